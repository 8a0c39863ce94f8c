"""Does a head raise the logit of what it attends to? By its own logits on random tokens, and by its eigenvalues.

Both take class i for token i, so they are of models whose classes are tokens. What lies between a head's z and the
logits is read off the weights; a hook on it has no part in these numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from mechgrok.errors import MeasureError
from mechgrok.measures.attention import RepeatedTokens


@dataclass(frozen=True)
class CopyingScores:
    """share: Float64[head], NaN for a head that raises no logit; chance: the share of any one token of the sample.

    error: Float64[head], the standard error of the share over rows.
    """

    share: Tensor
    chance: float
    error: Tensor

    @property
    def rescaled(self) -> Tensor:
        """2 share - 1, in [-1, 1]. (The text of Olsson et al. maps 0 ... 0.5 there instead, which is 4 share - 1.)"""
        return 2 * self.share - 1

    @property
    def times_chance(self) -> Tensor:
        """Float64[head], 1 for a head whose logits know nothing of what it attends to."""
        return self.share / self.chance


@torch.no_grad()
def copying_scores(model: HookedTransformer, repeats: RepeatedTokens, queries: Tensor) -> CopyingScores:
    """Share of what a head raises that goes to the token it attends to most, among the tokens of the sample.

    At every query: the head's own logits z W_O W_U of the block's tokens, less their mean over the vocabulary, ReLU;
    of their sum, the part on the token that gets the largest attention weight (a start token is passed over).
    Mean over a row's queries where the head raises anything, then over rows. Olsson et al. 2022 use tokens that do
    not repeat: `queries=repeats.first`. With `repeats.second`, an induction head attends to what it matches.

    LayerNorm's scale cancels in the share; its centring and gain are applied, its bias is no head's.

    Args:
        queries: Bool[row, pos].

    Raises:
        MeasureError: a token of the blocks is no class of the model.
    """
    n_classes = model.cfg.d_vocab_out
    if (largest := int(repeats.tokens[:, repeats.start :].max())) >= n_classes:
        raise MeasureError(
            f"copying compares token i with class i, and token {largest} is none of the model's {n_classes} classes; "
            "repeat tokens that are classes too"
        )
    read, hooks = _output_readers(model), ("attn.hook_z", "attn.hook_pattern")
    _, cache = model.run_with_cache(  # no logits are needed
        repeats.tokens, names_filter=lambda name: name.endswith(hooks), stop_at_layer=model.cfg.n_layers
    )
    keys = repeats.tokens
    directions = read[:, keys.clamp(max=n_classes - 1)]  # [d_model, row, key]; the start token, maybe none, is left out
    shares = []
    for layer in range(model.cfg.n_layers):
        z, pattern = (cache[f"blocks.{layer}.{hook}"] for hook in hooks)
        for head in range(model.cfg.n_heads):
            attended = pattern[:, head, :, repeats.start :].argmax(-1) + repeats.start  # [row, query]
            own = z[:, :, head] @ model.W_O[layer, head]
            raised = torch.einsum("rqd,drk->rqk", own, directions).relu().double()
            raised = raised * repeats.first[:, None]  # each token of the sample once
            copied = raised * (keys[:, None] == keys.gather(1, attended)[..., None])
            total = raised.sum(-1)
            counts = queries & (total > 0)
            share = torch.where(counts, copied.sum(-1) / total, 0.0).sum(1) / counts.sum(1)
            shares.append(share[counts.any(1)])
    length = repeats.first.sum(1).double()
    return CopyingScores(
        torch.stack([share.mean() for share in shares]),
        float((1 / length).mean()),
        torch.stack(
            [(share.square().mean() - share.mean() ** 2).clamp(min=0).div(len(share)).sqrt() for share in shares]
        ),
    )


@torch.no_grad()
def eigenvalue_copying(model: HookedTransformer, tokens: Sequence[int] | None = None) -> Tensor:
    """sum Re(lambda) / sum |lambda| over the eigenvalues of W_E W_V W_O W_U, in [-1, 1]: Float64[head].

    1 for a head that raises every token's own logit. Chance is 0, by symmetry under W_O -> -W_O. NaN for a dead head,
    and for all where a weight is not finite. Elhage et al. 2021, on the weights as they are: no scale, gain or bias of
    a LayerNorm.

    The products are TransformerLens's FactoredMatrix, whose eigenvalues come from the d_head x d_head side.

    Args:
        tokens: the ids that mean the same as a token and as a class; None for all.

    Raises:
        MeasureError: a model of as many classes as tokens is needed for None, and ids that are both.
    """
    n_tokens, n_classes = model.cfg.d_vocab, model.cfg.d_vocab_out
    if tokens is None and n_tokens != n_classes:
        raise MeasureError(
            f"copying compares token i with class i, and this model reads {n_tokens} tokens and answers with "
            f"{n_classes} classes; name the `tokens` that are classes too, if any are"
        )
    ids = torch.arange(n_tokens) if tokens is None else torch.as_tensor(tokens)
    if not 0 <= int(ids.min()) <= int(ids.max()) < min(n_tokens, n_classes):
        raise MeasureError(
            f"copying compares token i with class i for ids below {min(n_tokens, n_classes)}, got {int(ids.min())} to "
            f"{int(ids.max())}; name ids that are both"
        )
    read, written = model.W_E[ids], model.W_U[:, ids]
    if not all(bool(torch.isfinite(weight).all()) for weight in (read, model.W_V, model.W_O, written)):
        return torch.full((model.cfg.n_layers * model.cfg.n_heads,), float("nan"), dtype=torch.float64)
    eigenvalues = (read @ model.OV @ written).eigenvalues.to(torch.complex128)
    return (eigenvalues.real.sum(-1) / eigenvalues.abs().sum(-1)).flatten()


def _output_readers(model: HookedTransformer) -> Tensor:
    """[d_model, class]: what the residual stream is multiplied with for a logit less the mean logit, scale left out."""
    read = model.W_U - model.W_U.mean(1, keepdim=True)
    if model.cfg.normalization_type in ("LN", "RMS"):
        read = model.get_parameter("ln_final.w")[:, None] * read
    return read - read.mean(0) if model.cfg.normalization_type in ("LN", "LNPre") else read
