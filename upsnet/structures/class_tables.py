"""Class tables that ship with the package, so that weights work without their data set."""

import json
from importlib import resources

from upsnet.structures.categories import Categories


def class_table(dataset: str) -> Categories | None:
    """The classes of a data set by its name in recipes ("coco"), None if no table ships for it."""
    file = resources.files("upsnet.structures") / f"{dataset.lower()}_categories.json"
    if not file.is_file():
        return None
    return Categories.from_coco(json.loads(file.read_text(encoding="utf-8")), f"class table of {dataset}")
