"""From a recipe to the things it describes: the one room that knows recipe keys and constructors both."""

from pathlib import Path

import torch

from upsnet.config import Recipe, TestOptions, TrainOptions
from upsnet.dataset.annotated_set import coco_image_sets
from upsnet.dataset.batches import SamePaddedSizeSampler, TrainingSampler
from upsnet.dataset.coco_panoptic import CocoPanoptic
from upsnet.dataset.loading import BatchLoader
from upsnet.dataset.transforms import Transform
from upsnet.engine.optimizer import build_optimizer
from upsnet.engine.options import LoopOptions
from upsnet.models.box_head import BoxHead, DetectionOptions
from upsnet.models.fpn import FPN
from upsnet.models.layers import NormKind
from upsnet.models.mask_head import MaskHead
from upsnet.models.matching import AnchorSampling, RoISampling
from upsnet.models.resnet import ResNet
from upsnet.models.rpn import RPN, ProposalOptions
from upsnet.models.semantic_head import SemanticHead
from upsnet.models.upsnet import SamplingOptions, SelectionOptions, UPSNet
from upsnet.structures.categories import Categories
from upsnet.structures.draws import seed_of
from upsnet.structures.errors import RecipeError

ROI_LOSS_SHARE = 0.2
"""Weight of the semantic loss on crops, as a share of the semantic loss' own (UPSNet, section 3.2)."""


