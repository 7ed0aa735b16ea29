"""Own cells under torch's transforms, compilers and processes.

Legend: T steps, B batch, H hidden.
"""

import io
import subprocess
import sys
import textwrap

import pytest
import torch

from ostinato import nn
from support import own
from support.pairs import flat

cells = pytest.mark.parametrize("cell", **own.names(own.CELLS))
traced = pytest.mark.parametrize("cell", **own.names(own.TRACED))
# torch's own use of torch.jit, in forward mode too, and of what a trace takes for a constant.
TORCH_WARNS = (
    "ignore:`torch.jit:DeprecationWarning",
    "ignore:.*is deprecated. Please switch:DeprecationWarning",
    "ignore::torch.jit.TracerWarning",
)
KIND = {"dtype": torch.float64}


@pytest.fixture
def layer(cell):
    torch.manual_seed(0)
    return nn.Recurrent(cell, 3, 4, **KIND)


@pytest.fixture
def drives(cell):
    torch.manual_seed(1)
    return own.drives_of(cell, 5, 2, hidden=4, **KIND)


def draw(*shape):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*(shape or (5, 2, 3)), generator=generator, **KIND)


@cells
def test_gradients_and_their_gradients(cell, layer, drives):
    x = draw().requires_grad_()
    driven = () if drives is None else (drives.requires_grad_(),)
    weights = tuple(layer.parameters())
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *given):
        values = dict(zip(names, given[len(driven) :], strict=True))
        named = {"drives": given[0]} if driven else {}
        return tuple(flat(torch.func.functional_call(layer, values, (x,), named)))

    assert torch.autograd.gradcheck(run, (x, *driven, *weights))
    assert torch.autograd.gradgradcheck(run, (x, *driven, *weights))


@cells
def test_vmap_over_inputs_and_over_stacked_models(cell, layer, drives):
    xs = draw(6, 5, 2, 3)
    mapped = torch.func.vmap(lambda x: layer(x, drives=drives)[0])(xs)
    exact = {"rtol": 0, "atol": 0} if cell.engine else {}
    looped = torch.stack([layer(x, drives=drives)[0] for x in xs])
    torch.testing.assert_close(mapped, looped, **exact)
    models = [nn.Recurrent(cell, 3, 4, **KIND) for _ in range(3)]
    values, _ = torch.func.stack_module_state(models)

    def one(values):
        return torch.func.functional_call(models[0], values, (xs[0],), {"drives": drives})[0]

    looped = torch.stack([model(xs[0], drives=drives)[0] for model in models])
    torch.testing.assert_close(torch.func.vmap(one)(values), looped, **exact)


@cells
def test_gradients_of_each_sample(cell, layer, drives):
    x, weights = draw(), dict(layer.named_parameters())

    def loss(weights, x, drives):
        driven = None if drives is None else drives.unsqueeze(1)
        found = torch.func.functional_call(layer, weights, (x.unsqueeze(1),), {"drives": driven})
        return found[0].square().sum()

    dims = (None, 1, None if drives is None else 1)
    found = torch.func.vmap(torch.func.grad(loss), in_dims=dims)(weights, x, drives)
    for b in range(2):
        row = None if drives is None else drives[:, b]
        alone = torch.func.grad(loss)(weights, x[:, b], row)
        for name, grad in alone.items():
            torch.testing.assert_close(found[name][b], grad)


@pytest.mark.filterwarnings(*TORCH_WARNS)
@cells
def test_forward_mode_and_jacobians(cell, layer, drives):
    x = draw()

    def run(x):
        return layer(x, drives=drives)[0]

    moved, tangent = torch.func.jvp(run, (x,), (torch.ones_like(x),))
    jacobian = torch.func.jacrev(run)(x)
    torch.testing.assert_close(moved, run(x))
    torch.testing.assert_close(tangent, jacobian.sum((3, 4, 5)))


@cells
def test_compiled_as_one_graph(cell, layer, drives):
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = draw().requires_grad_()
    found, expected = (flat(f(x, drives=drives)) for f in (compiled, layer))
    torch.testing.assert_close(found, expected)
    leaves = (x, *layer.parameters())
    grads = [torch.autograd.grad(sum(t.sum() for t in each), leaves) for each in (found, expected)]
    torch.testing.assert_close(*grads)


