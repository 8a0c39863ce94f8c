"""Where heads attend: previous, current, first and earlier equal tokens, and what followed an equal token.

Every score comes with its chance level on the very same queries, and with the spread that a head as sharp as
this one has when it attends to unrelated positions. Heads are ordered layer-major. What is visible is asked of the
model (`needs.visible_positions`), so the chance is right for causal, bidirectional and windowed attention, and beside
hooks that mask padding.

TransformerLens's `head_detector` supplies the patterns to look for. Its `detect_head` cannot be called here: it
wants text and a tokenizer, one row shorter than n_ctx at a time, scores all queries alike instead of those
where the pattern can be met, and knows no chance level. (Older releases also edit the cached pattern in place.)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.head_detector import (
    get_duplicate_token_head_detection_pattern,
    get_induction_head_detection_pattern,
    get_previous_token_head_detection_pattern,
)
from transformer_lens.hook_points import HookPoint

from mechgrok.errors import ShapeError
from mechgrok.measures.needs import check_fits, visible_positions
from mechgrok.model import shares
from mechgrok.types import Examples

AttentionKind = Literal["previous-token", "current-token", "first-token", "duplicate-token"]
ATTENTION_KINDS: tuple[AttentionKind, ...] = ("previous-token", "current-token", "first-token", "duplicate-token")
MAX_BLOCK = 25  # tokens of a repeated block, as in Olsson et al. 2022
N_ROWS = 64

Keys = Callable[[Tensor], Tensor]  # tokens Int[row, pos] -> Bool[row, query, key], the keys that are asked about


@dataclass(frozen=True)
class AttentionScores:
    """Mean attention of every head to the keys of one kind, over the queries that have such a key.

    score: Float64[head]. chance: the score of uniform attention over the visible positions, on the same queries: the
    mean of (visible keys of the kind) / (visible positions).
    spread: Float64[head], the standard deviation of the score if each query's weights were shuffled over its
    visible positions, alike for all queries of a row (so that a head with a fixed offset is not thought sure), and
    independently between rows. NaN where no query has such a key.
    """

    score: Tensor
    chance: float
    spread: Tensor

    @property
    def times_chance(self) -> Tensor:
        """Float64[head], 1 for uniform attention."""
        return self.score / self.chance


@dataclass(frozen=True)
class RepeatedTokens:
    """Rows of random distinct tokens, repeated: a start token if there is one, then the block again and again.

    tokens: Int[row, pos]. targets: Int[row, pos], the token that comes next in the repeated block.
    first, second: Bool[row, pos], the positions of the block's first and second copy. Each row has a block length of
    its own, so a fixed offset finds no match. start: 1 where there is a start token, else 0.
    """

    tokens: Tensor
    targets: Tensor
    first: Tensor
    second: Tensor
    start: int

    @property
    def examples(self) -> Examples:
        """The rows with their second copies scored: there alone the next token follows from the context."""
        return Examples(self.tokens, self.targets, self.second.float())


def repeated_tokens(
    rng: torch.Generator, n_ctx: int, plain: Sequence[int], bos: int | None, n_rows: int = N_ROWS
) -> RepeatedTokens:
    """Random blocks of distinct tokens, repeated, with block lengths uniform between half the longest and the longest.

    The longest is MAX_BLOCK, or what the vocabulary and two copies in the context allow. Olsson et al. 2022 repeat
    one length four times; the jitter and the distinct tokens are ours, as are the two scored copies.

    Args:
        plain: ids that the block may be made of. bos: the start token, None for none.

    Raises:
        ShapeError: the context or the vocabulary is too small for two copies of two tokens.
    """
    start = int(bos is not None)
    longest = min(MAX_BLOCK, len(plain), (n_ctx - start) // 2)
    if longest < 2:
        raise ShapeError(
            f"repeats need two plain tokens and a context of {4 + start}, got {len(plain)} and {n_ctx}; "
            "use a task with longer rows"
        )
    lengths = torch.randint(max(2, (longest + 1) // 2), longest + 1, (n_rows, 1), generator=rng)
    order = torch.stack([torch.randperm(len(plain), generator=rng)[:longest] for _ in range(n_rows)])
    blocks = torch.tensor(plain)[order]
    place = torch.arange(2 * longest).expand(n_rows, -1)
    tokens, targets = blocks.gather(1, place % lengths), blocks.gather(1, (place + 1) % lengths)
    first, second = place < lengths, (place >= lengths) & (place < 2 * lengths)
    if bos is not None:
        tokens, targets = (torch.nn.functional.pad(ids, (1, 0), value=bos) for ids in (tokens, targets))
        first, second = (torch.nn.functional.pad(mask, (1, 0)) for mask in (first, second))
    return RepeatedTokens(tokens, targets, first, second, start)


def shuffle_first(repeats: RepeatedTokens, rng: torch.Generator) -> Tensor:
    """The tokens with those of each first copy in another, random order: what is to come has been seen, but not how."""
    tokens = repeats.tokens.clone()
    for row, first in zip(tokens, repeats.first, strict=True):
        own = row[first]
        row[first] = own[torch.randperm(len(own), generator=rng)]
    return tokens


def attention_scores(model: HookedTransformer, examples: Examples) -> dict[str, AttentionScores]:
    """Attention to the previous, the current, the first and earlier equal tokens, by kind.

    Mean over queries of sum over the kind's keys of the attention pattern, in all rows at every position from the
    third on (before it, the first, the previous and the current position are not three). A query without an earlier
    equal token does not count for "duplicate-token".
    """
    n_pos = examples.tokens.shape[1]

    def fixed(pattern: Tensor) -> Keys:
        return lambda tokens: pattern.bool().expand(len(tokens), -1, -1)

    first = torch.zeros(n_pos, n_pos)
    first[:, 0] = 1
    previous = get_previous_token_head_detection_pattern(examples.tokens[:1])
    keys = (fixed(previous), fixed(torch.eye(n_pos)), fixed(first), _rows(get_duplicate_token_head_detection_pattern))
    return _scores(model, examples, dict(zip(ATTENTION_KINDS, keys, strict=True)))


def prefix_matching(model: HookedTransformer, repeats: RepeatedTokens) -> AttentionScores:
    """Attention from a repeated token to the position that *followed* its earlier copy, over second copies.

    Olsson et al. 2022 with the erratum ("followed", not "preceded"). Each query has one such key, as tokens are
    distinct within a block.
    """
    keys = {"prefix": _rows(get_induction_head_detection_pattern)}
    return _scores(model, repeats.examples, keys, repeats.second)["prefix"]


def _rows(pattern: Callable[[Tensor], Tensor]) -> Keys:
    """TransformerLens's detection patterns take one prompt."""
    return lambda tokens: torch.stack([pattern(row[None]) for row in tokens]).bool()


