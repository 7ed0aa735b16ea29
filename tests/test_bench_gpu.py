"""The GPU's benchmark (benchmarks/gpu*.py, micro.*), as far as no GPU is needed for it."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_cases  # noqa: E402
import gpu_report  # noqa: E402
import gpu_row  # noqa: E402
import micro  # noqa: E402
from gpu_cases import GpuCase, chosen, ordered, tier, within  # noqa: E402

SMALL = {"steps": 5, "batch": 3, "hidden": 4}


@pytest.fixture(autouse=True)
def tf32_setting():
    """Leave torch's switches as they were."""
    # torch's own test tools, which other files here import, forbid to turn them outside of this.
    with torch.backends.__allow_nonbracketed_mutation():
        yield
        gpu_row.allow_tf32(True)


# ---- cases ----


def test_the_list_is_the_whole_product_once_and_a_few_short_rows():
    names = [case.name for case in ordered()]
    assert len(names) == len(set(names))
    axes = (3, len(gpu_cases.HIDDEN), len(gpu_cases.BATCH), 4, 2, 4)
    size = 1
    for axis in axes:
        size *= axis
    assert len(names) == size + sum(case.steps == gpu_cases.SHORT for case in ordered())


def test_what_the_goals_ask_comes_first():
    cases = ordered()
    assert [tier(case) for case in cases] == sorted(tier(case) for case in cases)
    first = [case for case in cases if tier(case) == 0]
    assert all(case.form == "padded" for case in first)
    for wanted in itertools.product(
        ("GRU", "LSTM"), (1, 16, 64), gpu_cases.HIDDEN, (False, True), ("bf16",)
    ):
        cell, batch, hidden, train, precision = wanted
        assert GpuCase(cell, precision, train, "padded", batch, hidden) in first
    # Every goal has rows among the first tiers.
    early = [case.sizes() for case in cases if tier(case) <= 2]
    for goal in gpu_report.GOALS:
        assert any(goal.holds(row) for row in early), goal.name


def test_forms_before_precisions_before_the_rest():
    places = {tier(case): place for place, case in enumerate(ordered())}
    assert places[2] < places[3] < places[4] < places[5]
    assert {case.form for case in ordered() if tier(case) == 2} == set(gpu_cases.FORMS[1:])
    assert {case.precision for case in ordered() if tier(case) == 3} == {"fp16", "tf32", "fp32"}


def test_quick_is_a_few_dozen_rows_of_all_kinds():
    quick = chosen(True, [])
    assert 24 <= len(quick) <= 48
    assert {case.form for case in quick} == set(gpu_cases.FORMS)
    assert {case.train for case in quick} == {False, True}


def test_filters_are_words_commas_and_alternatives():
    found = chosen(False, ["GRU bf16 padded forward H256,H512 B1"])
    assert {case.hidden for case in found} == {256, 512}
    assert {(case.cell, case.batch, case.train) for case in found} == {("GRU", 1, False)}
    both = chosen(False, ["RNN H64 B1 packed", "LSTM H64 B1 packed"])
    assert {case.cell for case in both} == {"RNN", "LSTM"}
    # B1 is not B16.
    assert not any(case.batch == 16 for case in found)
    with pytest.raises(ValueError, match="got 'gru'"):
        chosen(False, ["gru"])


def test_rows_that_were_measured_before_are_left_out():
    first, second = ordered()[:2]
    assert chosen(False, [], [first.name])[0] == second


def test_packed_lengths_are_the_cpu_s():
    case = GpuCase("GRU", "bf16", False, "packed", 4, 64, steps=100)
    assert case.lengths() == [100, 74, 49, 24]
    assert GpuCase("GRU", "bf16", False, "padded", 2, 64, steps=9).lengths() == [9, 9]


# ---- budget ----


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_the_budget_ends_before_a_row_and_never_inside_one():
    clock = Clock()
    begun = []
    for case in within(ordered(), 10, clock, clock.now):
        begun.append(case)
        clock.now += 3
    assert begun == ordered()[:4]
    assert list(within(ordered(), 0, clock, clock.now)) == []


