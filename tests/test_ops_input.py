"""What the operators refuse, by name and before any kernel runs."""

import pytest
import torch

import ostinato.numpy
from ostinato import cpu, fast_path, reference
from support.samples import draw

operators = torch.ops.ostinato


@pytest.fixture
def no_kernel(monkeypatch):
    """Fail where anything is computed."""

    def ran(*_, **__):
        pytest.fail("a kernel ran on arguments that had to be refused")

    def declined(entry):
        def run(*arguments):
            if entry(*arguments) is not None:
                ran()

        return run

    monkeypatch.setattr(cpu._core, "forward", ran)
    monkeypatch.setattr(cpu._core, "backward", ran)
    # These are asked, and are to decline.
    for name in ("tensors_forward", "tensors_backward"):
        monkeypatch.setattr(cpu._core, name, declined(getattr(cpu._core, name)))
    monkeypatch.setattr(reference, "states", ran)


def weight(index, change):
    """A sample whose weight of this index is changed."""

    def changed(sample):
        weights = list(sample.weights)
        weights[index] = change(weights[index])
        return sample._replace(weights=weights)

    return changed


def part(field, change):
    def changed(sample):
        return sample._replace(**{field: change(getattr(sample, field))})

    return changed


def to(value):
    return lambda _: value


def packed(sizes, rows=None):
    """A packed sample with these batch_sizes."""

    def changed(sample):
        sizes_of_steps = torch.tensor(sizes, device="cpu") if isinstance(sizes, list) else sizes
        count = int(sum(sizes)) if rows is None else rows
        return sample._replace(input=torch.randn(count, 2), batch_sizes=sizes_of_steps)

    return changed


def double(t):
    return t.double()


def meta(t):
    return t.to("meta")


