"""The fast path against TransformerLens itself, over architectures, data and components."""

import copy
import dataclasses
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

import mechgrok as mg
from mechgrok import seeds
from mechgrok.components import component
from mechgrok.config import LLCConfig
from mechgrok.errors import ConfigError, TogetherError
from mechgrok.hooked_heads import heads_at
from mechgrok.llc.estimate import estimate_group
from mechgrok.llc.head_potential import HeadPotential
from mechgrok.llc.precision import why_idle
from mechgrok.llc.problem import groups, make_problem
from mechgrok.model import model_losses
from mechgrok.replicas import blockwise
from mechgrok.replicas.cross_entropy import cross_entropy
from mechgrok.replicas.distinct import Distinct
from mechgrok.replicas.heads import LayerHeads
from mechgrok.replicas.network import Network, why_not
from mechgrok.replicas.whole import NetworkPotential
from mechgrok.reproducible import matmul_precision
from mechgrok.sampling.potential import ModulePotential, Potential
from mechgrok.types import Component, Examples

N_POS, N_EXAMPLES, N_CHAINS = 6, 10, 3
PLENTY = 1e9

architectures = st.fixed_dictionaries(
    {
        "n_layers": st.integers(1, 3),
        "n_heads": st.integers(1, 3),
        "d_head": st.sampled_from([2, 4]),
        "d_model": st.sampled_from([5, 8]),
        "d_mlp": st.sampled_from([None, 7]),
        "act_fn": st.sampled_from(["relu", "gelu", "silu"]),
        "normalization_type": st.sampled_from([None, "LN", "LNPre", "RMS", "RMSPre"]),
        "positional_embedding_type": st.sampled_from(["standard", "rotary", "shortformer", "alibi"]),
        "attention_dir": st.sampled_from(["causal", "bidirectional"]),
        "scale_attn_by_inverse_layer_idx": st.booleans(),
        "d_vocab_out": st.sampled_from([-1, 4]),
    }
)


def build(seed: int = 0, **shape: object) -> HookedTransformer:
    """A model whose every parameter is random, biases and gains too."""
    given = {"n_layers": 2, "n_heads": 2, "d_head": 4, "d_model": 8, "d_mlp": None, "normalization_type": "LN"} | shape
    if given.get("positional_embedding_type") == "rotary":
        given["rotary_dim"] = 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = HookedTransformerConfig(
            **given, attn_only=given["d_mlp"] is None, n_ctx=N_POS, d_vocab=9, init_weights=False,
            default_prepend_bos=False, device="cpu", **({} if "act_fn" in given else {"act_fn": "relu"}),
        )  # fmt: skip
        model = HookedTransformer(config).eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=seeds.stream(seed, "weights", name))
        parameter.data = 0.5 * noise + (1.0 if name.endswith(".w") else 0.0)
    return model


def examples(model: HookedTransformer, scored: str = "all") -> Examples:
    """scored: every position, the last only, or a random share that differs between examples, with unequal weights."""
    rng = seeds.stream(0, "examples", scored)
    tokens = torch.randint(model.cfg.d_vocab, (N_EXAMPLES, N_POS), generator=rng)
    targets = torch.randint(model.cfg.d_vocab_out, (N_EXAMPLES, N_POS), generator=rng)
    weights = torch.ones(N_EXAMPLES, N_POS)
    if scored == "last":
        weights[:, :-1] = 0
    if scored == "some":
        weights = torch.rand(N_EXAMPLES, N_POS, generator=rng) * torch.randint(2, weights.shape, generator=rng)
        weights[:, 2] = 0.0  # a position that nobody scores, in the middle
        weights[:, 4] = 0.5
    return Examples(tokens, targets, weights)


def moved(anchor: Tensor, n_chains: int = N_CHAINS) -> Tensor:
    """Replicas around the anchors, member-major."""
    rows = anchor.reshape(-1, anchor.shape[-1]).repeat_interleave(n_chains, 0)
    return rows + 0.3 * torch.randn(rows.shape, generator=seeds.stream(0, "moved"))


