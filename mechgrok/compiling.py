"""Whether a study's loops are worth compiling, and having that done while the model trains."""

from collections.abc import Mapping, Sequence

from mechgrok.config import LLCConfig, RunConfig
from mechgrok.llc.curve import Unit
from mechgrok.llc.estimate import estimate_group
from mechgrok.llc.problem import groups
from mechgrok.llc.work import estimate_work, loops_pay
from mechgrok.model import build_model
from mechgrok.reproducible import reproducible
from mechgrok.types import Split

Plan = Mapping[str, Sequence[Unit]]  # what `plan.plan_units` gives


def worth_compiling(config: RunConfig, split: Split, plan: Plan) -> bool:
    """Whether loops pay for all that is planned, done already or not: so that a resumed run ends in the same bits."""
    model = build_model(config.model, split, config.seed)
    each = [(data, settings) for data, units in plan.items() for _, _, settings in units]
    examples = {data: split.distributions.get(data, split.train) for data in plan}
    work = (estimate_work(model, examples[data], settings) for data, settings in each)
    return loops_pay(work, [settings for _, settings in each])


def compile_ahead(config: RunConfig, split: Split, plan: Plan) -> None:
    """Compile, and keep on disk, the loops that these estimates will call, by a few draws of each kind of them."""
    model = build_model(config.model, split, config.seed)
    few = split.train.first(8)
    kinds: dict[tuple[bool, str, str], tuple[str, LLCConfig]] = {}
    for units in plan.values():
        for _, name, settings in units:
            kinds.setdefault((name == "model", settings.sampler, settings.precision), (name, settings))
    short = {"n_chains": 2, "n_draws": 8, "n_burnin": 0, "batch_size": None, "path": "compiled", "canonicalize": False}
    with reproducible(config.llc.n_threads):
        for name, settings in kinds.values():
            for group in groups(model, [name]):
                estimate_group(model, few, group, config=settings.model_copy(update=short), seed=0)
