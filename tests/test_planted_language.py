"""The planted language read back by a slow reader that knows its grammar and none of its code."""

from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import chisquare

from mechgrok.measures.in_context import bigram_table
from mechgrok.task_config import MechanismRates, PlantedLanguageConfig
from mechgrok.tasks import make_split
from mechgrok.tasks.planted_language import KINDS, Language, make_language, sample_rows
from mechgrok.types import Split
from tests.planted import RATES, language_config

RATE_NAMES = ("ngram", "repeat", "open", "close", "skip_open", "skip_close")
NOTHING = dict.fromkeys(RATE_NAMES, 0.0)
HEAVY = {
    "ngram-heavy": RATES.model_copy(update=NOTHING | {"ngram": 0.4}),
    "repeat-heavy": RATES.model_copy(update=NOTHING | {"repeat": 0.4}),
    "bracket-heavy": RATES.model_copy(update=NOTHING | {"open": 0.2, "close": 0.2}),
}


@cache
def split() -> Split:
    return make_split(language_config(n_train=256, n_test=1024, n_refined=512, distributions=HEAVY), seed=0)


@cache
def rows() -> tuple[list[list[int]], list[list[str]]]:
    """Tokens of the test rows, and the kind of each token: that of the target before it."""
    names = [[KINDS[kind] for kind in row] for row in split().kinds.tolist()]
    return split().test.tokens.tolist(), [["start", *row[:-1]] for row in names]


class Reader:
    """What may stand at each place of a row, worked out from the tokens before it."""

    def __init__(self, language: Language):
        self.plain = set(language.plain.tolist())
        self.closer_of = dict(zip(language.openers.tolist(), language.closers.tolist(), strict=True))
        self.gives = dict(zip(language.skips.tolist(), language.skip_targets.tolist(), strict=True))
        self.e = language.skip_closer
        self.ngrams = [tuple(ngram) for ngram in language.ngrams.tolist()]

    def open_brackets(self, row: list[int]) -> list[int]:
        """The closers that are still owed, the last first; fails on a closer that is not owed."""
        owed: list[int] = []
        for token in row:
            if token in self.closer_of:
                owed.insert(0, self.closer_of[token])
            elif token in self.closer_of.values():
                assert owed and owed.pop(0) == token, row
        return owed

    def continues_ngram(self, row: list[int], at: int) -> bool:
        """Whether an n-gram's tokens up to its third or a later one end at this place."""
        ends = (ngram[:n] for ngram in self.ngrams for n in range(3, len(ngram) + 1))
        return any(tuple(row[max(at + 1 - len(end), 0) : at + 1]) == end for end in ends)

    def continues_copy(self, row: list[int], at: int) -> bool:
        """Whether this token and the two before it, all plain, stood together earlier in the row."""
        three = row[at - 2 : at + 1]
        return set(three) <= self.plain and any(row[i : i + 3] == three for i in range(1, at - 2))


def test_every_row_begins_with_bos_and_has_no_other() -> None:
    for examples in (split().train, split().test, *split().distributions.values()):
        assert (examples.tokens[:, 0] == split().bos).all()
        assert (examples.tokens[:, 1:] != split().bos).all()


def test_brackets_match_and_never_close_what_is_not_open() -> None:
    reader, closed = Reader(split().language), 0
    for row, kinds in zip(*rows(), strict=True):
        reader.open_brackets(row)
        for at in range(1, len(row)):
            owed = reader.open_brackets(row[:at])
            assert len(owed) <= 4
            assert (kinds[at] == "close") == (row[at] in reader.closer_of.values())
            if kinds[at] == "close":
                assert row[at] == owed[0]
                closed += 1
    assert closed > 300


def test_the_reader_finds_a_bracket_that_does_not_match() -> None:
    language = split().language
    (first, second), (_, other) = language.openers.tolist(), language.closers.tolist()
    reader = Reader(language)
    for wrong in ([0, other], [0, first, other], [0, first, second, language.closers[0]]):
        with pytest.raises(AssertionError):
            reader.open_brackets(wrong)


