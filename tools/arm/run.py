"""Compiles the engine for aarch64 and tests it on this machine, under qemu's user emulation.

    python tools/arm/run.py BUILD [bits] [test files ...] [-- arguments of pytest]

Makes an arm64 Python with NumPy and pytest (once) and the package for it, and tells what its
kernels multiply and add with. `bits` writes results of this machine and compares those of aarch64
with them, bit by bit; test files run on aarch64.

Needs Debian's packages g++-aarch64-linux-gnu and qemu-user, and this Python to have cmake, ninja,
nanobind and the package itself. All that is fetched goes to BUILD/arm and nothing is installed: no
root is needed, and apt's own lists and settings stay as they are.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What is needed, and the Debian package that has it.
PROGRAMS = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "aarch64-linux-gnu-objdump": "binutils-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
}
# Debian's default Python, its headers, and the C++ library. Their dependencies come along.
PACKAGES = ["python3", "libpython3-dev", "libstdc++6"]
PLATFORMS = ["manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64"]
# With NEON and without SVE: emulated, SVE made the products of NumPy's OpenBLAS ten times slower.
PROCESSOR = "cortex-a76"
# A minute's pause of an emulated thread is no hang.
PYTEST = ["-q", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=1800"]
# What is left out, and why.
LEFT_OUT = {
    "32_bits_count": "minutes each, over billions of numbers",
    "a_forked_child_computes_the_same": "the emulator ends where a forked child starts a thread",
}


def run(*command, **options):
    subprocess.run([str(part) for part in command], check=True, **options)


def missing():
    """Return the Debian packages whose programs are not there."""
    return [package for program, package in PROGRAMS.items() if not shutil.which(program)]


class Arm:
    """What lies in BUILD/arm."""

    def __init__(self, build):
        self.home = Path(build).resolve() / "arm"
        self.sysroot = self.home / "sysroot"
        self.python = self.home / "venv/bin/python"  # a script that looks like a Python of aarch64
        self.package = self.home / "package"
        self.results = self.home / "results"

    # ---- an arm64 Python ----

    def unpack(self):
        """Download Debian's arm64 Python with all that it needs, and unpack it."""
        apt = self.home / "apt"
        for folder in ("state/lists/partial", "cache/archives/partial"):
            (apt / folder).mkdir(parents=True, exist_ok=True)
        (apt / "status").touch()  # nothing is installed, so every dependency is downloaded
        config = apt / "apt.conf"
        config.write_text(
            f'APT::Architecture "arm64";\n'
            f'APT::Architectures {{ "arm64"; }};\n'
            f'APT::Install-Recommends "false";\n'
            f'APT::Keep-Downloaded-Packages "true";\n'
            f'Acquire::Languages "none";\n'
            f'Dir::State "{apt}/state";\n'
            f'Dir::State::status "{apt}/status";\n'
            f'Dir::Cache "{apt}/cache";\n',
            encoding="utf-8",
        )
        environment = os.environ | {"APT_CONFIG": str(config)}
        run("apt-get", "-qq", "update", env=environment)
        fetch = ["apt-get", "-qq", "--yes", "--download-only", "install"]
        run(*fetch, *PACKAGES, env=environment, stdout=subprocess.DEVNULL)
        shutil.rmtree(self.sysroot, ignore_errors=True)
        self.sysroot.mkdir()
        for archive in sorted((apt / "cache/archives").glob("*.deb")):
            run("dpkg-deb", "--extract", archive, self.sysroot)
        # A newer Debian has all under /usr, and this link from a package's script.
        if not (self.sysroot / "lib").exists():
            (self.sysroot / "lib").symlink_to("usr/lib")

    def make_environment(self):
        """Make a virtual environment whose Python is emulated, with NumPy and pytest."""
        binary = (self.sysroot / "usr/bin/python3").resolve()
        version = binary.name.removeprefix("python")
        site = self.home / f"venv/lib/python{version}/site-packages"
        shutil.rmtree(self.home / "venv", ignore_errors=True)
        self.python.parent.mkdir(parents=True)
        # -0: `sys.executable` is this script then, and what a test starts is emulated too.
        self.python.write_text(
            f'#!/bin/sh\nexec qemu-aarch64 -cpu {PROCESSOR} -L "{self.sysroot}" -0 "$0" '
            f'"{binary}" "$@"\n',
            encoding="utf-8",
        )
        self.python.chmod(0o755)
        config = f"home = {binary.parent}\ninclude-system-site-packages = false\n"
        (self.home / "venv/pyvenv.cfg").write_text(config, encoding="utf-8")
        run(
            *(sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"),
            *("--target", site, "--only-binary=:all:", "--implementation", "cp"),
            *("--python-version", version),
            *(word for platform in PLATFORMS for word in ("--platform", platform)),
            *("-c", ROOT / "constraints.txt", "numpy", "pytest", "hypothesis"),
        )

    def prepare(self):
        """Make the arm64 Python, unless it is there."""
        constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
        wanted = "\n".join([PROCESSOR, *PACKAGES, *PLATFORMS, constraints])
        done = self.home / "python.stamp"
        if not done.exists() or done.read_text(encoding="utf-8") != wanted:
            self.unpack()
            self.make_environment()
            done.write_text(wanted, encoding="utf-8")

    # ---- the package ----

    def compile(self):
        """Compile the extension module, and put the package together."""
        tools = {"PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])}
        nanobind = subprocess.run(
            [sys.executable, "-m", "nanobind", "--cmake_dir"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        folder = self.home / "cmake"
        run(
            *("cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, "--log-level=WARNING"),
            f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'tools/arm/toolchain.cmake'}",
            f"-DOSTINATO_SYSROOT={self.sysroot}",
            f"-DPython_EXECUTABLE={self.python}",
            f"-Dnanobind_DIR={nanobind}",
            "-DOSTINATO_WERROR=ON",
            env=os.environ | tools,
        )
        run("cmake", "--build", folder, "--target", "_core", env=os.environ | tools)
        shutil.rmtree(self.package, ignore_errors=True)
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / "src/ostinato", self.package / "ostinato", ignore=ignored)
        (module,) = folder.glob("_core*.so")
        shutil.copy(module, self.package / "ostinato")

    def show_kernels(self):
        """Count what the kernels multiply and add with; a call of the C library is an error."""
        objects = sorted((self.home / "cmake").glob("**/ostinato_*_*.dir/**/*.o"))
        counts, called = Counter(), set()
        for path in objects:
            counts += instructions(path)
            called |= undefined(path) & {"fma", "fmaf"}
        print(
            f"{len(objects)} kernel objects: "
            + ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
            + f"; calls of the C library's fma: {sorted(called) or 'none'}"
        )
        if called or not all(counts[f"fmla of {shape}"] for shape in ("4s", "2d")):
            sys.exit("tools/arm/run.py: the kernels do not multiply and add by NEON's fmla")

    # ---- tests ----

    def emulated(self, *arguments):
        """Run the arm64 Python with the package and the tests in sight."""
        paths = os.pathsep.join([str(self.package), str(ROOT / "tests")])
        # OpenBLAS would start a thread for every core and let them spin.
        environment = {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"}
        run(self.python, *arguments, env=os.environ | environment, cwd=ROOT)

    def bits(self):
        """Write this machine's results, and compare those of aarch64."""
        shutil.rmtree(self.results, ignore_errors=True)
        script = ("-m", "support.architectures")
        paths = os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
        here = os.environ | {"PYTHONPATH": paths}
        run(sys.executable, *script, "write", self.results, env=here)
        self.emulated(*script, "check", self.results)

    def tests(self, files, arguments):
        """Run test files, but for the tests that emulation cannot."""
        for name, reason in LEFT_OUT.items():
            print(f"left out: {name}: {reason}", flush=True)
        chosen = f"not ({' or '.join(LEFT_OUT)})"
        self.emulated("-m", "pytest", *PYTEST, "-k", chosen, *files, *arguments)


def instructions(path):
    """Count the fused multiply-adds of an object file by the shape of their registers."""
    text = subprocess.run(
        ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", path],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = re.findall(r"\t(fml[as])\tv\d+\.(\w+)|\t(fn?m(?:add|sub))\t", text)
    return Counter(scalar or f"{name} of {shape}" for name, shape, scalar in found)


def undefined(path):
    """Return the names that an object file takes from elsewhere."""
    text = subprocess.run(
        ["aarch64-linux-gnu-nm", "--undefined-only", path],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return {line.split()[-1] for line in text.splitlines()}


def main():
    """Do what is asked for; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", metavar="BUILD")
    parser.add_argument("parts", nargs="*", help="bits, and files of tests/")
    own, pytest_arguments = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, pytest_arguments = own[:at], own[at + 1 :]
    arguments = parser.parse_args(own)
    if packages := missing():
        print(
            "tools/arm/run.py: needs Debian's packages "
            f"{' '.join(packages)}: as root, apt-get install {' '.join(packages)}",
            file=sys.stderr,
        )
        return 1
    arm = Arm(arguments.folder)
    files = [part for part in arguments.parts if part != "bits"]
    try:
        arm.prepare()
        arm.compile()
        arm.show_kernels()
        if "bits" in arguments.parts:
            arm.bits()
        if files:
            arm.tests(files, pytest_arguments)
    except subprocess.CalledProcessError as error:
        return error.returncode or 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
