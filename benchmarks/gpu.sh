#!/usr/bin/env bash
# What only a CUDA machine can do, in under eight minutes: builds the native code for its GPU, runs the self-check, the
# tests marked `gpu` and the three benchmarks. Their tables land in benchmarks/results/gpu-<date>, ready to be committed.
#
#     benchmarks/gpu.sh DATA WEIGHTS
#
# DATA is in the official COCO layout, WEIGHTS a ResNet-50 in caffe's convention. Python: $PYTHON, else the active
# environment's, else that of .venv.
set -uo pipefail

if (($# != 2)); then
    echo "gpu: two arguments are wanted, a data set and a ResNet-50: benchmarks/gpu.sh DATA WEIGHTS" >&2
    exit 2
fi
data="$(realpath "$1")" weights="$(realpath "$2")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-${VIRTUAL_ENV:-${CONDA_PREFIX:-.venv}}/bin/python}"
if ! capability="$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>/dev/null)"; then
    echo "gpu: the torch of $python sees no CUDA device: run this where one is, or set PYTHON" >&2
    exit 1
fi
export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$capability}"

results="benchmarks/results/gpu-$(date +%F)"
status=0
step() {
    local start=$SECONDS
    "$python" "$@" || status=1
    echo "gpu: $1 ${2:-}: $((SECONDS - start)) s"
}
step setup.py --quiet build_ext --inplace --force  # a build for other GPUs would count as up to date
step -m upsnet.operators
step -m pytest -m gpu
step benchmarks/operators.py --device cuda --out "$results/operators.md"
for name in inference training; do
    step "benchmarks/$name.py" --data "$data" --weights "$weights" --device cuda --out "$results/$name.md"
done
exit $status
