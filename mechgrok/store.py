"""A run directory on disk, and the only file that touches one. Every write is atomic; nothing is unpickled here.

    config.toml                     the run's settings; another configuration is refused
    checkpoints/step-00000100.safetensors   parameters; metadata: step, metrics, config digest, SHA-256
    import.json                     where imported checkpoints came from
    audit.json                      what speaks against some of them
    made-with.json                  versions and machines that trained and sampled
    training/state.safetensors      parameters and AdamW moments, to resume from
    llc/localization-<gamma>-step-size-<epsilon>/<component>/step-00000100.safetensors   losses [chain, draw];
                                    metadata: the estimate
    calibration.json  calibration.svg  calibrated.toml
    refined/<distribution>/localization-...   the same on other data
    reference/                      the run of the reference model, where one is asked for
    llc.nc  <distribution>.nc  report.json  report.md  report.html

and what is kept for every run: <cache folder>/<SHA-256 of the key>.json

The SHA-256 in a file's metadata covers its tensors and its other metadata, so a file that was cut or
altered is refused with its name rather than read.
"""

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mechgrok.config import READ_LATER, LLCConfig, RunConfig, parse_config
from mechgrok.errors import CheckpointError, RunDirectoryError
from mechgrok.health import ChainHealth
from mechgrok.reproducible import made_with
from mechgrok.types import CheckpointMetrics, LLCEstimate

CONFIG = "config.toml"
MAKERS = "made-with.json"
AUDIT = "audit.json"


