"""vmap, torch.func and forward mode: the rules of ostinato.transforms against loops.

Legend: T steps, B batch, N packed rows, I input, H hidden, V elements of a mapped dimension.
"""

import copy
import functools

import pytest
import torch
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)

from ostinato import cpu, nn, ops, reference, transforms
from support.cells import CELL_MODULES, CELLS, LAYERS, RECORDS
from support.devices import on_cpu, same
from support.samples import SAMPLES, close, draw, forward_mode

V = 5
close = functools.partial(close, steps=32)

samples = pytest.mark.parametrize("kind", SAMPLES)
cells = pytest.mark.parametrize("cell", CELLS)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def engine_alone(monkeypatch):
    """Make the reference refuse, so that what passes ran on the engine; for GPUs it has no vmap."""
    if not on_cpu():
        return

    def refuse(*_, **__):
        raise AssertionError("the reference runs")

    monkeypatch.setattr(reference, "states", refuse)


def mapped(leaf, dim, count=V):
    """Variants of a leaf, along a new dimension; the leaf itself where there is none."""
    if dim is None:
        return leaf
    return torch.stack([leaf + 0.1 * v * torch.randn_like(leaf) for v in range(count)], dim)


def dims_of(sample, which):
    """Where each leaf is mapped: inputs, states or weights, or most along mixed dimensions."""
    count, weights = len(sample.leaves()), len(sample.weights)
    states = count - weights - 1
    return {
        "inputs": (0, *[None] * (states + weights)),
        "states": (None, *[0] * states, *[None] * weights),
        "weights": (*[None] * (1 + states), *[0] * weights),
        "one weight": (*[None] * (1 + states), None, 0, *[None] * (weights - 2)),
        "all": (0,) * count,
        "mixed": tuple(
            leaf.dim() - k % 2 if k % 3 else None for k, leaf in enumerate(sample.leaves())
        ),
    }[which]


def one_by_one(function, dims, leaves):
    """What vmap is to give: the function of each element, stacked."""
    found = [
        function(*(
            leaf if dim is None else leaf.select(dim, v)
            for leaf, dim in zip(leaves, dims, strict=True)
        ))
        for v in range(V)
    ]  # fmt: skip
    return [torch.stack(results) for results in zip(*found, strict=True)]


def run_of(sample, cuts=None):
    """The sample's results as a function of its leaves."""

    def run(*leaves):
        mine = sample.replaced(leaves)
        if cuts is None:
            return tuple(mine.run())
        options = {"has_biases": mine.has_biases, "bidirectional": mine.bidirectional}
        return tuple(r for r in ops.cut_layer(*mine[:6], **options, **cuts) if r is not None)

    return run


def loss_of(run):
    def loss(*leaves):
        return sum((r.square() * (k + 1)).sum() for k, r in enumerate(run(*leaves)))

    return loss


def cuts_of(sample):
    """Some lengths, if the rows have none, and resets."""
    cuts = {"resets": torch.rand(sample.input.shape[:-1]) < 0.3}
    if sample.batch_sizes is None:
        steps, batch = sample.input.shape[:2]
        cuts["lengths"] = torch.randint(0, steps + 1, (batch,), device="cpu")
    if sample.h_0 is not None:
        cuts["reset_h"] = torch.randn_like(sample.h_0)
    return cuts


# ---- vmap ----


@pytest.mark.parametrize(
    ("kind", "which"),
    [
        (kind, which)
        for kind in SAMPLES
        for which in ("inputs", "states", "weights", "one weight", "all", "mixed")
        # Without states there is nothing to map.
        if (which, SAMPLES[kind].get("states")) != ("states", "")
    ],
)
def test_vmap_has_the_bits_of_a_loop(kind, which, threads, engine_alone):
    sample = draw(**SAMPLES[kind])
    dims = dims_of(sample, which)
    leaves = [mapped(*pair) for pair in zip(sample.leaves(), dims, strict=True)]
    run = run_of(sample)
    same(vmap(run, in_dims=dims)(*leaves), one_by_one(run, dims, leaves))


