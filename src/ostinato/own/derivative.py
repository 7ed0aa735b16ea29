"""The derivative of a step in reverse mode, by torch's conventions.

relu'(0) = 0 and abs'(0) = 0; minimum and maximum halve the gradient of a tie; clamp passes it at
its bounds; a choice passes it to what was chosen, by selection: no product with 0, which is NaN
beside infinity. Where a derivative can be had from the result it is: exp, sqrt, sigmoid, tanh.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from ostinato.own.arithmetic import Arithmetic, Instruction
from ostinato.own.graph import SOFTPLUS_THRESHOLD

# The gradient of each argument, or None where there is none: of the arithmetic, the operation, its
# place and the gradient of its result.
_Rule = Callable[[Arithmetic, Instruction, int, int], Iterable[int | None]]


def differentiate(values: Arithmetic, results: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Append the derivatives of what has been computed.

    Args:
        values: the arithmetic of a step; it grows.
        results: places of results, and of their gradients.

    Returns:
        The place of the gradient of each place that has one.

    Example:
        >>> values = Arithmetic()
        >>> x = values.value("x", index=0)
        >>> y, grad = values.apply("tanh", x), values.value("grad", index=0)
        >>> values.items[differentiate(values, [(y, grad)])[x]].op
        'tanh_slope'
    """
    grads: dict[int, int] = {}

    def arrive(place: int, grad: int) -> None:
        known = grads.get(place)
        grads[place] = grad if known is None else values.apply("add", known, grad)

    for place, grad in results:
        arrive(place, grad)
    for place in range(max(grads), -1, -1):
        item = values.items[place]
        if place not in grads or item.op not in _RULES:
            continue
        pieces = _RULES[item.op](values, item, place, grads[place])
        for argument, piece in zip(item.args, pieces, strict=True):
            if piece is not None and values.number_at(argument) is None:
                arrive(argument, piece)
    return grads


def _add(values: Arithmetic, item: Instruction, y: int, g: int) -> Iterable[int | None]:
    return g, g


def _sub(values: Arithmetic, item: Instruction, y: int, g: int) -> Iterable[int | None]:
    return g, values.apply("neg", g)


def _mul(values: Arithmetic, item: Instruction, y: int, g: int) -> Iterable[int | None]:
    a, b = item.args
    return values.apply("mul", g, b), values.apply("mul", g, a)


def _div(values: Arithmetic, item: Instruction, y: int, g: int) -> Iterable[int | None]:
    _, b = item.args
    slope = values.apply("mul", g, values.apply("div", y, b))
    return values.apply("div", g, b), values.apply("neg", slope)


def _neg(values: Arithmetic, item: Instruction, y: int, g: int) -> Iterable[int | None]:
    return (values.apply("neg", g),)


def _between(values: Arithmetic, item: Instruction, y: int, g: int) -> Iterable[int | None]:
    """(1 - z) * a + z * b."""
    z, a, b = item.args
    rest = values.apply("sub", values.number(1.0), z)
    return (
        values.apply("mul", g, values.apply("sub", b, a)),
        values.apply("mul", g, rest),
        values.apply("mul", g, z),
    )


def _slope(op: str) -> _Rule:
    """The rule of a function whose derivative the engine has, from its result."""

    def rule(values: Arithmetic, item: Instruction, y: int, g: int) -> Iterable[int | None]:
        return (values.apply(op, g, y),)

    return rule


def _exp(values: Arithmetic, item: Instruction, y: int, g: int) -> Iterable[int | None]:
    return (values.apply("mul", g, y),)


def _log(values: Arithmetic, item: Instruction, y: int, g: int) -> Iterable[int | None]:
    (x,) = item.args
    return (values.apply("div", g, x),)


def _sqrt(values: Arithmetic, item: Instruction, y: int, g: int) -> Iterable[int | None]:
    return (values.apply("div", g, values.apply("add", y, y)),)


def _rsqrt(values: Arithmetic, item: Instruction, y: int, g: int) -> Iterable[int | None]:
    half = values.apply("mul", g, values.number(-0.5))
    return (values.apply("mul", half, values.power(y, 3)),)


