#!/usr/bin/env bash
# Runs the same commands with two builds of the program and compares what they print, byte for byte: standard output,
# standard error, exit status. A change of structure must leave all of it as it was.
#
#     scripts/compare_builds.sh                              # builds the base commit and this tree, both with CUDA=0
#     scripts/compare_builds.sh --base COMMIT                # another base (3465891)
#     CUDA=1 scripts/compare_builds.sh --engine cublas       # with the CUDA Toolkit and a GPU; --engine fused
#     scripts/compare_builds.sh --base-program OLD --program NEW --engine fused      # two that are built; needs no git
#
#   --engine NAME     every command that computes runs on this engine (without it: on the fastest that a build has)
#   --expected FILE   commands whose output changed on purpose, one a line: NAME REASON, or NAME@ENGINE REASON for one
#                     engine only. Such a command must differ; if it does not, the line is stale, which is a failure.
#                     (tests/compare_builds.expected; `--expected ""` for none)
#   --shared DIR      where reference/ with HuggingFace checkpoints is (../shared); what is not there is skipped
#   --only TEXT       only the commands whose name contains TEXT
#   --keep DIR        leaves the outputs there: NAME.base.out, .err, .status and NAME.new.*, and the files they read
#
# Figures of time (ms, s, tokens/s, GB/s), the commit, the list of GPUs that a build has code for and free memory are
# masked, and token_texts, shared_tokens and evictions, which came after the base; nothing else. One line a difference;
# the last line is: N passed, N failed, N skipped.
set -uo pipefail

base_commit=3465891
base_program= program= engine= only= keep=
cuda=${CUDA:-0}
here=$(cd "$(dirname "$0")/.." && pwd)
expected=$here/tests/compare_builds.expected
shared=$here/../shared

usage() {
    echo "compare_builds.sh: $1 (the comment at its head lists the options)" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || usage "$1: unknown, or its value is missing"
    case $1 in
    --base) base_commit=$2 ;;
    --base-program) base_program=$2 ;;
    --program) program=$2 ;;
    --engine) engine=$2 ;;
    --expected) expected=$2 ;;
    --shared) shared=$2 ;;
    --only) only=$2 ;;
    --keep) keep=$2 ;;
    *) usage "$1: unknown" ;;
    esac
    shift 2
done
[ -z "$expected" ] || [ -r "$expected" ] || usage "--expected $expected: no such file"
for path in "$base_program" "$program"; do
    [ -z "$path" ] || [ -x "$path" ] || usage "$path: no program"
done
[ -z "$base_program" ] || base_program=$(realpath "$base_program")
[ -z "$program" ] || program=$(realpath "$program")
[ -z "$keep" ] || { mkdir -p "$keep" && keep=$(realpath "$keep"); } || exit 2
[ ! -d "$shared" ] || shared=$(realpath "$shared")
cd "$here" || exit 2

work=$(mktemp -d)
tree=$work/tree
clean() {
    [ ! -d "$tree" ] || git worktree remove --force "$tree"
    rm -rf "$work"
}
trap clean EXIT
trap 'exit 130' INT TERM

# ---- the two programs -----------------------------------------------------------------------------------------------

build() { # DIRECTORY PROGRAM MAKE-ARGUMENTS...
    make -s -j2 -C "$1" CUDA="$cuda" PROGRAM="$2" "${@:3}" > "$work/make.log" 2>&1 || {
        cat "$work/make.log" >&2
        echo "compare_builds.sh: $1 does not build" >&2
        exit 1
    }
}

if [ -z "$base_program" ]; then
    git worktree add --quiet --detach "$tree" "$base_commit" || exit 1
    base_program=$work/llama-base
    build "$tree" "$base_program" BUILD="$work/base"
fi
if [ -z "$program" ]; then # its objects are kept: the next comparison compiles what changed
    program=$here/build/compare-$cuda/llama
    build "$here" "$program" BUILD="build/compare-$cuda"
fi

for path in "$base_program" "$program"; do
    "$path" --version > "$work/version" 2>&1 || { cat "$work/version" >&2 && usage "$path does not run here"; }
