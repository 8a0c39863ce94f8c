"""A study and its reports as one self-contained HTML page, as Markdown, and as JSON."""

import base64
import html
import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from analyses import contract
from mechgrok import plotting
from mechgrok.components import head_names
from mechgrok.config import LLCConfig
from mechgrok.measures.landmarks import landmarks
from mechgrok.reproducible import made_with
from mechgrok.stages import MIN_POINTS, smooth, stage_points
from mechgrok.types import VARIANCES, Claim, Report, Stage, Study

CURVE_KEYS = ("steps", "components", "llc", "std_error", "healthy", *VARIANCES, "variance_ratio")
SHOWN_STEPS = 8
SHOWN_TOKENS = 64  # beyond, the widget is too large to look at


def provenance(study: Study) -> dict[str, str]:
    """Seed, config digest, and what made the numbers: what a reader needs to make the same ones.

    Versions are those of the processes that trained and sampled, where the run has kept them, and this one's. Where
    they differ it is said which are whose.
    """
    makers = [(part, record) for part, records in study.made_with.items() for record in records]
    now = made_with()
    makers.append(("report", now))
    found = {"seed": str(study.config.seed), "config SHA-256": study.config.digest()}
    for key in now:
        whose: dict[str, list[str]] = {}
        for part, record in makers:
            whose.setdefault(record.get(key, "unknown"), []).append(part)
        each = (f"{value} ({', '.join(dict.fromkeys(parts))})" for value, parts in whose.items())
        found[key] = next(iter(whose)) if len(whose) == 1 else "; ".join(each)
    return found


def to_json(study: Study, reports: Sequence[Report]) -> dict[str, Any]:
    """Everything in the report as plain JSON values; numbers that are not finite become null."""
    every = {"main": study.curve, "control": study.curve.control, "finer": study.curve.finer, **study.curve.refined}
    curves = {name: curve for name, curve in every.items() if curve is not None}
    return _plain(
        {
            "name": study.config.name,
            "provenance": provenance(study),
            "config": study.config.model_dump(mode="json"),
            "suspicious": study.suspicious,
            "stages": [vars(stage) for stage in study.stages],
            "landmarks": landmarks_of(study),
            "metrics": [vars(row) for row in study.trajectory.metrics],
            "curves": {name: {key: getattr(curve, key) for key in CURVE_KEYS} for name, curve in curves.items()},
            "reports": {
                report.analysis: {
                    "claims": [{**vars(claim), "holds": claim.holds} for claim in report.claims],
                    "facts": report.facts,
                    "derived": report.derived,
                    "steps": report.steps,
                    "series": report.series,
                }
                for report in reports
            },
        }
    )


def to_markdown(study: Study, reports: Sequence[Report]) -> str:
    """Stage table and claim tables, for a terminal, an issue or a diff."""
    lines = [f"# {study.config.name}", "", summary(study), "", "## Stages of the LLC", ""]
    keys = ("name", "direction", "start", "end", "interval", "delta_llc", "delta_loss")
    titles = ("stage", "LLC", "from step", "to step", "end, interval", "change of LLC", "change of train loss")
    lines += _table(titles, [[row[key] for key in keys] for row in map(stage_row, study.stages)])
    lines += ["", f"**{audit_note(study)}**"] if study.suspicious else []
    lines += ["", health_note(study), "", bias_note(study)]
    marks = ", ".join(f"{name} {step}" for name, step in landmark_row(study).items())
    lines += ["", f"Landmarks of the loss, for comparison: {marks}."] if marks else []
    lines += ["", "## The model's LLC from the variance of the sampled loss", "", VARIANCE_NOTE, ""]
    lines += _table(*variance_table(study))
    for report in reports:
        lines += ["", f"## {report.analysis}", ""]
        for title, (columns, rows) in tables_of(report).items():
            lines += [f"{title}:", "", *_table(columns, rows), ""]
        columns = ("claim", "stage", "value", "threshold", "holds", "better than random stages", "holds by chance")
        lines += _table(columns, [list(claim_row(claim).values()) for claim in report.claims])
    return "\n".join(lines) + "\n"


