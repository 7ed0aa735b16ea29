"""The drop-in contract: what forward accepts, returns and refuses, held against torch itself.

Dtypes and autocast are in test_contract_dtypes.py.
"""

import contextlib
import re

import pytest
import torch
from packaging.version import Version
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from ostinato import nn, route
from support.cells import (
    CELL_MODULES,
    LAYERS,
    MODULES,
    SIX,
    TORCH_CELL_MODULES,
    TORCH_LAYERS,
    has_c,
    record_of,
)
from support.devices import assert_equal
from support.pairs import (
    TOLERANCE,
    TORCH_WARNS,
    assert_same,
    by_cpu,
    each,
    flat,
    packed,
    pair,
    shapes,
    state,
)

pytestmark = pytest.mark.filterwarnings(TORCH_WARNS)


@pytest.fixture
def finished(monkeypatch):
    """The calls of a layer that came to their end."""
    calls = []
    run = route.run

    def counted(call):
        result = run(call)
        calls.append(call)
        return result

    monkeypatch.setattr(route, "run", counted)
    return calls


# ---- errors that are torch's, class and text ----


def layer_errors(name):
    """Arguments that torch refuses in words of its own, by what is wrong with them."""
    x, h = shapes(name)
    flip = packed(False)
    return {
        "0D": (x[0, 0, 0],),
        "1D": (x[0, 0],),
        "4D": (x[None],),
        "1D, wrong state as well": (x[0, 0], each(h, lambda t: t[0, 0])),
        "batched, state 2D": (x, each(h, lambda t: t[0])),
        "batched, state 4D": (x, each(h, lambda t: t[None])),
        "unbatched, state 3D": (x[:, 0], h),
        "unbatched, state 1D": (x[:, 0], each(h, lambda t: t[0, 0])),
        "state 2D before dtype": (x.double(), each(h, lambda t: t[0])),
        "dtype": (x.double(), h),
        "dtype without state": (x.double(),),
        "integers": (x.long(), h),
        "half": (x.half(),),
        "dtype before size": (x[..., :3].double(), h),
        "unbatched dtype": (x[:, 0].double(),),
        "input size": (x[..., :3], h),
        "input size without state": (x[..., :3],),
        "unbatched input size": (x[:, 0, :3],),
        "input size before state size": (x[..., :3], each(h, lambda t: t[..., :7])),
        "state features": (x, each(h, lambda t: t[..., :7])),
        "state batch": (x, each(h, lambda t: t[:, :2])),
        "state layers": (x, each(h, lambda t: t.repeat(2, 1, 1))),
        "unbatched state features": (x[:, 0], each(h, lambda t: t[:, 0, :7])),
        "packed dtype": (flip.to(torch.float64), h),
        "packed integers": (flip.to(torch.int64),),
        "packed 3D": (flip._replace(data=flip.data[None]), h),
        "packed input size": (flip._replace(data=flip.data[:, :3]), h),
        "packed state features": (flip, each(h, lambda t: t[..., :7])),
        "packed state layers": (flip, each(h, lambda t: t.repeat(2, 1, 1))),
    }


# Where torch's LSTM lets packed input pass, or says what happened to go wrong further down.
PACKED_LSTM = (
    "packed 3D",
    "packed input size",
    "packed dtype",
    "packed integers",
    "packed state features",
    "packed state layers",
)


# Our words are the newest torch's. Here is what older ones said, and since when torch says it so.
OLD_DTYPE = re.compile(r"input must have the type (\S+), got type (\S+)")
NEW_DTYPE = (
    r"RNN input dtype (\2) does not match weight dtype (\1). "
    r"Convert input: input.to(\1), or convert model: model.to(\2)"
)
CELL_WORDS = {"batched, state 1D": Version("2.15"), "unbatched, state 2D": Version("2.15")}


def newest_words(text):
    """What the newest torch says for what this one says of dtypes."""
    return OLD_DTYPE.sub(NEW_DTYPE, text)


