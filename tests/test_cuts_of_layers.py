"""`lengths=`, `resets=`, `reset_to=` and `return_all_states=` of the layers.

The operator below them is held to the reference in tests/test_cuts_of_operators.py.
Legend: T steps, B batch, L layers, D directions, H hidden.
"""

import copy

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ostinato import nn
from support.cells import LAYERS, TORCH_LAYERS, has_c
from support.devices import assert_equal, device_type, moved, pack
from support.pairs import each, flat, pair, state

LENGTHS = (3, 7, 1, 5)

layers = pytest.mark.parametrize("name", LAYERS)
KINDS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"batch_first": True, "bidirectional": True},
    {"num_layers": 2, "bias": False},
]


def build(name, **options):
    return getattr(nn, name)(4, 6, **options)


def arguments(module, name, dtype=torch.float32):
    """An input of four rows and seven steps, and initial states."""
    x = torch.randn(*((4, 7) if module.batch_first else (7, 4)), 4, dtype=dtype)
    rows = module.num_layers * (2 if module.bidirectional else 1)
    return x, state(name, rows, 4, 6, dtype=dtype)


def packing(module, x, h, lengths=LENGTHS):
    """What torch's functions do in three calls."""
    options = {"batch_first": module.batch_first}
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False, **options)
    output, h_n = module(packed, h)
    return pad_packed_sequence(output, total_length=7, **options)[0], h_n