@traced
def test_a_process_that_unpickles_a_layer_compiles_it(cell, layer, drives, tmp_path, request):
    x = draw()
    torch.save((layer, x, drives, layer(x, drives=drives)), tmp_path / "layer.pt")
    text = f"""
        import sys, torch
        sys.path.insert(0, {str(request.config.rootpath / "tests")!r})
        layer, x, drives, expected = torch.load({str(tmp_path / "layer.pt")!r}, weights_only=False)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, drives=drives), expected)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(text)], check=True, timeout=120)


class Driven(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, drives):
        return self.layer(x, drives=drives)[0]


@traced
def test_exported_and_loaded_by_a_process_without_the_class(cell, layer, drives, tmp_path):
    model, x = Driven(layer), draw()
    steps, batch = torch.export.Dim("steps", min=2), torch.export.Dim("batch", min=2)
    shapes = ({0: steps, 1: batch}, None if drives is None else {0: steps, 1: batch})
    program = torch.export.export(model, (x, drives), dynamic_shapes=shapes)
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("ostinato.layer" in target for target in targets) == 1
    file = tmp_path / "program.pt2"
    torch.export.save(program, file)
    torch.save((x, drives, model(x, drives)), tmp_path / "expected.pt")
    text = f"""
        import torch, ostinato.ops
        x, drives, expected = torch.load({str(tmp_path / "expected.pt")!r})
        found = torch.export.load({str(file)!r}).module()(x, drives)
        assert torch.equal(found, expected)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(text)], check=True, timeout=120)


def test_an_untraced_cell_is_exported_as_torchs_operators():
    torch.manual_seed(0)
    layer, x = nn.Recurrent(own.Untraced, 3, 4, **KIND), draw()
    program = torch.export.export(layer, (x,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), layer(x))


@pytest.mark.filterwarnings(*TORCH_WARNS)
@cells
def test_traced_by_jit(cell, layer, drives):
    model, x = Driven(layer), draw()
    if drives is None:
        model = torch.nn.Sequential(layer)
        found = torch.jit.trace(model, (x,), check_trace=False)(x)
        torch.testing.assert_close(flat(found), flat(layer(x)))
    else:
        found = torch.jit.trace(model, (x, drives), check_trace=False)(x, drives)
        torch.testing.assert_close(found, model(x, drives))


@cells
def test_many_gradients_at_once(cell, layer, drives):
    x = draw().requires_grad_()
    y = layer(x, drives=drives)[0]
    seeds = draw(3, *y.shape)
    leaves = (x, *layer.parameters())
    found = torch.autograd.grad(y, leaves, seeds, is_grads_batched=True, retain_graph=True)
    for k, seed in enumerate(seeds):
        alone = torch.autograd.grad(y, leaves, seed, retain_graph=True)
        for many, one in zip(found, alone, strict=True):
            torch.testing.assert_close(many[k], one)


TRAIN = """
    import os, sys, torch
    import torch.distributed as dist
    sys.path.insert(0, {tests!r})
    from ostinato import nn
    from support import own

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    layer = nn.Recurrent(own.Independent, 3, 4, num_layers=2, dtype=torch.float64)
    parallel = torch.nn.parallel.DistributedDataParallel(layer)
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    parallel(x[:, 2 * rank : 2 * rank + 2])[0].square().mean().backward()
    whole = nn.Recurrent(own.Independent, 3, 4, num_layers=2, dtype=torch.float64)
    whole.load_state_dict(layer.state_dict())
    whole(x)[0].square().mean().backward()
    for ours, expected in zip(layer.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)
    dist.destroy_process_group()
"""


def test_two_processes_share_the_gradient(tmp_path, request):
    file = tmp_path / "train.py"
    file.write_text(textwrap.dedent(TRAIN).format(tests=str(request.config.rootpath / "tests")))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    subprocess.run([*command, str(file)], check=True, timeout=120)
