#!/usr/bin/env python3
"""Draw what `llama --bench --json` measured: python3 scripts/plot_bench.py BENCH.json [PICTURE.svg]

    ./llama --synthetic llama-3.1-8b --bench --json > bench.json

Three pictures in one: how close decode comes to the speed at which this machine reads memory, the time a step takes, and
prefill beside this machine's matrix products. The suffix chooses the format (SVG, PNG, PDF). Needs matplotlib.
"""
import argparse
import json
import os
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

INK, GREY = "#222222", "#8a8a8a"


def tokens(n):
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)


def milliseconds(ms):
    return f"{ms:,.0f} ms" if ms >= 1000 else f"{ms:.4g} ms"


def length_axis(ax, lengths, label):
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [tokens(n) for n in lengths])
    ax.minorticks_off()
    ax.set_xlabel(label)


def errors(rows, value):
    """The medians, and how far the smallest and the largest are from them. value: of a row and its milliseconds."""
    middle = [value(row, row["ms"]["median"]) for row in rows]
    ends = [[value(row, row["ms"][end]) for row in rows] for end in ("min", "max")]
    low, high = ([min(pair) for pair in zip(*ends)], [max(pair) for pair in zip(*ends)])
    return middle, [[m - x for m, x in zip(middle, low)], [x - m for m, x in zip(middle, high)]]


def draw_decode(ax, rows, value, colours):
    for batch, colour in colours.items():
        line = [row for row in rows if row["batch"] == batch]
        middle, spread = errors(line, value)
        ax.errorbar([row["context"] for row in line], middle, yerr=spread, fmt="o-", color=colour, capsize=2, ms=4,
                    lw=1.6, label=f"batch {batch}")
    length_axis(ax, sorted({row["context"] for row in rows}), "tokens in the cache")


def draw(bench):
    decode = [row for row in bench["decode"] if "ms" in row]
    prefill = [row for row in bench["prefill"] if "ms" in row]
    batches = sorted({row["batch"] for row in decode})
    shades = matplotlib.colormaps["viridis"]
    colours = {b: shades(0.9 * i / max(1, len(batches) - 1)) for i, b in enumerate(batches)}
    read, product = bench["read"]["gb_s"]["median"], bench["product"]["tflop_s"]["median"]

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14.5, 4.8))
    draw_decode(left, decode, lambda row, ms: 100 * row["bytes"] / (ms * 1e6) / read, colours)
    left.axhline(100, color=GREY, lw=1, ls="--")
    left.set(ylim=(0, 105), ylabel="% of what this machine reads", title=f"Decode: share of {read:,.0f} GB/s")
    left.legend(fontsize=9, frameon=False, loc="lower left", ncols=2)

    draw_decode(middle, decode, lambda row, ms: ms / row["batch"], colours)
    middle.set(yscale="log", ylabel="ms per token", title="Decode: time per token")
    middle.yaxis.set_major_formatter("{x:g}")
    low, high = middle.get_ylim()
    middle.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else "")
    middle.grid(which="minor", axis="y", alpha=0.12)
    one = [row for row in decode if row["batch"] == 1]
    for row in one:
        middle.annotate(f"{row['ms']['median']:.3g}", (row["context"], row["ms"]["median"]), xytext=(0, 7),
                        textcoords="offset points", ha="center", fontsize=9, color=INK)

    scale, unit = (1, "TFLOP/s") if product >= 1 else (1e3, "GFLOP/s")
    places, (heights, spread) = range(len(prefill)), errors(prefill, lambda row, ms: scale * row["tflop_s"] *
                                                            row["ms"]["median"] / ms)
    right.bar(places, heights, yerr=spread, capsize=3, width=0.6, color=shades(0.35))
    for x, row in zip(places, prefill):
        right.annotate(f"{100 * row['share']:.0f} %\n{milliseconds(row['ms']['median'])}", (x, heights[x]), xytext=(0, 6),
                       textcoords="offset points", ha="center", fontsize=9, color=INK)
    right.axhline(scale * product, color=GREY, lw=1, ls="--")
    right.annotate(bench["product"]["how"], (0.01, scale * product), xycoords=("axes fraction", "data"), xytext=(2, 3),
                   textcoords="offset points", fontsize=8, color=GREY)
    right.set(ylim=(0, 1.15 * max([scale * product, *heights])), xlabel="tokens of the prompt", ylabel=unit,
              title="Prefill")
    right.set_xticks(places, [tokens(row["tokens"]) for row in prefill])

    for ax in (left, middle, right):
        ax.grid(axis="y", alpha=0.3)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    name = bench["model"]["synthetic"] or f"dim {bench['model']['dim']}, {bench['model']['n_layers']} layers"
    figure.suptitle(f"{name}, {bench['precision']}, engine {bench['engine']}, {bench['machine']['name']}   (medians; "
                    "bars from the smallest to the largest)", fontsize=11)
    figure.tight_layout()
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", metavar="BENCH.json")
    parser.add_argument("picture", metavar="PICTURE", nargs="?", help="BENCH.svg")
    args = parser.parse_args()
    try:
        with open(args.bench) as file:
            bench = json.load(file)
    except (OSError, ValueError) as error:
        sys.exit(f"plot_bench.py: {args.bench}: {error}")
    plt.rcParams.update({"svg.hashsalt": "llama", "font.size": 10})
    figure = draw(bench)
    picture = args.picture or os.path.splitext(args.bench)[0] + ".svg"
    figure.savefig(picture, dpi=120, metadata={"Date": None} if picture.endswith(".svg") else None)


if __name__ == "__main__":
    main()
