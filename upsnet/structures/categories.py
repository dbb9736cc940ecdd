"""The class table of a data set, in the order that the network uses: stuff first.

Three numberings meet here:

* category id: the data set's own number (COCO: 1..200 with gaps),
* semantic id: 0..S-1, all stuff classes in file order, then all thing classes in file order,
* thing class: 1..C-1 in the instance head, 0 is background; semantic id = num_stuff - 1 + thing class.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from upsnet.structures.errors import DataError


@dataclass(frozen=True, slots=True)
class Category:
    """One class. `color` is RGB, 0..255, for pictures only: it makes no other class."""

    id: int
    name: str
    is_thing: bool
    color: tuple[int, int, int] = field(compare=False)


class Categories:
    """An immutable class table; `categories[semantic_id]` is a `Category`."""

    def __init__(self, categories: Iterable[Category]) -> None:
        given = list(categories)
        self._ordered = [c for c in given if not c.is_thing] + [c for c in given if c.is_thing]
        self._semantic_id = {category.id: i for i, category in enumerate(self._ordered)}
        if len(self._semantic_id) != len(given):
            ids = [category.id for category in given]
            doubled = next(i for i in ids if ids.count(i) > 1)
            raise DataError(f"category id {doubled} is given to two classes: every class needs an id of its own")
        self.num_stuff = sum(not category.is_thing for category in given)
        self.num_things = len(given) - self.num_stuff

    @classmethod
    def from_coco(cls, records: Iterable[Mapping[str, Any]], source: str) -> "Categories":
        """Builds the table from the `categories` list of a COCO panoptic json.

        Args:
            records: dictionaries with `id`, `name`, `isthing` and optionally `color`.
            source: where the records come from, for the error message.

        Raises:
            DataError: this is no list of records, a record lacks a key or holds a wrong value, or two share an id.
        """
        if isinstance(records, str | Mapping) or not isinstance(records, Iterable):
            raise DataError(f"{source}: 'categories' is {_shown(records)}: make it a list of records")
        try:
            return cls(_checked_category(record, position) for position, record in enumerate(records))
        except DataError as error:
            raise DataError(f"{source}: {error}") from None

    def to_coco(self) -> list[dict[str, Any]]:
        """The table as COCO records, in semantic order."""
        return [{"id": c.id, "name": c.name, "isthing": int(c.is_thing), "color": list(c.color)} for c in self._ordered]

    @property
    def num_classes(self) -> int:
        """C: thing classes and the background, the width of the instance head."""
        return self.num_things + 1

    @property
    def num_seg_classes(self) -> int:
        """S: all classes, the width of the semantic head."""
        return len(self._ordered)

    def same_classes(self, other: "Categories") -> bool:
        """Whether both name the same things and stuff in the same order; category ids may differ."""
        return [(c.name, c.is_thing) for c in self] == [(c.name, c.is_thing) for c in other]

    def semantic_id(self, category_id: int) -> int:
        """Semantic id of a category id; KeyError if the table does not hold it."""
        return self._semantic_id[category_id]

    def thing_class(self, category_id: int) -> int:
        """Class 1..C-1 of a thing's category id; KeyError if there is no such thing class."""
        thing_class = self._semantic_id[category_id] - self.num_stuff + 1
        if thing_class < 1:
            raise KeyError(category_id)
        return thing_class

    def semantic_id_of_thing(self, thing_class: int) -> int:
        """Semantic id of a thing class 1..C-1."""
        return self.num_stuff - 1 + thing_class

    def of_thing(self, thing_class: int) -> Category:
        """The category of a thing class 1..C-1."""
        return self._ordered[self.semantic_id_of_thing(thing_class)]

    def __contains__(self, category_id: int) -> bool:
        return category_id in self._semantic_id

    def __getitem__(self, semantic_id: int) -> Category:
        return self._ordered[semantic_id]

    def __iter__(self) -> Iterator[Category]:
        return iter(self._ordered)

    def __len__(self) -> int:
        return len(self._ordered)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Categories) and self._ordered == other._ordered

    def __hash__(self) -> int:
        return hash(tuple(self._ordered))

    def __repr__(self) -> str:
        return f"Categories({self.num_stuff} stuff, {self.num_things} things)"


def _checked_category(record: Any, position: int) -> Category:
    """One record of a COCO categories list, number `position` from 0."""
    if not isinstance(record, Mapping):
        raise DataError(f"category number {position} is {_shown(record)}: make it a record with id, name and isthing")
    label = f"category '{record['name']}'" if record.get("name") else f"category number {position}"
    for key in ("id", "name", "isthing"):
        if key not in record:
            raise DataError(f"{label} has no '{key}': add it to the categories list")
    color = record.get("color")
    if color is None:
        color = _spread_color(position)
    for key, is_right, rule in (
        ("id", _is_whole(record["id"]), "a whole number"),
        ("name", isinstance(record["name"], str), "a text"),
        ("isthing", record["isthing"] in (0, 1) and not isinstance(record["isthing"], float), "0 or 1"),
        ("color", _is_rgb(color), "three whole numbers 0..255, red, green and blue"),
    ):
        if not is_right:
            raise DataError(f"{label}: '{key}' is {_shown(record[key])}: it must be {rule}")
    red, green, blue = color
    return Category(record["id"], record["name"], bool(record["isthing"]), (red, green, blue))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rgb(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(_is_whole(v) and 0 <= v <= 255 for v in value)


def _shown(value: Any) -> str:
    """A value as json writes it, short enough for a sentence."""
    return json.dumps(value, ensure_ascii=False, default=repr)[:60]


def _spread_color(position: int) -> tuple[int, int, int]:
    """A colour for a class that has none: steps of the golden angle around the hue circle, in two brightnesses."""
    hue = (position * 0.618034) % 1.0 * 6.0
    value = 230 if position % 2 == 0 else 160
    rising = int(value * (hue % 1.0))
    falling = value - rising
    return [
        (value, rising, 0),
        (falling, value, 0),
        (0, value, rising),
        (0, falling, value),
        (rising, 0, value),
        (value, 0, falling),
    ][int(hue)]
