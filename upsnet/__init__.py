"""UPSNet: panoptic segmentation. `load` gives a predictor, `PanopticResult` is what it returns."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upsnet import operators
    from upsnet.predict import PanopticResult, Predictor, load

__all__ = ["PanopticResult", "Predictor", "load", "operators"]


def __getattr__(name: str) -> Any:
    # Found when first asked for: `upsnet --help` does not wait for torch, and the command line can set how torch's
    # threads wait, which counts only before torch is imported.
    if name == "operators":
        return importlib.import_module("upsnet.operators")
    if name in __all__:
        return getattr(importlib.import_module("upsnet.predict"), name)
    raise AttributeError(f"module 'upsnet' has no attribute '{name}'")