def fake_row(case, **more):
    return case.sizes() | {"relative_error": {}, "failed": {}} | more


def test_a_run_says_how_many_rows_remain(capsys):
    clock, rows, saved = Clock(), [{"earlier": True}], []
    cases = ordered()[:50]

    def run(case):
        clock.now += 1
        return fake_row(case)

    stopped = gpu.sweep(
        cases, rows, 30, clock.now, run, clock=clock, save=lambda: saved.append(len(rows))
    )
    assert stopped == "the budget of 30 s is spent; 20 of 50 rows remain"
    assert len(rows) == 31
    # A run that is ended from outside leaves what it has.
    assert saved == [20]
    assert cases[29].name in capsys.readouterr().out
    assert gpu.sweep(cases[:2], [], 30, clock.now, run, clock=clock) == ""


def test_a_failure_does_not_end_a_run_but_a_lost_gpu_does():
    rows, saved = [], []
    states = iter([True, False])
    stopped = gpu.sweep(
        ordered()[:5],
        rows,
        1e9,
        0,
        lambda case: fake_row(case, failed={"ostinato": "RuntimeError: misaligned address"}),
        alive=lambda: next(states),
        save=lambda: saved.append(len(rows)),
    )
    assert stopped == f"the GPU was lost at {ordered()[1].name}; 3 of 5 rows remain"
    assert len(rows) == 2
    assert saved == [2]


# ---- a row ----


def sampler(seconds):
    """A timer that calls, and tells torch.nn's and our seconds in turn."""
    turn = itertools.cycle(seconds)

    def sample(call, calls):
        call()
        return next(turn)

    return sample


def test_participants_are_timed_in_turns_after_a_warm_up():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    samples = gpu_row.turns(calls, sampler([1.0]), 0)
    assert {name: len(values) for name, values in samples.items()} == {"a": 7, "b": 7}
    # Once each, three times each to learn how long one takes, then turns.
    assert "".join(order) == "ab" + "aaabbb" + "ab" * 7


@pytest.mark.parametrize("precision", gpu_cases.PRECISIONS)
@pytest.mark.parametrize("form", gpu_cases.FORMS)
@pytest.mark.parametrize("train", [False, True])
def test_a_row_holds_times_ratio_and_errors_of_both(precision, form, train):
    case = GpuCase("GRU", precision, train, form, **SMALL)
    row = gpu_row.measure(case, sampler([1.0]), device="cpu", seconds=0)
    assert row["failed"] == {}
    assert row["ratio"] == [1.0, 1.0, 1.0]
    assert row["microseconds"]["torch.nn"] == [1e6, 1e6, 1e6]
    assert row["us_per_step"] == {"torch.nn": 2e5, "ostinato": 2e5}
    kinds = {"output", "gradients"} if train else {"output"}
    for errors in row["relative_error"].values():
        assert errors.keys() == kinds
        assert all(0 < error < 2e-2 for error in errors.values())
    json.dumps(row)


@pytest.mark.parametrize("cell", ["RNN", "LSTM"])
def test_the_ratio_is_torch_nn_over_ours(cell):
    case = GpuCase(cell, "fp32", False, "padded", **SMALL)
    # The first call of both and three of each come before the rounds.
    sample = sampler([1.0] * 8 + [3.0, 1.0] * 7)
    assert gpu_row.measure(case, sample, device="cpu", seconds=0)["ratio"] == [3.0, 3.0, 3.0]


def test_by_default_nothing_is_forced(monkeypatch):
    from ostinato.cuda import choice

    monkeypatch.setattr(choice, "forced", None)
    case = GpuCase("GRU", "fp32", False, "padded", **SMALL)
    row = gpu_row.measure(case, sampler([1.0]), device="cpu", default=True)
    assert not row["failed"]
    assert "ostinato" in row["microseconds"]
    with pytest.raises(TypeError, match="NoneType"):
        gpu_row.measure(case, sampler([1.0]), device="cpu")


