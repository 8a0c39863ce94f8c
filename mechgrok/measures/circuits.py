"""Circuits of two heads: what the path from an earlier head to a later one costs, and which pairs do induction.

A pair is named "L0H3 -> L1H5". Losses are in nats. Standard errors are over examples, as the positions of one row are
not independent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from mechgrok import seeds
from mechgrok.components import head_of
from mechgrok.measures.ablation import AblationKind, CleanRun, clean_run, permutation, put_head, replacement
from mechgrok.measures.attention import AttentionScores, RepeatedTokens, attention_scores, prefix_matching
from mechgrok.measures.composition import composition_scores
from mechgrok.measures.head_types import SURE, probe, strong_heads
from mechgrok.measures.in_context import position_losses
from mechgrok.measures.needs import check_causal
from mechgrok.measures.path_ablation import INPUTS, Head, Input, path_ablation
from mechgrok.measures.streams import changed_inputs, frozen_between, put, ungrouped
from mechgrok.model import FwdHook
from mechgrok.types import Examples, Split

Pair = tuple[Head, Head]  # the earlier head, the later head

PATH_NATS = 0.01  # a circuit's path costs as much; a tenth of what an induction head must do, as it has several senders
MAX_PAIRS = 256  # whose paths are ablated in a search; all of them for two layers of sixteen heads


@dataclass(frozen=True)
class WeightedMean:
    """A mean over positions, and how much each example moves it: its sum of squares is the variance.

    So the difference of two means over the same examples has the shifts' difference: `a.less(b)`.
    shifts: Float64[example].
    """

    value: float
    shifts: Tensor

    @property
    def error(self) -> float:
        """Standard error over examples; NaN for a single one."""
        n = len(self.shifts)
        return float((self.shifts.square().sum() * n / (n - 1)).sqrt()) if n > 1 else float("nan")

    def less(self, other: "WeightedMean") -> "WeightedMean":
        """This mean less another over the same examples."""
        return WeightedMean(self.value - other.value, self.shifts - other.shifts)

    def lower(self) -> float:
        """The lower end of the 95 % interval."""
        return self.value - 1.96 * self.error


def weighted_mean(values: Tensor, weights: Tensor) -> WeightedMean:
    """Mean of values over positions by weight, with the error of a ratio whose examples are independent.

    mean = sum(w x) / sum(w), shift of example i = sum over its positions of w (x - mean) / sum(w). NaN without weight.

    Args:
        values, weights: [example, scored].
    """
    weights = weights.double()
    total = weights.sum()
    mean = (values * weights).sum() / total
    return WeightedMean(float(mean), (weights * (values - mean)).sum(1) / total)


def head_name(head: Head) -> str:
    """ "L0H3"."""
    return f"L{head[0]}H{head[1]}"


def pair_name(pair: Pair) -> str:
    """ "L0H3 -> L1H5"."""
    return " -> ".join(map(head_name, pair))


def pair_of(name: str) -> Pair:
    """The heads of a pair by name. Raises ComponentError for another text."""
    sender, _, receiver = name.partition(" -> ")
    return head_of(sender), head_of(receiver)


def all_pairs(model: HookedTransformer) -> list[Pair]:
    """Every head with every head of a later layer, ordered by the earlier head, then the later."""
    heads = list(product(range(model.cfg.n_layers), range(model.cfg.n_heads)))
    return [(sender, receiver) for sender in heads for receiver in heads if sender[0] < receiver[0]]


def path_effect(
    model: HookedTransformer, examples: Examples, pair: Pair, inputs: Sequence[Input], clean: CleanRun
) -> WeightedMean:
    """Increase of the mean loss when the path is mean-ablated, see `path_ablation`."""
    no_draw = torch.Generator()  # mean ablation draws nothing
    increase = path_ablation(model, examples, *pair, inputs, "mean", no_draw, clean)
    return weighted_mean(increase, examples.tensors[2])


@torch.no_grad()
def joint_ablation(
    model: HookedTransformer,
    examples: Examples,
    heads: Sequence[Head],
    kind: AblationKind,
    rng: torch.Generator,
    clean: CleanRun,
) -> WeightedMean:
    """Increase of the mean loss when all these heads are ablated at once, each as in `ablation.head_ablations`.

    Heads that stand in for each other cost little one by one, and much together. What is put in their places is of the
    clean run.
    """
    instead = {}
    for layer, head in heads:
        own = clean.z[layer][:, :, head]
        instead[layer, head] = replacement(kind, own, permutation(kind, len(examples), rng)).expand_as(own)

    def hooks(rows: slice) -> list[FwdHook]:
        return [put_head(f"blocks.{layer}.attn.hook_z", head, of[rows]) for (layer, head), of in instead.items()]

    return weighted_mean(position_losses(model, examples, hooks) - clean.losses, examples.tensors[2])


@torch.no_grad()
def layer_path_effects(
    model: HookedTransformer, examples: Examples, sender: int, receiver: int, heads: Sequence[int], clean: CleanRun
) -> Tensor:
    """Increase of every position's loss, Float64[example, scored], when all heads of the sending layer are mean-ablated
    for these heads of a later layer at once, and for no other.

    Through queries, keys and values; all else sees the clean stream. Single paths can cancel, or stand in for each
    other, and then their sum says little. It equals `path_ablation` where one head alone sends (a test holds them
    equal): the later layer runs on the changed stream, and its queries, keys and values are put into a clean run.
    """
    mean, ours = clean.z[sender].mean(0, keepdim=True), list(heads)

    def only_ours(changed: Tensor) -> Callable[[Tensor, HookPoint], Tensor]:
        def hook_fn(value: Tensor, hook: HookPoint) -> Tensor:
            value = value.clone()
            value[:, :, ours] = changed[:, :, ours]
            return value

        return hook_fn

    def hooks(rows: slice) -> list[FwdHook]:
        z = [of[rows] for of in clean.z]
        silent = (f"blocks.{sender}.attn.hook_z", put(mean.expand_as(z[sender])))
        changed = changed_inputs(model, examples.tokens[rows], z, silent, sender, receiver, INPUTS)
        return [(f"blocks.{receiver}.attn.hook_{letter}", only_ours(of)) for letter, of in changed.items()]

    with ungrouped(model):
        return position_losses(model, examples, hooks) - clean.losses


@torch.no_grad()
def direct_effects(model: HookedTransformer, examples: Examples, layer: int, clean: CleanRun) -> Tensor:
    """Increase of every position's loss without what a head tells the logits directly: Float64[head, example, scored].

    The head's z is mean-ablated, and what all later layers and its own layer's MLP write stays as it is in the clean
    run. (The final LayerNorm sees the change.)
    """
    point, end = f"blocks.{layer}.attn.hook_z", model.cfg.n_layers

    def without(head: int) -> Tensor:
        own = clean.z[layer][:, :, head]
        instead = replacement("mean", own, None).expand_as(own)

        def hooks(rows: slice) -> list[FwdHook]:
            kept = frozen_between(model, examples.tokens[rows], [of[rows] for of in clean.z], layer, end)
            return [put_head(point, head, instead[rows]), *kept]

        return position_losses(model, examples, hooks) - clean.losses

    return torch.stack([without(head) for head in range(model.cfg.n_heads)])


@dataclass(frozen=True)
class InductionScores:
    """What speaks for a pair: scores of its heads and their K-composition as multiples of chance, and whether each is
    beyond doubt.

    sender, receiver: AttentionScores of all heads. composition: Float64[layer, head, layer, head], NaN as in
    `CompositionScores`. composes: Bool of that shape.
    """

    n_heads: int
    sender: AttentionScores
    receiver: AttentionScores
    composition: Tensor
    composes: Tensor

    def of(self, pair: Pair) -> tuple[float, float, float]:
        """(previous-token score of the first, prefix matching of the second, K-composition), times chance."""
        first, second = (layer * self.n_heads + head for layer, head in pair)
        sender, receiver = self.sender.times_chance[first], self.receiver.times_chance[second]
        return float(sender), float(receiver), float(self.composition[(*pair[0], *pair[1])])

    def looks_back(self, head: Head) -> bool:
        """It is surely a previous-token head on random tokens."""
        return bool(strong_heads(self.sender)[head[0] * self.n_heads + head[1]])

    def matches(self, head: Head) -> bool:
        """It surely matches prefixes."""
        return bool(strong_heads(self.receiver)[head[0] * self.n_heads + head[1]])

    def composed(self, pair: Pair) -> bool:
        """Their K-composition is SURE spreads above that of random matrices."""
        return bool(self.composes[(*pair[0], *pair[1])])


def induction_scores(model: HookedTransformer, repeats: RepeatedTokens, rng: torch.Generator) -> InductionScores:
    """Previous-token attention on the repeated random tokens, prefix matching, and K-composition of every pair."""
    composition = composition_scores(model, rng)["K"]
    return InductionScores(
        n_heads=model.cfg.n_heads,
        sender=attention_scores(model, repeats.examples)["previous-token"],
        receiver=prefix_matching(model, repeats),
        composition=composition.times_chance,
        composes=composition.scores - composition.chance > SURE * composition.spread,
    )


@dataclass(frozen=True)
class PairEvidence:
    """One pair in the search for induction circuits. k_effect: what its K path costs on the repeats, nats."""

    pair: Pair
    looks_back: bool
    matches: bool
    composes: bool
    k_effect: WeightedMean

    @property
    def costs(self) -> bool:
        """The K path costs PATH_NATS, and is SURE standard errors from costing nothing."""
        return self.k_effect.value >= max(PATH_NATS, SURE * self.k_effect.error)

    @property
    def found(self) -> bool:
        """Scores, composition and path ablation agree."""
        return self.looks_back and self.matches and self.composes and self.costs


def induction_search(
    model: HookedTransformer, repeats: RepeatedTokens, rng: torch.Generator
) -> tuple[PairEvidence, ...]:
    """Every pair with the evidence for and against its being an induction circuit, in the order of `all_pairs`.

    A circuit is a pair of which all four are true. The rules are ours: the sender attends to the previous token and the
    receiver matches prefixes (both by `strong_heads`, on repeated random tokens), the receiver's keys read what the
    sender writes more than random matrices would (SURE spreads), and mean ablation of the sender in the receiver's keys
    alone raises the loss on the second copies (by PATH_NATS and SURE standard errors).

    Of a model of more than MAX_PAIRS pairs, those of the largest product of the two attention scores are searched.

    Raises:
        MeasureError: positions see later ones, so that there is nothing to match.
    """
    check_causal(model, repeats.examples, "the search for induction circuits")
    scores = induction_scores(model, repeats, rng)
    pairs = all_pairs(model)
    if len(pairs) > MAX_PAIRS:
        best = sorted(pairs, key=lambda pair: -scores.of(pair)[0] * scores.of(pair)[1])[:MAX_PAIRS]
        pairs = sorted(best)
    clean = clean_run(model, repeats.examples)
    return tuple(
        PairEvidence(
            pair=pair,
            looks_back=scores.looks_back(pair[0]),
            matches=scores.matches(pair[1]),
            composes=scores.composed(pair),
            k_effect=path_effect(model, repeats.examples, pair, ("k",), clean),
        )
        for pair in pairs
    )


def searched_circuits(model: HookedTransformer, split: Split) -> tuple[PairEvidence, ...]:
    """`induction_search` on random tokens of the data's vocabulary, the same ones for every analysis that asks."""
    tokens, chance = (seeds.stream(0, "induction_circuit", name) for name in ("search", "chance"))
    return induction_search(model, probe(split, tokens), chance)


def strongest_first(searched: Sequence[PairEvidence]) -> list[PairEvidence]:
    """The circuits among these pairs, those whose K path costs most first."""
    return sorted((of for of in searched if of.found), key=lambda of: -of.k_effect.value)
