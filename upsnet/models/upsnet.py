"""UPSNet (Xiong et al. 2019, figure 1): backbone, proposals, three heads and their fusion, for training and test."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from upsnet.models.box_head import BoxHead, Candidates, DetectionOptions, box_losses, detect
from upsnet.models.fpn import FPN
from upsnet.models.mask_head import MaskHead, mask_loss
from upsnet.models.matching import AnchorSampling, RoISampling, SampledRoIs, mask_targets, sample_rois
from upsnet.models.panoptic_head import (
    PanopticMap,
    fuse,
    keep_instances,
    panoptic_logits,
    panoptic_loss,
    panoptic_target,
)
from upsnet.models.postprocess import detections_on_photo, labels_on_photo, merge_segments
from upsnet.models.resnet import ResNet
from upsnet.models.rpn import RPN, ProposalOptions, RPNOutput, propose, rpn_losses
from upsnet.models.semantic_head import SemanticHead, roi_loss, semantic_loss
from upsnet.structures.results import Prediction, TrainingOutput
from upsnet.structures.sample import VOID, Batch, Instances


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling in training.

    keep_fraction: share of the true instances that take part in the panoptic loss; below 1 the rest is "unknown".
    with_roi_loss: adds the semantic loss on crops around things.
    """

    anchors: AnchorSampling = field(default_factory=AnchorSampling)
    proposals: ProposalOptions = field(default_factory=lambda: ProposalOptions(pre_nms=2000, post_nms=2000))
    rois: RoISampling = field(default_factory=RoISampling)
    keep_fraction: float = 0.7
    with_roi_loss: bool = False


@dataclass(frozen=True)
class SelectionOptions:
    """Selection at test time.

    panoptic_score_threshold: least score of an instance in the panoptic map.
    stuff_area_limit: stuff classes with fewer pixels on the photo are removed from the panoptic map.
    """

    proposals: ProposalOptions = field(default_factory=ProposalOptions)
    detections: DetectionOptions = field(default_factory=DetectionOptions)
    panoptic_score_threshold: float = 0.6
    stuff_area_limit: int = 4096


@dataclass(frozen=True, slots=True)
class Features:
    """What the dense parts of the network say about a batch.

    levels: P2..P5. rpn: raw anchors. scores: B×S×h×w semantic scores at stride 4.
    """

    levels: list[Tensor]
    rpn: RPNOutput
    scores: Tensor


