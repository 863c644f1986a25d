#!/bin/sh
# The GPU's engines against HuggingFace's tokens and against engine cpu. Needs a GPU; every test says SKIP without one.
LLAMA=${LLAMA:-./llama}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
model=model/stories.bin
check() { # NAME COMMAND...: ok if the command exits 0; what it printed last stands behind a failure
    name=$1
    shift
    case $name in *"$ONLY"*) ;; *) return ;; esac
    case $gpu in *"; engine $engine,"*) ;; *) echo "SKIP $name: ${gpu#llama: }" && return ;; esac
    if "$@" > "$work/out" 2>&1; then echo "ok $name"; else echo "FAIL $name: $(tail -n 1 "$work/out")"; failed=1; fi
    grep -h 'Δlogit' "$work/out"
}

refused() { # FRAGMENT COMMAND...: exit 1, one line on standard error that has the fragment, nothing on standard output
    fragment=$1
    shift
    "$@" > "$work/stdout" 2> "$work/stderr"
    status=$?
    [ $status -eq 1 ] && [ ! -s "$work/stdout" ] && [ "$(wc -l < "$work/stderr")" -eq 1 ] && grep -q "$fragment" "$work/stderr" && return
    echo "exit status $status: $(cat "$work/stderr")"
    return 1
}

same_tokens() { # two files of JSON lines, but for their timings
    sed 's/"timings.*//' "$1" > "$work/a"
    sed 's/"timings.*//' "$2" > "$work/b"
    [ -s "$work/a" ] && cmp "$work/a" "$work/b"
}

batch_equals_single() {
    printf '{"text": "Once upon a time"}\n{"text": "The king"}\n{"ids": [300]}\n{"text": "In the morning, when the sun rose over the hills,"}\n' > "$work/prompts"
    $LLAMA $model --prompts "$work/prompts" -b 1 -n 200 --engine cpu --ignore-eos > "$work/cpu" &&
        for b in 1 2 3 4; do
            $LLAMA $model --prompts "$work/prompts" -b $b -n 200 --engine $engine --precision f32 --ignore-eos > "$work/gpu" &&
                same_tokens "$work/cpu" "$work/gpu" || return 1
        done
}

# Engine fused in bf16: the JSON lines without speculation and with it,
# but for timings and what speculation says of itself.
speculation_changes_nothing() {
    printf '{"text": "Once upon a time"}\n{"text": "The king said: The king said: The king"}\n{"ids": [300]}\n{"text": "In the morning, when the sun rose over the hills,"}\n' > "$work/prompts"
    for flags in "-b 1" "-b 1 --temp 0.8 -s 4" "-b 1 --repetition-penalty 1.2" "-b 3" "-b 3 --temp 0.8" "-b 9 --temp 0.8 --top-p 0.9"; do
        $LLAMA $model --prompts "$work/prompts" -n 200 --engine $engine --logprobs 2 $flags > "$work/plain" || return 1
        for way in --lookup "--draft $model"; do
            $LLAMA $model --prompts "$work/prompts" -n 200 --engine $engine --logprobs 2 $flags $way | sed 's/"speculation.*"timings/"timings/' > "$work/gpu" &&
                same_tokens "$work/plain" "$work/gpu" || return 1
        done
    done
}

