"""Opacus trains RNN, GRU and LSTM: gradients per sample, and the engine that makes them private."""

import warnings

import pytest
import torch

import ostinato.opacus
from ostinato import nn, reference
from support.cells import LAYERS
from support.devices import on_cpu
from support.tolerances import tolerance

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    opacus = pytest.importorskip("opacus")

B, T, I, H = 6, 5, 3, 4

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def registered():
    ostinato.opacus.register()
    ostinato.opacus.register()


class Model(torch.nn.Module):
    def __init__(self, layer, width):
        super().__init__()
        self.layer = layer
        self.head = torch.nn.Linear(width, 2)

    def forward(self, x, *hx):
        return self.head(self.layer(x, *hx)[0][:, -1])


def model(kind, **options):
    layer = getattr(nn, kind)(I, H, batch_first=True, **options)
    return Model(layer, H * (1 + layer.bidirectional))


def loop(net, x):
    """Gradients of each sample, one backward per row."""
    found = [
        torch.autograd.grad(net(row).square().sum(), list(net.parameters())) for row in x.split(1)
    ]
    return [torch.stack(grads) for grads in zip(*found, strict=True)]


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}])
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_of_samples_are_those_of_a_loop(kind, options, monkeypatch):
    if on_cpu():  # where an engine serves vmap
        monkeypatch.setattr(reference, "states", None)
    net, x = model(kind, **options), torch.randn(B, T, I)
    expected = loop(net, x)
    private = opacus.GradSampleModule(net, loss_reduction="sum")
    private(x).square().sum().backward()
    actual = [p.grad_sample for p in private.parameters()]
    torch.testing.assert_close(actual, expected, **tolerance(torch.float32, 4 * T))


def test_rows_second_and_hx():
    layer = nn.GRU(I, H)
    x, hx = torch.randn(T, B, I), torch.randn(1, B, H)
    found = []
    for b in range(B):
        y = layer(x[:, b], hx[:, b])[0]
        found.append(torch.autograd.grad(y.square().sum(), list(layer.parameters())))
    expected = [torch.stack(grads) for grads in zip(*found, strict=True)]
    private = opacus.GradSampleModule(layer, batch_first=False, loss_reduction="sum")
    private(x, hx)[0].square().sum().backward()
    actual = [p.grad_sample for p in private.parameters()]
    torch.testing.assert_close(actual, expected, **tolerance(torch.float32, 4 * T))


def test_hx_whose_rows_opacus_would_not_find():
    private = opacus.GradSampleModule(nn.GRU(I, H, batch_first=True))
    with pytest.raises(ValueError, match="hx: expected None with batch_first"):
        private(torch.randn(B, T, I), torch.randn(1, B, H))[0].sum().backward()


def test_the_layer_and_opacus_must_agree_on_the_batch():
    private = opacus.GradSampleModule(nn.GRU(I, H))
    with pytest.raises(ValueError, match="batch_first: expected the same"):
        private(torch.randn(T, B, I))[0].sum().backward()


@pytest.mark.parametrize("kind", LAYERS)
def test_the_privacy_engine_trains(kind):
    net = model(kind)
    assert opacus.validators.ModuleValidator.is_valid(net)
    data = torch.utils.data.TensorDataset(torch.randn(32, T, I), torch.randint(0, 2, (32,)))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = [p.detach().clone() for p in net.parameters()]
    engine = opacus.PrivacyEngine()
    private, optimizer, loader = engine.make_private(
        module=net,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    for x, y in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(private(x), y).backward()
        optimizer.step()
    assert engine.get_epsilon(delta=1e-3) > 0
    assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_dropout_between_layers_is_refused_in_words():
    layer = nn.GRU(I, H, 2, batch_first=True, dropout=0.5)
    private = opacus.GradSampleModule(layer)
    output, _ = private(torch.randn(B, T, I))
    with pytest.raises(ValueError, match="dropout: expected 0 between the layers"):
        output.sum().backward()
    (error,) = opacus.validators.ModuleValidator.validate(layer)
    assert "dropout: expected 0 between the layers" in str(error)
    assert opacus.validators.ModuleValidator.is_valid(nn.GRU(I, H, 2))


def test_one_sequence_is_no_batch_of_samples():
    private = opacus.GradSampleModule(nn.GRU(I, H, batch_first=True))
    output, _ = private(torch.randn(T, I))
    with pytest.raises(ValueError, match="input: expected a padded batch of 3 dimensions"):
        output.sum().backward()
