"""Which n-grams and skip n-grams the heads have memorized. The procedure is ours; no published one is complete.

Wang et al. 2024 (arXiv:2410.02984) ablate a head, collect the tokens that suffer, and sort them into induction
patterns, brackets, skip n-grams and n-grams. Here a *multigram* is (source, token -> target): two tokens of the
context that together predict the next one, the source directly before the token (an n-gram) or with a gap (a skip
n-gram). One counts as memorized by a head if

    the data hold it: given source and token, the target is likelier than given the token alone (one-sided binomial
        test, with Bonferroni's correction for all multigrams looked at) and comes at least half of the time;
    the model knows it: the mean loss at its places is below ln 2, the target is likelier than not;
    the head is needed: ablating it adds at least ADDED_NATS there, and SURE standard errors more than nothing;
    the head looks: it attends to the multigram's tokens at least as much as uniform attention would.

Targets that repeat what followed the same token earlier in the row are left out, as induction predicts those, and
so are closing brackets.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor
from transformer_lens import HookedTransformer

from mechgrok import seeds
from mechgrok.measures.ablation import AblationKind, position_ablations
from mechgrok.measures.in_context import position_losses
from mechgrok.measures.needs import check_causal, check_next_tokens, visible_positions
from mechgrok.model import shares
from mechgrok.types import Examples, Split

MIN_COUNT = 3  # places of a multigram; a mean over fewer has no standard error to speak of
LEVEL = 0.05  # of the binomial tests, all together
LIKELY = 0.5  # the share of the target after source and token
KNOWN_NATS = float(np.log(2))
ADDED_NATS = 0.1  # a change of the target's probability by a tenth
SURE = 3.0  # standard errors
OPENING, CLOSING = "([{⟨", ")]}⟩"
N_EXAMPLES = 256


@dataclass(frozen=True, order=True)
class Multigram:
    """source ... token -> target, as token ids; contiguous: nothing stands between source and token."""

    source: int
    token: int
    target: int
    contiguous: bool


@dataclass(frozen=True)
class Memory:
    """What a head has memorized, and the loss that ablating it adds, summed over a row's targets, nats:

    at_multigrams: at the places of what it has memorized. at_repeats: at targets that repeat what followed the same
    token earlier in the row, as induction predicts them.
    """

    multigrams: tuple[Multigram, ...]
    at_multigrams: float
    at_repeats: float


@dataclass(frozen=True)
class Score:
    """precision: share of the found multigrams that were planted; recall: share of the planted ones that were found.

    Both are NaN where there is nothing to divide by.
    """

    precision: float
    recall: float


class Truth(Protocol):
    """A language that knows its multigrams, as `tasks.planted_language.Language` does."""

    @property
    def n_multigrams(self) -> int: ...

    def multigram(self, source: int, token: int, target: int, contiguous: bool) -> int | None: ...


def score(found: Iterable[Multigram], truth: Truth) -> Score:
    """What was found, against what was planted; two finds of one planted multigram are one for the recall."""
    planted = [truth.multigram(one.source, one.token, one.target, one.contiguous) for one in set(found)]
    right = [index for index in planted if index is not None]
    precision = len(right) / len(planted) if planted else float("nan")
    return Score(precision, len(set(right)) / truth.n_multigrams if truth.n_multigrams else float("nan"))


@dataclass(frozen=True)
class Places:
    """Where the targets of some examples can show what was memorized. All arrays are [place], in order.

    example, pos: of the token that the target follows. previous: the token before it, -1 at the row's beginning.
    """

    example: np.ndarray
    pos: np.ndarray
    previous: np.ndarray
    token: np.ndarray
    target: np.ndarray


def places(examples: Examples, labels: Sequence[str]) -> Places:
    """The scored positions whose targets neither repeat what followed the same token earlier nor close a bracket."""
    tokens, targets = examples.tokens.numpy(), examples.targets.numpy()
    scored = examples.weights.numpy() > 0
    closing = closing_brackets(labels).numpy()[targets]
    free = scored & ~_follows_earlier(tokens, targets) & ~closing
    example, pos = np.nonzero(free)
    previous = np.where(pos > 0, tokens[example, np.maximum(pos - 1, 0)], -1)
    return Places(example, pos, previous, tokens[example, pos], targets[example, pos])


def closing_brackets(labels: Sequence[str]) -> Tensor:
    """Which tokens close a bracket that they do not open, as ")" and "):" do and "()" does not: Bool[token]."""

    def closes(label: str) -> bool:
        depth = 0
        for character in label:
            depth += (character in OPENING) - (character in CLOSING)
            if depth < 0:
                return True
        return False

    return torch.tensor([closes(label) for label in labels])


def _follows_earlier(tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Whether the same token stood earlier in the row with the same token after it: bool[example, pos]."""
    same = np.zeros(tokens.shape, bool)
    for distance in range(1, tokens.shape[1]):
        now, before = slice(distance, None), slice(None, -distance)
        same[:, now] |= (tokens[:, now] == tokens[:, before]) & (targets[:, now] == targets[:, before])
    return same