# ---- lengths ----


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("name", TORCH_LAYERS)
def test_lengths_are_packing_in_one_call(name, options):
    ours, theirs = pair(name, 4, 6, **options)
    x, h = arguments(ours, name)
    results = []
    for call in (
        lambda x, h: ours(x, h, lengths=torch.tensor(LENGTHS)),
        lambda x, h: packing(ours, x, h),
        lambda x, h: packing(theirs, x, h),
    ):
        leaves = [x.clone().requires_grad_(), *(t.clone().requires_grad_() for t in flat(h))]
        hx = leaves[1] if len(leaves) == 2 else tuple(leaves[1:])
        found = flat(call(leaves[0], hx))
        parameters = theirs if len(results) == 2 else ours
        grads = torch.autograd.grad(
            sum((t * (i + 1)).square().sum() for i, t in enumerate(found)),
            [*leaves, *parameters.parameters()],
        )
        results.append((found, grads))
    (mine, my_grads), (packed, packed_grads), (torchs, torch_grads) = results
    for one, other in zip(mine, packed, strict=True):
        assert_equal(one, other)
    torch.testing.assert_close(my_grads, packed_grads)
    torch.testing.assert_close(mine, torchs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(my_grads, torch_grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "given",
    [
        list(LENGTHS),
        LENGTHS,
        *(torch.tensor(LENGTHS, dtype=d) for d in (torch.int32, torch.uint8)),
        *(np.array(LENGTHS, dtype=d) for d in ("i8", "i4", "u1", "u8", ">i8")),
        np.array(LENGTHS[::-1])[::-1],
        [*map(np.int64, LENGTHS)],
        (np.int32(3), 7, np.uint8(1), 5),
        [*map(torch.tensor, LENGTHS)],
        [torch.tensor([n], dtype=torch.int32) for n in LENGTHS],
        [3, torch.tensor(7), np.int64(1), torch.tensor(5, dtype=torch.uint8)],
        range(3, 7),
    ],
    ids=repr,
)
def test_every_form_of_lengths(given):
    gru = build("GRU")
    x, h = arguments(gru, "GRU")
    numbers = torch.tensor([int(n) for n in given])
    expected = gru(x, h, lengths=numbers)
    if not (
        isinstance(given, np.ndarray) and (given.dtype.byteorder, given.strides) != ("=", (8,))
    ):
        # torch's own function is not stricter.
        packed = pack_padded_sequence(x, given, enforce_sorted=False)
        assert_equal(packed.batch_sizes, pack_padded_sequence(x, numbers, enforce_sorted=False)[1])
    for one, other in zip(flat(gru(x, h, lengths=given)), flat(expected), strict=True):
        assert_equal(one, other)


@layers
def test_a_row_of_no_steps_passes_its_states_on(name):
    module = build(name, bidirectional=True)
    x, h = arguments(module, name)
    output, h_n = module(x, h, lengths=[0, 7, 0, 2])
    assert not output[:, [0, 2]].any()
    for mine, given in zip(flat(h_n), flat(h), strict=True):
        assert_equal(mine[:, [0, 2]], given[:, [0, 2]])
        assert not torch.equal(mine[:, 1], given[:, 1])
    _, h_n = module(x, lengths=[0, 0, 0, 0])
    assert not any(t.any() for t in flat(h_n))


@layers
def test_the_reverse_direction_starts_at_the_true_end(name):
    module = build(name, bidirectional=True)
    x, _ = arguments(module, name)
    output, _ = module(x, lengths=LENGTHS)
    other = x.clone()
    for row, length in enumerate(LENGTHS):
        other[length:, row] = torch.nan
    again, _ = module(other, lengths=LENGTHS)
    assert_equal(output, again)
    for row, length in enumerate(LENGTHS):
        alone, _ = module(x[:length, row])
        assert_equal(alone, output[:length, row])


def test_one_sequence():
    gru = build("GRU")
    x = torch.randn(7, 4)
    expected, h_n = gru(x[:3])
    for length in (3, [3], torch.tensor(3), torch.tensor([3]), np.int32(3), np.array([3])):
        output, last = gru(x, lengths=length)
        assert_equal(output[:3], expected)
        assert not output[3:].any()
        assert_equal(last, h_n)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([8, 1, 1, 1], ValueError, "lengths must be numbers from 0 to 7, the steps, got 8"),
        ([1, 1, -1, 1], ValueError, "lengths must be numbers from 0 to 7, the steps, got -1"),
        (
            np.array([1, 1, 9, 1]),
            ValueError,
            "lengths must be numbers from 0 to 7, the steps, got 9",
        ),
        (np.ones(4), ValueError, "lengths must be whole numbers, got float64"),
        (np.ones(4, bool), ValueError, "lengths must be whole numbers, got bool"),
        (np.ones((4, 1), int), RuntimeError, r"lengths must have shape \(4,\), one per row"),
        ([torch.tensor(1.0)] * 4, ValueError, "lengths must be whole numbers, got torch.float32"),
        ([torch.ones(2).int()] * 4, TypeError, "lengths must be a Tensor or a list of ints"),
        ([np.float64(1)] * 4, TypeError, "a list of ints, got numpy.float64"),
        ([True] * 4, TypeError, "lengths must be a Tensor or a list of ints, got bool"),
        ([1, 1, 1], RuntimeError, r"lengths must have shape \(4,\), one per row, got \(3,\)"),
        (torch.ones(2, 2, dtype=torch.int64), RuntimeError, "lengths must have shape"),
        (torch.ones(4), ValueError, "lengths must be whole numbers, got torch.float32"),
        (torch.ones(4, dtype=torch.bool), ValueError, "lengths must be whole numbers"),
        ([1.0, 2.0, 3.0, 4.0], TypeError, "lengths must be a Tensor or a list of ints, got float"),
        ("abcd", TypeError, "lengths must be a Tensor or a list of ints, got str"),
        (3, TypeError, "lengths must be a Tensor or a list of ints, got int"),
    ],
)
def test_wrong_lengths(lengths, error, message):
    with pytest.raises(error, match=message):
        build("GRU")(torch.randn(7, 4, 4), lengths=lengths)


def test_every_message_about_lengths_names_the_layer():
    gru, x = build("GRU"), torch.randn(7, 4, 4)
    for lengths in ([8, 1, 1, 1], [1, 1], [1.0] * 4, torch.ones(4), "abcd", 3):
        with pytest.raises((TypeError, ValueError, RuntimeError), match=r"^GRU: lengths must "):
            gru(x, lengths=lengths)


def test_packed_rows_have_their_own_lengths():
    with pytest.raises(ValueError, match="lengths must be None where input is packed"):
        build("GRU")(pack([torch.randn(3, 4)]), lengths=[3])


# ---- resets ----


