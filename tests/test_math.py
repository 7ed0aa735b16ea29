"""docs/math.md, equation by equation in NumPy, against torch's autograd through the reference.

The engine's backward pass follows the document, so the document itself has to be right.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ostinato import reference
from support.cells import CELLS, RECORDS, has_c
from support.equations import walk

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("sizes", [[3, 3, 3, 3], [5, 4, 4, 1, 1], [4, 2], []], ids=str)
@pytest.mark.parametrize(("cell", "proj_size"), [*((cell, 0) for cell in CELLS), ("lstm", 2)])
def test_the_document_equals_autograd_through_the_reference(cell, proj_size, sizes):
    generator = torch.Generator().manual_seed(len(sizes))

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    # One row more than the first step takes, wherever sizes leave room: it must stay as it is.
    batch, size, hidden = 5, 3, 4
    width, rows = proj_size or hidden, RECORDS[cell].gates * hidden
    shapes = [(rows, size), (rows, width), (rows,), (rows,), *([(width, hidden)] * bool(proj_size))]
    weights = [draw(*shape) for _ in range(2) for shape in shapes]
    input, h_0 = draw(sum(sizes), size), draw(2, batch, width)
    c_0 = draw(2, batch, hidden) if has_c(cell) else None
    leaves = [input, h_0, *weights, *([c_0] if has_c(cell) else [])]
    results = reference.layer(
        cell, input, sizes, h_0, c_0, weights, has_biases=True, bidirectional=True
    )
    results = [a for a in results if a is not None]
    cotangents = [draw(*a.shape).detach() for a in results]
    # Without steps no weight is used: zero is then the gradient.
    gradients = torch.autograd.grad(results, leaves, cotangents, materialize_grads=True)

    names = ["ih", "hh", "b_ih", "b_hh", "hr"]
    doutput, dh_n, *dc_n = (a.numpy() for a in cotangents)
    ways = []
    for d in range(2):
        own = weights[d * len(shapes) : (d + 1) * len(shapes)]
        w = dict.fromkeys(names) | {k: a.detach().numpy() for k, a in zip(names, own, strict=False)}
        ways.append(
            walk(
                cell,
                w,
                input.detach().numpy(),
                sizes,
                h_0[d].detach().numpy(),
                None if c_0 is None else c_0[d].detach().numpy(),
                dh_n[d],
                dc_n[0][d] if dc_n else None,
                doutput[:, d * width : (d + 1) * width],
                reverse=d == 1,
            )
        )
    output, h_n, c_n, dinput, dw, dh_0, dc_0 = zip(*ways, strict=True)
    expected_results = [np.concatenate(output, -1), np.stack(h_n)]  # (34)
    expected = [dinput[0] + dinput[1], np.stack(dh_0)]
    expected += [dw[d][k] for d in range(2) for k in names[: len(shapes)]]
    if has_c(cell):
        expected_results.append(np.stack(c_n))
        expected.append(np.stack(dc_0))
    bound = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(results, [torch.from_numpy(a) for a in expected_results], **bound)
    torch.testing.assert_close(list(gradients), [torch.from_numpy(a) for a in expected], **bound)


def test_cited_equations_stand_in_the_document():
    document = (ROOT / "docs" / "math.md").read_text(encoding="utf-8")
    numbers = [int(n) for n in re.findall(r"^\((\d+)\) ", document, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    cited = set()
    for source in (ROOT / "src" / "ostinato" / "reference.py", ROOT / "csrc" / "cells.h"):
        found = re.findall(r"equations? (\d+)(?:-(\d+))?", source.read_text(encoding="utf-8"))
        cited |= {int(n) for pair in found for n in pair if n}
    assert {7, 10} <= cited
    assert cited <= set(numbers)
