"""The operators that dominate the network's time: one file each, native where the library covers the call."""

from upsnet.operators.deform_conv import deform_conv2d
from upsnet.operators.library import describe
from upsnet.operators.nms import batched_nms, nms, nms_inclusive
from upsnet.operators.pyramid_roi_align import pyramid_roi_align, roi_levels

__all__ = ["batched_nms", "deform_conv2d", "describe", "nms", "nms_inclusive", "pyramid_roi_align", "roi_levels"]
