#!/usr/bin/env bash
# What `make test` and `make lint` run: run.sh lint [tests [pytest argument ...]]. Goes on after a failure, and fails at
# the end if anything failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
readonly BIN=.venv/bin
failed=() lines=()

step() {  # step NAME COMMAND...
    local name=$1 start=$SECONDS result=ok
    shift
    echo "== $name"
    "$@" || { result=FAILED && failed+=("$name"); }
    lines+=("$(printf '%-18s %-7s %4d s' "$name" "$result" "$((SECONDS - start))")")
}

[[ ${1:-} == lint ]] || { echo "usage: tests/run.sh lint [tests [pytest argument ...]]" >&2; exit 2; }
shift
step "ruff check" "$BIN/ruff" check .
step "ruff format" "$BIN/ruff" format --check .
step "import contracts" "$BIN/lint-imports"
step "mypy" "$BIN/mypy"
if [[ ${1:-} == tests ]]; then
    shift
    if (($#)); then
        step "pytest" "$BIN/python" -m pytest --durations=15 "$@"
    else  # side by side: whole runs wait for their processes to start half of the time
        log=$(mktemp)
        "$BIN/python" -m pytest -m "not long" --durations=20 tests/unit tests/integration >"$log" 2>&1 &
        others=$!
        step "pytest, runs" "$BIN/python" -m pytest -m "not long" --durations=20 tests/system
        step "pytest, others" wait "$others"
        cat "$log" && rm "$log"
    fi
fi

printf '%s\n' "" "${lines[@]}"
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}"
    exit 1
fi
