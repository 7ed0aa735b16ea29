"""Values that record: what a step is given instead of tensors."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch

from ostinato.own.errors import StepAttributeError, StepError, user_frame
from ostinato.own.graph import LEAVES, Graph, Node, Sizes

_SHAPES = "each value is (B, H), and a step computes each element for itself"


class Recorder:
    """The nodes of one trace; what is recorded twice is one node."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[Node] = []
        self._places: dict[str, int] = {}

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a function of torch, by its name (`ostinato.own.functions`)."""
        raise NotImplementedError

    def attribute(self, symbol: Symbol, name: str) -> Any:
        """Return a method of torch's tensors that is called on a value."""
        raise NotImplementedError

    def node(self, op: str, *args: int, value: float | int | None = None) -> Value:
        """Record a node, or find it."""
        if not torch.is_grad_enabled():
            raise self.error("torch.no_grad", "it changes the gradient", "the step without it")
        node = Node(op, args, value)
        # By the text, which tells 0 from -0.
        place = self._places.setdefault(node.text(), len(self.nodes))
        if place == len(self.nodes):
            self.nodes.append(node)
        return Value(self, place)

    def const(self, number: float) -> Value:
        """Record a number."""
        return self.node("const", value=float(number))

    def error(self, operation: str, reason: str, instead: str = "") -> StepError:
        """Return the error for what the user's code does at this moment."""
        return self._located(StepError(operation, reason, instead))

    def attribute_error(self, operation: str, reason: str, instead: str = "") -> StepError:
        """Return the same as an AttributeError, so that `hasattr` answers no."""
        return self._located(StepAttributeError(operation, reason, instead))

    def _located(self, error: StepError) -> StepError:
        frame = user_frame()
        if frame is None:
            return error
        return error.at(self.name, frame.f_code.co_filename, frame.f_lineno)

    def value(self, operation: str, given: Any) -> Value:
        """Return an argument of `operation` as a value: a value of this trace or a number."""
        if isinstance(given, Value):
            if given.recorder is not self:
                raise self.error(operation, "got a value of another run of a step", "what is given")
            return given
        if isinstance(given, Rows):
            raise self.error(
                operation,
                f"got all {len(given)} rows of self.{given.name}",
                f"one of them, self.{given.name}[0]",
            )
        if isinstance(given, Buffer):
            raise self.error(
                operation,
                f"self.{given.name} is a buffer, which may change after the step was recorded",
                "a Python number, or an nn.Parameter with requires_grad=False",
            )
        if isinstance(given, torch.Tensor):
            return self.const(self._number_of(operation, given))
        if isinstance(given, numbers.Real):
            return self.const(float(given))
        raise self.error(operation, f"expected a value or a number, got {type(given).__name__}")

    def number(self, operation: str, given: Any) -> Value:
        """`value`, with a mask as 1 and 0."""
        value = self.value(operation, given)
        return self.where(value, self.const(1.0), self.const(0.0)) if value.is_mask else value

    def only_number(self, operation: str, given: Any) -> Value:
        """`value`, which may not be a mask."""
        value = self.value(operation, given)
        if value.is_mask:
            raise self.error(operation, "got a mask", "torch.where(mask, a, b), or mask.float()")
        return value

    def mask(self, operation: str, given: Any) -> Value:
        """`value`, which has to be a mask."""
        value = self.value(operation, given)
        if not value.is_mask:
            raise self.error(operation, "expected a mask, got a number", "a comparison: x > 0")
        return value

    def where(self, mask: Value, a: Value, b: Value) -> Value:
        """Record a choice."""
        return self.node("where", mask.place, a.place, b.place)

    def _number_of(self, operation: str, tensor: torch.Tensor) -> float:
        if tensor.dim() or tensor.requires_grad:
            shape = tuple(tensor.shape)
            raise self.error(
                operation,
                f"got a tensor {shape} that is neither an argument nor a parameter of shape (H,)"
                " or (n, H)",
                "an nn.Parameter of the cell, a Python number, or a drive",
            )
        if tensor.device.type != "cpu" or not (tensor.is_floating_point() or _is_integer(tensor)):
            raise self.error(
                operation, f"got a tensor of {tensor.dtype} on {tensor.device}", "a Python number"
            )
        return float(tensor)

    def graph(self, outputs: Iterable[int], sizes: Sizes) -> Graph:
        """Return what the outputs need, in the order of the step."""
        outputs = tuple(outputs)
        needed = set(outputs)
        for place in reversed(range(len(self.nodes))):
            if place in needed:
                needed.update(self.nodes[place].args)
        places = {old: new for new, old in enumerate(sorted(needed))}
        nodes = tuple(
            self.nodes[old]._replace(args=tuple(places[a] for a in self.nodes[old].args))
            for old in places
        )
        return Graph(self.name, *sizes, nodes, tuple(places[place] for place in outputs))


