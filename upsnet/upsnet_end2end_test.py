"""Tests a recipe: python upsnet/upsnet_end2end_test.py --cfg upsnet/experiments/X.yaml [--weight_path F.pth] ..."""

import sys
from pathlib import Path

# The script's own folder comes first on the path; a plain checkout needs the one above it, and only that.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from upsnet.cli import run, testing_parser  # noqa: E402

if __name__ == "__main__":
    sys.exit(run(testing_parser(Path(__file__).name)))
