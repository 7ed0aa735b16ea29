"""What plans of the GPU engine cost beyond the best measured kernel, and the fit of their model.

    python benchmarks/plans.py [FILE.json]
    python benchmarks/plans.py --take SWEEP.json FILE.json

The first fits the costs of `ostinato.cuda.plan` to measured kernels and prints them; then how many
times as long as the best measured kernel a plan takes: of all places, by the plan's exchange, by
batch size, and where the places judged were left out of the fit; then the kernels to measure next.
The second writes FILE.json from a sweep's raw records.

A sweep ran each kernel alone on a device, timed by events over 128 steps (64 at H 1024), after its
numbers were compared. The H100's (2026-11-27, commit 9adf1c0) had 40 layers: GRU and LSTM, bf16 and
tf32, H 64 to 1024, forward and backward, at B 1, 16, 64 and 256, padded, in one direction; of each
the kernels that seemed sensible by the model of that time. A row of FILE.json has a kernel's
constants and its microseconds a step for each batch.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ostinato.cuda.config import Config
from ostinato.cuda.plan import H100_COSTS, H200, Terms, configs, counts, plan

SWEEP = Path(__file__).parent / "results/plans-nvidia-h100-80gb-hbm3.json"
# An H100 SXM has an H200's multiprocessors, shared memory and clusters.
DEVICE = H200
# From where the fit begins.
START = Terms(300, 100, 300, 3, 10, 18, 2, 300, 500, 500, 10, 500, 30, 100)
Numbers = npt.NDArray[np.float64]


class Place(NamedTuple):
    """What a plan is asked for."""

    cell: str
    math: str
    hidden: int
    batch: int
    is_backward: bool


class Kernel(NamedTuple):
    """One that was measured."""

    config: Config
    batch: int
    nanoseconds: float  # a step of the whole batch

    @property
    def place(self) -> Place:
        """What it is a candidate for."""
        c = self.config
        return Place(c.cell, c.math, c.hidden, self.batch, c.is_backward)


def take(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return FILE.json's content from a sweep's raw records."""
    batches = sorted({record["batch"] for record in records})
    times: dict[Config, dict[int, float]] = {}
    for record in records:
        config = Config(**record["config"])
        times.setdefault(config, {})[record["batch"]] = record["us_per_step"]
    rows = [[*config, *(time[batch] for batch in batches)] for config, time in times.items()]
    return {"fields": [*Config._fields], "batches": batches, "rows": rows}


def read(path: Path = SWEEP) -> list[Kernel]:
    """Return all measured kernels."""
    sweep = json.loads(path.read_text("utf-8"))
    return [
        Kernel(Config(*row[: len(sweep["fields"])]), batch, microseconds * 1000)
        for row in sweep["rows"]
        for batch, microseconds in zip(sweep["batches"], row[len(sweep["fields"]) :], strict=True)
    ]


def by_place(kernels: Iterable[Kernel]) -> dict[Place, dict[Config, float]]:
    """Return the measured candidates of each place with their times."""
    found: dict[Place, dict[Config, float]] = {}
    for kernel in kernels:
        found.setdefault(kernel.place, {})[kernel.config] = kernel.nanoseconds
    return found


def fit(kernels: list[Kernel]) -> Terms:
    """Fit what each term costs.

    Least squares on the logarithm of time, by Gauss and Newton in the logarithm of the costs, which
    keeps these above zero. A kernel counts by how near the best of its place it is: what is four
    times slower is never chosen, however wrong its model is. Terms that no kernel has stay. What
    is no term (how many clusters run at once, registers, the price of sharing a multiprocessor, the
    size of the near cache) was set by hand, with all kernels in sight.
    """
    places = by_place(kernels)
    table = np.array([_counts(k.config, k.batch) for k in kernels], float)
    times = np.array([k.nanoseconds for k in kernels])
    weights = np.array([min(places[k.place].values()) for k in kernels]) / times
    fitted = table.any(0)
    table, costs = table[:, fitted], np.array(H100_COSTS)
    logs = np.log(START)[fitted]
    for _ in range(60):
        terms = table * np.exp(logs)
        modelled = terms.sum(1)
        slopes = weights[:, None] * terms / modelled[:, None]
        step = np.linalg.lstsq(slopes, weights * np.log(times / modelled), rcond=None)[0]
        logs += np.clip(step, -1, 1)
        if abs(step).max() < 1e-6:
            break
    costs[fitted] = np.exp(logs)
    return Terms(*costs.tolist())


@functools.cache
def _counts(config: Config, batch: int) -> Numbers:
    return np.array(counts(config, batch, 1, DEVICE), float)


def losses(
    places: dict[Place, dict[Config, float]], costs: Terms = H100_COSTS
) -> dict[Place, tuple[float, Config]]:
    """Return by place how often the best time the chosen kernel takes, of the measured ones."""
    found, cost = {}, np.array(costs)
    for place, times in places.items():
        chosen = min(times, key=lambda c: _counts(c, place.batch) @ cost)
        found[place] = times[chosen] / min(times.values()), chosen
    return found


def plan_of(place: Place) -> Config | None:
    """Return what a layer would run, of all kernels, measured or not."""
    return plan(place.cell, place.math, place.hidden, place.batch, 1, place.is_backward, DEVICE)


