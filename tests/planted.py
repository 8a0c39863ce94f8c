"""Small settings of the planted language, and an invented stage, for the tests of what reads them."""

from typing import Any

from mechgrok.task_config import MechanismRates, PlantedLanguageConfig
from mechgrok.types import Stage

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
