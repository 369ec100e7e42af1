"""Time optimizer steps at every stage of a track, and what each kernel and choice is worth.

    python benchmarks/step.py [--steps=8] [--compare=all] [--cap_gib=22] [--profile] [--out=FILE] [flags]

Other flags go to train_gpt.py (--track=short is the default). Prints, for each stage, the median
milliseconds per micro-batch (forward, backward and its share of the optimizer's step, so over an even
number of steps), their range, tokens per second, share of bf16 peak, peak memory allocated and reserved
(what graphs hold is reserved only), and the seconds from the start of the process to the first timed step.
--compare=NAME,NAME or all does the same for variants, in the same process; one whose loss is not the first
one's fails the run. --profile adds the kernels (on a CPU the operators) that take the time in each stage.
Tokens are synthetic: frequencies fall off like words', lengths of documents are log-normal.
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
from typing import NamedTuple

import numpy as np
import torch
import torch._dynamo

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg
from data.shards import user_path


class Variant(NamedTuple):
    """What differs from the default."""

    flags: tuple = ()
    plain: tuple = ()            # kernels replaced by torch.compile of their references
    small: bool = False          # the MLP's kernel as on GPUs with less shared memory


VARIANTS = {
    "default": Variant(),
    "CUDA graphs off": Variant(("--graphs=off",)),
    "FlashAttention 2": Variant(("--fa3=off",)),
    "float8 off": Variant(("--fp8=off",)),
    "softmax kernel off": Variant(plain=("log_sum", "logits_gradient")),
    "transpose kernel off": Variant(plain=("transpose",)),
    "small tiles": Variant(small=True),
    "compiled plain torch": Variant(("--kernels=off", "--fp8=off", "--graphs=off")),
}
SAME_LOSS = 0.02  # relative, after the same steps; a wrong kernel diverges


def synthetic_batch(cfg: tg.Config, stage: tg.Stage, rng) -> tg.MicroBatch:
    """A packed micro-batch: word-like token frequencies, log-normal document lengths (mean about 1,000)."""
    T = cfg.micro_tokens(stage)
    tokens = np.minimum(rng.zipf(1.15, T + 1) - 1, rng.integers(0, cfg.vocab_size - 1, T + 1))
    lengths = np.clip(rng.lognormal(6.4, 1.0, T), 16, stage.max_doc).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    starts = starts[starts < T]
    tokens[starts] = cfg.bos
    columns = tg.choose_columns(cfg, stage, tokens[1:], 0, torch.device("cpu"))
    return tg.MicroBatch(torch.from_numpy(tokens), tg.to_documents(starts, T, stage.max_doc), columns)


class Bench:
    """A model and its optimizer after a few steps: weights are no longer zero, everything is compiled."""

    def __init__(self, cfg: tg.Config, small: bool = False):
        self.cfg, self.world, self.step = cfg, tg.World(), 0
        self.hardware = tg.choose_hardware(cfg, self.world)
        if small and self.hardware.kernels == "large":
            self.hardware = self.hardware._replace(kernels="small")
        self.cuda = self.hardware.device.type == "cuda"
        self.model = tg.new_model(cfg, self.hardware)
        self.model.initialise(tg.draw_weights(cfg))
        self.optimizer = tg.Optimizer(self.model, tg.optimizer_table(cfg), self.world)
        first = {}  # of the steps of each size
        for step in range(cfg.total_steps):
            plan = tg.plan_step(cfg, step)
            first.setdefault(plan.stage.batch_tokens, plan)
        self.plans = list(first.values())
        for plan in reversed(self.plans):  # the largest first
            self.prepare(plan)
            self.train(plan).item()
            if self.model.graphs:
                weights = tg.loss_weights(cfg, plan, self.hardware.device)
                self.model.graphs.add(self.model, self.batches[0], plan, self.rotary, weights)
        if self.model.graphs:
            self.model.graphs.capture()

    def prepare(self, plan: tg.StepPlan):
        rng = np.random.default_rng(plan.stage_index)
        longest = max(self.cfg.micro_tokens(stage) for stage in self.cfg.stages)
        self.rotary = tg.build_rotary(self.cfg, longest, self.hardware.device)
        batches = [synthetic_batch(self.cfg, plan.stage, rng) for _ in range(self.cfg.micro_batches)]
        device = self.hardware.device
        self.batches = [
            tg.MicroBatch(tg.pinned(tokens, device), docs, None if c is None else tg.pinned(c, device))
            for tokens, docs, c in batches
        ]

    def train(self, plan: tg.StepPlan) -> torch.Tensor:
        report = tg.train_step(self.model, self.optimizer, self.batches, plan, self.rotary, self.step)
        self.step += 1
        return report["train_loss"]

    def time(self, plan: tg.StepPlan, steps: int) -> dict:
        """Milliseconds per micro-batch over `steps` steps, timed in pairs: Adam works at every other one."""
        self.prepare(plan)
        for _ in range(2):
            self.train(plan).item()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        compiled, times = compilations(), []
        for _ in range(steps // 2):
            self.hardware.synchronize()
            began = time.perf_counter()
            self.train(plan)
            loss = self.train(plan)
            self.hardware.synchronize()
            times.append((time.perf_counter() - began) * 1e3 / 2 / self.cfg.micro_batches)
        T = self.cfg.micro_tokens(plan.stage)
        metrics = tg.step_metrics(self, T, statistics.median(times) / 1e3)
        return {"tokens": T, "ms": statistics.median(times), "low": min(times), "high": max(times),
                "n": len(times), **metrics, **self.memory(), "loss": loss.item(),
                "compilations": compilations() - compiled}

    def memory(self) -> dict:
        reserved = torch.cuda.max_memory_reserved() >> 20 if self.cuda else 0
        return {"peak_mib": torch.cuda.max_memory_allocated() >> 20, "reserved_mib": reserved}

    def profile(self, plan: tg.StepPlan) -> str:
        """The kernels, on a CPU the operators, that take longest: milliseconds and calls a micro-batch."""
        self.prepare(plan)
        kinds = torch.profiler.ProfilerActivity
        activities = {kinds.CPU, kinds.CUDA} if self.cuda else {kinds.CPU}
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            self.train(plan)
            self.train(plan)
            self.hardware.synchronize()
        events, own = profile.key_averages(), "self_cpu_time_total"
        if self.cuda:
            events = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
            own = "self_device_time_total"
        runs = 2 * self.cfg.micro_batches
        rows = sorted(((getattr(e, own) / 1e3 / runs, e.count / runs, e.key) for e in events), reverse=True)
        lines = [f"{self.cfg.micro_tokens(plan.stage):,} tokens, {sum(ms for ms, *_ in rows):.2f} ms:"]
        lines += [f"{ms:9.3f} ms {calls:7.1f} x  {name[:80]}" for ms, calls, name in rows[:45]]
        return "\n".join(lines)

    def validate(self) -> dict:
        """One validation chunk: seconds and peak memory."""
        rng = np.random.default_rng(0)
        batch = synthetic_batch(self.cfg, self.cfg.stages[-1], rng)
        tokens = np.resize(batch.tokens.numpy(), self.cfg.val_chunk + 1)
        val, windows = tg.Validation(self.cfg, tokens), tg.plan_step(self.cfg, self.cfg.total_steps).windows
        rotary = tg.build_rotary(self.cfg, val.positions, self.hardware.device)
        if self.model.graphs:
            self.model.graphs.release()
        val.run(self.model, windows, rotary, self.world)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        val.run(self.model, windows, rotary, self.world)
        return {"tokens": val.count, "seconds": time.perf_counter() - began, **self.memory()}


def compilations() -> int:
    """Graphs that torch.compile has made so far in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@contextmanager
