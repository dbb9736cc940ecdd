"""Keys of the original UPSNet that need no code here: its yaml files load all the same."""

NO_EFFECT = {
    "dataset.root_path": "folder of all data sets",
    "network.rpn_with_norm": "norm in the RPN",
    "network.binary_thresh": "threshold of masks",
    "network.has_mask_rcnn": "mask head",
    "train.bbox_regression_thresh": "least IoU for box targets",
    "train.bbox_weights": "weights of box targets",
    "train.bbox_thresh": "threshold of pre-computed box targets",
    "train.bbox_normalization_precomputed": "normalisation of box targets",
    "train.bbox_means": "means of box targets",
    "train.bbox_stds": "deviations of box targets",
    "train.rpn_clobber_positive": "negatives win over positives",
    "train.rpn_bbox_weights": "weights of the RPN's box targets",
    "train.rpn_positive_weight": "weight of positive anchors",
    "train.fcn_with_negative_loss": "loss of absent classes",
    "train.fcn_use_focal_loss": "focal semantic loss",
    "train.fcn_focal_loss_gamma": "its exponent",
    "train.panoptic_with_roi_loss": "panoptic loss inside boxes",
    "train.panoptic_use_focal_loss": "focal panoptic loss",
    "train.panoptic_focal_loss_gamma": "its exponent",
}
"""Accepted with any value and named in one warning: in the original they have no effect either."""

ONE_VALUE = {
    "network.backbone_with_dilation": "the pyramid and its anchors need res5 at stride 32",
    "network.has_fpn": "every network here has a feature pyramid",
    "network.has_rpn": "every network here has an RPN",
    "network.has_rcnn": "every network here has a box head",
    "network.has_mask_head": "every network here has a mask head",
    "network.has_fcn_head": "every network here has a semantic head; train.fcn_loss_weight 0 drops its loss",
    "network.has_panoptic_head": "every network here has a panoptic head; train.panoptic_loss_weight 0 drops its loss",
    "network.fcn_head": "there is no other semantic head",
    "network.rpn_feat_stride": "the levels of the pyramid are fixed",
    "network.rcnn_feat_stride": "image sides are always padded to a multiple of 32",
    "network.cls_agnostic_bbox_reg": "box regression is always per class",
    "train.rpn_individual_proposals": "proposals are always made level by level",
}
"""Only the default is accepted; the sentence says what to know or to do instead."""
