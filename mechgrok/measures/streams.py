"""What a change of one layer's heads becomes on its way to a later layer, when everything between stays as it was."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

from mechgrok.errors import ComponentError
from mechgrok.model import FwdHook
from mechgrok.plain import is_untouched


@contextmanager
def ungrouped(model: HookedTransformer) -> Iterator[None]:
    """Within it hook_k and hook_v hold a copy for every head, where heads share keys and values (grouped queries).

    The model computes the same. Of use where one head's keys or values are changed and those of its group are not.

    Raises:
        ComponentError: a hook of the caller's sits on the shared keys or values.
    """
    cfg = model.cfg
    if cfg.n_key_value_heads in (None, cfg.n_heads) or cfg.ungroup_grouped_query_attention:
        yield
        return
    for name, point in model.hook_dict.items():
        if name.split("_")[-1] in ("k", "v") and "attn.hook" in name and point._forward_hooks:
            raise ComponentError(
                f"heads share keys and values (grouped-query attention), and a hook sits on {name}, so that no head's "
                "own copy can be changed; remove that hook"
            )
    model.set_ungroup_grouped_query_attention(True)
    try:
        yield
    finally:
        model.set_ungroup_grouped_query_attention(False)


def is_plain(model: HookedTransformer) -> bool:
    """Whether what a head writes is added to the residual stream as it is: no norm after it, no caller's hook."""
    cfg = model.cfg
    normed = cfg.use_normalization_before_and_after or cfg.original_architecture in POST_NORM_ARCHITECTURES
    return not normed and is_untouched(model)


def put(value: Tensor) -> Callable[[Tensor, HookPoint], Tensor]:
    """What puts a value in the place of an activation: of its last positions, where the others were dropped."""
    return lambda now, hook: value[:, -now.shape[1] :]


def frozen_between(
    model: HookedTransformer, tokens: Tensor, z: Sequence[Tensor], first: int, end: int
) -> list[FwdHook]:
    """Hooks that keep what layers `first` ... `end` - 1 write as it is in the clean run, but for the first's heads.

    A change of those heads then reaches layer `end` (n_layers: the final norm) through the residual stream alone.

    Args:
        z: by layer, [row, pos, head, d_head], of the clean run on these tokens.
    """
    hooks: list[FwdHook] = [(f"blocks.{layer}.attn.hook_z", put(z[layer])) for layer in range(first + 1, end)]
    if model.cfg.attn_only:
        return hooks
    names = [f"blocks.{layer}.hook_mlp_out" for layer in range(first, end)]
    _, cache = model.run_with_cache(tokens, names_filter=names, stop_at_layer=end)
    return [*hooks, *((name, put(cache[name])) for name in names)]


def changed_inputs(
    model: HookedTransformer,
    tokens: Tensor,
    z: Sequence[Tensor],
    change: FwdHook,
    first: int,
    end: int,
    letters: Sequence[str],
) -> dict[str, Tensor]:
    """Queries, keys or values of all heads of layer `end`, by letter, when `change` acts on layer `first`'s heads only.

    They are [row, pos, head, d_head], before any rotation; every other part has written what it does in the clean run.
    """
    found: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: HookPoint) -> None:
        found[str(hook.name)] = value

    points = {letter: f"blocks.{end}.attn.hook_{letter}" for letter in letters}
    hooks: list[Any] = [
        change,
        *frozen_between(model, tokens, z, first, end),
        *((point, keep) for point in points.values()),
    ]
    model.run_with_hooks(tokens, stop_at_layer=end + 1, fwd_hooks=hooks)
    return {letter: found[point] for letter, point in points.items()}