# All of an LSTM of T4 B3 I2 H3 in both directions: what is wrong, the error, what it must say.
BAD = {
    "cell": (part("cell", to("elman")), ValueError, "cell: .*'elman'"),
    "input of 2 dimensions": (part("input", lambda t: t[0]), RuntimeError, "input: .*2D"),
    "input of 4 dimensions": (part("input", lambda t: t[None]), RuntimeError, "input: .*4D"),
    "input of no dimension": (part("input", lambda t: t[0, 0, 0]), RuntimeError, "input: .*0D"),
    "input size": (part("input", lambda t: t[..., :1]), RuntimeError, "weight_ih: .*1.*2"),
    "input dtype": (part("input", double), ValueError, "dtype.*float64.*float32"),
    "input None": (part("input", to(None)), TypeError, "input: .*NoneType"),
    "input list": (part("input", to([[[0.0]]])), TypeError, "input: .*list"),
    "integers": (lambda s: s.each(lambda t: t.to(torch.int64)), ValueError, "input: .*int64"),
    "booleans": (lambda s: s.each(lambda t: t > 0), ValueError, "input: .*bool"),
    "input sparse": (part("input", lambda t: t.to_sparse()), RuntimeError, "input: .*sparse"),
    "no weights": (part("weights", to([])), RuntimeError, "weights: .*0"),
    "too few weights": (part("weights", lambda w: w[:-1]), RuntimeError, "weights: .*7"),
    "too many weights": (part("weights", lambda w: w * 2), RuntimeError, "weights: .*16"),
    "one direction's weights": (part("weights", lambda w: w[:4]), RuntimeError, "weights: .*4"),
    "weight_ih rows": (weight(0, lambda t: t[1:]), RuntimeError, "weight_ih: .*11"),
    "weight_ih columns": (weight(0, lambda t: t[:, 1:]), RuntimeError, r"weight_ih: .*\(12, 1\)"),
    "weight_ih 1D": (weight(0, lambda t: t[:, 0]), RuntimeError, r"weight_ih: .*\(12,\)"),
    "weight_ih dtype": (weight(0, double), ValueError, "weight_ih: .*float64"),
    "weight_ih device": (weight(0, meta), RuntimeError, "weight_ih: .*meta"),
    "weight_ih None": (weight(0, to(None)), TypeError, "weights: .*NoneType"),
    "weight_ih sparse": (weight(0, lambda t: t.to_sparse()), RuntimeError, "weight_ih: .*sparse"),
    "weight_hh rows": (weight(1, lambda t: t[1:]), RuntimeError, "weight_hh: .*11"),
    "weight_hh columns": (weight(1, lambda t: t[:, 1:]), RuntimeError, "weight_hh: .*2"),
    "weight_hh empty": (weight(1, lambda t: t[:0]), RuntimeError, "weight_hh: .*0"),
    "weight_hh 1D": (weight(1, lambda t: t[0]), RuntimeError, "weight_hh: .*1D"),
    "weight_hh None": (weight(1, to(None)), TypeError, "weights: .*NoneType"),
    "bias_ih": (weight(2, lambda t: t[1:]), RuntimeError, "bias_ih: .*11"),
    "bias_hh dtype": (weight(3, double), ValueError, "bias_hh: .*float64"),
    "weight_ih_reverse": (weight(4, lambda t: t.t()), RuntimeError, "weight_ih_reverse: "),
    "weight_hh_reverse": (weight(5, lambda t: t.t()), RuntimeError, "weight_hh_reverse: "),
    "bias_hh_reverse": (weight(7, lambda t: t[None]), RuntimeError, "bias_hh_reverse: "),
    "h_0 of one direction": (part("h_0", lambda t: t[:1]), RuntimeError, r"h_0: .*\(1, 3, 3\)"),
    "h_0 batch": (part("h_0", lambda t: t[:, :1]), RuntimeError, r"h_0: .*\(2, 1, 3\)"),
    "h_0 size": (part("h_0", lambda t: t[..., :1]), RuntimeError, r"h_0: .*\(2, 3, 1\)"),
    "h_0 2D": (part("h_0", lambda t: t[0]), RuntimeError, r"h_0: .*\(3, 3\)"),
    "h_0 1D": (part("h_0", lambda t: t[0, 0]), RuntimeError, r"h_0: .*\(3,\)"),
    "h_0 dtype": (part("h_0", double), ValueError, "h_0: .*float64"),
    "h_0 device": (part("h_0", meta), RuntimeError, "h_0: .*meta"),
    "h_0 list": (part("h_0", to([0.0])), TypeError, "h_0: .*list"),
    "c_0 shape": (part("c_0", lambda t: t[:1]), RuntimeError, r"c_0: .*\(1, 3, 3\)"),
    "c_0 dtype": (part("c_0", double), ValueError, "c_0: .*float64"),
    "batch_sizes sum": (packed([3, 2, 1], rows=7), ValueError, "batch_sizes: .*7"),
    "batch_sizes increasing": (packed([1, 2, 3]), ValueError, r"batch_sizes: .*\[1, 2, 3\]"),
    "batch_sizes over the batch": (packed([4, 2]), ValueError, r"batch_sizes: .*3.*\[4, 2\]"),
    "batch_sizes negative": (packed([3, 1, -1]), ValueError, r"batch_sizes: .*-1"),
    # Products and sums past 64 bits must not wrap into something that fits.
    "batch_sizes huge": (
        packed([2**62] * 4 + [6], rows=6),
        ValueError,
        "batch_sizes: .*4611686018427387904",
    ),
    "batch_sizes 0D": (packed(torch.tensor(3), rows=3), RuntimeError, "batch_sizes: .*0D"),
    "batch_sizes 2D": (packed(torch.full((2, 3), 3), rows=18), RuntimeError, "batch_sizes: .*2D"),
    "batch_sizes float": (
        packed(torch.tensor([3.0, 2.0]), rows=5),
        RuntimeError,
        "batch_sizes: .*float32",
    ),
    "batch_sizes int32": (
        packed(torch.tensor([3, 2], dtype=torch.int32), rows=5),
        RuntimeError,
        "batch_sizes: .*int32",
    ),
    "batch_sizes meta": (
        packed(torch.zeros(2, dtype=torch.int64, device="meta"), rows=5),
        RuntimeError,
        "batch_sizes: .*meta",
    ),
    "batch_sizes list": (packed((3, 2), rows=5), TypeError, "batch_sizes: .*tuple"),
    "batch_sizes with 3D input": (
        part("batch_sizes", to(torch.tensor([3, 3]))),
        RuntimeError,
        "input: .*3D",
    ),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_by_name(case, training, no_kernel):
    change, exception, match = BAD[case]
    sample = draw("lstm", bidirectional=True)
    if training:
        sample = sample.training()
    with pytest.raises(exception, match=match):
        change(sample).run()


@pytest.mark.skipif(not cpu.IS_OPEN, reason="this torch has no table of C functions")
@pytest.mark.parametrize("case", BAD)
def test_the_fast_path_declines_what_the_check_refuses(case, no_kernel):
    """C++ asks what the check asks: one table of cases holds both."""
    change, _, _ = BAD[case]
    sample, shape = draw("lstm", bidirectional=True), (2, 3, 0, 2)
    cell, *tensors, weights = change(sample)[:6]
    assert fast_path.run(cell, shape, *tensors, tuple(weights), True) is None


# Cases that are none for NumPy: it takes whole numbers of any kind, and has no such arrays.
NO_NUMPYS = {"batch_sizes list", "batch_sizes int32"}
NO_NUMPYS |= {case for case in BAD if case.endswith(("sparse", "device", "meta"))}
# What torch calls a shape or a form, NumPy's face names as its own: a value, or a type.
NUMPYS = {case: ValueError for case in BAD if case.startswith("input of")}
NUMPYS |= {"batch_sizes with 3D input": ValueError}
NUMPYS |= {f"batch_sizes {form}": TypeError for form in ("0D", "2D", "float")}


@pytest.mark.parametrize("case", [case for case in BAD if case not in NO_NUMPYS])
def test_numpys_face_refuses_what_the_check_refuses(case, no_kernel):
    def as_array(value):
        return value.numpy() if isinstance(value, torch.Tensor) else value

    change, exception, _ = BAD[case]
    cell, *tensors, weights = change(draw("lstm", bidirectional=True))[:6]
    arrays = *map(as_array, tensors), [*map(as_array, weights)]
    with pytest.raises(NUMPYS.get(case, exception), match=r"xpected|must|should|dtype"):
        ostinato.numpy.layer(cell, *arrays, has_biases=True, bidirectional=True)


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in BAD
        # Without states the first of batch_sizes is the batch.
        if case.startswith(("batch_sizes", "h_0", "c_0")) and case != "batch_sizes over the batch"
    ],
)
def test_packed_without_the_other_states(case, no_kernel):
    # The batch is then read from whatever is there, which may be what is wrong.
    change, _, _ = BAD[case]
    sample = draw("lstm", bidirectional=True)
    if case.startswith("batch_sizes"):
        sample = change(sample)._replace(h_0=None, c_0=None)
        names = "batch_sizes|input"
    else:
        state, other = ("h_0", "c_0") if case.startswith("h_0") else ("c_0", "h_0")
        sample = packed([3, 2])(change(sample)._replace(**{other: None}))
        names = f"{state}|batch_sizes"
    with pytest.raises((RuntimeError, TypeError, ValueError), match=f"^({names}): "):
        sample.run()


