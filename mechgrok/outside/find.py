"""From a folder or a name to the checkpoints that lie there. File names from outside are not trusted.

Three kinds of source:

    state dicts    a folder of HookedTransformer state dicts, step-100.safetensors and so on; config.json beside
                   them, if it is there, is `cfg.to_dict()`
    Hugging Face   a folder of folders step0, step1000, ... each with config.json and model.safetensors, as Pythia's
                   revisions are when each is downloaded into a folder of its own
    a name         a model that TransformerLens knows the checkpoints of; its revisions are fetched from the hub
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformer_lens import loading_from_pretrained as loading

from mechgrok.errors import ConfigError
from mechgrok.outside.sources import HuggingFace, Source, StateDicts, first_line

STEP = re.compile(r"(?:step|checkpoint)[-_]?(\d{1,12})")
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
MAX_BYTES, MAX_CONFIG_BYTES = 20 * 10**9, 10**6
REVISIONS = {"EleutherAI/pythia": "step{}", "stanford-crfm/": "checkpoint-{}"}  # how the hub names a step
ANSWER_WITHIN = 5  # seconds


def open_source(source: str | Path) -> Source:
    """The checkpoints in a folder, or of a model by its name.

    Raises:
        ConfigError: nothing is there, a step comes twice, a file is a pickle or a link, or no network for a name.
    """
    folder = Path(source)
    if not folder.is_dir():
        if folder.exists():
            raise ConfigError(f"{source} is a file; give the folder of all checkpoints")
        return _on_the_hub(str(source))
    inside = sorted(folder.iterdir())
    folders = _by_step(path for path in inside if path.is_dir() and STEP.fullmatch(path.name))
    files = _by_step(path for path in inside if path.suffix == ".safetensors")
    for path in inside:
        match = STEP.fullmatch(path.stem) if path.suffix in PICKLES else None
        if match and int(match[1]) not in files:
            raise ConfigError(_pickle(path))
    if bool(folders) == bool(files):
        found = "holds both kinds of checkpoint" if files else "holds no checkpoint"
        raise ConfigError(
            f"{source} {found}; give a folder of step-100.safetensors and so on, or one of folders step100 and so on "
            "with config.json and model.safetensors in each"
        )
    if folders:
        return _checkout(folder, folders)
    for path in files.values():
        _plain(path, MAX_BYTES)
    told = folder / "config.json"
    return StateDicts(str(source), files, _json(told) if told.exists() else None)


def _checkout(folder: Path, folders: Mapping[int, Path]) -> HuggingFace:
    """A folder of one folder for each step."""
    resolved = folder.resolve()
    if word := re.search("llama|gemma", str(resolved), re.IGNORECASE):
        raise ConfigError(f"TransformerLens takes {word[0]!r} in the path {resolved} for an architecture; rename it")
    where = {}
    for step, path in folders.items():
        _plain(path)
        inside = sorted(path.iterdir())
        weights = [one for one in inside if one.suffix == ".safetensors"]
        pickles = [one for one in inside if one.suffix in PICKLES and one.name.startswith(("pytorch_model", "model"))]
        if pickles and not weights:
            raise ConfigError(_pickle(pickles[0]))
        if not weights or not (path / "config.json").exists():
            raise ConfigError(f"{path} lacks config.json or model.safetensors; complete it or move it away")
        for one in weights:
            _plain(one, MAX_BYTES)
        _json(path / "config.json")
        where[step] = (str(resolved / path.name), {"local_files_only": True})
    return HuggingFace(str(folder), where, "Hugging Face models")


def _on_the_hub(name: str) -> HuggingFace:
    """A model that TransformerLens has checkpoints of. Raises ConfigError at once where the hub does not answer."""
    from huggingface_hub import HfApi

    try:
        official = loading.get_official_model_name(name)
    except ValueError:
        raise ConfigError(
            f"there is no folder {name!r}, and TransformerLens knows no model of that name; give the folder that the "
            "checkpoints lie in, or a name such as EleutherAI/pythia-14m"
        ) from None
    revision = next((form for start, form in REVISIONS.items() if official.startswith(start)), None)
    if revision is None:
        raise ConfigError(
            f"{official} has no checkpoints, or has them as pickles, which can run code when read; load it yourself, "
            "save its state dicts as step-100.safetensors and so on, and give their folder"
        )
    try:
        HfApi().model_info(official, timeout=ANSWER_WITHIN)
    except Exception as error:  # of several libraries, which change from version to version
        raise ConfigError(
            f"the Hugging Face hub does not give {official} ({first_line(error)}); where there is a network, run `hf "
            f"download {official} --revision {revision.format(1000)} --local-dir FOLDER/step1000` for each step, then "
            "give FOLDER instead of the name"
        ) from None
    steps, _ = loading.get_checkpoint_labels(official)
    # Not TransformerLens's own loading: it would take pickles, and sends an empty token where none is set.
    return HuggingFace(name, {step: (official, {"revision": revision.format(step)}) for step in steps}, "from the hub")


def _by_step(paths: Iterable[Path]) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for path in paths:
        match = STEP.fullmatch(path.name.removesuffix(".safetensors"))
        if match is None:
            raise ConfigError(f"{path} names no step; call it step-100.safetensors, or move it away")
        step = int(match[1])
        if step in found:
            raise ConfigError(f"{found[step]} and {path} are both step {step}; move one of them away")
        found[step] = path
    return found


def _json(path: Path) -> dict[str, Any]:
    _plain(path, MAX_CONFIG_BYTES)
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no JSON file: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold the entries of a config by name")
    return value


def _plain(path: Path, at_most: int | None = None) -> None:
    """Raise ConfigError for a link, which could lead anywhere, and for what should be a file and is none, or huge."""
    if path.is_symlink():
        raise ConfigError(f"{path} is a symbolic link to {path.readlink()}; put what it stands for in its place")
    if at_most is not None and not path.is_file():
        raise ConfigError(f"{path} is no file; move it away")
    if at_most is not None and (size := path.stat().st_size) > at_most:
        raise ConfigError(f"{path} has {size:,} bytes, and at most {at_most:,} are read; give a smaller model")


def _pickle(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run code when read, so it is not; "
        "load it where you trust it and save it with safetensors.torch.save_file"
    )
