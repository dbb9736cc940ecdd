"""The index of all 118,287 COCO training images must stay well under 1 GB."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.miniature import CATEGORIES
from upsnet.dataset.index import index_panoptic
from upsnet.dataset.instance_index import read_instances

COCO_IMAGES, SEGMENTS, INSTANCES, CORNERS = 118_287, 11, 7, 25
"""As in COCO train2017: about 11 segments and 7.3 instances an image, 25 corners an instance."""


def write_jsons(folder, images):
    """A panoptic and an instances json like COCO's, written piece by piece."""
    draws = np.random.default_rng(0)
    corners = [draws.uniform(0, 640, 2 * CORNERS).round(2).tolist() for _ in range(50)]
    with open(folder / "panoptic.json", "w") as panoptic, open(folder / "instances.json", "w") as instances:
        sizes = '"height": 480, "width": 640'
        photos = ",".join(f'{{"id": {i}, "file_name": "{i:012d}.jpg", {sizes}}}' for i in range(images))
        panoptic.write(f'{{"images": [{photos}], "categories": {json.dumps(CATEGORIES)}, "annotations": [')
        instances.write('{"annotations": [')
        for i in range(images):
            comma = "," if i else ""
            records = [
                {
                    "id": k * 4321 + i + 1,
                    "category_id": (7, 90, 12)[k % 3],
                    "iscrowd": 0,
                    "bbox": [1, 2, 30, 40],
                    "area": 9,
                }
                for k in range(SEGMENTS)
            ]
            annotation = {"image_id": i, "file_name": f"{i:012d}.png", "segments_info": records}
            panoptic.write(comma + json.dumps(annotation))
            for k in range(INSTANCES):
                record = {"id": i * INSTANCES + k, "image_id": i, "category_id": 90, "area": 99.5, "iscrowd": 0}
                record |= {"bbox": [1.5, 2, 30, 40], "segmentation": [corners[(i + k) % 50]]}
                instances.write((comma or ("," if k else "")) + json.dumps(record))
        panoptic.write("]}")
        instances.write("]}")


def test_bytes_per_image(tmp_path):
    images = 2000
    write_jsons(tmp_path, images)
    categories, index = index_panoptic(tmp_path / "panoptic.json")
    instances = read_instances(tmp_path / "instances.json", categories, index)
    assert len(index.segment_ids) == images * SEGMENTS and len(instances.ids) == images * INSTANCES
    assert len(instances.corners) == images * INSTANCES * CORNERS * 2
    per_image = (index.nbytes + instances.nbytes) / images
    assert per_image > INSTANCES * CORNERS * 2 * 8, "nbytes counts the polygons"
    assert per_image * COCO_IMAGES < 0.5e9


MEASURE = """
import resource, sys
from pathlib import Path
from upsnet.dataset.index import index_panoptic
from upsnet.dataset.instance_index import read_instances
folder = Path(sys.argv[1])
used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = used()
categories, index = index_panoptic(folder / "panoptic.json")
instances = read_instances(folder / "instances.json", categories, index)
print(index.nbytes + instances.nbytes, used() - before)
"""


@pytest.mark.slow
def test_all_of_coco_while_it_is_read(tmp_path):
    """The highest memory while reading, not only what is left."""
    write_jsons(tmp_path, COCO_IMAGES)
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    kept, peak = (int(number) for number in done.stdout.split())
    print(f"index {kept / 1e6:.0f} MB, highest while reading {peak / 1e6:.0f} MB")
    assert kept < 0.5e9 and peak < 1e9
