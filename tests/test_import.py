"""Trajectories from elsewhere: what is imported computes what its source computed, and what is wrong is named."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformer_lens import loading_from_pretrained

from mechgrok import cli, pipeline
from mechgrok.config import RunConfig, parse_config
from mechgrok.errors import CheckpointError, ConfigError
from mechgrok.model import build_model, evaluate, shape_of
from mechgrok.outside.find import open_source
from mechgrok.outside.sources import check_fits
from mechgrok.replicas.network import why_not
from tests.oracles import tiny_config
from tests.outside_models import SHAPES, SPLIT, STEPS, checkout, gpt2, neox, outside_config, state_dicts


@pytest.fixture(scope="module")
def pythia(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkout(tmp_path_factory.mktemp("outside") / "tiny-neox", neox)


@pytest.mark.parametrize("name", SHAPES)
def test_imported_state_dicts_are_the_same_model(name: str, tmp_path: Path) -> None:
    shape = tiny_config(model=SHAPES[name] | {"init_std": 0.5}).model
    logits = state_dicts(tmp_path / "out", shape)
    config = outside_config(shape)
    trajectory = pipeline.import_run(str(tmp_path / "out"), config, tmp_path / "run")
    assert trajectory.steps == STEPS
    for step, model in trajectory:
        assert torch.equal(model(SPLIT.test.tokens), logits[step])
    assert not torch.allclose(logits[0], logits[100], atol=0.1)
    losses = [evaluate(trajectory.model_at(step), SPLIT.test)[0] for step in STEPS]
    np.testing.assert_allclose(trajectory.column("test_loss"), losses, rtol=1e-6)
    # What config.json tells describes the model entirely, and survives TOML.
    told = pipeline.import_template(str(tmp_path / "out"))
    again = parse_config(told.to_toml(), "again")
    assert again == told and again.train.checkpoints == STEPS
    check_fits(open_source(tmp_path / "out"), again.model, SPLIT, STEPS)


def test_half_precision_and_no_config_json_are_accepted(tmp_path: Path) -> None:
    shape = tiny_config(model=SHAPES["rotary"]).model
    logits = state_dicts(tmp_path / "out", shape, torch.bfloat16)
    (tmp_path / "out" / "config.json").unlink()
    trajectory = pipeline.import_run(str(tmp_path / "out"), outside_config(shape), tmp_path / "run")
    for step, model in trajectory:
        assert model.W_E.dtype == torch.float32
        torch.testing.assert_close(model(SPLIT.test.tokens), logits[step], atol=0.1, rtol=0.1)
    # Without config.json the saved tables still tell another rotary base.
    other = outside_config(shape.model_copy(update={"rotary_base": 10000.0}))
    with pytest.raises(CheckpointError, match="rotary_sin is another table"):
        pipeline.import_run(str(tmp_path / "out"), other, tmp_path / "other")


CASES = {
    "parallel": (neox, "parallel_attn_mlp", True),
    "sequential": (lambda step: neox(step, use_parallel_residual=False), "parallel_attn_mlp", False),
    "base": (lambda step: neox(step, rope_theta=7.0, rotary_emb_base=7.0), "rotary_base", 7.0),
    "gpt2": (gpt2, "act_fn", "gelu_new"),
}


@pytest.mark.parametrize("case", CASES)
def test_imported_hugging_face_models_have_their_logits(case: str, tmp_path: Path) -> None:
    make, setting, value = CASES[case]
    folder = checkout(tmp_path / "models", make)
    config = outside_config(pipeline.import_template(str(folder)).model)
    assert getattr(config.model, setting) == value
    trajectory = pipeline.import_run(str(folder), config, tmp_path / "run")
    for step, model in trajectory:
        with torch.no_grad():
            expected = make(step)(SPLIT.test.tokens).logits
        torch.testing.assert_close(model(SPLIT.test.tokens), expected, atol=2e-5, rtol=1e-5)
        assert expected.std() > 0.1
    assert json.loads((tmp_path / "run" / "import.json").read_text())["kind"] == "Hugging Face models"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """The command line in this process: what it prints, on stderr where it ends in an error."""

    def run(*arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["mechgrok", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        assert (stopped.value.code or 0) == code, printed
        return printed.err if code else printed.out

    return run


SHORT = {"nbeta": 10.0, "step_size": 1e-3, "localization": 200.0, "n_chains": 2, "n_draws": 8, "n_burnin": 2}


def test_a_run_of_imported_checkpoints_is_the_run_that_was_trained(tmp_path: Path, call: Callable[..., str]) -> None:
    """The checkpoints of a finished run, brought in from a folder, give its estimates bit by bit, and its report."""
    few = {"llc": {"sampling": SHORT | {"batch_size": 8}, "checks_every": 4}, "stages": {"n_posterior": 20}}
    trained = tiny_config(**few, analyses={"names": ("ablation",), "n_null": 3})
    study = pipeline.run(trained, tmp_path / "trained", n_workers=1)
    folder, out = tmp_path / "elsewhere", tmp_path / "run"
    folder.mkdir()
    for step, model in study.trajectory:
        save_file(model.state_dict(), folder / f"step-{step}.safetensors")
    train = {"source": "imported", "checkpoints": study.trajectory.steps}
    model = trained.model.model_dump(exclude={"init_std"})  # which an import has no use for
    config = RunConfig.model_validate(trained.model_dump() | {"train": train, "model": model})
    (tmp_path / "my.toml").write_text(config.to_toml())
    assert "test accuracy" in call("import", folder, "--config", tmp_path / "my.toml", "--out", out)
    assert call("run", out / "config.toml", "--out", out, "--workers", 1).strip().endswith("report.html")
    for command, text in (("llc", "L0H1"), ("stages", "stage"), ("report", "report.html")):
        assert text in call(command, out)
    assert "claims: ablation" in call("analyse", out, "ablation")
    imported = pipeline.load_study(out)
    assert np.array_equal(imported.curve.llc, study.curve.llc)
    assert imported.stages == study.stages and imported.trajectory.metrics == study.trajectory.metrics
    # Again does nothing; other weights are refused; what is missing is told, and nothing is trained in its place.
    call("import", folder, "--config", tmp_path / "my.toml", "--out", out)
    last = folder / f"step-{study.trajectory.steps[-1]}.safetensors"
    save_file({name: 1.1 * tensor for name, tensor in load_file(last).items() if "." in name}, last)
    told = (out / "import.json").read_text()
    message = call("import", folder.rename(tmp_path / "other"), "--config", tmp_path / "my.toml", "--out", out, code=2)
    assert "holds another checkpoint at step 40" in message and (out / "import.json").read_text() == told
    (out / "checkpoints" / "step-00000040.safetensors").unlink()
    assert "lacks the imported checkpoint of step 40; run `mechgrok import" in call(
        "train", out / "config.toml", "--out", out, code=2
    )
    assert "lacks the imported checkpoint of step 40" in call("stages", out, code=2)
    assert not (out / "training").exists()


def test_a_neox_model_gets_an_llc_for_a_head_and_for_the_model(pythia: Path, tmp_path: Path) -> None:
    """The fast path refuses its parallel layers by name, so TransformerLens itself is sampled."""
    model = pipeline.import_template(str(pythia)).model
    config = outside_config(
        model,
        (100, 2000),
        llc={"components": ("model", "L0H1"), "checks_every": 2, "sampling": SHORT | {"batch_size": 8}},
    )
    pipeline.import_run(str(pythia), config, tmp_path / "run")
    study = pipeline.run(config, tmp_path / "run", n_workers=1)
    assert why_not(study.trajectory.model_at(100)) == "parallel_attn_mlp = True"
    assert study.curve.llc.shape == (2, 2) and np.isfinite(study.curve.llc).all()
    assert (study.curve.std_error > 0).all()
    np.testing.assert_allclose(study.curve.init_loss, study.trajectory.column("train_loss"), rtol=1e-6)


def test_a_conversion_that_is_wrong_is_noticed(pythia: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = loading_from_pretrained.convert_neox_weights

    def wrong(model: torch.nn.Module, cfg: object) -> dict[str, torch.Tensor]:
        state = convert(model, cfg)
        query, key = (f"blocks.1.attn.W_{letter}" for letter in "QK")
        return state | {query: state[key].flip(0), key: state[query]}

    monkeypatch.setattr(loading_from_pretrained, "convert_neox_weights", wrong)
    config = outside_config(pipeline.import_template(str(pythia)).model)
    with pytest.raises(CheckpointError, match="step0: TransformerLens converts this .* other logits"):
        pipeline.import_run(str(pythia), config, tmp_path / "run")


def spoiled(folder: Path, how: str) -> None:
    """A folder of state dicts with one thing wrong."""
    first, last = folder / "step_000000.safetensors", folder / "step_002000.safetensors"
    state, config = load_file(first), json.loads((folder / "config.json").read_text())
    if how == "truncated":
        first.write_bytes(first.read_bytes()[:-100])
    elif how == "garbage":
        first.write_bytes(b"\xff" * 1000)
    elif how == "shape":
        save_file(state | {"embed.W_E": state["embed.W_E"][:-1].clone()}, first)
    elif how == "names":
        save_file({name: tensor for name, tensor in state.items() if ".attn." not in name}, first)
    elif how == "integers":
        save_file(state | {"embed.W_E": state["embed.W_E"].int()}, first)
    elif how == "not finite":
        save_file(state | {"embed.W_E": state["embed.W_E"] * torch.nan}, first)
    elif how == "overflow":  # every number is finite, and their products are not
        save_file({name: 1e30 * tensor.float() for name, tensor in state.items()}, first)
    elif how == "missing":
        last.unlink()
    elif how == "duplicate":
        shutil.copy(last, folder / "step-2000.safetensors")
    elif how == "nameless":
        last.rename(folder / "final.safetensors")
    elif how == "pickle":
        last.unlink()
        (folder / "step-2000.bin").write_bytes(b"")
    elif how == "link":
        last.rename(folder.parent / "kept")
        last.symlink_to(folder.parent / "kept")
    elif how == "folder":
        last.unlink()
        last.mkdir()
    elif how == "huge":
        with last.open("r+b") as file:
            file.truncate(10**11)  # a hole: it takes no room
    elif how == "activation":
        (folder / "config.json").write_text(json.dumps(config | {"act_fn": "gelu"}))
    elif how == "feature":
        (folder / "config.json").write_text(json.dumps(config | {"use_attn_scale": False}))
    elif how == "unknown":
        (folder / "config.json").write_text(json.dumps(config | {"use_magic": True}))
    elif how == "no json":
        (folder / "config.json").write_text("{")
    elif how == "empty":
        for path in folder.iterdir():
            path.unlink()
    else:
        raise AssertionError(how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "step_000000.safetensors is truncated or no safetensors file"),
        ("garbage", "step_000000.safetensors is truncated or no safetensors file"),
        ("shape", r"step_000000.safetensors: parameter embed.W_E has shape \(17, 16\), the model needs \(18, 16\)"),
        ("names", r"missing \['blocks.0.attn.W_K', .*\] and 5 more, unknown \[\]; correct \[model\]"),
        ("integers", "embed.W_E is torch.int32, which is no kind of weight"),
        ("not finite", r"at step 0 is not finite: embed.W_E\[0, 0\] is nan, and 287 more; leave .* train.checkpoints$"),
        ("overflow", "the loss of .* at step 0 is not finite; leave .* and choose another --out$"),
        ("missing", "has no checkpoint at step 2000; it has 0, 100$"),
        ("duplicate", "step-2000.safetensors and .*step_002000.safetensors are both step 2000"),
        ("nameless", "final.safetensors names no step; call it step-100.safetensors"),
        ("pickle", "step-2000.bin is a pickle, which can run code when read"),
        ("link", "step_002000.safetensors is a symbolic link to .*kept"),
        ("folder", "step_002000.safetensors is no file"),
        ("huge", "step_002000.safetensors has 100,000,000,000 bytes, and at most"),
        ("activation", "act_fn = 'gelu', not 'relu'; correct \\[model\\]"),
        ("feature", "use_attn_scale = False, which no setting"),
        ("unknown", "use_magic = True, which no setting"),
        ("no json", "config.json is no JSON file"),
        ("empty", "holds no checkpoint; give a folder of step-100.safetensors"),
    ],
)
def test_what_is_wrong_with_state_dicts_is_one_sentence(how: str, message: str, tmp_path: Path) -> None:
    shape = tiny_config().model
    state_dicts(tmp_path / "out", shape)
    pipeline.import_run(str(tmp_path / "out"), outside_config(shape), tmp_path / "good")
    spoiled(tmp_path / "out", how)
    with pytest.raises((ConfigError, CheckpointError), match=message) as error:
        pipeline.import_run(str(tmp_path / "out"), outside_config(shape), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("pickle", "pytorch_model.bin is a pickle, which can run code when read"),
        ("truncated", "step100 cannot be read as a model"),
        ("incomplete", "step100 does not fit its config.json: gpt_neox.final_layer_norm.weight"),
        ("deeper", "at step 100 has n_layers = 3, not 2; correct"),
        ("code", "step100 cannot be read as a model"),
        ("gated", "step100 cannot be read|no setting of"),
        ("no config", "step100 lacks config.json or model.safetensors"),
        ("link", "step100 is a symbolic link"),
        ("duplicate", "are both step 100"),
        ("llama", "takes 'Llama' in the path .* for an architecture; rename it"),
    ],
)
def test_what_is_wrong_with_hugging_face_models_is_one_sentence(
    how: str, message: str, pythia: Path, tmp_path: Path
) -> None:
    config = outside_config(pipeline.import_template(str(pythia)).model)
    folder = shutil.copytree(pythia, tmp_path / ("Llama" if how == "llama" else "models"))
    step = folder / "step100"
    weights, told = step / "model.safetensors", step / "config.json"
    if how == "pickle":
        weights.rename(step / "pytorch_model.bin")
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "incomplete":
        state = load_file(weights)
        del state["gpt_neox.final_layer_norm.weight"]
        save_file(state, weights, {"format": "pt"})
    elif how == "deeper":
        told.write_text(told.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    elif how == "code":
        evil = {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil", "architectures": ["Evil"]}
        told.write_text(json.dumps(evil))
        (step / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit")
    elif how == "gated":
        told.write_text(told.read_text().replace("GPTNeoXForCausalLM", "MambaForCausalLM"))
    elif how == "no config":
        told.unlink()
    elif how == "link":
        step.rename(tmp_path / "kept")
        step.symlink_to(tmp_path / "kept")
    elif how == "duplicate":
        shutil.copytree(step, folder / "checkpoint-100")
    with pytest.raises((ConfigError, CheckpointError), match=message) as error:
        pipeline.import_run(str(folder), config, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_task_that_does_not_fit_the_model_is_refused(pythia: Path, tmp_path: Path) -> None:
    model = pipeline.import_template(str(pythia)).model
    for changes, message in (
        ({"d_vocab": 17}, "model.d_vocab is 17 and the task needs 18"),
        ({"n_ctx": 11}, "model.n_ctx is 11 and the task needs 12"),
        ({"d_vocab_out": 3}, "model.d_vocab_out is 3 and the task needs 18"),
        ({"rotary_dim": 5}, "even rotary_dim"),
        ({"d_mlp": 20, "eps": 1e-3}, "has d_mlp = 24, not 20, eps = 1e-05, not 0.001"),
    ):
        with pytest.raises(ConfigError, match=message):
            pipeline.import_run(str(pythia), outside_config(model.model_copy(update=changes)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_settings_of_an_import(call: Callable[..., str], pythia: Path, tmp_path: Path) -> None:
    trained, imported = tiny_config(), outside_config(tiny_config().model)
    assert parse_config(imported.to_toml(), "again") == imported and imported.digest() != trained.digest()
    text = imported.to_toml()
    for old, new, message in (
        ('source = "imported"', 'source = "elsewhere"', "train.source"),
        ('source = "imported"', 'source = "imported"\nn_steps = 3', "unknown key 'train.n_steps'"),
        ('source = "imported"', "", "missing key 'train.n_steps'"),
        ("    100,\n    2000,", "    2000,\n    100,", "checkpoints must increase"),
    ):
        assert old in text
        with pytest.raises(ConfigError, match=message):
            parse_config(text.replace(old, new), "my.toml")
    reference = {"distribution": "reference", "reference_layers": 1, "components": ("model",)}
    with pytest.raises(ValueError, match="trains nothing, so remove the refinement 'reference'"):
        outside_config(tiny_config().model, llc={"refinements": (reference,)})
    (tmp_path / "trained.toml").write_text(trained.to_toml())
    assert "describes training" in call("import", pythia, "--config", tmp_path / "trained.toml", code=2)
    assert "give either --config" in call("import", pythia, code=2)
    printed = call("import", pythia, "--init")
    assert printed.startswith("# [model] and [train] are those of")
    assert parse_config(printed, "printed").model == pipeline.import_template(str(pythia)).model
    assert "is a file; give the folder" in call("import", tmp_path / "trained.toml", "--init", code=2)


def test_a_name_without_a_network_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, call: Callable[..., str]) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing answers there
    started = time.perf_counter()
    message = call("import", "EleutherAI/pythia-14m", "--init", code=2)
    assert "then give FOLDER instead of the name" in message and "--local-dir FOLDER/step1000" in message
    assert time.perf_counter() - started < 5
    assert "has them as pickles" in call("import", "gelu-2l", "--init", code=2)
    assert "TransformerLens knows no model of that name" in call("import", "no/such", "--init", code=2)


def test_revisions_of_a_name_are_fetched_by_step(pythia: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what fetches is replaced: each revision comes from a folder here."""
    asked = []
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, name, timeout: None)
    for kind in (transformers.AutoConfig, transformers.AutoModelForCausalLM):
        fetch = kind.from_pretrained

        def local(name: str, *, fetch: Callable = fetch, revision: str = "", **options: object) -> object:
            if isinstance(name, Path):  # by the other one, which has been here
                return fetch(name, **options)
            assert name == "EleutherAI/pythia-14m"
            asked.append((revision, options.get("use_safetensors")))
            return fetch(pythia / revision, **{k: v for k, v in options.items() if k != "token"})

        monkeypatch.setattr(kind, "from_pretrained", local)
    source = open_source("pythia-14m")
    assert source.steps[:3] == (0, 1, 2) and source.steps[-1] == 143000
    config = outside_config(source.shape(2000), (0, 2000))
    trajectory = pipeline.import_run("pythia-14m", config, tmp_path / "run")
    monkeypatch.undo()
    for step, model in trajectory:
        with torch.no_grad():
            torch.testing.assert_close(
                model(SPLIT.test.tokens), neox(step)(SPLIT.test.tokens).logits, atol=2e-5, rtol=1e-5
            )
    audited = imported = ["step0", "step2000"]
    assert [revision for revision, safe in asked if safe] == audited + imported


def test_a_description_holds_everything_or_is_refused() -> None:
    cfg = vars(build_model(tiny_config(model=SHAPES["rotary"]).model, SPLIT, 0).cfg)
    assert shape_of(cfg) == shape_of(json.loads(json.dumps(cfg, default=str)))
    for name, value in (
        ("gated_mlp", True), ("attention_dir", "bidirectional"), ("use_local_attn", True), ("attn_scale", 1.0),
        ("n_key_value_heads", 1), ("act_fn", "xielu"), ("normalization_type", "other"),
        ("output_logits_soft_cap", 30.0),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=name):
            shape_of(cfg | {name: value})
