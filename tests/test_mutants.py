"""Each mutant of `tests/mutants.py`, alone in a copy of the project, must make a test fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants import MUTANTS

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("upsnet", "tests", "experiments", "docs", "pyproject.toml", "README.md")
PASSED, FAILED = 0, 1
"""Exit codes of pytest; any other means that the tests did not run."""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project without data beside it, so that what catches a mutant runs on every machine."""
    folder = tmp_path_factory.mktemp("mutants") / "project"
    folder.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def run_tests(folder, files):
    environment = {name: value for name, value in os.environ.items() if name != "UPSNET_DATA"}
    # Two changes of one file within a second and of one length would share their bytecode.
    environment |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-m", "not slow", "-p", "no:cacheprovider", *files]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=550)


def test_the_lines_are_there_and_the_mutants_differ():
    for mutant in MUTANTS:
        text = (ROOT / mutant.path).read_text(encoding="utf-8")
        assert text.count(mutant.before) == 1, f"{mutant.name}: {mutant.path} must hold this line once"
        assert mutant.after != mutant.before
        assert "\n" not in mutant.before + mutant.after, "a mutant changes one line"
        assert all((ROOT / name).is_file() for name in mutant.tests)
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) == 15


@pytest.mark.slow
def test_without_a_mutant_these_tests_pass_in_the_copy(copy):
    where = subprocess.run(
        [sys.executable, "-c", "import upsnet; print(upsnet.__file__)"],
        cwd=copy, env=os.environ | {"PYTHONPATH": str(copy)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(copy), "the copy must be what is tested"
    outcome = run_tests(copy, sorted({name for mutant in MUTANTS for name in mutant.tests}))
    assert outcome.returncode == PASSED, outcome.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "_"))
def test_a_mutant_is_caught(copy, mutant):
    path = copy / mutant.path
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutant.before, mutant.after), encoding="utf-8")
    try:
        outcome = run_tests(copy, mutant.tests)
    finally:
        path.write_text(text, encoding="utf-8")
    assert outcome.returncode == FAILED, f"'{mutant.name}' went unnoticed:\n{outcome.stdout[-3000:]}{outcome.stderr}"
