"""JapaneseVowels: 640 utterances of the vowels /ae/ by nine speakers, 7 to 29 steps of 12 channels.

The two files lie in the wheel of sktime. They are found through its metadata and read as text, so
sktime is never imported and its dependencies need not be installed.
"""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from torch import Tensor

CHANNELS = 12  # LPC cepstrum coefficients
SPEAKERS = 9
SIZES = {"TRAIN": 270, "TEST": 370}


def japanese_vowels(split: str) -> tuple[list[Tensor], Tensor]:
    """Reads one split, "TRAIN" or "TEST", in the order of the published files.

    Returns:
        The sequences, each (steps, CHANNELS), and the speakers 0 to 8, shape (utterances,).

    Raises:
        FileNotFoundError: sktime, or the file in it, is not installed.
        ValueError: the file does not hold the published number of utterances.
    """
    path = _locate(f"sktime/datasets/data/JapaneseVowels/JapaneseVowels_{split}.ts")
    _, _, body = path.read_text(encoding="utf-8").partition("@data\n")
    sequences, speakers = [], []
    # One utterance a line, "channel:...:channel:speaker"; a channel is "step,step,...".
    for line in body.splitlines():
        *channels, speaker = line.split(":")
        rows = [[float(value) for value in channel.split(",")] for channel in channels]
        sequences.append(torch.tensor(rows).T.contiguous())
        speakers.append(int(speaker) - 1)
    if len(sequences) != SIZES[split]:
        raise ValueError(f"{path}: expected {SIZES[split]} utterances, got {len(sequences)}")
    return sequences, torch.tensor(speakers)


def _locate(name: str) -> Path:
    hint = "install it with: pip install --no-deps sktime==1.2.0"
    try:
        path = Path(str(distribution("sktime").locate_file(name)))
    except PackageNotFoundError as error:
        raise FileNotFoundError(f"the data set is part of sktime; {hint}") from error
    if not path.is_file():
        raise FileNotFoundError(f"this sktime has no {name}; {hint}")
    return path