def test_after_the_skip_closer_comes_what_the_last_skip_opener_gives() -> None:
    reader, seen = Reader(split().language), Counter[int]()
    for row, kinds in zip(*rows(), strict=True):
        for at in range(1, len(row)):
            assert (kinds[at] == "skip") == (row[at - 1] == reader.e)
            if kinds[at] == "skip":
                last = [token for token in row[: at - 1] if token in reader.gives][-1]
                assert row[at] == reader.gives[last]
                seen[last] += 1
    assert set(seen) == set(reader.gives)
    assert len(set(reader.gives.values())) == len(reader.gives)


def test_every_ngram_target_continues_a_planted_ngram_and_most_others_do_not() -> None:
    reader, right, by_chance = Reader(split().language), 0, []
    for row, kinds in zip(*rows(), strict=True):
        for at in range(1, len(row)):
            if kinds[at] == "ngram":
                assert reader.continues_ngram(row, at)
                right += 1
            elif kinds[at] == "bigram":
                by_chance.append(reader.continues_ngram(row, at))
    assert right > 2000
    assert np.mean(by_chance) < 0.05


def test_every_repeat_target_continues_a_copy_of_what_stood_earlier_and_most_others_do_not() -> None:
    reader, right, by_chance = Reader(split().language), 0, []
    for row, kinds in zip(*rows(), strict=True):
        for at in range(1, len(row)):
            if kinds[at] == "repeat":
                assert reader.continues_copy(row, at)
                right += 1
            elif kinds[at] == "bigram":
                by_chance.append(reader.continues_copy(row, at))
    assert right > 1000
    assert np.mean(by_chance) < 0.05


def test_copies_end_before_a_token_that_is_not_plain_and_are_as_long_as_told() -> None:
    """Where only segments are copied and brackets opened, each run of a copy is read off its kinds."""
    rates = RATES.model_copy(update=NOTHING | {"repeat": 0.3, "open": 0.3, "repeat_length": (5, 7)})
    language = make_language(language_config(), seed=0)
    tokens, kinds, _ = sample_rows(language, rates, 400, 32, np.random.default_rng(0))
    copied = 0
    for row, kind in zip(tokens.tolist(), kinds.tolist(), strict=True):
        at = 1
        while at < len(row):
            run = 0
            while at + run < len(row) and KINDS[kind[at + run]] == "repeat":
                run += 1
            if run:
                # The two tokens before the run began the copy; nothing of the copy is a bracket.
                segment = row[at - 2 : at + run]
                assert set(segment) <= set(language.plain.tolist())
                assert len(segment) <= 7
                earlier = [i for i in range(1, at - 2) if row[i : i + len(segment)] == segment]
                assert earlier
                if len(segment) < 5 and at + run < len(row):  # cut short by what is not plain
                    assert any(row[i + len(segment)] not in language.plain for i in earlier)
                copied += 1
            at += max(run, 1)
    assert copied > 200


def test_bigram_targets_follow_the_chain() -> None:
    language, counts = split().language, np.zeros_like(split().language.chain)
    for row, kinds in zip(*rows(), strict=True):
        for at in range(1, len(row)):
            if kinds[at] == "bigram":
                counts[row[at - 1], row[at]] += 1
    np.testing.assert_allclose(language.chain.sum(1), 1.0)
    assert counts[:, np.setdiff1d(np.arange(language.n_tokens), language.plain)].sum() == 0
    plain = counts[:, language.plain]
    p_values = [
        chisquare(seen, seen.sum() * chain).pvalue
        for seen, chain in zip(plain, language.chain[:, language.plain], strict=True)
        if seen.sum() >= 200
    ]
    assert len(p_values) > 20
    assert min(p_values) > 0.05 / len(p_values) / 5
    # The same tokens do not follow the chain of another seed.
    other = make_language(language_config(), seed=1).chain[:, language.plain]
    busiest = int(plain.sum(1).argmax())
    assert chisquare(plain[busiest], plain[busiest].sum() * other[busiest]).pvalue < 1e-9