def batches() -> Tensor:
    return torch.randint(N_EXAMPLES, (N_CHAINS, 4), generator=seeds.stream(0, "batches"))


def exactly(model: HookedTransformer, data: Examples, of: Component) -> Potential:
    """TransformerLens itself, in float64: in float32 it is as far from that as what is tested."""
    return ModulePotential(copy.deepcopy(model).to(torch.float64), model_losses, data.tensors, of)


def assert_same(fast: Potential, plain: Potential, theta: Tensor, rows: slice, index: Tensor) -> None:
    """Losses and gradients of these rows of theta, where losses are of order 1."""
    losses, gradient = fast.losses_and_grad(theta, index)
    plain_losses, plain_gradient = plain.losses_and_grad(theta[rows].to(plain.anchor.dtype), index)
    torch.testing.assert_close(losses[rows], plain_losses.double(), rtol=2e-5, atol=2e-5)
    size = float(plain_gradient.abs().max())
    torch.testing.assert_close(gradient[rows], plain_gradient.to(gradient.dtype), rtol=1e-4, atol=1e-4 * size)
    torch.testing.assert_close(fast.losses(theta, index), losses, rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(architectures, st.sampled_from(["all", "last", "some"]), st.sampled_from([PLENTY, 0.0]), st.booleans())
def test_every_architecture_agrees_with_transformer_lens(shape: dict, scored: str, memory: float, rank: bool) -> None:
    model = build(**shape)
    assert why_not(model) is None
    data, index = examples(model, scored), batches()
    for layer in range(model.cfg.n_layers):
        fast = LayerHeads(model, data, layer, range(model.cfg.n_heads), memory)
        fast._rank_pays = lambda n_rows: rank  # type: ignore[method-assign]
        theta = moved(fast.anchor)
        for head in range(model.cfg.n_heads):
            plain = exactly(model, data, component(model, f"L{layer}H{head}"))
            rows = slice(head * N_CHAINS, (head + 1) * N_CHAINS)
            assert_same(fast, plain, theta, rows, index)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    architectures,
    st.sampled_from(["all", "last", "some"]),
    st.sampled_from([PLENTY, 0.0]),
    st.sampled_from(["model", "embed", "unembed", "L0", "L0.attn", "L0H0"]),
)
def test_every_component_agrees_with_transformer_lens(shape: dict, scored: str, memory: float, name: str) -> None:
    model = build(**shape)
    data, of = examples(model, scored), component(model, name)
    fast = NetworkPotential(model, data, of, memory)
    theta = moved(fast.anchor)
    assert_same(fast, exactly(model, data, of), theta, slice(None), batches())


def test_a_union_of_heads_and_a_mask_of_single_weights_agree_too() -> None:
    model = build(n_layers=3)
    data = examples(model, "some")
    mask = torch.rand(model.W_E.shape, generator=seeds.stream(0, "mask")) < 0.3
    for of in (component(model, "L0H1+L2H0"), make_problem(model, data, {"embed.W_E": mask}).component):
        fast = NetworkPotential(model, data, of, PLENTY)
        plain = exactly(model, data, of)
        assert_same(fast, plain, moved(fast.anchor), slice(None), batches())


def test_hooks_supply_a_head_to_the_same_effect() -> None:
    model = build()
    data, of = examples(model), component(model, "L0H1")
    fast, hooked = LayerHeads(model, data, 0, [1], PLENTY), HeadPotential(model, data, of)
    assert_same(fast, hooked, moved(fast.anchor), slice(None), batches())
    with heads_at(model, of, dict(model.named_parameters())):
        assert model.blocks[0].attn._forward_hooks
    assert not model.blocks[0].attn._forward_hooks


def test_blocks_of_one_example_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    data = examples(model, "some")
    fast = LayerHeads(model, data, 0, [0, 1], PLENTY)
    theta, index = moved(fast.anchor), batches()
    losses, gradient = fast.losses_and_grad(theta, index)
    monkeypatch.setattr(blockwise, "WORKING_SET", 1)
    assert len(fast._blocks(len(theta), index)) == index.shape[1]
    for mine, whole in zip(fast.losses_and_grad(theta, index), (losses, gradient), strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-5, atol=1e-5)


