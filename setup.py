"""The native library. It is optional: without torch or a compiler the package installs without it.

`python setup.py build_ext --inplace` builds it beside upsnet/operators; UPSNET_NATIVE=0 leaves it out. It is written
against LibTorch's stable ABI and loaded by `upsnet/operators/library.py`; no Python symbol is needed, so that one file
serves every Python and every torch from 2.10 on.
"""

import importlib.util
import os
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

WARNINGS = ["-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-unused-function"]
COMPILE = ["-std=c++20", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", *WARNINGS]


def native_extensions() -> list[Extension]:
    """The CPU library, where torch's headers are at hand (torch itself is not imported: that takes seconds)."""
    torch = importlib.util.find_spec("torch")
    if os.environ.get("UPSNET_NATIVE") == "0" or sys.platform == "win32" or torch is None or torch.origin is None:
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
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000"), ("Py_LIMITED_API", "0x030b0000")],
            extra_compile_args=COMPILE,
            language="c++",
            py_limited_api=True,
            optional=True,
        )
    ]


setup(ext_modules=native_extensions())
