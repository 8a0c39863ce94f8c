"""The compiled passes: when they serve, that blocks and room change nothing, and their products and norms."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from mechgrok import seeds
from mechgrok.components import component
from mechgrok.loops import lanes, tiles
from mechgrok.loops.kept import OPTIONS
from mechgrok.loops.lanes import WIDTH, gated, load, put, store, where_above
from mechgrok.replicas import compiled
from mechgrok.replicas.heads import LayerHeads
from mechgrok.replicas.linear import MATRIX, linear, linear_back, linear_gradient
from mechgrok.replicas.network import Network
from mechgrok.replicas.norms import NORM, normalize, normalize_back
from mechgrok.replicas.packing import Linear, Packed, fill
from mechgrok.replicas.products import ZERO
from mechgrok.replicas.whole import NetworkPotential
from mechgrok.reproducible import without_denormals
from mechgrok.sampling.potential import Potential
from tests.test_replicas import N_CHAINS, N_EXAMPLES, PLENTY, build, exactly, examples, moved


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
    assert compiled.why_not(Network(model.to(torch.float64), examples(model))) == "not float32 on the CPU"


@pytest.mark.parametrize(("amx", "bfloat16", "serves"), [(0, 0, False), (0, 1, True), (1, 1, False)])
def test_bfloat16_goes_where_it_is_fastest(
    amx: int, bfloat16: int, serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "HAS_AMX", amx)
    monkeypatch.setattr(compiled, "HAS_BFLOAT16", bfloat16)
    model = build()
    net = Network(model, examples(model))
    assert (compiled.why_not(net, "bfloat16") is None) == serves
    assert compiled.why_not(net, "float32") is None


def test_the_passes_make_no_denormals_whatever_the_caller_has_set() -> None:
    """Masked keys and far classes have shares below 1.2e-38, and a processor may take a hundred cycles for each."""
    for potential in potentials(d_mlp=7):
        passes, (theta, index) = potential._compiled.passes, (moved(potential.anchor), batch(9))
        plain = potential.losses_and_grad(theta, index)
        left = passes._room
        assert not ((left != 0) & (left.abs() < torch.finfo(torch.float32).tiny)).any()
        with without_denormals():
            flushed = potential.losses_and_grad(theta, index)
        assert all(torch.equal(one, other) for one, other in zip(plain, flushed, strict=True))


def test_bfloat16_is_for_gradients_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is only evaluated, as the baseline is, keeps the bits of float32."""
    for potential in potentials(d_mlp=7):
        theta, index = moved(potential.anchor), batch(9)
        exact, (losses, gradient) = potential.losses(theta, index), potential.losses_and_grad(theta, index)
        monkeypatch.setattr(potential._compiled.passes, "precision", "bfloat16")
        rough, back = potential.losses_and_grad(theta, index)
        assert torch.equal(potential.losses(theta, index), exact)
        assert 1e-5 < float((rough - losses).abs().max()) < 0.03
        # As much as rounding the weights to bfloat16 by itself does.
        assert 1e-3 < float((back - gradient).norm() / gradient.norm()) < 0.1


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