def left_out(
    kernels: list[Kernel], part: Callable[[Place], object]
) -> dict[Place, tuple[float, Config]]:
    """Return the losses of each part's places by a fit to all other parts."""
    found = {}
    for one in {part(kernel.place): None for kernel in kernels}:
        costs = fit([kernel for kernel in kernels if part(kernel.place) != one])
        found.update(losses(by_place(k for k in kernels if part(k.place) == one), costs))
    return found


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean."""
    return math.exp(float(np.mean(np.log(list(values)))))


def _line(name: str, found: Iterable[tuple[float, Config]]) -> str:
    values = [loss for loss, _ in found]
    mean, worst = geometric_mean(values), max(values)
    return f"    {name:28} {len(values):3} places: geometric mean {mean:.3f}, worst {worst:.3f}"


PARTS: dict[str, Callable[[Place], object]] = {
    "a layer": lambda place: place._replace(batch=0),
    "a cell": lambda place: place.cell,
    "a math": lambda place: place.math,
    "an H": lambda place: place.hidden,
    "a B": lambda place: place.batch,
}


def judge(places: dict[Place, dict[Config, float]]) -> dict[Place, tuple[float, Config]]:
    """Return the losses of what a layer would run, where that was measured.

    How many fragments registers hold is left aside: it follows from the rest, by what a compiler
    needs, and a few more or less cost little.
    """
    found = {}
    for place, times in places.items():
        chosen, by_shape = plan_of(place), {_shape(c): time for c, time in times.items()}
        if chosen is not None and _shape(chosen) in by_shape:
            found[place] = by_shape[_shape(chosen)] / min(times.values()), chosen
    return found


def _shape(config: Config) -> Config:
    return config._replace(resident=0)


def to_measure(
    places: dict[Place, dict[Config, float]], costs: Terms = H100_COSTS
) -> Iterator[tuple[Place, Config, float]]:
    """Yield the unmeasured kernels that the model has faster than a place's plan, and how much."""
    for place, times in places.items():
        cost = np.array(costs)
        found = configs(place.cell, place.math, place.hidden, place.is_backward, DEVICE)
        modelled = {config: float(_counts(config, place.batch) @ cost) for config in found}
        first = min(modelled, key=modelled.__getitem__)
        chosen = plan_of(place)
        if _shape(first) not in set(map(_shape, times)) and chosen is not None:
            yield place, first, modelled[chosen] / modelled[first]


def main(path: Path = SWEEP) -> None:
    """Print the fit and the losses."""
    kernels = read(path)
    places, costs = by_place(kernels), fit(kernels)
    print(f"{len(kernels)} kernels in {len(places)} places\n\ncosts, fitted and shipped:")
    for name, fitted, shipped in zip(Terms._fields, costs, H100_COSTS, strict=True):
        print(f"    {name:18} {fitted:8.4g} {shipped:8.4g}")
    modelled = [_counts(k.config, k.batch) @ np.array(costs) for k in kernels]
    errors = np.log(np.array(modelled) / [k.nanoseconds for k in kernels])
    print(f"error of the model, standard deviation of the logarithm: {errors.std():.3f}")

    judged = judge(places)
    print(f"\nplans that were not measured: {len(places) - len(judged)}")
    print("time of a plan / time of the best measured kernel:")
    print(_line("all", judged.values()))
    for exchange in ("block", "cluster", "grid"):
        print(_line(exchange, (f for f in judged.values() if f[1].exchange == exchange)))
    for batch in sorted({place.batch for place in places}):
        print(_line(f"B {batch}", (f for p, f in judged.items() if p.batch == batch)))
    print("the same of all measured kernels, of whatever kind, by this fit:")
    print(_line("all", losses(places, costs).values()))
    for name, part in PARTS.items():
        print(_line(f"{name} left out of the fit", left_out(kernels, part).values()))

    print("\nthe worst plans:")
    for place, (loss, chosen) in sorted(judged.items(), key=lambda item: -item[1][0])[:10]:
        best = min(places[place], key=places[place].__getitem__)
        print(f"    {loss:.3f} {_place(place)}: {_name(chosen)}; best: {_name(best)}")
    found = sorted(to_measure(places), key=lambda item: -item[2])
    print(f"\nplaces where the model has an unmeasured kernel in front: {len(found)}")
    print("to measure next, with the plan's modelled time over theirs:")
    for place, config, gain in found:
        if gain > 1.1:
            print(f"    {gain:.2f} {_place(place)}: {_name(config)}")


def _place(p: Place) -> str:
    way = "backward" if p.is_backward else "forward"
    return f"{p.cell} {p.math} H{p.hidden} B{p.batch} {way}"


def _name(c: Config) -> str:
    rows = f"{c.groups} groups" + f" of {c.group_rows} rows" * (c.group_rows > 8)
    return f"{c.exchange} {c.blocks} x {c.units} units, {c.warps} warps, {rows}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--take"]:
        source, target = map(Path, sys.argv[2:])
        target.write_text(json.dumps(take(json.loads(source.read_text("utf-8")))), "utf-8")
    else:
        main(*map(Path, sys.argv[1:]))
