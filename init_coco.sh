#!/usr/bin/env bash
# Checks a COCO tree; see `./init_coco.sh --help`. Needs what ./init.sh sets up.
set -euo pipefail

usage() {
    cat <<'TEXT'
./init_coco.sh [PATH] [--deep]      checks the COCO tree at PATH, default data/coco
./init_coco.sh --help               this text
Reports what is missing or wrong (files against jsons both ways, sizes, ids) and where to get it. Nothing is downloaded
or changed; indexes of the large jsons are kept in PATH/.upsnet_index, for faster starts (UPSNET_INDEX=DIR: elsewhere,
UPSNET_INDEX=0: nowhere); that folder may be deleted at any time. With --deep every photo and label is decoded too,
which takes about half an hour. Exit code 0: ready; 2: not.

PATH is a folder or a link. Train and test need, all from http://images.cocodataset.org:
  images/train2017/          zips/train2017.zip (18 GB)
  images/val2017/            zips/val2017.zip (1 GB)
  annotations/instances_{train,val}2017.json       annotations/annotations_trainval2017.zip
  annotations/panoptic_{train,val}2017.json        annotations/panoptic_annotations_trainval2017.zip
  annotations/panoptic_{train,val}2017/            the two zips inside of that one
and, only for results that the evaluation server scores:
  images/test2017/           zips/test2017.zip (6 GB)
  annotations/image_info_test{,-dev}2017.json      annotations/image_info_test2017.zip
TEXT
}

# The checkout that this script lies in; PATH is relative to where it is called from.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

main() {
    local python word path="$here/data/coco"
    for word in "$@"; do
        case "$word" in
            -h | --help | help)
                usage
                exit
                ;;
            -*) ;;
            *) path="" ;; # it is among the arguments
        esac
    done
    python="${VIRTUAL_ENV:-${CONDA_PREFIX:-$here/.venv}}/bin/python"
    if ! "$python" -c 'import cv2, pycocotools, tqdm' 2>/dev/null; then
        echo "init_coco: the packages are not installed in ${python%/bin/python}: run ./init.sh first" >&2
        exit 2
    fi
    PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m upsnet prepare coco ${path:+"$path"} "$@"
}

main "$@"
