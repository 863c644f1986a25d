#!/bin/sh
# Shows that ./llama gives HuggingFace's tokens on a checkpoint, and writes what it found as a report.
#
#   scripts/validate.sh MODEL_DIR [REPORT.md]         (validation.md)
#   scripts/validate.sh --bf16 MODEL_DIR [REPORT.md]  as well: bf16 mode beside HuggingFace's own bf16
#
# MODEL_DIR is a LLaMA checkpoint in HuggingFace layout, real or from scripts/make_random_hf.py. Five scenarios against
# a float32 dump: one token; 50 tokens; 200 tokens of four prompts; memory of the K/V cache; the four prompts in one
# batch. Exit status 0 if all hold, 1 if one does not or the machine cannot run them.
#
# Environment: LLAMA the program (./llama, built if it is not there), PYTHON (python3), ENGINE (cublas; cpu where there
# is no GPU), DEVICE where HuggingFace runs (cuda, or cpu for engine cpu), WORK a directory for model.bin and dumps
# (build/validate).
set -u
here=$(dirname "$0")
root=$here/..
python=${PYTHON:-python3} engine=${ENGINE:-cublas} llama=${LLAMA:-$root/llama} work=${WORK:-$root/build/validate}
device=${DEVICE:-$([ "$engine" = cpu ] && echo cpu || echo cuda)}
steps=200 full=50

die() {
    echo "validate.sh: $1" >&2
    exit 1
}

bf16=
[ "${1-}" = --bf16 ] && bf16=1 && shift
case ${1---help} in
-*) die "usage: validate.sh [--bf16] MODEL_DIR [REPORT.md]" ;;
esac
[ $# -le 2 ] || die "usage: validate.sh [--bf16] MODEL_DIR [REPORT.md]"
model=$1 report=${2:-validation.md}

# step NAME COMMAND...: its output and errors go to files, its seconds and status to the list that the report reads.
step() {
    name=$1
    shift
    printf 'validate.sh: %s ... ' "$name" >&2
    start=$(date +%s.%N)
    "$@" > "$work/$name.out" 2> "$work/$name.err"
    status=$?
    seconds=$(echo "$start $(date +%s.%N)" | awk '{ printf "%.1f", $2 - $1 }')
    printf '%s\t%s\t%s\n' "$name" "$seconds" "$status" >> "$work/steps.tsv"
    echo "$seconds s$([ $status -eq 0 ] || echo ", exit status $status")" >&2
    return $status
}

must() { # without this step there is nothing to compare
    step "$@" || die "$1 failed: $(tail -n 1 "$work/$1.err")"
}

# ---- is everything there? -------------------------------------------------------------------------------------------

command -v "$python" > /dev/null 2>&1 || die "no $python; PYTHON names another"
mkdir -p "$work" && : > "$work/steps.tsv" || die "$work: cannot be written; WORK names another directory"
rm -f "$work/dump.safetensors" "$work/hf-half.safetensors"
"$python" "$here/validate_report.py" preflight "$model" "$work" "$engine" "$device" || exit 1
: > "$report" || die "$report: cannot be written" # and an older report must not pass for this one
if [ ! -x "$llama" ]; then
    [ -z "${LLAMA-}" ] || die "LLAMA=$llama: no such program"
    must build make -C "$root"
fi
"$llama" --help | grep -q "Engines in this build:.*$engine" ||
    die "$llama has no engine $engine: build it where the CUDA Toolkit is (make), or validate with ENGINE=cpu"
"$llama" --version > "$work/version.out" 2>&1 || die "$llama does not run: $(head -n 1 "$work/version.out")"

cat > "$work/prompts.jsonl" << 'END'
{"text": "Once"}
{"text": "The capital of France is"}
{"text": "In 1969, at 20:17:40 UTC, two people landed on the Moon. It's been said that 3.14159 is π, that naïve cafés cost €4.50, and that 東京 is über-crowded.\n\n    for (int i = 0; i < 10; i++)\n        printf(\"%d\\n\", i);\n"}
{"text": "A miller had three sons, a mill, a donkey and a cat. The sons ground the corn, the donkey fetched the grain and carried the flour, and the cat caught the mice. When the miller died the sons divided what he left: the eldest took the mill, the second the donkey, and for the third nothing remained but the cat. He was sad, and said to himself: \"I have done badly after all. My eldest brother can grind, my second brother can ride on his donkey, but what can I do with a cat? If I have a pair of gloves made from its fur, there is an end of it.\" The cat had understood every word. \"You need not kill me,\" it began, \"to get a pair of poor gloves out of my fur. Have a pair of boots made for me, so that I can go out and be seen among people, and you shall soon be helped.\" The miller's son was surprised that a cat should speak, but as the shoemaker was just passing he called him in and had a pair of boots measured. When they were finished the cat put them on, took a sack, covered the bottom of it with corn, and fixed a cord to the top with which it could be drawn shut. Then it threw the sack over its back and went out at the door on two legs, like a man."}
END
printf Once > "$work/prompt.txt" # the first of them

# ---- HuggingFace's tokens and ours ----------------------------------------------------------------------------------

run() { # NAME FLAGS...
    name=$1
    shift
    step "$name" "$llama" "$work/model.bin" --engine "$engine" "$@"
}

must convert "$python" "$here/convert.py" "$model" "$work/model.bin"
must dump "$python" "$here/dump_hf.py" "$model" "$work/dump.safetensors" --prompts "$work/prompts.jsonl" -n $steps \
    --full $full --device "$device"
run one --precision f32 -f "$work/prompt.txt" -n 1 --ignore-eos --json
run fifty --precision f32 --prompts "$work/prompts.jsonl" -b 1 -n 50 --ignore-eos --verbose
run compare --precision f32 --compare "$work/dump.safetensors"
run single --precision f32 --prompts "$work/prompts.jsonl" -b 1 -n $steps --ignore-eos
run batch --precision f32 --prompts "$work/prompts.jsonl" -b 4 -n $steps --ignore-eos

if [ "$bf16" ]; then
    dtype=$("$python" "$here/validate_report.py" half "$work")
    step hf-half "$python" "$here/dump_hf.py" "$model" "$work/hf-half.safetensors" --follow "$work/dump.safetensors" \
        --full $full --dtype "$dtype" --device "$device"
    run half --precision bf16 --compare "$work/dump.safetensors" --verbose
fi

"$python" "$here/validate_report.py" report "$work" "$report" "$steps" ${bf16:+bf16}
