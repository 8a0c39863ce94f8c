"""How a walk over settings tells that one matters: by the bits of what is made with it."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from hashlib import sha256
from typing import Annotated, Any, Literal, get_args, get_origin

import numpy as np
import torch

from mechgrok.config import RunConfig
from mechgrok.errors import MechgrokError
from mechgrok.task_config import Settings
from mechgrok.types import Split
from tests.oracles import tiny_config

TINY = tiny_config().model_dump()
SAMPLING = TINY["llc"]["sampling"] | {"n_draws": 8, "n_burnin": 1}
SHORT = tiny_config(train={"n_steps": 2, "n_checkpoints": 2}, llc={"sampling": SAMPLING}, analyses={"names": ()})

# bits: the result has other bits. same: it has the same, as the setting says how, where or what for it is computed.
# rounding: to rounding it is the same, and yet part of what a run is, as its last bits may differ. refused: no result.
Effect = Literal["bits", "same", "rounding", "refused"]


@dataclass(frozen=True)
class Change:
    """What is changed of a base, and what that does. of: what the base is given first, where the change needs it."""

    to: Mapping[str, Any]
    effect: Effect = "bits"
    of: Mapping[str, Any] = field(default_factory=dict)


def is_(key: str, value: Any, effect: Effect = "bits", **of: Any) -> Change:
    """One key set to a value."""
    return Change({key: value}, effect, of)


def validated(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """Settings, checked as those of a file are; a mistake is ours."""
    try:
        return kind.model_validate(values)
    except ValueError as error:
        raise MechgrokError(str(error)) from None


def run_config(**sections: Any) -> RunConfig:
    """The tiny run with other sections."""
    return validated(RunConfig, TINY | sections)


def assert_effect(result: Callable[[dict[str, Any]], Any], base: Mapping[str, Any], change: Change) -> None:
    """result: what is made with settings; MechgrokError if it is refused."""
    before, after = dict(base) | change.of, dict(base) | change.of | change.to
    made = result(before)  # the base itself is never refused
    try:
        other = result(after)
    except MechgrokError as error:
        assert change.effect == "refused", f"{change.to} is refused: {error}"
        return
    assert change.effect != "refused", f"{change.to} is not refused"
    one, two = bits(made), bits(other)
    if change.effect == "rounding":
        for mine, theirs in zip(one, two, strict=True):
            if isinstance(mine, float | np.ndarray):
                np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)
            else:
                assert mine == theirs
    else:
        assert (digest(one) == digest(two)) == (change.effect == "same"), f"{change.to}: {change.effect}"


def bits(value: Any) -> list[Any]:
    """Every number and word of a result, in order, without the settings that it was made with."""
    return list(_leaves(value))


def digest(leaves: list[Any]) -> str:
    """Of these, to the bit."""
    sha = sha256()
    for leaf in leaves:
        whole = isinstance(leaf, np.ndarray) and leaf.dtype != object
        sha.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes() if whole else repr(leaf).encode())
    return sha.hexdigest()


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Settings) or inspect.isfunction(value):
        return
    if isinstance(value, torch.Tensor):
        yield value.detach().cpu().numpy()
    elif isinstance(value, torch.nn.Module):
        yield from _leaves(dict(value.named_parameters()))
    elif isinstance(value, Split):  # its language is of numpy's tables, and all rows are drawn from them
        yield from _leaves([value.train, value.test, value.labels, dict(value.distributions)])
    elif is_dataclass(value):
        yield from _leaves({each.name: getattr(value, each.name) for each in fields(value)})
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(item, Settings):
                yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        yield len(value)
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def settings_classes() -> dict[str, type[Settings]]:
    """Every class of settings that a RunConfig is made of, by name."""
    found: dict[str, type[Settings]] = {}

    def visit(kind: Any) -> None:
        if isinstance(kind, type) and issubclass(kind, Settings):
            if kind.__name__ not in found:
                found[kind.__name__] = kind
                for setting in kind.model_fields.values():
                    visit(setting.annotation)
        elif get_origin(kind) is not Literal:
            for part in get_args(kind)[: 1 if get_origin(kind) is Annotated else None]:
                visit(part)

    visit(RunConfig)
    return found


def keys_of(kind: type[Settings]) -> list[str]:
    """Class.key of each setting, under the class that has it first."""
    owners = {}
    for base in reversed(kind.__mro__):
        for key in getattr(base, "__annotations__", {}):
            if key in kind.model_fields:
                owners.setdefault(key, base.__name__)
    return [f"{owner}.{key}" for key, owner in owners.items()]
