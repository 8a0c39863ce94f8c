"""The only file that constructs a HookedTransformer, and the one loss that is trained and sampled."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.hook_points import HookPoint

from mechgrok import seeds
from mechgrok.config import ModelConfig
from mechgrok.errors import CheckpointError, ConfigError
from mechgrok.plain import is_untouched
from mechgrok.task_config import STORED
from mechgrok.types import Examples, Split

BLOCK = 2**23  # logits at once: 64 MB in float64
EVALUATED = 2**20  # numbers of one activation: larger ones leave the cache, and their memory is given back each time
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
        missing, unknown = _few(own.keys() - parameters.keys()), _few(parameters.keys() - own.keys())
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


def _few(names: Iterable[str]) -> str:
    found = sorted(names)
    return f"{found}" if len(found) <= 4 else f"{found[:3]} and {len(found) - 3} more"


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
    drop: bool | None = None,
) -> Tensor:
    """The logits of the last `n_scored` positions, [batch, scored, class], under the given hooks.

    After the last attention no position looks at another, so a hook drops the unscored ones there
    and the MLP and the unembedding run on the scored ones only. Where something of the caller's acts on the model,
    all positions run to the end: a hook on the last MLP may count them. drop: whether nothing does, None to look.
    """
    cfg = model.cfg
    positions = None
    if start_at_layer is not None and cfg.positional_embedding_type == "shortformer":  # which later layers need as well
        positions = model.W_pos[: inputs.shape[1]].expand(len(inputs), -1, -1)

    def logits(rows: Tensor, *hooks: FwdHook) -> Tensor:
        return model.run_with_hooks(
            rows, start_at_layer=start_at_layer, shortformer_pos_embed=positions, fwd_hooks=[*fwd_hooks, *hooks]
        )

    if not (is_untouched(model) if drop is None else drop):
        return logits(inputs)[:, -n_scored:]
    if start_at_layer == cfg.n_layers:  # no layer is left to drop them in
        return logits(inputs[:, -n_scored:])
    has_resid_mid = not (cfg.attn_only or cfg.parallel_attn_mlp)
    point = f"blocks.{cfg.n_layers - 1}.hook_resid_{'mid' if has_resid_mid else 'post'}"

    def drop_unscored(resid: Tensor, hook: HookPoint) -> Tensor:
        return resid[:, -n_scored:].contiguous()  # TransformerLens views it as a matrix

    return logits(inputs, (point, drop_unscored))


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
    """`examples.tensors` on the model's device, `at_once` at a time."""
    tensors = examples.tensors
    for rows in shares(model, examples):
        yield tuple(tensor[rows].to(model.W_E.device) for tensor in tensors)


def shares(model: HookedTransformer, examples: Examples) -> Iterator[slice]:
    """The rows of each block, `at_once` of them."""
    n = at_once(model, examples)
    return (slice(first, first + n) for first in range(0, len(examples), n))


def at_once(model: HookedTransformer, examples: Examples) -> int:
    """How many examples make EVALUATED logits, scores or neurons."""
    cfg, n_pos = model.cfg, examples.tokens.shape[1]
    neurons = 0 if cfg.attn_only else n_pos * (cfg.d_mlp or 0)
    each = max(examples.tensors[1].shape[1] * cfg.d_vocab_out, cfg.n_heads * n_pos**2, neurons)
    return max(1, EVALUATED // each)


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


def fitted(config: ModelConfig, split: Split) -> ModelConfig:
    """The shape with nothing left to the task: n_ctx, d_vocab, d_vocab_out and rotary_dim as numbers.

    Raises:
        ConfigError: the task has longer rows or more tokens than the model takes.
    """
    rotary = config.positional_embedding_type == "rotary"
    sizes = {
        "n_ctx": config.n_ctx or split.train.tokens.shape[1],
        "d_vocab": config.d_vocab or len(split.labels),
        "d_vocab_out": config.d_vocab_out or config.d_vocab or split.n_classes,
    }
    needed = (split.train.tokens.shape[1], len(split.labels), split.n_classes)
    for (name, size), needs in zip(sizes.items(), needed, strict=True):
        if size < needs:
            raise ConfigError(f"model.{name} is {size} and the task needs {needs}; choose a task that fits the model")
    return config.model_copy(update=sizes | {"rotary_dim": (config.rotary_dim or config.d_head) if rotary else None})


def shape_of(settings: Mapping[str, Any]) -> ModelConfig:
    """The shape that describes a HookedTransformer whose config has these entries (`cfg.to_dict()`).

    Raises:
        ConfigError: it has a feature that no setting describes, named with its value.
    """
    known = {name: settings[name] for name in ModelConfig.model_fields if name in settings}
    if settings.get("attn_only"):
        known["d_mlp"] = None  # which TransformerLens fills in
    try:
        shape = ModelConfig.model_validate(known, context=STORED).without_idle()
        plain = vars(_hooked_config(shape))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigError(f"[model] cannot describe {name} = {first['input']!r}: {first['msg']}") from None
    except (TypeError, AssertionError) as error:
        raise ConfigError(f"no HookedTransformer has these settings: {error}") from None
    for name, value in settings.items():
        usual = value == plain[name] if name in plain else value in (None, False)
        if not (usual or name in known or name in NO_MATTER):
            raise ConfigError(f"the model has {name} = {value!r}, which no setting of [model] describes")
    return shape


# Entries of a HookedTransformerConfig that do not change what a model computes from tokens.
NO_MATTER = {
    "model_name", "original_architecture", "tokenizer_name", "tokenizer_prepends_bos", "default_prepend_bos",
    "device", "n_devices", "dtype", "seed", "init_mode", "init_weights", "initializer_range", "n_params",
    "from_checkpoint", "checkpoint_index", "checkpoint_label_type", "checkpoint_value", "use_attn_result",
    "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in", "use_hook_tokens", "tie_word_embeddings",
    "trust_remote_code",
}  # fmt: skip


def _construct(config: ModelConfig, split: Split) -> HookedTransformer:
    shape = fitted(config, split)
    if shape.rotary_dim is not None and (shape.rotary_dim % 2 or shape.rotary_dim > shape.d_head):
        name = "d_head" if config.rotary_dim is None else "rotary_dim of at most d_head"
        raise ConfigError(f"rotary positions need an even {name}, got {shape.rotary_dim}")
    with warnings.catch_warnings():
        # The class is deprecated in 3.x and gone in 4.x: the pin in pyproject.toml is deliberate.
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(_hooked_config(shape))
    return model.eval()


def _hooked_config(shape: ModelConfig) -> HookedTransformerConfig:
    return HookedTransformerConfig(
        **shape.model_dump(exclude={"init_std"}),
        attn_only=shape.d_mlp is None,
        default_prepend_bos=False,
        init_weights=False,
        device="cpu",
    )