def _is_integer(tensor: torch.Tensor) -> bool:
    return not tensor.is_complex() and tensor.dtype is not torch.bool


class ValueType:
    """The dtype of a value, which is the layer's."""

    def __repr__(self) -> str:
        return "the dtype of the layer"


VALUE_TYPE = ValueType()


def _operator(name: str, *, swapped: bool = False) -> Callable[..., Value]:
    def operator(self: Symbol, *others: Any) -> Value:
        arguments = (*others, self) if swapped else (self, *others)
        made: Value = self.recorder.call(name, arguments, {})
        return made

    return operator


def _assigned(name: str) -> Callable[..., Any]:
    """An operator like +=: as in torch, all names of the value see what becomes of it."""

    def operator(self: Value, other: Any) -> Value:
        if self.node.op in LEAVES:
            reason = "an in-place operation on an argument of the step or a parameter"
            raise self.recorder.error(f"value {name}=", reason, f"a = a {name} b")
        made = self.recorder.call(_ASSIGNED[name], (self, other), {})
        if made.is_mask != self.is_mask:
            raise self.recorder.error(f"value {name}=", "a number became a mask", "a new name")
        self.place = made.place
        return self

    return operator


_ASSIGNED = {
    "+": "add",
    "-": "sub",
    "*": "mul",
    "/": "div",
    "**": "pow",
    "&": "logical_and",
    "|": "logical_or",
    "^": "logical_xor",
}


def _refused(operation: str, reason: str, instead: str) -> Callable[..., Any]:
    def refuse(self: Symbol, *args: Any, **kwargs: Any) -> NoReturn:
        raise self.recorder.error(operation, reason, instead)

    return refuse


