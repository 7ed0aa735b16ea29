"""A trial: ours and torch's both run on the user's device, once, and the faster is kept.

It answers where nothing that ships was measured (`ostinato.cuda.choice`): at the first call of a
size, on random numbers of that call's shapes. First some steps of both are compared with the
reference in float64. Ours is refused where it is wrong or less exact than torch's. Then both are
timed, in turns, by events on the current stream.

Legend: T steps, B batch, H hidden, D directions, L layers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ostinato import __version__, reference_backend, torch_operator
from ostinato.call import Call, Parts, Results
from ostinato.cells import cell_of
from ostinato.cuda import choice, compiler, kept, launch
from ostinato.cuda.kept import Kept, Place
from ostinato.tensors import check_call, is_recorded, keeps

_log = logging.getLogger("ostinato")
_T = TypeVar("_T")

# By how much ours must be faster: less than that is noise.
_MARGIN = 1.03
# Seconds of a sample and of all samples; rounds at least and at most.
_SAMPLE, _BUDGET, _ROUNDS = 1e-3, 3e-2, (3, 9)
# Launches show in a call that is shorter than this. A graph that the user captures has none, so the
# device is timed without them too.
_SHORT = 5e-3
# Steps and states that are compared with float64, whose sums a small GPU is slow at.
_COMPARED_STEPS, _COMPARED_STATES = 32, 2**20
# Relative errors that rounding alone explains, as benchmarks/gpu_row.py has them.
_ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11, "tf32": 2.0**-11, "fp32": 2.0**-19}
# Ours is wrong where it errs by so much more than torch's, and less exact by so much more.
_WRONG, _LESS_EXACT = 3.0, 1.1


# ---- who wants trials ----

_is_on = True


class trials:
    """Let trials choose between our kernels and cuDNN, or not; for all threads.

    Without them what was measured before a release chooses alone: nothing is timed, and what
    earlier trials found is left aside. It takes effect where it is called. In a `with` statement it
    ends there.

    Args:
        enabled: whether trials are run, and their answers used.

    Example:
        >>> with trials(False):
        ...     pass  # here cuDNN runs on every device that the library has no measurements of
    """

    def __init__(self, enabled: bool) -> None:
        global _is_on
        self._before, _is_on = _is_on, enabled
        choice.changed()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        global _is_on
        _is_on = self._before
        choice.changed()


def is_on() -> bool:
    """Whether trials are wanted."""
    return _is_on


_asking = threading.local()


@contextlib.contextmanager
def only_asked() -> Iterator[None]:
    """Let this thread hear what is known, without a trial."""
    before = getattr(_asking, "is_on", False)
    _asking.is_on = True
    try:
        yield
    finally:
        _asking.is_on = before


# ---- what a trial asks of a device ----


class TrialDevice(Protocol):
    """A device, as a trial knows it; tests give recorded times."""

    @property
    def name(self) -> str:
        """What a user calls it."""

    @property
    def identity(self) -> str:
        """Stands for all that an answer depends on beside its place: device, driver, versions."""

    def is_capturing(self) -> bool:
        """Whether a graph records what runs now, or nobody may wait for the device."""

    def is_alive(self) -> bool:
        """Whether the device does what it is asked, after a trial has failed."""

    def alone(self, do: Callable[[], _T]) -> _T:
        """Do something on the current stream, out of sight of the caller's modes and hooks."""

    def ours(self, call: Call) -> Results:
        """Run a layer by our kernels."""

    def seconds(self, run: Callable[[], object], calls: int, is_queued: bool) -> float:
        """Time a call: as it is, or with all launches in the queue before the device begins."""


def past_dispatcher(call: Call) -> Results | None:
    """Run a layer past the dispatcher, or decline. `ostinato.fast_path` puts its own way here."""
    return None


