#!/bin/sh
# coverage.sh BUILD: lines that were run, file by file and in all.
build=$1
for file in llama.c $(find cli model tokenizer -name '*.c' | sort); do
    object=$build/${file%.c}
    [ -f "${object}_avx2.gcda" ] && object=${object}_avx2 # compiled once for each instruction set
    [ -f "$object.gcda" ] || continue
    gcov -n -o "$object.gcno" "$file" 2> /dev/null | awk -v file="$file" '
        /^File/ { mine = ($0 == "File \047" file "\047") }
        /^Lines executed:/ && mine { sub("Lines executed:", ""); sub("% of", ""); print $1, $2, file; exit }'
done | awk '
    { printf "%6.2f %% of %4d  %s\n", $1, $2, $3; hit += $1 * $2 / 100; all += $2 }
    END { printf "line coverage: %.1f %% of %d lines\n", all ? 100 * hit / all : 0, all }'
