"""Kinds of targets that the data show: brackets by their labels, n-grams that were planted among noise."""

from dataclasses import replace

import pytest
import torch

from mechgrok import seeds
from mechgrok.measures.kinds import KINDS, with_kinds
from mechgrok.measures.multigrams import closing_brackets
from mechgrok.tasks.next_token import next_token_examples
from mechgrok.types import Split
from tests import hand_built

LABELS = (*(f"w{i}" for i in range(18)), "(", ")")
CLOSE, SOURCE, TOKEN, TARGET = 19, 3, 5, 7


def rows_of(n: int, planted: bool) -> torch.Tensor:
    """Random tokens; in the middle of each row a bracket that closes and, if planted, source, token, target."""
    rows = torch.randint(18, (n, 17), generator=seeds.stream(0, "rows", str(planted)))
    rows[:, 12] = CLOSE
    if planted:
        rows[:, 4:7] = torch.tensor([SOURCE, TOKEN, TARGET])
    return rows


def split_of(planted: bool) -> Split:
    examples = next_token_examples(rows_of(60, planted))
    return Split(examples, examples, LABELS, len(LABELS))


@pytest.mark.parametrize("planted", [True, False])
def test_the_planted_ngram_and_the_brackets_are_found_and_nothing_else(planted: bool) -> None:
    found = with_kinds(split_of(planted))
    assert found.kind_names == KINDS and found.kinds is not None
    targets = found.test.targets
    assert torch.equal(found.kinds == KINDS.index("close"), targets == CLOSE)
    ngrams = found.kinds == KINDS.index("ngram")
    assert torch.equal(targets[ngrams].unique(), torch.tensor([TARGET] if planted else []))
    if planted:
        assert ngrams[:, 5].float().mean() > 0.8  # but where the row had the same bigram before
        assert float(ngrams.sum()) <= 1.1 * float(ngrams[:, 5].sum())


def test_kinds_that_a_task_knows_stay() -> None:
    split = split_of(True)
    known = replace(split, kinds=torch.zeros_like(split.test.tokens), kind_names=("its own",))
    assert with_kinds(known) is known
    assert with_kinds(hand_built.SPLIT).kinds is not None


def test_a_token_closes_a_bracket_that_it_does_not_open() -> None:
    closing, others = [")", "Ġ)", "):", "')", ")(", "]}", "())"], ["(", "()", "f(x)", "([)", "([])", ">", "->", "", "a"]
    assert closing_brackets(closing).all() and not closing_brackets(others).any()
