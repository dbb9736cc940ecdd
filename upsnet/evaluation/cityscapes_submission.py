"""Results as Cityscapes' evaluation server wants them: an archive for each of its three tasks, with label ids.

* pixel.zip: <stem>.png, 8-bit label ids, 0 where there is no class.
* instance.zip: <stem>.txt with a line "path of its mask, label id, score" for each detection; masks: PNGs of 0 and 255.
* panoptic.zip: cityscapes_panoptic_<split>.json and its PNGs in the folder of that name (COCO panoptic format).

<stem> is <city>_<sequence>_<frame>: how the server and its public scripts find an image.
"""

import json
import zipfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from upsnet.evaluation.coco_files import panoptic_record
from upsnet.structures.categories import Categories
from upsnet.structures.errors import DataError
from upsnet.structures.panoptic_png import id_to_rgb
from upsnet.structures.pictures import encode_png
from upsnet.structures.places import replacing
from upsnet.structures.results import Detections, Prediction

TASKS = ("pixel", "instance", "panoptic")


def write_cityscapes_submission(
    predictions: Iterable[Prediction], categories: Categories, split: str, out: Path
) -> list[Path]:
    """Writes the three archives; they get their names when all are whole.

    Args:
        predictions: of all photos of the split, with all three parts.
        categories: their ids are Cityscapes' label ids.
        split: val or test.
        out: folder of the archives.

    Raises:
        DataError: a prediction lacks a part.
        PlaceError: the folder cannot be written or the disk is full.
    """
    targets = [out / f"{task}.zip" for task in TASKS]
    label_ids = np.array(
        [category.id for category in categories] + [0], dtype=np.uint8
    )  # the last one is that of VOID, -1
    name, records = f"cityscapes_panoptic_{split}", []
    with ExitStack() as stack:
        pixel, instance, panoptic = (
            # PNGs are compressed already.
            stack.enter_context(zipfile.ZipFile(stack.enter_context(replacing(target)), "w", zipfile.ZIP_STORED))
            for target in targets
        )
        for prediction in predictions:
            if prediction.semantic_map is None or prediction.instances is None or prediction.segment_map is None:
                raise DataError(
                    f"image {prediction.image_id}: a submission needs panoptic map, semantic map and instances, "
                    f"and one is missing: run the test again"
                )
            stem = Path(prediction.file_name).stem.removesuffix("_leftImg8bit")
            pixel.writestr(f"{stem}.png", encode_png(label_ids[prediction.semantic_map]))
            _write_instances(instance, stem, prediction.instances, categories)
            png_name = f"{stem}_panoptic.png"
            panoptic.writestr(f"{name}/{png_name}", encode_png(id_to_rgb(prediction.segment_map)))
            records.append({**panoptic_record(prediction, png_name, categories), "image_id": stem})
        panoptic.writestr(f"{name}.json", json.dumps({"annotations": records}), zipfile.ZIP_DEFLATED)
    return targets


def _write_instances(archive: zipfile.ZipFile, stem: str, found: Detections, categories: Categories) -> None:
    lines = []
    for i, (thing_class, score, rle) in enumerate(
        zip(found.classes.tolist(), found.scores.tolist(), found.masks, strict=True)
    ):
        mask = f"masks/{stem}_{i:03d}.png"
        archive.writestr(mask, encode_png(coco_mask.decode(rle) * np.uint8(255)))
        lines.append(f"{mask} {categories.of_thing(thing_class).id} {score!r}\n")
    archive.writestr(f"{stem}.txt", "".join(lines))
