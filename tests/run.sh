#!/bin/sh
# Runs tests (programs, shell scripts and, where there is python3, Python scripts) and adds up what they print.
# LLAMA: the program under test.
log=$(mktemp)
trap 'rm -f "$log"' EXIT


run() { # a test prints one line a test, ok, FAIL or SKIP, and exits non-zero if it failed
    echo "== $*"
    "$@" > "$log.one" 2>&1 || {
        status=$?
        grep -q '^FAIL' "$log.one" || echo "FAIL $*: exit status $status" >> "$log.one"
    }
    grep -vE '^(ok |[0-9]+ passed)' "$log.one"
    grep -cE '^ok ' "$log.one" | sed 's/$/ ok/'
    cat "$log.one" >> "$log"
    rm -f "$log.one"
}

for test in "$@"; do
    case $test in
    *.sh) run sh "$test" ;;
    *.py)
        if command -v python3 > /dev/null 2>&1; then run python3 "$test"; else
            echo "SKIP $test: no python3" | tee -a "$log"
        fi
        ;;
    *) run "$test" ;;
    esac
done

passed=$(grep -cE '^ok ' "$log")
failed=$(grep -cE '^FAIL' "$log")
skipped=$(grep -cE '^SKIP' "$log")
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
