"""Where a run puts its files: the places of the original UPSNet."""

from datetime import datetime
from pathlib import Path

from upsnet.config.schema import Recipe


def _sets(image_sets: str) -> str:
    return image_sets.replace("+", "_")


def _minute(time: datetime) -> str:
    return time.strftime("%Y-%m-%d-%H-%M")


def training_folder(recipe: Recipe) -> Path:
    """Folder of the logs and snapshots of a training: output_path/NAME/IMAGE_SETS."""
    return Path(recipe.output_path) / recipe.name / _sets(recipe.dataset.image_set)


def testing_folder(recipe: Recipe) -> Path:
    """Folder of the logs of a test: output_path/NAME/TEST_IMAGE_SETS."""
    return Path(recipe.output_path) / recipe.name / _sets(recipe.dataset.test_image_set)


def results_folder(recipe: Recipe) -> Path:
    """Folder of what a test predicts and scores."""
    return testing_folder(recipe) / "results"


def log_file(recipe: Recipe, folder: Path, time: datetime) -> Path:
    """The text log of a run that started at this time, in `training_folder` or `testing_folder`."""
    return folder / f"{recipe.name}_{_minute(time)}.log"


def tensorboard_folder(recipe: Recipe, time: datetime) -> Path:
    """Folder of the TensorBoard events of a training that started at this time."""
    return Path(recipe.output_path) / "tensorboard" / recipe.name / _sets(recipe.dataset.image_set) / _minute(time)


def snapshot_file(recipe: Recipe, iteration: int) -> Path:
    """Weights after this many steps."""
    return training_folder(recipe) / f"{recipe.model_prefix}{iteration}.pth"


def default_weights(recipe: Recipe) -> Path:
    """What a test loads when no weights are named."""
    iteration = recipe.test.test_iteration
    return snapshot_file(recipe, recipe.train.max_iteration if iteration is None else iteration)
