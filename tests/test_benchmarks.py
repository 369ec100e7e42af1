"""The benchmarks run at toy size on a CPU, so that they can't rot."""

import json
import math
import re
import sys
from dataclasses import replace

import pytest
import torch

from small import SCRIPT, train_gpt, write_corpus

sys.path.insert(0, str(SCRIPT.parent / "benchmarks"))

import ablation  # noqa: E402
import kernels  # noqa: E402
import scaling  # noqa: E402
import step  # noqa: E402
import versions  # noqa: E402

TINY = ["--track=tiny", "--width=32", "--vocab_size=257", "--val_chunk=512"]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Also the processes that a benchmark starts."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs a benchmark's main(): (what it exits with, stdout, stderr), those of its processes included."""

    def call(benchmark, *argv):
        monkeypatch.setattr(sys, "argv", [f"{benchmark.__name__}.py", *map(str, argv)])
        try:
            benchmark.main()
            code = 0
        except SystemExit as end:
            code = end.code
        return (code, *capfd.readouterr())

    return call


# ----------------------------------------------------------------------------------------------------------
# ablation.py


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
    default = train_gpt.parse_config(["--track=race300"])
    for name, flags in ablation.VARIANTS.items():
        assert train_gpt.parse_config(["--track=race300", *flags]) != default, name


@pytest.mark.parametrize("argument, words", [("--widht=3", "--widht=3"), ("--only=nothing", "'nothing'")])
def test_a_sweep_that_cannot_run_ends_in_one_line(run, argument, words):
    code, _, error = run(ablation, argument)
    assert code == 2 and words in error.splitlines()[-1]


@pytest.mark.parametrize("left", [1, 0])
def test_a_toy_sweep_runs_and_goes_on_where_it_stopped(run, tmp_path, left):
    data, out = write_corpus(tmp_path / "data"), tmp_path / "out.json"
    whole = {"default seed 0": result(3.0), "default seed 1": result(3.01)}
    whole["smear-MTP off"] = result(3.5)
    done = dict(list(whole.items())[: 3 - left])
    out.write_text(json.dumps(done))
    code, printed, error = run(
        ablation, *TINY, f"--data={data}", "--scheduled_steps=2", "--val_every=2", "--epochs=50", "--seeds=2",
        "--only=smear-MTP off,averaged weights off", f"--out={out}")  # fmt: skip
    assert code == 0 and "| default, n = 2 |" in printed and "| smear-MTP off |" in printed
    assert "not run: averaged weights off" in error
    found = json.loads(out.read_text())
    assert found.keys() == whole.keys() and [name for name in done if found[name] != done[name]] == []
    assert all(row["device"] == "CPU" and len(row["val_loss"]) == 2
               for name, row in found.items() if name not in done)


# ----------------------------------------------------------------------------------------------------------
# kernels.py