def by_hand(module, name, x, h, resets, anew):
    """A loop over steps that replaces the state where a row begins anew."""
    outputs = []
    for t in range(len(x)):
        cut = resets[t][None, :, None]
        mixed = [torch.where(cut, n, s) for n, s in zip(flat(anew), flat(h), strict=True)]
        h = tuple(mixed) if has_c(name) else mixed[0]
        output, h = module(x[t : t + 1], h)
        outputs.append(output)
    return torch.cat(outputs), h


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
@layers
def test_resets_are_a_loop_with_a_mask(name, num_layers, learned):
    module = build(name, num_layers=num_layers)
    x, h = arguments(module, name)
    resets = torch.rand(7, 4) < 0.4
    parameters = list(module.parameters())
    anew = each(state(name, num_layers, 6), lambda t: t.requires_grad_())
    found = []
    for way in ("ours", "hand"):
        leaf = x.clone().requires_grad_()
        full = each(anew, lambda t: t[:, None].expand(num_layers, 4, 6))
        zeros = each(full, torch.zeros_like)
        if way == "ours":
            results = module(leaf, h, resets=resets, reset_to=anew if learned else None)
        else:
            results = by_hand(module, name, leaf, h, resets, full if learned else zeros)
        loss = sum((t * (i + 1)).square().sum() for i, t in enumerate(flat(results)))
        leaves = [leaf, *parameters, *(flat(anew) if learned else [])]
        found.append((flat(results), torch.autograd.grad(loss, leaves)))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert_equal(one, other)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


@layers
def test_episodes_are_sequences_of_their_own_in_both_directions(name):
    module = build(name, bidirectional=True, batch_first=True)
    x = torch.randn(1, 7, 4)
    resets = torch.zeros(1, 7, dtype=torch.bool)
    resets[0, [0, 3, 6]] = True
    output, _ = module(x, resets=resets)
    pieces = [module(x[:, a:b])[0] for a, b in ((0, 3), (3, 6), (6, 7))]
    assert_equal(output, torch.cat(pieces, 1))
    assert_equal(module(x[0], resets=resets[0])[0], output[0])


@layers
def test_resets_of_packed_rows(name):
    module = build(name, num_layers=2)
    rows = [torch.randn(n, 4) for n in LENGTHS]
    flags = [torch.rand(n) < 0.4 for n in LENGTHS]
    anew = state(name, 2, 4, 6)
    packed = pack(rows, enforce_sorted=False)
    output, h_n = module(packed, resets=pack(flags, enforce_sorted=False), reset_to=anew)
    padded, lengths = pad_packed_sequence(output)
    for row, (x, cut) in enumerate(zip(rows, flags, strict=True)):
        alone, last = module(x, resets=cut, reset_to=each(anew, lambda t, r=row: t[:, r]))
        assert_equal(padded[: lengths[row], row], alone)
        for mine, other in zip(flat(h_n), flat(last), strict=True):
            assert_equal(mine[:, row], other)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "batch_first": True}], ids=str)
@layers
def test_one_step_and_resets_are_what_the_walk_makes_of_them(name, options, states, learned):
    """Such a call goes past the walk with resets; one that asks for all states takes it."""
    module = build(name, **options)
    x, h = arguments(module, name)
    x = (x[:, :1] if module.batch_first else x[:1]).clone().requires_grad_()
    resets = torch.tensor([True, False, False, True]).reshape(x.shape[:2])
    anew = each(state(name, module.num_layers, 6), lambda t: t.requires_grad_())
    h = each(h, lambda t: t.requires_grad_())
    given = {"resets": resets, "reset_to": anew if learned else None}
    found = []
    for all_states in (False, True):
        output, h_n, *_ = module(x, h if states else None, **given, return_all_states=all_states)
        results = [output, *flat(h_n)]
        loss = sum((t * (i + 1)).square().sum() for i, t in enumerate(results))
        leaves = [x, *module.parameters(), *flat(h) * states, *flat(anew) * learned]
        found.append((results, torch.autograd.grad(loss, leaves)))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(found[0][1], found[1][1])
    with pytest.raises(RuntimeError, match="Expected hidden"):
        module(x, each(h, lambda t: t[:, :1]), **given)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_of_one_step_has_resets_for_any_steps():
    class Agent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = build("GRU")

        def forward(self, x, resets):
            return self.gru(x, resets=resets)[0]

    agent, resets, x = Agent(), torch.rand(5, 4) < 0.5, torch.randn(5, 4, 4)
    with torch.no_grad():
        traced = torch.jit.trace(agent, (x[:1], resets[:1]))
        assert_equal(traced(x, resets), agent(x, resets))


