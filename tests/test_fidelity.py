"""docs/fidelity.md goes through all quirks, and the tests that it names are there."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PAGE = (TESTS.parent / "docs" / "fidelity.md").read_text(encoding="utf-8")


def quirks() -> dict[int, str]:
    """Number and text of each entry of the first list."""
    section = PAGE.split("## The 29 quirks")[1].split("\n## ")[0].split("\n\nIn the original")[0]
    return {int(number): text for number, text in re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |\Z)", section, re.M | re.S)}


def test_every_quirk_has_a_status_and_a_test() -> None:
    found = quirks()
    assert list(found) == list(range(1, 30))
    for number, text in found.items():
        assert len(re.findall(r"\*\*(Reproduced|Mended|Behind `train\.compat`)\*\*", text)) == 1, number
        assert re.search(r"`[\w/]+\.py(::test_\w+)?`", text), number


def test_what_the_page_names_is_there() -> None:
    for name, test in re.findall(r"`([\w/]+\.py)(?:::(test_\w+))?`", PAGE):
        path = TESTS / name
        assert path.is_file(), name
        assert not test or f"def {test}(" in path.read_text(encoding="utf-8"), f"{name}::{test}"