def test_what_the_fast_path_does_not_compute_is_left_to_transformer_lens() -> None:
    shared = build(n_heads=2, n_key_value_heads=1)
    assert "n_key_value_heads" in str(why_not(shared))
    assert isinstance(make_problem(shared, examples(shared), "L0.attn").potential, ModulePotential)
    capped = build(attn_scores_soft_cap=20.0)
    assert "soft_cap" in str(why_not(capped))
    assert isinstance(make_problem(capped, examples(capped), "L0H1").potential, HeadPotential)
    assert groups(capped, ("L0H0", "L0H1")) == [("L0H0",), ("L0H1",)]
    together = make_problem(capped, examples(capped), ("L0H0", "L0H1"))
    assert together.path == "hooks" and "soft_cap" in together.why_not_faster


def test_groups_are_the_heads_of_a_layer() -> None:
    names = ("model", "L0H0", "L1H1", "L0H1", "L1H0+L0H0")
    assert groups(build(), names) == [("model",), ("L0H0", "L0H1"), ("L1H1",), ("L1H0+L0H0",)]
    many = [f"L0H{head}" for head in range(20)]
    assert groups(build(), many) == [tuple(many[:16]), tuple(many[16:])]
    across = make_problem(build(), examples(build()), ("L0H0", "L1H0"))
    assert across.path == "hooks" and "one layer" in across.why_not_faster
    with pytest.raises(TogetherError, match="L0H0, L0.mlp cannot be sampled together"):
        make_problem(build(d_mlp=7), examples(build()), ("L0H0", "L0.mlp"))


CONFIG = LLCConfig(nbeta=20.0, step_size=2e-3, localization=50.0, n_chains=3, n_draws=30, n_burnin=10, batch_size=4)


def test_a_head_among_others_is_estimated_as_alone() -> None:
    model = build()
    together = estimate_group(model, examples(model), ("L1H0", "L1H1"), config=CONFIG, seed=3)
    for estimate in together:
        alone = mg.estimate_llc(model, examples(model), config=CONFIG, seed=3, component=estimate.component)
        assert alone.llc == pytest.approx(estimate.llc, rel=1e-3)
        assert alone.n_params == estimate.n_params == component(model, "L1H0").n_params
        assert alone.health.saturation == pytest.approx(estimate.health.saturation, rel=1e-3, nan_ok=True)
    assert together[0].llc != pytest.approx(together[1].llc, rel=1e-2)


@pytest.mark.parametrize("precision", ["int16", "bfloat16", "float64"])
@pytest.mark.parametrize("name", ["model", "L0H1"])
def test_precisions_agree_within_the_error(precision: str, name: str) -> None:
    model, compiled = build(), CONFIG.model_copy(update={"path": "compiled"})
    plain = mg.estimate_llc(model, examples(model), config=compiled, seed=0, component=name)
    other_config = compiled.model_copy(
        update={"precision": precision, "path": "auto" if precision == "float64" else "compiled"}
    )
    other = mg.estimate_llc(model, examples(model), config=other_config, seed=0, component=name)
    # The same noise, so they are much nearer to each other than to the truth; float64 draws other normals.
    assert abs(other.llc - plain.llc) < (4 if precision == "float64" else 0.5) * plain.std_error
    assert (other.llc == plain.llc) == (why_idle(precision, model, examples(model)) is not None)
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"  # type: ignore[attr-defined]


def test_float32_means_float32_whatever_kernels_make_the_products() -> None:
    rng = seeds.stream(0, "product")
    a, b = torch.randn(300, 200, generator=rng), torch.randn(200, 400, generator=rng)
    with matmul_precision("float32"):
        product = a @ b
    assert float((product.double() - a.double() @ b.double()).abs().max()) < 2e-4
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"  # type: ignore[attr-defined]


def test_a_device_that_is_not_there_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = CONFIG.model_copy(update={"device": "cuda"})
    with pytest.raises(ConfigError, match="no such device; install a CUDA build"):
        mg.estimate_llc(build(), examples(build()), config=config, seed=0)


