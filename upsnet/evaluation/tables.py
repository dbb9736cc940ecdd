"""The scores as text. Only here are they rounded."""

from collections.abc import Sequence
from typing import Any


def summary_tables(summary: dict[str, Any], per_class: bool = False) -> str:
    """Everything that a summary (the content of summary.json) holds, as text tables.

    Args:
        summary: `panoptic`, `boundary`, `box`, `mask`, `cityscapes`, `semantic`, as far as they were scored.
        per_class: with panoptic quality class by class.
    """
    parts = []
    if panoptic := summary.get("panoptic"):
        parts.append(panoptic_table(panoptic))
        if per_class:
            parts.append(per_class_table(panoptic))
    if boundary := summary.get("boundary"):
        parts.append(panoptic_table(boundary, "Boundary"))
    if "box" in summary or "mask" in summary:
        parts.append(ap_table(summary))
    if semantic := summary.get("semantic"):
        parts.append(semantic_table(semantic))
    return "\n\n".join(parts)


def panoptic_table(panoptic: dict[str, Any], title: str = "") -> str:
    """PQ, SQ and RQ of all classes, things and stuff; n: number of classes that occur."""
    rows = [
        [name.capitalize(), *(_number(panoptic[name][key]) for key in ("pq", "sq", "rq")), str(panoptic[name]["n"])]
        for name in ("all", "things", "stuff")
    ]
    return text_table([title, "PQ", "SQ", "RQ", "n"], rows)


def per_class_table(panoptic: dict[str, Any]) -> str:
    """PQ and counts of every class that occurs."""
    rows = []
    for row in panoptic["per_class"]:
        counts = [row[key] for key in ("tp", "fp", "fn")]
        if sum(counts):
            scores = [_number(row[key]) for key in ("pq", "sq", "rq")]
            rows.append([row["name"], "thing" if row["isthing"] else "stuff", *scores, *map(str, counts)])
    return text_table(["class", "kind", "PQ", "SQ", "RQ", "TP", "FP", "FN"], rows, left=2)


def ap_table(summary: dict[str, Any]) -> str:
    """Average precision of boxes and masks by COCO's rule and of masks by Cityscapes', as far as they are there."""
    keys = ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l")
    names = {"box": "Box", "mask": "Mask", "cityscapes": "Mask (Cityscapes)"}
    rows = [
        [name, *(_number(summary[kind].get(key)) for key in keys)] for kind, name in names.items() if kind in summary
    ]
    return text_table(["", "AP", "AP50", "AP75", "APs", "APm", "APl"], rows)


def semantic_table(semantic: dict[str, Any]) -> str:
    """Mean IoU, pixel accuracy, mean accuracy."""
    keys = ("miou", "miou_present", "aacc", "macc")
    return text_table(
        ["", "mIoU", "mIoU of classes that occur", "aAcc", "mAcc"],
        [["Semantic", *(_number(semantic[key]) for key in keys)]],
    )


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table with aligned columns, the first `left` of them to the left."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    lines = []
    for line in (header, ["-" * width for width in widths], *rows):
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
