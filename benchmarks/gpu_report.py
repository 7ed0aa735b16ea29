"""From rows of gpu.py to the goals, a table and pictures.

Usage: python benchmarks/gpu_report.py FILE.json DIR    draws a report again
       python benchmarks/gpu_report.py FILE.json --choose    lets the library choose by these rows
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import geometric_mean

PEER, OURS = "torch.nn", "ostinato"
Row = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """What a group of rows is meant to reach: a median of torch.nn / ours."""

    name: str
    target: float
    holds: Callable[[Row], bool]


# Training is to gain at least this part of what forward gains.
TRAINING = 0.6
GOALS = (
    Goal(
        "H <= 128, B <= 64, padded",
        2,
        lambda row: row["hidden"] <= 128 and row["batch"] <= 64 and row["form"] == "padded",
    ),
    Goal(
        "H 129-192, B >= 16, padded",
        5,
        lambda row: 129 <= row["hidden"] <= 192 and row["batch"] >= 16 and row["form"] == "padded",
    ),
    Goal(
        "GRU and LSTM, bf16, H 256-768, B <= 64, padded",
        4,
        lambda row: (
            row["cell"] != "RNN"
            and row["precision"] == "bf16"
            and 256 <= row["hidden"] <= 768
            and row["batch"] <= 64
            and row["form"] == "padded"
        ),
    ),
    Goal("packed, bidirectional and two layers", 5, lambda row: row["form"] != "padded"),
    Goal(
        "H 1024-2048, B <= 32, padded",
        2,
        lambda row: row["hidden"] >= 1024 and row["batch"] <= 32 and row["form"] == "padded",
    ),
)

# Estimated microseconds of a GRU's forward step in bf16 on an H200, for 8, 16, 32 and 64 rows to a
# tile: matrix instructions, gates and one handoff, from figures that others measured.
FLOORS = {
    64: (0.15, 0.16, 0.21, 0.31),
    128: (0.21, 0.31, 0.50, 0.89),
    256: (0.45, 0.6, 0.9, 1.5),
    512: (0.62, 0.85, 1.4, 2.6),
    768: (0.77, 1.3, 2.3),
    1024: (0.8, 1.0, 1.5, 2.4),
    2048: (1.05, 1.6, 2.6, 4.7),
}


def floor(row: Row) -> float | None:
    """The estimated floor of a row, where there is one."""
    kind = (row["cell"], row["precision"], row["kind"], row["form"])
    if kind != ("GRU", "bf16", "forward", "padded"):
        return None
    tiles = zip((8, 16, 32, 64), FLOORS.get(row["hidden"], ()), strict=False)
    return next((time for rows, time in tiles if row["batch"] <= rows), None)


def usual(found: dict[str, Any]) -> list[Row]:
    """Rows of the usual length that have a ratio; those of few steps stand for launches."""
    return [row for row in found["rows"] if "ratio" in row and row["steps"] > 16]


def _mean(rows: list[Row]) -> float | None:
    return geometric_mean(row["ratio"][1] for row in rows) if rows else None


def _cell(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _median(rows: list[Row]) -> float | None:
    return statistics.median(row["ratio"][1] for row in rows) if rows else None


def goals(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Median of each goal's rows, forward and training, and whether they reach it."""
    reached = []
    for goal in GOALS:
        rows = [row for row in usual(found) if goal.holds(row)]
        medians = {
            kind: _median([row for row in rows if row["kind"] == kind])
            for kind in ("forward", "training")
        }
        forward, training = medians["forward"], medians["training"]
        met = None
        if forward is not None:
            met = forward >= goal.target and (training is None or training >= TRAINING * forward)
        reached.append({"name": goal.name, "target": goal.target, "rows": len(rows), "met": met})
        reached[-1] |= medians
    return reached


