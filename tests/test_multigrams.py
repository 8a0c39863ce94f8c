"""The multigrams that heads memorize: on invented sequences, on hand-built heads, and against what was planted."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from analyses import multigrams as analysis
from mechgrok import seeds
from mechgrok.measures.head_types import MIN_MULTIGRAMS, typed_heads
from mechgrok.measures.multigrams import Multigram, associated, memorized, memorized_on, places, score
from mechgrok.model import at_once
from mechgrok.tasks import planted_language
from mechgrok.tasks.next_token import next_token_examples
from mechgrok.types import Examples, LLCCurve, Split, Stage
from tests.hand_built import TableHead, table_model
from tests.planted import A_STAGE, language_config


def flat(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    table = np.array(rows)
    return table[:, 0], table[:, 1], table[:, 2]


def test_a_context_that_decides_the_target_is_associated_and_a_bigram_is_not() -> None:
    # After token 1 comes 2 or 3, half and half; after 7 1 always 2. After token 4 always 5, whatever the source.
    rng = np.random.default_rng(0)
    rows = [[int(rng.integers(10, 20)), 1, int(rng.integers(2, 4))] for _ in range(400)] + [[7, 1, 2]] * 30
    rows += [[int(rng.integers(10, 20)), 4, 5] for _ in range(400)]
    rows += [[8, 9, 3]] * 30  # with no other source before 9, it may be the bigram
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
    monkeypatch.setattr(measure, "_attention", lambda *_: iter([np.stack([pattern] * len(knows))]))
    monkeypatch.setattr(measure, "check_causal", lambda *_: None)
    monkeypatch.setattr(measure, "_n_visible", lambda *_: np.tile(np.arange(length) + 1, (n, 1)))
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


# ---- hand-built heads

N_TOKENS, LENGTH, N_ROWS = 23, 20, 250
SECOND, CLOSER = 1, 2  # what comes after the source: of an n-gram directly, of a skip n-gram with a gap
ANSWERS, FILLERS = range(13, 18), range(18, 23)
NGRAMS = tuple(Multigram(3 + i, SECOND, ANSWERS[i], True) for i in range(MIN_MULTIGRAMS))
SKIPS = tuple(Multigram(8 + i, CLOSER, ANSWERS[-1 - i], False) for i in range(MIN_MULTIGRAMS))
GAIN = 12.0
ADDED = float(np.log(N_TOKENS) - np.log1p((N_TOKENS - 1) * np.exp(-GAIN)))  # by zeroing the head that knows


def table_rows(own: int = 5, one_answer: bool = False, hint: bool = False) -> Split:
    """BOS and fillers, with one n-gram, twice in every other row, and one skip n-gram with a gap of one to three.

    own: of five times, how often the source gets its own answer and not any of the others. one_answer: all sources
    have the same. hint: before the n-gram comes a filler that tells which it is.
    """
    rng = np.random.default_rng(0)

    def some(least: int, most: int) -> list[int]:
        return rng.choice(FILLERS, rng.integers(least, most + 1)).tolist()

    def answer(known: Multigram, turn: int) -> int:
        if one_answer:
            return ANSWERS[0]
        others = [token for token in ANSWERS if token != known.target]
        return known.target if turn % 5 < own else int(rng.choice(others))

    rows = []
    for row in range(N_ROWS):
        ngram, skip = NGRAMS[row % 5], SKIPS[(row + row // 5) % 5]
        said = [ngram.source, SECOND, answer(ngram, row // 5)]
        made = [0, *some(0, 1), *([FILLERS[row % 5]] if hint else []), *said, *some(1, 2)]
        made += [skip.source, *some(1, 3), CLOSER, answer(skip, row // 25), *some(1, 2), *(said if row % 2 else [])]
        rows.append(made + some(LENGTH - len(made), LENGTH - len(made)))
    examples = next_token_examples(torch.tensor(rows))
    examples.weights[:, :2] = 0.0  # no place of either
    return Split(examples, examples, tuple(f"w{token}" for token in range(N_TOKENS)), N_TOKENS, bos=0)


TABLE = table_rows()


def knowing_head(known: tuple[Multigram, ...], gain: float = GAIN, sink: float = 150.0, back: int = 1) -> TableHead:
    """A source raises its target where the token looks at it, in an n-gram only `back` positions before.

    Without a source the token looks at BOS, which writes nothing. sink: the score of BOS; a source has 200.
    """
    looks, writes, where = (torch.zeros(n, n) for n in (N_TOKENS, N_TOKENS, LENGTH))
    looks[:, 0] = sink
    for one in known:
        looks[one.token, one.source] = 100.0 if one.contiguous else 200.0
        writes[one.source, one.target] = gain
    if known[0].contiguous:
        where += 100 * torch.diag(torch.ones(LENGTH - back), -back)
    return TableHead(looks, writes, where)


IDLE = TableHead(torch.zeros(N_TOKENS, N_TOKENS), torch.zeros(N_TOKENS, N_TOKENS))


def what_is_found(split: Split, *heads: TableHead) -> list[tuple[Multigram, ...]]:
    return [memory.multigrams for memory in memorized_on(table_model(split, heads), split)]


def test_hand_built_heads_have_memorized_what_they_know_and_an_idle_one_nothing() -> None:
    found = what_is_found(TABLE, knowing_head(NGRAMS), knowing_head(SKIPS), IDLE)
    assert found == [NGRAMS, SKIPS, ()]
    # Not what the data hold, but what each head does of it.
    assert what_is_found(TABLE, knowing_head(SKIPS[1:]), knowing_head(NGRAMS[:2])) == [SKIPS[1:], NGRAMS[:2]]


def test_what_is_found_does_not_depend_on_how_many_rows_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechgrok.model.EVALUATED", 2**16)
    model = table_model(TABLE, [knowing_head(NGRAMS), knowing_head(SKIPS)])
    assert 1 < at_once(model, TABLE.test) < N_ROWS / 2
    assert [memory.multigrams for memory in memorized_on(model, TABLE)] == [NGRAMS, SKIPS]


def test_the_harm_of_a_head_is_counted_at_its_multigrams_and_at_repeats() -> None:
    """One n-gram and one skip n-gram a row, and the n-gram once more in every other row: then it repeats."""
    model = table_model(TABLE, [knowing_head(NGRAMS), knowing_head(SKIPS), IDLE])
    found = memorized(model, TABLE.test, TABLE.labels, TABLE.bos, "zero", seeds.stream(0))
    assert [memory.at_multigrams for memory in found] == pytest.approx([ADDED, ADDED, 0.0], abs=1e-4)
    assert [memory.at_repeats for memory in found] == pytest.approx([ADDED / 2, 0.0, 0.0], abs=1e-4)


def test_hand_built_heads_with_enough_multigrams_are_multigram_heads() -> None:
    found = typed_heads(table_model(TABLE, [knowing_head(NGRAMS), knowing_head(SKIPS), IDLE]), TABLE)
    assert [of.type for of in found] == ["multigram", "multigram", "dead"]
    assert [of.scores["multigrams"] for of in found] == [MIN_MULTIGRAMS, MIN_MULTIGRAMS, 0]
    # One that looks at the token before whatever it is knows as much, and is a previous-token head.
    (nearby,) = typed_heads(table_model(TABLE, [knowing_head(NGRAMS, sink=50.0)]), TABLE)
    assert (nearby.type, nearby.scores["multigrams"]) == ("previous-token", MIN_MULTIGRAMS)
    fewer = typed_heads(table_model(TABLE, [knowing_head(NGRAMS[1:]), knowing_head(SKIPS[1:])]), TABLE)
    assert [(of.type, of.scores["multigrams"]) for of in fewer] == [("first-token", MIN_MULTIGRAMS - 1)] * 2


@pytest.mark.parametrize("own", [1, 2])
def test_answers_that_the_data_do_not_tie_to_the_source_are_not_memorized(own: int) -> None:
    """At one in five, a source has no answer of its own; at two, it has, but mostly gets another."""
    assert what_is_found(table_rows(own), knowing_head(NGRAMS), knowing_head(SKIPS)) == [(), ()]


def test_a_bigram_that_a_head_reads_off_the_source_is_no_multigram() -> None:
    rows = table_rows(one_answer=True)
    heads = [knowing_head(tuple(replace(one, target=ANSWERS[0]) for one in known)) for known in (NGRAMS, SKIPS)]
    assert what_is_found(rows, *heads) == [(), ()]
    # From the closer the start token answers, all other tokens look at themselves.
    looks, writes = 100 * torch.eye(N_TOKENS), torch.zeros(N_TOKENS, N_TOKENS)
    looks[CLOSER, 0], writes[0, ANSWERS[0]] = 200.0, GAIN
    assert what_is_found(rows, TableHead(looks, writes)) == [()]


@pytest.mark.parametrize(
    "changes", [{"gain": 1.5}, {"sink": 205.0, "gain": GAIN * (1 + np.exp(5))}], ids=["unsure", "looks at BOS"]
)
def test_heads_that_are_not_sure_or_hardly_look_have_memorized_nothing(changes: dict[str, float]) -> None:
    """The unsure ones take the loss from 3.1 to 1.8 nats; the others read faintly and write loudly."""
    heads = [knowing_head(NGRAMS, **changes), knowing_head(SKIPS, **changes)]
    assert what_is_found(TABLE, *heads) == [(), ()]


def test_twins_of_which_each_suffices_have_memorized_what_another_rows_value_spoils() -> None:
    """Zeroing one costs nothing, as the other stays; what it writes in another row is often another answer."""
    twins = [knowing_head(NGRAMS), knowing_head(NGRAMS)]
    by_zero = memorized(table_model(TABLE, twins), TABLE.test, TABLE.labels, TABLE.bos, "zero", seeds.stream(0))
    assert [memory.multigrams for memory in by_zero] == [(), ()]
    assert what_is_found(TABLE, *twins) == [NGRAMS, NGRAMS]


def test_one_place_in_six_that_suffers_is_too_few() -> None:
    """Another head knows the n-grams as well, but not of a source in second place."""
    early = TABLE.test.tokens[:, 2] == SECOND
    other = knowing_head(NGRAMS)
    assert other.where is not None
    other.where[2] = 0.0
    model = table_model(TABLE, [knowing_head(NGRAMS), other])
    for n_early, expected in ((1, ()), (6, NGRAMS)):
        rows: list[int] = []
        for one in NGRAMS:
            mine = (TABLE.test.tokens[:, 1:3] == one.source).any(1)
            rows += (mine & early).nonzero().flatten()[:n_early].tolist()
            rows += (mine & ~early).nonzero().flatten()[: 6 - n_early].tolist()
        chosen = Examples(TABLE.test.tokens[rows], TABLE.test.targets[rows], TABLE.test.weights[rows])
        found = memorized(model, chosen, TABLE.labels, TABLE.bos, "zero", seeds.stream(0))
        assert [memory.multigrams for memory in found] == [expected, ()]


def test_a_head_that_reads_an_ngram_off_a_token_before_it_has_not_memorized_it() -> None:
    """Nor is that a skip n-gram, as the n-gram explains the place."""
    rows = table_rows(hint=True)
    hints = tuple(replace(one, source=FILLERS[i]) for i, one in enumerate(NGRAMS))
    assert what_is_found(rows, knowing_head(hints, back=2)) == [()]
    assert what_is_found(rows, knowing_head(NGRAMS)) == [NGRAMS]


def conclude(counts: np.ndarray, llcs: np.ndarray, n_typed: int = 8) -> dict[str, float]:
    heads = [f"L{layer}H{head}" for layer in range(2) for head in range(4)]
    curve = LLCCurve(np.array([1, 100]), ("model", *heads), np.vstack([[1.0, 2.0], np.column_stack([llcs, llcs])]),
                     np.full((9, 2), 0.1))  # fmt: skip
    series = {
        "step": np.array([1, 100]), "ngrams": np.array([0 * counts, counts]), "skip_ngrams": np.zeros((2, 8)),
        "found": np.array([0.0, 5.0]), "precision": np.array([np.nan, 0.9]), "recall": np.array([0.0, 0.7]),
    }  # fmt: skip
    facts = {"heads": heads, "multigram heads": heads[:n_typed]}
    derived = analysis.derive(series, curve, facts, np.random.default_rng(0))
    stages: list[Stage] = [A_STAGE]
    return {claim.text[:20]: claim.value for claim in analysis.conclude(series | derived, stages, curve)}


def test_the_claims_read_what_they_say() -> None:
    counts = np.arange(8)
    agreeing, opposed = conclude(counts, counts * 1.0), conclude(counts, 8.0 - counts)
    assert agreeing["planted multigrams a"] == 0.7 and agreeing["what is found at the"] == 0.9
    assert agreeing["heads that memorized"] < 0.01 < 0.9 < opposed["heads that memorized"]
    assert np.isnan(conclude(np.zeros(8), counts * 1.0)["heads that memorized"])
    assert agreeing["beside it: multigram"] == agreeing["heads that memorized"]
    other = 8.0 + np.array([0, 1, 2, 3, 4, 5, -7, -6])  # two heads of another type have the smallest LLC
    found = conclude(counts, other, n_typed=6)
    assert found["beside it: multigram"] < 0.01 < 0.3 < found["heads that memorized"]
    assert np.isnan(conclude(counts, other, n_typed=4)["beside it: multigram"])  # too few


def test_examples_stay_as_they_are(planted: SimpleNamespace) -> None:
    before = planted.split.test.tokens.clone()
    places(planted.split.test, planted.split.labels)
    assert torch.equal(before, planted.split.test.tokens) and isinstance(planted.split.test, Examples)
