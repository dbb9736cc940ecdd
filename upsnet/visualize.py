"""Pictures of segments over their photo (coloured, outlined, named) and of a batch as the network sees it.

A class has one colour, that of the class table, in every picture and every run; the instances of a thing class are told
apart by neighbouring shades of it. Small photos are drawn larger by a whole factor, so that names can be read on them;
line widths and letters follow the size of the picture.
"""

import colorsys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from upsnet.structures.categories import Categories
from upsnet.structures.results import Segment, segments_of
from upsnet.structures.sample import VOID, Batch

Picture = NDArray[np.uint8]
Color = tuple[int, int, int]

COMFORTABLE_SIDE = 640
"""Photos whose longer side is well below this many pixels are drawn enlarged."""

# Steps of hue (of a full circle) and lightness for the 1st, 2nd, … instance of a class; the 9th starts again.
_SHADES = (
    (0.0, 0.0), (0.03, 0.12), (-0.03, -0.12), (0.05, -0.06), (-0.05, 0.07), (0.0, 0.18), (0.03, -0.17), (-0.03, 0.14)
)  # fmt: skip


def enlargement(height: int, width: int) -> int:
    """The whole factor ≥ 1 by which a photo of this size is drawn larger."""
    return max(1, round(COMFORTABLE_SIDE / max(height, width)))


def enlarge(photo: Picture, factor: int) -> Picture:
    """H×W×3 → factor·H × factor·W × 3, always a copy."""
    if factor == 1:
        return photo.copy()
    size = (photo.shape[1] * factor, photo.shape[0] * factor)
    return np.asarray(cv2.resize(photo, size, interpolation=cv2.INTER_CUBIC), dtype=np.uint8)


def segment_colors(segments: Sequence[Segment], categories: Categories) -> dict[int, Color]:
    """RGB by segment id: stuff in its class colour, things in shades of theirs, by ascending id within the class."""
    colors = {}
    drawn: Counter[int] = Counter()
    for segment in sorted(segments, key=lambda segment: segment.id):
        category = categories[segment.semantic_id]
        colors[segment.id] = category.color
        if category.is_thing:
            colors[segment.id] = shade(category.color, drawn[segment.semantic_id])
            drawn[segment.semantic_id] += 1
    return colors


def shade(color: Color, number: int) -> Color:
    """The colour of a thing class's instance 0, 1, 2, …; instance 0 has the class colour, 0..255 RGB."""
    hue_step, light_step = _SHADES[number % len(_SHADES)]
    hue, light, saturation = colorsys.rgb_to_hls(*(value / 255 for value in color))
    # Steps that would leave the visible range turn round: a class that is nearly white gets darker shades only.
    if not 0.15 <= light + light_step <= 0.85:
        light_step = -light_step
    red, green, blue = colorsys.hls_to_rgb((hue + hue_step) % 1.0, min(max(light + light_step, 0.0), 1.0), saturation)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_panoptic(
    photo: Picture,
    segment_map: NDArray[np.int32],
    segments: Sequence[Segment],
    categories: Categories,
    *,
    alpha: float = 0.5,
    names: bool = True,
) -> Picture:
    """The photo with its segments in colour, outlined (things white, stuff dark) and named.

    Pixels without a segment (id 0, or an id that `segments` does not hold) are shown grey, dark and hatched.

    Args:
        photo: H×W×3 uint8 RGB.
        segment_map: H×W ids ≥ 0.
        segments: the map's segments; their boxes say where to look for the place of a name.
        categories: the class table that the segments' semantic ids point into.
        alpha: 0 leaves the photo as it is, 1 hides it under the colours.
        names: whether to write names, with the score where there is one, largest segments first; a name that has no
            room or would cover another one is left out.

    Returns:
        k·H × k·W × 3 uint8 RGB, k = `enlargement(H, W)`: 4 for 160×120, 1 from about 430 pixels on.

    Raises:
        ValueError: photo and map differ in size.
    """
    if photo.shape[:2] != segment_map.shape:
        raise ValueError(f"the photo has size {photo.shape[:2]}, the segment map {segment_map.shape}")
    factor = enlargement(*segment_map.shape)
    picture = enlarge(photo, factor)
    if not segment_map.size:
        return picture
    index = _positions(segment_map, segments)
    if factor > 1:
        index = index.repeat(factor, axis=0).repeat(factor, axis=1)
    by_id = segment_colors(segments, categories)
    colors = np.array([(0, 0, 0), *(by_id[segment.id] for segment in segments)], dtype=np.uint8)
    is_thing = np.array([False, *(categories[segment.semantic_id].is_thing for segment in segments)])

    void = index == 0
    plain = hatched(picture)[void]
    cv2.addWeighted(picture, 1 - alpha, colors[index], alpha, 0, dst=picture)
    picture[void] = plain
    _outline(picture, index, is_thing)
    if names:
        labels = [_label_text(segment, categories) for segment in segments]
        _write_names(picture, index, segments, labels, factor)
    return picture


