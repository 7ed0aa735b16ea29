"""Derivatives of a layer whose states are known, without a graph of its steps.

A layer's states solve S_t = step(x_t, S_(t-1)). An engine has found them; so all steps can be
looked at at once, by a few operators on whole sequences. What follows the order of the steps is one
linear recurrence,

    adjoint:  L_(t-1) = g_(t-1) + A_t^T L_t        what reaches a state in all      (41)
    tangent:  s_t     = b_t     + A_t   s_(t-1)    how a state moves                (42)

where A_t, the Jacobian of a step, is weight_hh (and weight_hr) between factors for each unit. These
factors are derivatives of the reference's step, asked of torch: no gate is named here. Each
recurrence is the derivative of the other, so all of it can be differentiated any number of times.
Equation numbers refer to docs/math.md.

Legend: T steps, B batch, N packed rows, I input, H hidden, O output of a step (proj_size, or H),
D directions, G gates. "Loop order": steps in the order in which a direction takes them, each row
from its own first step on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType

from ostinato import reference
from ostinato.batches import over_batches
from ostinato.call import Call, Parts, Results, States
from ostinato.cells import CELLS

_peek_transform = torch._C._functorch.peek_interpreter_stack

_Maybe = Sequence[Tensor | None]


class _Jacobian(NamedTuple):
    """How each step of a time loop moves with the state before it.

    Each new state, h before its projection and c, depends on the hidden product of its own unit and
    on one state of that unit: the last one, h of a GRU or c of an LSTM.
    """

    # Of each state, (T, B, G, H), of an RNN (T, B, H): by the hidden product of each gate.
    gates: list[Tensor]
    carry: list[Tensor]  # of each state, (T, B, H): by the last state; none for an RNN
    weight_hh: Tensor  # (G * H, O)
    weight_hr: Tensor | None  # (O, H)

    def at(self) -> list[_Jacobian]:
        """Return the Jacobian of each step, arrays without T."""
        gates, carry = ([t.unbind(0) for t in each] for each in (self.gates, self.carry))
        count = self.gates[0].shape[0]
        return [
            _Jacobian([g[t] for g in gates], [c[t] for c in carry], *self[2:]) for t in range(count)
        ]

    def rows(self) -> _Jacobian:
        """Return the Jacobian of all steps at once, (T * B, ...) instead of (T, B, ...)."""
        gates, carry = ([t.flatten(0, 1) for t in each] for each in (self.gates, self.carry))
        return _Jacobian(gates, carry, *self[2:])

    def weighted(self, units: Sequence[Tensor]) -> Tensor:
        """Return gradients of the hidden products, (B, G * H), from those of the new states."""
        if not self.carry:
            return self.gates[0] * units[0]
        found = self.gates[0] * units[0].unsqueeze(-2)
        for factor, unit in zip(self.gates[1:], units[1:], strict=True):
            found = torch.addcmul(found, factor, unit.unsqueeze(-2))
        return found.flatten(-2)

    def units(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Return gradients before the projection from those of the states."""
        if self.weight_hr is None:
            return list(states)
        return [states[0] @ self.weight_hr, *states[1:]]

    def pull(self, states: Sequence[Tensor], onto: Sequence[Tensor]) -> list[Tensor]:
        """Return `onto` + A^T states (39)."""
        units = self.units(states)
        pulled = list(onto)
        for factor, unit in zip(self.carry, units, strict=bool(self.carry)):
            pulled[-1] = torch.addcmul(pulled[-1], factor, unit)
        pulled[0] = torch.addmm(pulled[0], self.weighted(units), self.weight_hh)
        return pulled

    def moved(self, product: Tensor, last: Tensor) -> list[Tensor]:
        """Return how new states move before the projection.

        `product`, (B, G * H), says how the hidden products move, and `last`, (B, H), how the last
        state does.
        """
        if not self.carry:
            return [self.gates[0] * product]
        product = product.view(self.gates[0].shape)
        found = [(factor * product).sum(-2) for factor in self.gates]
        for k, factor in enumerate(self.carry):
            found[k] = torch.addcmul(found[k], factor, last)
        return found

    def push(self, states: Sequence[Tensor], onto: Sequence[Tensor]) -> list[Tensor]:
        """Return `onto` + A states (40)."""
        product = states[0] @ self.weight_hh.T
        if not self.carry:
            return [torch.addcmul(onto[0], self.gates[0], product)]
        h, *rest = self.moved(product, states[-1])
        hr = self.weight_hr
        h = onto[0] + h if hr is None else torch.addmm(onto[0], h, hr.T)
        return [h, *(b + c for b, c in zip(onto[1:], rest, strict=True))]

    def gradients(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> _Jacobian:
        """Return the gradients of <after, A before>, weights' summed over rows (44)."""
        product = before[0] @ self.weight_hh.T
        units = self.units(after)
        of_hr = None
        if self.weight_hr is not None:
            of_hr = after[0].T @ self.moved(product, before[-1])[0]
        product = product.view(self.gates[0].shape)
        return _Jacobian(
            [product * (unit.unsqueeze(-2) if self.carry else unit) for unit in units],
            [before[-1] * unit for unit in units][: len(self.carry)],
            self.weighted(units).T @ before[0],
            of_hr,
        )


def autograd_alone(*tensors: Tensor) -> bool:
    """Whether torch.autograd.grad can differentiate by these tensors where a function stands.

    So it is without transforms, and where the innermost is a gradient of which all are variables.
    It saves a transform around all that is differentiated.
    """
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    innermost = _peek_transform()
    if innermost is None:
        return True
    is_grad = innermost.key() == TransformType.Grad
    return is_grad and all(t.requires_grad for t in tensors)


# ---- the recurrence ----


def _recur(jacobian: _Jacobian, right: Sequence[Tensor], is_adjoint: bool) -> list[Tensor]:
    """Solve the recurrence step by step; `right` has a row more than there are steps, h_0's."""
    rows = list(zip(*(r.unbind(0) for r in right), strict=True))
    steps = jacobian.at()
    if is_adjoint:
        solved = [list(rows[-1])]
        for step, onto in zip(reversed(steps), reversed(rows[:-1]), strict=True):
            solved.append(step.pull(solved[-1], onto))
        solved.reverse()
    else:
        solved = [list(rows[0])]
        for step, onto in zip(steps, rows[1:], strict=True):
            solved.append(step.push(solved[-1], onto))
    return [torch.stack(each) for each in zip(*solved, strict=True)]


def _solve(jacobian: _Jacobian, right: Sequence[Tensor], is_adjoint: bool) -> list[Tensor]:
    """Solve the recurrence so that it can be differentiated."""
    if _peek_transform() is not None or torch.autograd.forward_ad._current_level >= 0:
        return _recur(jacobian, right, is_adjoint)  # transforms see through it
    counts = len(jacobian.gates), len(jacobian.carry), is_adjoint
    tensors = *jacobian.gates, *jacobian.carry, *jacobian[2:], *right
    return list(_Solve.apply(counts, *tensors))  # type: ignore[no-untyped-call]


class _Solve(torch.autograd.Function):
    """The recurrence, whose derivative is the one that runs the other way."""

    @staticmethod
    def forward(ctx: Any, counts: tuple[int, int, bool], *tensors: Any) -> tuple[Tensor, ...]:
        jacobian, right = _taken(counts, tensors)
        found = _recur(jacobian, right, counts[2])
        ctx.save_for_backward(*tensors[: -len(right)], *found)
        ctx.counts = counts
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        jacobian, found = _taken(ctx.counts, ctx.saved_tensors)

        def run(*grads: Tensor) -> tuple[Tensor | None, ...]:
            is_adjoint = ctx.counts[2]
            other = _solve(jacobian, grads, not is_adjoint)
            before, after = (other, found) if is_adjoint else (found, other)
            rows = jacobian.rows().gradients(
                [s[:-1].flatten(0, 1) for s in before], [s[1:].flatten(0, 1) for s in after]
            )
            pairs = zip((*rows.gates, *rows.carry), (*jacobian.gates, *jacobian.carry), strict=True)
            return *(r.view_as(factor) for r, factor in pairs), *rows[2:], *other

        return None, *over_batches(run, grads)


def _taken(
    counts: tuple[int, int, bool], tensors: Sequence[Any]
) -> tuple[_Jacobian, Sequence[Tensor]]:
    gates, carry, _ = counts
    end = gates + carry
    jacobian = _Jacobian(list(tensors[:gates]), list(tensors[gates:end]), *tensors[end : end + 2])
    return jacobian, tensors[end + 2 :]


# ---- one direction ----


@dataclass(frozen=True)
class _Order:
    """How the rows of a call lie in loop order."""

    steps: int
    batch: int
    is_reverse: bool
    # Of packed rows: the row of each place (T * B,), N where there is none; the place of each row
    # (N,); and the place of each row's last state among those of steps and, in front, h_0 (B,).
    rows: Tensor | None = None
    places: Tensor | None = None
    ends: Tensor | None = None

    def in_order(self, tensor: Tensor) -> Tensor:
        """Bring rows, (T, B, ...) or (N, ...), to (T, B, ...) in loop order."""
        if self.rows is None:
            return tensor.flip(0) if self.is_reverse else tensor
        padded = torch.cat([tensor, tensor.new_zeros((1, *tensor.shape[1:]))])
        return self.steps_of(padded.index_select(0, self.rows))

    def steps_of(self, rows: Tensor) -> Tensor:
        """Bring rows in loop order, (T * B, ...), to (T, B, ...)."""
        return rows.view(self.steps, self.batch, *rows.shape[1:])

    def given(self, tensor: Tensor) -> Tensor:
        """Bring (T, B, ...) in loop order to the layout of the call."""
        if self.places is None:
            return tensor.flip(0) if self.is_reverse else tensor
        return tensor.flatten(0, 1).index_select(0, self.places)

    def right(self, first: Tensor | None, rest: Tensor | None, end: Tensor | None) -> Tensor:
        """Return (T + 1, B, ...): of the initial state, of each step, and more at each row's end.

        `first` and `end` are (B, ...), `rest` is (T, B, ...) in loop order; each may be None.
        """
        some = next(t for t in (rest, first, end) if t is not None)
        feature = some.shape[-1]
        if first is None:
            first = some.new_zeros((self.batch, feature))
        if rest is None:
            rest = some.new_zeros((self.steps, self.batch, feature))
        states = torch.cat([first.unsqueeze(0), rest])
        if end is None:
            return states
        if self.ends is None:
            return torch.cat([states[:-1], (states[-1] + end).unsqueeze(0)])
        return states.flatten(0, 1).index_add(0, self.ends, end).view_as(states)

    def last(self, states: Tensor) -> Tensor:
        """Return each row's last state of (T + 1, B, ...)."""
        if self.ends is None:
            return states[-1]
        return states.flatten(0, 1).index_select(0, self.ends)


def _order(call: Call, is_reverse: bool) -> _Order:
    if call.batch_sizes is None:
        return _Order(call.input.shape[0], call.batch, is_reverse)
    sizes: list[int] = call.batch_sizes.tolist()
    steps, batch = len(sizes), call.batch
    lengths = [sum(n > b for n in sizes) for b in range(batch)]
    starts = [sum(sizes[:t]) for t in range(steps)]
    count = call.input.shape[0]
    rows = [count] * (steps * batch)
    places = [0] * count
    for b, length in enumerate(lengths):
        for t in range(length):
            place = (length - 1 - t if is_reverse else t) * batch + b
            rows[place], places[starts[t] + b] = starts[t] + b, place
    ends = [length * batch + b for b, length in enumerate(lengths)]
    tensors = (torch.tensor(each, device=call.input.device) for each in (rows, places, ends))
    return _Order(steps, batch, is_reverse, *tensors)


class _Direction(NamedTuple):
    """All steps of one direction, in loop order."""

    order: _Order
    x: Tensor  # (T * B, I)
    before: Tensor  # h that enters each step, (T * B, O)
    jacobian: _Jacobian
    inputs: list[Tensor]  # of each new state, (T * B, G * H): derivative by the input's product
    new: Tensor  # h before the projection, (T * B, H)


def _directions(call: Call, output: Tensor, every: States) -> list[_Direction]:
    """Look at all steps of a layer without cuts at once.

    `output` is the layer's, `every` the states behind h after every step.
    """
    count = 2 if call.bidirectional else 1
    found = []
    named = reference.directions(call.cell, call.weights, call.has_biases, call.bidirectional)
    for d, weight in enumerate(named):
        order = _order(call, d == 1)
        x = order.in_order(call.input).flatten(0, 1)
        before = []
        for state, first in zip((output, *every), call.initial, strict=True):
            looped = order.in_order(state.chunk(count, -1)[d])
            start = None if first is None else first[d]
            before.append(order.right(start, looped[:-1], None)[: order.steps].flatten(0, 1))
        gates_x = reference.linear(x, weight.ih, weight.bias_ih)
        gates_h = reference.linear(before[0], weight.hh, weight.bias_hh)
        new, inputs, gates, carry = _slopes(call.cell, gates_x, gates_h, before[-1])
        shape, per_unit = (order.steps, order.batch), [call.kind.gates] * bool(carry)
        jacobian = _Jacobian(
            [g.view(*shape, *per_unit, new.shape[-1]) for g in gates],
            [order.steps_of(c) for c in carry],
            weight.hh,
            weight.hr,
        )
        found.append(_Direction(order, x, before[0], jacobian, inputs, new))
    return found


def _slopes(
    cell: str, gates_x: Tensor, gates_h: Tensor, last: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Return h before its projection, and derivatives of the new states, unit by unit.

    For each new state these are the derivatives by gates_x, by gates_h and by the last state,
    shaped as what they are by; there are none by the last state where a step reads neither its last
    h alone nor c.
    """
    kind = CELLS[cell]
    has_carry = kind.reads_previous or kind.has_c

    def step(gates_x: Tensor, gates_h: Tensor, last: Tensor) -> tuple[Tensor, ...]:
        return reference.STEPS[cell](gates_x, gates_h, (last, last), None)

    def one(k: int, new: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(
            torch.ones_like(t) if j == k else torch.zeros_like(t) for j, t in enumerate(new)
        )

    if not autograd_alone(gates_x, gates_h, *[last] * has_carry):
        new, pull = torch.func.vjp(step, gates_x, gates_h, last)  # type: ignore[misc]
        found = [pull(one(k, new)) for k in range(len(new))]
    else:
        higher = torch.is_grad_enabled()
        with torch.enable_grad():
            # Aliases: gates_h depends on `last`, which is not to be asked here.
            primals = [
                t.view_as(t) if higher and t.requires_grad else t.detach().requires_grad_()
                for t in (gates_x, gates_h, last)
            ]
            new = step(*primals)
            asked = primals if has_carry else primals[:2]
            found = [
                torch.autograd.grad(
                    state, asked, torch.ones_like(state), higher or k + 1 < len(new), higher
                )
                for k, state in enumerate(new)
            ]
    by_x, by_h, *by_last = (list(each) for each in zip(*found, strict=True))
    return new[0], by_x, by_h, by_last[0] if has_carry and by_last else []


# ---- gradients and tangents of a layer ----


def gradients(
    call: Call, output: Tensor, every: States, arrived: Results, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Differentiate a layer without cuts whose states are known; the result is differentiable, too.

    Equation (41), then the gradients of (4), (6) and (24). `every` holds the states behind h after
    every step. At least one gradient of a result has arrived; `wanted` has a flag for each of
    `call.tensors()`, and the result is None where it is False.
    """
    count = 2 if call.bidirectional else 1
    width, asked = len(call.weights) // count, call.parts(wanted)
    dx: Tensor | None = None
    first: list[list[Tensor]] = []
    dw: list[Tensor | None] = []
    for d, one in enumerate(_directions(call, output, every)):
        own, of_direction = slice(d * width, (d + 1) * width), _of_direction(arrived, count, d)
        steps = of_direction.output, *of_direction.every
        right = [
            # h is as wide as an output, all others as the layer.
            _right(one.order, one.new if k else one.before, dy, d_last)
            for k, (dy, d_last) in enumerate(zip(steps, of_direction.last, strict=True))
        ]
        total = _solve(one.jacobian, right, is_adjoint=True)
        first.append([t[0] for t in total])
        dgates_x, found = _of_weights(one, [t[1:].flatten(0, 1) for t in total], asked.weights[own])
        dw += found
        if asked.input:
            weight_ih, *_ = call.weights[own]
            part = one.order.given(one.order.steps_of(dgates_x @ weight_ih))
            dx = part if dx is None else dx + part
    initial = (torch.stack(each) for each in zip(*first, strict=True))
    found_initial = (g if want else None for g, want in zip(initial, asked.initial, strict=True))
    return Parts(dx, tuple(found_initial), (None,) * len(call.initial), dw).flat()


def _of_weights(
    one: _Direction, states: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """Return gradients of the input's products, and those of the weights that are wanted.

    `states`, (T * B, ...), is all that reaches the new states of all steps; `wanted` has a flag for
    each weight of this direction.
    """
    rows = one.jacobian.rows()
    units = rows.units(states)
    by_input = [g.view_as(r) for g, r in zip(one.inputs, rows.gates, strict=True)]
    dgates_x = rows._replace(gates=by_input).weighted(units)
    has_hr = one.jacobian.weight_hr is not None
    if not any(wanted):
        return dgates_x, [None] * len(wanted)
    dgates_h = rows.weighted(units)
    has_biases = len(wanted) - has_hr == 4
    pairs: list[tuple[Tensor, Tensor | None]] = [(dgates_x, one.x), (dgates_h, one.before)]
    pairs += [(dgates_x, None), (dgates_h, None)] if has_biases else []
    pairs += [(states[0], one.new)] if has_hr else []
    return dgates_x, [
        None if not want else gate.sum(0) if value is None else gate.T @ value
        for (gate, value), want in zip(pairs, wanted, strict=True)
    ]


def _of_direction(arrived: Results, count: int, d: int) -> Results:
    """Cut what belongs to results of all directions down to one."""

    def own(grad: Tensor | None) -> Tensor | None:
        return None if grad is None else grad.chunk(count, -1)[d]

    last = (None if grad is None else grad[d] for grad in arrived.last)
    return Results(own(arrived.output), tuple(last), tuple(map(own, arrived.every)))


def _right(order: _Order, like: Tensor, rest: Tensor | None, end: Tensor | None) -> Tensor:
    if rest is None and end is None:
        return like.new_zeros((order.steps + 1, order.batch, like.shape[-1]))
    return order.right(None, None if rest is None else order.in_order(rest), end)


def tangents(call: Call, output: Tensor, every: States, moves: _Maybe) -> Results:
    """Return how the results of a layer without cuts move whose states are known.

    Equation (42), where b_t is how a step moves by its input and weights alone. `every` holds the
    states behind h after every step; `moves` says how each of `call.tensors()` moves, None for one
    that does not.
    """
    count = 2 if call.bidirectional else 1
    width, moved = len(call.weights) // count, call.parts(moves)
    each: list[list[Tensor]] = []
    ends: list[list[Tensor]] = []
    for d, one in enumerate(_directions(call, output, every)):
        order, own = one.order, slice(d * width, (d + 1) * width)
        rows = None if moved.input is None else order.in_order(moved.input).flatten(0, 1)
        weight_ih, *_ = call.weights[own]
        right = _moved(one, rows, weight_ih, moved.weights[own])
        ordered = [
            order.right(None if start is None else start[d], order.steps_of(b), None)
            for start, b in zip(moved.initial, right, strict=True)
        ]
        found = _solve(one.jacobian, ordered, is_adjoint=False)
        each.append([order.given(s[1:]) for s in found])
        ends.append([order.last(s) for s in found])
    dy, *d_every = (torch.cat(s, -1) for s in zip(*each, strict=True))
    last = tuple(torch.stack(s) for s in zip(*ends, strict=True))
    return Results(dy, last, tuple(d_every))


def _moved(one: _Direction, dx: Tensor | None, weight_ih: Tensor, moves: _Maybe) -> list[Tensor]:
    """Return how all steps move by their inputs and weights, (T * B, ...) of each state.

    `dx`, (T * B, I), says how the inputs of this direction move, `moves` how each of its weights
    does; None where one does not.
    """
    jacobian = one.jacobian.rows()
    like = jacobian.gates[0]
    moves = list(moves)
    dhr = moves.pop() if jacobian.weight_hr is not None else None
    dih, dhh, db_ih, db_hh = (*moves, None, None)[:4]
    by_input = [g.view_as(like) for g in one.inputs]
    sides = (
        (by_input, [dx, one.x if dih is not None else None], [weight_ih, dih], db_ih),
        (jacobian.gates, [one.before if dhh is not None else None], [dhh], db_hh),
    )
    nothing = torch.zeros_like(one.new)
    new = [nothing] * len(jacobian.gates)
    for factors, values, weights, bias in sides:
        parts = [
            v @ w.T for v, w in zip(values, weights, strict=True) if v is not None and w is not None
        ]
        parts += [] if bias is None else [bias.expand(like.shape[0], -1)]
        if parts:
            product = sum(parts[1:], parts[0])
            moved = jacobian._replace(gates=factors).moved(product, nothing)
            new = [n + m for n, m in zip(new, moved, strict=True)]
    if jacobian.weight_hr is not None:
        new[0] = new[0] @ jacobian.weight_hr.T
        if dhr is not None:
            new[0] = torch.addmm(new[0], one.new, dhr.T)
    return new
