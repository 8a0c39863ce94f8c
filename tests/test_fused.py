"""The compiled loops against float64, on every shape; and that they keep to their own memory."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from torch import Tensor

from mechgrok import seeds
from mechgrok.loops.lanes import LEAST, WIDTH, exp, larger, load, store
from mechgrok.replicas import fused
from mechgrok.replicas.attention import attend
from mechgrok.replicas.few_queries import are_few


def normal(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=seeds.stream(0, "fused", name))


def amid_nan(tensor: Tensor) -> Tensor:
    """The same numbers with NaN before and behind them in memory, at a multiple of 64 bytes."""
    room = torch.full((tensor.numel() + 64,), torch.nan)
    inside = room[32 : 32 + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor)


@njit
def exps(x, out):
    for at in range(0, len(x), WIDTH):
        store(out, at, WIDTH, exp(load(x, at, WIDTH, LEAST)))


@njit
def largers(a, b, out):
    store(out, 0, WIDTH, larger(load(a, 0, WIDTH, LEAST), load(b, 0, WIDTH, LEAST)))


def test_exp_to_the_last_digits_of_float32() -> None:
    x = np.linspace(-87, 88, 2**21).astype(np.float32)
    out = np.empty_like(x)
    exps(x, out)
    assert np.abs(out / np.exp(x.astype(np.float64)) - 1).max() < 1e-7


def test_exp_and_larger_at_the_edges() -> None:
    x = np.array([0, -0.0, -87, -1000, -np.inf, np.nan, 88, 1000, np.inf] + [0] * 7, np.float32)
    out = np.empty_like(x)
    exps(x, out)
    assert out[0] == out[1] == 1
    assert out[2] == out[3] == out[4] and 0 < out[2] < 2e-38
    assert np.isnan(out[5])
    assert out[6] == out[7] == out[8] and 1e38 < out[6] < np.inf
    largers(np.full(WIDTH, 2, np.float32), x, out)
    assert (out[:5] == 2).all() and np.isnan(out[5])


shapes = st.tuples(
    st.integers(1, 3), st.integers(1, 37), st.integers(1, 3), st.sampled_from([1, 4, 12, 16, 17, 40]), st.booleans(),
    st.booleans(), st.booleans(),
)  # fmt: skip


@settings(deadline=None)  # the first call compiles
@given(shapes, st.data())
def test_attention_and_its_gradients_against_float64(shape: tuple, data: st.DataObject) -> None:
    n_examples, n_pos, n_heads, d_head, causal, some, apart = shape
    at = list(range(n_pos))
    if some:
        at = sorted(data.draw(st.sets(st.sampled_from(at), min_size=1)))
    n_keys = torch.tensor(at) + 1 if causal else torch.full((len(at),), n_pos)
    q = normal("q", n_examples, len(at), n_heads, d_head) if some else None
    rest = normal("rest", n_examples, n_pos, 2 if some else 3, n_heads, d_head)
    leaves = [amid_nan(part).requires_grad_() for part in (q, rest) if part is not None]
    exact = [part.detach().double().requires_grad_() for part in leaves]
    found = attend(*(leaves if some else [None, *leaves]), n_keys, 0.7, apart=apart)
    wanted = attend(*(exact if some else [None, *exact]), n_keys, 0.7, apart=apart)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=4e-6)
    back = normal("back", *found.shape)
    mine, theirs = torch.autograd.grad(found, leaves, back), torch.autograd.grad(wanted, exact, back.double())
    # Scores of 40 terms reach 15, so a probability is off by 1e-6 of itself, and where one key has nearly all of it the
    # gradients by queries and keys are small differences: relative to the largest of all that makes 2.4e-6 at most over
    # 3000 of these shapes.
    off = max(float((one.double() - other).abs().max()) for one, other in zip(mine, theirs, strict=True))
    assert off < 5e-6 * max(float(each.abs().max()) for each in theirs)


@pytest.mark.parametrize("n_queries", [1, 2, 3, 4])
@pytest.mark.parametrize(("n_pos", "d_head"), [(4, 32), (5, 7), (16, 16), (17, 20)])
@pytest.mark.parametrize("apart", [False, True])
def test_a_few_queries_against_float64(n_queries: int, n_pos: int, d_head: int, apart: bool) -> None:
    """On both sides of where loops of their own take them; one example's NaN stays with it."""
    n_keys = torch.tensor([1, n_pos - 2, n_pos, n_pos])[-n_queries:]
    few = bool(are_few(n_queries, n_pos))
    assert few == (n_queries <= 3 and n_pos <= 16)
    q, rest = normal("few q", 5, n_queries, 2, d_head), normal("few rest", 5, n_pos, 2, 2, d_head)
    rest[2, n_pos - 1, 0] = torch.nan
    leaves = [amid_nan(part).requires_grad_() for part in (q, rest)]
    exact = [part.detach().double().requires_grad_() for part in leaves]
    found, wanted = attend(*leaves, n_keys, 0.7, apart=apart), attend(*exact, n_keys, 0.7, apart=apart)
    assert not found.isfinite().all() and torch.equal(found.isnan(), wanted.isnan())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=4e-6, equal_nan=True)
    back = normal("back", *found.shape)
    mine = torch.autograd.grad(found, leaves, back)
    for own, theirs in zip(mine, torch.autograd.grad(wanted, exact, back.double()), strict=True):
        there = ~theirs.isnan()
        assert torch.equal(own[[0, 1, 3, 4]].isfinite(), there[[0, 1, 3, 4]])
        torch.testing.assert_close(own[there].double(), theirs[there], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
def test_the_plain_path_against_torch_and_finite_differences(biased: bool) -> None:
    q, rest = normal("q", 4, 3, 2, 4).double().requires_grad_(), normal("rest", 4, 5, 2, 2, 4).double().requires_grad_()
    n_keys = torch.tensor([2, 4, 5])
    bias = normal("bias", 2, 3, 5).double() if biased else None
    assert torch.autograd.gradcheck(lambda a, b: attend(a, b, n_keys, 0.7, bias), (q, rest))
    mask = torch.zeros(2, 3, 5) if bias is None else bias
    mask = mask.masked_fill(torch.arange(5) >= n_keys[:, None], -torch.inf).double()
    parts = (q, rest[:, :, 0], rest[:, :, 1])
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(part.transpose(1, 2) for part in parts), mask, scale=0.7
    )
    torch.testing.assert_close(attend(q, rest, n_keys, 0.7, bias), wanted.transpose(1, 2))


