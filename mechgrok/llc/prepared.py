"""A module as chains need it: in float32 or float64, on one device, all there. The caller's own is not touched."""

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from mechgrok.config import Precision
from mechgrok.errors import ConfigError

KEPT = (torch.float32, torch.float64)
Module = TypeVar("Module", bound=torch.nn.Module)


def prepared(module: Module, precision: Precision = "float32", device: str | None = None) -> Module:
    """The module itself, or a copy in the numbers that chains run in.

    In bfloat16 or float16 a step smaller than the spacing of the numbers vanishes, so such a module is sampled at its
    parameters in float32; one of mixed kinds in the widest of them. What was made in inference mode is copied too, as
    torch takes no gradient through it.

    Args:
        device: where it is to be; None: where it is.

    Raises ConfigError for parameters on the meta device, on several devices, in each other's memory, or of no floating
    kind.
    """
    named = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    if on_meta := [name for name, one in named.items() if one.is_meta]:
        raise ConfigError(f"{on_meta[0]} lies on the meta device and has no numbers; load the weights first")
    own = dict(module.named_parameters())
    if wrong := [name for name, one in own.items() if not one.is_floating_point()]:
        kind = own[wrong[0]].dtype
        raise ConfigError(f"{wrong[0]} is {kind}, which no chain can move; make it a buffer, or load it unquantized")
    first: dict[int, str] = {}
    for name, one in own.items():
        if one.numel() and first.setdefault(one.data_ptr(), name) != name:
            raise ConfigError(
                f"{name} lies in the memory of {first[one.data_ptr()]} without being it, so they cannot be moved "
                "together; make them one Parameter, or give each memory of its own with .clone()"
            )
    devices = sorted({str(one.device) for one in own.values()})
    if len(devices) > 1 and device is None:
        raise ConfigError(f"the module lies on {' and '.join(devices)}; move it to one device")
    widest = torch.float64 if torch.float64 in {one.dtype for one in own.values()} else torch.float32
    kind = torch.float64 if precision == "float64" else widest
    other = any(one.is_floating_point() and one.dtype != kind for one in own.values())
    other = other or any(one.is_floating_point() and one.dtype not in KEPT for one in named.values())
    moves = device is not None and devices not in ([], [device])
    if not (other or moves or any(one.is_inference() for one in named.values()) or _stale(module, kind)):
        return module
    result = copy.deepcopy(module)
    result.to(kind)
    if moves:
        result.to(device)
    for part in result.modules():  # TransformerLens casts activations to what `cfg` says
        if isinstance(getattr(getattr(part, "cfg", None), "dtype", None), torch.dtype):
            part.cfg.dtype = kind
    return result


def prepared_data(tensors: Sequence[Tensor], module: torch.nn.Module) -> tuple[Tensor, ...]:
    """The tensors, those in numbers narrower than float32 in those of the module, none made in inference mode."""
    kind = next((one.dtype for one in module.parameters()), torch.float32)
    narrow = (torch.float16, torch.bfloat16)
    return tuple(
        (one.to(kind) if one.dtype in narrow else one.clone() if one.is_inference() else one) for one in tensors
    )


def _stale(module: torch.nn.Module, kind: torch.dtype) -> bool:
    """Whether a TransformerLens config tells of other numbers than the parameters are."""
    told = getattr(getattr(module, "cfg", None), "dtype", None)
    return isinstance(told, torch.dtype) and told != kind
