import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechgrok import seeds

names = st.lists(st.one_of(st.text(max_size=5), st.integers(-3, 3)), max_size=3)


@given(names, names)
def test_streams_differ_exactly_when_names_do(first: list, second: list) -> None:
    assert (seeds.derive(0, *first) == seeds.derive(0, *second)) == (
        [(type(n), n) for n in first] == [(type(n), n) for n in second]
    )


def test_a_stream_does_not_touch_global_state_or_other_streams() -> None:
    before = torch.random.get_rng_state()
    first = torch.randn(3, generator=seeds.stream(1, "noise", 0))
    torch.randn(5, generator=seeds.stream(1, "noise", 1))
    again = torch.randn(3, generator=seeds.stream(1, "noise", 0))
    assert torch.equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_numpy_integers_are_integers() -> None:
    assert seeds.derive(0, np.int64(5)) == seeds.derive(np.int32(0), 5)


def test_the_root_seed_matters() -> None:
    assert seeds.derive(0, "a") != seeds.derive(1, "a")
