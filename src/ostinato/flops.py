"""How many operations a layer takes, for torch.utils.flop_counter.

As torch counts: 2 m n k for each matrix product, nothing for what is done element by element.

Legend: N rows of all steps, I input, H hidden, O output of a step, G gates, D directions.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ostinato import arrays
from ostinato.call import Call
from ostinato.later import when_imported
from ostinato.sizes import Sizes
from ostinato.tensors import check_call


def register() -> None:
    """Enter the formulas into torch's table, when somebody imports it."""
    when_imported("torch.utils.flop_counter", _register)


def _register(module: ModuleType) -> None:
    operators = torch.ops.ostinato
    register = module.register_flop_formula
    register(operators.layer, get_raw=True)(_forward)
    register(operators.layer_backward, get_raw=True)(_backward)


def _forward(*arguments: Any, out_val: Any = None, **named: Any) -> int:
    """Count forward: the products with weight_ih, weight_hh and weight_hr."""
    call, _ = _bind("layer", arguments, named)
    sizes = check_call(call, values=False)
    rows, _ = _rows(call)
    return sizes.directions * rows * sum(_per_row(call, sizes))


def _backward(*arguments: Any, out_val: Any = None, **named: Any) -> int:
    """Count backward: of each product of forward the two gradients, as far as they are wanted."""
    call, given = _bind("layer_backward", arguments, named)
    sizes = check_call(call, values=False)
    rows, starts = _rows(call)
    input, state, projection = _per_row(call, sizes)
    wanted = call.padded_parts(given["wanted"])
    (dh_0, *_), (dreset_h, *_), dw = wanted.initial, wanted.reset_to, wanted.weights
    # Nothing is sent back past the first step of a row, unless somebody asks for it.
    sent = rows if dh_0 or dreset_h else rows - starts
    shared = rows * (input * wanted.input + projection) + sent * state
    if call.recompute:
        shared += rows * (input + state)
    found: int = sizes.directions * shared
    per_direction = len(dw) // sizes.directions
    for first in range(0, len(dw), per_direction):
        of_input, of_state, *others = dw[first : first + per_direction]
        found += rows * (input * of_input + state * of_state)
        if projection:
            found += rows * projection * others[-1]
    return found


def _bind(operator: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Call, Any]:
    """Return the call and all arguments by name, as the schema names them."""
    schema = getattr(torch.ops.ostinato, operator).default._schema
    given = {argument.name: argument.default_value for argument in schema.arguments}
    given.update(zip(given, arguments, strict=False))
    given.update(named)
    return Call.of(*(given[each.name] for each in arrays.PARAMETERS)), given


def _per_row(call: Call, sizes: Sizes) -> tuple[int, int, int]:
    """Return the operations of the three products for one row of a step in one direction."""
    kind, twice = call.kind, 2 * sizes.hidden
    of_input, of_state = twice * kind.input_gates, twice * kind.gates
    return of_input * sizes.input, of_state * sizes.output, twice * sizes.projection


def _rows(call: Call) -> tuple[int, int]:
    """Return N, and how many of these rows are the first of a sequence.

    Fake tensors have no values; then every row of a batch takes every step.
    """
    input, sizes, lengths = call.input, call.batch_sizes, call.lengths
    if sizes is not None:
        begun = int(sizes[0]) if _has_values(sizes) and len(sizes) else call.batch
        return input.shape[0], begun
    steps, batch = input.shape[:2]
    if lengths is not None and _has_values(lengths):
        return int(lengths.sum()), int((lengths > 0).sum())
    return steps * batch, batch if steps else 0


def _has_values(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.device.type != "meta"
