"""What torch's functions become when a step calls them: nodes of its graph, or a refusal."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch

from ostinato.own.graph import COMPARISONS, LARGEST_POWER, LEAVES, SOFTPLUS_THRESHOLD, TAKES
from ostinato.own.refused import reason_of
from ostinato.own.values import VALUE_TYPE, Recorder, Rows, Symbol, Value

_Function = Callable[..., Any]
_AnyFunction = TypeVar("_AnyFunction", bound=_Function)


class TorchRecorder(Recorder):
    """A recorder that knows torch's functions by their names."""

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a function, for each row where a parameter (n, H) is given as a whole."""
        name = _plain(name)
        if name == "unbind":
            return self._unbind(*args, **kwargs)
        rows = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Rows)]
        return self._call_rows(name, rows, args, kwargs) if rows else self._call(name, args, kwargs)

    def attribute(self, symbol: Symbol, name: str) -> Any:
        """Return a method, or say that there is none."""
        if name == "unbind":
            return partial(self._unbind, symbol)
        if name in _METHODS:
            return partial(_METHODS[name], self, symbol)
        if name in _FUNCTIONS:
            return lambda *args, **kwargs: self.call(name, (symbol, *args), kwargs)
        raise self.attribute_error(f"value.{name}", *reason_of(_plain(name)))

    def _unbind(self, input: Symbol, dim: int = 0) -> tuple[Value, ...]:
        if not isinstance(input, Rows) or dim != 0:
            raise self.error("torch.unbind", *reason_of("unbind"))
        return tuple(input)

    def _call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name not in _FUNCTIONS:
            raise self.error(f"torch.{name}", *reason_of(name))
        function = _FUNCTIONS[name]
        try:
            _signature(function).bind(self, *args, **kwargs)
        except TypeError as error:
            raise self.error(f"torch.{name}", f"this call is not recorded: {error}") from None
        return function(self, *args, **kwargs)

    def _call_rows(
        self, name: str, rows: list[Rows], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Rows:
        count, label = len(rows[0]), rows[0].name
        for value in (*args, *kwargs.values()):
            fits = len(value) == count if isinstance(value, Rows) else self._is_per_unit(value)
            if not fits:
                raise self.error(
                    f"torch.{name}",
                    f"got all {count} rows of self.{label} beside what is no parameter (H,)",
                    f"one of them, self.{label}[0]",
                )

        def row(value: Any, k: int) -> Any:
            return value[k] if isinstance(value, Rows) else value

        made = tuple(
            self._call(
                name,
                tuple(row(value, k) for value in args),
                {key: row(value, k) for key, value in kwargs.items()},
            )
            for k in range(count)
        )
        return Rows(self, label, made)

    def _is_per_unit(self, value: Any) -> bool:
        """Whether something is a number for each unit, the same in each row, or no value."""
        if not isinstance(value, Value):
            return True
        if value.node.op in LEAVES and value.node.op != "p":
            return False
        return all(self._is_per_unit(Value(self, place)) for place in value.node.args)


@lru_cache(maxsize=256)
def _signature(function: _Function) -> inspect.Signature:
    return inspect.signature(function)


def _plain(name: str) -> str:
    """Return a function's name as it is known: `__add__`, `special_expit` and the like."""
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
    name = name.removeprefix("special_")
    return _SAME.get(name, name)


# Other names of the same function.
_SAME = {
    other: name
    for name, others in {
        "div": "truediv true_divide divide",
        "mul": "multiply",
        "sub": "subtract",
        "neg": "negative",
        "abs": "absolute",
        "sigmoid": "expit",
        "clamp": "clip",
        "lt": "less",
        "le": "less_equal",
        "gt": "greater",
        "positive": "pos",
        "ge": "greater_equal",
        "ne": "not_equal",
        "sign": "sgn",
        "logsigmoid": "log_sigmoid",
        "threshold": "_threshold",
        "logical_and": "and bitwise_and",
        "logical_or": "or bitwise_or",
        "logical_xor": "xor bitwise_xor",
        "logical_not": "invert bitwise_not",
    }.items()
    for other in others.split()
}
_FUNCTIONS: dict[str, _Function] = {}


def _records(*names: str) -> Callable[[_AnyFunction], _AnyFunction]:
    def enter(function: _AnyFunction) -> _AnyFunction:
        _FUNCTIONS.update(dict.fromkeys(names, function))
        return function

    return enter


def _unary(name: str) -> None:
    def record(to: Recorder, input: Any, *, inplace: bool = False) -> Value:
        _not_in_place(to, name, inplace)
        return to.node(name, to.only_number(f"torch.{name}", input).place)

    _FUNCTIONS[name] = record


