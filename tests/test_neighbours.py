"""What stands beside recurrent layers in people's programs, with switched models in it.

docs/models.md says the same in words. What cannot work is tested too, so that the page stays true.
"""

import copy
import io
import multiprocessing
import pickle
import warnings

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ostinato
from ostinato import nn
from support.cells import SIX, TORCH_LAYERS
from support.devices import device_type, on_cpu
from support.pairs import TORCH_WARNS, assert_same, pair, shapes

pytestmark = pytest.mark.filterwarnings(TORCH_WARNS)


class Tagger(torch.nn.Module):
    """Two recurrent layers of torch's and what stands around them."""

    def __init__(self):
        super().__init__()
        self.gru = torch.nn.GRU(4, 8, bidirectional=True)
        self.lstm = torch.nn.LSTM(16, 8)
        self.head = torch.nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.lstm(self.gru(x)[0])[0])


def taggers():
    """The same model twice, the first one switched."""
    torch.manual_seed(3)
    theirs = Tagger()
    ours = copy.deepcopy(theirs)
    ostinato.replace(ours)
    return ours, theirs


def hidden(name):
    """What a layer or a cell calls its hidden weight."""
    return "weight_hh_l0" if name in TORCH_LAYERS else "weight_hh"


def step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def assert_same_weights(ours, theirs):
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


# ---- copies ----


@pytest.mark.cpu("processes on this machine")
def test_another_process_takes_a_pickled_layer():
    ours, _ = taggers()
    x = torch.randn(5, 3, 4)
    for weight in ours.parameters():
        weight.requires_grad_(False)
    # The layer is the function that is called there. The process imports what its class needs.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        output, h_n = pool.apply(ours.gru, (x,))
    assert torch.equal(output, ours.gru(x)[0])
    assert torch.equal(h_n, ours.gru(x)[1])


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)])
def test_averaged_copies_follow(average):
    models = taggers()
    averages = [AveragedModel(model, multi_avg_fn=average) for model in models]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    for _ in range(3):
        x = torch.randn(5, 3, 4)
        for model, optimizer, averaged in zip(models, optimizers, averages, strict=True):
            step(model, optimizer, x)
            averaged.update_parameters(model)
    assert type(averages[0].module.gru) is nn.GRU
    assert_same_weights(*averages)
    x = torch.randn(5, 3, 4)
    assert_same(averages[0](x), averages[1](x))
    assert not torch.equal(averages[0](x), models[0](x))