@torch.no_grad()
def _scores(
    model: HookedTransformer, examples: Examples, kinds: Mapping[str, Keys], queries: Tensor | None = None
) -> dict[str, AttentionScores]:
    check_fits(model, examples)
    tokens = examples.tokens
    n_rows, n_pos = tokens.shape
    if queries is None:
        queries = (torch.arange(n_pos) >= 2).expand(n_rows, -1)
    parts: dict[str, list[_Sums]] = {name: [] for name in kinds}
    for rows in shares(model, examples):
        for name, sums in _chunk_sums(model, tokens[rows], queries[rows], kinds).items():
            parts[name].append(sums)
    scores = {}
    for name, of in parts.items():
        n_queries = sum(part.n_queries for part in of) or float("nan")
        hit, variance = (torch.stack([getattr(p, field) for p in of]).sum(0).flatten() for field in ("hit", "variance"))
        chance = sum(part.chance for part in of) / n_queries
        scores[name] = AttentionScores(hit / n_queries, chance, variance.sqrt() / n_queries)
    return scores


@dataclass(frozen=True)
class _Sums:
    """Sums over the queries of some rows: of attention and its variance under shuffling, [layer, head], and chance."""

    hit: Tensor
    variance: Tensor
    chance: float
    n_queries: int


def _chunk_sums(
    model: HookedTransformer, tokens: Tensor, queries: Tensor, kinds: Mapping[str, Keys]
) -> dict[str, _Sums]:
    cfg = model.cfg
    can_see = visible_positions(model, tokens)
    visible = can_see.sum(-1).clamp(min=1).double()  # [row, query]
    empty = torch.zeros(cfg.n_layers, cfg.n_heads, dtype=torch.float64)
    masks, sums = {}, {}
    for name, keys in kinds.items():
        mask = keys(tokens) & can_see
        counted = mask.any(-1) & queries
        masks[name] = mask & counted[..., None]
        chance = float((masks[name].sum(-1) / visible).sum())
        sums[name] = _Sums(empty.clone(), empty.clone(), chance, int(counted.sum()))

    def read(pattern: Tensor, hook: HookPoint) -> None:
        concentration = pattern.square().sum(-1, dtype=torch.float64)  # [row, head, query]
        among = visible[:, None]
        single = (concentration / among - among**-2).clamp(min=0)  # variance of one weight among its row's
        for name, mask in masks.items():
            n_keys = mask.sum(-1)[:, None]  # [row, 1, query], 0 where the query is not counted
            drawn = n_keys * (among - n_keys) / (among - 1).clamp(min=1)  # without replacement
            sums[name].hit[hook.layer()] += torch.einsum("bhqk,bqk->h", pattern, mask.to(pattern.dtype)).double()
            sums[name].variance[hook.layer()] += (drawn * single).sqrt().sum(-1).square().sum(0)

    model.run_with_hooks(
        tokens,
        stop_at_layer=cfg.n_layers,  # no logits are needed
        fwd_hooks=[(lambda name: name.endswith("attn.hook_pattern"), read)],
    )
    return sums
