"""A bidirectional GRU says who is speaking, on real, ragged sequences, beside torch.nn's.

    python examples/japanese_vowels.py [--epochs 30] [--seed 0] [--out build/demo]

Two models, equal but for the import, see the same batches in turns. The picture, the weights and
the numbers go to --out. Exits with 1 if the accuracy or the reloaded model is not as it should be.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch
from data import CHANNELS, SPEAKERS, japanese_vowels
from figure import draw
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_sequence
from tqdm import tqdm

from ostinato import nn as onn

# Test accuracy on the same split; examples/README.md has the sources.
PUBLISHED = {
    "passing-through regions (Kudo et al. 1999)": 0.941,
    "hidden Markov model (Kudo et al. 1999)": 0.962,
    "echo state networks (Jaeger et al. 2007)": 1.0,
}
# Seeds 0 to 4 reach 0.976 to 0.986; below this something is broken, not unlucky.
MIN_ACCURACY = 0.96
# The scores, float32 within +-5, come from sums in another order.
MAX_DIFFERENCE = 1e-4
HIDDEN, BATCH, LEARNING_RATE = 96, 15, 5e-3


class Classifier(torch.nn.Module):
    """Packed utterances in, one score per speaker out."""

    def __init__(self, gru: type[torch.nn.Module], mean: Tensor, std: Tensor) -> None:
        super().__init__()
        # Buffers, so that the saved file holds all that a prediction needs.
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.drop_input = torch.nn.Dropout(0.2)
        self.gru = gru(CHANNELS, HIDDEN, bidirectional=True)
        self.drop_state = torch.nn.Dropout(0.3)
        self.score = torch.nn.Linear(2 * HIDDEN, SPEAKERS)

    def forward(self, utterances: PackedSequence) -> Tensor:
        frames = (utterances.data - self.mean) / self.std  # (N, CHANNELS), no padding in between
        _, h_n = self.gru(utterances._replace(data=self.drop_input(frames)))
        state = torch.cat([h_n[0], h_n[1]], dim=1)  # last forward and last backward state, (B, 2H)
        return self.score(self.drop_state(state))


class Run:
    """One model in training, and what it has shown so far."""

    def __init__(self, model: Classifier, steps: int) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, LEARNING_RATE, total_steps=steps
        )
        self.loss: list[float] = []
        self.accuracy: list[float] = []
        self.seconds: list[float] = []

    def epoch(self, sequences: list[Tensor], speakers: Tensor, seed: int) -> None:
        # The same seed for both models: the same batches and the same dropout masks.
        torch.manual_seed(seed)
        self.model.train()
        total, start = 0.0, time.perf_counter()
        for rows in torch.randperm(len(sequences)).split(BATCH):
            scores = self.model(pack([sequences[row] for row in rows]))
            loss = cross_entropy(scores, speakers[rows], label_smoothing=0.1)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            total += loss.item() * len(rows)
        self.seconds.append(time.perf_counter() - start)
        self.loss.append(total / len(sequences))


def pack(sequences: list[Tensor]) -> PackedSequence:
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return pack_padded_sequence(pad_sequence(sequences), lengths, enforce_sorted=False)


@torch.inference_mode()
def predict(model: Classifier, utterances: PackedSequence) -> Tensor:
    return model.eval()(utterances)


def train(
    epochs: int, seed: int, train_set: tuple[list[Tensor], Tensor], test: PackedSequence,
    test_speakers: Tensor,
) -> tuple[Run, Run]:  # fmt: skip
    sequences, speakers = train_set
    frames = torch.cat(sequences)
    torch.manual_seed(seed)
    models = [Classifier(gru, frames.mean(0), frames.std(0)) for gru in (onn.GRU, torch.nn.GRU)]
    models[1].load_state_dict(models[0].state_dict())
    steps = epochs * -(-len(sequences) // BATCH)
    ours, theirs = (Run(model, steps) for model in models)

    bar = tqdm(range(epochs), desc="training both", unit="epoch")
    for epoch in bar:
        # In turns, and each goes first every other time, so that neither has the quieter machine.
        for run in (ours, theirs) if epoch % 2 == 0 else (theirs, ours):
            run.epoch(sequences, speakers, seed + epoch)
            hits = predict(run.model, test).argmax(1) == test_speakers
            run.accuracy.append(hits.double().mean().item())
        bar.set_postfix(loss=f"{ours.loss[-1]:.3f}", accuracy=f"{ours.accuracy[-1]:.1%}")
    return ours, theirs


def report(ours: Run, theirs: Run) -> None:
    accuracies = {
        "ostinato.nn.GRU, this run": ours.accuracy[-1],
        "torch.nn.GRU, this run": theirs.accuracy[-1],
        **PUBLISHED,
    }
    print("\nTest accuracy after the last epoch")
    for name, value in accuracies.items():
        print(f"  {name:<44}{value:7.1%}")

    threads = torch.get_num_threads()
    print(f"\nTime per epoch: median (range) of {len(ours.seconds)}, in turns, {threads} threads")
    for name, run in {"ostinato.nn.GRU": ours, "torch.nn.GRU": theirs}.items():
        low, middle, high = (f(run.seconds) * 1e3 for f in (min, median, max))
        print(f"  {name:<17}{middle:7.1f} ms   ({low:.1f} to {high:.1f})")
    print(f"  torch.nn / ours  {median(theirs.seconds) / median(ours.seconds):7.2f}")
    if any(median(run.seconds) > 1.5 * min(run.seconds) for run in (ours, theirs)):
        print("  These times are no evidence: the machine is busy (a median > 1.5 x its minimum).")


def load_into_torch(weights: Path) -> Classifier:
    # The statistics given here are overwritten by the file's.
    model = Classifier(torch.nn.GRU, torch.zeros(CHANNELS), torch.ones(CHANNELS))
    model.load_state_dict(load_file(weights))
    return model


def main() -> int:
    parser = argparse.ArgumentParser(description="A GRU learns to tell nine speakers apart.")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    options = parser.parse_args()
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")
    options.out.mkdir(parents=True, exist_ok=True)
    weights = options.out / "japanese_vowels.safetensors"
    picture = options.out / "japanese_vowels.png"

    try:
        train_set, (sequences, speakers) = japanese_vowels("TRAIN"), japanese_vowels("TEST")
    except FileNotFoundError as error:
        sys.exit(f"FAILED: {error}")
    test = pack(sequences)
    ours, theirs = train(options.epochs, options.seed, train_set, test, speakers)
    report(ours, theirs)

    save_file(ours.model.state_dict(), weights)
    scores, their_scores = predict(ours.model, test), predict(load_into_torch(weights), test)
    guesses, their_guesses = scores.argmax(1), their_scores.argmax(1)
    same = int((guesses == their_guesses).sum())
    apart = (scores - their_scores).abs().max().item()
    print(
        f"\nThe saved weights in torch.nn.GRU: {same} of {len(speakers)} predictions equal, "
        f"scores differ by {apart:.1e} at most"
    )

    confusion = torch.zeros(SPEAKERS, SPEAKERS, dtype=torch.int64)
    confusion.index_put_((speakers, guesses), torch.tensor(1), accumulate=True)
    draw(picture, ours, theirs, confusion.tolist(), PUBLISHED)
    print(f"\n{picture}\n{weights}")

    failures = []
    if not ours.accuracy[-1] >= MIN_ACCURACY:
        failures.append(f"accuracy {ours.accuracy[-1]:.1%} is under {MIN_ACCURACY:.0%}")
    if same != len(speakers):
        failures.append(f"{len(speakers) - same} predictions changed in torch.nn.GRU")
    if not apart <= MAX_DIFFERENCE:
        failures.append(f"scores changed by {apart:.1e} in torch.nn.GRU, {MAX_DIFFERENCE} allowed")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
