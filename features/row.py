"""One row of the table: something that a user asks of a recurrent layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """What is asked, and a program that asks it.

    Args:
        title: what a user would say, in a few words.
        ask: is called with a library (torch.nn or ostinato.nn), whose names are RNN, GRU, LSTM and
            their cells; returns nothing where the answer is right, and raises where there is none
            or a wrong one.
    """

    title: str
    ask: Callable[[Any], None]