# What the operators themselves refuse, where they are called past `ops.layer`.
STILL_BAD = [
    case
    for case, (_, exception, _) in BAD.items()
    # The schema refuses other Python types, in torch's words.
    # A tensor without numbers makes the whole call one.
    if exception is not TypeError and not case.endswith(("device", "meta"))
]


@pytest.mark.parametrize("case", STILL_BAD)
def test_the_operator_checks_again(case, no_kernel):
    change, _, _ = BAD[case]
    sample = draw("lstm", bidirectional=True)
    rest = sample.operator_arguments()[9:]
    bad = change(sample)
    arguments = (bad.input, bad.batch_sizes, 3, bad.h_0, bad.c_0, bad.weights, bad.cell)
    with pytest.raises((RuntimeError, ValueError)):
        operators.layer(*arguments, bad.has_biases, bad.bidirectional, *rest)


def test_a_cell_state_is_for_the_lstm(no_kernel):
    sample = draw("gru")._replace(c_0=torch.zeros(1, 3, 3))
    with pytest.raises(RuntimeError, match="c_0: expected None for gru"):
        sample.run()


@pytest.mark.parametrize("batch", [-1, 0, 2, 4, 2**40])
def test_the_operator_holds_batch_against_the_input(batch, no_kernel):
    arguments = list(draw("gru", states="").operator_arguments())
    arguments[2] = batch
    with pytest.raises(RuntimeError, match="batch"):
        operators.layer(*arguments)


