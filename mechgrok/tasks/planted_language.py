"""A language whose every regularity is known: bigrams, n-grams, skip n-grams, brackets and repeated segments.

Every row begins with BOS. The next token is decided by the first of these that applies:

    n-gram    the rest of a planted n-gram that has begun
    repeat    the rest of a copy of an earlier segment that has begun; it ends before a token that is not plain
    skip      after the skip closer "e": g(s), where s is the last skip opener
    a draw    with its rate, the start of an n-gram or of a copy, an opening bracket, the bracket that closes
              the last one open, a skip opener, the skip closer; else a token of the bigram chain

so each position has a `kind`: what made it, and a `floor`: the nats that it costs who knows the tables and all that
the generator has begun, so 0 where something has. The bigram chain gives `n_successors` plain tokens to each token
with probabilities falling as 1/rank, and with `noise` any plain token. Tables are drawn from the stream
(seed, "language"), rows from (seed, "rows", distribution, side). The mechanisms follow the stages that
Hoogland et al. 2024 (arXiv:2402.02364) and Wang et al. 2024 (arXiv:2410.02984) saw in language; the generator is ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from mechgrok import seeds
from mechgrok.task_config import MechanismRates, PlantedLanguageConfig
from mechgrok.tasks.next_token import next_token_examples
from mechgrok.types import Examples, Split

KINDS = ("bigram", "free", "ngram", "skip", "repeat", "close")
BIGRAM, FREE, NGRAM, SKIP, REPEAT, CLOSE = range(len(KINDS))
BOS = 0
MAX_DEPTH = 4  # of brackets
PREFIX = 2  # tokens of an n-gram that come before it can be known


@dataclass(frozen=True)
class Language:
    """The tables. openers, closers: brackets in pairs; skips: s of "s ... e -> g(s)"; plain: all other tokens.

    chain: Float[token, token], rows sum to 1. ngrams: Int[ngram, length]. skip_targets: Int[skip], g of each s.
    """

    openers: np.ndarray
    closers: np.ndarray
    skips: np.ndarray
    skip_closer: int
    plain: np.ndarray
    chain: np.ndarray
    ngrams: np.ndarray
    skip_targets: np.ndarray

    @property
    def n_tokens(self) -> int:
        return len(self.chain)

    @property
    def labels(self) -> tuple[str, ...]:
        """What to print for each token."""
        names = {BOS: "BOS", self.skip_closer: "e"}
        brackets = zip(self.openers, self.closers, ("()", "[]", "{}", "⟨⟩"), strict=False)
        names |= {int(token): text for pair in brackets for token, text in zip(pair[:2], pair[2], strict=True)}
        names |= {int(token): f"s{i}" for i, token in enumerate(self.skips)}
        names |= {int(token): f"w{i}" for i, token in enumerate(self.plain)}
        return tuple(names[token] for token in range(self.n_tokens))

    @property
    def n_multigrams(self) -> int:
        """N-grams and skip n-grams together."""
        return len(self.ngrams) + len(self.skips)

    def multigram(self, source: int, token: int, target: int, contiguous: bool) -> int | None:
        """Which planted multigram says that `target` follows `token` after `source`, None if none does.

        N-grams come first, then skip n-grams. Of an n-gram, any two of its tokens may be meant that stand before the
        target, the later one directly; contiguous: nothing stands between source and token.
        """
        for index, ngram in enumerate(self.ngrams.tolist()):
            for at in range(PREFIX, len(ngram)):
                earlier = ngram[at - 2 : at - 1] if contiguous else ngram[: at - 2]
                if (ngram[at - 1], ngram[at]) == (token, target) and source in earlier:
                    return index
        if token == self.skip_closer and source in self.skips:
            at = int(source - self.skips[0])
            return len(self.ngrams) + at if self.skip_targets[at] == target else None
        return None


class Rows(NamedTuple):
    """Of each position of a row: tokens, kinds: Int[row, pos]; floors: Float[row, pos], nats, NaN unless asked for."""

    tokens: np.ndarray
    kinds: np.ndarray
    floors: np.ndarray


def make_split(config: PlantedLanguageConfig, seed: int) -> Split:
    """Train and test rows at the configured rates, and test-sized rows of every other named distribution."""
    language = make_language(config, seed)

    def rows(n: int, rates: MechanismRates, name: str, floors: bool = False) -> Rows:
        rng = np.random.default_rng(seeds.derive(seed, "rows", name))
        return sample_rows(language, rates, n, config.n_ctx, rng, floors)

    def examples(drawn: Rows) -> Examples:
        return next_token_examples(torch.from_numpy(drawn.tokens))

    test = rows(config.n_test, config.rates, "test", floors=True)
    kinds, floors = (torch.from_numpy(np.roll(values, -1, axis=1)) for values in test[1:])  # of the targets
    return Split(
        train=examples(rows(config.n_train, config.rates, "train")),
        test=examples(test),
        labels=language.labels,
        n_classes=language.n_tokens,
        distributions={
            name: examples(rows(config.n_refined, rates, name)) for name, rates in config.distributions.items()
        },
        bos=BOS,
        plain=tuple(int(token) for token in language.plain),
        kinds=kinds,
        kind_names=KINDS,
        floors=floors,
        language=language,
    )


def make_language(config: PlantedLanguageConfig, seed: int) -> Language:
    """The tables that the settings and the seed give."""
    rng = np.random.default_rng(seeds.derive(seed, "language"))
    first_closer = 1 + config.n_brackets
    first_skip = first_closer + config.n_brackets
    skip_closer = first_skip + config.n_skips
    plain = np.arange(skip_closer + 1, skip_closer + 1 + config.n_plain)
    n_tokens = int(plain[-1]) + 1
    chain = np.zeros((n_tokens, n_tokens))
    chain[:, plain] = config.noise / len(plain)
    falling = 1 / np.arange(1, config.n_successors + 1)
    for token in range(n_tokens):
        successors = rng.choice(plain, config.n_successors, replace=False)
        chain[token, successors] += (1 - config.noise) * falling / falling.sum()
    return Language(
        openers=np.arange(1, first_closer),
        closers=np.arange(first_closer, first_skip),
        skips=np.arange(first_skip, skip_closer),
        skip_closer=skip_closer,
        plain=plain,
        chain=chain,
        ngrams=_ngrams(config, plain, rng),
        skip_targets=rng.choice(plain, config.n_skips, replace=False),
    )


def _ngrams(config: PlantedLanguageConfig, plain: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """N-grams in which every two neighbours occur once: two tokens of one tell the rest."""
    chosen: list[np.ndarray] = []
    pairs: set[tuple[int, int]] = set()
    while len(chosen) < config.n_ngrams:
        ngram = rng.choice(plain, config.ngram_length, replace=False)
        own = {(int(a), int(b)) for a, b in zip(ngram, ngram[1:], strict=False)}
        if not own & pairs:
            chosen.append(ngram)
            pairs |= own
    return np.array(chosen)


def sample_rows(
    language: Language, rates: MechanismRates, n: int, length: int, rng: np.random.Generator, with_floors: bool = False
) -> Rows:
    """Rows of this length, whose first token is BOS. All advance together, one position at a time."""
    rows = np.arange(n)
    tokens, kinds, floors = np.full((n, length), BOS), np.full((n, length), FREE), np.zeros((n, length))
    floors[:, 1:] = 0.0 if with_floors else np.nan
    cumulative = language.chain.cumsum(1)
    is_plain = np.isin(np.arange(language.n_tokens), language.plain)
    ngram, ngram_at = np.zeros(n, int), np.zeros(n, int)  # which n-gram, and its next token; 0: none has begun
    source, copied, left = np.zeros(n, int), np.zeros(n, int), np.zeros(n, int)  # of a copy
    stack, depth = np.zeros((n, MAX_DEPTH), int), np.zeros(n, int)
    last_skip = np.full(n, -1)
    for t in range(1, length):
        previous = tokens[:, t - 1]
        token = (rng.random(n)[:, None] >= cumulative[previous]).sum(1).clip(max=language.n_tokens - 1)
        kind = np.full(n, BIGRAM)
        draw, which = rng.random(n), rng.random(n)
        n_copied = rng.integers(rates.repeat_length[0], rates.repeat_length[1] + 1, n)
        start = 1 + (which * np.maximum(t - n_copied, 1)).astype(int)

        in_ngram = ngram_at > 0
        in_copy = ~in_ngram & (left > 0) & is_plain[tokens[rows, source]]
        left[~in_copy] = 0
        after_closer = ~in_ngram & ~in_copy & (previous == language.skip_closer)
        free = ~in_ngram & ~in_copy & ~after_closer
        possible = {
            "ngram": free,
            "repeat": free & (t > rates.repeat_length[1]),
            "open": free & (depth < MAX_DEPTH),
            "close": free & (depth > 0),
            "skip_open": free,
            "skip_close": free & (last_skip >= 0),
        }
        starts = _events(draw, possible, rates)
        to_close = language.closers[stack[rows, depth - 1]]

        for mask, value in (
            (starts["open"], language.openers[(which * len(language.openers)).astype(int)]),
            (starts["skip_open"], language.skips[(which * len(language.skips)).astype(int)]),
            (starts["skip_close"], np.full(n, language.skip_closer)),
            (starts["ngram"], language.ngrams[(which * len(language.ngrams)).astype(int), 0]),
        ):
            token[mask], kind[mask] = value[mask], FREE
        begun = starts["ngram"]
        ngram[begun], ngram_at[begun] = (which[begun] * len(language.ngrams)).astype(int), 0
        copying = starts["repeat"] & is_plain[tokens[rows, start]]
        source[copying], left[copying], copied[copying] = start[copying], n_copied[copying], 0
        copies = in_copy | copying
        token[copies] = tokens[rows, source][copies]
        kind[copies] = np.where(copied[copies] >= PREFIX, REPEAT, FREE)
        token[in_ngram] = language.ngrams[ngram, ngram_at][in_ngram]
        kind[in_ngram] = np.where(ngram_at[in_ngram] >= PREFIX, NGRAM, FREE)
        closing = starts["close"]
        token[closing] = to_close[closing]
        kind[closing] = CLOSE
        token[after_closer] = language.skip_targets[last_skip[after_closer] - language.skips[0]]
        kind[after_closer] = SKIP
        if with_floors:
            chance = _probability(language, rates, tokens[:, :t], token, possible, to_close)
            floors[free, t] = -np.log(chance[free])

        opening = starts["open"]
        stack[opening, depth[opening]] = token[opening] - language.openers[0]
        depth += opening.astype(int) - closing
        last_skip[starts["skip_open"]] = token[starts["skip_open"]]
        source, copied, left = source + copies, copied + copies, left - copies
        ngram_at = np.where(in_ngram | begun, (ngram_at + 1) % language.ngrams.shape[1], 0)
        tokens[:, t], kinds[:, t] = token, kind
    return Rows(tokens, kinds, floors)


def _events(draw: np.ndarray, possible: Mapping[str, np.ndarray], rates: MechanismRates) -> Mapping[str, np.ndarray]:
    """Which rows begin what: {event: bool[row]}, at most one for each row; what cannot begin yet gives a bigram."""
    found, low = {}, 0.0
    for event, mask in possible.items():
        high = low + getattr(rates, event)
        found[event] = mask & (draw >= low) & (draw < high)
        low = high
    return found


def _probability(
    language: Language,
    rates: MechanismRates,
    before: np.ndarray,
    token: np.ndarray,
    possible: Mapping[str, np.ndarray],
    to_close: np.ndarray,
) -> np.ndarray:
    """Of each row's token, Float[row], after the tokens `before`, where nothing has begun that decides it.

    The sum over events of the chance of each, if possible, times that of this token given the event, and what is left
    times the bigram chain; a copy that would begin at a token that is not plain gives a bigram too.
    """
    copied, plain = np.zeros(len(token)), np.zeros(len(token))  # of a copy's first token: is it this one? is it plain?
    lengths = range(rates.repeat_length[0], rates.repeat_length[1] + 1)
    for n_copied in lengths if possible["repeat"].any() else ():
        first = before[:, 1 : 1 + max(before.shape[1] - n_copied, 1)]
        is_plain = np.isin(first, language.plain)
        copied += (is_plain & (first == token[:, None])).mean(1) / len(lengths)
        plain += is_plain.mean(1) / len(lengths)
    given = {
        "ngram": (language.ngrams[:, 0] == token[:, None]).mean(1),
        "repeat": copied,
        "open": np.isin(token, language.openers) / len(language.openers),
        "close": token == to_close,
        "skip_open": np.isin(token, language.skips) / len(language.skips),
        "skip_close": token == language.skip_closer,
    }
    chances = {event: getattr(rates, event) * mask for event, mask in possible.items()}
    rest = 1 - sum(chances.values()) + chances["repeat"] * (1 - plain)
    begun = sum(chances[event] * given[event] for event in chances)
    return begun + rest * language.chain[before[:, -1], token]
