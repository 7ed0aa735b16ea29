"""What torch.nn's recurrent layers refuse and Ostinato does: each row is run on both.

Usage: python features/run.py [--check] [--write docs/features.md]

A row that fails on Ostinato ends the script with an error. `--check` fails, too, where the page has
other rows, and names those in which torch.nn said something else: a few depend on the processor.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from row import Row

import ostinato.nn

# In the order of the page. Each holds ROWS.
TOPICS = ("compiling", "deploying", "derivatives", "sequences", "models", "training")
# What a library that refuses raises. Anything else is our mistake.
ANSWERS = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, ImportError)
BEGIN, END = "<!-- features -->", "<!-- end of features -->"


def answer(row: Row, library: Any) -> str:
    """Return "yes", or what the library said instead."""
    torch.manual_seed(0)
    try:
        row.ask(library)
    except ANSWERS as error:
        lines = str(error).strip().splitlines() or [""]
        first = lines[0].replace("|", "/").replace("<", "&lt;")
        return f"{type(error).__name__}: {first[:90]}"
    finally:
        torch._dynamo.reset()
    return "yes"


def rows() -> list[Row]:
    """Every row, topic after topic."""
    return [row for topic in TOPICS for row in importlib.import_module(topic).ROWS]


def table() -> tuple[str, list[str]]:
    """Return the table in Markdown, and the rows that Ostinato fails."""
    lines = ["| | torch.nn | ostinato.nn |", "| --- | --- | --- |"]
    failed = []
    for row in rows():
        theirs, ours = answer(row, torch.nn), answer(row, ostinato.nn)
        lines.append(f"| {row.title} | {theirs} | {ours} |")
        print(lines[-1], flush=True)
        if ours != "yes":
            failed.append(row.title)
    return "\n".join(lines), failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail where the page says otherwise")
    parser.add_argument("--write", type=Path, help="put the table into this page")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    os.environ.setdefault("TORCH_LOGS", "-all")
    found, failed = table()
    for title in failed:
        print(f"ostinato.nn fails: {title}", file=sys.stderr)
    page = Path(__file__).parent.parent / "docs" / "features.md"
    if arguments.write:
        text = arguments.write.read_text()
        before, rest = text.split(BEGIN, 1)
        arguments.write.write_text(f"{before}{BEGIN}\n\n{found}\n\n{END}{rest.split(END, 1)[1]}")
    is_stale = arguments.check and not compare(found, page.read_text())
    return bool(failed) or is_stale


def compare(found: str, page: str) -> bool:
    """Whether the page has the rows that were found; says what torch.nn answers otherwise."""
    text = page.split(BEGIN, 1)[1].split(END, 1)[0]
    told = {line.split(" | ")[0]: line for line in text.strip().splitlines()}
    new = {line.split(" | ")[0]: line for line in found.splitlines()}
    for title in told.keys() ^ new.keys():
        print(f"docs/features.md: make features has another row: {title}", file=sys.stderr)
    for title in told.keys() & new.keys():
        if told[title] != new[title]:
            print(f"here torch.nn answers: {new[title]}\n  in docs/features.md: {told[title]}")
    return told.keys() == new.keys()


if __name__ == "__main__":
    sys.exit(main())