def test_a_diverged_replica_leaves_the_others_alone() -> None:
    model = build()
    fast = LayerHeads(model, examples(model), 0, [0, 1], PLENTY)
    theta, index = moved(fast.anchor), batches()
    losses, gradient = fast.losses_and_grad(theta, index)
    broken = theta.clone()
    broken[1] = torch.nan
    broken_losses, broken_gradient = fast.losses_and_grad(broken, index)
    others = torch.arange(len(theta)) != 1
    assert broken_losses[1].isnan().all() and broken_gradient[1].isnan().all()
    torch.testing.assert_close(broken_losses[others], losses[others], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(broken_gradient[others], gradient[others], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("margin", [0.0, 30.0, 60.0, -150.0])
def test_cross_entropy_is_exact_from_tiny_to_huge(margin: float) -> None:
    """Losses from 1e-26 to 150 nats, and their gradients, against float64."""
    rng = seeds.stream(0, "cross entropy")
    x = torch.randn(1, 7, 4, generator=rng)
    readout, bias = torch.randn(1, 4, 11, generator=rng), torch.randn(1, 11, generator=rng)
    targets = torch.full((1, 7), 5)
    bias[0, 5] += margin
    weights = torch.rand(1, 7, generator=rng)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, readout, bias)]
    nats, total = cross_entropy(*leaves, targets, weights)
    found = torch.autograd.grad(total.sum(), leaves)
    exact = [tensor.double().requires_grad_() for tensor in (x, readout, bias)]
    logits = exact[0][0] @ exact[1][0] + exact[2]
    wanted = -logits.log_softmax(-1)[:, 5]
    others = torch.cat([logits[:, :5], logits[:, 6:]], 1).logsumexp(-1)
    wanted = torch.where(wanted < 1e-3, torch.nn.functional.softplus(others - logits[:, 5]), wanted)
    torch.testing.assert_close(nats[0].double(), wanted.detach(), rtol=1e-4, atol=0.0)
    for mine, theirs in zip(found, torch.autograd.grad((wanted * weights[0]).sum(), exact), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))


