"""Photo in, panoptic result out: what a program that uses UPSNet wants."""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from upsnet import builders
from upsnet.checkpoints.files import WeightFile, read_weights
from upsnet.config import Recipe, load_recipe
from upsnet.dataset.batches import collate
from upsnet.dataset.views import Views
from upsnet.engine.inference_loop import predict_batches
from upsnet.engine.precision import DTYPES, Precision
from upsnet.evaluation.coco_files import panoptic_record
from upsnet.evaluation.json_files import write_json
from upsnet.models.inference import prepare
from upsnet.models.upsnet import UPSNet
from upsnet.structures.categories import Categories
from upsnet.structures.class_tables import class_table
from upsnet.structures.errors import DataError, RecipeError
from upsnet.structures.panoptic_png import id_to_rgb
from upsnet.structures.pictures import read_photo, write_png
from upsnet.structures.results import OUTPUTS, Detections, Output, Prediction, Segment
from upsnet.visualize import draw_panoptic

logger = logging.getLogger("upsnet")

Picture = NDArray[np.uint8]
Photo = str | Path | Image.Image | Picture


@dataclass(frozen=True, slots=True)
class ResultSegment:
    """One segment of a result.

    id: its number in the map. category_id: the data set's own number of the class. score: 0..1, None for stuff.
    area: pixels. bbox: x, y, width, height in pixels.
    """

    id: int
    category_id: int
    name: str
    is_thing: bool
    score: float | None
    area: int
    bbox: tuple[int, int, int, int]


class PanopticResult:
    """The network's answer for one photo, at the photo's size. A part that was not asked for is None.

    segment_map: H×W int32, ids of `segments`, 0 = no label. instances: detections of the instance head.
    semantic_map: H×W int16, positions in `categories`.
    """

    def __init__(self, photo: Picture, prediction: Prediction, categories: Categories) -> None:
        self.photo = photo
        self.categories = categories
        self.segment_map: NDArray[np.int32] | None = prediction.segment_map
        self.instances: Detections | None = prediction.instances
        self.semantic_map: NDArray[np.int16] | None = prediction.semantic_map
        self._prediction = prediction

    @property
    def segments(self) -> list[ResultSegment]:
        """The segments of the map: stuff first, then things.

        Raises:
            DataError: the panoptic map was not asked for.
        """
        self._panoptic_map()
        return [self._describe(segment) for segment in self._prediction.segments]

    def _describe(self, segment: Segment) -> ResultSegment:
        category = self.categories[segment.semantic_id]
        return ResultSegment(
            segment.id, category.id, category.name, category.is_thing, segment.score, segment.area, segment.bbox
        )

    def _panoptic_map(self) -> NDArray[np.int32]:
        if self.segment_map is None:
            raise DataError("this result has no panoptic map: ask for it, predict(photo, outputs=('panoptic', ...))")
        return self.segment_map

    def draw(self, alpha: float = 0.5, names: bool = True) -> Picture:
        """The photo with coloured, outlined and named segments, uint8 RGB; small photos are drawn enlarged.

        Raises:
            DataError: the panoptic map was not asked for.
        """
        segments = self._prediction.segments
        return draw_panoptic(self.photo, self._panoptic_map(), segments, self.categories, alpha=alpha, names=names)

    def save(self, path: str | Path) -> None:
        """Writes `path.png` and `path.json` in the COCO panoptic format (the PNG lies beside the json).

        Raises:
            DataError: the panoptic map was not asked for.
            PlaceError: they cannot be written.
        """
        segment_map = self._panoptic_map()
        stem = Path(path)
        png = stem.with_name(f"{stem.name}.png")
        height, width = segment_map.shape
        image = {"id": 1, "file_name": self._prediction.file_name or png.name, "height": height, "width": width}
        record = panoptic_record(self._prediction, png.name, self.categories)
        write_png(png, id_to_rgb(segment_map))
        write_json(
            stem.with_name(f"{stem.name}.json"),
            {
                "images": [image],
                "annotations": [{**record, "image_id": 1}],
                "categories": self.categories.to_coco(),
            },
        )


