"""The picture of ratios (benchmarks/report.py); figures in our Markdown (tools/check_docs.py)."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "tools")]

import check_docs  # noqa: E402
import report  # noqa: E402

RESULT = "benchmarks/results/amd-epyc-avx512-2-threads.json"


@pytest.fixture
def found():
    return json.loads((ROOT / RESULT).read_text())


def dots(found):
    """Every dot of the picture: its heading, line and layer, and the ratio by peer."""
    return {
        (title, label, layer): by_peer
        for title, lines in report.pictured(found).items()
        for label, layers in lines.items()
        for layer, by_peer in layers.items()
    }


# ---- the picture ----


def test_the_picture_has_the_measured_medians(found):
    rows = {(row["name"], row["shape"]): row["ratios"] for row in found["rows"]}
    shown = dots(found)
    for place, (name, shape), peers in [
        (("Inference, 100 steps", "batch 1, hidden 64", "GRU"),
         ("GRU, inference", "T100 B1 I64 H64"), 3),
        (("Inference, 100 steps", "batch 128, hidden 1024, 50 steps", "LSTM"),
         ("LSTM, inference", "T50 B128 I1024 H1024"), 3),
        (("Training, packed, 1000 steps", "batch 32, hidden 64", "RNN"),
         ("RNN, training, packed", "T1000 B32 I64 H64"), 1),
        (("Training, one step (cells)", "batch 64, hidden 256", "LSTM"),
         ("LSTMCell, training", "B64 I256 H256"), 1),
        # Where we lose.
        (("Inference in bfloat16, 100 steps", "batch 64, hidden 512", "LSTM"),
         ("LSTM, inference in bfloat16", "T100 B64 I512 H512"), 1),
    ]:  # fmt: skip
        medians = {peer: ratios[1] for peer, ratios in rows[name, shape].items()}
        assert shown[place] == medians
        assert len(medians) == peers
    assert shown["Inference in bfloat16, 100 steps", "batch 64, hidden 512", "LSTM"]["torch.nn"] < 1


def test_the_picture_has_all_of_the_grid_and_no_row_twice(found):
    headings = [report.section(row) for row in found["rows"]]
    shown = [row for row, title in zip(found["rows"], headings, strict=True) if title]
    assert len(shown) == len(dots(found))
    grid = [
        row for row in found["rows"]
        if row["sizes"][0] == 100 and row["name"] == f"{row['layer']}, {row['kind']}"
    ]  # fmt: skip
    assert len(grid) == 3 * (7 + 7 + 4)
    assert all(row in shown for row in grid)
    assert not any(row["odd"] or "layers" in row["name"] for row in shown)


def test_all_three_layers_stand_on_each_line(found):
    for lines in report.pictured(found).values():
        assert all(list(layers) == ["GRU", "LSTM", "RNN"] for layers in lines.values())


def test_the_dots_stand_where_the_ratios_are(found):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axis = pyplot.subplots()
    line = report.pictured(found)["Inference, 100 steps"]["batch 8, hidden 128"]
    report.draw_panel(axis, "RNN", [(3.0, line)])
    points = [artist for artist in axis.lines if artist.get_marker() in ("o", "^", "s")]
    assert [float(p.get_xdata()[0]) for p in points] == list(line["RNN"].values())
    heights = [float(p.get_ydata()[0]) for p in points]
    assert sum(heights) == pytest.approx(3 * 3.0)
    assert len(set(heights)) == 3
    pyplot.close(figure)


@pytest.mark.parametrize("rows", ["all", "one layer", "torch.nn alone", "none that is shown"])
def test_what_was_measured_is_written_and_drawn(found, rows, tmp_path):
    pytest.importorskip("matplotlib")
    if rows == "one layer":
        found["rows"] = [row for row in found["rows"] if row["layer"] == "LSTM"]
    elif rows == "torch.nn alone":
        for row in found["rows"]:
            row["ratios"] = {"torch.nn": row["ratios"]["torch.nn"]}
            row["microseconds"] = {
                name: row["microseconds"][name] for name in (report.OURS, "torch.nn")
            }
    elif rows == "none that is shown":
        found["rows"] = [row for row in found["rows"] if row["odd"]]
    report.write(found, tmp_path)
    stem = "amd-epyc-avx512-2-threads"
    picture = tmp_path / f"{stem}-ratios.png"
    if rows == "none that is shown":
        assert not picture.exists()
    else:
        assert picture.stat().st_size > 30_000
    assert json.loads((tmp_path / f"{stem}.json").read_text()) == found


# ---- figures in Markdown ----


def test_the_pages_have_the_measured_figures():
    pages = {name: (ROOT / name).read_text() for name in ("README.md", "docs/performance.md")}
    assert {what for text in pages.values() for what, *_ in check_docs.TABLE.findall(text)} == {
        "ratios",
        "figures",
    }
    for text in pages.values():
        assert check_docs.wrong_figures(text) == []


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_a_changed_figure_is_found(page):
    text = (ROOT / page).read_text()
    what, _, body = check_docs.TABLE.findall(text)[0]
    line = body.strip().splitlines()[3]
    other = re.sub(r"\d+\.\d\d", lambda figure: f"{float(figure[0]) + 0.01:.2f}", line, count=1)
    assert other != line
    assert check_docs.wrong_figures(text.replace(line, other))
    assert check_docs.wrong_figures(text.replace("| GRU", "| GRU2").replace("GRU (", "GRU2 ("))
    if what == "figures":
        assert check_docs.wrong_figures(text.replace(f"{line}\n", ""))
