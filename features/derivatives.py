"""Derivatives: vmap, many models or samples at once, higher orders, forward mode."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
from row import Row
from torch import Tensor

STEPS, BATCH, INPUT, HIDDEN = 4, 3, 2, 5


def layer_of(library: Any, kind: str = "GRU") -> torch.nn.Module:
    return getattr(library, kind)(INPUT, HIDDEN).double()


def sequence() -> Tensor:
    return torch.randn(STEPS, BATCH, INPUT, dtype=torch.float64)


def energy(library: Any) -> Callable[[Tensor], Tensor]:
    """A scalar function of the input."""
    layer = layer_of(library, "LSTM")
    return lambda x: layer(x)[0].square().sum()


def agree(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected)


def stacked_models(library: Any) -> None:
    layers, x = [layer_of(library) for _ in range(3)], sequence()
    state = torch.func.stack_module_state(layers)
    base = copy.deepcopy(layers[0]).to("meta")

    def call(*state: Any) -> Tensor:
        return torch.func.functional_call(base, state, (x,))[0]

    outputs = torch.func.vmap(call)(*state)
    agree(outputs, torch.stack([layer(x)[0] for layer in layers]))
    outputs.square().sum().backward()
    layers[1](x)[0].square().sum().backward()
    agree(state[0]["weight_hh_l0"].grad[1], layers[1].weight_hh_l0.grad)


def gradients_of_samples(library: Any) -> None:
    layer, x = layer_of(library), sequence()
    parameters = dict(layer.named_parameters())

    def loss(parameters: Any, row: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (row,))[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(parameters, x)
    for b in range(BATCH):
        expected = torch.autograd.grad(loss(parameters, x[:, b]), list(parameters.values()))
        agree([grad[b] for grad in found.values()], list(expected))


def gradient_penalty(library: Any) -> None:
    layer, x = layer_of(library), sequence().requires_grad_()
    (grad,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert layer.weight_hh_l0.grad.any(), "no gradient"


def checked_twice(library: Any) -> None:
    layer = layer_of(library)
    x = sequence().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], x, fast_mode=True)


def hessian_vector_product(library: Any) -> None:
    f, x, v = energy(library), sequence(), sequence()
    found = torch.func.jvp(torch.func.grad(f), (x,), (v,))[1]
    step = 1e-5
    difference = (torch.func.grad(f)(x + step * v) - torch.func.grad(f)(x - step * v)) / (2 * step)
    torch.testing.assert_close(found, difference, rtol=1e-5, atol=1e-6)


def forward_mode(library: Any) -> None:
    f, x, v = energy(library), sequence(), sequence()
    _, found = torch.func.jvp(f, (x,), (v,))
    x.requires_grad_()
    agree(found, (torch.autograd.grad(f(x), x)[0] * v).sum())


def jacobians(library: Any) -> None:
    layer, x = layer_of(library), sequence()

    def last(x: Tensor) -> Tensor:
        return layer(x)[0][-1]

    agree(torch.func.jacfwd(last)(x), torch.func.jacrev(last)(x))


def hessian(library: Any) -> None:
    found = torch.func.hessian(energy(library))(sequence()[:2])
    flat = found.reshape(2 * BATCH * INPUT, -1)
    agree(flat, flat.T)


def linearized(library: Any) -> None:
    f, x, v = energy(library), sequence(), sequence()
    value, linear = torch.func.linearize(f, x)
    agree(value, f(x))
    agree(linear(v), torch.func.jvp(f, (x,), (v,))[1])


def private(library: Any) -> None:
    opacus = importlib.import_module("opacus")
    if library.__name__.startswith("ostinato"):
        importlib.import_module("ostinato.opacus").register()
    layer = library.GRU(INPUT, HIDDEN, batch_first=True)
    errors = opacus.validators.ModuleValidator.validate(layer)
    assert not errors, str(errors[0])
    x = torch.randn(BATCH, STEPS, INPUT)
    twin = copy.deepcopy(layer)
    wrapped = opacus.GradSampleModule(layer, loss_reduction="sum")
    wrapped(x)[0].square().sum().backward()
    samples = layer.weight_hh_l0.grad_sample
    for b in range(BATCH):
        (grad,) = torch.autograd.grad(twin(x[b])[0].square().sum(), twin.weight_hh_l0)
        torch.testing.assert_close(samples[b], grad, rtol=1e-4, atol=1e-5)


ROWS = [
    Row("An ensemble trains: `vmap` over stacked models, and their gradients", stacked_models),
    Row("A gradient per sample: `vmap(grad(loss))`", gradients_of_samples),
    Row("Double backward: a gradient penalty", gradient_penalty),
    Row("`gradgradcheck`", checked_twice),
    Row("A Hessian-vector product, forward over reverse", hessian_vector_product),
    Row("Forward mode: `torch.func.jvp`", forward_mode),
    Row("`jacfwd` and `jacrev`", jacobians),
    Row("`torch.func.hessian`", hessian),
    Row("`torch.func.linearize`", linearized),
    Row("Opacus computes gradients per sample, and accepts the layer as it is", private),
]
