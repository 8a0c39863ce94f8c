"""Modular addition: tokens (a, b, =), the answer (a + b) mod p scored at the last position.

All p^2 ordered pairs are used. The `unordered` split keeps (a, b) and (b, a) on one side. With the
`ordered` split of the literature they part, and a trained model answers (b, a) from (a, b): its
test accuracy then measures the leak, not the rule (Nanda et al. 2301.05217 split ordered pairs).
"""

import torch

from mechgrok import seeds
from mechgrok.errors import ConfigError
from mechgrok.task_config import ModularAdditionConfig
from mechgrok.types import Examples, Split


def make_split(config: ModularAdditionConfig, seed: int) -> Split:
    """Train and test examples; the token "=" has index p and is no class.

    A share `train_fraction` of the pairs (of the p(p+1)/2 unordered or the p^2 ordered ones),
    rounded down, is drawn without replacement from the stream (seed, "split").
    """
    p = config.p
    a, b = torch.arange(p).repeat_interleave(p), torch.arange(p).repeat(p)
    pair = torch.minimum(a, b) * p + torch.maximum(a, b) if config.split == "unordered" else a * p + b
    facts = pair.unique()
    n_train = int(config.train_fraction * len(facts))
    if not 0 < n_train < len(facts):
        raise ConfigError(
            f"train_fraction {config.train_fraction} leaves {n_train} of {len(facts)} pairs for training; "
            "both sides of the split need at least one"
        )
    chosen = facts[torch.randperm(len(facts), generator=seeds.stream(seed, "split"))[:n_train]]
    is_train = torch.isin(pair, chosen)
    return Split(
        train=_examples(a[is_train], b[is_train], p),
        test=_examples(a[~is_train], b[~is_train], p),
        labels=(*(str(i) for i in range(p)), "="),
        n_classes=p,
    )


def _examples(a: torch.Tensor, b: torch.Tensor, p: int) -> Examples:
    tokens = torch.stack([a, b, torch.full_like(a, p)], dim=1)
    targets = torch.zeros_like(tokens)
    targets[:, -1] = (a + b) % p
    weights = torch.zeros(tokens.shape)
    weights[:, -1] = 1.0
    return Examples(tokens, targets, weights)
