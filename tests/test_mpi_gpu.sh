#!/bin/sh
# One model on several GPUs, by one process (--gpus) and by as many (mpirun -n): the same bytes as on one GPU; and all
# processes end when one does. Needs the GPUs and a build with MPI and NCCL; says SKIP without.
# GPUS: how many, 2 by default. KILLS: how often a process is killed.
LLAMA=${LLAMA:-./llama}
MPIRUN=${MPIRUN:-mpirun}
GPUS=${GPUS:-2}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
model=model/stories.bin
root=
[ "$(id -u)" -ne 0 ] || root=--allow-run-as-root
all="$MPIRUN $root --bind-to none -n $GPUS $LLAMA"

missing=
[ "$(nvidia-smi -L 2> /dev/null | wc -l)" -ge "$GPUS" ] || missing="$GPUS GPUs are needed"
[ -n "$missing" ] || $LLAMA --version | grep -q "Open MPI" || missing="$($LLAMA --version): no MPI"
[ -n "$missing" ] || command -v "$MPIRUN" > /dev/null || missing="there is no $MPIRUN"

check() { # NAME COMMAND...: ok if the command exits 0; what it printed last stands behind a failure
    name=$1
    shift
    case $name in *"$ONLY"*) ;; *) return ;; esac
    if [ -n "$missing" ]; then echo "SKIP $name: $missing" && return; fi
    if "$@" > "$work/out" 2>&1; then echo "ok $name"; else echo "FAIL $name: $(tail -n 1 "$work/out")"; failed=1; fi
    grep -h '^longest' "$work/out"
}

# Standard output of a run on one GPU, on all by --gpus, on all by mpirun, but for times.
same() { # FLAG...
    $LLAMA "$@" --quiet | sed 's/"timings.*//' > "$work/one" &&
        $LLAMA "$@" --gpus $GPUS --quiet | sed 's/"timings.*//' > "$work/gpus" &&
        $all "$@" --quiet < /dev/null | tr -d '\r' | sed 's/"timings.*//' > "$work/mpi" || return 1
    [ -s "$work/one" ] || { echo "nothing was printed" && return 1; }
    cmp "$work/one" "$work/gpus" && cmp "$work/one" "$work/mpi"
}

# Prompts of several lengths, which begin alike, drawn and greedy.
for i in 0 1 2 3 4 5 6 7 8 9 10 11; do
    printf '{"text": "%sThe king said %d", "n": %d, "temp": %s, "seed": %d}\n' \
        "$(yes 'Once upon a time there was a king. ' | head -n $((15 + 40 * (i % 3))) | tr -d '\n')" $i $((40 + 13 * i)) "$([ $((i % 2)) -eq 0 ] && echo 0 || echo 0.8)" $i
done > "$work/many"
head -c 1500 "$work/many" > "$work/text"
ids() { # NUMBER: so many token ids
    seq 1 "$1" | awk '{ printf "%d ", ($1 * 7919 + 13) % 8000 }'
}

compares() { # FLAG...: against HuggingFace's tokens
    $all $model --compare tests/vectors/stories-dump.safetensors "$@" --precision f32 < /dev/null
}

quantised() { # TYPE
    $LLAMA $model --quantize "$1" -o "$work/small.bin" --quiet &&
        same "$work/small.bin" -p "Once upon a time" -n 200 --ignore-eos --json --logprobs 5 &&
        same "$work/small.bin" --prompts "$work/many" -b 8 --ignore-eos --logprobs 2
}

refused() { # STATUS FRAGMENT FLAG...: the line is said once
    status=$1 fragment=$2
    shift 2
    $all "$@" < /dev/null > "$work/stdout" 2> "$work/stderr"
    found=$?
    [ $found -eq "$status" ] && [ "$(grep -c "$fragment" "$work/stderr")" -eq 1 ] && return
    echo "exit status $found: $(cat "$work/stderr")"
    return 1
}

