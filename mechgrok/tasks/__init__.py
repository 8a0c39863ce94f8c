"""One file per task. A task turns its config and a seed into a `Split` of `Examples`."""

from mechgrok.task_config import ModularAdditionConfig, PlantedLanguageConfig, TaskConfig, TextConfig
from mechgrok.tasks import modular_addition, planted_language
from mechgrok.types import Split


def make_split(config: TaskConfig, seed: int) -> Split:
    """The train and test examples of the task that `config` names."""
    if isinstance(config, ModularAdditionConfig):
        return modular_addition.make_split(config, seed)
    if isinstance(config, PlantedLanguageConfig):
        return planted_language.make_split(config, seed)
    if isinstance(config, TextConfig):
        from mechgrok.tasks import text  # tokenizers and datasets are read only where they are used

        return text.make_split(config, seed)
    from mechgrok.tasks import hugging_face

    return hugging_face.make_split(config, seed)
