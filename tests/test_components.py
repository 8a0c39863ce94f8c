from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformer_lens import HookedTransformer

from mechgrok import seeds
from mechgrok.components import HEAD_PARAMETERS, complement, component, expand_names
from mechgrok.errors import ComponentError
from mechgrok.hooked_heads import heads_at
from mechgrok.model import build_model, evaluate, model_losses
from mechgrok.sampling.potential import extract, inserter
from mechgrok.tasks import make_split
from tests.oracles import tiny_config

SPLIT = make_split(tiny_config().task, 0)

architectures = st.fixed_dictionaries(
    {
        "n_layers": st.integers(1, 2),
        "d_mlp": st.sampled_from([None, 16]),
        "normalization_type": st.sampled_from([None, "LN", "LNPre"]),
        "positional_embedding_type": st.sampled_from(["standard", "rotary", "shortformer"]),
    }
)


def build(**changes) -> HookedTransformer:
    model = build_model(tiny_config(model=changes).model, SPLIT, 0)
    generator = seeds.stream(0, "biases")
    with torch.no_grad():  # biases away from zero, so that a slice that misses them shows
        for name, q in model.named_parameters():
            if ".b_" in name:
                q.copy_(0.1 * torch.randn(q.shape, generator=generator))
    return model


def parameters(model: HookedTransformer) -> dict[str, torch.Tensor]:
    return {name: q.detach() for name, q in model.named_parameters()}


def count(model: HookedTransformer, masks) -> dict[str, torch.Tensor]:
    """How often each entry is selected."""
    own = parameters(model)
    return {
        name: torch.zeros_like(q)
        if name not in masks
        else (torch.ones_like(q) if masks[name] is None else masks[name].float())
        for name, q in own.items()
    }


def test_a_head_is_its_slices_and_nothing_else() -> None:
    model = build(n_layers=2)
    head = component(model, "L1H0")
    assert set(head.masks) == {f"blocks.1.attn.{leaf}" for leaf in HEAD_PARAMETERS}
    for name, mask in head.masks.items():
        assert mask[0].all() and not mask[1].any(), name
    assert head.n_params == 4 * 16 * 8 + 3 * 8


@settings(deadline=None, max_examples=15)
@given(architectures)
def test_components_partition_the_parameters(shape) -> None:
    model = build(**shape)
    own = parameters(model)
    parts = ["embed", "unembed", *(f"L{layer}" for layer in range(model.cfg.n_layers))]
    total = [count(model, component(model, part).masks) for part in parts]
    assert all((sum(c[name] for c in total) == 1).all() for name in own)
    heads = [component(model, name) for name in expand_names(model, ["heads"])]
    for first, second in combinations(heads, 2):
        one, two = count(model, first.masks), count(model, second.masks)
        assert all((one[name] * two[name] == 0).all() for name in own)
    for head in heads:
        rest = complement(model, head)
        inside, outside = count(model, head.masks), count(model, rest.masks)
        assert all((inside[name] + outside[name] == 1).all() for name in own)
        assert head.n_params + rest.n_params == sum(q.numel() for q in own.values())


def test_layer_splits_into_attention_and_mlp_and_unions_add_up() -> None:
    model = build(normalization_type="LN", n_layers=2)
    assert set(component(model, "L0.attn").masks) | set(component(model, "L0.mlp").masks) == set(
        component(model, "L0").masks
    )
    union = component(model, "L0H1+L1H0")
    assert union.heads == ((0, 1), (1, 0))
    assert union.n_params == 2 * component(model, "L0H0").n_params
    assert component(model, "L0H1+L0.mlp").heads == ()


@settings(deadline=None, max_examples=25)
@given(architectures, st.sampled_from(["L0H0", "L0H1", "L0H0+L0H1"]))
def test_at_the_models_own_parameters_hooks_change_no_bit(shape, name) -> None:
    model = build(**shape)
    tokens = SPLIT.train.tokens
    plain = model(tokens)
    with heads_at(model, component(model, name), parameters(model)):
        assert torch.equal(model(tokens), plain)


@settings(deadline=None, max_examples=40)
@given(architectures, st.sampled_from(["L0H0", "L0H1", "L0H0+L0H1", "last"]), st.integers(0, 3))
def test_hooks_equal_a_model_that_really_has_the_other_parameters(shape, name, seed) -> None:
    model = build(**shape)
    last = model.cfg.n_layers - 1
    head = component(model, f"L{last}H1+L0H0" if name == "last" else name)
    own = parameters(model)
    anchor = extract(head, own)
    moved = anchor + 0.5 * torch.randn(anchor.shape, generator=seeds.stream(seed, "moved"))
    other = inserter(head, own)(moved)
    with heads_at(model, head, other):
        hooked = evaluate(model, SPLIT.train)[0]
    expected = float(torch.func.functional_call(_Losses(model), {f"model.{n}": q for n, q in other.items()}, ()).mean())
    assert hooked == pytest.approx(expected, rel=2e-5)
    assert hooked != pytest.approx(evaluate(model, SPLIT.train)[0], rel=1e-4)
    outside = count(model, complement(model, head).masks)
    assert all(torch.equal(other[n] * outside[n], own[n] * outside[n]) for n in own)


class _Losses(torch.nn.Module):
    def __init__(self, model: HookedTransformer):
        super().__init__()
        self.model = model

    def forward(self) -> torch.Tensor:
        return model_losses(self.model, *SPLIT.train.tensors)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("L3H0", "the model has 1 layers, numbered from 0 to 0"),
        ("L0H2", "the model has 2 heads, numbered from 0 to 1"),
        ("head3", "unknown component 'head3'"),
        ("", "unknown component ''"),
        ("L0H0+L0H0", "overlap"),
        ("L0H0+L0", "overlap"),
        ("L0H0+", "unknown component ''"),
        ("L0.mlp", "attention-only"),
        ("L00H00", "unknown component 'L00H00'"),
        ("L00", "unknown component 'L00'"),
        ("L\u0663H0", "unknown component 'L\u0663H0'"),
        ("L" + 5000 * "9" + "H0", f"unknown component 'L{39 * '9'}'; use model"),
    ],
)
def test_a_name_that_does_not_fit_is_refused(name: str, message: str) -> None:
    with pytest.raises(ComponentError, match=message.replace("(", r"\(")):
        component(build(d_mlp=None), name)


def test_hooks_supply_heads_only() -> None:
    model = build()
    with (
        pytest.raises(ComponentError, match="hooks supply heads and unions of heads"),
        heads_at(model, component(model, "L0.mlp"), parameters(model)),
    ):
        pass