def test_no_reset_changes_no_bit():
    gru = build("GRU", num_layers=2)
    x, h = arguments(gru, "GRU")
    none = torch.zeros(7, 4, dtype=torch.bool)
    for one, other in zip(flat(gru(x, h, resets=none)), flat(gru(x, h)), strict=True):
        assert_equal(one, other)


FLAGS = torch.zeros(7, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"resets": FLAGS[:-1]}, RuntimeError, r"resets must have shape \(7, 4\)"),
        ({"resets": FLAGS.T}, RuntimeError, r"resets must have shape \(7, 4\)"),
        ({"resets": FLAGS.float()}, ValueError, "resets must be torch.bool, got torch.float32"),
        ({"resets": FLAGS.tolist()}, TypeError, "resets must be a Tensor, got list"),
        ({"resets": FLAGS.to("meta")}, RuntimeError, "resets must be on input's device"),
        ({"reset_to": torch.zeros(1, 6)}, ValueError, "reset_to says what resets bring"),
        (
            {"resets": FLAGS, "reset_to": torch.zeros(2, 6)},
            RuntimeError,
            r"reset_to must have shape \(1, 4, 6\) or \(1, 6\), got \(2, 6\)",
        ),
        (
            {"resets": FLAGS, "reset_to": torch.zeros(1, 6).double()},
            ValueError,
            "reset_to must have input's dtype",
        ),
        ({"resets": FLAGS, "reset_to": [0.0]}, TypeError, "reset_to must be a Tensor"),
        ({"resets": pack([FLAGS])}, TypeError, "resets must be a Tensor"),
    ],
)
def test_wrong_resets(options, error, message):
    with pytest.raises(error, match=message):
        build("GRU")(torch.randn(7, 4, 4), **moved(options))


def test_wrong_resets_of_packed_rows():
    packed = pack([torch.randn(3, 4)])
    with pytest.raises(TypeError, match="resets must be a PackedSequence"):
        build("GRU")(packed, resets=torch.zeros(3, dtype=torch.bool))
    other = pack([torch.zeros(2, dtype=torch.bool)])
    with pytest.raises(RuntimeError, match="resets must be packed with the lengths of input"):
        build("GRU")(packed, resets=other)


def test_an_lstm_resets_two_states():
    lstm = build("LSTM")
    x = torch.randn(7, 4, 4)
    with pytest.raises(TypeError, match="reset_to must be a tuple or list of two Tensors"):
        lstm(x, resets=moved(FLAGS), reset_to=torch.zeros(1, 6))


# ---- all states ----


@pytest.mark.parametrize("options", KINDS, ids=str)
@layers
def test_all_states(name, options):
    module = build(name, **options)
    x, h = arguments(module, name)
    output, h_n, states = module(x, h, return_all_states=True)
    plain = module(x, h)
    assert_equal(output, plain[0])
    steps = [s.transpose(0, 1) for s in flat(states)]  # (T, L * D, B, H)
    assert [s.shape for s in steps] == [(7, t.size(0), 4, 6) for t in flat(h_n)]
    for every, last in zip(steps, flat(h_n), strict=True):
        for row in range(last.size(0)):
            is_reverse = module.bidirectional and row % 2 == 1
            assert_equal(every[0 if is_reverse else -1, row], last[row])
    top = steps[0][:, -2:] if module.bidirectional else steps[0][:, -1:]
    flattened = top.permute(0, 2, 1, 3).flatten(2)
    assert_equal(flattened.transpose(0, 1) if module.batch_first else flattened, output)


def test_every_c_is_what_a_loop_of_steps_shows():
    lstm = build("LSTM", num_layers=2, dtype=torch.float64)
    x, h = arguments(lstm, "LSTM", torch.float64)
    found = []
    for way in ("at once", "by steps"):
        leaf = x.clone().requires_grad_()
        if way == "at once":
            _, _, (every_h, every_c) = lstm(leaf, h, return_all_states=True)
        else:
            carried, steps = h, []
            for t in range(7):
                _, carried = lstm(leaf[t : t + 1], carried)
                steps.append(carried)
            every_h, every_c = (torch.stack([s[i] for s in steps], 1) for i in (0, 1))
        loss = (every_h * torch.arange(6.0)).sum() + (every_c.square() * torch.arange(6.0)).sum()
        grads = torch.autograd.grad(loss, [leaf, *lstm.parameters()])
        found.append((every_h, every_c, *grads))
    torch.testing.assert_close(*found)


