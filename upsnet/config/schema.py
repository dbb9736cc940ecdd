"""Every key of a recipe with its type, default and meaning.

A recipe is immutable. Types are strict: a whole number passes for a number, but true and false never do, and a single
number passes where a list is expected. Keys and defaults of the original UPSNet keep their names; `original_keys.py`
lists those of its keys that have no effect or only one value here.
"""

from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from upsnet.structures.pixel_means import PIXEL_MEANS


def _as_tuple(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (value,)
    return value


def _ascending(points: tuple[int, ...]) -> tuple[int, ...]:
    if any(after <= before for before, after in pairwise(points)):
        raise ValueError("must be in ascending order")
    return points


def _gpu_text(value: Any) -> Any:
    # yaml reads an unquoted single number as a number
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _gpu_list(value: str) -> str:
    numbers = [number.strip() for number in value.split(",")]
    if not all(number.isdecimal() for number in numbers) or len(set(numbers)) < len(numbers):
        raise ValueError("must be device numbers separated by commas, each once, such as '0,1'")
    return value


def _distinct(scales: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(scales)) < len(scales):
        raise ValueError("must name each scale once")
    return scales


def _even(value: int) -> int:
    if value % 2:
        raise ValueError("must be even")
    return value


def _image_sets(value: str) -> str:
    names = [name.strip() for name in value.split("+")]
    if not all(names):
        raise ValueError("must be an image set, or several joined by '+'")
    return "+".join(names)


Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]
ImageSets = Annotated[str, AfterValidator(_image_sets)]
Scales = Annotated[tuple[Count, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
Steps = Annotated[tuple[Count, ...], BeforeValidator(_as_tuple), AfterValidator(_ascending)]
Positives = Annotated[tuple[Positive, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
Means = Annotated[tuple[NotNegative, NotNegative, NotNegative], BeforeValidator(_as_tuple)]
BoxWeights = Annotated[tuple[Positive, Positive, Positive, Positive], BeforeValidator(_as_tuple)]
Gpus = Annotated[str, BeforeValidator(_gpu_text), AfterValidator(_gpu_list)]
Norm = Literal["none", "group_norm", "batch_norm"]
Precision = Literal["fp32", "bf16", "fp16"]


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


class DatasetOptions(_Options):
    """Section `dataset`: which photos and labels."""

    dataset: Literal["coco", "panoptic", "Cityscapes", "ade20k"] = Field(
        "coco",
        description="kind of data set; panoptic: any set in the COCO panoptic format, with classes of its own; "
        "Cityscapes: its own layout, made ready by `upsnet prepare cityscapes`; ade20k: recipes load, but there is no "
        "reader for its layout yet",
    )
    dataset_path: Text = Field(description="folder of the data set, with `images/` and `annotations/` (COCO's layout)")
    image_set: ImageSets = Field(description="training images, e.g. train2017; several sets are joined by `+`")
    test_image_set: ImageSets = Field(description="images for validation losses and for testing")
    num_classes: Count | None = Field(
        None, description="C, thing classes and the background; null: from the data, otherwise checked against them"
    )
    num_seg_classes: Count | None = Field(
        None, description="S, all classes, stuff and things; null: from the data, otherwise checked against them"
    )
    limit: Count | None = Field(
        None, description="use only the first N images, counted over all joined sets together; null: all"
    )
    num_workers: Natural = Field(4, description="processes that load images, for each worker; 0: load in the main one")

    @model_validator(mode="after")
    def _things_are_classes(self) -> Self:
        things, all_classes = self.num_classes, self.num_seg_classes
        if things is not None and all_classes is not None and things - 1 > all_classes:
            raise ValueError(f"num_seg_classes ({all_classes}) counts every class, so {things - 1} at least")
        return self


class NetworkOptions(_Options):
    """Section `network`: what is built."""

    pretrained: Text | None = Field(None, description="weights to start training from; null: from scratch")
    pretrained_convention: Literal["caffe", "torchvision"] | None = Field(
        None,
        description="of a ResNet as `pretrained`; caffe: strides in the first 1×1 convolution, wants BGR 0..255 minus "
        "means; torchvision: strides in the 3×3, wants RGB, normalised; null: known from the file, or asked for",
    )
    use_caffe_model: bool = Field(
        True,
        description="input is BGR 0..255 minus `pixel_means`; false: RGB 0..1, then torchvision's mean and deviation",
    )
    pixel_means: Means = Field(PIXEL_MEANS, description="channel means, in the order B, G, R")
    backbone_stride_in_1x1: bool = Field(
        True,
        description="bottlenecks stride in their first 1×1 convolution (caffe); false: in the 3×3 (torchvision); "
        "without meaning for ResNet-18 and 34, which have no bottlenecks",
    )
    backbone_fix_bn: bool = Field(True, description="batch norm of the backbone is frozen; false: it is trained")
    backbone_with_norm: Literal["batch_norm", "group_norm"] = Field(
        "batch_norm", description="norm of the backbone; `backbone_fix_bn` counts for batch_norm only"
    )
    backbone_freeze_at: Annotated[int, Field(ge=0, le=5)] = Field(
        2, description="depth that is not trained: 0 nothing, 1 the stem, N the stem and res2..resN"
    )
    backbone_with_dilation: bool = Field(False, description="res5 with stride 1 and dilation 2")
    backbone_with_dconv: Annotated[int, Field(ge=3)] = Field(
        100, description="stages with this number and above (3, 4, 5) use deformable convolutions; 100: none"
    )
    backbone_with_dpyramid: bool = Field(
        False, description="the last block of res3 and of res4 uses a deformable convolution"
    )
    backbone_checkpointing: bool = Field(
        False,
        description="in training the backbone keeps the inputs of its blocks only and computes each block twice: less "
        "memory, more time, the same results",
    )
    has_fpn: bool = Field(True, description="feature pyramid")
    fpn_feature_dim: Count = Field(256, description="channels of the pyramid and of the RPN")
    fpn_with_gap: bool = Field(False, description="adds the global average of res5 to the pyramid")
    fpn_upsample_method: Literal["nearest", "bilinear"] = Field("nearest", description="enlargement in the pyramid")
    fpn_with_norm: Norm = Field("none", description="norm after the convolutions of the pyramid")
    has_rpn: bool = Field(True, description="region proposals")
    rpn_feat_stride: Positives = Field((4, 8, 16, 32, 64), description="strides of the pyramid levels")
    rcnn_feat_stride: Count = Field(32, description="image sides are padded to a multiple of this")
    anchor_ratios: Positives = Field((0.5, 1, 2), description="height to width of the anchors")
    anchor_scales: Positives = Field((8,), description="sides of the anchors in strides of their level")
    num_anchors: Count | None = Field(
        None, description="anchors at each place; null: ratios × scales, otherwise checked against them"
    )
    has_rcnn: bool = Field(True, description="box head")
    rcnn_feature_dim: Count = Field(1024, description="width of the two layers of the box head")
    rcnn_with_norm: Norm = Field("none", description="norm in the box head and the mask head")
    bbox_reg_weights: BoxWeights = Field(
        (10, 10, 5, 5), description="factors on dx, dy, dw, dh in the box head's coding"
    )
    cls_agnostic_bbox_reg: bool = Field(False, description="one box for all classes instead of one for each")
    has_mask_head: bool = Field(True, description="mask head")
    mask_feature_dim: Count = Field(256, description="channels of the mask head")
    mask_size: Annotated[int, Field(ge=2), AfterValidator(_even)] = Field(
        28, description="side of a predicted mask in cells, even"
    )
    has_fcn_head: bool = Field(True, description="semantic head")
    fcn_head: Text = Field("FCNHead", description="kind of semantic head")
    fcn_num_layers: Count = Field(3, description="deformable layers of the semantic head")
    fcn_feature_dim: Count = Field(128, description="channels of each pyramid level at the end of the semantic head")
    fcn_with_norm: Norm = Field("none", description="norm in the semantic head")
    has_panoptic_head: bool = Field(True, description="panoptic head")
    use_syncbn: bool = Field(
        False,
        description="trained batch norms look at the images of all workers; on CPUs, for which torch has no such norm, "
        "at each worker's own",
    )

    @model_validator(mode="after")
    def _anchors_agree(self) -> Self:
        expected = len(self.anchor_ratios) * len(self.anchor_scales)
        if self.num_anchors not in (None, expected):
            raise ValueError(f"num_anchors ({self.num_anchors}) must be ratios × scales = {expected}")
        return self

    @model_validator(mode="after")
    def _groups_divide(self) -> Self:
        for norm, widths in (
            ("fpn_with_norm", ("fpn_feature_dim",)),
            ("rcnn_with_norm", ("rcnn_feature_dim", "mask_feature_dim")),
            ("fcn_with_norm", ("fpn_feature_dim", "fcn_feature_dim")),
        ):
            for width in widths:
                if getattr(self, norm) == "group_norm" and getattr(self, width) % 32:
                    raise ValueError(
                        f"{norm}: group_norm needs {width} ({getattr(self, width)}) to be a multiple of 32"
                    )
        return self


class TrainOptions(_Options):
    """Section `train`: schedule, sampling and losses."""

    lr: Positive = Field(description="learning rate after the warm-up; it belongs to a total batch, see `total_batch`")
    max_iteration: Count = Field(description="optimiser steps")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd: caffe's form, rate inside the momentum")
    lr_schedule: Literal["step", "poly"] = Field(
        "step", description="step: × 0.1 at `decay_iteration`; poly: power 0.9"
    )
    decay_iteration: Steps = Field((), description="steps at which the rate drops to a tenth, ascending")
    warmup_iteration: Natural = Field(0, description="steps over which the rate rises linearly from a tenth")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="momentum of sgd")
    wd: NotNegative = Field(1e-4, description="weight decay, on weights and not on biases and norms")
    batch_size: Count = Field(1, description="images for each worker and pass")
    total_batch: Count | None = Field(
        None, description="images for each optimiser step, by accumulation; null: workers × `batch_size`"
    )
    precision: Precision = Field("fp32", description="arithmetic of the network in training; fp16 is slow on CPUs")
    clip_gradient: Positive | None = Field(
        None, description="greatest norm of all gradients together, longer ones are shortened; null: none is"
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="decay of an average of the weights, e.g. 0.9998; validation, testing and the snapshots' weight "
        "files then have the averages; null: the weights themselves",
    )
    compat: Literal["original"] | None = Field(
        None,
        description="original: the original's oddities in training, which its published results have in them: photos "
        "without things are left out, crowds can be foreground, background anchors can be missing; null: mended",
    )
    use_horovod: bool = Field(False, description="for a launch by horovodrun; a plain launch is one worker")
    horovod_compression: Literal["none", "fp16"] = Field(
        "none", description="of gradients between Horovod's workers; fp16: half the bytes, rounded"
    )
    scales: Scales = Field((800,), description="short sides of the image in pixels, one is drawn each time")
    max_size: Count = Field(1333, description="upper limit of the long side in pixels")
    flip: bool = Field(True, description="an epoch holds every image twice, as it is and mirrored")
    shuffle: bool = Field(True, description="a new order of the images in every epoch")
    gt_min_area: float = Field(-1, description="leaves out instances with a smaller area in pixels")
    resume: bool | Literal["auto"] = Field(
        False,
        description="true: continues from the snapshot of `begin_iteration`; auto: from the newest whole snapshot of "
        "the run, from the beginning if there is none",
    )
    begin_iteration: Natural = Field(0, description="number of the snapshot to resume from")
    display_iter: Count = Field(20, description="steps between two lines in the log")
    snapshot_step: Count = Field(2000, description="steps between two snapshots")
    keep_snapshots: Count | None = Field(
        None, description="so many of the last snapshots stay, and the best one; null: all"
    )
    test_step: Count | None = Field(
        None,
        description="steps between two tests on the test images; the snapshot with the best panoptic quality is kept; "
        "null: never",
    )
    bad_images: Literal["error", "skip"] = Field(
        "error", description="training images that cannot be read; skip: another image takes the place, and is counted"
    )
    eval_data: bool = Field(True, description="losses on the test images after every epoch")
    rpn_batch_size: Count = Field(256, description="anchors sampled in each image")
    rpn_fg_fraction: Fraction = Field(0.5, description="largest share of positive anchors in the sample")
    rpn_positive_overlap: Fraction = Field(0.7, description="an anchor is positive from this IoU on")
    rpn_negative_overlap: Fraction = Field(0.3, description="an anchor is negative below this IoU")
    rpn_straddle_thresh: float = Field(
        0, description="pixels by which an anchor may leave the image and still be sampled; negative: any number"
    )
    rpn_individual_proposals: bool = Field(True, description="proposals and their NMS level by level")
    rpn_nms_thresh: Fraction = Field(0.7, description="NMS threshold of the proposals")
    rpn_pre_nms_top_n: Count = Field(2000, description="proposals of each level before NMS")
    rpn_post_nms_top_n: Count = Field(2000, description="proposals after NMS")
    rpn_min_size: NotNegative = Field(0, description="shortest side of a proposal in pixels of the photo")
    batch_rois: Count = Field(512, description="regions sampled in each image for the box head")
    fg_fraction: Fraction = Field(0.25, description="largest share of foreground in that sample")
    fg_thresh: Fraction = Field(0.5, description="a region is foreground from this IoU on")
    bg_thresh_hi: Fraction = Field(0.5, description="a region is background below this IoU")
    bg_thresh_lo: Fraction = Field(0, description="and from this IoU on")
    crowd_filter_thresh: Fraction = Field(
        0.7,
        description="a proposal with a greater share of its area inside a crowd is not sampled, and such an anchor is "
        "no background; without effect where `compat` is original",
    )
    panoptic_box_keep_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        0.7, description="share of instances shown to the panoptic head; below 1 the rest teaches the unknown class"
    )
    bbox_loss_weight: NotNegative = Field(1, description="weight of the box loss")
    fcn_loss_weight: NotNegative = Field(1, description="weight of the semantic loss")
    fcn_with_roi_loss: bool = Field(False, description="second semantic loss, inside the boxes, a fifth as heavy")
    panoptic_loss_weight: NotNegative = Field(1, description="weight of the panoptic loss")

    @model_validator(mode="after")
    def _thresholds_agree(self) -> Self:
        for low, high in (("bg_thresh_lo", "bg_thresh_hi"), ("rpn_negative_overlap", "rpn_positive_overlap")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} ({getattr(self, low)}) must not lie above {high} ({getattr(self, high)})")
        return self

    @model_validator(mode="after")
    def _batches_agree(self) -> Self:
        if self.total_batch is not None and self.total_batch % self.batch_size:
            raise ValueError(f"total_batch ({self.total_batch}) must be a multiple of batch_size ({self.batch_size})")
        return self


class TestOptions(_Options):
    """Section `test`: inference and scoring."""

    __test__ = False  # not a test class, though pytest might think so

    test_iteration: Natural | None = Field(
        None, description="snapshot that is tested without --weight_path; null: that of `train.max_iteration`"
    )
    scales: Annotated[Scales, AfterValidator(_distinct)] = Field(
        (800,),
        description="short sides of the image in pixels; with several the image is seen at each, and the results are "
        "fused at the first; scales that `max_size` makes the same count once",
    )
    flip: bool = Field(False, description="the image is seen mirrored as well, at each scale, and all is fused")
    max_size: Count = Field(1333, description="upper limit of the long side in pixels, at every scale")
    batch_size: Count = Field(1, description="images for each pass; only images of equal padded size share a pass")
    precision: Precision = Field("fp32", description="arithmetic of the network in testing; fp16 is slow on CPUs")
    compile: bool = Field(
        False,
        description="`torch.compile` of all that comes before the regions; it takes minutes first, and a C++ compiler",
    )
    cuda_graph: bool = Field(
        False, description="the same part is recorded as a CUDA graph for image sizes that come again; CUDA only"
    )
    rpn_nms_thresh: Fraction = Field(0.7, description="NMS threshold of the proposals")
    rpn_pre_nms_top_n: Count = Field(1000, description="proposals of each level before NMS")
    rpn_post_nms_top_n: Count = Field(1000, description="proposals after NMS")
    rpn_min_size: NotNegative = Field(0, description="shortest side of a proposal in pixels of the photo")
    score_thresh: Fraction = Field(0.05, description="detections need more than this probability")
    nms_thresh: Fraction = Field(0.5, description="NMS threshold of the detections")
    max_det: Count = Field(100, description="detections in each image")
    panoptic_score_thresh: Fraction = Field(0.6, description="instances of the panoptic head need more than this")
    panoptic_stuff_area_limit: Natural = Field(
        4096, description="stuff classes with fewer pixels in the photo are left without label"
    )
    vis_mask: bool = Field(False, description="draws pictures of the results instead of scoring them")


class Recipe(_Options):
    """A whole recipe; `upsnet.config.load_recipe` makes it from yaml files and overrides."""

    name: str = Field(
        "", description="name of the run in output paths; empty: the yaml's file name up to its first dot"
    )
    system: Literal["upsnet"] = Field("upsnet", description="kind of network")
    symbol: Literal["resnet_18_upsnet", "resnet_34_upsnet", "resnet_50_upsnet", "resnet_101_upsnet"] = Field(
        "resnet_50_upsnet", description="backbone depth"
    )
    output_path: Text = Field("./output/upsnet", description="folder of logs, snapshots and results")
    model_prefix: Text = Field("upsnet_", description="start of the snapshots' file names, followed by the step")
    gpus: Gpus = Field("0", description="devices of a launch without Horovod, e.g. `'0,1,2,3'`")
    seed: Natural = Field(235, description="seed of every random draw")
    debug_mode: bool = Field(False, description="forces `train.use_horovod: false` and `gpus: '0'`")
    dataset: DatasetOptions = Field(description="photos and labels")
    network: NetworkOptions = Field(description="what is built")
    train: TrainOptions = Field(description="schedule, sampling and losses")
    test: TestOptions = Field(description="inference and scoring")


SECTIONS: dict[str, type[_Options]] = {
    "dataset": DatasetOptions,
    "network": NetworkOptions,
    "train": TrainOptions,
    "test": TestOptions,
}


def recipe_keys() -> list[str]:
    """All keys, dotted, in the order of the schema; sections themselves are left out."""
    top = [key for key in Recipe.model_fields if key not in SECTIONS]
    return top + [f"{section}.{key}" for section, options in SECTIONS.items() for key in options.model_fields]
