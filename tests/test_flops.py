"""What torch's counters and profilers say of a layer: operations, and names."""

import subprocess
import sys

import pytest
import torch
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

from ostinato import nn
from support.cells import LAYERS, MODULES, TORCH_CELL_MODULES, TORCH_LAYERS, record_of
from support.devices import on_cpu
from support.pairs import TORCH_WARNS, flat, shapes, state

pytestmark = pytest.mark.filterwarnings(TORCH_WARNS)


def counted(run, wanted):
    """Operations of forward and of backward, for the gradients of some tensors."""
    with FlopCounterMode(display=False) as counter:
        results = flat(run())
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(sum(r.sum() for r in results), wanted, allow_unused=True)
    return forward, counter.get_total_flops()


def composed(weights, gates, x, h_0, lengths, projection=None):
    """A layer's products alone, as functions of torch.nn.functional on the rows that are active.

    Args:
        weights: weight_ih, weight_hh[, bias_ih, bias_hh].
        gates: G.
        x: (T, B, I), the longest row first.
        h_0: (B, O) or None.
        lengths: of the rows.
        projection: weight_hr or None.
    """
    rows = torch.cat([x[t, : sum(n > t for n in lengths)] for t in range(x.shape[0])])
    gates_x = linear(rows, weights[0], *weights[2:3])
    h = x.new_zeros(x.shape[1], weights[1].shape[1]) if h_0 is None else h_0
    first, found = 0, []
    for t in range(x.shape[0]):
        active = sum(n > t for n in lengths)
        step = gates_x[first : first + active] + linear(h[:active], weights[1], *weights[3:4])
        h = sum(step.chunk(gates, 1)).tanh()
        h = h if projection is None else linear(h, projection)
        found.append(h)
        first += active
    return torch.cat(found)


def weights_of(module, k=0):
    names = "weight_ih", "weight_hh", "bias_ih", "bias_hh"
    return [getattr(module, f"{name}_l{k}") for name in names]


WANTED = ("everything", "weights alone", "input alone", "h_0 alone", "weight_hh alone")


@pytest.mark.parametrize("lengths", [[6, 6, 6], [6, 4, 1]], ids=["padded", "ragged"])
@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_counts_what_its_products_count(name, wanted, lengths):
    module = getattr(nn, name)(4, 5)
    x, hx = torch.randn(6, 3, 4, requires_grad=True), state(name, 1, 3, 5, requires_grad=True)
    h_0 = flat(hx)[0]
    leaves = {
        "everything": [x, h_0, *module.parameters()],
        "weights alone": list(module.parameters()),
        "input alone": [x],
        "h_0 alone": [h_0],
        "weight_hh alone": [module.weight_hh_l0],
    }[wanted]
    for leaf in (x, *flat(hx), *module.parameters()):
        leaf.requires_grad_(any(leaf is other for other in leaves))
    expected = counted(
        lambda: composed(weights_of(module), record_of(name).gates, x, h_0[0], lengths), leaves
    )
    ragged = torch.tensor(lengths, device="cpu")
    assert counted(lambda: module(x, hx, lengths=ragged), leaves) == expected
    assert counted(lambda: module(pack_padded_sequence(x, ragged), hx), leaves) == expected
    if min(lengths) == 6:
        assert counted(lambda: module(x, hx), leaves) == expected


def test_a_projection_counts_and_recomputation_too():
    module, x = nn.LSTM(4, 5, proj_size=2), torch.randn(6, 3, 4)
    leaves = list(module.parameters())
    expected = counted(
        lambda: composed(weights_of(module), 4, x, None, [6] * 3, module.weight_hr_l0), leaves
    )
    assert counted(lambda: module(x), leaves) == expected
    module.memory = "recompute"
    again = 2 * 6 * 3 * 4 * 5 * (4 + 2)  # the gates of all steps
    assert counted(lambda: module(x), leaves) == (expected[0], expected[1] + again)


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")
@pytest.mark.cpu("torch counts nothing for cuDNN's operator")
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("name", TORCH_LAYERS)
def test_layers_count_what_torchs_count(name, options):
    x = torch.randn(6, 3, 4, requires_grad=True)
    modules = [getattr(library, name)(4, 5, **options) for library in (nn, torch.nn)]
    # torch's LSTM is one operator of oneDNN's without this, for which torch counts nothing.
    with torch.backends.mkldnn.flags(enabled=False):
        ours, theirs = (counted(lambda m=m: m(x), [x, *m.parameters()]) for m in modules)
    assert ours == theirs
    assert ours[0] > 0