class Predictor:
    """A network with what it takes to feed it photos.

    model: the network with its weights by their names. What predicts is a form of it that is made at the first photo,
    and anew when weights have been loaded or changed in place (not through `.data`, which nobody sees).
    """

    def __init__(
        self,
        model: UPSNet,
        categories: Categories,
        views: Views,
        precision: Precision = "fp32",
        batch_size: int = 1,
        compiled: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        self.model = model
        self.categories = categories
        self._views, self._precision, self._batch_size = views, precision, batch_size
        self._on_request = compiled, cuda_graph
        self._prepared: tuple[list[tuple[int, int]], UPSNet] | None = None

    @property
    def prepared(self) -> UPSNet:
        """What predicts: the model's weights in a form for prediction alone."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        state = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        if self._prepared is None or self._prepared[0] != state:
            self._prepared = state, prepare(self.model.eval(), DTYPES[self._precision], *self._on_request)
        return self._prepared[1]

    @overload
    def predict(self, photos: Photo, outputs: Sequence[str] = ...) -> PanopticResult: ...

    @overload
    def predict(self, photos: list[Photo], outputs: Sequence[str] = ...) -> list[PanopticResult]: ...

    def predict(
        self, photos: Photo | list[Photo], outputs: Sequence[str] = ("panoptic", "instances", "semantic")
    ) -> PanopticResult | list[PanopticResult]:
        """The panoptic result of a photo, or of each in a list.

        Only photos of equal padded sizes share a pass, so a list gives what one photo at a time gives.

        Args:
            photos: path, PIL image (both turned as EXIF says) or H×W×3 uint8 RGB array; or a list of these.
            outputs: what is wanted, of "panoptic" (the map and its segments), "instances" and "semantic"; nothing is
                computed for the others.

        Raises:
            DataError: a file is no photo, an array has another shape or type, an output is unknown.
        """
        wanted = _known_outputs(outputs)
        if isinstance(photos, list):
            return self._predict_all(photos, wanted)
        return self._predict_all([photos], wanted)[0]

    def _predict_all(self, photos: Sequence[Photo], outputs: frozenset[Output]) -> list[PanopticResult]:
        pictures = [_to_picture(photo) for photo in photos]
        names = [Path(photo).name if isinstance(photo, str | Path) else "" for photo in photos]
        groups: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
        for i, (picture, name) in enumerate(zip(pictures, names, strict=True)):
            try:
                groups[self._views.padded_sizes(*picture.shape[:2])].append(i)
            except DataError as error:
                raise DataError(f"{name}: {error}" if name else str(error)) from None
        parts = [g[k : k + self._batch_size] for g in groups.values() for k in range(0, len(g), self._batch_size)]
        batches = (collate([self._views.sample(pictures[i], i, names[i]) for i in part]) for part in parts)
        results: dict[int, PanopticResult] = {}
        for prediction in predict_batches(self.prepared, batches, self._precision, outputs):
            i = prediction.image_id
            results[i] = PanopticResult(pictures[i], prediction, self.categories)
        return [results[i] for i in range(len(pictures))]


def _known_outputs(names: Sequence[str]) -> frozenset[Output]:
    """The outputs of these names, of which there must be one at least."""
    given = [names] if isinstance(names, str) else list(names)
    known = frozenset(output for output in OUTPUTS if output in given)
    if not given or len(known) < len(set(given)):
        unknown = [name for name in given if name not in OUTPUTS]
        raise DataError(f"outputs: {unknown[0] if unknown else 'nothing'!r} is none of {', '.join(sorted(OUTPUTS))}")
    return known


def _to_picture(photo: Photo) -> Picture:
    if isinstance(photo, str | Path):
        return read_photo(Path(photo), apply_exif=True)
    if isinstance(photo, Image.Image):
        try:
            return np.asarray(ImageOps.exif_transpose(photo).convert("RGB"))
        except OSError as error:  # PIL decodes only now
            raise DataError(f"a photo cannot be decoded ({error}): copy or download it again") from error
    if not isinstance(photo, np.ndarray):
        raise DataError(f"a photo must be a path, a PIL image or an H×W×3 uint8 RGB array, not {type(photo).__name__}")
    if photo.ndim != 3 or photo.shape[2] != 3 or photo.dtype != np.uint8 or photo.size == 0:
        raise DataError(f"a photo array must be H×W×3 uint8 RGB, not {photo.dtype} of shape {photo.shape}")
    return photo


def load(
    recipe: str | Path,
    weights: str | Path | None = None,
    device: str | torch.device | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
) -> Predictor:
    """A predictor from a recipe and weights.

    Args:
        recipe: a yaml file or the bare name of a shipped recipe.
        weights: a weight file that fits. None: untrained heads, the backbone from `network.pretrained` if it is there.
        device: "cpu", "cuda", "cuda:1", …; None: CUDA where it is found.
        overrides: recipe keys, `{"test.scales": [480]}` or `["test.scales=[480]"]`.

    Raises:
        UserError: the recipe or the weights are at fault, there is no such device, or nothing tells the classes.
    """
    return load_predictor(
        load_recipe(recipe, overrides),
        None if weights is None else Path(weights),
        None if device is None else torch.device(device),
    )


@torch.inference_mode(False)  # within a caller's, tensors would not know that they were changed
def load_predictor(recipe: Recipe, weights: Path | None = None, device: torch.device | None = None) -> Predictor:
    """`load` for a recipe that is already read."""
    device = builders.choose_device(recipe, device)
    file = read_weights(weights) if weights is not None else None
    categories = _categories_of(recipe, file)
    builders.check_class_counts(recipe, categories, f"the class table of {weights or recipe.dataset.dataset}")
    network = builders.build_network(recipe, categories)
    if file is None:
        _start_untrained(recipe, network, categories)
    else:
        builders.load_trained(recipe, network, file, categories)
    network.to(device).eval()
    test = recipe.test
    return Predictor(
        network,
        categories,
        builders.test_views(recipe),
        test.precision,
        test.batch_size,
        test.compile,
        test.cuda_graph,
    )


def _start_untrained(recipe: Recipe, network: UPSNet, categories: Categories) -> None:
    pretrained = recipe.network.pretrained
    if pretrained is not None and Path(pretrained).is_file():
        builders.start_from_pretrained(recipe, network, categories)
        logger.warning("no weights given: the backbone is pretrained, what network.pretrained lacks is untrained")
    else:
        logger.warning("no weights given: the network is untrained")


def _categories_of(recipe: Recipe, file: WeightFile | None) -> Categories:
    """The class table: the one inside the weight file, the one that ships with the package, or the data set's."""
    if file is not None and file.categories is not None:
        return file.categories
    table = class_table(recipe.dataset.dataset)
    if table is not None:
        return table
    try:
        return builders.build_test_set(recipe).categories
    except DataError as error:
        raise RecipeError(
            f"nothing tells the classes: the weights hold no class table and the data set cannot be read ({error})"
        ) from error
