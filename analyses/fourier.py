"""Is the network's algorithm the Fourier one of Nanda et al. 2023, and in which stage does it form?

Key frequencies are fixed from the final checkpoint (`measures.fourier.key_frequencies`) and applied
to all. Restricted loss is on test pairs, excluded loss on training pairs; the projections use all
p^2 inputs, so the excluded loss has seen the test inputs too (not their answers). Where the model has more classes than
residues, losses are over all of them, as in training, and spectra and R^2 over the residues. W_E and W_L are of the
weights: no norm and no hook is in them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformer_lens import HookedTransformer

from analyses.contract import CONCENTRATED, Series, at, change, claim, concentration, end_of, mean_over, strongest
from mechgrok import plotting
from mechgrok.errors import AnalysisError
from mechgrok.measures import fourier
from mechgrok.types import Claim, LLCCurve, Report, Split, Stage, Study

NAME = "fourier"
TASKS = ("modular-addition",)
ROWS = 2**12  # of all pairs at once


def prepare(model: HookedTransformer, split: Split) -> dict[str, Any]:
    """The key frequencies of the final model."""
    return {"key_frequencies": fourier.key_frequencies(_neuron_logit_map(model, split.n_classes))}


def measure(
    model: HookedTransformer, split: Split, rng: torch.Generator, facts: Mapping[str, Any]
) -> dict[str, np.ndarray | float]:
    """Spectra, restricted and excluded loss, neuron clusters, logit fit and sparsity of one model."""
    p, keys = split.n_classes, facts["key_frequencies"]
    logits, activations, is_train = _on_all_pairs(model, split)
    targets = np.add.outer(np.arange(p), np.arange(p)).flatten() % p
    embedding = model.W_E[:p].detach().double().numpy()
    neuron_map = _neuron_logit_map(model, p)
    fve = fourier.neuron_fve(activations, p)
    best = fve.argmax(1) + 1
    clustered = fve.max(1) > fourier.FVE_CLUSTERED
    frequencies = np.arange(1, (p - 1) // 2 + 1)

    def loss(of: np.ndarray, on: np.ndarray) -> float:
        return float(fourier.cross_entropy(of, targets)[on].mean())

    return {
        "embedding_spectrum": fourier.frequency_norms(embedding),
        "neuron_logit_spectrum": fourier.frequency_norms(neuron_map),
        "neurons_by_frequency": ((best == frequencies[:, None]) & clustered).mean(1),
        "single_frequency_neurons": float(clustered.mean()),
        "logit_r2": fourier.logit_r2(logits, keys),
        "restricted_loss": loss(fourier.restricted_logits(logits, keys), ~is_train),
        "excluded_loss": loss(fourier.excluded_logits(logits, keys), is_train),
        "test_loss": loss(logits, ~is_train),
        "train_loss": loss(logits, is_train),
        "gini_W_E": fourier.gini(fourier.component_norms(embedding)),
        "gini_W_L": fourier.gini(fourier.component_norms(neuron_map)),
        "squared_weights": sum(float(q.detach().double().square().sum()) for q in model.parameters()),
    }


def conclude(series: Series, stages: Sequence[Stage], curve: LLCCurve) -> list[Claim]:
    """Restricted before test loss, the U of the excluded loss, and what becomes Fourier while the LLC falls."""
    rising, falling = strongest(stages, "rising"), strongest(stages, "falling")
    lead = {"step": series["step"], "lead": np.log10(series["test_loss"] / series["restricted_loss"])}
    guessing = np.log(series["embedding_spectrum"].shape[1] * 2 + 1)  # ln p

    def gain(name: str) -> Callable[[Stage], float]:
        return lambda stage: concentration(series, name, stage)

    def shrinkage(stage: Stage) -> float:
        size = at(series, "squared_weights", stage.start)
        return change(series, "squared_weights", stage) / size if size > 0 else float("nan")

    def u_shape(stage: Stage) -> float:
        inside = (series["step"] >= stage.start) & (series["step"] <= stage.end)
        start, end = (at(series, "excluded_loss", step) for step in (stage.start, (falling or stage).end))
        low = min([start, *series["excluded_loss"][inside]])
        return min(start - low, end - low)

    return [
        claim(
            "restricted loss is below test loss while the LLC falls (mean log10 of the ratio)",
            falling, lambda s: mean_over(lead, "lead", s), float(np.log10(5)),
        ),
        claim(
            "restricted loss is halved before test loss is (ratio of steps, test / restricted)",
            falling, lambda s: _halved(series, "test_loss") / _halved(series, "restricted_loss"), 1.2,
        ),
        claim(
            "excluded loss is U-shaped: it falls while the LLC rises, and is up again when the LLC has fallen "
            "(smaller side, nats; against a tenth of ln p)",
            rising, u_shape, 0.1 * float(guessing),
        ),
        claim(
            "without the key frequencies the final model is worse than guessing (excluded loss less ln p, nats)",
            end_of(stages, series), lambda s: at(series, "excluded_loss", s.end) - guessing, 0.0,
        ),
        claim(
            "neurons become single-frequency while the LLC falls (share of the gain, less that of time)",
            falling, gain("single_frequency_neurons"), CONCENTRATED,
        ),
        claim(
            "the logits become waves cos(w_k(a+b-c)) while the LLC falls (share of the gain of R^2, less that of time)",
            falling, gain("logit_r2"), CONCENTRATED,
        ),
        claim(
            "W_E becomes Fourier-sparse while the LLC falls (share of the gain of Gini, less that of time)",
            falling, gain("gini_W_E"), CONCENTRATED,
        ),
        claim(
            "W_L becomes Fourier-sparse while the LLC falls (share of the gain of Gini, less that of time)",
            falling, gain("gini_W_L"), CONCENTRATED,
        ),
        claim(
            "neurons of the final model are single-frequency (share)",
            end_of(stages, series), lambda s: at(series, "single_frequency_neurons", s.end), 0.5,
        ),
        claim(
            "squared weights shrink while the LLC falls (relative change)",
            falling, shrinkage, -0.1, "<=",
        ),
    ]  # fmt: skip


def plot(report: Report, study: Study) -> dict[str, Figure]:
    """The figures of the report."""
    series, keys = report.series, report.facts["key_frequencies"]
    progress, (losses, shares) = plotting.panels(2)
    for name in ("train_loss", "test_loss", "restricted_loss", "excluded_loss"):
        losses.plot(report.steps, series[name], label=name.replace("_", " "))
    losses.set_yscale("log")
    for name in ("single_frequency_neurons", "logit_r2", "gini_W_E", "gini_W_L"):
        shares.plot(report.steps, series[name], label=name.replace("_", " ").replace("logit r2", "logit $R^2$"))
    for ax, label in ((losses, "loss (nats)"), (shares, "share")):
        plotting.developmental_axis(ax, study.stages, label)
        ax.legend(frameon=False, fontsize=8)

    by_frequency, axes = plotting.panels(3)
    labels = {
        "embedding_spectrum": "norm of each frequency in $W_E$",
        "neuron_logit_spectrum": "norm of each frequency in $W_L$",
        "neurons_by_frequency": f"share of neurons with FVE > {fourier.FVE_CLUSTERED}",
    }
    for ax, (name, label) in zip(axes, labels.items(), strict=True):
        values = series[name]
        for index in range(values.shape[1]):
            is_key = index + 1 in keys
            ax.plot(report.steps, values[:, index], color=None if is_key else "0.8", lw=1.6 if is_key else 0.6,
                    label=f"k = {index + 1}" if is_key else None, zorder=2 if is_key else 1)  # fmt: skip
        plotting.developmental_axis(ax, study.stages, label)
        if keys:
            ax.legend(frameon=False, fontsize=8)
    return {"Progress measures": progress, f"By frequency; the keys are {', '.join(map(str, keys))}": by_frequency}


def _halved(series: Series, name: str) -> float:
    """The step from which a loss stays below half of its largest value, NaN if it never does or is not known."""
    grid = np.linspace(0, np.log1p(series["step"][-1]), 2000)
    values = np.interp(grid, np.log1p(series["step"]), series[name])
    first = np.flatnonzero(~(values <= 0.5 * values.max()))[-1] + 1
    return float(np.expm1(grid[first])) if first < len(grid) else float("nan")


def _neuron_logit_map(model: HookedTransformer, p: int) -> np.ndarray:
    """W_L: what each neuron of the last layer adds to each residue's logit, [p, d_mlp] (W_U W_out in the paper)."""
    if model.cfg.attn_only:
        raise AnalysisError("the fourier analysis reads neurons, and this model is attention-only; give it an MLP")
    return (model.W_out[-1] @ model.W_U[:, :p]).detach().double().numpy().T


@torch.no_grad()
def _on_all_pairs(model: HookedTransformer, split: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits [p^2, class], neuron activations [p^2, d_mlp] and is_train [p^2], in the order a * p + b."""
    p, train = split.n_classes, split.train.tokens
    is_train = torch.zeros(p * p, dtype=torch.bool)
    is_train[train[:, 0] * p + train[:, 1]] = True
    operands = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    tokens = torch.cat([operands, train[:1, 2:].expand(p * p, -1)], dim=1)
    hook_post = f"blocks.{model.cfg.n_layers - 1}.mlp.hook_post"
    rows = []
    for block in tokens.split(ROWS):
        logits, cache = model.run_with_cache(block, names_filter=hook_post)
        rows.append((cast(Tensor, logits)[:, -1].double(), cache[hook_post][:, -1].double()))
    every = [torch.cat(of).numpy() for of in zip(*rows, strict=True)]
    return every[0], every[1], is_train.numpy()