def to_html(study: Study, reports: Sequence[Report]) -> str:
    """The report as one file: figures inlined as SVG, circuitsvis' script once, every text escaped."""
    enough = stage_points(study.curve).sum() >= MIN_POINTS
    fit = smooth(study.curve, study.config.stages, seed=study.config.seed) if enough else None
    llc_figures = {
        "LLC of the whole model, with 95 % intervals; right: the same at the control localization": plotting.llc_figure(
            study.curve, study.stages, (fit.steps, fit.mean, fit.sd) if fit else None
        ),
        "Refined LLC of every head": plotting.components_figure(study.curve, study.stages),
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["code"] = _with_code
    template = environment.from_string((resources.files("analyses") / "templates/report.html").read_text())
    return template.render(
        name=study.config.name,
        summary=summary(study),
        stages=[stage_row(stage) for stage in study.stages],
        audit=audit_note(study),
        health=health_note(study),
        bias=bias_note(study),
        landmarks=landmark_row(study),
        llc_figures=llc_figures,
        variance_note=VARIANCE_NOTE,
        variance_table=variance_table(study),
        training_figures={
            "Loss and accuracy": plotting.training_figure(study.trajectory, study.stages, landmarks_of(study))
        },
        reports=[
            {
                "name": report.analysis,
                "facts": {key: ", ".join(map(str, value)) for key, value in report.facts.items()},
                "claims": [claim_row(claim) | {"good": claim.holds} for claim in report.claims],
                "tables": tables_of(report),
                "figures": contract.load(report.analysis).plot(report, study),
            }
            for report in reports
        ],
        figure=_figures,
        attention=_attention(study),
        config=study.config.to_toml(),
        provenance=provenance(study),
    )


def summary(study: Study) -> str:
    """Sizes and sampling settings in two sentences."""
    model = study.trajectory.model_at(study.trajectory.steps[-1])
    llc = study.config.llc
    n_params = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{n_params:,} parameters, {len(study.split.train):,} training and {len(study.split.test):,} test examples, "
        f"{len(study.trajectory.steps)} checkpoints to step {study.trajectory.steps[-1]:,}. "
        f"LLC: {_settings(llc.sampling)}{f'; of heads: {_settings(llc.head_sampling)}' if llc.head_sampling else ''}."
    )


def _settings(sampling: LLCConfig) -> str:
    return (
        f"{sampling.sampler.upper()}, nbeta {sampling.nbeta:g}, step size {sampling.step_size:g}, "
        f"localization {sampling.localization:g}, {sampling.n_chains} chains of {sampling.n_draws} draws "
        f"after {sampling.n_burnin} of burn-in"
    )


def audit_note(study: Study) -> str:
    """Which steps of an import are kept out of the stages, and why, in a sentence; empty where there is none."""
    named = [f"step {step} {why}" for step, why in study.suspicious.items()]
    if not named:
        return ""
    more = f"; and {len(named) - SHOWN_STEPS} more, which audit.json lists" if len(named) > SHOWN_STEPS else ""
    which = f"{len(named)} imported checkpoints are" if len(named) > 1 else "One imported checkpoint is"
    return f"{which} kept out of the stages and the analyses: {'; '.join(named[:SHOWN_STEPS])}{more}."


def health_note(study: Study) -> str:
    """How many estimates are healthy, and how many the stages do without."""
    healthy = study.curve.healthy
    mine = healthy[study.curve.row("model")]
    usable = int(stage_points(study.curve).sum())
    downhill = int(mine.sum()) - usable
    surely = f" {downhill} more are surely negative, as their chains ran downhill from w*." if downhill else ""
    flat = healthy & study.curve.saturated
    few = f" Only {usable} were left, and stages need {MIN_POINTS}." if usable < MIN_POINTS else ""
    return (
        f"{int(healthy.sum())} of {healthy.size} estimates are healthy (crosses are not); "
        f"{int((~mine).sum())} of the model's were left out when the stages were found.{surely}{few}"
        f" {int(flat.sum())} are saturated (open squares), {int(flat[study.curve.row('model')].sum())} of them the "
        "model's: there the loss is so flat at the localization's scale that the localization decides more of the "
        "estimate than the loss. "
        "`mechgrok llc RUN` lists both kinds with what to change."
    )


def _with_code(text: str) -> Markup:
    """Escaped, and what stands between backticks set as code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text)))


def bias_note(study: Study) -> str:
    """What the step size adds to the model's LLC, in a sentence."""
    if study.curve.bias is None:
        return "The bias of the step size was not measured."
    bias, error = study.curve.bias
    told = np.abs(bias) > 2 * error
    if not told.any():
        return "At no checkpoint is the bias of the step size told from 0 (half the step, extrapolated)."
    worst = int(np.argmax(np.where(told, np.abs(bias), 0)))
    assert study.curve.finer is not None  # or there were no bias
    step = study.curve.finer.steps[worst]
    llc = study.curve.llc[study.curve.row("model")][np.searchsorted(study.curve.steps, step)]
    return (
        f"The step size adds to the model's LLC at {int(told.sum())} of {len(bias)} checkpoints (half the step, "
        f"extrapolated); most at step {step}: {bias[worst]:.3g} ± {error[worst]:.2g} of {llc:.3g}. "
        "It is in no error bar and in no number here; hollow points are without it."
    )


VARIANCE_NOTE = (
    "llc_variance needs no loss at w*, so it also stands early, where w* is no minimum and llc says how far the chains "
    "ran down; at most the part in the next column is the slope's at w*. Where the localization decides nothing both "
    "are equal and the ratio is 1; it is given where both are positive."
)


