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
from mechgrok.loops.lanes import WIDTH, gated, load, put, spread, store, where_above
from mechgrok.replicas import compiled, plan
from mechgrok.replicas.heads import LayerHeads
from mechgrok.replicas.linear import MATRIX, linear, linear_back, linear_gradient
from mechgrok.replicas.network import Network
from mechgrok.replicas.norms import NORM, normalize, normalize_back
from mechgrok.replicas.packing import Linear, fill, laid_out
from mechgrok.replicas.pairs import PANEL, pair_rows, pair_terms, row_of_pairs, rows_of_pairs, turn_pairs
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


@pytest.mark.parametrize("amx", [False, True])
def test_bfloat16_goes_where_it_is_fastest(amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "HAS_AMX", amx)
    model = build()
    net = Network(model, examples(model))
    assert (compiled.why_not(net, "bfloat16") is None) != amx
    assert compiled.why_not(net, "float32") is None and compiled.why_not(net, "int16") is None


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


@pytest.mark.parametrize("shape", [{"d_mlp": 7}, {"d_vocab_out": 600}, {"d_mlp": 7, "normalization_type": None}])
def test_int16_is_for_gradients_alone(shape: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is only evaluated, as the baseline is, keeps the bits of float32, as all do where int16s are slow."""
    for potential in potentials(**shape):
        theta, index = moved(potential.anchor), batch(9)
        exact, (losses, gradient) = potential.losses(theta, index), potential.losses_and_grad(theta, index)
        monkeypatch.setattr(potential._compiled.passes, "precision", "int16")
        monkeypatch.setattr(compiled, "HAS_VNNI", False)
        assert torch.equal(potential.losses_and_grad(theta, index)[1], gradient)
        monkeypatch.setattr(compiled, "HAS_VNNI", True)
        rough, back = potential.losses_and_grad(theta, index)
        assert torch.equal(potential.losses(theta, index), exact)
        # Six products in a row, each off by sqrt(16) / 32767 of its lengths at most; and a softmax's shares are off,
        # for their size, by as much as its logits.
        off = float((rough - losses).abs().max())
        assert 1e-7 < off / float(losses.max()) < 1e-3
        assert 1e-6 < float((back - gradient).norm() / gradient.norm()) < 1e-3 + off


def test_int16_where_logits_are_hundreds_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exponentials that float32 cannot hold, or whose squares it cannot, are made anew."""
    model = build(d_vocab_out=300)
    model.unembed.W_U.data *= 100
    data = examples(model, "some")
    heads = [LayerHeads(model, data, layer, range(2), PLENTY) for layer in (0, 1)]
    monkeypatch.setattr(compiled, "HAS_VNNI", True)
    for potential in [*heads, NetworkPotential(model, data, component(model, "model"), PLENTY)]:
        theta, index = moved(potential.anchor), batch(7)
        losses, gradient = potential.losses_and_grad(theta, index)
        monkeypatch.setattr(potential._compiled.passes, "precision", "int16")
        rough, back = potential.losses_and_grad(theta, index)
        assert float(losses.max()) > 100
        torch.testing.assert_close(rough, losses, rtol=1e-4, atol=0.03)
        assert float((back - gradient).norm() / gradient.norm()) < 0.01


@pytest.mark.parametrize("d_mlp", [None, 7])
@pytest.mark.parametrize("rows", [1, 13, 10**4])
def test_blocks_of_any_number_of_examples_give_the_same(
    rows: int, d_mlp: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, usual = batch(7), potentials(d_mlp=d_mlp)
    before = [potential.losses_and_grad(moved(potential.anchor), index) for potential in usual]
    monkeypatch.setattr(plan, "ROWS", rows)
    for (losses, gradient), potential in zip(before, potentials(d_mlp=d_mlp), strict=True):
        again, other = potential.losses_and_grad(moved(potential.anchor), index)
        torch.testing.assert_close(again, losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("shape", [{}, {"d_mlp": 7}, {"d_mlp": 7, "normalization_type": None}])
def test_calls_of_many_shapes_leave_no_trace_in_each_other(shape: dict) -> None:
    """Where numbers lie is told once for each shape; the bits are those of a potential that was called but once."""
    batches = [batch(size) for size in (7, 2, 9, 7)]
    for at, potential in enumerate(potentials(**shape)):
        theta = moved(potential.anchor)
        for of in (theta, 2 * theta):
            for index in batches:
                fresh = potentials(**shape)[at]
                assert torch.equal(potential.losses(of, index), potentials(**shape)[at].losses(of, index))
                both = zip(potential.losses_and_grad(of, index), fresh.losses_and_grad(of, index), strict=True)
                assert all(torch.equal(one, other) for one, other in both)


@pytest.mark.parametrize("size", [1.0, 200.0])
@pytest.mark.parametrize("d_vocab_out", [16, 41])
def test_classes_by_and_by_give_the_same(d_vocab_out: int, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen at once or all, also where the largest logit of some lies hundreds below that of others; or of the first
    ones, to which the others' exponentials are relative: more than float32 can hold.
    """
    model = build(d_vocab_out=d_vocab_out)
    model.unembed.W_U.data *= size
    data = examples(model, "some")
    index = batch(7)

    def found() -> list[tuple[torch.Tensor, ...]]:
        heads = [LayerHeads(model, data, layer, range(2), PLENTY) for layer in (0, 1)]
        each = [*heads, NetworkPotential(model, data, component(model, "model"), PLENTY)]
        thetas = [moved(potential.anchor) for potential in each]
        pairs = zip(each, thetas, strict=True)
        return [
            (*potential.losses_and_grad(theta, index), potential.losses(theta, index)) for potential, theta in pairs
        ]

    at_once = found()
    monkeypatch.setattr(plan, "LOGITS", 1)
    for (losses, gradient, _), (again, other, evaluated) in zip(at_once, found(), strict=True):
        assert torch.equal(again, evaluated)
        torch.testing.assert_close(again, losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
        assert losses.isfinite().all() and gradient.isfinite().all()
    whole = exactly(model, data, component(model, "model"))
    exact, _ = whole.losses_and_grad(moved(whole.anchor.float()).double(), index)
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


SIZES = st.integers(1, 70) | st.integers(230, 600)


@settings(deadline=None)
@given(SIZES, SIZES, SIZES, st.integers(1, 3), st.booleans(), st.booleans())
def test_linear_maps_and_their_gradients(
    n_rows: int, n_in: int, n_out: int, n_bias: int, each: bool, half: bool
) -> None:
    """With int16s just their rounding is lost, half of 1 / 32767 of a vector's length for each of its numbers; with
    float32 that of each sum so far.
    """

    def near(found: torch.Tensor, a: torch.Tensor, b: torch.Tensor, besides: float | torch.Tensor = 0.0) -> None:
        a, b = a.double(), b.double()
        error = (found.double() - a @ b - besides).abs()
        lengths = a.norm(dim=1, keepdim=True) * b.norm(dim=0)
        assert bool((error <= a.shape[1] ** 0.5 * (1 / 32767 if half else 2**-23) * lengths * 1.01 + 1e-5).all())

    n = 3 if each else 1
    weight, bias, x = normal(n, n_in, n_out), normal(n, n_bias, n_out), normal(n_rows, n_in)
    linear = Linear(weight, bias, moves=True)
    layout, record = laid_out([linear], half=half), np.zeros((), MATRIX)
    fill(record, linear, layout.places[0] | {"dweight": 0, "dbias": weight.numel()})
    record["spare"] = room = n_rows * max(n_in, n_out)
    out, dx = (torch.full((room + (n_rows + 3) * (n_in + n_out + 131),), torch.nan) for _ in range(2))
    gradients, replica = torch.zeros(weight.numel() + bias.numel()), n - 1
    arrays = [part.view(-1).numpy() for part in (layout.pack([linear]), torch.zeros(1), x)]
    _apply(record[()], replica, *arrays, n_rows, *(part.numpy() for part in (out, dx, gradients)))
    out, dx = out[: n_rows * n_out].view(n_rows, n_out), dx[: n_rows * n_in].view(n_rows, n_in)
    rows, own = torch.arange(n_rows) % n_bias, weight[replica]
    near(out, x, own, bias[replica, rows].double())
    near(dx, out, own.T)
    dweight, dbias = gradients.split([weight.numel(), bias.numel()])
    near(dweight.view(weight.shape)[replica], x.T, out)
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


@pytest.mark.parametrize("native", [False, lanes.HAS_VNNI])
def test_pairs_of_int16s_and_their_products(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the processor's own instruction where it has it, and by others."""
    monkeypatch.setattr(lanes, "HAS_VNNI", native)
    one = tiles.tile(replace(tiles.PAIR_TERMS), 1, 1)

    @njit(**OPTIONS)
    def apply(x, y, z, out):
        by = spread(x[0])
        a, b, c = load(x, 0, WIDTH, ZERO), load(y, 0, WIDTH, ZERO), load(z, 0, WIDTH, ZERO)
        store(out, 0, WIDTH, lanes.pairs(a, b, by))
        store(out, WIDTH, WIDTH, lanes.pairs(b, c, by))
        out[1], out[2 * WIDTH] = 2, 3  # the scales of the row and, of the lanes, behind their only term
        store(out, 2 * WIDTH, WIDTH, b)
        store(out, 3 * WIDTH, WIDTH, c)
        # The first pair, (x[0], y[0]), times every pair of the others.
        one(out, 3 * WIDTH, 0, True, 0, out, 0, 0, 1, out, WIDTH, WIDTH, 0, 1, WIDTH)

    x, y, z = (1e3 * normal(3, WIDTH)).round()
    x[0], y[:3], z[:2] = 2, torch.tensor([32767 / 2, -32767 / 2, 2.25]), torch.tensor([32767 / 2, 1.75])
    out = torch.empty(4 * WIDTH)
    apply(x.numpy(), y.numpy(), z.numpy(), out.numpy())
    found = out[: 2 * WIDTH].view(torch.int16).view(2, WIDTH, 2)
    ints = [(2 * one).round() for one in (x, y, z)]  # halves to the even one
    assert torch.equal(found[1], torch.stack(ints[1:], 1).to(torch.int16))
    assert torch.equal(found[0, 2:], torch.stack(ints[:2], 1)[2:].to(torch.int16))
    a, b, c = (one.double() for one in ints)
    scales = y.double()
    wanted = z.double() + 2 * scales * (a[0] * b + b[0] * c)
    torch.testing.assert_close(out[3 * WIDTH :].double(), wanted, rtol=1e-6, atol=1)


@njit(**OPTIONS)
def _pair(x, n_rows, n, terms, turned, rows):
    pair_terms(x, 0, n_rows, n, terms, 0)
    turn_pairs(terms, 0, n_rows, n, turned, 0)
    pair_rows(x, 0, n_rows, n, rows, 0)


@settings(deadline=None)
@given(SIZES, st.integers(1, 256))
def test_pairs_of_terms_become_pairs_of_rows(n_rows: int, n: int) -> None:
    x = normal(n_rows, n) * torch.logspace(-3, 3, n_rows)[:, None]
    terms, turned, rows = (
        torch.full((rows_of_pairs(n_rows) * n + n_rows * row_of_pairs(n),), torch.nan) for _ in "123"
    )
    _pair(x.view(-1).numpy(), n_rows, n, *(part.numpy() for part in (terms, turned, rows)))
    for found, error in ((turned, x.norm(dim=1, keepdim=True) / 32767), (rows, torch.zeros(n_rows, 1))):
        begin = 0
        for some, wanted, off in zip(x.split(PANEL), x.split(PANEL), error.split(PANEL), strict=True):
            n_pairs = (len(some) + 1) // 2
            ints = found[begin : begin + n_pairs * n].view(torch.int16).view(n_pairs, n, 2)
            scales = found[begin + n_pairs * n :][:n]
            back = (ints * scales[:, None]).transpose(1, 2).flatten(0, 1)[: len(some)]
            assert bool(((back - wanted).abs() <= 0.51 * off + 0.51 * scales).all())
            lengths = wanted.norm(dim=0)
            assert bool(((scales * 32767 - lengths).abs() <= 0.51 * off.norm() + 1e-4 * lengths).all())
            begin += (n_pairs + 1) * n


def test_what_is_no_number_stays_none_as_int16() -> None:
    """A chain that has diverged shows; and vectors of zeros are zeros."""
    weight, x = normal(1, 40, 33), normal(5, 40)
    x[1], x[2, 3], x[3, 4] = 0, torch.inf, torch.nan
    linear = Linear(weight, moves=True)
    layout, record = laid_out([linear], half=True), np.zeros((), MATRIX)
    fill(record, linear, layout.places[0])
    record["spare"] = 5 * 40
    out, dx = torch.zeros(2000), torch.zeros(2000)
    arrays = [part.view(-1).numpy() for part in (layout.pack([linear]), torch.zeros(1), x)]
    _apply(record[()], 0, *arrays, 5, *(part.numpy() for part in (out, dx, torch.zeros(1))))
    out = out[: 5 * 33].view(5, 33)
    assert out[[0, 4]].isfinite().all() and not out[1].any() and not out[2:4].isfinite().any()
