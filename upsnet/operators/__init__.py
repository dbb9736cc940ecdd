"""The operators that dominate the time of networks and scores: one file each, native where the call is covered."""

from upsnet.operators.caffe_sgd import caffe_sgd_
from upsnet.operators.deform_conv import deform_conv2d
from upsnet.operators.fused_conv import fast_linear, fused_conv2d
from upsnet.operators.library import describe
from upsnet.operators.nms import batched_nms, nms, nms_flags
from upsnet.operators.overlaps import count_overlaps
from upsnet.operators.panoptic_head import fuse_panoptic
from upsnet.operators.paste_masks import paste_masks
from upsnet.operators.pyramid_roi_align import pyramid_roi_align, roi_levels

__all__ = [
    "batched_nms",
    "caffe_sgd_",
    "count_overlaps",
    "deform_conv2d",
    "describe",
    "fast_linear",
    "fuse_panoptic",
    "fused_conv2d",
    "nms",
    "nms_flags",
    "paste_masks",
    "pyramid_roi_align",
    "roi_levels",
]
