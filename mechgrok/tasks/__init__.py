"""One file per task. A task turns its config and a seed into a `Split` of `Examples`."""

from mechgrok.task_config import ModularAdditionConfig, TaskConfig
from mechgrok.tasks import modular_addition, planted_language
from mechgrok.types import Split


def make_split(config: TaskConfig, seed: int) -> Split:
    """The train and test examples of the task that `config` names."""
    if isinstance(config, ModularAdditionConfig):
        return modular_addition.make_split(config, seed)
    return planted_language.make_split(config, seed)
