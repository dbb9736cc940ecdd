#!/usr/bin/env bash
# All set-up in one place; see `./init.sh help`. Needs bash, Python 3.11 or newer and, the first time, the network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'TEXT'
./init.sh                 set up: .venv (or the active environment, conda's too), packages, native operators, and the
                          ResNets that recipes start from (270 MB into model/), if their sources are reached
./init.sh demo [...]      set up, then the demo: generate data, train, test, report; arguments go to `upsnet demo`
./init.sh horovod         set up, then build Horovod for several workers (minutes; kept in ~/.cache/upsnet for later): with
                          Gloo for CPUs, and with NCCL for GPUs where nvcc and pip's NCCL are found
./init.sh test [...]      set up, then ruff, mypy and the quick tests; arguments go to pytest
./init.sh help            this text
Set-up takes minutes the first time and seconds afterwards. The native operators need a C++20 compiler (CXX, c++, g++
or clang++); without one torchvision's operators and numpy serve, with the same results.
TEXT
}

say() { printf '%s\n' "init: $*"; }

fail() {
    say "$*" >&2
    exit 1
}

is_suitable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local name
    for name in python3.11 python3.12 python3.13 python3 python; do
        if command -v "$name" >/dev/null && is_suitable "$name"; then
            command -v "$name"
            return
        fi
    done
    fail "no Python 3.11 or newer with the venv module found: install one (e.g. python3.11 and python3.11-venv)"
}

# Hash of files and words; changes when any of them does.
fingerprint() {
    (
        cat "$@"
        printf '%s ' "$PWD" "$(command -v "${CXX:-}" || true)" "${CUDA_HOME:-$(command -v nvcc || true)}" \
            "${TORCH_CUDA_ARCH_LIST:-}"
    ) | cksum | tr ' ' '-'
}

set_up_python() {
    local active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" unfinished=.venv/.upsnet-unfinished base
    environment="${active:-.venv}"
    python="$environment/bin/python"
    if [[ -n "$active" ]]; then
        is_suitable "$python" || fail "the active environment $active lacks Python 3.11 or newer: deactivate it"
        say "python: the active environment $active"
    elif [[ (-e .venv || -L .venv) && ! -f "$unfinished" ]]; then
        is_suitable "$python" || fail ".venv has no Python 3.11 or newer with the venv module: move it away or delete it"
        say "python: .venv is there"
    else
        base="$(find_python)"
        # The mark tells the next run that this environment may be cleared, should this run be stopped half-way.
        rm -rf .venv
        mkdir .venv
        touch "$unfinished"
        "$base" -m venv .venv || fail "$base cannot make a virtual environment, see above"
        rm "$unfinished"
        say "python: made .venv with $("$python" -V)"
    fi
}

