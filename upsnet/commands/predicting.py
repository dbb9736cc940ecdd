"""`upsnet predict`: photos in, label maps and pictures out."""

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from upsnet import builders
from upsnet.commands.startup import say_where
from upsnet.config import Recipe
from upsnet.engine.log import logging_to
from upsnet.predict import load_predictor
from upsnet.structures.errors import DataError, PlaceError
from upsnet.structures.pictures import write_png


def predict(recipe: Recipe, weights: Path, photos: Sequence[Path], out: Path) -> None:
    """Predicts photos: for each, panoptic PNG, json and picture: `street.png`, `street.json`, `street_drawn.png`.

    Raises:
        UserError: weights or a photo cannot be used, a result would overwrite another one or a photo, or `out` cannot
            be written.
    """
    for photo in photos:
        if not photo.is_file():
            raise DataError(f"{photo}: there is no such photo: check the path")
    taken = {photo.resolve() for photo in photos}
    for photo in photos:
        for ending in (".png", ".json", "_drawn.png"):
            path = (out / f"{photo.stem}{ending}").resolve()
            if path in taken:
                raise PlaceError(f"{path}: {photo} would overwrite it with its result: choose another --out or rename")
            taken.add(path)
    with logging_to(None):
        device = builders.choose_device(recipe)
        predictor = load_predictor(recipe, weights, device)
        say_where(device)
        for photo in tqdm(photos, "predict", unit="photo"):
            result = predictor.predict(photo, outputs=("panoptic",))
            result.save(out / photo.stem)
            write_png(out / f"{photo.stem}_drawn.png", result.draw())
    print(f"{len(photos)} results in {out}")