def draw_batch(
    batch: Batch, categories: Categories, to_photo: Callable[[Tensor], Picture], *, max_images: int = 8
) -> Picture:
    """The images of a batch as the network sees them, one row each: boxes and masks of the things | semantic map.

    Masks are those of the panoptic targets (`quarter_masks`) or, without these, the instances' own. Crowds have a grey
    box. Void is grey with rising lines, padding with falling ones. A part that the batch does not have is left out.

    Args:
        batch: B padded images with their targets.
        categories: the class table of the targets.
        to_photo: undoes the normalisation: 3×H×W float tensor → H×W×3 uint8 RGB.
        max_images: further images are left out.

    Returns:
        A picture of min(B, max_images) rows, uint8 RGB.
    """
    rows = []
    for i in range(min(len(batch), max_images)):
        photo = to_photo(batch.images[i].detach().cpu())
        panels = [_draw_things(photo, batch, i, categories)]
        if batch.semantic is not None:
            labels = np.where(batch.semantic[i].cpu().numpy() == VOID, 0, batch.semantic[i].cpu().numpy() + 1)
            segment_map = labels.astype(np.int32)
            segments = segments_of(segment_map, {k + 1: k for k in range(len(categories))})
            panels.append(draw_panoptic(photo, segment_map, segments, categories))
        for panel in panels:
            _mark_padding(panel, *batch.sizes[i], enlargement(*photo.shape[:2]))
        row = np.hstack(panels)
        rows.append(np.vstack([_caption(batch, i, row.shape[1]), row]))
    return np.vstack(rows)


def _draw_things(photo: Picture, batch: Batch, i: int, categories: Categories) -> Picture:
    """Image i of the batch with masks, boxes and names of its things."""
    factor = enlargement(*photo.shape[:2])
    picture = enlarge(photo, factor)
    if batch.instances is None:
        return picture
    instances = batch.instances[i]
    line = line_width(*picture.shape[:2])
    single = [k for k in range(len(instances)) if not instances.is_crowd[k]]
    colors: dict[int, Color] = {}
    of_class: Counter[int] = Counter()
    for position, k in enumerate(single):
        thing_class = int(instances.classes[k])
        colors[k] = shade(categories.of_thing(thing_class).color, of_class[thing_class])
        of_class[thing_class] += 1
        mask = _mask_at_network_scale(batch, i, position, k, factor)
        inside = picture[: mask.shape[0], : mask.shape[1]]
        inside[mask] = inside[mask] // 2 + np.array(colors[k], dtype=np.uint8) // 2
        contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(inside, contours, -1, (255, 255, 255), line)

    canvas = Image.fromarray(picture)
    pen = ImageDraw.Draw(canvas, "RGBA")
    plates = _Plates(canvas)
    size = max(11, round(0.8 * font_size(*picture.shape[:2])))
    boxes = (instances.boxes.cpu().numpy() * batch.scales[i] * factor).tolist()
    for k, box in enumerate(boxes):
        pen.rectangle(box, outline=(*colors.get(k, (170, 170, 170)), 255), width=2 * line)
    for k in sorted(range(len(boxes)), key=lambda k: (boxes[k][0] - boxes[k][2]) * (boxes[k][3] - boxes[k][1])):
        text = categories.of_thing(int(instances.classes[k])).name + ("" if k in colors else " (group)")
        width, height = _Plates.size_of(text, size)
        plates.write(boxes[k][0] + width / 2, boxes[k][1] - height / 2, text, size)
    return np.array(canvas)


def _mask_at_network_scale(batch: Batch, i: int, position: int, k: int, factor: int) -> NDArray[np.bool_]:
    """The mask of instance k (number `position` of those that are no crowd), `factor` times the unpadded size."""
    height, width = batch.sizes[i]
    if batch.quarter_masks is not None:
        mask = batch.quarter_masks[i][position].cpu().numpy()
    else:
        assert batch.instances is not None
        mask = batch.instances[i].masks[k].draw(*batch.original_sizes[i])
    size = (width * factor, height * factor)
    return np.asarray(cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)) > 0


