#!/usr/bin/env bash
# Checks a Cityscapes tree and makes it ready; see `./init_cityscapes.sh --help`. Needs what ./init.sh sets up.
set -euo pipefail

usage() {
    cat <<'TEXT'
./init_cityscapes.sh [PATH]         checks the Cityscapes tree at PATH, default data/cityscapes, and makes it ready
./init_cityscapes.sh --help         this text
Reports what is missing or damaged and where to get it. Makes, with the official tools and from the tree alone: label
images with train ids, panoptic images and json (all where the official tools look for them), jsons for our reader (in
annotations/). What is there and whole is left as it is, official files are never changed. About half a second for each
photo and processor core, the first time. Exit code 0: ready; 2: not.

PATH is a folder or a link. Train and test need, from https://www.cityscapes-dataset.com/downloads (free of charge after
registration):
  leftImg8bit/{train,val,test}/       leftImg8bit_trainvaltest.zip (11 GB)
  gtFine/{train,val,test}/            gtFine_trainvaltest.zip (241 MB)
and, only for training with coarse labels and for the film:
  leftImg8bit/train_extra/            leftImg8bit_trainextra.zip (44 GB)
  gtCoarse/train_extra/               gtCoarse.zip (1.3 GB)
  leftImg8bit/demoVideo/              leftImg8bit_demoVideo.zip (6.6 GB)
TEXT
}

# The checkout that this script lies in; PATH is relative to where it is called from.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

main() {
    local python
    if [[ "${1:-}" == -h || "${1:-}" == --help || "${1:-}" == help ]]; then
        usage
        exit
    fi
    python="${VIRTUAL_ENV:-${CONDA_PREFIX:-$here/.venv}}/bin/python"
    if ! "$python" -c 'import cityscapesscripts, cv2, pycocotools, tqdm' 2>/dev/null; then
        echo "init_cityscapes: the packages are not installed in ${python%/bin/python}: run ./init.sh first" >&2
        exit 2
    fi
    if (($# == 0)); then
        set -- "$here/data/cityscapes"
    fi
    PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m upsnet prepare cityscapes "$@"
}

main "$@"
