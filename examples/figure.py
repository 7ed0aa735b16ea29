"""The demo's pictures: who is speaking, and which cell learns to add."""

import math
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator, PercentFormatter

PAPER, FAINT, SOFT, INK = "#fcfcfa", "#e6e9ed", "#6b7785", "#1d2733"
OURS, WRONG = "#0b6e74", "#c8553d"
# Okabe and Ito's colours, which the colour-blind tell apart, in an order of changing lightness.
CURVES = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#0072b2", "#f0c808", "#6b7785")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
STYLE = {
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": SOFT,
    "axes.spines.left": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.titlepad": 12,
    "font.size": 9.5,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}


def draw(
    path: Path, ours: Any, theirs: Any, confusion: list[list[int]], published: dict[str, float]
) -> None:
    """Writes the PNG; ours and theirs carry loss, accuracy and seconds, a number per epoch."""
    total = sum(map(sum, confusion))
    hits = sum(row[speaker] for speaker, row in enumerate(confusion))
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(13, 7.3))
        figure.text(
            0.05, 0.925, f"The right speaker for {hits} of {total} utterances",
            fontsize=22, weight="bold",
        )  # fmt: skip
        subtitle = (
            "JapaneseVowels, test set: 9 speakers, 7 to 29 steps of 12 channels, packed. "
            "One bidirectional GRU, trained with two libraries."
        )
        figure.text(0.05, 0.88, subtitle, fontsize=11.5, color=SOFT)

        columns = figure.add_gridspec(
            1, 2, width_ratios=(1.22, 1), left=0.05, right=0.98, top=0.78, bottom=0.09, wspace=0.14
        )
        left = columns[0].subgridspec(2, 2, height_ratios=(1.5, 1), hspace=0.5, wspace=0.22)
        _accuracy(figure.add_subplot(left[0, :]), ours, theirs, published)
        _loss(figure.add_subplot(left[1, 0]), ours, theirs)
        _time(figure.add_subplot(left[1, 1]), ours, theirs)
        _confusion(figure.add_subplot(columns[1]), confusion)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _curves(axes: Axes, ours: list[float], theirs: list[float]) -> None:
    epochs = range(1, len(ours) + 1)
    axes.plot(epochs, ours, color=OURS, linewidth=3, alpha=0.85, label="ostinato.nn.GRU")
    axes.plot(epochs, theirs, color=INK, linewidth=1.1, linestyle=(0, (3, 2)), label="torch.nn.GRU")
    axes.grid(axis="y")
    axes.margins(x=0.02)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _accuracy(axes: Axes, ours: Any, theirs: Any, published: dict[str, float]) -> None:
    axes.set_title("Test accuracy, and what was published")
    _curves(axes, ours.accuracy, theirs.accuracy)
    axes.legend(loc="lower right", ncols=2, bbox_to_anchor=(1.01, 0), labelcolor=INK)
    axes.set_ylim(0.79, 1.025)
    axes.set_yticks([0.8, 0.85, 0.9, 0.95, 1.0])
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    right_edge = axes.get_xlim()[1]
    for name, value in published.items():
        axes.axhline(value, color=WRONG, linewidth=0.9)
        axes.text(
            # Above the line where the curve cannot be, below it elsewhere.
            right_edge, value + (0.003 if value == 1 else -0.004), f"{name}  {value:.1%}",
            color=WRONG, fontsize=8.5, ha="right", va="bottom" if value == 1 else "top",
        )  # fmt: skip


def _loss(axes: Axes, ours: Any, theirs: Any) -> None:
    axes.set_title("Training loss")
    _curves(axes, ours.loss, theirs.loss)
    axes.set_ylim(bottom=0)


def _time(axes: Axes, ours: Any, theirs: Any) -> None:
    _curves(axes, [1e3 * s for s in ours.seconds], [1e3 * s for s in theirs.seconds])
    medians = 1e3 * median(ours.seconds), 1e3 * median(theirs.seconds)
    axes.set_title(f"Milliseconds per epoch, {medians[1] / medians[0]:.1f} : 1")
    for middle, color in zip(medians, (OURS, INK), strict=True):
        axes.annotate(
            f"{middle:.0f}", (1, middle), xycoords=("axes fraction", "data"), xytext=(3, 0),
            textcoords="offset points", color=color, weight="bold",
            # Away from each other, so that close medians stay readable.
            va="bottom" if middle == max(medians) else "top",
        )  # fmt: skip
    # A pause of the machine may leave the frame, the medians may not.
    axes.set_ylim(0, 1.6 * max(medians))


def _confusion(axes: Axes, confusion: list[list[int]]) -> None:
    axes.set_title("Who spoke, and whom the model heard")
    size = len(confusion)
    # The diagonal is each speaker's share of hits; any mistake gets the same tint of the other end.
    shares = [
        [count / sum(row) if i == j else -0.2 * (count > 0) for j, count in enumerate(row)]
        for i, row in enumerate(confusion)
    ]
    colors = LinearSegmentedColormap.from_list("confusion", [WRONG, "#f1f3f4", OURS])
    axes.imshow(shares, cmap=colors, vmin=-1, vmax=1)
    for i, row in enumerate(confusion):
        for j, count in enumerate(row):
            if count:
                color = PAPER if i == j else WRONG
                axes.text(j, i, count, color=color, weight="bold", ha="center", va="center")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(range(size), [str(speaker + 1) for speaker in range(size)])
        axis.set_ticks([edge + 0.5 for edge in range(size - 1)], minor=True)
    axes.grid(which="minor", color=PAPER, linewidth=3)
    axes.set_xlabel("heard")
    axes.set_ylabel("spoke")
    axes.spines[:].set_visible(False)