def choose_device(recipe: Recipe) -> torch.device:
    """The first device of `gpus` where CUDA is found, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    first = int(recipe.gpus.split(",")[0])
    if first >= torch.cuda.device_count():
        raise RecipeError(f"gpus: device {first} is not there, this machine has {torch.cuda.device_count()}")
    return torch.device("cuda", first)


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU (threads: {torch.get_num_threads()})"


# -- network -----------------------------------------------------------------------------------------------------------


def build_network(recipe: Recipe, categories: Categories) -> UPSNet:
    """The untrained network for these classes; its initial weights are a function of `seed`.

    Raises:
        RecipeError: the class table has no things, so there is nothing for the instance head to learn.
    """
    if categories.num_things == 0:
        raise RecipeError("UPSNet needs at least one thing class: none of this data set's categories has 'isthing'")
    network = recipe.network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(recipe.seed))
        backbone = ResNet(
            _depth(recipe),
            norm=_backbone_norm(recipe),
            stride_in_1x1=network.backbone_stride_in_1x1,
            freeze_at=network.backbone_freeze_at,
            deformable_from=network.backbone_with_dconv,
            deformable_last=network.backbone_with_dpyramid,
        )
        channels = network.fpn_feature_dim
        built = UPSNet(
            backbone,
            FPN(
                backbone.out_channels,
                channels,
                network.fpn_with_gap,
                network.fpn_upsample_method,
                network.fpn_with_norm,
            ),
            RPN(channels, ratios=network.anchor_ratios, scales=network.anchor_scales),
            BoxHead(channels, categories.num_classes, network.rcnn_feature_dim, network.rcnn_with_norm),
            MaskHead(
                channels, categories.num_classes, network.mask_feature_dim, network.mask_size, network.rcnn_with_norm
            ),
            SemanticHead(
                channels,
                categories.num_seg_classes,
                network.fcn_feature_dim,
                network.fcn_num_layers,
                network.fcn_with_norm,
            ),
            categories.num_stuff,
            _sampling(recipe),
            _selection(recipe),
        )
    # Convolutions and the deformable layers are fastest with the channels innermost; weights laid out so pull the maps
    # along.
    return built.to(memory_format=torch.channels_last)


def _depth(recipe: Recipe) -> int:
    return int(recipe.symbol.split("_")[1])


def _backbone_norm(recipe: Recipe) -> NormKind:
    network = recipe.network
    if network.backbone_with_norm == "batch_norm" and network.backbone_fix_bn:
        return "frozen_batch_norm"
    return network.backbone_with_norm


def _proposals(options: TrainOptions | TestOptions) -> ProposalOptions:
    return ProposalOptions(
        options.rpn_nms_thresh, options.rpn_pre_nms_top_n, options.rpn_post_nms_top_n, options.rpn_min_size
    )


def _sampling(recipe: Recipe) -> SamplingOptions:
    train = recipe.train
    return SamplingOptions(
        anchors=AnchorSampling(
            train.rpn_batch_size,
            train.rpn_fg_fraction,
            train.rpn_positive_overlap,
            train.rpn_negative_overlap,
            train.rpn_straddle_thresh,
        ),
        proposals=_proposals(train),
        rois=RoISampling(
            train.batch_rois,
            train.fg_fraction,
            train.fg_thresh,
            train.bg_thresh_hi,
            train.bg_thresh_lo,
            recipe.network.bbox_reg_weights,
        ),
        keep_fraction=train.panoptic_box_keep_fraction,
        with_roi_loss=train.fcn_with_roi_loss,
    )


def _selection(recipe: Recipe) -> SelectionOptions:
    test = recipe.test
    return SelectionOptions(
        proposals=_proposals(test),
        detections=DetectionOptions(test.score_thresh, test.nms_thresh, test.max_det, recipe.network.bbox_reg_weights),
        panoptic_score_threshold=test.panoptic_score_thresh,
        stuff_area_limit=test.panoptic_stuff_area_limit,
    )


def loss_weights(recipe: Recipe) -> dict[str, float]:
    """Factor of every loss in the total."""
    train = recipe.train
    weights = {
        "rpn_cls_loss": 1.0,
        "rpn_bbox_loss": 1.0,
        "cls_loss": 1.0,
        "bbox_loss": train.bbox_loss_weight,
        "mask_loss": 1.0,
        "fcn_loss": train.fcn_loss_weight,
        "panoptic_loss": train.panoptic_loss_weight,
    }
    if train.fcn_with_roi_loss:
        weights["fcn_roi_loss"] = train.fcn_loss_weight * ROI_LOSS_SHARE
    return weights


# -- data --------------------------------------------------------------------------------------------------------------


def training_transform(recipe: Recipe) -> Transform:
    """How training photos become network inputs."""
    network, train = recipe.network, recipe.train
    return Transform(train.scales, train.max_size, network.pixel_means, network.use_caffe_model, recipe.seed)


def test_transform(recipe: Recipe) -> Transform:
    """How photos become network inputs at test time.

    Raises:
        RecipeError: `test.scales` holds more than one scale.
    """
    network, test = recipe.network, recipe.test
    if len(test.scales) > 1:
        raise RecipeError(f"test.scales: {list(test.scales)} are several scales, testing takes one: choose one of them")
    return Transform(test.scales, test.max_size, network.pixel_means, network.use_caffe_model)


def build_training_set(recipe: Recipe) -> CocoPanoptic:
    """The training images, with mirrored copies if the recipe says so.

    The original trains on images with things only; without `compat: original` the others take part.
    """
    return _build_set(
        recipe,
        recipe.dataset.image_set,
        training_transform(recipe),
        flip_copies=recipe.train.flip,
        skip_without_things=recipe.train.compat == "original",
        min_area=recipe.train.gt_min_area,
    )


def build_test_set(recipe: Recipe, targets: bool = False) -> CocoPanoptic:
    """The test images. targets: for validation losses."""
    return _build_set(recipe, recipe.dataset.test_image_set, test_transform(recipe), targets=targets)


def _build_set(
    recipe: Recipe,
    image_set: str,
    transform: Transform,
    *,
    targets: bool = True,
    flip_copies: bool = False,
    skip_without_things: bool = False,
    min_area: float = -1,
) -> CocoPanoptic:
    options = recipe.dataset
    if options.dataset not in ("coco", "panoptic"):
        raise RecipeError(
            f"dataset.dataset: '{options.dataset}' cannot be read in its own layout yet: "
            f"convert it to the COCO panoptic format and set dataset.dataset=panoptic"
        )
    dataset = CocoPanoptic(
        coco_image_sets(Path(options.dataset_path), image_set),
        transform,
        targets=targets,
        flip_copies=flip_copies,
        skip_without_things=skip_without_things,
        limit=options.limit,
        min_area=min_area,
    )
    check_class_counts(recipe, dataset.categories, str(options.dataset_path))
    return dataset


def check_class_counts(recipe: Recipe, categories: Categories, source: str) -> None:
    """Refuses a recipe whose class counts contradict the class table."""
    for key, stated, found in (
        ("num_classes", recipe.dataset.num_classes, categories.num_classes),
        ("num_seg_classes", recipe.dataset.num_seg_classes, categories.num_seg_classes),
    ):
        if stated is not None and stated != found:
            raise RecipeError(
                f"dataset.{key} is {stated}, but {source} has {categories.num_things} thing and {categories.num_stuff} "
                f"stuff classes, which makes {found}: correct the recipe or leave the key out"
            )


def accumulation(recipe: Recipe, workers: int = 1) -> int:
    """Micro-batches of each worker in one optimiser step.

    Raises:
        RecipeError: `total_batch` is no multiple of workers × batch_size.
    """
    share = workers * recipe.train.batch_size
    total = recipe.train.total_batch or share
    if total % share:
        raise RecipeError(
            f"train.total_batch ({total}) is no multiple of workers × batch_size ({workers} × "
            f"{recipe.train.batch_size}): change one of them"
        )
    return total // share


def build_training_loader(recipe: Recipe, dataset: CocoPanoptic, start_step: int) -> BatchLoader:
    """Micro-batches from step `start_step` to the last one."""
    sampler = TrainingSampler(
        len(dataset),
        recipe.train.batch_size,
        accumulation(recipe),
        seed=recipe.seed,
        start_step=start_step,
        steps=recipe.train.max_iteration,
        shuffle=recipe.train.shuffle,
    )
    return BatchLoader(dataset, sampler, recipe.dataset.num_workers)


def build_test_loader(recipe: Recipe, dataset: CocoPanoptic) -> BatchLoader:
    """Batches of images of equal padded size, every image once."""
    sampler = SamePaddedSizeSampler(dataset.padded_sizes(), recipe.test.batch_size)
    return BatchLoader(dataset, sampler, recipe.dataset.num_workers)


# -- training ----------------------------------------------------------------------------------------------------------


def build_optimizer_of(recipe: Recipe, network: UPSNet) -> torch.optim.Optimizer:
    """The recipe's optimiser over the network's trainable parameters."""
    train = recipe.train
    return build_optimizer(network, train.optimizer, train.momentum, train.wd)


def engine_options(recipe: Recipe, epoch_length: int) -> LoopOptions:
    """The training loop's options. epoch_length: entries of the training set, mirrored copies included."""
    train = recipe.train
    total_batch = train.batch_size * accumulation(recipe)
    return LoopOptions(
        max_iteration=train.max_iteration,
        steps_per_epoch=max(-(-epoch_length // total_batch), 1),
        lr=train.lr,
        lr_schedule=train.lr_schedule,
        decay_iterations=train.decay_iteration,
        warmup_iterations=train.warmup_iteration,
        accumulation=accumulation(recipe),
        loss_weights=loss_weights(recipe),
        precision=train.precision,
        seed=recipe.seed,
        display_iter=train.display_iter,
        snapshot_step=train.snapshot_step,
    )
