#!/usr/bin/env bash
# All set-up in one place; see `./init.sh help`. Needs bash, Python 3.11 or newer and, the first time, the network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'TEXT'
./init.sh                 set up: .venv (or the active environment, conda's too), packages, native operators, and the
                          ResNets that recipes start from (270 MB into model/), if their sources are reached
./init.sh demo [...]      set up, then the demo: generate data, train, test, report; arguments go to `upsnet demo`
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
        setup | demo | test) shift || true ;;
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
        demo) exec "$environment/bin/upsnet" demo "$@" ;;
        test) run_tests "$@" ;;
    esac
}

# When the script is sourced (by a test), nothing is set up.
if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    main "$@"
fi
