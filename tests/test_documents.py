"""The examples of the five documents that fix the interface, run as printed.

Each example runs twice after the same seed, once with our `nn` and once with torch's, and every
tensor that it leaves behind is compared. Only the names of the array library are translated.
"""

import torch

from ostinato import nn

# Both sides run in float32; the sums are short.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}

GRU_CELL_TORCH_1_8 = """
>>> rnn = nn.GRUCell(10, 20)
>>> input = torch.randn(6, 3, 10)
>>> hx = torch.randn(3, 20)
>>> output = []
>>> for i in range(6):
        hx = rnn(input[i], hx)
        output.append(hx)
"""

# `import oneflow as flow` and `import oneflow.nn as nn` stand above it.
GRU_CELL_ONEFLOW = """
>>> rnn = nn.GRUCell(10, 20)
>>> input = flow.randn(6, 3, 10)
>>> hx = flow.randn(3, 20)
>>> hx = rnn(input[0], hx)
>>> size = hx.size()
"""

GRU_TORCH = """
>>> rnn = nn.GRU(10, 20, 2)
>>> input = torch.randn(5, 3, 10)
>>> h0 = torch.randn(2, 3, 20)
>>> output, hn = rnn(input, h0)
"""

RNN_CELL_TORCH = """
>>> rnn = nn.RNNCell(10, 20)
>>> input = torch.randn(6, 3, 10)
>>> hx = torch.randn(3, 20)
>>> output = []
>>> for i in range(6):
...     hx = rnn(input[i], hx)
...     output.append(hx)
"""

# R: rnn <- nn_gru(10, 20, 2), input <- torch_randn(5, 3, 10), h0 <- torch_randn(2, 3, 20),
# output <- rnn(input, h0); a list of two.
GRU_R = """
>>> rnn = nn.GRU(10, 20, 2)
>>> input = torch.randn(5, 3, 10)
>>> h0 = torch.randn(2, 3, 20)
>>> output = rnn(input, h0)
"""


def statements(example):
    """Strip the prompts: a continuation is printed with one, or with blanks in its place."""
    return "\n".join(
        line[4:] if line.startswith((">>> ", "... ")) else line for line in example.splitlines()
    )


def run_twice(example):
    """Run an example with our modules and with torch's; compare what both leave behind."""
    left = []
    for module in (nn, torch.nn):
        torch.manual_seed(0)
        names = {"nn": module, "torch": torch, "flow": torch}
        exec(statements(example), names)
        left.append(names)
    ours, theirs = left
    assert type(ours["rnn"]).__module__.startswith("ostinato")
    for name in theirs.keys() - {"nn", "torch", "flow", "rnn", "__builtins__"}:
        if name != "size":
            torch.testing.assert_close(ours[name], theirs[name], **TOLERANCE)
    assert repr(ours["rnn"]) == repr(theirs["rnn"])
    for name, weight in theirs["rnn"].state_dict().items():
        assert torch.equal(ours["rnn"].state_dict()[name], weight)
    return ours


def test_gru_cell_of_torch_1_8():
    names = run_twice(GRU_CELL_TORCH_1_8)
    assert len(names["output"]) == 6
    assert names["output"][-1] is names["hx"]
    assert names["hx"].shape == (3, 20)


def test_gru_cell_of_torch_1_8_says_shapes_and_defaults():
    cell = nn.GRUCell(input_size=10, hidden_size=20, bias=True)
    shapes = {name: tuple(weight.shape) for name, weight in cell.named_parameters()}
    assert shapes == {
        "weight_ih": (3 * 20, 10),
        "weight_hh": (3 * 20, 20),
        "bias_ih": (3 * 20,),
        "bias_hh": (3 * 20,),
    }
    bound = (1 / 20) ** 0.5
    for weight in cell.parameters():
        assert weight.abs().max() <= bound
        assert weight.abs().max() > 0.8 * bound
    input = torch.randn(3, 10)
    assert torch.equal(cell(input), cell(input, torch.zeros(3, 20)))
    without = nn.GRUCell(10, 20, bias=False)
    assert [name for name, _ in without.named_parameters()] == ["weight_ih", "weight_hh"]
    assert without.bias_ih is None
    assert without.bias_hh is None