def variance_table(study: Study) -> tuple[Sequence[str], list[list[str]]]:
    """(column titles, rows) of the model's two estimates at each checkpoint."""
    curve = study.curve
    row = curve.row("model")
    each = (curve.steps, curve.llc[row], curve.std_error[row], *(getattr(curve, key)[row] for key in VARIANCES))
    rows = [
        [f"{step}", f"{llc:.3g} ± {error:.2g}", _known(variance, of), _known(slope, its), _known(ratio)]
        for step, llc, error, variance, of, slope, its, ratio in zip(*each, curve.variance_ratio[row], strict=True)
    ]
    return ("step", "llc", "llc_variance", "of which the slope at most", "llc_variance / llc"), rows


def _known(value: float, error: float | None = None) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}" if error is None else f"{value:.3g} ± {error:.2g}"


def stage_row(stage: Stage) -> dict[str, str]:
    """The cells of a stage in a table."""
    interval = "end of run" if stage.end_interval is None else "{:.0f} – {:.0f}".format(*stage.end_interval)
    return {
        "name": stage.name,
        "direction": stage.direction,
        "start": f"{stage.start:.0f}",
        "end": f"{stage.end:.0f}",
        "interval": interval,
        "delta_llc": f"{stage.delta_llc:+.1f}",
        "delta_loss": "–" if stage.delta_loss is None else f"{stage.delta_loss:+.3g}",
    }


def claim_row(claim: Claim) -> dict[str, str]:
    """The cells of a claim in a table."""
    null = claim.null_quantile
    return {
        "text": claim.text,
        "stage": claim.stage,
        "value": f"{claim.value:.3g}" if math.isfinite(claim.value) else "–",
        "threshold": f"{'≥' if claim.relation == '>=' else '≤'} {claim.threshold:.3g}",
        "holds": "holds" if claim.holds else "not evaluated" if math.isnan(claim.value) else "does not hold",
        "null": "–" if null is None else f"{null:.0%}",
        "chance": "–" if claim.chance is None or math.isnan(claim.chance) else f"{claim.chance:.2g}",
    }


Tables = Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]]  # title -> column titles, rows


def tables_of(report: Report) -> Tables:
    """The tables that the report's analysis makes of it."""
    make = getattr(contract.load(report.analysis), "tables", None)
    return make(report) if make else {}


def landmarks_of(study: Study) -> dict[str, float]:
    """The landmarks of the loss, from the metrics that training kept; none where no accuracy can reach 1."""
    if study.task.name != "modular-addition":
        return {}
    path, steps = study.trajectory, np.array(study.trajectory.steps)
    trusted = np.isin(steps, contract.trusted_steps(study))
    return landmarks(steps[trusted], *(path.column(f"{side}_accuracy")[trusted] for side in ("train", "test")))


def landmark_row(study: Study) -> dict[str, str]:
    """The landmarks as text."""
    return {name: f"{step:.0f}" if math.isfinite(step) else "never" for name, step in landmarks_of(study).items()}


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(titles), line(["---"] * len(titles)), *map(line, rows)]


def _figures(figures: Mapping[str, Figure]) -> Markup:
    parts = []
    for caption, fig in figures.items():
        data = base64.b64encode(plotting.to_svg(fig).encode()).decode()
        text = html.escape(caption)
        parts.append(
            f'<figure><img alt="{text}" src="data:image/svg+xml;base64,{data}"><figcaption>{text}</figcaption></figure>'
        )
    return Markup("\n".join(parts))


def _attention(study: Study) -> dict[str, Any]:
    """The final model's attention on the first test example, for circuitsvis' AttentionHeads.

    circuitsvis' own HTML loads its script from the net and puts tokens in as HTML, so the bundled
    script is inlined once, tokens are escaped, and no "<" is left that could end the script.
    """
    import circuitsvis
    from circuitsvis.utils.convert_props import convert_props

    model = study.trajectory.model_at(study.trajectory.steps[-1])
    tokens = study.split.test.tokens[:1, :SHOWN_TOKENS]
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_pattern"))
    patterns = [cache["pattern", layer][0].detach().numpy() for layer in range(model.cfg.n_layers)]
    labels = [html.escape(study.split.labels[token]) for token in tokens[0].tolist()]
    names = head_names(model)
    pattern = np.concatenate(patterns).round(4)
    causal = model.cfg.attention_dir == "causal"  # else what is above the diagonal is shown as well
    props = convert_props({"attention": pattern, "tokens": labels, "attentionHeadNames": names, "maskUpperTri": causal})
    script = (resources.files(circuitsvis) / "dist/cdn/iife.js").read_text().replace("</script>", "")
    whole = len(labels) == study.split.test.tokens.shape[1]
    text = " ".join(study.split.labels[token] for token in tokens[0].tolist())
    return {
        "example": f"the test example {text}" if whole else f"the first {len(labels)} tokens of a test example",
        "script": Markup(script),
        "props": Markup(props.replace("<", "\\u003c")),
    }


def _plain(value: Any) -> Any:
    """JSON values of numpy arrays, tuples and floats that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
