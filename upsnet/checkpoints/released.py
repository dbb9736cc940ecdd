"""Names of the released UPSNet weights ↔ ours."""

import re
from collections.abc import Callable

_BLOCK, _OUR_BLOCK = "resnet_backbone.res{stage}.layers.{block}", "backbone.res{stage}.{block}"
_CONV = "fcn_head.fcn_subnet.conv.{layer}.0"

LAYERS = (
    ("resnet_backbone.conv1.conv1", "backbone.stem.conv"),
    ("resnet_backbone.conv1.bn1", "backbone.stem.norm"),
    (f"{_BLOCK}.conv{{n}}", f"{_OUR_BLOCK}.conv{{n}}"),
    (f"{_BLOCK}.conv{{n}}_offset", f"{_OUR_BLOCK}.conv{{n}}.offset"),
    (f"{_BLOCK}.bn{{n}}", f"{_OUR_BLOCK}.norm{{n}}"),
    (f"{_BLOCK}.downsample.0", f"{_OUR_BLOCK}.downsample.conv"),
    (f"{_BLOCK}.downsample.1", f"{_OUR_BLOCK}.downsample.norm"),
    ("fpn.fpn_gap", "fpn.global_average"),
    ("fpn.fpn_p{level}_1x1", "fpn.lateral.{level-2}.conv"),
    ("fpn.fpn_p{level}", "fpn.output.{level-2}.conv"),
    ("rpn.conv_proposal.0", "rpn.conv"),
    ("rpn.cls_score", "rpn.objectness"),
    ("rpn.bbox_pred", "rpn.deltas"),
    ("rcnn.fc{n}.0", "box_head.fc{n}"),
    ("rcnn.cls_score", "box_head.class_logits"),
    ("rcnn.bbox_pred", "box_head.deltas"),
    ("mask_branch.mask_conv{n}.0", "mask_head.convs.{n-1}.conv"),
    ("mask_branch.mask_deconv1.0", "mask_head.deconv"),
    ("mask_branch.mask_score", "mask_head.score"),
    (f"{_CONV}.conv_offset", "semantic_head.layers.{layer}.conv.offset"),
    (f"{_CONV}.conv", "semantic_head.layers.{layer}.conv"),
    ("fcn_head.score", "semantic_head.score"),
)
"""Released layer, our layer. {x} stands for a number; {x-2} for one that is smaller by two."""


def our_name(name: str) -> str | None:
    """Our name of a tensor of a released file: `fpn.fpn_p5.bias` → `fpn.output.3.conv.bias`; None: there is none."""
    return _translated(name, _TO_OURS)


def released_name(name: str) -> str | None:
    """The released name of one of our tensors; None: the original has no such layer, e.g. no group norm's."""
    return _translated(name, _TO_RELEASED)


_Rule = tuple[re.Pattern[str], Callable[[re.Match[str]], str]]

_PLACE = re.compile(r"\{(\w+?)(?:-(\d))?\}")


def _rule(wanted: str, given: str) -> _Rule:
    """How a layer name of the form `given` becomes one of the form `wanted`."""
    pattern = "".join(
        f"(?P<{part}>\\d+)" if i % 3 == 1 else re.escape(part)
        for i, part in enumerate(_PLACE.split(given))
        if i % 3 != 2
    )
    smaller = {name: int(by or 0) for name, by in _PLACE.findall(given)}

    def fill(match: re.Match[str]) -> str:
        return _PLACE.sub(lambda place: str(int(match[place[1]]) + smaller[place[1]] - int(place[2] or 0)), wanted)

    return re.compile(pattern), fill


_TO_OURS = [_rule(ours, released) for released, ours in LAYERS]
_TO_RELEASED = [_rule(released, ours) for released, ours in LAYERS]


def _translated(name: str, rules: list[_Rule]) -> str | None:
    layer, _, kind = name.rpartition(".")
    for pattern, fill in rules:
        if match := pattern.fullmatch(layer):
            return f"{fill(match)}.{kind}"
    return None
