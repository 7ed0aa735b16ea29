"""Whole models, and weights that something else computes: norms, masks, low-rank updates."""

from __future__ import annotations

import copy
import importlib
import weakref
from typing import Any

import torch
from row import Row
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize, prune

STEPS, BATCH, INPUT, HIDDEN = 5, 2, 4, 8


def sequence() -> Tensor:
    return torch.randn(STEPS, BATCH, INPUT)


class LowRank(torch.nn.Module):
    """W + B A, the two factors being what is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(2, HIDDEN))
        self.b = torch.nn.Parameter(torch.randn(3 * HIDDEN, 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


class Watched(torch.nn.Module):
    """A parametrization that counts its runs and remembers its last result, without holding it."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def forward(self, weight: Tensor) -> Tensor:
        result = 2 * weight
        self.runs += 1
        self.last = weakref.ref(result)
        return result


def agrees_compiled(layer: torch.nn.Module, weight: Tensor) -> None:
    """Compile a layer without a break, compare, and ask for the gradient of what is trained."""
    x = sequence()
    expected = layer(x)[0]
    output = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)[0]
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert weight.grad is not None, "no gradient"


def switched(library: Any) -> None:
    model = torch.nn.Sequential(torch.nn.GRU(INPUT, HIDDEN))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = sequence()
    before = model(x)[0]
    importlib.import_module(library.__name__.partition(".")[0]).replace(model)
    assert type(model[0]) is library.GRU, "not switched"
    torch.testing.assert_close(model(x)[0], before)
    model(x)[0].sum().backward()
    optimizer.step()
    assert not torch.equal(model(x)[0], before), "the optimizer trains something else"


def normed_compiled(library: Any) -> None:
    layer = library.GRU(INPUT, HIDDEN)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    agrees_compiled(layer, layer.parametrizations.weight_hh_l0.original0)


def pruned_compiled(library: Any) -> None:
    layer = library.GRU(INPUT, HIDDEN)
    prune.l1_unstructured(layer, "weight_hh_l0", amount=0.5)
    agrees_compiled(layer, layer.weight_hh_l0_orig)


def low_rank_compiled(library: Any) -> None:
    layer = library.GRU(INPUT, HIDDEN).requires_grad_(False)
    update = LowRank()
    parametrize.register_parametrization(layer, "weight_hh_l0", update)
    agrees_compiled(layer, update.a)


class Replaced(torch.nn.Module):
    """A layer whose weight is replaced by a computed tensor before every call."""

    def __init__(self, library: Any) -> None:
        super().__init__()
        self.layer = library.GRU(INPUT, HIDDEN)
        self.update = LowRank()
        self.weight = self.layer.weight_hh_l0
        del self.layer.weight_hh_l0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.layer.weight_hh_l0 = self.update(self.weight)
        return self.layer(x)


def replaced_compiled(library: Any) -> None:
    model = Replaced(library)
    agrees_compiled(model, model.update.a)


def runs_once(library: Any) -> None:
    layer, watched = library.GRU(INPUT, HIDDEN), Watched()
    parametrize.register_parametrization(layer, "weight_hh_l0", watched)
    watched.runs = 0
    layer(sequence())
    assert watched.runs == 1, f"it ran {watched.runs} times"


def one_power_iteration(library: Any) -> None:
    layer = library.GRU(INPUT, HIDDEN)
    parametrizations.spectral_norm(layer, "weight_hh_l0")
    (norm,) = layer.parametrizations.weight_hh_l0
    twin = copy.deepcopy(norm)
    twin(layer.parametrizations.weight_hh_l0.original)
    layer(sequence())
    assert torch.equal(norm._u, twin._u), "more than one iteration"


def one_mask(library: Any) -> None:
    layer, plain = library.GRU(INPUT, HIDDEN), library.GRU(INPUT, HIDDEN)
    plain.load_state_dict(layer.state_dict())
    mask = torch.nn.Dropout(0.5)
    parametrize.register_parametrization(layer, "weight_hh_l0", mask)
    x = sequence()
    torch.manual_seed(1)
    output = layer(x)[0]
    torch.manual_seed(1)
    with torch.no_grad():
        plain.weight_hh_l0.copy_(mask(plain.weight_hh_l0))
    assert torch.allclose(output, plain(x)[0], atol=1e-6), "the mask is not the first one drawn"


def copied_in_training(library: Any) -> None:
    layer, x = library.GRU(INPUT, HIDDEN), sequence()
    parametrizations.weight_norm(layer, "weight_hh_l0")
    layer(x)[0].sum().backward()
    averaged = torch.optim.swa_utils.AveragedModel(layer)
    averaged.update_parameters(layer)
    torch.testing.assert_close(averaged(x)[0], layer(x)[0])


def computed_weight_is_freed(library: Any) -> None:
    layer, watched = library.GRU(INPUT, HIDDEN), Watched()
    parametrize.register_parametrization(layer, "weight_hh_l0", watched)
    layer(sequence())[0].sum().backward()
    assert watched.last() is None, "the layer still holds it"


def deleted_weight_is_missed(library: Any) -> None:
    layer = library.GRU(INPUT, HIDDEN)
    del layer.weight_hh_l0
    try:
        layer(sequence())
    except AttributeError:
        return
    raise AssertionError("it computes with the weight that was deleted")


def wrong_weight_is_refused(library: Any) -> None:
    layer = library.LSTM(INPUT, HIDDEN)
    layer.weight_ih_l0 = torch.nn.Parameter(torch.randn(4 * HIDDEN, INPUT + 1))
    try:
        layer(sequence())
    except RuntimeError:
        return
    raise AssertionError("it computes with a weight that does not fit")


def ensemble(library: Any) -> None:
    layers, x = [library.GRU(INPUT, HIDDEN) for _ in range(3)], sequence()
    stacked = torch.func.stack_module_state(layers)
    base = copy.deepcopy(layers[0]).to("meta")

    def call(*state: Any) -> Tensor:
        return torch.func.functional_call(base, state, (x,))[0]

    outputs = torch.func.vmap(call)(*stacked)
    torch.testing.assert_close(outputs, torch.stack([layer(x)[0] for layer in layers]))


ROWS = [
    Row("One call switches the layers of a whole model, its optimizer goes on", switched),
    Row("`weight_norm`, `torch.compile(fullgraph=True)`, training", normed_compiled),
    Row("Pruned weights, `torch.compile(fullgraph=True)`, training", pruned_compiled),
    Row("A low-rank update as a parametrization, compiled likewise", low_rank_compiled),
    Row("A weight replaced by a computed tensor in each call, compiled", replaced_compiled),
    Row("A parametrization runs once per call", runs_once),
    Row("`spectral_norm` makes one power iteration per call", one_power_iteration),
    Row("A random mask on a weight is drawn once per call", one_mask),
    Row("`AveragedModel` of a layer with `weight_norm`, in training", copied_in_training),
    Row("A computed weight is freed after backward", computed_weight_is_freed),
    Row("A deleted weight is an error", deleted_weight_is_missed),
    Row("A weight that does not fit an LSTM is an error", wrong_weight_is_refused),
    Row("An ensemble: `vmap` over the stacked weights of several layers", ensemble),
]
