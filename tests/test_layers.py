"""Who may import whom, read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each set may import the sets above it; within a set only the first, the vocabulary, imports its own.
LAYERS = [
    {
        "types",
        "health",
        "calibration",
        "errors",
        "seeds",
        "task_config",
        "llc_config",
        "setting_errors",
        "toml_values",
        "config",
        "reproducible",
        "unwrap",
        "terminal",
    },
    {"plain"},
    {"model", "canonical", "components", "store", "schedule", "stages", "plotting", "regression"},
    {"loops", "hooked_heads"},
    {"sampling"},
    {"replicas", "tasks", "outside"},
    {"train", "measures", "llc"},
    {"plan", "compiling"},
    {"importing"},
    {"pipeline"},
    {"import_command"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
FILES = [path for package in ("mechgrok", "analyses") for path in (ROOT / package).rglob("*.py")]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def unit(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_layer_may(path: Path) -> None:
    names, own = imported(path), unit(path)
    inner = {name.split(".")[1] for name in names if name.startswith("mechgrok.")} - {own}
    if path.is_relative_to(ROOT / "analyses"):
        assert not inner & {"cli", "pipeline", "store", "train"}
        others = {name.split(".")[1] for name in names if name.startswith("analyses.")}
        allowed = {"contract": {"REGISTRY"}, "render": {"contract"}, "__init__": {"contract"}}.get(
            path.stem, {"contract"}
        )
        assert others <= allowed, f"{path.stem} imports {others - allowed}"
        return
    if own in {"cli", "__init__", "presets"}:
        return
    assert not any(name.split(".")[0] == "analyses" for name in names)
    for other in inner:
        same_layer = LEVEL[own] == LEVEL[other] == 0
        assert LEVEL[other] < LEVEL[own] or same_layer, f"{own} imports {other}"


def test_only_cli_imports_analyses_in_mechgrok() -> None:
    importers = {
        unit(path)
        for path in FILES
        if path.is_relative_to(ROOT / "mechgrok") and any(n.split(".")[0] == "analyses" for n in imported(path))
    }
    assert importers == {"cli"}


@pytest.mark.parametrize("package", ["sampling", "stages.py"])
def test_sampling_and_stages_know_no_transformer_lens(package: str) -> None:
    paths = [path for path in FILES if package in path.parts]
    assert paths
    for path in paths:
        assert not any(name.startswith("transformer_lens") for name in imported(path))


def calls(path: Path) -> set[str]:
    """Names that are called, the last part of a dotted one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            target = node.func
            found.add(target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", ""))
    return found


def test_only_model_constructs_hooked_transformers() -> None:
    assert {unit(path) for path in FILES if "HookedTransformer" in calls(path)} == {"model"}


def test_only_store_writes_files_and_nothing_is_unpickled() -> None:
    writers = {"write_text", "write_bytes", "mkdir", "to_netcdf", "rename", "unlink", "replace_file"}
    for path in FILES:
        if unit(path) == "store":
            continue
        used = calls(path) & (writers | {"open", "save_file", "savez"})
        # RunDirectory.write_text is the store's own.
        assert used <= ({"write_text", "open"} if unit(path) in {"cli", "pipeline"} else set()), (path, used)
    banned = {"pickle", "torch.load", "numpy.load", "marshal", "shelve", "dill"}
    for path in FILES:
        assert not banned & imported(path), path


def test_files_stay_small() -> None:
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 400, path
