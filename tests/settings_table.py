"""What changing each setting of a run does; `tests/test_settings_*.py` try it.

No changes: the setting holds others, which stand here by themselves.
"""

from typing import Any

import pytest

from tests.planted import RATES
from tests.settings_walk import Change, is_

ROTARY = {"positional_embedding_type": "rotary"}
RMSPROP = {"sampler": "rmsprop_sgld"}
REFERENCE = {"distribution": "reference", "components": ("L0H0",), "reference_layers": 1}

TABLE: dict[str, list[Change]] = {
    "ModularAdditionConfig.p": [is_("p", 11)],
    "ModularAdditionConfig.train_fraction": [is_("train_fraction", 0.6)],
    "ModularAdditionConfig.split": [is_("split", "ordered")],
    "PlantedLanguageConfig.n_ctx": [is_("n_ctx", 31)],
    "PlantedLanguageConfig.n_train": [is_("n_train", 65)],
    "PlantedLanguageConfig.n_test": [is_("n_test", 65)],
    "PlantedLanguageConfig.n_refined": [is_("n_refined", 33)],
    "PlantedLanguageConfig.n_plain": [is_("n_plain", 25)],
    "PlantedLanguageConfig.n_brackets": [is_("n_brackets", 3)],
    "PlantedLanguageConfig.n_skips": [is_("n_skips", 5)],
    "PlantedLanguageConfig.n_ngrams": [is_("n_ngrams", 11)],
    "PlantedLanguageConfig.ngram_length": [is_("ngram_length", 5)],
    "PlantedLanguageConfig.n_successors": [is_("n_successors", 5)],
    "PlantedLanguageConfig.noise": [is_("noise", 0.21)],
    "PlantedLanguageConfig.rates": [is_("rates", RATES.model_dump() | {"ngram": 0.2})],
    "PlantedLanguageConfig.distributions": [is_("distributions", {"same": RATES.model_dump()})],
    "MechanismRates.ngram": [is_("ngram", 0.2)],
    "MechanismRates.repeat": [is_("repeat", 0.2)],
    "MechanismRates.open": [is_("open", 0.1)],
    "MechanismRates.close": [is_("close", 0.1)],
    "MechanismRates.skip_open": [is_("skip_open", 0.1)],
    "MechanismRates.skip_close": [is_("skip_close", 0.1)],
    "MechanismRates.repeat_length": [is_("repeat_length", (4, 9))],
    "_LanguageSettings.n_ctx": [is_("n_ctx", 15)],
    "_LanguageSettings.n_train": [is_("n_train", 41)],
    "_LanguageSettings.n_test": [is_("n_test", 11)],
    "_LanguageSettings.test_fraction": [is_("test_fraction", 0.5)],
    "_LanguageSettings.mixture": [is_("mixture", (0.25, 0.75))],
    "_LanguageSettings.distributions_from": [is_("distributions_from", "train")],
    "_LanguageSettings.vocabulary": [is_("vocabulary", 290)],
    "_LanguageSettings.tokenizer": [Change({"tokenizer": "tokenizer.json", "vocabulary": None})],
    "_LanguageSettings.bos_token": [is_("bos_token", "<s>")],
    "TextConfig.sources": [is_("sources", ("b", "a"))],
    "HuggingFaceConfig.sources": [is_("sources", ("b", "a"))],
    "DatasetConfig.label": [is_("label", "other")],
    "DatasetConfig.path": [is_("path", "b.data")],
    "DatasetConfig.n_documents": [is_("n_documents", 19)],
    "DatasetConfig.config_name": [
        is_("config_name", "other", "refused"),
        is_("config_name", "other", "refused", path="a.jsonl"),
        is_("config_name", "other", path="a.configs", config_name="one"),
    ],
    "DatasetConfig.split": [is_("split", "other"), is_("split", "other", "refused", path="a.jsonl")],
    "DatasetConfig.column": [is_("column", "title")],
    "DatasetConfig.revision": [is_("revision", "main~1", "refused")],
    "ModelConfig.n_layers": [is_("n_layers", 2)],
    "ModelConfig.d_model": [is_("d_model", 8)],
    "ModelConfig.n_heads": [is_("n_heads", 1)],
    "ModelConfig.d_head": [is_("d_head", 4)],
    "ModelConfig.d_mlp": [is_("d_mlp", None), is_("d_mlp", 8)],
    "ModelConfig.act_fn": [is_("act_fn", "gelu"), is_("act_fn", "gelu", "refused", d_mlp=None)],
    "ModelConfig.normalization_type": [is_("normalization_type", kind) for kind in ("LN", "LNPre", "RMS", "RMSPre")],
    "ModelConfig.positional_embedding_type": [
        is_("positional_embedding_type", kind) for kind in ("rotary", "shortformer", "alibi")
    ],
    "ModelConfig.init_std": [is_("init_std", 0.5)],
    "ModelConfig.n_ctx": [is_("n_ctx", 4)],
    "ModelConfig.d_vocab": [is_("d_vocab", 9)],
    "ModelConfig.d_vocab_out": [is_("d_vocab_out", 9)],
    "ModelConfig.eps": [is_("eps", 1e-2, normalization_type="LN"), is_("eps", 1e-2, "refused")],
    "ModelConfig.final_rms": [
        is_("final_rms", True, normalization_type="LN"),
        is_("final_rms", True, "refused"),
        is_("final_rms", True, "refused", normalization_type="RMS"),
    ],
    "ModelConfig.parallel_attn_mlp": [
        is_("parallel_attn_mlp", True), is_("parallel_attn_mlp", True, "refused", d_mlp=None)
    ],
    "ModelConfig.scale_attn_by_inverse_layer_idx": [
        is_("scale_attn_by_inverse_layer_idx", True, n_layers=2),
        is_("scale_attn_by_inverse_layer_idx", True, "refused"),
    ],
    "ModelConfig.rotary_dim": [is_("rotary_dim", 4, **ROTARY), is_("rotary_dim", 4, "refused")],
    "ModelConfig.rotary_base": [is_("rotary_base", 10.0, **ROTARY), is_("rotary_base", 10.0, "refused")],
    "ModelConfig.rotary_adjacent_pairs": [
        is_("rotary_adjacent_pairs", True, **ROTARY), is_("rotary_adjacent_pairs", True, "refused")
    ],
    "TrainConfig.n_steps": [is_("n_steps", 13)],
    "TrainConfig.learning_rate": [is_("learning_rate", 4e-3)],
    "TrainConfig.weight_decay": [is_("weight_decay", 0.0)],
    "TrainConfig.betas": [is_("betas", (0.8, 0.98)), is_("betas", (0.9, 0.9))],
    "TrainConfig.batch_size": [is_("batch_size", 8), is_("batch_size", 35)],
    "TrainConfig.max_grad_norm": [is_("max_grad_norm", 1e-3)],
    "TrainConfig.n_checkpoints": [is_("n_checkpoints", 4), is_("n_checkpoints", 14, "refused")],
    "TrainConfig.checkpoints": [Change({"checkpoints": (0, 5, 12), "n_checkpoints": None})],
    "TrainConfig.n_threads": [is_("n_threads", 2, "rounding")],
    "TrainConfig.device": [is_("device", "cuda", "refused")],
    "ImportedConfig.source": [],  # which of the two kinds [train] is
    "ImportedConfig.checkpoints": [is_("checkpoints", (0, 40))],
    "LLCConfig.nbeta": [is_("nbeta", 11.0)],
    "LLCConfig.step_size": [is_("step_size", 2e-3)],
    "LLCConfig.localization": [is_("localization", 100.0)],
    "LLCConfig.n_chains": [is_("n_chains", 3)],
    "LLCConfig.n_draws": [is_("n_draws", 9)],
    "LLCConfig.n_burnin": [is_("n_burnin", 2)],
    "LLCConfig.batch_size": [is_("batch_size", None), is_("batch_size", 35), is_("batch_size", 36, "refused")],
    "LLCConfig.sampler": [
        is_("sampler", "rmsprop_sgld"), is_("sampler", "baoab"), is_("sampler", "sgnht", "refused"),
        Change({"sampler": "sgnht", "momentum": 0.5}, of={"sampler": "baoab", "momentum": 0.5}),
        is_("sampler", "mala", batch_size=None), is_("sampler", "mala", "refused"),
    ],
    "LLCConfig.momentum": [
        is_("momentum", 0.6, sampler="baoab"), is_("momentum", 0.6, sampler="sgnht", momentum=0.5),
        is_("momentum", 0.6, "refused"), is_("momentum", 0.6, "refused", sampler="rmsprop_sgld"),
        is_("momentum", 0.6, "refused", sampler="mala", batch_size=None),
    ],
    "LLCConfig.rmsprop_decay": [is_("rmsprop_decay", 0.9, **RMSPROP), is_("rmsprop_decay", 0.9, "refused")],
    "LLCConfig.rmsprop_stability": [is_("rmsprop_stability", 0.2, **RMSPROP), is_("rmsprop_stability", 0.2, "refused")],
    "LLCConfig.canonicalize": [is_("canonicalize", True)],
    "LLCConfig.engine": [is_("engine", "devinterp"), is_("engine", "devinterp", "refused", sampler="baoab")],
    "LLCConfig.precision": [is_("precision", "float64"), is_("precision", "int16", "refused", engine="devinterp"),
                            is_("precision", "bfloat16", "refused", engine="devinterp")],
    "LLCConfig.device": [is_("device", "cuda", "refused")],
    "LLCConfig.path": [is_("path", "compiled"), is_("path", "module"),
                       is_("path", "torch", "refused", engine="devinterp")],
    "LLCConfig.memory_gb": [is_("memory_gb", 1e-6, "rounding")],
    "RefinementConfig.distribution": [is_("distribution", "repeat-heavy")],
    "RefinementConfig.components": [is_("components", ("L0H1",))],
    "RefinementConfig.every": [is_("every", 2), is_("every", 4, "refused")],
    "RefinementConfig.reference_layers": [
        is_("reference_layers", 2, **REFERENCE), is_("reference_layers", 1, "refused")
    ],
    "CurveConfig.components": [is_("components", ("model", "L0.attn"))],
    "CurveConfig.control_localization": [is_("control_localization", 300.0)],
    "CurveConfig.n_threads": [
        is_("n_threads", 2, "rounding", components=("model",), head_sampling=None, refinements=())
    ],
    "CurveConfig.n_examples": [is_("n_examples", 20), is_("n_examples", 65, "refused")],
    "CurveConfig.checks_every": [is_("checks_every", 3), is_("checks_every", 4, "refused")],
    "CurveConfig.sampling": [],  # walked as LLCConfig
    "CurveConfig.head_sampling": [
        is_("head_sampling", None), is_("components", ("model",), "refused", refinements=()),
    ],
    "CurveConfig.refinements": [is_("refinements", ())],
    "StageConfig.plateau": [is_("plateau", 0.3)],
    "StageConfig.credible": [is_("credible", 0.8)],
    "StageConfig.min_evidence": [is_("min_evidence", 1e6)],
    "StageConfig.n_posterior": [is_("n_posterior", 50)],
    "AnalysesConfig.names": [is_("names", ("grokking",))],
    "AnalysesConfig.n_null": [is_("n_null", 11)],
    "RunConfig.name": [is_("name", "other")],
    "RunConfig.seed": [is_("seed", 1)],
    **{f"RunConfig.{key}": [] for key in ("task", "model", "train", "llc", "stages", "analyses")},  # walked above
}  # fmt: skip


def of(name: str) -> list[Any]:
    """The changes of all settings of a class."""
    return [
        pytest.param(change, id=f"{key}-{number}")
        for key, changes in TABLE.items()
        for number, change in enumerate(changes)
        if key.split(".")[0] == name
    ]
