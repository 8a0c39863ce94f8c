"""The canonical gauge: the same function, and the same weights and LLC for every rescaling of it."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer

import mechgrok as mg
from mechgrok import seeds
from mechgrok.canonical import canonicalize
from mechgrok.errors import ConfigError
from mechgrok.model import build_model, model_losses
from mechgrok.tasks import make_split
from tests.oracles import tiny_config

SPLIT = make_split(tiny_config().task, 0)
TOKENS = SPLIT.train.tokens
SHAPES = list(itertools.product([None, "LN", "LNPre"], [None, 16], ["standard", "rotary", "shortformer"], [1, 2]))
GRID = pytest.mark.parametrize(("norm", "d_mlp", "positions", "n_layers"), SHAPES)


def build(norm: str | None, d_mlp: int | None = 16, positions: str = "standard", n_layers: int = 1, **changes):
    """A model in float64 with every parameter random, gains and biases too; `changes` are of TransformerLens' cfg."""
    shape = {"d_mlp": d_mlp, "positional_embedding_type": positions, "n_layers": n_layers}
    if norm in (None, "LN", "LNPre"):
        shape["normalization_type"] = norm
    else:
        changes["normalization_type"] = norm
    model = build_model(tiny_config(model=shape).model, SPLIT, 0)
    if changes:
        cfg = copy.deepcopy(model.cfg)
        for key, value in changes.items():
            setattr(cfg, key, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            model = HookedTransformer(cfg).eval()
    model.to(torch.float64, print_details=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=seeds.stream(0, "random", name), dtype=torch.float64)
            parameter.copy_(name.endswith(".w") + 0.3 * noise)
    return model


def assert_same_logits(model: HookedTransformer, other: HookedTransformer, tolerance: float) -> None:
    with torch.no_grad():
        logits, others = model(TOKENS), other(TOKENS)
    assert logits.std() > 0.1
    torch.testing.assert_close(others, logits, rtol=0, atol=tolerance * max(1.0, float(logits.abs().max())))


def assert_same_weights(model: HookedTransformer, other: HookedTransformer, rtol: float) -> None:
    others = dict(other.named_parameters())
    assert list(others) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        size = float(parameter.detach().abs().max())
        torch.testing.assert_close(others[name], parameter, rtol=0, atol=rtol * size, msg=lambda m, n=name: f"{n}: {m}")
    for module, twin in zip(norms(model), norms(other), strict=True):
        assert twin.eps == pytest.approx(module.eps, rel=rtol)


def norms(model: HookedTransformer) -> list:
    modules = [getattr(block, name) for block in model.blocks for name in ("ln1", "ln2") if hasattr(block, name)]
    return [module for module in [*modules, getattr(model, "ln_final", None)] if hasattr(module, "eps")]


@torch.no_grad()
def rescale(model: HookedTransformer, seed: int = 1, stream: float = 3.0, heads: float = 1.0, gains: float = 1.0):
    """The same function at other scales: the stream times `stream`, log-normal factors in heads and at gains."""
    other = copy.deepcopy(model)
    cfg, rng = other.cfg, seeds.stream(seed, "rescale")

    def factors(*shape: int, spread: float) -> Tensor:
        return (spread * torch.randn(shape, generator=rng, dtype=torch.float64)).exp().to(cfg.dtype)

    def move_gain(ln, *readers: tuple[Tensor, Tensor]) -> None:
        if cfg.normalization_type != "LN":
            return
        by, shift = factors(cfg.d_model, spread=gains), gains * factors(cfg.d_model, spread=1.0)
        for weight, bias in readers:
            weight /= by[:, None]
            bias -= shift @ weight
        ln.w *= by
        ln.b *= by
        ln.b += shift

    shortformer = cfg.positional_embedding_type == "shortformer"
    written = [other.embed.W_E]
    if hasattr(other, "pos_embed") and not (shortformer and cfg.normalization_type):
        written.append(other.pos_embed.W_pos)
    read = [other.unembed.W_U]
    for block in other.blocks:
        attn = block.attn
        if not shortformer:
            move_gain(block.ln1, (attn.W_Q, attn.b_Q), (attn.W_K, attn.b_K), (attn.W_V, attn.b_V))
        for up, down in (((attn.W_Q, attn.b_Q), (attn.W_K, attn.b_K)), ((attn.W_V, attn.b_V), (attn.W_O,))):
            by = factors(cfg.n_heads, 1, 1, spread=heads)
            for side, factor in ((up, by), (down, 1 / by)):
                for parameter in side:
                    parameter *= factor if parameter.ndim == 3 else factor[:, :, 0]
        written += [attn.W_O, attn.b_O]
        read += [attn.W_Q, attn.W_K, attn.W_V]
        if not cfg.attn_only:
            move_gain(block.ln2, (block.mlp.W_in, block.mlp.b_in))
            written += [block.mlp.W_out, block.mlp.b_out]
            read.append(block.mlp.W_in)
    if cfg.normalization_type:
        move_gain(other.ln_final, (other.unembed.W_U, other.unembed.b_U))
        for module in norms(other):
            module.eps *= stream**2
    else:
        for parameter in read:
            parameter /= stream
    for parameter in written:
        parameter *= stream
    return other


@GRID
def test_the_function_stays(norm, d_mlp, positions, n_layers) -> None:
    model = build(norm, d_mlp, positions, n_layers)
    assert_same_logits(model, canonicalize(model), 1e-10)
    single = model.to(torch.float32, print_details=False)
    canonical = canonicalize(single)
    assert all(parameter.dtype == torch.float32 for parameter in canonical.parameters())
    assert_same_logits(single, canonical, 1e-5)


@GRID
def test_a_rescaled_model_has_the_same_canonical_weights(norm, d_mlp, positions, n_layers) -> None:
    model = build(norm, d_mlp, positions, n_layers)
    other = rescale(model)
    assert_same_logits(model, other, 1e-10)
    with pytest.raises(AssertionError):
        assert_same_weights(model, other, 1e-2)
    canonical = canonicalize(model)
    assert_same_weights(canonical, canonicalize(other), 1e-10)
    assert_same_weights(canonical, canonicalize(canonical), 1e-12)


@GRID
def test_the_scales_are_fixed(norm, d_mlp, positions, n_layers) -> None:
    model = build(norm, d_mlp, positions, n_layers)
    canonical = canonicalize(model)
    own = {name: parameter.detach() for name, parameter in canonical.named_parameters()}
    for name, parameter in own.items():
        leaf = name.split(".")[-1]
        if leaf in ("w", "b"):
            if positions == "shortformer" and ".ln1." in name:
                assert torch.equal(parameter, model.get_parameter(name))
            else:
                assert bool((parameter == (leaf == "w")).all())
    assert float(own["embed.W_E"].square().sum(-1).mean()) == pytest.approx(1.0)
    for block in canonical.blocks:
        q, k, v = (
            torch.cat([getattr(block.attn, f"W_{x}"), getattr(block.attn, f"b_{x}")[:, None]], 1).norm(dim=(1, 2))
            for x in "QKV"
        )
        torch.testing.assert_close(q, k)
        torch.testing.assert_close(v, block.attn.W_O.norm(dim=(1, 2)))
    s = float(own["embed.W_E"][0, 0] / model.embed.W_E[0, 0].detach())
    assert [module.eps for module in norms(canonical)] == pytest.approx([1e-5 * s**2] * len(norms(model)))
    assert not norm or canonical.blocks[0].cfg.eps == pytest.approx(1e-5 * s**2)


@pytest.mark.parametrize("norm", ["RMS", "RMSPre", None])
@pytest.mark.parametrize("positions", ["standard", "rotary", "shortformer"])
def test_gated_and_parallel_blocks_and_rms_norms_keep_their_function(norm, positions) -> None:
    for changes in ({"gated_mlp": True}, {"parallel_attn_mlp": True}, {"attn_scores_soft_cap": 2.0}):
        model = build(norm, positions=positions, n_layers=2, **changes)
        canonical = canonicalize(model)
        assert_same_logits(model, canonical, 1e-10)
        assert_same_weights(canonical, canonicalize(canonical), 1e-12)
        if norm == "RMS":
            assert bool((canonical.blocks[1].ln2.w == 1).all())


@pytest.mark.parametrize("n_shared", [1, 2, 4])
@pytest.mark.parametrize("norm", ["LN", None])
def test_heads_that_share_keys_and_values_have_one_scale_together(norm: str | None, n_shared: int) -> None:
    """The same function; queries against the keys that they meet, and the same weights whatever the scales were."""
    model = build(norm, n_heads=4, n_key_value_heads=n_shared)
    canonical = canonicalize(model)
    assert_same_logits(model, canonical, 1e-10)
    attn = canonical.blocks[0].attn
    sides = (
        ([attn.W_Q, attn.b_Q], [attn._W_K, attn._b_K]),
        ([attn._W_V, attn._b_V], [attn.W_O]),
    )
    for one, other in sides:
        norms = [
            sum(part.detach().square().reshape(n_shared, -1).sum(1) for part in side).sqrt() for side in (one, other)
        ]
        torch.testing.assert_close(*norms, rtol=1e-10, atol=0)
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        own, by = scaled.blocks[0].attn, torch.linspace(0.2, 3.0, n_shared, dtype=torch.float64)
        for parts, factor in (
            ((own._W_K, own._b_K), by),
            ((own.W_Q, own.b_Q), 1 / by.repeat_interleave(4 // n_shared)),
        ):
            for part in parts:
                part.mul_(factor.view(-1, *[1] * (part.ndim - 1)))
    assert_same_weights(canonical, canonicalize(scaled), 1e-10)


def test_the_given_model_is_untouched_and_the_result_is_independent_of_it() -> None:
    model = build("LN")
    model(TOKENS).sum().backward()
    model.blocks[0].attn.W_Q.requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    canonical = canonicalize(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert model.cfg.eps == model.ln_final.eps == 1e-5
    assert all(parameter.grad is None for parameter in canonical.parameters())
    for name, parameter in canonical.named_parameters():
        assert parameter.is_leaf and parameter.shape == before[name].shape
        assert parameter.requires_grad == model.get_parameter(name).requires_grad
        assert parameter.data_ptr() != model.get_parameter(name).data_ptr()


@pytest.mark.parametrize(
    ("dead", "alive", "power"),
    [(("W_Q", "b_Q"), "W_K", -1), (("W_K", "b_K"), "W_Q", -1), (("W_V", "b_V"), "W_O", 1), (("W_O",), "W_V", -1)],
)
def test_a_dead_head_is_left_alone(dead, alive, power) -> None:
    model = build(None)
    with torch.no_grad():
        for leaf in dead:
            getattr(model.blocks[0].attn, leaf)[1] = 0
    canonical = canonicalize(model)
    assert all(bool(parameter.isfinite().all()) for parameter in canonical.parameters())
    assert_same_logits(model, canonical, 1e-10)
    s = canonical.embed.W_E[0, 0] / model.embed.W_E[0, 0]  # the stream's scale, which W_Q, W_K, W_V divide out
    ours, given = (getattr(m.blocks[0].attn, alive)[1] for m in (canonical, model))
    torch.testing.assert_close(ours, s**power * given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization_type": "RMS", "use_normalization_before_and_after": True}, "blocks.0.ln1_post.w"),
        ({"use_qk_norm": True}, "q_norm"),
        ({"post_embedding_ln": True}, "embed.ln.w"),
        ({"normalization_type": "LNPre", "act_fn": "solu_ln"}, "act_fn 'solu_ln'"),
        ({"normalization_type": "LN", "gated_mlp": True}, "gated_mlp"),
        ({"clip_qkv": 1.0}, "clip_qkv"),
    ],
)
def test_models_without_a_canonical_gauge_are_refused(changes, message) -> None:
    changes = {"normalization_type": None} | changes
    with pytest.raises(ConfigError, match=f"{message}.*; leave canonicalize out"):
        canonicalize(build(changes.pop("normalization_type"), **changes))


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_an_embedding_without_a_scale_is_refused(value) -> None:
    model = build("LN")
    with torch.no_grad():
        model.embed.W_E.fill_(value)
    with pytest.raises(ConfigError, match="W_E has norm .*; leave canonicalize out"):
        canonicalize(model)


@pytest.fixture(scope="module")
def trained() -> HookedTransformer:
    model = build_model(tiny_config(model={"normalization_type": "LN"}).model, SPLIT, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        loss = model_losses(model, *SPLIT.train.tensors).mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.5
    return model


@pytest.mark.parametrize("component", ["model", "L0H1"])
def test_the_llc_of_a_rescaled_model_is_the_same_in_the_canonical_gauge_alone(trained, component) -> None:
    other = rescale(trained, heads=0.7, gains=0.3, stream=0.3)
    assert_same_logits(trained, other, 1e-5)
    config = mg.LLCConfig(nbeta=10.0, step_size=1e-3, localization=100.0, n_chains=4, n_draws=80, n_burnin=40)

    def estimate(model: HookedTransformer, **changes) -> mg.LLCEstimate:
        settings = config.model_copy(update=changes)
        return mg.estimate_llc(model, SPLIT.train, component=component, config=settings, seed=0)

    one, two = estimate(canonicalize(trained)), estimate(other, canonicalize=True)
    assert one.llc > 5 * one.std_error
    assert two.llc == pytest.approx(one.llc, rel=1e-3)
    one, two = estimate(trained), estimate(other)
    assert abs(two.llc - one.llc) > 5 * (one.std_error**2 + two.std_error**2) ** 0.5