def test_successors_fall_as_one_over_rank() -> None:
    config = language_config(n_successors=4, noise=0.2)
    for row in make_language(config, 0).chain:
        above = np.sort(row)[::-1][:5] - 0.2 / config.n_plain
        np.testing.assert_allclose(above, [*(0.8 / np.arange(1, 5) / (25 / 12)), 0], atol=1e-12)


def test_two_neighbours_tell_an_ngram() -> None:
    pairs = Counter(pair for ngram in split().language.ngrams.tolist() for pair in zip(ngram, ngram[1:], strict=False))
    assert max(pairs.values()) == 1


def share(kinds: np.ndarray, kind: str) -> float:
    return float(np.mean(kinds[:, 1:] == KINDS.index(kind)))


def test_one_mechanism_alone_begins_at_its_rate() -> None:
    """Alone, each leaves a known share of positions: renewal theory for those that last, the rate for the rest."""
    language, length, n = make_language(language_config(), 0), 200, 400

    def kinds(**rates: Any) -> tuple[np.ndarray, np.ndarray]:
        return sample_rows(language, RATES.model_copy(update=NOTHING | rates), n, length, np.random.default_rng(1))[:2]

    _, found = kinds(ngram=0.2)
    # An n-gram of 4 occupies 4 positions once begun: a cycle is 4 + (1 - .2) / .2 = 8 on average, 2 of it are known.
    assert share(found, "ngram") == pytest.approx(2 / 8, abs=0.01)
    tokens, found = kinds(skip_open=0.1)
    assert np.isin(tokens, language.skips).mean() * length / (length - 1) == pytest.approx(0.1, abs=0.005)
    tokens, found = kinds(open=0.01)
    assert np.isin(tokens, language.openers)[:, :40].mean() == pytest.approx(0.01, abs=0.002)
    tokens, found = kinds(skip_open=0.5, skip_close=0.2)
    # Once there is an opener, a closer comes at a fifth of the positions that do not follow one.
    assert share(found, "skip") == pytest.approx(0.2 / 1.2, abs=0.01)
    # The same for copies of 6, all tokens being plain: a cycle is 6 + 4, and 4 of it are known.
    _, found = kinds(repeat=0.2, repeat_length=(6, 6))
    assert share(found[:, 20:], "repeat") == pytest.approx(4 / 10, abs=0.01)
    # The depth is a birth-death chain on 0 ... 4; a bracket closes at the rate .3 unless the depth is 0.
    _, found = kinds(open=0.5, close=0.3)
    depth = (0.5 / 0.3) ** np.arange(5)
    assert share(found[:, 40:], "close") == pytest.approx(0.3 * (1 - depth[0] / depth.sum()), abs=0.01)
    _, found = kinds()
    assert share(found, "bigram") == 1.0


def test_the_distributions_differ_as_their_rates_do() -> None:
    language, names = split().language, {"ngram-heavy": "ngram", "repeat-heavy": "repeat", "bracket-heavy": "close"}
    found = {}
    for name, rates in HEAVY.items():
        tokens, kinds, _ = sample_rows(language, rates, 512, 32, np.random.default_rng(0))
        found[name] = {kind: share(kinds, kind) for kind in names.values()}
        for other, kind in names.items():
            assert (found[name][kind] > 0.1) == (name == other)
            assert (found[name][kind] == 0) == (name != other)
    has_bracket = {
        name: bool(np.isin(examples.tokens.numpy(), language.openers).any())
        for name, examples in split().distributions.items()
    }
    assert has_bracket == {"ngram-heavy": False, "repeat-heavy": False, "bracket-heavy": True}
    assert all(len(examples) == 512 for examples in split().distributions.values())


