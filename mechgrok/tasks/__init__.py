"""One file per task. A task turns its config and a seed into a `Split` of `Examples`."""

from mechgrok.config import ModularAdditionConfig
from mechgrok.tasks import modular_addition
from mechgrok.types import Split


def make_split(config: ModularAdditionConfig, seed: int) -> Split:
    """The train and test examples of the task that `config` names."""
    return modular_addition.make_split(config, seed)
