"""`python -m ostinato info`: what this installation has and what it would use."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.util import find_spec

import numpy

from ostinato import __version__, _core


def info() -> dict[str, str]:
    """Describe this installation.

    Returns:
        One line per entry: versions, instruction sets of this processor with the one in use, and
        the threads that a call from torch and from NumPy may take.

    Raises:
        ImportError: torch is installed but cannot be imported.

    Example:
        >>> from ostinato.__main__ import info
        >>> "ostinato" in info()
        True
    """
    # As `ostinato.numpy` and `ostinato.ops` count them.
    threads = {"NumPy": len(os.sched_getaffinity(0))}
    torch_version = "not installed (pip install ostinato[torch])"
    if find_spec("torch"):
        import torch

        threads["torch"] = torch.get_num_threads()
        torch_version = torch.__version__
    return {
        "ostinato": __version__,
        "python": f"{platform.python_version()} on {platform.machine()}",
        "numpy": numpy.__version__,
        "torch": torch_version,
        "instruction sets": ", ".join(_core.instruction_sets()),
        "in use": _core.isa() + (" (OSTINATO_ISA)" if os.environ.get("OSTINATO_ISA") else ""),
        "threads": f"{_core.forced_threads} (OSTINATO_NUM_THREADS)"
        if _core.forced_threads
        else ", ".join(f"{count} from {caller}" for caller, count in threads.items()),
    }


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name; None: those of this process.

    Returns:
        The exit status.

    Raises:
        SystemExit: the arguments are wrong, or ask for help.
    """
    parser = argparse.ArgumentParser(prog="python -m ostinato", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("info", help="versions, instruction sets and threads")
    parser.parse_args(argv)

    lines = info()
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