set_up_packages() {
    local stamp="$environment/.upsnet-packages" wanted started=$SECONDS
    wanted="$(CXX='' fingerprint pyproject.toml constraints.txt)"
    if [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then
        say "packages: as in constraints.txt"
        return
    fi
    say "packages: installing torch and the others; on Linux about 3 GB to download the first time, some minutes"
    local install=("$python" -m pip install -qq --disable-pip-version-check --constraint constraints.txt)
    local advice="packages: pip failed, see above; is the network there, and 10 GB of disk?"
    "${install[@]}" setuptools wheel Cython || fail "$advice"
    # Without isolation, so that nothing is downloaded twice; the native operators are built in a step of their own.
    UPSNET_NATIVE=0 "${install[@]}" --no-build-isolation --editable '.[test]' || fail "$advice"
    printf '%s' "$wanted" >"$stamp"
    say "packages: installed as in constraints.txt, in $((SECONDS - started)) s"
}

find_compiler() {
    local name
    for name in ${CXX:-c++ g++ clang++}; do
        if echo 'int main() {}' | "$name" -x c++ -std=c++20 -fsyntax-only - 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    return 1
}

is_built() {
    compgen -G 'upsnet/operators/_native.*' >/dev/null && compgen -G 'upsnet/operators/_overlaps.*' >/dev/null
}

set_up_native() {
    local stamp=build/native-stamp log=build/native.log wanted started=$SECONDS
    if ! CXX="$(find_compiler)"; then
        rm -f upsnet/operators/_native*.so upsnet/operators/_overlaps*.so
        say "native operators: not built, no C++20 compiler works here; torchvision's serve"
        return
    fi
    export CXX
    wanted="$(fingerprint setup.py $(find lib/native lib/cython -type f | LC_ALL=C sort))"
    if is_built && [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then
        say "native operators: built before"
        return
    fi
    mkdir -p build
    rm -f upsnet/operators/_native*.so upsnet/operators/_overlaps*.so
    if "$python" setup.py --quiet build_ext --inplace --force >"$log" 2>&1 && is_built; then
        printf '%s' "$wanted" >"$stamp"
        say "native operators: built in $((SECONDS - started)) s"
    else
        say "native operators: not or not all built, the compiler's messages are in $log; torchvision's serve"
    fi
}

# Folder of CUDA's toolkit, if Horovod can be compiled for NCCL. nvcc on the path may be a wrapper, so it is asked itself.
find_cuda() {
    local top
    [[ -f "$site/nvidia/nccl/lib/libnccl.so.2" ]] || return 1
    top="$("${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" --dryrun -x cu -c /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')"
    [[ -n "$top" ]] && (cd "$top" && pwd -P)
}

# Horovod's CMake files want a CMake from 3.13 on and below 4.
find_cmake() {
    if cmake --version 2>/dev/null | grep -Eq '^cmake version 3\.(1[3-9]|[2-9][0-9])\.'; then
        command -v cmake
    else
        "$python" -m pip install -q --target "$build/cmake" 'cmake>=3.31,<4' >&2 || return 1
        echo "$build/cmake/cmake/data/bin/cmake"
    fi
}

# The folder `build` gets a wheel, for GPUs, too, where the folder of CUDA's toolkit is given. What is exported ends here.
build_horovod() (
    cuda="$1" source="$build/horovod-$horovod_version"
    rm -rf "$build"
    mkdir -p "$build/nccl/lib"
    "$python" -m pip download -q --no-deps --no-build-isolation --no-binary horovod --dest "$build" \
        "horovod==$horovod_version" && tar -xf "$source.tar.gz" -C "$build" || exit 1
    HOROVOD_CMAKE="$(find_cmake)" || exit 1
    # Horovod's CMake files ask for C++14, torch's headers want C++20: of two such options a compiler takes the last.
    compiler="$(command -v "$CXX")"
    printf '#!/bin/sh\nexec "%s" "$@" -std=c++20\n' "$compiler" >"$build/c++"
    chmod +x "$build/c++"
    if [[ -n "$cuda" ]]; then
        ln -s "$site/nvidia/nccl/include" "$build/nccl/include"
        ln -s "$site/nvidia/nccl/lib/libnccl.so.2" "$build/nccl/lib/libnccl.so"
        export HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_LINK=SHARED HOROVOD_NCCL_HOME="$build/nccl"
        export CUDA_HOME="$cuda" HOROVOD_CUDA_HOME="$cuda" CUDAHOSTCXX="$compiler" NVCC_APPEND_FLAGS=-std=c++17
        CPATH="$(printf '%s:' "$site"/nvidia/{cu*,nccl}/include)"
        export CPATH="${CPATH%:}"
    else
        # Otherwise it would want the whole toolkit where it finds nvcc.
        sed -i.before 's/print(True if ((torch.version.cuda/print(True if (False and (torch.version.cuda/' \
            "$source/cmake/Modules/FindPytorch.cmake"
    fi
    export HOROVOD_CMAKE HOROVOD_WITH_GLOO=1 HOROVOD_CPU_OPERATIONS=GLOO HOROVOD_WITHOUT_MPI=1
    export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
    CXX="$build/c++" MAKEFLAGS="-j$(getconf _NPROCESSORS_ONLN)" \
        "$python" -m pip wheel -v --no-deps --no-build-isolation --wheel-dir "$build" "$source"
)

install_horovod() {
    local install=("$python" -m pip install -qq --disable-pip-version-check --constraint constraints.txt)
    # The first line puts this very wheel in place of another one of the same version, the second what it depends on.
    "${install[@]}" --force-reinstall --no-deps "$1" && "${install[@]}" "horovod==$horovod_version" &&
        "$python" -c 'import horovod.torch'
}

# Argument: nccl or gloo; with nccl GPUs are reached where that is possible.
set_up_horovod() {
    local horovod_version=0.28.1 log=build/horovod.log build="$PWD/build/horovod" started=$SECONDS
    local stamp="$environment/.upsnet-horovod" site cuda='' kind="$1" key wheels
    site="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    if [[ $kind == nccl ]] && ! cuda="$(find_cuda)"; then
        say "horovod: nvcc or pip's NCCL is not found, so with Gloo only, for CPUs"
        kind=gloo
    fi
    key="$("$python" -c 'import sys, sysconfig, torch
print(torch.__version__, sysconfig.get_config_var("SOABI"), *sys.argv[1:], sep="_")' "$horovod_version" $kind)"
    if [[ -f "$stamp" && "$(<"$stamp")" == "$key" ]] && "$python" -c 'import horovod.torch' 2>/dev/null; then
        say "horovod: built before, with $kind"
        return
    fi
    wheels="${XDG_CACHE_HOME:-$HOME/.cache}/upsnet/wheels/$key"
    if ! compgen -G "$wheels/horovod-*.whl" >/dev/null; then
        CXX="$(find_compiler)" || fail "horovod: no C++20 compiler works here: install g++, or name one by CXX"
        say "horovod: building $horovod_version ($kind), some minutes; messages go to $log"
        mkdir -p build "$wheels"
        if ! build_horovod "$cuda" >"$log" 2>&1; then
            [[ $kind == nccl ]] || fail "horovod: not built, the messages are in $log"
            mv "$log" "${log%.log}-nccl.log"
            say "horovod: not built with NCCL, the messages are in ${log%.log}-nccl.log; so with Gloo only, for CPUs"
            set_up_horovod gloo
            return
        fi
        mv "$build"/horovod-*.whl "$wheels/"
        rm -rf "$build"
    fi
    install_horovod "$wheels"/horovod-*.whl || fail "horovod: its wheel in $wheels does not serve, see above: delete it"
    printf '%s' "$key" >"$stamp"
    say "horovod: $horovod_version with $kind installed, in $((SECONDS - started)) s; horovodrun --check-build shows it"
}

# Neither the demo nor the tests need weights, so only the plain set-up fetches them.
set_up_weights() {
    "$python" -m upsnet download-weights imagenet --if-online ||
        say "weights: not all of them are there, see above; only recipes that start from these need them"
}

run_tests() {
    local status=0
    "$python" -m ruff check . || status=1
    "$python" -m mypy || status=1
    "$python" -m pytest -m 'not slow' "$@" || status=1
    return $status
}

say_what_is_next() {
    if [[ "$environment" == .venv ]]; then
        say "next: source .venv/bin/activate; upsnet --help"
    fi
}

main() {
    local command="${1:-setup}"
    case "$command" in
        help | -h | --help)
            usage
            exit
            ;;
        setup | horovod | demo | test) shift || true ;;
        *)
            say "unknown command '$command'" >&2
            usage >&2
            exit 2
            ;;
    esac

    set_up_python
    set_up_packages
    set_up_native
    case "$command" in
        setup)
            set_up_weights
            say_what_is_next
            ;;
        horovod) set_up_horovod nccl ;;
        demo) exec "$environment/bin/upsnet" demo "$@" ;;
        test) run_tests "$@" ;;
    esac
}

# When the script is sourced (by a test), nothing is set up.
if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    main "$@"
fi
