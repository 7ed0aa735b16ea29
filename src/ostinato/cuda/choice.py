"""Whether our kernels or cuDNN run a layer: what was measured on that kind of device says so.

measured.json holds, for each device's name, the rows of `make bench-gpu`: by how much ours was
faster than torch.nn. Ours runs where it was faster at every measured size around the asked one.
`benchmarks/gpu_report.py --choose` writes the file. What it does not cover, a trial on the user's
device answers (`ostinato.cuda.trial`).
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from importlib import resources
from typing import Any, NamedTuple

from ostinato.cells import cell_of


class Question(NamedTuple):
    """What a choice depends on, in the words of a row of the benchmark."""

    cell: str  # "rnn_tanh", "rnn_relu", "gru", "lstm", or an own cell's name
    math: str  # "bf16", "fp16", "tf32" or "fp32"
    hidden: int
    batch: int
    form: str  # "padded", "packed" or "bidirectional"
    is_training: bool


class Answer(NamedTuple):
    """Whether our kernels are to run a layer, and why."""

    is_ours: bool
    reason: str
    # Whether sizes on both sides of the asked one were measured. Otherwise a trial knows better.
    is_covered: bool


# None: as measured. Tests ask for one or the other, and so does the benchmark, which measures. All
# threads see it, because backward may run a layer again, on a thread of autograd.
_forced: bool | None = None
# Grows whenever an answer may change.
_version = 0


@contextlib.contextmanager
def forced(ours: bool) -> Iterator[None]:
    """Run our kernels wherever they fit, or with `ours` False nowhere, in all threads."""
    global _forced
    before, _forced = _forced, ours
    changed()
    try:
        yield
    finally:
        _forced = before
        changed()


def changed() -> None:
    """Let who keeps answers ask again."""
    global _version
    _version += 1


def version() -> int:
    """Return a number that is another one wherever an answer given before may have changed."""
    return _version


def is_ours(device: str, question: Question) -> Answer:
    """Say whether our kernels are to run a layer on a device of this name, and why."""
    if _forced is not None:
        return Answer(_forced, "asked for by ostinato.cuda.choice.forced", True)
    rows = _measured().get(device)
    if rows is None:
        return Answer(False, f"nothing was measured on {device}", False)
    return answer(rows, question)


def is_forced() -> bool:
    """Whether one or the other is asked for, whatever was measured."""
    return _forced is not None


def is_known(device: str) -> bool:
    """Whether our kernels were run on a device of this name, or are asked for."""
    return device in _measured() if _forced is None else _forced


def answer(rows: list[dict[str, Any]], question: Question) -> Answer:
    """Say whether our kernels are to run, by the measured rows of a device, and why.

    Each row has the fields of a question and `ratio`, the lower quartile of torch.nn / ours. Past
    the last measured size that one speaks, but does not cover the asked one.
    """
    cell = cell_of(question.cell).timed_as or question.cell
    alike = (cell, question.math, question.form, question.is_training)
    ratios = {
        (row["hidden"], row["batch"]): row["ratio"]
        for row in rows
        if (row["cell"], row["math"], row["form"], row["is_training"]) == alike
    }
    if not ratios:
        return Answer(False, "no such layer was measured on this device", False)
    around = [
        (hidden, batch)
        for hidden in _around(question.hidden, {hidden for hidden, _ in ratios})
        for batch in _around(question.batch, {batch for _, batch in ratios})
    ]
    missing = [place for place in around if place not in ratios]
    if missing:
        reason = "H {} at B {} was not measured on this device".format(*missing[0])
        return Answer(False, reason, False)
    worst = min(around, key=lambda place: ratios[place])
    text = f"{ratios[worst]:.2f} times as fast as torch.nn at H {worst[0]}, B {worst[1]}"
    asked = question.hidden, question.batch
    is_covered = all(
        min(known) <= value <= max(known)
        for value, known in zip(asked, zip(*around, strict=True), strict=True)
    )
    return Answer(ratios[worst] > 1, f"measured {text}", is_covered)


def _around(value: int, known: set[int]) -> set[int]:
    """Return the nearest known numbers on both sides; past the last, that one."""
    below = [k for k in known if k <= value]
    above = [k for k in known if k >= value]
    return {max(below, default=min(known)), min(above, default=max(known))}


@functools.cache
def _measured() -> dict[str, list[dict[str, Any]]]:
    text = resources.files("ostinato.cuda").joinpath("measured.json").read_text("utf-8")
    found: dict[str, list[dict[str, Any]]] = json.loads(text)
    return found
