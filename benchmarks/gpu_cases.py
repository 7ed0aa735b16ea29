"""What is measured on a GPU, and in which order: what is worth most comes first.

The whole product has 4,320 rows, more than ten minutes hold. A run goes down this list until its
budget is spent, so every beginning of the list must be a benchmark by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cases import Case

CELLS = ("GRU", "LSTM", "RNN")
# Where the goals lie first, then the ends.
HIDDEN = (256, 512, 768, 128, 192, 1024, 64, 160, 2048)
BATCH = (16, 1, 64, 8, 256)
# tf32 and fp32 are both float32, with cuDNN's TensorFloat-32 allowed or not.
PRECISIONS = ("bf16", "fp16", "tf32", "fp32")
FORMS = ("padded", "packed", "bidirectional", "2-layer")
# Steps of the rows that show what a call costs beside its steps.
SHORT = 16


@dataclass(frozen=True)
class GpuCase:
    """One row: a layer of `hidden` inputs and as many units.

    Args:
        cell: "RNN" (tanh), "GRU" or "LSTM".
        precision: "bf16", "fp16", "tf32" or "fp32".
        train: forward and backward of every parameter and the input, instead of forward.
        form: "padded", "packed", "bidirectional" or "2-layer"; the last two are padded.
        batch: B.
        hidden: H, and the input's size.
        steps: T; 0 for the usual number at this size.
    """

    cell: str
    precision: str
    train: bool
    form: str
    batch: int
    hidden: int
    steps: int = 0

    def __post_init__(self) -> None:
        if not self.steps:
            object.__setattr__(self, "steps", usual_steps(self.batch, self.hidden))

    @property
    def kind(self) -> str:
        return "training" if self.train else "forward"

    @property
    def name(self) -> str:
        """The row's label: words by which `--only` chooses."""
        sizes = f"T{self.steps} B{self.batch} H{self.hidden}"
        return f"{self.cell} {self.precision} {self.kind} {self.form} {sizes}"

    @property
    def layers(self) -> int:
        return 2 if self.form == "2-layer" else 1

    def lengths(self) -> list[int]:
        """Steps of each row, falling: those of the CPU's benchmark."""
        ragged = 0.24 if self.form == "packed" else 1.0
        return Case("GRU", self.steps, self.batch, 1, 1, ragged=ragged).lengths()

    def sizes(self) -> dict[str, Any]:
        """What a row of the results says about its case."""
        return {
            "name": self.name,
            "cell": self.cell,
            "precision": self.precision,
            "kind": self.kind,
            "form": self.form,
            "steps": self.steps,
            "batch": self.batch,
            "hidden": self.hidden,
        }


def usual_steps(batch: int, hidden: int) -> int:
    """T: long enough that a step shows, short enough for some milliseconds."""
    steps = 256 if hidden < 1024 else 128 if hidden < 2048 else 64
    return steps // 2 if batch >= 256 else steps


def everything() -> list[GpuCase]:
    """The whole product, cells innermost, so that each beginning compares them."""
    product = itertools.product(PRECISIONS, FORMS, BATCH, HIDDEN, (False, True), CELLS)
    return [
        GpuCase(cell, precision, train, form, batch, hidden)
        for precision, form, batch, hidden, train, cell in product
    ]


def tier(case: GpuCase) -> int:
    """Order of a case: the smaller, the sooner."""
    core = case.cell != "RNN" and case.batch in (1, 16, 64)
    # A goal of its own.
    goal = (case.cell, case.precision, case.hidden, case.batch) == ("LSTM", "fp16", 768, 16)
    if case.form == "padded" and ((core and case.precision == "bf16") or goal):
        return 0 if case.steps > SHORT else 1
    if core and case.precision == "bf16":
        return 2
    if core and case.form == "padded":
        return 3
    return 4 if case.form == "padded" else 5


def ordered() -> list[GpuCase]:
    """Every row, in the order in which it is measured."""
    short = [
        GpuCase(cell, "bf16", False, "padded", batch, hidden, SHORT)
        for batch, hidden, cell in itertools.product((1, 16), (128, 256, 512), ("GRU", "LSTM"))
    ]
    # A stable sort: inside a tier the order of the product stays.
    return sorted(everything() + short, key=tier)


def is_quick(case: GpuCase) -> bool:
    """Whether `--quick` measures it: a few dozen rows."""
    if tier(case) == 0:
        return case.batch in (1, 16) and case.hidden in (128, 256, 512, 1024)
    forms = tier(case) == 2 and (case.batch, case.hidden, case.cell) == (16, 256, "GRU")
    return forms or (tier(case) == 1 and case.hidden == 256)


def matches(case: GpuCase, only: Iterable[str]) -> bool:
    """Whether a case has all words of one of the filters.

    Args:
        case: a case.
        only: filters such as "GRU bf16 H256,H512"; a comma is an or. No filter lets all pass.
    """
    filters = list(only)
    words = set(case.name.split())
    return not filters or any(
        all(words & set(word.split(",")) for word in each.split()) for each in filters
    )


def chosen(quick: bool, only: Iterable[str], done: Iterable[str] = ()) -> list[GpuCase]:
    """The rows of a run.

    Args:
        quick: few of them.
        only: filters.
        done: names of rows that were measured before.

    Raises:
        ValueError: a filter that no row has.
    """
    only, done = list(only), set(done)
    known = {word for case in ordered() for word in case.name.split()}
    for word in (word for each in only for part in each.split() for word in part.split(",")):
        if word not in known:
            raise ValueError(f"--only: expected words such as GRU, bf16 or H256, got {word!r}")
    return [
        case
        for case in ordered()
        if (not quick or is_quick(case)) and matches(case, only) and case.name not in done
    ]


def within(
    cases: list[GpuCase], budget: float, clock: Callable[[], float], started: float
) -> Iterator[GpuCase]:
    """Yield cases until `budget` seconds are over; a row that was begun is finished.

    Args:
        cases: what is to be measured.
        budget: seconds from `started`.
        clock: seconds of now.
        started: seconds of the start.
    """
    for case in cases:
        if clock() - started >= budget:
            return
        yield case
