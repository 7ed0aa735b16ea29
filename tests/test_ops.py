"""The operators `ostinato::layer` and `ostinato::layer_backward`, and `ops.layer` above them."""

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from ostinato import cpu, route
from support.cells import CELLS, has_c
from support.devices import device_type, engine_dtype, on_cpu, same
from support.samples import SAMPLES, Sample, close, draw, forward_mode, gradients

operators = torch.ops.ostinato

samples = pytest.mark.parametrize("kind", SAMPLES)
# What the operators themselves take.
projects = pytest.mark.cpu("no kernel for GPUs projects")
FLOAT64 = pytest.param(torch.float64, marks=pytest.mark.cpu("no kernel for GPUs in float64"))
operator_samples = pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[projects] * ("projection" in SAMPLES[k])) for k in SAMPLES],
)


def sample_of(kind, dtype=torch.float64):
    return draw(**SAMPLES[kind], dtype=dtype)


def cotangents_of(results):
    return [torch.randn_like(result) for result in results]


# ---- torch's own checks of an operator ----

# Nothing here is about speed, and a transform of torch.compile costs seconds for every sample.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
ALL_CHECKS = (*CHECKS, "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("keep", [True, False])
@operator_samples
def test_opcheck_layer(kind, keep):
    sample = sample_of(kind, engine_dtype())
    checks = CHECKS
    if keep:
        sample, checks = sample.training(), ALL_CHECKS
    torch.library.opcheck(operators.layer, sample.operator_arguments(keep), test_utils=checks)


def backward_arguments(sample, wanted=None):
    """The arguments of `ostinato::layer_backward` after a forward call of this sample."""
    *call, _, _ = sample.operator_arguments()
    with torch.no_grad():
        output, h_n, c_n, cells, reserve = operators.layer(*call, has_c(sample.cell), True)
    grads = [torch.randn_like(output), torch.randn_like(h_n), None, None]
    if has_c(sample.cell):
        grads[2:] = [torch.randn_like(c_n), torch.randn_like(cells)]
    if wanted is None:
        wanted = [True, sample.h_0 is not None, sample.c_0 is not None, False, False]
        wanted += [True] * len(sample.weights)
    return (*grads, output, reserve, wanted, *call)


@operator_samples
def test_opcheck_layer_backward(kind):
    sample = sample_of(kind, engine_dtype())
    torch.library.opcheck(operators.layer_backward, backward_arguments(sample), test_utils=CHECKS)


@pytest.mark.parametrize("wanted", range(7))
def test_backward_computes_what_is_wanted(wanted):
    sample = draw("lstm", bidirectional=True, dtype=engine_dtype())
    everything = [True] * 3 + [False] * 2 + [True] * len(sample.weights)
    arguments = backward_arguments(sample, everything)
    every = operators.layer_backward(*arguments)
    flags = [ok and index % 7 == wanted for index, ok in enumerate(everything)]
    some = operators.layer_backward(*arguments[:6], flags, *arguments[7:])
    for want, part, whole in zip(flags, some, every, strict=True):
        assert torch.equal(part, whole) if want else part.numel() == 0


# ---- numbers ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@samples
def test_results_and_gradients_are_the_references(kind, dtype):
    sample = sample_of(kind, dtype).training()
    expected = sample.each(lambda t: t.detach().double().requires_grad_())
    results, truth = sample.run(), expected.reference()
    seeds = cotangents_of(results)
    grads = gradients(results, sample.leaves(), seeds)
    true_grads = gradients(truth, expected.leaves(), [seed.double() for seed in seeds])
    close([*results, *grads], [t.to(dtype) for t in (*truth, *true_grads)])


@operator_samples
def test_the_operator_and_the_call_past_the_dispatcher_agree(kind):
    sample = sample_of(kind, torch.float32).training()
    direct = sample.run()
    through = [
        result
        for result in operators.layer(*sample.operator_arguments())[:3]
        if result.numel() or has_c(sample.cell)
    ][: len(direct)]
    seeds = cotangents_of(direct)
    with torch.no_grad():
        same(sample.run(), direct)
    same(through, direct)
    same(gradients(through, sample.leaves(), seeds), gradients(direct, sample.leaves(), seeds))


@samples
def test_gradcheck(kind):
    sample = sample_of(kind).training()

    def function(*leaves):
        return tuple(sample.replaced(leaves).run())

    assert torch.autograd.gradcheck(function, sample.leaves())


@samples
def test_gradgradcheck(kind):
    sample = sample_of(kind).training()

    def function(*leaves):
        return tuple(sample.replaced(leaves).run())

    assert torch.autograd.gradgradcheck(function, sample.leaves(), fast_mode=True)


def derivatives(sample, run, order):
    """Gradients of a scalar of the results, taken `order` times over."""
    leaves = sample.leaves()
    # Squares, so that the cotangents depend on the leaves as well.
    value = sum(result.square().sum() for result in run(sample))
    for _ in range(order):
        found = gradients(value, leaves, None, create_graph=True)
        value = sum((grad * (1 + grad)).sum() for grad in found)
    return found


@pytest.mark.parametrize("order", [2, 3])
@samples
def test_higher_derivatives_are_the_references(kind, order):
    sample = sample_of(kind).training()
    close(
        derivatives(sample, Sample.run, order),
        derivatives(sample, Sample.reference, order),
        steps=32,
    )


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_of_a_gradient_of_one_output_alone(cell):
    # The others have no cotangent: undefined gradients reach both operators.
    for index in range(3 if has_c(cell) else 2):
        sample = draw(cell, dtype=torch.float64).training()
        found = []
        for run in (Sample.run, Sample.reference):
            first = gradients(run(sample)[index].sum(), sample.leaves(), None, create_graph=True)
            second = gradients(first[0].square().sum(), sample.leaves(), None)
            found.append([*first, *second])
        close(*found)


def test_a_result_that_nobody_uses_has_no_gradient():
    sample = draw("lstm").training()
    output, h_n, c_n = sample.run()
    assert all(grad is None for grad in torch.autograd.grad(
        output.detach().sum() + sample.input.sum(), sample.leaves()[1:], allow_unused=True
    ))  # fmt: skip
    for result in (output, h_n, c_n):
        assert torch.autograd.grad(result.sum(), sample.input, retain_graph=True)[0].any()


# ---- which gradients are asked for ----


@pytest.mark.parametrize("kind", ["rnn_relu", "gru", "packed both ways", "packed projected"])
def test_each_gradient_alone_and_each_left_out(kind):
    sample = sample_of(kind, torch.float32).training()
    results = sample.run()
    seeds = cotangents_of(results)
    everything = gradients(results, sample.leaves(), seeds)
    for index, leaf in enumerate(sample.leaves()):
        for alone in (True, False):
            leaves = [t.detach().requires_grad_(alone == (t is leaf)) for t in sample.leaves()]
            results = sample.replaced(leaves).run()
            asked = [t for t in leaves if t.requires_grad]
            expected = [g for i, g in enumerate(everything) if alone == (i == index)]
            same(gradients(results, asked, seeds), expected)


def test_nothing_requires_a_gradient():
    assert not any(result.requires_grad for result in draw("lstm").run())
    with torch.no_grad():
        assert not any(result.requires_grad for result in draw("lstm").training().run())
    with torch.inference_mode():
        assert all(result.is_inference() for result in draw("lstm").run())


def test_backward_twice_over_one_graph():
    sample = draw("lstm", lengths=(4, 2), bidirectional=True).training()
    results = sample.run()
    seeds = cotangents_of(results)
    first = gradients(results, sample.leaves(), seeds, retain_graph=True)
    same(gradients(results, sample.leaves(), seeds), first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(results, sample.leaves(), seeds)


@pytest.mark.parametrize("name", ["output", "input", "weight_hh"])
def test_what_backward_reads_must_not_change_before_it(name):
    sample = draw("gru").training()
    input, weight = sample.input.clone(), sample.weights[1].clone()
    sample = sample._replace(input=input, weights=[sample.weights[0], weight, *sample.weights[2:]])
    output, _ = sample.run()
    with torch.no_grad():
        {"output": output, "input": input, "weight_hh": weight}[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_backward_without_kept_values_says_so():
    sample = draw("gru").training()
    output, *_ = operators.layer(*sample.operator_arguments(keep=False))
    with pytest.raises(RuntimeError, match="keep=True"):
        output.sum().backward()


def test_checkpointing_recomputes_the_layer():
    sample = draw("lstm").training()
    results = sample.run()
    seeds = cotangents_of(results)
    again = torch.utils.checkpoint.checkpoint(sample.run, use_reentrant=False)
    same(again, results)
    same(gradients(again, sample.leaves(), seeds), gradients(results, sample.leaves(), seeds))


# ---- memory layouts ----


def transposed(t):
    """The same numbers, last dimension with the largest stride."""
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


def every_other(t):
    """The same numbers with gaps between them."""
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"))
    wide[..., ::2] = t
    return wide[..., ::2]


def off_by_one(t):
    """The same numbers, one element past the allocation's alignment."""
    return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)


def negative(t):
    """The same numbers, with the sign kept as a bit that only the dispatcher applies."""
    return torch._neg_view(-t)


LAYOUTS = {
    "transposed": transposed,
    "every other": every_other,
    "off by one": off_by_one,
    "negative bit": negative,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["gru", "packed both ways", "packed projected"])
def test_any_memory_layout_gives_the_same_bits(kind, layout):
    change = LAYOUTS[layout]
    sample = sample_of(kind, torch.float32)
    expected = sample.training()
    results = expected.run()
    seeds = cotangents_of(results)
    same(sample.each(change).run(), results)
    laid_out = expected.each(change)
    if sample.batch_sizes is not None:
        # Half of another tensor, whose other half would not do.
        doubled = torch.stack([sample.batch_sizes, torch.full_like(sample.batch_sizes, 99)], -1)
        laid_out = laid_out._replace(batch_sizes=doubled[:, 0])
    actual = laid_out.run()
    same(actual, results)
    found = gradients(actual, expected.leaves(), [change(seed) for seed in seeds])
    same(found, gradients(results, expected.leaves(), seeds))


def test_expanded_states_and_cotangents():
    sample = draw("lstm", states="")
    h, c = torch.randn(1, 1, 3), torch.randn(3)
    expanded = sample._replace(h_0=h.expand(1, 3, 3), c_0=c.expand(1, 3, 3)).training()
    expanded = expanded._replace(h_0=h.expand(1, 3, 3), c_0=c.expand(1, 3, 3))
    dense = expanded.each(torch.Tensor.contiguous)
    same(expanded.run(), dense.run())
    leaves = [expanded.input, *expanded.weights]
    ones = [torch.ones_like(result) for result in dense.run()]
    same(
        # The gradient of a sum is one number, expanded.
        gradients(sum(r.sum() for r in expanded.run()), leaves, None),
        gradients(dense.run(), leaves, ones),
    )


def test_zero_tensors_are_zeros():
    # What autograd makes where it knows that a tangent is zero: no memory stands behind it.
    sample = draw("gru")
    zero = torch._efficientzerotensor(sample.input.shape, device=device_type())
    expected = sample._replace(input=torch.zeros_like(sample.input))
    same(sample._replace(input=zero).run(), expected.run())


# ---- transforms of torch ----


@pytest.mark.parametrize("cell", CELLS)
def test_func_grad(cell):
    sample = draw(cell, dtype=torch.float64)
    training = sample.training()
    # Packed outputs of different scale, so that no gradient hides behind another.
    expected = gradients(sum(r.square().sum() for r in training.run()), training.leaves(), None)

    def loss(leaves):
        return sum(result.square().sum() for result in sample.replaced(leaves).run())

    close(torch.func.grad(loss)(sample.leaves()), expected)


@forward_mode
def test_func_hessian():
    sample = draw("gru", steps=2, batch=1, dtype=torch.float64)

    def loss(input, run):
        return sum(r.square().sum() for r in run(sample._replace(input=input)))

    actual, expected = (
        torch.func.hessian(loss)(sample.input, run) for run in (Sample.run, Sample.reference)
    )
    close([actual], [expected])


@forward_mode
def test_forward_mode_derivatives():
    sample = draw("lstm", dtype=torch.float64)
    tangents = [torch.randn_like(leaf) for leaf in sample.leaves()]

    def results(*leaves):
        return tuple(sample.replaced(leaves).run())

    def expected(*leaves):
        return tuple(sample.replaced(leaves).reference())

    leaves = tuple(sample.leaves())
    for a, e in zip(
        torch.func.jvp(results, leaves, tuple(tangents)),
        torch.func.jvp(expected, leaves, tuple(tangents)),
        strict=True,
    ):
        close(a, e)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(leaves, tangents, strict=True)]
        actual = [forward_ad.unpack_dual(r).tangent for r in results(*duals)]
        close(actual, [forward_ad.unpack_dual(r).tangent for r in expected(*duals)])


# ---- shapes without numbers ----


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
@pytest.mark.parametrize("keep", [True, False])
@operator_samples
def test_fake_and_meta_tensors_have_the_real_shapes(kind, keep, dtype):
    sample = sample_of(kind, dtype)
    arguments = sample.operator_arguments(keep)
    shapes = [(r.shape, r.dtype, r.stride()) for r in operators.layer(*arguments)]
    meta = sample.each(lambda t: t.to("meta"))
    results = operators.layer(*meta.operator_arguments(keep))
    # What is kept for backward is an engine's own.
    alike = len(shapes) if on_cpu() else 4
    assert [(r.shape, r.dtype, r.stride()) for r in results[:alike]] == shapes[:alike]
    assert all(r.device.type == "meta" for r in results)
    with FakeTensorMode() as mode:
        fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
        results = operators.layer(*fake)
        assert [(r.shape, r.dtype, r.stride()) for r in results] == shapes


def test_meta_tensors_go_through_the_layer_and_back():
    sample = draw("lstm", lengths=(3, 1), bidirectional=True).each(lambda t: t.to("meta"))
    training = sample.each(lambda t: t.detach().requires_grad_())
    results = training.run()
    assert [tuple(r.shape) for r in results] == [(4, 6), (2, 2, 3), (2, 2, 3)]
    found = gradients(results, training.leaves(), [torch.empty_like(r) for r in results])
    assert [g.shape for g in found] == [t.shape for t in training.leaves()]


# ---- dtypes without an engine ----


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_other_dtypes_run_the_reference_and_say_so_once(dtype, monkeypatch, caplog):
    monkeypatch.setattr(route, "_told", set())
    monkeypatch.setattr(cpu._core, "forward", None)
    monkeypatch.setattr(cpu._core, "tensors_forward", lambda *_: None)
    sample = draw("lstm", lengths=(4, 2, 2), bidirectional=True, dtype=dtype).training()
    with caplog.at_level(logging.WARNING, logger="ostinato"):
        results = sample.run()
        sample.run()
        draw("gru", dtype=dtype).run()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(dtype) in caplog.text
    assert device_type() in caplog.text
    seeds = cotangents_of(results)
    expected = sample.reference()
    same(results, expected)
    same(gradients(results, sample.leaves(), seeds), gradients(expected, sample.leaves(), seeds))


def test_engine_dtypes_say_nothing(caplog):
    with caplog.at_level(logging.DEBUG, logger="ostinato"):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            draw("gru", dtype=dtype).training().run()
    assert not caplog.records
