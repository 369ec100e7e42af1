"""Draw the README's figures from benchmarks/results/*.json: python benchmarks/figures.py"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"


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


def main():
    runs = json.loads((RESULTS / "sprint_ablation.json").read_text())
    h100 = json.loads((RESULTS / "sprint_h100.json").read_text())
    seeds = [run for name, run in runs.items() if name.startswith("default")]

    figure, axes = plt.subplots(figsize=(7.5, 4))
    train = runs["default seed 0"]["train_loss"]
    axes.plot(*points(train), lw=0.8, alpha=0.6, color="C2",
              label="H200, baseline of the table: training, seed 0")
    for i, run in enumerate(seeds):
        axes.plot(*points(run["val_loss"]), "s--", ms=3, lw=1, color="C2", alpha=0.7,
                  label="H200, baseline of the table: validation, 4 seeds" if not i else None)
    axes.plot(*points(h100["val_loss"]), "o-", ms=4, lw=1, color="C1",
              label="H100, kernels, float8 head and CUDA graphs, slope 0, seed 0: validation")
    finish(figure, axes, "sprint_loss.png", xlabel="step", ylabel="loss (nats per token)", ylim=(3.4, 7),
           title="sprint: 210 steps on one GPU, substitute corpus")

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
