"""Two naming schemes of the same layers, as one table that reads in both directions."""

import re
from collections.abc import Callable

_PLACE = re.compile(r"\{(\w+?)(?:-(\d))?\}")


class NameTable:
    """Layer names of two schemes, side by side.

    In a name, `{x}` stands for a number, `{x-2}` for one that is smaller by two: `p{level}` beside `output.{level-2}`.
    What comes after a layer's name (`.weight`, `.running_mean`) is the same in both schemes.
    """

    def __init__(self, *layers: tuple[str, str]) -> None:
        self._to_right = [_rule(left, right) for left, right in layers]
        self._to_left = [_rule(right, left) for left, right in layers]

    def to_right(self, name: str) -> str | None:
        """The right-hand name of a tensor, None if the table does not hold its layer."""
        return _translated(name, self._to_right)

    def to_left(self, name: str) -> str | None:
        """The left-hand name of a tensor, None if the table does not hold its layer."""
        return _translated(name, self._to_left)


_Rule = tuple[re.Pattern[str], Callable[[re.Match[str]], str]]


def _rule(given: str, wanted: str) -> _Rule:
    """How a layer name of the form `given` becomes one of the form `wanted`."""
    smaller_by = {place: int(by or 0) for place, by in _PLACE.findall(given)}
    pieces = _PLACE.split(given)  # text, place, by, text, place, by, …, text
    pattern = re.escape(pieces[0])
    for place, text in zip(pieces[1::3], pieces[3::3], strict=True):
        pattern += rf"(?P<{place}>\d+)" + re.escape(text)

    def fill(match: re.Match[str]) -> str:
        return _PLACE.sub(lambda p: str(int(match[p[1]]) + smaller_by[p[1]] - int(p[2] or 0)), wanted)

    return re.compile(pattern), fill


def _translated(name: str, rules: list[_Rule]) -> str | None:
    layer, _, kind = name.rpartition(".")
    for pattern, fill in rules:
        if match := pattern.fullmatch(layer):
            return f"{fill(match)}.{kind}"
    return None
