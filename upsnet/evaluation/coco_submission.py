"""Stored results as COCO's evaluation servers want them: an archive for each task (cocodataset.org, "Upload").

* panoptic_<set>_<name>_results.zip: a json and the folder of its PNGs, both named like the archive.
* bbox/detections_<set>_<name>_results.zip, segm/detections_<set>_<name>_results.zip: a json named like the archive.
  Boxes and masks go to two servers that want the same name, hence the folders.
"""

import re
import zipfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from tqdm import tqdm

from upsnet.evaluation.detection_files import DETECTION_KINDS, detection_file
from upsnet.evaluation.json_files import read_json
from upsnet.structures.errors import DataError
from upsnet.structures.places import replacing
from upsnet.structures.results import Prediction


def write_coco_submission(
    results: Path, predictions: Iterable[Prediction], image_set: str, name: str, out: Path
) -> list[Path]:
    """Packs a result folder; the archives get their names when all are whole.

    Args:
        results: the folder.
        predictions: what is stored in it, a prediction for each photo of the set: read once before anything is packed.
        image_set: e.g. test-dev2017.
        name: of the method.
        out: folder of the archives.

    Returns:
        The archives of the panoptic, the box and the mask server.

    Raises:
        DataError: the results are damaged or lack a part, or the name has neither letters nor digits.
        PlaceError: a file cannot be read or written, or the disk is full.
    """
    # Underscores separate the parts of such a name.
    word = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
    if not word:
        raise DataError(f"'{name}' cannot name a submission: give a name with letters (a to z) or digits")
    for prediction in predictions:
        _check(prediction, results)
    panoptic, detections = (f"{task}_{image_set}_{word}_results" for task in ("panoptic", "detections"))
    pngs = [record["file_name"] for record in read_json(results / "panoptic.json")["annotations"]]
    contents = {
        out / f"{panoptic}.zip": {
            f"{panoptic}.json": results / "panoptic.json",
            **{f"{panoptic}/{png}": results / "panoptic" / png for png in pngs},
        }
    }
    for kind in DETECTION_KINDS:
        contents[out / kind / f"{detections}.zip"] = {f"{detections}.json": detection_file(results, kind)}
    with ExitStack() as stack:
        for target, members in contents.items():
            part = stack.enter_context(replacing(target))
            with zipfile.ZipFile(part, "w", strict_timestamps=False) as archive:
                for member, path in tqdm(members.items(), target.name, unit="file", disable=len(members) == 1):
                    # PNGs are compressed already.
                    archive.write(path, member, zipfile.ZIP_STORED if path.suffix == ".png" else zipfile.ZIP_DEFLATED)
    return list(contents)


def _check(prediction: Prediction, results: Path) -> None:
    """Refuses what a server would stumble over."""
    image = f"{results}: image {prediction.image_id}"
    if prediction.segment_map is None or prediction.instances is None:
        raise DataError(f"{image}: panoptic map or instances are missing: a submission needs both: run the test again")
    drawn, recorded = np.unique(prediction.segment_map), [segment.id for segment in prediction.segments]
    if drawn[drawn > 0].tolist() != sorted(recorded):
        raise DataError(f"{image}: PNG and panoptic.json hold other segment ids: run the test again")