def replaced(names: tuple):
    """Kernels replaced by torch.compile of their references in plain torch."""
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

    compiled_already = wrapper.__name__ in ("log_sum", "logits_gradient")  # by regions
    return reference if compiled_already else torch.compile(reference, dynamic=False)


def row(name: str, r: dict) -> str:
    mfu = f"{r['mfu']:.2f}" if "mfu" in r else "-"
    return (f"| {name} | {r['tokens']:,} | {r['ms']:.2f} | {r['low']:.2f} - {r['high']:.2f} "
            f"| {r['tokens_per_s']:,} | {mfu} | {r['peak_mib']:,} | {r['reserved_mib']:,} |")


def measure(name: str, flags: list, args) -> dict:
    """All stages of a variant, printed as they come."""
    variant = VARIANTS[name]
    cfg = tg.parse_config([*flags, *variant.flags])
    with replaced(variant.plain):
        bench = Bench(cfg, variant.small)
        out = {"first_step_s": time.time() - tg.STARTED}
        out["stages"] = [bench.time(plan, args.steps) for plan in bench.plans]
        for r in out["stages"]:
            print(row(name, r), flush=True)
        if args.profile and name == "default":
            for plan in bench.plans:
                print(f"\n{bench.profile(plan)}\n")
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
    parser.add_argument("--out", type=user_path)
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
            if abs(r["loss"] / base["loss"] - 1) > SAME_LOSS:
                sys.exit(f"{name}: loss {r['loss']} at {r['tokens']} tokens, not {base['loss']}")


if __name__ == "__main__":
    main()