@pytest.mark.parametrize("name", TORCH_CELL_MODULES)
def test_cells_count_what_torchs_count(name):
    x, hx = shapes(name, requires_grad=True)
    modules = [getattr(library, name)(4, 8) for library in (nn, torch.nn)]
    leaves = [x, *flat(hx)[:1]]
    ours, theirs = (counted(lambda m=m: m(x, hx), [*leaves, *m.parameters()]) for m in modules)
    assert ours == theirs
    assert ours[0] > 0


def test_tensors_without_values_count_as_full():
    with torch.device("meta"):
        module, x = nn.GRU(4, 5), torch.randn(6, 3, 4)
    lengths = torch.tensor([6, 6, 6], device="cpu")
    with FlopCounterMode(display=False) as counter:
        module(x, lengths=lengths)
    assert counter.get_total_flops() == 6 * 3 * 2 * 15 * (4 + 5)


def test_counts_stand_under_their_modules():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), nn.GRU(4, 5))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(6, 3, 4))[0].sum().backward()
    found = counter.get_flop_counts()["Sequential.1"]
    assert {str(operator) for operator in found} == {"ostinato.layer", "ostinato.layer_backward"}


@pytest.mark.cpu("imports, which are the same everywhere")
@pytest.mark.parametrize("order", ["before", "after"])
def test_whoever_is_imported_first(order):
    """The table of torch gets the formulas in either order."""
    lines = ["import ostinato.nn", "from torch.utils.flop_counter import FlopCounterMode"]
    text = "\n".join(
        [
            "import sys, torch",
            *(lines if order == "before" else lines[::-1]),
            "assert not any(type(f).__module__ == 'ostinato.later' and f._name == "
            "'torch.utils.flop_counter' for f in sys.meta_path)",
            "with FlopCounterMode(display=False) as counter:",
            "    ostinato.nn.GRU(4, 5)(torch.zeros(6, 3, 4))",
            "print(counter.get_total_flops())",
        ]
    )
    found = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(6 * 3 * 2 * 15 * 9)


@pytest.mark.cpu("imports, which are the same everywhere")
def test_our_import_loads_none_of_what_waits():
    text = (
        "import sys, torch; before = set(sys.modules); import ostinato.nn; "
        "print(sorted(name for name in set(sys.modules) - before if name.startswith('torch')))"
    )
    found = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# ---- the profiler ----


def names(run, *, once=()):
    with torch.profiler.profile() as profile:
        run()
    found = [event.name for event in profile.events()]
    # What is shown twice, one in the other, counts twice in a table.
    assert all(found.count(name) == 1 for name in once)
    return set(found)


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
@pytest.mark.parametrize("name", MODULES)
def test_a_profile_names_cell_and_direction(name):
    module = getattr(nn, name)(4, 8)
    x, hx = shapes(name, requires_grad=True)
    cell = record_of(name).name

    def step():
        sum(result.sum() for result in flat(module(x, hx))).backward()

    found = names(step)
    if on_cpu():
        # A call that goes past the dispatcher does so under a profiler, too.
        assert not {"ostinato::layer", "ostinato::layer_backward"} & found
    assert {f"ostinato::{cell}_forward", f"ostinato::{cell}_backward"} <= found
    with torch.no_grad():
        assert f"ostinato::{cell}_backward" not in names(lambda: module(x, hx))


@pytest.mark.cpu("what no engine serves, and the rules for the CPU engine")
def test_a_profile_names_what_runs_past_the_operator():
    module, x = nn.GRU(4, 8), torch.randn(5, 3, 4)
    found = names(lambda: torch.func.vmap(lambda x: module(x)[0])(x[None]))
    assert "ostinato::gru_forward" in found
    both = {"ostinato::gru_forward", "ostinato::gru_backward"}
    assert both <= names(lambda: torch.func.grad(lambda x: module(x)[0].sum())(x), once=both)
    module, x = nn.GRU(4, 8, dtype=torch.complex64), x.to(torch.complex64)
    found = names(lambda: module(x))
    assert "ostinato::gru_forward" in found
    assert "ostinato::layer" not in found


@pytest.mark.cpu("what the compiler makes of it is named on the CPU")
def test_a_profile_of_a_compiled_layer():
    module, x = nn.GRU(4, 8), torch.randn(5, 3, 4)
    compiled = torch.compile(module, backend="aot_eager")
    compiled(x)[0].sum().backward()
    both = {"ostinato::gru_forward", "ostinato::gru_backward"}
    assert both <= names(lambda: compiled(x)[0].sum().backward(), once=both)