@pytest.mark.parametrize("case", layer_errors("GRU"))
@pytest.mark.parametrize("name", TORCH_LAYERS)
def test_layers_refuse_in_torchs_words(name, case, finished):
    ours, theirs = pair(name, 4, 8)
    arguments = layer_errors(name)[case]
    with pytest.raises((ValueError, RuntimeError)) as mine:
        ours(*arguments)
    assert finished == []
    if name == "LSTM" and case in PACKED_LSTM:
        # Better: the checks of padded input, with the words that GRU has for packed input.
        theirs = torch.nn.GRU(4, 8)
        arguments = layer_errors("GRU")[case]
    with pytest.raises((ValueError, RuntimeError)) as other:
        theirs(*arguments)
    assert type(mine.value) is type(other.value)
    text = newest_words(str(other.value))
    if name == "LSTM" and case.startswith("packed state"):
        text = text.replace("hidden size", "hidden[0] size")
    assert str(mine.value) == text


@pytest.mark.parametrize("case", ["batched", "batched, 2D", "unbatched", "size", "batch"])
def test_lstm_checks_its_second_state_as_well(case):
    ours, theirs = pair("LSTM", 4, 8, 2, proj_size=3)
    x, h, c = torch.randn(5, 3, 4), torch.randn(2, 3, 3), torch.randn(2, 3, 8)
    arguments = {
        "batched": (x, (h, c[None])),
        "batched, 2D": (x, (h, c[0])),
        "unbatched": (x[:, 0], (h[:, 0], c)),
        "size": (x, (h, torch.randn(2, 3, 3))),
        "batch": (x, (h, c[:, :2])),
    }[case]
    with pytest.raises(RuntimeError) as mine:
        ours(*arguments)
    with pytest.raises(RuntimeError) as other:
        theirs(*arguments)
    assert str(mine.value) == str(other.value)


def cell_errors(name):
    x, h = shapes(name)
    return {
        "0D": (x[0, 0],),
        "3D": (x[None],),
        "3D, wrong state as well": (x[None], each(h, lambda t: t[None])),
        "state 0D": (x, each(h, lambda t: t[0, 0])),
        "state 3D": (x, each(h, lambda t: t[None])),
        "input size": (x[:, :3], h),
        "input size without state": (x[:, :3],),
        "unbatched input size": (x[0, :3], each(h, lambda t: t[0])),
        "input size before state": (x[:, :3], each(h, lambda t: t[:2])),
        "state batch": (x, each(h, lambda t: t[:2])),
        "state features": (x, each(h, lambda t: t[:, :7])),
        "batched, state 1D": (x, each(h, lambda t: t[0])),
        "unbatched, state 2D": (x[0], h),
        "unbatched state features": (x[0], each(h, lambda t: t[0, :7])),
    }


@pytest.mark.parametrize("case", cell_errors("GRUCell"))
@pytest.mark.parametrize("name", TORCH_CELL_MODULES)
def test_cells_refuse_in_torchs_words(name, case, finished):
    ours, theirs = pair(name, 4, 8)
    arguments = cell_errors(name)[case]
    with pytest.raises((ValueError, RuntimeError)) as mine:
        ours(*arguments)
    with pytest.raises((ValueError, RuntimeError)) as other:
        theirs(*arguments)
    assert type(mine.value) is type(other.value)
    if Version(torch.__version__) >= CELL_WORDS.get(case, Version("2.0")):
        assert str(mine.value) == str(other.value)
    else:
        assert re.fullmatch(r"Expected 2D hidden0 .*, but got [13]D tensor", str(mine.value))
    assert finished == []


def test_a_cell_refuses_a_square_state_that_would_broadcast():
    # (H, H) for an unbatched input looked like a batch of one with H features to older versions.
    with pytest.raises(RuntimeError, match=r"Expected 2D hidden0 .*, but got 3D"):
        nn.RNNCell(4, 8)(torch.randn(4), torch.randn(8, 8))


# ---- errors that are better than torch's ----


@pytest.mark.parametrize("wrong", [None, [[1.0]], 3, 2.5, "x", (torch.randn(5, 3, 4),)])
@pytest.mark.parametrize("name", MODULES)
def test_an_input_of_another_type_is_a_type_error(name, wrong, finished):
    with pytest.raises(TypeError, match=rf"{name}: input must be a Tensor.*{type(wrong).__name__}"):
        getattr(nn, name)(4, 8)(wrong)
    assert finished == []


