#!/usr/bin/env python3
"""Draw what `llama --bench --json` measured: python3 scripts/plot_bench.py BENCH.json [PICTURE.svg]

    ./llama --synthetic llama-3.1-8b --bench --json > bench.json
    python3 scripts/plot_bench.py bench.json bench.svg --commit 1234567 --peers peers.json

Four pictures in one: the time of a step of one sequence, beside that of other programs and the lower bound that memory
bandwidth sets; the time of a step of a batch; the tokens per second of the whole batch; the tokens per second of a
prompt. A point is a median, its error bar reaches from the smallest to the largest sample. The suffix chooses the
format (SVG, PNG, PDF). Needs matplotlib.

--peers FILE has what other programs took for the same shape and dtype on the same machine, in milliseconds:

    [{"name": "llama.cpp", "version": "b1234", "how": "BF16, -ngl 99 -fa 1",
      "decode": [{"context": 2048, "batch": 1, "ms": 4.98}],
      "prefill": [{"tokens": 2048, "ms": 76.7}]}]

scripts/bench_peers.py --json FILE writes such a file for transformers. --peers may be given several times.
"""
import argparse
import json
import os
import re
import sys

INK, GREY, OURS = "#222222", "#767676", "#1f5fa8"
PEERS = ["#d1730f", "#3f8f5b", "#8e4fa8", "#8a6d3b"]    # in the order of the files


def tokens(n):
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)


def number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def measured(rows):
    return [row for row in rows if "ms" in row]


def spread(rows, value):
    """The medians, and how far the ends of each row's samples are from them. value: of a row and its milliseconds."""
    middle = [value(row, row["ms"]["median"]) for row in rows]
    ends = [[value(row, row["ms"][end]) for row in rows] for end in ("min", "max")]
    return middle, [[m - min(pair) for m, pair in zip(middle, zip(*ends))],
                    [max(pair) - m for m, pair in zip(middle, zip(*ends))]]


def annotate(ax, text, x, y, up, colour=INK, size=9, **where):
    ax.annotate(text, (x, y), xytext=(0, up), textcoords="offset points", color=colour, fontsize=size,
                **{"ha": "center", "va": "bottom" if up > 0 else "top", **where})


def context_axis(ax, rows):
    contexts = sorted({row["context"] for row in rows})
    ax.set_xscale("log", base=2)
    ax.set_xticks(contexts, [tokens(n) for n in contexts])
    ax.set_xlim(contexts[0] / 1.6, contexts[-1] * 1.6)
    ax.minorticks_off()
    ax.set_xlabel("context length, tokens")


def log_axis(ax, label):
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high < 1000 * low:       # 2 and 5 have labels, too
        ax.set_yticks([step * 10.0 ** power for power in range(-6, 9) for step in (1, 2, 5)])
        ax.set_ylim(low, high)
    ax.yaxis.set_major_formatter("{x:,g}")
    ax.yaxis.set_minor_formatter("")
    ax.set_ylabel(label)


def draw_line(ax, rows, value, colour, label=None):
    """A line with bars. Returns its medians, and the upper ends of its bars."""
    middle, ends = spread(rows, value)
    ax.errorbar([row["context"] for row in rows], middle, yerr=ends, fmt="o-", color=colour, capsize=2.5, ms=4, lw=1.6,
                label=label)
    return middle, [m + up for m, up in zip(middle, ends[1])]