def test_gru_cell_of_oneflow():
    names = run_twice(GRU_CELL_ONEFLOW)
    assert names["size"] == torch.Size([3, 20])


def test_gru_cell_of_oneflow_says_equations_factory_arguments_and_unbatched():
    cell = nn.GRUCell(10, 20, device="cpu", dtype=torch.float64)
    input, hidden = torch.randn(2, 10).double(), torch.randn(2, 20).double()
    ir, iz, i_n = (input @ cell.weight_ih.T + cell.bias_ih).chunk(3, 1)
    hr, hz, hn = (hidden @ cell.weight_hh.T + cell.bias_hh).chunk(3, 1)
    r, z = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
    n = torch.tanh(i_n + r * hn)
    expected = (1 - z) * n + z * hidden
    torch.testing.assert_close(cell(input, hidden), expected, rtol=1e-12, atol=1e-14)
    one = cell(input[0], hidden[0])  # (I,), (H,)
    assert one.shape == (20,)
    torch.testing.assert_close(one, expected[0], rtol=1e-12, atol=1e-14)
    assert cell(input[0]).shape == (20,)


def test_gru_of_torch():
    names = run_twice(GRU_TORCH)
    assert names["output"].shape == (5, 3, 20)
    assert names["hn"].shape == (2, 3, 20)


def test_gru_of_torch_separates_directions():
    steps, batch, directions, hidden = 5, 3, 2, 20
    gru = nn.GRU(10, hidden, num_layers=2, bidirectional=True)
    output, h_n = gru(torch.randn(steps, batch, 10))
    forward, backward = output.view(steps, batch, directions, hidden).unbind(2)
    assert torch.equal(forward[-1], h_n[2])
    assert torch.equal(backward[0], h_n[3])
    assert gru.weight_ih_l0.shape == (3 * hidden, 10)
    assert gru.weight_ih_l1.shape == (3 * hidden, directions * hidden)
    assert gru.weight_hh_l1_reverse.shape == (3 * hidden, hidden)


def test_rnn_cell_of_torch():
    names = run_twice(RNN_CELL_TORCH)
    assert len(names["output"]) == 6
    rnn = names["rnn"]
    assert rnn.weight_ih.shape == (20, 10)
    assert rnn.weight_hh.shape == (20, 20)


def test_rnn_cell_of_torch_says_tanh_or_relu():
    input, hidden = torch.randn(3, 10), torch.randn(3, 20)
    for nonlinearity in ("tanh", "relu"):
        cell = nn.RNNCell(10, 20, nonlinearity=nonlinearity)
        sums = input @ cell.weight_ih.T + cell.bias_ih + hidden @ cell.weight_hh.T + cell.bias_hh
        torch.testing.assert_close(
            cell(input, hidden), getattr(torch, nonlinearity)(sums), **TOLERANCE
        )


def test_gru_of_r():
    output, h_n = run_twice(GRU_R)["output"]
    assert output.shape == (5, 3, 20)
    num_layers, num_directions, batch, hidden = 2, 1, 3, 20
    by_layer = h_n.view(num_layers, num_directions, batch, hidden)
    assert torch.equal(by_layer[-1, 0], output[-1])


def test_gru_of_r_separates_layers_and_directions():
    num_layers, num_directions, batch, hidden = 3, 2, 4, 7
    gru = nn.GRU(5, hidden, num_layers, bidirectional=True)
    output, h_n = gru(torch.randn(6, batch, 5))
    by_layer = h_n.view(num_layers, num_directions, batch, hidden)
    separate = output.view(6, batch, num_directions, hidden)
    assert torch.equal(by_layer[-1, 0], separate[-1, :, 0])
    assert torch.equal(by_layer[-1, 1], separate[0, :, 1])
