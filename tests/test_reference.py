"""The specification against torch.nn and against ONNX's reference evaluator.

Legend: T steps, B batch, I input, H hidden, O output of a step, D directions.
"""

import itertools
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import onnx
import onnx.reference
import pytest
import torch

from ostinato.reference import gru_step, layer, lstm_step, namespace, relu, rnn_step, sigmoid
from support.calls import batch_sizes_of
from support.cells import (
    FIRST_CELLS,
    TORCH_KINDS,
    cell_of,
    has_c,
    is_projected,
    options_of,
    record_of,
)

BOTH = [False, True]

# T, B, I, H: ones, odd numbers, rows that outnumber steps and the reverse.
SHAPES = [(1, 1, 1, 1), (2, 1, 3, 2), (5, 4, 3, 7), (3, 17, 9, 5), (31, 3, 1, 6)]


def output_size(name, hidden):
    return (hidden + 1) // 2 if is_projected(name) else hidden


def module_of(name, size, hidden, *, bias=True, bidirectional=False, dtype=torch.float64):
    """Build torch's own layer, whose parameters are `weights` in the reference's order."""
    options = {"bias": bias, "bidirectional": bidirectional, "dtype": dtype} | options_of(name)
    if is_projected(name):
        hidden = max(hidden, 2)
        options["proj_size"] = output_size(name, hidden)
    return getattr(torch.nn, record_of(name).layer)(size, hidden, **options)


def run_torch(module, input, batch_sizes, h_0, c_0):
    """Return output, h_n, c_n of torch.nn; c_n is None for RNN and GRU."""
    if batch_sizes is not None:
        input = torch.nn.utils.rnn.PackedSequence(input, torch.tensor(batch_sizes, device="cpu"))
    hx = h_0
    if isinstance(module, torch.nn.LSTM):
        hx = None if h_0 is None else (h_0, c_0)
    with warnings.catch_warnings():
        # torch says once that oneDNN has no projections.
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        output, state = module(input, hx)
    output = output if batch_sizes is None else output.data
    return (output, *state) if isinstance(module, torch.nn.LSTM) else (output, state, None)


def run_reference(name, module, input, batch_sizes, h_0, c_0):
    options = {"has_biases": module.bias, "bidirectional": module.bidirectional}
    weights = list(module.parameters())
    return layer(cell_of(name), input, batch_sizes, h_0, c_0, weights, **options)


def states_for(name, module, batch, dtype=torch.float64):
    directions = 2 if module.bidirectional else 1
    size = module.proj_size or module.hidden_size
    h_0 = torch.randn(directions, batch, size, dtype=dtype)
    c_0 = torch.randn(directions, batch, module.hidden_size, dtype=dtype)
    return h_0, c_0 if has_c(name) else None


def ragged(steps, batch):
    """Draw batch_sizes of `steps` steps whose longest row has them all; one row has one step."""
    lengths = torch.randint(1, steps + 1, (batch,)).tolist()
    lengths[0], lengths[-1] = steps, steps if batch == 1 else 1
    return batch_sizes_of(lengths)


def present(arrays):
    return [a for a in arrays if a is not None]


def tolerance(dtype, steps=1):
    # Errors of one step are a few eps, and a saturating cell adds them up at worst.
    bound = 32 * (4 + steps) * torch.finfo(dtype).eps
    return {"rtol": bound, "atol": bound}


def compare(name, module, input, batch_sizes, h_0, c_0):
    """Hold outputs and every gradient of the reference to those of torch.nn."""
    steps = len(input) if batch_sizes is None else len(batch_sizes)
    leaves = present([input, h_0, c_0])
    for leaf in leaves:
        leaf.requires_grad_()
    leaves += module.parameters()
    expected = present(run_torch(module, input, batch_sizes, h_0, c_0))
    actual = present(run_reference(name, module, input, batch_sizes, h_0, c_0))
    torch.testing.assert_close(actual, expected, **tolerance(input.dtype, steps))
    assert not any(a is b for a in actual for b in leaves)

    cotangents = [torch.randn_like(a) for a in expected]
    expected = torch.autograd.grad(expected, leaves, cotangents)
    actual = torch.autograd.grad(actual, leaves, cotangents)
    # A weight gradient sums over rows as well.
    torch.testing.assert_close(actual, expected, **tolerance(input.dtype, steps * 8))


