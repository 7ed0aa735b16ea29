"""The user's cache: files of one process that a later one reads, whole or not at all.

It is $XDG_CACHE_HOME/ostinato or ~/.cache/ostinato, and may be deleted at any time. A file is named
by its key, a hash of all that its content depends on. It holds that key again and a hash of its
content, and is not read where either differs, or where another user could have written it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

_log = logging.getLogger("ostinato")


@dataclass
class Cache:
    """One kind of files, in a folder of their own."""

    folder_name: str
    suffix: str  # of a file's name, with its dot
    magic: bytes  # how a file begins
    lack: str  # what is so where there is no cache, for the log
    has_told: bool = False  # whether the log said it

    def folder(self) -> Path | None:
        """Name the folder, or None where the user has no home; it need not exist yet."""
        base = os.environ.get("XDG_CACHE_HOME", "")
        # The XDG specification: a relative path is to be ignored.
        if not os.path.isabs(base):
            home = os.path.expanduser("~")
            if not os.path.isabs(home):
                self._tell("this user has no home folder")
                return None
            base = os.path.join(home, ".cache")
        return Path(base, "ostinato", self.folder_name)

    def read(self, folder: Path, key: str) -> bytes | None:
        """Read the content of a file, or find that there is none which can be trusted."""
        try:
            with open(folder / f"{key}{self.suffix}", "rb") as file:
                status = os.fstat(file.fileno())
                # What another user could have written would act with this user's rights.
                if status.st_uid != os.getuid() or status.st_mode & 0o022:
                    return None
                text = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._tell(f"{folder} cannot be read ({error.strerror})")
            return None
        header, _, content = text.partition(b"\n")
        return content if header == self._header(key, content) else None

    def write(self, folder: Path, key: str, content: bytes, *, once: bool = False) -> bool:
        """Write a file; whoever reads at the same time sees all of it or nothing.

        With `once` a file that is there already stays as it is. Returns False there alone: where no
        file can be written, the log says so, once.
        """
        try:
            # The mode that makedirs takes is that of the last folder alone.
            os.makedirs(folder.parent.parent, exist_ok=True)
            folder.parent.mkdir(mode=0o700, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            # For the user only, which is mkstemp's way.
            number, temporary = tempfile.mkstemp(dir=folder, prefix=f"{key}.")
            try:
                with open(number, "wb") as file:
                    file.write(self._header(key, content) + b"\n" + content)
                return _put(temporary, folder / f"{key}{self.suffix}", once)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            self._tell(f"{folder} cannot be written ({error.strerror})")
            return True

    def _header(self, key: str, content: bytes) -> bytes:
        return b" ".join([self.magic, key.encode(), hashlib.sha256(content).hexdigest().encode()])

    def _tell(self, reason: str) -> None:
        """Say once that there is no cache."""
        if not self.has_told:
            self.has_told = True
            _log.warning("%s: %s", self.lack, reason)


def _put(temporary: str, path: Path, once: bool) -> bool:
    """Give a finished file its name; with `once` only where nothing has that name."""
    if once:
        try:
            os.link(temporary, path)
        except FileExistsError:
            os.unlink(temporary)
            return False
        except OSError:
            # A file system without links: two processes in the same moment may both write.
            if path.exists():
                os.unlink(temporary)
                return False
        else:
            os.unlink(temporary)
            return True
    os.replace(temporary, path)
    return True
