"""The benchmarks run at toy size, so that they can't rot."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import ablation  # noqa: E402
import kernels  # noqa: E402
import scaling  # noqa: E402
import ttt  # noqa: E402
import versions  # noqa: E402

from small import SCRIPT, SMALL, train_gpt, write_corpus  # noqa: E402


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
    default = train_gpt.parse_config(["--track=sprint"])
    for name, flags in ablation.VARIANTS.items():
        assert train_gpt.parse_config(["--track=sprint", *flags]) != default, name


def test_a_flag_that_does_not_exist_ends_the_sweep_in_one_line():
    command = [sys.executable, ROOT / "benchmarks" / "ablation.py", "--widht=3"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "--widht=3" in run.stderr.splitlines()[-1]


@pytest.mark.parametrize("left", [2, 0])
def test_a_toy_sweep_runs_and_goes_on_where_it_stopped(tmp_path, left):
    data, out = write_corpus(tmp_path / "data"), tmp_path / "out.json"
    whole = {f"default seed {i}": result(3.0 + i / 100) for i in range(2)} | {"skip connection off": result(3.5)}
    done = dict(list(whole.items())[: 3 - left])
    out.write_text(json.dumps(done))
    command = [sys.executable, ROOT / "benchmarks" / "ablation.py", "--track=tiny", f"--data={data}",
               "--scheduled_steps=2", "--width=32", "--val_every=2", "--sample_tokens=1", "--epochs=50",
               "--device=cpu", "--seeds=2", "--only=skip connection off,late attention off", f"--out={out}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    assert "| default, n = 2 |" in run.stdout and "| skip connection off |" in run.stdout
    assert "not run: late attention off" in run.stderr
    found = json.loads(out.read_text())
    assert found.keys() == whole.keys() and [name for name in done if found[name] != done[name]] == []


@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_every_kernel_is_timed_and_checked(tmp_path, interpreted):
    if interpreted == "1":
        pytest.importorskip("triton")
    out = tmp_path / "out.json"
    run = subprocess.run([sys.executable, ROOT / "benchmarks" / "kernels.py", "--stages=1", f"--out={out}"],
                         env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": interpreted},
                         capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    mode = "pointer" if interpreted == "1" else "reference"
    assert run.stdout.startswith("toy size") and f"{mode} kernels" in run.stdout
    lines = [line.split(" | ") for line in run.stdout.splitlines() if line.startswith("| ")]
    assert {len(line) for line in lines} == {8}
    names = [line[0].removeprefix("| ") for line in lines[1:]]
    twice = {"polynomial", "attention"}  # two banks, two windows
    assert names == [name for name in kernels.KERNELS for _ in range(2 if name in twice else 1)]
    rows = json.loads(out.read_text())["rows"]
    assert [row["kernel"] for row in rows] == names
    assert all(row[column] > 0 for row in rows for column in ("ours_us", "torch_us", "floor_us"))


@pytest.mark.parametrize("factor", [1.5, math.nan])
@pytest.mark.parametrize("name", list(kernels.KERNELS))
def test_a_wrong_kernel_fails_the_benchmark(name, factor, monkeypatch, capsys):
    key = name.removesuffix("_float8").removesuffix("_bfloat16")
    owner, key = (kernels.tg.ATTENTION, "reference") if name == "attention" else (vars(kernels.tg), key)
    right = owner[key]

    def broken(*args, **kwargs):
        results = right(*args, **kwargs)
        last = results[-1] if isinstance(results, tuple) else args[0] if results is None else results
        last.copy_(last.float() * factor)
        return results

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setitem(owner, key, broken)
    with pytest.raises(SystemExit) as stop:
        kernels.main([f"--only={name}", "--stages=1"])
    assert re.fullmatch(rf"({name} [^;]+: error (nan|\d\S+) exceeds \d[^;\s]*(; |$))+", stop.value.code)
    assert f"| {name} |" in capsys.readouterr().out


def run_step(*arguments):
    command = [sys.executable, ROOT / "benchmarks" / "step.py", "--track=tiny", "--device=cpu", "--width=32",
               "--micro_batches=2", "--val_chunk=512", "--steps=2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


def test_step_times_every_stage_of_the_default_and_a_variant_and_counts_compilations(tmp_path):
    out = tmp_path / "out.json"
    run = run_step("--compare=float8 MLP and head off", f"--out={out}")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("| default | 2,048 |") == run.stdout.count("| float8 MLP and head off | 2,048 |") == 1
    assert "compilations within timed steps: 0" in run.stdout
    stage = json.loads(out.read_text())["default"]["stages"][0]
    assert 0 < stage["low"] <= stage["ms"] <= stage["high"] and stage["n"] == 1


@pytest.mark.parametrize("argument, words", [
    ("--steps=3", "an even number"), ("--compare=nothing", "there are"), ("--heds=2", "did you mean --heads"),
])  # fmt: skip
def test_step_refuses_in_one_line(argument, words):
    run = run_step(argument)
    assert run.returncode == 2 and words in run.stderr.splitlines()[-1]


def test_step_fails_if_a_variant_has_another_loss(monkeypatch, capsys):
    import step

    monkeypatch.setattr(step, "VARIANTS", {"default": ((), ()), "other": (("--leaky_slope=0.9",), ())})
    flags = ["--track=tiny", "--device=cpu", "--width=32", "--val_chunk=512", "--steps=2", "--compare=all"]
    monkeypatch.setattr(step, "SAME_LOSS", 1e-6)
    monkeypatch.setattr(sys, "argv", ["step.py", *flags])
    with pytest.raises(SystemExit, match="other: loss"):
        step.main()


def test_only_exchanging_is_communication_without_anything_beside_it(tmp_path):
    def event(name, ts, dur, cat="kernel"):
        return {"name": name, "ts": ts, "dur": dur, "cat": cat}

    events = [event("matmul", 0, 1000), event("ncclDevKernel_AllGather", 500, 1000),
              event("ncclDevKernel_ReduceScatter", 1200, 800), event("Memcpy DtoD", 1800, 100, "gpu_memcpy"),
              event("ncclKernel", 0, 9000, "cpu_op")]  # fmt: skip
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    assert scaling.exposed_ms(tmp_path / "trace.json") == pytest.approx(0.9)


def run_versions(*flags):
    command = [sys.executable, ROOT / "benchmarks" / "versions.py", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


def test_versions_of_the_script_are_timed_in_turn(tmp_path):
    copy, out = tmp_path / "edited.py", tmp_path / "out.json"
    copy.write_text(SCRIPT.read_text())
    tiny = "--track=tiny", "--device=cpu", "--width=32", "--rounds=2", "--steps=2"
    run = run_versions(SCRIPT, copy, *tiny, f"--out={out}")
    assert run.returncode == 0, run.stderr
    found = json.loads(out.read_text())
    assert list(found) == [str(SCRIPT), str(copy)] and len(run.stdout.splitlines()) == 2 + 2
    for rounds in found.values():
        assert [len(stages) for stages in rounds] == [1, 1] and all(r["n"] == 1 for r, in rounds)
    run = run_versions(copy, *tiny, "--width=33")
    assert run.returncode == 1 and f"{copy}: --width=33 --heads=2" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize("flags, text", [
    (["none.py"], "none.py is no file"), ([SCRIPT, SCRIPT], "named twice"),
    ([SCRIPT, "--steps=3"], "--steps=3"), ([SCRIPT, "--rounds=0"], "--rounds=0")])  # fmt: skip
def test_versions_refuses_what_it_cannot_compare(flags, text):
    run = run_versions(*flags)
    assert run.returncode == 2 and text in run.stderr.splitlines()[-1]


def test_ratios_of_versions_are_medians_over_rounds_of_each_round_s_own():
    def rounds(*times):
        return [[{"ms": ms, "tokens": 10, "peak_mib": 1}] for ms in times]

    text = versions.table({"a": rounds(10.0, 20.0, 40.0), "b": rounds(11.0, 18.0, 40.0)})
    assert text.splitlines()[3:] == ["| b | 10 | 18.00 | 1.0000 | 0.9000 - 1.1000 | 1 |"]


def test_medians_are_of_pairs_within_a_stage_without_validations_and_profiled_steps():
    cfg = train_gpt.parse_config(["--track=sprint"])
    plans = [train_gpt.plan_step(cfg, step).stage_index for step in range(cfg.total_steps)]
    seconds = {step + 1: 1.0 + plan for step, plan in enumerate(plans)}
    paused = range(0, cfg.total_steps, cfg.val_every)
    seconds |= {step + 1: 50.0 for step in paused} | {5: 30.0}  # what must not count
    times, now = {0: 0.0}, 0.0
    for step, spent in seconds.items():
        now += spent
        times[step] = now
    medians = scaling.stage_medians(times, cfg, skip={5})
    assert [s["seconds"] for s in medians] == pytest.approx([1, 2, 3, 4])
    assert [s["steps"] for s in medians] == [154, 153, 153, 20]
    assert [s["pairs"] for s in medians] == [74, 75, 75, 9]


def test_scaling_compares_one_process_with_two(tmp_path):
    data, out = write_corpus(tmp_path / "data", 70_000), tmp_path / "out.json"
    flags = ["--track=tiny", "--device=cpu", f"--data={data}", "--width=32", "--val_chunk=512", "--val_every=12",
             "--scheduled_steps=12", "--micro_batches=2", "--val_tokens=0", f"--out={out}"]
    command = [sys.executable, ROOT / "benchmarks" / "scaling.py", *flags]
    for more in (["--gpus=1"], ["--gpus=1,2", "--profile"]):  # the second goes on from the first
        run = subprocess.run([*command, *more], capture_output=True, text=True, timeout=500)
        assert run.returncode == 0, run.stderr
    one, two = json.loads(out.read_text())
    assert (one["gpus"], two["gpus"]) == (1, 2) and "exposed_ms" in two
    assert one["val_loss"] == pytest.approx(two["val_loss"], abs=1e-3)
    assert len(one["stages"]) == len(two["stages"]) == 3 and all(s["seconds"] > 0 for s in two["stages"])
    assert run.stdout.count("| 1 |") == run.stdout.count("| 2 |") == 1


def test_step_goes_on_after_a_variant_that_does_not_fit(monkeypatch, capsys, tmp_path):
    import step

    bench, flags = step.Bench, ["--track=tiny", "--device=cpu", "--width=32", "--val_chunk=512", "--steps=2"]

    def build(cfg):
        if cfg.leaky_slope == 0.25:
            raise torch.OutOfMemoryError("tried to allocate. more")
        return bench(cfg)

    variants = {"default": ((), ()), "large": (("--leaky_slope=0.25",), ()), "other": ((), ())}
    monkeypatch.setattr(step, "VARIANTS", variants)
    monkeypatch.setattr(step, "Bench", build)
    monkeypatch.setattr(sys, "argv", ["step.py", *flags, "--compare=all", f"--out={tmp_path / 'out'}"])
    step.main()
    out = capsys.readouterr().out
    assert "| large | doesn't fit |" in out and "| other | 2,048 |" in out
    assert json.loads((tmp_path / "out").read_text())["large"]["stages"] == []


def windows_of(*counts):
    """Documents of so many windows."""
    return [train_gpt.document_windows(1000 * d, 1000 * d + 8 * n + 1, 32, 8) for d, n in enumerate(counts)]


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
    train_gpt.export_model(tmp_path / "model.safetensors", model)
    arguments = ["--settings=lora_lr=0.01;lora_lr=0,eval_stride=16", f"--checkpoint={tmp_path}/model.safetensors",
                 f"--data={data}", "--eval_context=32", "--eval_stride=8", "--eval_slots=3", "--eval_batch=128",
                 "--lora_rank=2", "--sgd_chunk=64", "--device=cpu", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", ["ttt.py", *arguments])
    ttt.main()
    results = json.loads(out.read_text())
    assert list(results["schedules"]) == list(ttt.SCHEDULES)
    first, *others = results["schedules"].values()
    assert all(row["nats"] == pytest.approx(first["nats"], rel=1e-4) for row in others)
    assert first["tokens"] < results["schedules"]["neighbours"]["tokens"]
    assert [row["point"] for row in results["settings"]] == [
        {"lora_lr": "0.01"}, {"lora_lr": "0", "eval_stride": "16"}]
    assert results["settings"][0]["gain"] != 0 and results["settings"][1]["gain"] == 0
    printed = capsys.readouterr().out
    assert "| neighbours, ended ones dropped |" in printed and "| lora_lr=0 eval_stride=16 |" in printed
