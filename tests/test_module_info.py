"""torch's own test entries for the six modules (ModuleInfo), with our classes in their place.

torch's wheel carries the entries, which say what to construct, what to feed and what must fail, but
not the tests that run them. Those below follow their names: forward, factory arguments, gradients,
non-contiguous input, training flag, saving, copying, printing, memory format, errors.
"""

import contextlib
import copy
import io
import pickle

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

from ostinato import nn
from support.cells import SIX
from support.devices import assert_equal, device_type, without_cudnn
from support.pairs import TORCH_WARNS, flat

pytestmark = pytest.mark.filterwarnings(TORCH_WARNS)

ENTRIES = {
    info.module_cls.__name__: info
    for info in module_db
    if info.module_cls in [getattr(torch.nn, name) for name in SIX]
}
CASES = [
    pytest.param(name, dtype, training, id=f"{name}-{str(dtype)[6:]}-{training}")
    for name, info in ENTRIES.items()
    for dtype in info.dtypes
    for training in ((True, False) if info.train_and_eval_differ else (True,))
]
EVERY = pytest.mark.parametrize(("name", "dtype", "training"), CASES)
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
}
# The entries' numbers reach 9: behind saturated gates, gradients are small differences.
GRADIENT_TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float64: {"rtol": 1e-11, "atol": 1e-13},
}


def samples(name, dtype, training, requires_grad=False):
    """The entry's samples: (constructor arguments, forward arguments, reference function)."""
    device = device_type()
    info = ENTRIES[name]
    torch.manual_seed(0)
    # What torch packs has its lengths on the default device, which must be the CPU.
    with torch.device("cpu"):
        found = info.module_inputs_func(
            info,
            device=device,
            dtype=dtype,
            requires_grad=requires_grad,
            training=training,
            with_packed_sequence=name in ("RNN", "GRU"),
        )
    assert found
    for sample in found:
        make, call = sample.constructor_input, sample.forward_input
        yield (make.args, make.kwargs), (call.args, call.kwargs), sample.reference_fn


def build(library, name, make, dtype, training=True):
    """A module of one library, after the same seed for both."""
    torch.manual_seed(1)
    module = getattr(library, name)(*make[0], **make[1], device=device_type(), dtype=dtype)
    return module.train(training)


def leaves(arguments):
    """The tensors among the arguments of a call."""
    found = []
    for argument in arguments:
        if argument is not None:
            found += flat(argument)
    return found


def test_the_entries_are_all_there():
    assert set(ENTRIES) == set(SIX)
    assert all(info.module_error_inputs_func is not None for info in ENTRIES.values())


@EVERY
def test_forward_equals_torch_and_the_entrys_reference(name, dtype, training):
    for make, (args, kwargs), reference in samples(name, dtype, training):
        ours = build(nn, name, make, dtype, training)
        theirs = build(torch.nn, name, make, dtype, training)
        assert ours.training == training
        result = ours(*args, **kwargs)
        expected = theirs(*args, **kwargs)
        torch.testing.assert_close(flat(result), flat(expected), **TOLERANCE[dtype])
        # The references add a batch dimension, which packed input has.
        if reference is not None and not isinstance(args[0], PackedSequence):
            expected = reference(ours, *args, **kwargs)
            torch.testing.assert_close(flat(result), flat(expected), **TOLERANCE[dtype])


@EVERY
def test_factory_arguments_reach_the_parameters(name, dtype, training):
    for make, (args, kwargs), _ in samples(name, dtype, training):
        module = build(nn, name, make, dtype, training)
        for weight in module.parameters():
            assert weight.dtype == dtype
            assert weight.device.type == device_type()
        assert all(t.dtype == dtype for t in flat(module(*args, **kwargs)))
        meta = getattr(nn, name)(*make[0], **make[1], device="meta", dtype=dtype)
        assert all(weight.is_meta for weight in meta.parameters())
        filled = meta.to_empty(device=device_type())
        filled.load_state_dict(module.state_dict())
        for one, other in zip(
            flat(filled(*args, **kwargs)), flat(module(*args, **kwargs)), strict=True
        ):
            assert_equal(one, other)