class UPSNet(nn.Module):
    """The network. In training mode a batch gives `TrainingOutput`, in evaluation mode a list of `Prediction`s.

    Args:
        num_stuff: stuff classes; the semantic head has num_stuff + C - 1 classes, C those of the box head.
    """

    def __init__(
        self,
        backbone: ResNet,
        fpn: FPN,
        rpn: RPN,
        box_head: BoxHead,
        mask_head: MaskHead,
        semantic_head: SemanticHead,
        num_stuff: int,
        sampling: SamplingOptions,
        selection: SelectionOptions,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.fpn = fpn
        self.rpn = rpn
        self.box_head = box_head
        self.mask_head = mask_head
        self.semantic_head = semantic_head
        self.num_stuff = num_stuff
        self.sampling = sampling
        self.selection = selection

    @property
    def has_unknown(self) -> bool:
        """Whether the panoptic head has its unknown channel."""
        return self.sampling.keep_fraction < 1

    def forward(self, batch: Batch) -> TrainingOutput | list[Prediction]:
        features = self.features(batch.images)
        return self._losses(features, batch) if self.training else self._predict(features, batch)

    def features(self, images: Tensor) -> Features:
        """images: B×3×H×W, sides multiples of 32."""
        levels = self.fpn(self.backbone(images))
        return Features(levels[:4], self.rpn(levels), self.semantic_head(levels[:4]))

    # -- training ------------------------------------------------------------------------------------------------------

    def _losses(self, features: Features, batch: Batch) -> TrainingOutput:
        assert batch.instances is not None and batch.semantic is not None and batch.quarter_masks is not None
        options = self.sampling
        things = [instances.without_crowd() for instances in batch.instances]
        boxes = [t.boxes * scale for t, scale in zip(things, batch.scales, strict=True)]
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}

        losses["rpn_cls_loss"], losses["rpn_bbox_loss"] = rpn_losses(
            features.rpn, boxes, batch.sizes, options.anchors, batch.draws
        )
        sampled = self._sample(features, batch)
        rois = _join([s.boxes * scale for s, scale in zip(sampled, batch.scales, strict=True)])
        logits, deltas = self.box_head(features.levels, rois)
        losses["cls_loss"], losses["bbox_loss"], metrics["rcnn_accuracy"] = box_losses(logits, deltas, sampled)
        losses["mask_loss"] = self._mask_loss(features, sampled, things, batch.scales)
        losses["fcn_loss"] = semantic_loss(features.scores, batch.semantic)
        if options.with_roi_loss:
            bias = self.semantic_head.score.bias
            assert bias is not None
            losses["fcn_roi_loss"] = roi_loss(features.scores, bias, batch.semantic, boxes)
        losses["panoptic_loss"], metrics["panoptic_accuracy"] = self._panoptic_loss(features, batch, things, boxes)
        return TrainingOutput(losses, metrics)

    def _sample(self, features: Features, batch: Batch) -> list[SampledRoIs]:
        assert batch.instances is not None
        options = self.sampling
        sampled = []
        for image, (instances, draws) in enumerate(zip(batch.instances, batch.draws, strict=True)):
            scale = batch.scales[image]
            proposals, _ = propose(features.rpn, image, batch.sizes[image], scale, options.proposals)
            sampled.append(
                sample_rois(
                    proposals / scale, instances.boxes, instances.classes, instances.is_crowd, options.rois, draws
                )
            )
        return sampled

    def _mask_loss(
        self, features: Features, sampled: list[SampledRoIs], things: list[Instances], scales: list[float]
    ) -> Tensor:
        # A foreground RoI without any mask to learn from (its image shows a crowd and no single thing) is left out.
        counts = [s.num_foreground if len(t) else 0 for s, t in zip(sampled, things, strict=True)]
        size = 2 * self.mask_head.pooled_size
        targets = [
            mask_targets(s.boxes[:count], t.masks, size) if count else s.boxes.new_zeros(0, size, size)
            for s, t, count in zip(sampled, things, counts, strict=True)
        ]
        rois = _join([s.boxes[:n] * scale for s, n, scale in zip(sampled, counts, scales, strict=True)])
        classes = torch.cat([s.labels[:n] for s, n in zip(sampled, counts, strict=True)])
        return mask_loss(self.mask_head(features.levels, rois, classes), torch.cat(targets), counts)

    def _panoptic_loss(
        self, features: Features, batch: Batch, things: list[Instances], boxes: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        assert batch.semantic is not None and batch.quarter_masks is not None
        fraction = self.sampling.keep_fraction
        kept = [
            keep_instances(len(t), fraction, draws).to(features.scores.device)
            for t, draws in zip(things, batch.draws, strict=True)
        ]
        kept_boxes = [b[k] for b, k in zip(boxes, kept, strict=True)]
        kept_classes = [t.classes[k] for t, k in zip(things, kept, strict=True)]
        mask_logits = self.mask_head(features.levels, _join(kept_boxes), torch.cat(kept_classes))
        losses, accuracies = [], []
        for image, logits in enumerate(mask_logits.split([len(k) for k in kept])):
            channels = panoptic_logits(
                features.scores[image],
                kept_boxes[image],
                kept_classes[image],
                logits,
                self.num_stuff,
                self.has_unknown,
            )
            target = panoptic_target(
                quarter_labels(batch.semantic[image], batch.sizes[image]),
                batch.quarter_masks[image][kept[image]],
                self.num_stuff,
                self.has_unknown,
            )
            loss, accuracy = panoptic_loss(channels, target)
            losses.append(loss)
            accuracies.append(accuracy)
        return torch.stack(losses).mean(), torch.stack(accuracies).mean()

    # -- test ----------------------------------------------------------------------------------------------------------

    def _predict(self, features: Features, batch: Batch) -> list[Prediction]:
        proposals = [
            propose(features.rpn, image, size, scale, self.selection.proposals)[0]
            for image, (size, scale) in enumerate(zip(batch.sizes, batch.scales, strict=True))
        ]
        detections, candidates = self._detect(features, proposals, batch.sizes)
        found = [*detections, *candidates]
        rois = _join([f.boxes for f in found])
        rois[:, 0] %= len(batch)  # detections and candidates of one image share its features
        masks = self.mask_head(features.levels, rois, torch.cat([f.classes for f in found]))
        parts = masks.split([len(f) for f in found])
        predictions = []
        for image in range(len(batch)):
            fused = fuse(
                features.scores[image],
                (batch.images.shape[-2], batch.images.shape[-1]),
                candidates[image],
                parts[len(batch) + image],
                self.num_stuff,
                self.has_unknown,
            )
            prediction = self._on_photo(fused, batch, image)
            prediction.instances = detections_on_photo(
                detections[image], parts[image], batch.scales[image], batch.original_sizes[image]
            )
            predictions.append(prediction)
        return predictions

    def _detect(
        self, features: Features, proposals: list[Tensor], sizes: list[tuple[int, int]]
    ) -> tuple[list[Candidates], list[Candidates]]:
        """For each image: the detections of the instance branch, and the candidates of the panoptic head."""
        options = self.selection.detections
        strong = DetectionOptions(
            self.selection.panoptic_score_threshold,
            options.nms_threshold,
            options.max_detections,
            options.box_weights,
        )
        logits, deltas = self.box_head(features.levels, _join(proposals))
        counts = [len(p) for p in proposals]
        detections, candidates = [], []
        for boxes, probabilities, image_deltas, size in zip(
            proposals, F.softmax(logits, dim=1).split(counts), deltas.split(counts), sizes, strict=True
        ):
            detections.append(detect(boxes, probabilities, image_deltas, size, options, class_agnostic=False))
            candidates.append(detect(boxes, probabilities, image_deltas, size, strong, class_agnostic=True))
        return detections, candidates

    def _on_photo(self, fused: PanopticMap, batch: Batch, image: int) -> Prediction:
        (height, width), original = batch.sizes[image], batch.original_sizes[image]
        channels = labels_on_photo(fused.channels[:height, :width], batch.scales[image], original)
        semantic = labels_on_photo(fused.semantic[:height, :width], batch.scales[image], original)
        segment_map, segments = merge_segments(
            channels,
            semantic,
            fused.instances.classes.cpu().numpy(),
            fused.instances.scores.cpu().numpy(),
            self.num_stuff,
            self.selection.stuff_area_limit,
        )
        return Prediction(batch.image_ids[image], batch.file_names[image], segment_map, segments, semantic_map=semantic)


def quarter_labels(semantic: Tensor, size: tuple[int, int]) -> Tensor:
    """Every fourth label of an H×W map, H/4×W/4; what lies beyond round(h/4), round(w/4) of the image is VOID."""
    quarter = semantic[::4, ::4].clone()
    quarter[round(size[0] / 4) :] = VOID
    quarter[:, round(size[1] / 4) :] = VOID
    return quarter


def _join(boxes: list[Tensor]) -> Tensor:
    """N_i×4 boxes of each image → R×5 RoIs with the image's position in front."""
    return torch.cat([F.pad(b, (1, 0), value=float(i)) for i, b in enumerate(boxes)])
