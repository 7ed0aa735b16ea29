"""Says what a machine lacks for `make bench-gpu` and `make test-gpu`, which install nothing.

    python tools/gpu_ready.py

Exit status 1 if something is missing that the build or the run needs.
"""

import importlib.util
import shutil
import sys

# What each is for, and whether nothing works without it.
MODULES = {
    "torch": ("ostinato.nn and torch.nn, with CUDA", True),
    "numpy": ("ostinato", True),
    "scikit_build_core": ("builds the package without an isolated environment", True),
    "nanobind": ("the bindings of the CPU engine", True),
    "pytest": ("make test-gpu", False),
    "hypothesis": ("make test-gpu: the seeds in tests/conftest.py", False),
    "onnx": ("make test-gpu: tests of the reference", False),
    "expecttest": ("make test-gpu: torch's own table of module tests", False),
    "matplotlib": ("the pictures of make bench-gpu", False),
    "cuda.core": ("compiles and launches CUDA kernels", False),
}
PROGRAMS = {"g++": "compiles the CPU engine", "cmake": "drives it, 3.26 or later"}


def has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        # The package that it stands in.
        return False


def main() -> int:
    missing = []
    for module, (purpose, needed) in MODULES.items():
        if not has(module):
            print(f"{'missing' if needed else 'missing, optional'}: {module} ({purpose})")
            missing += [module] * needed
    for program, purpose in PROGRAMS.items():
        # The package of the name brings the program along.
        if not shutil.which(program) and not has(program):
            print(f"missing: {program} ({purpose})")
            missing.append(program)
    if not (shutil.which("ninja") or shutil.which("make")):
        print("missing: ninja or make (cmake runs one of them)")
        missing.append("ninja")
    if has("torch"):
        import torch

        if torch.cuda.is_available():
            print(f"torch {torch.__version__} sees {torch.cuda.get_device_name(0)}")
        else:
            print(f"torch {torch.__version__} sees no GPU: nothing can be measured")
    print(f"{sys.executable}: {'not ready' if missing else 'ready'}")
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main())
