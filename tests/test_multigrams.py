"""The multigrams that heads memorize: on invented sequences, on hand-built heads, and against what was planted."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from analyses import multigrams as analysis
from mechgrok import seeds
from mechgrok.measures.multigrams import Multigram, associated, memorized, places, score
from mechgrok.tasks import planted_language
from mechgrok.tasks.next_token import next_token_examples
from mechgrok.types import Examples, LLCCurve, Split, Stage
from tests.planted import A_STAGE, language_config


def flat(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    table = np.array(rows)
    return table[:, 0], table[:, 1], table[:, 2]


def test_a_context_that_decides_the_target_is_associated_and_a_bigram_is_not() -> None:
    # After token 1 comes 2 or 3, half and half; after 7 1 always 2. After token 4 always 5, whatever the source.
    rng = np.random.default_rng(0)
    rows = [[int(rng.integers(10, 20)), 1, int(rng.integers(2, 4))] for _ in range(400)] + [[7, 1, 2]] * 30
    rows += [[int(rng.integers(10, 20)), 4, 5] for _ in range(400)]
    found = associated(*flat(rows), contiguous=True)
    assert list(found) == [Multigram(7, 1, 2, True)]
    assert found[Multigram(7, 1, 2, True)].tolist() == list(range(400, 430))


def test_chance_gives_no_association_more_often_than_the_level() -> None:
    found = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        found += len(associated(rng.integers(0, 8, 2000), rng.integers(0, 8, 2000), rng.integers(0, 3, 2000), True))
    assert found <= 18  # 10 expected at the level; more than 18 has probability .7 %


def test_targets_that_induction_or_brackets_give_are_left_out() -> None:
    tokens = torch.tensor([[0, 5, 6, 7, 5, 6, 2]])
    labels = ["BOS", "(", ")", "a", "b", "c", "d", "e"]
    seen = places(next_token_examples(tokens), labels)
    # 5 -> 6 the second time repeats; 6 -> ")" closes; the last position is not scored.
    assert list(zip(seen.pos.tolist(), seen.target.tolist(), strict=True)) == [(0, 5), (1, 6), (2, 7), (3, 5)]
    assert seen.previous.tolist() == [-1, 0, 5, 6]


@pytest.fixture(scope="module")
def planted() -> SimpleNamespace:
    config = language_config(n_train=8, n_test=256)
    split = planted_language.make_split(config, seed=0)
    return SimpleNamespace(split=split, language=split.language)


def run_memorized(
    monkeypatch: pytest.MonkeyPatch, split: Split, knows: list[set[int]], looks: bool = True, known: bool = True
) -> list[tuple[Multigram, ...]]:
    """`memorized` of heads that look where they must, and whose ablation costs 3 nats on the multigrams they know."""
    from mechgrok.measures import multigrams as measure

    tokens, targets = split.test.tokens.numpy(), split.test.targets.numpy()
    n, length = tokens.shape
    which = np.full((n, length), -1)
    source = np.zeros((n, length), int)
    for row in range(n):
        for at in range(2, length - 1):
            for back in range(1, at):
                index = split.language.multigram(
                    int(tokens[row, at - back]), int(tokens[row, at]), int(targets[row, at]), contiguous=back == 1
                )
                if index is not None:
                    which[row, at], source[row, at] = index, at - back
                    break
    added = torch.zeros(len(knows), n, length, dtype=torch.float64)
    pattern = np.full((n, length, length), 1.0 / length)
    for row, at in zip(*np.nonzero(which >= 0), strict=True):
        pattern[row, at] = 0.0
        pattern[row, at, source[row, at] if looks else 0] = 1.0
        for head, mine in enumerate(knows):
            added[head, row, at] = 3.0 * (which[row, at] in mine)
    loss = torch.full((n, length), 0.05 if known else 2.0, dtype=torch.float64)
    monkeypatch.setattr(measure, "position_losses", lambda *_: loss)
    monkeypatch.setattr(measure, "position_ablations", lambda *_: added)
    monkeypatch.setattr(measure, "_attention", lambda *_: [pattern] * len(knows))
    found = memorized(None, split.test, split.labels, split.bos, "mean", seeds.stream(0, "x"))  # type: ignore[arg-type]
    for memory in found:
        assert (memory.at_multigrams > 0) == bool(memory.multigrams)
    return [memory.multigrams for memory in found]


def test_each_head_gets_what_it_knows_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, planted: SimpleNamespace
) -> None:
    n_ngrams, n_all = len(planted.language.ngrams), planted.language.n_multigrams
    knows = [set(range(n_ngrams // 2)), set(range(n_ngrams, n_all)), set()]
    found = run_memorized(monkeypatch, planted.split, knows)
    for mine, right in zip(found, knows, strict=True):
        indices = {planted.language.multigram(m.source, m.token, m.target, m.contiguous) for m in mine}
        assert indices <= right
        assert len(indices) >= 0.8 * len(right)
    every = [one for mine in found for one in mine]
    assert score(every, planted.language).precision == 1.0


@pytest.mark.parametrize(("looks", "known"), [(False, True), (True, False)])
def test_a_head_that_looks_elsewhere_or_a_model_that_does_not_know_has_memorized_nothing(
    monkeypatch: pytest.MonkeyPatch, planted: SimpleNamespace, looks: bool, known: bool
) -> None:
    knows = [set(range(planted.language.n_multigrams))]
    (found,) = run_memorized(monkeypatch, planted.split, knows, looks, known)
    # A skip n-gram's source is read off the attention, so one that looks at BOS has none to name.
    assert not found


def test_the_score_counts_planted_ones_once_and_another_language_scores_nothing(planted: SimpleNamespace) -> None:
    ngrams = planted.language.ngrams
    right = [Multigram(int(g[0]), int(g[1]), int(g[2]), True) for g in ngrams[:4]]
    twice = [*right, Multigram(int(ngrams[0][1]), int(ngrams[0][2]), int(ngrams[0][3]), True)]
    assert score(right, planted.language).recall == score(twice, planted.language).recall
    assert score(right, planted.language).recall == 4 / planted.language.n_multigrams
    assert score([*right, Multigram(0, 0, 0, True)], planted.language).precision == 4 / 5
    other = planted_language.make_language(language_config(), seed=1)
    assert score(right, other).precision == 0.0
    assert np.isnan(score([], planted.language).precision)


def conclude(counts: np.ndarray, llcs: np.ndarray) -> dict[str, float]:
    heads = [f"L{layer}H{head}" for layer in range(2) for head in range(4)]
    curve = LLCCurve(np.array([1, 100]), ("model", *heads), np.vstack([[1.0, 2.0], np.column_stack([llcs, llcs])]),
                     np.full((9, 2), 0.1))  # fmt: skip
    series = {
        "step": np.array([1, 100]), "ngrams": np.array([0 * counts, counts]), "skip_ngrams": np.zeros((2, 8)),
        "found": np.array([0.0, 5.0]), "precision": np.array([np.nan, 0.9]), "recall": np.array([0.0, 0.7]),
    }  # fmt: skip
    derived = analysis.derive(series, curve, {"heads": heads}, np.random.default_rng(0))
    stages: list[Stage] = [A_STAGE]
    return {claim.text[:20]: claim.value for claim in analysis.conclude(series | derived, stages, curve)}


def test_the_claims_read_what_they_say() -> None:
    counts = np.arange(8)
    agreeing, opposed = conclude(counts, counts * 1.0), conclude(counts, -counts * 1.0)
    assert agreeing["planted multigrams a"] == 0.7 and agreeing["what is found at the"] == 0.9
    assert agreeing["heads that memorized"] < 0.01 < 0.9 < opposed["heads that memorized"]
    assert np.isnan(conclude(np.zeros(8), counts * 1.0)["heads that memorized"])


def test_examples_stay_as_they_are(planted: SimpleNamespace) -> None:
    before = planted.split.test.tokens.clone()
    places(planted.split.test, planted.split.labels)
    assert torch.equal(before, planted.split.test.tokens) and isinstance(planted.split.test, Examples)
