"""One layer on a GPU: who runs it, and our kernels' run of it.

`decide` says whether the operator `ostinato::layer` is to be called for CUDA tensors. If not,
torch's own operator (cuDNN) runs, and where that cannot serve either, the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ostinato.call import DTYPES, Call, batch_of, check, check_dtype
from ostinato.cells import CELLS
from ostinato.cuda import choice, cudnn, launch, sequence
from ostinato.cuda.config import Config
from ostinato.cuda.plan import Device, at_once, plan
from ostinato.engine import Sizes
from ostinato.later import when_imported

_MATHS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# A compiled graph keeps its choice for every batch.
_COMPILED_BATCH = 16


class Decision(NamedTuple):
    """Who runs a layer, and why."""

    is_ours: bool
    reason: str


def math_of(dtype: torch.dtype) -> str | None:
    """Name the precision of a dtype's products, by torch's own switch for recurrent layers.

    Args:
        dtype: of input and weights.

    Returns:
        "bf16", "fp16", "tf32" or "fp32", or None where there is no kernel.
    """
    if dtype is not torch.float32:
        return _MATHS.get(dtype)
    switch = getattr(torch.backends.cudnn, "rnn", None)
    precision = getattr(switch, "fp32_precision", None)
    # Before torch 2.9 there is one switch for all of cuDNN. Once the new ones differ from each
    # other, it can no longer be read.
    is_tf32 = torch.backends.cudnn.allow_tf32 if precision is None else precision == "tf32"
    return "tf32" if is_tf32 else "fp32"


def decide(call: Call, *, is_training: bool, all_c: bool = False) -> Decision:
    """Decide who runs a layer on CUDA tensors.

    Args:
        call: not necessarily checked yet.
        is_training: whether backward is to follow.
        all_c: whether c is wanted at every step.

    Returns:
        The decision.
    """
    input, weights = call.input, call.weights
    math = math_of(input.dtype)
    if call.cell not in CELLS or input.dim() < 2:
        return Decision(False, "the arguments are not those of a layer")
    if math is None:
        return Decision(False, f"no kernel computes in {input.dtype}")
    if len(weights) % (1 + call.bidirectional) or len(weights) < 2 or weights[1].dim() != 2:
        return Decision(False, "the weights are not those of a layer")
    count = len(weights) // (1 + call.bidirectional)
    if count != (4 if call.has_biases else 2):
        return Decision(False, "no kernel projects h (proj_size)")
    if _is_sure(input.numel() == 0) or not (weights[0].numel() and weights[1].numel()):
        return Decision(False, "there is nothing to compute")
    if not all(t is None or t.layout is torch.strided for t in call.tensors()):
        return Decision(False, "not all tensors are strided")
    if _form(call) == "packed" and _is_capturing():
        return Decision(False, "a graph cannot capture how lengths come to the device")
    hidden = weights[1].shape[1]
    steps = input.shape[0] if call.batch_sizes is None else len(call.batch_sizes)
    batch = _COMPILED_BATCH if torch.compiler.is_compiling() else call.batch
    decision: Decision = _decide(
        call.cell,
        math,
        hidden,
        batch,
        call.bidirectional,
        _form(call),
        is_training,
        call.is_cut or all_c,
        _is_sure(steps == 1),
        input.device.index or 0,
    )
    return decision


def _is_sure(condition: Any) -> bool:
    """Whether a condition holds; in a compiled graph, whether it does whatever the sizes are."""
    if not torch.compiler.is_compiling():
        return bool(condition)
    found: bool = torch.fx.experimental.symbolic_shapes.statically_known_true(condition)
    return found


def _is_capturing() -> bool:
    return not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


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
) -> Decision:
    if not launch.available():
        return Decision(False, "cuda-core, NVRTC or a driver new enough for it is missing")
    device = device_of(index)
    for is_backward in (False, True)[: 1 + is_training]:
        if plan(cell, math, hidden, batch, 1 + bidirectional, is_backward, device) is None:
            walk = "backward" if is_backward else "forward"
            return Decision(False, f"no {walk} kernel of this size fits the device")
    if is_one_step and not choice.is_forced():
        return Decision(False, "one step reads its weights once, wherever they are kept")
    question = choice.Question(cell, math, hidden, batch, form, is_training)
    name = torch.cuda.get_device_name(index)
    found, reason = choice.is_ours(name, question)
    if found or not is_beyond_cudnn:
        return Decision(found, reason)
    # What cuDNN does not have is not compared with it, but was anything run on this device at all?
    return Decision(choice.is_known(name), f"cuDNN has no such layer; {reason}")


# A compiled graph keeps the answer. torch's decorator would load the compiler, which takes as long
# as the rest of torch.
when_imported("torch._dynamo", lambda compiler: compiler.assume_constant_result(_decide))


_devices: dict[int, Device] = {}


def device_of(index: int) -> Device:
    """Describe a device.

    Args:
        index: torch's.

    Returns:
        What plans need to know of it.
    """
    found = _devices.get(index)
    if found is None:
        properties = torch.cuda.get_device_properties(index)
        shared = getattr(properties, "shared_memory_per_block_optin", 48 * 1024)
        has_clusters = (properties.major, properties.minor) == (9, 0)
        found = Device(properties.multi_processor_count, shared, has_clusters)
        if properties.major < 8:
            found = Device(0, 0, False)
        _devices[index] = found
    return found


def forward(call: Call, all_c: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the operator `ostinato::layer` on CUDA tensors.

    Args:
        call: the arguments.
        all_c: whether c is wanted at every step.
        keep: whether backward is to follow.

    Returns:
        As the operator.

    Raises:
        RuntimeError: no kernel fits this layer or this device.
    """
    sizes = check(call)
    config = _config(call, sizes, is_backward=False)
    if not sizes.rows:
        return _of_no_rows(call, sizes, all_c)
    return sequence.forward(call, sizes, config, _launcher(call), all_c, keep)


