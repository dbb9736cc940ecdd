"""Where tests find the real data that is never committed; and one tiny training that many tests look at."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# As the command line does: threads that sleep while they wait, set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

REPOSITORY = Path(__file__).resolve().parent.parent


def find_shared(name: str) -> Path | None:
    """Path of `name` (e.g. `data/coco_mini`, `reference/oracle_fixtures`) beside the project or in `UPSNET_DATA`."""
    candidates = [REPOSITORY.parent / "shared" / name]
    if root := os.environ.get("UPSNET_DATA"):
        candidates = [Path(root) / name, Path(root) / name.removeprefix("data/"), *candidates]
    return next((path for path in candidates if path.exists()), None)


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """`shared("data/coco_mini")` is its path; the test skips where it is not there."""

    def find(name: str) -> Path:
        path = find_shared(name)
        if path is None:
            pytest.skip(f"{name} is neither in ../shared nor in UPSNET_DATA")
        return path

    return find


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A `TinyRun`: the whole road once, for all tests that look at what lies beside it."""
    from tests.tiny import run_once

    return run_once(tmp_path_factory.mktemp("tiny"))