# Those that torch has under the same name, with one argument. Others are written below.
for _name, _takes in TAKES.items():
    if _takes == "n":
        _unary(_name)


def _comparison(name: str) -> None:
    def record(to: Recorder, input: Any, other: Any) -> Value:
        a, b = (to.value(f"torch.{name}", each) for each in (input, other))
        if a.is_mask and b.is_mask and name in ("eq", "ne"):
            differs = _xor(to, a, b)
            return differs if name == "ne" else to.node("logical_not", differs.place)
        a, b = (to.number(f"torch.{name}", each) for each in (a, b))
        return to.node(name, a.place, b.place)

    _FUNCTIONS[name] = record


for _name in COMPARISONS:
    _comparison(_name)


def _not_in_place(to: Recorder, name: str, inplace: bool) -> None:
    if inplace:
        raise to.error(f"torch.{name}", "an in-place operation", "the same without inplace=True")


def _two(to: Recorder, name: str, a: Any, b: Any, alpha: Any = 1) -> tuple[Value, Value]:
    """Two numbers of which the second is multiplied."""
    first, second = to.number(name, a), to.number(name, b)
    return first, second if alpha == 1 else second * alpha


@_records("add")
def _add(to: Recorder, input: Any, other: Any, *, alpha: Any = 1) -> Value:
    a, b = to.value("torch.add", input), to.value("torch.add", other)
    if a.is_mask and b.is_mask:
        return to.node("logical_or", a.place, b.place)
    a, b = _two(to, "torch.add", a, b, alpha)
    return to.node("add", a.place, b.place)


@_records("sub")
def _sub(to: Recorder, input: Any, other: Any, *, alpha: Any = 1) -> Value:
    a, b = (to.only_number("torch.sub", each) for each in (input, other))
    b = b if alpha == 1 else b * alpha
    return to.node("sub", a.place, b.place)


@_records("rsub")
def _rsub(to: Recorder, input: Any, other: Any, *, alpha: Any = 1) -> Value:
    return _sub(to, other, input, alpha=alpha)


@_records("mul")
def _mul(to: Recorder, input: Any, other: Any) -> Value:
    a, b = to.value("torch.mul", input), to.value("torch.mul", other)
    if a.is_mask and b.is_mask:
        return to.node("logical_and", a.place, b.place)
    a, b = _two(to, "torch.mul", a, b)
    return to.node("mul", a.place, b.place)


@_records("div")
def _div(to: Recorder, input: Any, other: Any, *, rounding_mode: str | None = None) -> Value:
    if rounding_mode is not None:
        raise to.error("torch.div", *reason_of("floor_divide"))
    a, b = _two(to, "torch.div", input, other)
    return to.node("div", a.place, b.place)


@_records("pow")
def _pow(to: Recorder, input: Any, exponent: Any) -> Value:
    power = to.only_number("torch.pow", exponent).node
    if power.op != "const" or power.value is None:
        raise to.error("torch.pow", "the exponent is a value", "torch.exp(b * torch.log(a))")
    number, base = power.value, to.only_number("torch.pow", input)
    roots = {0.5: "sqrt", -0.5: "rsqrt"}
    if number in roots:
        return to.node(roots[number], base.place)
    if number != int(number) or abs(number) > LARGEST_POWER:
        raise to.error(
            "torch.pow",
            f"expected an integer of at most {LARGEST_POWER}, 0.5 or -0.5, got {number}",
            "torch.exp(number * torch.log(value))",
        )
    if number in (0, 1):
        return base if number else to.const(1.0)
    return 1 / base if number == -1 else to.node("pow", base.place, value=int(number))


@_records("square")
def _square(to: Recorder, input: Any) -> Value:
    value = to.only_number("torch.square", input)
    return to.node("mul", value.place, value.place)


@_records("reciprocal")
def _reciprocal(to: Recorder, input: Any) -> Value:
    return to.node("div", to.const(1.0).place, to.only_number("torch.reciprocal", input).place)


@_records("positive", "clone", "contiguous")
def _same(to: Recorder, input: Any, *, memory_format: Any = None) -> Value:
    return Value(to, to.value("torch.clone", input).place)


@_records("minimum")
def _minimum(to: Recorder, input: Any, other: Any) -> Value:
    return _extreme(to, "minimum", input, other)


@_records("maximum")
def _maximum(to: Recorder, input: Any, other: Any) -> Value:
    return _extreme(to, "maximum", input, other)