def _abs(values: Arithmetic, item: Instruction, y: int, g: int) -> Iterable[int | None]:
    (x,) = item.args
    zero = values.number(0.0)
    is_positive, is_negative = (values.apply(op, x, zero) for op in ("gt", "lt"))
    other = values.apply("select", is_negative, values.apply("neg", g), zero)
    return (values.apply("select", is_positive, g, other),)


def _erf(values: Arithmetic, item: Instruction, y: int, g: int) -> Iterable[int | None]:
    (x,) = item.args
    bell = values.apply("exp", values.apply("neg", values.apply("mul", x, x)))
    return (
        values.apply("mul", values.apply("mul", g, values.number(2 / math.sqrt(math.pi))), bell),
    )


def _softplus(values: Arithmetic, item: Instruction, y: int, g: int) -> Iterable[int | None]:
    (x,) = item.args
    is_linear = values.apply("gt", x, values.number(SOFTPLUS_THRESHOLD))
    slope = values.apply("mul", g, values.apply("sigmoid", x))
    return (values.apply("select", is_linear, g, slope),)


def _logsigmoid(values: Arithmetic, item: Instruction, y: int, g: int) -> Iterable[int | None]:
    (x,) = item.args
    return (values.apply("mul", g, values.apply("sigmoid", values.apply("neg", x))),)


def _power(values: Arithmetic, item: Instruction, y: int, g: int) -> Iterable[int | None]:
    (x,) = item.args
    assert item.index is not None
    slope = values.apply("mul", values.power(x, item.index - 1), values.number(item.index))
    return (values.apply("mul", g, slope),)


def _extreme(loses: str, wins: str) -> _Rule:
    """The rule of minimum and maximum: by which comparison the first loses, and the second."""

    def rule(values: Arithmetic, item: Instruction, y: int, g: int) -> Iterable[int | None]:
        a, b = item.args
        is_tie = values.apply("eq", a, b)
        shared = values.apply("select", is_tie, values.apply("mul", g, values.number(0.5)), g)
        zero = values.number(0.0)
        # No comparison is true of NaN, which passes the gradient to both.
        return tuple(
            values.apply("select", values.apply(op, a, b), zero, shared) for op in (loses, wins)
        )

    return rule


def _clamp(values: Arithmetic, item: Instruction, y: int, g: int) -> Iterable[int | None]:
    x, low, high = item.args
    zero = values.number(0.0)
    bounds = [(low, "ge", -math.inf), (high, "le", math.inf)]
    masks = [
        values.apply(op, x, bound)
        for bound, op, absent in bounds
        if values.number_at(bound) != absent
    ]
    if not masks:
        return g, None, None
    inside = masks[0]
    for mask in masks[1:]:
        inside = values.apply("logical_and", inside, mask)
    crossed = values.apply("lt", high, low)
    below = values.apply("logical_and", values.apply("lt", x, low), values.apply("lt", low, high))
    above = values.apply("logical_or", values.apply("gt", x, high), crossed)
    return tuple(values.apply("select", mask, g, zero) for mask in (inside, below, above))


def _select(values: Arithmetic, item: Instruction, y: int, g: int) -> Iterable[int | None]:
    mask, _, _ = item.args
    zero = values.number(0.0)
    return None, values.apply("select", mask, g, zero), values.apply("select", mask, zero, g)


_RULES: dict[str, _Rule] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "between": _between,
    "sigmoid": _slope("sigmoid_slope"),
    "tanh": _slope("tanh_slope"),
    "relu": _slope("relu_slope"),
    "exp": _exp,
    "log": _log,
    "sqrt": _sqrt,
    "rsqrt": _rsqrt,
    "abs": _abs,
    "erf": _erf,
    "softplus": _softplus,
    "logsigmoid": _logsigmoid,
    "pow": _power,
    "minimum": _extreme("gt", "lt"),
    "maximum": _extreme("lt", "gt"),
    "clamp": _clamp,
    "select": _select,
}
