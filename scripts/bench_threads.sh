#!/usr/bin/env bash
# Measures a token and a prompt with one thread and with several, on a machine that is otherwise idle and on one whose
# cores are all kept busy by other processes, by one or more builds of the program:
#
#     scripts/bench_threads.sh                        # ./llama on the story model
#     scripts/bench_threads.sh OLD NEW                # two builds beside each other
#     scripts/bench_threads.sh --runs 5 --prompt 32 --new 8 OLD NEW -- --synthetic llama-3.2-1b
#
#   --runs N          runs of each build, number of threads and condition (9)
#   --threads "N..."  numbers of threads ("1 2")
#   --busy "N..."     conditions: how many other processes keep cores busy meanwhile ("0" and the number of cores)
#   --prompt N        tokens of the prompt (256)
#   --new N           tokens after it (200)
#   -- ARGUMENTS      the model (model/stories.bin)
#
# Runs alternate: each round has one of every kind. The table has the medians of the milliseconds for a new token and
# for the prompt (the first token's), the fastest and the slowest run, and the median as a multiple of one thread's of
# the same build (of the first of --threads).
set -euo pipefail

runs=9 threads="1 2" busy="0 $(nproc)" prompt=256 new=200 programs=() model=(model/stories.bin)

usage() {
    echo "bench_threads.sh: $1 (the comment at its head lists the options)" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case $1 in
    --runs | --threads | --busy | --prompt | --new)
        [ $# -ge 2 ] || usage "$1: its value is missing"
        printf -v "${1#--}" %s "$2"
        shift
        ;;
    --) model=("${@:2}") && break ;;
    -*) usage "$1: unknown" ;;
    *)
        [ -x "$1" ] || usage "$1: no program"
        programs+=("$(realpath "$1")")
        ;;
    esac
    shift
done
for value in "$runs" "$prompt" "$new" $threads $busy; do
    case $value in '' | *[!0-9]*) usage "\"$value\": expected a whole number" ;; esac
done
cd "$(dirname "$0")/.."
[ ${#programs[@]} -gt 0 ] || programs=("$PWD/llama")
[ -x "${programs[0]}" ] || usage "${programs[0]}: no program; run make first"

work=$(mktemp -d)
others=()
stop_others() {
    [ ${#others[@]} -eq 0 ] && return
    kill "${others[@]}" 2> /dev/null
    wait "${others[@]}" 2> /dev/null || true
    others=()
}
trap 'stop_others; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

ids=$(for ((i = 0; i < prompt; i++)); do printf '%d ' $((100 + i * 37 % 900)); done)

measure() { # PROGRAM THREADS FILES: the milliseconds of one run are a line of FILES.token and FILES.prompt
    OMP_NUM_THREADS=$2 "$1" "${model[@]}" --engine cpu --ids -p "$ids" -n "$new" --ignore-eos --json --quiet > "$work/answer" 2> "$work/error" ||
        { cat "$work/error" >&2 && exit 1; }
    sed -n 's/.*"ms_per_token": \([0-9.]*\).*/\1/p' "$work/answer" >> "$3.token"
    sed -n 's/.*"first_token_ms": \([0-9.]*\).*/\1/p' "$work/answer" >> "$3.prompt"
}

for n_busy in $busy; do
    for ((i = 0; i < n_busy; i++)); do
        (while :; do :; done) &
        others+=($!)
    done
    for ((run = 0; run < runs; run++)); do
        for n in $threads; do
            for i in "${!programs[@]}"; do measure "${programs[i]}" "$n" "$work/$n_busy.$n.$i"; done
        done
    done
    stop_others
done

echo "$(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo | head -n 1), $(nproc) cores; ${model[*]}, $prompt tokens and $new; medians of $runs"
printf '%-7s %-8s %-8s %11s %11s %11s %7s  %s\n' what others threads ms fastest slowest ratio program
for what in token prompt; do
    for n_busy in $busy; do
        for i in "${!programs[@]}"; do
            one=
            for n in $threads; do
                read -r median fastest slowest < <(sort -n "$work/$n_busy.$n.$i.$what" | awk '
                    { ms[NR] = $1 }
                    END { print NR % 2 ? ms[(NR + 1) / 2] : (ms[NR / 2] + ms[NR / 2 + 1]) / 2, ms[1], ms[NR] }')
                one=${one:-$median}
                printf '%-7s %-8s %-8s %11.3f %11.3f %11.3f %7.2f  %s\n' "$what" "$n_busy busy" "$n" "$median" "$fastest" \
                    "$slowest" "$(awk "BEGIN { print $median / $one }")" "${programs[i]}"
            done
        done
    done
done
