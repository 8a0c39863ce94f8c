import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechgrok import LLCConfig
from mechgrok.config import load_config, parse_config, preset_names
from mechgrok.errors import ConfigError
from tests.oracles import tiny_config
from tests.planted import language_run_config

TOML = tiny_config().to_toml()
TASKS = "modular-addition, planted-language, text, hugging-face"


@pytest.mark.parametrize("name", preset_names())
def test_presets_load_bear_their_name_and_survive_toml(name: str) -> None:
    config = load_config(name)
    assert config.name == name
    assert parse_config(config.to_toml(), "again") == config


@given(
    nbeta=st.floats(0, 1e6),
    step=st.floats(1e-9, 1.0),
    gamma=st.floats(0, 1e5),
    batch=st.none() | st.integers(1, 10_000),
)
def test_toml_keeps_every_number_and_the_digest_tells_them_apart(nbeta, step, gamma, batch) -> None:
    sampling = LLCConfig(nbeta=nbeta, step_size=step, localization=gamma, batch_size=batch)
    config = tiny_config(llc={"sampling": sampling, "control_localization": gamma + 1.0})
    again = parse_config(config.to_toml(), "again")
    assert again == config
    assert again.digest() == config.digest()
    assert (config.digest() == tiny_config().digest()) == (config == tiny_config())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("p = 7", "p = 7\nq = 3"), "unknown key 'task.q'"),
        (("p = 7", ""), "missing key 'task.p'"),
        (("p = 7", "p = 12"), "p must be a prime of at least 5, got 12; try 13"),
        (("p = 7", "p = 2"), "p must be a prime of at least 5, got 2; try 5"),
        (("p = 7", 'p = "seven"'), "task.p"),
        (("p = 7", "p = 1000003"), "p must be at most 1000"),
        (("train_fraction = 0.7", "train_fraction = 1.5"), "task.train_fraction"),
        (("nbeta = 10.0", "nbeta = -1.0"), "nbeta"),
        (("nbeta = 10.0", "nbeta = nan"), "nbeta"),
        (("p = 7", "p = 1000"), "task: p must be a prime of at least 5, got 1000; try 997"),
        (("p = 7", f"p = 1{40 * '0'}"), f"got 1{40 * '0'}; try 997"),
        (("p = 7", f"p = 1{5000 * '0'}"), "not valid TOML"),
        (('name = "modular-addition"\n', ""), f"my.toml: task.name is missing; give one of {TASKS}"),
        (("modular-addition", "addition"), f"my.toml: task.name 'addition' is unknown; give one of {TASKS}"),
        (("nbeta = 10.0", "nbeta = 10.0\nnbetta = 3"), "my.toml: unknown key 'llc.sampling.nbetta'"),
        (
            ("nbeta = 10.0", "nbeta = 1e300"),
            "llc.sampling.nbeta: Input should be less than or equal to 1000000000000000000 (got 1e",
        ),
        (("step_size = 0.001", "step_size = 1e300"), "llc.sampling.step_size: Input should be less than or equal"),
        (
            ("n_draws = 32", "n_draws = 10_000_001"),
            "llc.sampling.n_draws: Input should be less than or equal to 10000000",
        ),
        (
            ("n_burnin = 8", "n_burnin = 10_000_001"),
            "llc.sampling.n_burnin: Input should be less than or equal to 1000",
        ),
        (
            ("n_chains = 2", "n_chains = 1048577"),
            "llc.sampling.n_chains: Input should be less than or equal to 1048576",
        ),
        (("batch_size = 8", "batch_size = 1048577"), "llc.sampling.batch_size: Input should be less than or equal to"),
        (("d_model = 16", "d_model = 1048577"), "model.d_model: Input should be less than or equal to 1048576"),
        (
            ("d_model = 16", "d_model = 16\nn_ctx = 1048577"),
            "model.n_ctx: Input should be less than or equal to 1048576",
        ),
        (("d_model = 16", "d_model = 16\nd_vocab = 1048577"), "model.d_vocab: Input should be less than or equal to"),
        (("d_model = 16", "d_model = 16\nn_ctx = 300_000"), "takes 90 GB, more than 70; make it smaller"),
        (("d_mlp = 16", "d_mlp = 1048577"), "model.d_mlp: Input should be less than or equal to 1048576"),
        (("n_chains = 2", "n_chains = 1"), "n_chains"),
        (('"model",', ""), 'components must hold "model"'),
        (("control_localization = 400.0", "control_localization = 200.0"), "must differ"),
        (('name = "tiny"', 'name = "../../etc"'), "name must be of letters, digits and ._- and not begin with these"),
        (("p = 7", "p = "), "not valid TOML"),
    ],
)
def test_a_bad_setting_is_named_with_its_file(change: tuple[str, str], message: str) -> None:
    assert change[0] in TOML
    with pytest.raises(ConfigError, match="my.toml") as error:
        parse_config(TOML.replace(*change), "my.toml")
    assert message in str(error.value)