@pytest.mark.parametrize("absent", BOTH, ids=["states", "no states"])
@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize("bidirectional", BOTH, ids=["one way", "both ways"])
@pytest.mark.parametrize("bias", BOTH, ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", TORCH_KINDS)
def test_outputs_and_gradients_equal_torch(name, shape, bias, bidirectional, packed, absent):
    steps, batch, size, hidden = shape
    module = module_of(name, size, hidden, bias=bias, bidirectional=bidirectional)
    batch_sizes = ragged(steps, batch) if packed else None
    input = torch.randn(*([sum(batch_sizes)] if packed else [steps, batch]), size).double()
    h_0, c_0 = (None, None) if absent else states_for(name, module, batch)
    compare(name, module, input, batch_sizes, h_0, c_0)


@pytest.mark.parametrize("bidirectional", BOTH)
@pytest.mark.parametrize("name", TORCH_KINDS)
def test_an_empty_batch_equals_torch(name, bidirectional):
    module = module_of(name, 3, 4, bidirectional=bidirectional)
    h_0, c_0 = states_for(name, module, 0)
    compare(name, module, torch.randn(5, 0, 3).double(), None, h_0, c_0)
    compare(name, module, torch.randn(5, 0, 3).double(), None, None, None)


@pytest.mark.parametrize("packed", BOTH)
@pytest.mark.parametrize("bidirectional", BOTH)
@pytest.mark.parametrize("name", TORCH_KINDS)
def test_no_steps_return_the_initial_states(name, bidirectional, packed):
    module = module_of(name, 3, 4, bidirectional=bidirectional)
    h_0, c_0 = states_for(name, module, 2)
    input = torch.randn(0, 3).double() if packed else torch.randn(0, 2, 3).double()
    batch_sizes = [] if packed else None
    width = h_0.shape[0] * h_0.shape[2]

    output, h_n, c_n = run_reference(name, module, input, batch_sizes, h_0, c_0)
    assert output.shape == ((0, width) if packed else (0, 2, width))
    assert torch.equal(h_n, h_0)
    assert h_n.data_ptr() != h_0.data_ptr()
    assert (c_n is None) if c_0 is None else torch.equal(c_n, c_0)

    output, h_n, c_n = run_reference(name, module, input, batch_sizes, None, None)
    # Packed and without states there is nothing to take a batch from.
    batch = 0 if packed else 2
    assert output.shape == ((0, width) if packed else (0, 2, width))
    assert torch.equal(h_n, torch.zeros(h_0.shape[0], batch, h_0.shape[2]).double())


@pytest.mark.parametrize("given", ["h_0", "c_0"])
@pytest.mark.parametrize("name", ["lstm", "lstm_projected"])
def test_one_absent_state_of_an_lstm_is_zero(name, given):
    module = module_of(name, 3, 6, bidirectional=True)
    h_0, c_0 = states_for(name, module, 4)
    input, batch_sizes = torch.randn(7, 3).double(), [4, 2, 1]
    if given == "h_0":
        actual = run_reference(name, module, input, batch_sizes, h_0, None)
        expected = run_torch(module, input, batch_sizes, h_0, torch.zeros_like(c_0))
    else:
        actual = run_reference(name, module, input, batch_sizes, None, c_0)
        expected = run_torch(module, input, batch_sizes, torch.zeros_like(h_0), c_0)
    torch.testing.assert_close(actual, expected, **tolerance(torch.float64))


@pytest.mark.parametrize("name", TORCH_KINDS)
def test_rows_of_length_zero_keep_their_states(name):
    module = module_of(name, 3, 5, bidirectional=True)
    h_0, c_0 = states_for(name, module, 4)
    input, batch_sizes = torch.randn(5, 3).double(), [2, 2, 1]
    actual = run_reference(name, module, input, batch_sizes, h_0, c_0)
    c_2 = None if c_0 is None else c_0[:, :2].contiguous()
    expected = run_torch(module, input, batch_sizes, h_0[:, :2].contiguous(), c_2)
    torch.testing.assert_close(actual[0], expected[0], **tolerance(torch.float64))
    for a, e, initial in zip(actual[1:], expected[1:], (h_0, c_0), strict=True):
        if e is not None:
            torch.testing.assert_close(a[:, :2], e, **tolerance(torch.float64))
            assert torch.equal(a[:, 2:], initial[:, 2:])


@pytest.mark.parametrize("name", TORCH_KINDS)
def test_every_form_of_batch_sizes_and_layout_is_taken(name):
    module = module_of(name, 3, 5, bidirectional=True)
    module.requires_grad_(False)
    sizes = [4, 3, 1]
    input = torch.randn(3, 8).double()
    expected = run_reference(name, module, input.T.contiguous(), sizes, None, None)
    for batch_sizes in (tuple(sizes), np.array(sizes), torch.tensor(sizes, device="cpu")):
        actual = run_reference(name, module, input.T, batch_sizes, None, None)
        torch.testing.assert_close(actual, expected, **tolerance(torch.float64))
    actual = run_reference(
        name, module, input.T.contiguous(), sizes, *expanded_states(name, module)
    )
    torch.testing.assert_close(actual, expected, **tolerance(torch.float64))


def expanded_states(name, module):
    h_0, c_0 = states_for(name, module, 4)
    zero = torch.zeros(1, 1, 1).double()
    return zero.expand(h_0.shape), None if c_0 is None else zero.expand(c_0.shape)


@pytest.mark.cpu("torch has complex layers on the CPU alone")
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("name", [name for name in TORCH_KINDS if name != "rnn_relu"])
def test_complex_equals_torch(name, dtype):
    module = module_of(name, 3, 4, bidirectional=True, dtype=dtype)
    # Near a pole of tanh nothing is well conditioned: stay small.
    module.requires_grad_(False).apply(lambda m: [p.mul_(0.5) for p in m.parameters()])
    module.requires_grad_()
    h_0, c_0 = states_for(name, module, 4, dtype)
    compare(name, module, 0.5 * torch.randn(7, 3, dtype=dtype), [4, 2, 1], h_0, c_0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", TORCH_KINDS)
def test_lower_precision_is_near_float64(name, dtype):
    module = module_of(name, 3, 6, bidirectional=True, dtype=dtype)
    if name == "rnn_relu":
        # Half of the units on, half off, none near 0: there rounding would switch the gradient.
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                signs = torch.tensor([2.0, -2.0] * 3, dtype=dtype)
                parameter.copy_(0.1 * parameter if key.startswith("weight") else signs)
    exact = module_of(name, 3, 6, bidirectional=True)
    exact.load_state_dict(module.state_dict())
    h_0, c_0 = states_for(name, module, 4, dtype)
    input, sizes = torch.randn(9, 3, dtype=dtype), [4, 3, 2]
    actual = present(run_reference(name, module, input, sizes, h_0, c_0))
    wide = [None if a is None else a.double() for a in (h_0, c_0)]
    expected = present(run_reference(name, exact, input.double(), sizes, *wide))
    cotangents = [torch.randn_like(a) for a in actual]
    gradients = torch.autograd.grad(actual, list(module.parameters()), cotangents)
    cotangents = [a.double() for a in cotangents]
    exact_gradients = torch.autograd.grad(expected, list(exact.parameters()), cotangents)
    eps = torch.finfo(dtype).eps
    for a, e in zip([*actual, *gradients], [*expected, *exact_gradients], strict=True):
        assert a.dtype == dtype
        scale = max(1.0, e.abs().max().item())
        torch.testing.assert_close(a.double(), e, rtol=0, atol=8 * eps * scale)


@pytest.mark.parametrize("name", TORCH_KINDS)
def test_nan_and_inf_propagate_as_in_torch(name):
    module = module_of(name, 3, 5, bidirectional=True)
    input = torch.randn(4, 4, 3).double()
    input[1, 0, 0], input[2, 1, 1], input[0, 2, 2] = torch.nan, torch.inf, -torch.inf
    expected = present(run_torch(module, input, None, None, None))
    actual = present(run_reference(name, module, input, None, None, None))
    assert actual[0].isnan().any()
    torch.testing.assert_close(actual, expected, equal_nan=True, **tolerance(torch.float64))
    # The row without either stays clean.
    assert actual[0][:, 3].isfinite().all()


# Where ONNX's gates are in torch's order: ONNX has GRU z r h and LSTM i o f c.
ONNX_GATES = {"RNN": [0], "GRU": [1, 0, 2], "LSTM": [0, 3, 1, 2]}


def run_onnx(name, module, input, h_0, c_0):
    """Run one ONNX node on (T, B, I); return output (T, B, D * H), h_n, c_n."""
    op = record_of(name).layer
    order, hidden = ONNX_GATES[op], module.hidden_size

    def stacked(*names):
        def reordered(weight):
            return np.concatenate([np.split(weight, len(order))[k] for k in order])

        ways = ["", "_reverse"] if module.bidirectional else [""]
        parts = [
            [reordered(getattr(module, f"{n}_l0{way}").numpy()) for n in names] for way in ways
        ]
        return np.stack([np.concatenate(part) for part in parts])

    feeds = {
        "X": input.numpy(),
        "W": stacked("weight_ih"),
        "R": stacked("weight_hh"),
        "B": stacked("bias_ih", "bias_hh"),
        "initial_h": h_0.numpy(),
    }
    inputs, outputs = ["X", "W", "R", "B", "", "initial_h"], ["Y", "Y_h"]
    if has_c(name):
        feeds["initial_c"] = c_0.numpy()
        inputs, outputs = [*inputs, "initial_c"], [*outputs, "Y_c"]
    direction = "bidirectional" if module.bidirectional else "forward"
    extra = {"linear_before_reset": 1} if op == "GRU" else {}
    node = onnx.helper.make_node(
        op, inputs, outputs, hidden_size=hidden, direction=direction, **extra
    )
    double = onnx.TensorProto.DOUBLE
    values = [onnx.helper.make_tensor_value_info(n, double, None) for n in (*feeds, *outputs)]
    graph = onnx.helper.make_graph([node], op, values[: len(feeds)], values[len(feeds) :])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)])
    y, *states = onnx.reference.ReferenceEvaluator(model).run(None, feeds)
    # ONNX keeps directions apart: (T, D, B, H).
    y = y.transpose(0, 2, 1, 3).reshape(*y.shape[::2], -1)
    return [torch.from_numpy(a) for a in (y, *states)]


