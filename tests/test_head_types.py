"""Types of heads on the hand-built model, near misses of an induction head, and the analysis over a planted run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from transformer_lens import HookedTransformer

from analyses import head_types as analysis
from mechgrok import seeds
from mechgrok.errors import ShapeError
from mechgrok.measures.head_types import (
    DEAD_NATS,
    HEAD_TYPES,
    MIN_MULTIGRAMS,
    HeadEvidence,
    head_evidence,
    some_examples,
)
from mechgrok.measures.multigrams import Memory, Multigram
from mechgrok.tasks.next_token import next_token_examples
from mechgrok.types import LLCCurve, Report, Split, Stage
from tests import hand_built
from tests.hand_built import (
    DEAD,
    DECOY,
    INDEX,
    NAMES,
    OFFSET,
    OUT,
    PREVIOUS,
    SPLIT,
    TOKEN,
    TWINS,
    TableHead,
    hand_built_model,
    table_model,
)
from tests.planted import assert_only_the_end_is_judged
from tests.test_attention_measures import ARCHITECTURES, TWICE, random_model


def evidence(model: HookedTransformer, n_multigrams: list[int] | None = None, at_repeats: float = 2.0) -> dict:
    some = [Multigram(0, 0, target, True) for target in range(MIN_MULTIGRAMS)]
    memories = None if n_multigrams is None else [Memory(tuple(some[:n]), 1.0, at_repeats) for n in n_multigrams]
    return {of.head: of for of in head_evidence(model, SPLIT, seeds.stream(0), memories)}


def write(model: HookedTransformer, layer: int, head: int, to_out: torch.Tensor) -> None:
    """Let a head write a multiple of what it carries to the unembedded part."""
    with torch.no_grad():
        model.blocks[layer].attn.W_O[head] = 0.0
        model.blocks[layer].attn.W_O[head, :9, OUT] = to_out


def test_every_head_is_of_the_type_that_it_was_built_as() -> None:
    found = evidence(hand_built_model())
    assert list(found) == NAMES
    assert {name: of.type for name, of in found.items()} == {
        PREVIOUS: "previous-token",
        **dict.fromkeys(TWINS, "induction"),
        **dict.fromkeys((OFFSET, DECOY, *DEAD), "dead"),
    }
    twin, decoy = found[TWINS[0]].scores, found[DECOY].scores
    assert twin["prefix matching"] == pytest.approx(decoy["prefix matching"]) and twin["prefix matching"] > 5
    assert np.isnan(decoy["copying"]) and decoy["direct effect"] == 0.0
    assert twin["direct effect"] == pytest.approx(4 * 8 / 9, abs=1e-5)
    assert found[DEAD[0]].scores["prefix matching"] == pytest.approx(1.0, abs=1e-5)


def test_a_live_decoy_that_writes_another_token_is_unclear() -> None:
    """It attends like an induction head and its ablation matters, but it does not raise what it attends to."""
    model = hand_built_model()
    write(model, 1, 2, 0.3 * torch.eye(9).roll(1, 1))
    found = evidence(model)[DECOY]
    assert found.scores["ablation"] > DEAD_NATS and found.scores["prefix matching"] > 5
    assert found.type == "unclear"


def test_a_head_that_copies_without_matching_is_no_induction_head() -> None:
    """Uniform attention and a copying OV circuit: it raises the right logit on repeats, as all the others."""
    model = hand_built_model()
    with torch.no_grad():
        model.blocks[1].attn.W_V[3, TOKEN, :9] = torch.eye(9)
    write(model, 1, 3, 3 * torch.eye(9))
    found = evidence(model)["L1H3"]
    assert found.scores["ablation"] > DEAD_NATS and found.type == "unclear"


def test_a_head_that_lowers_what_it_matches_is_no_induction_head() -> None:
    model = hand_built_model()
    write(model, 1, 0, -0.2 * torch.eye(9))
    assert [evidence(model)[name].type for name in TWINS] == ["unclear", "induction"]


def test_twins_of_which_each_suffices_are_not_dead() -> None:
    """So sure is the model here that ablating one twin costs a millionth of a nat."""
    model = hand_built_model()
    with torch.no_grad():
        model.unembed.W_U *= 4
    certain = replace(SPLIT, test=TWICE)
    found = {of.head: of for of in head_evidence(model, certain, seeds.stream(0))}
    assert found[TWINS[0]].scores["ablation"] < DEAD_NATS
    assert [found[name].type for name in (*TWINS, DECOY)] == ["induction", "induction", "dead"]


def test_first_and_current_token_heads_are_told_by_where_they_attend() -> None:
    model = hand_built_model()
    for head, attends in ((1, "first"), (3, "current")):
        with torch.no_grad():
            attn = model.blocks[0].attn
            source = torch.eye(24) if attends == "current" else torch.zeros(24, 24)
            source[:, 0] += attends == "first"
            attn.W_Q[head, hand_built.POSITION] = 40 * 24**0.5 * source
            attn.W_K[head, hand_built.POSITION] = torch.eye(24)
            attn.W_V[head, TOKEN, :9] = torch.eye(9)
        write(model, 0, head, 0.1 * torch.eye(9))
    found = evidence(model)
    assert (found["L0H1"].type, found["L0H3"].type) == ("first-token", "current-token")
    many = evidence(model, [MIN_MULTIGRAMS] * 8)
    assert (many["L0H1"].type, many["L0H3"].type) == ("multigram", "current-token")


@pytest.mark.parametrize(("looks_for", "kind"), [("its own token", "duplicate-token"), ("another", "unclear")])
def test_a_duplicate_token_head_looks_at_earlier_copies_of_its_token(looks_for: str, kind: str) -> None:
    """The earliest copy wins, so it looks at its own position only when there is no earlier one."""
    matches = torch.eye(9) if looks_for == "its own token" else torch.eye(9).roll(1, 1)
    earliest = -2.0 * torch.arange(24.0).expand(24, -1)
    model = table_model(SPLIT, [TableHead(100 * matches, 0.5 * torch.eye(9), earliest)])
    (found,) = head_evidence(model, SPLIT, seeds.stream(0))
    assert found.type == kind
    assert found.scores["ablation"] > DEAD_NATS and np.isnan(found.scores["brackets"])
    assert (found.scores["duplicate-token"] > 5) == (kind == "duplicate-token")
    assert max(found.scores[other] for other in ("previous-token", "current-token", "first-token")) < 3.7


# ---- brackets

BRACKET_LABELS = ("BOS", "(", ")", "[", "]", "a", "b", "c", "d")
OPEN, CLOSE, LETTERS, LAST = [1, 3], [2, 4], [5, 6, 7], 8


def bracket_split() -> Split:
    """BOS, then a bracket opens, one to three of a, b and c, d, and it closes; again and again."""
    rng = np.random.default_rng(0)
    rows = torch.zeros(48, 24, dtype=torch.long)
    for row in rows:
        made: list[int] = []
        while len(made) < 23:
            which = int(rng.integers(2))
            made += [OPEN[which], *rng.choice(LETTERS, rng.integers(1, 4)).tolist(), LAST, CLOSE[which]]
        row[1:] = torch.tensor(made[:23])
    examples = next_token_examples(rows)
    return Split(examples, examples, BRACKET_LABELS, 9, bos=0)


BRACKETS = bracket_split()


def bracket_head(own: tuple[float, float], other: float = 0.0, letters: float = 0.0) -> TableHead:
    """From d it looks at the last open bracket, else at BOS, which writes nothing.

    own: what the open brackets write on their own closing one, other: on the other. letters: what a, b and c write on
    what may follow them; they look at themselves then.
    """
    looks, writes = torch.zeros(9, 9), torch.zeros(9, 9)
    looks[:, 0] = 500.0
    looks[LAST, OPEN] = 1000.0
    for opened, closed, wrong, gain in zip(OPEN, CLOSE, CLOSE[::-1], own, strict=True):
        writes[opened, closed], writes[opened, wrong] = gain, other
    if letters:
        looks[LETTERS, LETTERS] = 1000.0
        writes[5:8, 5:9] = letters
    return TableHead(looks, writes, 5 * torch.arange(24.0).expand(24, -1))


def bracket_evidence(head: TableHead, split: Split = BRACKETS) -> HeadEvidence:
    (found,) = head_evidence(table_model(split, [head]), split, seeds.stream(0))
    return found


def added(own: float, other: float = 0.0) -> float:
    """What zeroing the head adds at a closing bracket, of nine tokens that are then alike."""
    return float(np.log(9) - np.log(7 + np.exp(own) + np.exp(other)) + own)


def test_a_head_that_closes_what_was_opened_is_a_bracket_head() -> None:
    found = bracket_evidence(bracket_head((4.0, 4.0)))
    assert found.type == "bracket"
    assert found.scores["brackets"] == pytest.approx(added(4.0), abs=1e-5) and added(4.0) > 2
    unnamed = bracket_evidence(bracket_head((4.0, 4.0)), replace(BRACKETS, labels=tuple("012345678")))
    assert unnamed.type == "first-token" and np.isnan(unnamed.scores["brackets"])


@pytest.mark.parametrize(
    ("own", "other", "kind"),
    [(-4.0, 0.0, "first-token"), (0.0, 4.0, "first-token"), (0.4, 0.0, "first-token"), (0.0, 0.0, "dead")],
    ids=["lowers the right one", "raises the wrong one", "too faint", "writes nothing"],
)
def test_a_head_that_looks_at_the_bracket_but_does_not_close_it_is_none(own: float, other: float, kind: str) -> None:
    found = bracket_evidence(bracket_head((own, own), other))
    assert found.type == kind
    assert found.scores["brackets"] == pytest.approx(added(own, other), abs=1e-5) and added(own, other) < 0.5


def test_a_head_that_is_needed_elsewhere_too_is_no_bracket_head() -> None:
    assert bracket_evidence(bracket_head((2.0, 2.0))).type == "bracket"
    found = bracket_evidence(bracket_head((2.0, 2.0), letters=8.0))
    assert found.type == "unclear"
    assert found.scores["brackets"] == pytest.approx(added(2.0), abs=1e-5) and added(2.0) > 1


def test_a_few_closing_brackets_of_which_half_suffer_make_no_bracket_head() -> None:
    few = replace(BRACKETS, test=BRACKETS.test.first(2))
    assert bracket_evidence(bracket_head((4.0, 4.0)), few).type == "bracket"
    found = bracket_evidence(bracket_head((4.0, 0.0)), few)
    assert found.type == "unclear" and 0.5 < found.scores["brackets"] < added(4.0)


def test_multigrams_are_counted_by_others_and_need_a_minimum() -> None:
    model = hand_built_model()
    write(model, 1, 2, 0.3 * torch.eye(9).roll(1, 1))
    count = [0] * 8
    count[INDEX[DECOY]] = MIN_MULTIGRAMS - 1
    assert evidence(model, count)[DECOY].type == "unclear"
    enough = evidence(model, [MIN_MULTIGRAMS] * 8)
    assert enough[DECOY].type == "multigram" and enough[DECOY].scores["multigrams"] == MIN_MULTIGRAMS
    assert enough[PREVIOUS].type == "previous-token"  # it looks back at random tokens too
    assert enough[TWINS[0]].type == "induction" and enough[DEAD[0]].type == "dead"
    with pytest.raises(ShapeError, match="one entry for each of 8 heads, got 3"):
        evidence(model, [1, 2, 3])


def test_an_induction_head_whose_loss_hurts_multigrams_more_is_a_multigram_head() -> None:
    model = hand_built_model()
    for at_repeats, kind in ((0.5, "multigram"), (2.0, "induction")):
        assert evidence(model, [MIN_MULTIGRAMS] * 8, at_repeats)[TWINS[0]].type == kind
    assert evidence(model, [MIN_MULTIGRAMS - 1] * 8, 0.5)[TWINS[0]].type == "induction"


@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("init_std", [0.02, 0.3])
def test_untrained_heads_are_of_no_type(changes, init_std) -> None:
    found = evidence(random_model(init_std=init_std, **changes))
    assert {of.type for of in found.values()} <= {"unclear", "dead"}


def test_evidence_depends_on_the_generator_alone() -> None:
    model = hand_built_model()
    state = torch.random.get_rng_state()
    one, same = (head_evidence(model, SPLIT, seeds.stream(0)) for _ in range(2))
    assert repr(one) == repr(same)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_some_examples_are_evenly_spaced() -> None:
    many = hand_built.full_rows(400, seeds.stream(0))
    few = some_examples(many)
    assert len(few) == 4096 // 24
    assert torch.equal(few.tokens[0], many.tokens[0]) and torch.equal(few.tokens[-1], many.tokens[-1])
    assert len(some_examples(SPLIT.test)) == len(SPLIT.test)


# ---- the analysis

STEPS = np.array([0, 10, 30, 100, 300, 1000, 3000])
STAGES = (
    Stage("S1", "rising", 0, 100, None, None, 5, None),
    Stage("S2", "rising", 100, 1000, None, None, 20, None),
    Stage("S3", "falling", 1000, 3000, None, None, -5, None),
)


@pytest.fixture(scope="module")
def planted() -> tuple[dict, LLCCurve]:
    """The hand-built model, whose previous-token head and then twins are switched on within the second stage."""
    rows, facts = [], None
    for previous, match in ((0, 0), (0, 0), (0, 0), (0, 0), (0.6, 0.02), (1, 1), (1, 1)):
        model = hand_built_model()
        with torch.no_grad():
            model.blocks[0].attn.W_Q[0] *= previous
            model.blocks[1].attn.W_Q[:2] *= match
            model.blocks[1].attn.W_Q[2] = 0.0
        facts = facts or analysis.prepare(model, SPLIT)
        rows.append(analysis.measure(model, SPLIT, seeds.stream(len(rows)), facts))
    series = {"step": STEPS} | {key: np.array([row[key] for row in rows]) for key in rows[0]}
    llc = np.array([[10, 12, 14, 15, 20, 35, 30.0]])
    curve = LLCCurve(STEPS, ("model",), llc, np.full((1, 7), 0.5))
    best = analysis.derive(series, curve, facts, np.random.default_rng(0))
    return series | best | {"facts": facts}, curve


def test_what_forms_in_a_planted_stage_is_claimed_of_that_stage(planted) -> None:
    series, curve = planted
    claims = analysis.conclude(series, STAGES, curve)
    assert [claim.stage for claim in claims] == ["S2", "S2", "S2", "S3", "S3", "S3"]
    assert all(claim.holds for claim in claims), [(claim.text, claim.value) for claim in claims]
    assert claims[2].value == pytest.approx(20 - 1.96 * np.hypot(0.5, 0.5))
    assert [claim.value for claim in claims[-2:]] == [1.0, 2.0]


def test_claims_are_the_same_for_any_stages_and_fail_where_they_must(planted) -> None:
    series, curve = planted
    without = analysis.conclude(series, (), curve)
    assert_only_the_end_is_judged(without, analysis.conclude(series, STAGES, curve))
    assert [claim.stage for claim in without] == ["none"] * 3 + ["run"] * 3
    falling = LLCCurve(STEPS, ("model",), -curve.llc, curve.std_error)
    assert not analysis.conclude(series, STAGES, falling)[2].holds
    # The previous-token head comes last: the order is not claimed.
    names = ("best previous-token", "best prefix matching")
    swapped = dict(series) | dict(zip(names, (series[name] for name in names[::-1]), strict=True))
    assert not analysis.conclude(swapped, STAGES, curve)[3].holds


def test_a_head_of_the_last_layer_is_no_previous_token_head_that_another_can_read() -> None:
    values = np.array([[5.0, 1.0, 9.0, 2.0]])
    series = {"step": STEPS[:1], "previous-token": values, "prefix matching": values}
    curve = LLCCurve(STEPS, ("model",), np.zeros((1, 7)), np.ones((1, 7)))

    def best(heads: list[str]) -> tuple[float, float]:
        found = analysis.derive(series, curve, {"heads": heads}, np.random.default_rng(0))
        return float(found["best previous-token"][0]), float(found["best prefix matching"][0])

    assert best(["L0H0", "L0H1", "L1H0", "L1H1"]) == (5.0, 9.0)
    assert best(["L0H0", "L0H1", "L0H2", "L0H3"]) == (9.0, 9.0)  # of one layer, all


def test_an_untrained_run_claims_nothing() -> None:
    model = random_model(init_std=0.1)
    facts = analysis.prepare(model, SPLIT)
    rows = [analysis.measure(model, SPLIT, seeds.stream(step), facts) for step in range(2)]
    for name in rows[0]:  # whatever the generator: only the model changes
        np.testing.assert_array_equal(rows[0][name], rows[1][name])
    series = {"step": STEPS} | {name: np.stack([rows[0][name]] * len(STEPS)) for name in rows[0]}
    curve = LLCCurve(STEPS, ("model",), np.arange(7.0)[None], np.full((1, 7), 0.1))
    series |= analysis.derive(series, curve, facts, np.random.default_rng(0))
    assert not any(claim.holds for claim in analysis.conclude(series, STAGES, curve))


def test_tables_and_figures_name_every_head(planted) -> None:
    series, curve = planted
    facts = series["facts"]
    report = Report("head_types", STEPS, {k: v for k, v in series.items() if k not in ("step", "facts")}, (), facts)
    tables = analysis.tables(report)
    columns, rows = tables["Heads at the last checkpoint"]
    assert [row[:2] for row in rows][4:6] == [["L1H0", "induction"], ["L1H1", "induction"]]
    assert all(len(row) == len(columns) for row in rows) and len(rows) == 8
    _, since = tables["Since when there is a head of the type"]
    assert ["induction", "L1H0, L1H1", "1000"] in since
    assert {row[0] for row in since} <= set(HEAD_TYPES)

    class PlantedStudy:
        stages = STAGES

    figures = analysis.plot(report, PlantedStudy())
    assert all(isinstance(figure, Figure) for figure in figures.values())


def test_the_analysis_refuses_rows_too_short_to_repeat() -> None:
    model = hand_built_model()
    short = replace(SPLIT, test=hand_built.cut(SPLIT.test, 4))
    with pytest.raises(ShapeError, match="use a task with longer rows"):
        analysis.prepare(model, short)