def _mark_padding(panel: Picture, height: int, width: int, factor: int) -> None:
    """Hatches what lies outside the unpadded height×width."""
    padding = np.ones(panel.shape[:2], dtype=bool)
    padding[: height * factor, : width * factor] = False
    panel[padding] = hatched(np.full_like(panel, 100), rising=False)[padding]


def _caption(batch: Batch, i: int, width: int) -> Picture:
    """A strip of text over the row of image i."""
    # The font has neither × nor →.
    (height_here, width_here), (height_there, width_there) = batch.original_sizes[i], batch.sizes[i]
    text = (
        f"{batch.file_names[i]} · id {batch.image_ids[i]} · {width_here} x {height_here} as {width_there} x"
        f" {height_there}, scale {batch.scales[i]:.3g}" + (" · mirrored" if batch.flipped[i] else "")
    )
    size = max(11, min(28, width // 60))
    canvas = Image.new("RGB", (width, 2 * size), (16, 18, 24))
    ImageDraw.Draw(canvas).text((size / 2, size), text, font=font(size), fill=(235, 238, 245), anchor="lm")
    return np.array(canvas)


def hatched(picture: Picture, rising: bool = True) -> Picture:
    """The picture dark, without colour and under diagonal lines: how void (rising) and padding (falling) look."""
    height, width = picture.shape[:2]
    step = 6 * line_width(height, width)
    rows, columns = np.arange(height)[:, None], np.arange(width)[None, :]
    lines = (columns + rows if rising else columns - rows) % (2 * step) < step // 2
    gray = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) // 2
    gray[lines] = gray[lines] // 2 + 60
    return np.repeat(gray[..., None], 3, axis=2)


def line_width(height: int, width: int) -> int:
    """Pixels of an outline on a picture of this size."""
    return max(1, round((height * width) ** 0.5 / 500))


def font_size(height: int, width: int) -> int:
    """Pixels of a name's letters on a picture of this size."""
    return max(11, round((height * width) ** 0.5 / 36))


@lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own scalable font."""
    loaded = ImageFont.load_default(size)
    assert isinstance(loaded, ImageFont.FreeTypeFont)  # Pillow's wheels all carry FreeType
    return loaded


class _Plates:
    """Names in white on dark, half transparent plates that lie inside the canvas and never cover one another."""

    def __init__(self, canvas: Image.Image) -> None:
        self._pen = ImageDraw.Draw(canvas, "RGBA")
        self._width, self._height = canvas.size
        self._taken: list[tuple[float, float, float, float]] = []

    @staticmethod
    def size_of(text: str, size: int) -> tuple[float, float]:
        """Width and height of the plate of a name in letters of this size."""
        return font(size).getlength(text) + 0.6 * size, 1.3 * size

    def write(self, center_x: float, center_y: float, text: str, size: int) -> None:
        """Writes the name around this point (moved inside the canvas), unless it would touch an earlier one."""
        width, height = self.size_of(text, size)
        x1 = min(max(center_x - width / 2, 0), max(self._width - 1 - width, 0))
        y1 = min(max(center_y - height / 2, 0), max(self._height - 1 - height, 0))
        x2, y2 = x1 + width, y1 + height
        if any(x1 <= right and left <= x2 and y1 <= bottom and top <= y2 for left, top, right, bottom in self._taken):
            return
        self._taken.append((x1, y1, x2, y2))
        self._pen.rounded_rectangle((x1, y1, x2, y2), radius=height / 4, fill=(16, 18, 24, 165))
        middle = ((x1 + x2) / 2, (y1 + y2) / 2)
        self._pen.text(middle, text, font=font(size), fill=(255, 255, 255, 255), anchor="mm")


def _positions(segment_map: NDArray[np.int32], segments: Sequence[Segment]) -> NDArray[np.int32]:
    """H×W positions in `segments`, counted from 1; 0 where the map's id is 0 or unknown."""
    table = np.zeros(int(segment_map.max()) + 1, dtype=np.int32)
    for position, segment in enumerate(segments, start=1):
        if 0 < segment.id < len(table):
            table[segment.id] = position
    return np.asarray(table[segment_map])


def _outline(picture: Picture, index: NDArray[np.int32], is_thing: NDArray[np.bool_]) -> None:
    """Draws lines between segments: dark ones between stuff, white ones with dark edges around things."""
    width = line_width(*index.shape)
    things, others = np.zeros(index.shape, dtype=np.uint8), np.zeros(index.shape, dtype=np.uint8)
    thing = is_thing[index]
    ahead, behind = slice(1, None), slice(None, -1)
    for here, there in (
        ((slice(None), behind), (slice(None), ahead)),
        ((behind, slice(None)), (ahead, slice(None))),
    ):
        edge = index[here] != index[there]
        at_thing = edge & (thing[here] | thing[there])
        things[here] |= at_thing
        others[here] |= edge & ~at_thing
    dark = (cv2.dilate(things, _disc(3 * width)) > 0) | (cv2.dilate(others, _disc(width)) > 0)
    picture[dark] = picture[dark] // 4
    picture[cv2.dilate(things, _disc(width)) > 0] = 255


def _disc(diameter: int) -> Picture:
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (diameter, diameter)), dtype=np.uint8)