class RunDirectory:
    """The files of one run. Cheap to make and to send to a worker: it holds only a path and a digest."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        self.config = config
        self.digest = config.digest()

    def __getstate__(self) -> dict[str, Any]:
        # A worker on another machine works in another directory.
        return {**self.__dict__, "path": self.path.absolute()}

    # ---- opening

    @staticmethod
    def holds(path: Path, name: str) -> bool:
        """Whether there is a directory at `path` that has this file or folder."""
        return (path / name).exists()

    @classmethod
    def create(cls, path: str | Path, config: RunConfig) -> "RunDirectory":
        """Make the directory, or open it if it already holds this configuration, whatever `stages` and `analyses` are.

        Raises:
            RunDirectoryError: it holds another configuration, or files that are not a run.
        """
        run = cls(Path(path), config)
        if (run.path / CONFIG).exists():
            every = config.changes_from(_read_config(run.path))
            changes = [change for change in every if not change.startswith(tuple(f"{name}." for name in READ_LATER))]
            if changes:
                raise RunDirectoryError(
                    f"{run.path} belongs to another configuration ({'; '.join(changes)}); "
                    "choose another --out, or go back to the settings in its config.toml"
                )
            if every:
                run.write_text(CONFIG, config.to_toml())
            return run
        if run.path.exists() and (not run.path.is_dir() or any(not _ours(p.name) for p in run.path.iterdir())):
            lost = (run.path / "checkpoints").exists()
            raise RunDirectoryError(
                f"{run.path} has checkpoints but no {CONFIG}; put that back as it was, or choose another --out"
                if lost
                else f"{run.path} exists and is not a mechgrok run; choose another --out"
            )
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirectoryError(
                f"cannot make the run directory {run.path}: {error}; choose another --out"
            ) from None
        run.write_text(CONFIG, config.to_toml())
        return run

    @classmethod
    def open(cls, path: str | Path) -> "RunDirectory":
        """Open an existing run. Raises RunDirectoryError if there is none at `path`."""
        return cls(Path(path), _read_config(Path(path)))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for writing; the lock falls when the process ends, however it ends."""
        try:
            with FileLock(self.path / ".lock", timeout=0):
                for unfinished in self.path.rglob(".*.tmp"):  # of a process that was killed while it wrote
                    unfinished.unlink(missing_ok=True)
                yield
        except Timeout:
            raise RunDirectoryError(f"{self.path} is in use by another mechgrok process; wait for it to end") from None
        except PermissionError as error:
            raise RunDirectoryError(f"{self.path} cannot be written: {error}") from None

    # ---- plain files

    def write_text(self, name: str, text: str) -> Path:
        _write_atomically(self.path / name, text.encode())
        return self.path / name

    def write_json(self, name: str, value: Any) -> Path:
        write_json(self.path / name, value)
        return self.path / name

    def write_netcdf(self, name: str, dataset: Any) -> Path:
        """An xarray Dataset as netCDF 4."""
        with _replacing(self.path / name) as temporary:
            dataset.to_netcdf(temporary, engine="h5netcdf", invalid_netcdf=True)
        return self.path / name

    # ---- what made it

    def note_maker(self, part: str) -> None:
        """Keep what this process makes a part of the run with, beside what others made of it."""
        makers = self.makers()
        own = made_with()
        if own not in makers.setdefault(part, []):
            makers[part].append(own)
            self.write_json(MAKERS, makers)

    def makers(self) -> dict[str, list[dict[str, str]]]:
        """Versions and machines by part; empty for a run that did not keep them."""
        try:
            return read_json(self.path / MAKERS) if (self.path / MAKERS).exists() else {}
        except RunDirectoryError:
            raise RunDirectoryError(
                f"{self.path / MAKERS} is damaged; delete it, and the run no longer tells what made it"
            ) from None

    # ---- what an import was found to be

    def suspicious(self) -> dict[int, str]:
        """The steps that the audit of an import names, and why; empty where there was none."""
        if not (self.path / AUDIT).exists():
            return {}
        try:
            return {int(step): str(why) for step, why in read_json(self.path / AUDIT)["named"].items()}
        except (RunDirectoryError, AttributeError, KeyError, TypeError, ValueError):
            raise RunDirectoryError(f"{self.path / AUDIT} is damaged; run `mechgrok import` again to make it") from None

    # ---- checkpoints

    def write_checkpoint(self, parameters: Mapping[str, Tensor], metrics: CheckpointMetrics) -> None:
        self._write_tensors(self._checkpoint(metrics.step), parameters, {"metrics": asdict(metrics)})

    def read_checkpoint(self, step: int) -> tuple[dict[str, Tensor], CheckpointMetrics]:
        """The parameters and metrics at a step. Raises CheckpointError for a file that cannot be trusted."""
        tensors, metadata = self._read_tensors(self._checkpoint(step), "metrics")
        metrics = CheckpointMetrics(**metadata["metrics"])
        if metrics.step != step:
            raise CheckpointError(f"{self._checkpoint(step)} holds step {metrics.step}; {_REMEDY}")
        return tensors, metrics

    def has_checkpoint(self, step: int) -> bool:
        return self._checkpoint(step).exists()

    def write_training_state(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        self._write_tensors(self.path / "training" / "state.safetensors", tensors, {"step": step})

    def read_training_state(self) -> tuple[int, dict[str, Tensor]] | None:
        """(step, tensors) of the last saved training state, None if training has not begun."""
        path = self.path / "training" / "state.safetensors"
        if not path.exists():
            return None
        tensors, metadata = self._read_tensors(path, "step")
        return metadata["step"], tensors

    # ---- estimates

    def write_estimate(self, step: int, estimate: LLCEstimate, data: str = "") -> None:
        """data: the distribution it was sampled on, "" for the training data."""
        losses = torch.from_numpy(np.ascontiguousarray(estimate.losses))
        record = {k: v for k, v in asdict(estimate).items() if k not in ("losses", "config")}
        self._write_tensors(
            self._estimate(step, estimate.component, estimate.config, data),
            {"losses": losses},
            {"estimate": record, "step": step, "data": data, "sampling": estimate.config.model_dump()},
        )

    def read_estimate(self, step: int, component: str, config: LLCConfig, data: str = "") -> LLCEstimate | None:
        """The stored estimate, None if this unit of work has not ended yet."""
        path = self._estimate(step, component, config, data)
        if not path.exists():
            return None
        tensors, metadata = self._read_tensors(path, "estimate")
        record = metadata["estimate"]
        # What an older version had no setting for was done as the setting's default has it.
        sampling = {name: own.default for name, own in LLCConfig.model_fields.items()} | metadata["sampling"]
        told = (sampling, record["component"], metadata["step"], metadata["data"])
        if told != (config.model_dump(), component, step, data):
            raise CheckpointError(f"{path} holds another estimate than its name says; {_REMEDY}")
        for reasons in ("reasons", "start_reasons"):
            record["health"][reasons] = tuple(record["health"].get(reasons, ()))
        try:  # what an older version did not know keeps its default
            health = ChainHealth(**record.pop("health"))
            return LLCEstimate(losses=tensors["losses"].numpy(), config=config, health=health, **record)
        except TypeError:
            raise CheckpointError(f"{path} was written by another version of mechgrok; {_REMEDY}") from None

    # ---- inside

    def _checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:08d}.safetensors"

    def _estimate(self, step: int, component: str, config: LLCConfig, data: str) -> Path:
        setting = f"localization-{config.localization!r}-step-size-{config.step_size!r}"
        root = self.path / "refined" / data if data else self.path / "llc"
        return root / setting / component / f"step-{step:08d}.safetensors"

    def _write_tensors(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        # One metadata key alone: safetensors writes several in no fixed order, and equal runs should be equal files.
        record = {"config": self.digest, **metadata}
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        signed = {"record": record, "sha256": _digest(plain, record)}
        _write_atomically(path, save(plain, {"mechgrok": json.dumps(signed, sort_keys=True)}))

    def _read_tensors(self, path: Path, has: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the metadata, which have this key in a file of the kind that is asked for."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except FileNotFoundError:
            if not (self.path / CONFIG).exists():
                raise RunDirectoryError(
                    f"{platform.node()} does not see the run directory {self.path}; "
                    "keep it on a filesystem that every worker has at that same path"
                ) from None
            raise CheckpointError(f"{path} is missing; run `mechgrok run` again to make it") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is truncated or no safetensors file ({error}); {_REMEDY}") from None
        try:
            signed = json.loads(metadata["mechgrok"])
            record, intact = signed["record"], signed["sha256"] == _digest(tensors, signed["record"])
        except (KeyError, TypeError, json.JSONDecodeError):
            raise CheckpointError(f"{path} was not written by mechgrok; {_REMEDY}") from None
        if not intact:
            raise CheckpointError(f"{path} was altered since mechgrok wrote it (SHA-256 differs); {_REMEDY}")
        if record["config"] != self.digest:
            raise CheckpointError(
                f"{path} belongs to another configuration than {self.path / CONFIG}; if that was changed in more than "
                "stages and analyses, put it back as it was, or run it with another --out"
            )
        if has not in record:
            raise CheckpointError(f"{path} holds something else than its name says; {_REMEDY}")
        return tensors, record


def _ours(name: str) -> bool:
    """Whether a file can be there before config.toml is: a lock, or what a killed first write left."""
    return name == ".lock" or (name.startswith(f".{CONFIG}.") and name.endswith(".tmp"))


_REMEDY = "delete that file and run `mechgrok run` again to make it anew"


def run_directories(root: str | Path) -> list[Path]:
    """The runs directly under `root`, sorted."""
    return sorted(path.parent for path in Path(root).glob(f"*/{CONFIG}"))


def read_json(path: str | Path) -> Any:
    """A JSON file from anywhere. Raises RunDirectoryError if it is missing or malformed."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise RunDirectoryError(f"cannot read {path}: {error}") from None
    except json.JSONDecodeError as error:
        raise RunDirectoryError(f"{path} is not valid JSON ({error}); make it anew") from None


def write_json(path: str | Path, value: Any) -> None:
    """A JSON file anywhere, atomically."""
    _write_atomically(Path(path), (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def cache_folder() -> Path:
    """Where what is dear to make is kept between runs: $MECHGROK_CACHE, or ~/.cache/mechgrok."""
    return Path(os.environ.get("MECHGROK_CACHE") or "~/.cache/mechgrok").expanduser()


def compiled_folder(*sources: Path) -> Path | None:
    """Where what is compiled from the files of folders is kept: another place as soon as any of them changes.

    None where others could write: numba unpickles what it finds there.
    """
    with suppress(OSError, RuntimeError):  # no folder, so nobody's; numba will find no place either
        state = _made_cache_folder().stat()
        if os.name == "posix" and (state.st_uid != os.getuid() or state.st_mode & 0o022):
            return None
    contents = hashlib.sha256()
    for path in (path for folder in sources for path in sorted(folder.glob("*.py"))):
        contents.update(path.name.encode() + path.read_bytes())
    return cache_folder() / f"compiled-{contents.hexdigest()[:16]}"


def _made_cache_folder() -> Path:
    cache_folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    return cache_folder()


def cached_json(key: Any, make: Callable[[], Any]) -> Any:
    """What `make()` returns, as JSON gives it back; made once for every `key`, which is JSON too.

    The file is named by the SHA-256 of the key and begins with that of its contents: one that was cut or
    altered is made anew. A folder that cannot be read or written costs the time of making, nothing else.
    """
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest() + ".json"
    with suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        path = cache_folder() / name
        signature, _, body = path.read_bytes().partition(b"\n")
        if signature == hashlib.sha256(body).hexdigest().encode():
            return json.loads(body)
    body = json.dumps(make(), separators=(",", ":")).encode()
    with suppress(OSError, RuntimeError, RunDirectoryError):
        # It may hold words of a private text, and the folder may have been there before.
        signed = hashlib.sha256(body).hexdigest().encode() + b"\n" + body
        _write_atomically(_made_cache_folder() / name, signed, mode=0o600)
    return json.loads(body)


def _read_config(path: Path) -> RunConfig:
    try:
        text = (path / CONFIG).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise RunDirectoryError(f"{path} is not a mechgrok run: cannot read its config.toml ({error})") from None
    return parse_config(text, str(path / CONFIG), stored=True)


def _digest(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> str:
    """SHA-256 over the metadata as canonical JSON, which keeps floats exactly, and over every tensor."""
    sha = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


@contextmanager
def _replacing(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place, whole, when the block ends well."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    except IsADirectoryError:
        raise RunDirectoryError(f"cannot write {path}: it is a folder; give the name of a file") from None
    except OSError as error:
        raise RunDirectoryError(f"cannot write {path}: {error}; make room or choose another place") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    with _replacing(path, mode) as temporary:
        temporary.write_bytes(data)
