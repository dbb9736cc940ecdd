"""The page: complete, self-contained, escaped, and its map under the pointer is the segment map."""

import base64
import json
import math
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from upsnet.evaluation.error_analysis import ErrorAnalysis
from upsnet.evaluation.panoptic_quality import PanopticQuality, quality_of
from upsnet.report import GalleryItem, write_report
from upsnet.report.curves import draw_curves
from upsnet.report.gallery import LONGEST_SIDE, encode_runs
from upsnet.structures.categories import Categories, Category
from upsnet.structures.errors import PlaceError
from upsnet.structures.results import Prediction, Truth, segments_of
from upsnet.structures.sample import VOID

NASTY = "</script><b>\"kite\" & 'co'</b>"
CATEGORIES = Categories(
    [
        Category(7, "grass", False, (40, 180, 60)),
        Category(9, "sky", False, (120, 190, 250)),
        Category(8, "never seen", False, (1, 2, 3)),
        Category(1, "ball", True, (220, 20, 60)),
        Category(4, NASTY, True, (250, 210, 30)),
    ]
)
GRASS, SKY, _, BALL, KITE = range(5)
VOID_TAGS = {"meta", "link", "img", "line", "circle", "polyline", "br"}


class Page(HTMLParser):
    """Checks that tags are balanced and keeps elements, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text, self.script = [], [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            self.script[self.open[-1][1].get("id", "code")] = data
        else:
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def decode(panel):
    """The obvious way back from runs to a map of ids."""
    pixels = []
    for position, length in zip(panel["runs"][::2], panel["runs"][1::2], strict=True):
        pixels += [panel["segments"][position - 1]["id"] if position else 0] * length
    return np.array(pixels).reshape(panel["height"], panel["width"])


def make_item(image_id=3, size=(60, 80), wrong_class=BALL):
    """Truth: sky, grass, ball 256, kite 70000, a crowd of balls and void. Prediction: sky, grass, one good ball, one
    bad kite (`wrong_class` there), one ball in the crowd, one invented."""
    height = size[0]
    truth = np.full(size, 1, dtype=np.int32)
    truth[height // 2 :] = 2
    truth[10:30, 10:30] = 256
    truth[10:30, 40:50] = 70000
    truth[40:50, 50:70] = 9
    truth[:, :3] = 0
    guess = np.full(size, 1, dtype=np.int32)
    guess[height // 2 :] = 2
    guess[10:30, 12:30] = 3
    guess[10:30, 40:50] = 4
    guess[42:50, 52:60] = 5
    guess[50:55, 10:20] = 6
    truth_segments = segments_of(truth, {1: SKY, 2: GRASS, 256: BALL, 70000: KITE, 9: BALL})
    next(s for s in truth_segments if s.id == 9).is_crowd = True
    guesses = {1: SKY, 2: GRASS, 3: BALL, 4: wrong_class, 5: BALL, 6: BALL}
    scores = {3: 0.91, 4: 0.6, 5: 0.55, 6: 0.5}
    labels = np.full(size, VOID, dtype=np.int16)
    return (
        np.full((*size, 3), 128, dtype=np.uint8),
        Truth(image_id, f"photo<{image_id}>.jpg", truth, truth_segments, labels),
        Prediction(image_id, f"photo<{image_id}>.jpg", guess, segments_of(guess, guesses, scores)),
    )


HISTORY = [
    {"iteration": i, "epoch": 0, "lr": 0.01, "total": 5 / i + 1, "rpn_loss": 100.0 * math.exp(-i / 20), "time": 1.7e9}
    for i in range(1, 200, 4)
] + [{"iteration": 100, "epoch": 0, "val_total": 2.5, "time": 1.7e9}]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Folder, page text, parsed page, gallery items."""
    quality, errors, items = PanopticQuality(CATEGORIES), ErrorAnalysis(CATEGORIES), []
    for image_id, wrong_class in ((3, KITE), (4, BALL)):
        photo, truth, prediction = make_item(image_id, wrong_class=wrong_class)
        matching = quality.add(prediction, truth)
        causes = errors.add(prediction, truth, matching)
        items.append(GalleryItem(photo, truth, prediction, matching, quality_of(matching), causes))
    folder = tmp_path_factory.mktemp("report") / "made" / "here"
    path = write_report(
        folder,
        title="shapes <1>",
        subtitle="two cores & no GPU",
        categories=CATEGORIES,
        summary={"panoptic": quality.summary(), "box": {"ap": 31.26}, "semantic": {"miou": 50.0}},
        error_summary=errors.summary(),
        history=HISTORY,
        gallery=items,
    )
    assert path == folder / "report.html"
    text = path.read_text("utf-8")
    return folder, text, Page(text), items