done

# ---- files that the commands read -----------------------------------------------------------------------------------

files=${keep:-$work/out} # the outputs too
mkdir -p "$files"
stories=model/stories.bin
dump=tests/vectors/stories-dump.safetensors
reference() { # NAME: the path of that checkpoint, converted
    echo "$files/$1.bin"
}
for checkpoint in gqa3-newlayout gqa4-hd64 gqa7-hd128 long-context mha-tied; do
    [ -d "$shared/reference/$checkpoint" ] && command -v python3 > /dev/null || continue
    python3 scripts/convert.py "$shared/reference/$checkpoint" "$(reference $checkpoint)" 2> "$work/convert" ||
        { cat "$work/convert" >&2 && exit 1; }
done

# The story model's vocabulary has LLaMA 3's special tokens, so it can be made to chat (the header keeps its length).
chat=$files/chat.bin chat31=$files/chat31.bin
LC_ALL=C sed '1s/"chat_format":"none","source":".stories"/"chat_format":"llama3","source":".stori"/' $stories > "$chat"
LC_ALL=C sed '1s/"chat_format":"none","source":".stories"/"chat_format":"llama3.1","source":".sto"/' $stories > "$chat31"
printf 'Once upon a time there was a king who had three daughters, and the youngest' > "$files/prompt"
printf '\377\376 not UTF-8 \303(' > "$files/bytes"
head -c 900 model/STORIES.md > "$files/text"
printf '{"text": "Once upon a time"}\n{"ids": [8181, 668, 258]}\n\n{"text": "The king said:"}\n{"ids": [300]}\n{"text": "A wolf"}\n{"text": "In the morning, when the sun rose over the hills, the old man"}\n{"text": "\\u00e9\\n\\"quoted\\""}\n{"text": "x"}\n{"text": "They"}\n' > "$files/prompts"
printf '{"text": "Once upon a time"}\n{"text": "The king said:"}\n{"text": "x"}\n{"ids": [30, 31, 32]}\n' > "$files/prompts-any"
printf '{"text": "a"}\n{"text": 1}\n' > "$files/prompts-bad"
printf '{"prompt": "a"}\n' > "$files/prompts-key"
printf '{"ids": [1, 8192]}\n' > "$files/prompts-id"
printf '\n\n' > "$files/prompts-none"
printf '486920746865726521\n\nfffe\n' > "$files/hex"
printf '104 105\n\n8181\n' > "$files/ids-lines"
printf '486\n' > "$files/hex-odd"
printf 'Hello\n\nWho are you?\n/clear\nAnd the wolf?\n' > "$files/conversation"
printf '/help\nHi\n' > "$files/conversation-help"
: > "$files/empty"
printf 'GGUF\003\000\000\000and so on, and so on' > "$files/gguf"
printf 'this is text' > "$files/textfile"
head -c 100000 $stories > "$files/short.bin"
head -c 15316027 $stories > "$files/cut.bin"
{ cat $stories && printf x; } > "$files/long.bin"
sed_model() { # NAME EXPRESSION: the story model with its header changed
    LC_ALL=C sed "1$2" $stories > "$files/$1.bin"
}
sed_model bad-heads 's/"n_heads":"4"/"n_heads":"3"/'
sed_model bad-format 's/llama-model.1/llama-model\/9/'
sed_model bad-json 's/"hidden_dim"/"hidden_dim/'
sed_model bad-shape 's/"shape":\[8192,256\]/"shape":[8192,255]/'
sed_model bad-dtype 's/"dtype":"BF16"/"dtype":"I8", /'
sed_model bad-eos 's/8182,8189,8190/8182,8189,9190/'
sed_model bad-rope 's/"rope_type":"llama3"/"rope_type":"yarn45"/'
sed_model no-dim 's/"dim":"256"/"dxm":"256"/'
sed_model another-rope 's/"rope_factor":"8.0"/"rope_factor":"4.0"/'
sed_model end-id 's/8182,8189,8190/8182,8189,0455/'
head -c 3000 $dump > "$files/dump-short"