def draw_one_sequence(ax, rows, read, peers):
    """Time of a step of one sequence; tokens/s on the right; other programs; the lower bound of memory bandwidth."""
    contexts = [row["context"] for row in rows]
    highest = 0
    for colour, peer in peers:
        line = sorted((row["context"], row["ms"]) for row in peer.get("decode", [])
                      if row["batch"] == 1 and row["context"] in contexts)
        if line:
            ax.plot(*zip(*line), "s-", color=colour, ms=4.5, lw=1.4, label=peer["name"])
        for x, y in line:
            annotate(ax, number(y), x, y, 5, colour)
            highest = max(highest, y)
    middle, tops = draw_line(ax, rows, lambda row, ms: ms, OURS, "llama")
    for x, y, top in zip(contexts, middle, tops):
        annotate(ax, number(y), x, top, 4, OURS)
    ax.plot(contexts, [row["bytes"] / (read * 1e6) for row in rows], ls="--", lw=1.2, color=GREY,
            label=f"lower bound: weights and cache read at {number(read)} GB/s")
    ax.legend(fontsize=9, frameon=False, loc="upper left", reverse=True)
    highest = max(highest, *tops)
    ax.set(ylim=(0, 1.45 * highest), ylabel="ms per step", title="One sequence: time of a step, and tokens/s")
    right = ax.secondary_yaxis("right")     # the same ticks in tokens/s
    ticks = [ms for ms in ax.get_yticks() if 0 < ms <= 1.45 * highest]
    right.set_yticks(ticks, [number(1000 / ms) for ms in ticks])
    right.set_ylabel("tokens/s")
    context_axis(ax, rows)


def label_ends(ax, ends):
    """A text after the last point of each line, those at one place far enough apart to be read."""
    below = {}                              # context -> where the label below is, in points
    for x, y, text, colour in sorted(ends, key=lambda end: end[1]):
        at = ax.transData.transform((x, y))[1] * 72 / ax.figure.dpi
        up = max(0, below.get(x, -1e9) + 11 - at)
        below[x] = at + up
        ax.annotate(text, (x, y), xytext=(8, up), textcoords="offset points", color=colour, fontsize=9, va="center",
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.5})


def draw_batches(ax, rows, value, colours, label, title):
    ends = []
    for batch, colour in colours.items():
        line = [row for row in rows if row["batch"] == batch]
        middle, _ = draw_line(ax, line, value, colour)
        ends.append((line[-1]["context"], middle[-1], f"batch {batch}", colour))
    log_axis(ax, label)
    context_axis(ax, rows)
    ax.set_title(title)
    return ends


def draw_prompts(ax, rows, product, peers):
    """Tokens/s of prompts, a group of bars for each length: this program's, then each peer's."""
    bars = [("llama", OURS, {row["tokens"]: row["ms"]["median"] for row in rows})]
    for colour, peer in peers:
        times = {row["tokens"]: row["ms"] for row in peer.get("prefill", [])}
        if any(row["tokens"] in times for row in rows):
            bars.append((peer["name"], colour, times))
    width, highest = 0.8 / len(bars), 0
    for i, (name, colour, times) in enumerate(bars):
        places = [(x - 0.4 + (i + 0.5) * width, row) for x, row in enumerate(rows) if row["tokens"] in times]
        heights = [row["tokens"] / times[row["tokens"]] * 1e3 for _, row in places]
        ends = spread([row for _, row in places], lambda row, ms: row["tokens"] / ms * 1e3)[1] if i == 0 else None
        ax.bar([x for x, _ in places], heights, yerr=ends, capsize=2.5, width=0.92 * width, color=colour, label=name,
               error_kw={"ecolor": INK, "lw": 1})
        for at, ((x, row), height) in enumerate(zip(places, heights)):
            top = height + (ends[1][at] if ends else 0)
            highest = max(highest, top)
            annotate(ax, number(times[row["tokens"]]), x, top, 3, colour, 8.5)
    if len(bars) > 1:
        ax.legend(fontsize=9, frameon=False, loc="upper right", ncols=len(bars))
    shares = ", ".join(f"{100 * row['share']:.0f}" for row in rows)
    unit, scale = ("TFLOP/s", 1) if product["tflop_s"]["median"] >= 1 else ("GFLOP/s", 1e3)
    ax.set(ylim=(0, (1.2 if len(bars) > 1 else 1.1) * highest), ylabel="tokens/s",
           title="Prompts: tokens/s, and ms above each bar",
           xlabel=f"tokens of the prompt\nllama: {shares} % of {scale * product['tflop_s']['median']:,.0f} {unit}\n"
                  f"(measured peak: {product['how']})")
    ax.set_xticks(range(len(rows)), [tokens(row["tokens"]) for row in rows])
    ax.yaxis.set_major_formatter("{x:,g}")


