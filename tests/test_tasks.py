import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechgrok.errors import ConfigError
from mechgrok.tasks import make_split
from tests.oracles import tiny_config

primes = st.sampled_from([5, 7, 11, 13])


def pairs(examples) -> set[tuple[int, int]]:
    return {(int(a), int(b)) for a, b, _ in examples.tokens}


@settings(deadline=None)
@given(p=primes, fraction=st.floats(0.1, 0.9), seed=st.integers(0, 5), kind=st.sampled_from(["unordered", "ordered"]))
def test_split_holds_every_pair_once_with_its_sum(p: int, fraction: float, seed: int, kind: str) -> None:
    split = make_split(tiny_config(task={"p": p, "train_fraction": fraction, "split": kind}).task, seed)
    train, test = pairs(split.train), pairs(split.test)
    assert train.isdisjoint(test)
    assert train | test == {(a, b) for a in range(p) for b in range(p)}
    for examples in (split.train, split.test):
        a, b, equals = examples.tokens.T
        assert (equals == p).all()
        assert torch.equal(examples.targets[:, -1], (a + b) % p)
        assert torch.equal(examples.weights, torch.tensor([0.0, 0.0, 1.0]).expand(len(examples), 3))


def test_unordered_split_keeps_mirrored_pairs_together_and_ordered_does_not() -> None:
    def leaks(kind: str) -> int:
        split = make_split(tiny_config(task={"p": 13, "split": kind}).task, 0)
        train = pairs(split.train)
        return sum((b, a) in train for a, b in pairs(split.test))

    assert leaks("unordered") == 0
    assert leaks("ordered") > 10


def test_the_split_depends_on_the_seed_alone() -> None:
    task = tiny_config().task
    assert torch.equal(make_split(task, 3).train.tokens, make_split(task, 3).train.tokens)
    assert pairs(make_split(task, 3).train) != pairs(make_split(task, 4).train)


def test_an_empty_side_is_refused() -> None:
    with pytest.raises(ConfigError, match="both sides of the split need at least one"):
        make_split(tiny_config(task={"train_fraction": 0.001}).task, 0)