def test_scores_may_be_large_and_a_nan_stays_with_its_example() -> None:
    rest = normal("rest", 3, 20, 3, 2, 8) * 30
    rest[1, 7, 0] = torch.nan
    n_keys = torch.arange(20) + 1
    z = attend(None, rest, n_keys, 1.0)
    assert z[1, 7].isnan().all()
    wanted = attend(None, rest.double(), n_keys, 1.0)
    others = ~wanted.isnan()
    torch.testing.assert_close(z[others].double(), wanted[others], rtol=1e-3, atol=1e-3)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(2, 70), st.floats(0.1, 30))
def test_softmax_against_float64(n_rows: int, n_classes: int, size: float) -> None:
    x, bias = amid_nan(size * normal("x", n_rows, n_classes)), amid_nan(normal("b", n_classes))
    scale, target = normal("scale", n_rows).abs() + 0.1, torch.arange(n_rows) % n_classes
    factor = normal("factor", n_rows)
    exact = x.double()
    by = scale.double().requires_grad_()
    y = by[:, None] * exact + bias.double()
    nats = -y.log_softmax(-1).gather(1, target[:, None])[:, 0]
    others, away, along = (torch.empty(n_rows) for _ in range(3))
    fused.softmax(*(part.view(-1).numpy() for part in (x, scale, bias, target, factor, others, away, along)))
    found = others.double().log() - away.double() + torch.log1p(away.double().exp() / others.double())
    torch.testing.assert_close(found, nats.detach(), rtol=1e-5, atol=1e-5)
    wanted = (y.softmax(-1) - torch.nn.functional.one_hot(target, n_classes)).detach()
    torch.testing.assert_close(x.double(), factor[:, None].double() * wanted, rtol=1e-4, atol=1e-5)
    (dscale,) = torch.autograd.grad(nats.sum(), by)
    torch.testing.assert_close(along.double(), dscale, rtol=1e-4, atol=1e-5 * (1 + size * float(dscale.abs().max())))


def test_a_row_that_is_not_finite_stays_by_itself() -> None:
    x = normal("x", 3, 40)
    x[1, 3] = torch.nan
    whole = x.clone()
    rest = [
        torch.ones(3),
        torch.zeros(40),
        torch.zeros(3, dtype=torch.int64),
        torch.ones(3),
        *(torch.empty(3) for _ in range(3)),
    ]
    fused.softmax(*(part.view(-1).numpy() for part in (x, *rest)))
    assert x[1].isnan().all() and rest[4][1].isnan()
    torch.testing.assert_close(x[::2].sum(1), torch.zeros(2), atol=1e-6, rtol=0)
    assert whole[::2].isfinite().all() and x[::2].isfinite().all()