# ---- running --------------------------------------------------------------------------------------------------------

passed=0 failed=0 skipped=0
names=" "
export OMP_NUM_THREADS=1 LC_ALL=C
limit=$(command -v timeout > /dev/null && echo "timeout 300")

mask() { # what two runs of one build may print differently
    sed -E -e 's/(^|[^0-9.])[0-9]+(\.[0-9]+)? (ms|s|tokens\/s|GB\/s)([^A-Za-z0-9_]|$)/\1# \3\4/g' \
        -e 's/[0-9.]+ tokens\/s/# tokens\/s/g; s/[0-9.]+ (GB|GiB|MB|MiB) (of memory )?(are |is )?free/# \1 free/g' \
        -e 's/"([a-z0-9_]*ms[a-z_]*)": -?[0-9.]+/"\1": #/g' \
        -e 's/\(commit [^;]*;/(commit #;/; s/ for sm [0-9a ]*( and newer)?\)/ for sm #)/' \
        -e 's/"token_texts": \[("([^"\\]|\\.)*"(, )?)*\], //; s/, "shared_tokens": [0-9]+, "evictions": [0-9]+//'
}

mask_bench() { # a benchmark's figures are all of this run
    sed -E -e 's/[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?/#/g; s/ +/ /g'
}

run_one() { # WHICH PROGRAM ARGUMENTS...: $input, $output, $masks
    local to=$files/$name.$1
    shift
    case $output in
    full) $limit "$@" < "$input" > /dev/full 2> "$to.err" ;;
    closed) $limit "$@" < "$input" >&- 2> "$to.err" ;;
    *) $limit "$@" < "$input" > "$to.out" 2> "$to.err" ;;
    esac
    echo $? > "$to.status"
    [ -e "$to.out" ] || : > "$to.out"
    for stream in out err; do $masks < "$to.$stream" > "$to.$stream.masked"; done
}

around_difference() { # of two files: what each has from a little before the first byte that differs
    local at
    at=$(cmp "$1" "$2" 2>&1 | sed -n 's/.* [bc][yh][ta][er] \([0-9]*\),.*/\1/p')
    at=$((${at:-1} > 30 ? ${at:-1} - 30 : 1))
    for file in "$1" "$2"; do printf '"%s" ' "$(tail -c +$at "$file" | head -c 90 | tr '\n' '~' | tr -d '\000-\037')"; done
}

reason_of() { # why the command's output changed on purpose; nothing if it did not
    [ -n "$expected" ] && awk -v name="$name" -v engine="$engine" '
        $1 == name || ($1 == name "@" engine && engine != "") { sub(/^[^ \t]+[ \t]*/, ""); print ($0 == "" ? "(no reason)" : $0); exit }' "$expected"
}

input=/dev/null output= masks=mask # of the next command
compare() { # NAME ARGUMENTS...
    name=$1
    shift
    case $names in *" $name "*) usage "two commands are called $name" ;; esac
    names="$names$name "
    case $name in
    *"$only"*)
        local what= file
        for file in "$@"; do
            case $file in
            *.bin) case " gqa3-newlayout gqa4-hd64 gqa7-hd128 long-context mha-tied " in
                *" $(basename "$file" .bin) "*) [ -e "$file" ] || what="no $shared/reference/$(basename "$file" .bin), or no python3" ;;
                esac ;;
            esac
        done
        if [ -n "$what" ]; then
            echo "SKIP $name: $what"
            skipped=$((skipped + 1))
        else
            run_one base "$base_program" "$@"
            run_one new "$program" "$@"
            judge "$@"
        fi
        ;;
    esac
    input=/dev/null output= masks=mask
}

