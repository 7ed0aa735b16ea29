"""Derivatives beyond `backward()`: Jacobians, second derivatives, forward mode, beside torch.nn.

Usage: python benchmarks/derivatives.py [--threads 1] [--seconds 0.5] [--only WORD]

Each case is run by both libraries with the same weights; the numbers are compared first, then both
are timed in turns by `ostinato.bench.compare`. Above 1 ours is faster. What torch.nn refuses has
no ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp

from ostinato import nn
from ostinato.bench import compare, ratio

NAMES = ("GRU", "LSTM", "RNN")
_Call = Callable[[], Any]
_Case = Callable[[torch.nn.Module, tuple[int, ...]], _Call]


def of_cell(cell: torch.nn.Module, batch: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return h' as a function of h, and an h."""
    torch.manual_seed(1)
    x, h = torch.randn(batch, cell.input_size), torch.randn(batch, cell.hidden_size)
    if isinstance(cell, torch.nn.modules.rnn.RNNCellBase) and "LSTM" in type(cell).__name__:
        c = torch.randn(batch, cell.hidden_size)
        return (lambda h: cell(x, (h, c))[0]), h
    return (lambda h: cell(x, h)), h


def cell_jacrev(cell: torch.nn.Module, shape: tuple[int, ...]) -> _Call:
    function, h = of_cell(cell, shape[0])
    return lambda: jacrev(function)(h)


def cell_jacfwd(cell: torch.nn.Module, shape: tuple[int, ...]) -> _Call:
    function, h = of_cell(cell, shape[0])
    return lambda: jacfwd(function)(h)


def cell_jacobian(cell: torch.nn.Module, shape: tuple[int, ...]) -> _Call:
    function, h = of_cell(cell, shape[0])
    return lambda: jacobian(function, h, vectorize=True)


def cell_batched(cell: torch.nn.Module, shape: tuple[int, ...]) -> _Call:
    function, h = of_cell(cell, shape[0])
    h.requires_grad_()
    basis = torch.eye(h.numel()).view(-1, *h.shape)
    return lambda: torch.autograd.grad(function(h), h, basis, is_grads_batched=True)


def cell_penalty(cell: torch.nn.Module, shape: tuple[int, ...]) -> _Call:
    function, h = of_cell(cell, shape[0])
    h.requires_grad_()

    def run() -> Any:
        (slope,) = torch.autograd.grad(function(h).square().sum(), h, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), list(cell.parameters()))

    return run


def sequence(layer: torch.nn.Module, shape: tuple[int, ...]) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*shape, layer.input_size)


def maml(layer: torch.nn.Module, shape: tuple[int, ...]) -> _Call:
    """One inner step whose gradient is kept as a graph, then the gradient of the outer loss."""
    x, target = sequence(layer, shape), sequence(layer, shape)
    parameters = dict(layer.named_parameters())

    def loss(parameters: Any, x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,))[0].square().mean()

    def run() -> Any:
        found = torch.autograd.grad(
            loss(parameters, x), list(parameters.values()), create_graph=True
        )
        moved = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), found, strict=True)}
        return torch.autograd.grad(loss(moved, target), list(parameters.values()))

    return run


def penalty(layer: torch.nn.Module, shape: tuple[int, ...]) -> _Call:
    x = sequence(layer, shape).requires_grad_()

    def run() -> Any:
        (slope,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), list(layer.parameters()))

    return run


def layer_jvp(layer: torch.nn.Module, shape: tuple[int, ...]) -> _Call:
    x, v = sequence(layer, shape), torch.randn(*shape, layer.input_size)
    return lambda: jvp(lambda x: layer(x)[0], (x,), (v,))


def layer_dual(layer: torch.nn.Module, shape: tuple[int, ...]) -> _Call:
    x, v = sequence(layer, shape), torch.randn(*shape, layer.input_size)

    def run() -> Any:
        with forward_ad.dual_level(), torch.no_grad():
            return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, v))[0])

    return run


def hessian_vector(layer: torch.nn.Module, shape: tuple[int, ...]) -> _Call:
    """Forward mode over torch.func.grad."""
    x, v = sequence(layer, shape), torch.randn(*shape, layer.input_size)
    slope = torch.func.grad(lambda x: layer(x)[0].square().sum())
    return lambda: jvp(slope, (x,), (v,))


def twice(layer: torch.nn.Module, shape: tuple[int, ...]) -> _Call:
    """torch.func.grad of a loss of a torch.func.grad."""
    x = sequence(layer, shape)
    slope = torch.func.grad(lambda x: layer(x)[0].square().sum())
    return lambda: torch.func.grad(lambda x: slope(x).square().sum())(x)


def whole_hessian(layer: torch.nn.Module, shape: tuple[int, ...]) -> _Call:
    x = sequence(layer, shape)
    return lambda: hessian(lambda x: layer(x)[0].square().sum())(x)


