"""Floors of the planted language: what a target costs who knows the tables and what has begun."""

import numpy as np
import pytest

from mechgrok.task_config import MechanismRates
from mechgrok.tasks import planted_language
from mechgrok.tasks.planted_language import KINDS, Language, Rows, make_language, sample_rows
from tests.planted import RATES, language_config


def drawn(n: int = 3000, length: int = 24) -> Rows:
    language = make_language(language_config(), 0)
    return sample_rows(language, RATES, n, length, np.random.default_rng(0), with_floors=True)


def test_tokens_come_as_often_as_the_floors_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a token is drawn, the probabilities of all tokens sum to 1, and each comes so often in all."""
    original, n_tokens = planted_language._probability, make_language(language_config(), 0).n_tokens
    expected, variance, seen, by_chain = (np.zeros(n_tokens) for _ in range(4))

    def watched(language: Language, rates: MechanismRates, before, token, possible, to_close) -> np.ndarray:
        free = possible["ngram"]
        each = np.stack(
            [
                original(language, rates, before, np.full_like(token, other), possible, to_close)
                for other in range(n_tokens)
            ]
        )[:, free]
        np.testing.assert_allclose(each.sum(0), 1.0, atol=1e-12)
        expected[:] += each.sum(1)
        variance[:] += (each * (1 - each)).sum(1)
        seen[:] += np.bincount(token[free], minlength=n_tokens)
        by_chain[:] += language.chain[before[free, -1]].sum(0)
        return original(language, rates, before, token, possible, to_close)

    monkeypatch.setattr(planted_language, "_probability", watched)
    rows = drawn()
    assert seen.sum() == (rows.floors > 0).sum() > 10_000
    comes = variance > 0
    assert (seen[~comes] == 0).all() and comes.sum() == n_tokens - 1  # all but BOS
    away = np.abs(seen - expected)[comes] / np.sqrt(variance[comes])
    assert away.max() < 4.5
    assert (np.abs(seen - by_chain)[comes] / np.sqrt(variance[comes])).max() > 20  # the control: the chain alone


def test_what_has_begun_costs_nothing_and_all_else_something() -> None:
    rows = drawn()
    certain = np.isin(rows.kinds, [KINDS.index(kind) for kind in ("ngram", "repeat", "skip")])
    assert (rows.floors[certain] == 0).all()
    chosen = np.isin(rows.kinds, [KINDS.index(kind) for kind in ("bigram", "close")])
    assert (rows.floors[chosen] > 0).all()
