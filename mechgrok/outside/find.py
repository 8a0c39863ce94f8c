"""From a folder, a file or a name to the checkpoints that lie there. Names from outside are not trusted.

state dicts    of a HookedTransformer: a folder of step-100.safetensors, ckpt_100.pt and so on, or one such file;
               config.json beside them, if it is there, is `cfg.to_dict()`
Hugging Face   a folder of folders step1000, checkpoint-500, ... each with config.json and model.safetensors: what
               transformers' Trainer leaves, or Pythia's revisions, each downloaded into a folder of its own
a cache        the hub's own, models--ORG--NAME, whose references name steps
a name         a model that TransformerLens knows the checkpoints of; its revisions are fetched from the hub
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformer_lens import loading_from_pretrained as loading

from mechgrok.errors import ConfigError, first_line
from mechgrok.outside.names import by_step, step_of
from mechgrok.outside.sources import HuggingFace, Source, StateDicts
from mechgrok.outside.tensor_files import PICKLED, READABLE

PICKLES = {".bin", ".ckpt", ".pkl", ".pickle"}
# Trainers leave these beside their checkpoints, and none of them holds the model.
LEFT_BY_TRAINERS = re.compile(r"(optimizer|scheduler|scaler|rng_state|random_states|training_args).*")
MAX_BYTES, MAX_CONFIG_BYTES = 20 * 10**9, 10**6
REVISIONS = {"EleutherAI/pythia": "step{}", "stanford-crfm/": "checkpoint-{}"}  # how the hub names a step
ANSWER_WITHIN = 5  # seconds


def open_source(source: str | Path) -> Source:
    """The checkpoints in a folder or a file, or of a model by its name.

    Raises:
        ConfigError: nothing is there, a step comes twice, a file is a pickle of another kind than torch.save's or a
            link out of its cache, or no network for a name.
    """
    folder = Path(source)
    if folder.is_file():
        return _single(folder)
    if not folder.is_dir():
        if folder.is_symlink() or folder.exists():
            raise ConfigError(f"{source} is no file and no folder; give the folder of all checkpoints")
        return _on_the_hub(str(source))
    inside = sorted(folder.iterdir())
    caches = [path for path in inside if _is_cache(path)]
    if _is_cache(folder) or caches:
        if len(caches) > 1:
            raise ConfigError(f"{source} holds {', '.join(path.name for path in caches)}; give one of these folders")
        return _cached(folder if _is_cache(folder) else caches[0])
    folders = by_step((path.name, path) for path in inside if path.is_dir() and step_of(path.name))
    weights = [path for path in inside if path.suffix in READABLE and not LEFT_BY_TRAINERS.fullmatch(path.name)]
    counted = [path for path in weights if step_of(path.stem)]
    for path in inside:
        if path.suffix in PICKLES and step_of(path.stem):
            raise ConfigError(_pickle(path))
    if folders and not counted:
        return _checkout(folder, folders, _final(folder, weights))
    if bool(folders) == bool(weights):
        found = "holds both kinds of checkpoint" if folders else "holds no checkpoint"
        raise ConfigError(
            f"{source} {found}; give a folder of step-100.safetensors and so on, or one of folders step100 and so on "
            "with config.json and model.safetensors in each"
        )
    converted = {path.stem for path in weights if path.suffix not in PICKLED}
    files = by_step((path.stem, path) for path in weights if path.suffix not in PICKLED or path.stem not in converted)
    return _state_dicts(str(source), files, folder / "config.json")


def _single(path: Path) -> StateDicts:
    """One state dict: a trajectory of one step."""
    if path.suffix in PICKLES:
        raise ConfigError(_pickle(path))
    if path.suffix not in READABLE:
        raise ConfigError(f"{path} is a file; give the folder of all checkpoints")
    step, _ = step_of(path.stem) or (0, "")
    found = _state_dicts(str(path), {step: path}, path.parent / "config.json")
    if step_of(path.stem) is None:
        found.note(f"{path.name} names no step, so it is step 0")
    return found


def _state_dicts(name: str, files: Mapping[int, Path], told: Path) -> StateDicts:
    for path in files.values():
        _plain(path, MAX_BYTES)
    return StateDicts(name, files, _json(told) if told.exists() else None)


def _final(folder: Path, weights: list[Path]) -> Path | None:
    """The folder itself, where a trainer left the final model beside its checkpoints."""
    final = [path for path in weights if path.name.startswith(("model", "pytorch_model"))]
    if others := [path for path in weights if path not in final]:
        raise ConfigError(f"{others[0]} names no step; call it step-100{others[0].suffix}, or move it away")
    return folder if final else None


def _checkout(folder: Path, folders: Mapping[int, Path], final: Path | None) -> HuggingFace:
    """A folder of one folder for each step; final: a model whose step trainer_state.json may tell."""
    folders = dict(folders)
    note = None
    if final is not None:
        told = final / "trainer_state.json"
        step = _json(told).get("global_step") if told.exists() else None
        if not isinstance(step, int) or step < 0:
            note = f"the model in {final} itself is left out, as no trainer_state.json tells its step"
        elif step in folders:
            note = f"the model in {final} itself is left out, as {folders[step].name} is step {step} too"
        else:
            folders[step] = final
    found = _models(folder, folders)
    if note:
        found.note(note)
    return found


def _cached(folder: Path) -> HuggingFace:
    """A model in the hub's cache: the snapshots that references with a step in their names stand for."""
    folders, other = {}, []
    for path in sorted(one for one in (folder / "refs").rglob("*") if one.is_file()):
        told, revision = step_of(path.name), str(path.relative_to(folder / "refs"))
        _plain(path, MAX_CONFIG_BYTES)
        commit = path.read_text().strip()
        if told is None:
            other.append(revision)
        elif not re.fullmatch("[0-9a-f]{7,64}", commit) or not (folder / "snapshots" / commit).is_dir():
            raise ConfigError(f"{folder} lacks the snapshot of {revision}; run `hf download` for that revision again")
        elif told[0] in folders:
            raise ConfigError(f"{folder} has two references to step {told[0]}; remove {path}")
        else:
            folders[told[0]] = folder / "snapshots" / commit
    if not folders:
        raise ConfigError(
            f"no reference in {folder / 'refs'} names a step; run `hf download` with --revision step1000 and so on"
        )
    found = _models(folder, folders)
    if other:
        found.note(f"of {folder.name}, {', '.join(other)} is left out, as its name tells no step")
    return found