def test_frozen_targets_are_shared_by_the_members_of_a_chain() -> None:
    """Two members of a chain see the same batch: equal parameters give equal losses."""
    model = build()
    heads = LayerHeads(model, examples(model), 1, [0, 0], PLENTY)
    theta, index = heads.anchor.repeat_interleave(N_CHAINS, 0), batches()
    losses = heads.losses(theta, index)
    torch.testing.assert_close(losses[:N_CHAINS], losses[N_CHAINS:], rtol=1e-5, atol=1e-5)
    expected = model_losses(model, *examples(model).tensors).detach()[index]
    torch.testing.assert_close(losses[:N_CHAINS], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_layers", [1, 2])
def test_where_nearly_all_positions_are_scored_the_others_are_computed_and_do_not_count(
    n_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(n_layers=n_layers)
    data, index = examples(model, "some"), batches()
    assert len(Network(model, data).scored) < N_POS
    monkeypatch.setattr("mechgrok.replicas.network.NEARLY_ALL", 0.5)
    assert len(Network(model, data).scored) == N_POS
    for fast, name in (
        *((LayerHeads(model, data, layer, [1], PLENTY), f"L{layer}H1") for layer in range(n_layers)),
        (NetworkPotential(model, data, component(model, "model"), PLENTY), "model"),
    ):
        plain = exactly(model, data, component(model, name))
        assert_same(fast, plain, moved(fast.anchor), slice(None), index)


@pytest.mark.parametrize("positions", ["standard", "shortformer"])
@pytest.mark.parametrize("scored", ["all", "last", "some"])
@pytest.mark.parametrize(
    "shape", [{"n_layers": 1, "d_mlp": 7, "normalization_type": None}, {"n_layers": 2}, {"normalization_type": "RMS"}]
)
@pytest.mark.parametrize("name", ["model", "embed"])
def test_rows_that_begin_alike_are_read_once(
    positions: str, scored: str, shape: dict, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(positional_embedding_type=positions, **shape)
    data, of, index = examples(model, scored), component(model, name), batches()
    fast = NetworkPotential(model, data, of, PLENTY)
    theta, plain, seen = moved(fast.anchor), exactly(model, data, of), []
    passes = fast._compiled.passes
    run = type(passes).__call__
    monkeypatch.setattr(type(passes), "__call__", lambda *given: seen.append((given[3], given[7])) or run(*given))
    for most, told_apart in ((1.0, True), (0.0, False)):
        monkeypatch.setattr("mechgrok.replicas.distinct.ALIKE", most)
        assert_same(fast, plain, theta, slice(None), index)
        resid, begun = seen[-1]
        assert (begun is not None) == told_apart
        assert (resid.shape[1] < index.shape[1] * N_POS) == told_apart


@pytest.mark.parametrize("positions", ["standard", "shortformer"])
@pytest.mark.parametrize("scored", ["all", "last"])
@pytest.mark.parametrize("size", [1, 4, 40])
def test_each_distinct_row_of_a_batch_is_there_once(
    size: int, positions: str, scored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mechgrok.replicas.distinct.ALIKE", 1.0)
    monkeypatch.setattr("mechgrok.replicas.distinct.SPARSE", 1000)
    model = build(n_layers=1, positional_embedding_type=positions)
    data = examples(model, scored)
    net = Network(model, data)
    index = torch.randint(N_EXAMPLES, (N_CHAINS, size), generator=seeds.stream(0, "batches", size))
    distinct = Distinct(net, data.tokens)
    begun = distinct.of(index)
    assert begun is not None
    resid = net.embed(data.tokens[index], net.frozen)
    for chain, rows in enumerate(begun.rows):
        mine = distinct.embed(net.frozen, rows[None])[0]
        assert torch.equal(mine[begun.which[chain]], resid[chain]) and len(mine.unique(dim=0)) == len(mine)
    # One of token and position, or of the token alone where positions do not enter the residual stream.
    placed = positions == "standard"
    pairs = [
        {(at if placed else 0, int(token)) for tokens in data.tokens[own] for at, token in enumerate(tokens)}
        for own in index
    ]
    assert begun.rows.shape[1] == max(map(len, pairs))
    asks = N_POS - 1 if scored == "last" and placed else 0
    assert begun.asking == min(sum(at < asks for at, _ in found) for found in pairs)


@pytest.mark.parametrize("memory", [PLENTY, 0.0])
@pytest.mark.parametrize("positions", ["standard", "shortformer"])
@pytest.mark.parametrize("scored", ["all", "last", "some"])
def test_neurons_and_logits_read_heads_directly_where_no_norm_is_between(
    scored: str, positions: str, memory: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(n_layers=1, d_mlp=7, normalization_type=None, positional_embedding_type=positions)
    data, index = examples(model, scored), batches()
    monkeypatch.setattr("mechgrok.replicas.distinct.ALIKE", 1.0)  # heads of the first layer read distinct rows
    fast = LayerHeads(model, data, 0, range(2), memory)
    assert fast._direct is not None and (fast._direct.kept is None) == (memory == 0.0)
    assert fast._distinct is not None and fast._distinct.of(index) is not None
    theta = moved(fast.anchor)
    for pays in (True, False):
        fast._rank_pays = lambda n_rows, pays=pays: pays  # type: ignore[method-assign]
        for head in range(2):
            plain = exactly(model, data, component(model, f"L0H{head}"))
            assert_same(fast, plain, theta, slice(head * N_CHAINS, (head + 1) * N_CHAINS), index)
    assert LayerHeads(build(n_layers=1, d_mlp=7), data, 0, [0], memory)._direct is None  # its LayerNorm is between


def test_losses_do_not_depend_on_unscored_targets() -> None:
    model = build()
    data = examples(model, "some")
    other = dataclasses.replace(data, targets=torch.where(data.weights > 0, data.targets, 0))
    index = batches()
    fast, same = (LayerHeads(model, one, 0, [0], PLENTY) for one in (data, other))
    theta = moved(fast.anchor)
    assert torch.equal(fast.losses(theta, index), same.losses(theta, index))