@pytest.mark.parametrize("name", MODULES)
def test_a_state_of_another_type_is_a_type_error(name, finished):
    module = getattr(nn, name)(4, 8)
    x, h = shapes(name)
    lstm = has_c(name)
    wrong = [3, 2.5, "hx", {"h": h}]
    wrong += [(None, None), (h[0], 3), [None, h[1]], h[0]] if lstm else [[h], (h, h), (h,)]
    for hx in wrong:
        with pytest.raises(TypeError, match=rf"{name}: hx.* must be "):
            module(x, hx)
    assert finished == []


@pytest.mark.parametrize("name", LAYERS)
def test_a_state_of_another_type_is_a_type_error_for_packed_input(name):
    with pytest.raises(TypeError, match=rf"{name}: hx.* must be "):
        getattr(nn, name)(4, 8)(packed(False), 3)


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_lstm_takes_two_states_neither_fewer_nor_more(name):
    module = getattr(nn, name)(4, 8)
    x, (h, c) = shapes(name)
    for hx in ((), (h,), (h, c, c)):
        with pytest.raises(RuntimeError, match=f"{name}: .* got {len(hx)}"):
            module(x, hx)


@pytest.mark.parametrize("name", MODULES)
def test_a_state_of_another_dtype_is_a_value_error_naming_both(name, finished):
    module = getattr(nn, name)(4, 8)
    x, h = shapes(name)
    hx = each(h, lambda t: t.double())
    with pytest.raises(ValueError, match=r"hx.* \(torch.float64\) .* \(torch.float32\)"):
        module(x, hx)
    if has_c(name):
        with pytest.raises(ValueError, match=r"hx\[1\] .*\(torch.float64\)"):
            module(x, (h[0], hx[1]))
    assert finished == []


@pytest.mark.parametrize("name", CELL_MODULES)
def test_an_input_of_another_dtype_is_a_value_error_naming_both_in_cells_too(name, finished):
    x, h = shapes(name)
    for wrong in (x.double(), x.long(), x.half(), x.cfloat()):
        with pytest.raises(ValueError, match=rf"\({wrong.dtype}\) .* \(torch.float32\)"):
            getattr(nn, name)(4, 8)(wrong, h)
    assert finished == []


@pytest.mark.parametrize("name", MODULES)
def test_another_device_is_refused(name, finished):
    module = getattr(nn, name)(4, 8)
    x, h = shapes(name)
    with pytest.raises(RuntimeError, match="meta"):
        module(x.to("meta"))
    with pytest.raises(RuntimeError, match="meta"):
        module(x, each(h, lambda t: t.to("meta")))
    assert finished == []


@pytest.mark.parametrize("name", LAYERS)
def test_packed_states_are_checked_before_they_are_permuted(name):
    # torch takes three rows out of five by the permutation, and computes with them.
    with pytest.raises(RuntimeError, match=r"size \(1, 3, 8\), got \[1, 5, 8\]"):
        getattr(nn, name)(4, 8)(packed(False), state(name, 1, 5, 8))


@pytest.mark.parametrize("name", LAYERS)
def test_batch_sizes_that_do_not_fit_the_rows_are_refused(name):
    module = getattr(nn, name)(4, 8)
    data = torch.randn(5, 4)
    for sizes in ([2, 2], [2, 2, 2], [1, 2, 2], [6, -1], [3, 1, 0, 1]):
        with pytest.raises((ValueError, RuntimeError)):
            module(PackedSequence(data, torch.tensor(sizes, device="cpu")))
    with pytest.raises((ValueError, RuntimeError)):
        module(PackedSequence(data, torch.tensor([3.0, 2.0], device="cpu")))


# ---- weights that were made wrong after construction ----


def wrong_weights(weight):
    yield "longer", torch.randn(*[size + 1 for size in weight.shape])
    yield "flat", weight.detach().reshape(-1)[:-1].clone()
    yield "0D", torch.tensor(1.0)
    yield "dtype", weight.detach().double()
    yield "device", weight.detach().to("meta")