def test_needs_no_other_file_and_no_network(report):
    _, text, page, _ = report
    written = re.sub(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", "", text)
    assert len(written) < 0.5 * len(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|import\(", written, re.IGNORECASE)
    for tag, attributes in page.elements:
        for name in ("src", "href"):
            assert attributes.get(name, "data:,").startswith("data:"), tag
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) == 6
    for attributes in images:
        assert attributes["alt"]
        picture = Image.open(BytesIO(base64.b64decode(attributes["src"].split(",", 1)[1])))
        assert picture.size == (int(attributes["width"]), int(attributes["height"])) == (640, 480)


def test_pngs_beside_the_page_worst_first(report):
    folder, _, page, items = report
    names = sorted(path.name for path in (folder / "gallery").iterdir())
    worst = min(items, key=lambda item: item.quality)
    assert worst.truth.image_id == 4
    assert names == ["001_4.png", "002_3.png"]
    strip = cv2.imread(str(folder / "gallery" / names[0]))
    assert strip.shape == (480, 3 * 640 + 12, 3)
    assert page.words.index("photo<4>.jpg") < page.words.index("photo<3>.jpg")


def test_a_second_report_leaves_no_pictures_of_the_first(report, tmp_path):
    _, _, _, items = report
    write_report(tmp_path, title="t", categories=CATEGORIES, summary={}, gallery=items)
    (tmp_path / "gallery" / "mine.png").write_bytes(b"")
    write_report(tmp_path, title="t", categories=CATEGORIES, summary={}, gallery=items[:1])
    assert sorted(path.name for path in (tmp_path / "gallery").iterdir()) == ["001_3.png", "mine.png"]


def test_every_class_that_occurs_has_a_row_and_names_are_escaped(report):
    _, text, page, _ = report
    table = page.words[: page.words.index("Gallery")]
    for name in ("All", "Things", "Stuff", "grass", "sky", "ball", NASTY):
        assert name in table
    assert "never seen" not in table
    assert "neither in truth nor in predictions: 1." in table
    assert "<b>&quot;kite" not in text
    assert text.count("</script>") == 2
    assert "shapes <1>" in page.words and "two cores & no GPU" in page.words


def test_headline_and_scores(report):
    _, _, page, items = report
    quality = PanopticQuality(CATEGORIES)
    for item in items:
        quality.add(item.prediction, item.truth)
    assert f"PQ {quality.summary()['all']['pq']:.1f}" in page.words
    assert "Box AP 31.3" in page.words and "mIoU 50.0" in page.words
    assert "Mask AP" not in page.words


def test_bars_fill_the_hundred_points(report):
    _, _, page, _ = report
    stacks = [attributes["aria-label"] for tag, attributes in page.elements if attributes.get("class") == "stack"]
    assert len(stacks) == 7
    for said in stacks:
        parts = [float(value) for value in re.findall(r"[\d.]+", said)]
        assert len(parts) == 6
        assert sum(parts) == pytest.approx(100, abs=0.35)


def test_embedded_maps_are_the_segment_maps(report):
    _, _, page, items = report
    rows = json.loads(page.script["data"])
    by_quality = sorted(items, key=lambda item: item.quality)
    assert len(rows) == 2
    for row, item in zip(rows, by_quality, strict=True):
        np.testing.assert_array_equal(decode(row["truth"]), item.truth.segment_map)
        np.testing.assert_array_equal(decode(row["prediction"]), item.prediction.segment_map)


def test_what_is_told_of_each_segment(report):
    _, _, page, _ = report
    bad, good = json.loads(page.script["data"])
    told = {(side, entry["id"]): entry for side in bad for entry in bad[side]["segments"]}
    assert told["truth", 256]["verdict"] == "TP"
    assert told["truth", 256]["partner"] == 3
    assert told["prediction", 3] == {
        "id": 3, "name": "ball", "verdict": "TP", "detail": "score 0.91, IoU 0.90", "partner": 256,
    }  # fmt: skip
    assert told["truth", 70000]["verdict"] == "FN"
    assert told["truth", 70000]["name"] == NASTY
    assert told["truth", 70000]["detail"] == "confused, IoU 1.00 with ball"
    assert told["prediction", 4]["verdict"] == "FP"
    assert told["prediction", 4]["detail"] == f"score 0.60, confused, IoU 1.00 with {NASTY}"
    assert told["truth", 9]["verdict"] == told["prediction", 5]["verdict"] == "not counted"
    assert told["prediction", 6]["verdict"] == "FP"
    assert told["prediction", 6]["detail"].startswith("score 0.50, invented, IoU 0.")
    kite = next(entry for entry in good["truth"]["segments"] if entry["id"] == 70000)
    assert (kite["verdict"], kite["detail"], kite["partner"]) == ("TP", "IoU 1.00", 4)


@pytest.mark.parametrize("seed", range(10))
def test_runs_are_the_map(seed):
    draws = np.random.default_rng(seed)
    ids = [5, 70000, 2, 16777215]
    segment_map = draws.choice([0, 99, *ids], size=(7, 9)).astype(np.int32)
    if seed == 0:
        segment_map[:] = 0
    runs = encode_runs(segment_map, ids)
    panel = {"height": 7, "width": 9, "runs": runs, "segments": [{"id": i} for i in ids]}
    np.testing.assert_array_equal(decode(panel), np.where(segment_map == 99, 0, segment_map))
    assert min(runs[1::2]) > 0


def test_large_photos_are_shrunk(tmp_path):
    photo, truth, prediction = make_item()
    zoom = 20
    photo = photo.repeat(zoom, 0).repeat(zoom, 1)
    small = truth.segment_map
    truth.segment_map = small.repeat(zoom, 0).repeat(zoom, 1)
    truth.segment_map[0, 0] = 12  # vanishes when shrunk
    scores = {segment.id: segment.score for segment in prediction.segments}
    ids = {segment.id: segment.semantic_id for segment in truth.segments} | {12: KITE}
    truth.segments = segments_of(truth.segment_map, ids)
    prediction.segment_map = prediction.segment_map.repeat(zoom, 0).repeat(zoom, 1)
    ids = {segment.id: segment.semantic_id for segment in prediction.segments}
    prediction.segments = segments_of(prediction.segment_map, ids, scores)
    matching = PanopticQuality(CATEGORIES).add(prediction, truth)
    item = GalleryItem(photo, truth, prediction, matching, quality_of(matching))
    path = write_report(tmp_path, title="large", categories=CATEGORIES, summary={}, gallery=[item])
    panel = json.loads(Page(path.read_text("utf-8")).script["data"])[0]["truth"]
    assert (panel["height"], panel["width"]) == (480, LONGEST_SIDE)
    np.testing.assert_array_equal(decode(panel), small.repeat(8, 0).repeat(8, 1))
    assert path.stat().st_size < 1_000_000


def test_an_empty_report_is_a_page(tmp_path):
    path = write_report(tmp_path, title="nothing", categories=CATEGORIES, summary={})
    page = Page(path.read_text("utf-8"))
    assert "nothing" in page.words and "Gallery" not in page.words and "Curves" not in page.words


def test_scores_without_any_class_and_without_causes(tmp_path):
    summary = {"panoptic": PanopticQuality(CATEGORIES).summary(), "box": {"ap": None}}
    page = Page(write_report(tmp_path, title="t", categories=CATEGORIES, summary=summary).read_text("utf-8"))
    assert "All 0 classes – – –" in page.words
    assert "neither in truth nor in predictions: 5." in page.words


def test_curves():
    page = Page(draw_curves(HISTORY))
    names = [attributes["aria-label"].split(":")[0] for tag, attributes in page.elements if tag == "svg"]
    assert names == ["total", "rpn_loss", "lr"]
    for tag, attributes in page.elements:
        if tag == "polyline":
            points = [tuple(map(float, point.split(","))) for point in attributes["points"].split()]
            assert all(0 <= x <= 360 and 0 <= y <= 200 for x, y in points)
            assert points == sorted(points)
    assert "val" in [attributes["class"] for tag, attributes in page.elements if tag == "circle"]


def test_a_falling_loss_falls_and_wide_ranges_are_logarithmic():
    # A straight line on a logarithmic axis.
    history = [{"iteration": i, "loss": 1000.0 * 0.9**i} for i in range(100)]
    page = Page(draw_curves(history))
    line = next(a["points"] for tag, a in page.elements if tag == "polyline" and a["class"] == "train raw")
    ys = np.array([float(point.split(",")[1]) for point in line.split()])
    assert (np.diff(ys) > 0).all()
    # (apart from the last ones, which the axis cuts off: it ends where the smoothed curve ends)
    np.testing.assert_allclose(np.diff(ys)[:80], np.diff(ys)[0], atol=0.11)


@pytest.mark.parametrize(
    "history",
    [
        [],
        [{"iteration": 1, "loss": float("nan")}],
        [{"iteration": 1, "loss": None, "name": "x", "flag": True}],
        [{"loss": 1.0}],
    ],
)
def test_history_without_numbers_draws_nothing(history):
    assert draw_curves(history) == ""


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-12, 1e9, 0.5])
def test_constant_single_and_odd_curves_are_drawn(value):
    for count in (1, 2, 1000):
        history = [{"iteration": 10 * i, "loss": value, "val_<b>": value} for i in range(count)]
        page = Page(draw_curves([*history, {"iteration": 5, "loss": math.inf}]))
        assert "<b>" in page.words
        drawn = [a.get("points", a.get("cy")) for tag, a in page.elements if tag in ("polyline", "circle")]
        assert drawn and not any("nan" in text or "inf" in text for text in drawn)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PlaceError, match=re.escape(str(tmp_path / "file"))):
        write_report(tmp_path / "file", title="t", categories=CATEGORIES, summary={})


def test_templates_ship_with_the_package():
    declared = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for ending in ("html", "css", "js"):
        assert f'"report/*.{ending}"' in declared
