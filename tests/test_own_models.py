"""Models as people have them: hooks, forwards and parts of their own, parameters in two places. All are sampled as they
are, and an estimate says by which path and why not by the fast one.
"""

import copy
import types
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer

import mechgrok as mg
from mechgrok import seeds
from mechgrok.components import component
from mechgrok.errors import ComponentError, ConfigError
from mechgrok.hooked_heads import heads_at
from mechgrok.llc.estimate import estimate_group
from mechgrok.llc.head_potential import HeadPotential
from mechgrok.llc.problem import make_problem
from mechgrok.model import example_losses
from mechgrok.plain import is_untouched, why_not_plain
from mechgrok.replicas.network import why_not
from mechgrok.sampling.potential import extract, inserter
from tests.test_replicas import CONFIG, build, examples

SEED = 1


def losses_of(model: HookedTransformer) -> Tensor:
    """Each example's loss by a plain call of the model."""
    data = examples(model)
    with torch.no_grad():
        return example_losses(model(data.tokens), data.targets, data.weights)


def hooked(name: str, change: Callable[[Tensor], Tensor], **how: bool) -> Callable[[HookedTransformer], None]:
    return lambda model: model.add_hook(name, lambda value, hook: change(value), **how)


class Doubled(torch.nn.Module):
    """A norm, or an MLP, of the user's own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Subclass(HookedTransformer):
    def forward(self, *args, **kwargs):
        return 0.5 * super().forward(*args, **kwargs)


def replace(place: str, part: torch.nn.Module) -> Callable[[HookedTransformer], None]:
    def change(model: HookedTransformer) -> None:
        parent, _, name = place.rpartition(".")
        setattr(model.get_submodule(parent), name, part)

    return change


def own_forward(model: HookedTransformer) -> None:
    def forward(self: HookedTransformer, *args, **kwargs):
        return 3 * HookedTransformer.forward(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


def own_act_fn(model: HookedTransformer) -> None:
    model.blocks[0].mlp.act_fn = torch.tanh


def first_out(model: HookedTransformer) -> None:
    model.blocks[1].hook_mlp_out.add_hook(_zero_first)


def _zero_first(value: Tensor, hook: object) -> Tensor:
    value = value.clone()
    value[:, 0] = 0.0  # by position: which of them is first must not depend on what is scored
    return value


CHANGES: dict[str, Callable[[HookedTransformer], None]] = {
    "permanent hook": hooked("hook_pos_embed", lambda a: a * 0, is_permanent=True),
    "hook": hooked("hook_pos_embed", lambda a: a * 0),
    "hook on the MLP's output": hooked("blocks.0.hook_mlp_out", lambda a: a * 0),
    "hook on a pattern": hooked("blocks.1.attn.hook_pattern", lambda a: a * 0.5),
    "hook by position": first_out,
    "forward hook": lambda model: model.blocks[0].register_forward_hook(lambda module, args, out: 2 * out),
    "forward pre-hook": lambda model: model.ln_final.register_forward_pre_hook(lambda module, args: (-args[0],)),
    "hook on v": hooked("blocks.0.attn.hook_v", lambda a: a * 0),
    "hook on q": hooked("blocks.0.attn.hook_q", lambda a: a * 3),
    "hook on z": hooked("blocks.0.attn.hook_z", lambda a: a * -1),
    "hook on the attention's output": hooked("blocks.0.hook_attn_out", lambda a: a * 0.1),
    "hook on what attention reads": lambda model: model.blocks[0].attn.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"query_input": 2 * kwargs["query_input"]}), with_kwargs=True
    ),
    "forward of its own": own_forward,
    "another ln2": replace("blocks.0.ln2", Doubled()),
    "another ln_final": replace("ln_final", torch.nn.Hardtanh()),
    "another MLP": replace("blocks.1.mlp", Doubled()),
    "no MLP": replace("blocks.1.mlp", torch.nn.Identity()),
    "another act_fn": own_act_fn,
    "one block fewer": lambda model: model.blocks.__delitem__(1),
}


def changed(how: str, **shape: object) -> HookedTransformer:
    model = build(d_mlp=7, **shape)
    CHANGES[how](model)
    return model


@pytest.mark.parametrize("name", ["model", "L0H1"])
@pytest.mark.parametrize("how", CHANGES)
def test_what_is_sampled_is_the_users_model(how: str, name: str) -> None:
    plain, model = build(d_mlp=7), changed(how)
    assert why_not(plain) is None and why_not(model) is not None
    assert not torch.allclose(losses_of(plain), losses_of(model), atol=1e-3)  # or nothing would be tested
    estimate = mg.estimate_llc(model, examples(model), component=name, config=CONFIG, seed=SEED)
    assert estimate.init_loss == pytest.approx(float(losses_of(model).mean()), rel=1e-6)
    assert estimate.path in (("module",) if name == "model" else ("hooks", "module"))
    assert estimate.why_not_faster is not None
    by_module = CONFIG.model_copy(update={"path": "module"})
    slow = mg.estimate_llc(model, examples(model), component=name, config=by_module, seed=SEED)
    np.testing.assert_allclose(estimate.losses, slow.losses, rtol=1e-3, atol=1e-4)
    assert slow.path == "module"


def test_a_subclass_is_sampled_by_its_own_forward() -> None:
    model = build(d_mlp=7)
    model.__class__ = Subclass
    estimate = mg.estimate_llc(model, examples(model), config=CONFIG, seed=SEED)
    assert estimate.path == "module" and "Subclass" in str(estimate.why_not_faster)
    assert estimate.init_loss == pytest.approx(float(losses_of(model).mean()), rel=1e-6)


@pytest.mark.parametrize("name", ["L0H1", "L0H0+L1H1"])
@pytest.mark.parametrize("flags", [{}, {"use_attn_result": True}, {"use_split_qkv_input": True}, {"use_attn_in": True}])
@pytest.mark.parametrize("how", ["hook on v", "hook on q", "hook on z", "hook on the attention's output",
                                 "hook on what attention reads", "hook on a pattern"])  # fmt: skip
def test_a_head_supplied_by_hooks_is_that_head_beside_the_users_hooks(how: str, flags: dict, name: str) -> None:
    model = changed(how, **flags)
    fired: list[str] = []
    model.blocks[0].ln1.hook_scale.add_hook(lambda value, hook: fired.append("ln1"))
    model.blocks[0].hook_attn_out.add_hook(lambda value, hook: fired.append("attn_out"))
    if "use_attn_result" in flags:
        model.add_hook("blocks.0.attn.hook_result", lambda value, hook: value * 0.7)
    of = component(model, name)
    own = {key: value.detach() for key, value in model.named_parameters()}
    anchor = extract(of, own)
    other = inserter(of, own)(anchor + 0.3 * torch.randn(anchor.shape, generator=seeds.stream(0, "moved")))
    truly = copy.deepcopy(model)
    truly.load_state_dict(other, strict=False)
    tokens = examples(model).tokens
    expected = truly(tokens)
    fired.clear()
    with heads_at(model, of, other):
        found = model(tokens)
    n_calls = {"ln1": 3} if "use_split_qkv_input" in flags or "use_attn_in" in flags else {"ln1": 3}
    assert sorted(fired) == ["attn_out"] + ["ln1"] * n_calls["ln1"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if how != "hook on v":  # which leaves the heads of layer 0 without effect
        assert not torch.allclose(found, model(tokens), atol=1e-3)


def test_hooks_of_the_user_stay_and_what_is_only_watched_is_sampled_all_the_same() -> None:
    model = build(d_mlp=7)
    seen = []
    model.add_hook("blocks.0.hook_mlp_out", lambda value, hook: seen.append(value.shape), is_permanent=True)
    handle = model.unembed.register_forward_hook(lambda module, args, out: None)
    assert not is_untouched(model)
    watched = mg.estimate_llc(model, examples(model), component="L1H0", config=CONFIG, seed=SEED)
    assert len(model.blocks[0].hook_mlp_out.fwd_hooks) == 1 and handle.id in model.unembed._forward_hooks and seen
    plain = mg.estimate_llc(build(d_mlp=7), examples(model), component="L1H0", config=CONFIG, seed=SEED)
    assert watched.path == "hooks" and plain.path == "torch"
    np.testing.assert_allclose(watched.losses, plain.losses, rtol=1e-4)


def test_flags_that_only_expose_activations_cost_nothing() -> None:
    shape = {"use_attn_result": True, "use_split_qkv_input": True, "use_attn_in": True, "use_hook_mlp_in": True}
    for flags in [shape, *({flag: True} for flag in shape)]:
        model = build(d_mlp=7, **flags)
        for name in ("model", "L0H1"):
            found = make_problem(model, examples(model), name)
            assert (found.path, found.why_not_faster) == ("compiled", None), flags
            exposed = found.potential.losses(found.potential.anchor[None] * 1.1, torch.arange(5)[None])
            plain = make_problem(build(d_mlp=7), examples(model), name).potential
            torch.testing.assert_close(exposed, plain.losses(plain.anchor[None] * 1.1, torch.arange(5)[None]))


def test_a_curve_an_observation_and_a_group_serve_such_models_too() -> None:
    model = changed("hook on q")
    data = examples(model)
    curve = mg.llc_curve([(0, model)], data, components=["model", "L0H0", "L0H1"], config=CONFIG, seed=SEED)
    group = estimate_group(model, data, ("L0H0", "L0H1"), config=CONFIG, seed=SEED)
    assert curve.init_loss == pytest.approx([float(losses_of(model).mean())], rel=1e-6)
    for one in group:
        alone = mg.estimate_llc(model, data, component=one.component, config=CONFIG, seed=SEED)
        assert one.path == "hooks" and one.llc == pytest.approx(alone.llc, rel=1e-3)
    seen = mg.observe(model, data, {"same": data}, config=CONFIG, seed=SEED, component="L0H0")
    np.testing.assert_allclose(seen.init_losses["same"], losses_of(model).numpy(), rtol=1e-6)
    with pytest.raises(
        ConfigError, match="no canonical gauge for a model with more to it .*: hooks on blocks.0.attn.hook_q"
    ):
        mg.estimate_llc(model, data, config=CONFIG.model_copy(update={"canonicalize": True}), seed=SEED)


def test_a_path_that_is_asked_for_serves_or_is_refused() -> None:
    plain, own = build(d_mlp=7), changed("hook on v")
    for path in ("compiled", "torch", "module"):
        config = CONFIG.model_copy(update={"path": path})
        assert mg.estimate_llc(plain, examples(plain), config=config, seed=SEED).path == path
    with pytest.raises(ConfigError, match='path "torch" does not serve model: hooks on blocks.0.attn.hook_v'):
        mg.estimate_llc(own, examples(own), config=CONFIG.model_copy(update={"path": "torch"}), seed=SEED)
    with pytest.raises(ConfigError, match='path "hooks" does not serve model: hooks supply heads'):
        mg.estimate_llc(own, examples(own), config=CONFIG.model_copy(update={"path": "hooks"}), seed=SEED)


class _Off:
    """A potential that is wrong away from w* alone, as one would be that leaves the component where it is."""

    def __init__(self, inside: object):
        self.inside, self.anchor, self.n_examples = inside, inside.anchor, inside.n_examples

    def losses(self, theta: Tensor, index: Tensor) -> Tensor:
        return self.inside.losses(self.anchor.expand(len(theta), -1), index)


def test_a_potential_that_does_not_move_the_component_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from mechgrok.llc import paths

    model = build(d_mlp=7)
    real = paths.NetworkPotential

    def off(*args: object) -> object:
        found = _Off(real(*args))
        found.loops = False
        return found

    monkeypatch.setattr(paths, "NetworkPotential", off)
    found = make_problem(model, examples(model), "L0.mlp")
    assert found.path == "module" and "nats at a perturbed w" in str(found.why_not_faster)


# Parameters in two places, or made of others.


def test_a_block_used_twice_is_one_set_of_parameters() -> None:
    model = build(d_mlp=7)
    model.blocks[1] = model.blocks[0]
    before = {name: (id(one), one.clone()) for name, one in model.named_parameters()}
    assert why_not_plain(model) is not None
    whole = mg.estimate_llc(model, examples(model), config=CONFIG, seed=SEED)
    assert whole.path == "module" and whole.n_params == sum(one.numel() for one in model.parameters())
    twice = mg.estimate_llc(model, examples(model), component="L0H0", config=CONFIG, seed=SEED)
    assert twice.path == "module"
    after = dict(model.named_parameters())
    assert all(id(after[name]) == at and torch.equal(after[name], own) for name, (at, own) in before.items())
    with pytest.raises(ComponentError, match="L1' selects no parameter: blocks.1.*is blocks.0"):
        component(model, "L1")
    with pytest.raises(ComponentError, match="L1H0' has no blocks.1.attn.W_Q of its own"):
        component(model, "L1H0")


def test_a_shared_weight_moves_both_places() -> None:
    model = build()
    model.blocks[1].attn.W_Q = model.blocks[0].attn.W_Q
    of = component(model, "L0H1")
    problem = make_problem(model, examples(model), "L0H1")
    assert problem.path == "module" and "W_Q is blocks.0.attn.W_Q" in str(problem.why_not_faster)
    theta = problem.potential.anchor + 0.2
    truly = copy.deepcopy(model)
    own = {key: value.detach() for key, value in model.named_parameters()}
    truly.load_state_dict(inserter(of, own)(theta), strict=False)
    truly.blocks[1].attn.W_Q = truly.blocks[0].attn.W_Q
    found = problem.potential.losses(theta[None], torch.arange(10)[None])[0]
    torch.testing.assert_close(found, losses_of(truly), rtol=1e-4, atol=1e-5)
    with pytest.raises(ComponentError, match="L1H0' has no blocks.1.attn.W_Q of its own"):
        component(model, "L1H0")


def test_a_tied_unembedding_is_one_parameter() -> None:
    model = build(d_model=9)
    model.unembed.W_U = model.embed.W_E
    whole = mg.estimate_llc(model, examples(model), config=CONFIG, seed=SEED)
    assert whole.path == "module" and whole.n_params == sum(one.numel() for one in model.parameters())
    model.unembed.W_U = torch.nn.Parameter(model.embed.W_E.data.T)  # two parameters on the same numbers
    with pytest.raises(ConfigError, match="unembed.W_U lies in the memory of embed.W_E"):
        mg.estimate_llc(model, examples(model), config=CONFIG, seed=SEED)


def test_a_parametrized_weight_is_sampled_by_what_it_is_made_of() -> None:
    model = build(d_mlp=7)
    torch.nn.utils.parametrize.register_parametrization(model.blocks[0].attn, "W_Q", Doubled(), unsafe=True)
    for name in ("model", "L0.attn", "L1H0"):
        estimate = mg.estimate_llc(model, examples(model), component=name, config=CONFIG, seed=SEED)
        assert estimate.path in ("module", "hooks") and np.isfinite(estimate.llc)
    with pytest.raises(ComponentError, match="L0H0' has no blocks.0.attn.W_Q of its own"):
        component(model, "L0H0")


def test_a_part_without_parameters_is_named_as_that() -> None:
    with pytest.raises(ComponentError, match="L1.mlp' selects no parameter: it has none"):
        component(changed("no MLP", normalization_type=None), "L1.mlp")


@pytest.mark.parametrize("n_key_value_heads", [1, 2, 4])
def test_a_head_of_grouped_queries_is_its_query_and_output(n_key_value_heads: int) -> None:
    model = build(n_heads=4, n_key_value_heads=n_key_value_heads)
    head = component(model, "L1H2")
    parts = {name.rpartition(".")[2] for name in head.masks}
    assert parts == ({"W_Q", "b_Q", "W_O"} | ({"_W_K", "_W_V", "_b_K", "_b_V"} if n_key_value_heads == 4 else set()))
    for name in ("model", "L0.attn", "L1H2", "L0H1+L1H2"):
        found = make_problem(model, examples(model), name)
        assert found.path == ("hooks" if "H" in name else "module")
        by_module = make_problem(model, examples(model), name, path="module")
        theta = found.potential.anchor + 0.2 * torch.randn(2, len(found.potential.anchor), generator=seeds.stream(0))
        index = torch.arange(6).view(2, 3)
        for mine, exact in zip(
            found.potential.losses_and_grad(theta, index),
            by_module.potential.losses_and_grad(theta, index),
            strict=True,
        ):
            torch.testing.assert_close(mine, exact, rtol=1e-3, atol=1e-5)


def test_experts_are_sampled_one_replica_after_another() -> None:
    model = build(d_mlp=7, num_experts=3, experts_per_token=1)
    estimate = mg.estimate_llc(model, examples(model), config=CONFIG, seed=SEED)
    assert estimate.path == "module" and "vmap does not take it" in str(estimate.why_not_faster)
    assert np.isfinite(estimate.llc)


# Losses that are no function of the parameters.


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(2, 2))
        self.register_buffer("count", torch.zeros(()))
        self.calls = 0


def _numpy_noise(net: Net, x: Tensor) -> Tensor:
    return (x @ net.w).sum(1) ** 2 + torch.from_numpy(np.random.default_rng().normal(size=len(x))).float()


def _counting(net: Net, x: Tensor) -> Tensor:
    net.count += 1
    return (x @ net.w).sum(1) ** 2


def _learning(net: Net, x: Tensor) -> Tensor:
    net.calls += 1
    return (x @ net.w).sum(1) ** 2 * net.calls


NO_FUNCTIONS = {
    "dropout": lambda net, x: (torch.nn.functional.dropout(x, training=True) @ net.w).sum(1) ** 2,
    "noise": lambda net, x: ((x + torch.randn_like(x)) @ net.w).sum(1) ** 2,
    "numpy's noise": _numpy_noise,
    "a counter in a buffer": _counting,
    "a counter": _learning,
    "the batch's mean": lambda net, x: ((x - x.mean(0)) @ net.w).sum(1) ** 2,
}


@pytest.mark.parametrize("what", NO_FUNCTIONS)
def test_a_loss_that_is_no_function_of_the_parameters_is_refused(what: str) -> None:
    x = torch.randn(20, 2, generator=seeds.stream(0, "x"))
    with pytest.raises(ConfigError, match="the loss of example .* in another|changes its own parameters or buffers"):
        mg.estimate_llc(Net(), (x,), loss_fn=NO_FUNCTIONS[what], config=CONFIG, seed=0)


def test_a_transformer_with_noise_in_a_hook_is_refused() -> None:
    model = build()
    model.add_hook("hook_embed", lambda value, hook: value + 0.1 * torch.randn_like(value))
    for name in ("model", "L0H0"):
        with pytest.raises(ConfigError, match="the loss of example"):
            mg.estimate_llc(model, examples(model), component=name, config=CONFIG, seed=0)


def test_a_model_half_on_meta_is_refused() -> None:
    model = build()
    model.unembed.to("meta")
    with pytest.raises(ConfigError, match="unembed.W_U lies on the meta device"):
        mg.estimate_llc(model, examples(model), config=CONFIG, seed=0)


def test_the_reference_for_heads_says_what_it_does_not_serve() -> None:
    model = build()
    model.blocks[0].attn = Doubled()
    data = examples(model)
    of = component(model, "L1H0")
    assert HeadPotential(build(), data, of).anchor.shape == (of.n_params,)
    with pytest.raises(ComponentError, match="L0H0' has no blocks.0.attn.W_Q of its own"):
        component(model, "L0H0")
