"""A row of the gallery: photo | truth | prediction, with what the page tells about the segment under the pointer."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from upsnet.evaluation.panoptic_quality import Matching
from upsnet.report.tables import CAUSES
from upsnet.structures.categories import Categories
from upsnet.structures.pictures import encode_jpeg
from upsnet.structures.results import Prediction, Segment, Truth, segments_of
from upsnet.visualize import Picture, draw_panoptic, enlarge, enlargement

LONGEST_SIDE = 640
"""Larger photos are shrunk to this, in pixels, before they are drawn: the page stays a few megabytes."""


@dataclass(slots=True)
class GalleryItem:
    """One photo for the gallery.

    photo: H×W×3 uint8 RGB, as truth and prediction see it. quality: PQ of this photo alone, 0..1. causes: what
    `ErrorAnalysis.add` returned, the cause of each miss and invention by ("truth" | "prediction", segment id).
    """

    photo: Picture
    truth: Truth
    prediction: Prediction
    matching: Matching
    quality: float
    causes: Mapping[tuple[str, int], str] = field(default_factory=dict)


@dataclass(slots=True)
class Row:
    """A finished row: its HTML, the data of its two panels for the page's script, and the strip for the PNG."""

    image_id: int
    html: str
    panels: dict[str, Any]
    strip: Picture


