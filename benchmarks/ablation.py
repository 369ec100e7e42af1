"""Which mechanisms pay: the default over several seeds, and each mechanism off or changed, one run each.

    python benchmarks/ablation.py --data=FOLDER [--seeds=3] [--only=name,name] [--out=FILE]

Runs race300 once per variant, one run per visible GPU at a time (on a CPU only --track=tiny makes sense).
Finished variants are kept in --out (JSON) and not run again, so a sweep can be spread over several occasions.
Prints a Markdown table: a difference below 2 sd of the default's seeds is 'not resolved'. Other flags go to
train_gpt.py.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

SCRIPT = Path(__file__).resolve().parent.parent / "train_gpt.py"
sys.path.insert(0, str(SCRIPT.parent))
import train_gpt as tg
from data.shards import user_path

VARIANTS = {
    "smear-MTP off": ["--smear_mtp=off"],
    "2 MTP heads, weight 0.1": ["--mtp_heads=2"],
    "LeakyReLU slope 0": ["--leaky_slope=0"],
    "LeakyReLU slope 0.75": ["--leaky_slope=0.75"],
    "bigram table off": ["--bigram_ratio=0"],
    "bigram table of V rows": ["--bigram_ratio=1"],
    "head and embedding apart": ["--untie_at=0"],
    "pointer off": ["--pointer=off"],
    "learning-rate floor 0.1": ["--lr_floor=0.1"],
    "value embeddings start at 0": ["--value_std=0"],
    "backout and late attention off": ["--backout_from=-1"],
    "slow momentum off": ["--slow_momentum=1"],
    "averaged weights off": ["--average=0"],
    "attention lr x 1": ["--attn_lr_ratio=1"],
    "momentum rises over 600 steps": ["--momentum_warmup=600"],
}


def read_log(folder: Path) -> dict:
    """Validation losses and smear-MTP lambdas by step, training seconds and peak memory of a finished run."""
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    validations = [row for row in rows if "val_loss" in row]
    text = (folder / "log.txt").read_text()
    return {
        "val_loss": {row["step"]: row["val_loss"] for row in validations},
        "smear_mtp_lambda": {r["step"]: r["lambdas"].get("smear_mtp_lambda", [None])[0] for r in validations},
        "train_seconds": validations[-1]["train_time"],
        "peak_mib": int(re.search(r"peak memory: (\d+)", text)[1]),
        "device": re.search(r"device: .*\((.*)\)", text)[1],
        "source_sha256": re.search(r"sha256:(\w+)", text)[1],
    }


def run_all(jobs: dict, flags: list, out: Path, results: dict):
    """Run the jobs that `results` lacks, one per GPU at a time, and write `out` after each."""
    free, running = list(range(torch.cuda.device_count())) or [""], {}  # "": on the CPU
    todo = [name for name in jobs if name not in results]
    scratch = Path(tempfile.mkdtemp())
    while todo or running:
        while todo and free:
            name, gpu = todo.pop(0), free.pop(0)
            logs = scratch / re.sub(r"\W+", "_", name)
            command = [sys.executable, SCRIPT, *flags, *jobs[name], f"--log_folder={logs}", "--save_every=-1"]
            log = open(scratch / f"{logs.name}.txt", "w")
            env = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}
            running[name] = subprocess.Popen(command, stdout=log, stderr=log, env=env), gpu, logs, log.name
        for name, (process, gpu, logs, output) in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            free.append(gpu)
            if process.returncode:
                end = Path(output).read_text()[-300:]
                print(f"{name}: exit {process.returncode}: {end}", file=sys.stderr)
                continue
            results[name] = read_log(next(logs.iterdir())) | {"flags": flags + jobs[name]}
            out.write_text(json.dumps(results, indent=1))
            print(f"{name}: {list(results[name]['val_loss'].values())[-1]:.4f}", file=sys.stderr, flush=True)
        time.sleep(1)


def table(results: dict) -> str:
    """Markdown: final loss of each variant against the default's seeds."""
    final = {name: list(result["val_loss"].values())[-1] for name, result in results.items()}
    seeds = [loss for name, loss in final.items() if name.startswith("default")]
    mean, sd = statistics.mean(seeds), statistics.stdev(seeds) if len(seeds) > 1 else float("nan")
    seconds = statistics.mean(r["train_seconds"] for n, r in results.items() if n.startswith("default"))
    rows = ["| variant | final loss | difference | verdict | train s |", "|---|--:|--:|---|--:|",
            f"| default, n = {len(seeds)} | {mean:.4f}, sd {sd:.4f} | | | {seconds:.1f} |"]
    for name in sorted((n for n in final if not n.startswith("default")), key=final.get):
        gap = final[name] - mean
        verdict = "not resolved" if not abs(gap) > 2 * sd else "worse" if gap > 0 else "better"
        seconds = results[name]["train_seconds"]
        rows.append(f"| {name} | {final[name]:.4f} | {gap:+.4f} | {verdict} | {seconds:.1f} |")
    return "\n".join(rows)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--seeds", type=int, default=3, help="runs of the default (3)")
    parser.add_argument("--only", default="", help="comma-separated names of variants; default: all")
    parser.add_argument("--out", type=user_path, default="ablation.json", help="results (ablation.json)")
    options, flags = parser.parse_known_args()
    flags = ["--track=race300", *flags]  # later ones win
    wanted = [name for name in options.only.split(",") if name] or list(VARIANTS)
    unknown = [name for name in wanted if name not in VARIANTS]
    if unknown:
        parser.error(f"unknown variant {unknown[0]!r}: expected some of {', '.join(VARIANTS)}")
    try:
        default = tg.parse_config(flags)
        same = [name for name in wanted if tg.parse_config([*flags, *VARIANTS[name]]) == default]
    except tg.UserError as error:
        parser.error(str(error))
    if same:
        print(f"as the default, so not run: {', '.join(same)}", file=sys.stderr)
    jobs = {f"default seed {seed}": [f"--seed={seed}"] for seed in range(options.seeds)}
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    run_all(jobs | {name: VARIANTS[name] for name in wanted if name not in same}, flags, options.out, results)
    print(table(results))


if __name__ == "__main__":
    main()