@pytest.mark.parametrize("name", MODULES)
def test_a_wrong_weight_is_named_before_any_layer_runs(name, finished):
    if name in CELL_MODULES:
        args, kwargs = (4, 8), {}
        x, h = shapes(name)
    else:
        args, kwargs = (4, 8, 2), {"bidirectional": True}
        kwargs |= {"proj_size": 3} if record_of(name).projects else {}
        x, h = torch.randn(5, 3, 4), None
    for key, right in getattr(nn, name)(*args, **kwargs).named_parameters():
        for case, wrong in wrong_weights(right):
            module = getattr(nn, name)(*args, **kwargs)
            setattr(module, key, torch.nn.Parameter(wrong))
            said = f"{name}: {key} must"
            if key in ("weight_ih", "weight_ih_l0") and case in ("dtype", "device"):
                # What the first weight says of dtype and device is what input has to fit.
                said = "weight dtype" if case == "dtype" else "parameter tensor at meta"
            error = ValueError if case == "dtype" else RuntimeError
            for hx in (None, h):
                with pytest.raises(error, match=said):
                    module(x, hx)
            assert finished == [], (key, case)


@pytest.mark.parametrize("name", MODULES)
def test_weights_that_fit_each_other_but_not_the_module_are_refused(name, finished):
    module = getattr(nn, name)(4, 8)
    for key, weight in getattr(nn, name)(4, 6).named_parameters():
        setattr(module, key, weight)
    with pytest.raises(RuntimeError, match=r"weight_ih.* must have shape \(\d+, 4\)"):
        module(shapes(name)[0])
    assert finished == []


@pytest.mark.parametrize("name", MODULES)
def test_a_weight_that_is_gone_is_named(name):
    module = getattr(nn, name)(4, 8)
    key = next(n for n, _ in module.named_parameters() if "weight_hh" in n)
    setattr(module, key, None)
    with pytest.raises(TypeError, match=f"{key} must be a Tensor, got NoneType"):
        module(shapes(name)[0])
    delattr(module, key)
    with pytest.raises(AttributeError, match=key):
        module(shapes(name)[0])


@pytest.mark.parametrize("name", TORCH_CELL_MODULES)
@pytest.mark.parametrize("key", ["bias_ih", "bias_hh"])
def test_a_cell_does_with_a_bias_on_one_side(name, key):
    ours, theirs = pair(name, 4, 8)
    setattr(ours, key, None)
    setattr(theirs, key, None)
    x, h = shapes(name)
    assert_same(ours(x, h), by_cpu(theirs, x, h))


# ---- what is accepted ----


@pytest.mark.parametrize("name", SIX)
def test_expanded_transposed_and_strided_arguments(name):
    ours, theirs = pair(name, 4, 8)
    x, h = shapes(name)
    wide = torch.randn(*x.shape[:-1], 8)[..., ::2]
    turned = x.transpose(0, -1).contiguous().transpose(0, -1)
    assert not wide.is_contiguous()
    assert not turned.is_contiguous()
    expanded = each(h, lambda t: t[..., :1, :].expand_as(t))
    strided = each(h, lambda t: torch.stack([t, t], -1)[..., 0])
    for input in (x, wide, turned, x[..., :1, :].expand_as(x)):
        for hx in (h, expanded, strided):
            # cuDNN takes no states with gaps.
            dense = each(hx, torch.Tensor.contiguous)
            assert_same(ours(input, hx), theirs(input, dense))


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_lstm_takes_its_states_in_a_list(name):
    ours, theirs = pair(name, 4, 8)
    x, h = shapes(name)
    assert_same(ours(x, list(h)), theirs(x, h))
    unbatched = (x[:, 0], [t[:, 0] for t in h]) if name == "LSTM" else (x[0], [t[0] for t in h])
    assert_same(ours(*unbatched), theirs(*unbatched))
    # torch indexes hx, and so takes a stack for unbatched input.
    stacked = (unbatched[0], torch.stack(unbatched[1]))
    assert_same(ours(*stacked), theirs(*stacked))


