"""Operators of the network. (The lead's first version: keep `pyramid_roi_align`, replace the other two.)"""

from torchvision.ops import deform_conv2d, nms

from upsnet.operators.pyramid_roi_align import pyramid_roi_align, roi_levels

__all__ = ["deform_conv2d", "nms", "pyramid_roi_align", "roi_levels"]
