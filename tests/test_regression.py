import copy
import json

import numpy as np
import pytest

import analyses
from mechgrok.errors import RunDirectoryError
from mechgrok.regression import baseline_of, compare


@pytest.fixture(scope="module")
def baseline(tiny_run: tuple) -> dict:
    study = tiny_run[1]
    return json.loads(json.dumps(baseline_of(study, [analyses.run("grokking", study)]), allow_nan=False))


def test_a_study_has_not_moved_from_itself(baseline: dict) -> None:
    assert compare(baseline, copy.deepcopy(baseline)) == []


def test_noise_of_the_stated_size_is_not_a_move_and_a_shift_is() -> None:
    """Two estimates of one truth are called moved in at most about 1 % of comparisons of a whole curve."""
    rng = np.random.default_rng(0)

    def study(shift: float = 0.0) -> dict:
        values = 10 + rng.normal(size=150) + shift * (np.arange(150) == 70)
        points = [[float(value), 1.0] for value in values]
        empty = {"stages": [], "claims": {}, "config": "x", "name": "x", "format": 1}
        return {"llc": {"model": points}, "steps": list(range(150)), **empty}

    assert sum(bool(compare(study(), study())) for _ in range(300)) <= 6
    moves = [compare(study(), study(20.0)) for _ in range(20)]
    assert all(len(move) == 1 and move[0].startswith("LLC of model at step 70") for move in moves)


def edited(baseline: dict, edit) -> dict:
    other = copy.deepcopy(baseline)
    edit(other)
    return other


def test_each_kind_of_move_is_named(baseline: dict) -> None:
    def set_claim(value: float, holds: bool):
        def edit(other: dict) -> None:
            next(iter(other["claims"]["grokking"].values())).update(value=value, threshold=1.0, holds=holds)

        return edited(baseline, edit)

    (move,) = compare(set_claim(1.3, True), set_claim(0.7, False))
    assert "claim of grokking no longer holds (value 1.3 -> 0.7)" in move
    (move,) = compare(set_claim(0.7, False), set_claim(1.3, True))
    assert "now holds" in move
    assert compare(set_claim(1.01, True), set_claim(0.99, False)) == []  # within the margin of the threshold
    assert compare(set_claim(1.3, True), set_claim(2.6, True)) == []

    two = [{"name": "S1", "direction": "rising", "end": 10.0, "end_interval": [8.0, 12.0]},
           {"name": "S2", "direction": "falling", "end": 40.0, "end_interval": None}]  # fmt: skip
    staged = edited(baseline, lambda other: other.update(stages=two))
    overlapping = edited(staged, lambda other: other["stages"][0].update(end=11.0, end_interval=[11.0, 15.0]))
    apart = edited(staged, lambda other: other["stages"][0].update(end=14.0, end_interval=[13.0, 15.0]))
    assert compare(staged, overlapping) == []
    assert compare(staged, apart) == ["end of stage S1: 10 [8, 12] -> 14 [13, 15]"]
    assert compare(staged, edited(staged, lambda o: o["stages"].pop()))[0] == "stages: rising falling -> rising"

    gone = edited(baseline, lambda other: other["llc"].pop("L0H0"))
    assert compare(baseline, gone) == ["LLC of L0H0: in only one of the two"]
    lost = edited(baseline, lambda other: other["llc"]["L0H0"].__setitem__(2, [None, None]))
    assert "L0H0 at step" in compare(baseline, lost)[0] and "not finite" in compare(baseline, lost)[0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: b.update(config="other"), "another configuration"),
        (lambda b: b.update(format=99), "format 99"),
        (lambda b: b.update(steps=[step + 5000 for step in b["steps"]]), "other checkpoints than the run"),
        (lambda b: b["steps"].pop(), "other checkpoints than the run"),
        (lambda b: b.pop("format"), "malformed, or no baseline at all"),
        (lambda b: b.pop("stages"), "malformed"),
        (lambda b: b["llc"].update(model=[["a"]]), "malformed"),
        (lambda b: b.update(llc=[]), "malformed"),
        (lambda b: b.update(llc={}), "malformed"),
        (lambda b: b.update(claims=[]), "malformed"),
    ],
)
def test_a_baseline_that_does_not_fit_is_refused(baseline: dict, spoil, message: str) -> None:
    with pytest.raises(RunDirectoryError, match=message):
        compare(edited(baseline, spoil), baseline)