def test_projection_belongs_to_the_lstm(no_kernel):
    sample = draw("lstm", projection=2)
    for hr, match in (
        (sample.weights[4].t(), r"weight_hr: .*\(2, 3\).*\(3, 2\)"),
        (sample.weights[4].double(), "weight_hr: .*float64"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=match):
            sample._replace(weights=[*sample.weights[:4], hr]).run()
    gru = draw("gru")
    with pytest.raises(RuntimeError, match=r"weights: .*5"):
        gru._replace(weights=[*gru.weights, torch.zeros(3, 3)]).run()


@pytest.mark.parametrize("case", ["cell", "weight_hh rows", "h_0 batch", "weight_ih device"])
def test_shapes_without_numbers_are_checked_too(case):
    change, exception, match = BAD[case]
    sample = draw("lstm", bidirectional=True).each(meta)
    bad = change(sample)
    if case == "weight_ih device":
        bad = weight(0, torch.empty_like)(bad)
        bad = weight(0, lambda t: torch.empty(t.shape, device="cpu"))(bad)
        match = "weight_ih: .*cpu"
    with pytest.raises(exception, match=match):
        bad.run()


# ---- backward ----


def backward_arguments():
    sample = draw("gru", bidirectional=True)
    *call, _, _ = sample.operator_arguments()
    output, h_n, _, _, reserve = operators.layer(*call, False, True)
    names = ("grad_output", "grad_h_n", "grad_c_n", "grad_cells", "output", "reserve", "wanted")
    wanted = [True, True, *[False] * 3, *[True] * len(sample.weights)]
    values = (torch.ones_like(output), torch.ones_like(h_n), None, None, output, reserve, wanted)
    return dict(zip(names, values, strict=True)), call


BAD_BACKWARD = {
    "grad_output": [lambda t: t[:-1], double],
    "grad_h_n": [lambda t: t[:1], double],
    "output": [lambda t: t[..., :-1], double],
    "reserve": [lambda t: t[:-1], lambda t: t[:0], lambda t: t.float(), lambda t: t.repeat(2)[::2]],
    "wanted": [lambda w: w[:-1], lambda w: [*w, True], lambda w: []],
}


@pytest.mark.parametrize(
    ("name", "index"), [(name, i) for name, many in BAD_BACKWARD.items() for i in range(len(many))]
)
def test_backward_refuses_by_name(name, index, monkeypatch):
    arguments, call = backward_arguments()
    monkeypatch.setattr(
        cpu._core, "backward", lambda *_: pytest.fail("the kernel ran on bad arguments")
    )
    arguments[name] = BAD_BACKWARD[name][index](arguments[name])
    with pytest.raises((RuntimeError, ValueError), match=f"{name}: "):
        operators.layer_backward(*arguments.values(), *call)
