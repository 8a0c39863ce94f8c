"""The only file that constructs a HookedTransformer, and the one loss that is trained and sampled."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.hook_points import HookPoint

from mechgrok import seeds
from mechgrok.config import ModelConfig
from mechgrok.errors import CheckpointError, ConfigError
from mechgrok.types import Examples, Split

BLOCK = 2**23  # logits at once: 64 MB in float64
FwdHook = tuple[str, Callable[[Tensor, HookPoint], Tensor | None]]


def build_model(config: ModelConfig, split: Split, seed: int) -> HookedTransformer:
    """A HookedTransformer for the task: weights ~ N(0, init_std^2), biases 0, LayerNorm gains 1.

    Each parameter is drawn from its own stream (seed, "init", name), so it does not depend on what
    other parameters there are.
    """
    model = _construct(config, split)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            leaf = name.split(".")[-1]
            if leaf.startswith("W_"):
                noise = torch.randn(parameter.shape, generator=seeds.stream(seed, "init", name))
                parameter.copy_(config.init_std * noise)
            else:
                parameter.fill_(1.0 if leaf == "w" else 0.0)
    return model


def model_from_parameters(config: ModelConfig, split: Split, parameters: Mapping[str, Tensor]) -> HookedTransformer:
    """The model with exactly these parameters, bit for bit.

    Raises:
        CheckpointError: a name is missing, unknown, or has another shape.
    """
    model = _construct(config, split)
    own = dict(model.named_parameters())
    if own.keys() != parameters.keys():
        missing, unknown = sorted(own.keys() - parameters.keys()), sorted(parameters.keys() - own.keys())
        raise CheckpointError(f"parameters do not fit the model: missing {missing}, unknown {unknown}")
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != parameters[name].shape:
                raise CheckpointError(
                    f"parameter {name} has shape {tuple(parameters[name].shape)}, "
                    f"the model needs {tuple(parameter.shape)}"
                )
            parameter.copy_(parameters[name])
    return model


def example_losses(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross-entropy of each example in nats: Float64[batch].

    The log-softmax runs in float64: in float32 it cannot go below about 1.2e-7, which stalls a
    network that has memorized its training set (Nanda et al. 2301.05217).

    Args:
        logits: [batch, pos, class]; targets, weights: [batch, pos].
    """
    log_probs = logits.double().log_softmax(dim=-1)
    nats = -log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return (nats * weights).sum(-1) / weights.sum(-1)


def scored_logits(
    model: HookedTransformer,
    inputs: Tensor,
    n_scored: int,
    fwd_hooks: Sequence[FwdHook] = (),
    start_at_layer: int | None = None,
) -> Tensor:
    """The logits of the last `n_scored` positions, [batch, scored, class], under the given hooks.

    After the last attention no position looks at another, so a hook drops the unscored ones there
    and the MLP and the unembedding run on the scored ones only.
    """
    cfg = model.cfg
    has_resid_mid = not (cfg.attn_only or cfg.parallel_attn_mlp)
    point = f"blocks.{cfg.n_layers - 1}.hook_resid_{'mid' if has_resid_mid else 'post'}"

    def drop_unscored(resid: Tensor, hook: HookPoint) -> Tensor:
        return resid[:, -n_scored:].contiguous()  # TransformerLens views it as a matrix

    return model.run_with_hooks(inputs, start_at_layer=start_at_layer, fwd_hooks=[*fwd_hooks, (point, drop_unscored)])


def model_losses(model: HookedTransformer, tokens: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Each example's loss, Float64[batch]; targets and weights are those of the last positions."""
    return example_losses(scored_logits(model, tokens, targets.shape[1]), targets, weights)


def batch_loss(model: HookedTransformer, tokens: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The mean loss of the examples, for its gradient.

    Beyond BLOCK logits the float64 part is made block by block, and made anew in the backward pass: at the published
    language models' batches it would take more memory than all the rest.
    """
    logits = scored_logits(model, tokens, targets.shape[1])
    at_once = max(1, BLOCK // logits[0].numel())
    if len(logits) <= at_once:
        return example_losses(logits, targets, weights).mean()
    losses = [
        checkpoint(example_losses, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(logits.split(at_once), targets.split(at_once), weights.split(at_once), strict=True)
    ]
    return torch.cat(losses).mean()


@torch.no_grad()
def evaluate(model: HookedTransformer, examples: Examples, fwd_hooks: Sequence[FwdHook] = ()) -> tuple[float, float]:
    """Mean loss in nats, and the share of scored positions whose largest logit is the target."""
    losses, correct = [], []
    for tokens, targets, weights in blocks(model, examples):
        logits = scored_logits(model, tokens, targets.shape[1], fwd_hooks)
        losses.append(example_losses(logits, targets, weights))
        correct.append((logits.argmax(-1) == targets)[weights > 0])
    return float(torch.cat(losses).mean()), float(torch.cat(correct).double().mean())


def blocks(model: HookedTransformer, examples: Examples) -> Iterator[tuple[Tensor, ...]]:
    """`examples.tensors` on the model's device, in blocks of at most BLOCK logits, so that any number fits."""
    at_once = max(1, BLOCK // (examples.tensors[1].shape[1] * model.cfg.d_vocab_out))
    for block in zip(*(tensor.split(at_once) for tensor in examples.tensors), strict=True):
        yield tuple(tensor.to(model.W_E.device) for tensor in block)


@torch.no_grad()
def with_drawn_targets(model: HookedTransformer, examples: Examples, rng: torch.Generator) -> Examples:
    """The same inputs with targets drawn from the model's own predictions.

    On them another model's mean loss estimates E[KL(this model || other)] + this model's entropy.
    """
    targets = examples.targets.clone()
    first = targets.shape[1] - examples.tensors[1].shape[1]
    start = 0
    for tokens, scored, _ in blocks(model, examples):
        probabilities = scored_logits(model, tokens, scored.shape[1]).double().softmax(-1)
        drawn = torch.multinomial(probabilities.flatten(0, 1), 1, generator=rng).view(scored.shape)
        targets[start : start + len(tokens), first:] = drawn
        start += len(tokens)
    return Examples(examples.tokens, targets, examples.weights)


def chance_loss(model: HookedTransformer) -> float:
    """The loss of the uniform guess, ln(number of classes), in nats."""
    return math.log(model.cfg.d_vocab_out)


def _construct(config: ModelConfig, split: Split) -> HookedTransformer:
    if config.positional_embedding_type == "rotary" and config.d_head % 2:
        raise ConfigError(f"rotary positions need an even d_head, got {config.d_head}")
    with warnings.catch_warnings():
        # The class is deprecated in 3.x and gone in 4.x: the pin in pyproject.toml is deliberate.
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(
            HookedTransformerConfig(
                n_layers=config.n_layers,
                d_model=config.d_model,
                n_heads=config.n_heads,
                d_head=config.d_head,
                d_mlp=config.d_mlp,
                attn_only=config.d_mlp is None,
                act_fn=config.act_fn,
                normalization_type=config.normalization_type,
                positional_embedding_type=config.positional_embedding_type,
                rotary_dim=config.d_head if config.positional_embedding_type == "rotary" else None,
                n_ctx=split.train.tokens.shape[1],
                d_vocab=len(split.labels),
                d_vocab_out=split.n_classes,
                default_prepend_bos=False,
                init_weights=False,
                device="cpu",
            )
        )
    return model.eval()
