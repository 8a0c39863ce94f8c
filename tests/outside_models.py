"""Small models of other makes, and settings of runs that import them."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from mechgrok import seeds
from mechgrok.config import ModelConfig, RunConfig
from mechgrok.model import build_model
from mechgrok.tasks import make_split
from tests.oracles import tiny_config

RATES = {"ngram": 0.1, "repeat": 0.1, "open": 0.0, "close": 0.0, "skip_open": 0.0, "skip_close": 0.0}
TASK = {
    "name": "planted-language", "n_ctx": 12, "n_train": 64, "n_test": 32, "n_refined": 8, "n_plain": 10,
    "n_brackets": 1, "n_skips": 4, "n_ngrams": 2, "ngram_length": 3, "n_successors": 2, "noise": 0.1,
    "rates": RATES | {"repeat_length": (2, 4)}, "distributions": {},
}  # fmt: skip
N_TOKENS = 18
STEPS = (0, 100, 2000)

SHAPES = {
    "shortformer": {"d_mlp": None, "normalization_type": "LN", "positional_embedding_type": "shortformer"},
    "rotary": {
        "positional_embedding_type": "rotary", "rotary_dim": 4, "rotary_base": 500.0, "parallel_attn_mlp": True,
        "normalization_type": "RMS", "act_fn": "gelu_new", "eps": 1e-3, "rotary_adjacent_pairs": True,
    },
    "alibi": {"positional_embedding_type": "alibi", "act_fn": "solu_ln", "normalization_type": "LNPre", "d_vocab": 40},
}  # fmt: skip


def outside_config(model: ModelConfig, steps: tuple[int, ...] = STEPS, **changes: dict) -> RunConfig:
    """The settings of an imported run on a tiny planted language."""
    base = tiny_config(**changes).model_dump()
    train = {"source": "imported", "checkpoints": steps}
    return RunConfig.model_validate(
        base | {"task": TASK, "train": train, "model": model.model_dump(exclude={"init_std"})}
    )


SPLIT = make_split(outside_config(tiny_config().model).task, 0)


def filled(model: torch.nn.Module, step: int) -> torch.nn.Module:
    """Weights large enough that attention and positions matter, other ones at every step."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=seeds.stream(step, name)))
            if "norm" in name and "weight" in name or ".ln_" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval()


def neox(step: int, **changes: object) -> torch.nn.Module:
    shape = {
        "vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
        "rotary_pct": 0.5, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    return filled(transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**(shape | changes))), step)


def gpt2(step: int) -> torch.nn.Module:
    config = transformers.GPT2Config(vocab_size=N_TOKENS, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    config.n_ctx = 16
    return filled(transformers.GPT2LMHeadModel(config), step)


def checkout(folder: Path, make: Callable[[int], torch.nn.Module], steps: tuple[int, ...] = STEPS) -> Path:
    for step in steps:
        make(step).save_pretrained(folder / f"step{step}", safe_serialization=True)
    return folder


def state_dicts(folder: Path, shape: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[int, torch.Tensor]:
    """A folder of state dicts with their buffers and config.json, and the models' logits on the test rows."""
    folder.mkdir()
    logits = {}
    for step in STEPS:
        model = build_model(shape, SPLIT, step)
        state = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
        state["blocks.0.attn.mask"] = torch.ones(12, 12, dtype=torch.bool)  # as older versions saved it
        save_file(state, folder / f"step_{step:06d}.safetensors")
        logits[step] = model(SPLIT.test.tokens).detach()
    (folder / "config.json").write_text(json.dumps(model.cfg.to_dict(), default=str))
    return logits
