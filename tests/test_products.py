"""Products in pieces, whatever their sizes and however their numbers lie, against float64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from mechgrok import seeds
from mechgrok.loops.kept import OPTIONS, keeper
from mechgrok.loops.lanes import WIDTH
from mechgrok.loops.tiles import FLOAT_TERMS, tile
from mechgrok.replicas.products import loop, padded, product

_piece = tile(FLOAT_TERMS, WIDTH, 1, (1, WIDTH))


@njit(**OPTIONS)
def _product(out, add, since, a, a_row, a_term, x, n_terms, n_rows, n_lanes):
    product(out, 3, n_lanes, add, since, a, 1, a_row, a_term, x, 0, WIDTH, WIDTH * n_terms, n_terms, n_rows, n_lanes)


@njit(**OPTIONS)
def _by_columns(out, add, a, x, n_terms, n_lanes):
    _piece(out, 0, n_lanes, add, 0, a, 0, 0, 0, x, 0, WIDTH, 0, n_terms, n_lanes)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=seeds.stream(sum(shape), "products"))


def laid_out(x: torch.Tensor) -> np.ndarray:
    """Sixteen columns, and the next sixteen after them; NaN in the columns that are not there."""
    full = torch.full((len(x), padded(x.shape[1])), torch.nan)
    full[:, : x.shape[1]] = x
    return torch.cat([part.flatten() for part in full.split(WIDTH, dim=1)]).numpy()


SIZES = st.one_of(st.integers(1, 40), st.sampled_from([8, 16]))


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 25), SIZES, SIZES, st.booleans(), st.booleans(), st.booleans())
def test_products_of_any_size(n_rows: int, n_terms: int, n_lanes: int, add: bool, apart: bool, turned: bool) -> None:
    """What lies around the product stays as it is, and what lies around its factors is not looked at."""
    a, x = normal(n_rows, n_terms), normal(n_terms, n_lanes)
    given_ = (a.T if turned else a).contiguous().flatten()
    strides = (1, n_rows) if turned else (n_terms, 1)
    size = n_rows * n_lanes
    out = torch.cat([torch.full((3,), 7.0), normal(size), torch.full((40,), 7.0), normal(size + 1)])
    since = size + 41 if apart else 0
    before = out.clone()
    around = torch.full((1,), torch.nan)
    _product(
        out.numpy(),
        add,
        since,
        torch.cat([around, given_, around]).numpy(),
        *strides,
        laid_out(x),
        n_terms,
        n_rows,
        n_lanes,
    )
    made = slice(3, 3 + size)
    wanted = (a.double() @ x.double()).flatten() + add * before[since:][made].double()
    torch.testing.assert_close(out[made].double(), wanted, rtol=1e-5, atol=1e-5)
    assert bool((out[:3] == 7).all()) and torch.equal(out[made.stop :], before[made.stop :])


@settings(deadline=None)
@given(SIZES, st.integers(1, WIDTH), st.booleans())
def test_a_piece_whose_strides_are_known(n_terms: int, n_lanes: int, add: bool) -> None:
    a, x, out = normal(n_terms, WIDTH), normal(n_terms, n_lanes), normal(WIDTH, n_lanes)
    wanted = a.T.double() @ x.double() + add * out.double()
    _by_columns(out.view(-1).numpy(), add, a.view(-1).numpy(), laid_out(x), n_terms, n_lanes)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [loop, keeper()])
def test_a_loop_made_in_a_function_needs_a_name(compiled: Callable) -> None:
    def made(x):
        x[0] = 1

    with pytest.raises(ValueError, match=r"<locals>\.made needs a __qualname__"):
        compiled(made)
    made.__qualname__ = "one_of_many"
    compiled(made)