def choose_images(qualities: Mapping[int, float], count: int) -> set[int]:
    """Ids of `count` images for a gallery: half of them the worst, and as many taken evenly from all others."""
    ordered = sorted(qualities, key=lambda image_id: (qualities[image_id], image_id))
    worst, rest = ordered[: count // 2], ordered[count // 2 :]
    step = max(len(rest) // (count - count // 2), 1)
    return {*worst, *rest[::-step][: count - count // 2]}


def build_row(item: GalleryItem, categories: Categories) -> Row:
    """Draws truth and prediction of one photo and describes their segments.

    Raises:
        ValueError: the prediction has no segment map.
    """
    if item.prediction.segment_map is None:
        raise ValueError(f"image {item.prediction.image_id}: the prediction has no segment map")
    photo = _shrink(item.photo)
    maps = {
        "truth": _shrink_map(item.truth.segment_map, photo),
        "prediction": _shrink_map(item.prediction.segment_map, photo),
    }
    segments = {"truth": item.truth.segments, "prediction": item.prediction.segments}
    told = _Verdicts(item, categories)
    pictures = {"photo": enlarge(photo, enlargement(*photo.shape[:2]))}
    panels = {}
    for side, segment_map in maps.items():
        drawn = _still_visible(segment_map, segments[side])
        pictures[side] = draw_panoptic(photo, segment_map, drawn, categories)
        entries = [told.of(side, segment) for segment in segments[side]]
        panels[side] = {
            "width": segment_map.shape[1],
            "height": segment_map.shape[0],
            "runs": encode_runs(segment_map, [segment.id for segment in segments[side]]),
            "segments": entries,
        }
    gap = np.full((pictures["photo"].shape[0], 6, 3), 255, dtype=np.uint8)
    strip = np.hstack([pictures["photo"], gap, pictures["truth"], gap, pictures["prediction"]])
    return Row(item.truth.image_id, _row_html(item, pictures, panels), panels, strip)


def encode_runs(segment_map: NDArray[np.int32], ids: Sequence[int]) -> list[int]:
    """The map, row after row, as position, length, position, length, …

    A position counts `ids` from 1; 0 stands for every id that `ids` does not hold.
    """
    flat = segment_map.ravel()
    starts = np.flatnonzero(np.diff(flat, prepend=flat[:1] - 1))
    lengths = np.diff(starts, append=flat.size)
    position = {segment_id: k for k, segment_id in enumerate(ids, start=1)}
    return [
        number
        for segment_id, length in zip(flat[starts].tolist(), lengths.tolist(), strict=True)
        for number in (position.get(segment_id, 0), length)
    ]


class _Verdicts:
    """What became of each segment of a photo, in words."""

    def __init__(self, item: GalleryItem, categories: Categories) -> None:
        self._categories = categories
        self._causes = item.causes
        self._matches = {("truth", match.truth.id): match for match in item.matching.matched}
        self._matches |= {("prediction", match.prediction.id): match for match in item.matching.matched}
        self._wrong = {("truth", segment.id): "FN" for segment in item.matching.missed}
        self._wrong |= {("prediction", segment.id): "FP" for segment in item.matching.invented}
        self._segment = {("truth", segment.id): segment for segment in item.truth.segments}
        self._segment |= {("prediction", segment.id): segment for segment in item.prediction.segments}
        # For every segment the one of the other side that it overlaps best.
        self._best: dict[tuple[str, int], tuple[float, int]] = {}
        for truth_id, prediction_id in item.matching.overlaps.pixels:
            if ("truth", truth_id) in self._segment and ("prediction", prediction_id) in self._segment:
                iou = item.matching.overlaps.iou(truth_id, prediction_id)
                for here, there in ((("truth", truth_id), prediction_id), (("prediction", prediction_id), truth_id)):
                    self._best[here] = max(self._best.get(here, (0.0, 0)), (iou, there))

    def of(self, side: str, segment: Segment) -> dict[str, Any]:
        """id, name, verdict (TP, FN, FP or "not counted"), detail, and the partner's id on the other side (or 0)."""
        here = (side, segment.id)
        details = [] if segment.score is None else [f"score {segment.score:.2f}"]
        partner = 0
        if here in self._matches:
            match = self._matches[here]
            verdict = "TP"
            details.append(f"IoU {match.iou:.2f}")
            partner = match.prediction.id if side == "truth" else match.truth.id
        else:
            verdict = self._wrong.get(here, "not counted")
            if segment.is_crowd:
                details.append("a group")
            elif verdict == "not counted":
                details.append("mostly without label or in a group")
            if here in self._causes:
                details.append(CAUSES[self._causes[here]].lower())
            iou, partner = self._best.get(here, (0.0, 0))
            details.append(f"IoU {iou:.2f}" + (f" with {self._name(side, partner)}" if partner else ""))
        name = self._categories[segment.semantic_id].name
        return {
            "id": segment.id,
            "name": name,
            "verdict": verdict,
            "detail": ", ".join(details),
            "partner": partner,
        }

    def _name(self, side: str, partner: int) -> str:
        other = self._segment["prediction" if side == "truth" else "truth", partner]
        return self._categories[other.semantic_id].name


def _row_html(item: GalleryItem, pictures: Mapping[str, Picture], panels: Mapping[str, Any]) -> str:
    name = escape(item.truth.file_name)
    matching = item.matching
    counts = f"{len(matching.matched)} found, {len(matching.missed)} missed, {len(matching.invented)} invented"
    figures = "".join(
        f'<figure data-side="{side}"><div class="picture"><img src="{_data_uri(picture)}" width="{picture.shape[1]}"'
        f' height="{picture.shape[0]}" alt="{side} of {name}">{"" if side == "photo" else "<canvas></canvas>"}</div>'
        f"<figcaption>{side.capitalize()}</figcaption></figure>"
        for side, picture in pictures.items()
    )
    facts = f"id {item.truth.image_id} · PQ {100 * item.quality:.1f} · {counts}"
    button = '<button type="button" class="enlarge" aria-pressed="false">Enlarge</button>'
    return (
        f'<article class="row"><h3>{name} <small>{facts}</small> {button}</h3>'
        f'<div class="panels">{figures}</div>{_segment_table(panels)}</article>'
    )


def _segment_table(panels: Mapping[str, Any]) -> str:
    """The same facts as a table, for those who cannot point."""
    rows = "".join(
        f'<tr><td>{side}</td><th scope=row>{escape(entry["name"])}</th><td><b class="{entry["verdict"][:2]}">'
        f"{entry['verdict']}</b></td><td>{escape(entry['detail'])}</td></tr>"
        for side, panel in panels.items()
        for entry in panel["segments"]
    )
    return f"<details><summary>All segments of this photo</summary><table>{rows}</table></details>"


def _data_uri(picture: Picture) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(picture, quality=84)).decode()


def _shrink(photo: Picture) -> Picture:
    height, width = photo.shape[:2]
    zoom = LONGEST_SIDE / max(height, width)
    if zoom >= 1:
        return photo
    size = (max(1, round(width * zoom)), max(1, round(height * zoom)))
    return np.asarray(cv2.resize(photo, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _shrink_map(segment_map: NDArray[np.int32], photo: Picture) -> NDArray[np.int32]:
    """The map at the size of the shrunk photo: the id in the middle of every pixel."""
    height, width = photo.shape[:2]
    rows = ((np.arange(height) + 0.5) * segment_map.shape[0] / height).astype(np.int64)
    columns = ((np.arange(width) + 0.5) * segment_map.shape[1] / width).astype(np.int64)
    return np.asarray(segment_map[np.ix_(rows, columns)])


def _still_visible(segment_map: NDArray[np.int32], segments: Sequence[Segment]) -> list[Segment]:
    """The segments with area and box in the shrunk map; those that vanished are left out."""
    by_id = {segment.id: segment for segment in segments}
    known = np.where(np.isin(segment_map, list(by_id)), segment_map, 0).astype(np.int32)
    scores = {segment.id: segment.score for segment in segments if segment.score is not None}
    found = segments_of(known, {segment.id: segment.semantic_id for segment in segments}, scores)
    for segment in found:
        segment.is_crowd = by_id[segment.id].is_crowd
    return found
