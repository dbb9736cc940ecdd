"""UPSNet: panoptic segmentation. `load` gives a predictor, `PanopticResult` is what it returns."""

from upsnet.predict import PanopticResult, Predictor, load

__all__ = ["PanopticResult", "Predictor", "load"]
