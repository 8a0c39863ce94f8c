"""Stages on curves whose change points are planted, and on curves that have none."""

from dataclasses import replace

import numpy as np
import pytest

import mechgrok as mg
from mechgrok.errors import ComponentError, ConfigError, ShapeError, UnhealthyEstimateError
from mechgrok.stages import place_stages, smooth, stage_points
from mechgrok.train import checkpoint_steps

STEPS = np.array(checkpoint_steps(3000, 33))
X = np.log1p(STEPS)


def curve(values: np.ndarray, sd: float, seed: int, stated: float | None = None) -> mg.LLCCurve:
    noise = sd * np.random.default_rng(seed).normal(size=len(values))
    error = np.full((1, len(values)), sd if stated is None else stated)
    return mg.LLCCurve(steps=STEPS, components=("model",), llc=[values + noise], std_error=error)


def hump(x: np.ndarray) -> np.ndarray:
    """Flat, up around e^4.4, down around e^6, flat: a peak and two shoulders."""
    return 300 / (1 + np.exp(-4 * (x - 4.4))) - 290 / (1 + np.exp(-2.5 * (x - 6)))


FINE = np.linspace(0, X[-1], 100_001)
PEAK = float(np.expm1(FINE[np.argmax(hump(FINE))]))


def test_a_planted_hump_is_found_and_its_peak_covered() -> None:
    covered, widths, shapes = [], [], []
    for seed in range(30):
        stages = mg.detect_stages(curve(hump(X), 6.0, seed))
        shapes.append([stage.direction for stage in stages])
        (falling,) = [stage for stage in stages if stage.direction == "falling"]
        low, high = falling.start_interval
        covered.append(low <= PEAK <= high)
        widths.append(high / low)
        assert abs(np.log(falling.start / PEAK)) < 0.15
        assert falling.delta_llc == pytest.approx(-250, abs=40)
    assert np.mean(covered) >= 0.9  # 95 % intervals, 30 runs
    assert np.mean(widths) < 1.5  # and not by being wide
    assert np.mean([shape[:3] == ["plateau", "rising", "falling"] for shape in shapes]) > 0.9


def test_stages_tile_the_run_and_intervals_hold_their_boundary() -> None:
    stages = mg.detect_stages(curve(hump(X), 6.0, 0))
    assert stages[0].start == 0 and stages[-1].end == 3000
    assert stages[0].start_interval is None and stages[-1].end_interval is None
    for before, after in zip(stages[:-1], stages[1:], strict=True):
        assert before.end == after.start and before.end_interval == after.start_interval
        assert before.end_interval[0] <= before.end <= before.end_interval[1]


def test_shoulders_of_a_step_are_plateau_boundaries() -> None:
    """Flat to e^3, straight up to e^5.5, flat: boundaries at the kinks, to about two checkpoints."""
    ramp = 100 * np.clip((X - 3.0) / 2.5, 0, 1)
    for seed in range(5):
        stages = mg.detect_stages(curve(ramp, 1.0, seed))
        assert [stage.direction for stage in stages] == ["plateau", "rising", "plateau"]
        assert abs(np.log1p(stages[1].start) - 3.0) < 0.6
        assert abs(np.log1p(stages[1].end) - 5.5) < 0.6
        assert stages[1].delta_llc == pytest.approx(100, abs=8)


@pytest.mark.parametrize("stated", [5.0, 1.0])
def test_a_flat_noisy_curve_has_no_stage_even_if_its_errors_are_understated(stated: float) -> None:
    found = [len(mg.detect_stages(curve(np.full(len(X), 50.0), 5.0, seed, stated))) for seed in range(40)]
    assert sum(n > 0 for n in found) <= 1


def test_an_exactly_constant_curve_has_no_stage() -> None:
    assert mg.detect_stages(curve(np.full(len(X), 3.0), 0.0, 0)) == ()


def test_a_straight_rise_is_one_stage() -> None:
    (stage,) = mg.detect_stages(curve(10 * X, 1.0, 0))
    assert (stage.direction, stage.start, stage.end) == ("rising", 0, 3000)


def test_more_noise_widens_the_interval() -> None:
    def width(sd: float) -> float:
        ratios = []
        for seed in range(5):
            (falling,) = [s for s in mg.detect_stages(curve(hump(X), sd, seed)) if s.direction == "falling"]
            ratios.append(np.log(falling.start_interval[1] / falling.start_interval[0]))
        return float(np.mean(ratios))

    assert width(20.0) > 1.5 * width(2.0)


def test_scale_and_offset_do_not_matter() -> None:
    base = curve(hump(X), 6.0, 3)
    other = mg.LLCCurve(steps=STEPS, components=("model",), llc=1e-3 * base.llc + 7, std_error=1e-3 * base.std_error)
    first, second = mg.detect_stages(base), mg.detect_stages(other)
    assert [s.start for s in first] == pytest.approx([s.start for s in second], rel=0.02)


def test_unhealthy_points_raise_unless_dropped_and_then_do_not_matter() -> None:
    base = curve(hump(X), 6.0, 0)
    spoiled, healthy = base.llc.copy(), np.ones_like(base.llc, bool)
    spoiled[0, 20], healthy[0, 20] = 1e6, False
    bad = mg.LLCCurve(steps=STEPS, components=("model",), llc=spoiled, std_error=base.std_error, healthy=healthy)
    with pytest.raises(UnhealthyEstimateError, match=rf"at steps {STEPS[20]} are unhealthy"):
        mg.detect_stages(bad)
    dropped = mg.detect_stages(bad, drop_unhealthy=True)
    (falling,) = [s for s in dropped if s.direction == "falling"]
    assert abs(np.log(falling.start / PEAK)) < 0.3


