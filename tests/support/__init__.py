"""What tests share. No test imports another one, or conftest.py (tests/test_structure.py).

Each module says in its first sentence what it is; docs/architecture.md lists them. cells, calls,
engine, faces, equations, tolerances, storage, poison, cpu_alone and architectures do without torch.
"""
