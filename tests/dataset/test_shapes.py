"""The `shapes` data set: format, statistics, and what colour and size must not give away."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest

from upsnet.dataset import shapes
from upsnet.dataset.shapes import shapes_categories, write_shapes
from upsnet.dataset.shapes_drawing import SILHOUETTES, TEXTURES, silhouette
from upsnet.dataset.shapes_scene import DIAMETERS, Scene, draw_scene
from upsnet.structures.errors import DataError, PlaceError
from upsnet.structures.panoptic_png import rgb_to_id

SIZE = (192, 256)
SMALL = (96, 128)


def read_rgb(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1]


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@dataclass
class Observed:
    """One segment as it is in the pixels."""

    scene: int
    kind: str
    is_thing: bool
    diameter: float
    mask: np.ndarray
    color: np.ndarray

    @property
    def area(self) -> int:
        return int(self.mask.sum())

    def touches(self, edge: np.ndarray) -> bool:
        return bool((self.mask & edge).any())


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(np.random.default_rng([5, i]), SIZE) for i in range(240)]


@pytest.fixture(scope="module")
def observed(scenes: list[Scene]) -> list[Observed]:
    found = []
    for number, scene in enumerate(scenes):
        for position, piece in enumerate(scene.pieces):
            mask = scene.labels == position
            if mask.any() and not piece.is_crowd:
                color = scene.image[mask].mean(axis=0)
                found.append(Observed(number, piece.kind, piece.kind in SILHOUETTES, piece.diameter, mask, color))
    return found


@pytest.fixture(scope="module")
def things(observed: list[Observed]) -> list[Observed]:
    return [segment for segment in observed if segment.is_thing]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("set") / "shapes"
    write_shapes(root, train=40, val=5, seed=3)
    return root


class TestFiles:
    def test_same_seed_same_bytes(self, tmp_path: Path) -> None:
        for name, seed in (("one", 1), ("two", 1), ("three", 2)):
            write_shapes(tmp_path / name, train=3, val=2, seed=seed, size=SMALL)
        one, two, three = (files_of(tmp_path / name) for name in ("one", "two", "three"))
        assert one == two
        assert one.keys() == three.keys()
        assert all(one[name] != three[name] for name in one)

    def test_training_and_validation_share_no_image(self, root: Path) -> None:
        photos = [data for name, data in files_of(root).items() if name.startswith("images")]
        assert len(set(photos)) == len(photos) == 45

    def test_an_image_depends_on_nothing_but_seed_split_and_number(self, tmp_path: Path) -> None:
        write_shapes(tmp_path / "few", train=2, val=1, seed=0, size=SMALL)
        write_shapes(tmp_path / "many", train=3, val=2, seed=0, size=SMALL)
        few, many = files_of(tmp_path / "few"), files_of(tmp_path / "many")
        assert all(many[name] == data for name, data in few.items() if not name.endswith("json"))

    @pytest.mark.parametrize(("split", "count"), [("train", 40), ("val", 5)])
    def test_records_describe_the_pixels(self, root: Path, split: str, count: int) -> None:
        document = json.loads((root / "annotations" / f"panoptic_{split}.json").read_text())
        is_thing = {record["id"]: record["isthing"] for record in document["categories"]}
        assert len(document["images"]) == len(document["annotations"]) == count
        for image, annotation in zip(document["images"], document["annotations"], strict=True):
            photo = read_rgb(root / "images" / split / image["file_name"])
            ids = rgb_to_id(read_rgb(root / "annotations" / f"panoptic_{split}" / annotation["file_name"]))
            assert annotation["image_id"] == image["id"]
            assert photo.shape[:2] == ids.shape == (image["height"], image["width"]) == SIZE
            records = annotation["segments_info"]
            assert sorted(record["id"] for record in records) == sorted(set(np.unique(ids).tolist()) - {0})
            for record in records:
                ys, xs = np.nonzero(ids == record["id"])
                box = [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
                assert (record["area"], record["bbox"]) == (len(ys), box)
                assert record["iscrowd"] <= is_thing[record["category_id"]]
            stuff = [record["category_id"] for record in records if not is_thing[record["category_id"]]]
            assert len(stuff) == len(set(stuff)) > 0

    def test_class_table(self, root: Path) -> None:
        document = json.loads((root / "annotations" / "panoptic_val.json").read_text())
        categories = shapes_categories()
        assert (categories.num_things, categories.num_stuff) == (len(SILHOUETTES), len(TEXTURES)) == (6, 6)
        assert sorted(document["categories"], key=str) == sorted(categories.to_coco(), key=str)
        assert not list(root.rglob("instances*"))

    def test_the_set_already_there_is_left_alone(self, root: Path) -> None:
        stamps = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
        write_shapes(root, train=40, val=5, seed=3)
        assert stamps == {path: path.stat().st_mtime_ns for path in root.rglob("*")}

    def test_an_empty_folder_is_filled(self, tmp_path: Path) -> None:
        write_shapes(tmp_path, train=1, val=0, seed=0, size=SMALL)
        assert len(files_of(tmp_path)) == 4

    @pytest.mark.parametrize("spoil", ["other seed", "other file", "lost photo", "a file in the way"])
    def test_another_content_is_refused(self, tmp_path: Path, spoil: str) -> None:
        out = tmp_path / "set"
        if spoil == "a file in the way":
            out.write_text("mine")
        elif spoil == "other file":
            out.mkdir()
            (out / "thesis.txt").write_text("mine")
        else:
            write_shapes(out, train=2, val=1, seed=1 if spoil == "other seed" else 0, size=SMALL)
        if spoil == "lost photo":
            next((out / "images" / "train").iterdir()).unlink()
        before = files_of(tmp_path)
        with pytest.raises(PlaceError, match="set holds something else"):
            write_shapes(out, train=2, val=1, seed=0, size=SMALL)
        assert files_of(tmp_path) == before

    @pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
    def test_an_interrupted_set_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
    ) -> None:
        def fail(rng: np.random.Generator, size: tuple[int, int]) -> Scene:
            if any(tmp_path.rglob("*.jpg")):
                raise failure
            return draw_scene(rng, size)

        monkeypatch.setattr(shapes, "draw_scene", fail)
        with pytest.raises((KeyboardInterrupt, PlaceError)):
            write_shapes(tmp_path / "set", train=3, val=1, seed=0, size=SMALL)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("wrong", [{"train": -1}, {"seed": -1}, {"size": (64, 256)}])
    def test_impossible_wishes_are_refused(self, tmp_path: Path, wrong: dict) -> None:
        with pytest.raises(DataError, match="shapes"):
            write_shapes(tmp_path / "set", **{"train": 1, "val": 1, "seed": 0, **wrong})
        assert not list(tmp_path.iterdir())


class TestStatistics:
    def test_number_of_things(self, scenes: list[Scene], things: list[Observed]) -> None:
        counts = Counter(thing.scene for thing in things)
        assert set(counts.values()) == set(range(3, 13))
        without = len(scenes) - len(counts)
        assert 0.02 < without / len(scenes) < 0.15

    def test_crowds_and_void_strips(self, scenes: list[Scene]) -> None:
        crowds = [scene for scene in scenes if any(piece.is_crowd for piece in scene.pieces)]
        voids = [np.mean(scene.labels < 0) for scene in scenes if (scene.labels < 0).any()]
        assert 0.05 < len(crowds) / len(scenes) < 0.2
        assert 0.08 < len(voids) / len(scenes) < 0.25
        assert 0.02 < min(voids) < max(voids) < 0.15
        parts = []
        for scene in crowds:
            position = next(i for i, piece in enumerate(scene.pieces) if piece.is_crowd)
            parts.append(cv2.connectedComponents((scene.labels == position).astype(np.uint8), connectivity=4)[0] - 1)
        assert min(parts) >= 2
        assert np.mean(parts) > 6

    def test_every_silhouette_has_the_area_of_its_diameter(self) -> None:
        for kind in SILHOUETTES:
            for diameter in (*DIAMETERS, 33.3):
                area = silhouette(kind, diameter, angle=0.7, stretch=1.07).sum()
                assert area == pytest.approx(np.pi / 4 * diameter**2, rel=0.025), kind

    def test_sizes_are_wide_and_the_same_for_every_class(self, things: list[Observed]) -> None:
        assert np.quantile([t.area for t in things], 0.95) > 6 * np.quantile([t.area for t in things], 0.05)
        features = {
            "diameter": [t.diameter for t in things],
            "area": [t.area for t in things],
            **{f"channel {i}": [t.color[i] for t in things] for i in range(3)},
        }
        for kind in SILHOUETTES:
            own = np.array([t.kind == kind for t in things])
            assert own.mean() > 0.7 / len(SILHOUETTES)
            for name, values in features.items():
                inside, outside = np.array(values)[own], np.array(values)[~own]
                # Equal distributions are further apart than this once in a thousand draws.
                limit = 1.95 * np.sqrt(1 / len(inside) + 1 / len(outside))
                assert distance_of_distributions(inside, outside) < limit < 0.16, (kind, name)

    def test_a_third_of_the_things_is_partly_covered(self, scenes: list[Scene], things: list[Observed]) -> None:
        edge = np.ones(SIZE, dtype=bool)
        edge[1:-1, 1:-1] = False
        void_too = [edge | (cv2.dilate((scene.labels < 0).astype(np.uint8), np.ones((3, 3))) > 0) for scene in scenes]
        inside = [t for t in things if not t.touches(void_too[t.scene])]
        seen = np.array([t.area / (np.pi / 4 * t.diameter**2) for t in inside])
        assert len(inside) > 0.7 * len(things)
        assert np.mean(seen < 0.93) >= 0.3
        assert seen.min() > 0.45

    def test_things_are_turned(self, things: list[Observed]) -> None:
        eighths = Counter()
        for bar in (t for t in things if t.kind == "bar" and t.area > 0.95 * np.pi / 4 * t.diameter**2):
            moments = cv2.moments(bar.mask.astype(np.uint8), binaryImage=True)
            angle = 0.5 * np.arctan2(2 * moments["mu11"], moments["mu20"] - moments["mu02"])
            eighths[int(angle / np.pi * 8 + 4) % 8] += 1
        assert len(eighths) == 8
        assert max(eighths.values()) < 4 * min(eighths.values())

    def test_stuff_has_its_place(self, observed: list[Observed]) -> None:
        height = {
            kind: np.array([np.nonzero(s.mask)[0].mean() / SIZE[0] for s in observed if s.kind == kind])
            for kind in TEXTURES
        }
        assert all(len(rows) > 30 for rows in height.values())
        assert height["sky"].max() < 0.35
        assert height["hills"].min() > height["sky"].mean()
        assert min(height[kind].min() for kind in ("field", "tiles", "meadow")) > 0.5
        assert all(rows.std() > 0.02 for rows in height.values())


def distance_of_distributions(one: np.ndarray, other: np.ndarray) -> float:
    """Kolmogorov and Smirnov's: the widest gap between the two cumulated distributions."""
    values = np.sort(np.concatenate([one, other]))
    return float(
        np.abs(
            np.searchsorted(np.sort(one), values, side="right") / len(one)
            - np.searchsorted(np.sort(other), values, side="right") / len(other)
        ).max()
    )