@layers
def test_all_states_of_one_sequence_and_of_packed_rows(name):
    module = build(name)
    _, h_n, states = module(torch.randn(7, 4), return_all_states=True)
    assert all(torch.equal(s[:, -1], t) for s, t in zip(flat(states), flat(h_n), strict=True))
    packed = pack([torch.randn(3, 4), torch.randn(2, 4)])
    output, _, states = module(packed, return_all_states=True)
    assert_equal(flat(states)[0][0], output.data)


# ---- among the rest of torch ----


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_everything_at_once_compiles(name):
    module = build(name, num_layers=2, bidirectional=True)
    x, h = arguments(module, name)
    resets = torch.rand(7, 4) < 0.3

    def call(x, h, lengths, resets):
        return module(x, h, lengths=lengths, resets=resets, return_all_states=True)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = flat(call(x, h, torch.tensor(LENGTHS), resets))
    actual = flat(compiled(x, h, torch.tensor(LENGTHS), resets))
    for one, other in zip(actual, expected, strict=True):
        assert_equal(one, other)
    with pytest.raises(ValueError, match="lengths: expected numbers from 0 to 7"):
        compiled(x, h, torch.tensor([9, 1, 1, 1]), resets)


@layers
def test_recompute_and_copies_take_them_too(name):
    module = build(name)
    again = getattr(nn, name)(4, 6, memory="recompute")
    again.load_state_dict(module.state_dict())
    x, h = arguments(module, name)
    resets = torch.rand(7, 4) < 0.3
    grads = []
    for each_module in (module, again, copy.deepcopy(module)):
        leaf = x.clone().requires_grad_()
        results = each_module(leaf, h, lengths=LENGTHS, resets=resets)
        loss = sum(t.square().sum() for t in flat(results))
        grads.append(torch.autograd.grad(loss, [leaf, *each_module.parameters()]))
    for other in grads[1:]:
        for one, two in zip(grads[0], other, strict=True):
            assert_equal(one, two)


def test_autocast_casts_the_states_of_resets():
    gru = build("GRU")
    x, h = arguments(gru, "GRU")
    low = {"resets": torch.rand(7, 4) < 0.3, "reset_to": torch.randn(1, 6).bfloat16()}
    with torch.autocast(device_type()):
        output, _ = gru(x.bfloat16(), h, lengths=LENGTHS, **low)
    low["reset_to"] = low["reset_to"].float()
    assert_equal(output, gru(x.bfloat16().float(), h, lengths=LENGTHS, **low)[0])


def test_vmap_over_inputs_and_lengths():
    gru = build("GRU", dtype=torch.float64)
    x = torch.randn(3, 7, 4, 4, dtype=torch.float64)
    lengths = torch.randint(0, 8, (3, 4))
    for own in (False, True):
        given = lengths if own else lengths[0]
        expected = [gru(x[i], lengths=given[i] if own else given)[0] for i in range(3)]
        actual = torch.func.vmap(
            lambda x, n: gru(x, lengths=n)[0], in_dims=(0, 0 if own else None)
        )(x, given)
        torch.testing.assert_close(actual, torch.stack(expected))


@layers
@pytest.mark.parametrize("given", ["no", 1, 0, None, np.True_, torch.tensor(True)], ids=repr)
def test_return_all_states_is_a_bool(name, given):
    with pytest.raises(TypeError, match=f"^{name}: return_all_states must be a bool, got "):
        build(name)(torch.randn(7, 4, 4), return_all_states=given)


def test_lengths_of_single_tensors_in_a_compiled_graph_and_under_vmap():
    gru, x = build("GRU"), torch.randn(7, 4, 4)
    expected = gru(x, lengths=LENGTHS)[0]
    numbers = torch.tensor(LENGTHS)

    def call(x, lengths):
        return gru(x, lengths=list(lengths.unbind()))[0]

    assert_equal(torch.compile(call, fullgraph=True, backend="eager")(x, numbers), expected)
    assert_equal(torch.func.vmap(call)(x[None], numbers[None])[0], expected)
