"""What tests share. No test imports another one, or conftest.py (tests/test_structure.py).

- cells: which cells, layers and modules the tests go through; those that torch.nn has.
- calls: the one way to draw a call, and seeds.
- samples: such a call as torch's tensors, for the operators.
- engine: such a call as addresses, for the engine by itself; it runs by the equations too.
- emulation: such a call for the kernels of the GPU engine, which run on host fibers.
- pairs: the same module of both libraries, and arguments that suit it.
- faces: the functions of `ostinato.numpy`, and parameters for them.
- equations: docs/math.md in NumPy.
- tolerances: how near numbers must be, and comparisons by that.
- storage: 16-bit numbers in NumPy, and layers that are stored in them.
- poison: memory that shows what touches it.
- devices: what a test has to know of the device that it runs on (`--device`).
- cpu_alone: which tests are of the CPU alone.
- onnx_models: models to export, and what runs the result.
- architectures: a script that compares the bits of two machines.
- two_processes: a script that torchrun starts twice.

cells, calls, engine, faces, equations, tolerances, storage, poison, cpu_alone and architectures do
without torch.
"""