def test_torch_nn_alone_does_not_load_ours():
    case = GpuCase("GRU", "bf16", True, "padded", **SMALL)
    row = gpu_row.measure(case, sampler([1.0]), device="cpu", peer_only=True)
    assert row["us_per_step"].keys() == {"torch.nn"}
    assert "ratio" not in row


def test_ours_is_not_timed_with_wrong_numbers(monkeypatch):
    from ostinato import nn

    class Wrong(nn.GRU):
        def forward(self, *args):
            output, h_n = super().forward(*args)
            return output * 1.1, h_n

    monkeypatch.setattr(nn, "GRU", Wrong)
    case = GpuCase("GRU", "bf16", False, "padded", **SMALL)
    row = gpu_row.measure(case, sampler([1.0]), device="cpu")
    assert "expected relative errors up to" in row["failed"]["ostinato"]
    assert row["relative_error"]["ostinato"]["output"] == pytest.approx(0.1, rel=0.1)
    assert row["us_per_step"].keys() == {"torch.nn"}


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory"), RuntimeError("not served\nlong story")]
)
def test_a_failure_of_one_is_an_entry_and_the_other_is_timed(monkeypatch, error):
    from ostinato import nn

    def fail(self, *args):
        raise error

    monkeypatch.setattr(nn.GRU, "forward", fail)
    case = GpuCase("GRU", "fp32", False, "padded", **SMALL)
    row = gpu_row.measure(case, sampler([1.0]), device="cpu")
    expected = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    assert row["failed"] == {"ostinato": expected}
    assert row["us_per_step"].keys() == {"torch.nn"}


def test_results_that_are_not_finite_are_wrong_of_whomever():
    one = torch.ones(2, dtype=torch.float64)
    assert gpu_row.relative_errors([one * float("nan"), one], [one, one]) == [float("inf"), 0.0]
    case, row = (
        GpuCase("GRU", "bf16", False, "padded", **SMALL),
        {"relative_error": {}, "failed": {}},
    )
    calls = {"torch.nn": lambda: [one * float("nan")], "ostinato": lambda: [one * 1.001]}
    gpu_row.compare_numbers(case, row, calls, lambda: [one])
    assert set(row["failed"]) == {"torch.nn"}
    assert set(calls) == {"ostinato"}


def test_the_library_is_asked_which_kernel_ran(monkeypatch):
    from ostinato import cuda

    monkeypatch.setattr(cuda, "explain", lambda layer, x: f"one of {x.shape[0]}", raising=False)
    case = GpuCase("GRU", "fp32", False, "padded", **SMALL)
    assert gpu_row.measure(case, sampler([1.0]), device="cpu")["kernel"] == "one of 5"


def test_both_settings_of_tf32_agree():
    cudnn = torch.backends.cudnn
    for allowed, name in ((False, "ieee"), (True, "tf32")):
        api = gpu_row.allow_tf32(allowed)
        # Reading this raises if the settings contradict each other.
        assert cudnn.allow_tf32 is allowed
        if api == "rnn.fp32_precision":
            assert cudnn.rnn.fp32_precision == name


# ---- report ----


def synthetic(ratio=4.2):
    """A run with every row of the first tiers."""
    rows = []
    for case in ordered():
        if tier(case) > 3:
            break
        theirs = 4.0 * (2 if case.train else 1)
        ours = theirs / ratio
        times = {"torch.nn": theirs, "ostinato": ours}
        rows.append(
            fake_row(
                case,
                us_per_step=times,
                microseconds={name: [t * case.steps] * 3 for name, t in times.items()},
                ratio=[ratio] * 3,
                relative_error={name: {"output": 1e-3} for name in times},
            )
        )
    return {
        "device": "Some GPU 9000",
        "capability": "9.0",
        "multiprocessors": 132,
        "driver": "1.2",
        "versions": {"torch": "2"},
        "clocks": {"before": {"clocks.sm": "1980 MHz"}, "after": {}},
        "part": {"quick": False, "only": [], "peer_only": False},
        "micro": {"barrier of a block": {"cycles": 30.0, "ns": 15.2}, "left out": "clusters"},
        "rows": rows,
    }


