"""The Pythons of this machine that the package is for, and empty environments of them.

    python tools/pythons.py

lists them: pyenv's, those on PATH, and the one that runs this.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Minor versions of Python 3: pyproject.toml's oldest, and the newest to be named if it is missing.
OLDEST, NEWEST = 10, 14

# What the package cannot do without, asked of an interpreter itself.
PROBE = """
import importlib.util, json, os, sys, sysconfig
lacks = []
if sys.implementation.name != "cpython":
    lacks.append("it is not CPython")
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    lacks.append("it has no GIL")
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    lacks.append("no headers")
if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
    lacks.append("no venv")
print(json.dumps([list(sys.version_info[:3]), os.path.realpath(sys.executable), lacks]))
"""


@dataclass(frozen=True)
class Python:
    version: tuple[int, int, int]
    path: str
    lacks: tuple[str, ...] = ()

    @property
    def minor(self) -> str:
        return "{}.{}".format(*self.version)


def candidates() -> list[str]:
    """Every interpreter there might be, by path; not all of them run."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    paths = [sys.executable, *map(str, sorted(pyenv.glob("versions/*/bin/python")))]
    folders = [Path(folder) for folder in os.get_exec_path()]
    names = ["python3", *(f"python3.{minor}" for minor in range(OLDEST, 30))]
    return paths + [str(folder / name) for name in names for folder in folders]


def ask(path: str) -> Python | None:
    """Asks an interpreter about itself; None where it does not run (a shim of pyenv's, say)."""
    try:
        answer = subprocess.run(
            [path, "-I", "-c", PROBE], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    version, real, lacks = json.loads(answer.stdout)
    return Python(tuple(version), real, tuple(lacks))


def best(found: Iterable[Python]) -> list[Python]:
    """One of each minor version from the oldest on: what lacks least, then what is newest."""
    chosen: dict[str, Python] = {}
    for python in found:
        if python.version < (3, OLDEST):
            continue
        other = chosen.get(python.minor)
        # The first of equals stays: the one that runs this comes first.
        if other is None or (not other.lacks, other.version) < (not python.lacks, python.version):
            chosen[python.minor] = python
    return sorted(chosen.values(), key=lambda python: python.version)


def find() -> tuple[list[Python], list[str]]:
    """Returns what can be used, and a line about each that cannot or is missing."""
    existing = {path for path in candidates() if os.access(path, os.X_OK)}
    ordered = [path for path in dict.fromkeys(candidates()) if path in existing]
    found = best(python for path in ordered if (python := ask(path)))
    minors = {python.minor for python in found}
    notes = [f"{p.path}: not used: {', '.join(p.lacks)}" for p in found if p.lacks]
    missing = [f"3.{minor}" for minor in range(OLDEST, NEWEST + 1)]
    notes += [f"Python {minor}: not on this machine" for minor in missing if minor not in minors]
    return [python for python in found if not python.lacks], notes


def select(pythons: list[Python], wanted: str, without: str = "") -> list[Python]:
    """Chooses by words: "all", "ends" (the oldest and the newest), or versions like "3.10 3.13".

    Raises:
        ValueError: a version is named that `pythons` does not hold.
    """
    if wanted not in ("all", "ends"):
        known = {python.minor: python for python in pythons}
        if unknown := set(wanted.split()) - set(known):
            raise ValueError(f"no Python {', '.join(sorted(unknown))} here; there is {list(known)}")
        return [known[minor] for minor in wanted.split()]
    left = [python for python in pythons if python.minor != without]
    return left if wanted == "all" or len(left) < 3 else [left[0], left[-1]]


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Splits at the first "--"."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


class Environment:
    """An empty virtual environment; what it runs finds nothing of the one that runs this."""

    def __init__(self, python: Python, folder: Path):
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([python.path, "-I", "-m", "venv", folder], check=True)
        self.python = folder.resolve() / "bin" / "python"

    def run(self, *arguments: str | Path, path: str | None = None, **variables: str) -> None:
        """Runs its python in the project's folder; `path` replaces PATH."""
        run([self.python, *arguments], path=path, **variables)

    def install(self, *arguments: str | Path, path: str | None = None) -> None:
        self.run(
            "-m", "pip", *PIP, "install", "-c", ROOT / "constraints.txt", *arguments, path=path
        )


PIP = ("--disable-pip-version-check", "--quiet")


def run(command: list[str | Path], path: str | None = None, **variables: str) -> None:
    """Runs a command in the project's folder, without this process's own Python variables."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME")
    }
    environment |= variables | ({"PATH": path} if path else {})
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def build_wheel(environment: Environment, source: Path, folder: Path, **defines: str) -> Path:
    """Builds a wheel as pip does for a user, in isolation, and shows how it goes."""
    shutil.rmtree(folder, ignore_errors=True)
    settings = [f"--config-settings=cmake.define.{name}={value}" for name, value in defines.items()]
    pip = [environment.python, "-m", "pip", *PIP[:1], "wheel", "-v", "--no-deps"]
    log = folder.parent / f"{folder.name}.log"
    command = [*pip, "--wheel-dir", folder, *settings, source]
    run(
        [sys.executable, ROOT / "tools" / "progress.py", log, *command],
        PIP_CONSTRAINT=str(ROOT / "constraints.txt"),
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


if __name__ == "__main__":
    usable, remarks = find()
    for python in usable:
        print("{}.{}.{}".format(*python.version), python.path)
    print(*remarks, sep="\n")
