"""`./init.sh horovod` with a stand-in for Python; a real build: .ci/run."""

import pytest

from tests.test_init import STAND_IN, Tree

BUILDS = """\
    *get_path*) echo "{folder}/site" ;;
    *SOABI*) echo "key ${{@: -1}}" | tr ' ' - ;;
    *"pip download"*) mkdir -p source/horovod-0.28.1/cmake/Modules
        echo 'print(True if ((torch.version.cuda' >source/horovod-0.28.1/cmake/Modules/FindPytorch.cmake
        tar -czf build/horovod/horovod-0.28.1.tar.gz -C source horovod-0.28.1 ;;
    *"pip wheel"*) echo "$CXX ${{HOROVOD_GPU_OPERATIONS:-none}} ${{HOROVOD_CUDA_HOME:-none}}" >>"{folder}/built"
        cp build/horovod/c++ "{folder}/wrapper"
        cp build/horovod/horovod-0.28.1/cmake/Modules/FindPytorch.cmake "{folder}/patched"
        [[ ! -f "{folder}/broken-${{HOROVOD_GPU_OPERATIONS:-GLOO}}" ]] || exit 1
        touch build/horovod/horovod-0.28.1-any.whl ;;
esac
"""


@pytest.fixture
def tree(tmp_path):
    tree = Tree(tmp_path)
    text = STAND_IN.format(tree=tree.folder)
    tree.program("python3.11", text.removesuffix("esac\n") + BUILDS.format(folder=tmp_path))
    tree.program("cmake", "#!/bin/sh\necho cmake version 3.25.1\n")
    tree.program("nvcc", f"#!/bin/sh\necho '#$ TOP={tmp_path}/cuda/bin/..' >&2\n")
    (tmp_path / "cuda/bin").mkdir(parents=True)
    return tree


def horovod(tree):
    return tree.run("main horovod", XDG_CACHE_HOME=str(tree.folder.parent / "cache"), CUDA_HOME="")


def builds(tree):
    return (tree.folder.parent / "built").read_text().splitlines()


def with_nccl(tree):
    library = tree.folder.parent / "site/nvidia/nccl/lib/libnccl.so.2"
    library.parent.mkdir(parents=True)
    library.touch()


def test_it_is_built_once_and_its_wheel_is_kept_for_other_environments(tree):
    first = horovod(tree)
    assert first.returncode == 0, first.stderr
    assert "nvcc or pip's NCCL is not found, so with Gloo only" in first.stdout and "0.28.1 with gloo" in first.stdout
    assert builds(tree) == [f"{tree.folder}/build/horovod/c++ none none"]
    assert '"$@" -std=c++20' in (tree.folder.parent / "wrapper").read_text()
    assert "False and" in (tree.folder.parent / "patched").read_text()
    assert "horovod: built before, with gloo" in horovod(tree).stdout
    (tree.folder / ".venv/.upsnet-horovod").unlink()
    again = horovod(tree)
    assert again.returncode == 0 and "with gloo installed" in again.stdout and len(builds(tree)) == 1


def test_with_nvcc_and_pips_nccl_it_reaches_gpus(tree):
    with_nccl(tree)
    ran = horovod(tree)
    assert ran.returncode == 0 and "0.28.1 with nccl installed" in ran.stdout, ran.stderr
    assert builds(tree) == [f"{tree.folder}/build/horovod/c++ NCCL {tree.folder.parent}/cuda"]


def test_where_that_fails_it_is_built_for_cpus(tree):
    with_nccl(tree)
    (tree.folder.parent / "broken-NCCL").touch()
    ran = horovod(tree)
    assert ran.returncode == 0 and "not built with NCCL, the messages are in build/horovod-nccl.log" in ran.stdout
    assert "0.28.1 with gloo installed" in ran.stdout and len(builds(tree)) == 2


def test_a_failing_build_is_an_error_that_names_the_log(tree):
    (tree.folder.parent / "broken-GLOO").touch()
    ran = horovod(tree)
    assert ran.returncode == 1 and "horovod: not built, the messages are in build/horovod.log" in ran.stderr


def test_a_cmake_of_its_own_where_the_one_here_is_too_new(tree):
    tree.program("cmake", "#!/bin/sh\necho cmake version 4.1.0\n")
    assert horovod(tree).returncode == 0
    assert any("--target" in call and "cmake>=3.31,<4" in call for call in tree.calls)
