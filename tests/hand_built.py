"""Attention-only models whose heads are known by construction: one of two layers, and one of any tables.

Eight tokens after a start token 0, 24 positions, no LayerNorm. The residual stream is [token 9 | position 24 | prev 9 |
out 9 | junk 9]; only `out` is unembedded. L0H0 attends to the previous token and writes it to `prev`. L0H2 attends two
back and writes junk. L1H0 and L1H1, twins of half the gain, look for the position whose `prev` is the current token and
write its token to `out`: induction. L1H2, the decoy, attends like them and writes junk. The others are zero.

`table_model` has one layer, whose heads look and write as tables of tokens say, and nothing besides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from mechgrok import seeds
from mechgrok.config import ModelConfig
from mechgrok.model import build_model, model_from_parameters
from mechgrok.types import Examples, Split

N_PLAIN, N_CTX, D_HEAD = 8, 24, 24
N_TOKENS = N_PLAIN + 1
PREVIOUS, OFFSET, TWINS, DECOY = "L0H0", "L0H2", ("L1H0", "L1H1"), "L1H2"
DEAD = ("L0H1", "L0H3", "L1H3")
NAMES = [f"L{layer}H{head}" for layer in range(2) for head in range(4)]
INDEX = {name: index for index, name in enumerate(NAMES)}

TOKEN, POSITION = slice(0, 9), slice(9, 33)
PREV, OUT, JUNK = slice(33, 42), slice(42, 51), slice(51, 60)
CONFIG = ModelConfig(n_layers=2, d_model=60, n_heads=4, d_head=D_HEAD, init_std=1.0)
GAIN = 8.0  # of the unembedding
SHARP = 40.0  # the attention score of a match; the others have 0


def twice(n_rows: int, rng: torch.Generator) -> Examples:
    """BOS and a permutation of the eight plain tokens, twice; scored where the second copy follows from the first."""
    order = torch.stack([1 + torch.randperm(N_PLAIN, generator=rng) for _ in range(n_rows)])
    rows = torch.cat([torch.zeros(n_rows, 1, dtype=torch.long), order, order], dim=1)
    weights = torch.zeros(n_rows, 16)
    weights[:, 9:] = 1.0
    return Examples(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), weights)


def full_rows(n_rows: int, rng: torch.Generator) -> Examples:
    """Rows of the whole context: BOS, then permutations of the plain tokens, every position scored."""
    repeats = [torch.stack([1 + torch.randperm(N_PLAIN, generator=rng)]).repeat(1, 3) for _ in range(n_rows)]
    rows = torch.cat([torch.zeros(n_rows, 1, dtype=torch.long), torch.cat(repeats)], dim=1)
    return Examples(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), torch.ones(n_rows, N_CTX))


def split() -> Split:
    train, test = (full_rows(64, seeds.stream(0, side)) for side in ("train", "test"))
    return Split(train, test, tuple(map(str, range(N_TOKENS))), N_TOKENS, bos=0)


SPLIT = split()


def cut(examples: Examples, n_pos: int) -> Examples:
    """The first positions of every row."""
    return Examples(examples.tokens[:, :n_pos], examples.targets[:, :n_pos], examples.weights[:, :n_pos])


def hand_built_model() -> HookedTransformer:
    parameters = {name: torch.zeros_like(q) for name, q in build_model(CONFIG, SPLIT, 0).named_parameters()}
    parameters["embed.W_E"][:, TOKEN] = torch.eye(N_TOKENS)
    parameters["pos_embed.W_pos"][:, POSITION] = torch.eye(N_CTX)
    parameters["unembed.W_U"][OUT] = GAIN * torch.eye(N_TOKENS)
    _attend_back(parameters, 0, 1, PREV)
    _attend_back(parameters, 2, 2, JUNK)
    for head, writes, gain in ((0, OUT, 0.5), (1, OUT, 0.5), (2, JUNK, 1.0)):
        _match_previous(parameters, head, writes, gain)
    return model_from_parameters(CONFIG, SPLIT, parameters)


def _attend_back(parameters: dict[str, Tensor], head: int, by: int, writes: slice) -> None:
    """Position i looks for i - by, and writes its token; the first positions look for the very first."""
    source = torch.zeros(N_CTX, D_HEAD)
    source[torch.arange(N_CTX), (torch.arange(N_CTX) - by).clamp(min=0)] = 1
    attn = "blocks.0.attn"
    parameters[f"{attn}.W_Q"][head, POSITION] = SHARP * D_HEAD**0.5 * source
    parameters[f"{attn}.W_K"][head, POSITION] = torch.eye(N_CTX)
    _carry_token(parameters, attn, head, writes, 1.0)


def _match_previous(parameters: dict[str, Tensor], head: int, writes: slice, gain: float) -> None:
    attn = "blocks.1.attn"
    parameters[f"{attn}.W_Q"][head, TOKEN, :N_TOKENS] = SHARP * D_HEAD**0.5 * torch.eye(N_TOKENS)
    parameters[f"{attn}.W_K"][head, PREV, :N_TOKENS] = torch.eye(N_TOKENS)
    _carry_token(parameters, attn, head, writes, gain)


def _carry_token(parameters: dict[str, Tensor], attn: str, head: int, writes: slice, gain: float) -> None:
    parameters[f"{attn}.W_V"][head, TOKEN, :N_TOKENS] = torch.eye(N_TOKENS)
    parameters[f"{attn}.W_O"][head, :N_TOKENS, writes] = gain * torch.eye(N_TOKENS)


@dataclass(frozen=True)
class TableHead:
    """From position i with token a it attends to position j with token b by softmax(looks[a, b] + where[i, j]).

    Each token c gets writes[b, c] on its logit. where: None for nowhere in particular.
    """

    looks: Tensor
    writes: Tensor
    where: Tensor | None = None


def table_model(split: Split, heads: Sequence[TableHead]) -> HookedTransformer:
    """One layer of these heads; all logits are 0 but for what they write.

    The residual stream is [token | position | out]; only `out` is unembedded.
    """
    n, n_ctx = split.n_classes, split.test.tokens.shape[1]
    read = n + n_ctx
    config = ModelConfig(n_layers=1, d_model=read + n, n_heads=len(heads), d_head=read, init_std=1.0)
    parameters = {name: torch.zeros_like(q) for name, q in build_model(config, split, 0).named_parameters()}
    parameters["embed.W_E"][:, :n] = torch.eye(n)
    parameters["pos_embed.W_pos"][:, n:read] = torch.eye(n_ctx)
    parameters["unembed.W_U"][read:] = torch.eye(n)
    for index, head in enumerate(heads):
        where = torch.zeros(n_ctx, n_ctx) if head.where is None else head.where
        attn = "blocks.0.attn"
        parameters[f"{attn}.W_Q"][index, :read] = read**0.5 * torch.eye(read)
        parameters[f"{attn}.W_K"][index, :read] = torch.block_diag(head.looks, where).T
        parameters[f"{attn}.W_V"][index, :n, :n] = torch.eye(n)
        parameters[f"{attn}.W_O"][index, :n, read:] = head.writes
    return model_from_parameters(config, split, parameters)
