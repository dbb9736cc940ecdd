"""The three official evaluation scripts of Cityscapes, run on unpacked submissions in a process of their own.

They read environment variables on import, keep their options in module globals and write into the working directory.
Version 2.3 does not run on numpy 2.4 as it is: two things, both outside the scores, are mended from here.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

TASKS = ("pixel", "instance", "panoptic")


def official_scores(root: Path, archives: Path, folder: Path) -> dict[str, Any]:
    """What each script reports for the val split: its own json by task (`pixel`, `instance`, `panoptic`).

    The instance script knows a case in which it stops: then its part is empty.

    Args:
        root: of the data set. archives: folder with pixel.zip, instance.zip and panoptic.zip. folder: to work in.
    """
    folder.mkdir(parents=True)
    for task in TASKS:
        with zipfile.ZipFile(archives / f"{task}.zip") as archive:
            archive.extractall(folder / task)
        environment = {**os.environ, "CITYSCAPES_DATASET": str(root), "CITYSCAPES_RESULTS": str(folder / task)}
        command = [sys.executable, str(Path(__file__).resolve()), task]
        ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    return {task: json.loads((folder / f"{task}.json").read_text()) for task in TASKS}


def run_script(task: str) -> None:
    """Runs one script in this process, whose environment it reads."""
    import numpy as np

    if not hasattr(np, "in1d"):
        np.in1d = np.isin  # its old name, which the scripts still use
    sys.argv = ["script"]  # the scripts read the command line
    if task == "pixel":
        from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as pixel

        pixel.args.exportFile = os.path.abspath("pixel.json")
        pixel.main()
    elif task == "instance":
        from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as instance

        instance.args.exportFile = os.path.abspath("instance.json")
        instance.args.gtInstancesFile = os.path.abspath("gtInstances.json")  # otherwise inside the package
        instance.writeDict2JSON = write_json  # theirs does not take numpy's integers
        try:
            instance.main()
        except IndexError:  # a class of which nothing is found and every detection is forgiven
            write_json({}, instance.args.exportFile)
    else:
        from cityscapesscripts.evaluation import evalPanopticSemanticLabeling as panoptic

        sys.argv += ["--results_file", "panoptic.json"]
        panoptic.main()


def write_json(content: Any, path: str) -> None:
    Path(path).write_text(json.dumps(content, default=lambda number: number.item()))


if __name__ == "__main__":
    run_script(sys.argv[1])
