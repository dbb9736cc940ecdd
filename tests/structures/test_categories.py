import re

import pytest

from tests.miniature import CATEGORIES
from upsnet.structures.categories import Categories, Category
from upsnet.structures.errors import DataError


def test_stuff_comes_first_in_file_order():
    table = Categories.from_coco(CATEGORIES, "toy.json")
    assert [c.name for c in table] == ["grass", "sky", "ball", "box", "kite"]
    assert (table.num_stuff, table.num_things, table.num_seg_classes, table.num_classes) == (2, 3, 5, 4)


def test_three_numberings_agree():
    table = Categories.from_coco(CATEGORIES, "toy.json")
    assert [table.semantic_id(c) for c in (7, 200, 90, 12, 3)] == [0, 1, 2, 3, 4]
    assert [table.thing_class(c) for c in (90, 12, 3)] == [1, 2, 3]
    for thing_class in (1, 2, 3):
        category = table.of_thing(thing_class)
        assert table.thing_class(category.id) == thing_class
        assert table.semantic_id_of_thing(thing_class) == table.semantic_id(category.id)


def test_stuff_has_no_thing_class():
    table = Categories.from_coco(CATEGORIES, "toy.json")
    for category_id in (7, 200, 5):
        with pytest.raises(KeyError):
            table.thing_class(category_id)
    assert 5 not in table and 7 in table


def test_round_trip_through_coco_records():
    table = Categories.from_coco(CATEGORIES, "toy.json")
    assert Categories.from_coco(table.to_coco(), "again.json") == table


@pytest.mark.parametrize("key", ["id", "name", "isthing"])
def test_a_missing_key_is_named_with_its_class(key):
    records = [dict(record) for record in CATEGORIES]
    del records[2][key]
    with pytest.raises(DataError, match=rf"toy\.json.*'{key}'") as caught:
        Categories.from_coco(records, "toy.json")
    assert ("number 2" if key == "name" else "box") in str(caught.value)


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("id", "a", "category 'box': 'id' is \"a\": it must be a whole number"),
        ("id", None, "'id' is null"),
        ("id", 3.5, "'id' is 3.5"),
        ("id", True, "'id' is true"),
        ("name", None, "category number 2: 'name' is null: it must be a text"),
        ("name", 3, "'name' is 3"),
        ("isthing", "0", "category 'box': 'isthing' is \"0\": it must be 0 or 1"),
        ("isthing", None, "'isthing' is null"),
        ("isthing", 2, "'isthing' is 2"),
        ("isthing", [], "'isthing' is []"),
        ("color", "red", "'color' is \"red\": it must be three whole numbers 0..255"),
        ("color", [1, 2], "'color' is [1, 2]"),
        ("color", [1, 2, 256], "'color' is [1, 2, 256]"),
        ("color", [1, 2, "3"], "'color' is [1, 2, \"3\"]"),
        ("color", [1, 2, 0.5], "'color' is [1, 2, 0.5]"),
        ("color", 7, "'color' is 7"),
    ],
)
def test_a_wrong_value_is_named_with_its_class(key, value, says):
    records = [dict(record) for record in CATEGORIES]
    records[2][key] = value
    with pytest.raises(DataError, match=f"^toy\\.json: .*{re.escape(says)}"):
        Categories.from_coco(records, "toy.json")


@pytest.mark.parametrize("record, shown", [("box", '"box"'), (None, "null"), ([1, "box"], '[1, "box"]')])
def test_a_category_that_is_no_record(record, shown):
    with pytest.raises(DataError, match=re.escape(f"toy.json: category number 1 is {shown}: make it a record")):
        Categories.from_coco([CATEGORIES[0], record], "toy.json")


@pytest.mark.parametrize("records", [None, 3, "box", {"id": 1}])
def test_categories_that_are_no_list(records):
    with pytest.raises(DataError, match=r"toy\.json: 'categories' is .*: make it a list"):
        Categories.from_coco(records, "toy.json")


def test_true_and_null_in_records():
    record = {"id": 1, "name": "a", "isthing": True}
    (with_null,), (without,) = (Categories.from_coco([r], "toy.json") for r in ({**record, "color": None}, record))
    assert with_null.is_thing and with_null.color == without.color


def test_an_id_given_twice_is_refused():
    with pytest.raises(DataError, match="category id 7"):
        Categories([Category(7, "a", True, (0, 0, 0)), Category(7, "b", False, (0, 0, 0))])


def test_classes_without_colour_get_distinct_ones():
    records = [{"id": i, "name": str(i), "isthing": 0} for i in range(40)]
    colors = [c.color for c in Categories.from_coco(records, "x.json")]
    assert len(set(colors)) == 40
    assert all(0 <= value <= 255 for color in colors for value in color)
