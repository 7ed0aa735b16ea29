"""The drop-in contract: every float dtype, and torch.autocast."""

import copy

import pytest
import torch

from ostinato import cpu, cuda, nn
from support.cells import LAYERS, MODULES, SIX, TORCH_LAYERS
from support.devices import assert_equal, device_type
from support.pairs import TORCH_WARNS, assert_same, by_cpu, each, flat, packed, pair, shapes, state

pytestmark = pytest.mark.filterwarnings(TORCH_WARNS)

DTYPES = {
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
    torch.float32: 1e-5,
    torch.float64: 1e-12,
    torch.complex64: 1e-5,
    torch.complex128: 1e-12,
}


def kept_from_poles(module):
    """Make weights small: tanh has poles off the real line, near which rounding grows."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(0.25 if weight.is_complex() else 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SIX)
def test_every_float_dtype_forward_and_backward(name, dtype):
    ours, theirs = pair(name, 4, 8, dtype=dtype)
    kept_from_poles(ours)
    kept_from_poles(theirs)
    x, h = shapes(name, dtype=dtype)
    results = []
    for module in (ours, theirs):
        arguments = (x.clone().requires_grad_(), each(h, lambda t: t.clone().requires_grad_()))
        # torch's operators for GPUs take no complex numbers.
        is_less = module is theirs and dtype.is_complex
        result = by_cpu(module, *arguments) if is_less else module(*arguments)
        sum(t.abs().square().sum() for t in flat(result)).backward()
        gradients = [t.grad for t in flat(arguments)]
        gradients += [w.grad.to(x.device) for w in module.parameters()]
        results.append((flat(result), gradients))
    tolerance = DTYPES[dtype]
    assert all(t.dtype == dtype for t in results[0][0])
    torch.testing.assert_close(*(r[0] for r in results), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(*(r[1] for r in results), rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("name", TORCH_LAYERS)
def test_packed_layers_in_other_dtypes(name, dtype):
    ours, theirs = pair(name, 4, 8, 2, bidirectional=True, dtype=dtype)
    kept_from_poles(ours)
    kept_from_poles(theirs)
    sequences = packed(False, dtype=dtype)
    tolerance = DTYPES[dtype]
    expected = by_cpu(theirs, sequences) if dtype.is_complex else theirs(sequences)
    assert_same(ours(sequences), expected, rtol=tolerance, atol=tolerance)


# ---- autocast ----


@pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", MODULES)
def test_autocast_computes_in_the_dtype_of_the_weights(name, weights, given):
    module = getattr(nn, name)(4, 8, dtype=weights)
    x, h = shapes(name, dtype=given)
    expected = module(x.to(weights), each(h, lambda t: t.to(weights)))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device_type(), dtype=dtype):
            results = module(x, h)
            assert torch.is_autocast_enabled(device_type())
        for mine, other in zip(flat(results), flat(expected), strict=True):
            assert mine.dtype == weights
            assert_equal(mine, other)


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_serves_packed_input_and_mixed_states(name):
    module = getattr(nn, name)(4, 8, 2, dropout=1.0)
    sequences, h = packed(False), state(name, 2, 3, 8)
    expected = module(sequences, each(h, lambda t: t.bfloat16().float()))
    with torch.autocast(device_type()):
        results = module(sequences, each(h, lambda t: t.bfloat16()))
    for mine, other in zip(flat(results), flat(expected), strict=True):
        assert_equal(mine, other)


@pytest.mark.parametrize("name", MODULES)
def test_autocast_trains(name):
    module = getattr(nn, name)(4, 8)
    x, h = shapes(name)
    low = x.bfloat16().requires_grad_()
    with torch.autocast(device_type()):
        sum(t.sum() for t in flat(module(low, h))).backward()
    assert low.grad.dtype == torch.bfloat16
    assert all(weight.grad.dtype == torch.float32 for weight in module.parameters())


@pytest.mark.parametrize("name", MODULES)
def test_autocast_does_not_turn_other_numbers_into_floats(name):
    module = getattr(nn, name)(4, 8)
    x, h = shapes(name)
    with torch.autocast(device_type()):
        for wrong in (x.long(), x.cfloat()):
            with pytest.raises(ValueError, match=r"\(torch.float32\)"):
                module(wrong, h)
        with pytest.raises(ValueError, match=r"\(torch.float32\)"):
            module(x, each(h, lambda t: t.cfloat()))


def test_a_disabled_region_is_no_autocast():
    with (
        torch.autocast(device_type()),
        torch.autocast(device_type(), enabled=False),
        pytest.raises(ValueError, match="dtype"),
    ):
        nn.GRU(4, 8)(torch.randn(5, 3, 4).double())


# ---- 16 bits: stored narrow, computed in float32 ----


@pytest.mark.cpu("kernels for GPUs carry states in 16 bits")
@pytest.mark.parametrize("way", ["fast", "operator", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODULES)
def test_16_bits_are_the_float32_module_rounded_once(name, dtype, way, monkeypatch):
    torch._dynamo.reset()
    if way == "operator":
        monkeypatch.setattr(cpu, "IS_OPEN", False)
    narrow = getattr(nn, name)(4, 8, dtype=dtype)
    wide = copy.deepcopy(narrow).float()
    x, h = shapes(name, dtype=dtype)
    call = (
        torch.compile(narrow, fullgraph=True, backend="aot_eager") if way == "compiled" else narrow
    )
    leaf = x.clone().requires_grad_()
    results = flat(call(leaf, h))
    expected = flat(wide(x.float(), each(h, torch.Tensor.float)))
    for mine, other in zip(results, expected, strict=True):
        assert_equal(mine, other.to(dtype))
    with torch.no_grad():
        assert_equal(flat(call(x, h))[0], results[0])
    sum(t.square().sum() for t in results).backward()
    assert leaf.grad.dtype == dtype
    assert all(weight.grad.dtype == dtype for weight in narrow.parameters())


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_refused_as_by_torch_and_in_words(name, dtype, caplog):
    mine, theirs = (module.to(dtype) for module in pair(name, 4, 8))
    x = torch.randn(3, 4).to(dtype)
    with pytest.raises(NotImplementedError):
        theirs(x)
    words = f"nothing computes a layer in {dtype}, which is for storage; convert input and weights"
    with pytest.raises(NotImplementedError, match=words):
        mine(x)
    with pytest.raises(NotImplementedError, match=words):
        cuda.explain(mine, x)
    assert not caplog.records  # that the reference runs, for example
