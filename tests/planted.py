"""Small settings of the planted language, and an invented stage, for the tests of what reads them."""

from collections.abc import Sequence
from typing import Any

from mechgrok.config import RunConfig
from mechgrok.task_config import MechanismRates, PlantedLanguageConfig
from mechgrok.types import Claim, Stage

RATES = MechanismRates(
    ngram=0.10, repeat=0.12, open=0.05, close=0.06, skip_open=0.04, skip_close=0.05, repeat_length=(4, 8)
)
A_STAGE = Stage("S1", "rising", 1.0, 100.0, None, None, 1.0, None)


def language_config(**changes: Any) -> PlantedLanguageConfig:
    settings: dict[str, Any] = {
        "name": "planted-language", "n_ctx": 32, "n_train": 64, "n_test": 64, "n_refined": 32, "n_plain": 24,
        "n_brackets": 2, "n_skips": 4, "n_ngrams": 10, "ngram_length": 4, "n_successors": 4, "noise": 0.2,
        "rates": RATES, "distributions": {},
    }  # fmt: skip
    return PlantedLanguageConfig(**(settings | changes))


def language_run_config(**changes: dict[str, Any]) -> RunConfig:
    """The whole path on the planted language in a few seconds, refinements and all. Sections are updated key by key."""
    heavy = {"ngram-heavy": RATES.model_copy(update={"ngram": 0.4, "repeat": 0.0}),
             "repeat-heavy": RATES.model_copy(update={"ngram": 0.0, "repeat": 0.5})}  # fmt: skip
    sections: dict[str, Any] = {
        "task": language_config(distributions=heavy),
        "model": {
            "n_layers": 2, "d_model": 16, "n_heads": 4, "d_head": 4, "normalization_type": "LN",
            "positional_embedding_type": "shortformer", "init_std": 0.1,
        },
        "train": {
            "n_steps": 40, "learning_rate": 1e-2, "weight_decay": 0.05, "betas": (0.9, 0.98), "batch_size": 8,
            "n_checkpoints": 8, "n_threads": 1,
        },
        "llc": {
            "components": ("model", "heads"), "control_localization": 400.0, "n_threads": 1, "n_examples": 32,
            "checks_every": 2,
            "sampling": {
                "nbeta": 30.0, "step_size": 1e-3, "localization": 200.0, "n_chains": 2, "n_draws": 8, "n_burnin": 2,
                "batch_size": 4, "canonicalize": True,
            },
            "head_sampling": {
                "nbeta": 30.0, "step_size": 2e-3, "localization": 100.0, "n_chains": 2, "n_draws": 8, "n_burnin": 4,
                "batch_size": 4, "canonicalize": True,
            },
            "refinements": (
                {"distribution": "ngram-heavy", "components": ("heads",), "every": 2},
                {"distribution": "repeat-heavy", "components": ("heads",), "every": 2},
                {"distribution": "reference", "components": ("heads",), "every": 4, "reference_layers": 1},
            ),
        },
        "stages": {"n_posterior": 50},
        "analyses": {"names": ("mechanisms", "head_types"), "n_null": 10},
    }  # fmt: skip
    for name, values in changes.items():
        sections[name] |= values
    return RunConfig.model_validate({"name": "tiny-language", "seed": 0, **sections})


def assert_only_the_end_is_judged(without: Sequence[Claim], claims: Sequence[Claim]) -> None:
    """Claims made without any stage beside the same ones with stages: those on the end of the run stay as they are."""
    assert [claim.text for claim in without] == [claim.text for claim in claims]
    assert {claim.stage for claim in without} <= {"none", "run"}
    for bare, claim in zip(without, claims, strict=True):
        if bare.stage == "run":
            assert repr((bare.value, bare.holds, bare.chance)) == repr((claim.value, claim.holds, claim.chance))
        else:
            assert repr(bare.value) == "nan" and not bare.holds
