#!/bin/sh
# Runs the built test programs, the shell tests and, where there is python3, the Python tests; adds up what they print.
# LLAMA: the program under test. BUILD: where the test programs are.
log=$(mktemp)
trap 'rm -f "$log"' EXIT


run() { # a test prints one line a test, ok, FAIL or SKIP, and exits non-zero if it failed
    echo "== $1"
    "$@" > "$log.one" 2>&1 || {
        status=$?
        grep -q '^FAIL' "$log.one" || echo "FAIL $*: exit status $status" >> "$log.one"
    }
    grep -E '^(FAIL|SKIP)' "$log.one"
    grep -cE '^ok ' "$log.one" | sed 's/$/ ok/'
    cat "$log.one" >> "$log"
    rm -f "$log.one"
}

for test in "$BUILD"/tests/test_*; do
    case $test in *.o | *.d) continue ;; esac
    run "$test"
done
for test in tests/test_*.sh; do
    [ -f "$test" ] && run sh "$test"
done
for test in tests/test_*.py; do
    [ -f "$test" ] || continue
    if command -v python3 > /dev/null 2>&1; then run python3 "$test"; else
        echo "SKIP $test: no python3" | tee -a "$log"
    fi
done

passed=$(grep -cE '^ok ' "$log")
failed=$(grep -cE '^FAIL' "$log")
skipped=$(grep -cE '^SKIP' "$log")
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
