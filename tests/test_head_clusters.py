"""The analysis on invented curves: types that go with the curve's shape, types that do not, and gaps."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from analyses import head_clusters as analysis
from mechgrok import seeds
from mechgrok.model import build_model
from mechgrok.tasks import make_split
from mechgrok.types import LLCCurve, Report, Stage
from tests.oracles import tiny_config
from tests.planted import assert_only_the_end_is_judged

STEPS = np.unique(np.geomspace(1, 5000, 25).astype(int)) - 1
X = np.log1p(STEPS) / np.log1p(STEPS[-1])
HEADS = [f"L{layer}H{head}" for layer in range(2) for head in range(8)]
KIND = np.array([0, 0, 0, 1, 1, 1, 2, 2] * 2)
NAMES = np.array(["multigram", "induction", "previous-token"])
SHAPES = np.array([4 * X, 2 * X + np.sin(3 * X), np.full_like(X, 0.5)])
STAGES = (Stage("S1", "rising", 0.0, float(STEPS[-1]), None, None, 3.0, None),)


def typed(kind: np.ndarray) -> list[str]:
    return [f"{head} {name}" for head, name in zip(HEADS, NAMES[kind], strict=True)]


def facts(kind: np.ndarray = KIND) -> dict:
    return {"heads": HEADS, "types": typed(kind)}


def curve(noise: float = 0.05, seed: int = 0) -> LLCCurve:
    llc = SHAPES[KIND] + noise * np.random.default_rng(seed).normal(size=(16, len(STEPS)))
    return LLCCurve(
        steps=STEPS,
        components=("model", *HEADS),
        llc=np.vstack([np.zeros(len(STEPS)), llc]),
        std_error=np.full((17, len(STEPS)), noise),
    )


def norms(seed: int = 5) -> dict:
    return {"step": STEPS, "weight_norm": np.random.default_rng(seed).normal(size=(len(STEPS), 16))}


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "N_DRAWS", 3)


def concluded(of: LLCCurve, known: dict) -> tuple[dict, list]:
    derived = analysis.derive(norms(), of, known, np.random.default_rng(0))
    return derived, analysis.conclude(norms() | derived, STAGES, of)


def test_types_that_go_with_the_curves_are_found_by_every_variant_and_not_by_norms_that_know_nothing() -> None:
    derived, claims = concluded(curve(), facts())
    assert [claim.holds for claim in claims] == [True] * len(claims)
    assert claims[1].value == 1
    primary = analysis.VARIANTS.index(analysis.PRIMARY)
    assert derived["ari"][primary] == 1
    assert derived["ari"][primary] > derived["ari_null_95"][primary]
    assert analysis.VARIANTS[-1].of == "norm"
    assert derived["p_value"][-1] > 0.05 and np.isnan(derived["stability"][-1])
    assert derived["compared"] == 16


def test_types_that_do_not_go_with_the_curves_are_not_found() -> None:
    _, claims = concluded(curve(), facts(np.array([0, 1, 2, 0, 1, 2, 0, 1] * 2)))
    agree = [claim for claim in claims if claim.relation == "<="]
    assert len(agree) == len(claims) - 1
    assert not any(claim.holds for claim in agree)


def test_curves_lost_in_their_errors_are_not_stable() -> None:
    _, claims = concluded(curve(noise=5.0), facts())
    assert not claims[1].holds


def test_standardizing_loses_heads_that_differ_by_level_alone_so_raw_is_primary() -> None:
    shifted = curve()
    llc = (1 + np.concatenate([[0], KIND]))[:, None] * X + 0.05 * np.random.default_rng(1).normal(size=(17, len(X)))
    derived, _ = concluded(replace(shifted, llc=llc), facts())
    by_name = dict(zip(map(str, analysis.VARIANTS), derived["ari"], strict=True))
    assert by_name["K-means, raw, per layer"] == 1
    assert by_name["K-means, standardized, per layer"] < 0.5


def test_unhealthy_and_missing_heads_are_left_out() -> None:
    whole = curve()
    healthy = whole.healthy.copy()
    healthy[whole.row("L0H0"), 5:] = False
    keep = [row for row, name in enumerate(whole.components) if name != "L1H7"]
    part = LLCCurve(
        steps=STEPS, components=tuple(whole.components[row] for row in keep),
        llc=whole.llc[keep], std_error=whole.std_error[keep], healthy=healthy[keep],
    )  # fmt: skip
    derived, claims = concluded(part, facts())
    primary = derived["cluster"][analysis.VARIANTS.index(analysis.PRIMARY)]
    assert np.flatnonzero(np.isnan(primary)).tolist() == [0, 15]
    assert derived["compared"] == 14
    assert claims[0].holds


@pytest.mark.parametrize("healthy", [False, True])
def test_without_curves_nothing_holds_and_nothing_fails(healthy: bool) -> None:
    whole = curve()
    of = replace(whole, healthy=np.array(False))
    if healthy:  # the model alone is followed
        of = LLCCurve(steps=STEPS, components=("model",), llc=whole.llc[:1], std_error=whole.std_error[:1])
    derived, claims = concluded(of, facts())
    assert all(np.isnan(claim.value) and not claim.holds for claim in claims)
    report = Report("head_clusters", STEPS, {}, tuple(claims), facts(), derived)
    assert analysis.tables(report)
    assert analysis.plot(report, SimpleNamespace(curve=of, stages=STAGES))


def test_unclear_heads_are_no_type() -> None:
    known = facts()
    known["types"][:8] = [f"{head} unclear" for head in HEADS[:8]]
    derived, claims = concluded(curve(), known)
    assert derived["compared"] == 8 and claims[0].holds
    known["types"] = [f"{head} unclear" for head in HEADS]
    _, claims = concluded(curve(), known)
    assert np.isnan(claims[0].value) and claims[1].holds  # the clusters stand all the same


def test_the_claims_are_the_same_for_any_stages_and_without_any_only_those_on_the_end_are_judged() -> None:
    derived, claims = concluded(curve(), facts())
    without = analysis.conclude(norms() | derived, (), curve())
    assert_only_the_end_is_judged(without, claims)


def test_the_same_seed_gives_the_same_clusters() -> None:
    one, two = (concluded(curve(noise=0.5), facts())[0] for _ in range(2))
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


def test_tables_and_figures_name_every_head() -> None:
    derived, claims = concluded(curve(), facts())
    report = Report("head_clusters", STEPS, {}, tuple(claims), facts(), derived)
    found, clusters = analysis.tables(report).values()
    assert [row[0] for row in found[1]] == list(map(str, analysis.VARIANTS))
    assert [row[0] for row in clusters[1]] == HEADS
    for titles, rows in (found, clusters):
        assert {len(row) for row in rows} == {len(titles)}
    (figure,) = analysis.plot(report, SimpleNamespace(curve=curve(), stages=STAGES)).values()
    legends = [text.get_text() for ax in figure.axes for text in ax.get_legend().get_texts()]
    assert legends == report.facts["types"]


def test_prepare_and_measure_follow_the_heads_order(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = (SimpleNamespace(head="L0H0", type="unclear"), SimpleNamespace(head="L0H1", type="induction"))
    monkeypatch.setattr(analysis, "typed_heads", lambda model, split: evidence)
    split = make_split(tiny_config().task, 0)
    model = build_model(tiny_config().model, split, 0)
    assert analysis.prepare(model, split) == {"heads": ["L0H0", "L0H1"], "types": ["L0H0 unclear", "L0H1 induction"]}
    norm = analysis.measure(model, split, seeds.stream(0), {})["weight_norm"]
    attn = model.blocks[0].attn
    weights = (attn.W_Q, attn.W_K, attn.W_V, attn.W_O)
    assert norm.shape == (2,)
    assert norm[1] == pytest.approx(sum(float(w[1].detach().square().sum()) for w in weights) ** 0.5, rel=1e-6)