def _models(folder: Path, folders: Mapping[int, Path]) -> HuggingFace:
    """Hugging Face models, each in a folder of its own."""
    if word := re.search("llama|gemma", str(folder.resolve()), re.IGNORECASE):
        raise ConfigError(
            f"TransformerLens takes {word[0]!r} in the path {folder.resolve()} for an architecture; rename it"
        )
    where = {}
    for step, path in folders.items():
        _plain(path)
        inside = sorted(path.iterdir())
        for one in filter(Path.is_symlink, inside):
            _plain(one)
        weights = [one for one in inside if one.suffix == ".safetensors"]
        kinds = PICKLES | PICKLED
        pickles = [one for one in inside if one.suffix in kinds and one.name.startswith(("pytorch_model", "model"))]
        if pickles and not weights:
            raise ConfigError(_pickle(pickles[0]))
        if not weights or not (path / "config.json").exists():
            raise ConfigError(f"{path} lacks config.json or model.safetensors; complete it or move it away")
        for one in weights:
            _plain(one, MAX_BYTES)
        _json(path / "config.json")
        where[step] = (str(path.resolve()), {"local_files_only": True})
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
    """Raise ConfigError for a link, which could lead anywhere, and for what should be a file and is none, or huge.

    Links of the hub's cache from a snapshot to its blobs are what they should be.
    """
    if path.is_symlink():
        cache = next((one for one in path.absolute().parents if _is_cache(one)), None)
        if cache is None or not path.resolve().is_relative_to(cache.resolve()):
            raise ConfigError(f"{path} is a symbolic link to {path.readlink()}; put what it stands for in its place")
        if not path.exists():
            raise ConfigError(f"{path} is a link to what is not in the cache; download it again")
    if at_most is not None and not path.is_file():
        raise ConfigError(f"{path} is no file; move it away")
    if at_most is not None and (size := path.stat().st_size) > at_most:
        raise ConfigError(f"{path} has {size:,} bytes, and at most {at_most:,} are read; give a smaller model")


def _is_cache(folder: Path) -> bool:
    return folder.name.startswith("models--") and (folder / "snapshots").is_dir()


def _pickle(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run code when read, so it is not; "
        "load it where you trust it and save it with safetensors.torch.save_file"
    )
