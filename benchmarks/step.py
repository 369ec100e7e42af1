"""Time optimizer steps at every stage of a track, and what each kernel and choice is worth.

    python benchmarks/step.py [--steps=8] [--compare=all] [--cap_gib=22] [--profile] [--out=FILE] [flags]

Other flags go to train_gpt.py (--track=short is the default). Prints, for each stage, the median
milliseconds per micro-batch (forward, backward and its share of the optimizer's step, so over an even
number of steps), their range, tokens per second, share of bf16 peak, peak memory allocated and reserved
(what graphs hold is reserved only), and the seconds from the start of the process to the first timed step.
--compare=NAME,NAME or all does the same for variants, in the same process; one whose loss is not the first
one's fails the run. --profile adds the kernels that take the time. Tokens are synthetic: frequencies fall
off like words', lengths of documents are log-normal.
"""

import argparse
import gc
import inspect
import json
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg

MLP = ("mlp_forward", "mlp_backward")
VARIANTS = {  # name: (flags, kernels replaced by torch.compile of their references)
    "default": ((), ()),
    "CUDA graphs off": (("--graphs=off",), ()),
    "FlashAttention 2": (("--attention=fa2",), ()),
    "float8 MLP off": (("--fp8_mlp=off",), ()),
    "float8 MLP and head off": (("--fp8=off",), ()),
    "float8 MLP and fused MLP off": (("--fp8_mlp=off",), MLP),
    "cross-entropy kernel off": ((), ("cross_entropy",)),
    "polynomial kernel off": ((), ("polynomial",)),
    "transpose kernel off": ((), ("transpose",)),
    "TMA off": (("--kernels=pointer",), ()),
    "TMA and float8 off": (("--kernels=pointer", "--fp8=off"), ()),
    "compiled plain torch": (("--kernels=reference", "--fp8=off", "--graphs=off"), MLP),
    "windows off (dense causal)": (("--sliding_window=off",), ()),
}
SAME_LOSS = 0.02  # relative, after the same steps; a wrong kernel diverges


def tokens_of(cfg: tg.Config, stage: tg.Stage) -> int:
    """Of a micro-batch on one GPU."""
    return tg.micro_tokens(cfg, tg.World(), stage)


def synthetic_batch(cfg: tg.Config, stage: tg.Stage, rng) -> tg.MicroBatch:
    """A packed micro-batch: word-like token frequencies, log-normal document lengths (mean about 1,000)."""
    T = tokens_of(cfg, stage)
    tokens = np.minimum(rng.zipf(1.15, T + 1) - 1, rng.integers(0, cfg.vocab_size - 1, T + 1))
    lengths = np.clip(rng.lognormal(6.4, 1.0, T), 16, stage.max_doc).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    starts = starts[starts < T]
    tokens[starts] = cfg.bos
    return tg.MicroBatch(torch.from_numpy(tokens), tg.to_documents(starts, T, stage.max_doc))


