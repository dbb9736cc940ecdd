"""No key without effect: what the schema accepts, some code reads."""

import re
from pathlib import Path

import pytest

from upsnet.config.original_keys import ONE_VALUE
from upsnet.config.schema import recipe_keys

PACKAGE = Path(__file__).resolve().parent.parent.parent / "upsnet"
CHECKED_BY_THE_SCHEMA = {"network.num_anchors", "system"}


def readers() -> str:
    """The code that may see a recipe: the upper floors, and the part of config/ that acts on keys."""
    files = [*PACKAGE.glob("*.py"), *(PACKAGE / "engine").glob("**/*.py")]
    files += [PACKAGE / "config" / "load.py", PACKAGE / "config" / "paths.py"]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


@pytest.mark.skipif(not (PACKAGE / "builders.py").exists(), reason="upsnet/builders.py is not there yet")
def test_every_key_is_read():
    code = readers()
    keys = set(recipe_keys()) - set(ONE_VALUE) - CHECKED_BY_THE_SCHEMA
    unread = sorted(key for key in keys if not re.search(rf"\.{key.rpartition('.')[2]}\b", code))
    assert not unread, f"nothing reads these recipe keys: {', '.join(unread)}"
