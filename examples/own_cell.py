"""A recurrent cell of one's own beside cells of the zoo: who learns to add two numbers far apart?

    python examples/own_cell.py [--length 100] [--steps 800] [--seed 0] [--no-times]

`Paced`, below, is the cell: six lines of torch. Every cell sees the same batches. The picture and
the numbers go to --out, build/demo. Exits with 1 if the own cell has not learned the task.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import torch
from figure import draw_cells
from torch import Tensor
from torch.nn.functional import linear, mse_loss
from tqdm import tqdm

from ostinato import nn, zoo

BATCH, HIDDEN, LEARNING_RATE = 64, 48, 1e-2
TESTED, TEST_EVERY = 500, 20
ROUNDS = 21
# Two numbers from 0 to 1: whoever always answers 1 is wrong by their variance.
GUESS = 1 / 6
# Seeds 0 to 4 reach 0.0005 to 0.0016; above this something is broken, not unlucky.
MAX_ERROR = 0.01
# What the engine and torch may differ by in float32, where sums have another order.
BOUND = {"rtol": 1e-4, "atol": 1e-4}


class Paced(nn.Cell):
    """An RNN of tanh whose units move at a pace of their own, when the input lets them.

    w = sigmoid(x_w + pace), n = tanh(x_n + h_n), h' = h + w * (n - h). Gates n, w.
    """

    # W_ih has two gates, W_hh one: the input alone says when to write.
    x_gates, h_gates = 2, 1

    def __init__(self, hidden_size, **factory):
        super().__init__(hidden_size, **factory)
        self.pace = torch.nn.Parameter(torch.linspace(0, -4, hidden_size, **factory))

    def step(self, x, h, state):
        w = torch.sigmoid(x[1] + self.pace)
        return state + w * (torch.tanh(x[0] + h[0]) - state)


class PythonLoop(torch.nn.Module):
    """What one would write without the engine: the same step and weights, in a loop over time."""

    def __init__(self, layer: nn.Recurrent) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        layer = self.layer
        gates_x = linear(input, layer.weight_ih_l0, layer.bias_ih_l0)  # (T, B, 2 * H)
        h = input.new_zeros(input.shape[1], HIDDEN)
        output = []
        for x in gates_x:
            gates_h = linear(h, layer.weight_hh_l0, layer.bias_hh_l0)  # (B, H)
            h = layer.cell_l0.step(x.chunk(2, dim=1), (gates_h,), h)
            output.append(h)
        return torch.stack(output), h


def adding_problem(length: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws a batch.

    Returns:
        Input (length, rows, 2): numbers from 0 to 1, and 1 beside the two that count, one in each
        half of the sequence. Target (rows, 1): their sum.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(length, rows, generator=generator)
    half = length // 2
    where = torch.randint(half, (2, rows), generator=generator) + torch.tensor([[0], [half]])
    marks = torch.zeros(length, rows).scatter_(0, where, 1.0)
    return torch.stack([numbers, marks], dim=2), (numbers * marks).sum(0).unsqueeze(1)


class Adder(torch.nn.Module):
    """Sequences in, one sum for each out."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.sum = torch.nn.Linear(HIDDEN, 1)

    def forward(self, input: Tensor) -> Tensor:
        output, _ = self.layer(input)
        return self.sum(output[-1])


def layers(length: int) -> dict[str, torch.nn.Module]:
    """Makes a layer of each cell; those of the zoo need no line of one's own."""

    def recurrent(cell: type[nn.Cell], num_layers: int = 1) -> torch.nn.Module:
        return nn.Recurrent(cell, 2, HIDDEN, num_layers)

    janet = recurrent(zoo.JANET)
    with torch.no_grad():  # as its paper asks: to remember up to `length` steps
        janet.bias_hh_l0[:HIDDEN] = 0
        janet.bias_ih_l0[:HIDDEN] = torch.log(1 + (length - 2) * torch.rand(HIDDEN))
    return {
        "Paced (own)": recurrent(Paced),
        "MinimalGatedUnit": recurrent(zoo.MinimalGatedUnit),
        "UGRNN": recurrent(zoo.UGRNN),
        "JANET": janet,
        "CoupledLSTM": recurrent(zoo.CoupledLSTM),
        "SLSTM": recurrent(zoo.SLSTM),
        "IndRNN, 2 layers": recurrent(zoo.IndRNN, 2),
        "nn.RNN (built in)": nn.RNN(2, HIDDEN),
    }


