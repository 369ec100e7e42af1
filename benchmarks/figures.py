"""Draw the README's figures from benchmarks/results/*.json and the records: python benchmarks/figures.py"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SPRINT = {"december": "December's default", "plain": "today's, in plain torch", "eleven_techniques": "today's"}

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


def draw_sprint(window: int = 7):
    """Losses over training seconds of the sprint's records: running means of training's, last validations."""
    figure, axes = plt.subplots(figsize=(7.5, 4))
    for i, (name, label) in enumerate(SPRINT.items()):
        (folder,) = (ROOT / "records/track_0_sprint").glob(f"*_{name}")
        runs = [parse_log(path) for path in sorted(folder.glob("seed*.txt"))]
        for run in runs:
            seconds, losses = np.array([(s.ms / 1e3, s.loss) for s in run.steps if s.kind == "train"]).T
            mean = np.convolve(losses, np.ones(window) / window, "valid")
            middle = seconds[window // 2 : -(window // 2)]
            axes.plot(middle, mean, color=f"C{i}", lw=0.8, alpha=0.6)
        axes.plot([run.seconds for run in runs], [run.loss for run in runs], f"C{i}o", ms=5,
                  label=f"{label}: {np.mean([run.loss for run in runs]):.4f}, n = {len(runs)}")
    finish(figure, axes, "sprint_loss.png", xlabel="training seconds, one H100", ylabel="loss (nats per token)",
           ylim=(3.4, 6), title="sprint: training loss, and last validation loss (dots)")


def main():
    runs = json.loads((RESULTS / "sprint_ablation.json").read_text())
    seeds = [run for name, run in runs.items() if name.startswith("default")]

    draw_sprint()

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
