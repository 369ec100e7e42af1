"""Time and check every kernel of train_gpt.py against plain torch, torch.compile and its floor.

    python benchmarks/kernels.py [--stages=1,2,3] [--only=NAME,..] [--out=FILE.json]

Shapes are those of the short track's micro-batches. Prints a Markdown table of median microseconds. The floor
is the larger of FLOP over the speed of a large bfloat16 product and bytes over that of a large copy, both
measured first; each input is read and each output written once. Attention is compared with dense causal: the
same call with window = T. The error is mean |ours - exact| over mean |exact|, exact being float64 on the
first 256 rows; above the kernel's bound the run fails. On a CPU all is of toy size and in float32, in plain
torch or, with TRITON_INTERPRET=1, in Triton's interpreter.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg
from data.shards import user_path
from step import synthetic_batch

ROWS = 256


class Case(NamedTuple):
    """One line of the table."""

    shape: str
    run: partial                 # what the script calls, but for mode=..
    exact: tuple                 # float64: the first rows of each result
    bound: float                 # of the error
    flop: float = 0
    dense: Callable | None = None  # compared with instead of plain torch


class Setting(NamedTuple):
    cfg: tg.Config
    hardware: tg.Hardware
    mode: str

    def tokens(self, stage: tg.Stage) -> int:
        return self.cfg.micro_tokens(stage)

    def random(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, device=self.hardware.device).mul_(std).to(self.hardware.dtype)

    def batch(self, stage: tg.Stage) -> tuple[Tensor, tg.Documents]:
        tokens, docs, _ = synthetic_batch(self.cfg, stage, np.random.default_rng(0))
        cu_seqlens = docs.cu_seqlens.to(self.hardware.device)
        return tokens.to(self.hardware.device), docs._replace(cu_seqlens=cu_seqlens)

    def time_us(self, function: Callable) -> float:
        if self.hardware.device.type == "cuda":
            return 1e3 * tg.triton.testing.do_bench(function, warmup=10, rep=40, return_mode="median")
        began = time.perf_counter()
        function()
        return 1e6 * (time.perf_counter() - began)


def choose_setting() -> Setting:
    cuda = torch.cuda.is_available()
    cfg = tg.parse_config(["--track=short"] if cuda else ["--track=tiny", "--micro_batches=1"])
    if not cuda:
        toy = [tg.Stage(i / 3, 64 * (i + 1), 80, 8 * (i + 1), 24 * (i + 1), 1.0) for i in range(3)]
        cfg = replace(cfg, stages=tuple(toy), vocab_size=257)
    hardware = tg.choose_hardware(cfg, tg.World())
    interpreted = tg.triton and os.environ.get("TRITON_INTERPRET") == "1"
    return Setting(cfg, hardware, "small" if interpreted else hardware.kernels)


def mlp_forward(s: Setting, stage: tg.Stage):
    T, D, hidden, slope = s.tokens(stage), s.cfg.width, tg.MLP_RATIO * s.cfg.width, s.cfg.leaky_slope
    h_TD, up_FD = s.random(T, D).to(torch.float8_e4m3fn), s.random(hidden, D, std=D**-0.5)
    up_FD, scale = up_FD.to(torch.float8_e4m3fn), torch.ones((), device=h_TD.device)
    r = F.leaky_relu(h_TD[:ROWS].double() @ up_FD.double().T, slope)
    run = partial(tg.mlp_forward, h_TD, up_FD, scale, slope)
    yield Case(f"{T:,} x {D} x {hidden:,}", run, (r, r * r), 0.1, 2 * T * D * hidden)


def mlp_backward(s: Setting, stage: tg.Stage):
    """Two of the results are transposed: their first rows are the first hidden channels of all tokens."""
    T, D, hidden, slope = s.tokens(stage), s.cfg.width, tg.MLP_RATIO * s.cfg.width, s.cfg.leaky_slope
    grad_TD, r_TF = s.random(T, D).to(torch.float8_e5m2), s.random(T, hidden).bfloat16()
    down_FD, scale = s.random(hidden, D, std=D**-0.5), torch.ones((), device=r_TF.device)
    down_FD, exact = down_FD.to(torch.float8_e4m3fn), []
    for tokens, channels in ((slice(ROWS), slice(None)), (slice(None), slice(ROWS))):
        r = r_TF[tokens, channels].double()
        u_grad = grad_TD[tokens].double() @ down_FD[channels].double().T * 2 * F.leaky_relu(r, slope)
        exact += [u_grad, u_grad.T, (r * r).T]
    run = partial(tg.mlp_backward, grad_TD, down_FD, r_TF, scale, slope)
    yield Case(f"{T:,} x {D} x {hidden:,}", run, (exact[0], exact[5], exact[4]), 0.1, 2 * T * D * hidden)


def entropy(logits_TV, targets_TK, weights_K, scale, dtype, mode):
    lse_T = tg.log_sum(logits_TV, mode)
    loss_T, places_TK, pulls_TK, _ = tg.loss_region(logits_TV, lse_T, targets_TK, weights_K)
    return loss_T, tg.logits_gradient(logits_TV, lse_T, places_TK, pulls_TK, scale, dtype, mode)


def cross_entropy(s: Setting, stage: tg.Stage, dtype: torch.dtype, bound: float):
    """A chunk of the head, scaled as in head_step. The bounds allow for rounding and an approximate tanh."""
    T, V = min(tg.LOSS_CHUNK, s.tokens(stage)), s.cfg.padded_vocab
    logits_TV, targets_TK = s.random(T, V, std=4), s.batch(stage)[0][1 : T + 1, None]
    weights_K = torch.full((1,), 1 / stage.batch_tokens, device=logits_TV.device)
    scale = weights_K.sum() * 2.0**-14 if dtype.itemsize == 1 else weights_K.new_ones(())
    height, shift, width = tg.CAP_HEIGHT, tg.CAP_SHIFT, tg.CAP_WIDTH
    tanh, targets = ((logits_TV[:ROWS].double() + shift) / width).tanh(), targets_TK[:ROWS]
    log_p = (height * tanh).log_softmax(-1)
    loss = -weights_K.double() * log_p.gather(1, targets)[:, 0]
    steepness = height / width * (weights_K / scale).double()
    grad = (log_p.exp() - F.one_hot(targets[:, 0], V)) * (1 - tanh.square()) * steepness
    run = partial(entropy, logits_TV, targets_TK, weights_K, scale, dtype)
    yield Case(f"{T:,} x {V:,}", run, (loss, grad), bound)


def transpose(s: Setting, stage: tg.Stage):
    T, V = min(tg.LOSS_CHUNK, s.tokens(stage)), s.cfg.padded_vocab
    x_TV = s.random(T, V).to(torch.float8_e5m2)
    yield Case(f"{T:,} x {V:,}", partial(tg.transpose, x_TV), (x_TV[:, :ROWS].T.double(),), 0)


def attention(s: Setting, stage: tg.Stage):
    """Forward, at the short and the long window."""
    T, H, E, docs = s.tokens(stage), s.cfg.heads, s.cfg.width // s.cfg.heads, s.batch(stage)[1]
    qkv = s.random(T, H, E, std=0.1), s.random(T, H, E), s.random(T, H, E)
    position, starts = torch.arange(T, device=s.hardware.device), docs.cu_seqlens.long()
    start = starts[torch.searchsorted(starts, position, right=True) - 1]
    back, same = position[:ROWS, None] - position[:ROWS], start[:ROWS, None] == start[:ROWS]
    q, k, v = (x[:ROWS].double() for x in qkv)

    def attend(q_THE, k_THE, v_THE, window, mode=None):
        attention = tg.attention_reference if s.hardware.attention == "reference" else tg.attention_varlen
        return attention(q_THE, k_THE, v_THE, docs, window)

    for window in (stage.window_short, stage.window_long):
        unseen = (back < 0) | (back > window) | ~same
        share = torch.einsum("qhe,khe->hqk", q, k).masked_fill(unseen, -torch.inf).softmax(-1)
        exact = torch.einsum("hqk,khe->qhe", share, v)
        pairs = ((position - start).clamp(max=window) + 1).sum().item()
        yield Case(f"{T:,}, window {window:,}", partial(attend, *qkv, window), (exact,), 1e-2,
                   4 * pairs * H * E, dense=partial(attend, *qkv, T))


KERNELS = {
    "mlp_forward": mlp_forward, "mlp_backward": mlp_backward,
    "cross_entropy_float8": partial(cross_entropy, dtype=torch.float8_e5m2, bound=0.06),
    "cross_entropy_bfloat16": partial(cross_entropy, dtype=torch.bfloat16, bound=5e-3),
    "transpose": transpose, "attention": attention,
}
ALIKE = {"cross_entropy_float8", "cross_entropy_bfloat16", "transpose"}  # at every stage


def measure_ceilings(s: Setting) -> tuple[float, float]:
    """FLOP/s of a square product, and bytes/s, read and written, of a copy."""
    n, count = (8192, 2**29) if s.hardware.device.type == "cuda" else (128, 2**19)
    a, b, source, target = s.random(n, n), s.random(n, n), s.random(count), s.random(count)
    product_us, copy_us = s.time_us(lambda: a @ b), s.time_us(lambda: target.copy_(source))
    return 2e6 * n**3 / product_us, 2e6 * source.nbytes / copy_us


def relative_error(result: Tensor, exact: Tensor) -> Tensor:
    return (result[: len(exact)].double() - exact).abs().sum() / exact.abs().sum()


def measure(s: Setting, name: str, case: Case, flop_rate: float, byte_rate: float) -> dict:
    results = case.run(mode=s.mode)
    results = results if isinstance(results, tuple) else (results,)
    errors = [relative_error(*pair) for pair in zip(results, case.exact, strict=True)]
    moved = sum(x.nbytes for x in (*case.run.args, *results) if isinstance(x, Tensor))
    row = {"kernel": name, "shape": case.shape, "flop": case.flop, "bytes": moved,
           "error": torch.stack(errors).max().item(), "bound": case.bound,  # the maximum with a NaN is NaN
           "floor_us": 1e6 * max(case.flop / flop_rate, moved / byte_rate), "compiled_us": None}
    del results
    row["ours_us"] = s.time_us(partial(case.run, mode=s.mode))
    row["torch_us"] = s.time_us(case.dense or partial(case.run, mode="reference"))
    if s.hardware.compile and not case.dense:
        compiled = torch.compile(case.run.func, dynamic=False)
        compiled = partial(compiled, *case.run.args, **case.run.keywords, mode="reference")
        row["compiled_us"] = s.time_us(compiled)
    return row


def markdown(row: dict) -> str:
    columns = "torch_us", "compiled_us", "ours_us", "floor_us"
    times = [f"{row[column]:,.1f}" if row[column] else "-" for column in columns]
    ratio, error = f"{row['ours_us'] / row['floor_us']:.2f}", f"{row['error']:.1e}"
    return f"| {' | '.join([row['kernel'], row['shape'], *times, ratio, error])} |"


def report(s: Setting, names: list, stages: list, out: Path | None) -> list:
    """Print the table, line by line; its rows."""
    began, rates, rows = time.perf_counter(), measure_ceilings(s), []
    title = f"{s.hardware.name}, torch {torch.__version__}, {s.mode} kernels, products at "
    title += f"{rates[0] / 1e12:,.3g} TFLOP/s, copies at {rates[1] / 1e9:,.0f} GB/s"
    print(title if s.hardware.device.type == "cuda" else f"toy size, times mean nothing: {title}")
    print("\n| kernel | shape | torch us | compiled us | ours us | floor us | ours/floor | error |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for name in names:
        for stage in stages[:1] if name in ALIKE else stages:
            for case in KERNELS[name](s, stage):
                rows.append(measure(s, name, case, *rates))
                print(markdown(rows[-1]), flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s")
    if out:
        ceilings = {"flop_per_second": rates[0], "bytes_per_second": rates[1]}
        out.write_text(json.dumps({"title": title, **ceilings, "rows": rows}, indent=1))
    return rows


def main(argv: list | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stages", default="1,2,3")
    parser.add_argument("--only", default=",".join(KERNELS))
    parser.add_argument("--out", type=user_path)
    args = parser.parse_args(argv)
    names, numbers = args.only.split(","), args.stages.split(",")
    if not set(names) <= set(KERNELS):
        parser.error(f"--only={args.only}: expected some of {','.join(KERNELS)}")
    if not set(numbers) <= {"1", "2", "3"}:
        parser.error(f"--stages={args.stages}: expected some of 1,2,3")
    torch.manual_seed(0)
    s = choose_setting()
    stages = [s.cfg.stages[int(number) - 1] for number in numbers]
    wrong = [row for row in report(s, names, stages, args.out) if not row["error"] <= row["bound"]]
    if wrong:
        sys.exit("; ".join(f"{row['kernel']} {row['shape']}: error {row['error']:.1e} exceeds {row['bound']}"
                           for row in wrong))


if __name__ == "__main__":
    main()