def test_goals_are_told_and_whether_they_are_met():
    goals = {goal["name"]: goal for goal in gpu_report.goals(synthetic(4.2))}
    assert [goal["met"] for goal in goals.values()] == [True, False, True, False, True]
    core = goals["GRU and LSTM, bf16, H 256-768, B <= 64, padded"]
    assert core["forward"] == pytest.approx(4.2)
    # 2 cells, 3 sizes, 3 batches, forward and training; B 8 comes later.
    assert core["rows"] == 36
    assert all(goal["met"] is None for goal in gpu_report.goals({"rows": []}))


def test_training_is_to_gain_six_tenths_of_what_forward_gains():
    for ratio, met in ((2.6, True), (2.5, False)):
        found = synthetic(4.2)
        for row in found["rows"]:
            if row["kind"] == "training":
                row["ratio"] = [ratio] * 3
        goals = {goal["target"]: goal for goal in gpu_report.goals(found)}
        assert goals[4]["met"] is met


def test_floors_are_those_of_a_tile_that_holds_the_batch():
    def of(*arguments):
        return gpu_report.floor(GpuCase(*arguments).sizes())

    assert of("GRU", "bf16", False, "padded", 1, 256) == 0.45
    assert of("GRU", "bf16", False, "padded", 64, 2048) == 4.7
    assert of("GRU", "bf16", False, "padded", 64, 768) is None
    assert of("GRU", "bf16", False, "padded", 256, 64) is None
    assert of("LSTM", "bf16", False, "padded", 1, 256) is None
    assert of("GRU", "bf16", True, "padded", 1, 256) is None


def test_a_row_below_1_and_a_failed_one_are_named():
    found = synthetic()
    assert "| nothing below 1 |" in gpu_report.summary(found)
    assert "| 0 below, 0 failed | | yes |" in gpu_report.summary(found)
    found["rows"][7]["ratio"] = [0.8, 0.9, 1.0]
    found["rows"][8] = fake_row(ordered()[8], failed={"ostinato": "RuntimeError: no | memory"})
    told = gpu_report.summary(found)
    assert "| 1 below, 1 failed | | no |" in told
    assert f"- below 1: {found['rows'][7]['name']}: 0.90" in told
    assert f"- failed: {found['rows'][8]['name']}: ostinato: RuntimeError" in told
    # A bar would end the cell.
    assert "no / memory" in gpu_report.table(found)


