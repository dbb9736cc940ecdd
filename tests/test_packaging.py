"""`python -m build`: a complete sdist, and a wheel from it that works where the tree is not."""

import runpy
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools

from upsnet.operators import library

ROOT = Path(__file__).resolve().parent.parent
TREE = ("benchmarks", "docs", "lib", "tests", "upsnet", "init.sh", "setup.py", "constraints.txt", "LICENSE")


def tracked_files():
    listed = subprocess.run(["git", "ls-files", *TREE], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return set(listed.stdout.split())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("build")
    tracked = tracked_files()
    copy, folder = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in tracked | {"README.md", "pyproject.toml", "MANIFEST.in"}:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return tracked, sdist, wheel


@pytest.mark.slow
def test_sdist_is_complete(built):
    tracked, sdist, _ = built
    with tarfile.open(sdist) as archive:
        inside = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert tracked <= inside
    assert not [name for name in inside if name.endswith((".so", ".pyc"))]


@pytest.mark.slow
def test_wheel_works_alone(built, tmp_path):
    """Unpacked far from the tree, it serves with native operators if this checkout does."""
    tracked, _, wheel = built
    assert "-cp311-abi3-" in wheel.name or not library.native_in_use()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    package = {name for name in tracked if name.startswith("upsnet/")}
    assert package <= {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    command = [sys.executable, "-c", "import upsnet; print(upsnet.__file__)"]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    where = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert where.stdout.startswith(str(tmp_path)), where.stderr
    command = [sys.executable, "-m", "upsnet.operators"]
    checked = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert library.describe() in checked.stdout


def test_architectures_are_those_that_were_asked_for(monkeypatch):
    """As torch's own extensions read TORCH_CUDA_ARCH_LIST."""
    monkeypatch.setenv("UPSNET_NATIVE", "0")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    arch_flags = runpy.run_path(str(ROOT / "setup.py"))["arch_flags"]
    ampere, hopper = "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"
    assert arch_flags("8.0;9.0a") == arch_flags("8.0 9.0a") == [ampere, hopper]
    assert arch_flags("8.0+PTX") == [ampere, "-gencode=arch=compute_80,code=compute_80"]