def summary(found: dict[str, Any]) -> str:
    """The goals, the geometric mean of each group, and where ours is slower or wrong; Markdown."""
    lines = [
        "| torch.nn / ours, median | rows | goal | forward | training | met |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for goal in goals(found):
        met = {True: "yes", False: "no", None: "not measured"}[goal["met"]]
        lines.append(
            f"| {goal['name']} | {goal['rows']} | {goal['target']:g} | {_cell(goal['forward'])} | "
            f"{_cell(goal['training'])} | {met} |"
        )
    timed = [row for row in found["rows"] if "ratio" in row]
    below = sorted((row for row in timed if row["ratio"][1] < 1), key=lambda row: row["ratio"][1])
    # Where only torch.nn has a time, ours failed or was wrong.
    failed = [row for row in found["rows"] if OURS in row["failed"]]
    met = ("no" if below or failed else "yes") if timed or failed else "not measured"
    told = f"{len(below)} below, {len(failed)} failed"
    lines.append(f"| nothing below 1 | {len(timed) + len(failed)} | 1 | {told} | | {met} |")
    lines += ["", *group_table(found), ""]
    lines += [f"- below 1: {row['name']}: {row['ratio'][1]:.2f}" for row in below[:12]]
    lines += [f"- and {len(below) - 12} more" for _ in range(len(below) > 12)]
    for row in found["rows"]:
        lines += [f"- failed: {row['name']}: {who}: {why}" for who, why in row["failed"].items()]
    return "\n".join(lines) + "\n"


def group_table(found: dict[str, Any]) -> list[str]:
    """Geometric mean and lowest row by cell, precision, form and kind."""
    groups: dict[str, list[Row]] = {}
    for row in usual(found):
        name = f"{row['cell']} {row['precision']} {row['form']} {row['kind']}"
        groups.setdefault(name, []).append(row)
    if not groups:
        return []
    lines = ["| rows | geometric mean | lowest | where |", "|---|---:|---:|---|"]
    for name, rows in groups.items():
        lowest = min(rows, key=lambda row: row["ratio"][1])
        where = f"T{lowest['steps']} B{lowest['batch']} H{lowest['hidden']}"
        lines.append(
            f"| {name} ({len(rows)}) | {_cell(_mean(rows))} | {lowest['ratio'][1]:.2f} | {where} |"
        )
    return lines


def heading(found: dict[str, Any]) -> str:
    """Device, driver, versions and clocks in a line."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    clocks = " and ".join(
        f"{told['clocks.sm']} {when}" for when, told in found["clocks"].items() if told
    )
    return (
        f"{found['device']} (compute capability {found['capability']}, "
        f"{found['multiprocessors']} multiprocessors), driver {found['driver']}; {versions}"
        + (f". Clock {clocks}" if clocks else "")
        + "."
    )


def line(row: Row) -> str:
    """What is printed of a row while measuring, after its name."""
    words = [f"{name} {us:.3f}" for name, us in row.get("us_per_step", {}).items()]
    told = f"us/step: {'  '.join(words)}" if words else ""
    if "ratio" in row:
        low, median, high = row["ratio"]
        told += f"  x {median:.2f} ({low:.2f}-{high:.2f})"
    if "ratio" in row.get("graph", {}):
        told += f"  graph x {row['graph']['ratio'][1]:.2f}"
    failed = "; ".join(f"{who} failed: {why}" for who, why in row["failed"].items())
    return "  ".join(part for part in (told, row.get("kernel", ""), failed) if part)


def table(found: dict[str, Any]) -> str:
    """Every row, in Markdown."""
    lines = [
        heading(found),
        "",
        "Microseconds of a call / T, medians; torch.nn / ours with its quartiles; relative errors "
        "against float64, torch.nn and ours, of the output or the worst gradient. The floor is an "
        "estimate for an H200.",
        "",
        "| row | torch.nn | ours | floor | torch.nn / ours | as graphs: torch.nn, ours | errors | "
        "kernel |",
        "|---|---:|---:|---:|---:|---:|---|---|",
    ]
    for row in found["rows"]:
        times = [_cell(row.get("us_per_step", {}).get(name), 3) for name in (PEER, OURS)]
        low, median, high = row.get("ratio", (None,) * 3)
        ratio = "" if median is None else f"{median:.2f} ({low:.2f}-{high:.2f})"
        graph = row.get("graph", {}).get("us_per_step", {})
        graphs = ", ".join(f"{graph[name]:.3f}" for name in (PEER, OURS) if name in graph)
        errors = ", ".join(f"{max(e.values()):.1e}" for e in row["relative_error"].values())
        # A bar would end the cell.
        notes = [row.get("kernel", ""), *(f"{who}: {why}" for who, why in row["failed"].items())]
        note = "; ".join(filter(None, notes)).replace("|", "/")
        cells = [row["name"], *times, _cell(floor(row)), ratio, graphs, errors, note]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def micro_table(found: dict[str, Any]) -> str:
    """What a handoff and a launch cost, in Markdown."""
    lines = ["| what | figures |", "|---|---|"]
    for name, figures in found["micro"].items():
        lines.append(f"| {name} | {_told(figures)} |")
    return "\n".join(lines) + "\n" if found["micro"] else ""


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')}: {_told(v)}" for name, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- pictures ----

COLORS = {PEER: "#c96f1f", OURS: "#1f5fa8"}


def draw(found: dict[str, Any], path: Path, precision: str, forms: tuple[str, ...]) -> bool:
    """Draw microseconds per step against H: a row for each cell and form, a column for each B.

    Returns:
        Whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [
        row
        for row in found["rows"]
        if row["precision"] == precision and row["form"] in forms and row["steps"] > 16
    ]
    rows = [row for row in rows if "us_per_step" in row]
    if not rows:
        return False
    names = list(dict.fromkeys((row["cell"], row["form"]) for row in rows))
    names.sort(key=lambda name: (("GRU", "LSTM", "RNN").index(name[0]), forms.index(name[1])))
    batches = sorted({row["batch"] for row in rows})
    sizes = sorted({row["hidden"] for row in rows})
    figure, axes = plt.subplots(
        len(names),
        len(batches),
        figsize=(1.2 + 2.7 * len(batches), 1.1 + 2.3 * len(names)),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for line_of_axes, (cell, form) in zip(axes, names, strict=True):
        for axis, batch in zip(line_of_axes, batches, strict=True):
            panel = [r for r in rows if (r["cell"], r["form"], r["batch"]) == (cell, form, batch)]
            draw_panel(axis, panel)
            # Every other size is named: they are close together.
            axis.set_xscale("log", base=2)
            axis.set_xticks(
                sizes, [str(s) if s in (64, 128, 256, 512, 1024, 2048) else "" for s in sizes]
            )
            axis.minorticks_off()
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
            axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
            axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
            axis.tick_params(labelsize=7)
        line_of_axes[0].set_ylabel(f"{cell}, {form}\nmicroseconds per step", fontsize=8)
    for axis, batch in zip(axes[0], batches, strict=True):
        axis.set_title(f"B = {batch}", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("H", fontsize=8)
    handles = [
        plt.Line2D([], [], color=color, linestyle=style, marker="o", markersize=3.5, label=label)
        for name, color in COLORS.items()
        for style, label in (("-", f"{name}, forward"), ("--", f"{name}, forward and backward"))
        if any(name in row["us_per_step"] for row in rows)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(f"{found['device']}, {precision}: time of a call / T", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def draw_panel(axis: Any, rows: list[Row]) -> None:
    """One cell, form and batch: both participants, forward and training, with quartiles."""
    for name, color in COLORS.items():
        for kind, style in (("forward", "-"), ("training", "--")):
            of = [row for row in rows if row["kind"] == kind and name in row["us_per_step"]]
            of.sort(key=lambda row: row["hidden"])
            if not of:
                continue
            sizes = [row["hidden"] for row in of]
            low, median, high = zip(
                *([t / row["steps"] for t in row["microseconds"][name]] for row in of), strict=True
            )
            axis.plot(sizes, median, style, color=color, marker="o", markersize=3, linewidth=1.2)
            axis.fill_between(sizes, low, high, color=color, alpha=0.15, linewidth=0)


def stem(found: dict[str, Any]) -> str:
    """File name of a run: the device, and what part of the list it took."""
    part = found["part"]
    words = f"gpu {found['device']}" + " torch.nn alone" * part["peer_only"]
    words += " by default" * part.get("default", False)
    words += " quick" * part["quick"] + " some" * bool(part["only"])
    return "-".join("".join(c if c.isalnum() else " " for c in words).lower().split())


def write_json(found: dict[str, Any], folder: Path) -> Path:
    """Write what was found into a folder, named by the device; return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem(found)}.json"
    # All of it or nothing: the run may be ended while it writes.
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(found, indent=1) + "\n")
    draft.replace(path)
    return path


def write(found: dict[str, Any], folder: Path) -> None:
    """Write JSON, tables and pictures into a folder, named by the device."""
    path = write_json(found, folder)
    parts = [summary(found), table(found), micro_table(found)]
    path.with_suffix(".md").write_text("\n".join(part for part in parts if part))
    draw(found, path.with_suffix(".png"), "bf16", ("padded",))
    forms = path.with_name(f"{path.stem}-forms.png")
    draw(found, forms, "bf16", ("packed", "bidirectional", "2-layer"))


# What the library chooses by (src/ostinato/cuda/choice.py).
RESULTS = Path(__file__).parent / "results"
MEASURED = Path(__file__).parents[1] / "src" / "ostinato" / "cuda" / "measured.json"
MODES = {"RNN": "rnn_tanh", "GRU": "gru", "LSTM": "lstm"}
# An error this much above torch.nn's, and ours is not chosen, however fast.
WORSE = 1.1


def measured(found: dict[str, Any]) -> list[Row]:
    """Turn a run's rows into what the library chooses by: lower quartiles of torch.nn / ours.

    Of a row's calls and its graphs the lower counts: calls alone flatter whoever launches less
    where the host is slow, and a user's may be quicker. So a row that was faster without having
    been captured says nothing, and nor does a packed one, whose graphs ran cuDNN on both sides. Of
    rows that differ in steps alone the slowest counts. A row that failed for ours, or was less
    exact than torch.nn's, chooses torch.nn; one that failed for torch.nn says nothing.
    """
    rows: dict[tuple[Any, ...], Row] = {}
    for row in found["rows"]:
        if row["form"] == "2-layer" or ("ratio" not in row and OURS not in row["failed"]):
            continue
        ratio, _, _ = row.get("ratio", (0.0, 0.0, 0.0))
        graph, _, _ = row.get("graph", {}).get("ratio", (None, None, None))
        if row["failed"] or is_less_exact(row):
            ratio = 0.0
        elif ratio > 1 and (graph is None or row["form"] == "packed"):
            continue
        elif graph is not None:
            ratio = min(ratio, graph)
        asked = {
            "cell": MODES[row["cell"]],
            "math": row["precision"],
            "hidden": row["hidden"],
            "batch": row["batch"],
            "form": row["form"],
            "is_training": row["kind"] == "training",
        }
        place = rows.setdefault(tuple(asked.values()), {**asked, "ratio": round(ratio, 3)})
        place["ratio"] = min(place["ratio"], round(ratio, 3))
    return list(rows.values())


def is_less_exact(row: Row) -> bool:
    """Whether any error of ours is above torch.nn's, by more than a tenth."""
    errors = row.get("relative_error", {})
    theirs, ours = errors.get(PEER, {}), errors.get(OURS, {})
    return any(error > WORSE * theirs.get(name, error) for name, error in ours.items())


def choose(found: dict[str, Any], path: Path = MEASURED) -> None:
    """Let the library choose by a run, on devices of that name."""
    everywhere = json.loads(path.read_text())
    everywhere[found["device"]] = measured(found)
    lines = ",\n".join(
        f"  {json.dumps(device)}: [\n"
        + ",\n".join(f"    {json.dumps(row)}" for row in rows)
        + "\n  ]"
        for device, rows in sorted(everywhere.items())
    )
    path.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    source, target = sys.argv[1:]
    again = json.loads(Path(source).read_text())
    if target == "--choose":
        choose(again)
    else:
        write(again, Path(target))
        print(summary(again))
