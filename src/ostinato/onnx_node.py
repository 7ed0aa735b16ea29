"""One layer as one ONNX node: RNN, GRU or LSTM, version 14, whoever writes it.

There are three ways to an ONNX model, and `node` writes the same node on each:

- torch.onnx.export(dynamo=True) traces a model with torch.export; the layer that runs then asks
  `is_wanted`, and `trace` puts torch's symbolic operator in its place (`_Traced`);
- torch.onnx.export(dynamo=False) traces it with torch.jit, likewise (`_Scripted`);
- a program that torch.export had traced before holds our operator. `ostinato.onnx.translations`
  turns it into a node of the model (`Values`).

What a node says of a layer: the gates of the weights in ONNX's order (z r n, and i o f c),
directions stacked, biases joined; `lengths` are sequence_lens, h_0 and c_0 initial_h and initial_c.
Its output (T, D, B, H) becomes (T, B, D * H) behind it.

Legend: T steps, B batch, I input, H hidden, D directions, G gates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ostinato import arrays
from ostinato.call import Call, Results
from ostinato.cells import cell_of
from ostinato.later import when_imported
from ostinato.reference_backend import results
from ostinato.tensors import DTYPES, check_call, is_traced, unrecorded

# TensorProto's numbers.
_INT32, _BFLOAT16 = 6, 16
# What a node says, or need not say since only backward asks.
_TAKEN = {
    *("input", "batch", "lengths", *(array.name for array in arrays.INITIAL), "weights", "cell"),
    *("has_biases", "bidirectional", "recompute", "keep"),
}
_PACKED = "ONNX has no packed sequences; give the layer a padded batch and lengths="
# Why no node takes the other arguments of the operator.
_REFUSED = {
    "batch_sizes": _PACKED,
    "resets": "ONNX has no resets within a sequence",
    "all_c": "ONNX's LSTM returns the last c alone",
}


class NoCounterpartError(NotImplementedError):
    """ONNX has no operator for this."""


class Form(NamedTuple):
    """What a node is beside its inputs."""

    operator: str
    states: int
    hidden: int
    directions: int
    attributes: dict[str, Any]


class Writer(Protocol):
    """How one of the three ways writes what `node` says."""

    # Whether batch_sizes may stand for sequence_lens.
    takes_packed: bool

    def ordered(self, weight: Any, rows: list[int]) -> Any:
        """Take these rows of a weight."""

    def joined(self, parts: Sequence[Any], *shape: int) -> Any:
        """Return parts, one behind the other, as one array of this shape."""

    def small(self, lengths: Any) -> Any:
        """Return lengths as int32."""

    def recur(self, form: Form, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Write the node; return output, (T, B, D * H), and the last states, (D, B, H).

        The inputs are X, W, R, B, sequence_lens, initial_h and, for an LSTM, initial_c; some are
        None.
        """

    def kept(self, lengths: Any, first: Any, last: Any) -> Any:
        """Return the last states, and the first ones for rows of no steps."""


