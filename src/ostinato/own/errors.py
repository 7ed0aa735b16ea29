"""What a step may not do, said with the line of the user's file."""

from __future__ import annotations

import linecache
import os
import sys
import sysconfig
from types import FrameType, TracebackType

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_STANDARD = sysconfig.get_paths()["stdlib"] + os.sep


class StepError(TypeError, ValueError):
    """A step does what cannot be recorded.

    Attributes:
        operation: what it did, in torch's words.
        filename: the user's file, or "" where it is not known.
        lineno: the line in it, or 0.
    """

    def __init__(self, operation: str, reason: str, instead: str = "") -> None:
        self.operation, self.reason, self.instead = operation, reason, instead
        self.cell, self.filename, self.lineno = "", "", 0
        super().__init__(operation)

    def at(self, cell: str, filename: str, lineno: int) -> StepError:
        """Say of which cell and line this is, unless it is known already."""
        if not self.lineno:
            self.cell, self.filename, self.lineno = cell, filename, lineno
        return self

    def __str__(self) -> str:
        line = linecache.getline(self.filename, self.lineno).strip()
        where = f' (File "{self.filename}", line {self.lineno}: {line})' if self.lineno else ""
        instead = f". Instead: {self.instead}" if self.instead else ""
        step = f"{self.cell}.step: " if self.cell else ""
        return f"{step}{self.operation}: {self.reason}{where}{instead}"


class StepAttributeError(StepError, AttributeError):
    """A step asks a value for what it does not have."""


def user_frame() -> FrameType | None:
    """Return the innermost frame of the stack that is the user's code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def user_line(traceback: TracebackType | None) -> tuple[str, int]:
    """Return file and line of the innermost frame of a traceback that is the user's code."""
    found = ("", 0)
    while traceback is not None:
        filename = traceback.tb_frame.f_code.co_filename
        if _is_users(filename):
            found = (filename, traceback.tb_lineno)
        traceback = traceback.tb_next
    return found


def _is_users(filename: str) -> bool:
    if filename.startswith(("<frozen", "<__array_function__")):
        return False
    path = os.path.abspath(filename)
    if path.startswith(_HERE) or any(path.startswith(folder) for folder in _libraries()):
        return False
    return not path.startswith(_STANDARD) or "site-packages" in path


def _libraries() -> list[str]:
    """Return the folders of the libraries that a step calls."""
    names = [sys.modules[name].__file__ for name in ("torch", "numpy") if name in sys.modules]
    return [os.path.dirname(os.path.abspath(name)) + os.sep for name in names if name]