# The evaluator knows no relu and no projection; torch.nn vouches for those.
@pytest.mark.cpu("NumPy")
@pytest.mark.parametrize("bidirectional", BOTH)
@pytest.mark.parametrize("name", [name for name in FIRST_CELLS if name in TORCH_KINDS])
def test_padded_equals_onnx(name, bidirectional):
    module = module_of(name, 3, 7, bidirectional=bidirectional).requires_grad_(False)
    input = torch.randn(6, 5, 3).double()
    h_0, c_0 = states_for(name, module, 5)
    actual = present(run_reference(name, module, input, None, h_0, c_0))
    expected = run_onnx(name, module, input, h_0, c_0)
    torch.testing.assert_close(actual, expected, **tolerance(torch.float64, 6))


@pytest.mark.cpu("NumPy")
@pytest.mark.parametrize("bidirectional", BOTH)
@pytest.mark.parametrize("name", [name for name in FIRST_CELLS if name in TORCH_KINDS])
def test_each_packed_row_equals_onnx_on_that_row_alone(name, bidirectional):
    module = module_of(name, 3, 7, bidirectional=bidirectional).requires_grad_(False)
    lengths = [6, 6, 3, 1]
    rows = [torch.randn(length, 3).double() for length in lengths]
    packed = torch.nn.utils.rnn.pack_sequence(rows)
    h_0, c_0 = states_for(name, module, len(rows))
    output, *states = present(
        run_reference(name, module, packed.data, packed.batch_sizes, h_0, c_0)
    )
    padded, _ = torch.nn.utils.rnn.pad_packed_sequence(packed._replace(data=output))
    for b, row in enumerate(rows):
        c_b = None if c_0 is None else c_0[:, b : b + 1]
        expected = run_onnx(name, module, row[:, None], h_0[:, b : b + 1], c_b)
        actual = [padded[: lengths[b], b : b + 1], *(s[:, b : b + 1] for s in states)]
        torch.testing.assert_close(actual, expected, **tolerance(torch.float64, 6))