def node(write: Writer, call: dict[str, Any]) -> tuple[Any, ...]:
    """Write one layer; return output, (T, B, D * H), and the last states, (D, B, H).

    `call` holds the arguments of `ostinato::layer`, by the names of its schema. Raises
    NoCounterpartError where ONNX has no node for such a layer.
    """
    taken = _TAKEN | {"batch_sizes"} if write.takes_packed else _TAKEN
    kind = cell_of(call["cell"])
    if not kind.has_c:
        taken = taken | {"all_c"}  # there is no c
    if not kind.onnx:
        raise NoCounterpartError(f"cell: ONNX has no {kind.layer}")
    for name, given in call.items():
        if name not in taken and given is not None and given is not False:
            raise NoCounterpartError(f"{name}: {_REFUSED.get(name, 'ONNX has nothing like it')}")
    node, weights, lengths = kind.onnx, call["weights"], call.get("lengths")
    if weights[0].dtype in (_BFLOAT16, torch.bfloat16):
        raise NoCounterpartError(f"dtype: ONNX has no {kind.layer} in bfloat16 before opset 22")
    directions = 2 if call["bidirectional"] else 1
    count = len(weights) // directions
    if count > (4 if call["has_biases"] else 2):
        raise NoCounterpartError(f"proj_size: ONNX has no {kind.layer} with a projection")
    _, weight_hh, *_ = weights
    rows, hidden = _sizes(weight_hh)
    initial = [call[array.name] for array in arrays.INITIAL[: len(kind.states)]]
    units = [gate * hidden + unit for gate in node.gates for unit in range(hidden)]

    def joined(names: slice, *shape: int) -> Any:
        """Return these weights of every direction as one, (D, *shape)."""
        parts = [
            weight if len(node.gates) == 1 else write.ordered(weight, units)
            for first in range(0, len(weights), count)
            for weight in weights[first : first + count][names]
        ]
        return write.joined(parts, directions, *shape)

    inputs = [
        call["input"],
        joined(slice(0, 1), rows, -1),
        joined(slice(1, 2), rows, hidden),
        joined(slice(2, 4), 2 * rows) if call["has_biases"] else None,
        call["batch_sizes"] if lengths is None else write.small(lengths),
        *initial,
    ]
    attributes: dict[str, Any] = {"hidden_size": hidden, **node.attributes}
    if node.activation:
        attributes["activations"] = [node.activation] * directions
    if directions == 2:
        attributes["direction"] = "bidirectional"
    output, *states = write.recur(
        Form(kind.layer, len(kind.states), hidden, directions, attributes), inputs
    )
    if lengths is not None:
        # A row of no steps keeps its state. ONNX does not say so, and ONNX Runtime gives zeros.
        states = [
            last if first is None else write.kept(lengths, first, last)
            for first, last in zip(initial, states, strict=True)
        ]
    return output, *states


@unrecorded
def _sizes(weight: Any) -> list[int]:
    """Return the sizes of a weight, which no model may change, as numbers."""
    return [int(size) for size in weight.shape]