@pytest.mark.parametrize("which", ["inputs", "weights", "all"])
@samples
def test_vmap_with_cuts_has_the_bits_of_a_loop(kind, which, engine_alone):
    sample = draw(**SAMPLES[kind])
    dims = dims_of(sample, which)
    leaves = [mapped(*pair) for pair in zip(sample.leaves(), dims, strict=True)]
    run = run_of(sample, cuts_of(sample) | {"all_c": True})
    same(vmap(run, in_dims=dims)(*leaves), one_by_one(run, dims, leaves))


@cells
def test_vmap_over_lengths_resets_and_their_states(cell, engine_alone):
    sample = draw(cell, 6, 4, bidirectional=True)
    lengths, resets = torch.randint(0, 7, (V, 4), device="cpu"), torch.rand(6, V, 4) < 0.3
    anew = torch.randn(V, 2, 4, 3)

    def run(lengths, resets, anew):
        cuts = {"lengths": lengths, "resets": resets, "reset_h": anew}
        return run_of(sample, cuts)(*sample.leaves())

    dims = (0, 1, 0)
    leaves = (lengths, resets, anew)
    same(vmap(run, in_dims=dims)(*leaves), one_by_one(run, dims, leaves))


@pytest.mark.cpu("the compiled engine")
def test_lengths_out_of_range_are_refused():
    sample = draw("gru", 6, 4)
    lengths = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 7]], device="cpu")

    def run(lengths, weight):
        leaves = sample.replaced([*sample.leaves()[:-1], weight]).leaves()
        return run_of(sample, {"lengths": lengths})(*leaves)[0]

    bias = sample.weights[-1]
    for weights, dim in ((bias, None), (torch.stack([bias, bias]), 0)):
        with pytest.raises(ValueError, match="numbers from 0 to 6, the steps, got 7"):
            vmap(run, in_dims=(0, dim))(lengths, weights)


@pytest.mark.parametrize(("steps", "batch"), [(0, 3), (4, 0), (1, 1)])
@cells
def test_vmap_of_empty_and_single(cell, steps, batch):
    sample = draw(cell, steps, batch, bidirectional=True)
    for which in ("inputs", "weights"):
        dims = dims_of(sample, which)
        leaves = [mapped(*pair) for pair in zip(sample.leaves(), dims, strict=True)]
        run = run_of(sample)
        same(vmap(run, in_dims=dims)(*leaves), one_by_one(run, dims, leaves))
        gradient = grad(loss_of(run), argnums=tuple(range(len(leaves))))
        close(vmap(gradient, in_dims=dims)(*leaves), one_by_one(gradient, dims, leaves))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype, engine_alone):
    sample = draw("lstm", hidden=17, dtype=dtype)
    run = run_of(sample)
    gradient = grad(loss_of(run), argnums=tuple(range(len(sample.leaves()))))
    for which in ("inputs", "weights"):
        dims = dims_of(sample, which)
        leaves = [mapped(*pair) for pair in zip(sample.leaves(), dims, strict=True)]
        same(vmap(run, in_dims=dims)(*leaves), one_by_one(run, dims, leaves))
        same(vmap(gradient, in_dims=dims)(*leaves), one_by_one(gradient, dims, leaves))


@pytest.mark.parametrize("order", ["models outside", "models inside", "models twice"])
@pytest.mark.parametrize("cuts", [False, True])
@cells
def test_nested_vmap(cell, cuts, order, engine_alone):
    sample = draw(cell, projection=2 * RECORDS[cell].projects)
    run = run_of(sample, cuts_of(sample) if cuts else None)
    gradient = grad(loss_of(run), argnums=tuple(range(len(sample.leaves()))))
    inner, outer = {
        "models outside": ("inputs", "weights"),
        "models inside": ("weights", "inputs"),
        "models twice": ("weights", "one weight"),
    }[order]
    inner, outer = dims_of(sample, inner), dims_of(sample, outer)
    leaves = [
        mapped(mapped(leaf, a), b) for leaf, a, b in zip(sample.leaves(), inner, outer, strict=True)
    ]
    for function in (run, gradient):
        actual = vmap(vmap(function, in_dims=inner), in_dims=outer)(*leaves)
        expected = one_by_one(lambda *each, f=function: one_by_one(f, inner, each), outer, leaves)
        same(actual, expected)


