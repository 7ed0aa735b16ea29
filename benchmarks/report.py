"""From measured rows to a table, a summary and a picture.

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


def write(found: dict[str, Any], folder: Path) -> None:
    """Write JSON, tables and picture into a folder, named by the processor."""
    folder.mkdir(parents=True, exist_ok=True)
    words = f"{found['processor']} {found['isa']} {found['threads']} threads"
    words += " crowded" if found["crowded"] else ""
    stem = "-".join("".join(c if c.isalnum() else " " for c in words).lower().split())
    (folder / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(f"{summary(found)}\n{table(found)}")
    draw(found, folder / f"{stem}.png")


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    again = json.loads(source.read_text())
    finish(again)
    write(again, target)
    print(summary(again))