def _label_text(segment: Segment, categories: Categories) -> str:
    name = categories[segment.semantic_id].name
    if segment.is_crowd:
        return f"{name} (group)"
    return name if segment.score is None else f"{name} {100 * segment.score:.0f}%"


@dataclass(slots=True)
class _Room:
    """A place for an upright box inside a mask: the box's centre and greatest height, in pixels of the mask."""

    x: float
    y: float
    height: float


def _largest_room(mask: NDArray[np.bool_], aspect: float, enough: float) -> _Room:
    """Room for a box with width = aspect · height: the chessboard distance to the mask's edge, columns squeezed.

    Of all places that are nearly as roomy as the best and hold a box of height `enough`, the most central one.
    """
    columns = np.arange(aspect / 2, mask.shape[1], aspect).astype(np.int64)
    if len(columns) == 0:
        return _Room(0, 0, 0)
    squeezed = np.pad(mask[:, columns], 1).astype(np.uint8)
    distance = cv2.distanceTransform(squeezed, cv2.DIST_C, 3)[1:-1, 1:-1]
    best = float(distance.max())
    ys, xs = np.nonzero(distance >= min(best, max(enough / 2, 0.6 * best)))
    middle = int(np.argmin(((xs - xs.mean()) * aspect) ** 2 + (ys - ys.mean()) ** 2))
    return _Room(float(columns[xs[middle]]) + 0.5, float(ys[middle]) + 0.5, max(0.0, 2 * best - 1))


def _write_names(
    picture: Picture, index: NDArray[np.int32], segments: Sequence[Segment], labels: Sequence[str], factor: int
) -> None:
    """Writes each label inside its segment, the largest segments first, as far as there is room."""
    height, width = index.shape
    wanted = font_size(height, width)
    canvas = Image.fromarray(picture)
    plates = _Plates(canvas)
    step = max(1, max(height, width) // 1000)  # a coarser map is enough to find a place
    coarse = index[::step, ::step]
    for position in sorted(range(len(segments)), key=lambda i: -segments[i].area):
        x, y, w, h = (value * factor // step for value in segments[position].bbox)
        mask = coarse[y : y + h + 1, x : x + w + 1] == position + 1
        if (place := _place_name(mask, labels[position], wanted, step)) is not None:
            center_x, center_y, size = place
            plates.write(center_x + x * step, center_y + y * step, labels[position], size)
    picture[:] = np.asarray(canvas)


def _place_name(mask: NDArray[np.bool_], text: str, wanted: int, step: int) -> tuple[float, float, int] | None:
    """Centre (picture pixels from the mask's corner) and letter size for a name, None if it has no room.

    Inside the segment if letters of at least 70 % of the wanted size fit; else across its thickest place, with the
    smallest letters, if the segment is at least half as large as the plate.
    """
    smallest = max(11, round(0.7 * wanted))
    plate_w, plate_h = _Plates.size_of(text, wanted)
    room = _largest_room(mask, plate_w / plate_h, plate_h / step)
    size = int(room.height * step * wanted / plate_h)
    if size >= smallest:
        return room.x * step, room.y * step, min(size, wanted)
    plate_w, plate_h = _Plates.size_of(text, smallest)
    if 2 * mask.sum() * step**2 < plate_w * plate_h:
        return None
    room = _largest_room(mask, 1.0, plate_h / step)
    return room.x * step, room.y * step, smallest
