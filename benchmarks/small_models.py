"""Small trained models for the benchmarks, made in memory: no run directory, no analysis."""

from collections.abc import Sequence

import torch
from transformer_lens import HookedTransformer

from mechgrok import seeds
from mechgrok.config import ModelConfig, TrainConfig, load_config
from mechgrok.model import build_model, model_losses
from mechgrok.reproducible import reproducible
from mechgrok.tasks import make_split
from mechgrok.types import Examples, Split

Checkpoints = list[tuple[int, HookedTransformer]]


def next_token(tokens: torch.Tensor, scored_from: int = 0) -> Examples:
    """Every position from `scored_from` on predicts the next one."""
    weights = torch.ones(tokens.shape[0], tokens.shape[1] - 1)
    weights[:, :scored_from] = 0.0
    return Examples(tokens[:, :-1], tokens[:, 1:].contiguous(), weights)


def planted_sequences(n_examples: int = 512, n_tokens: int = 24, n_pos: int = 31) -> Examples:
    """A sparse bigram chain over the tokens whose second half repeats the first: bigrams, then induction."""
    rng = seeds.stream(0, "planted")
    follow = torch.stack([torch.randperm(n_tokens, generator=rng)[:4] for _ in range(n_tokens)])
    tokens = torch.randint(n_tokens, (n_examples, 1), generator=rng)
    for _ in range(n_pos // 2):
        pick = torch.randint(4, (n_examples, 1), generator=rng)
        tokens = torch.cat([tokens, follow[tokens[:, -1]].gather(1, pick)], dim=1)
    return next_token(torch.cat([tokens, tokens], dim=1)[:, : n_pos + 1])


def sorting() -> Examples:
    """Five of 20 numbers without repeats, a separator, and the same in order; the sorted part is scored."""
    order = torch.rand(1024, 20, generator=seeds.stream(0, "sorting")).argsort(1)[:, :5]
    separator = torch.full((1024, 1), 20)
    return next_token(torch.cat([order, separator, order.sort(1).values], dim=1), scored_from=5)


def attention_only(examples: Examples, n_classes: int, steps: Sequence[int], **shape: object) -> Checkpoints:
    """An attention-only transformer with LayerNorm at the given steps of AdamW on batches of 128."""
    config = ModelConfig(normalization_type="LN", init_std=0.15, **shape)  # type: ignore[arg-type]
    split = Split(examples, examples, tuple(map(str, range(n_classes))), n_classes)
    return trained(config, split, steps, batch_size=min(128, len(examples)), lr=3e-3, weight_decay=0.01)


def modular_addition(preset: str, steps: Sequence[int]) -> tuple[Checkpoints, Examples]:
    """The model of a preset at the given steps, and the data that it was trained on."""
    config = load_config(preset)
    split, train = make_split(config.task, config.seed), config.train
    assert isinstance(train, TrainConfig)
    options = {"lr": train.learning_rate, "weight_decay": train.weight_decay, "betas": train.betas}
    return trained(config.model, split, steps, batch_size=None, **options), split.train


def trained(
    config: ModelConfig, split: Split, steps: Sequence[int], batch_size: int | None, **options: object
) -> Checkpoints:
    """Copies of the model at the given steps of AdamW with these options."""
    model, found = build_model(config, split, 0), []
    optimizer = torch.optim.AdamW(model.parameters(), **options)  # type: ignore[arg-type]
    rng, tensors = seeds.stream(0, "batches"), split.train.tensors
    with reproducible(1):
        for step in range(max(steps) + 1):
            if step in steps:
                copy = build_model(config, split, 0)
                copy.load_state_dict(model.state_dict())
                found.append((step, copy))
            batch = tensors
            if batch_size is not None:
                rows = torch.randint(len(split.train), (batch_size,), generator=rng)
                batch = tuple(tensor[rows] for tensor in tensors)  # type: ignore[assignment]
            optimizer.zero_grad()
            model_losses(model, *batch).mean().backward()
            optimizer.step()
    return found
