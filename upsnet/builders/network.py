"""From a recipe to its untrained network, and the device it runs on."""

import torch

from upsnet.config import Recipe, TestOptions, TrainOptions
from upsnet.engine.precision import DTYPES
from upsnet.models.box_head import BoxHead, DetectionOptions
from upsnet.models.fpn import FPN
from upsnet.models.inference import prepare
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


def choose_device(recipe: Recipe, wanted: torch.device | None = None, local_rank: int | None = None) -> torch.device:
    """The wanted device; None: the first one of `gpus` where CUDA is found, else the CPU.

    Args:
        local_rank: of a worker that a launcher started. Such workers have a device each, by that number; `gpus` is for
            plain launches.

    Raises:
        RecipeError: there is no such device.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted is not None:
        if wanted.type == "cuda" and (wanted.index or 0) >= found:
            raise RecipeError(f"device: {wanted} is not there, this machine has {found} of the kind: choose another")
        return wanted
    if not found:
        return torch.device("cpu")
    if local_rank is not None:
        if local_rank >= found:
            raise RecipeError(
                f"worker {local_rank} of this machine has no GPU of its own, {found} are here: start {found} workers"
            )
        return torch.device("cuda", local_rank)
    first = int(recipe.gpus.split(",")[0])
    if first >= found:
        raise RecipeError(f"gpus: device {first} is not there, this machine has {found}")
    return torch.device("cuda", first)


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU (threads: {torch.get_num_threads()})"


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
            checkpointing=network.backbone_checkpointing,
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


def prepare_for_test(recipe: Recipe, network: UPSNet) -> UPSNet:
    """The network in the form in which the recipe's test runs it; see `upsnet.models.inference.prepare`."""
    test = recipe.test
    return prepare(network.eval(), DTYPES[test.precision], test.compile, test.cuda_graph)


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
    as_original = train.compat == "original"
    return SamplingOptions(
        anchors=AnchorSampling(
            train.rpn_batch_size,
            train.rpn_fg_fraction,
            train.rpn_positive_overlap,
            train.rpn_negative_overlap,
            train.rpn_straddle_thresh,
            as_original,
            train.crowd_filter_thresh,
        ),
        proposals=_proposals(train),
        rois=RoISampling(
            train.batch_rois,
            train.fg_fraction,
            train.fg_thresh,
            train.bg_thresh_hi,
            train.bg_thresh_lo,
            recipe.network.bbox_reg_weights,
            as_original,
            train.crowd_filter_thresh,
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
