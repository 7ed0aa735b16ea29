"""The bits of own cells do not depend on how a result was computed.

Legend: T steps, B batch, I input, H hidden.
"""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ostinato import _core, nn, zoo
from support import own
from support.pairs import flat

CELLS = (own.Gru, own.Lstm, own.Independent, own.Everything, own.Five)
CELLS += (zoo.PeepholeLSTM, zoo.SLSTM, zoo.CoRNN)
cells = pytest.mark.parametrize("cell", **own.names(CELLS))
sizes = pytest.mark.parametrize("hidden", [5, 64, 100])


@pytest.fixture(autouse=True)
def settings():
    """Give threads and instruction set back as they were."""
    threads, isa = torch.get_num_threads(), _core.isa()
    yield
    torch.set_num_threads(threads)
    _core.set_isa(isa)


def drawn(cell, hidden, steps=9, batch=5, **options):
    torch.manual_seed(0)
    layer = nn.Recurrent(cell, 7, hidden, **options)
    x = torch.randn(steps, batch, 7)
    return layer, x, own.drives_of(cell, steps, batch, hidden=hidden)


def run(layer, x, drives, hx=None):
    """Results, and the gradients of the input and of the weights."""
    x = x.detach().clone().requires_grad_()
    results = flat(layer(x, hx, drives=drives))
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(r.shape, generator=generator) for r in results]
    return [*results, *torch.autograd.grad(results, (x, *layer.parameters()), seeds)]


def assert_same(some, others):
    assert all(map(torch.equal, some, others))


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"memory": "recompute"}], ids=str)
@sizes
@cells
def test_threads_and_instruction_sets(cell, hidden, options):
    layer, *given = drawn(cell, hidden, batch=20, **options)
    torch.set_num_threads(1)
    expected = run(layer, *given)
    for isa in _core.instruction_sets():
        _core.set_isa(isa)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_same(run(layer, *given), expected)


@sizes
@cells
def test_recompute_is_keep(cell, hidden):
    layer, *given = drawn(cell, hidden)
    expected = run(layer, *given)
    layer.memory = "recompute"
    assert_same(run(layer, *given), expected)


@sizes
@cells
def test_inference_is_training(cell, hidden):
    layer, x, drives = drawn(cell, hidden)
    with torch.no_grad():
        found = flat(layer(x, drives=drives))
    assert_same(found, run(layer, x, drives)[: len(found)])


@sizes
@cells
def test_a_row_alone_is_a_row_of_a_batch(cell, hidden):
    layer, x, drives = drawn(cell, hidden, batch=40)
    output, _ = layer(x, drives=drives)
    for b in (0, 17, 39):
        row = slice(b, b + 1)
        alone, _ = layer(x[:, row], drives=None if drives is None else drives[:, row])
        assert torch.equal(alone, output[:, row])


@sizes
@cells
def test_a_sequence_in_pieces(cell, hidden):
    layer, x, drives = drawn(cell, hidden)
    output, last = layer(x, drives=drives)
    pieces, hx = [], None
    for part in (slice(0, 1), slice(1, 6), slice(6, 9)):
        piece, hx = layer(x[part], hx, drives=None if drives is None else drives[part])
        pieces.append(piece)
    assert torch.equal(torch.cat(pieces), output)
    assert_same(flat([hx]), flat([last]))


@sizes
@cells
def test_padding_is_packing(cell, hidden):
    layer, x, drives = drawn(cell, hidden, bidirectional=True)
    lengths = [9, 2, 7, 7, 1]
    padded, last = layer(x, lengths=lengths, drives=drives)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    driven = None if drives is None else pack_padded_sequence(drives, lengths, enforce_sorted=False)
    output, last_of_packed = layer(packed, drives=driven)
    assert torch.equal(pad_packed_sequence(output, total_length=9)[0], padded)
    assert_same(flat([last]), flat([last_of_packed]))


@cells
def test_one_step_of_many_rows_is_the_steps_of_few(cell):
    torch.manual_seed(0)
    one = nn.RecurrentCell(cell, 7, 20)
    x, drives = torch.randn(300, 7), own.drives_of(cell, 300, hidden=20)
    whole = flat([one(x, drives=drives)])
    for part in (slice(0, 1), slice(5, 8), slice(100, 300)):
        driven = None if drives is None else drives[part]
        found = flat([one(x[part], drives=driven)])
        assert all(torch.equal(a, b[part]) for a, b in zip(found, whole, strict=True))


@pytest.mark.parametrize("cell", **own.names(tuple(own.BUILT_IN)))
def test_a_built_in_cell_written_as_a_step_has_its_bits(cell):
    # But for an LSTM's gradients, whose products are associated in another order.
    layer, x, _ = drawn(cell, 33)
    built = own.BUILT_IN[cell](7, 33)
    built.load_state_dict(layer.state_dict())
    found = [run(layer, x, None)]
    x = x.detach().clone().requires_grad_()
    results = flat(built(x))
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(r.shape, generator=generator) for r in results]
    found.append([*results, *torch.autograd.grad(results, (x, *built.parameters()), seeds)])
    count = len(found[0]) if cell is not own.Lstm else len(results)
    assert_same(*(each[:count] for each in found))
