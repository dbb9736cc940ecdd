"""The report: report.html, which needs no other file and no network, and PNGs of its gallery beside it."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from upsnet.report.curves import draw_curves
from upsnet.report.gallery import GalleryItem, Row, build_row
from upsnet.report.tables import number, quality_table
from upsnet.structures.categories import Categories
from upsnet.structures.pictures import write_png
from upsnet.structures.places import replacing, writing

_TEMPLATES = Path(__file__).parent


def write_report(
    folder: Path,
    *,
    title: str,
    categories: Categories,
    summary: Mapping[str, Any],
    error_summary: Mapping[str, Any] | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    gallery: Sequence[GalleryItem] = (),
    subtitle: str = "",
) -> Path:
    """Writes folder/report.html and folder/gallery/*.png.

    Args:
        folder: made if it is not there.
        title: the headline; subtitle: a line below it (recipe, weights, date, machine).
        summary: the content of results/summary.json; parts that are not there are left out of the page.
        error_summary: `ErrorAnalysis.summary()`; without it the table does not tell why quality was lost.
        history: the lines of metrics.jsonl in the order of the file.
        gallery: photos with truth and prediction; the page shows the worst first. About 0.3 MB each.

    Returns:
        The path of the page.

    Raises:
        PlaceError: the folder or a file in it cannot be written.
    """
    page = folder / "report.html"
    rows = [build_row(item, categories) for item in sorted(gallery, key=lambda item: item.quality)]
    with writing(page):
        pictures = folder / "gallery"
        pictures.mkdir(parents=True, exist_ok=True)
        for old in pictures.glob("[0-9][0-9][0-9]_*.png"):
            old.unlink()
        for position, row in enumerate(rows, start=1):
            write_png(pictures / f"{position:03d}_{row.image_id}.png", row.strip)
    html = _html(title, subtitle, categories, summary, error_summary or {}, history, rows)
    with replacing(page) as part:
        part.write_text(html, "utf-8")
    return page


def _html(
    title: str,
    subtitle: str,
    categories: Categories,
    summary: Mapping[str, Any],
    error_summary: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
) -> str:
    # "<" may not stand in a script element as it is: a name like "</script>" would end it.
    data = json.dumps([row.panels for row in rows], separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    sections = [
        ("Curves", draw_curves(history)),
        (
            "Panoptic quality, and where it is lost",
            quality_table(summary.get("panoptic") or {}, error_summary, categories),
        ),
        ("Gallery", _GALLERY_HINT + "".join(row.html for row in rows) if rows else ""),
    ]
    return Template(_read("page.html")).substitute(
        title=escape(title),
        subtitle=escape(subtitle),
        style=_read("style.css"),
        script=_read("script.js"),
        headline=_headline(summary),
        sections="".join(f"<section><h2>{name}</h2>{body}</section>" for name, body in sections if body),
        data=data,
    )


_GALLERY_HINT = (
    '<p class="hint">Worst photos first. Point at a segment (or tap it) to see its class, score, IoU and verdict: '
    "<b>TP</b> found, <b>FN</b> missed, <b>FP</b> invented. Its partner lights up on the other side. "
    "Grey and hatched: no label.</p>"
)


def _headline(summary: Mapping[str, Any]) -> str:
    """The cards with the numbers that people ask for first."""
    wanted = (
        ("PQ", ("panoptic", "all", "pq")),
        ("PQ things", ("panoptic", "things", "pq")),
        ("PQ stuff", ("panoptic", "stuff", "pq")),
        ("Box AP", ("box", "ap")),
        ("Mask AP", ("mask", "ap")),
        ("Mask AP (Cityscapes)", ("cityscapes", "ap")),
        ("mIoU", ("semantic", "miou")),
    )
    cards = []
    for label, keys in wanted:
        value: Any = summary
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            cards.append(f"<div><dt>{label}</dt><dd>{number(value)}</dd></div>")
    return f'<dl class="headline">{"".join(cards)}</dl>' if cards else ""


def _read(name: str) -> str:
    return (_TEMPLATES / name).read_text("utf-8")
