"""The compiled passes: when they serve, that blocks and room change nothing, and their products and norms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from mechgrok import seeds
from mechgrok.components import component
from mechgrok.replicas import compiled, products
from mechgrok.replicas.heads import LayerHeads
from mechgrok.replicas.lanes import WIDTH, gated, load, put, store, where_above
from mechgrok.replicas.network import Network
from mechgrok.replicas.packing import Linear, Packed, fill
from mechgrok.replicas.products import MATRIX, NORM, OPTIONS, ZERO
from mechgrok.replicas.whole import NetworkPotential
from mechgrok.sampling.potential import Potential
from tests.test_replicas import N_CHAINS, N_EXAMPLES, PLENTY, build, examples, moved


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=seeds.stream(0, "compiled", *shape))


def potentials(**shape: object) -> list[Potential]:
    """Heads of the first and the last layer, and the whole, of a model that the passes serve."""
    model = build(**shape)
    data, layers = examples(model, "some"), (0, model.cfg.n_layers - 1)
    heads = [LayerHeads(model, data, layer, range(model.cfg.n_heads), PLENTY) for layer in layers]
    assert all(each._compiled is not None for each in heads)
    return [*heads, NetworkPotential(model, data, component(model, "model"), PLENTY)]


def batch(size: int) -> torch.Tensor:
    return torch.randint(N_EXAMPLES, (N_CHAINS, size), generator=seeds.stream(0, "batch", size))


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({}, None), ({"positional_embedding_type": "shortformer"}, None), ({"d_mlp": 7}, None),
        ({"positional_embedding_type": "rotary"}, "rotary"), ({"d_mlp": 7, "act_fn": "gelu"}, "gelu"),
        ({"d_vocab_out": 2**17}, "logits"),
    ],
)  # fmt: skip
def test_when_they_serve(shape: dict, reason: str | None) -> None:
    model = build(**shape)
    found = compiled.why_not(Network(model, examples(model)))
    assert found is None if reason is None else reason in str(found)
    assert compiled.why_not(Network(model, examples(model)), "bfloat16") == "not float32 on the CPU"
    assert compiled.why_not(Network(model.to(torch.float64), examples(model))) == "not float32 on the CPU"


@pytest.mark.parametrize("d_mlp", [None, 7])
@pytest.mark.parametrize("rows", [1, 13, 10**4])
def test_blocks_of_any_number_of_examples_give_the_same(
    rows: int, d_mlp: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for potential in potentials(d_mlp=d_mlp):
        theta, index = moved(potential.anchor), batch(7)
        losses, gradient = potential.losses_and_grad(theta, index)
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "ROWS", rows)
            again, other = potential.losses_and_grad(theta, index)
        torch.testing.assert_close(again, losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_what_an_earlier_call_left_in_the_room_is_not_seen() -> None:
    """Not even if it was NaN: the same bits as from a fresh start."""
    for potential, fresh in zip(potentials(), potentials(), strict=True):
        theta = moved(potential.anchor)
        potential.losses_and_grad(torch.full_like(theta, torch.nan), batch(9))
        for mine, wanted in zip(
            potential.losses_and_grad(theta, batch(4)), fresh.losses_and_grad(theta, batch(4)), strict=True
        ):
            assert mine.isfinite().all() and torch.equal(mine, wanted)


@njit(**OPTIONS)
def _apply(m, replica, packed, nothing, x, n_rows, out, dx, gradients):
    products.linear(m, replica, nothing, packed, x, 0, n_rows, out, 0, False)
    products.linear_back(m, replica, nothing, packed, out, 0, n_rows, dx, 0, False)
    products.linear_gradient(m, replica, x, 0, out, 0, n_rows, gradients)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.booleans())
def test_linear_maps_and_their_gradients(n_rows: int, n_in: int, n_out: int, n_bias: int, each: bool) -> None:
    n = 3 if each else 1
    weight, bias, x = normal(n, n_in, n_out), normal(n, n_bias, n_out), normal(n_rows, n_in)
    linear = Linear(weight, bias, moves=True)
    packed = Packed([linear])
    packed.places[id(linear)].update(dweight=0, dbias=weight.numel())
    record = np.zeros((), MATRIX)
    fill(record, linear, packed.places)
    out, dx, gradients = (
        torch.full((n_rows, n_out), torch.nan),
        torch.full((n_rows, n_in), torch.nan),
        torch.zeros(weight.numel() + bias.numel()),
    )
    replica = n - 1
    arrays = [part.view(-1).numpy() for part in (packed.flat, torch.zeros(1), x)]
    _apply(record[()], replica, *arrays, n_rows, *(part.view(-1).numpy() for part in (out, dx, gradients)))
    rows = torch.arange(n_rows) % n_bias
    wanted = x.double() @ weight[replica].double() + bias[replica, rows].double()
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dx.double(), wanted @ weight[replica].double().T, rtol=1e-4, atol=1e-3)
    dweight, dbias = gradients.split([weight.numel(), bias.numel()])
    torch.testing.assert_close(
        dweight.view(weight.shape)[replica].double(), x.double().T @ wanted, rtol=1e-4, atol=1e-3
    )
    sums = torch.zeros(n_bias, n_out, dtype=torch.float64).index_add_(0, rows, wanted)
    torch.testing.assert_close(dbias.view(bias.shape)[replica].double(), sums, rtol=1e-4, atol=1e-3)
    assert not dweight.view(weight.shape)[:replica].any()


@njit(**OPTIONS)
def _norm(norm, x, n_rows, n, hat, dhat, dx):
    products.normalize(norm, x, 0, n_rows, n, hat, 0, n_rows * n)
    products.normalize_back(norm, dhat, 0, n_rows, n, hat, 0, n_rows * n, dx, 0)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(2, 40), st.sampled_from([(True, True), (False, True), (False, False)]))
def test_norms_and_their_gradients(n_rows: int, n: int, kind: tuple[bool, bool]) -> None:
    centred, scaled = kind
    record = np.zeros((), NORM)
    record["centred"], record["scaled"], record["eps"] = centred, scaled, 1e-3
    x, dhat, dx, hat = normal(n_rows, n), normal(n_rows, n) + 1, torch.ones(n_rows, n), torch.empty(n_rows * (n + 1))
    _norm(record[()], x.view(-1).numpy(), n_rows, n, *(part.view(-1).numpy() for part in (hat, dhat, dx)))
    exact = x.double().requires_grad_()
    wanted = exact - exact.mean(-1, keepdim=True) if centred else exact
    if scaled:
        wanted = wanted / (wanted.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(hat[: n_rows * n].view(n_rows, n).double(), wanted.detach(), rtol=1e-4, atol=1e-4)
    (back,) = torch.autograd.grad(wanted, exact, dhat.double())
    torch.testing.assert_close(dx.double(), 1 + back, rtol=1e-3, atol=1e-3)


@njit(**OPTIONS)
def _lanewise(x, y, out):
    a, b = load(x, 0, WIDTH, ZERO), load(y, 0, WIDTH, ZERO)
    store(out, 0, WIDTH, gated(a, b))
    store(out, WIDTH, WIDTH, put(a, 3, y[0]))
    store(out, 2 * WIDTH, WIDTH, put(a, WIDTH, y[0]))
    store(out, 3 * WIDTH, WIDTH, where_above(a, y[0], b, y[1]))


def test_choices_lane_by_lane() -> None:
    x, y = normal(WIDTH).numpy(), normal(1, WIDTH)[0].numpy()
    out = np.empty(4 * WIDTH, np.float32)
    _lanewise(x, y, out)
    replaced = x.copy()
    replaced[3] = y[0]
    wanted = np.concatenate([np.where(x > 0, y, 0), replaced, x, np.where(x > y[0], y, y[1])])
    assert np.array_equal(out, wanted)
