"""Documents -> tokens -> rows: what every task of real text does with its text.

Train and test are told apart by document. The documents of a side are joined, with the beginning-of-row
token between them, and cut into rows; a row is that token and the next n_ctx - 1 of the text.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import tokenizers
import torch
from torch import Tensor

from mechgrok import seeds
from mechgrok.errors import ConfigError
from mechgrok.store import cached_json
from mechgrok.task_config import HuggingFaceConfig, TextConfig
from mechgrok.tasks.next_token import next_token_examples
from mechgrok.tasks.tokenizer import (
    bos_id,
    encode,
    parse_tokenizer,
    read_tokenizer,
    special_ids,
    token_names,
    train_tokenizer,
)
from mechgrok.types import Examples, Split

SAMPLE = 2_000_000  # characters of each source that a tokenizer is trained on

LanguageConfig = TextConfig | HuggingFaceConfig


@dataclass(frozen=True)
class Document:
    """A text, and the name of where it is from: documents of one key are never on two sides of the split."""

    key: str
    text: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


Sources = Mapping[str, Sequence[Document]]


def text_split(sources: Sources, config: LanguageConfig, seed: int) -> Split:
    """Rows of tokens from documents; every position but the last is scored, on the token that follows.

    train and test: n_train and n_test rows of the sources in the shares of `config.mixture`, in random
    order. distributions: n_test rows of each source alone, of held-out documents or of those trained on as
    `config.distributions_from` says. Rows are drawn without replacement.

    Raises:
        ConfigError: too few documents or rows, no such tokenizer, a vocabulary larger than the text allows.
    """
    sources = without_copies(sources)
    held_out = held_out_keys(sources, config.test_fraction, seed)
    tokenizer, tokens = _tokenized(sources, config)
    bos = bos_id(tokenizer, config.bos_token)

    def rows(name: str, side: str, n: int) -> Tensor:
        """The first n of the side's rows in a random order that n does not change."""
        pairs = zip(sources[name], tokens[name], strict=True)
        chosen = [ids for document, ids in pairs if (document.key in held_out) == (side == "test")]
        every = rows_of(chosen, bos, config.n_ctx)
        if len(every) < n:
            raise ConfigError(
                f"{name} has {len(every)} rows of {config.n_ctx} tokens for {side}, and {n} are asked for; "
                f"lower n_{side} or n_ctx, change test_fraction, or give more text"
            )
        return every[torch.randperm(len(every), generator=seeds.stream(seed, "rows", name, side))[:n]]

    def mixed(side: str, n: int) -> Examples:
        together = torch.cat([rows(name, side, k) for name, k in _shares(config, n)])
        return next_token_examples(together[torch.randperm(n, generator=seeds.stream(seed, "mixture", side))])

    labels = token_names(tokenizer)
    return Split(
        train=mixed("train", config.n_train),
        test=mixed("test", config.n_test),
        labels=labels,
        n_classes=len(labels),
        distributions={
            name: next_token_examples(rows(name, config.distributions_from, config.n_test)) for name in sources
        },
        bos=bos,
        plain=tuple(sorted(set(range(len(labels))) - special_ids(tokenizer) - {bos})),
    )


def rows_of(documents: Sequence[Sequence[int]], bos: int, n_ctx: int) -> Tensor:
    """Documents joined with `bos` between them, cut into rows of bos and n_ctx - 1 tokens: Int[row, pos].

    What is left at the end, less than a row, is dropped.
    """
    joined = np.concatenate(
        [np.array([*document, bos], dtype=np.int64) for document in documents] or [np.zeros(0, int)]
    )
    n_rows = len(joined) // (n_ctx - 1)
    body = torch.from_numpy(joined[: n_rows * (n_ctx - 1)].reshape(n_rows, n_ctx - 1))
    return torch.cat([torch.full((n_rows, 1), bos), body], dim=1)


def without_copies(sources: Sources) -> dict[str, list[Document]]:
    """The documents without empty ones and without exact copies of earlier ones, which could lie on both sides."""
    seen: set[str] = set()
    kept: dict[str, list[Document]] = {}
    for name, documents in sources.items():
        kept[name] = []
        for document in documents:
            digest = document.digest
            if document.text.strip() and digest not in seen:
                seen.add(digest)
                kept[name].append(document)
    return kept


def held_out_keys(sources: Sources, fraction: float, seed: int) -> frozenset[str]:
    """The keys of the documents that are not trained on: of each source that share, at least one, and not all.

    A key that two sources share (a module's code and its docstrings) is decided once, with the first.
    """
    decided: set[str] = set()
    held_out: set[str] = set()
    for name, documents in sources.items():
        keys = sorted({document.key for document in documents})
        if len(keys) < 2:
            raise ConfigError(
                f"{name} holds {len(keys)} documents, and both sides of the split need one; give more text"
            )
        keys = [key for key in keys if key not in decided]
        order = torch.randperm(len(keys), generator=seeds.stream(seed, "documents", name)).tolist()
        n = min(max(1, round(fraction * len(keys))), len(keys) - 1)
        held_out |= {keys[i] for i in order[: max(n, 0)]}
        decided |= set(keys)
    return frozenset(held_out)


def _shares(config: LanguageConfig, n: int) -> Iterator[tuple[str, int]]:
    """How many of n rows come from each source; they add up to n."""
    ends = np.rint(n * np.cumsum([0.0, *config.mixture])).astype(int)
    return zip(config.names, (int(b - a) for a, b in pairwise(ends)), strict=True)


def _tokenized(sources: Sources, config: LanguageConfig) -> tuple[tokenizers.Tokenizer, dict[str, list[list[int]]]]:
    """The tokenizer and every document's tokens; cached, as they do not depend on the seed."""
    given = None if config.tokenizer is None else read_tokenizer(config.tokenizer)
    digests = [[name, [document.digest for document in documents]] for name, documents in sources.items()]
    settings = [config.vocabulary, config.bos_token, given, SAMPLE]
    key = {"tokens of": digests, "settings": settings, "tokenizers": tokenizers.__version__, "format": 1}

    def make() -> dict[str, object]:
        if given is not None:
            tokenizer = parse_tokenizer(given, str(config.tokenizer))
        else:
            assert config.vocabulary is not None  # the settings have one of the two
            tokenizer = train_tokenizer(_sample(sources), config.vocabulary, config.bos_token)
        tokens = {name: encode(tokenizer, [document.text for document in sources[name]]) for name in sources}
        return {"tokenizer": tokenizer.to_str(), "tokens": tokens}

    made = cached_json(key, make)
    return parse_tokenizer(made["tokenizer"], "the cached tokenizer"), made["tokens"]


def _sample(sources: Sources) -> Iterator[str]:
    """Whole documents of each source, in the order of their digests, which is as good as random and the same always."""
    for documents in sources.values():
        taken = 0
        for document in sorted(documents, key=lambda document: document.digest):
            if taken < SAMPLE:
                yield document.text
            taken += len(document.text)