def test_views_negative_and_expanded(engine_alone):
    sample = draw("gru")
    weight = torch._neg_view(-mapped(sample.weights[0], 0))
    input = torch.randn(1, 4, 3, 2).expand(V, 4, 3, 2)

    def run(input, weight):
        return tuple(sample._replace(input=input, weights=[weight, *sample.weights[1:]]).run())

    same(vmap(run)(input, weight), one_by_one(run, (0, 0), (input, weight)))


# ---- gradients ----


@pytest.mark.parametrize("which", ["inputs", "weights", "mixed"])
@samples
def test_gradients_of_each_have_the_bits_of_a_loop(kind, which, threads, engine_alone):
    sample = draw(**SAMPLES[kind])
    dims = dims_of(sample, which)
    leaves = [mapped(*pair) for pair in zip(sample.leaves(), dims, strict=True)]
    gradient = grad(loss_of(run_of(sample)), argnums=tuple(range(len(leaves))))
    same(vmap(gradient, in_dims=dims)(*leaves), one_by_one(gradient, dims, leaves))


@cells
def test_gradients_of_each_with_cuts(cell, engine_alone):
    sample = draw(cell, 6, 4, bidirectional=True)
    run = run_of(sample, cuts_of(sample) | {"all_c": True})
    gradient = grad(loss_of(run), argnums=tuple(range(len(sample.leaves()))))
    for which in ("inputs", "weights"):
        dims = dims_of(sample, which)
        leaves = [mapped(*pair) for pair in zip(sample.leaves(), dims, strict=True)]
        same(vmap(gradient, in_dims=dims)(*leaves), one_by_one(gradient, dims, leaves))


@cells
def test_jacobian_of_the_input_alone_is_one_run(cell, monkeypatch, engine_alone):
    sample = draw(cell, bidirectional=True)
    backward = cpu._core.backward

    def one(*arguments):
        assert arguments[4] == 1, "a stack ran"
        return backward(*arguments)

    monkeypatch.setattr(cpu._core, "backward", one)
    results, pull = vjp(lambda x: tuple(sample._replace(input=x).run()), sample.input)
    seeds = [mapped(result, 0) for result in results]
    (actual,) = vmap(lambda *seeds: pull(seeds))(*seeds)
    same(actual, [pull(each)[0] for each in zip(*seeds, strict=True)])


@pytest.mark.parametrize("which", ["inputs", "weights", "mixed"])
@samples
def test_gradient_of_a_vmap(kind, which, engine_alone):
    sample = draw(**SAMPLES[kind], dtype=torch.float64)
    dims = dims_of(sample, which)
    leaves = [mapped(*pair) for pair in zip(sample.leaves(), dims, strict=True)]
    run = run_of(sample)
    arguments = tuple(range(len(leaves)))
    each = loss_of(vmap(run, in_dims=dims))
    loop = loss_of(lambda *leaves: one_by_one(run, dims, leaves))
    expected = grad(loop, argnums=arguments)(*leaves)
    close(grad(each, argnums=arguments)(*leaves), expected)
    # The same by autograd alone, as a training step of an ensemble takes it.
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    close(torch.autograd.grad(each(*leaves), leaves), expected)


@cells
def test_many_gradients_at_once(cell):
    sample = draw(cell, 3, 2, dtype=torch.float64)
    dims = dims_of(sample, "weights")
    leaves = [mapped(*pair).requires_grad_() for pair in zip(sample.leaves(), dims, strict=True)]
    output = vmap(run_of(sample), in_dims=dims)(*leaves)[0]
    seeds = torch.randn(3, *output.shape, dtype=output.dtype)
    for is_batched in (True, False):
        if is_batched:
            options = {"retain_graph": True, "is_grads_batched": True}
            actual = torch.autograd.grad(output, leaves, seeds, **options)
        else:
            actual = vmap(
                lambda seed: torch.autograd.grad(output, leaves, seed, retain_graph=True)
            )(seeds)
        each = [torch.autograd.grad(output, leaves, seed, retain_graph=True) for seed in seeds]
        close(actual, [torch.stack(found) for found in zip(*each, strict=True)])