def _extreme(to: Recorder, name: str, a: Any, b: Any) -> Value:
    first, second = (to.only_number(f"torch.{name}", each) for each in (a, b))
    return to.node(name, first.place, second.place)


@_records("min")
def _min(to: Recorder, input: Any, other: Any = None) -> Value:
    if not isinstance(other, Symbol | torch.Tensor):
        raise to.error("torch.min", *reason_of("amin"))
    return _extreme(to, "minimum", input, other)


@_records("max")
def _max(to: Recorder, input: Any, other: Any = None) -> Value:
    if not isinstance(other, Symbol | torch.Tensor):
        raise to.error("torch.max", *reason_of("amax"))
    return _extreme(to, "maximum", input, other)


@_records("clamp")
def _clamp(to: Recorder, input: Any, min: Any = None, max: Any = None) -> Value:
    value = to.only_number("torch.clamp", input)
    low = to.only_number("torch.clamp", -math.inf if min is None else min)
    high = to.only_number("torch.clamp", math.inf if max is None else max)
    return to.node("clamp", value.place, low.place, high.place)


@_records("clamp_min")
def _clamp_min(to: Recorder, input: Any, min: Any) -> Value:
    return _clamp(to, input, min)


@_records("clamp_max")
def _clamp_max(to: Recorder, input: Any, max: Any) -> Value:
    return _clamp(to, input, None, max)


@_records("where")
def _where(to: Recorder, condition: Any, input: Any = None, other: Any = None) -> Value:
    if input is None or other is None:
        raise to.error("torch.where", "expected a mask and two values", "torch.where(mask, a, b)")
    mask = to.mask("torch.where", condition)
    a, b = to.value("torch.where", input), to.value("torch.where", other)
    if a.is_mask and b.is_mask:
        return (mask & a) | (~mask & b)
    return to.where(mask, to.number("torch.where", a), to.number("torch.where", b))


@_records("Tensor.where")
def _tensor_where(to: Recorder, input: Any, condition: Any, other: Any) -> Value:
    return _where(to, condition, input, other)


@_records("masked_fill")
def _masked_fill(to: Recorder, input: Any, mask: Any, value: Any) -> Value:
    return _where(to, mask, value, input)


@_records("logical_and")
def _and(to: Recorder, input: Any, other: Any) -> Value:
    a, b = (to.mask("torch.logical_and", each) for each in (input, other))
    return to.node("logical_and", a.place, b.place)


@_records("logical_or")
def _or(to: Recorder, input: Any, other: Any) -> Value:
    a, b = (to.mask("torch.logical_or", each) for each in (input, other))
    return to.node("logical_or", a.place, b.place)


@_records("logical_xor")
def _xor(to: Recorder, input: Any, other: Any) -> Value:
    a, b = (to.mask("torch.logical_xor", each) for each in (input, other))
    return (a | b) & ~(a & b)


@_records("logical_not")
def _not(to: Recorder, input: Any) -> Value:
    return to.node("logical_not", to.mask("torch.logical_not", input).place)


@_records("isnan")
def _isnan(to: Recorder, input: Any) -> Value:
    value = to.only_number("torch.isnan", input)
    return to.node("ne", value.place, value.place)


@_records("sign")
def _sign(to: Recorder, input: Any) -> Value:
    value = to.only_number("torch.sign", input)
    negative = to.where(value < 0, to.const(-1.0), to.const(0.0))
    return to.where(value > 0, to.const(1.0), negative)


@_records("zeros_like")
def _zeros_like(to: Recorder, input: Any, **options: Any) -> Value:
    return _full_like(to, input, 0.0, **options)


@_records("ones_like")
def _ones_like(to: Recorder, input: Any, **options: Any) -> Value:
    return _full_like(to, input, 1.0, **options)


@_records("full_like")
def _full_like(to: Recorder, input: Any, fill_value: Any, **options: Any) -> Value:
    to.only_number("torch.full_like", input)
    if any(option is not None for option in options.values()):
        raise to.error("torch.full_like", f"got {', '.join(options)}", "no further arguments")
    return to.only_number("torch.full_like", fill_value)


@_records("lerp")
def _lerp(to: Recorder, input: Any, end: Any, weight: Any) -> Value:
    a, b, w = (to.only_number("torch.lerp", each) for each in (input, end, weight))
    return a + w * (b - a)


