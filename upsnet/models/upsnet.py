"""UPSNet (Xiong et al. 2019, figure 1): backbone, proposals, three heads and their fusion, for training and test."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from upsnet.models.box_head import (
    BoxHead,
    Candidates,
    DetectionOptions,
    box_losses,
    decode_above,
    joined_positions,
    suppress,
)
from upsnet.models.fpn import FPN
from upsnet.models.mask_head import MaskHead, mask_loss
from upsnet.models.matching import AnchorSampling, RoISampling, SampledRoIs, mask_targets, sample_rois
from upsnet.models.multi_scale import Frame, carry_boxes, mean_masks, mean_scores
from upsnet.models.panoptic_head import (
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
from upsnet.structures.results import OUTPUTS, Output, Prediction, TrainingOutput
from upsnet.structures.sample import VOID, Batch, Instances
from upsnet.structures.transfer import Download, upload

OF_THINGS: frozenset[Output] = frozenset({"instances", "panoptic"})
OF_MAPS: frozenset[Output] = frozenset({"panoptic", "semantic"})
"""The outputs that take the instance heads, and those that take the semantic head."""


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

    levels: P2..P5. rpn: raw anchors. scores: B×S×h×w semantic scores at stride 4. What nobody asked for is empty.
    """

    levels: list[Tensor]
    rpn: RPNOutput
    scores: Tensor


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of one photo, view by view, the reference first.

    scores: S×h×w semantic scores at stride 4. candidates: their boxes lie in the reference.
    """

    frames: list[Frame]
    scores: list[Tensor] = field(default_factory=list)
    candidates: list[Candidates] = field(default_factory=list)


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

    def forward(self, batch: Batch, outputs: frozenset[Output] = OUTPUTS) -> TrainingOutput | list[Prediction]:
        """outputs: at test time, what is wanted; only what that takes is computed."""
        return self._losses(self.features(batch.images), batch) if self.training else self._predict(batch, outputs)

    def features(self, images: Tensor, outputs: frozenset[Output] = OUTPUTS) -> Features:
        """images: B×3×H×W, sides multiples of 32. outputs: what shall be made of it."""
        levels = self.fpn(self.backbone(images))
        return Features(
            levels[:4],
            self.rpn(levels) if outputs & OF_THINGS else RPNOutput([], [], []),
            self.semantic_head(levels[:4]) if outputs & OF_MAPS else levels[0].new_empty(len(images), 0, 0, 0),
        )

    # -- training ------------------------------------------------------------------------------------------------------

    def _losses(self, features: Features, batch: Batch) -> TrainingOutput:
        """Enqueues all that needs no masks before it waits for the sampled RoIs, whose masks the host draws."""
        assert batch.instances is not None and batch.semantic is not None
        options, device = self.sampling, features.scores.device
        features = replace(features, scores=features.scores.contiguous())  # the losses look at planes
        things = [instances.without_crowd() for instances in batch.instances]
        boxes = [upload(t.boxes * scale, device) for t, scale in zip(things, batch.scales, strict=True)]
        crowds = [
            upload(i.crowd_boxes() * scale, device) for i, scale in zip(batch.instances, batch.scales, strict=True)
        ]

        rpn_class_loss, rpn_box_loss = rpn_losses(
            features.rpn, boxes, crowds, batch.sizes, options.anchors, batch.draws
        )
        sampled = self._sample(features, batch)
        foreground = Download(torch.cat([s.foreground() for s in sampled]))
        rois = _join([s.boxes * scale for s, scale in zip(sampled, batch.scales, strict=True)])
        logits, deltas = self.box_head(features.levels, rois)
        class_loss, box_loss, box_accuracy = box_losses(logits, deltas, sampled)
        semantic = {"fcn_loss": semantic_loss(features.scores, batch.semantic)}
        if options.with_roi_loss:
            bias = self.semantic_head.score.bias
            assert bias is not None
            semantic["fcn_roi_loss"] = roi_loss(features.scores, bias, batch.semantic, boxes)
        panoptic, panoptic_accuracy = self._panoptic_loss(features, batch, things, boxes)
        masks = self._mask_loss(features, sampled, foreground, things, batch.scales)
        losses = {  # in the order of the log
            "rpn_cls_loss": rpn_class_loss,
            "rpn_bbox_loss": rpn_box_loss,
            "cls_loss": class_loss,
            "bbox_loss": box_loss,
            "mask_loss": masks,
            **semantic,
            "panoptic_loss": panoptic,
        }
        return TrainingOutput(losses, {"rcnn_accuracy": box_accuracy, "panoptic_accuracy": panoptic_accuracy})

    def _sample(self, features: Features, batch: Batch) -> list[SampledRoIs]:
        assert batch.instances is not None
        options, device = self.sampling, features.scores.device
        proposals = propose(features.rpn, batch.sizes, batch.scales, options.proposals)
        sampled = []
        for image, (instances, draws) in enumerate(zip(batch.instances, batch.draws, strict=True)):
            rois = sample_rois(
                proposals.boxes[image] / batch.scales[image],
                upload(instances.boxes, device),
                upload(instances.classes, device),
                upload(instances.is_crowd, device),
                options.rois,
                draws,
                proposals.valid[image],
            )
            # To ask costs nothing on the host, to compute empty slots does.
            sampled.append(rois.trimmed() if device.type == "cpu" else rois)
        return sampled

    def _mask_loss(
        self,
        features: Features,
        sampled: list[SampledRoIs],
        foreground: Download,
        things: list[Instances],
        scales: list[float],
    ) -> Tensor:
        """foreground: `SampledRoIs.foreground` of all images."""
        size, counts, targets = 2 * self.mask_head.pooled_size, [], []
        slots = foreground.wait().split([len(s.box_targets) for s in sampled])
        for of_image, s, t in zip(slots, sampled, things, strict=True):
            # A RoI without any mask to learn from (its image shows a crowd and no single thing) is left out.
            count = int((of_image[:, 4].numpy() > 0).sum()) if len(t) else 0
            owners = None if s.owners is None else of_image[:count, 5].long()
            counts.append(count)
            crops = mask_targets(of_image[:count, :4], t.masks, size, owners) if count else torch.zeros(0, size, size)
            targets.append(crops)
        rois = _join([s.boxes[:n] * scale for s, n, scale in zip(sampled, counts, scales, strict=True)])
        classes = torch.cat([s.labels[:n] for s, n in zip(sampled, counts, strict=True)])
        logits = self.mask_head(features.levels, rois, classes)
        return mask_loss(logits, upload(torch.cat(targets), logits.device), counts)

    def _panoptic_loss(
        self, features: Features, batch: Batch, things: list[Instances], boxes: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        assert batch.semantic is not None and batch.quarter_masks is not None
        fraction, device = self.sampling.keep_fraction, features.scores.device
        on_host = [keep_instances(len(t), fraction, draws) for t, draws in zip(things, batch.draws, strict=True)]
        kept = [upload(k, device) for k in on_host]
        kept_boxes = [b[k] for b, k in zip(boxes, kept, strict=True)]
        kept_classes = [upload(t.classes[k], device) for t, k in zip(things, on_host, strict=True)]
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

    def _predict(self, batch: Batch, outputs: frozenset[Output]) -> list[Prediction]:
        """Looks at every view, the batch itself first (often the only one), and fuses them as `multi_scale` says."""
        views = [batch, *batch.views]
        levels: list[list[Tensor]] = []
        photos = [Seen([Frame.of(view, image) for view in views]) for image in range(len(batch))]
        for view in views:
            features = self.features(view.images, outputs)
            levels.append(features.levels)
            for image, (seen, found) in enumerate(zip(photos, self._candidates(features, view, outputs), strict=True)):
                boxes = carry_boxes(found.boxes, Frame.of(view, image), seen.frames[0])
                seen.candidates.append(replace(found, boxes=boxes))
                seen.scores.append(features.scores[image])
        found_in = self._instances(levels, photos, outputs)
        return [self._on_photo(batch, image, photos[image], found, outputs) for image, found in enumerate(found_in)]

    def _candidates(self, features: Features, view: Batch, outputs: frozenset[Output]) -> list[Candidates]:
        """For each image of a view all boxes that may become an instance."""
        options = self.selection
        if not outputs & OF_THINGS:
            return [Candidates.none(view.images.device)] * len(view)
        proposals = propose(features.rpn, view.sizes, view.scales, options.proposals).trimmed()
        counts = [len(p) for p in proposals]
        logits, deltas = self.box_head(features.levels, _join(proposals))
        probabilities = F.softmax(logits, dim=1)
        threshold = min(self._options(output).score_threshold for output in outputs & OF_THINGS)
        return [
            decode_above(*of_image, threshold, options.detections.box_weights)
            for of_image in zip(proposals, probabilities.split(counts), deltas.split(counts), view.sizes, strict=True)
        ]

    def _options(self, output: Output) -> DetectionOptions:
        """How instances are selected for an output."""
        options = self.selection.detections
        return (
            replace(options, score_threshold=self.selection.panoptic_score_threshold)
            if output == "panoptic"
            else options
        )

    def _instances(
        self, levels: list[list[Tensor]], photos: list[Seen], outputs: frozenset[Output]
    ) -> list[dict[Output, tuple[Candidates, Tensor]]]:
        """For each photo and output its instances and their N×M×M mask logits. levels: P2..P5 of each view."""
        wanted = sorted(outputs & OF_THINGS)
        if not wanted:
            return [{}] * len(photos)
        found, places = [], []
        for seen in photos:
            boxes = Candidates.joined(seen.candidates)
            lists = [suppress(boxes, self._options(output), class_agnostic=output == "panoptic") for output in wanted]
            either, places_of_each = joined_positions(len(boxes), lists)
            found.append(boxes.select(either))
            places.append(places_of_each)
        masks = self._mask_logits(levels, photos, found)
        return [
            {output: (f.select(at), m[at]) for output, at in zip(wanted, of_photo, strict=True)}
            for f, m, of_photo in zip(found, masks, places, strict=True)
        ]

    def _mask_logits(self, levels: list[list[Tensor]], photos: list[Seen], found: list[Candidates]) -> list[Tensor]:
        """For each photo N×M×M mask logits of the boxes found in it, from all views."""
        counts, classes = [len(f) for f in found], torch.cat([f.classes for f in found])
        logits = []
        for number, of_view in enumerate(levels):
            frames = [(seen.frames[0], seen.frames[number]) for seen in photos]
            boxes = [carry_boxes(f.boxes, first, own) for f, (first, own) in zip(found, frames, strict=True)]
            masks = self.mask_head(of_view, _join(boxes), classes).split(counts)
            upright = [m.flip(-1) if own.flipped else m for m, (_, own) in zip(masks, frames, strict=True)]
            logits.append(torch.cat(upright))
        return list(mean_masks(logits).split(counts))

    def _on_photo(
        self,
        batch: Batch,
        image: int,
        seen: Seen,
        found: dict[Output, tuple[Candidates, Tensor]],
        outputs: frozenset[Output],
    ) -> Prediction:
        scale, original = batch.scales[image], batch.original_sizes[image]
        prediction = Prediction(batch.image_ids[image], batch.file_names[image])
        if "instances" in outputs:
            prediction.instances = detections_on_photo(*found["instances"], scale, original)
        if not outputs & OF_MAPS:
            return prediction
        size = (batch.images.shape[-2], batch.images.shape[-1])
        competing, masks = found.get("panoptic") or (
            Candidates.none(batch.images.device),
            batch.images.new_empty(0, 2, 2),
        )
        fused = fuse(
            mean_scores(seen.scores, seen.frames, size), size, competing, masks, self.num_stuff, self.has_unknown
        )
        height, width = batch.sizes[image]
        semantic = labels_on_photo(fused.semantic[:height, :width], scale, original)
        if "semantic" in outputs:
            prediction.semantic_map = semantic
        if "panoptic" in outputs:
            prediction.segment_map, prediction.segments = merge_segments(
                labels_on_photo(fused.channels[:height, :width], scale, original),
                semantic,
                fused.instances.classes.cpu().numpy(),
                fused.instances.scores.cpu().numpy(),
                self.num_stuff,
                self.selection.stuff_area_limit,
            )
        return prediction


def quarter_labels(semantic: Tensor, size: tuple[int, int]) -> Tensor:
    """Every fourth label of an H×W map, H/4×W/4; what lies beyond round(h/4), round(w/4) of the image is VOID."""
    quarter = semantic[::4, ::4].clone()
    quarter[round(size[0] / 4) :] = VOID
    quarter[:, round(size[1] / 4) :] = VOID
    return quarter


def _join(boxes: list[Tensor]) -> Tensor:
    """N_i×4 boxes of each image → R×5 RoIs with the image's position in front."""
    return torch.cat([F.pad(b, (1, 0), value=float(i)) for i, b in enumerate(boxes)])
