"""The set-up script, as far as it can be tested without installing anything; and what belongs into a package."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments):
    return subprocess.run(["bash", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    "script", ["init.sh", "init_cityscapes.sh", "download_weights.sh", "benchmarks/gpu.sh", ".ci/run"]
)
def test_scripts_are_executable_bash(script):
    assert (ROOT / script).stat().st_mode & 0o111
    assert run("-n", script).returncode == 0


def test_help_and_unknown_commands():
    helped, unknown = run("init.sh", "help"), run("init.sh", "nonsense")
    assert helped.returncode == 0 and "./init.sh demo" in helped.stdout
    assert unknown.returncode == 2 and "nonsense" in unknown.stderr


def test_the_run_on_a_gpu_says_what_it_lacks():
    without = run("benchmarks/gpu.sh")
    assert without.returncode == 2 and "DATA WEIGHTS" in without.stderr
    blind = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "data", "weights"],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert blind.returncode == 1 and "sees no CUDA device" in blind.stderr


# -- the steps, in a copied tree with a stand-in for Python ------------------------------------------------------------

STAND_IN = """\
#!/usr/bin/env bash
# Python, as far as the set-up uses it; every call is written down.
echo "$*" >>"{tree}/calls"
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *"setup.py"*"build_ext"*) touch upsnet/operators/_{{native,overlaps}}.so ;;
esac
"""


class Tree:
    """A copy of what the set-up looks at, and a folder of programs that comes first on the path."""

    def __init__(self, folder):
        self.folder, self.programs = folder / "tree", folder / "programs"
        self.programs.mkdir(parents=True)
        (self.folder / "upsnet/operators").mkdir(parents=True)
        for folder in ("lib/native", "lib/cython"):
            (self.folder / folder).mkdir(parents=True)
        for name in ("init.sh", "pyproject.toml", "constraints.txt", "setup.py"):
            shutil.copy(ROOT / name, self.folder)
        self.program("python3.11", STAND_IN.format(tree=self.folder))
        self.program("compiler", "#!/usr/bin/env bash\ncat >/dev/null\n")

    def program(self, name, text):
        path = self.programs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def run(self, commands="main", **variables):
        """Sources the script and runs its functions."""
        (self.folder / "calls").write_text("")
        kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX", "CXX")}
        path = f"{self.programs}:{kept['PATH']}"
        return subprocess.run(
            ["bash", "-c", f"source init.sh; {commands}"], cwd=self.folder, capture_output=True, text=True,
            env={**kept, "PATH": path, "CXX": "compiler", **variables},
        )  # fmt: skip

    @property
    def calls(self):
        return (self.folder / "calls").read_text().splitlines()

    @property
    def installed(self):
        return sum("pip install" in line for line in self.calls)


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def test_the_first_run_does_everything_and_the_second_nothing(tree):
    first = tree.run()
    assert first.returncode == 0, first.stderr
    assert "made .venv" in first.stdout and "native operators: built in" in first.stdout and tree.installed == 2
    assert first.stdout.splitlines()[-1] == "init: next: source .venv/bin/activate; upsnet --help"
    second = tree.run()
    assert second.returncode == 0 and tree.installed == 0, second.stderr
    said = [".venv is there", "as in constraints.txt", "built before", "next: source"]
    assert all(text in line for text, line in zip(said, second.stdout.splitlines(), strict=True))


def test_only_the_plain_set_up_fetches_weights(tree):
    command = "-m upsnet download-weights imagenet --if-online"
    assert tree.run().returncode == 0 and command in tree.calls
    tree.program("python3.11", STAND_IN.format(tree=tree.folder))
    assert tree.run("main test").returncode == 0 and command not in tree.calls
    tree.program("active/bin/python", STAND_IN.format(tree=tree.folder))
    tree.program("active/bin/upsnet", "#!/usr/bin/env bash\n")
    demo = tree.run("main demo", VIRTUAL_ENV=str(tree.programs / "active"))
    assert demo.returncode == 0 and command not in tree.calls, demo.stderr


def test_without_weights_the_set_up_goes_on(tree):
    failing = STAND_IN.format(tree=tree.folder).replace("esac", '*download-weights*) echo "no" >&2; exit 2 ;;\nesac')
    tree.program("python3.11", failing)
    ran = tree.run()
    assert ran.returncode == 0 and "weights: not all of them are there" in ran.stdout, ran.stderr
    assert ran.stdout.splitlines()[-1].startswith("init: next:")


def test_changed_constraints_are_installed(tree):
    tree.run()
    with (tree.folder / "constraints.txt").open("a") as file:
        file.write("other==1\n")
    assert tree.run().returncode == 0 and tree.installed == 2


@pytest.mark.parametrize("source", ["lib/native/a.cpp", "lib/cython/a.pyx"])
def test_changed_sources_are_built(tree, source):
    tree.run()
    (tree.folder / source).write_text("new")
    assert "native operators: built in" in tree.run().stdout and "built before" in tree.run().stdout


def test_a_library_that_is_missing_is_built(tree):
    tree.run()
    (tree.folder / "upsnet/operators/_overlaps.so").unlink()
    assert "native operators: built in" in tree.run().stdout


def test_without_a_compiler_the_set_up_still_ends_well(tree):
    ran = tree.run(CXX="no-such-compiler")
    assert ran.returncode == 0 and "no C++20 compiler works here; torchvision's serve" in ran.stdout, ran.stderr
    assert not list((tree.folder / "upsnet/operators").iterdir())


def test_a_failing_build_is_no_error(tree):
    tree.program("python3.11", STAND_IN.format(tree=tree.folder).replace("touch", "false"))
    ran = tree.run()
    assert ran.returncode == 0 and "the compiler's messages are in build/native.log" in ran.stdout, ran.stderr


def test_an_unsuitable_environment_of_the_user_is_left_alone(tree):
    mine = tree.folder / ".venv/mine"
    mine.parent.mkdir()
    mine.write_text("precious")
    ran = tree.run()
    assert ran.returncode == 1 and ".venv has no Python 3.11 or newer" in ran.stderr
    assert mine.read_text() == "precious" and tree.installed == 0


def test_an_environment_that_was_left_unfinished_is_made_anew(tree):
    stopped = STAND_IN.format(tree=tree.folder).replace("mkdir -p .venv/bin", "touch .venv/half; false")
    tree.program("python3.11", stopped)
    assert tree.run().returncode == 1 and (tree.folder / ".venv/half").exists()
    tree.program("python3.11", STAND_IN.format(tree=tree.folder))
    ran = tree.run()
    assert ran.returncode == 0 and "made .venv" in ran.stdout, ran.stderr
    assert not (tree.folder / ".venv/half").exists() and ".venv is there" in tree.run().stdout


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_is_used(tree, variable):
    tree.program("active/bin/python", STAND_IN.format(tree=tree.folder))
    active = str(tree.programs / "active")
    ran = tree.run(**{variable: active})
    assert ran.returncode == 0 and f"the active environment {active}" in ran.stdout, ran.stderr
    assert not (tree.folder / ".venv").exists() and tree.installed == 2 and "next:" not in ran.stdout
    old = tree.run(**{variable: str(tree.programs / "nowhere")})
    assert old.returncode == 1 and "deactivate it" in old.stderr


# -- what is pinned and packed -----------------------------------------------------------------------------------------


def test_every_file_of_the_package_is_packed():
    """Data files that git tracks under upsnet/ match a pattern of package-data."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["upsnet"]
    listed = subprocess.run(["git", "ls-files", "-z", "upsnet"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    names = [name.removeprefix("upsnet/") for name in listed.stdout.split("\0") if name and not name.endswith(".py")]
    assert len(names) > 5
    assert not [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def test_constraints_pin_every_dependency():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text().lower(), re.MULTILINE))
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = content["project"]
    needed_to_build = content["build-system"]["requires"]
    wanted = [*needed_to_build, *project["dependencies"], *project["optional-dependencies"]["test"]]
    names = {re.split(r"[<>=]", line)[0].lower() for line in wanted}
    assert names <= pins.keys()
    assert not any(name.startswith(("nvidia", "cuda", "triton")) for name in pins)
