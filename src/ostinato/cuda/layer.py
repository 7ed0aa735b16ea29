"""The GPU engine as a backend: whether it runs a layer, and with which kernels."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ostinato.call import Call, Results
from ostinato.cells import cell_of, find
from ostinato.check import shapes_of
from ostinato.cuda import choice, kept, launch, sequence, trial
from ostinato.cuda.config import Config, Previous
from ostinato.cuda.plan import Device, at_once, plan
from ostinato.cuda.sequence import reserve_bytes
from ostinato.later import when_imported
from ostinato.sizes import Sizes
from ostinato.tensors import TORCH_OPERATORS, check_backward, check_call, keeps

_MATHS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# A compiled graph keeps its choice for every batch.
_COMPILED_BATCH = 16


class Decision(NamedTuple):
    """Who runs a layer, and why."""

    is_ours: bool
    reason: str
    place: kept.Place | None = None  # where a trial would say more, if one may be run


def math_of(dtype: torch.dtype) -> str | None:
    """Name the precision of a dtype's products, by torch's own switch for recurrent layers.

    It is "bf16", "fp16", "tf32" or "fp32", or None where there is no kernel.
    """
    if dtype is not torch.float32:
        return _MATHS.get(dtype)
    switch = getattr(torch.backends.cudnn, "rnn", None)
    precision = getattr(switch, "fp32_precision", None)
    # Before torch 2.9 there is one switch for all of cuDNN. Once the new ones differ from each
    # other, it can no longer be read.
    is_tf32 = torch.backends.cudnn.allow_tf32 if precision is None else precision == "tf32"
    return "tf32" if is_tf32 else "fp32"


def decide(call: Call, *, is_training: bool) -> Decision:
    """Decide who runs a layer or a stack on CUDA tensors, which need not be checked yet.

    `is_training` says whether backward is to follow. What nobody measured is tried, if it may be.
    A stack is decided as its first layer, but tried as a whole, since cuDNN runs it so; its layers
    then hear what is known of the whole. A decision with a place may be another one later.
    """
    layers = _layers(call)
    decision = _known(call.of_layer(0, call.input), layers, is_training)
    if torch.compiler.is_compiling() or decision.place is None:
        return decision
    device = device_of_trials(call.input.device.index or 0)
    refusal = trial.why_not(call, device)
    if refusal is not None:
        place = decision.place if trial.is_on() else None
        return Decision(decision.is_ours, f"{decision.reason}; {refusal}", place)
    if layers > 1 and call.stack > 1:
        return decision
    found = trial.run(call, decision.place, device)
    return decision if found is None else Decision(*found)


def is_cut(call: Call) -> bool:
    """Return `call.is_cut`. The compiler of torch 2.10 cannot branch on a property of a tuple."""
    return call.lengths is not None or call.resets is not None


def _layers(call: Call) -> int:
    """Return how many layers are decided together: those of a stack that cuDNN would run whole."""
    if is_cut(call) or call.all_states or call.recompute or call.cell not in TORCH_OPERATORS:
        return 1
    return max(call.layers, call.stack)


def _has(call: Call) -> str:
    """Name what a call has, of what a kernel is to be right about."""
    there = {
        "biases": call.has_biases,
        "lengths": call.lengths is not None,
        "resets": call.resets is not None,
        "states": call.all_states,
    }
    return " ".join(name for name, is_there in there.items() if is_there)


def _known(call: Call, layers: int, is_training: bool) -> Decision:
    """Decide by what is known."""
    input, weights = call.input, call.weights
    math, kind = math_of(input.dtype), find(call.cell)
    if kind is None or input.dim() < 2:
        return Decision(False, "the arguments are not those of a layer")
    if not kind.has_engine:
        return Decision(False, "this cell asks for the reference")
    if math is None:
        return Decision(False, f"no kernel computes in {input.dtype}")
    count, rest = divmod(len(weights), 1 + call.bidirectional)
    weight_ih, weight_hh, *_ = (*weights, input, input)
    if rest or count < 2 or weight_ih.dim() != 2 or weight_hh.dim() != 2:
        return Decision(False, "the weights are not those of a layer")
    if count != (4 if call.has_biases else 2) + (kind.parameters > 0):
        return Decision(False, "no kernel projects h (proj_size)")
    if _is_sure(input.numel() == 0) or not (weight_ih.numel() and weight_hh.shape[1]):
        return Decision(False, "there is nothing to compute")
    if not all(t is None or t.layout is torch.strided for t in call.tensors()):
        return Decision(False, "not all tensors are strided")
    if _form(call) == "packed" and _is_capturing():
        return Decision(False, "a graph cannot capture how lengths come to the device")
    hidden = weight_hh.shape[1]
    steps = input.shape[0] if call.batch_sizes is None else len(call.batch_sizes)
    sizes: tuple[int, int] | None = steps, weight_ih.shape[1]
    batch = call.batch
    if torch.compiler.is_compiling():
        batch, sizes = _COMPILED_BATCH, None
    decision: Decision = _decide(
        call.cell,
        math,
        hidden,
        batch,
        call.bidirectional,
        _form(call),
        is_training,
        is_cut(call) or call.all_states or call.cell not in TORCH_OPERATORS,
        _is_sure(steps == 1),
        input.device.index or 0,
        layers,
        sizes,
        _has(call),
    )
    return decision


def _is_sure(condition: Any) -> bool:
    """Whether a condition holds; in a compiled graph, whether it does whatever the sizes are."""
    if not torch.compiler.is_compiling():
        return bool(condition)
    found: bool = torch.fx.experimental.symbolic_shapes.statically_known_true(condition)
    return found


def _is_capturing() -> bool:
    return not torch.compiler.is_compiling() and sequence.is_capturing()


def _form(call: Call) -> str:
    if call.batch_sizes is not None or call.lengths is not None:
        return "packed"
    return "bidirectional" if call.bidirectional else "padded"


def _decide(
    cell: str,
    math: str,
    hidden: int,
    batch: int,
    bidirectional: bool,
    form: str,
    is_training: bool,
    is_beyond_cudnn: bool,
    is_one_step: bool,
    index: int,
    layers: int = 1,
    sizes: tuple[int, int] | None = None,
    has: str = "",
) -> Decision:
    """Decide by numbers alone; `sizes` are steps and input_size, or None in a compiled graph."""
    if not launch.available():
        return Decision(False, "cuda-core, NVRTC or a driver new enough for it is missing")
    device = device_of(index)
    if device == NO_DEVICE:
        return Decision(False, "our kernels need a device of sm_80 or later")
    is_wide = False
    for is_backward in (False, True)[: 1 + is_training]:
        kernel = plan(cell, math, hidden, batch, 1 + bidirectional, is_backward, device)
        if kernel is None:
            direction = "backward" if is_backward else "forward"
            return Decision(False, f"no {direction} kernel of this size fits the device")
        is_wide = is_wide or kernel.group_rows > 8
    if is_one_step and not is_beyond_cudnn and not choice.is_forced():
        return Decision(False, "one step reads its weights once, wherever they are kept")
    question = choice.Question(cell, math, hidden, batch, form, is_training)
    name = torch.cuda.get_device_name(index)
    found = choice.is_ours(name, question)
    if is_wide and not choice.is_forced():
        # What was measured had groups of eight rows.
        found = found._replace(is_ours=False, is_covered=False)
    if is_beyond_cudnn:
        reason = found.reason if found.is_ours else f"cuDNN has no such layer; {found.reason}"
        is_enough = choice.is_known(name) and not is_wide and not cell_of(cell).is_own
        if choice.is_forced() or is_enough:
            # It is not compared with cuDNN. That some kernels were right on this device is enough,
            # but for an own cell, whose arithmetic nobody has seen.
            return Decision(choice.is_known(name), reason)
        found = found._replace(reason=reason)
    elif found.is_covered:
        return Decision(found.is_ours, found.reason)
    about = cell, math, hidden, form, is_training, 1 + bidirectional, layers, is_beyond_cudnn, has
    layer = kept.Layer(*about)
    place = None
    if sizes is None:
        known = trial.known_of_layer(device_of_trials(index), layer)
    else:
        place = kept.Place.of(layer, batch, *sizes)
        known = trial.known(device_of_trials(index), place)
    return Decision(found.is_ours, found.reason, place) if known is None else Decision(*known)


# A compiled graph keeps the answer. torch's decorator would load the compiler, which takes as long
# as the rest of torch.
when_imported("torch._dynamo", lambda compiler: compiler.assume_constant_result(_decide))


@functools.cache
def device_of_trials(index: int) -> trial.TrialDevice:
    """Return what trials ask of a device, by its index in torch."""
    return trial.Gpu(index)


# One without the instructions that our kernels are made of.
NO_DEVICE = Device(0, 0, 0)
_devices: dict[int, Device] = {}


def device_of(index: int) -> Device:
    """Return what plans need to know of a device, by its index in torch."""
    found = _devices.get(index)
    if found is None:
        properties = torch.cuda.get_device_properties(index)
        shared = getattr(properties, "shared_memory_per_block_optin", 48 * 1024)
        # From sm_90 on there are clusters of 8; of 16 where data centres have them.
        cluster = {9: 16, 10: 16}.get(properties.major, 8 if properties.major > 10 else 0)
        found = Device(properties.multi_processor_count, shared, cluster)
        if properties.major < 8:
            found = NO_DEVICE
        _devices[index] = found
    return found


def why_not(call: Call) -> str | None:
    """Say why our kernels do not serve a call of a layer."""
    if call.input.device.type != "cuda":
        return "the tensors are not on a GPU"
    decision = decide(call, is_training=keeps(call))
    return None if decision.is_ours else decision.reason


def forward(call: Call, keep: bool) -> tuple[Results, Tensor]:
    """Run the operator `ostinato::layer` on CUDA tensors.

    Returns the results, and what is kept for backward. Raises RuntimeError where no kernel fits
    this layer or this device.
    """
    sizes = check_call(call)
    config = _config(call, sizes, is_backward=False)
    if not sizes.rows:
        return _of_no_rows(call, sizes)
    rows, given = sequence.rows_of(call, may_keep=False), sequence.dense(call)
    launcher = launcher_of(call)
    results, reserve = sequence.forward(given, sizes, rows, config, launcher, keep)
    return results, call.input.new_empty(0, dtype=torch.uint8) if reserve is None else reserve


def backward(
    call: Call, arrived: Results, output: Tensor, reserve: Tensor, wanted: list[bool]
) -> list[Tensor | None]:
    """Run the operator `ostinato::layer_backward` on CUDA tensors.

    `output` and `reserve` are what forward returned. `wanted` has a flag for each of
    `call.tensors()`, and the result is None where it is False. Raises RuntimeError where no kernel
    fits this layer or this device.
    """
    sizes = check_call(call)
    check_backward(call, sizes, arrived, output, reserve, reserve_bytes(call, sizes))
    config = _config(call, sizes, is_backward=True)
    if not sizes.rows:
        return _gradients_of_no_rows(call, arrived, wanted)
    launcher, given = launcher_of(call), sequence.dense(call)
    dense = sequence.dense_results(Results(output, ())).output, reserve, wanted
    results, rows = sequence.dense_results(arrived), sequence.rows_of(given, may_keep=False)
    return sequence.backward(given, sizes, rows, config, launcher, results, *dense)


def _of_no_rows(call: Call, sizes: Sizes) -> tuple[Results, Tensor]:
    """Return what a layer makes of no steps or no batch, where there is no kernel to launch."""
    x = call.input
    shapes, table = shapes_of(call, sizes), call.results()
    last = tuple(
        x.new_zeros(shapes[array.name])
        if state is None
        else state.clone(memory_format=torch.contiguous_format)
        for array, state in zip(table.last, call.initial, strict=True)
    )
    every = tuple(x.new_empty(shapes[array.name]) for array in table.every)
    results = Results(x.new_empty(shapes["output"]), last, every)
    return results, x.new_empty(0, dtype=torch.uint8)


def _gradients_of_no_rows(call: Call, arrived: Results, wanted: list[bool]) -> list[Tensor | None]:
    found = call.parts(
        [
            call.input.new_zeros(t.shape) if want and t is not None else None
            for t, want in zip(call.tensors(), wanted, strict=True)
        ]
    )
    for own, grad in zip(found.initial, arrived.last, strict=True):
        if own is not None and grad is not None:  # initial states go through as they are
            own.copy_(grad)
    return found.flat()


def plan_of(call: Call, sizes: Sizes, is_backward: bool) -> Config | None:
    """Return the kernel that is to run a checked call, or None where there is none."""
    math = math_of(call.input.dtype)
    if math is None or sizes.projection or not launch.available():
        return None
    device = device_of(call.input.device.index or 0)
    options = sizes.hidden, sizes.batch, sizes.directions, is_backward, device
    found: Config | None = plan(call.cell, math, *options)
    return found


def _config(call: Call, sizes: Sizes, is_backward: bool) -> Config:
    found = plan_of(call, sizes, is_backward)
    if found is None:
        raise RuntimeError(
            f"ostinato::layer: no kernel on {call.input.device} for {call.cell} of "
            f"{call.input.dtype}, hidden_size {sizes.hidden}, proj_size {sizes.projection}"
        )
    return found


class Launcher(NamedTuple):
    """Runs kernels on a device."""

    device: int

    def at_once(self, config: Config) -> int:
        """Return how many loops of a kernel the device runs at once."""
        return at_once(config, device_of(self.device))

    def __call__(self, config: Config | Previous, loops: int, arguments: tuple[Any, ...]) -> None:
        """Launch a kernel on torch's current stream."""
        loaded, stream = launch.load(config, self.device), sequence.stream_of(self.device)
        launch.launch(loaded, loops * config.blocks, stream, arguments)


def launcher_of(call: Call) -> sequence.Launcher:
    """Return what runs kernels on the device of a call."""
    return Launcher(call.input.device.index or 0)


def detail(call: Call) -> str:
    """Name the kernels that run a call, forward and, in training, backward, and say why these."""
    math, names = math_of(call.input.dtype), []
    _, weight_hh, *_ = call.weights
    hidden, device = weight_hh.shape[1], device_of(call.input.device.index or 0)
    for is_backward in (False, True)[: 1 + keeps(call)]:
        directions = 1 + call.bidirectional
        assert math is not None
        config = plan(call.cell, math, hidden, call.batch, directions, is_backward, device)
        assert config is not None
        names.append(
            f"{config.entry} in {math}, {config.exchange} of {config.blocks} x {config.units} "
            f"units, {config.warps} warps, {config.rows} rows to a tile"
        )
    return f"{'; '.join(names)} ({decide(call, is_training=keeps(call)).reason})"
