#!/usr/bin/env bash
# Makes .venv-bench ready, for `make bench`: the peers of bench.txt on top of a ready .venv, which stays as it is. Does
# nothing when nothing changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly BASE="$PWD/.venv/bin/python" VENV="$PWD/.venv-bench" LOCK="requirements/bench.txt" LOG="build/bench-setup.log"
readonly PY="$VENV/bin/python" STAMP="$VENV/bench-ready" MIB=1200 TEMPORARY_MIB=400

unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_USER PIP_REQUIRE_VIRTUALENV VIRTUAL_ENV
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off HF_HUB_OFFLINE=1

say() { printf 'set-up  %s\n' "$*"; }

fail() {  # fail WHAT [WHAT WOULD BE RIGHT]
    printf 'set-up of the peers stopped: %s\n' "$1" >&2
    [[ -z ${2:-} ]] || printf '  %s\n' "$2" >&2
    exit 1
}

site() { "$1" -I -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

stamp() {  # what .venv-bench was made from
    readlink -f "$BASE"
    site "$BASE"
    sha256sum "$LOCK" requirements/bench.sh
}

wanted() {  # the lock without what .venv has in a version of its own: GPU builds of torch bring a triton
    local name
    while IFS= read -r line; do
        name=${line%%==*}
        [[ $name != triton ]] || ! compgen -G "$(site "$BASE")/triton-*.dist-info" > /dev/null || continue
        printf '%s\n' "$line"
    done < <(grep '^[^#]' "$LOCK")
}

main() {
    local free wanted_lock
    [[ -x $BASE ]] || fail "there is no .venv." "make setup makes it."
    if [[ -f $STAMP && $(< "$STAMP") == "$(stamp)" ]]; then
        say "nothing to do: .venv-bench is ready"
        return
    fi
    free=$(df -Pm . | awk 'NR == 2 { print $4 }')
    ((free >= MIB + TEMPORARY_MIB)) ||
        fail "too little disk: $PWD has $free MiB free, the peers need about $((MIB + TEMPORARY_MIB)) MiB." "Free some."
    mkdir -p "${LOG%/*}"
    rm -rf "$VENV"
    "$BASE" -I -m venv --without-pip "$VENV"
    site "$BASE" > "$(site "$PY")/base.pth"
    wanted_lock=$(mktemp)
    # shellcheck disable=SC2064
    trap "rm -f '$wanted_lock'" EXIT
    wanted > "$wanted_lock"
    say "installing TRL, Liger and what they need into .venv-bench; what pip says is in $LOG"
    "$PY" -m pip install --no-deps --no-compile --requirement "$wanted_lock" > "$LOG" 2>&1 ||
        fail "$(grep '^ERROR' "$LOG" | tail -1 || tail -1 "$LOG")" "All that pip said: $LOG"
    "$PY" -W ignore -c 'import liger_kernel.chunked_loss; from trl import DistillationTrainer' > "$LOG" 2>&1 ||
        fail "the peers do not import: $(tail -1 "$LOG")" "The whole message: $LOG"
    stamp > "$STAMP"
    say "ready in $SECONDS s"
}

main
