"""Tests of the command line: import, what mistakes print, a run from end to end and what it leaves."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from small import BOS, CPU, SCRIPT, SMALL, assert_refused, train_gpt, write_corpus, write_shard

NARROW = ("--width=32", "--heads=2", "--scheduled_steps=6", "--val_every=3", "--sample_tokens=5",
          "--mtp_heads=1", "--save_every=4")  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(train_gpt.TRACKS, "tiny", replace(SMALL, vocab_size=0))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data"))


# --------------------------------------------------------------------- import

IMPORT = """
import os, sys, threading
import numpy, torch, torch.distributed
modules, environment, threads = set(sys.modules), dict(os.environ), threading.active_count()
import train_gpt
new = set(sys.modules) - modules
assert not new & {"safetensors", "tiktoken", "matplotlib", "huggingface_hub"}, new
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
assert dict(os.environ) == environment and threading.active_count() == threads
"""


@pytest.mark.parametrize("environment", [{}, None], ids=["empty_environment", "inherited_environment"])
def test_import_has_no_side_effects(tmp_path, environment):
    (tmp_path / "train_gpt.py").write_bytes(SCRIPT.read_bytes())
    command = [sys.executable, "-B", "-c", IMPORT]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert os.listdir(tmp_path) == ["train_gpt.py"]


QUICK = """
import time
import numpy, torch, torch.distributed
begin = time.process_time()  # whatever else runs on this machine
import train_gpt
print(time.process_time() - begin)
"""


def test_import_is_quick_and_silent(tmp_path):
    command = [sys.executable, "-B", "-c", QUICK]
    done = subprocess.run(command, cwd=SCRIPT.parent, env={}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("\n") == 1
    assert float(done.stdout) < 10


# ------------------------------------------------------------------- mistakes


MISTAKES = {
    "nothing_reads_late": (["--late_attention", "--backout_from=2"], "--late_attention", "--backout_from=2"),
    "misspelt": (["--widht=32"], "--widht=32", "--width"),
    "misspelt_with_dashes": (["--scheduled-stepz=3"], "--scheduled_steps"),
    "nothing_like_it": (["--zzzz=1"], "--zzzz=1"),
    "not_a_flag": (["width=32"], "width=32"),
    "table_as_flag": (["--layers=3"], "--layers=3"),
    "no_name": (["--=3"], "--=3"),
    "word_for_whole_number": (["--width=wide"], "--width=wide", "whole number"),
    "fraction_for_whole_number": (["--width=32.5"], "--width=32.5", "whole number"),
    "word_for_number": (["--temperature=hot"], "--temperature=hot", "number"),
    "word_for_switch": (["--smear=maybe"], "--smear=maybe", "on or off"),
    "unknown_choice": (["--attention=flash"], "--attention=flash", "fa3", "fa2", "reference"),
    "unknown_track": (["--track=long"], "--track=long", "sprint", "medium"),
    "empty_choice": (["--track="], "--track=", "tiny"),
    "zero_width": (["--width=0"], "--width=0", "from 1"),
    "negative": (["--val_tokens=-1"], "--val_tokens=-1", "from 0"),
    "below_minus_one": (["--save_every=-2"], "--save_every=-2", "from -1"),
    "nan": (["--adam_lr=nan"], "--adam_lr=nan"),
    "infinite": (["--muon_lr=inf"], "--muon_lr=inf"),
    "huge": (["--scheduled_steps=10000000000000"], "--scheduled_steps"),
    "line_break": (["--device=a\nb"], "--device=a"),
    "no_value": (["--width"], "--width", "needs a value"),
    "no_value_for_text": (["--data"], "--data", "needs a value"),
    "prefixes_of_bytes": (["--prefix_weight=0.25"], "--prefix_weight=0.25", "no token", "bytes"),
    "heads_do_not_divide": (["--width=32", "--heads=3"], "--width=32", "--heads=3"),
    "head_of_two": (["--width=4", "--heads=2", "--gate_inputs=1"], "--width=4"),
    "rotary_over_one": (["--rotary_fraction=1.5"], "--rotary_fraction=1.5"),
    "backout_beyond_the_model": (["--backout_from=99"], "--backout_from=99"),
    "too_many_gate_inputs": (["--width=32", "--heads=2", "--gate_inputs=33"], "--gate_inputs=33"),
    "missing_data_folder": (["--data={tmp}/nowhere"], "{tmp}/nowhere", "--data"),
    "empty_data_folder": (["--data={tmp}/empty"], "{tmp}/empty", "_train_"),
    "no_validation_shards": (["--data={tmp}/train_only"], "{tmp}/train_only", "_val_"),
    "corrupted_shard": (["--data={tmp}/corrupted"], "x_train_000.bin"),
    "corrupted_validation_shard": (["--data={tmp}/corrupted_val"], "x_val_000.bin"),
    "missing_checkpoint": (["--checkpoint={tmp}/none", "--sample=a"], "{tmp}/none"),
    "missing_resume": (["--resume={tmp}/none"], "{tmp}/none"),
    "checkpoint_is_a_folder": (["--checkpoint={tmp}/empty", "--sample=a"], "{tmp}/empty"),
    "missing_tokenizer_file": (["--tokenizer={tmp}/none.tiktoken"], "{tmp}/none.tiktoken"),
    "damaged_tokenizer_file": (["--tokenizer={tmp}/corrupted/x_train_000.bin"], "x_train_000.bin"),
    "vocabulary_too_large": (["--vocab_size=300"], "x_train_000.bin", "299"),
    "vocabulary_too_small": (["--vocab_size=100"], "x_train_000.bin", "100"),
    "too_few_tokens": (["--scheduled_steps=500"], "of 500 steps", "--epochs=1", "--scheduled_steps"),
    "val_tokens_too_large": (["--val_tokens=100000"], "--val_tokens=100000"),
    "no_gpu": (["--device=cuda"], "GPU"),
    "flash_on_cpu": (["--device=cpu", "--attention=fa2"], "--attention=fa2"),
    "tma_on_cpu": (["--device=cpu", "--kernels=tma"], "--kernels=tma", "Hopper"),
    "pointer_on_cpu": (["--device=cpu", "--kernels=pointer"], "--kernels=pointer", "Triton"),
    "fp8_on_cpu": (["--device=cpu", "--fp8=on"], "--fp8=on", "compute capability"),
    "graphs_on_cpu": (["--device=cpu", "--graphs=on"], "--graphs=on", "a GPU"),
    "batch_not_divisible": (["--micro_batches=3"], "3 micro-batches", "256"),
}


@pytest.fixture
def broken(tmp_path, data):
    """Folders with something wrong; where there are files, all but one are good."""
    for name in ("empty", "train_only", "corrupted", "corrupted_val"):
        (tmp_path / name).mkdir()
    for path in data.glob("x_*.bin"):
        for name in ("corrupted", "corrupted_val", "train_only"):
            if "val" not in path.name or name != "train_only":
                (tmp_path / name / path.name).write_bytes(path.read_bytes())
    write_shard(tmp_path / "corrupted" / "x_train_000.bin", [BOS, 1, 2], count=4)
    write_shard(tmp_path / "corrupted_val" / "x_val_000.bin", [BOS, 1, 2], magic=1)
    return tmp_path


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line_and_leaves_no_log(cli, small, data, broken, monkeypatch, mistake):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    argv, *words = ([text.replace("{tmp}", str(broken)) for text in part] if isinstance(part, list)
                    else part.replace("{tmp}", str(broken)) for part in MISTAKES[mistake])  # fmt: skip
    saved = any(arg.startswith(("--checkpoint", "--resume", "--data")) for arg in argv)
    result = cli(f"--log_folder={broken / 'logs'}", *([] if saved else [f"--data={data}"]), *argv)
    assert_refused(result, *words)
    assert not (broken / "logs").exists()


@pytest.mark.parametrize("size, fits", [(1, True), (2, True), (3, False), (4, True), (6, False), (8, True)])
def test_check_refuses_a_world_size_that_does_not_divide(cli, small, data, monkeypatch, size, fits):
    monkeypatch.setenv("WORLD_SIZE", str(size))
    monkeypatch.setenv("RANK", "0")
    result = cli("--check", f"--data={data}")
    if fits:
        assert result[0] == 0, result
    else:
        assert_refused(result, f"{size} ")


def test_mistake_in_a_process_of_its_own_has_no_traceback():
    done = subprocess.run([sys.executable, SCRIPT, "--widht=32"], capture_output=True, text=True)
    assert_refused((done.returncode, done.stdout, done.stderr), "--width")
    assert done.stdout == ""


def test_log_folder_that_cannot_be_made_is_one_line(cli, small, data, tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(cli(f"--data={data}", f"--log_folder={tmp_path / 'file' / 'logs'}"), "--log_folder=")


def test_diverged_training_is_one_line_and_saves_no_checkpoint(cli, small, data, tmp_path):
    flags = "--adam_lr=1e11", "--softcap=0", "--muon_lr=1e11"
    result = cli(f"--data={data}", f"--log_folder={tmp_path}", *flags)
    assert_refused(result, "training loss is", "step")
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_too_little_gpu_memory_is_one_line_that_says_what_to_change(cli, small, data, tmp_path, monkeypatch):
    def run_out(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr(train_gpt, "train_step", run_out)
    result = cli(f"--data={data}", f"--log_folder={tmp_path}")
    assert_refused(result, "CUDA out of memory: raise --micro_batches=", "--bigram_ratio=")


def test_check_passes_on_good_data_and_writes_nothing(cli, small, data, tmp_path):
    before = sorted(os.listdir(data))
    code, out, error = cli("--check", f"--data={data}", f"--log_folder={tmp_path / 'logs'}")
    assert (code, out, error) == (0, "configuration and data are fine\n", "")
    assert not (tmp_path / "logs").exists() and sorted(os.listdir(data)) == before


def test_flags_are_read_as_their_fields_say():
    argv = ["--width=64", "--scheduled-steps=1_000", "--temperature=1e-1", "--smear=OFF", "--cut_smear"]
    cfg = train_gpt.parse_config([*argv, "--width=96", "--sample=a=b --c"])
    assert (cfg.width, cfg.scheduled_steps, cfg.temperature, cfg.sample) == (96, 1000, 0.1, "a=b --c")
    assert cfg.smear is False and cfg.cut_smear is True


# ------------------------------------------------------------------- hardware


CHOSEN = [  # compute capability, what else is so, (attention, kernels, fp8, graphs)
    (None, {}, ("reference", "reference", False, False)),
    (None, {"dtype": "bfloat16"}, ("reference", "reference", False, False)),
    ((7, 5), {}, ("reference", "reference", False, False)),
    ((8, 0), {}, ("fa2", "pointer", False, True)),
    ((8, 9), {}, ("fa2", "pointer", True, True)),
    ((9, 0), {}, ("fa3", "tma", True, True)),
    ((9, 0), {"attention": "fa2"}, ("fa2", "tma", True, True)),
    ((10, 0), {}, ("fa2", "pointer", True, True)),
    ((9, 0), {"dtype": "float32"}, ("reference", "reference", False, False)),
    ((9, 0), {"width": 40}, ("fa3", "tma", False, True)),
    ((9, 0), {"attention": "reference"}, ("reference", "tma", True, False)),
    ((9, 0), {"kernels": "pointer", "fp8": "off", "graphs": "off"}, ("fa3", "pointer", False, False)),
]


@pytest.fixture
def gpu(monkeypatch):
    """Pretends a GPU of a compute capability, or none, with Triton."""

    def pretend(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(capability is not None))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
        monkeypatch.setattr(train_gpt, "triton", True)
        monkeypatch.setattr(train_gpt.importlib.util, "find_spec",
                            lambda name: name == "flash_attn_interface" or None)
        monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", active.append)
        monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: active and active[-1])
        monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", active.clear)
        return active

    active = []
    return pretend


@pytest.mark.parametrize("capability, flags, expected", CHOSEN)
def test_hardware_gets_the_best_that_it_can_run(gpu, capability, flags, expected):
    active = gpu(capability)
    cfg = replace(SMALL, **flags)
    hardware = train_gpt.choose_hardware(cfg, train_gpt.World())
    assert (hardware.attention, hardware.kernels, hardware.fp8, hardware.graphs) == expected
    assert hardware.compile == hardware.warmup == (capability is not None)
    assert set(hardware.reasons) == {*hardware._fields} - {"reasons"}
    first = {"attention": "fa3", "kernels": "tma", "fp8": "on", "graphs": "on"}
    for (name, option), choice in zip(first.items(), expected):
        reason = f"{option} needs " if choice in (False, "reference", "pointer", "fa2") else "the fastest"
        assert hardware.reasons[name].startswith("forced" if name in flags else reason)
    assert active == ["FA3"] * (expected[0] == "fa3")
    train_gpt.choose_hardware(replace(cfg, attention="reference"), train_gpt.World())
    assert not active


def test_a_hopper_gpu_without_flash_attention_3_gets_2_and_says_what_is_missing(gpu, monkeypatch):
    active = gpu((9, 0))
    monkeypatch.setattr(train_gpt.importlib.util, "find_spec", lambda name: None)
    hardware = train_gpt.choose_hardware(SMALL, train_gpt.World())
    assert hardware.attention == "fa2" and not active
    assert hardware.reasons["attention"] == "fa3 needs a Hopper GPU and the package flash_attn_interface"
    with pytest.raises(train_gpt.UserError, match="^--attention=fa3: needs .+ flash_attn_interface$"):
        train_gpt.choose_hardware(replace(SMALL, attention="fa3"), train_gpt.World())


REFUSED = "attention=fa3", "attention=fa2", "kernels=tma", "kernels=pointer", "fp8=on", "graphs=on"


@pytest.mark.parametrize("flag", REFUSED)
@pytest.mark.parametrize("capability", [None, (7, 5)])
def test_hardware_that_cannot_run_what_is_forced_is_refused(gpu, capability, flag):
    gpu(capability)
    name, value = flag.split("=")
    with pytest.raises(train_gpt.UserError, match=f"^--{flag}: needs .+$"):
        train_gpt.choose_hardware(replace(SMALL, **{name: value}), train_gpt.World())


@pytest.mark.parametrize("flags, graphs", [({}, True), ({"warmup": "off"}, False), ({"compile": "off"}, False),
                                           ({"compile": "off", "warmup": "on"}, True)])  # fmt: skip
def test_graphs_need_the_warm_up_that_records_them(gpu, flags, graphs):
    gpu((9, 0))
    hardware = train_gpt.choose_hardware(replace(SMALL, **flags), train_gpt.World())
    assert hardware.graphs == hardware.warmup == graphs
    assert hardware.reasons["graphs"] == ("the fastest" if graphs else "on needs --warmup=on")
    forced = replace(SMALL, graphs="on", **flags)
    if graphs:
        assert train_gpt.choose_hardware(forced, train_gpt.World()).graphs
    else:
        with pytest.raises(train_gpt.UserError, match="^--graphs=on: needs --warmup=on"):
            train_gpt.choose_hardware(forced, train_gpt.World())


@pytest.mark.parametrize("capability", [None, (9, 0)])
@pytest.mark.parametrize("name, value", [("dtype", "float32"), ("dtype", "bfloat16"), ("compile", "off"),
                                         ("warmup", "on"), ("warmup", "off")])  # fmt: skip
def test_hardware_says_what_was_forced(gpu, capability, name, value):
    gpu(capability)
    for wanted in (value, "auto"):
        hardware = train_gpt.choose_hardware(replace(SMALL, **{name: wanted}), train_gpt.World())
        assert (hardware.reasons[name] == "forced") == (wanted == value)


def test_without_triton_there_are_no_kernels(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(train_gpt, "triton", None)
    assert train_gpt.choose_hardware(SMALL, train_gpt.World()).kernels == "reference"
    with pytest.raises(train_gpt.UserError, match="^--kernels=tma: needs .*Triton"):
        train_gpt.choose_hardware(replace(SMALL, kernels="tma"), train_gpt.World())


# ---------------------------------------------------- a run from end to end


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The script itself, six steps of a narrow tiny track in a process of its own: (log folder, stdout)."""
    import matplotlib.font_manager  # noqa: F401  makes its font cache; where that takes over 5 s, it says so

    root = tmp_path_factory.mktemp("trained")
    data = write_corpus(root / "data", train_tokens=40_000, val_tokens=1500)
    argv = [*NARROW, f"--data={data}", f"--log_folder={root / 'logs'}", "--device=cpu"]
    done = subprocess.run([sys.executable, SCRIPT, *argv], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    (folder,) = (root / "logs").iterdir()
    return folder, done.stdout


def test_run_leaves_its_files_and_nothing_else(trained):
    assert sorted(os.listdir(trained[0])) == [
        "checkpoint_000004.safetensors", "checkpoint_000006.safetensors", "log.txt", "loss.png",
        "metrics.jsonl", "train_gpt.py",
    ]  # fmt: skip
    assert re.fullmatch(r"\d{8}-\d{6}-tiny-seed0", trained[0].name)
    assert (trained[0] / "train_gpt.py").read_bytes() == SCRIPT.read_bytes()
    assert (trained[0] / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


TIMES = r"train_time:\d+ms step_avg:\d+\.\d\dms"
TRAIN_LINE = re.compile(rf"step:(\d+)/6 train_loss:(\d+\.\d{{4}}) {TIMES}")
VAL_LINE = re.compile(
    rf"step:(\d+)/6 val_loss:(\d+\.\d{{4}}) val_bpb:(\d+\.\d{{4}}) {TIMES} smear_mtp_lambda:[+-]\d+\.\d{{4}}"
)


def matches(pattern, text):
    return [match.groups() for line in text.splitlines() if (match := pattern.fullmatch(line))]


HEADER_AND_END = (
    "source sha256:", "config {", "python:", "device: cpu", "data: ", "validation: tokens:", "timed: ",
    "untimed: ", "launch to first step: ", "peak memory: ", "sample:", "log: ", "plot: ",
)  # fmt: skip


def test_log_has_the_documented_lines(trained):
    text = (trained[0] / "log.txt").read_text()
    assert [step for step, _ in matches(TRAIN_LINE, text)] == ["1", "2", "3", "4", "5", "6"]
    assert [step for step, *_ in matches(VAL_LINE, text)] == ["0", "3", "6"]
    for start in HEADER_AND_END:
        assert sum(line.startswith(start) for line in text.splitlines()) == 1, start
    config = json.loads(re.search(r"^config (.*)$", text, re.M)[1])
    assert (config["width"], config["scheduled_steps"], config["seed"]) == (32, 6, 0)


PHASES = "import", "process group", "data", "model", "validation and graphs"
LAUNCH = r"launch to first step: (\d+\.\d) s \(" + ", ".join(rf"{phase} (\d+\.\d)" for phase in PHASES) + r"\)"


def test_log_says_how_long_the_launch_took_by_phase(trained):
    (found,) = matches(re.compile(LAUNCH), (trained[0] / "log.txt").read_text())
    total, *phases = map(float, found)
    assert total == pytest.approx(sum(phases), abs=0.05 * (len(phases) + 1) + 1e-9)
    assert 0 < phases[0] <= total < 3600  # torch is imported


@pytest.mark.parametrize("warmup, later", [("on", r"0"), ("off", r"[1-9]\d*")], ids=["on", "off"])
def test_after_the_warm_up_nothing_is_compiled(cli, small, data, tmp_path, monkeypatch, warmup, later):
    """With dynamo's own backend, which makes the graphs and their guards but generates no code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    flags = f"--data={data}", f"--log_folder={tmp_path}", "--compile=on", f"--warmup={warmup}", "--mtp_heads=1"
    code, out, error = cli(*flags, *(["--stop_after=1"] if warmup == "off" else []))
    assert (code, error) == (0, "")
    assert train_gpt.compilations() > len(train_gpt.REGIONS)
    assert re.search(rf"^compilations after the first step: {later}$", out, re.M)
    assert bool(re.search(r"^launch to first step: .+, warm-up \d+\.\d, ", out, re.M)) == (warmup == "on")
    torch._dynamo.reset()


@pytest.mark.parametrize("flags, steps", [([], 2), (["--stop_after=3"], 1), (["--stop_after=2"], 0)])
def test_profile_leaves_a_trace_of_so_many_steps_and_a_table(cli, small, data, tmp_path, flags, steps):
    flags = f"--data={data}", f"--log_folder={tmp_path}", "--profile=2", "--val_every=100", *flags
    code, out, error = cli(*flags)
    assert (code, error) == (0, "")
    (folder,) = tmp_path.iterdir()
    text, trace = (folder / "log.txt").read_text(), folder / "trace.json"
    if not steps:
        assert not trace.exists() and "profile of" not in text
        return
    assert f"trace: {trace} (open in" in out
    names = [event["name"] for event in json.loads(trace.read_text())["traceEvents"]]
    layers = len(SMALL.attention_layers)
    assert names.count("aten::searchsorted") == steps * SMALL.micro_batches * layers  # once by each attention
    head = rf"^profile of {steps} steps: (\d+\.\d+) ms a step\n((?:.+\n)+?)trace: "
    total, table = re.search(head, text, re.M).groups()
    rows = matches(re.compile(r" *(\d+\.\d+) ms +(\d+\.\d) x  (\S.*)"), table)
    spent = [float(row[0]) for row in rows]
    assert len(rows) == len(table.splitlines()) == 20 and {row[2] for row in rows} <= set(names)
    assert spent == sorted(spent, reverse=True) and 0 < sum(spent) <= float(total) + 0.1


def test_loss_begins_at_that_of_a_uniform_guess_and_falls(trained):
    validations = matches(VAL_LINE, (trained[0] / "log.txt").read_text())
    assert float(validations[0][1]) == pytest.approx(5.9506, abs=1e-3)  # ln 384
    assert float(validations[0][1]) > float(validations[1][1]) > float(validations[2][1])


def test_console_shows_the_validation_lines_of_the_log(trained):
    assert matches(VAL_LINE, trained[1]) == matches(VAL_LINE, (trained[0] / "log.txt").read_text())


def test_metrics_are_the_log_line_by_line(trained):
    text = (trained[0] / "log.txt").read_text()
    rows = [json.loads(line) for line in (trained[0] / "metrics.jsonl").read_text().splitlines()]
    train, val = ([row for row in rows if key in row] for key in ("train_loss", "val_loss"))
    assert len(train) + len(val) == len(rows)
    assert [(str(r["step"]), r["train_loss"]) for r in train] == [
        (step, pytest.approx(float(loss), abs=1e-4)) for step, loss in matches(TRAIN_LINE, text)
    ]
    assert [(str(r["step"]), r["val_loss"], r["val_bpb"]) for r in val] == [
        (step, pytest.approx(float(loss), abs=1e-4), pytest.approx(float(bpb), abs=1e-4))
        for step, loss, bpb in matches(VAL_LINE, text)
    ]
    assert all(r["tokens_per_s"] > 0 and r["lr"] > 0 for r in train)
    assert [r["train_time"] for r in rows] == sorted(r["train_time"] for r in rows)
    assert {"attn_lambdas", "resid_lambdas", "smear_mtp_lambda"} <= set(val[0]["lambdas"])


@pytest.fixture(scope="module")
def checkpoint(trained):
    return trained[0] / "checkpoint_000006.safetensors"


def test_checkpoint_and_its_export_give_the_same_sample(cli, checkpoint, tmp_path):
    export = tmp_path / "model.safetensors"
    flags = ["--sample=ab", "--sample_tokens=12"]
    code, out, error = cli(f"--checkpoint={checkpoint}", *flags, f"--export={export}")
    assert (code, error) == (0, "") and out.startswith("ab") and out.endswith(f"export: {export}\n")
    sample = out.removesuffix(f"export: {export}\n")
    assert cli(f"--checkpoint={export}", *flags) == (0, sample, "")
    assert cli(f"--checkpoint={export}", *flags, "--seed=1")[1] != sample
    assert sorted(os.listdir(tmp_path)) == ["model.json", "model.safetensors"]


def test_model_trained_with_fp8_mlp_is_sampled_from_and_exported_on_a_cpu(cli, data, tmp_path):
    cfg = replace(SMALL, fp8_mlp=True, data=str(data), log_folder=str(tmp_path))
    model, log = train_gpt.train(cfg, CPU._replace(fp8=True), train_gpt.World(), train_gpt.Launch())
    saved, export = log.folder / "checkpoint_000006.safetensors", tmp_path / "model.safetensors"
    plain = train_gpt.load_model(str(saved), replace(cfg, fp8_mlp=False), CPU)
    assert torch.equal(plain.mlp_bank, model.mlp_bank) and model.mlp_bank[:, 1].any()
    sample = train_gpt.sample_text(plain, train_gpt.load_tokenizer("bytes"), "ab", 12) + "\n"
    flags = "--device=cpu", "--sample=ab", "--sample_tokens=12"
    assert cli(f"--checkpoint={saved}", *flags, f"--export={export}") == (0, f"{sample}export: {export}\n", "")
    assert cli(f"--checkpoint={export}", *flags) == (0, sample, "")


def test_export_is_refused_by_resume(cli, checkpoint, tmp_path):
    export = tmp_path / "model.safetensors"
    assert cli(f"--checkpoint={checkpoint}", f"--export={export}")[0] == 0
    assert_refused(cli(f"--resume={export}", f"--log_folder={tmp_path / 'logs'}"), str(export), "export")
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("saved", ["checkpoint", "resume"])
@pytest.mark.parametrize("flag, had", [("--width=64", "32"), ("--smear=off", "True"), ("--mtp_heads=0", "1"),
                                       ("--softcap=30", "15.0"), ("--scheduled_steps=7", "6"),
                                       ("--track=short", "tiny")])  # fmt: skip
def test_flag_that_would_change_the_model_is_refused(cli, checkpoint, tmp_path, saved, flag, had):
    result = cli(f"--{saved}={checkpoint}", "--sample=a", f"--log_folder={tmp_path / 'logs'}", flag)
    assert_refused(result, flag.partition("=")[0], had, str(checkpoint))
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("name", ["file/model.safetensors", "folder"])
def test_export_that_cannot_be_written_is_one_line(cli, checkpoint, tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    assert_refused(cli(f"--checkpoint={checkpoint}", f"--export={tmp_path / name}"), name)


def test_flag_with_the_checkpoints_own_value_is_accepted(cli, checkpoint):
    flags = ["--sample=ab", "--sample_tokens=1", "--width=32", "--smear=on"]
    assert cli(f"--checkpoint={checkpoint}", *flags)[0] == 0


def test_resumed_run_ends_with_the_same_log_lines(cli, trained, tmp_path):
    saved = trained[0] / "checkpoint_000004.safetensors"
    code, _, error = cli(f"--resume={saved}", f"--log_folder={tmp_path}", "--sample=ab", "--sample_tokens=1")
    assert (code, error) == (0, "")
    (log,) = tmp_path.glob("*/log.txt")
    for pattern in (TRAIN_LINE, VAL_LINE):
        found, expected = (matches(pattern, path.read_text()) for path in (log, trained[0] / "log.txt"))
        assert found and found == expected[-len(found):]


def losses(root, cli, *argv):
    """Every loss of a run, as logged."""
    code, out, error = cli(f"--log_folder={root}", *argv)
    assert code == 0, error
    (path,) = root.glob("*/metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["step"], row.get("train_loss"), row.get("val_loss")) for row in rows]


def test_losses_depend_on_the_seed_alone(cli, small, data, tmp_path):
    first, again, other = (losses(tmp_path / name, cli, f"--data={data}", f"--seed={seed}")
                           for name, seed in (("first", 3), ("again", 3), ("other", 4)))  # fmt: skip
    assert len(first) == 6 + 3
    assert first == again
    equal = [a[0] for a, b in zip(first, other) if a == b]
    assert equal == [0, 1, 2]  # the head is 0 until Adam's first update


def test_runs_of_the_same_second_have_folders_of_their_own(cli, small, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt.time, "strftime", lambda form: "now")
    for _ in range(2):
        assert cli(f"--data={data}", f"--log_folder={tmp_path}", "--stop_after=1")[0] == 0
    assert sorted(os.listdir(tmp_path)) == ["now-tiny-seed0", "now-tiny-seed0-1"]


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(train_gpt.Config)])
def test_torchrun_hands_every_flag_on(name):
    """Its parser refuses a flag of ours that abbreviates two of its own, as --logs did."""
    from torch.distributed.run import get_args_parser

    argv = ["--standalone", "--nproc_per_node=2", "train_gpt.py", f"--{name}=1"]
    assert get_args_parser().parse_args(argv).training_script_args == [f"--{name}=1"]