@pytest.mark.parametrize("size", [1.0, 200.0])
@pytest.mark.parametrize("d_vocab_out", [16, 41])
def test_classes_by_and_by_give_the_same(d_vocab_out: int, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen at once or all, also where the largest logit of some lies hundreds below that of others; or of the first
    ones, to which the others' exponentials are relative: more than float32 can hold.
    """
    model = build(d_vocab_out=d_vocab_out)
    model.unembed.W_U.data *= size
    data = examples(model, "some")
    heads = [LayerHeads(model, data, layer, range(2), PLENTY) for layer in (0, 1)]
    for potential in [*heads, NetworkPotential(model, data, component(model, "model"), PLENTY)]:
        theta, index = moved(potential.anchor), batch(7)
        losses, gradient = potential.losses_and_grad(theta, index)
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "LOGITS", 1)
            again, other = potential.losses_and_grad(theta, index)
            assert torch.equal(again, potential.losses(theta, index))
        torch.testing.assert_close(again, losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
        assert losses.isfinite().all() and gradient.isfinite().all()
    exact, _ = exactly(model, data, component(model, "model")).losses_and_grad(theta.double(), index)
    torch.testing.assert_close(losses, exact, rtol=3e-5, atol=3e-5)
    assert (float(exact.max()) > 200) == (size > 1)


@pytest.mark.parametrize("layer", [0, 1])
def test_small_losses_keep_their_digits(layer: int) -> None:
    """Where the target has nearly all of the probability: 1 - p would be zero in float32."""
    model = build()
    model.unembed.W_U.data *= 20
    data = examples(model, "last")
    with torch.no_grad():
        data = replace(data, targets=model(data.tokens).argmax(-1))
    fast = LayerHeads(model, data, layer, [0], PLENTY)
    theta, index = fast.anchor[None], torch.arange(N_EXAMPLES)[None]
    losses, gradient = fast.losses_and_grad(theta, index)
    exact, by = exactly(model, data, component(model, f"L{layer}H0")).losses_and_grad(theta.double(), index)
    small = (exact < 1e-10) & (exact > 1e-30)
    assert small.any()
    torch.testing.assert_close(losses[small], exact[small], rtol=1e-3, atol=0)
    torch.testing.assert_close(gradient.double(), by, rtol=1e-3, atol=1e-4 * float(by.abs().max()))


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
    linear(m, replica, nothing, packed, x, 0, n_rows, out, 0, False)
    linear_back(m, replica, nothing, packed, out, 0, n_rows, dx, 0, False)
    linear_gradient(m, replica, x, 0, out, 0, n_rows, gradients)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 70), st.integers(1, 3), st.booleans(), st.booleans())
def test_linear_maps_and_their_gradients(
    n_rows: int, n_in: int, n_out: int, n_bias: int, each: bool, half: bool
) -> None:
    """With bfloat16s just their rounding is lost: products of two are exact in float32."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return (x.to(torch.bfloat16) if half else x).double()

    n = 3 if each else 1
    weight, bias, x = normal(n, n_in, n_out), normal(n, n_bias, n_out), normal(n_rows, n_in)
    linear = Linear(weight, bias, moves=True)
    packed = Packed([linear], half=half)
    packed.places[id(linear)].update(dweight=0, dbias=weight.numel())
    record = np.zeros((), MATRIX)
    fill(record, linear, packed.places)
    record["spare"] = room = n_rows * max(n_in, n_out)
    out, dx = (torch.full((room + 21 * (n_in + n_out),), torch.nan) for _ in range(2))
    gradients, replica = torch.zeros(weight.numel() + bias.numel()), n - 1
    arrays = [part.view(-1).numpy() for part in (packed.flat, torch.zeros(1), x)]
    _apply(record[()], replica, *arrays, n_rows, *(part.numpy() for part in (out, dx, gradients)))
    out, dx = out[: n_rows * n_out].view(n_rows, n_out), dx[: n_rows * n_in].view(n_rows, n_in)
    rows, own = torch.arange(n_rows) % n_bias, rounded(weight[replica])
    wanted = rounded(x) @ own + bias[replica, rows].double()
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dx.double(), rounded(out) @ own.T, rtol=1e-4, atol=1e-3)
    dweight, dbias = gradients.split([weight.numel(), bias.numel()])
    torch.testing.assert_close(
        dweight.view(weight.shape)[replica].double(), rounded(x).T @ rounded(out), rtol=1e-4, atol=1e-3
    )
    sums = torch.zeros(n_bias, n_out, dtype=torch.float64).index_add_(0, rows, out.double())
    torch.testing.assert_close(dbias.view(bias.shape)[replica].double(), sums, rtol=1e-4, atol=1e-3)
    assert not dweight.view(weight.shape)[:replica].any()


@njit(**OPTIONS)
def _norm(norm, x, n_rows, n, hat, dhat, dx):
    normalize(norm, x, 0, n_rows, n, hat, 0, n_rows * n)
    normalize_back(norm, dhat, 0, n_rows, n, hat, 0, n_rows * n, dx, 0)


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(2, 40), st.sampled_from([(True, True), (False, True), (False, False)]))
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


@pytest.mark.parametrize("native", [False, lanes.HAS_BFLOAT16])
def test_pairs_of_bfloat16s_and_their_products(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the processor's own instructions where it has them, and by others."""
    monkeypatch.setattr(lanes, "HAS_BFLOAT16", native)

    one = tiles.tile(lanes.into_dots, 1, 1)

    @njit(**OPTIONS)
    def apply(x, y, z, out):
        a, b, c = load(x, 0, WIDTH, ZERO), load(y, 0, WIDTH, ZERO), load(z, 0, WIDTH, ZERO)
        store(out, 0, WIDTH, lanes.pairs(a, b))
        store(out, WIDTH, WIDTH, lanes.halves(a, b))
        store(out, 2 * WIDTH, WIDTH, a)
        store(out, 3 * WIDTH, WIDTH, lanes.pairs(b, c))
        # The first pair of the first, (x[0], y[0]), times every pair of the latter.
        one(out, 2 * WIDTH, 0, True, out, 0, 0, 0, out, 3 * WIDTH, 0, 0, 1, WIDTH)

    x, y, z = 1e3 * normal(3, WIDTH)
    x[0], y[1] = 1 + 2**-8, 1 + 3 * 2**-8  # halfway between two: to the even one
    out = torch.empty(4 * WIDTH)
    apply(x.numpy(), y.numpy(), z.numpy(), out.numpy())
    found = out[: 2 * WIDTH].view(torch.bfloat16).view(2, -1)
    assert torch.equal(found[0], torch.stack([x, y], dim=1).flatten().to(torch.bfloat16))
    assert torch.equal(found[1], torch.cat([x, y]).to(torch.bfloat16))
    a, b, c = (one.to(torch.bfloat16).double() for one in (x, y, z))
    wanted = x.double() + a[0] * b + b[0] * c
    torch.testing.assert_close(out[2 * WIDTH : 3 * WIDTH].double(), wanted, rtol=1e-6, atol=1)