def test_unknown_presets_and_missing_files_say_what_there_is() -> None:
    with pytest.raises(ConfigError, match="presets are .*modular-addition, "):
        load_config("modular-subtraction")
    with pytest.raises(ConfigError, match="cannot read the config nowhere.toml"):
        load_config("nowhere.toml")


def test_llc_config_built_by_hand_raises_our_error() -> None:
    with pytest.raises(ConfigError, match="missing key 'localization'"):
        LLCConfig(nbeta=1.0, step_size=1e-3)  # ty: ignore


def test_chains_and_draws_are_bounded_together() -> None:
    with pytest.raises(
        ConfigError, match=r"^LLCConfig: n_chains \* n_draws must be at most 10\^9, got 101 \* 10000000;"
    ):
        LLCConfig(nbeta=1.0, step_size=1e-3, localization=1.0, n_chains=101, n_draws=10**7)


def test_a_refinement_of_nothing_is_refused() -> None:
    nothing = 'refinements = [{ distribution = "reference", reference_layers = 1, components = [] }]'
    with pytest.raises(ConfigError, match=r"^my.toml: llc.refinements.0.components: Tuple should have at least 1 item"):
        parse_config(TOML.replace("refinements = []", nothing), "my.toml")


def test_a_parallel_mlp_that_is_not_there_is_refused() -> None:
    text = TOML.replace("d_mlp = 16\n", "").replace("parallel_attn_mlp = false", "parallel_attn_mlp = true")
    with pytest.raises(ConfigError) as error:
        parse_config(text, "my.toml")
    message = "parallel_attn_mlp needs an MLP beside the attention: give d_mlp, or leave it out"
    assert str(error.value) == f"my.toml: model: {message}"


def test_a_calibration_of_a_run_without_localization_gives_a_config() -> None:
    free = tiny_config(llc={"sampling": tiny_config().llc.sampling.model_dump() | {"localization": 0.0}})
    found = free.with_sampling(tiny_config().llc.sampling)
    assert (found.llc.sampling.localization, found.llc.control_localization) == (200.0, 400.0)
    assert parse_config(found.to_toml(), "calibrated.toml") == found


def test_a_run_that_is_there_already_is_read_whatever_its_settings_do() -> None:
    """What an older version let pass stays readable, under the digest that it has."""
    idle = TOML.replace("momentum = 0.0", "momentum = 0.9").replace("eps = 1e-05", "eps = 1e-3")
    assert idle.count("0.9\n") == 1 and "eps = 1e-3" in idle
    with pytest.raises(ConfigError, match="my.toml: model: eps = 0.001 changes nothing, as it acts in a normalization"):
        parse_config(idle, "my.toml")
    found = parse_config(idle, "my.toml", stored=True)
    assert found.llc.sampling.momentum == 0.9 and found.model.eps == 1e-3
    assert parse_config(found.to_toml(), "again", stored=True).digest() == found.digest() != tiny_config().digest()


def test_digests_stay_what_they_are() -> None:
    """A run directory of an older version belongs to the same settings: these were computed before any was refused."""
    assert tiny_config().digest() == "7dc7f037e1183cf4027610d3afd1d094e8e9d0e43dcb66d8643458d935a3d1b2"
    assert language_run_config().digest() == "dcd8e436add1e1933f6770468b7eb76fa1f8007da5c52e99de2ccfdd0d647de6"


@pytest.mark.parametrize("name", preset_names())
def test_nothing_in_a_preset_is_idle(name: str) -> None:
    config = load_config(name)
    for settings in (config.model, *config.llc.each_sampling.values()):
        assert settings.without_idle() == settings