@pytest.mark.cpu("the compiled engine")
def test_what_needs_no_gradient_keeps_nothing(monkeypatch):
    kept = []
    run = transforms.run
    monkeypatch.setattr(
        transforms, "run", lambda plan, values: kept.append(plan.keep) or run(plan, values)
    )
    sample = draw("gru")
    training = sample.training()
    inputs = mapped(sample.input, 0)
    vmap(lambda x: sample._replace(input=x).run()[0])(inputs)
    vmap(lambda x: training._replace(input=x).run()[0])(inputs)
    with torch.no_grad():
        vmap(lambda x: training._replace(input=x).run()[0])(inputs)
    assert kept == [False, True, False]


# ---- derivatives, against the reference ----


def functions(cell, **options):
    """The layer and the reference as functions of input and one weight."""
    options = {"steps": 3, "batch": 2, "hidden": 2} | options
    sample = draw(cell, dtype=torch.float64, **options)

    def function(run):
        def results(input, weight):
            weights = [sample.weights[0], weight, *sample.weights[2:]]
            return tuple(run(sample._replace(input=input, weights=weights)))

        return results

    arguments = sample.input, sample.weights[1]
    return function(lambda s: s.run()), function(lambda s: s.reference()), arguments


def flat(tree):
    return torch.utils._pytree.tree_leaves(tree)