def test_states_are_never_batch_first():
    for name in TORCH_LAYERS:
        ours, theirs = pair(name, 4, 8, 2, batch_first=True)
        x, h = torch.randn(3, 5, 4), state(name, 2, 3, 8)
        assert_same(ours(x, h), theirs(x, h))
        assert flat(ours(x, h))[1].shape == (2, 3, 8)
        with pytest.raises(RuntimeError, match=r"\(2, 3, 8\), got \[3, 2, 8\]"):
            ours(x, each(h, lambda t: t.transpose(0, 1)))


def test_final_states_stand_per_layer_then_direction():
    gru = nn.GRU(4, 8, 2, bidirectional=True)
    x = torch.randn(5, 3, 4)
    output, h_n = gru(x)
    first = nn.GRU(4, 8, bidirectional=True)
    first.load_state_dict({k: v for k, v in gru.state_dict().items() if "_l0" in k})
    assert_equal(first(x)[1], h_n[:2])
    assert_equal(output[-1, :, :8], h_n[2])
    assert_equal(output[0, :, 8:], h_n[3])


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("name", TORCH_LAYERS)
def test_packed_sequences_come_back_packed_and_in_the_callers_order(name, enforce_sorted):
    ours, theirs = pair(name, 4, 8, 2, bidirectional=True)
    sequences, h = packed(enforce_sorted), state(name, 4, 3, 8)
    for hx in (None, h):
        mine, other = ours(sequences, hx), theirs(sequences, hx)
        assert_same(mine, other)
        assert type(mine[0]) is PackedSequence
        assert mine[0].batch_sizes is sequences.batch_sizes
        for attribute in ("sorted_indices", "unsorted_indices"):
            assert getattr(mine[0], attribute) is getattr(sequences, attribute)


@pytest.mark.parametrize("name", LAYERS)
def test_packing_by_lengths_equals_each_sequence_alone(name):
    module = getattr(nn, name)(4, 8, bidirectional=True)
    x, lengths = torch.randn(6, 4, 4), torch.tensor([3, 6, 1, 4], device="cpu")
    h = state(name, 2, 4, 8)
    output, *ends = module(pack_padded_sequence(x, lengths, enforce_sorted=False), h)
    padded, _ = torch.nn.utils.rnn.pad_packed_sequence(output)
    for row, length in enumerate(lengths.tolist()):
        alone, *end = module(x[:length, row], each(h, lambda t, row=row: t[:, row]))
        torch.testing.assert_close(padded[:length, row], alone, **TOLERANCE)
        assert (padded[length:, row] == 0).all()
        for one, other in zip(flat(ends), flat(end), strict=True):
            torch.testing.assert_close(one[:, row], other, **TOLERANCE)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_no_steps_give_an_empty_output_and_the_initial_state(name, layers):
    module = getattr(nn, name)(4, 8, layers, bidirectional=True)
    h = state(name, 2 * layers, 3, 8)
    output, *ends = module(torch.randn(0, 3, 4), h)
    assert output.shape == (0, 3, 16)
    for end, start in zip(flat(ends), flat([h]), strict=True):
        assert_equal(end, start)
    output, *ends = module(torch.randn(0, 3, 4))
    assert output.shape == (0, 3, 16)
    for end in flat(ends):
        assert_equal(end, torch.zeros(2 * layers, 3, 8))
    output, *ends = module(torch.randn(0, 4), each(h, lambda t: t[:, 0]))
    assert output.shape == (0, 16)
    assert_equal(flat(ends)[0], flat([h])[0][:, 0])
    module.batch_first = True
    assert module(torch.randn(3, 0, 4), h)[0].shape == (3, 0, 16)
    nothing = PackedSequence(torch.randn(0, 4), torch.tensor([], dtype=torch.int64, device="cpu"))
    output, *ends = module(nothing, h)
    assert output.data.shape == (0, 16)
    for end, start in zip(flat(ends), flat([h]), strict=True):
        assert_equal(end, start)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_pass_through_no_steps(name):
    module = getattr(nn, name)(4, 8)
    h = each(state(name, 1, 3, 8), lambda t: t.requires_grad_())
    sum(t.sum() for t in flat(module(torch.randn(0, 3, 4), h))).backward()
    for start in flat([h]):
        assert_equal(start.grad, torch.ones(1, 3, 8))


