"""The benchmarks run at toy size, so that they can't rot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import ablation  # noqa: E402

from small import write_corpus  # noqa: E402


def result(loss: float) -> dict:
    return {"val_loss": {"0": 5.0, "10": loss}, "train_seconds": 2.0}


def test_a_difference_under_two_sd_is_not_resolved():
    losses = {"default seed 0": 3.00, "default seed 1": 3.01, "default seed 2": 3.02,
              "small": 3.025, "worse": 3.04, "better": 2.98}
    rows = ablation.table({name: result(loss) for name, loss in losses.items()}).splitlines()
    assert "3.0100, sd 0.0100" in rows[2]
    verdicts = {row.split("|")[1].strip(): row.split("|")[4].strip() for row in rows[3:]}
    assert verdicts == {"better": "better", "small": "not resolved", "worse": "worse"}


def test_every_variant_is_made_of_flags_that_exist():
    import train_gpt

    for flags in ablation.VARIANTS.values():
        train_gpt.parse_config(["--track=sprint", *flags])


@pytest.mark.parametrize("finished", [False, True])
def test_a_toy_sweep_runs_and_goes_on_where_it_stopped(tmp_path, finished):
    data, out = write_corpus(tmp_path / "data"), tmp_path / "out.json"
    if finished:
        done = {f"default seed {i}": result(3.0 + i / 100) for i in range(2)} | {"backout off": result(3.5)}
        out.write_text(json.dumps(done))
    command = [sys.executable, ROOT / "benchmarks" / "ablation.py", "--track=tiny", f"--data={data}",
               "--scheduled_steps=2", "--width=32", "--val_every=2", "--sample_tokens=1", "--epochs=50",
               "--device=cpu", "--seeds=2", "--only=backout off", f"--out={out}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "| default, n = 2 |" in run.stdout and "| backout off |" in run.stdout
    assert set(json.loads(out.read_text())) == {"default seed 0", "default seed 1", "backout off"}
