"""From measured rows to a table, a summary and two pictures.

The roofline of a row is the larger of two times: its multiply-adds at the peak rate, and, since
each step waits for the one before, its steps times the reading of weight_hh at the bandwidth of
that footprint. Both ceilings are of the same run.

Usage: python benchmarks/report.py FILE.json DIR    draws a report again
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ceilings

OURS = "ostinato"

# The picture of ratios. Colours that are told apart without red and green (Okabe and Ito), and
# shapes that are told apart without colour.
PEERS = {
    "torch.nn": ("o", "#0072b2"),
    "ONNX Runtime": ("^", "#e69f00"),
    "OpenVINO": ("s", "#cc79a7"),
}
PANELS = ("GRU", "LSTM", "RNN")
FAINT, SOFT = "#e1e5e9", "#4a525b"


def line(row: dict[str, Any]) -> str:
    """One row, as it is printed while measuring."""
    times = "  ".join(f"{name} {us:.4g}" for name, us in row["microseconds"].items())
    ratios = " ".join(f"{median:.2f}" for _, median, _ in row["ratios"].values())
    return f"{row['name']:34} {row['shape']:20} us: {times}   x {ratios}"


def finish(found: dict[str, Any]) -> None:
    """Add each row's roofline, in microseconds, and how near ours comes to it."""
    # The better of before and after: what the machine can do.
    threads = str(found["threads"])
    before, after = (found["ceilings"][when][threads] for when in ("before", "after"))
    ceiling = {
        "operations": max(before["operations"], after["operations"]),
        "bytes": {s: max(v, after["bytes"][s]) for s, v in before["bytes"].items()},
    }
    for row in found["rows"]:
        steps, _, size, hidden = row["sizes"]
        passes = 2 if row["kind"].startswith("training") else 1
        weights = row["weight_bytes"]
        if not steps:
            # A cell reads both weights once, and in training writes their gradients.
            weights = weights * (size + hidden) // hidden
        reading = max(1, steps) * passes * weights / ceilings.bandwidth(ceiling, weights)
        computing = row["operations"] / ceiling["operations"]
        row["bound"] = "reading" if reading > computing else "computing"
        row["floor_us"] = max(reading, computing) * 1e6
        row["attained"] = row["floor_us"] / row["microseconds"][OURS]
        row["gflops"] = row["operations"] / row["microseconds"][OURS] / 1e3


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def groups(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows by what they are compared as: inference of GRU, packed training, cells, ..."""
    sorted_rows: dict[str, list[dict[str, Any]]] = {}
    for row in found["rows"]:
        layer = row["layer"]
        if not row["sizes"][0]:
            layer = f"{layer} B{row['sizes'][1]}"
        one_feature = bool(row["sizes"][0]) and row["sizes"][2] == 1
        words = [row["kind"], *["packed"] * row["packed"], *["of one feature"] * one_feature, layer]
        sorted_rows.setdefault(" ".join(words), []).append(row)
    return sorted_rows


def summary(found: dict[str, Any]) -> str:
    """Geometric means and the lowest row of each group, in Markdown."""
    lines = ["| rows | peer | geometric mean | lowest | where |", "|---|---|---:|---:|---|"]
    for group, rows in groups(found).items():
        peers = dict.fromkeys(peer for row in rows for peer in row["ratios"])
        for peer in peers:
            ratios = {row["shape"]: row["ratios"][peer][1] for row in rows if peer in row["ratios"]}
            where = min(ratios, key=lambda shape: ratios[shape])
            mean = geometric_mean(ratios.values())
            lines.append(
                f"| {group} ({len(ratios)}) | {peer} | {mean:.2f} | {ratios[where]:.2f} | {where} |"
            )
    return "\n".join(lines) + "\n"


def table(found: dict[str, Any]) -> str:
    """Every row, in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    threads = str(found["threads"])
    before, after = (found["ceilings"][when][threads] for when in ("before", "after"))
    peers = [name for name in found["versions"] if name != OURS]
    title = " | ".join(f"{peer} / ours" for peer in peers)
    peaks = f"{before['operations'] / 1e9:.0f} GFLOP/s before and {after['operations'] / 1e9:.0f}"
    lines = [
        f"{found['processor']}, {found['isa']}, {threads} threads, float32 if not said; "
        f"{versions}, Python {found['python']}. Peak {peaks} after.",
        "",
        f"| layer | shape | ours, us | {title} | GFLOP/s | of roofline | "
        "kept, KiB: torch / ours / recompute |",
        "|---|---|---:|" + "---:|" * (len(peers) + 3),
    ]
    for row in found["rows"]:
        cells = []
        for peer in peers:
            low, median, high = row["ratios"].get(peer, (None,) * 3)
            cells.append("" if median is None else f"{median:.2f} ({low:.2f}-{high:.2f})")
        kept = row.get("kept_bytes")
        kept_cell = " / ".join(str(size >> 10) for size in kept.values()) if kept else ""
        lines.append(
            f"| {row['name']} | {row['shape']} | {row['microseconds'][OURS]:.4g} | "
            + " | ".join(cells)
            + f" | {row['gflops']:.1f} | {row['attained']:.0%} ({row['bound']}) | {kept_cell} |"
        )
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw how near each layer's row comes to its roofline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in found["rows"] if row["sizes"][0]]
    if not rows:
        return
    colors = {"computing": "#1f5fa8", "reading": "#c96f1f"}
    peers = {"torch.nn": "|", "ONNX Runtime": "x", "OpenVINO": "+"}
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.21 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        axes.barh(place, row["attained"], color=colors[row["bound"]], height=0.7)
        for peer, marker in peers.items():
            if peer in row["microseconds"]:
                near = row["floor_us"] / row["microseconds"][peer]
                axes.plot(near, place, marker, color="black", markersize=6)
    axes.set_yticks(range(len(rows)), [f"{r['name']}  {r['shape']}" for r in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlim(0, max(1.05, *(row["attained"] for row in rows)))
    axes.set_xlabel("part of the roofline: least possible time / measured time")
    axes.set_title(f"{found['processor']}, {found['isa']}, {found['threads']} threads")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    labels = ["ours, bound by multiply-adds", "ours, bound by reading weight_hh"]
    for peer, marker in peers.items():
        if any(peer in row["microseconds"] for row in rows):
            handles.append(plt.Line2D([], [], color="black", marker=marker, linestyle=""))
            labels.append(peer)
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# The median of a peer's time / ours, by peer, by a layer's name without "Cell".
Dots = dict[str, dict[str, float]]


def section(row: dict[str, Any]) -> str | None:
    """Under which heading the picture of ratios shows a row; None for one that it leaves out.

    It shows the grid of sizes, packed rows, single steps and bfloat16. It leaves out what lies
    between: odd sizes and their neighbours, stacks, two directions, series of one feature.
    """
    steps, batch, size, hidden = row["sizes"]
    kind = row["kind"].capitalize()
    if not steps:
        return f"{kind}, one step (cells)" if (batch, hidden) in ((1, 64), (64, 256)) else None
    plain = f"{row['layer']}, {row['kind']}"
    if row["packed"]:
        return f"{kind}, packed, {steps} steps" if row["name"] == f"{plain}, packed" else None
    shown = row["name"] == plain and size == hidden and (steps, batch) != (50, 32)
    return f"{kind}, 100 steps" if shown else None


def pictured(found: dict[str, Any]) -> dict[str, dict[str, Dots]]:
    """What the picture of ratios shows, by heading and by the label of a line."""
    sections: dict[str, dict[str, Dots]] = {}
    # Layers, packed ones, cells, bfloat16. Sorting keeps the rest of the order.
    for row in sorted(
        found["rows"],
        key=lambda row: ("bfloat16" in row["kind"], not row["sizes"][0], row["packed"]),
    ):
        if (title := section(row)) is None:
            continue
        steps, batch, _, hidden = row["sizes"]
        label = f"batch {batch}, hidden {hidden}"
        if not (row["packed"] or steps in (0, 100)):
            label += f", {steps} steps"
        layer = row["layer"].removesuffix("Cell")
        dots = {peer: row["ratios"][peer][1] for peer in PEERS if peer in row["ratios"]}
        sections.setdefault(title, {}).setdefault(label, {})[layer] = dots
    return sections


def draw_ratios(found: dict[str, Any], path: Path) -> None:
    """Draw how many times as fast as each peer ours is, a panel for each layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sections = pictured(found)
    lines = [dots for lines in sections.values() for dots in lines.values()]
    panels = [layer for layer in PANELS if any(layer in dots for dots in lines)]
    ratios = {peer: ratio for dots in lines for by in dots.values() for peer, ratio in by.items()}
    if not panels:
        return
    every = [ratio for dots in lines for by_peer in dots.values() for ratio in by_peer.values()]
    peers = [peer for peer in PEERS if peer in ratios]
    height = 1.35 + 0.15 * (len(lines) + 1.3 * len(sections))
    with plt.rc_context({"font.size": 8, "axes.edgecolor": FAINT, "xtick.color": SOFT}):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(8, height), sharey=True, squeeze=False, layout="constrained"
        )
        figure.get_layout_engine().set(w_pad=0.07, h_pad=0.06)
        places = label_lines(axes[0, 0], sections)
        for axis, layer in zip(axes[0], panels, strict=True):
            axis.set_title(layer, fontsize=10, fontweight="bold")
            axis.set_xlim(min(0.55, *every) / 1.15, max(2.0, *every) * 1.15)
            draw_panel(axis, layer, list(zip(places, lines, strict=True)))
        names = ", ".join(peers[:-1]) + " and " * (len(peers) > 1) + peers[-1]
        figure.suptitle(
            f"Ostinato: how many times as fast as {names}\n", fontsize=11, fontweight="bold"
        )
        versions = ", ".join(f"{peer} {found['versions'][peer]}" for peer in peers)
        where = f"{found['processor']}, {found['isa']}, {found['threads']} threads; {versions}"
        figure.text(0.5, 1 - 0.3 / height, where, ha="center", va="top", color=SOFT)
        handles = [
            plt.Line2D([], [], linestyle="", marker=PEERS[peer][0], color=PEERS[peer][1])
            for peer in peers
        ]
        figure.legend(handles, peers, loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, dpi=160, facecolor="white", pil_kwargs={"optimize": True})
        plt.close(figure)


def label_lines(axis: Any, sections: dict[str, dict[str, Dots]]) -> list[float]:
    """Label the lines of the picture, from the top, and return where each lies."""
    places, ticks, place = [], [], 0.0
    for title, lines in sections.items():
        ticks.append((place, title))
        for label in lines:
            place += 1
            places.append(place)
            ticks.append((place, label))
        place += 1.3
    axis.set_yticks([at for at, _ in ticks], [label for _, label in ticks])
    for tick, (_, label) in zip(axis.get_yticklabels(), ticks, strict=True):
        tick.set_fontweight("bold" if label in sections else "normal")
    axis.set_ylim(place - 0.6, -0.6)
    return places


def draw_panel(axis: Any, layer: str, lines: list[tuple[float, Dots]]) -> None:
    """Draw the dots of one layer; left of 1.0 the peer is the faster one."""
    axis.set_xscale("log")
    axis.axvspan(1e-3, 1, color="#f3e3df", linewidth=0)
    axis.axvline(1, color="#1d2733", linewidth=1.2)
    axis.text(0.95, 0, "slower", ha="right", va="center", color=SOFT, fontsize=7)
    axis.text(1.07, 0, "faster", ha="left", va="center", color=SOFT, fontsize=7)
    for place, dots in lines:
        axis.axhline(place, color=FAINT, linewidth=0.6, zorder=0.5)
        by_peer = dots.get(layer, {})
        for at, (peer, ratio) in enumerate(by_peer.items()):
            marker, color = PEERS[peer]
            # A little apart from each other, or peers of equal speed would hide one another.
            height = place + 0.22 * (at - (len(by_peer) - 1) / 2)
            axis.plot(
                ratio, height, marker, color=color, markersize=5,
                markeredgecolor="white", markeredgewidth=0.4,
            )  # fmt: skip
    ticks = [0.5, 1, 2, 5, 10, 20]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.tick_params(length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)


def write(found: dict[str, Any], folder: Path) -> None:
    """Write JSON, tables and pictures into a folder, named by the processor."""
    folder.mkdir(parents=True, exist_ok=True)
    words = f"{found['processor']} {found['isa']} {found['threads']} threads"
    words += " crowded" if found["crowded"] else ""
    stem = "-".join("".join(c if c.isalnum() else " " for c in words).lower().split())
    (folder / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(f"{summary(found)}\n{table(found)}")
    draw(found, folder / f"{stem}.png")
    draw_ratios(found, folder / f"{stem}-ratios.png")


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    again = json.loads(source.read_text())
    finish(again)
    write(again, target)
    print(summary(again))
