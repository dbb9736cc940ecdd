"""Trains a recipe: python upsnet/upsnet_end2end_train.py --cfg upsnet/experiments/X.yaml [key=value ...]"""

import sys
from pathlib import Path

# The script's own folder comes first on the path; a plain checkout needs the one above it, and only that.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from upsnet.cli import run, training_parser  # noqa: E402

if __name__ == "__main__":
    sys.exit(run(training_parser(Path(__file__).name)))