class Gpu:
    """A GPU, by torch's index."""

    def __init__(self, index: int) -> None:
        self.index = index

    @functools.cached_property
    def name(self) -> str:
        """What torch calls it."""
        return torch.cuda.get_device_name(self.index)

    @functools.cached_property
    def identity(self) -> str:
        """The hash of the device, its driver, all versions, our kernels and what launches them."""
        properties = torch.cuda.get_device_properties(self.index)
        here = Path(__file__).parent
        parts = {
            "device": self.name,
            "capability": (properties.major, properties.minor),
            "processors": properties.multi_processor_count,
            "driver": _driver_release(),
            "torch": (torch.__version__, torch.version.cuda),
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "nvrtc": compiler.nvrtc_version(),
            "ostinato": __version__,
            "kernels": compiler.sources(compiler.text_folder()),
            "host": {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted([*here.glob("*.py"), *here.parent.glob("*.py")])
            },
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def is_capturing(self) -> bool:
        """Whether the current stream is being captured, or torch is told to refuse waits."""
        return torch.cuda.is_current_stream_capturing() or torch.cuda.get_sync_debug_mode() > 0

    def is_alive(self) -> bool:
        """Wait for the device, which says so if a kernel has broken it."""
        try:
            torch.cuda.synchronize(self.index)
        except RuntimeError:
            return False
        return True

    def alone(self, do: Callable[[], _T]) -> _T:
        """Do something on a new thread, where no mode, hook or region of the caller's stands.

        A checkpoint, for example, counts what its hooks see saved.
        """
        with ThreadPoolExecutor(1, "ostinato-trial") as pool:
            return pool.submit(self._here(do)).result()

    def _here(self, do: Callable[[], _T]) -> Callable[[], _T]:
        """Give a new thread this one's device and stream."""
        stream = torch.cuda.current_stream(self.index)

        def run() -> _T:
            with torch.cuda.device(self.index), torch.cuda.stream(stream):
                return do()

        return run

    def ours(self, call: Call) -> Results:
        """Run our kernels as the user's calls will, past the route, which would ask for a trial."""
        found = past_dispatcher(call)
        if found is not None:
            return found
        operator = torch.ops.ostinato.layer
        return call.returned(operator(*call.parameters(), call.all_states, keeps(call)))

    def seconds(self, run: Callable[[], object], calls: int, is_queued: bool) -> float:
        """Time by events; what is called first keeps the device busy until the first launch."""
        event: Any = torch.cuda.Event
        start, end = (event(enable_timing=True) for _ in range(2))
        began = time.perf_counter()
        run()
        if is_queued:
            launching = (time.perf_counter() - began) * calls
            # In cycles, of which a second has two billion or, the safe way, fewer.
            sleep: Any = torch.cuda._sleep
            sleep(int((1.5 * launching + 1e-4) * 2e9))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls


def _driver_release() -> tuple[str, tuple[int, int]]:
    """Name the driver: its release, where the system tells it, and what it serves of CUDA."""
    try:
        release = Path("/proc/driver/nvidia/version").read_text("utf-8").partition("\n")[0]
    except OSError:
        release = ""
    return release, launch.driver_version()


# ---- whether to try ----


def known(device: TrialDevice, place: Place) -> Kept | None:
    """Return what an earlier trial found."""
    return kept.of(device.identity, place) if _is_on else None


def known_of_layer(device: TrialDevice, layer: kept.Layer) -> Kept | None:
    """Return what earlier trials of a layer found, for a graph that takes any batch."""
    return kept.of_layer(device.identity, layer) if _is_on else None


_PLAIN = (Tensor, torch.nn.Parameter)


def why_not(call: Call, device: TrialDevice) -> str | None:
    """Say why no trial can be run now."""
    if not _is_on:
        return "trials are switched off (ostinato.cuda.trials)"
    if getattr(_asking, "is_on", False):
        return "a trial at the first call will say"
    if torch._C._current_graph_task_id() != -1:
        return "no trial during backward"
    if not all(t is None or type(t) in _PLAIN for t in call.tensors()):
        return "no trial of another class of tensors"
    if torch._C._len_torch_dispatch_stack() or is_recorded():
        return "no trial while a mode or a tracer looks on"
    if not torch.backends.cudnn.enabled:
        return "no trial without cuDNN (torch.backends.cudnn.enabled)"
    if device.is_capturing():
        return "no trial while a graph is captured, or where nobody may wait for the device"
    return None


_lock = threading.Lock()


def run(call: Call, place: Place, device: TrialDevice) -> Kept | None:
    """Find out who is faster; None where another thread does so for some call.

    Two trials at once would time each other. Whoever comes meanwhile need not wait. What is wrong
    with a call is raised, as it would be by whoever ran it.
    """
    check_call(call.of_layer(0, call.input))
    if not _lock.acquire(blocking=False):
        return None
    try:
        return kept.of(device.identity, place, anew=True) or _told(call, place, device)
    finally:
        _lock.release()


def _word(cell: str) -> str:
    """Return what a user calls a cell: the name of an own cell is its whole graph."""
    kind = cell_of(cell)
    return kind.layer if kind.is_own else cell


def _told(call: Call, place: Place, device: TrialDevice) -> Kept:
    """Run a trial, keep what it found, and log it."""
    layer = place.layer
    other = "the reference" if layer.is_beyond_cudnn else "torch.nn"
    what = (
        f"{_word(layer.cell)} in {layer.math}, H {layer.hidden}, {layer.form}, "
        f"about B {place.batch}, T {place.steps}, I {place.size}, L {layer.layers}, "
        f"{'training' if layer.is_training else 'inference'}, on {device.name}"
    )
    try:
        found, is_wrong = device.alone(functools.partial(_tried, call, layer, device))
    except torch.OutOfMemoryError:
        _log.warning("no memory for a trial, so that %s's runs in this process: %s", other, what)
        return kept.remember(device.identity, place, Kept(False, "a trial had too little memory"))
    except Exception as error:
        # A trial is nobody's wish: it may not end a call that cuDNN serves.
        if not device.is_alive():
            what = f"{device.name}: a trial of our kernels broke it"
            raise RuntimeError(f"{what}: {error}") from error
        _log.warning(
            "a trial failed, so that %s's runs in this process: %s: %s", other, what, error
        )
        return kept.remember(device.identity, place, Kept(False, f"a trial failed: {error}"))
    if is_wrong:
        _log.warning("our kernel is not used, please report: %s: %s", what, found.reason)
    found = kept.keep(device.identity, place, found)
    who = "ours" if found.is_ours else other
    _log.info("%s runs from now on: %s: %s", who, what, found.reason)
    return found


# ---- the trial ----


class _Side(NamedTuple):
    """One of the two that are tried."""

    layer: Callable[[Call], Results]  # runs a layer, or a whole stack
    call: Call

    def shortened(self) -> _Side:
        """Return the same, of the first steps."""
        return self._replace(call=_shortened(self.call))

    def values(self, seeds: list[Tensor]) -> list[Tensor]:
        """Return the results and, with seeds, the gradients of all that wants one."""
        results = self.layer(self.call).flat()
        if not seeds:
            return results
        leaves = [t for t in self.call.tensors() if t is not None and t.requires_grad]
        own = [seed.to(result.dtype) for seed, result in zip(seeds, results, strict=True)]
        grads = torch.autograd.grad(results, leaves, own, materialize_grads=True)
        return [*(result.detach() for result in results), *grads]


def _tried(call: Call, layer: kept.Layer, device: TrialDevice) -> tuple[Kept, bool]:
    """Compare and time both; say also whether ours was wrong."""
    with torch.set_grad_enabled(layer.is_training):
        draw = _Draw(call, layer.is_training)
        mine = draw.call(call)
        ours = _Side(lambda call: reference_backend.stack_results(call, device.ours), mine)
        theirs = _their_side(mine, layer)
        verdict = _compared(ours, theirs, layer, draw)
        if verdict.refused:
            return Kept(False, verdict.refused), verdict.is_wrong
        if layer.is_beyond_cudnn:
            return Kept(True, "tried on this device: right, and cuDNN has no such layer"), False
        seeds = draw.seeds(theirs.layer(theirs.call).flat())
        both = theirs, ours
        apart = _apart([side.values(seeds) for side in both])
        if not apart <= max(16 * _ROUNDING[layer.math], 8 * verdict.largest):
            return Kept(False, f"ours and torch.nn's are {apart:.1e} apart over all steps"), True
        ratio = _ratio(device, [functools.partial(side.values, seeds) for side in both])
        reason = f"tried on this device: {ratio:.2f} times as fast as torch.nn"
        return Kept(ratio > _MARGIN, reason), False


def _their_side(call: Call, layer: kept.Layer) -> _Side:
    """Return what runs where ours does not, on weights of the same numbers."""
    if layer.is_beyond_cudnn:
        return _Side(reference_backend.stack_results, call)
    weights = [w.detach().clone().requires_grad_(w.requires_grad) for w in call.weights]
    call = call._replace(weights=weights)
    sizes = check_call(call.of_layer(0, call.input))
    # torch.nn's own layer has them so: the stronger rival.
    torch_operator.lay_out(call, sizes)
    return _Side(lambda call: torch_operator.run(call, sizes), call)


class _Draw:
    """Random numbers that leave the user's generators alone."""

    def __init__(self, call: Call, is_training: bool) -> None:
        self._rng = torch.Generator(call.input.device).manual_seed(0)
        self._is_training = is_training

    def call(self, call: Call) -> Call:
        """Return the same call on other numbers: the user's may be all zeros, or NaN."""
        _, weight_hh, *_ = call.weights
        bound = weight_hh.shape[1] ** -0.5
        parts = call.parts(call.tensors())
        drawn = parts._replace(
            input=self._like(parts.input).normal_(generator=self._rng),
            initial=tuple(self._between(t, 1.0) for t in parts.initial),
            reset_to=tuple(self._between(t, 1.0) for t in parts.reset_to),
            weights=[self._between(t, bound) for t in parts.weights],
        )
        if call.kind.is_own:
            drawn = _with_own_numbers(call, drawn)
        for new in drawn.flat():
            if new is not None:
                # Whoever is answered by this trial may want what the first caller did not.
                new.requires_grad_(self._is_training)
        # What dropout draws is cuDNN's own.
        return call.with_tensors(drawn.flat())._replace(dropout=0.0, recompute=False)

    def moved(self, call: Call, by: float) -> Call:
        """Return the call on numbers that stand a rounding away."""

        def move(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            factor = self._like(tensor).uniform_(1 - by, 1 + by, generator=self._rng)
            return (tensor.detach() * factor).requires_grad_(tensor.requires_grad)

        return call.with_tensors([move(tensor) for tensor in call.tensors()])

    def seeds(self, results: list[Tensor]) -> list[Tensor]:
        """Draw gradients of results, in training."""
        if not self._is_training:
            return []
        return [self._like(result).normal_(generator=self._rng) for result in results]

    def _like(self, tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    def _between(self, tensor: Tensor | None, bound: float) -> Tensor | None:
        if tensor is None:
            return None
        return self._like(tensor).uniform_(-bound, bound, generator=self._rng)


def _with_own_numbers(call: Call, drawn: Parts) -> Parts:
    """Return what was drawn with the user's states, parameters and drives in it.

    A step may need these within bounds, as a decay from 0 to 1.
    """
    ways, kind = 1 + call.bidirectional, call.kind
    _, weight_hh, *_ = call.weights
    count, weights = len(call.weights) // (ways * call.layers), list(drawn.weights)
    with torch.no_grad():
        if kind.drives:
            behind = kind.drives * weight_hh.shape[1]
            drawn.input[..., -behind:] = call.input[..., -behind:]
        if kind.parameters:
            for last in range(count - 1, len(weights), count):
                weights[last] = call.weights[last].detach().clone()
    given = call.parts(call.tensors())
    initial, reset_to = (
        tuple(None if t is None else t.detach().clone() for t in states)
        for states in (given.initial, given.reset_to)
    )
    return drawn._replace(initial=initial, reset_to=reset_to, weights=weights)


def _shortened(call: Call) -> Call:
    """Return the call of the first steps: as many as float64 has time for."""
    _, weight_hh, *_ = call.weights
    states = call.batch * weight_hh.shape[1] * (1 + call.bidirectional)
    steps = max(4, min(_COMPARED_STEPS, _COMPARED_STATES // max(states, 1)))
    rows: Any = steps
    changed: dict[str, Any] = {}
    if call.batch_sizes is not None:
        changed["batch_sizes"] = call.batch_sizes[:steps]
        rows = int(changed["batch_sizes"].sum())
    if call.lengths is not None:
        changed["lengths"] = call.lengths.clamp(max=min(steps, len(call.input)))
    if call.resets is not None:
        changed["resets"] = call.resets[:rows]
    input = call.input.detach()[:rows].requires_grad_(call.input.requires_grad)
    return call._replace(input=input, **changed)


# ---- are they right ----


class _Verdict(NamedTuple):
    """What comparing the first steps found."""

    refused: str  # why ours is not exact enough, or nothing
    is_wrong: bool
    largest: float  # error of either, or jump


def _compared(ours: _Side, theirs: _Side, layer: kept.Layer, draw: _Draw) -> _Verdict:
    """Compare both with the reference in float64, on the same rounded numbers."""
    ours, theirs = ours.shortened(), theirs.shortened()
    exact = _Side(reference_backend.stack_results, _widened(ours.call))
    dtype, rounding = ours.call.input.dtype, _ROUNDING[layer.math]
    results = exact.layer(exact.call).flat()
    seeds = draw.seeds([result.to(dtype) for result in results])
    # A gradient of relu jumps where a state is nearly zero: so far rounding alone may go.
    near = exact._replace(call=draw.moved(exact.call, rounding))
    sides = (ours, theirs, near)
    expected = exact.values(seeds)
    if not all(bool(value.isfinite().all()) for value in expected):
        return _Verdict("the reference has no finite numbers to compare with", False, math.inf)
    found = [side.values(seeds) for side in sides]
    rival = "the reference" if layer.is_beyond_cudnn else "torch.nn"
    refused, largest = "", 0.0
    for k, (wanted, *values) in enumerate(zip(expected, *found, strict=True)):
        mine, other, jump = (_error(value, wanted) for value in values)
        what = "a result" if k < len(results) else "a gradient"
        text = f"{what} of ours errs by {mine:.1e}, of {rival} by {other:.1e}"
        if not mine <= _WRONG * max(x for x in (rounding, other, jump) if x < math.inf):
            return _Verdict(f"wrong: {text}", True, math.inf)
        # Of few numbers the error is an estimate: three standard deviations.
        limit = _LESS_EXACT * other * (1 + 3 / math.sqrt(max(wanted.numel(), 1)))
        # Rounding the exact results would cost as much, or some roundings of sums in float32.
        limit = max(limit, torch.finfo(dtype).eps / 4, 8 * torch.finfo(torch.float32).eps)
        if not layer.is_beyond_cudnn and not mine <= limit:
            refused = f"less exact: {text}"
        largest = max(largest, mine, other, jump)
    return _Verdict(refused, False, largest)


def _widened(call: Call) -> Call:
    def wide(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    return call.with_tensors([wide(tensor) for tensor in call.tensors()])


def _error(found: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference over that of the exact; infinite where not finite."""
    norm = torch.linalg.vector_norm
    error = float(norm(found.to(exact.dtype) - exact) / norm(exact).clamp_min(1e-30))
    return error if error < math.inf else math.inf


def _apart(both: list[list[Tensor]]) -> float:
    """Return the largest relative difference between results of the two."""
    theirs, ours = both
    return max(_error(a.float(), b.float()) for a, b in zip(ours, theirs, strict=True))


# ---- who is faster ----


def _ratio(device: TrialDevice, runs: list[Callable[[], object]]) -> float:
    """Return the median of torch.nn / ours: of calls or, if that is lower, of the device alone."""
    one = [device.seconds(run, 1, False) for run in runs]
    calls = [max(1, min(20, int(_SAMPLE / max(seconds, 1e-7)))) for seconds in one]
    kinds = (False, True)[: 1 + (max(one) < _SHORT)]
    # Each sample has a call more than it times.
    a_round = sum(t * (n + 1) for t, n in zip(one, calls, strict=True)) * len(kinds)
    least, most = _ROUNDS
    rounds = max(least, min(most, int(_BUDGET / max(a_round, 1e-7))))
    pairs: dict[bool, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, found in pairs.items():
            theirs, ours = (
                device.seconds(run, n, kind) for run, n in zip(runs, calls, strict=True)
            )
            found.append(theirs / max(ours, 1e-9))
    return min(map(statistics.median, pairs.values()))
