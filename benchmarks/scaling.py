"""One run on more GPUs of a host: the same training, how much faster, and what the exchange costs.

    python benchmarks/scaling.py --data=FOLDER [--gpus=1,2,4] [--profile] [--out=FILE] [flags]

Runs 60 steps of the short track with torchrun once for each number of GPUs, one after the other, and prints a
table: the median milliseconds of a step in each stage, over pairs of steps, as Adam works at every other one;
the efficiency, time on one GPU / (GPUs x time on them), in each stage and for the schedule at these medians;
and the final loss. --profile adds the milliseconds a step in which a GPU did nothing but exchange, from a
trace of four steps of the first stage, which don't enter the medians. Numbers of GPUs that --out (JSON) has
already aren't run again. Other flags go to train_gpt.py.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SCRIPT = Path(__file__).resolve().parent.parent / "train_gpt.py"
sys.path.insert(0, str(SCRIPT.parent))
import train_gpt as tg
from data.shards import user_path

PROFILED = 4
CUT = "--track=short --scheduled_steps=60 --extension_steps=0 --val_every=60 --val_tokens=262144".split()


def pairs(train_time: dict, first: int, last: int, skip: set) -> list[float]:
    """Seconds of a step, over the pairs of steps first + 1 .. last that hold none of `skip`."""
    ends = range(first + 2, last + 1, 2)
    return [(train_time[s] - train_time[s - 2]) / 2 for s in ends
            if s - 2 in train_time and not skip & {s - 1, s}]


def stage_medians(train_time: dict, cfg: tg.Config, skip: set) -> list[dict]:
    """One entry per stage that has steps: their number and the median seconds of one.

    train_time: {step: seconds on the clock}. A stage's first step and those after a validation, at which the
    host is not ahead of the GPU, are left out.
    """
    plans = [tg.plan_step(cfg, step).stage_index for step in range(cfg.total_steps)]
    skip = skip | {step + 1 for step in range(0, cfg.total_steps, cfg.val_every)}
    out = []
    for stage in dict.fromkeys(plans):
        first, count = plans.index(stage), plans.count(stage)
        last = first + count
        seconds = pairs(train_time, first + 1, last, skip) or pairs(train_time, first, last, set())
        if seconds:
            out.append({"steps": count, "seconds": statistics.median(seconds), "pairs": len(seconds)})
    return out


def exposed_ms(trace: Path) -> float:
    """Milliseconds of a trace in which communication ran on the GPU and nothing else did."""
    events = [e for e in json.loads(trace.read_text())["traceEvents"]
              if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    edges = []
    for e in events:
        kind = "nccl" in e["name"].lower()
        edges += [(e["ts"], 1, kind), (e["ts"] + e["dur"], -1, kind)]
    running, before, total = [0, 0], 0.0, 0.0
    for moment, change, kind in sorted(edges):
        if running[True] and not running[False]:
            total += moment - before
        running[kind] += change
        before = moment
    return total / 1e3


def train_traced(trace: str, flags: list):
    """The script's main(), in a rank, with a trace of some steps, from the third on, that rank 0 writes."""
    inner, first_rank = tg.train_step, os.environ["RANK"] == "0"
    profiler = torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=2, warmup=0, active=PROFILED, repeat=1),
        on_trace_ready=lambda profile: profile.export_chrome_trace(trace) if first_rank else None)

    def train_step(*args):
        report = inner(*args)
        profiler.step()
        return report

    tg.train_step, sys.argv = train_step, [str(SCRIPT), *flags]
    profiler.start()
    tg.main()


def run(gpus: int, flags: list, profile: bool, folder: Path) -> dict:
    trace = folder.with_suffix(".json")
    script = [__file__, f"--trace={trace}"] if profile else [str(SCRIPT)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}",
               *script, *flags, f"--log_folder={folder}", "--save_every=-1"]
    if subprocess.run(command).returncode:
        sys.exit(f"training on {gpus} GPUs failed: see above")
    (log,) = folder.iterdir()
    rows = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    train_time = {0: 0.0} | {r["step"]: r["train_time"] for r in rows if "train_loss" in r}
    cfg = tg.parse_config(flags)
    skip = set(range(3, 4 + PROFILED)) if profile else set()
    final = [r for r in rows if "val_loss" in r][-1]
    out = {"gpus": gpus, "stages": stage_medians(train_time, cfg, skip), "val_loss": final["val_loss"],
           "train_seconds": final["train_time"]}
    if profile:
        out["exposed_ms"] = exposed_ms(trace) / PROFILED
    return out


def table(results: list[dict]) -> str:
    count = len(results[0]["stages"])
    stages = [f"stage {i + 1}" if i < 3 else "extension" for i in range(count)]
    head = " | ".join(f"{stage}, ms a step (efficiency)" for stage in stages)
    lines = [f"| GPUs | {head} | schedule, s (efficiency) | only exchanging, ms a step | final loss |",
             "|--:" * (count + 4) + "|"]
    whole = [sum(s["steps"] * s["seconds"] for s in r["stages"]) for r in results]
    for r, total in zip(results, whole):
        share = results[0]["gpus"] / r["gpus"]
        cells = [f"{s['seconds'] * 1e3:.1f} ({base['seconds'] * share / s['seconds']:.3f})"
                 for s, base in zip(r["stages"], results[0]["stages"])]
        exposed = f"{r['exposed_ms']:.2f}" if "exposed_ms" in r else "-"
        cells += [f"{total:.2f} ({whole[0] * share / total:.3f})", exposed, f"{r['val_loss']:.4f}"]
        lines.append(f"| {r['gpus']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    if sys.argv[1:] and sys.argv[1].startswith("--trace="):  # a rank
        return train_traced(sys.argv[1].partition("=")[2], sys.argv[2:])
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--gpus", default="1,2,4")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=user_path)
    args, flags = parser.parse_known_args()
    flags = [*CUT, *flags]  # later ones win
    if not all(number.isdigit() and int(number) for number in args.gpus.split(",")):
        parser.error(f"--gpus={args.gpus}: expected numbers, as 1,2,4")
    results = json.loads(args.out.read_text()) if args.out and args.out.is_file() else []
    done = {result["gpus"] for result in results}
    with tempfile.TemporaryDirectory() as folder:
        for gpus in sorted(set(map(int, args.gpus.split(","))) - done):
            results.append(run(gpus, flags, args.profile, Path(folder) / str(gpus)))
            if args.out:
                args.out.write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
