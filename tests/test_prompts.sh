#!/bin/sh
# --prompts: a line out for each line in, in order, with the tokens that each prompt gives alone.
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

run() {
    $LLAMA "$model" --engine cpu --quiet "$@"
}

# A byte-order mark, white space, an empty line, Windows line ends, ids, and a last line without its end.
printf '\357\273\277{"text": "Once upon a time"}\r\n\n  \n{"ids": [8181, 668, 258]}\n{"text": "The \\"king\\"\\n"}' > "$work/prompts"

lines_equal_single_runs() {
    run -p "Once upon a time" -n 20 --json > "$work/single" &&
        run --ids -p "8181 668 258" -n 20 --json >> "$work/single" &&
        printf 'The "king"\n' > "$work/text" && run -f "$work/text" -n 20 --json >> "$work/single" || return 1
    sed 's/"index": [0-9]*, //; s/"timings.*//' "$work/single" > "$work/expected"
    for b in 1 2 3 64; do
        run --prompts "$work/prompts" -b $b -n 20 > "$work/batch" || return 1
        sed 's/"index": [0-9]*, //; s/"timings.*//' "$work/batch" | cmp - "$work/expected" || return 1
        grep -o '"index": [0-9]*' "$work/batch" | tr '\n' ' ' | grep -qx '"index": 0 "index": 1 "index": 2 ' || return 1
    done
}

refused() { # FRAGMENT CONTENT: exit 1, one line with the fragment, nothing on standard output
    printf '%b' "$2" > "$work/bad"
    run --prompts "$work/bad" -n 2 > "$work/stdout" 2> "$work/stderr"
    status=$?
    [ $status -eq 1 ] && [ ! -s "$work/stdout" ] && [ "$(wc -l < "$work/stderr")" -eq 1 ] && grep -qF "$1" "$work/stderr" && return
    echo "exit status $status: $(cat "$work/stderr")"
    return 1
}

# 455 is what the story model says first: as an end id it is the only token, and the first.
end_id_first() {
    LC_ALL=C sed 's/8182,8189,8190/8182,8189,0455/' $model > "$work/model.bin"
    model=$work/model.bin run -p "Once upon a time" --json > "$work/json" || return 1
    model=model/stories.bin
    cat "$work/json"
    grep -q '"ids": \[455\], "text": "", "finish_reason": "stop"' "$work/json" && ! grep -q 'ms": -' "$work/json" &&
        grep -q '"decode_ms": 0.0' "$work/json"
}

blank_lines() {
    { head -c 1000 /dev/zero | tr '\0' '\n' && echo '{"text": "a"}'; } > "$work/blank"
    run --prompts "$work/blank" -n 1 > "$work/json" && [ "$(wc -l < "$work/json")" -eq 1 ]
}

check test_prompts_lines_equal_single_runs lines_equal_single_runs
check test_prompts_bad_json_names_file_and_line refused "bad:2: bad JSON" '{"text": "a"}\n{"text": 1}\n'
check test_prompts_unknown_key_is_refused refused 'bad:1: key "prompt", expected "text", "ids" or "messages"' '{"prompt": "a"}\n'
check test_prompts_id_beyond_the_vocabulary refused "bad:1: id 8192, expected below 8192" '{"ids": [1, 8192]}\n'
check test_prompts_messages_without_a_chat_format refused "bad:2: messages: this model has no chat format" \
    '{"text": "a"}\n{"messages": [{"role": "user", "content": "a"}]}\n'
check test_prompts_empty_ids refused "prompt 1 is empty" '{"text": "a"}\n{"ids": []}\n'
check test_prompts_empty_file refused "no prompts" '\n\n'
check test_prompts_end_id_first_has_timings end_id_first
check test_prompts_blank_lines_are_skipped blank_lines
exit ${failed:-0}
