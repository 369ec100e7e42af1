"""Every fault of benchmarks/reliability.py strikes once, and its checks can fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from small import SCRIPT

sys.path.insert(0, str(SCRIPT.parent / "benchmarks"))

import reliability  # noqa: E402


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * fault.slow)
                                  for name, fault in reliability.FAULTS.items()])
def test_run_survives(name):
    result = reliability.strike(name, times=1, seed=1)
    assert result["lost"] == [] and result["tried"] == result["survived"] == 1


def test_lost_runs_are_counted_and_those_not_struck_are_tried_again(monkeypatch):
    outcomes = iter([None, reliability.NotStruck(), AssertionError("lost"), None])

    def fault(scene):
        outcome = next(outcomes)
        if outcome:
            raise outcome

    monkeypatch.setitem(reliability.FAULTS, "fault", reliability.Fault("a", "b", fault))
    result = reliability.strike("fault", times=3)
    assert result == {"tried": 3, "survived": 2, "attempts": 4, "lost": ["lost"]}
    assert reliability.table({"fault": result}).splitlines()[-1] == "| a | b | 3 | 2 |"


def test_another_result_is_not_survival(tmp_path):
    scene = reliability.Scene(tmp_path, 0)
    reliability.Run(scene, "--seed=1", "--stop_after=2", size=1).finished()
    with pytest.raises(AssertionError, match="differ"):
        scene.check_result("another seed")


def test_command_prints_a_table_and_writes_json(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, Path(reliability.__file__), "--times=1", "--only=tokens", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "| too few tokens | a schedule of up to 10,000 steps | 1 | 1 |" in done.stdout
    assert json.loads(out.read_text())["tokens"]["survived"] == 1
