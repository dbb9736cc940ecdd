"""From a recipe to the evaluators of its test."""

from pathlib import Path

from upsnet.config import Recipe
from upsnet.dataset.cityscapes import instance_id_reader
from upsnet.engine.inference_loop import SharedEvaluator
from upsnet.evaluation.cityscapes import CityscapesAP
from upsnet.evaluation.detection_files import detection_file
from upsnet.evaluation.instance_ap import InstanceAP
from upsnet.evaluation.panoptic_quality import PanopticQuality
from upsnet.evaluation.semantic_iou import SemanticIoU
from upsnet.structures.categories import Categories


def build_evaluators(recipe: Recipe, categories: Categories, folder: Path) -> dict[str, SharedEvaluator]:
    """The evaluators by the name of their part in summary.json, in the order of the printed tables.

    Args:
        folder: where the results of the test lie; the finished files in it are read when summaries are asked for.
    """
    evaluators: dict[str, SharedEvaluator] = {
        "panoptic": PanopticQuality(categories),
        "box": InstanceAP(categories, detection_file(folder, "bbox"), "bbox"),
        "mask": InstanceAP(categories, detection_file(folder, "segm"), "segm"),
        "semantic": SemanticIoU(categories),
    }
    data = recipe.dataset
    if data.dataset == "Cityscapes":
        instance_ids_of = instance_id_reader(Path(data.dataset_path), data.test_image_set)
        evaluators["cityscapes"] = CityscapesAP(categories, instance_ids_of)
    return evaluators