@EVERY
def test_gradients_equal_torchs(name, dtype, training):
    for make, (args, kwargs), _ in samples(name, dtype, training, requires_grad=True):
        gradients = []
        for library in (nn, torch.nn):
            module = build(library, name, make, dtype, training)
            with without_cudnn() if library is torch.nn else contextlib.nullcontext():
                results = flat(module(*args, **kwargs))
            torch.manual_seed(2)
            loss = sum((t * torch.randn_like(t)).sum() for t in results)
            wanted = leaves(args) + list(module.parameters())
            assert all(t.requires_grad for t in wanted)
            gradients.append(torch.autograd.grad(loss, wanted))
        torch.testing.assert_close(*gradients, **GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("name", SIX)
def test_gradcheck_and_gradgradcheck(name):
    info = ENTRIES[name]
    found = list(samples(name, torch.float64, True, requires_grad=True))
    # A layer has dozens of samples that take turns by two and four; a third meets every kind.
    for make, (args, _), _ in found[:: 1 if len(found) < 4 else 3]:
        module = build(nn, name, make, torch.float64)
        names = [key for key, _ in module.named_parameters()]
        inputs = leaves(args)

        def call(*tensors, module=module, names=names, args=args):
            given = dict(zip(names, tensors[-len(names) :], strict=True))
            tensors = tensors[: -len(names)]
            input, hx = tensors[0], tensors[1:] if len(tensors) == 3 else tensors[1:2]
            if isinstance(args[0], PackedSequence):
                input = args[0]._replace(data=input)
            hx = hx if len(hx) == 2 else hx[0] if hx else None
            return tuple(flat(torch.func.functional_call(module, given, (input, hx))))

        every = (*inputs, *module.parameters())
        assert torch.autograd.gradcheck(
            call, every, nondet_tol=info.gradcheck_nondet_tol, fast_mode=True
        )
        assert info.supports_gradgrad
        assert torch.autograd.gradgradcheck(
            call, every, nondet_tol=info.gradcheck_nondet_tol, fast_mode=True
        )


def scattered(argument):
    """The same numbers, in every other place of memory."""
    if argument is None:
        return None
    if isinstance(argument, PackedSequence):
        return argument._replace(data=scattered(argument.data))
    if isinstance(argument, tuple):
        return tuple(scattered(part) for part in argument)
    wide = torch.stack([argument.detach(), torch.full_like(argument, torch.nan)], -1)[..., 0]
    assert not wide.is_contiguous()
    return wide.requires_grad_(argument.requires_grad)


@EVERY
def test_non_contiguous_input_gives_the_same_bits_and_gradients(name, dtype, training):
    for make, (args, kwargs), _ in samples(name, dtype, training, requires_grad=True):
        module = build(nn, name, make, dtype, training)
        apart = [scattered(argument) for argument in args]
        outcomes = []
        for arguments in (args, apart):
            results = flat(module(*arguments, **kwargs))
            loss = sum(t.square().sum() for t in results)
            wanted = leaves(arguments) + list(module.parameters())
            outcomes.append((*results, *torch.autograd.grad(loss, wanted)))
        for one, other in zip(*outcomes, strict=True):
            assert_equal(one, other)


@EVERY
def test_training_flag(name, dtype, training):
    for make, (args, kwargs), _ in samples(name, dtype, training):
        module = build(nn, name, make, dtype, training)
        before = module(*args, **kwargs)
        module.train(not training)
        assert module.training is not training
        # No sample has dropout, so even where the modes may differ they do not here.
        for one, other in zip(flat(before), flat(module(*args, **kwargs)), strict=True):
            assert_equal(one, other)


@pytest.mark.cpu("cuDNN draws dropout's numbers itself")
@pytest.mark.parametrize("name", [n for n in SIX if ENTRIES[n].train_and_eval_differ])
def test_dropout_acts_in_training_only(name):
    for make, (args, kwargs), _ in samples(name, torch.float64, True):
        ours, theirs = (build(lib, name, make, torch.float64) for lib in (nn, torch.nn))
        plain = flat(ours.eval()(*args, **kwargs))
        for module in (ours, theirs):
            # All or nothing, so that no random numbers are compared.
            module.dropout = 1.0
        for one, other in zip(plain, flat(ours(*args, **kwargs)), strict=True):
            assert_equal(one, other)
        dropped = flat(ours.train()(*args, **kwargs))
        torch.testing.assert_close(
            dropped, flat(theirs.train()(*args, **kwargs)), **TOLERANCE[torch.float64]
        )
        if getattr(ours, "nonlinearity", "tanh") == "tanh":
            assert not torch.equal(plain[0], dropped[0])


@EVERY
def test_saved_and_copied_modules_give_the_same_bits(name, dtype, training):
    for make, (args, kwargs), _ in samples(name, dtype, training):
        module = build(nn, name, make, dtype, training)
        saved = io.BytesIO()
        torch.save(module, saved)
        saved.seek(0)
        for twin in (
            copy.deepcopy(module),
            copy.copy(module),
            pickle.loads(pickle.dumps(module)),
            torch.load(saved, weights_only=False),
        ):
            assert twin.training == training
            for one, other in zip(
                flat(twin(*args, **kwargs)), flat(module(*args, **kwargs)), strict=True
            ):
                assert_equal(one, other)


@EVERY
def test_printed_like_torchs(name, dtype, training):
    for make, _, _ in samples(name, dtype, training):
        ours = build(nn, name, make, dtype, training)
        theirs = build(torch.nn, name, make, dtype, training)
        assert repr(ours) == repr(theirs)
        assert str(ours) == str(theirs)


@EVERY
def test_memory_format_of_the_module_does_not_affect_output(name, dtype, training):
    assert not ENTRIES[name].module_memformat_affects_out
    for make, (args, kwargs), _ in samples(name, dtype, training):
        module = build(nn, name, make, dtype, training)
        before = flat(module(*args, **kwargs))
        module.to(memory_format=torch.channels_last)
        for one, other in zip(before, flat(module(*args, **kwargs)), strict=True):
            assert_equal(one, other)
            assert one.stride() == other.stride()


def errors(name, dtype, training):
    """The entry's samples of what must fail."""
    info = ENTRIES[name]
    return info.module_error_inputs_func(
        info, device=device_type(), dtype=dtype, requires_grad=False, training=training
    )


def raise_errors(found, name, training, **options):
    """Let each sample fail with the type and the words that torch's table asserts."""
    for sample in found:
        make = sample.module_error_input.constructor_input
        arguments = {**options, **make.kwargs}
        if sample.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(sample.error_type, match=sample.error_regex):
                getattr(nn, name)(*make.args, **arguments)
            continue
        call = sample.module_error_input.forward_input
        module = getattr(nn, name)(*make.args, **arguments).train(training)
        with pytest.raises(sample.error_type, match=sample.error_regex):
            module(*call.args, **call.kwargs)


@EVERY
def test_errors(name, dtype, training):
    """As torch runs them: a module that is given no dtype meets input of the entry's."""
    found = errors(name, dtype, training)
    assert found
    raise_errors(found, name, training)


@EVERY
def test_errors_where_dtypes_agree(name, dtype, training):
    raise_errors(errors(name, dtype, training), name, training, dtype=dtype)


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="counted in torch 2.13")
def test_the_errors_are_all_there():
    """So many does torch 2.13 have for its six modules; `test_errors` meets each."""
    counts = [
        len(errors(name, dtype, True)) for name, info in ENTRIES.items() for dtype in info.dtypes
    ]
    assert sum(counts) == 116