# A job that goes on for long, and after some time a signal to a rank, or to the launcher: all end.
# (TERM: mpirun's own.)
ends() { # SIGNAL WHO: 0 or 1: of mpirun's children; mpirun
    most=0 times=0
    while [ $times -lt "${KILLS:-5}" ]; do
        times=$((times + 1))
        timeout 120 $all $model -p "Once upon a time" -n 1900 -c 2048 --ignore-eos --quiet < /dev/null > "$work/stdout" 2> "$work/stderr" &
        job=$!
        sleep "$(awk -v s="$times$job" 'BEGIN { srand(s); print 0.3 + 4 * rand() }')"
        launcher=$(pgrep -P $job | head -n 1)
        [ -n "$launcher" ] || { wait $job; continue; } # it was faster
        target=$launcher
        [ "$2" = mpirun ] || target=$(pgrep -P "$launcher" | sed -n "$(($2 + 1))p")
        ranks=$(pgrep -P "$launcher")
        start=$(date +%s)
        [ -z "$target" ] || kill -s "$1" "$target" 2> /dev/null
        wait $job
        [ $? -ne 124 ] || { echo "still running after 120 s" && return 1; }
        seconds=$(($(date +%s) - start))
        [ $seconds -le $most ] || most=$seconds
        sleep 1
        for rank in $ranks; do
            ! grep -qs '^State:[[:space:]]*[RSD]' "/proc/$rank/status" || { echo "process $rank still runs" && return 1; }
        done
    done
    echo "longest: $most s from $1 to $2 to the end of all, of $times"
}

check test_mpi_bf16_has_the_bytes_of_one_gpu same $model -p "Once upon a time" -n 200 --ignore-eos --json --logprobs 5
check test_mpi_drawn_has_the_bytes_of_one_gpu same $model -p "Once upon a time" -n 200 --ignore-eos --json --temp 0.8 --top-p 0.9 -s 3
check test_mpi_lookup_has_the_bytes_of_one_gpu same $model -f "$work/text" -n 100 --ignore-eos --json --lookup --logprobs 2
check test_mpi_long_prompt_has_the_bytes_of_one_gpu same $model --ids -p "$(ids 1900)" -n 20 --ignore-eos --json --logprobs 5
for b in 1 8 12 20; do
    check test_mpi_batch_${b}_has_the_bytes_of_one_gpu same $model --prompts "$work/many" -b $b --ignore-eos --logprobs 2
done
check test_mpi_few_pages_have_the_bytes_of_one_gpu same $model --prompts "$work/many" -b 6 --kv-memory 6M --ignore-eos --logprobs 2
check test_mpi_perplexity_is_that_of_one_gpu same $model --perplexity README.md -c 512 --json
for type in int4 int8 fp8; do check test_mpi_${type}_has_the_bytes_of_one_gpu quantised $type; done
check test_mpi_8b_has_the_bytes_of_one_gpu same --synthetic llama-3.1-8b --ids -p "$(ids 700)" -n 200 --ignore-eos --json --logprobs 5
for engine in fused cublas; do check test_mpi_${engine}_equals_huggingface compares --engine $engine; done
check test_mpi_gpus_beside_mpirun_are_refused refused 2 "gpus $GPUS in each of $GPUS processes" $model -p x --gpus $GPUS
check test_mpi_missing_file_is_said_once refused 1 "/no/such/file" /no/such/file -p x
check test_mpi_usage_is_refused_once refused 2 "unknown flag --nonsense" --nonsense
check test_mpi_ends_when_a_follower_is_killed ends KILL 1
check test_mpi_ends_when_rank_0_is_killed ends KILL 0
check test_mpi_ends_when_a_follower_is_interrupted ends INT 1
check test_mpi_ends_when_rank_0_is_interrupted ends INT 0
check test_mpi_ends_at_ctrl_c ends INT mpirun
exit ${failed:-0}
