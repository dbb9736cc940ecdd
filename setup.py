"""The native code, in three libraries. All are optional: without a compiler, torch, Cython or CUDA's compiler the
package installs without them.

`python setup.py build_ext --inplace` builds them beside upsnet/operators, whose `library.py` loads them;
UPSNET_NATIVE=0 leaves them out. `_native` (CPU) and `_native_cuda` are written against LibTorch's stable ABI and need
no Python symbol, so that one file serves every Python and every torch from 2.11 on; they are separate, because what is
linked against torch's CUDA libraries does not load beside a torch without them. `_overlaps` is Cython and keeps to
Python's limited API.

The CUDA part is built where `nvcc` is found (CUDA_HOME, or the path) and torch has CUDA. TORCH_CUDA_ARCH_LIST says for
which GPUs, as for torch's own extensions ("8.0;9.0+PTX"); without it code for Turing is built that newer GPUs translate
once when they load it.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

WARNINGS = ["-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-unused-function"]
LIMITED_API = ("Py_LIMITED_API", "0x030b0000")
TORCH_API = ("TORCH_TARGET_VERSION", "0x020a000000000000")  # 2.10: the first whose ABI has all that is called
COMPILE = ["-std=c++20", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", *WARNINGS]
COMPILE_CUDA = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wno-psabi", "--threads=0"]
PORTABLE_ARCH = "7.5+PTX"


def torch_folder() -> Path | None:
    """The folder of torch, where its headers are at hand (torch is not imported: that takes seconds)."""
    torch = importlib.util.find_spec("torch")
    return None if sys.platform == "win32" or torch is None or torch.origin is None else Path(torch.origin).parent


def cuda_toolkit() -> Path | None:
    """The folder of CUDA's toolkit. What is found on the path may be a wrapper, so nvcc itself is asked."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(str(Path(home, "bin/nvcc"))) if home else shutil.which("nvcc")
    if nvcc is None:
        return None
    told = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
    tops = [line.split("=", 1)[1] for line in told.stderr.splitlines() if line.startswith("#$ TOP=")]
    return Path(tops[0]).resolve() if tops else None


def arch_flags(wanted: str) -> list[str]:
    """nvcc's flags for a list of architectures: "8.0;9.0+PTX" → code for 8.0 and 9.0, and portable code of 9.0."""
    flags = []
    for arch in wanted.replace(";", " ").split():
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class BuildWithCuda(build_ext):
    """setuptools' build, which also compiles .cu files; the libraries side by side, which halves the time."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extensions(self) -> None:
        toolkit = cuda_toolkit()
        compile_other = self.compiler._compile

        def compile_one(target: str, source: str, suffix: str, arguments: list, flags: list, macros: list) -> None:
            if suffix != ".cu":
                compile_other(target, source, suffix, arguments, flags, macros)
                return
            assert toolkit is not None
            self.spawn([str(toolkit / "bin/nvcc"), "-c", source, "-o", target, *macros, *flags])

        self.compiler.src_extensions.append(".cu")
        self.compiler._compile = compile_one
        super().build_extensions()


def torch_extensions() -> list[Extension]:
    """The operators on tensors."""
    root = torch_folder()
    if root is None:
        print("upsnet: no torch here, so operators on tensors are left out: build without isolation", file=sys.stderr)
        return []
    common = {
        "include_dirs": [str(root / "include"), str(root / "include/torch/csrc/api/include"), "lib/native"],
        "depends": sorted(glob("lib/native/*/*.h")),
        "language": "c++",
        "py_limited_api": True,
        "optional": True,
    }
    cpu = Extension(
        "upsnet.operators._native",
        sources=sorted(glob("lib/native/cpu/*.cpp")),
        library_dirs=[str(root / "lib")],
        libraries=["torch_cpu"],
        define_macros=[TORCH_API, LIMITED_API],
        extra_compile_args=COMPILE,
        **common,
    )
    toolkit = cuda_toolkit()
    kernels = sorted(glob("lib/native/cuda/*.cu"))
    if toolkit is None or not kernels or not glob(str(root / "lib/libtorch_cuda.*")):
        return [cpu]
    cuda = Extension(
        "upsnet.operators._native_cuda",
        sources=kernels,
        library_dirs=[str(root / "lib"), str(toolkit / "lib64")],
        libraries=["torch_cpu", "torch_cuda", "cudart_static", "rt", "dl", "pthread"],
        define_macros=[TORCH_API, LIMITED_API, ("USE_CUDA", None)],
        extra_compile_args=[*COMPILE_CUDA, *arch_flags(os.environ.get("TORCH_CUDA_ARCH_LIST") or PORTABLE_ARCH)],
        **common,
    )
    return [cpu, cuda]


def cython_extensions() -> list[Extension]:
    """The counting of overlaps, where Cython is at hand."""
    if importlib.util.find_spec("Cython") is None:
        return []
    from Cython.Build import cythonize

    overlaps = Extension(
        "upsnet.operators._overlaps",
        sources=["lib/cython/overlaps.pyx"],
        define_macros=[LIMITED_API],
        extra_compile_args=["-O3", "-g0"],
        py_limited_api=True,
    )
    (built,) = cythonize([overlaps], build_dir="build/cython", quiet=True)
    built.optional = True  # cythonize forgets it
    return [built]


switched_off = os.environ.get("UPSNET_NATIVE") == "0"
setup(
    ext_modules=[] if switched_off else torch_extensions() + cython_extensions(),
    cmdclass={"build_ext": BuildWithCuda},
    # One wheel for Python 3.11 and later, as far as there is native code at all.
    options={} if switched_off else {"bdist_wheel": {"py_limited_api": "cp311"}},
)
