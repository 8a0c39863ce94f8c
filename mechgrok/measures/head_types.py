"""What kind of head each one is, from scores compared with chance. The rules and thresholds are ours.

Published thresholds (.4 of the attention, from GPT-2) miss the induction heads of small models, which end at .06 where
chance is .011 (Hoogland et al. 2024). So a score counts as a multiple of its chance level and by its spread.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from mechgrok import seeds
from mechgrok.components import head_names
from mechgrok.errors import ShapeError
from mechgrok.measures.ablation import position_ablations
from mechgrok.measures.attention import (
    ATTENTION_KINDS,
    AttentionScores,
    RepeatedTokens,
    attention_scores,
    prefix_matching,
    repeated_tokens,
)
from mechgrok.measures.attribution import head_attributions
from mechgrok.measures.copying import copying_scores
from mechgrok.measures.multigrams import Memory, closing_brackets, memorized_on
from mechgrok.measures.needs import check_causal, check_next_tokens
from mechgrok.types import Examples, Split

HeadType = Literal[
    "induction", "previous-token", "bracket", "multigram", "duplicate-token", "current-token", "first-token", "dead",
    "unclear",
]  # fmt: skip
HEAD_TYPES: tuple[HeadType, ...] = (
    "induction", "previous-token", "bracket", "multigram", "duplicate-token", "current-token", "first-token", "dead",
    "unclear",
)  # fmt: skip

TIMES_CHANCE = 3.7  # midway, in ratio, between 2.7, which published heads of no type reach, and 5, the faintest of one
SURE = (
    4.0  # spreads above chance: one in 30,000 for a normal, as some 16 heads x 6 scores x 100 checkpoints are looked at
)
GENERIC = 0.5  # of the attention on random tokens: with most of it, a head looks nearby whatever the tokens are
COPIES = 2.0  # times its share that the attended token gets; not more, as what a blurred head raises is spread as well
DIRECT_NATS = 0.1  # an induction head raises the right logit; .1 changes a probability by a tenth
DEAD_NATS = 1e-3  # per position; the smallest change of a loss that the reports print
MIN_MULTIGRAMS = 5  # memorized n-grams or skip n-grams that make a multigram head: fewer may be miscounted
BRACKET_NATS = 0.5  # of loss that ablation adds to a closing bracket, which changes its probability by half or so
BRACKET_RATIO = 5.0  # times what it adds to other targets
MAX_POSITIONS = 2**12  # of the test examples that are looked at; it puts a few per cent on a score


@dataclass(frozen=True)
class HeadEvidence:
    """A head, its type, and the scores behind it.

    scores: "previous-token", "current-token", "first-token", "duplicate-token", "prefix matching" and "copying" as
    multiples of chance (1 = chance, NaN = cannot be met in these data); "direct effect" on the repeated token's logit
    "ablation", the larger mean |change of loss| on test examples and on repeats; "brackets", the loss that zeroing
    adds to closing brackets, NaN where none is a target; all three in nats; "multigrams", a count, and the
    loss that ablation adds to a row at them and at repeats, "harm to multigrams" and "harm to repeats", if given.
    """

    head: str
    type: HeadType
    scores: Mapping[str, float]


def head_evidence(
    model: HookedTransformer, split: Split, rng: torch.Generator, memories: Sequence[Memory] | None = None
) -> tuple[HeadEvidence, ...]:
    """Every head's type with its evidence, layer-major. The first of these rules that applies:

    induction: prefix matching is strong, *and* the head copies: of what it raises, the attended token gets COPIES times
        its share, *and* it raises the right logit on repeats by DIRECT_NATS. How little one head's ablation costs is
        not asked, since induction heads stand in for each other.
    dead: zeroing the head changes no loss, on the test examples or on repeats, by DEAD_NATS a position on average.
    bracket: zeroing it adds BRACKET_NATS to the loss on closing brackets, SURE standard errors more than nothing and
        BRACKET_RATIO times what it adds elsewhere.
    multigram: at least MIN_MULTIGRAMS were memorized; a strong previous- or current-token head is none if GENERIC of
        its attention on random tokens goes to the two together, as it then looks nearby whatever the tokens are.
        A head that is an induction head as well is of the type whose targets its ablation harms more, as Wang et al.
        2024 sort heads by the tokens that suffer.
    previous-, current-, first- or duplicate-token: the strong one of the largest multiple of chance. Each is taken on
        the test examples and on random tokens, and the smaller counts.
    unclear: none of them.

    A score is strong when it is TIMES_CHANCE its chance level and SURE spreads above it.

    Args:
        rng: draws the random tokens; the same seed at every checkpoint makes their scores comparable.
        memories: what each head has memorized, from `measures.multigrams`; None if that was not looked at.

    Raises:
        ShapeError: the context is too short for repeats, or `memories` has not one entry a head.
        MeasureError: the targets are not the next tokens, or positions see later ones, as all types but those by
            attention alone are about predicting the next token.
    """
    names = head_names(model)
    if memories is not None and len(memories) != len(names):
        raise ShapeError(f"memories must have one entry for each of {len(names)} heads, got {len(memories)}")
    examples, repeats = some_examples(split.test), probe(split, rng)
    check_causal(model, repeats.examples, "a head's type")

    on_data, on_random = attention_scores(model, examples), attention_scores(model, repeats.examples)
    prefix = prefix_matching(model, repeats)
    copying = copying_scores(model, repeats, repeats.second).times_chance
    direct = _mean(head_attributions(model, repeats.examples), repeats.examples)
    on_test = position_ablations(model, examples, "zero", rng)
    on_repeats = position_ablations(model, repeats.examples, "zero", rng)
    harms = [_mean(on_test.abs(), examples), _mean(on_repeats.abs(), repeats.examples)]
    brackets, is_bracket = _brackets(on_test, examples, split.labels)
    columns: dict[str, Tensor] = {
        **{kind: torch.minimum(on_data[kind].times_chance, on_random[kind].times_chance) for kind in ATTENTION_KINDS},
        "prefix matching": prefix.times_chance,
        "copying": copying,
        "direct effect": direct,
        "ablation": torch.maximum(*harms),
        "brackets": brackets,
    }
    if memories is not None:
        columns["multigrams"] = torch.tensor([len(of.multigrams) for of in memories], dtype=torch.float64)
        columns["harm to multigrams"] = torch.tensor([of.at_multigrams for of in memories], dtype=torch.float64)
        columns["harm to repeats"] = torch.tensor([of.at_repeats for of in memories], dtype=torch.float64)
    strong: dict[str, Tensor] = {
        kind: strong_heads(on_data[kind]) & strong_heads(on_random[kind]) for kind in ATTENTION_KINDS
    }
    strong["prefix matching"] = strong_heads(prefix)
    strong["bracket"] = is_bracket
    nearby = on_random["previous-token"].score + on_random["current-token"].score > GENERIC
    evidence = []
    for index, name in enumerate(names):
        scores = {key: float(column[index]) for key, column in columns.items()}
        strong_here = {kind for kind, of in strong.items() if of[index]}
        evidence.append(HeadEvidence(name, _type(scores, strong_here, bool(nearby[index])), scores))
    return tuple(evidence)


def typed_heads(
    model: HookedTransformer, split: Split, memories: Sequence[Memory] | None = None
) -> tuple[HeadEvidence, ...]:
    """`head_evidence` on fixed random tokens, with what each head has memorized; that is found if it is not given."""
    known = memorized_on(model, split) if memories is None else memories
    return head_evidence(model, split, seeds.stream(0, "head types"), known)


def strong_heads(scores: AttentionScores) -> Tensor:
    """Bool[head]: TIMES_CHANCE the chance level and SURE spreads above it; False for NaN."""
    sure = scores.score - scores.chance > SURE * scores.spread
    return (scores.times_chance >= TIMES_CHANCE) & sure


def some_examples(examples: Examples) -> Examples:
    """Evenly spaced examples of at most MAX_POSITIONS positions in all."""
    n = min(len(examples), max(1, MAX_POSITIONS // examples.tokens.shape[1]))
    chosen = torch.linspace(0, len(examples) - 1, n).long()
    return Examples(examples.tokens[chosen], examples.targets[chosen], examples.weights[chosen])


def probe(split: Split, rng: torch.Generator) -> RepeatedTokens:
    """Repeated random tokens in the task's own vocabulary: of `split.plain`, after `split.bos`.

    Raises:
        MeasureError: the targets are not the next tokens. ShapeError: the context is too short for repeats.
    """
    check_next_tokens(split.test, "a run on repeated tokens")
    ids = split.plain or tuple(i for i in range(min(len(split.labels), split.n_classes)) if i != split.bos)
    return repeated_tokens(rng, split.test.tokens.shape[1], ids, split.bos)


def _type(scores: Mapping[str, float], strong: set[str], nearby: bool) -> HeadType:
    copies = scores["copying"] >= COPIES and scores["direct effect"] >= DIRECT_NATS
    memorizes = scores.get("multigrams", 0) >= MIN_MULTIGRAMS
    if "prefix matching" in strong and copies:
        harms_more = memorizes and scores["harm to multigrams"] > scores["harm to repeats"]
        return "multigram" if harms_more else "induction"
    if scores["ablation"] < DEAD_NATS:
        return "dead"
    if "bracket" in strong:
        return "bracket"
    attended = max((kind for kind in ATTENTION_KINDS if kind in strong), key=lambda kind: scores[kind], default=None)
    if memorizes and not (nearby and attended in ("previous-token", "current-token")):
        return "multigram"
    return attended or "unclear"


def _brackets(added: Tensor, examples: Examples, labels: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(mean loss added to closing brackets, whether that makes a bracket head), [head] each; NaN without brackets."""
    targets, weights = examples.tensors[1], examples.tensors[2]
    closing = closing_brackets(labels)[targets] & (weights > 0)
    if int(closing.sum()) < 2:
        return torch.full(added.shape[:1], float("nan")), torch.zeros(added.shape[:1], dtype=torch.bool)
    inside, outside = added[:, closing], added[:, ~closing & (weights > 0)].mean(1)
    mean, error = inside.mean(1), inside.std(1) / inside.shape[1] ** 0.5
    return mean, (mean >= BRACKET_NATS) & (mean > SURE * error) & (mean > BRACKET_RATIO * outside)


def _mean(values: Tensor, examples: Examples) -> Tensor:
    """Weighted mean over examples and positions: [head, example, scored] -> Float64[head]."""
    weights = examples.tensors[2].double()
    return (values * weights).sum((1, 2)) / weights.sum()