@pytest.mark.parametrize("name", SIX)
def test_an_empty_batch_works(name):
    ours, theirs = pair(name, 4, 8)
    x, h = shapes(name, batch=0)
    for hx in (None, h):
        assert_same(ours(x, hx), theirs(x, hx))
    assert flat(ours(x))[0].shape[-2:] == (0, 8)


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_go_where_they_go_in_torch(name, value):
    for where in ("input", "state", "weight_ih", "weight_hh", "bias_ih"):
        ours, theirs = pair(name, 4, 8)
        x, h = shapes(name)
        if where == "input":
            x[..., 1, 2] = value
        elif where == "state":
            each(h, lambda t: t[..., 1, 3].fill_(value))
        else:
            for module in (ours, theirs):
                key = where if name in CELL_MODULES else f"{where}_l0"
                with torch.no_grad():
                    getattr(module, key)[9 % len(getattr(module, key))] = value
        assert_same(ours(x, h), theirs(x, h), **TOLERANCE, equal_nan=True)


# ---- results are the caller's own ----


@pytest.mark.parametrize("name", MODULES)
def test_results_can_be_written_without_touching_anything_else(name):
    module = getattr(nn, name)(4, 8)
    x, h = shapes(name)
    before = [t.clone() for t in flat([x, h])]
    for context in (contextlib.nullcontext(), torch.no_grad()):
        with context:
            results = flat(module(x, h))
            kept = [t.detach().clone() for t in results]
            for at, result in enumerate(results):
                result.mul_(0)
                for other, was in zip(results[at + 1 :], kept[at + 1 :], strict=True):
                    assert_equal(other, was)
    for tensor, was in zip(flat([x, h]), before, strict=True):
        assert_equal(tensor, was)


# ---- what a slip of the caller's meets ----


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("named", [{"length": 3}, {"hx": None}], ids=["unknown", "no input"])
def test_a_call_that_does_not_fit_names_the_public_class(name, named):
    mine, theirs = pair(name, 4, 8)
    messages = []
    for module in (theirs, mine):
        given = () if "hx" in named else (torch.randn(2, 4),)
        with pytest.raises(TypeError, match=rf"^{name}\.forward\(\)") as caught:
            module(*given, **named)
        # Python 3.13 goes on: did you mean lengths?
        messages.append(str(caught.value).partition(". Did")[0])
    assert messages[0] == messages[1]


@pytest.mark.parametrize("name", TORCH_LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_in_words_that_lead_on(name, batch_first):
    mine, theirs = pair(name, 4, 8, batch_first=batch_first)
    rows = [torch.randn(n, 4) for n in (5, 2, 3)]
    for layout in (torch.strided, torch.jagged):
        x = torch.nested.nested_tensor(rows, layout=layout)
        with pytest.raises((RuntimeError, ValueError)):
            theirs(x)
        for call in (mine, lambda x: mine(x, return_all_states=True)):
            with pytest.raises(RuntimeError, match=f"^{name}: input must not be a nested") as error:
                call(x)
            assert "lengths=" in str(error.value)
            assert "PackedSequence" in str(error.value)
        arguments = mine.mode.lower(), x, None, None, None, list(mine.parameters())
        with pytest.raises(RuntimeError, match=r"^input: must not be a nested tensor"):
            route.layer(*arguments, has_biases=True, bidirectional=False)
    # What the message says works.
    padded = torch.nested.to_padded_tensor(x, 0.0)
    lengths = [len(row) for row in x.unbind()]
    output, _ = mine(padded if batch_first else padded.transpose(0, 1), lengths=lengths)
    packed, _ = mine(torch.nn.utils.rnn.pack_sequence(x.unbind(), enforce_sorted=False))
    again, _ = torch.nn.utils.rnn.pad_packed_sequence(packed, batch_first)
    assert_equal(output, again)


@pytest.mark.parametrize("name", CELL_MODULES)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_by_cells(name):
    x = torch.nested.nested_tensor([torch.randn(4), torch.randn(4)])
    with pytest.raises(RuntimeError, match=f"^{name}: input must not be a nested tensor"):
        getattr(nn, name)(4, 8)(x)
