"""Trained models from packages of the registry: the package's own runtime beside ours.

Usage: python benchmarks/real.py [--threads 1 2] [--dtypes float32 int8 int8/int16] [--only DTLN]
                                 [--seconds 1] [--out DIR]

Each model of real_models.py runs step by step, as it does where it is in use, and whole. Outputs
are compared first, by their difference and by what the model is for; if they differ too much, the
run fails. Then theirs and ours are timed in turns by `ostinato.bench.compare`, end to end: all that
a model computes, on one thread and on two. Packages that are not installed are named, and the other
models are measured. CONTRIBUTING.md has the packages. A dtype is that of the streams' weights,
perhaps with what they are multiplied with behind a slash; one that streams do not have is left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_models import MODELS, Maker, Model
from real_onnx import numbers_of
from run import PAUSE, processor
from threadpoolctl import threadpool_info, threadpool_limits

import ostinato
from ostinato import Stream, _core
from ostinato.bench import compare, ratio

FAINT, SOFT = "#e1e5e9", "#4a525b"
# By dtype of the streams: a marker and a colour that are told apart without red and green.
LOOKS = {
    "float32": ("o", "#0072b2"),
    "int8": ("s", "#e69f00"),
    "int8/int16": ("^", "#cc79a7"),
}


def served(dtypes: Sequence[str]) -> list[str]:
    """Return those of the dtypes that streams have, and name the others."""
    weights = {"weight_ih_l0": np.zeros((3, 1), "f4"), "weight_hh_l0": np.zeros((3, 1), "f4")}
    found = []
    for dtype in dtypes:
        try:
            Stream("gru", weights, **numbers_of(dtype))
        except (TypeError, ValueError) as error:
            print(f"{dtype} is left out: {error}", flush=True)
        else:
            found.append(dtype)
    return found


def measure(make: Maker, threads: int, dtypes: Sequence[str], seconds: float) -> dict[str, Any]:
    """Check and time one model.

    Args:
        make: builds it for a number of threads.
        threads: for everybody: torch's, hence ours, ONNX Runtime's and those of NumPy's products.
        dtypes: of the streams.
        seconds: how long to time each participant in each way.

    Returns:
        What the model is, and a row for each way to run it.

    Raises:
        AssertionError: outputs differ by more than the model allows for a dtype.
    """
    torch.set_num_threads(threads)
    with threadpool_limits(threads):
        model: Model = make(threads)
        rows = []
        for way in model.ways:
            calls = {"theirs": way.theirs, **{dtype: way.ours(dtype) for dtype in dtypes}}
            expected = way.theirs()
            verdicts = {}
            for dtype in dtypes:
                verdicts[dtype] = way.judge(calls[dtype](), expected)
                # Where ours keeps states, a second call must begin anew as the first one did.
                again = way.judge(calls[dtype](), expected)
                assert again == verdicts[dtype], f"{model.name}: {way.name}: a call remembers"
                limit = way.exact if dtype == "float32" else way.coarse
                difference = verdicts[dtype].difference
                assert difference <= limit, (
                    f"{model.name}, {way.name}, {dtype}: {difference} above {limit}, "
                    f"{verdicts[dtype].measure}"
                )
            samples = compare(calls, seconds, pause=PAUSE)
            theirs = samples["theirs"]
            rows.append(
                {
                    "way": way.name,
                    "threads": threads,
                    "units": way.units,
                    "counted": way.counted,
                    "microseconds": {
                        name: statistics.median(times) / way.units * 1e6
                        for name, times in samples.items()
                    },
                    "ratios": {dtype: ratio(theirs, samples[dtype]) for dtype in dtypes},
                    "agreement": {name: each._asdict() for name, each in verdicts.items()},
                    "rounds": len(theirs),
                }
            )
            print(line(model.name, rows[-1]), flush=True)
    told = {field: getattr(model, field) for field in Model._fields if field != "ways"}
    return {**told, "rows": rows}


def line(name: str, row: dict[str, Any]) -> str:
    """One row, as it is printed while measuring."""
    times = "  ".join(f"{who} {us:.4g}" for who, us in row["microseconds"].items())
    ratios = " ".join(f"{median:.2f}" for _, median, _ in row["ratios"].values())
    return f"{name:10} {row['way']:28} {row['threads']} threads  us: {times}   x {ratios}"


def table(found: dict[str, Any]) -> str:
    """Every row, in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        f"{found['processor']}, {found['isa']}; {versions}, Python {found['python']}; NumPy's "
        f"products by {found['blas']}.",
        "",
        "| model | way | threads | streams | theirs, us | ours, us | theirs / ours | largest "
        "difference | measure |",
        "|---|---|---:|---|---:|---:|---:|---:|---|",
    ]
    for model in found["models"]:
        for row in model["rows"]:
            for dtype, (low, median, high) in row["ratios"].items():
                agreement, us = row["agreement"][dtype], row["microseconds"]
                lines.append(
                    f"| {model['name']} | {row['way']} | {row['threads']} | {dtype} | "
                    f"{us['theirs']:.4g} | {us[dtype]:.4g} | {median:.2f} ({low:.2f}-{high:.2f}) | "
                    f"{agreement['difference']:.1e} | {agreement['measure']} |"
                )
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw how many times as fast as each package ours is, a panel for each number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [(model, row) for model in found["models"] for row in model["rows"]]
    if not rows:
        return
    threads = sorted({row["threads"] for _, row in rows})
    places: dict[tuple[str, str], float] = {}
    ticks: list[tuple[float, str, bool]] = []
    place = 0.0
    for model in found["models"]:
        ticks.append((place, f"{model['name']}: {model['layers']}", True))
        for way in dict.fromkeys(row["way"] for row in model["rows"]):
            place += 1
            places[model["name"], way] = place
            ticks.append((place, way, False))
        place += 1.4
    every = [ratio for _, row in rows for each in row["ratios"].values() for ratio in each]
    height = 1.6 + 0.2 * len(ticks)
    with plt.rc_context({"font.size": 8, "axes.edgecolor": FAINT, "xtick.color": SOFT}):
        figure, axes = plt.subplots(
            1, len(threads), figsize=(8, height), sharey=True, squeeze=False, layout="constrained"
        )
        axes[0, 0].set_yticks([at for at, *_ in ticks], [label for _, label, _ in ticks])
        for tick, (_, _, is_title) in zip(axes[0, 0].get_yticklabels(), ticks, strict=True):
            tick.set_fontweight("bold" if is_title else "normal")
        axes[0, 0].set_ylim(place - 0.7, -0.7)
        for axis, count in zip(axes[0], threads, strict=True):
            axis.set_title(f"{count} thread{'s' * (count > 1)}", fontsize=10, fontweight="bold")
            axis.set_xscale("log")
            axis.set_xlim(min(0.7, *every) / 1.15, max(2.0, *every) * 1.2)
            axis.axvspan(1e-3, 1, color="#f3e3df", linewidth=0)
            axis.axvline(1, color="#1d2733", linewidth=1.2)
            for at in places.values():
                axis.axhline(at, color=FAINT, linewidth=0.6, zorder=0.5)
            for model, row in rows:
                for k, (dtype, (low, median, high)) in enumerate(row["ratios"].items()):
                    if row["threads"] != count:
                        continue
                    marker, color = LOOKS.get(dtype, ("x", "#1d2733"))
                    # A little apart from each other, or equal ones would hide one another.
                    apart = 0.24 * (k - (len(row["ratios"]) - 1) / 2)
                    at = places[model["name"], row["way"]] + apart
                    axis.plot((low, high), (at, at), color=color, linewidth=1.5)
                    axis.plot(
                        median, at, marker, color=color, markersize=5, markeredgecolor="white"
                    )
            marks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100) if tick < 1.2 * max(every)]
            axis.set_xticks(marks, [f"{tick:g}" for tick in marks])
            axis.minorticks_off()
            axis.tick_params(length=0)
            axis.spines[["top", "right", "left"]].set_visible(False)
        figure.suptitle(
            "Trained models: how many times as fast as the package's own runtime\n",
            fontsize=11,
            fontweight="bold",
        )
        where = f"{found['processor']}, {found['isa']}; left of 1 the package is faster"
        figure.text(0.5, 1 - 0.32 / height, where, ha="center", va="top", color=SOFT)
        dtypes = list(dict.fromkeys(dtype for _, row in rows for dtype in row["ratios"]))
        looks = [LOOKS.get(dtype, ("x", "#1d2733")) for dtype in dtypes]
        handles = [
            plt.Line2D([], [], linestyle="", marker=marker, color=color) for marker, color in looks
        ]
        labels = [f"ostinato.Stream, {dtype}" for dtype in dtypes]
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, dpi=160, facecolor="white", pil_kwargs={"optimize": True})
        plt.close(figure)


