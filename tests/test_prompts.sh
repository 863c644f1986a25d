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
        printf 'The "king"\n\n' > "$work/text" && run -f "$work/text" -n 20 --json >> "$work/single" || return 1
    sed 's/"index": [0-9]*, //; s/"timings.*//' "$work/single" > "$work/expected"
    for b in 1 2 3 64; do
        run --prompts "$work/prompts" -b $b -n 20 > "$work/batch" || return 1
        sed 's/"index": [0-9]*, //; s/"timings.*//' "$work/batch" | cmp - "$work/expected" || return 1
        grep -o '"index": [0-9]*' "$work/batch" | tr '\n' ' ' | grep -qx '"index": 0 "index": 1 "index": 2 ' || return 1
    done
}

refused() { # FRAGMENT CONTENT [N]: exit 1, the fragment in the first of two lines on standard error, N answers beside the error
    printf '%b' "$2" > "$work/bad"
    run --prompts "$work/bad" -n 2 > "$work/stdout" 2> "$work/stderr"
    status=$?
    [ $status -eq 1 ] && [ "$(grep -c '"error": ' "$work/stdout")" -eq 1 ] && [ "$(wc -l < "$work/stdout")" -eq $((1 + ${3:-0})) ] &&
        [ "$(wc -l < "$work/stderr")" -eq 2 ] && head -n 1 "$work/stderr" | grep -qF "$1" && return
    echo "exit status $status: $(cat "$work/stderr")"
    return 1
}

no_prompts() { # exit 1, one line, nothing on standard output
    printf '\n\n' > "$work/bad"
    run --prompts "$work/bad" > "$work/stdout" 2> "$work/stderr"
    [ $? -eq 1 ] && [ ! -s "$work/stdout" ] && [ "$(wc -l < "$work/stderr")" -eq 1 ] && grep -qF "no prompts" "$work/stderr"
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

# A page of the story model has 64 positions of 8192 bytes.
answers() { # PROMPTS FLAGS...: the lines without what depends on how they ran
    file=$1
    shift
    run --prompts "$file" "$@" > "$work/answers" && sed 's/"timings.*//' "$work/answers"
}

# Twelve prompts with a beginning of some 150 tokens in common, in room for two and a half of them: the same answers.
few_pages() {
    for i in 0 1 2 3 4 5 6 7 8 9 10 11; do
        printf '{"text": "%sThe king said %d", "n": %d}\n' "$(yes 'Once upon a time there was a king. ' | head -n 15 | tr -d '\n')" $i $((40 + 13 * i))
    done > "$work/many"
    answers "$work/many" -b 1 > "$work/expected" || return 1
    ! grep -q '"evictions": [1-9]' "$work/answers" || return 1
    for b in 2 6 12; do
        answers "$work/many" -b $b --kv-memory 4M | cmp - "$work/expected" || return 1
        [ "$(grep -c '"shared_tokens": 128, ' "$work/answers")" -eq 11 ] && head -n 1 "$work/answers" | grep -q '"shared_tokens": 0, "evictions": 0}' || return 1
        [ $b -eq 2 ] || grep -q '"evictions": [1-9]' "$work/answers" || return 1
    done
}

# One line needs three pages and there are two: it has an error in its place, and the others their answers.
never_fits() {
    printf '{"text": "a"}\n{"text": "b", "n": 140, "id": 5}\n{"text": "c", "n": 120}\n{"text": "d"}\n' > "$work/long"
    run --prompts "$work/long" -n 2 --kv-memory 1100K > "$work/stdout" 2> "$work/stderr"
    [ $? -eq 1 ] && [ "$(wc -l < "$work/stdout")" -eq 4 ] && [ "$(grep -c '"ids"' "$work/stdout")" -eq 3 ] && [ "$(wc -l < "$work/stderr")" -eq 2 ] || return 1
    sed -n 2p "$work/stdout" | grep -q '"index": 1, "line": 2, "error": "a prompt of 2 tokens and 140 new ones take 3 pages .*", "id": 5}' &&
        head -n 1 "$work/stderr" | grep -qF 'long:2: a prompt of 2 tokens and 140 new ones take 3 pages of 64 positions, the K/V cache has 2; try a larger --kv-memory' || return 1
    run -p "b" -n 140 --kv-memory 1100K > "$work/stdout" 2> "$work/stderr"
    [ $? -eq 1 ] && [ ! -s "$work/stdout" ] && [ "$(wc -l < "$work/stderr")" -eq 1 ] && grep -qF "take 3 pages" "$work/stderr" || return 1
    run -p "b" -n -1 --ignore-eos --kv-memory 1100K --json | grep -q '"finish_reason": "length"' || return 1
    $LLAMA "$model" -p "b" -n -1 --ignore-eos --kv-memory 1100K 2>&1 > "$work/stdout" |
        grep -qxF 'llama: the context of 128 tokens is full: the answer ends here; --kv-memory sets it'
}

blank_lines() {
    { head -c 1000 /dev/zero | tr '\0' '\n' && echo '{"text": "a"}'; } > "$work/blank"
    run --prompts "$work/blank" -n 1 > "$work/json" && [ "$(wc -l < "$work/json")" -eq 1 ]
}

check test_prompts_lines_equal_single_runs lines_equal_single_runs
check test_prompts_bad_json_names_file_and_line refused "bad:2: bad JSON" '{"text": "a"}\n{"text": 1}\n' 1
check test_prompts_line_without_a_prompt refused 'bad:1: no "text", "ids" or "messages"' '{"prompt": "a"}\n'
check test_prompts_id_beyond_the_vocabulary refused "bad:1: id 8192, expected below 8192" '{"ids": [1, 8192]}\n'
check test_prompts_messages_without_a_chat_format refused "bad:2: messages: this model has no chat format" \
    '{"text": "a"}\n{"messages": [{"role": "user", "content": "a"}]}\n' 1
check test_prompts_empty_ids refused "bad:2: the prompt is empty" '{"text": "a"}\n{"ids": []}\n' 1
check test_prompts_empty_file no_prompts
check test_prompts_end_id_first_has_timings end_id_first
check test_prompts_with_few_pages_equal_single_runs few_pages
check test_prompts_line_that_never_fits never_fits
check test_prompts_blank_lines_are_skipped blank_lines
exit ${failed:-0}