class Bench:
    """A model and its optimizer after a few steps: weights are no longer zero, everything is compiled."""

    def __init__(self, cfg: tg.Config):
        self.cfg, self.hardware, self.step = cfg, tg.choose_hardware(cfg, tg.World()), 0
        self.cuda = self.hardware.device.type == "cuda"
        with self.hardware.device:
            self.model = tg.build_model(cfg, self.hardware)
            self.model.prefix_V = torch.randint(cfg.vocab_size, (cfg.vocab_size,))
        self.optimizer = tg.Optimizer(self.model, tg.optimizer_table(cfg), tg.World(), self.hardware.compile)
        first = {}  # of the steps of each size
        for step in range(cfg.total_steps):
            plan = tg.plan_step(cfg, step)
            first.setdefault(plan.stage.batch_tokens, plan)
        self.plans = list(first.values())
        for plan in reversed(self.plans):  # the largest first
            self.prepare(plan)
            self.train(plan).item()
            if self.model.graphs:
                tg.add_graph(self.model, self.batches[0], plan, self.rotary, self.weights(plan))
        if self.model.graphs:
            self.model.graphs.capture()

    def weights(self, plan: tg.StepPlan):
        return tg.loss_weights(self.cfg, plan, self.hardware.device)

    def prepare(self, plan: tg.StepPlan):
        rng = np.random.default_rng(plan.stage_index)
        longest = max(tokens_of(self.cfg, stage) for stage in self.cfg.stages)
        self.rotary = tg.build_rotary(self.cfg, plan.stage_index, longest, self.hardware.device)
        batches = [synthetic_batch(self.cfg, plan.stage, rng) for _ in range(self.cfg.micro_batches)]
        self.batches = [tg.MicroBatch(t.pin_memory() if self.cuda else t, docs) for t, docs in batches]

    def train(self, plan: tg.StepPlan) -> torch.Tensor:
        loss, *_ = tg.train_step(self.model, self.optimizer, self.batches, plan, self.rotary, self.step)
        self.step += 1
        return loss

    def time(self, plan: tg.StepPlan, steps: int) -> dict:
        """Milliseconds per micro-batch over `steps` steps, timed in pairs: Adam works at every other one."""
        self.prepare(plan)
        for _ in range(2):
            self.train(plan).item()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        compiled, times = tg.compilations(), []
        for _ in range(steps // 2):
            self.hardware.synchronize()
            began = time.perf_counter()
            self.train(plan)
            loss = self.train(plan)
            self.hardware.synchronize()
            times.append((time.perf_counter() - began) * 1e3 / 2 / self.cfg.micro_batches)
        T = tokens_of(self.cfg, plan.stage)
        metrics = tg.step_metrics(self.model, self.hardware, tg.World(), T, statistics.median(times) / 1e3)
        return {"tokens": T, "ms": statistics.median(times), "low": min(times), "high": max(times),
                "n": len(times), **metrics, **self.memory(), "loss": loss.item(),
                "compilations": tg.compilations() - compiled}

    def memory(self) -> dict:
        reserved = torch.cuda.max_memory_reserved() >> 20 if self.cuda else 0
        return {"peak_mib": tg.memory_mib(self.hardware), "reserved_mib": reserved}

    def profile(self, plan: tg.StepPlan) -> str:
        with tg.new_profile(self.hardware) as profile:
            self.train(plan)
            self.train(plan)
            self.hardware.synchronize()
        return tg.kernel_table(profile, 2 * self.cfg.micro_batches, rows=45)

    def validate(self) -> dict:
        """One validation chunk: seconds and peak memory."""
        rng = np.random.default_rng(0)
        batch = synthetic_batch(self.cfg, self.cfg.stages[-1], rng)
        tokens = np.resize(batch.tokens.numpy(), self.cfg.val_chunk + 1)
        val, windows = tg.Validation(self.cfg, tokens), tg.final_windows(self.cfg)
        rotary = tg.build_rotary(self.cfg, len(self.cfg.stages) - 1, val.positions, self.hardware.device)
        if self.model.graphs:
            self.model.graphs.release()
        val.run(self.model, windows, rotary, tg.World())
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        val.run(self.model, windows, rotary, tg.World())
        return {"tokens": val.count, "seconds": time.perf_counter() - began, **self.memory()}


@contextmanager
def replaced(names: tuple):
    """Kernels replaced by torch.compile of their plain-torch references."""
    originals = {name: getattr(tg, name) for name in names}
    for name, original in originals.items():
        setattr(tg, name, compiled_reference(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(tg, name, original)


def compiled_reference(wrapper):
    def reference(*args, **named):
        bound = inspect.signature(wrapper).bind(*args, **named)
        bound.arguments["mode"] = "reference"
        return wrapper(*bound.args, **bound.kwargs)

    compiled_already = wrapper.__name__ in ("polynomial", "cross_entropy")  # a library's product, a region
    return reference if compiled_already else torch.compile(reference, dynamic=False)


def row(name: str, r: dict) -> str:
    mfu = f"{r['mfu']:.2f}" if "mfu" in r else "-"
    return (f"| {name} | {r['tokens']:,} | {r['ms']:.2f} | {r['low']:.2f} - {r['high']:.2f} "
            f"| {r['tokens_per_s']:,} | {mfu} | {r['peak_mib']:,} | {r['reserved_mib']:,} |")


def measure(name: str, flags: list, args) -> dict:
    """All stages of a variant, printed as they come."""
    own, kernels = VARIANTS[name]
    cfg = tg.parse_config([*flags, *own])
    with replaced(kernels):
        bench = Bench(cfg)
        out = {"first_step_s": time.time() - tg.STARTED}
        out["stages"] = [bench.time(plan, args.steps) for plan in bench.plans]
        for r in out["stages"]:
            print(row(name, r), flush=True)
        if args.profile and name == "default":
            for plan in bench.plans:
                bench.prepare(plan)
                print(f"\n{tokens_of(cfg, plan.stage)} tokens, {bench.profile(plan)}\n")
        out["validation"] = bench.validate()
    return out


def free_memory():
    """Of the variant before, whose graphs are in cycles of references."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--compare", default="")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--cap_gib", type=float, default=0)
    parser.add_argument("--out", type=Path)
    args, flags = parser.parse_known_args()
    flags = ["--track=short", *flags]  # later ones win
    if args.steps < 2 or args.steps % 2:
        parser.error(f"--steps={args.steps}: an even number, as Adam works at every other step")
    names = list(VARIANTS) if args.compare == "all" else ["default", *filter(None, args.compare.split(","))]
    unknown = set(names) - set(VARIANTS)
    if unknown:
        parser.error(f"--compare: no {unknown}; there are {', '.join(VARIANTS)}")
    try:
        tg.parse_config(flags)
    except tg.UserError as error:
        parser.error(str(error))
    if args.cap_gib:
        share = args.cap_gib * 2**30 / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(share)
    print("| variant | tokens a micro-batch | ms | range | tokens/s | of bf16 peak | MiB allocated "
          "| reserved |\n|---|--:|--:|--:|--:|--:|--:|--:|")
    results = {}
    for name in names:
        try:
            results[name] = measure(name, flags, args)
        except torch.OutOfMemoryError as error:
            if name == "default":
                sys.exit(f"default: {str(error).split('.')[0]}")
            results[name] = {"stages": [], "out_of_memory": str(error)}
            print(f"| {name} | doesn't fit |")
        free_memory()
        if args.out:
            args.out.write_text(json.dumps(results, indent=1))
    default = results["default"]
    val = default["validation"]
    print(f"\nstart of the process to the first timed step: {default['first_step_s']:.1f} s")
    print(f"validation of {val['tokens']:,} tokens: {val['seconds']:.2f} s, "
          f"{val['peak_mib']:,} MiB allocated")
    late = {name: sum(r["compilations"] for r in result["stages"]) for name, result in results.items()}
    print(f"compilations within timed steps: {sum(late.values())}")
    for name, result in results.items():
        for r, base in zip(result["stages"], default["stages"]):
            if abs(r["loss"] / base["loss"] - 1) > SAME_LOSS and "windows" not in name:
                sys.exit(f"{name}: loss {r['loss']} at {r['tokens']} tokens, not {base['loss']}")


if __name__ == "__main__":
    main()