def associated(
    source: np.ndarray, token: np.ndarray, target: np.ndarray, contiguous: bool
) -> dict[Multigram, np.ndarray]:
    """The multigrams that the data hold, each with the indices of its places; arguments are Int[place].

    Of n places with this source and token, c have the target; under the share q of the target among the other places
    with the token, P(at least c of n) must be below LEVEL / (number of multigrams with MIN_COUNT places).
    """
    base = int(max(source.max(initial=0), token.max(initial=0), target.max(initial=0))) + 1
    pair, bigram = source * base + token, token * base + target
    keys, inverse, count = np.unique(pair * base + target, return_inverse=True, return_counts=True)
    tested = np.flatnonzero(count >= MIN_COUNT)
    if not len(tested):
        return {}
    first = np.unique(inverse, return_index=True)[1][tested]
    n_pair, n_token, n_bigram = (_counts(of)[first] for of in (pair, token, bigram))
    hits = count[tested]
    others = n_token - n_pair
    share = np.clip((n_bigram - hits + 0.5) / (others + 1), 0, 1)  # of other places; never quite 0
    share[others == 0] = 1.0  # the data cannot tell it from a bigram
    chance = binom.sf(hits - 1, n_pair, share)
    holds = (chance < LEVEL / len(tested)) & (hits >= LIKELY * n_pair)
    order = np.argsort(inverse, kind="stable")
    ends = np.cumsum(count)
    return {
        Multigram(int(source[at]), int(token[at]), int(target[at]), contiguous): order[
            ends[key] - count[key] : ends[key]
        ]
        for key, at in zip(tested[holds], first[holds], strict=True)
    }


def _counts(values: np.ndarray) -> np.ndarray:
    """How often each entry's value occurs: [place]."""
    _, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
    return count[inverse]


def memorized_on(model: HookedTransformer, split: Split) -> list[Memory]:
    """`memorized` on the first N_EXAMPLES test rows, by resample ablation, as Wang et al. 2024 do.

    The rows that stand in are the same for every model.
    """
    rng = seeds.stream(0, "multigrams", "resample")
    return memorized(model, split.test.first(N_EXAMPLES), split.labels, split.bos, "resample", rng)