# Twelve prompts with a common beginning, in seven pages of the cache: sequences leave, come back and share, beside
# prompts in parts. In float32 the tokens are engine cpu's of each alone; in bf16 engine fused has those of a run with
# all the memory that it can use, which adds up alike up to 8 at a time, and alike beyond.
few_pages() {
    for i in 0 1 2 3 4 5 6 7 8 9 10 11; do
        printf '{"text": "%sThe king said %d", "n": %d}\n' "$(yes 'Once upon a time there was a king. ' | head -n 15 | tr -d '\n')" $i $((40 + 13 * i))
    done > "$work/many"
    $LLAMA $model --prompts "$work/many" -b 1 --engine cpu --ignore-eos > "$work/cpu" || return 1
    for b in 2 6 12; do
        $LLAMA $model --prompts "$work/many" -b $b --kv-memory 4M --engine $engine --precision f32 --ignore-eos > "$work/gpu" &&
            same_tokens "$work/cpu" "$work/gpu" || return 1
    done
    grep -q '"evictions": [1-9]' "$work/gpu" && grep -q '"shared_tokens": 128' "$work/gpu" || return 1
    [ $engine = fused ] || return 0
    for pair in "1 2" "1 6" "9 12"; do
        $LLAMA $model --prompts "$work/many" -b ${pair% *} --engine fused --ignore-eos > "$work/whole" &&
            $LLAMA $model --prompts "$work/many" -b ${pair#* } --kv-memory 2M --engine fused --ignore-eos > "$work/few" &&
            same_tokens "$work/whole" "$work/few" || return 1
    done
}

repeatable() {
    for run in 1 2; do
        $LLAMA $model -p "Once upon a time" -n 300 --ignore-eos --engine $engine --json --logprobs 5 | sed 's/"timings.*//' > "$work/run$run" || return 1
    done
    [ -s "$work/run1" ] && cmp "$work/run1" "$work/run2"
}

# model.bin with these matrices in float32, the same values; a tied model is untied where `output` is among them.
widen() { # FROM TO NAME...
    python3 - "$@" <<'EOF'
import json, struct, sys
with open(sys.argv[1], "rb") as file:
    n, = struct.unpack("<Q", file.read(8))
    header, data = json.loads(file.read(n)), file.read()
metadata = header.pop("__metadata__")
if "output" in sys.argv[3:] and "output" not in header:
    items = list(header.items())
    at = next(i for i, (name, _) in enumerate(items) if name.startswith("tokenizer."))
    header = dict(items[:at] + [("output", dict(header["tok_embeddings"]))] + items[at:])
    metadata["tie_embeddings"] = "false"
metadata["format"], blobs, end = "llama-model/2", [], 0
for name, entry in header.items():
    begin, stop = entry["data_offsets"]
    blob = data[begin:stop]
    if name in sys.argv[3:]:
        wide = bytearray(2 * len(blob))
        wide[2::4], wide[3::4] = blob[::2], blob[1::2]
        entry["dtype"], blob = "F32", bytes(wide)
    entry["data_offsets"] = [end, end + len(blob)]
    end += len(blob)
    blobs.append(blob)
text = json.dumps({"__metadata__": metadata, **header}).encode()
text += b" " * (-(8 + len(text)) % 4096)
with open(sys.argv[2], "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text + b"".join(blobs))
EOF
}

# Rounded to bf16 again, float32 copies are the matrices that they are copies of: the same logits.
same_in_bf16() { # MODEL
    $LLAMA "$1" -p "Once upon a time" -n 60 --ignore-eos --engine $engine --verbose --json --logprobs 5 > "$work/b.json" 2> "$work/err" &&
        grep -q "rounded to bf16" "$work/err" &&
        $LLAMA $model -p "Once upon a time" -n 60 --ignore-eos --engine $engine --json --logprobs 5 > "$work/a.json" &&
        same_tokens "$work/a.json" "$work/b.json"
}

# Embeddings and output in float32 beside layers in BF16. In float32 engine fused has no product for such an output.
own_dtypes() {
    widen $model "$work/both.bin" tok_embeddings output && widen $model "$work/output.bin" output &&
        same_in_bf16 "$work/both.bin" && same_in_bf16 "$work/output.bin" || return 1
    if [ $engine = cublas ]; then
        $LLAMA "$work/both.bin" --compare tests/vectors/stories-dump.safetensors --engine $engine --precision f32
    else
        refused "the output matrix is F32, expected BF16 as the layers are" $LLAMA "$work/output.bin" -p x -n 1 --engine $engine --precision f32
    fi
}

# Quantised weights in float32: the tokens of engine cpu, after prompts of 1 to some 60 tokens. In bf16, where engine
# fused promises it, the same numbers for a sequence beside others.
quantised() { # TYPE FLAG...: of --quantize
    printf '{"text": "Once upon a time"}\n{"text": "The king"}\n{"ids": [300]}\n{"text": "%s", "n": 40}\n' \
        "$(yes 'In the morning, when the sun rose over the hills,' | head -n 4 | tr '\n' ' ')" > "$work/prompts"
    $LLAMA $model --quantize "$@" -o "$work/small.bin" --quiet &&
        $LLAMA "$work/small.bin" --prompts "$work/prompts" -b 1 -n 100 --engine cpu --ignore-eos > "$work/cpu" || return 1
    for b in 1 4; do
        $LLAMA "$work/small.bin" --prompts "$work/prompts" -b $b -n 100 --engine $engine --precision f32 --ignore-eos > "$work/gpu" &&
            same_tokens "$work/cpu" "$work/gpu" || return 1
    done
    $LLAMA "$work/small.bin" --prompts "$work/prompts" -b 1 -n 100 --engine $engine --ignore-eos --logprobs 2 > "$work/one" || return 1
    [ $engine = cublas ] && return
    $LLAMA "$work/small.bin" --prompts "$work/prompts" -b 4 -n 100 --engine $engine --ignore-eos --logprobs 2 > "$work/four" &&
        same_tokens "$work/one" "$work/four"
}

# Bytes of a tensor of FILE replaced.
patch() { # FILE TENSOR BYTE HEX
    python3 - "$@" <<'EOF'
import json, struct, sys
with open(sys.argv[1], "r+b") as file:
    n, = struct.unpack("<Q", file.read(8))
    begin = 8 + n + json.loads(file.read(n))[sys.argv[2]]["data_offsets"][0]
    file.seek(begin + int(sys.argv[3]))
    file.write(bytes.fromhex(sys.argv[4]))
EOF
}

# What engine cpu refuses of codes and scales as it loads them, in the same words.
bad_codes() {
    $LLAMA $model --quantize fp8 -o "$work/nan.bin" --quiet && $LLAMA $model --quantize int4:32 -o "$work/inf.bin" --quiet &&
        patch "$work/nan.bin" layers.1.w2 1003 ff && patch "$work/inf.bin" layers.2.wk.scale 14 807f || return 1
    for file in nan inf; do
        $LLAMA "$work/$file.bin" -p x -n 1 --engine cpu > "$work/stdout" 2> "$work/cpu"
        $LLAMA "$work/$file.bin" -p x -n 1 --engine $engine > "$work/stdout" 2> "$work/gpu"
        [ $? -eq 1 ] && [ ! -s "$work/stdout" ] && [ "$(wc -l < "$work/gpu")" -eq 1 ] && cmp "$work/cpu" "$work/gpu" || return 1
    done
    grep -q "layers.2.wk.scale: element 7 is inf" "$work/gpu"
}

for engine in cublas fused; do
    gpu=$($LLAMA $model -p x -n 1 --engine $engine 2>&1 > /dev/null | tail -n 1)
    check test_${engine}_stories_equal_huggingface $LLAMA $model --compare tests/vectors/stories-dump.safetensors --engine $engine --precision f32
    for dump in ../shared/reference/*/dump.safetensors; do
        dir=$(dirname "$dump")
        name=test_${engine}_$(basename "$dir" | tr - _)_equal_huggingface
        if [ ! -f "$dump" ]; then echo "SKIP test_${engine}_reference_checkpoints: ../shared/reference is not there" && continue; fi
        if ! command -v python3 > /dev/null; then echo "SKIP $name: no python3 to convert with" && continue; fi
        case $gpu in *"; engine $engine,"*) python3 scripts/convert.py "$dir" "$work/model.bin" 2> /dev/null ;; esac
        check "$name" $LLAMA "$work/model.bin" --compare "$dump" --engine $engine --precision f32
    done
    check test_${engine}_batch_equals_single_runs_on_the_cpu batch_equals_single
    if [ $engine = fused ]; then
        check test_fused_speculation_changes_nothing speculation_changes_nothing
        check test_fused_speculation_in_f32_is_refused refused "gain nothing" $LLAMA $model -p x -n 9 --engine fused --precision f32 --lookup
    else
        check test_cublas_speculation_is_refused refused "depend on how many rows" $LLAMA $model -p x -n 9 --engine cublas --lookup
    fi
    check test_${engine}_fp8_products_of_other_weights_are_refused refused "takes FP8 weights: layers.0.wq is BF16" $LLAMA $model -p x -n 1 --engine $engine --precision fp8
    check test_${engine}_with_few_pages_equals_single_runs few_pages
    check test_${engine}_two_runs_are_identical repeatable
    check test_${engine}_embeddings_and_output_of_their_own_dtypes own_dtypes
    # (in float32 cublas holds float32 matrices, fused the file's)
    [ $engine = fused ] || check test_${engine}_weights_too_large_are_refused_before_allocation refused "GB of weights" $LLAMA --synthetic llama-3.1-70b -p x -n 1 --engine $engine --precision f32
    for i in 1 2 3 4 5 6 7 8; do echo '{"text": "x"}'; done > "$work/eight"
    check test_${engine}_kv_memory_too_large_names_what_fits refused "would fit" $LLAMA --synthetic llama-3.1-8b --prompts "$work/eight" -b 8 -c 131072 --kv-memory 250G -n 1 --engine $engine --precision f32
    for type in fp8 int8 int8:32 int4 int4:32 "int4:64 --output-weights keep" "int8 --output-weights int4:128"; do
        check "test_${engine}_$(echo "$type" | tr ' :' '__' | sed 's/-//g')_equals_the_cpu" quantised $type
    done
    if command -v python3 > /dev/null; then
        check test_${engine}_bad_codes_are_refused_as_on_the_cpu bad_codes
    else
        echo "SKIP test_${engine}_bad_codes_are_refused_as_on_the_cpu: no python3 to change a file with"
    fi
done
exit ${failed:-0}
