import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechgrok import LLCConfig
from mechgrok.config import load_config, parse_config, preset_names
from mechgrok.errors import ConfigError
from tests.oracles import tiny_config

TOML = tiny_config().to_toml()


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
        (("nbeta = 10.0", "betta = 10.0"), "unknown key 'betta'"),
        (("n_chains = 2", "n_chains = 1"), "n_chains"),
        (('"model",', ""), 'components must hold "model"'),
        (("control_localization = 400.0", "control_localization = 200.0"), "must differ"),
        (('name = "tiny"', 'name = "../../etc"'), "name"),
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
