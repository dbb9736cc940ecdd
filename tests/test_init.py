"""The set-up script, as far as it can be tested without installing anything."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments):
    return subprocess.run(["bash", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("script", ["init.sh", ".ci/run"])
def test_scripts_are_executable_bash(script):
    assert (ROOT / script).stat().st_mode & 0o111
    assert run("-n", script).returncode == 0


def test_help_and_unknown_commands():
    helped, unknown = run("init.sh", "help"), run("init.sh", "nonsense")
    assert helped.returncode == 0 and "./init.sh demo" in helped.stdout
    assert unknown.returncode == 2 and "nonsense" in unknown.stderr


def test_constraints_pin_every_dependency():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text().lower(), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    names = {re.split(r"[<>=]", line)[0].lower() for line in wanted}
    assert names <= pins.keys()
    assert not any(name.startswith(("nvidia", "cuda", "triton")) for name in pins)