class TestShortcuts:
    """Whoever looks at colour or size alone must fail."""

    # The area of stuff depends on its place, and so it may tell something.
    @pytest.mark.parametrize(("cue", "is_thing"), [("color", True), ("area", True), ("color", False)])
    def test_nearest_neighbours_with_perfect_segments(self, observed: list[Observed], cue: str, is_thing: bool) -> None:
        segments = [segment for segment in observed if segment.is_thing == is_thing]
        features = np.array([np.atleast_1d(s.color if cue == "color" else np.log(s.area)) for s in segments])
        kinds = np.array([s.kind for s in segments])
        train = np.array([s.scene % 2 == 0 for s in segments])
        distance = np.linalg.norm(features[~train, None] - features[None, train], axis=2)
        nearest = kinds[train][np.argsort(distance, axis=1)[:, :15]]
        guesses = np.array([Counter(row).most_common(1)[0][0] for row in nearest])
        commonest = max(Counter(kinds).values()) / len(kinds)
        assert np.mean(guesses == kinds[~train]) < commonest + 0.08

    @pytest.mark.parametrize("prior", ["as it is", "equal"])
    def test_a_classifier_that_sees_only_colour_finds_no_things(self, scenes: list[Scene], prior: str) -> None:
        kinds = list(SILHOUETTES) + list(TEXTURES)
        histogram = np.ones((len(kinds), 16**3))
        for scene in scenes[:160]:
            for position, piece in enumerate(scene.pieces):
                cells = color_cells(scene.image[scene.labels == position])
                histogram[kinds.index(piece.kind)] += np.bincount(cells, minlength=16**3)
        if prior == "equal":
            histogram /= histogram.sum(axis=1, keepdims=True)
        best = histogram.argmax(axis=0)
        quality = []
        for kind in SILHOUETTES:
            truth = [true_masks(scene, kind) for scene in scenes[160:]]
            guess = [components(best[color_cells(scene.image)] == kinds.index(kind)) for scene in scenes[160:]]
            quality.append(panoptic_quality(truth, guess))
        assert np.mean(quality) <= 0.05