@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_every_kernel_is_timed_and_checked(tmp_path, monkeypatch, capsys, interpreted):
    if interpreted == "1" and not kernels.tg.triton:
        pytest.skip("Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    out = tmp_path / "out.json"
    kernels.main(["--stages=1", f"--out={out}"])
    printed = capsys.readouterr().out
    mode = "small" if interpreted == "1" else "reference"
    assert printed.startswith("toy size") and f"{mode} kernels" in printed
    lines = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    assert {len(line) for line in lines} == {8}
    names = [line[0].removeprefix("| ") for line in lines[1:]]
    twice = {"attention"}  # two windows
    assert names == [name for name in kernels.KERNELS for _ in range(2 if name in twice else 1)]
    rows = json.loads(out.read_text())["rows"]
    assert [row["kernel"] for row in rows] == names
    assert all(row[column] > 0 for row in rows for column in ("ours_us", "torch_us", "floor_us"))


@pytest.mark.parametrize("factor", [1.5, math.nan])
@pytest.mark.parametrize("name", list(kernels.KERNELS))
def test_a_wrong_kernel_fails_the_benchmark(name, factor, monkeypatch, capsys):
    keys = {"attention": "attention_reference"}
    key = "logits_gradient" if name.startswith("cross_entropy") else keys.get(name, name)
    right = getattr(kernels.tg, key)

    def broken(*args, **kwargs):
        results = right(*args, **kwargs)
        last = results[-1] if isinstance(results, tuple) else results
        last.copy_(last.float() * factor)
        return results

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(kernels.tg, key, broken)
    with pytest.raises(SystemExit) as stop:
        kernels.main([f"--only={name}", "--stages=1"])
    assert re.fullmatch(rf"({name} [^;]+: error (nan|\d\S+) exceeds \d[^;\s]*(; |$))+", stop.value.code)
    assert f"| {name} |" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------
# step.py


STEP = [*TINY, "--micro_batches=2", "--steps=2"]


@pytest.fixture
def short_batches(monkeypatch):
    """Of 2 x 128 tokens."""
    stages = tuple(stage._replace(batch_tokens=256, max_doc=64) for stage in train_gpt.TRACKS["tiny"].stages)
    monkeypatch.setitem(train_gpt.TRACKS, "tiny", replace(train_gpt.TRACKS["tiny"], stages=stages))


def test_step_times_every_stage_of_the_default_and_a_variant_and_profiles(run, tmp_path, short_batches):
    out, variant = tmp_path / "out.json", "float8 off"
    code, printed, _ = run(step, *STEP, f"--compare={variant}", "--profile", f"--out={out}")
    assert code == 0
    assert printed.count("| default | 128 |") == printed.count(f"| {variant} | 128 |") == 1
    assert "compilations within timed steps: 0" in printed
    assert re.search(r"^128 tokens, \d+\.\d\d ms:$", printed, re.M)
    assert re.search(r"^ +\d+\.\d{3} ms +\d+\.\d x  aten::mm$", printed, re.M)
    stage = json.loads(out.read_text())["default"]["stages"][0]
    assert 0 < stage["low"] <= stage["ms"] <= stage["high"] and stage["n"] == 1


def test_compilations_are_counted():
    @torch.compile(backend="eager")
    def double(x):
        return 2 * x

    before = step.compilations()
    double(torch.ones(2))
    assert step.compilations() == before + 1
    torch._dynamo.reset()


def test_every_variant_of_a_step_is_made_of_flags_and_kernels_that_exist():
    default = train_gpt.parse_config([])
    for name, variant in step.VARIANTS.items():
        changed = train_gpt.parse_config([*variant.flags]) != default or variant.plain or variant.small
        assert bool(changed) == (name != "default")
        with step.replaced(variant.plain):
            assert all(getattr(step.tg, kernel).__name__ != kernel for kernel in variant.plain)


@pytest.mark.parametrize("argument, words", [
    ("--steps=3", "an even number"), ("--compare=nothing", "there are"), ("--heds=2", "--heds=2"),
])  # fmt: skip
def test_step_refuses_in_one_line(run, argument, words):
    code, _, error = run(step, *STEP, argument)
    assert code == 2 and words in error.splitlines()[-1]


def test_step_fails_if_a_variant_has_another_loss(run, monkeypatch, short_batches):
    variants = {"default": step.Variant(), "other": step.Variant(("--leaky_slope=0.9",))}
    monkeypatch.setattr(step, "VARIANTS", variants)
    monkeypatch.setattr(step, "SAME_LOSS", 1e-6)
    code, *_ = run(step, *STEP, "--compare=all")
    assert re.match(r"other: loss \d", code)


def test_step_goes_on_after_a_variant_that_does_not_fit(run, monkeypatch, tmp_path, short_batches):
    bench = step.Bench

    def build(cfg, small):
        if cfg.leaky_slope == 0.25:
            raise torch.OutOfMemoryError("tried to allocate. more")
        return bench(cfg, small)

    large, other = step.Variant(("--leaky_slope=0.25",)), step.Variant(small=True)
    monkeypatch.setattr(step, "VARIANTS", {"default": step.Variant(), "large": large, "other": other})
    monkeypatch.setattr(step, "Bench", build)
    code, printed, _ = run(step, *STEP, "--compare=all", f"--out={tmp_path / 'out'}")
    assert code == 0 and "| large | doesn't fit |" in printed and "| other | 128 |" in printed
    assert json.loads((tmp_path / "out").read_text())["large"]["stages"] == []


# ----------------------------------------------------------------------------------------------------------
# versions.py


OTHER_SCRIPT = """
class UserError(Exception):
    pass

def parse_config(flags):
    if "--width=33" in flags:
        raise UserError("no such width")
    return flags
"""
OTHER_BENCH = """
import train_gpt

class Bench:
    plans = ["one stage"]

    def __init__(self, cfg):
        assert "--track=tiny" in cfg and train_gpt.UserError

    def time(self, plan, steps):
        return {"tokens": 2048, "ms": 0.5 * steps, "peak_mib": 7}
"""


@pytest.fixture
def other(tmp_path):
    """A script with other functions, beside the step.py that knows them."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "step.py").write_text(OTHER_BENCH)
    (tmp_path / "train.py").write_text(OTHER_SCRIPT)
    return tmp_path / "train.py"


def test_versions_of_the_script_are_timed_in_turn_by_the_step_py_of_each(run, other, tmp_path):
    out = tmp_path / "out.json"
    code, printed, error = run(versions, other, SCRIPT, *TINY, "--rounds=2", "--steps=2", f"--out={out}")
    assert code == 0, error
    found = json.loads(out.read_text())
    assert list(found) == [str(other), str(SCRIPT)] and len(printed.splitlines()) == 2 + 2
    assert found[str(other)] == [[{"tokens": 2048, "ms": 1.0, "peak_mib": 7}]] * 2
    assert [len(stages) for stages in found[str(SCRIPT)]] == [1, 1]
    stage = found[str(SCRIPT)][0][0]
    assert stage["tokens"] == 2048 and stage["ms"] > 0 and stage["n"] == 1
    assert f"| {other} | 2,048 | 1.00 | 1.0000 | 1.0000 - 1.0000 | 7 |" in printed


def test_a_version_that_refuses_the_flags_ends_the_comparison_with_its_line(run, other):
    code, _, error = run(versions, other, *TINY, "--width=33")
    assert code.startswith(f"{other} ended with status 1") and error == f"{other}: no such width\n"


@pytest.mark.parametrize("flags, text", [
    (["none.py"], "none.py is no file"), ([SCRIPT, SCRIPT], "named twice"),
    ([SCRIPT, "--steps=3"], "--steps=3"), ([SCRIPT, "--rounds=0"], "--rounds=0")])  # fmt: skip
def test_versions_refuses_what_it_cannot_compare(run, flags, text):
    code, _, error = run(versions, *flags)
    assert code == 2 and text in error.splitlines()[-1]


def test_ratios_of_versions_are_medians_over_rounds_of_each_round_s_own():
    def rounds(*times):
        return [[{"ms": ms, "tokens": 10, "peak_mib": 1}] for ms in times]

    text = versions.table({"a": rounds(10.0, 20.0, 40.0), "b": rounds(11.0, 18.0, 40.0)})
    assert text.splitlines()[3:] == ["| b | 10 | 18.00 | 1.0000 | 0.9000 - 1.1000 | 1 |"]


# ----------------------------------------------------------------------------------------------------------
# scaling.py


def test_only_exchanging_is_communication_without_anything_beside_it(tmp_path):
    def event(name, ts, dur, cat="kernel"):
        return {"name": name, "ts": ts, "dur": dur, "cat": cat}

    events = [event("matmul", 0, 1000), event("ncclDevKernel_AllGather", 500, 1000),
              event("ncclDevKernel_ReduceScatter", 1200, 800), event("Memcpy DtoD", 1800, 100, "gpu_memcpy"),
              event("ncclKernel", 0, 9000, "cpu_op")]  # fmt: skip
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    assert scaling.exposed_ms(tmp_path / "trace.json") == pytest.approx(0.9)


def test_medians_are_of_pairs_within_a_stage_without_validations_and_profiled_steps():
    cfg = train_gpt.parse_config(["--track=race300"])
    plans = [train_gpt.plan_step(cfg, step).stage_index for step in range(cfg.total_steps)]
    seconds = {step + 1: 1.0 + plan for step, plan in enumerate(plans)}
    paused = range(0, cfg.total_steps, cfg.val_every)
    seconds |= {step + 1: 50.0 for step in paused} | {5: 30.0}  # what must not count
    times, now = {0: 0.0}, 0.0
    for step_number, spent in seconds.items():
        now += spent
        times[step_number] = now
    medians = scaling.stage_medians(times, cfg, skip={5})
    assert [s["seconds"] for s in medians] == pytest.approx([1, 2, 3, 4, 5])
    assert [s["steps"] for s in medians] == [97, 97, 76, 20, 10]
    assert [s["pairs"] for s in medians] == [47, 47, 36, 9, 4]


def test_scaling_runs_what_is_missing_traces_it_and_compares(run, tmp_path):
    data, out = write_corpus(tmp_path / "data", 30_000), tmp_path / "out.json"
    one = {"gpus": 1, "stages": [{"steps": 2, "seconds": 100.0, "pairs": 1}] * 3, "val_loss": 6.0,
           "train_seconds": 600.0}  # fmt: skip
    out.write_text(json.dumps([one]))
    code, printed, error = run(
        scaling, *TINY, f"--data={data}", "--val_every=6", "--scheduled_steps=6", "--micro_batches=2",
        "--val_tokens=0", "--gpus=1,2", "--profile", f"--out={out}")  # fmt: skip
    assert code == 0, error
    first, two = json.loads(out.read_text())
    assert first == one and two["gpus"] == 2 and two["exposed_ms"] == 0 and two["val_loss"] < 6
    assert len(two["stages"]) == 3 and all(stage["seconds"] > 0 for stage in two["stages"])
    assert printed.count("| 1 | 100000.0 (1.000) |") == printed.count("\n| 2 |") == 1