def backward(
    call: Call,
    sizes: Sizes,
    grads: Sequence[Tensor | None],
    output: Tensor,
    reserve: Tensor,
    wanted: list[bool],
) -> list[Tensor]:
    """Run the operator `ostinato::layer_backward` on CUDA tensors, all checked.

    Args:
        call: forward's arguments.
        sizes: of the call.
        grads: of output, h_n, c_n and c at every step.
        output: of forward.
        reserve: of forward.
        wanted: whether each of `call.tensors()` needs a gradient.

    Returns:
        The gradients; one that is not wanted is empty.

    Raises:
        RuntimeError: no kernel fits this layer or this device.
    """
    config = _config(call, sizes, is_backward=True)
    if not sizes.rows:
        return _gradients_of_no_rows(call, grads, wanted)
    launcher = _launcher(call)
    found = sequence.backward(call, sizes, config, launcher, grads, output, reserve, wanted)
    return [call.input.new_empty(0) if grad is None else grad for grad in found]


def _of_no_rows(
    call: Call, sizes: Sizes, all_c: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what a layer makes of no steps or no batch, where there is no kernel to launch."""
    x = call.input
    has_c = call.kind.has_c
    shape = (sizes.directions, sizes.batch, sizes.hidden)
    h_n, c_n = (
        x.new_zeros(shape) if state is None else state.clone(memory_format=torch.contiguous_format)
        for state in (call.h_0, call.c_0)
    )
    output = (*x.shape[:-1], sizes.directions * sizes.hidden)
    return (
        x.new_empty(output),
        h_n,
        c_n if has_c else x.new_empty(0),
        x.new_empty(output if has_c and all_c else (0,)),
        x.new_empty(0, dtype=torch.uint8),
    )


def _gradients_of_no_rows(
    call: Call, grads: Sequence[Tensor | None], wanted: list[bool]
) -> list[Tensor]:
    found = [
        call.input.new_zeros(t.shape if want and t is not None else (0,))
        for t, want in zip(call.tensors(), wanted, strict=True)
    ]
    for place in (1, 2):  # h_0 and c_0 go through as they are
        if wanted[place] and (grad := grads[place]) is not None:
            found[place].copy_(grad)
    return found


def _config(call: Call, sizes: Sizes, is_backward: bool) -> Config:
    math = math_of(call.input.dtype)
    found = None
    if math is not None and not sizes.projection and launch.available():
        device = device_of(call.input.device.index or 0)
        directions, batch = sizes.directions, sizes.batch
        found = plan(call.cell, math, sizes.hidden, batch, directions, is_backward, device)
    if found is None:
        raise RuntimeError(
            f"ostinato::layer: no kernel on {call.input.device} for {call.cell} of "
            f"{call.input.dtype}, hidden_size {sizes.hidden}, proj_size {sizes.projection}"
        )
    return found


class _Launcher(NamedTuple):
    """Runs kernels on a device."""

    device: int

    def at_once(self, config: Config) -> int:
        return at_once(config, device_of(self.device))

    def __call__(self, config: Config, walks: int, arguments: Sequence[int]) -> None:
        loaded = launch.load(config, self.device)
        if config.exchange == "cluster":
            launch.launch(loaded, walks, config.blocks, arguments)
        else:
            launch.launch(loaded, walks * config.blocks, 1, arguments)


def _launcher(call: Call) -> _Launcher:
    return _Launcher(call.input.device.index or 0)


def explain(layer: Any, x: Any, *, lengths: Any = None, resets: Any = None) -> str:
    """Say which kernel a layer's call would run, and why.

    Args:
        layer: one of the six modules of `ostinato.nn`.
        x: its input, a tensor or, but for a cell, a PackedSequence.
        lengths: as in the module's call.
        resets: likewise.

    Returns:
        A line for each layer that differs from the one before.

    Raises:
        TypeError: another module, or an argument that forward refuses so.
        ValueError: input of another dtype or number of dimensions than forward takes.
        RuntimeError: sizes that do not fit.
        NotImplementedError: a dtype that nothing computes in.

    Example:
        >>> from ostinato import nn
        >>> explain(nn.GRU(3, 4), torch.zeros(5, 2, 3))
        'the CPU engine'
    """
    # The modules stand above this one, which knows them by this method.
    explained: Any = getattr(layer, "explained", None)
    if explained is None:
        kind = type(layer)
        raise TypeError(
            "explain: layer must be RNN, GRU, LSTM or a cell of ostinato.nn, followed by its "
            f"input, got {kind.__module__}.{kind.__qualname__}"
        )
    data, sizes, flat = explained(x, lengths, resets)
    check_dtype(data)
    if not _is_cuda(data):
        has_engine = data.device.type == "cpu" and data.dtype in DTYPES
        return "the CPU engine" if has_engine else "the reference"
    if not isinstance(layer, torch.nn.RNNBase):
        return "torch's operator (cuDNN): a cell is one step, which reads its weights once"
    is_training = torch.is_grad_enabled() and (
        data.requires_grad or any(weight.requires_grad for weight in layer.parameters())
    )
    batch = batch_of(data, sizes, None, None)
    cell = layer.mode.lower()
    lines: list[str] = []
    per_layer = len(flat) // layer.num_layers
    for k in range(layer.num_layers):
        call = Call(
            data,
            sizes,
            batch,
            None,
            None,
            flat[k * per_layer : (k + 1) * per_layer],
            cell,
            layer.bias,
            layer.bidirectional,
            False,
            lengths,
            resets,
        )
        decision = decide(call, is_training=is_training)
        line = f"{_name(call, decision, is_training)}: {decision.reason}"
        if not lines or lines[-1] != line:
            lines.append(line)
    return "\n".join(lines)


def _is_cuda(data: Tensor) -> bool:
    return data.device.type == "cuda"


def _name(call: Call, decision: Decision, is_training: bool) -> str:
    if not decision.is_ours:
        has_cudnn = not call.is_cut and cudnn.serves(call.input)
        return "torch's operator (cuDNN)" if has_cudnn else "the reference"
    math, names = math_of(call.input.dtype), []
    hidden, device = call.weights[1].shape[1], device_of(call.input.device.index or 0)
    for is_backward in (False, True)[: 1 + is_training]:
        directions = 1 + call.bidirectional
        assert math is not None
        config = plan(call.cell, math, hidden, call.batch, directions, is_backward, device)
        assert config is not None
        names.append(
            f"{config.entry} in {math}, {config.exchange} of {config.blocks} x {config.units} "
            f"units, {config.warps} warps, {config.rows} rows to a tile"
        )
    return "; ".join(names)
