"""`python -m ostinato`: what this installation has and would use, and what a shape would gain."""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
from collections.abc import Callable
from importlib.util import find_spec

import numpy

from ostinato import __version__
from ostinato.cells import LAYERS


def info() -> dict[str, str]:
    """Describe this installation, one line per entry.

    These are versions, instruction sets of this processor with the one in use, and the threads that
    a call from torch and from NumPy may take. Raises ImportError where torch is installed but
    cannot be imported.

    Example:
        >>> from ostinato.__main__ import info
        >>> "ostinato" in info()
        True
    """
    from ostinato import _core

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
    """Run one command, by the arguments after the program's name; None: those of this process.

    Returns the exit status. Raises SystemExit where the arguments are wrong, or ask for help.
    """
    parser = argparse.ArgumentParser(prog="python -m ostinato", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("info", help="versions, instruction sets and threads")
    bench = commands.add_parser("bench", help="our layer beside torch.nn's, for a shape of yours")
    _add_shape(bench)
    bench.add_argument("--threads", type=_size, help="default: as many as torch takes")
    bench.add_argument(
        "--seconds", type=_duration, default=2.0, help="to measure each of the two for; %(default)s"
    )
    arguments = parser.parse_args(argv)
    try:
        from ostinato import _core  # noqa: F401  reads the environment
    except ImportError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    if arguments.command == "bench":
        if arguments.steps == 0 and (arguments.layers > 1 or arguments.bidirectional):
            parser.error("--layers and --bidirectional need --steps of 1 or more")
        return _bench(arguments)

    lines = info()
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")
    return 0


def _add_shape(bench: argparse.ArgumentParser) -> None:
    """Add the options that say which layer, and on what input."""
    bench.add_argument(
        "--cell", choices=list(LAYERS), default="gru", help="which layer; %(default)s"
    )
    for name, default, what in (
        ("--input-size", 128, "features of an input step"),
        ("--hidden-size", 128, "features of a state"),
        ("--batch", 1, "sequences at once"),
        ("--layers", 1, "layers, each over the output of the one before"),
    ):
        bench.add_argument(name, type=_size, default=default, help=f"{what}; %(default)s")
    bench.add_argument(
        "--steps",
        type=_count,
        default=100,
        help="steps of a sequence; 0: one step of the cell; %(default)s",
    )
    bench.add_argument("--bidirectional", action="store_true", help="run from both ends")
    bench.add_argument(
        "--train", action="store_true", help="forward and backward; without: inference"
    )


def _number(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"expected {least} or more, got {value}")
    return value


def _count(text: str) -> int:
    return _number(text, 0)


def _size(text: str) -> int:
    return _number(text, 1)


def _duration(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected more than 0, got {text}")
    return value


def _bench(arguments: argparse.Namespace) -> int:
    """Measure one shape and print what it gains."""
    if not find_spec("torch"):
        print("bench compares with torch.nn: pip install ostinato[torch]", file=sys.stderr)
        return 1
    import torch

    from ostinato import _core
    from ostinato.bench import Shape, gain, is_doubtful, is_out_of_memory, least_bytes

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    shape = Shape(
        arguments.cell,
        arguments.input_size,
        arguments.hidden_size,
        arguments.batch,
        arguments.steps,
        arguments.layers,
        arguments.bidirectional,
        arguments.train,
    )
    needed, there = least_bytes(shape), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        print(
            f"bench: at least {_gib(needed)} are needed, and {_gib(there)} there", file=sys.stderr
        )
        return 1
    try:
        found = gain(shape, arguments.seconds, _progress())
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            f"bench: the memory is not enough: at least {_gib(needed)} are needed", file=sys.stderr
        )
        return 1
    low, median, high = found.ratio
    what = "forward and backward" if shape.train else "inference"
    print(f"{what}, float32, {torch.get_num_threads()} threads, {_core.isa()}")
    print(f"torch.nn {torch.__version__:<16}{found.torch_us:12.1f} us")
    print(f"ostinato {__version__:<16}{found.ostinato_us:12.1f} us")
    print(f"torch.nn / ostinato      {median:12.2f}    (quartiles {low:.2f} to {high:.2f})")
    print(f"outputs differ by at most {found.difference:.1e}")
    if is_doubtful(found.ratio):
        print(
            "The quartiles are far apart: the machine had other work. Do not trust this ratio; "
            "measure again when it is quiet, or with more --seconds."
        )
    return 0


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB of memory"


def _progress() -> Callable[[int, int], None] | None:
    """Return what draws a bar of tqdm's, which the extra `bench` brings."""
    if not find_spec("tqdm"):
        print("pip install ostinato[bench] for a progress bar", file=sys.stderr)
        return None
    from tqdm import tqdm

    bar = tqdm(unit="round", leave=False)

    def show(done: int, rounds: int) -> None:
        bar.total = rounds
        bar.update(done - bar.n)
        if done == rounds:
            bar.close()

    return show


if __name__ == "__main__":
    raise SystemExit(main())
