"""Tests of the command line: import, flags, what mistakes print, a run from end to end and what it leaves."""

import dataclasses
import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from small import BOS, SCRIPT, SMALL, assert_refused, train_gpt, write_corpus, write_shard
from train_gpt import Config, UserError, World, choose_hardware, parse_config

sys.path.insert(0, str(SCRIPT.parent / "records"))
from runs import parse_log  # noqa: E402

FLAGS = [field for field in dataclasses.fields(Config) if field.type is not tuple]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(train_gpt.TRACKS, "tiny", replace(SMALL, vocab_size=0))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data"))


# ------------------------------------ a copy of the script alone, from end to end

# An import where there is no Triton, then what the command line does. All that it prints is a line of JSON.
ALONE = """
import json, os, sys, threading, time
sys.modules["triton"] = None
files, environment, threads = os.listdir(), dict(os.environ), threading.active_count()
import torch
begin = time.process_time()  # whatever else runs on this machine
import train_gpt
seconds = time.process_time() - begin
assert dict(os.environ) == environment and threading.active_count() == threads and os.listdir() == files
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
late = [name for name in ("safetensors", "tiktoken", "matplotlib") if name in sys.modules]
torch.cuda.is_available = lambda: False
resume, step, before, after = train_gpt.Clock.resume, train_gpt.train_step, [], []
train_gpt.Clock.resume = lambda clock: (before.append(set(sys.modules)), resume(clock))
train_gpt.train_step = lambda *args: (step(*args), after.append(set(sys.modules)))[0]
sys.stdout.flush()
sys.stdout = output = open("console", "w")
train_gpt.main()
output.flush()
print(json.dumps({"seconds": seconds, "late": late, "triton": train_gpt.triton,
                  "timed": sorted(after[0] - before[0])}), file=sys.__stdout__)
"""
NARROW = "--width=32", "--heads=2", "--scheduled_steps=6", "--val_every=3", "--mtp_heads=1", "--save_every=4"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Six steps of a narrow tiny track in an empty folder: (stdout, stderr, the folder, that of the log)."""
    import matplotlib.font_manager  # noqa: F401  makes its font cache; where that takes over 5 s, it says so

    root = tmp_path_factory.mktemp("alone")
    folder, data = root / "copy", write_corpus(root / "data", train_tokens=40_000, val_tokens=1500)
    folder.mkdir()
    (folder / "train_gpt.py").write_bytes(SCRIPT.read_bytes())
    command = [sys.executable, "-B", "-c", ALONE, *NARROW, f"--data={data}"]
    environment = {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (log,) = (folder / "logs").iterdir()
    return done.stdout, done.stderr, folder, log


def test_import_prints_nothing_is_quick_and_needs_no_triton(alone):
    out, error, *_ = alone
    assert error == "" and out.count("\n") == 1
    found = json.loads(out)
    assert found["seconds"] < 1.5 and found["late"] == [] and found["triton"] is None


def test_nothing_is_imported_on_the_clock(alone):
    """torch's first backward pass imports sympy, which took most of a short run's time."""
    assert json.loads(alone[0])["timed"] == []


def test_run_leaves_its_files_and_nothing_else(alone):
    *_, folder, log = alone
    assert sorted(os.listdir(folder)) == ["console", "logs", "train_gpt.py"]
    assert sorted(os.listdir(log)) == [
        "checkpoint_000004.safetensors", "checkpoint_000006.safetensors", "log.txt", "loss.png",
        "metrics.jsonl", "train_gpt.py",
    ]  # fmt: skip
    assert re.fullmatch(r"\d{8}-\d{6}-tiny-seed0", log.name)
    assert (log / "train_gpt.py").read_bytes() == SCRIPT.read_bytes()
    assert (log / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


TIMES = r"train_time:\d+ms step_avg:\d+\.\d\dms"
TRAIN_LINE = re.compile(rf"step:(\d+)/6 train_loss:(\d+\.\d{{4}}) {TIMES}")
VAL_LINE = re.compile(
    rf"step:(\d+)/6 val_loss:(\d+\.\d{{4}}) val_bpb:(\d+\.\d{{4}}) {TIMES}(?: \w+_lambdas?:[+-]\d+\.\d{{4}})+"
)


def matches(pattern, text):
    return [match.groups() for line in text.splitlines() if (match := pattern.fullmatch(line))]


HEADER_AND_END = (
    "source sha256:", "config {", "python:", "device: cpu (CPU)", "machine: gpu:",
    "hardware: float32, compile False", "data: data ", "validation: tokens:", "model: ", "timed: ",
    "untimed: ", "first step ", "training tokens: sha256:", "peak memory: ", "log: ", "plot: ",
)  # fmt: skip


def test_log_has_the_documented_lines(alone):
    text = (alone[-1] / "log.txt").read_text()
    assert [step for step, _ in matches(TRAIN_LINE, text)] == ["1", "2", "3", "4", "5", "6"]
    assert [step for step, *_ in matches(VAL_LINE, text)] == ["0", "3", "6"]
    assert text.count(" smear_mtp_lambda:") == 3
    for start in HEADER_AND_END:
        assert sum(line.startswith(start) for line in text.splitlines()) == 1, start
    config = json.loads(re.search(r"^config (.*)$", text, re.M)[1])
    assert (config["width"], config["scheduled_steps"], config["seed"]) == (32, 6, 0)
    (seconds,) = matches(re.compile(r"first step (\d+\.\d) s after the start of this process"), text)
    assert 0 < float(seconds[0]) < 3600


def test_records_read_the_log(alone):
    run = parse_log(alone[-1] / "log.txt")
    assert [(step.step, step.total, step.kind) for step in run.steps] == [
        (0, 6, "val"), (1, 6, "train"), (2, 6, "train"), (3, 6, "train"), (3, 6, "val"), (4, 6, "train"),
        (5, 6, "train"), (6, 6, "train"), (6, 6, "val")]  # fmt: skip
    assert list(run.curve) == [0, 3, 6] and run.config["seed"] == 0 and run.loss < 5.9
    assert run.header["sha256"] == train_gpt.source().split()[1].partition(":")[2]
    assert run.header["device"] == "cpu (CPU)"


def test_loss_begins_at_that_of_a_uniform_guess_and_falls(alone):
    validations = matches(VAL_LINE, (alone[-1] / "log.txt").read_text())
    assert float(validations[0][1]) == pytest.approx(5.9506, abs=1e-3)  # ln 384
    assert float(validations[0][1]) > float(validations[1][1]) > float(validations[2][1])


def test_console_shows_the_validation_lines_of_the_log(alone):
    *_, folder, log = alone
    console = (folder / "console").read_text()
    assert matches(VAL_LINE, console) == matches(VAL_LINE, (log / "log.txt").read_text())
    assert "config {" not in console
    assert re.search(r"^step:6/6 train_loss:\S+ tokens_per_s:\S+ eta:0s$", console, re.M)


def test_metrics_are_the_log_line_by_line(alone):
    text = (alone[-1] / "log.txt").read_text()
    rows = [json.loads(line) for line in (alone[-1] / "metrics.jsonl").read_text().splitlines()]
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


def test_resumed_run_ends_with_the_same_log_lines(cli, alone, tmp_path):
    log = alone[-1]
    code, _, error = cli(f"--resume={log / 'checkpoint_000004.safetensors'}", f"--log_folder={tmp_path}")
    assert (code, error) == (0, "")
    (path,) = tmp_path.glob("*/log.txt")
    for pattern in (TRAIN_LINE, VAL_LINE):
        found, expected = (matches(pattern, text.read_text()) for text in (path, log / "log.txt"))
        assert found and found == expected[-len(found):]


@pytest.mark.parametrize("flag, had", [
    ("--width=64", "32"), ("--smear_mtp=off", "True"), ("--mtp_heads=0", "1"), ("--leaky_slope=0.1", "0.5"),
    ("--scheduled_steps=7", "6"), ("--seed=1", "0"), ("--micro_batches=4", "2"), ("--track=short", "tiny")])
def test_flag_that_would_change_a_resumed_run_is_refused(cli, alone, tmp_path, flag, had):
    path = alone[-1] / "checkpoint_000004.safetensors"
    result = cli(f"--resume={path}", f"--log_folder={tmp_path / 'logs'}", flag)
    assert_refused(result, flag.partition("=")[0], had, str(path))
    assert not (tmp_path / "logs").exists()


def test_flags_that_a_resumed_run_may_have(alone):
    flags = "--width=32", "--smear_mtp=on", "--save_every=1", "--compile=off", "--log_folder=elsewhere"
    cfg = parse_config([f"--resume={alone[-1] / 'checkpoint_000004.safetensors'}", *flags])
    assert (cfg.scheduled_steps, cfg.mtp_heads, cfg.save_every, cfg.compile) == (6, 1, 1, False)
    assert (cfg.log_folder, cfg.data) == ("elsewhere", str(alone[2].parent / "data"))


def test_finished_run_and_several_runs_are_not_resumed(cli, alone):
    path = alone[-1] / "checkpoint_000006.safetensors"
    assert_refused(cli(f"--resume={path}"), str(path), "step 6")
    assert_refused(cli(f"--resume={path}", "--runs=2"), "--runs")


# ---------------------------------------------------------------------- flags


def test_help_says_what_each_of_at_most_60_flags_does(cli):
    code, out, error = cli("--help")
    assert (code, error) == (0, "")
    listed = re.findall(r"^  --(\w+)", out, re.M)
    assert listed == [field.name for field in FLAGS] and len(listed) <= 60
    letters, source = "".join(out.split()), SCRIPT.read_text()
    for field in FLAGS:
        line = rf"^    {field.name}: {field.type.__name__} = \S.*?  # (.{{10,}})$"
        (comment,) = re.findall(line, source, re.M)
        default = getattr(train_gpt.TRACKS["tiny"], field.name)
        assert "".join(f"{comment} [{default}]".split()) in letters


def test_limits_of_flags_are_of_fields_that_exist():
    assert {*train_gpt.CHOICES, *train_gpt.LEAST} <= {field.name for field in FLAGS}


def test_fields_that_are_no_flags_are_the_tables():
    assert {field.name for field in dataclasses.fields(Config)} - {field.name for field in FLAGS} == {
        "stages", "layers", "val_windows"}  # fmt: skip


def test_flags_that_others_use_keep_their_names():
    assert {field.name for field in FLAGS} >= {
        "data", "log_folder", "seed", "resume", "save_every", "val_tokens", "epochs", "scheduled_steps",
        "extension_steps", "width", "heads", "micro_batches"}  # fmt: skip


def test_flags_are_read_as_their_fields_say():
    argv = ["--width=64", "--adam_lr=1e-1", "--smear_mtp=off", "--pointer", "--width=96", "--graphs=on"]
    cfg = parse_config([*argv, "--seed", "5", "--data=a=b --c", "--vocab_size=257"])
    assert (cfg.width, cfg.adam_lr, cfg.data, cfg.seed) == (96, 0.1, "a=b --c", 5)
    assert (cfg.smear_mtp, cfg.pointer, cfg.graphs) == (False, True, True)


@pytest.mark.parametrize("track", train_gpt.TRACKS)
def test_every_track_fits_together(track):
    cfg = parse_config([f"--track={track}", "--vocab_size=50257"], ranks=8)
    assert cfg.track == track and cfg.micro_batches == 8
    assert train_gpt.config_from_json(json.loads(json.dumps(vars(cfg)))) == cfg


def test_vocabulary_is_that_of_the_data_or_gpt_2s(tmp_path):
    flag = f"--data={tmp_path}"
    assert parse_config([flag]).vocab_size == 50_257
    np.save(tmp_path / "token_bytes.npy", np.ones(300, np.int32))
    assert parse_config([flag]).vocab_size == 300
    assert parse_config([flag, "--vocab_size=400"]).vocab_size == 400


ABSURD = "", "nan", "inf", "-inf", "-1", "1e30", "9" * 99, "0x10", "1.5", "a=b", "a\nb", "🙂", "\0", "[]"


def test_absurd_values_are_refused_in_a_line_or_taken(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "run", lambda argv: parse_config([*argv, "--log_folder=logs"]))
    refused = set()
    for field in FLAGS:
        for value in ABSURD:
            code, out, error = cli(f"--{field.name}={value}")
            assert (code, error.count("\n"), out) in ((2, 1, ""), (0, 0, "")), (field.name, value)
            refused |= {field.name} if code else set()
    assert refused == {field.name for field in FLAGS} - {"data", "log_folder"}
    assert os.listdir() == []


def test_torchrun_hands_every_flag_on():
    """Its parser refuses a flag of ours that abbreviates two of its own, as --logs did."""
    from torch.distributed.run import get_args_parser

    for field in FLAGS:
        argv = ["--standalone", "--nproc_per_node=2", "train_gpt.py", f"--{field.name}=1"]
        assert get_args_parser().parse_args(argv).training_script_args == [f"--{field.name}=1"]


# ------------------------------------------------------------------- mistakes


MISTAKES = {
    "misspelt": (["--widht=32"], "--widht=32", "--help"),
    "abbreviated": (["--widt=32"], "--widt=32", "--help"),
    "not_a_flag": (["width=32"], "width=32", "--help"),
    "table_as_flag": (["--layers=3"], "--layers=3"),
    "no_name": (["--=3"], "--=3"),
    "word_for_whole_number": (["--width=wide"], "--width", "wide"),
    "fraction_for_whole_number": (["--width=32.5"], "--width", "32.5"),
    "word_for_number": (["--adam_lr=hot"], "--adam_lr", "hot"),
    "word_for_switch": (["--pointer=maybe"], "--pointer", "maybe", "on", "off"),
    "number_for_switch": (["--pointer=3"], "--pointer", "3"),
    "unknown_choice": (["--document_rest=all"], "--document_rest", "all", "skip", "keep"),
    "unknown_track": (["--track=long"], "--track", "long", "race300", "medium"),
    "empty_choice": (["--track="], "--track", "tiny"),
    "zero_width": (["--width=0"], "--width=0", "from 1"),
    "negative": (["--val_tokens=-1"], "--val_tokens=-1", "from 0"),
    "below_minus_one": (["--save_every=-2"], "--save_every=-2", "from -1"),
    "nan": (["--adam_lr=nan"], "--adam_lr=nan"),
    "infinite": (["--muon_lr=inf"], "--muon_lr=inf"),
    "huge": (["--scheduled_steps=10000000000000"], "--scheduled_steps"),
    "line_break": (["--document_rest=a\nb"], "--document_rest"),
    "no_value": (["--width"], "--width", "expected one argument"),
    "no_value_for_text": (["--data"], "--data", "expected one argument"),
    "heads_do_not_divide": (["--width=32", "--heads=3"], "--width=32", "heads"),
    "head_of_two": (["--width=4", "--heads=2"], "--width=4"),
    "backout_beyond_the_model": (["--backout_from=99"], "--backout_from=99", "2"),
    "missing_data_folder": (["--data={tmp}/nowhere"], "{tmp}/nowhere", "--data"),
    "empty_data_folder": (["--data={tmp}/empty"], "{tmp}/empty", "_train_"),
    "no_validation_shards": (["--data={tmp}/train_only"], "{tmp}/train_only", "_val_"),
    "corrupted_shard": (["--data={tmp}/corrupted"], "x_train_000000.bin"),
    "corrupted_validation_shard": (["--data={tmp}/corrupted_val"], "x_val_000000.bin"),
    "missing_resume": (["--resume={tmp}/none"], "{tmp}/none"),
    "resume_of_a_folder": (["--resume={tmp}/empty"], "{tmp}/empty"),
    "vocabulary_too_large": (["--vocab_size=300"], "x_train_000000.bin", "299"),
    "vocabulary_too_small": (["--vocab_size=100"], "x_train_000000.bin", "100"),
    "too_few_tokens": (["--scheduled_steps=500"], "1 epochs", "--epochs", "--scheduled_steps"),
    "val_tokens_too_large": (["--val_tokens=100000"], "--val_tokens=100000"),
    "batch_not_divisible": (["--micro_batches=3"], "--micro_batches=3", "256"),
    "log_folder_is_a_file": (["--log_folder={tmp}/file/logs"], "{tmp}/file", "--log_folder="),
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
    for name in ("corrupted", "corrupted_val", "train_only"):
        np.save(tmp_path / name / "token_bytes.npy", np.ones(BOS + 1, np.int32))
    write_shard(tmp_path / "corrupted" / "x_train_000000.bin", [BOS, 1, 2], count=4)
    write_shard(tmp_path / "corrupted_val" / "x_val_000000.bin", [BOS, 1, 2], magic=1)
    (tmp_path / "file").write_text("")
    return tmp_path


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line_and_leaves_no_log(cli, small, data, broken, monkeypatch, mistake):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv, *words = ([text.replace("{tmp}", str(broken)) for text in part] if isinstance(part, list)
                    else part.replace("{tmp}", str(broken)) for part in MISTAKES[mistake])  # fmt: skip
    given = any(arg.startswith(("--resume", "--data")) for arg in argv)
    result = cli(f"--log_folder={broken / 'logs'}", *([] if given else [f"--data={data}"]), *argv)
    assert_refused(result, *words)
    assert result[1] == "" and not (broken / "logs").exists()


def test_mistake_in_the_script_run_as_such_has_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--widht=32"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert_refused((end.value.code, *(printed := capsys.readouterr())), "--widht")
    assert printed.out == ""


def test_too_little_gpu_memory_is_one_line_that_says_what_to_change(cli, small, data, tmp_path, monkeypatch):
    def run_out(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr(train_gpt, "train_step", run_out)
    result = cli(f"--data={data}", f"--log_folder={tmp_path}")
    assert_refused(result, "CUDA out of memory: raise --micro_batches=", "--bigram_ratio=")


def test_data_is_found_from_any_folder(monkeypatch, tmp_path):
    """As given, or else beside the script or further up."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "__file__", str(tmp_path / "record" / "frozen" / "train_gpt.py"))
    beside, above = (tmp_path / "record" / name for name in ("frozen/data/a", "data/b"))
    for folder in (beside, above):
        folder.mkdir(parents=True)
    names = "data/a", "data/b", "record/data/b"
    found = [train_gpt.data_folder(replace(SMALL, data=name)) for name in names]
    assert [path.resolve() for path in found] == [beside, above, above]
    with pytest.raises(UserError, match="no data/c/.*_train_.*make them with python data/fineweb.py"):
        train_gpt.find_shards(replace(SMALL, data="data/c"), "train")


