"""Normal numbers by our own loops: torch's, and what the formula says."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from mechgrok import seeds
from mechgrok.loops.normals import Normals

FLOAT = torch.zeros(1)


def streams(n: int) -> list[torch.Generator]:
    return [seeds.stream(7, "normals", k) for k in range(n)]


@pytest.mark.parametrize("n", [16, 17, 31, 32, 33, 47, 48, 608, 624, 625, 640, 1000, 4123])
def test_they_are_torchs_call_after_call(n: int) -> None:
    """Up to the rounding of angle and logarithm; a wrong word would give another number altogether."""
    ours, theirs = Normals(streams(3), n, FLOAT), streams(3)
    for _ in range(100 if n < 100 else 6):
        wanted = torch.stack([torch.randn(n, generator=rng) for rng in theirs])
        torch.testing.assert_close(ours(), wanted, rtol=0, atol=3e-6)


def test_they_are_box_and_mullers_of_the_twisters_words() -> None:
    (rng,), n = streams(1), 2**18
    drawn = Normals([rng], n, FLOAT)()[0].double().numpy()
    words = np.random.RandomState(rng.initial_seed() & 0xFFFF_FFFF).randint(0, 2**32, n, dtype=np.uint32)
    u = (words % 2**24).reshape(-1, 2, 8) / 2**24
    length, angle = np.sqrt(-2 * np.log1p(-u[:, 0])), 2 * np.pi * u[:, 1]
    exact = np.stack([length * np.cos(angle), length * np.sin(angle)], 1).reshape(-1)
    assert np.abs(drawn - exact).max() < 1e-6
    assert kstest(drawn, "norm").pvalue > 1e-3 and kstest(1.01 * drawn + 0.01, "norm").pvalue < 1e-3


def test_a_stream_is_the_same_alone_and_its_generator_is_left_as_it_was() -> None:
    rngs = streams(4)
    before = [rng.get_state() for rng in rngs]
    together, alone = Normals(rngs, 100, FLOAT), Normals(rngs[2:3], 100, FLOAT)
    first, second = together(), together()
    assert torch.equal(first[2:3], alone()) and torch.equal(second[2:3], alone())
    assert len(torch.cat([first, second]).unique()) == 800
    assert all(torch.equal(rng.get_state(), state) for rng, state in zip(rngs, before, strict=True))


@pytest.mark.parametrize(("n", "dtype"), [(15, torch.float32), (1, torch.float32), (100, torch.float64)])
def test_what_the_loops_do_not_serve_is_torchs_own(n: int, dtype: torch.dtype) -> None:
    ours, theirs = Normals(streams(2), n, torch.zeros(1, dtype=dtype)), streams(2)
    for _ in range(3):
        found = ours()
        assert found.dtype == dtype
        assert torch.equal(found, torch.stack([torch.randn(n, generator=rng, dtype=dtype) for rng in theirs]))
