#!/bin/sh
# --lookup and --draft from outside: the output is, byte for byte, that of a run without, but for what JSON says of
# speculation and of time.
LLAMA=${LLAMA:-./llama}
model=model/stories.bin
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

check() { # NAME COMMAND...: ok if the command exits 0
    name=$1
    shift
    case $name in *"$ONLY"*) ;; *) return ;; esac
    if "$@" > "$work/out" 2>&1; then echo "ok $name"; else echo "FAIL $name: $(tail -n 1 "$work/out")"; failed=1; fi
}

same() { # FLAGS...: of a run on engine cpu
    $LLAMA $model --engine cpu --quiet "$@" < "$work/input" > "$work/plain" || return 1
    sed 's/"timings.*//' "$work/plain" > "$work/expected"
    for way in --lookup "--draft $model"; do
        $LLAMA $model --engine cpu --quiet "$@" $way < "$work/input" > "$work/got" || return 1
        sed 's/"timings.*//; s/"speculation": {"candidates": [0-9]*, "accepted": [0-9]*, "steps": [0-9]*, "tokens_per_step": [0-9.]*}, //' "$work/got" |
            cmp - "$work/expected" || return 1
    done
    [ -s "$work/expected" ]
}

refused() { # STATUS FRAGMENT FLAGS...: one line on standard error that has the fragment
    status=$1 fragment=$2
    shift 2
    $LLAMA $model --engine cpu "$@" > "$work/stdout" 2> "$work/stderr"
    [ $? -eq "$status" ] && [ ! -s "$work/stdout" ] && [ "$(wc -l < "$work/stderr")" -eq 1 ] && grep -qF -e "$fragment" "$work/stderr" && return
    cat "$work/stderr"
    return 1
}

saves_steps() { # of a text that repeats most; --verbose says it, and JSON
    $LLAMA $model --engine cpu -p "$repeats" -n 120 --lookup --verbose > /dev/null 2> "$work/said" &&
        grep -q -- '--lookup: [0-9]* of [0-9]* candidates were right ([0-9]* %); [0-9.]* tokens a step' "$work/said" &&
        $LLAMA $model --engine cpu -p "$repeats" -n 120 --lookup --json --quiet > "$work/json" &&
        steps=$(grep -o '"steps": [0-9]*' "$work/json" | tr -dc 0-9) && [ "$steps" -lt 100 ]
}

printf 'The king spoke.\nThe king spoke.\n' > "$work/input"
repeats="The king said to the queen: I will give you a golden ring. The king said to the queen: I will give you"
for i in 1 2 3 4 5 6 7 8; do
    printf '{"text": "%s, %d said: the king, the king, the", "n": %d, "temp": 0.%d, "seed": %d}\n{"text": "Once upon a time there were %d"}\n' "$repeats" $i $((20 + 5 * i)) $((i % 3 * 4)) $i $i
done > "$work/prompts"
check test_speculation_of_a_prompt same -p "$repeats" -n 150
check test_speculation_sampled same -p "$repeats" -n 150 --temp 0.8 -s 7
check test_speculation_with_echo_and_logprobs same -p "$repeats" -n 60 --json --echo --logprobs 3 --temp 0.3
check test_speculation_with_a_stop same -p "$repeats" -n 150 --stop "queen" --stop "ring"
check test_speculation_until_the_context_is_full same -p "$repeats" -n -1 -c 96 --ignore-eos
check test_speculation_of_prompts same --prompts "$work/prompts" -b 5 -n 40
check test_speculation_of_prompts_where_memory_is_short same --prompts "$work/prompts" -b 4 -n 60 --kv-memory 4M
check test_speculation_saves_steps saves_steps
check test_speculation_one_way refused 2 "--lookup and --draft: expected one of them" -p x --lookup --draft $model
check test_speculation_of_too_many refused 2 "expected at most 32" --prompts "$work/prompts" -b 33 --lookup
check test_speculation_draft_is_missing refused 1 "$work/none.bin" -p x --draft "$work/none.bin"
check test_speculation_beside_compare refused 2 "--lookup goes with generating text" --compare "$work/none" --lookup
exit ${failed:-0}