def test_a_parametrized_layer_is_averaged_after_a_call():
    ours, _ = pair("GRU", 4, 8)
    parametrizations.weight_norm(ours, "weight_hh_l0")
    x = torch.randn(5, 3, 4)
    output = ours(x)[0]
    assert torch.equal(AveragedModel(ours)(x)[0], output)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    ours, theirs = taggers()
    x = torch.randn(5, 3, 4)
    safetensors.save_model(ours, tmp_path / "ours")
    safetensors.save_model(theirs, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    other = Tagger()
    ostinato.replace(other)
    assert safetensors.load_model(other, tmp_path / "theirs") == (set(), [])
    assert torch.equal(other(x), ours(x))


# ---- weights that are computed ----


class Masked(torch.nn.Module):
    """A parametrization that draws a mask, as weight dropping does, and counts its runs."""

    def __init__(self):
        super().__init__()
        self.runs = 0

    def forward(self, weight):
        self.runs += 1
        return torch.nn.functional.dropout(weight, 0.5, self.training)


def masked_module(name):
    """A module of ours whose hidden weight is masked, and the mask; its runs count from now on."""
    module, masked = pair(name, 4, 8)[0], Masked()
    parametrize.register_parametrization(module, hidden(name), masked)
    masked.runs = 0
    return module, masked


@pytest.mark.parametrize("name", SIX)
def test_a_parametrization_runs_once_per_call(name):
    ours, masked = masked_module(name)
    given = shapes(name)
    torch.manual_seed(5)
    result = ours(*given)
    assert masked.runs == 1
    torch.manual_seed(5)
    mask = getattr(ours, hidden(name)).detach()
    plain, _ = pair(name, 4, 8)
    with torch.no_grad():
        getattr(plain, hidden(name)).copy_(mask)
    assert_same(result, plain(*given))


@pytest.mark.parametrize("name", SIX)
def test_spectral_norm_makes_one_iteration_per_call(name):
    ours, _ = pair(name, 4, 8)
    parametrizations.spectral_norm(ours, hidden(name))
    (norm,) = ours.parametrizations[hidden(name)]
    twin = copy.deepcopy(norm)
    twin(ours.parametrizations[hidden(name)].original)
    ours(*shapes(name))
    assert torch.equal(norm._u, twin._u)


@pytest.mark.parametrize("name", SIX)
def test_a_cached_parametrization_is_computed_once(name):
    ours, masked = masked_module(name)
    given = shapes(name)
    with parametrize.cached():
        assert_same(ours(*given), ours(*given), rtol=0, atol=0)
    assert masked.runs == 1


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("name", SIX)
def test_norms_of_the_older_kind_are_switched(name, norm):
    # With weights of this norm a layer hardly forgets, and roundings of float32 would grow.
    make, exact = getattr(torch.nn, name), {"rtol": 1e-11, "atol": 1e-12}
    ours, theirs = make(4, 8).double(), make(4, 8).double()
    for module in (ours, theirs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            getattr(torch.nn.utils, norm)(module, hidden(name))
    ours.load_state_dict(theirs.state_dict())
    given = shapes(name, dtype=torch.float64)
    assert len(ostinato.replace(ours).changed) == 1
    for module in (ours, theirs):
        module.eval()
        with torch.no_grad():
            next(module.parameters()).mul_(0.5)
            getattr(module, f"{hidden(name)}_{'g' if norm == 'weight_norm' else 'orig'}").mul_(2)
    assert_same(ours(*given), theirs(*given), **exact)
    getattr(torch.nn.utils, f"remove_{norm}")(ours, hidden(name))
    assert hidden(name) in dict(ours.named_parameters())
    assert_same(ours(*given), theirs(*given), **exact)


@pytest.mark.parametrize("name", SIX)
def test_pruned_weights(name):
    theirs = getattr(torch.nn, name)(4, 8)
    prune.l1_unstructured(theirs, hidden(name), amount=0.5)
    ours, given = getattr(torch.nn, name)(4, 8), shapes(name)
    ostinato.replace(ours)
    prune.l1_unstructured(ours, hidden(name), amount=0.5)
    ours.load_state_dict(theirs.state_dict())
    # Pruned after and before the change.
    assert_same(ours(*given), theirs(*given))
    expected = theirs(*given)
    assert len(ostinato.replace(theirs).changed) == 1
    assert_same(theirs(*given), expected)
    for module in (ours, theirs):
        prune.ln_structured(module, hidden(name), amount=2, n=2, dim=0)
        assert (getattr(module, hidden(name)) == 0).all(dim=1).sum() >= 2
        prune.remove(module, hidden(name))
        assert hidden(name) in dict(module.named_parameters())
    assert_same(ours(*given), theirs(*given))


class LowRank(torch.nn.Module):
    """W + B A as a parametrization: the weight that was there is frozen."""

    def __init__(self, weight, rank=2):
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(rank, weight.size(1)))
        self.b = torch.nn.Parameter(torch.randn(weight.size(0), rank))

    def forward(self, weight):
        return weight + self.b @ self.a


@pytest.mark.parametrize("name", SIX)
def test_low_rank_updates(name):
    # In float64: the updates are large, and float32 rounds what they leave of small states.
    exact = {"rtol": 1e-11, "atol": 1e-12}
    results, gradients, given = [], [], shapes(name, dtype=torch.float64)
    for module in pair(name, 4, 8, dtype=torch.float64):
        weight = getattr(module, hidden(name)).requires_grad_(False)
        torch.manual_seed(6)
        update = LowRank(weight).double()
        parametrize.register_parametrization(module, hidden(name), update)
        results.append(module(*given))
        first = results[-1] if isinstance(results[-1], torch.Tensor) else results[-1][0]
        gradients.append(torch.autograd.grad(first.sum(), list(update.parameters())))
    assert_same(*results, **exact)
    torch.testing.assert_close(*gradients, **exact)


@pytest.mark.parametrize("name", SIX)
def test_a_weight_that_is_replaced_by_a_computed_tensor(name):
    results, gradients, given = [], [], shapes(name)
    for module in pair(name, 4, 8):
        weight = getattr(module, hidden(name)).detach()
        torch.manual_seed(6)
        update = LowRank(weight)
        delattr(module, hidden(name))
        setattr(module, hidden(name), update(weight))
        results.append(module(*given))
        first = results[-1] if isinstance(results[-1], torch.Tensor) else results[-1][0]
        gradients.append(torch.autograd.grad(first.sum(), list(update.parameters())))
    assert_same(*results)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("library", [nn, torch.nn])
def test_copies_that_torch_does_not_make(library):
    layer = library.GRU(4, 8)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
        pickle.dumps(layer)
    layer = library.GRU(4, 8)
    weight = layer.weight_hh_l0
    del layer.weight_hh_l0
    layer.weight_hh_l0 = 2 * weight
    with pytest.raises(RuntimeError, match="Only Tensors created explicitly by the user"):
        copy.deepcopy(layer)


class Wrapped(torch.nn.Module):
    """A module in the place of a layer, which holds the layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.update = torch.nn.Linear(4, 16, bias=False)

    def forward(self, input, hx=None):
        output, h_n = self.base(input, hx)
        return output + self.update(input), h_n


def test_a_module_around_a_layer():
    _, model = taggers()
    model.gru = Wrapped(model.gru)
    twin = copy.deepcopy(model)
    assert [layer.name for layer in ostinato.replace(model).changed] == ["gru.base", "lstm"]
    x = torch.randn(5, 3, 4)
    assert_same(model(x), twin(x))


# ---- around the model ----


@pytest.mark.cpu("DataParallel without a GPU")
@pytest.mark.filterwarnings("ignore:DataParallel:FutureWarning")
def test_data_parallel_without_a_gpu():
    ours, theirs = taggers()
    x = torch.randn(5, 3, 4)
    assert_same(torch.nn.DataParallel(ours)(x), theirs(x))


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    torch.distributed.init_process_group(
        "gloo" if on_cpu() else "nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("late", [False, True])
def test_distributed_data_parallel_around_or_before_the_change(one_process, late):
    ours, theirs = taggers()
    x = torch.randn(5, 3, 4)
    wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(theirs) if late else ours)
    assert len(ostinato.replace(wrapped).changed) == (2 if late else 0)
    for model in (wrapped, theirs):
        model(x).sum().backward()
    for mine, other in zip(wrapped.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_fully_shard_after_the_change(one_process):
    from torch.distributed import device_mesh, fsdp

    ours, theirs = taggers()
    x = torch.randn(5, 3, 4)
    expected = theirs(x)
    mesh = device_mesh.init_device_mesh(device_type(), (1,))
    for model in (ours, theirs):
        for module in (model.gru, model.lstm, model):
            fsdp.fully_shard(module, mesh=mesh)
        assert_same(model(x), expected)
        model(x).sum().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            mine.grad.full_tensor(), other.grad.full_tensor(), rtol=1e-4, atol=1e-5
        )
    # What it wraps gets a class derived from its own, which is left alone.
    report = ostinato.replace(theirs)
    assert report.changed == ()
    assert report.left[0].why == "FSDPGRU is derived from torch.nn.GRU"


def test_a_model_that_fx_has_traced():
    ours, theirs = taggers()
    x = torch.randn(5, 3, 4)
    # Layers are leaves of a trace, torch's and ours, and the leaves can be switched.
    traced = torch.fx.symbolic_trace(copy.deepcopy(theirs))
    assert len(ostinato.replace(traced).changed) == 2
    assert torch.equal(traced(x), ours(x))
    traced = torch.fx.symbolic_trace(ours)
    assert torch.equal(traced(x), ours(x))
    assert len(ostinato.restore(traced).changed) == 2
    assert_same(traced(x), theirs(x))


def test_torchinfo():
    torchinfo = pytest.importorskip("torchinfo")
    ours, theirs = (torchinfo.summary(m, (5, 3, 4), verbose=0) for m in taggers())
    assert str(ours) == str(theirs)
    assert ours.total_params == sum(weight.numel() for weight in Tagger().parameters())


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")

    class Task(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, batch, index):
            return self.model(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    batches = torch.utils.data.DataLoader(torch.randn(3, 5, 3, 4), batch_size=None)
    tasks = [Task(model) for model in taggers()]
    late = Task(Tagger())
    late.load_state_dict(tasks[1].state_dict())
    assert [layer.name for layer in ostinato.replace(late).changed] == ["model.gru", "model.lstm"]
    for number, task in enumerate([*tasks, late]):
        trainer = lightning.Trainer(
            accelerator="cpu" if on_cpu() else "gpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path / str(number),
            gradient_clip_val=1.0,
        )
        trainer.fit(task, batches)
        (path,) = (tmp_path / str(number)).rglob("*.ckpt")
        # A checkpoint of either loads into the other.
        other = Task(taggers()[number == 0])
        other.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        assert_same_weights(task, other)
    assert_same_weights(*tasks)
    assert_same_weights(late, tasks[1])


# ---- quantization ----

AO_WARNS = (
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning",
    "ignore:torch.quantize_per_tensor:UserWarning",
)


@pytest.mark.cpu("torch quantizes on the CPU")
@pytest.mark.filterwarnings(*AO_WARNS)
def test_dynamic_quantization_knows_torchs_classes_alone():
    ours, _ = taggers()
    x = torch.randn(5, 3, 4)
    quantize, dynamic = torch.ao.quantization.quantize_dynamic, torch.ao.nn.quantized.dynamic
    with pytest.warns(UserWarning, match=r"left ostinato.nn.(GRU|LSTM) as it was") as seen:
        quantized = quantize(ours)
    said = [str(w.message) for w in seen if "ostinato.restore" in str(w.message)]
    assert len(said) == 2
    assert type(quantized.head) is dynamic.Linear
    assert type(quantized.gru) is nn.GRU
    torch.testing.assert_close(quantized(x), ours(x), rtol=0.1, atol=0.02)
    # A mapping does not help: torch's classes ask for torch's.
    with pytest.raises(AssertionError, match=r"only works for nn.LSTM and nn.GRU"):
        quantize(ours, {nn.GRU}, mapping={nn.GRU: dynamic.GRU})
    ostinato.restore(ours)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ostinato", category=UserWarning)
        quantized = quantize(ours)
    assert type(quantized.gru) is dynamic.GRU
    assert type(quantized.lstm) is dynamic.LSTM
    torch.testing.assert_close(quantized(x), ours(x), rtol=0.1, atol=0.02)
    # Its weights are packed: nothing there is ours to run.
    assert ostinato.replace(quantized).changed == ()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_restored_model_exports_as_torchs():
    pytest.importorskip("onnx")
    ours, _ = taggers()
    ostinato.restore(ours)
    written = io.BytesIO()
    torch.onnx.export(ours, (torch.randn(5, 3, 4),), written, dynamo=False)
    assert b"LSTM" in written.getvalue()