@torch.no_grad()
def memorized(
    model: HookedTransformer,
    examples: Examples,
    labels: Sequence[str],
    bos: int | None,
    kind: AblationKind,
    rng: torch.Generator,
) -> list[Memory]:
    """What each head has memorized, heads in layer-major order; the rule stands above.

    N-grams are the same candidates for every head. The source of a skip n-gram is the token, two or more places
    back and not `bos`, that the head attends to most; places that an n-gram of the data explains are left out.

    Raises:
        MeasureError: the targets are not the next tokens, or positions see later ones.
    """
    check_next_tokens(examples, "the search for multigrams")
    check_causal(model, examples, "the search for multigrams")
    seen = places(examples, labels)
    n_scored = examples.tensors[1].shape[1]
    column = seen.pos - (examples.tokens.shape[1] - n_scored)
    loss = position_losses(model, examples).numpy()[seen.example, column]
    everywhere = position_ablations(model, examples, kind, rng).numpy()
    added = everywhere[:, seen.example, column]
    repeats = (examples.weights.numpy() > 0) & _follows_earlier(examples.tokens.numpy(), examples.targets.numpy())
    tokens = examples.tokens.numpy()
    looks = _looks(_attention(model, examples), tokens, seen, bos)
    uniform = 2 / _n_visible(model, examples)[seen.example, seen.pos]

    inside = np.flatnonzero(seen.previous >= 0)
    ngrams = {
        multigram: inside[where]
        for multigram, where in associated(
            seen.previous[inside], seen.token[inside], seen.target[inside], contiguous=True
        ).items()
    }
    explained = np.zeros(len(seen.pos), bool)
    for where in ngrams.values():
        explained[where] = True

    found = []
    for head in range(len(everywhere)):
        near = looks.token[head] + looks.previous[head]
        far = looks.token[head] + looks.at_source[head]
        known = {
            multigram: where
            for multigram, where in ngrams.items()
            if _needed(loss[where], added[head, where]) and _enough(near[where], uniform[where])
        }
        open_ = np.flatnonzero(~explained & (looks.at_source[head] > 0))
        source = tokens[seen.example[open_], looks.source[head, open_]]
        skips = associated(source, seen.token[open_], seen.target[open_], contiguous=False)
        known |= {
            multigram: open_[where]
            for multigram, where in skips.items()
            if _needed(loss[open_[where]], added[head, open_[where]])
            and _enough(far[open_[where]], uniform[open_[where]])
        }
        at_multigrams = sum(float(added[head, where].sum()) for where in known.values())
        at_repeats = float(everywhere[head][repeats[:, -n_scored:]].sum())
        found.append(Memory(tuple(sorted(known)), at_multigrams / len(examples), at_repeats / len(examples)))
    return found


def _attention(model: HookedTransformer, examples: Examples) -> Iterator[np.ndarray]:
    """Every head's pattern, [head, example, query, key], layer-major, of `model.at_once` examples after the other."""
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    for rows in shares(model, examples):
        tokens = examples.tokens[rows]
        _, cache = model.run_with_cache(tokens, names_filter=names, stop_at_layer=model.cfg.n_layers)
        yield torch.cat([cache[name].transpose(0, 1) for name in names]).numpy()


@dataclass(frozen=True)
class Looks:
    """What heads attend to from the places. All arrays are [head, place].

    token, previous: attention to the place's own position and to the one before it. source: the position, two or more
    back and not of `bos`, that gets most; at_source: how much that is, -1 where there is none.
    """

    token: np.ndarray
    previous: np.ndarray
    source: np.ndarray
    at_source: np.ndarray


def _looks(patterns: Iterable[np.ndarray], tokens: np.ndarray, seen: Places, bos: int | None) -> Looks:
    """Read off the patterns of one block of examples after the other, as those of all do not fit the memory."""
    parts, first = [], 0
    for pattern in patterns:
        n_examples = pattern.shape[1]
        mine = slice(*np.searchsorted(seen.example, [first, first + n_examples]))
        example, pos = seen.example[mine], seen.pos[mine]
        place = np.arange(len(pos))
        far = np.arange(pattern.shape[3]) <= pos[:, None] - 2
        if bos is not None:
            far &= tokens[example] != bos
        read = []
        for of_head in pattern:
            rows = of_head[example - first, pos]  # [place, key]
            of_far = np.where(far, rows, -1.0)
            read.append((rows[place, pos], rows[place, np.maximum(pos - 1, 0)], of_far.argmax(1), of_far.max(1)))
        parts.append([np.stack(of) for of in zip(*read, strict=True)])
        first += n_examples
    return Looks(*(np.concatenate(of, 1) for of in zip(*parts, strict=True)))


def _needed(loss: np.ndarray, added: np.ndarray) -> bool:
    error = added.std(ddof=1) / len(added) ** 0.5
    return bool(loss.mean() < KNOWN_NATS and added.mean() >= ADDED_NATS and added.mean() > SURE * error)


def _enough(attention: np.ndarray, uniform: np.ndarray) -> bool:
    """Whether attention to source and token is, on average, at least uniform attention's 2 / (visible positions)."""
    return bool(attention.mean() >= uniform.mean())


def _n_visible(model: HookedTransformer, examples: Examples) -> np.ndarray:
    """How many positions each one sees: Int[example, pos]."""
    counts = [visible_positions(model, examples.tokens[rows]).sum(-1) for rows in shares(model, examples)]
    return torch.cat(counts).numpy()
