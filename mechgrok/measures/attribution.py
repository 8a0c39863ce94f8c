"""Direct logit attribution: what every head and every other part adds to the right logit."""

from typing import cast

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.components import LayerNorm, LayerNormPre

from mechgrok.errors import MeasureError
from mechgrok.measures.needs import check_fits
from mechgrok.model import blocks
from mechgrok.types import Examples

ROUNDING = 1e-3  # of the terms' size; what float32 and a norm's scale leave is a hundred times less


@torch.no_grad()
def direct_attributions(model: HookedTransformer, examples: Examples) -> dict[str, Tensor]:
    """What each part adds to (target logit - mean logit), by name, each Float64[example, scored], in nats of logit.

    The terms sum to the model's own difference: "embed", "pos_embed" (where positions enter the residual stream),
    "L0H1" for heads, "L0.mlp", "L0.b_O" for the bias that all heads share, and "bias" for the final LayerNorm's and
    the unembedding's. The final LayerNorm is frozen at each position's own scale, which makes it linear; its gain is
    applied.

    `ActivationCache.logit_attrs` on `stack_head_results` gives the same for models without a gain (a test holds them
    equal). It is not used because it leaves out the gain and the biases, and holds an array [example, pos, head,
    d_head, d_model] on the way.

    The heads' parts are z W_O, read off the weights. That the terms do sum to the model's difference is checked.

    Raises:
        MeasureError: they do not, as where a norm or a hook stands between a part and the residual stream.
        ShapeError: the model cannot read the tokens, or has no class for a target.
    """
    check_fits(model, examples)
    unembed = (model.W_U - model.W_U.mean(1, keepdim=True)).double()
    found = [_attributions(model, tokens, targets, unembed) for tokens, targets, _ in blocks(model, examples)]
    return {name: torch.cat([terms[name] for terms in found]) for name in found[0]}


def _attributions(model: HookedTransformer, tokens: Tensor, targets: Tensor, unembed: Tensor) -> dict[str, Tensor]:
    """The same of some rows; unembed: Float64[d_model, class], less its mean over the classes."""
    cfg, n_scored = model.cfg, targets.shape[1]
    parts = ("hook_embed", "hook_pos_embed", "attn.hook_z", "hook_mlp_out", "ln_final.hook_scale")
    logits, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith(parts))

    bias = (model.b_U - model.b_U.mean()).double()[targets]
    direction = unembed.T[targets]  # [example, scored, d_model]
    own = {name: one.double() for name, one in model.named_parameters() if name.startswith("ln_final.")}
    if "ln_final.b" in own:
        bias = bias + direction @ own["ln_final.b"]
    if "ln_final.w" in own:
        direction = direction * own["ln_final.w"]
    if isinstance(getattr(model, "ln_final", None), LayerNorm | LayerNormPre):  # with `final_rms` it is none of these
        direction = direction - direction.mean(-1, keepdim=True)
    if cfg.normalization_type is not None:
        direction = direction / cache["ln_final.hook_scale"].double()[:, -n_scored:]

    def along(written: Tensor) -> Tensor:
        return (written[:, -n_scored:].double() * direction).sum(-1)

    terms = {"embed": along(cache["hook_embed"])}
    if cfg.positional_embedding_type == "standard":  # shortformer positions go into queries and keys alone
        terms["pos_embed"] = along(cache["hook_pos_embed"])
    for layer in range(cfg.n_layers):
        block = model.blocks[layer]
        z = cache[f"blocks.{layer}.attn.hook_z"][:, -n_scored:].double()
        by_head = torch.einsum("epm,hdm,ephd->hep", direction, block.attn.W_O.double(), z)
        terms |= {f"L{layer}H{head}": by_head[head] for head in range(cfg.n_heads)}
        terms[f"L{layer}.b_O"] = direction @ block.attn.b_O.double()
        if not cfg.attn_only:
            terms[f"L{layer}.mlp"] = along(cache[f"blocks.{layer}.hook_mlp_out"])
    terms["bias"] = bias
    scored = cast(Tensor, logits)[:, -n_scored:].double()
    whole, size = (
        scored.gather(-1, targets[..., None])[..., 0] - scored.mean(-1),
        sum(of.abs() for of in terms.values()),
    )
    if bool(((sum(terms.values()) - whole).abs() > ROUNDING * (1 + size)).any()):
        raise MeasureError(
            "what the heads and the other parts write does not add up to this model's logits, so there is no direct "
            "attribution; a norm after the heads, a soft cap or a hook of yours on the residual stream does this"
        )
    return terms


def head_attributions(model: HookedTransformer, examples: Examples) -> Tensor:
    """The heads' part of `direct_attributions`, layer-major: Float64[head, example, scored]."""
    terms, cfg = direct_attributions(model, examples), model.cfg
    names = [f"L{layer}H{head}" for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    return torch.stack([terms[name] for name in names])