@pytest.mark.cpu("NumPy")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in TORCH_KINDS
        for dtype in ("float16", "float32", "float64", "complex64", "complex128")
        # Complex numbers have no order, hence no relu.
        if not (name == "rnn_relu" and dtype.startswith("complex"))
    ],
)
@pytest.mark.parametrize("packed", BOTH)
def test_numpy_equals_torch(name, packed, dtype):
    of_torch = getattr(torch, dtype)
    module = module_of(name, 3, 5, bidirectional=True, dtype=of_torch).requires_grad_(False)
    batch_sizes = [4, 2, 1] if packed else None
    input = 0.5 * torch.randn((7, 3) if packed else (3, 4, 3), dtype=of_torch)
    weights = [p.numpy() for p in module.parameters()]
    options = {"has_biases": True, "bidirectional": True}
    for h_0, c_0 in (states_for(name, module, 4, of_torch), (None, None)):
        arrays = [None if a is None else a.numpy() for a in (h_0, c_0)]
        actual = layer(cell_of(name), input.numpy(), batch_sizes, *arrays, weights, **options)
        expected = run_reference(name, module, input, batch_sizes, h_0, c_0)
        for a, e in zip(actual, expected, strict=True):
            if e is None:
                assert a is None
            else:
                assert type(a) is np.ndarray
                assert a.dtype == dtype
                torch.testing.assert_close(torch.from_numpy(a), e, **tolerance(of_torch))