judge() { # ARGUMENTS...: compares what the two printed
    local at=$files/$name what= reason
    reason=$(reason_of)
    if ! cmp -s "$at.base.status" "$at.new.status"; then
        what="exit status $(cat "$at.base.status"), now $(cat "$at.new.status")"
    fi
    for stream in out err; do
        cmp -s "$at.base.$stream.masked" "$at.new.$stream.masked" && continue
        what="$what${what:+; }standard $([ $stream = out ] && echo output || echo error): $(around_difference "$at.base.$stream.masked" "$at.new.$stream.masked")"
    done
    if [ "$(cat "$at.base.status")" = 124 ]; then what="still running after 300 s"; reason=; fi
    if [ -z "$what" ] && [ -z "$reason" ]; then
        passed=$((passed + 1))
    elif [ -n "$what" ] && [ -n "$reason" ]; then
        echo "differs on purpose: $name: $reason"
        passed=$((passed + 1))
    elif [ -n "$reason" ]; then
        echo "FAIL $name: $expected expects a difference ($reason), and there is none: $*"
        failed=$((failed + 1))
    else
        echo "FAIL $name: $what; llama $*"
        failed=$((failed + 1))
    fi
}

compute() { # NAME ARGUMENTS...: a command that computes, on --engine
    compare "$@" ${engine:+--engine "$engine"}
}

# ---- the commands ---------------------------------------------------------------------------------------------------

p="Once upon a time"

# A prompt, and its answer.
compute greedy $stories -p "$p" -n 60
compute greedy_quiet $stories -p "$p" -n 20 --quiet
compute greedy_verbose $stories -p "$p" -n 20 --verbose
compute greedy_f32 $stories -p "$p" -n 60 --precision f32
compute greedy_bf16 $stories -p "$p" -n 60 --precision bf16
compute greedy_200_logprobs $stories -p "$p" -n 200 --ignore-eos --json --logprobs 5
compute prompt_empty $stories -p "" -n 20
compute prompt_file $stories -f "$files/prompt" -n 20
input=$files/prompt compute prompt_file_standard_input $stories -f - -n 20
input=$files/prompt compute prompt_standard_input $stories -p - -n 20
compute prompt_not_utf8 $stories -f "$files/bytes" -n 10 --json
compute prompt_long $stories -f "$files/text" -n 20
compute prompt_ids $stories --ids -p "8181 668, 258" -n 20 --json
input=$files/ids-lines compute prompt_ids_standard_input $stories --ids -p - -n 10
compute special_not_written $stories -p "<|begin_of_text|>Once<|eot_id|>" -n 10 --json
compute special_written $stories -p "<|begin_of_text|>Once<|eot_id|>" -n 10 --json --special
compute special_echo $stories -p "<|begin_of_text|>Once" -n 10 --special --echo
compute echo $stories -p "$p" -n 20 --echo
compute echo_json $stories -p "$p" -n 20 --echo --json
compute json $stories -p "$p" -n 20 --json
compute json_end_id_first "$files/end-id.bin" -p "$p" --json
compute stop $stories -p "$p" -n 100 --stop king --stop called
compute stop_json $stories -p "$p" -n 100 --stop ". " --json
compute ignore_eos $stories -p "The end." -n 120 --ignore-eos
compute until_eos $stories -p "and they lived happily ever after." -n 400 --json
compute context_small $stories -p "$p" -n 100 -c 30
compute context_whole $stories -p "$p" -c 40 --ignore-eos --json
compute one_token $stories -p "$p" -n 1
OMP_NUM_THREADS=2 compute threads_2 $stories -p "$p" -n 30 --temp 0.8 -s 11

# Sampling.
compute temp $stories -p "$p" -n 40 --temp 0.8
compute temp_seed_7 $stories -p "$p" -n 40 --temp 0.8 -s 7
compute temp_high $stories -p "$p" -n 40 --temp 2.5 -s 18446744073709551615
compute top_k $stories -p "$p" -n 40 --temp 1 --top-k 20 -s 1
compute top_k_1 $stories -p "$p" -n 40 --temp 1 --top-k 1
compute top_p $stories -p "$p" -n 40 --temp 1 --top-p 0.9 -s 2
compute min_p $stories -p "$p" -n 40 --temp 1 --min-p 0.1 -s 3
compute all_samplers $stories -p "$p" -n 40 --temp 0.9 --top-k 50 --top-p 0.95 --min-p 0.02 -s 4 --json --logprobs 3
compute logprobs_64 $stories -p "$p" -n 5 --json --logprobs 64
compute sampler_without_temp $stories -p "$p" -n 5 --top-k 3 --top-p 0.5

