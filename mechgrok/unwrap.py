"""The module inside a wrapper: what torch.compile and the parallel wrappers return holds the module, and is none."""

import torch

from mechgrok.errors import ConfigError

_HELD_AS_MODULE = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The module that `torch.compile`, DataParallel or DistributedDataParallel was given; any other model itself.

    It has the very parameters of the wrapper, under their own names and not `_orig_mod.w` or `module.w`, and computes
    the same losses: losses of many replicas at once can be asked of it, which a wrapper is not made for.

    Raises:
        ConfigError: the wrapper has hooks of its own, which the module inside would run without.
    """
    while (held := _held(model)) is not None:
        attribute, inside = held
        if model._forward_hooks or model._forward_pre_hooks:
            raise ConfigError(
                f"the {type(model).__name__} has hooks, which the module inside it does not run; put them on its "
                f".{attribute} and pass that"
            )
        model = inside
    return model


def _held(model: torch.nn.Module) -> tuple[str, torch.nn.Module] | None:
    """(attribute, module inside), None where the model wraps nothing."""
    attribute = "module" if isinstance(model, _HELD_AS_MODULE) else "_orig_mod"  # OptimizedModule is slow to import
    inside = getattr(model, attribute, None)
    return (attribute, inside) if isinstance(inside, torch.nn.Module) else None
