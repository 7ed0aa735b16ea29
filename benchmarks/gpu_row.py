"""One row of the GPU's benchmark: the layers, the check of their numbers, and their times."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import micro
import torch
from gpu_cases import GpuCase
from gpu_report import OURS, PEER
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}
# A participant is right if its relative error is below this or three times torch.nn's: a rounding
# of the precision, in fp32 and tf32 as it grows over the steps.
ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11, "tf32": 2.0**-11, "fp32": 2.0**-19}
# Seconds of a sample at least, and rounds at least and at most.
SAMPLE, ROUNDS = 3e-3, (7, 31)
# A call shorter than this is timed as a CUDA graph too: there its launches show.
GRAPH_BELOW = 1e-3
# What a row may fail with; torch.OutOfMemoryError is a RuntimeError.
FAILURES = (torch.OutOfMemoryError, RuntimeError, ValueError, micro.cuda_error())

Call = Callable[[], list[torch.Tensor]]
Sample = Callable[[Callable[[], Any], int], float]


def sample_by_events(call: Callable[[], Any], calls: int) -> float:
    """Seconds of a call on the GPU, by events around several of them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Not timed: it keeps the GPU busy while the first timed call is launched, and warms the caches.
    call()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def turns(
    calls: dict[str, Callable[[], Any]], sample: Sample, seconds: float
) -> dict[str, list[float]]:
    """Time several calls in turns, one sample each in every round.

    Args:
        calls: what is timed, by name.
        sample: seconds of a call, given it and how often to call it.
        seconds: how long to go on for each of them, within ROUNDS.

    Returns:
        Seconds per call, one for each round, by name.
    """
    # The first call compiles, chooses kernels and allocates.
    for call in calls.values():
        sample(call, 1)
    one = {
        name: statistics.median(sample(call, 1) for _ in range(3)) for name, call in calls.items()
    }
    repeats = {name: max(1, min(200, int(SAMPLE / max(t, 1e-7)))) for name, t in one.items()}
    # One call more than are timed.
    a_round = sum(one[name] * (repeats[name] + 1) for name in calls)
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(seconds * len(calls) / max(a_round, 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(sample(call, repeats[name]))
    return samples


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")


# ---- a row's participants ----


def allow_tf32(allowed: bool) -> str:
    """Let cuDNN's recurrent layers round float32 to TensorFloat-32, or not; return the API's name.

    torch 2.9 has a setting for each operator. The old one is set first and the new ones agree with
    it, because reading it raises where convolutions and recurrent layers differ. Matrix products
    keep their own setting.
    """
    cudnn: Any = torch.backends.cudnn
    cudnn.allow_tf32 = allowed
    if not hasattr(cudnn.rnn, "fp32_precision"):
        return "allow_tf32"
    for part in (cudnn.rnn, cudnn.conv):
        part.fp32_precision = "tf32" if allowed else "ieee"
    return "rnn.fp32_precision"


def flatten(module: torch.nn.RNNBase) -> None:
    """Lay parameters out as cuDNN wants them, in bfloat16 too.

    torch's operator takes cuDNN for bfloat16 from 9.13 on, but its flatten_parameters leaves that
    type out (2.13), so that each call copies the weights. The stronger rival is the one without.
    """
    known = torch.backends.cudnn.CUDNN_TENSOR_DTYPES
    parameter = next(module.parameters())
    served = parameter.is_cuda and (torch.backends.cudnn.version() or 0) >= 91300
    if not served or parameter.dtype != torch.bfloat16 or torch.bfloat16 in known:
        return
    known.add(torch.bfloat16)
    try:
        # Where cuDNN refuses, torch.nn stays as its users have it.
        with contextlib.suppress(RuntimeError):
            module.flatten_parameters()
    finally:
        known.discard(torch.bfloat16)


def build(case: GpuCase, library: Any, device: str, dtype: torch.dtype) -> torch.nn.RNNBase:
    """Return the layer of a library."""
    options = {"num_layers": case.layers, "bidirectional": case.form == "bidirectional"}
    layer = getattr(library, case.cell)
    return layer(case.hidden, case.hidden, **options, device=device, dtype=dtype)


def draw_input(case: GpuCase, device: str, dtype: torch.dtype) -> Any:
    """Return an input, padded or packed, whose numbers want a gradient in training."""
    with torch.no_grad():
        x = torch.randn(case.steps, case.batch, case.hidden, device=device).to(dtype)
        if case.form == "packed":
            x = pack_padded_sequence(x, torch.tensor(case.lengths()))
    data_of(x).requires_grad_(case.train)
    return x


def data_of(x: Any) -> torch.Tensor:
    """The numbers of a padded or packed batch."""
    return x.data if isinstance(x, PackedSequence) else x


def make_call(module: torch.nn.Module, x: Any, seed: torch.Tensor | None) -> Call:
    """Return what is checked and timed: the output, and with a seed every gradient."""
    if seed is None:
        return lambda: [data_of(module(x)[0])]
    wanted = [*module.parameters(), data_of(x)]

    def training() -> list[torch.Tensor]:
        output = data_of(module(x)[0])
        return [output, *torch.autograd.grad(output, wanted, seed)]

    return training


def relative_errors(actual: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    """Norm of each difference over the norm of the exact result; infinite where not finite."""
    found = []
    for a, e in zip(actual, exact, strict=True):
        error = float((a.detach().double() - e).norm() / e.norm().clamp_min(1e-30))
        found.append(error if error < float("inf") else float("inf"))
    return found


def compare_numbers(
    case: GpuCase, row: dict[str, Any], calls: dict[str, Call], exact: Call
) -> None:
    """Record everyone's error against float64, and drop from `calls` who failed or is wrong."""
    expected = [tensor.detach() for tensor in exact()]
    # Torch.nn comes first and sets the limits of ours, if it is right itself.
    limits = [ROUNDING[case.precision]] * len(expected)
    for name in list(calls):
        with attempt(row, name):
            errors = relative_errors(calls[name](), expected)
            row["relative_error"][name] = {"output": errors[0]}
            if case.train:
                row["relative_error"][name]["gradients"] = max(errors[1:])
            finite = max(errors) < float("inf")
            if name == PEER and finite:
                limits = [max(3 * e, limit) for e, limit in zip(errors, limits, strict=True)]
            if not finite or any(e > limit for e, limit in zip(errors, limits, strict=True)):
                told = ", ".join(f"{e:.1e}" for e in errors)
                most = ", ".join(f"{limit:.1e}" for limit in limits)
                raise ValueError(f"expected relative errors up to {most}, got {told}")
        if name in row["failed"]:
            del calls[name]


@contextlib.contextmanager
def attempt(row: dict[str, Any], who: str) -> Iterator[None]:
    """Make a failure an entry of the row."""
    try:
        yield
    except FAILURES as error:
        row["failed"][who] = f"{type(error).__name__}: {(str(error) or 'no text').splitlines()[0]}"


# ---- a row ----


def ours(peer_only: bool, default: bool) -> contextlib.AbstractContextManager[None]:
    """Run our kernels wherever they fit: what is found so is what the library chooses by.

    With `default` nothing is forced: what is found so is what a user gets.
    """
    if peer_only or default:
        return contextlib.nullcontext()
    from ostinato.cuda.choice import forced

    return forced(True)


def measure(
    case: GpuCase,
    sample: Sample = sample_by_events,
    device: str = "cuda",
    seconds: float = 0.15,
    peer_only: bool = False,
    kernels: bool = False,
    default: bool = False,
) -> dict[str, Any]:
    """Check and time one case.

    Args:
        case: the case.
        sample: seconds of a call.
        device: where; tests take the CPU.
        seconds: for each participant.
        peer_only: torch.nn alone.
        kernels: record the names of the kernels that ran.
        default: let the library choose between our kernels and torch's, by trials too.

    Returns:
        The row; what failed stands under "failed" by name.
    """
    row: dict[str, Any] = case.sizes() | {"relative_error": {}, "failed": {}}
    allow_tf32(case.precision == "tf32")
    torch.manual_seed(0)
    with ours(peer_only, default), torch.set_grad_enabled(case.train), attempt(row, "row"):
        layers, x, seed = prepare(case, row, device, peer_only)
        calls = {name: make_call(layer, x, seed) for name, layer in layers.items()}
        exact = exact_call(case, layers[PEER], x, seed, device)
        compare_numbers(case, row, calls, exact)
        del exact
        if calls:
            row |= figures(turns(calls, sample, seconds), case.steps)
            if device == "cuda":
                graphs(row, calls, sample)
        if OURS in layers:
            explain(row, layers[OURS], x)
        if kernels:
            row["kernels"] = {name: kernel_names(call) for name, call in calls.items()}
    if device == "cuda" and row["failed"]:
        # What an exception held is free now.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
    return row


def prepare(
    case: GpuCase, row: dict[str, Any], device: str, peer_only: bool
) -> tuple[dict[str, torch.nn.RNNBase], Any, torch.Tensor | None]:
    """Build the layers with the same parameters, the input, and the seed of backward."""
    dtype = DTYPES[case.precision]
    layers = {PEER: build(case, torch.nn, device, dtype)}
    flatten(layers[PEER])
    if not peer_only:
        with attempt(row, OURS):
            from ostinato import nn

            layers[OURS] = build(case, nn, device, dtype)
            layers[OURS].load_state_dict(layers[PEER].state_dict())
    x = draw_input(case, device, dtype)
    if not case.train:
        return layers, x, None
    width = case.hidden * (2 if case.form == "bidirectional" else 1)
    seed = torch.randn(*data_of(x).shape[:-1], width, device=device).to(dtype)
    return layers, x, seed


def exact_call(
    case: GpuCase, layer: torch.nn.RNNBase, x: Any, seed: torch.Tensor | None, device: str
) -> Call:
    """The same call in float64, of the rounded parameters and input."""
    exact = build(case, torch.nn, device, torch.float64)
    exact.load_state_dict(layer.state_dict())
    data = data_of(x).detach().double().requires_grad_(case.train)
    wide = x._replace(data=data) if isinstance(x, PackedSequence) else data
    return make_call(exact, wide, None if seed is None else seed.double())


def figures(samples: dict[str, list[float]], steps: int) -> dict[str, Any]:
    """Quartiles of microseconds and of torch.nn / ours, round by round."""
    times = {name: quartiles([s * 1e6 for s in values]) for name, values in samples.items()}
    found: dict[str, Any] = {
        "microseconds": times,
        "us_per_step": {name: median / steps for name, (_, median, _) in times.items()},
        "rounds": len(next(iter(samples.values()))),
    }
    if PEER in samples and OURS in samples:
        pairs = zip(samples[PEER], samples[OURS], strict=True)
        found["ratio"] = quartiles([theirs / ours for theirs, ours in pairs])
    return found


def graphs(row: dict[str, Any], calls: dict[str, Call], sample: Sample) -> None:
    """Time short forward calls as CUDA graphs, where they can be captured."""
    shortest = min(median for _, median, _ in row["microseconds"].values())
    if row["kind"] != "forward" or shortest > GRAPH_BELOW * 1e6:
        return
    replays: dict[str, Callable[[], Any]] = {}
    row["graph"] = {}
    for name, call in calls.items():
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            replays[name] = graph.replay
        except FAILURES as error:
            row["graph"].setdefault("failed", {})[name] = str(error).partition("\n")[0]
    if replays:
        row["graph"] |= figures(turns(replays, sample, 0), row["steps"])


def explain(row: dict[str, Any], layer: torch.nn.Module, x: Any) -> None:
    """Record which kernel of ours ran, where the library can tell."""
    from ostinato import cuda

    tell = getattr(cuda, "explain", None)
    if tell is not None:
        with attempt(row, "explain"):
            row["kernel"] = str(tell(layer, x))


def kernel_names(call: Callable[[], Any]) -> list[str]:
    """The kernels that took the most time in a call, with their numbers of launches."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            call()
            torch.cuda.synchronize()
    except RuntimeError as error:
        return [f"not known: {error}"]
    events = sorted(found.key_averages(), key=lambda e: e.self_device_time_total, reverse=True)
    return [f"{e.count} x {e.key[:80]}" for e in events if e.self_device_time_total > 0][:5]
