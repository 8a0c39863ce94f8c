"""Whether a precision of `LLCConfig` changes anything on this processor and for this model; if not, it is said."""

import logging
from functools import cache

import torch
from transformer_lens import HookedTransformer

from mechgrok.config import LLCConfig, Precision
from mechgrok.loops.lanes import HAS_VNNI
from mechgrok.replicas import compiled, network
from mechgrok.reproducible import onednn_keeps_float32
from mechgrok.types import Examples

log = logging.getLogger("mechgrok")  # without a handler of the caller's, warnings go to stderr


def why_idle(precision: Precision, model: torch.nn.Module, data: object, device: str = "cpu") -> str | None:
    """Why products in this precision have the bits of float32's here; None if they have others.

    What is idle hangs on the processor, so it is no mistake in a file of settings: a run goes from machine to machine.
    """
    if precision not in ("int16", "bfloat16"):
        return None
    otherwise = "this model is not served by compiled passes"
    if isinstance(model, HookedTransformer) and isinstance(data, Examples):
        otherwise = network.why_not(model) or compiled.why_not(network.Network(model, data), precision) or ""
    if precision == "int16":
        missing = None if HAS_VNNI else "the processor has no AVX512_VNNI"
        return missing or (f"its products are those of compiled passes, and {otherwise}" if otherwise else None)
    if not otherwise:
        return "compiled passes serve, whose products are float32's where the processor has no AMX"
    return "the processor has no products in bfloat16" if device == "cpu" and onednn_keeps_float32() else None


def say_if_idle(config: LLCConfig, model: torch.nn.Module, data: object) -> None:
    """One line of the log `mechgrok`, once a process, if the precision changes nothing here."""
    reason = why_idle(config.precision, model, data, config.device)
    if reason is not None:
        _say_once(f'precision "{config.precision}" changes nothing here: {reason}')


@cache
def _say_once(line: str) -> None:
    log.warning(line)