KINDS = {
    **{cell: {} for cell in CELLS},
    "both ways": {"bidirectional": True},
    "projected": {"projection": 1},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def functions_of(kind):
    return functions(kind if kind in CELLS else "lstm", **KINDS[kind])


@forward_mode
@kinds
def test_jacobians(kind):
    actual, expected, arguments = functions_of(kind)
    truth = flat(jacrev(expected, argnums=(0, 1))(*arguments))
    close(flat(jacrev(actual, argnums=(0, 1))(*arguments)), truth)
    close(flat(jacfwd(actual, argnums=(0, 1))(*arguments)), truth)
    close(flat(jacrev(actual, argnums=(0, 1), chunk_size=1)(*arguments)), truth)


@forward_mode
@kinds
def test_hessians(kind):
    actual, expected, arguments = functions_of(kind)
    truth = flat(hessian(loss_of(expected), argnums=(0, 1))(*arguments))
    for outer in (jacfwd, jacrev):
        for inner in (jacfwd, jacrev):
            found = outer(inner(loss_of(actual), argnums=(0, 1)), argnums=(0, 1))(*arguments)
            close(flat(found), truth)


@forward_mode
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # torch's linearize
@kinds
def test_products_with_jacobians_and_hessians(kind):
    actual, expected, arguments = functions_of(kind)
    tangents = tuple(torch.randn_like(argument) for argument in arguments)
    truth = flat(jvp(expected, arguments, tangents))
    close(flat(jvp(actual, arguments, tangents)), truth)
    results, linear = linearize(actual, *arguments)
    close(flat((results, linear(*tangents))), truth)
    # Hessian-vector products: forward over reverse, reverse over forward, reverse over reverse.
    gradient, true_gradient = (grad(loss_of(f), argnums=(0, 1)) for f in (actual, expected))
    truth = jvp(true_gradient, arguments, tangents)[1]
    close(jvp(gradient, arguments, tangents)[1], truth)

    def directional(*arguments):
        return jvp(loss_of(actual), arguments, tangents)[1]

    close(grad(directional, argnums=(0, 1))(*arguments), truth)
    close(vjp(gradient, *arguments)[1](tangents), truth)
    # A pullback that was made before the tangents came.
    cotangents, pull = vjp(actual, *arguments)
    seeds = tuple(torch.randn_like(c) for c in cotangents)
    found = jvp(pull, (cotangents,), (seeds,))
    true_pull = vjp(expected, *arguments)[1]
    close(flat(found), flat(jvp(true_pull, (cotangents,), (seeds,))))


@cells
def test_third_derivatives(cell):
    actual, expected, arguments = functions(cell, steps=2)

    def third(run):
        def second(*arguments):
            found = grad(loss_of(run), argnums=(0, 1))(*arguments)
            return sum((g * (1 + g)).sum() for g in found)

        def first(*arguments):
            found = grad(second, argnums=(0, 1))(*arguments)
            return sum((g * (1 + g)).sum() for g in found)

        return grad(first, argnums=(0, 1))(*arguments)

    close(third(actual), third(expected))


@pytest.mark.parametrize("cut", [False, True])
@cells
def test_second_derivatives_of_each(cell, cut):
    sample = draw(cell, 3, 2, dtype=torch.float64, bidirectional=True)
    run = run_of(sample, cuts_of(sample) | {"all_c": True} if cut else None)
    arguments = tuple(range(len(sample.leaves())))

    def second(*leaves):
        found = grad(loss_of(run), argnums=arguments)(*leaves)
        return sum((g * (1 + g)).sum() for g in found)

    for which in ("inputs", "weights"):
        dims = dims_of(sample, which)
        leaves = [mapped(*pair) for pair in zip(sample.leaves(), dims, strict=True)]
        gradient = grad(second, argnums=arguments)
        close(vmap(gradient, in_dims=dims)(*leaves), one_by_one(gradient, dims, leaves))
        mean = loss_of(vmap(grad(loss_of(run), argnums=arguments), in_dims=dims))
        loop = loss_of(
            lambda *each, d=dims: one_by_one(grad(loss_of(run), argnums=arguments), d, each)
        )
        close(grad(mean, argnums=arguments)(*leaves), grad(loop, argnums=arguments)(*leaves))


@forward_mode
@pytest.mark.parametrize("kind", ["gru", "projected"])
def test_gradcheck_of_a_vmap(kind):
    sample = draw(**SAMPLES[kind], dtype=torch.float64)
    leaves = [t.requires_grad_() for t in sample.leaves()]
    checks = {"check_forward_ad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(run_of(sample), leaves, **checks)
    for which in ("inputs", "weights"):
        dims = dims_of(sample, which)
        leaves = [
            mapped(leaf.detach(), dim, 2).requires_grad_()
            for leaf, dim in zip(sample.leaves(), dims, strict=True)
        ]
        each = vmap(run_of(sample), in_dims=dims)
        assert torch.autograd.gradcheck(each, leaves, **checks)
        assert torch.autograd.gradgradcheck(each, leaves, fast_mode=True)


# ---- modules ----


@pytest.mark.parametrize("name", LAYERS)
def test_an_ensemble_trains_as_its_models_do(name, threads, engine_alone):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    models = [getattr(nn, name)(3, 5, **options) for _ in range(V)]
    stacked, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    x = torch.randn(2, 7, 3)

    def call(state, buffers, x):
        return functional_call(base, (state, buffers), (x,))[0]

    outputs = vmap(call, in_dims=(0, 0, None))(stacked, buffers, x)
    same(outputs, [model(x)[0] for model in models])
    outputs.square().sum().backward()
    for v, model in enumerate(models):
        model(x)[0].square().sum().backward()
        same([p.grad[v] for p in stacked.values()], [p.grad for p in model.parameters()])


@pytest.mark.parametrize("name", CELL_MODULES)
def test_cells(name, engine_alone):
    module = getattr(nn, name)(3, 4)
    x, parameters = torch.randn(V, 3), dict(module.named_parameters())

    def loss(parameters, x):
        found = functional_call(module, parameters, (x,))
        return (found[0] if isinstance(found, tuple) else found).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for v in range(V):
        expected = torch.autograd.grad(loss(parameters, x[v]), list(parameters.values()))
        same([found[key][v] for key in parameters], expected)


def test_another_tensor_class_gets_the_reference(monkeypatch):
    class Mine(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            with torch._C._DisableTorchDispatch():
                return function(*args, **(kwargs or {}))

    sample = draw("gru")
    inputs = mapped(sample.input, 0)
    monkeypatch.setattr(transforms._Layer, "apply", None)
    found = vmap(lambda x: sample._replace(input=x).run()[0])(inputs.as_subclass(Mine))
    assert found.shape == (V, 4, 3, 3)


def test_batch_sizes_are_the_same_for_all():
    sample = draw("gru", lengths=(3, 1))
    with pytest.raises(RuntimeError):
        vmap(lambda sizes: sample._replace(batch_sizes=sizes).run()[0])(torch.ones(2, 4).long())
