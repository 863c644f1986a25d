#!/usr/bin/env python3
"""The attention library beside PyTorch's scaled_dot_product_attention, in one process on one GPU.

    python3 scripts/check_attention_torch.py [--errors] [--times] [--csv FILE] [--plot FILE]

Errors: the largest against float64 on the same rounded inputs; in f16 and bf16 ours may be at most 1.1 x SDPA's own.
Times: medians of CUDA graph replays, with buffers rotated past the L2 cache, peers first; the read ceiling is taken in
the same run by build/tests/read_ceiling. Exits 1 if an error is out of bounds.
"""
import argparse
import csv
import ctypes
import math
import os
import statistics
import subprocess
import sys
import warnings

I, L, P = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


def load_torch():
    """After the arguments are read: --help does not need it."""
    global torch, SDPBackend, sdpa_kernel
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError as missing:
        sys.exit(f"{os.path.basename(sys.argv[0])}: the Python package {missing.name} is missing: "
                 "pip install -r scripts/requirements.txt")


class AttentionArgs(ctypes.Structure):    # model/attention/attention.h
    _fields_ = (
        [(n, I) for n in "dtype n_seq n_heads n_kv_heads head_dim causal append verbose".split()]
        + [("scale", ctypes.c_float)]
        + [(n, P) for n in "q out k_new v_new".split()]
        + [(n, L) for n in ("q_token_stride q_head_stride out_token_stride out_head_stride "
                            "k_token_stride k_head_stride v_token_stride v_head_stride").split()]
        + [("k_cache", P), ("v_cache", P), ("cache_max_len", I), ("block_table", P), ("block_rows", P),
           ("block_size", I)]
        + [("q_start", ctypes.POINTER(I)), ("seq_lens", ctypes.POINTER(I)), ("seq_lens_device", P)]
        + [("n_new", I), ("n_tokens", I), ("q_start_device", P)]
        + [("workspace", P), ("workspace_bytes", ctypes.c_size_t), ("kv_stable", I)])


class Library:
    def __init__(self, path):
        try:
            self.so = ctypes.CDLL(path)
        except OSError as error:
            sys.exit(f"{os.path.basename(sys.argv[0])}: {error}; make lib builds it")
        self.so.attention_error.restype = ctypes.c_char_p
        self.so.attention_workspace_bytes.restype = ctypes.c_size_t
        for f in (self.so.attention_prefill, self.so.attention_decode):
            f.argtypes = [ctypes.POINTER(AttentionArgs), P]

    def args(self, q, out, k, v, causal=True):
        """q, out [token, head, D]; k, v the cache [seq, kv head, position, D] with every position in it already."""
        dtypes = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}    # the AttentionDtype of attention.h
        a = AttentionArgs(dtype=dtypes[q.dtype], n_seq=k.shape[0], n_heads=q.shape[1], n_kv_heads=k.shape[1],
                          head_dim=q.shape[2], causal=int(causal), q=q.data_ptr(), out=out.data_ptr(),
                          k_cache=k.data_ptr(), v_cache=v.data_ptr(), cache_max_len=k.shape[2],
                          q_token_stride=q.stride(0), q_head_stride=q.stride(1),
                          out_token_stride=out.stride(0), out_head_stride=out.stride(1))
        a.keep = (q, out, k, v)
        return a

    def prefill(self, a, counts, lens):
        starts = [0]
        for c in counts:
            starts.append(starts[-1] + c)
        a.q_start, a.seq_lens = (I * len(starts))(*starts), (I * len(lens))(*lens)
        return lambda: self.check(self.so.attention_prefill(ctypes.byref(a), torch.cuda.current_stream().cuda_stream))

    def decode(self, a, lens):
        a.lens = torch.tensor(lens, dtype=torch.int32, device="cuda")
        a.seq_lens_device, a.workspace_bytes = a.lens.data_ptr(), self.so.attention_workspace_bytes(ctypes.byref(a))
        a.space = torch.zeros(a.workspace_bytes, dtype=torch.uint8, device="cuda")
        a.workspace = a.space.data_ptr()
        return lambda: self.check(self.so.attention_decode(ctypes.byref(a), torch.cuda.current_stream().cuda_stream))

    def check(self, status):
        if status:
            raise RuntimeError(self.so.attention_error().decode())


