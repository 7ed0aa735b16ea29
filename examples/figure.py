"""The demo's picture: accuracy, loss and time per epoch on the left, the confusion on the right."""

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