def test_what_is_written_is_read_again(tmp_path):
    found = synthetic()
    gpu_report.write_json(found, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-some-gpu-9000.json"]
    assert json.loads((tmp_path / "gpu-some-gpu-9000.json").read_text()) == found
    found["part"] = {"quick": True, "only": [], "peer_only": True}
    assert gpu_report.stem(found) == "gpu-some-gpu-9000-torch-nn-alone-quick"


def test_the_library_chooses_by_the_rows_of_a_run(tmp_path):
    from ostinato.cuda import choice

    def row(batch, ratio=None, graph=None, **changes):
        case = GpuCase("GRU", "bf16", False, "padded", batch, 256)
        found = case.sizes() | {"failed": {}}
        if ratio is not None:
            found["ratio"] = [ratio, ratio + 1, ratio + 2]
        if graph is not None:
            found["graph"] = {"ratio": [graph, graph + 1, graph + 2]}
        return found | changes

    errors = {gpu_report.PEER: {"output": 1e-3}, gpu_report.OURS: {"output": 1.2e-3}}
    rows = [
        row(1, 2.5, 1.5),
        row(1, 1.2, 2.0, steps=gpu_cases.SHORT),
        row(16, 0.9),
        row(32, 3.0),  # by the host alone, perhaps
        row(64, failed={gpu_report.OURS: "wrong numbers"}),
        row(8, failed={gpu_report.PEER: "out of memory"}),
        row(256, 3.0, 3.0, form="2-layer"),
        row(128, 1.3, 0.9),
        row(256, 3.0, 2.0, relative_error=errors),
        row(1, 3.0, 1.5, form="packed"),
        row(16, 0.7, 1.0, form="packed"),
    ]
    path = tmp_path / "measured.json"
    path.write_text('{"another": []}')
    gpu_report.choose({"device": "this", "rows": rows}, path)
    found = json.loads(path.read_text())
    assert found["another"] == []
    assert [(r["form"], r["batch"], r["ratio"]) for r in found["this"]] == [
        ("padded", 1, 1.2),
        ("padded", 16, 0.9),
        ("padded", 64, 0.0),
        ("padded", 128, 0.9),
        ("padded", 256, 0.0),
        ("packed", 16, 0.7),
    ]
    question = choice.Question("gru", "bf16", 256, 1, "padded", False)
    assert choice.answer(found["this"], question)[0]
    assert not choice.answer(found["this"], question._replace(batch=16))[0]
    assert not choice.answer(found["this"], question._replace(batch=64))[0]


def test_what_ships_follows_from_the_rows_that_ship():
    """No measured row below 1, as calls or as graphs, is chosen, and nearly all clearly above."""
    from ostinato.cuda import choice

    known = choice._measured()
    sources = [
        json.loads(path.read_text()) for path in sorted(gpu_report.RESULTS.glob("gpu-*.json"))
    ]
    assert known == {found["device"]: gpu_report.measured(found) for found in sources}
    for row in (row for found in sources for row in found["rows"]):
        asked = (gpu_report.MODES[row["cell"]], row["precision"], row["hidden"], row["batch"])
        question = choice.Question(*asked, row["form"], row["kind"] == "training")
        ours = choice.answer(known[sources[0]["device"]], question).is_ours
        call, graph = (part.get("ratio", [0, 0, 0])[1] for part in (row, row.get("graph", {})))
        if min(call, graph) < 1:  # a graph that was not captured is none that was faster
            assert not ours, row["name"]
        elif min(call, graph) > 1.1 and row["form"] != "packed":
            assert ours, row["name"]


def test_tables_and_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    found = synthetic()
    found["rows"] = [row for row in found["rows"] if row["batch"] == 16]
    # Without ours, as --peer-only leaves it.
    for row in found["rows"][::5]:
        del row["ratio"], row["us_per_step"]["ostinato"], row["microseconds"]["ostinato"]
    gpu_report.write(found, tmp_path)
    text = (tmp_path / "gpu-some-gpu-9000.md").read_text()
    assert all(row["name"] in text for row in found["rows"])
    assert "| barrier of a block | cycles: 30, ns: 15.2 |" in text
    for name in ("gpu-some-gpu-9000.png", "gpu-some-gpu-9000-forms.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    assert not gpu_report.draw(found, tmp_path / "none.png", "fp16", ("packed",))


# ---- micro-figures ----


@pytest.mark.parametrize("arch", ["sm_90a", "sm_80"])
def test_the_micro_kernels_compile(arch):
    pytest.importorskip("cuda.core", reason="NVRTC comes with cuda.core and nvidia-cuda-nvrtc")
    code = micro.compile_kernels(arch).code
    names = [b"flag_relaxed", b"grid_barrier", b"grid_words", b"block_barrier", b"nothing"]
    clusters = [b"push_pingpong", b"push_exchange", b"cluster_barrier"]
    assert all(name in code for name in names)
    assert all((name in code) == (arch == "sm_90a") for name in clusters)


def test_the_target_of_a_device():
    assert micro.architecture((8, 0)) == "sm_80"
    assert micro.architecture((9, 0)) == "sm_90a"
    assert micro.architecture((12, 0)) == "sm_120a"


class FakeBench:
    """Takes what the kernels would be launched with."""

    blocks = 6

    def __init__(self, clusters):
        self.clusters = clusters
        self.asked = []

    def cost(self, name, *, expected, handoffs=1, extra=(), **options):
        self.asked.append((name, options))
        # 2 cycles for each KiB.
        return {"cycles": options.get("shmem_size", 0) / 512, "ns": 1.0}


@pytest.mark.parametrize("clusters", [False, True])
def test_every_kernel_is_asked_for_once_it_is_there(clusters):
    bench = FakeBench(clusters)
    figures = micro.figures(bench)
    assert figures.pop("kernel and graph launch")
    found = {name: figure() for name, figure in figures.items()}
    kernels = {name for name, _ in bench.asked}
    there = {"block_barrier", "grid_barrier", "grid_words"}
    there |= {"flag_relaxed", "flag_volatile", "flag_ordered"}
    there |= {"cluster_barrier", "push_pingpong", "push_exchange"} if clusters else set()
    assert kernels == there
    # Whoever waits for another block outside a cluster must be sure that it runs.
    for name, options in bench.asked:
        if name.startswith(("grid", "flag")):
            assert options["is_cooperative"]
    if clusters:
        # Two buffers, of which a round sends one.
        assert found["exchange in a cluster of 4"]["bytes_per_cycle_sent"] == pytest.approx(256)


def in_python(code):
    return micro.in_a_process(60, (sys.executable, "-c", code))


def test_micro_figures_that_hang_or_fail_cost_only_themselves():
    begin = "import json, time; print(json.dumps({'a': 1}), flush=True)\n"
    assert in_python(begin) == {"a": 1}
    assert in_python(begin + "raise RuntimeError('lost')") == {
        "a": 1,
        "left out": "what follows: RuntimeError: lost",
    }
    found = micro.in_a_process(5, (sys.executable, "-c", begin + "time.sleep(60)"))
    assert found == {"a": 1, "left out": "what follows: not done after 5 s"}


# ---- the script ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    ended = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/gpu.py")], capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("no GPU: ")
    assert ended.stdout == ""


def test_it_lists_its_rows(capsys, tmp_path):
    earlier = tmp_path / "earlier.json"
    first, second = (case.name for case in ordered()[:2])
    rows = [fake_row(ordered()[0]), fake_row(ordered()[1], failed={"row": "once"})]
    earlier.write_text(json.dumps({"rows": rows}))
    assert gpu.main(["--list", "--continue", str(earlier)]) == 0
    listed = capsys.readouterr().out.splitlines()
    # What failed is tried again.
    assert first not in listed
    assert listed[0] == second


class FakeProperties:
    name, major, minor = "Fake GPU", 9, 0
    multi_processor_count, total_memory, uuid = 132, 2**37, "none"


def test_a_run_from_its_start_to_its_files(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: FakeProperties)
    # A torch with CUDA would look at the devices that it is told are there.
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    monkeypatch.setattr(gpu.micro, "in_a_process", lambda: {"left out": "all: no GPU"})
    small = [GpuCase("GRU", "bf16", train, "padded", 2, 4, steps=20) for train in (False, True)]
    monkeypatch.setattr(gpu, "chosen", lambda *arguments: small)

    def measure(case, **options):
        return gpu_row.measure(case, sampler([1.0]), device="cpu", **options)

    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(gpu_report, "draw", lambda *arguments: True)
    assert gpu.main(["--quick", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu-fake-gpu-quick.json").read_text())
    assert [row["name"] for row in found["rows"]] == [case.name for case in small]
    assert {"device", "driver", "versions", "clocks", "seconds", "micro"} <= found.keys()
    assert {"torch", "cuDNN", "ostinato"} <= found["versions"].keys()
    told = capsys.readouterr().out
    assert "every row was measured" in told
    assert "| GRU bf16 padded forward (1) | 1.00 | 1.00 | T20 B2 H4 |" in told
    # Nothing is left when the budget is nothing.
    assert gpu.main(["--peer-only", "--budget-seconds", "0", "--out", str(tmp_path)]) == 0
    assert "the budget of 0 s is spent; 2 of 2 rows remain" in capsys.readouterr().out
