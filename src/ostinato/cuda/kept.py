"""What trials found: kept for this process and, in the user's cache, for later ones.

An answer does not change any more once it is kept. Of several processes that try at once the first
to write is right, and the others take what it wrote.

Legend: T steps, B batch, I input, D directions, L layers.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from ostinato.cuda.cache import Cache

_TRIALS = Cache(
    "trials", ".json", b"ostinato trial 1", "which kernels are faster is tried in each process"
)


class Layer(NamedTuple):
    """What a trial is about, whatever the sizes of a batch."""

    cell: str  # the words are those of `ostinato.cuda.choice.Question`
    math: str
    hidden: int
    form: str
    is_training: bool
    directions: int
    layers: int  # L of a stack that runs as a whole, or 1
    is_beyond_cudnn: bool  # whether the reference alone serves it beside our kernels
    has: str = ""  # what a call may have or not: biases, lengths, resets, all states


class Place(NamedTuple):
    """What an answer is kept for; sizes are rounded up to powers of two."""

    layer: Layer
    batch: int
    steps: int
    size: int  # I, or 1 of a stack, whose layers differ in it

    @classmethod
    def of(cls, layer: Layer, batch: int, steps: int, size: int) -> Place:
        """Return the place of a call: a ragged last batch is to need no trial of its own.

        Example:
            >>> layer = Layer("gru", "bf16", 256, "padded", True, 1, 1, False)
            >>> Place.of(layer, 30, 100, 1)[1:]
            (32, 128, 1)
        """
        sizes = batch, steps, size if layer.layers == 1 else 1
        return cls(layer, *(1 << max(value - 1, 0).bit_length() for value in sizes))


class Kept(NamedTuple):
    """An answer."""

    is_ours: bool
    reason: str


_known: dict[tuple[str, Place], Kept] = {}
# Of these there was no file when this process looked.
_absent: set[tuple[str, Place]] = set()


def of(identity: str, place: Place, *, anew: bool = False) -> Kept | None:
    """Return what is known of a place; `identity` stands for all that it depends on besides.

    With `anew` a file is looked for again where there was none before.
    """
    found = _known.get((identity, place))
    if found is not None or ((identity, place) in _absent and not anew):
        return found
    folder = _TRIALS.folder()
    found = None if folder is None else _read(folder, _key(identity, place))
    if found is not None:
        return remember(identity, place, found)
    _absent.add((identity, place))
    return None


def of_layer(identity: str, layer: Layer) -> Kept | None:
    """Return what is known of a layer, for batches of any size: ours if every answer says so."""
    found = {
        _key(who, place): kept
        for (who, place), kept in list(_known.items())
        if (who, place.layer) == (identity, layer)
    }
    folder = _TRIALS.folder()
    if folder is not None:
        for path in folder.glob(f"{_key(identity, layer)}.*{_TRIALS.suffix}"):
            key = path.name.removesuffix(_TRIALS.suffix)
            kept = _read(folder, key)
            if kept is not None:
                found.setdefault(key, kept)
    if not found:
        return None
    ours = sum(kept.is_ours for kept in found.values())
    return Kept(ours == len(found), f"chosen by {ours} of {len(found)} trials on this device")


def keep(identity: str, place: Place, found: Kept) -> Kept:
    """Keep an answer; return it, or what another process was sooner to write."""
    folder, key = _TRIALS.folder(), _key(identity, place)
    if folder is not None:
        content = json.dumps({**found._asdict(), "place": place}).encode()
        if not _TRIALS.write(folder, key, content, once=True):
            written = _read(folder, key)
            if written is None:
                # What is there cannot be trusted. Others may find the same in this moment.
                _TRIALS.write(folder, key, content)
                written = _read(folder, key)
            found = written or found
    return remember(identity, place, found)


def remember(identity: str, place: Place, found: Kept) -> Kept:
    """Keep an answer for this process alone; return what is kept."""
    return _known.setdefault((identity, place), found)


def _read(folder: Path, key: str) -> Kept | None:
    content = _TRIALS.read(folder, key)
    if content is None:
        return None
    fields: dict[str, Any] = json.loads(content)
    return Kept(fields["is_ours"], fields["reason"])


def _key(identity: str, about: Place | Layer) -> str:
    """Name the file of a place; of a layer, what the names of its files begin with."""
    layer = about.layer if isinstance(about, Place) else about
    parts = [(identity, layer)] if layer is about else [(identity, layer), (identity, about)]
    texts = (json.dumps(part).encode() for part in parts)
    return ".".join(hashlib.sha256(text).hexdigest()[:32] for text in texts)
