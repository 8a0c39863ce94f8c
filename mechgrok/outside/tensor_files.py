"""A file of tensors to a state dict: safetensors, and of pickles those that hold tensors alone.

This is the one file that reads a pickle, and only by torch's reader for weights, which builds tensors and plain
containers and calls nothing that the file names.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mechgrok.errors import CheckpointError

PICKLED = {".pt", ".pth"}
READABLE = {".safetensors", *PICKLED}
KEYS = ("state_dict", "model_state_dict", "model", "model_state", "net", "network", "module", "weights", "params")
WRAPPERS = {"module.": "DataParallel", "model.": "a module that holds the model"}
Note = Callable[[str], None]


def read_tensors(path: Path, note: Note) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU, under the model's own names.

    A pickle holds one, or a dict with one under one of KEYS. `_orig_mod.`, which torch.compile puts into names, is
    left out, and so is a prefix of WRAPPERS that every name has. note: is told what was chosen or left out.

    Raises:
        CheckpointError: the file is damaged, holds more than tensors, or no state dict.
    """
    held = _pickled(path, note) if path.suffix in PICKLED else _safetensors(path)
    for name, tensor in held.items():
        # Strides of 0 let a file of a few bytes claim any size.
        claimed = tensor.numel() * tensor.element_size()
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(f"{path}: {name} is sparse, quantized or empty of values; save it as a plain tensor")
        if claimed > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {name} claims more entries than the file has; save it with .contiguous()")
    return _unprefixed(path, {name: tensor.detach() for name, tensor in held.items()}, note)


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({error}); fetch it again") from None


def _pickled(path: Path, note: Note) -> Mapping[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript, which is refused below
            held: Any = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 - weights alone
    except Exception as error:  # what a damaged or hostile file can raise in there is not to be listed
        raise CheckpointError(_refusal(path, str(error))) from None
    if _is_state_dict(held):
        return held
    found = [key for key in KEYS if isinstance(held, Mapping) and _is_state_dict(held.get(key))]
    if len(found) == 1:
        note(f"of each file the state dict under {found[0]!r} is read")
        return held[found[0]]
    what = f"state dicts under {' and '.join(found)}" if found else f"a {type(held).__name__} and no state dict"
    raise CheckpointError(f"{path} holds {what}; save the model's with torch.save(model.state_dict(), {path.name!r})")


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )  # fmt: skip


def _refusal(path: Path, told: str) -> str:
    if "TorchScript" in told:
        return f"{path} is a TorchScript archive; save the state_dict() of what torch.jit.load makes of it"
    if "Weights only load failed" not in told or "Unsupported operand" in told:
        return f"{path} is truncated or no file of torch.save; fetch it again"
    named = re.search(r"GLOBAL ([\w.]+)", told)
    return (
        f"{path} holds more than tensors{f' ({named[1]})' if named else ''}, which can run code when read, so it is "
        "not; where you trust it, torch.load(path, weights_only=False) it and save its model.state_dict() with "
        "safetensors.torch.save_file"
    )


def _unprefixed(path: Path, state: dict[str, Tensor], note: Note) -> dict[str, Tensor]:
    if any("_orig_mod." in name for name in state):
        note("`_orig_mod.`, which torch.compile puts into names of parameters, is left out")
        renamed = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
        if len(renamed) < len(state):
            raise CheckpointError(f"{path} has parameters with and without `_orig_mod.`; save one model's state dict")
        state = renamed
    while prefix := next((one for one in WRAPPERS if state and all(name.startswith(one) for name in state)), None):
        note(f"`{prefix}`, which {WRAPPERS[prefix]} puts before names of parameters, is left out")
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state