def test_too_few_points_and_unknown_components_are_refused() -> None:
    short = mg.LLCCurve(steps=[0, 1, 2], components=("model",), llc=[[1, 2, 3]], std_error=[[1, 1, 1]])
    with pytest.raises(ShapeError, match="at least 6 healthy points"):
        mg.detect_stages(short)
    with pytest.raises(ComponentError, match="no component 'L0H0'"):
        mg.detect_stages(curve(hump(X), 6.0, 0), component="L0H0")


def test_placed_stages_carry_the_changes_between_their_boundaries() -> None:
    base = curve(hump(X), 1.0, 0)
    losses = np.linspace(4, 0, len(X))
    known = mg.LLCCurve(steps=STEPS, components=("model",), llc=base.llc, std_error=base.std_error, init_loss=losses)
    stages = place_stages(known, smooth(known), [PEAK])
    assert [s.direction for s in stages] == ["rising", "falling"]
    assert sum(s.delta_loss for s in stages) == pytest.approx(-4.0)
    assert stages[0].delta_llc == pytest.approx(float(hump(np.log1p(PEAK)) - hump(0.0)), abs=5)


def test_the_same_seed_gives_the_same_stages() -> None:
    assert mg.detect_stages(curve(hump(X), 6.0, 0)) == mg.detect_stages(curve(hump(X), 6.0, 0))


def two_rises(slow: float) -> np.ndarray:
    """Rises at rate 30 in log time but for a stretch of 1.2 in its middle, where the rate is `slow`."""
    middle = X[-1] / 2
    rate = np.where(np.abs(X - middle) < 0.6, slow, 30.0)
    return np.concatenate([[0.0], np.cumsum(np.diff(X) * (rate[1:] + rate[:-1]) / 2)])


def test_a_dip_between_two_rises_is_a_boundary() -> None:
    stages = mg.detect_stages(curve(two_rises(2.0), 1.0, 0))
    assert [stage.direction for stage in stages][0] == [stage.direction for stage in stages][-1] == "rising"
    boundaries = [np.log1p(stage.end) for stage in stages[:-1]]
    assert boundaries and all(abs(x - X[-1] / 2) < 0.8 for x in boundaries)


def test_a_slight_slowing_is_a_dip_only_where_the_rate_falls_by_half() -> None:
    (rise,) = mg.detect_stages(curve(two_rises(22.0), 1.0, 0))
    assert rise.direction == "rising"
    first, second = mg.detect_stages(curve(two_rises(8.0), 1.0, 0))
    assert first.direction == second.direction == "rising"
    low, high = first.end_interval
    assert np.log1p(low) < X[-1] / 2 < np.log1p(high)


def test_noise_on_a_steady_rise_makes_no_dip() -> None:
    found = [len(mg.detect_stages(curve(30.0 * X, 5.0, seed), seed=seed)) > 1 for seed in range(60)]
    assert sum(found) <= 8  # at the level of 5 % more than 8 of 60 has probability .2 %


def test_stages_end_where_nothing_more_was_measured() -> None:
    """What the curve did at the ends is not known: the smooth curve is not drawn on as a plateau."""
    whole = curve(hump(X), 3.0, 0)
    healthy = np.ones((1, len(STEPS)), bool)
    healthy[0, :2] = healthy[0, -6:] = False
    stages = mg.detect_stages(replace(whole, healthy=healthy), drop_unhealthy=True)
    assert (stages[0].start, stages[-1].end) == (STEPS[2], STEPS[-7])
    assert [stage.end for stage in stages[:-1]] == [stage.start for stage in stages[1:]]


def test_numbers_that_are_not_finite_count_as_unhealthy() -> None:
    base = curve(hump(X), 3.0, 0)
    for name in ("llc", "std_error"):
        values = getattr(base, name).copy()
        values[0, 20] = np.nan
        holed = replace(base, **{name: values})
        with pytest.raises(UnhealthyEstimateError, match=rf"at steps {STEPS[20]} are unhealthy or not finite"):
            mg.detect_stages(holed)
        assert mg.detect_stages(holed, drop_unhealthy=True)


def test_a_list_is_no_curve() -> None:
    with pytest.raises(ShapeError, match="curve must be an LLCCurve, got list"):
        mg.detect_stages([1.0, 2.0])  # type: ignore[arg-type]


def test_a_number_is_no_stage_config() -> None:
    with pytest.raises(ConfigError, match="config must be a StageConfig, got float"):
        mg.detect_stages(curve(hump(X), 3.0, 0), 0.05)  # type: ignore[arg-type]


def test_surely_negative_points_are_no_minimum_and_found_no_stage_on() -> None:
    base = curve(hump(X) + 20, 3.0, 0)
    downhill, raised = base.llc.copy(), base.llc.copy()
    downhill[0, 0], raised[0, 0] = -500.0, np.nan
    with_it, without = (
        mg.detect_stages(mg.LLCCurve(STEPS, ("model",), llc, base.std_error), drop_unhealthy=True)
        for llc in (downhill, raised)
    )
    assert [(s.direction, s.end) for s in with_it] == [(s.direction, s.end) for s in without]
    slightly = base.llc.copy()
    slightly[0, 0] = -2 * base.std_error[0, 0]
    assert stage_points(mg.LLCCurve(STEPS, ("model",), slightly, base.std_error)).all()