def color_cells(image: np.ndarray) -> np.ndarray:
    """Which of 16³ cells of the RGB cube."""
    steps = image.astype(np.int64) // 16
    return steps[..., 0] * 256 + steps[..., 1] * 16 + steps[..., 2]


def true_masks(scene: Scene, kind: str) -> list[np.ndarray]:
    wanted = [i for i, piece in enumerate(scene.pieces) if piece.kind == kind and not piece.is_crowd]
    return [scene.labels == i for i in wanted]


def components(mask: np.ndarray, smallest: int = 100) -> list[np.ndarray]:
    """Connected parts of a mask, smoothed first so that noise does not tear them."""
    smooth = cv2.medianBlur(mask.astype(np.uint8), 5)
    count, labels = cv2.connectedComponents(smooth)
    parts = [labels == i for i in range(1, count)]
    return [part for part in parts if part.sum() >= smallest]


def panoptic_quality(truth: list[list[np.ndarray]], guess: list[list[np.ndarray]]) -> float:
    """PQ of one class, 0..1, without void and crowd: sum of matched IoU over TP + FP/2 + FN/2."""
    total, matches, segments = 0.0, 0, 0
    for true_parts, guessed_parts in zip(truth, guess, strict=True):
        segments += len(true_parts) + len(guessed_parts)
        for true_part in true_parts:
            for part in guessed_parts:
                iou = (true_part & part).sum() / (true_part | part).sum()
                if iou > 0.5:
                    total, matches = total + iou, matches + 1
    assert matches <= segments / 2
    return total / (segments / 2) if segments else 0.0