# Many prompts.
for b in 1 3 8; do
    compute prompts_b$b $stories --prompts "$files/prompts" -b $b -n 20
    compute prompts_b${b}_sampled $stories --prompts "$files/prompts" -b $b -n 20 --temp 0.9 --top-p 0.9 -s 5
done
compute prompts_logprobs $stories --prompts "$files/prompts" -n 8 --logprobs 2 --precision f32
compute prompts_b8_200_logprobs $stories --prompts "$files/prompts" -b 8 -n 200 --ignore-eos --logprobs 5
input=$files/prompts compute prompts_standard_input $stories --prompts - -n 3
compute prompts_stop_verbose $stories --prompts "$files/prompts" -b 2 -n 30 --stop the --verbose
compute prompts_small_context $stories --prompts "$files/prompts" -b 4 -n 50 -c 30
compute prompts_bad_json $stories --prompts "$files/prompts-bad" -n 3
compute prompts_unknown_key $stories --prompts "$files/prompts-key" -n 3
compute prompts_id_too_large $stories --prompts "$files/prompts-id" -n 3
compute prompts_none $stories --prompts "$files/prompts-none" -n 3

# Text and ids.
compare tokenize $stories --tokenize -p "$p, there was a King's daughter: 12345!  "
compare tokenize_json $stories --tokenize -p "$p" --json
compare tokenize_special $stories --tokenize -p "a<|eot_id|>b" --special
compare tokenize_file $stories --tokenize -f model/STORIES.md
input=$files/bytes compare tokenize_standard_input $stories --tokenize -p -
compare tokenize_hex $stories --tokenize --hex -f "$files/hex"
compare tokenize_hex_json $stories --tokenize --hex --json -f "$files/hex"
compare tokenize_hex_odd $stories --tokenize --hex -f "$files/hex-odd"
compare detokenize $stories --detokenize -p "8181 668 258, 552"
compare detokenize_json $stories --detokenize --json -p "668 258 255"
compare detokenize_hex $stories --detokenize --hex -f "$files/ids-lines"
compare detokenize_no_such_id $stories --detokenize -p "1 9000"

# Measures of a text, and of a comparison.
compute perplexity $stories --perplexity "$files/text" -c 128
compute perplexity_stride $stories --perplexity "$files/text" -c 64 --stride 16
compute perplexity_f32 $stories --perplexity "$files/text" --precision f32 --quiet
compute perplexity_empty $stories --perplexity "$files/empty"
compute compare_stories $stories --compare $dump
compute compare_stories_f32 $stories --compare $dump --precision f32 --verbose
compute compare_another_rope "$files/another-rope.bin" --compare $dump --precision f32
compute compare_short_dump $stories --compare "$files/dump-short"
compute compare_no_dump $stories --compare "$files/nothing"
masks=mask_bench compute bench $stories --bench -c 128 -b 1

# Conversations through a pipe.
for format in chat chat31; do
    input=$files/conversation compute $format "$files/$format.bin" --chat -n 20
done
input=$files/conversation compute chat_verbose "$chat" --chat -n 10 --verbose
input=$files/conversation compute chat_system "$chat" --chat -n 10 --system "You are a wolf."
input=$files/conversation compute chat_date "$chat31" --chat -n 10 --system "Short." --date "1 Jan 2030"
input=$files/conversation compute chat_sampled "$chat31" --chat -n 20 --temp 0.8 -s 3 --quiet
input=$files/conversation compute chat_stop "$chat" --chat -n 30 --stop and --ignore-eos
input=$files/conversation-help compute chat_help "$chat" --chat -n 5
input=$files/conversation compute chat_context_full "$chat" --chat -c 80
input=$files/text compute chat_message_too_long "$chat" --chat -c 30 -n 5
compute chat_no_format $stories --chat
compute chat_date_of_another_format "$chat" --chat --date "1 Jan 2030"

