"""How figures are measured (`ostinato.bench`)."""

import itertools

import pytest

from ostinato.bench import Shape, compare, gain, ratio


def test_everyone_is_timed_in_every_round_and_warmed_before():
    order = []
    samples = compare({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0)
    assert len(samples["a"]) == len(samples["b"]) == 7
    assert all(seconds > 0 for seconds in samples["a"] + samples["b"])
    # Three calls each to learn how long one takes, then turns.
    turns = "".join(order[6:])
    assert turns.startswith("a")
    assert sum(x != y for x, y in itertools.pairwise(turns)) == 2 * 7 - 1


def test_progress_is_told_from_nothing_to_all():
    told = []
    compare({"a": lambda: None}, 0, lambda done, rounds: told.append((done, rounds)))
    assert told == [(done, 7) for done in range(8)]


def test_nothing_to_compare():
    with pytest.raises(ValueError, match="at least one"):
        compare({}, 1)


def test_the_ratio_is_taken_round_by_round():
    # A round that was disturbed, for both alike, does not show.
    assert ratio([2.0, 200.0, 2.0, 2.0], [1.0, 100.0, 1.0, 1.0]) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0], [])


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        (Shape("qrnn", 3, 4, 1, 1), "cell"),
        (Shape("gru", 3, 4, 0, 1), "batch"),
        (Shape("gru", 3, 4, 1, -1), "steps"),
        (Shape("gru", 3, 4, 1, 0, layers=2), "layers"),
        (Shape("gru", 3, 0, 1, 1), "hidden_size"),
    ],
)
def test_wrong_shapes(shape, match):
    with pytest.raises(ValueError, match=match):
        gain(shape)