def test_importing_and_running_without_torch():
    program = """
        import sys
        import ostinato.reference
        assert "torch" not in sys.modules, "imported torch"

        sys.modules["torch"] = None  # an import of torch would now raise
        import numpy
        weights = [numpy.ones((6, 3)), numpy.zeros((6, 2))]
        output, h_n, c_n = ostinato.reference.layer(
            "gru", numpy.zeros((4, 1, 3)), None, numpy.ones((1, 1, 2)), None, weights,
            has_biases=False, bidirectional=False)
        print(output[:, 0, 0].tolist())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # Each step: r = z = 1/2, n = 0, h' = h / 2.
    assert done.stdout.strip() == "[0.5, 0.25, 0.125, 0.0625]"


def function_of(name, bidirectional=True, dtype=torch.float64):
    """Return f(input, weights..., states...) of a small ragged batch, and its arguments."""
    module = module_of(name, 2, 3, bidirectional=bidirectional, dtype=dtype)
    weights = [p.detach().requires_grad_() for p in module.parameters()]
    input = torch.randn(6, 2, dtype=dtype, requires_grad=True)
    states = [s.requires_grad_() for s in present(states_for(name, module, 3, dtype))]

    def f(input, *rest):
        h_0, c_0 = (*rest[len(weights) :], None)[:2]
        options = {"has_biases": True, "bidirectional": bidirectional}
        w = rest[: len(weights)]
        outputs = layer(cell_of(name), input, [3, 2, 1], h_0, c_0, w, **options)
        return tuple(present(outputs))

    return f, (input, *weights, *states)


@pytest.mark.parametrize("name", TORCH_KINDS)
def test_gradcheck(name):
    f, arguments = function_of(name)
    assert torch.autograd.gradcheck(f, arguments, check_batched_grad=True)


@pytest.mark.parametrize("name", TORCH_KINDS)
def test_gradgradcheck(name):
    f, arguments = function_of(name, bidirectional=False)
    assert torch.autograd.gradgradcheck(f, arguments, check_batched_grad=True)


@pytest.mark.parametrize("name", ["rnn_tanh", "gru", "lstm_projected"])
def test_gradcheck_complex(name):
    f, arguments = function_of(name, bidirectional=False, dtype=torch.complex128)
    assert torch.autograd.gradcheck(f, arguments)


@pytest.mark.parametrize("name", TORCH_KINDS)
def test_vmap_over_every_argument_and_its_gradient(name):
    f, arguments = function_of(name)
    arguments = [torch.stack([a.detach(), -a.detach(), a.detach() / 3]) for a in arguments]

    def loss(*one):
        return sum((a * a).sum() for a in f(*one))

    for g in (f, torch.func.grad(loss, argnums=tuple(range(len(arguments))))):
        actual = torch.func.vmap(g)(*arguments)
        singles = [g(*(a[k] for a in arguments)) for k in range(3)]
        expected = tuple(torch.stack(parts) for parts in zip(*singles, strict=True))
        torch.testing.assert_close(actual, expected, **tolerance(torch.float64, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sigmoid_saturates_without_nan(dtype):
    x = torch.tensor([-torch.inf, -3e4, -90, -1, 0, 1, 90, 3e4, torch.inf], dtype=dtype)
    x.requires_grad_()
    y = sigmoid(x)
    torch.testing.assert_close(y, torch.sigmoid(x), rtol=0, atol=2 * torch.finfo(dtype).eps)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x)
    assert slope.isfinite().all()
    assert bend.isfinite().all()
    assert torch.equal(slope[4], torch.tensor(0.25, dtype=dtype))


def test_relu_and_its_gradient_equal_torch_at_every_kind_of_number():
    x = torch.tensor([torch.nan, -torch.inf, -1, -0.0, 0, 2, torch.inf], requires_grad=True)
    expected, actual = torch.relu(x), relu(x)
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=0, atol=0)
    weight = torch.arange(1.0, 8.0)
    (expected,) = torch.autograd.grad(expected, x, weight)
    (actual,) = torch.autograd.grad(actual, x, weight)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", TORCH_KINDS)
def test_a_sequence_cut_in_two_and_carried_equals_one_run(name):
    module = module_of(name, 3, 5).requires_grad_(False)
    input = torch.randn(7, 4, 3).double()
    h_0, c_0 = states_for(name, module, 4)
    whole = present(run_reference(name, module, input, None, h_0, c_0))
    first, *states = run_reference(name, module, input[:3], None, h_0, c_0)
    second, *states = run_reference(name, module, input[3:], None, *states)
    actual = [torch.cat([first, second]), *present(states)]
    torch.testing.assert_close(actual, whole, **tolerance(torch.float64, 7))


@pytest.mark.parametrize("name", TORCH_KINDS)
def test_reversed_input_equals_the_reverse_direction(name):
    both = module_of(name, 3, 5, bidirectional=True).requires_grad_(False)
    weights = list(both.parameters())
    input = torch.randn(6, 4, 3).double()
    output, h_n, _ = run_reference(name, both, input, None, None, None)
    own = weights[len(weights) // 2 :]
    options = {"has_biases": True, "bidirectional": False}
    flipped, h, _ = layer(cell_of(name), input.flip(0), None, None, None, own, **options)
    half = output.shape[-1] // 2
    torch.testing.assert_close(output[..., half:], flipped.flip(0), **tolerance(torch.float64, 6))
    torch.testing.assert_close(h_n[1:], h, **tolerance(torch.float64, 6))


@pytest.mark.parametrize("name", TORCH_KINDS)
def test_rows_commute_with_permutation(name):
    module = module_of(name, 3, 5, bidirectional=True).requires_grad_(False)
    input, order = torch.randn(6, 4, 3).double(), torch.tensor([2, 0, 3, 1])
    h_0, c_0 = states_for(name, module, 4)
    expected = [a[:, order] for a in present(run_reference(name, module, input, None, h_0, c_0))]
    moved = (a if a is None else a[:, order] for a in (h_0, c_0))
    actual = present(run_reference(name, module, input[:, order], None, *moved))
    torch.testing.assert_close(actual, expected, **tolerance(torch.float64, 6))


def test_relu_on_whole_numbers_is_exact():
    # Nothing saturates or rounds, so one row or step out of place shows as another whole number.
    lengths, rng = [5, 4, 4, 2, 1], np.random.default_rng(0)
    rows = [rng.integers(0, 3, length).tolist() for length in lengths]
    sizes = [sum(length > t for length in lengths) for t in range(5)]
    starts = list(itertools.accumulate(sizes, initial=0))
    packed = [[row[t]] for t in range(5) for row in rows if t < len(row)]
    h_0 = np.arange(10.0).reshape(2, 5, 1)

    weights = [np.full((1, 1), w) for w in (5.0, 2.0, 7.0, 3.0)]
    options = {"has_biases": False, "bidirectional": True}
    rows_in = np.array(packed, dtype=float)
    output, h_n, _ = layer("rnn_relu", rows_in, sizes, h_0, None, weights, **options)
    for b, row in enumerate(rows):
        for d, (w_x, w_h) in enumerate([(5, 2), (7, 3)]):
            h = int(h_0[d, b, 0])
            for t in reversed(range(len(row))) if d else range(len(row)):
                h = w_x * row[t] + w_h * h
                assert output[starts[t] + b, d] == h
            assert h_n[d, b, 0] == h


def test_steps_equal_torch_cells():
    x, h, c = torch.randn(3, 4, 5).double()
    linear = torch.nn.functional.linear
    for cell, step in (
        (torch.nn.RNNCell(5, 5), lambda a, b: rnn_step(a, b)),
        (torch.nn.RNNCell(5, 5, nonlinearity="relu"), lambda a, b: rnn_step(a, b, "relu")),
        (torch.nn.GRUCell(5, 5), lambda a, b: gru_step(a, b, h)),
        (torch.nn.LSTMCell(5, 5), lambda a, b: lstm_step(a, b, c)),
    ):
        cell.double()
        expected = cell(x, (h, c) if isinstance(cell, torch.nn.LSTMCell) else h)
        gates_x = linear(x, cell.weight_ih, cell.bias_ih)
        gates_h = linear(h, cell.weight_hh, cell.bias_hh)
        torch.testing.assert_close(step(gates_x, gates_h), expected, **tolerance(torch.float64))


def test_namespace_of_subclasses():
    class Marked(torch.Tensor):
        pass

    for tensor in (torch.ones(1), torch.nn.Parameter(torch.ones(1)), Marked([1.0])):
        assert namespace(tensor) is torch
    with pytest.raises(TypeError, match="expected a NumPy array or a torch tensor, got list"):
        namespace([1.0])


def call(cell="gru", input=None, batch_sizes=None, h_0=None, count=4, **changes):
    input = np.zeros((2, 3, 1)) if input is None else input
    options = {"has_biases": True, "bidirectional": False} | changes
    return layer(cell, input, batch_sizes, h_0, None, [np.zeros((3, 1))] * count, **options)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"cell: expected one of rnn_tanh, .*, got 'elman'"):
        call(cell="elman")
    with pytest.raises(ValueError, match=r"weights: expected 4 per direction for 1 .*, got 5"):
        call(count=5)
    with pytest.raises(ValueError, match=r"weights: expected 2 or 3 per direction for 2 .*got 5"):
        call(cell="lstm", count=5, has_biases=False, bidirectional=True)
    packed = np.zeros((3, 1))
    for sizes in ([1, 2], [4, -1]):
        with pytest.raises(ValueError, match=r"batch_sizes: expected sizes that fall from at most"):
            call(input=packed, batch_sizes=sizes)
    with pytest.raises(ValueError, match=r"from at most 1 to at least 0, got \[2, 1\]"):
        call(input=packed, batch_sizes=[2, 1], h_0=np.zeros((1, 1, 1)))
    with pytest.raises(ValueError, match=r"batch_sizes: expected a sum of 3, .*, got 4"):
        call(input=packed, batch_sizes=[2, 2])
    with pytest.raises(ValueError, match="nonlinearity: expected 'tanh' or 'relu', got 'elu'"):
        rnn_step(packed, packed, "elu")
    for x in (np.zeros(2, "complex64"), torch.zeros(2, dtype=torch.complex128)):
        with pytest.raises(TypeError, match="relu: expected a real dtype, got"):
            relu(x)