class Symbol:
    """What records: a value, or the rows of a parameter."""

    # NumPy leaves its operators to ours.
    __array_ufunc__ = None

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        symbol = next(_symbols((args, kwargs)))
        # a.where(mask, b) of a tensor has another order than torch.where(mask, a, b).
        name = getattr(func, "__name__", str(func))
        name = "Tensor.where" if func is torch.Tensor.where else name
        return symbol.recorder.call(name, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        return self.recorder.attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("recorder", "place", "name", "rows"):
            raise self.recorder.error(f"value.{name} =", "a value has no attributes", "a new name")
        object.__setattr__(self, name, value)

    __hash__ = object.__hash__
    __add__ = _operator("add")
    __radd__ = _operator("add", swapped=True)
    __sub__ = _operator("sub")
    __rsub__ = _operator("sub", swapped=True)
    __mul__ = _operator("mul")
    __rmul__ = _operator("mul", swapped=True)
    __truediv__ = _operator("div")
    __rtruediv__ = _operator("div", swapped=True)
    __pow__ = _operator("pow")
    __rpow__ = _operator("pow", swapped=True)
    __neg__ = _operator("neg")
    __pos__ = _operator("positive")
    __abs__ = _operator("abs")
    __lt__ = _operator("lt")
    __le__ = _operator("le")
    __gt__ = _operator("gt")
    __ge__ = _operator("ge")
    __eq__ = _operator("eq")  # type: ignore[assignment]
    __ne__ = _operator("ne")  # type: ignore[assignment]
    __and__ = _operator("logical_and")
    __rand__ = _operator("logical_and", swapped=True)
    __or__ = _operator("logical_or")
    __ror__ = _operator("logical_or", swapped=True)
    __xor__ = _operator("logical_xor")
    __rxor__ = _operator("logical_xor", swapped=True)
    __invert__ = _operator("logical_not")
    __matmul__ = _operator("matmul")
    __rmatmul__ = _operator("matmul", swapped=True)
    __floordiv__ = _operator("floor_divide")
    __rfloordiv__ = _operator("floor_divide", swapped=True)
    __mod__ = _operator("remainder")
    __rmod__ = _operator("remainder", swapped=True)
    __round__ = _operator("round")
    __floor__ = _operator("floor")
    __ceil__ = _operator("ceil")
    __trunc__ = _operator("trunc")

    __bool__ = _refused(
        "bool(value)",
        "a branch on a value, which differs from row to row",
        "torch.where(mask, a, b) for if, and & | ~ for and, or, not",
    )
    __float__ = _refused("float(value)", "a step has no numbers yet when it is recorded", "torch.*")
    __int__ = _refused("int(value)", "a step has no numbers yet when it is recorded", "torch.*")
    __index__ = _refused("range(value)", "a loop as long as a value says", "a Python number")
    __complex__ = _refused("complex(value)", "values are real numbers", "two states")
    __array__ = _refused("numpy(value)", "a step is recorded in torch's words", "torch.*")
    __array_function__ = _refused("numpy(value)", "a step is recorded in torch's words", "torch.*")
    __reduce_ex__ = _refused("copy(value)", "a value cannot be copied or kept", "the value itself")


class Value(Symbol):
    """A number or a mask for each row and unit."""

    def __init__(self, recorder: Recorder, place: int) -> None:
        super().__init__(recorder)
        self.place = place

    def __repr__(self) -> str:
        return f"<value: {self.node.text()}>"

    @property
    def node(self) -> Node:
        """What was recorded."""
        return self.recorder.nodes[self.place]

    @property
    def is_mask(self) -> bool:
        """Whether it is true or false, and no number."""
        return self.node.is_mask

    @property
    def dtype(self) -> ValueType:
        """The layer's, whichever that will be."""
        return VALUE_TYPE

    __iadd__ = _assigned("+")
    __isub__ = _assigned("-")
    __imul__ = _assigned("*")
    __itruediv__ = _assigned("/")
    __ipow__ = _assigned("**")
    __iand__ = _assigned("&")
    __ior__ = _assigned("|")
    __ixor__ = _assigned("^")

    __len__ = _refused("len(value)", _SHAPES, "a value as a whole")
    __iter__ = _refused("iteration over a value", _SHAPES, "x[g] for gate g, and state[k]")
    __getitem__ = _refused("value[index]", _SHAPES, "x[g] for gate g, and state[k] of several")
    __setitem__ = _refused("value[index] =", "an in-place operation", "torch.where(mask, a, b)")
    __delitem__ = _refused("del value[index]", "an in-place operation", "torch.where(mask, a, b)")
    __contains__ = _refused("in value", _SHAPES, "value == number")


class Rows(Symbol):
    """A parameter (n, H): n values, one for each row."""

    def __init__(self, recorder: Recorder, name: str, rows: tuple[Value, ...]) -> None:
        super().__init__(recorder)
        self.name, self.rows = name, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Any:
        return iter(self.rows)

    def __getitem__(self, index: Any) -> Any:
        what = f"self.{self.name}[{index!r}]"
        if isinstance(index, slice):
            return Rows(self.recorder, self.name, self.rows[index])
        if isinstance(index, bool) or not isinstance(index, int):
            raise self.recorder.error(what, f"expected one row of {len(self)}", "an int")
        if not -len(self) <= index < len(self):
            raise self.recorder.error(what, f"expected a row below {len(self)}, got {index}")
        return self.rows[index]

    __setitem__ = _refused("parameter[index] =", "an in-place operation", "a new value")


class Buffer(Symbol):
    """A buffer of the cell, which is nowhere taken for a value."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        super().__init__(recorder)
        self.name = name


class Gates(tuple[Value, ...]):
    """The arguments of a step that come in a tuple, which knows its name."""

    label: str
    hint: str
    recorder: Recorder

    @classmethod
    def of(cls, recorder: Recorder, label: str, hint: str, values: Iterable[Value]) -> Gates:
        """Name a tuple."""
        made = cls(values)
        made.label, made.hint, made.recorder = label, hint, recorder
        return made

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) and not -len(self) <= index < len(self):
            raise self.recorder.error(
                f"{self.label}[{index}]", f"expected an index below {len(self)}", self.hint
            )
        return super().__getitem__(index)


def _symbols(tree: Any) -> Any:
    """Go through the symbols in nested arguments."""
    if isinstance(tree, Symbol):
        yield tree
    elif isinstance(tree, dict):
        for each in tree.values():
            yield from _symbols(each)
    elif isinstance(tree, tuple | list):
        for each in tree:
            yield from _symbols(each)
