"""What a test has to know of the device that it runs on (`--device`)."""

import contextlib

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_sequence
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from support.tolerances import tolerance


def device_type():
    """Where torch makes tensors: "cpu", "cuda"."""
    return torch.get_default_device().type


def on_cpu():
    return device_type() == "cpu"


def engine_dtype():
    """float64 where an engine computes in it; no kernel for GPUs does."""
    return torch.float64 if on_cpu() else torch.float32


def assert_equal(actual, expected):
    """Compare bit by bit on the CPU, whose engine promises that, elsewhere up to roundings."""
    if expected.device.type == "cpu":
        assert actual.device.type == "cpu"
        assert torch.equal(actual, expected), f"{actual} is not {expected}"
        return
    bound = tolerance(expected.dtype, 64)
    # A sum rounds in proportion to its terms, which may cancel.
    largest = expected.detach().abs().max().item() if expected.numel() else 0.0
    bound["atol"] *= max(1.0, largest)
    torch.testing.assert_close(actual, expected, **bound)


def same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert_equal(a, e)


def assert_near(actual, expected, steps=16):
    """Hold the tensors of one tree to those of another, up to the roundings of so many steps."""
    for a, e in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, e, **tolerance(e.dtype, steps))


def moved(tensors):
    """What was made while tests were collected, where it is to be; "meta" stays."""

    def move(leaf):
        return leaf if getattr(leaf, "is_meta", False) else to(leaf, device_type())

    return tree_map(move, tensors, is_leaf=is_packed)


def to(tree, device):
    """Bring tensors to a device, of packed rows the data alone."""
    kinds = (torch.Tensor, PackedSequence)
    return tree_map_only(kinds, lambda t: t.to(device), tree, is_leaf=is_packed)


def is_packed(tree):
    return isinstance(tree, PackedSequence)


def without_cudnn():
    """Let torch run its other operators, since cuDNN's have no gradient in eval mode."""
    return torch.backends.cudnn.flags(enabled=False, allow_tf32=False)


def pack(rows, enforce_sorted=True):
    """Pack as torch's pack_sequence, whose lengths would be made on the default device."""
    lengths = [len(row) for row in rows]
    return pack_padded_sequence(pad_sequence(rows), lengths, enforce_sorted=enforce_sorted)


@contextlib.contextmanager
def exact_float32(backends):
    """Keep TF32 out of the products of float32."""
    # By the older switches: torch.export reads them, and fails where the newer ones say otherwise.
    # Those of cuDNN by its context, which torch's own test tools leave as the only way.
    matmul = backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        with backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = before


class OnGpu:
    """A tensor of the CPU that says it is on a GPU, to those who ask no more."""

    device = torch.device("cuda", 0)

    def __init__(self, tensor):
        self._tensor = tensor

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._tensor, name)