def draw_cells(
    path: Path, runs: dict[str, Any], loop_milliseconds: float | None, guess: float, length: int
) -> None:
    """Writes the PNG; runs carry steps, errors and milliseconds, and the first is the own cell.

    Without loop_milliseconds no times are drawn.
    """
    names = list(runs)
    looks = {names[0]: {"color": WRONG, "linewidth": 3.2, "zorder": 3}}
    for k, name in enumerate(names[1:]):
        looks[name] = {
            "color": CURVES[k % len(CURVES)],
            "linewidth": 2,
            "linestyle": DASHES[k % len(DASHES)],
        }
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(13, 6.4))
        title = "A cell of one's own, beside cells of the zoo"
        figure.text(0.05, 0.91, title, fontsize=22, weight="bold")
        subtitle = (
            f"The adding problem: two of {length} numbers are marked, and their sum is asked for "
            "at the end. The same batches for all."
        )
        figure.text(0.05, 0.855, subtitle, fontsize=11.5, color=SOFT)
        if loop_milliseconds is None:
            place = figure.add_gridspec(left=0.05, right=0.86, top=0.76, bottom=0.1)
            _errors(figure.add_subplot(place[0]), runs, looks, guess)
        else:
            columns = figure.add_gridspec(
                1, 2, width_ratios=(2.2, 1),
                left=0.05, right=0.975, top=0.76, bottom=0.1, wspace=0.68,
            )  # fmt: skip
            _errors(figure.add_subplot(columns[0]), runs, looks, guess)
            _milliseconds(figure.add_subplot(columns[1]), runs, looks, loop_milliseconds)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _errors(axes: Axes, runs: dict[str, Any], looks: dict[str, Any], guess: float) -> None:
    axes.set_title("Test error (mean squared)")
    for name, run in runs.items():
        axes.plot(run.steps, run.errors, **looks[name])
    axes.axhline(guess, color=SOFT, linewidth=0.9, linestyle=(0, (1, 2)))
    last = max(run.steps[-1] for run in runs.values())
    axes.set_yscale("log")
    axes.set_xlim(0, last)
    axes.set_ylim(top=guess * 3)
    axes.grid(axis="y")
    axes.set_xlabel("training step, 64 sequences each")
    axes.text(last * 0.56, guess * 1.07, "a guess without memory", color=SOFT, fontsize=8.5)
    # A name at the end of each curve, moved apart where ends are close.
    low, high = axes.get_ylim()
    ends = sorted((run.errors[-1], name) for name, run in runs.items())
    places = spread([math.log(end / low) / math.log(high / low) for end, _ in ends], 0.052)
    for (end, name), place in zip(ends, places, strict=True):
        axes.annotate(
            name, (last, end), xytext=(1.04, place), textcoords="axes fraction", va="center",
            color=INK, fontsize=9.5, weight="bold" if name == next(iter(runs)) else "normal",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": looks[name]["color"], "linewidth": 1.6,
                        "relpos": (0, 0.5), "shrinkA": 2, "shrinkB": 0},
        )  # fmt: skip


def spread(places: list[float], apart: float) -> list[float]:
    """Moves rising numbers from 0 to 1 as little as it takes to keep them apart."""
    places = [min(max(place, 0.0), 1.0) for place in places]
    for _ in range(200):
        for k in range(len(places) - 1):
            missing = apart - (places[k + 1] - places[k])
            if missing > 0:
                places[k] -= missing / 2
                places[k + 1] += missing / 2
    return places


def _milliseconds(
    axes: Axes, runs: dict[str, Any], looks: dict[str, Any], loop_milliseconds: float
) -> None:
    axes.set_title("Milliseconds of a training step")
    bars = {name: (run.milliseconds, looks[name]["color"]) for name, run in runs.items()}
    order = sorted(bars, key=lambda name: bars[name][0])
    for place, name in enumerate(order):
        value, color = bars[name]
        axes.barh(place, value, color=color, height=0.62)
        axes.annotate(
            f"{value:.1f}" if value < 10 else f"{value:.0f}", (value, place), xytext=(4, 0),
            textcoords="offset points", va="center", color=INK, fontsize=9,
        )  # fmt: skip
    axes.set_yticks(range(len(order)), order, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(value for value, _ in bars.values()))
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    own = next(iter(runs))
    times = loop_milliseconds / runs[own].milliseconds
    note = (
        f"{own} in a Python loop over\nthe same step: {loop_milliseconds:.0f} ms, "
        f"{times:.0f} times as long"
    )
    axes.text(0, -0.06, note, transform=axes.transAxes, va="top", ha="left", color=WRONG)