# ------------------------------------------------------- progress and its plot


def test_progress_is_told_five_times_between_validations(cli, small, data, tmp_path):
    code, out, error = cli(f"--data={data}", f"--log_folder={tmp_path}", "--val_every=10")
    assert (code, error) == (0, "")
    line = r"^step:(\d)/6 train_loss:\d\.\d{4} tokens_per_s:[\d,]+ eta:\d+s$"
    assert re.findall(line, out, re.M) == list("246")


def test_plot_that_cannot_be_drawn_is_said_in_the_log(cli, small, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, error = cli(f"--data={data}", f"--log_folder={tmp_path}")
    assert (code, error) == (0, "") and re.search("^plot: not drawn: .*matplotlib", out, re.M)


def test_what_does_not_fit_on_the_disk_is_said_in_a_line(cli, small, data, tmp_path, monkeypatch):
    """A plot that doesn't is none of the run's failures; a log that doesn't ends it."""
    from matplotlib.figure import Figure

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    code, out, error = cli(f"--data={data}", f"--log_folder={tmp_path}")
    assert (code, error) == (0, "") and re.search("^plot: not drawn: .*No space left.*\nlog: ", out, re.M)
    monkeypatch.setattr(train_gpt.Log, "metric", full)
    assert_refused(cli(f"--data={data}", f"--log_folder={tmp_path}"), "No space left")


def test_a_tilde_is_the_home_folder_in_every_path(cli, small, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "write_plot", lambda folder: "not drawn: a test")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "data").symlink_to(data)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    flags = "--log_folder=~/logs", "--save_every=4"
    assert cli("--data=~/data", *flags)[::2] == (0, "")
    (path,) = (tmp_path / "home" / "logs").glob("*/checkpoint_000004*")
    assert cli(f"--resume=~/logs/{path.parent.name}/{path.name}", *flags)[::2] == (0, "")
    assert os.listdir(tmp_path) == ["home"] and len(os.listdir(tmp_path / "home" / "logs")) == 2