class Run:
    """One cell in training, and what it has shown."""

    def __init__(self, layer: torch.nn.Module, length: int, steps: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = Adder(layer)
        self.optimizer = torch.optim.Adam(self.model.parameters(), LEARNING_RATE)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, LEARNING_RATE, total_steps=steps
        )
        self.length, self.seed = length, seed
        self.steps: list[int] = []
        self.errors: list[float] = []  # mean squared, on the test set, after each of `steps`
        self.seconds: list[float] = []  # of training steps

    def train(self, steps: Iterable[int]) -> None:
        test = adding_problem(self.length, TESTED, self.seed << 32)
        for step in steps:
            self.learn(step)
            if step % TEST_EVERY == 0:
                with torch.no_grad():
                    error = mse_loss(self.model(test[0]), test[1]).item()
                self.steps.append(step)
                self.errors.append(error)
                if isinstance(steps, tqdm):
                    steps.set_postfix(error=f"{error:.5f}")

    def learn(self, step: int) -> None:
        input, target = adding_problem(self.length, BATCH, (self.seed << 32) + step)
        loss = mse_loss(self.model(input), target)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()

    def take_time(self) -> None:
        """Takes one more training step, without what it changes."""
        input, target = adding_problem(self.length, BATCH, self.seed << 32)
        start = time.perf_counter()
        mse_loss(self.model(input), target).backward()
        self.seconds.append(time.perf_counter() - start)

    @property
    def milliseconds(self) -> float:
        return 1e3 * median(self.seconds)


def compare_times(runs: Iterable[Run]) -> None:
    """Takes the times in turns, so that none has the quieter machine."""
    for _ in tqdm(range(ROUNDS), desc=f"{'times, in turns':<18}", unit="round"):
        for run in runs:
            run.take_time()


def main() -> int:
    parser = argparse.ArgumentParser(description="Recurrent cells learn to add.")
    parser.add_argument("--length", type=int, default=100)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument("--no-times", action="store_true", help="only the learning curves")
    options = parser.parse_args()
    for name, least in (("length", 4), ("steps", TEST_EVERY)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}")
    options.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(options.seed)
    given = options.length, options.steps, options.seed
    runs = {name: Run(layer, *given) for name, layer in layers(options.length).items()}
    for name, run in runs.items():
        run.train(tqdm(range(1, options.steps + 1), desc=f"{name:<18}", unit="step"))

    own = runs["Paced (own)"]
    by_hand = PythonLoop(own.model.layer)
    input, _ = adding_problem(options.length, TESTED, options.seed)
    with torch.no_grad():
        torch.testing.assert_close(own.model.layer(input)[0], by_hand(input)[0], **BOUND)
    loop = Run(by_hand, *given)
    if not options.no_times:
        compare_times([*runs.values(), loop])

    print(f"\nTest error after {options.steps} steps (a guess: {GUESS:.4f})")
    for name, run in runs.items():
        print(f"  {name:<20}{run.errors[-1]:10.5f}")
    if not options.no_times:
        print("\nTime of a training step")
        for name, run in {**runs, "Paced, Python loop": loop}.items():
            print(f"  {name:<20}{run.milliseconds:9.1f} ms")
        if any(median(run.seconds) > 1.5 * min(run.seconds) for run in runs.values()):
            print(
                "  These times are no evidence: the machine is busy (a median > 1.5 x its minimum)."
            )

    numbers = {
        name: {"steps": run.steps, "errors": run.errors, "seconds": run.seconds}
        for name, run in runs.items()
    }
    numbers["Paced, Python loop"] = {"seconds": loop.seconds}
    (options.out / "own_cell.json").write_text(json.dumps(numbers, indent=1) + "\n")
    picture = options.out / "own_cell.png"
    times = None if options.no_times else loop.milliseconds
    draw_cells(picture, runs, times, GUESS, options.length)
    print(f"\n{picture}")
    if not own.errors[-1] <= MAX_ERROR:
        print(f"FAILED: an error of {own.errors[-1]:.4f}, {MAX_ERROR} allowed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
