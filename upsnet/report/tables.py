"""The table of panoptic quality: for every class the 100 points, gained and lost."""

from collections.abc import Mapping
from html import escape
from typing import Any

from upsnet.structures.categories import Categories

CAUSES = {
    "missed": "Missed",
    "invented": "Invented",
    "badly_outlined": "Badly outlined",
    "confused": "Confused",
    "imprecise": "Imprecise",
}
"""Keys of `ErrorAnalysis.summary()` and their names on the page."""

_MEANINGS = {
    "missed": "there, but nothing was found",
    "invented": "found, but nothing is there",
    "badly_outlined": "right class and place, but IoU of at most 0.5",
    "confused": "right outline, but the wrong class",
    "imprecise": "found: what their IoU lacks to 1",
}


def number(value: float | None) -> str:
    """A score with one decimal; a dash where there is none."""
    return "–" if value is None else f"{value:.1f}"


def quality_table(panoptic: Mapping[str, Any], error_summary: Mapping[str, Any], categories: Categories) -> str:
    """HTML of the legend and the table: All, Things, Stuff, then every class that occurs; "" without any score.

    Args:
        panoptic: `PanopticQuality.summary()`. error_summary: `ErrorAnalysis.summary()` or {}.
    """
    if not panoptic:
        return ""
    lost_of_class = {row["category_id"]: row for row in error_summary.get("per_class", ())}
    colors = {category.id: category.color for category in categories}
    rows = []
    for key, name in (("all", "All"), ("things", "Things"), ("stuff", "Stuff")):
        group = panoptic.get(key) or {}
        label = f"{name} <small>{group.get('n', 0)} classes</small>"
        rows.append(_row(label, "", group, error_summary.get(key) or {}, "", " class=group"))
    present = [row for row in panoptic.get("per_class", ()) if row["tp"] + row["fp"] + row["fn"]]
    for row in present:
        errors = lost_of_class.get(row["category_id"], {})
        red, green, blue = colors.get(row["category_id"], (128, 128, 128))
        label = f'<i class="swatch" style="background:rgb({red},{green},{blue})"></i>{escape(row["name"])}'
        counts = f"{row['tp']} / {row['fp']} / {row['fn']}"
        others = ", ".join(
            f"{escape(other['name'])} ×{other['count']}" for other in errors.get("confused_with", ())[:2]
        )
        kind = f"<small>{'thing' if row['isthing'] else 'stuff'}</small>"
        rows.append(_row(f"{label} {kind}", counts, row, errors.get("lost", {}), others, ""))
    absent = len(panoptic.get("per_class", ())) - len(present)
    note = f"<p class=hint>Classes that occur neither in truth nor in predictions: {absent}.</p>" if absent else ""
    head = "".join(
        f'<th scope=col aria-sort=none><button type=button title="sort by this column">{name}</button></th>'
        for name in ("Class", "PQ", "SQ", "RQ")
    )
    causes = "".join(
        f'<th scope=col aria-sort=none><button type=button title="{_MEANINGS[key]}">{name}</button></th>'
        for key, name in CAUSES.items()
    )
    return (
        f"{_legend()}<div class=scroll><table class=quality><thead><tr>{head}<th scope=col>Where the 100 points go</th>"
        f"{causes}<th scope=col>TP / FP / FN</th><th scope=col>Confused with</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>{note}"
    )


def _row(label: str, counts: str, scores: Mapping[str, Any], lost: Mapping[str, float], others: str, mark: str) -> str:
    """One row; `label` and `others` are HTML."""
    figures = "".join(f"<td>{number(scores.get(key))}</td>" for key in ("pq", "sq", "rq"))
    causes = "".join(f"<td>{number(lost[key])}</td>" if lost.get(key) else "<td class=none>–</td>" for key in CAUSES)
    return (
        f"<tr{mark}><th scope=row>{label}</th>{figures}<td class=bar>{_bar(scores.get('pq'), lost)}</td>{causes}"
        f'<td class=counts>{counts}</td><td class=others title="{others}">{others}</td></tr>'
    )


def _bar(quality: float | None, lost: Mapping[str, float]) -> str:
    if quality is None:
        return ""
    parts = [("pq", "PQ", quality), *((key, name, lost.get(key, 0.0)) for key, name in CAUSES.items())]
    said = ", ".join(f"{name} {number(value)}" for _, name, value in parts)
    pieces = "".join(
        f'<i class="{key}" style="width:{value:.2f}%" title="{name} {number(value)}"></i>'
        for key, name, value in parts
        if value > 0
    )
    return f'<div class=stack role=img aria-label="{said}">{pieces}</div>'


def _legend() -> str:
    entries = "".join(f'<li><i class="{key}"></i>{name}: {_MEANINGS[key]}</li>' for key, name in CAUSES.items())
    return f'<ul class="legend"><li><i class="pq"></i>PQ</li>{entries}</ul>'
