"""benchmarks/ttt.py runs at toy size, so that it can't rot."""

import json
import sys

import pytest

from small import SCRIPT, SMALL, train_gpt, write_corpus

sys.path.insert(0, str(SCRIPT.parent / "benchmarks"))

import evaluate  # noqa: E402
import ttt  # noqa: E402


def windows_of(*counts):
    """Documents of so many windows."""
    return [evaluate.document_windows(1000 * d, 1000 * d + 8 * n + 1, 32, 8) for d, n in enumerate(counts)]


def test_neighbours_run_in_step_until_the_longest_of_them_ends():
    documents = windows_of(1, 5, 2, 3, 4)
    batches = list(ttt.neighbours(documents, 2, 0))
    assert [len(batch) for batch in batches] == [2] * 8 + [1]
    scored = [turn.window for batch in batches for turn in batch if turn.window.first < turn.window.hi]
    assert sorted(scored) == sorted(window for windows in documents for window in windows)
    assert all(len({turn.window.hi - turn.window.lo for turn in batch}) == 1 for batch in batches)
    dropped = list(ttt.neighbours(documents, 2, 0, drop=True))
    assert [len(batch) for batch in dropped] == [2, 2, 2, 2, 1, 2, 2, 1, 1]
    assert sorted(turn.window for batch in dropped for turn in batch) == sorted(scored)


def test_schedules_and_settings_of_test_time_training_are_compared(tmp_path, monkeypatch, capsys):
    data, out = write_corpus(tmp_path / "data", val_tokens=200), tmp_path / "out.json"
    model = train_gpt.GPT(SMALL)
    model.initialise(train_gpt.draw_weights(SMALL))
    evaluate.export_model(tmp_path / "model.safetensors", model)
    arguments = ["--settings=lora_lr=0.01;lora_lr=0,stride=16", f"--data={data}",
                 f"{tmp_path}/model.safetensors", "--context=32", "--stride=8",
                 "--slots=3", "--batch=128", "--lora_rank=2", "--sgd_chunk=64", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", ["ttt.py", *arguments])
    ttt.main()
    results = json.loads(out.read_text())
    assert list(results["schedules"]) == list(ttt.SCHEDULES)
    first, *others = results["schedules"].values()
    assert all(row["nats"] == pytest.approx(first["nats"], rel=1e-4) for row in others)
    assert first["tokens"] < results["schedules"]["neighbours"]["tokens"]
    assert [row["point"] for row in results["settings"]] == [
        {"lora_lr": 0.01}, {"lora_lr": 0, "stride": 16}]
    assert results["settings"][0]["gain"] != 0 and results["settings"][1]["gain"] == 0
    printed = capsys.readouterr().out
    assert "| neighbours, ended ones dropped |" in printed and "| lora_lr=0" in printed
