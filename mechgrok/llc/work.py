"""How much work an estimate is, and whether compiling loops for it pays: told from sizes alone, so that bits are."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from mechgrok.config import LLCConfig
from mechgrok.types import Examples

# Floating-point operations from which compiled loops are worth compiling: see docs/performance.md.
PAYS = 2e12


def estimate_work(
    model: torch.nn.Module, data: Examples | Sequence[torch.Tensor], config: LLCConfig, n_members: int = 1
) -> float:
    """Floating-point operations of the chains of an estimate, about: six for each weight that each token meets.

    Of a HookedTransformer; 0 of another module, for which there are no loops. n_members: components that are sampled
    together. A head moves less than all of the model, which is left out here.
    """
    cfg: Any = getattr(model, "cfg", None)
    if not isinstance(data, Examples) or not hasattr(cfg, "d_vocab_out"):
        return 0.0
    examples, n_pos = data, data.tokens.shape[1]
    weights = 4 * cfg.d_model * cfg.n_heads * cfg.d_head + 2 * n_pos * cfg.n_heads * cfg.d_head
    weights += 0 if cfg.attn_only else 2 * cfg.d_model * (cfg.d_mlp or 0)
    each = n_pos * cfg.n_layers * weights + examples.tensors[1].shape[1] * cfg.d_model * cfg.d_vocab_out
    batch = len(examples) if config.batch_size is None else config.batch_size
    return 6.0 * each * batch * (config.n_burnin + config.n_draws) * config.n_chains * n_members


def loops_pay(work: Iterable[float], configs: Iterable[LLCConfig]) -> bool:
    """Whether all this work is for compiled loops: where a setting asks for them, or there is enough of it."""
    configs = list(configs)
    if any(config.path == "compiled" or config.precision == "int16" for config in configs):  # which is of loops alone
        return True
    return any(config.path == "auto" for config in configs) and sum(work) >= PAYS