class Values:
    """Values of an ONNX model, by onnxscript's operators."""

    takes_packed = False

    def __init__(self, op: Any) -> None:
        self._op = op

    def _ints(self, *values: int) -> Any:
        return self._op.Constant(value_ints=list(values))

    def ordered(self, weight: Any, rows: list[int]) -> Any:
        """Take these rows of a weight."""
        return self._op.Gather(weight, self._ints(*rows), axis=0)

    def joined(self, parts: Sequence[Any], *shape: int) -> Any:
        """Return parts, one behind the other, as one array of this shape."""
        whole = self._op.Concat(*parts, axis=0) if len(parts) > 1 else parts[0]
        return self._op.Reshape(whole, self._ints(*shape))

    def small(self, lengths: Any) -> Any:
        """Return lengths as int32."""
        return self._op.Cast(lengths, to=_INT32)

    def recur(self, form: Form, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Write the node, and bring its output to (T, B, D * H)."""
        output, *states = getattr(self._op, form.operator)(*inputs, **form.attributes)
        if form.directions == 1:
            return self._op.Squeeze(output, self._ints(1)), *states
        output = self._op.Transpose(output, perm=[0, 2, 1, 3])
        # 0 stands for the size that the dimension has.
        return self._op.Reshape(output, self._ints(0, 0, 2 * form.hidden)), *states

    def kept(self, lengths: Any, first: Any, last: Any) -> Any:
        """Return the last states, and the first ones for rows of no steps."""
        column = self._op.Reshape(lengths, self._ints(-1, 1))
        return self._op.Where(self._op.Equal(column, self._op.Constant(value_int=0)), first, last)


class _Tensors:
    """Tensors, whose operators torch's exporters know."""

    def ordered(self, weight: Tensor, rows: list[int]) -> Tensor:
        return weight.index_select(0, unrecorded(torch.tensor)(rows, device=weight.device))

    def joined(self, parts: Sequence[Tensor], *shape: int) -> Tensor:
        return (torch.cat(list(parts)) if len(parts) > 1 else parts[0]).reshape(shape)

    def small(self, lengths: Tensor) -> Tensor:
        return lengths.to(torch.int32)

    def kept(self, lengths: Tensor, first: Tensor, last: Tensor) -> Tensor:
        empty = lengths.reshape(-1, 1).to(last.device) == 0
        return torch.where(empty, first, last)


class _Traced(_Tensors):
    """Tensors of torch.export."""

    takes_packed = False

    def recur(self, form: Form, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        output, *states = _symbols(*form, *inputs)
        return output, *states


def _symbols(
    operator: str,
    count: int,
    hidden: int,
    directions: int,
    attributes: dict[str, Any],
    *inputs: Tensor | None,
) -> list[Tensor]:
    """Put torch's symbols in the place of a node and of what brings its output to (T, B, D * H)."""
    x, *_ = inputs
    assert x is not None
    steps, batch = x.shape[0], x.shape[1]
    output, *states = torch.onnx.ops.symbolic_multi_out(
        operator,
        inputs,
        attributes,
        dtypes=(x.dtype,) * (1 + count),
        shapes=((steps, directions, batch, hidden), *[(directions, batch, hidden)] * count),
    )
    if directions == 1:
        return [output.squeeze(1), *states]
    # Not torch's reshape: of sizes that may change it would write a node for each.
    output = torch.onnx.ops.symbolic(
        "Reshape",
        (output.transpose(1, 2), torch.tensor([0, 0, 2 * hidden])),
        dtype=x.dtype,
        shape=(steps, batch, 2 * hidden),
    )
    return [output, *states]


class _Scripted(_Tensors):
    """Tensors of torch.jit's tracer, which want their values.

    Rows that the model itself packs and pads again are rows with lengths there: torch moves the
    packing behind a node whose sequence_lens are batch_sizes, where padding takes it back.
    """

    takes_packed = True

    def __init__(self, run: Callable[[], Results]) -> None:
        self._run = run

    def recur(self, form: Form, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        # The tracer takes no value for a constant that has a gradient.
        with torch.no_grad():
            found: tuple[Tensor, ...] = _Node.apply(self._run, form, *inputs)  # type: ignore[no-untyped-call]
        return found


class _Node(torch.autograd.Function):
    """What the tracer writes down as one node, by `symbolic`."""

    @staticmethod
    def forward(
        ctx: Any, run: Callable[[], Results], form: Form, *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        # What computes the values is no part of the model.
        found = unrecorded(run)()
        return found.output, *found.last

    @staticmethod
    def symbolic(g: Any, run: Any, form: Form, *inputs: Any) -> tuple[Any, ...]:
        attributes = {
            name + ("_s" if isinstance(value, (str, list)) else "_i"): value
            for name, value in form.attributes.items()
        }
        x, _, _, _, steps, *_ = inputs
        if steps is not None and x.type().dim() == 2 and not _is_packed_here(steps):
            raise NoCounterpartError(f"batch_sizes: {_PACKED}")
        absent = g.op("prim::Constant")
        absent.setType(torch._C.OptionalType.ofTensor())
        given = [absent if value is None else value for value in inputs]
        count = 1 + form.states
        output, *states = g.op(form.operator, *given, outputs=count, **attributes)
        if form.directions == 1:
            # A squeeze is written differently in each version of ONNX.
            return torch.onnx.symbolic_helper._squeeze_helper(g, output, [1]), *states
        output = g.op("Transpose", output, perm_i=[0, 2, 1, 3])
        shape = g.op("Constant", value_t=torch.tensor([0, 0, -1]))
        return g.op("Reshape", output, shape), *states


def _is_packed_here(batch_sizes: Any) -> bool:
    """Whether pack_padded_sequence within the model made these."""
    return bool(batch_sizes.node().kind() == "prim::PackPadded")


def _is_exporting() -> bool:
    return bool(torch.onnx.is_in_onnx_export())


# The strict mode of torch.export reads Python instead of running it. It takes this answer for a
# constant, and `_symbols` for one call, since torch.onnx is closed to it.
when_imported("torch._dynamo", lambda compiler: compiler.assume_constant_result(_is_exporting))
when_imported("torch._dynamo", lambda compiler: compiler.allow_in_graph(_symbols))


def why_not(call: Call) -> str | None:
    """Say why no node is put in the place of a layer."""
    if not is_traced():
        return "nothing is traced"
    if not _is_exporting():
        return "it does not run"
    return None if call.input.dtype in DTYPES else "ONNX has the engine's dtypes alone"


def layer(call: Call) -> Results:
    """Put a node in the place of a layer, without the c of every step.

    Raises NoCounterpartError where ONNX has no node for such a layer.
    """
    unrecorded(check_call)(call, values=False)
    is_scripted = torch._C._get_tracing_state() is not None
    write = _Scripted(lambda: results(call)) if is_scripted else _Traced()
    output, *last = node(write, {**call.named_parameters(), "all_c": call.all_states})
    return Results(output, tuple(last))
