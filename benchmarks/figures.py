"""Draw the figures of the pages from results and records, and print the records' milliseconds by stage.

    python benchmarks/figures.py
"""

import json
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SPRINT = {  # record: label
    "december_again": "mechanisms of December 2025",
    "plain": "eleven newer techniques, in plain torch",
    "fewer_passes": "eleven newer techniques, with kernels",
}

RACE300 = {  # log: label
    "benchmarks/results/short_november/old_300_seed0.txt": "commit 47ba671, methods of December 2025",
    "records/track_0_race300/2026-11-28_short_november/seed0.txt": "commit aeae3ba",
}

sys.path.insert(0, str(ROOT / "records"))
from runs import parse_log  # noqa: E402


def points(series: dict) -> tuple[list, list]:
    """{"step": value} as plottable steps and values."""
    return [int(step) for step in series], list(series.values())


def finish(figure, axes, name: str, **labels):
    axes.set(**labels)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / name, dpi=110)
    plt.close(figure)


def sprints() -> dict:
    """{name: runs} of the sprint's records."""
    folders = sorted((ROOT / "records/track_0_sprint").iterdir())
    return {folder.name.split("_", 1)[1]: [parse_log(path) for path in sorted(folder.glob("seed*.txt"))]
            for folder in folders}


def stage_times(run, settle: int = 4) -> list[float]:
    """Milliseconds per micro-batch in each stage but the extension: medians over pairs of steps.

    Pairs, as Adam works at every other step; the first steps of a stage are left out.
    """
    at = {step.step: step.ms for step in run.steps if step.kind == "train"}
    ends = [round(stage["start"] * run.config["scheduled_steps"]) for stage in run.config["stages"]]
    pairs = [range(lo + settle + lo % 2, hi - 1, 2) for lo, hi in zip(ends, ends[1:])]
    return [float(np.median([(at[step + 2] - at[step]) / 2 for step in steps])) / run.config["micro_batches"]
            for steps in pairs]


def print_stages(records: dict):
    for name, runs in records.items():
        times = np.array([stage_times(run) for run in runs])
        print(name, *(f"{ms.mean():.1f} ({ms.min():.1f} to {ms.max():.1f})" for ms in times.T), sep=" | ")


def draw_sprint(records: dict, window: int = 7):
    """Losses over training seconds of the sprint's records: running means of training's, last validations."""
    figure, axes = plt.subplots(figsize=(7.5, 4))
    for i, (name, runs) in enumerate(records.items()):
        for run in runs:
            seconds, losses = np.array([(s.ms / 1e3, s.loss) for s in run.steps if s.kind == "train"]).T
            mean = np.convolve(losses, np.ones(window) / window, "valid")
            middle = seconds[window // 2 : -(window // 2)]
            axes.plot(middle, mean, color=f"C{i}", lw=0.8, alpha=0.6)
        axes.plot([run.seconds for run in runs], [run.loss for run in runs], f"C{i}o", ms=5,
                  label=f"{SPRINT[name]}: {np.mean([run.loss for run in runs]):.4f}, n = {len(runs)}")
    finish(figure, axes, "sprint_loss.png", xlabel="training seconds, one H100",
           ylabel="loss (nats per token)", ylim=(3.4, 6),
           title=f"sprint: training loss, mean of {window} steps, and last validation loss (dots)")


def draw_race300():
    """Validation losses over training seconds of 300 steps of short: old settings, and today's."""
    figure, axes = plt.subplots(figsize=(7.5, 4))
    for i, (name, label) in enumerate(RACE300.items()):
        found = re.findall(r"val_loss:([\d.]+) .*train_time:(\d+)ms", (ROOT / name).read_text())
        losses, seconds = np.array(found[1:], float).T / np.array([[1], [1000]])
        axes.plot(seconds, losses, "o-", color=f"C{i}", lw=1, ms=4, label=f"{label}: {losses[-1]:.4f}")
    axes.axhline(3.3356, color="k", ls=":", lw=1, label="modded-nanogpt of August 2026 ends at 3.3356")
    finish(figure, axes, "race300_loss.png", xlabel="training seconds, one H200",
           ylabel="validation loss (nats per token)", title="300 steps of the short track's batches")


def main():
    draw_race300()
    runs = json.loads((RESULTS / "sprint_ablation.json").read_text())
    seeds = [run for name, run in runs.items() if name.startswith("default")]

    records = sprints()
    draw_sprint({name: records[name] for name in SPRINT})
    print_stages(records)

    figure, axes = plt.subplots(figsize=(7.5, 3.2))
    for i, run in enumerate(seeds):
        axes.plot(*points(run["smear_mtp_lambda"]), "s-", ms=3, lw=1, color="C2", alpha=0.7,
                  label="sprint, 4 seeds" if not i else None)
    axes.plot(*points(runs["medium, 50 steps"]["smear_mtp_lambda"]), "o-", ms=4, lw=1, color="C3",
              label="medium squeezed to 50 steps")
    axes.axhline(0, color="k", lw=0.6)
    finish(figure, axes, "smear_mtp_lambda.png", xlabel="step", ylabel="smear-MTP lambda",
           title="learned weight of the previous token's latents")


if __name__ == "__main__":
    main()
