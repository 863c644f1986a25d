#!/bin/sh
# run.sh [ALONE... --] TEST...: runs tests (programs, shell scripts and, where there is python3, Python scripts) and
# adds up what they print. Those before -- run first, one after the other; the rest side by side, JOBS at a time. What
# is printed comes in the order given, each file's lines together.
# LLAMA: the program under test. JOBS: this machine's cores, at most 8. ONLY: only the tests whose name contains this.

if [ "$1" = --one ]; then # DIRECTORY TEST: runs it, leaves NAME.out, and last NAME.done with its seconds of CPU
    at=$2/$(basename "$3")
    : > "$at.out"
    case $3 in
    *.sh) sh "$3" > "$at.out" 2>&1 ;;
    *.py) python3 "$3" > "$at.out" 2>&1 ;;
    *) "$3" > "$at.out" 2>&1 ;;
    esac || {
        status=$?
        grep -q '^FAIL' "$at.out" || echo "FAIL $3: exit status $status" >> "$at.out"
    }
    times > "$at.times"
    sed -n '2s/[ms]/ /gp' "$at.times" | awk '{ printf "%.1f\n", 60 * ($1 + $3) + $2 + $4 }' > "$at.seconds"
    mv "$at.seconds" "$at.done"
    exit 0
fi

jobs=${JOBS:-$(getconf _NPROCESSORS_ONLN 2> /dev/null || echo 1)}
[ -n "${JOBS:-}" ] || [ "$jobs" -le 8 ] || jobs=8
export PYTHONDONTWRITEBYTECODE=1
alone= beside=
for test in "$@"; do
    case $test in
    --) alone=$beside beside= ;;
    *.py) if command -v python3 > /dev/null 2>&1; then beside="$beside $test"; else missing="$missing $test"; fi ;;
    *) beside="$beside $test" ;;
    esac
done

work=$(mktemp -d)
pids=
stop() {
    kill $pids 2> /dev/null
    wait
    rm -rf "$work"
}
trap 'rm -rf "$work"' EXIT
trap 'stop; exit 130' INT TERM

run() { # JOBS TESTS...
    at_once=$1
    shift
    [ $# -gt 0 ] || return
    printf '%s\n' "$@" | xargs -P "$at_once" -I '{}' sh "$0" --one "$work" '{}' &
    pids=$!
    for test in "$@"; do
        at=$work/$(basename "$test")
        while [ ! -e "$at.done" ]; do
            kill -0 $pids 2> /dev/null || [ -e "$at.done" ] || break
            sleep 0.1
        done
        [ -e "$at.done" ] || echo "FAIL $test: its run ended without a result" >> "$at.out"
        echo "== $test"
        grep -vE '^(ok |[0-9]+ passed)' "$at.out"
        echo "$(grep -cE '^ok ' "$at.out") ok, $(cat "$at.done" 2> /dev/null || echo "?") s of CPU"
        cat "$at.out" >> "$work/log"
    done
    wait $pids
}

: > "$work/log"
run 1 $alone
run "$jobs" $beside
for test in $missing; do echo "SKIP $test: no python3" | tee -a "$work/log"; done

passed=$(grep -cE '^ok ' "$work/log")
failed=$(grep -cE '^FAIL' "$work/log")
skipped=$(grep -cE '^SKIP' "$work/log")
[ -z "${ONLY:-}" ] || [ $((passed + failed)) -gt 0 ] || echo "run.sh: ONLY=$ONLY: no test that ran has this in its name" >&2
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