@_records("addcmul")
def _addcmul(to: Recorder, input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Value:
    a, b, c = (to.only_number("torch.addcmul", each) for each in (input, tensor1, tensor2))
    return a + (b * c if value == 1 else b * value * c)


@_records("addcdiv")
def _addcdiv(to: Recorder, input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Value:
    a, b, c = (to.only_number("torch.addcdiv", each) for each in (input, tensor1, tensor2))
    return a + (b / c if value == 1 else b * value / c)


@_records("softplus")
def _softplus(
    to: Recorder, input: Any, beta: Any = 1, threshold: Any = SOFTPLUS_THRESHOLD
) -> Value:
    value = to.only_number("softplus", input)
    if threshold != SOFTPLUS_THRESHOLD:
        raise to.error("softplus", f"expected threshold=20, got {threshold}", "torch's default")
    scaled = value if beta == 1 else value * beta
    made = to.node("softplus", scaled.place)
    return made if beta == 1 else made / beta


@_records("logsigmoid")
def _logsigmoid(to: Recorder, input: Any) -> Value:
    # No threshold on this side: log1p(exp(-|x|)).
    value = to.only_number("logsigmoid", input)
    return _extreme(to, "minimum", value, 0.0) - _softplus(to, -abs(value))


@_records("gelu")
def _gelu(to: Recorder, input: Any, *, approximate: str = "none") -> Value:
    value = to.only_number("gelu", input)
    if approximate == "tanh":
        return to.node("gelu", value.place)
    return value * 0.5 * (1 + to.node("erf", (value * math.sqrt(0.5)).place))


@_records("mish")
def _mish(to: Recorder, input: Any, inplace: bool = False) -> Value:
    _not_in_place(to, "mish", inplace)
    value = to.only_number("mish", input)
    return value * to.node("tanh", _softplus(to, value).place)


@_records("softsign")
def _softsign(to: Recorder, input: Any) -> Value:
    value = to.only_number("softsign", input)
    return value / (abs(value) + 1)


@_records("hardtanh")
def _hardtanh(
    to: Recorder, input: Any, min_val: Any = -1.0, max_val: Any = 1.0, inplace: bool = False
) -> Value:
    # No clamp: torch's gradient is zero at the bounds.
    _not_in_place(to, "hardtanh", inplace)
    value = to.only_number("hardtanh", input)
    above = to.where(value >= max_val, to.const(max_val), value)
    return to.where(value <= min_val, to.const(min_val), above)


@_records("relu6")
def _relu6(to: Recorder, input: Any, inplace: bool = False) -> Value:
    return _hardtanh(to, input, 0.0, 6.0, inplace)


@_records("hardsigmoid")
def _hardsigmoid(to: Recorder, input: Any, inplace: bool = False) -> Value:
    return _hardtanh(to, to.only_number("hardsigmoid", input) + 3, 0.0, 6.0, inplace) / 6


@_records("hardswish")
def _hardswish(to: Recorder, input: Any, inplace: bool = False) -> Value:
    value = to.only_number("hardswish", input)
    return value * _hardtanh(to, value + 3, 0.0, 6.0, inplace) / 6


@_records("leaky_relu")
def _leaky_relu(
    to: Recorder, input: Any, negative_slope: Any = 0.01, inplace: bool = False
) -> Value:
    _not_in_place(to, "leaky_relu", inplace)
    value = to.only_number("leaky_relu", input)
    return to.where(value > 0, value, value * negative_slope)


@_records("threshold")
def _threshold(
    to: Recorder, input: Any, threshold: Any, value: Any, inplace: bool = False
) -> Value:
    _not_in_place(to, "threshold", inplace)
    given = to.only_number("threshold", input)
    return to.where(given <= threshold, to.const(value), given)


# What has another meaning, or none, as a function of the module torch.
_METHODS: dict[str, _Function] = {}


def _method(*names: str) -> Callable[[_AnyFunction], _AnyFunction]:
    def enter(function: _AnyFunction) -> _AnyFunction:
        _METHODS.update(dict.fromkeys(names, function))
        return function

    return enter


@_method("where")
def _where_of(to: Recorder, input: Any, condition: Any, other: Any) -> Value:
    return _where(to, condition, input, other)


@_method("to", "type", "type_as")
def _to(to: Recorder, input: Any, target: Any = None, **options: Any) -> Value:
    value, target = to.value("value.to", input), options.get("dtype", target)
    if target is VALUE_TYPE or (isinstance(target, Value) and not target.is_mask):
        return to.number("value.to", value)
    if value.is_mask and isinstance(target, torch.dtype) and target.is_floating_point:
        return to.number("value.to", value)
    raise to.error(f"value.to({target})", *reason_of("to"))


@_method("float")
def _float(to: Recorder, input: Any) -> Value:
    value = to.value("value.float", input)
    if not value.is_mask:
        raise to.error("value.float()", *reason_of("to"))
    return to.number("value.float", value)
