"""Each sabotage of an estimate gets a reason of its own, and what is sound gets none."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import mechgrok as mg
from mechgrok.config import load_config
from mechgrok.llc.curve import assemble_curve
from mechgrok.presets import __path__ as presets
from mechgrok.sampling.motion import unsettled_share
from mechgrok.sampling.samplers import SAMPLERS, State
from mechgrok.sampling.samplers import Slope as Force
from mechgrok.sampling.verdict import top_row
from tests.oracles import Quadratic, Slope, noisy_quadratic, quadratic_loss, slope_loss, stationary_llc

CURVATURE = torch.tensor([0.0, 0.3, 1.0, 2.0, 5.0, 0.1, 1.5, 3.0], dtype=torch.float64)
X = torch.zeros(1, dtype=torch.float64)
W_STAR, MOVED, SHORT = "w* is no minimum", "have not moved at all", "too short"
ALONE, NOTHING = "the localization alone decides", "pulls at nothing"


def config(**changes) -> mg.LLCConfig:
    values = {"nbeta": 30.0, "step_size": 0.01, "localization": 5.0, "n_chains": 4, "n_draws": 400, "n_burnin": 100}
    return mg.LLCConfig(**(values | changes))


def estimate(curvature: torch.Tensor = CURVATURE, chance_loss: float | None = None, **changes) -> mg.LLCEstimate:
    x = X.to(curvature.dtype)
    settings = config(**changes)
    return mg.estimate_llc(
        Quadratic(curvature), (x,), loss_fn=quadratic_loss, config=settings, seed=0, chance_loss=chance_loss
    )


def said(found: mg.LLCEstimate, *parts: str) -> list[bool]:
    return [any(part in reason for reason in found.health.reasons) for part in parts]


def test_a_sound_estimate_has_no_reason_and_no_caution() -> None:
    found = estimate(chance_loss=1.0)
    assert found.health.healthy, found.health.reasons
    assert found.health.cautions == ()
    assert (found.health.still, found.health.missing) == (0.0, 0.0)
    assert found.health.descent == 0.0 and found.health.gradient_variance == 0.0


# ---- nothing is pulled, or hardly


def test_nbeta_zero_pulls_at_nothing() -> None:
    found = estimate(nbeta=0.0)
    assert said(found, NOTHING, ALONE, W_STAR) == [True, False, False] and not found.health.sound


@pytest.mark.parametrize(
    ("localization", "share", "flagged"), [(5.0, 0.88, (False, False)), (60.0, 0.54, (False, False)),
                                           (300.0, 0.22, (True, False)), (1e5, 0.001, (True, True))]
)  # fmt: skip
def test_the_localization_decides_more_and_more_and_in_the_end_alone(
    localization: float, share: float, flagged: tuple[bool, bool]
) -> None:
    """A caution below a half of the ratio, a reason below a twentieth; exactly the ratio is sum r^2 / sum r."""
    found = estimate(localization=localization, step_size=0.2 / (150 + localization), n_chains=16)
    r = 30 * CURVATURE.numpy() / (30 * CURVATURE.numpy() + localization)
    assert (r**2).sum() / r.sum() == pytest.approx(share, rel=0.05)
    assert (found.health.saturated, *said(found, ALONE)) == flagged
    assert found.health.healthy != flagged[1]
    assert bool(found.health.cautions) == flagged[0]


# ---- the chains have not moved, or not long enough


@pytest.mark.parametrize("step_size", [1e-12, 1e-16, 1e-20])
@pytest.mark.parametrize("localization", [5.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_that_move_nothing_are_told(step_size: float, localization: float, dtype: torch.dtype) -> None:
    found = estimate(CURVATURE.to(dtype), step_size=step_size, localization=localization)
    assert said(found, SHORT, ALONE) == [True, False]
    assert found.health.missing == pytest.approx(1.0, abs=1e-4)


def test_steps_below_the_spacing_of_the_weights_are_lost() -> None:
    """Weights of 1e5 are .008 apart in float32, and steps of .001 leave them where they are."""
    module = Quadratic(CURVATURE.float())
    module.w.data += 1e5

    def loss(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * (module.curvature * (module.w - 1e5) ** 2).sum() + 0.0 * x

    settings = config(step_size=1e-6, localization=1000.0)
    found = mg.estimate_llc(module, (X.float(),), loss_fn=loss, config=settings, seed=0)
    assert said(found, MOVED) == [True] and found.health.still > 0.8
    sound = mg.estimate_llc(module.double(), (X,), loss_fn=loss, config=settings, seed=0)
    assert said(sound, MOVED) == [False] and sound.health.still == 0.0


def test_flat_directions_that_never_mixed_are_told_and_steep_ones_that_did_are_not() -> None:
    """n x step x localization = 6e-4 in both; what is missing is there only where directions are flat."""
    settings = {"step_size": 6e-7, "localization": 1.0, "n_draws": 900, "n_burnin": 100, "nbeta": 30.0, "n_chains": 32}
    wide = torch.logspace(-2, 4, 20, dtype=torch.float64)
    found = estimate(wide, **settings)
    r = 30 * wide / (30 * wide + 1)
    assert found.llc < 0.8 * 0.5 * float(r.sum())  # it is read low
    assert said(found, SHORT) == [True]
    true_share = 1 - found.llc / (0.5 * float(r.sum()))
    assert found.health.missing > true_share  # a bound, and no empty one
    assert found.health.missing < 0.95
    steep = estimate(torch.full((20,), 1e4, dtype=torch.float64), **settings)
    assert steep.health.healthy, steep.health.reasons
    assert unsettled_share(config(**settings), 1.0) > 0.99  # the settings alone do not tell the two apart
    exact = stationary_llc(np.full(20, 1e4), config(**settings))
    assert abs(steep.llc - exact) < 3 * steep.std_error < 0.05 * exact


@pytest.mark.parametrize(("sampler", "momentum"), [("sgld", 0.0), ("baoab", 0.0), ("baoab", 0.6), ("baoab", 0.95)])
def test_what_settings_say_is_left_of_a_displacement_is_what_the_step_leaves(sampler: str, momentum: float) -> None:
    """The variance over very many steps falls by `forgetting` a step, whether or not it swings."""
    for curvature in (0.3, 20.0):
        settings = config(sampler=sampler, momentum=momentum, step_size=0.02)
        carried = () if sampler == "sgld" else (torch.zeros(1, 1, dtype=torch.float64),)
        state = State(torch.ones(1, 1, dtype=torch.float64), carried)
        still = torch.zeros(1, 1, dtype=torch.float64)
        largest = [0.0, 0.0]
        for step in range(2000):
            grad = (curvature - settings.localization) / settings.nbeta * state.theta
            state = SAMPLERS[sampler].step(state, Force(grad, still), still, settings)
            if step % 1000 >= 900:  # the top of a swing
                largest[step // 1000] = max(largest[step // 1000], abs(float(state.theta)))
        rate = 2 * math.log(largest[1] / largest[0]) / 1000
        assert rate == pytest.approx(math.log(SAMPLERS[sampler].forgetting(settings, curvature)), rel=0.02)


def test_every_preset_gives_its_chains_the_time() -> None:
    """The settings of every preset, and of its controls, leave less than a twentieth even of flat directions."""
    for path in Path(next(iter(presets))).glob("*.toml"):
        curve = load_config(path.stem).llc
        for settings in (*curve.each_sampling.values(), curve.control, curve.sampling.halved()):
            assert unsettled_share(settings, settings.localization) < 0.05, path.stem


def test_without_a_localization_only_chains_in_which_nothing_happened_are_told() -> None:
    found = estimate(localization=0.0)
    assert math.isnan(found.health.missing) and found.health.healthy
    assert not found.health.saturated


# ---- w* is no minimum


def test_a_model_that_does_not_beat_guessing_has_no_minimum() -> None:
    def above(by: float) -> mg.LLCEstimate:
        module = Slope(torch.zeros(8, dtype=torch.float64), CURVATURE, above=by)
        return mg.estimate_llc(module, (X,), loss_fn=slope_loss, config=config(), seed=0, chance_loss=2.5)

    found = above(8.3)
    assert said(found, W_STAR, "by guessing") == [True, True]
    assert found.health.sound and not found.health.healthy  # the chains are what they should be
    of = {(0, "m", found.config): found}, {"m": found.config}
    on_own, elsewhere = (assemble_curve(*of, elsewhere=other) for other in (False, True))
    assert not on_own.healthy[0, 0] and elsewhere.healthy[0, 0]
    assert said(above(2.5), "by guessing") == [True]
    assert above(2.4).health.healthy


@pytest.mark.parametrize(("slope", "below"), [(0.3, False), (1.5, True)])
def test_a_slope_that_takes_more_than_it_leaves_is_told(slope: float, below: bool) -> None:
    """The gradient lies where the loss is flat: the exact descent is nbeta^2 g^2 / localization."""
    gradient = torch.zeros(8, dtype=torch.float64)
    gradient[0] = slope / 30 * 5**0.5 * 2.3  # descent 5.3 slope^2, of an LLC of 2.8
    found = mg.estimate_llc(Slope(gradient, CURVATURE), (X,), loss_fn=slope_loss, config=config(), seed=0)
    exact = 30**2 * float(gradient[0]) ** 2 / 5
    assert found.health.descent == pytest.approx(exact, rel=0.35)
    assert said(found, "its slope there takes", "found lower losses") == [below, below]
    assert found.health.healthy != below
    assert bool(found.health.start_reasons) == below


def test_a_slope_that_takes_more_than_the_error_bar_is_minded() -> None:
    gradient = torch.zeros(8, dtype=torch.float64)
    gradient[0] = 0.07  # descent .88, and all of it is lost where the loss is flat: 2.4 of an LLC of 3.3 are left
    settings = config(n_chains=16, n_draws=1000)
    found = mg.estimate_llc(Slope(gradient, CURVATURE), (X,), loss_fn=slope_loss, config=settings, seed=0)
    assert found.health.sloping and not said(found, "found lower losses")[0]
    (caution,) = (text for text in found.health.cautions if "not quite a minimum" in text)
    assert "takes 0.4" in caution and "to 0." in caution


def test_devinterps_chains_are_judged_by_their_settings() -> None:
    """Of its chains only the losses are known: what its weights did is not told, and the time they had is."""
    module, centres, loss = noisy_quadratic(n_params=6, n_examples=16, seed=0)
    settings = config(engine="devinterp", batch_size=4, n_chains=2, n_draws=60, n_burnin=20, step_size=1e-7)
    found = mg.estimate_llc(module.float(), (centres.float(),), loss_fn=loss, config=settings, seed=0)
    assert said(found, SHORT) == [True] and math.isnan(found.health.still) and math.isnan(found.health.descent)
    assert math.isfinite(found.llc_variance)


# ---- one row


def test_one_row_that_is_the_loss_is_told() -> None:
    rng = np.random.default_rng(0)
    alike = torch.from_numpy(rng.exponential(size=500))
    assert top_row(alike, 0.0)[0] < 0.05 and not top_row(alike, 0.0)[1]
    one = torch.zeros(500, dtype=torch.float64)
    one[7] = 9.7
    assert top_row(one, 1e-4) == (1.0, True)
    assert top_row(one, 1.0) == (1.0, False)  # no more than the error bar
    assert top_row(torch.tensor([1.0]), 0.0) == (1.0, False)
    assert top_row(torch.tensor([0.1, 1.0, 0.2]), 0.0)[1] is False  # three rows: by chance
    assert math.isnan(top_row(torch.tensor([-1.0, 2.0]), 0.0)[0])
    assert math.isnan(top_row(torch.zeros(3), 0.0)[0])


def test_chance_has_so_large_a_share_as_rarely_as_the_rule_says() -> None:
    """P(share > g) = n (1 - g)^(n - 1) for exponential losses and g of a half or more, by simulation."""
    losses = np.random.default_rng(0).exponential(size=(200_000, 6))
    share = losses.max(1) / losses.sum(1)
    assert np.mean(share > 0.6) == pytest.approx(6 * 0.4**5, rel=0.05)


def test_an_estimate_says_that_one_row_is_its_loss() -> None:
    def loss(module: torch.nn.Module, row: torch.Tensor) -> torch.Tensor:
        return 0.5 * (module.curvature * module.w**2).sum() + row

    rows = torch.zeros(500, dtype=torch.float64)
    rows[3] = 9.7
    found = mg.estimate_llc(Quadratic(CURVATURE), (rows,), loss_fn=loss, config=config(batch_size=50), seed=0)
    assert found.health.top_share == 1.0 and found.health.healthy
    assert any("one example makes 100%" in text for text in found.health.cautions)