def sdpa(q, k, v, causal, backend=None):    # [B, H, S, D]
    call = lambda: torch.nn.functional.scaled_dot_product_attention(    # noqa: E731
        q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    if backend is None:
        return call()
    with sdpa_kernel([backend]):
        return call()


def reference(q, k, v, causal):    # float64, a block of queries at a time
    group, S, T = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for h in range(q.shape[1]):
        kk, vv = k[:, h // group].double(), v[:, h // group].double()
        for i in range(0, S, 1024):
            s = q[:, h, i:i + 1024].double() @ kk.transpose(1, 2) / math.sqrt(q.shape[3])
            if causal:
                rows = torch.arange(i, i + s.shape[1], device=q.device)[:, None] + T - S
                s.masked_fill_(torch.arange(T, device=q.device)[None] > rows, -math.inf)
            out[:, h, i:i + 1024] = torch.softmax(s, -1) @ vv
    return out


# batch, heads, K/V heads, head_dim, new tokens, length with them, causal
ERROR_SHAPES = ((2, 8, 8, 64, 512, 512, True), (1, 32, 8, 128, 2048, 2048, True), (1, 32, 8, 128, 2048, 2048, False),
                (4, 14, 2, 64, 333, 333, True), (1, 32, 8, 128, 1, 2048, False), (16, 32, 8, 128, 1, 2048, False),
                (16, 8, 8, 64, 1, 2048, False), (1, 32, 32, 128, 1, 777, False), (1, 8, 2, 128, 8192, 8192, True))


def errors(lib):
    print(f"\n{'error against float64':44} {'ours':>10} {'SDPA':>10} {'flash':>10} {'cuDNN':>10} {'ours/SDPA':>10}")
    bad = 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for B, H, Hkv, D, S, T, causal in ERROR_SHAPES:
            torch.manual_seed(S + T + D)
            q = torch.randn(B, S, H, D, device="cuda").to(dtype)
            k, v = (torch.randn(B, Hkv, T, D, device="cuda").to(dtype) for _ in range(2))
            out = torch.full_like(q, math.nan).view(B * S, H, D)
            a = lib.args(q.view(B * S, H, D), out, k, v, causal)
            (lib.decode(a, [T - 1] * B) if S == 1 else lib.prefill(a, [S] * B, [T - S] * B))()
            qt = q.transpose(1, 2).contiguous()
            ref = reference(qt, k, v, causal)
            worst = lambda x: float((x.double() - ref).abs().nan_to_num(math.inf).max())
            ours = worst(out.view(B, S, H, D).transpose(1, 2))
            theirs = {}
            for name, backend in (("SDPA", None), ("flash", SDPBackend.FLASH_ATTENTION),
                                  ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
                try:
                    theirs[name] = worst(sdpa(qt, k, v, causal, backend))
                except RuntimeError:
                    theirs[name] = math.nan
            ratio = ours / theirs["SDPA"]
            failed = not (ours <= 1e-5 if dtype == torch.float32 else ratio <= 1.1)
            bad += failed
            label = f"{str(dtype)[6:]} B {B} {H}:{Hkv} D {D} new {S} of {T}{' causal' if causal else ''}"
            print(f"{label:44} {ours:10.2e} {theirs['SDPA']:10.2e} {theirs['flash']:10.2e} {theirs['cuDNN']:10.2e} "
                  f"{ratio:10.2f}{'  FAIL' if failed else ''}")
    return bad


def graph_us(calls, rounds=3, replays=25):
    """Median microseconds per call over replays of a graph of all calls `rounds` times, each on its own buffers."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for c in calls[:2]:
            c()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for c in calls:
                    c()
        times = []
        for _ in range(replays + 3):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1000 / (rounds * len(calls)))
    del graph
    return statistics.median(times[3:])


def maybe(f):
    try:
        return f()
    except RuntimeError as e:
        print("  (not run:", str(e).strip().split("\n")[0][:150] + ")")
        return math.nan


def decode_times(lib, rows, ceiling, table):
    print(f"\n{'decode, one new token':34} {'floor':>8} {'cuDNN':>8} {'flash':>8} {'ours':>8} {'ours not causal':>16} "
          f"{'share':>7} {'ours/cuDNN':>11}")
    for dtype, B, H, Hkv, D, T in rows:
        size = 4 if dtype == torch.float32 else 2
        bytes_moved = 2 * B * Hkv * T * D * size + 2 * B * H * D * size
        sets = max(2, min(48, math.ceil(256e6 / bytes_moved)))
        q = [torch.randn(B, H, 1, D, device="cuda").to(dtype) for _ in range(sets)]
        k, v = ([torch.randn(B, Hkv, T, D, device="cuda", dtype=dtype) for _ in range(sets)] for _ in range(2))
        rounds = max(1, 64 // sets)
        peer = {}
        for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
            peer[name] = math.nan if dtype == torch.float32 else maybe(
                lambda: graph_us([lambda i=i: sdpa(q[i], k[i], v[i], False, backend) for i in range(sets)], rounds))
        ours = {}
        for causal in (True, False):
            calls = []
            for i in range(sets):
                a = lib.args(q[i].view(B, H, D), torch.empty(B, H, D, dtype=dtype, device="cuda"), k[i], v[i], causal)
                a.kv_stable = 1    # the call before writes its own output only
                calls.append(lib.decode(a, [T - 1] * B))
            ours[causal] = graph_us(calls, rounds)
        floor = bytes_moved / ceiling / 1e3
        label = f"{str(dtype)[6:]} B {B} {H}:{Hkv} D {D} context {T}"
        print(f"{label:34} {floor:8.1f} {peer['cuDNN']:8.1f} {peer['flash']:8.1f} {ours[True]:8.2f} "
              f"{ours[False]:16.2f} {floor / ours[True]:7.1%} {ours[True] / peer['cuDNN']:11.3f}", flush=True)
        table.append(dict(phase="decode", dtype=str(dtype)[6:], batch=B, heads=H, kv_heads=Hkv, head_dim=D, context=T,
                          causal=1, floor_us=round(floor, 2), cudnn_us=round(peer["cuDNN"], 2),
                          flash_us=round(peer["flash"], 2), ours_us=round(ours[True], 2)))
        del q, k, v, calls


def prefill_times(lib, rows, table):
    print(f"\n{'prefill, B 1, TFLOP/s (us)':40} {'cuDNN':>16} {'flash':>16} {'ours':>16} {'ours/cuDNN':>11}")
    for dtype, H, Hkv, D, S, causal in rows:
        sets = 3 if S <= 8192 else 1
        flop = 4 * H * D * S * S / (2 if causal else 1)
        q = [torch.randn(1, S, H, D, device="cuda").to(dtype) for _ in range(sets)]
        k, v = ([torch.randn(1, Hkv, S, D, device="cuda").to(dtype) for _ in range(sets)] for _ in range(2))
        qt = [x.transpose(1, 2).contiguous() for x in q]
        rounds = 4 if S <= 2048 else 1
        peer = {}
        for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
            peer[name] = math.nan if dtype == torch.float32 else maybe(
                lambda: graph_us([lambda i=i: sdpa(qt[i], k[i], v[i], causal, backend) for i in range(sets)],
                                 rounds, 12))
        calls = []
        for i in range(sets):
            a = lib.args(q[i].view(S, H, D), torch.empty(S, H, D, dtype=dtype, device="cuda"), k[i], v[i], causal)
            calls.append(lib.prefill(a, [S], [0]))
        ours = graph_us(calls, rounds, 12)
        show = lambda us: f"{flop / us / 1e6:6.0f} ({us:7.0f})"
        label = f"{str(dtype)[6:]} {H}:{Hkv} D {D} {S} tokens{' causal' if causal else ''}"
        print(f"{label:40} {show(peer['cuDNN']):>16} {show(peer['flash']):>16} {show(ours):>16} "
              f"{peer['cuDNN'] / ours:11.3f}", flush=True)
        table.append(dict(phase="prefill", dtype=str(dtype)[6:], batch=1, heads=H, kv_heads=Hkv, head_dim=D, context=S,
                          causal=int(causal), floor_us="", cudnn_us=round(peer["cuDNN"], 2),
                          flash_us=round(peer["flash"], 2), ours_us=round(ours, 2)))
        del q, k, v, qt, calls


def plot(table, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    rows = [r for r in table if r["phase"] == "decode"
            and (r["batch"], r["heads"], r["kv_heads"], r["dtype"]) == (16, 32, 8, "bfloat16")]
    for name in ("ours", "cudnn", "flash", "floor"):
        axes[0].plot([r["context"] for r in rows], [r[name + "_us"] for r in rows], "--" if name == "floor" else "o-",
                     label=name)
    axes[0].set(yscale="log", xlabel="cache length", ylabel="us per call",
                title="decode, bf16, batch 16, 32:8 heads of 128")
    rows = [r for r in table if r["phase"] == "prefill" and r["causal"]
            and (r["heads"], r["head_dim"], r["dtype"]) == (32, 128, "bfloat16")]
    for name in ("ours", "cudnn", "flash"):
        axes[1].plot([r["context"] for r in rows],
                     [2 * r["heads"] * r["head_dim"] * r["context"] ** 2 / r[name + "_us"] / 1e6 for r in rows], "o-",
                     label=name)
    axes[1].set(xlabel="tokens", ylabel="TFLOP/s", title="causal prefill, bf16, 32:8 heads of 128")
    for ax in axes:
        ax.legend()
        ax.grid(alpha=0.3)
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main():
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--library", dest="lib", default=os.path.join(here, "build", "libattention.so"), metavar="FILE",
                    help="(build/libattention.so, which make lib builds)")
    ap.add_argument("--errors", action="store_true", help="only the errors")
    ap.add_argument("--times", action="store_true", help="only the times")
    ap.add_argument("--quick", action="store_true", help="only the times of the first rows")
    ap.add_argument("--csv", metavar="FILE", help="the times as a table")
    ap.add_argument("--plot", metavar="FILE", help="the times as a picture (with matplotlib)")
    opt = ap.parse_args()
    load_torch()
    warnings.filterwarnings("ignore", category=UserWarning)    # SDPA says at length why a back end cannot serve a call
    lib, bad, table = Library(opt.lib), 0, []
    torch.manual_seed(1)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    if not opt.times:
        bad = errors(lib)
        print("errors:", "ok" if not bad else f"{bad} out of bounds")
    if not opt.errors:
        probe = os.path.join(here, "build", "tests", "read_ceiling")
        if not os.path.exists(probe):
            sys.exit("check_attention_torch.py: build/tests/read_ceiling is not built; make compare-gpu builds it and "
                     "runs this")
        ceiling = float(subprocess.run([probe], check=True, capture_output=True, text=True).stdout.split()[0])
        print(f"read ceiling {ceiling:.0f} GB/s")
        b = torch.bfloat16
        rows = [(b, 16, 8, 8, 64, 2048), (b, 16, 32, 8, 128, 2048), (b, 64, 32, 8, 128, 2048), (b, 1, 32, 8, 128, 2048),
                (b, 1, 32, 8, 128, 8192), (b, 1, 32, 8, 128, 32768), (b, 1, 32, 8, 128, 131072),
                (b, 16, 32, 32, 128, 2048)]
        more = [(b, 1, 32, 32, 128, 2048), (b, 64, 32, 32, 128, 2048)]
        more += [(b, 16, 32, 8, 128, t) for t in (128, 256, 512, 1024, 4096)]
        more += [(torch.float16, 16, 32, 8, 128, 2048), (torch.float32, 16, 32, 8, 128, 2048),
                 (torch.float32, 1, 32, 8, 128, 2048)]
        decode_times(lib, rows if opt.quick else rows + more, ceiling, table)
        rows = [(b, 32, 8, 128, s, True) for s in (2048, 8192, 32768)] + [(b, 32, 8, 128, 8192, False)]
        more = [(b, 32, 8, 128, 512, True), (b, 32, 8, 128, 1024, True), (b, 32, 8, 128, 4096, True),
                (b, 32, 8, 128, 16384, True), (b, 32, 32, 64, 8192, True), (b, 32, 32, 96, 8192, True),
                (torch.float16, 32, 8, 128, 8192, True), (torch.float32, 32, 8, 128, 8192, True)]
        prefill_times(lib, rows if opt.quick else rows + more, table)
        both = {r["causal"]: r["ours_us"] for r in table
                if (r["phase"], r["dtype"], r["heads"], r["head_dim"], r["context"])
                == ("prefill", "bfloat16", 32, 128, 8192)}
        print(f"prefill at 8192, causal / not causal: {both[1] / both[0]:.3f}")
        table.sort(key=lambda r: (r["phase"], r["dtype"], r["batch"], r["heads"], r["kv_heads"], r["context"]))
        if opt.csv:
            with open(opt.csv, "w", newline="") as f:
                w = csv.DictWriter(f, table[0].keys())
                w.writeheader()
                w.writerows(table)
        if opt.plot:
            plot(table, opt.plot)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