def autograd_hessian(layer: torch.nn.Module, shape: tuple[int, ...]) -> _Call:
    x = sequence(layer, shape)
    return lambda: torch.autograd.functional.hessian(
        lambda x: layer(x)[0].square().sum(), x, vectorize=True
    )


def last_jacrev(layer: torch.nn.Module, shape: tuple[int, ...]) -> _Call:
    x = sequence(layer, shape)
    return lambda: jacrev(lambda x: layer(x)[0][-1])(x)


def last_jacfwd(layer: torch.nn.Module, shape: tuple[int, ...]) -> _Call:
    x = sequence(layer, shape)
    return lambda: jacfwd(lambda x: layer(x)[0][-1])(x)


def last_jacobian(layer: torch.nn.Module, shape: tuple[int, ...]) -> _Call:
    x = sequence(layer, shape)
    return lambda: jacobian(lambda x: layer(x)[0][-1], x, vectorize=True)


# What, its program, a cell or a layer, input_size, hidden_size, batch or (steps, batch).
CASES: list[tuple[str, _Case, str, int, int, tuple[int, ...]]] = [
    ("jacrev of a cell", cell_jacrev, "Cell", 64, 64, (1,)),
    ("jacfwd of a cell", cell_jacfwd, "Cell", 64, 64, (1,)),
    ("vectorized Jacobian of a cell", cell_jacobian, "Cell", 64, 64, (1,)),
    ("is_grads_batched of a cell", cell_batched, "Cell", 64, 64, (1,)),
    ("gradient penalty of a cell", cell_penalty, "Cell", 64, 64, (8,)),
    ("MAML", maml, "", 8, 32, (20, 8)),
    ("MAML", maml, "", 8, 32, (100, 8)),
    ("gradient penalty", penalty, "", 8, 32, (20, 16)),
    ("gradient penalty", penalty, "", 8, 32, (100, 16)),
    ("torch.func.jvp", layer_jvp, "", 8, 32, (20, 8)),
    ("torch.func.jvp", layer_jvp, "", 8, 32, (100, 8)),
    ("dual numbers", layer_dual, "", 8, 32, (20, 8)),
    ("dual numbers", layer_dual, "", 8, 32, (100, 8)),
    ("Hessian times vector", hessian_vector, "", 8, 32, (20, 8)),
    ("grad of grad", twice, "", 8, 32, (20, 8)),
    ("torch.func.hessian", whole_hessian, "", 4, 8, (5, 2)),
    ("vectorized Hessian", autograd_hessian, "", 4, 8, (5, 2)),
    ("jacrev of the last output", last_jacrev, "", 8, 32, (20, 1)),
    ("jacfwd of the last output", last_jacfwd, "", 8, 32, (20, 1)),
    ("vectorized Jacobian of the last output", last_jacobian, "", 8, 32, (20, 1)),
]


def flat(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found.detach()
        return
    for part in found:
        yield from flat(part)


def timed(
    case: _Case, name: str, size: int, hidden: int, shape: tuple[int, ...], seconds: float
) -> str:
    """Compare the numbers, then the times."""
    torch.manual_seed(0)
    theirs, ours = getattr(torch.nn, name)(size, hidden), getattr(nn, name)(size, hidden)
    ours.load_state_dict(theirs.state_dict())
    calls = {"theirs": case(theirs, shape), "ours": case(ours, shape)}
    found = list(flat(calls["ours"]()))
    try:
        expected = list(flat(calls["theirs"]()))
    except RuntimeError as error:
        median = statistics.median(compare({"ours": calls["ours"]}, seconds)["ours"])
        said = str(error).strip().splitlines()[0][:60]
        return f"| {median * 1e6:.0f} | | torch.nn: {said} |"
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    samples = compare(calls, seconds)
    low, median, high = ratio(samples["theirs"], samples["ours"])
    micros = [statistics.median(samples[who]) * 1e6 for who in ("ours", "theirs")]
    return f"| {micros[0]:.0f} | {micros[1]:.0f} | {median:.2f} ({low:.2f} to {high:.2f}) |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="time per case and library")
    parser.add_argument("--only", default="", help="cases that have this in their line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {arguments.threads} threads, float32\n")
    print("| what | shape | ours, us | torch.nn, us | torch.nn / ours |")
    print("| --- | --- | ---: | ---: | --- |")
    for title, case, kind, size, hidden, shape in CASES:
        for name in NAMES:
            lead = f"B{shape[0]}" if kind else "T{} B{}".format(*shape)
            line = f"| {title}, {name}{kind} | {lead} I{size} H{hidden} "
            if arguments.only in line:
                row = timed(case, name + kind, size, hidden, shape, arguments.seconds)
                print(line + row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
