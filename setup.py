"""The native code, in two libraries. Both are optional: without a compiler, torch or Cython the package installs
without them.

`python setup.py build_ext --inplace` builds them beside upsnet/operators, whose `library.py` loads them;
UPSNET_NATIVE=0 leaves them out. `_native` is written against LibTorch's stable ABI and needs no Python symbol, so that
one file serves every Python and every torch from 2.10 on; `_overlaps` is Cython and keeps to Python's limited API.
"""

import importlib.util
import os
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

WARNINGS = ["-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-unused-function"]
LIMITED_API = ("Py_LIMITED_API", "0x030b0000")
COMPILE = ["-std=c++20", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", *WARNINGS]


def torch_extensions() -> list[Extension]:
    """The operators on tensors, where torch's headers are at hand (torch is not imported: that takes seconds)."""
    torch = importlib.util.find_spec("torch")
    if sys.platform == "win32" or torch is None or torch.origin is None:
        return []
    root = Path(torch.origin).parent
    return [
        Extension(
            "upsnet.operators._native",
            sources=sorted(glob("lib/native/cpu/*.cpp")),
            depends=sorted(glob("lib/native/cpu/*.h")),
            include_dirs=[str(root / "include"), str(root / "include/torch/csrc/api/include")],
            library_dirs=[str(root / "lib")],
            libraries=["torch_cpu"],
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000"), LIMITED_API],
            extra_compile_args=COMPILE,
            language="c++",
            py_limited_api=True,
            optional=True,
        )
    ]


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
setup(ext_modules=[] if switched_off else torch_extensions() + cython_extensions())