ENVIRONMENTS = {  # RANK, WORLD_SIZE, LOCAL_RANK, and whether MASTER_ADDR and MASTER_PORT are there
    (None, None, None, False): World(), ("", "", "", False): World(), (None, "", None, True): World(),
    ("0", "1", "0", False): World(), ("1", "4", "0", True): World(1, 4, 0),
    ("1", None, None, False): None, ("", "2", None, True): None, ("0", "", "0", True): None,
    ("0", "2", None, True): None, (None, None, "0", False): None, ("2", "2", "0", True): None,
    ("one", "2", "1", True): None, ("-1", "2", "0", True): None, ("0", "2", "0", False): None,
}  # fmt: skip


@pytest.mark.parametrize("found", ENVIRONMENTS, ids=str)
def test_variables_of_a_launcher_count_only_together(cli, monkeypatch, found):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), found):
        if value is not None:
            monkeypatch.setenv(name, value)
    if found[3]:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", "29500")
    if ENVIRONMENTS[found] is not None:
        assert World.from_environment() == ENVIRONMENTS[found]
    else:
        assert_refused(cli(), "RANK", "WORLD_SIZE", "LOCAL_RANK", "torchrun", "unset")


def test_runs_of_the_same_second_have_folders_of_their_own(cli, small, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt, "write_plot", lambda folder: "not drawn: a test")
    monkeypatch.setattr(train_gpt.time, "strftime", lambda form: "now")
    flags = f"--data={data}", f"--log_folder={tmp_path}", "--scheduled_steps=1", "--save_every=-1"
    assert [cli(*flags)[0] for _ in range(3)] == [0] * 3
    assert sorted(os.listdir(tmp_path)) == ["now-tiny-seed0", "now-tiny-seed0-1", "now-tiny-seed0-1-1"]