def test_a_split_is_a_function_of_settings_and_seed_and_its_parts_do_not_touch_each_other() -> None:
    def made(seed: int = 0, **changes: Any) -> Split:
        return make_split(language_config(**({"distributions": HEAVY} | changes)), seed)

    base, again = made(), made()
    for name in ("train", "test"):
        assert torch.equal(getattr(base, name).tokens, getattr(again, name).tokens)
    assert torch.equal(base.kinds, again.kinds)
    more = made(n_test=96)
    assert torch.equal(base.train.tokens, more.train.tokens)
    assert all(torch.equal(base.distributions[name].tokens, more.distributions[name].tokens) for name in HEAVY)
    fewer = made(distributions={"repeat-heavy": HEAVY["repeat-heavy"]})
    assert torch.equal(base.test.tokens, fewer.test.tokens)
    assert torch.equal(base.distributions["repeat-heavy"].tokens, fewer.distributions["repeat-heavy"].tokens)
    twins = made(distributions={"a": RATES, "b": RATES})
    parts = [base.train, base.test, *(twins.distributions[name] for name in "ab")]
    tokens = [part.tokens[:32] for part in parts]
    assert not any(torch.equal(a, b) for i, a in enumerate(tokens) for b in tokens[:i])
    other = made(seed=1)
    assert not torch.equal(base.train.tokens, other.train.tokens)
    assert not np.array_equal(base.language.chain, other.language.chain)


def test_kinds_stand_where_their_targets_stand_and_the_last_position_is_not_scored() -> None:
    of = split()
    assert torch.equal(of.test.targets[:, :-1], of.test.tokens[:, 1:])
    assert (of.test.weights[:, -1] == 0).all() and (of.test.weights[:, :-1] == 1).all()
    closers, is_close = torch.from_numpy(of.language.closers), of.kinds == of.kind_names.index("close")
    assert torch.equal(is_close[:, :-1], torch.isin(of.test.targets[:, :-1], closers))
    assert not torch.equal(is_close, torch.isin(of.test.tokens, closers))  # of the tokens they would be one off


def test_labels_and_plain_tokens_name_every_token_once() -> None:
    of, language = split(), split().language
    assert len(set(of.labels)) == of.n_classes == language.n_tokens == 1 + 2 * 2 + 4 + 1 + 24
    assert of.labels[of.bos] == "BOS" and of.labels[language.skip_closer] == "e"
    assert [of.labels[token] for token in language.openers] == ["(", "["]
    assert [of.labels[token] for token in language.closers] == [")", "]"]
    assert [of.labels[token] for token in of.plain] == [f"w{i}" for i in range(24)]


def test_multigram_knows_its_own_tables_and_nothing_else() -> None:
    language = split().language
    ngrams, n = language.ngrams.tolist(), len(language.ngrams)
    assert language.n_multigrams == n + len(language.skips)
    for index, (a, b, c, d) in enumerate(ngrams):
        assert language.multigram(a, b, c, contiguous=True) == index
        assert language.multigram(b, c, d, contiguous=True) == index
        assert language.multigram(a, c, d, contiguous=False) == index
        for wrong in ((b, a, c), (a, c, b), (a, d, c)):
            assert language.multigram(*wrong, contiguous=True) is None
        assert language.multigram(a, b, c, contiguous=False) is None
        assert language.multigram(a, c, d, contiguous=True) is None
    e = language.skip_closer
    for index, (skip, target) in enumerate(zip(language.skips.tolist(), language.skip_targets.tolist(), strict=True)):
        assert language.multigram(skip, e, target, contiguous=False) == n + index
        assert language.multigram(skip, e, target, contiguous=True) == n + index
        other = language.skip_targets.tolist()[index - 1]
        assert language.multigram(skip, e, other, contiguous=False) is None
        assert language.multigram(skip, int(language.plain[0]), target, contiguous=False) is None


def test_who_knows_the_tables_loses_less_on_every_kind_than_the_best_bigram_table() -> None:
    """Told which mechanism is at work, the oracle gives planted targets probability 1 and bigrams the chain's."""
    of = split()
    tokens, targets = of.test.tokens.numpy(), of.test.targets.numpy()
    table = bigram_table(of.test, of.n_classes, of.n_classes).numpy()  # of the very rows: no bigram table does better

    def losses(kind: str) -> tuple[float, float]:
        mine = ((of.kinds == KINDS.index(kind)) & (of.test.weights > 0)).numpy()
        here = tokens[mine], targets[mine]
        oracle = -np.log(of.language.chain[here]).mean() if kind == "bigram" else 0.0
        return float(oracle), float(-np.log(table[here]).mean())

    for kind in ("bigram", "ngram", "skip", "repeat"):
        oracle, bigrams = losses(kind)
        assert oracle + 0.1 < bigrams < np.log(of.n_classes), kind
    assert min(losses(kind)[1] for kind in ("ngram", "repeat")) > 1.0