def write(found: dict[str, Any], folder: Path) -> None:
    """Write JSON, table and picture into a folder, named by the processor."""
    folder.mkdir(parents=True, exist_ok=True)
    words = f"real models {found['processor']} {found['isa']}"
    stem = "-".join("".join(c if c.isalnum() else " " for c in words).lower().split())
    (folder / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(table(found))
    draw(found, folder / f"{stem}.png")


def blas() -> str:
    """Name the library of NumPy's products, and for which processor its kernels are."""
    found = [each for each in threadpool_info() if each["user_api"] == "blas"]
    return ", ".join(
        f"{each['internal_api']} {each['version']} ({each.get('architecture', 'unknown')})"
        for each in found
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=list(LOOKS), help="of the streams")
    parser.add_argument("--seconds", type=float, default=1.0, help="time per way and participant")
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--out", type=Path, help="write JSON, Markdown and PNG into this folder")
    arguments = parser.parse_args()
    dtypes = served(arguments.dtypes)
    found: dict[str, Any] = {
        "processor": processor(),
        "isa": _core.isa(),
        "python": platform.python_version(),
        "blas": blas(),
        "versions": {
            "ostinato": ostinato.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "models": [],
    }
    for name, make in MODELS.items():
        if arguments.only not in name:
            continue
        try:
            made = [measure(make, n, dtypes, arguments.seconds) for n in arguments.threads]
        except ModuleNotFoundError as error:
            # importlib.metadata's PackageNotFoundError is one of these.
            print(f"{name} is left out: no package {error.name}", flush=True)
            continue
        found["models"].append({**made[0], "rows": [row for each in made for row in each["rows"]]})
        found["versions"].update(made[0]["versions"])
    print("\n" + table(found))
    if arguments.out:
        write(found, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
