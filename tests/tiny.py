"""The smallest recipe that goes the whole road, and commands run inside this process."""

import os
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from tests.miniature import write_miniature

RECIPE = """\
base: upsnet_resnet18_shapes
output_path: {folder}/out
model_prefix: tiny_
dataset: {{dataset_path: {folder}/data, num_workers: 0}}
network:
  {{fpn_feature_dim: 16, fcn_feature_dim: 16, rcnn_feature_dim: 32, mask_feature_dim: 16, fcn_num_layers: 1}}
train:
  {{max_iteration: 2, snapshot_step: 2, display_iter: 1, warmup_iteration: 0, optimizer: sgd, lr: 0.02, batch_size: 2,
   scales: [48], max_size: 64, rpn_pre_nms_top_n: 50, rpn_post_nms_top_n: 20, batch_rois: 16, eval_data: false}}
test:
  {{scales: [48], max_size: 64, batch_size: 2, score_thresh: 0.0, panoptic_score_thresh: 0.0, max_det: 10,
   panoptic_stuff_area_limit: 0}}
"""


def write_tiny(folder: Path) -> Path:
    """Writes data/ (six training and six test images) and tiny.yaml, whose outputs go to out/; returns the yaml."""
    write_miniature(folder / "data", "train")
    write_miniature(folder / "data", "val", seed=1)
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE.format(folder=folder))
    return recipe


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines of standard error that are the program's own complaint."""
        return [line for line in re.split(r"[\r\n]+", self.err) if re.match(r"upsnet\S*( \w+)?: error: ", line)]


def upsnet(*arguments: object) -> Ran:
    """Runs the command `upsnet` in this process."""
    from upsnet.cli import main

    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
    return Ran(code, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class TinyRun:
    """A tiny recipe that was trained and tested; tests leave its files as they are."""

    folder: Path
    recipe: Path
    trained: Ran
    tested: Ran

    @property
    def weights(self) -> Path:
        return self.folder / "out" / "tiny" / "train" / "tiny_2.pth"

    @property
    def results(self) -> Path:
        return self.folder / "out" / "tiny" / "val" / "results"


def run_once(folder: Path) -> TinyRun:
    """Trains (with a snapshot and a validation after the first of two steps) and tests."""
    recipe = write_tiny(folder)
    trained = upsnet("train", "--cfg", recipe, "train.snapshot_step=1", "train.eval_data=true")
    return TinyRun(folder, recipe, trained, upsnet("test", "--cfg", recipe))


def copy_run(run: TinyRun, folder: Path) -> Path:
    """A copy of a finished run that a test may change; returns its recipe."""
    # Snapshots are replaced, never written to, so they can be shared.
    shutil.copytree(run.folder, folder, dirs_exist_ok=True, copy_function=_link_or_copy)
    recipe = folder / run.recipe.name
    recipe.write_text(recipe.read_text().replace(str(run.folder), str(folder)))
    return recipe


def _link_or_copy(source: str, target: str) -> None:
    (os.link if source.endswith(".pth") else shutil.copy2)(source, target)