# HuggingFace's checkpoints: their dumps, greedy, batches, sampled.
for checkpoint in gqa3-newlayout gqa4-hd64 gqa7-hd128 long-context mha-tied; do
    short=${checkpoint//-/_} model=$(reference $checkpoint)
    # (prompts of 32,000 tokens take engine cpu minutes)
    [ $checkpoint = long-context ] && [ "${engine:-cpu}" = cpu ] ||
        compute ${short}_compare "$model" --compare "$shared/reference/$checkpoint/dump.safetensors" --precision f32
    compute ${short}_greedy "$model" -p "$p" -n 60 --ignore-eos --json --logprobs 5
    compute ${short}_batch "$model" --prompts "$files/prompts-any" -b 3 -n 40 --ignore-eos --logprobs 2
    compute ${short}_sampled "$model" -p "The king" -n 60 --ignore-eos --temp 1 --top-p 0.9 -s 9 --json
    compare ${short}_tokenize "$model" --tokenize -f "$files/text"
done

# What a program says of itself, and of wrong flags.
compare help --help
compare version --version
compare no_arguments
compare no_prompt $stories
compare unknown_flag $stories -p x --frobnicate
compare value_missing $stories -p
compare two_models $stories $stories -p x
compare two_prompts $stories -p x -f "$files/prompt"
compare two_modes $stories --chat --tokenize -p x
compare n_0 $stories -p x -n 0
compare n_text $stories -p x -n many
compare temp_negative $stories -p x --temp -1
compare top_p_2 $stories -p x --top-p 2
compare seed_negative $stories -p x -s -1
compare seed_too_large $stories -p x -s 18446744073709551616
compare batch_alone $stories -p x -b 2
compare stride_alone $stories -p x --stride 2
compare logprobs_without_json $stories -p x --logprobs 2
compare logprobs_65 $stories -p x --json --logprobs 65
compare system_alone $stories -p x --system y
compare hex_alone $stories -p x --hex
compare echo_prompts $stories --prompts "$files/prompts" --echo
compare ids_chat $stories --chat --ids
compare stop_empty $stories -p x --stop ""
compare precision_unknown $stories -p x --precision f64
compare shape_unknown --synthetic llama-9 -p x
compare engine_cpu $stories -p "$p" -n 20 --engine cpu
compare engine_cpu_verbose $stories -p "$p" -n 5 --engine cpu --precision f32 --verbose

# Files and requests that are refused.
compute model_missing "$files/nothing.bin" -p x
compute model_directory "$files" -p x
compute model_empty "$files/empty" -p x
compute model_gguf "$files/gguf" -p x
compute model_text "$files/textfile" -p x
compute model_not_ours $dump -p x
for bad in short cut long bad-heads bad-format bad-json bad-shape bad-dtype bad-eos bad-rope no-dim; do
    compute model_${bad//-/_} "$files/$bad.bin" -p x -n 2
done
compute prompt_file_missing $stories -f "$files/nothing"
compute prompt_file_directory $stories -f "$files"
compute prompt_id_too_large $stories --ids -p "1 8192"
compute prompt_no_ids $stories --ids -p ""
compute prompt_not_ids $stories --ids -p "1 two"
compute context_too_large $stories -p x -c 4096
compute context_too_small $stories -p "$p" -c 3
output=full compute output_full $stories -p "$p" -n 5
output=closed compute output_closed $stories -p "$p" -n 5
output=full compare help_full --help

# Weights from a seed: seconds of work, so last.
compute synthetic --synthetic llama-3.2-1b -p "ab" -n 3 -c 16 --json

if [ -n "$expected" ] && [ -z "$only" ]; then
    while read -r name reason; do
        case $name in '' | '#'*) continue ;; esac
        case $names in *" ${name%@*} "*) ;; *)
            echo "FAIL $name: $expected names it, and there is no such command"
            failed=$((failed + 1))
            ;;
        esac
    done < "$expected"
fi
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