def draw(plt, bench, commit, peers):
    decode, prefill = measured(bench["decode"]), measured(bench["prefill"])
    batches = sorted({row["batch"] for row in decode})
    shades = plt.get_cmap("viridis")
    colours = {b: shades(0.85 * i / max(1, len(batches) - 1)) for i, b in enumerate(batches)}
    peers = list(zip(PEERS, peers))

    figure, ((one, steps), (rates, prompts)) = plt.subplots(2, 2, figsize=(12.5, 10))
    smallest = [row for row in decode if row["batch"] == batches[0]]
    draw_one_sequence(one, smallest, bench["read"]["gb_s"]["median"], peers)
    many = f"Batches of {batches[0]} to {batches[-1]} sequences: " if len(batches) > 1 else f"Batch {batches[0]}: "
    labels = [(ax, draw_batches(ax, decode, value, colours, label, many + title)) for ax, value, label, title in (
        (steps, lambda row, ms: ms, "ms per step", "time of a step"),
        (rates, lambda row, ms: row["batch"] / ms * 1e3, "tokens/s", "tokens/s in all"))]
    draw_prompts(prompts, prefill, bench["product"], peers)
    for ax in (one, steps, rates, prompts):
        ax.grid(axis="y", alpha=0.3)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)

    name = bench["model"]["synthetic"] or f"dim {bench['model']['dim']}, {bench['model']['n_layers']} layers"
    machine = bench["machine"]
    lines = [f"{bench['program']}{f', commit {commit}' if commit else ''}, engine {bench['engine']}: {name}, "
             f"{bench['precision']}, {machine['name']}, {machine['software']}. Medians; bars from the smallest to the "
             "largest sample."]
    for _, peer in peers:
        lines.append(f"{peer['name']}: {', '.join(text for text in (peer.get('version'), peer.get('how')) if text)}")
    figure.text(0.01, 0.995, "\n".join(lines), fontsize=9.5, va="top", linespacing=1.45, color=INK)
    figure.tight_layout(rect=(0, 0, 0.965, 1 - 0.012 - 0.0215 * len(lines)), h_pad=2.2, w_pad=2)
    for ax, ends in labels:     # when the axes have their places
        label_ends(ax, ends)
    return figure


def compact(svg):
    """The same picture in fewer bytes: lines joined, two decimals, and the font named once."""
    family = re.search("font-family: ([^;\"]*)", svg)[1]
    svg = svg.replace(f" font-family: {family};", "").replace("<svg ", f'<svg font-family="{family}" ', 1)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"|<!--.*?-->|stroke-(?:linejoin|linecap|miterlimit): \w+;? ?', "", svg)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)
    svg = re.sub(r' ?\n(?=[MLCz"])', " ", svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    for _ in range(2):          # groups of one element
        svg = re.sub(r"<g(?: id=\"[^\"]*\")?>\n(<(?:use|text|path) .*)\n</g>", r"\1", svg)
    return svg


def read_json(path):
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        sys.exit(f"plot_bench.py: {path}: {error}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", metavar="BENCH.json")
    parser.add_argument("picture", metavar="PICTURE", nargs="?", help="BENCH.svg")
    parser.add_argument("--commit", help="of the program that was measured, for the heading")
    parser.add_argument("--peers", metavar="FILE", action="append", default=[], help="what other programs took")
    args = parser.parse_args()
    bench, peers = read_json(args.bench), []
    for path in args.peers:
        found = read_json(path)
        peers += found if isinstance(found, list) else [found]
    if len(peers) > len(PEERS):
        sys.exit(f"plot_bench.py: {len(peers)} other programs, expected at most {len(PEERS)}")

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    # Text stays text: small, and searchable.
    plt.rcParams.update({"svg.hashsalt": "llama", "svg.fonttype": "none", "font.size": 10,
                         "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"]})
    figure = draw(plt, bench, args.commit, peers)
    picture = args.picture or os.path.splitext(args.bench)[0] + ".svg"
    if not picture.endswith(".svg"):
        figure.savefig(picture, dpi=120)
        return
    figure.savefig(picture, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    with open(picture) as file:
        svg = compact(file.read())
    with open(picture, "w") as file:
        file.write(svg)


if __name__ == "__main__":
    main()
