r"""Builds and tests the package on every Python of this machine: wheel, engine, NumPy, torch.

    python tools/test_versions.py BUILD --tests "tests/test_core.py ..." [--pythons "3.10 3.13"] \
        [--torch "3.13"] -- pytest's arguments

--tests    what runs without torch
--pythons  "all" (default); "ends": the oldest and the newest but for the one that runs this; or
           versions. One that is missing is named, and fails only if it was asked for.
--torch    for which Pythons torch is installed, and what needs it tested too: versions, "none",
           or "here" (default): only for BUILD/venv's, whose torch lies there already. Others cost a
           download, of gigabytes where the index has torch with CUDA alone.
"""

import argparse
import sys
import time
from pathlib import Path

import pythons

# The fast path, the operators and the modules.
TORCH_TESTS = ["tests/test_fast_path.py", "tests/test_ops.py", "tests/test_nn.py"]


def torch_pin() -> str:
    lines = (pythons.ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torch=="))


def try_python(
    python: pythons.Python, build: Path, tests: list[str], torch: str, arguments: list[str]
) -> str:
    """Builds and tests on one Python; returns a line about it.

    torch: "there" where BUILD/venv has it for this Python, "install", or "" to do without.
    """
    start = time.monotonic()
    folder = build / "versions" / python.minor
    environment = pythons.Environment(python, folder / "venv")
    wheel = pythons.build_wheel(environment, pythons.ROOT, folder / "wheel", OSTINATO_WERROR="ON")
    built = time.monotonic()
    environment.install(wheel, "pytest", "hypothesis")
    environment.run("-m", "ostinato", "info")
    environment.run("-m", "pytest", "-q", *tests, *arguments)
    done = "engine and NumPy pass"
    if torch == "there":
        own, target = build / "venv" / "bin" / "python", folder / "torch"
        install = ["install", "--no-deps", "--upgrade", "--target", target, wheel]
        pythons.run([own, "-m", "pip", *pythons.PIP, *install])
        command = [own, "-m", "pytest", "-q", *TORCH_TESTS, *arguments]
        pythons.run(command, PYTHONPATH=str(target.resolve()))
    elif torch == "install":
        environment.install(torch_pin())
        environment.run("-m", "pytest", "-q", *TORCH_TESTS, *arguments)
    if torch:
        done += ", torch passes"
    seconds = f"{built - start:.0f} s to build, {time.monotonic() - built:.0f} s to test"
    size = f"{wheel.stat().st_size / 2**20:.2f} MiB"
    return f"Python {python.minor}: {wheel.name} ({size}), {seconds}; {done}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Build and test on every Python of this machine.")
    parser.add_argument("build", type=Path)
    parser.add_argument("--tests", required=True)
    parser.add_argument("--pythons", default="all")
    parser.add_argument("--torch", default="here")
    own_arguments, for_pytest = pythons.split_arguments(sys.argv[1:])
    options = parser.parse_args(own_arguments)
    usable, notes = pythons.find()
    own = pythons.ask(str(options.build / "venv" / "bin" / "python"))
    current = f"3.{sys.version_info.minor}" if options.pythons == "ends" else ""
    chosen = pythons.select(usable, options.pythons, current)
    with_torch = {}
    if options.torch == "here" and own:
        with_torch = {own.minor: "there"}
    elif options.torch not in ("here", "none"):
        names = [python.minor for python in pythons.select(usable, options.torch)]
        with_torch = {name: "there" if own and own.minor == name else "install" for name in names}
    print(*notes, sep="\n")
    lines = []
    for python in chosen:
        print(f"==> {python.path}", flush=True)
        torch = with_torch.get(python.minor, "")
        tests = options.tests.split()
        lines.append(try_python(python, options.build, tests, torch, for_pytest))
        if not torch:
            lines[-1] += ", torch not tried"
    print("", *notes, *(lines or ["no other Python to try"]), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
