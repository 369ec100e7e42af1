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
    seeds = [run for name, run in runs.items() if name.startswith("default")]

    figure, axes = plt.subplots(figsize=(7.5, 4))
    kinds = {"everything on": "C1o-", "plain torch": "C2s--"}
    for name, run in json.loads((RESULTS / "sprint_kernels.json").read_text()).items():
        kind = name.rpartition(",")[0]
        if kind in kinds:
            label = f"validation, {kind}, 3 seeds" if name.endswith("seed 0") else None
            axes.plot(*points(run["val_loss"]), kinds[kind], ms=3, lw=1, alpha=0.7, label=label)
    h100 = json.loads((RESULTS / "sprint_h100.json").read_text())
    axes.plot(*points(h100["train_loss"]), lw=0.8, alpha=0.5, color="C0", label="training, slope 0, seed 0")
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
