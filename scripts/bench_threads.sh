#!/usr/bin/env bash
# Measures what a token costs with one thread and with several, on a machine that is otherwise idle and on one whose cores
# are all busy with other processes, by one or more builds of the program:
#
#     scripts/bench_threads.sh                               # ./llama on the story model
#     scripts/bench_threads.sh OLD NEW                       # two builds beside each other
#     scripts/bench_threads.sh --runs 15 --threads "1 2 4" --busy 0 -- --synthetic llama-3.2-1b -n 8 -p Once
#
#   --runs N          runs of each build, number of threads and condition (9)
#   --threads "N..."  numbers of threads ("1 2")
#   --busy "N..."     conditions: how many other processes keep cores busy meanwhile ("0" and the number of cores)
#   -- ARGUMENTS      of the program (model/stories.bin, 200 tokens)
#
# Runs alternate: each round has one of every kind. The table has the median of the milliseconds a token, the fastest and
# the slowest run, and the median as a multiple of the one thread's of the same build.
set -euo pipefail

runs=9 threads="1 2" busy="0 $(nproc)" programs=()
arguments=(model/stories.bin -p "Once upon a time" -n 200 --ignore-eos)

usage() {
    echo "bench_threads.sh: $1 (the comment at its head lists the options)" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case $1 in
    --runs | --threads | --busy)
        [ $# -ge 2 ] || usage "$1: its value is missing"
        printf -v "${1#--}" %s "$2"
        shift
        ;;
    --) arguments=("${@:2}") && break ;;
    -*) usage "$1: unknown" ;;
    *) programs+=("$(realpath "$1")") ;;
    esac
    shift
done
cd "$(dirname "$0")/.."
[ ${#programs[@]} -gt 0 ] || programs=("$PWD/llama")
for program in "${programs[@]}"; do [ -x "$program" ] || usage "$program: no program"; done

work=$(mktemp -d)
others=()
stop_others() {
    [ ${#others[@]} -eq 0 ] || kill "${others[@]}" 2> /dev/null
    others=()
}
trap 'stop_others; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

measure() { # PROGRAM THREADS FILE: the milliseconds a token of one run are a line of the file
    OMP_NUM_THREADS=$2 "$1" "${arguments[@]}" --json --quiet > "$work/answer" 2> "$work/error" ||
        { cat "$work/error" >&2 && exit 1; }
    sed -n 's/.*"ms_per_token": \([0-9.]*\).*/\1/p' "$work/answer" >> "$3"
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

echo "$(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo | head -n 1), $(nproc) cores; ${arguments[*]}; medians of $runs"
printf '%-10s %-8s %10s %10s %10s %8s  %s\n' others threads ms fastest slowest ratio program
for n_busy in $busy; do
    for i in "${!programs[@]}"; do
        one=
        for n in $threads; do
            sort -n "$work/$n_busy.$n.$i" | awk -v others="$n_busy busy" -v threads="$n" -v one="$one" -v program="${programs[i]}" '
                { ms[NR] = $1 }
                END {
                    median = NR % 2 ? ms[(NR + 1) / 2] : (ms[NR / 2] + ms[NR / 2 + 1]) / 2
                    printf "%-10s %-8s %10.3f %10.3f %10.3f %8.2f  %s\n", others, threads, median, ms[1], ms[NR], median / (one ? one : median), program
                }' > "$work/line"
            cat "$work/line"
            [ -n "$one" ] || one=$(awk '{ print $4 }' "$work/line")
        done
    done
done