small = st.fixed_dictionaries(
    {
        "n_ctx": st.integers(9, 40), "n_train": st.integers(1, 6), "n_test": st.integers(1, 6),
        "n_refined": st.integers(1, 6), "n_plain": st.integers(16, 30), "n_brackets": st.integers(1, 4),
        "n_skips": st.integers(1, 8), "n_ngrams": st.integers(1, 12), "ngram_length": st.integers(3, 6),
        "n_successors": st.integers(1, 16), "noise": st.sampled_from([0.0, 0.3, 1.0]),
    }
)  # fmt: skip


@settings(deadline=None, max_examples=50)
@given(changes=small, seed=st.integers(0, 3))
def test_any_sizes_give_rows_of_that_shape_with_a_grammar(changes: dict[str, int], seed: int) -> None:
    busy = MechanismRates(
        ngram=0.2, repeat=0.2, open=0.2, close=0.15, skip_open=0.1, skip_close=0.15, repeat_length=(3, 8)
    )
    of = make_split(language_config(**changes, rates=busy, distributions={"other": RATES}), seed)
    n_ctx, reader = changes["n_ctx"], Reader(of.language)
    for examples, name in ((of.train, "n_train"), (of.test, "n_test"), (of.distributions["other"], "n_refined")):
        assert examples.tokens.shape == (changes[name], n_ctx)
        assert int(examples.tokens.min()) >= 0 and int(examples.tokens.max()) < of.n_classes
    n_special = 1 + 2 * changes["n_brackets"] + changes["n_skips"] + 1
    assert of.n_classes == len(of.labels) == n_special + changes["n_plain"]
    assert of.language.ngrams.shape == (changes["n_ngrams"], changes["ngram_length"])
    assert of.kinds.shape == of.test.tokens.shape
    for row, kinds in zip(of.test.tokens.tolist(), of.kinds.tolist(), strict=True):
        reader.open_brackets(row)
        for at in range(1, n_ctx):
            if KINDS[kinds[at - 1]] == "ngram":
                assert reader.continues_ngram(row, at)
            if KINDS[kinds[at - 1]] == "repeat":
                assert reader.continues_copy(row, at)


RATES_ABOVE_ONE = RATES.model_dump() | {"ngram": 0.9}
BACKWARDS = RATES.model_dump() | {"repeat_length": (8, 4)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_successors": 25}, "n_successors, n_skips and ngram_length must not exceed n_plain"),
        ({"n_skips": 25}, "n_successors, n_skips and ngram_length must not exceed n_plain"),
        ({"ngram_length": 25}, "n_successors, n_skips and ngram_length must not exceed n_plain"),
        ({"n_ngrams": 93}, "93 n-grams need more distinct pairs than 24 plain tokens give"),
        ({"n_ctx": 8}, "repeat_length 8 does not fit n_ctx 8"),
        ({"distributions": {"long": RATES.model_copy(update={"repeat_length": (4, 40)})}}, "repeat_length 40"),
        ({"rates": RATES_ABOVE_ONE}, r"must sum to at most 1, got 1.22"),
        ({"rates": BACKWARDS}, r"repeat_length must be \(shortest, longest\), got \(8, 4\)"),
        ({"n_skips": 0}, "greater than 0"),
        ({"n_brackets": 0}, "greater than or equal to 1"),
        ({"n_brackets": 5}, "less than or equal to 4"),
        ({"ngram_length": 2}, "greater than or equal to 3"),
        ({"n_train": 0}, "greater than 0"),
        ({"noise": 1.5}, "less than or equal to 1"),
        ({"distributions": {"test": RATES}}, "a distribution cannot be called test"),
        ({"colour": 1}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as error:
        language_config(**changes)
    assert len(error.value.errors()) == 1


def test_as_many_ngrams_as_are_allowed_can_be_drawn() -> None:
    config: PlantedLanguageConfig = language_config(n_ngrams=92)
    assert len(make_language(config, 0).ngrams) == 92
