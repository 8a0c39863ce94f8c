"""Heads that share keys and values: every measure equals that of the same function as plain multi-head attention."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformer_lens import HookedTransformer

import analyses
from analyses import contract, render
from mechgrok import seeds
from mechgrok.errors import ComponentError, ConfigError
from mechgrok.measures.path_ablation import path_ablation
from mechgrok.model import shape_of
from tests.all_measures import ALL, ROWS, Measure, assert_same, other_model

SHAPES = {
    "one for all": {"n_key_value_heads": 1, "attn_only": True, "d_mlp": None},
    "pairs": {"n_key_value_heads": 2},
    "each its own": {"n_key_value_heads": 4},
    "pairs, LN, rotary": {
        "n_key_value_heads": 2, "normalization_type": "LN", "positional_embedding_type": "rotary", "rotary_dim": 6
    },
    "pairs, shortformer": {
        "n_key_value_heads": 2, "normalization_type": "LNPre", "positional_embedding_type": "shortformer",
        "attn_only": True, "d_mlp": None,
    },
}  # fmt: skip


def expanded(model: HookedTransformer, **changes: object) -> HookedTransformer:
    """The same function with keys and values for every head."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    plain = other_model(**{**changes, "n_key_value_heads": None})
    group = model.cfg.n_heads // (model.cfg.n_key_value_heads or model.cfg.n_heads)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            layer, _, leaf = name.rpartition(".")
            shared = f"{layer}._{leaf}"
            given = parameters[shared].repeat_interleave(group, 0) if shared in parameters else parameters[name]
            parameter.copy_(given)
    return plain


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("measure", ALL.values(), ids=ALL)
def test_a_measure_is_that_of_heads_with_their_own_copies(measure: Measure, shape: dict) -> None:
    model = other_model(**shape)
    plain = expanded(model, **shape)
    torch.testing.assert_close(model(ROWS.tokens), plain(ROWS.tokens), rtol=1e-9, atol=1e-9)
    before = model.cfg.to_dict()
    assert_same(measure(model), measure(plain))
    assert model.cfg.to_dict() == before


def test_a_path_into_one_head_leaves_its_group_as_it_is() -> None:
    """Of two heads that share keys, one reads the change: its effect is not that of the group."""
    model = other_model(n_key_value_heads=2)
    each = [path_ablation(model, ROWS, (0, 1), (2, head), ("k",), "mean", seeds.stream(0)) for head in (0, 1)]
    assert float((each[0] - each[1]).abs().max()) > 1e-3


def test_a_hook_on_shared_keys_is_refused_where_a_head_needs_its_own() -> None:
    model = other_model(n_key_value_heads=2)
    model.add_hook("blocks.1.attn.hook_k", lambda keys, hook: keys * 2, is_permanent=True)
    with pytest.raises(ComponentError, match=r"share keys and values .*hook sits on blocks\.1\.attn\.hook_k"):
        path_ablation(model, ROWS, (0, 1), (2, 0), ("k",), "mean", seeds.stream(0))
    assert not model.cfg.ungroup_grouped_query_attention
    assert_same(ALL["zero ablation"](model), ALL["zero ablation"](_doubled_keys()))


def _doubled_keys() -> HookedTransformer:
    model = other_model(n_key_value_heads=2)
    with torch.no_grad():
        for parameter in (model.blocks[1].attn._W_K, model.blocks[1].attn._b_K):
            parameter.mul_(2)
    return model


def test_no_setting_describes_such_a_model_and_the_sentence_says_which() -> None:
    with pytest.raises(ConfigError, match="the model has n_key_value_heads = 2, which no setting"):
        shape_of(other_model(n_key_value_heads=2).cfg.to_dict())


@pytest.mark.parametrize(
    "name", [name for name in analyses.REGISTRY if "planted-language" in contract.load(name).TASKS]
)
def test_an_analysis_reports_the_same_of_both(name: str, language_run: tuple) -> None:
    """A trajectory of grouped-query models, brought along by hand, in place of the study's own."""
    study = language_run[1]
    sizes = {
        "n_layers": 2, "n_ctx": study.split.test.tokens.shape[1], "d_vocab": len(study.split.labels), "attn_only": True,
        "d_mlp": None, "n_key_value_heads": 2,
    }  # fmt: skip
    model = other_model(**sizes)
    plain = expanded(model, **sizes)
    few = study.trajectory.metrics[:2]
    reports = []
    for of in (model, plain):
        one = replace(study, trajectory=replace(study.trajectory, metrics=few, load=lambda step, of=of: of))
        reports.append(analyses.run(name, one))
        page = render.to_html(one, reports[-1:])
        assert name.replace("_", " ") in page.replace("_", " ")
    for key, values in reports[0].series.items():
        np.testing.assert_allclose(values, reports[1].series[key], rtol=1e-6, atol=1e-8, err_msg=key)
    assert reports[0].facts == reports[1].facts