# ------------------------------------------------------------------- hardware


CHOSEN = [  # compute capability, flags, attention, kernels, fp8, graphs
    (None, {}, "reference", "reference", False, False),
    ((7, 5), {}, "reference", "reference", False, False),
    ((8, 0), {}, "fa2", "small", False, True),
    ((8, 9), {}, "fa2", "small", True, True),
    ((9, 0), {}, "fa3", "large", True, True),
    ((9, 0), {"fa3": False}, "fa2", "large", True, True),
    ((9, 0), {"kernels": False}, "fa3", "reference", False, True),
    ((9, 0), {"fp8": False, "graphs": False}, "fa3", "large", False, False),
    ((9, 0), {"compile": False}, "fa3", "large", True, False),
    ((9, 0), {"width": 40}, "fa3", "large", False, True),
    ((10, 0), {}, "fa2", "large", True, True),
    ((12, 0), {}, "fa2", "small", True, True),
]


@pytest.fixture
def gpu(monkeypatch):
    """Pretends a GPU of a compute capability, or none, with Triton and FlashAttention 3."""

    def pretend(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(capability is not None))
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
        monkeypatch.setattr(train_gpt, "triton", True)
        monkeypatch.setattr(train_gpt.importlib.util, "find_spec",
                            lambda name: name == "flash_attn_interface" or None)
        monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", active.append)
        return active

    active = []
    return pretend


@pytest.mark.parametrize("capability, flags, attention, kernels, fp8, graphs", CHOSEN)
def test_hardware_gets_the_best_that_it_can_run(gpu, capability, flags, attention, kernels, fp8, graphs):
    active = gpu(capability)
    hardware = choose_hardware(replace(SMALL, **flags), World())
    assert hardware[3:] == (kernels, attention, fp8, graphs)
    assert hardware.compile == (capability is not None and flags.get("compile", True))
    assert hardware.dtype == (torch.bfloat16 if capability and capability >= (8, 0) else torch.float32)
    assert active == ["FA3"] * (attention == "fa3")


def test_a_hopper_gpu_without_flash_attention_3_or_triton_gets_what_there_is(gpu, monkeypatch):
    active = gpu((9, 0))
    monkeypatch.setattr(train_gpt.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(train_gpt, "triton", None)
    hardware = choose_hardware(SMALL, World())
    assert (hardware.attention, hardware.kernels) == ("fa2", "reference") and not active


def test_a_process_without_a_gpu_of_its_own_is_refused(gpu):
    gpu((9, 0))
    with pytest.raises(UserError, match="process 2 has no GPU"):
        choose_hardware(SMALL, World(1, 2, 1))
