"""Tests of what goes wrong on the way: numbers that aren't finite, full disks, kills, ranks that differ."""

import hashlib
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from small import SMALL, assert_refused, checkpoints, random_tokens, train_gpt, write_corpus, write_split
from train_gpt import UserError, read_checkpoint
from training import Runs, assert_same_checkpoint, fork_ranks, metrics_of, run_main

NAN = float("nan")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture
def runs(monkeypatch, data, tmp_path):
    return Runs(monkeypatch, data, tmp_path)


# ------------------------------------------------ what isn't finite


def poison(name, at, rank=0):
    """Something isn't finite in one step: the training loss, or an element of a gradient."""
    inner, step, now = train_gpt.backward_micro_batch, train_gpt.train_step, []

    def train_step(model, optimizer, batches, plan, rotary, index, *stop):
        now.append(index + 1)
        return step(model, optimizer, batches, plan, rotary, index, *stop)

    def backward(model, *args):
        loss = inner(model, *args)
        if (now[-1], int(os.environ.get("RANK", 0))) == (at, rank):
            if name == "loss":
                return loss * NAN
            model.get_parameter(name).grad.view(-1)[-1] = NAN
        return loss

    train_gpt.train_step, train_gpt.backward_micro_batch = train_step, backward


def finite(path):
    return all(x.isfinite().all() for x in read_checkpoint(str(path), tensors=True)[0].values())


# What isn't finite, in which step, and what the run ends with. Banks change at once, other parameters in
# steps 2, 4 and 6; a gradient that waits is saved with the rest. The last row of a table is padding, which is
# never looked up: no loss shows it.
LOSS, SAVE = "the training loss is nan", "checkpoint of step 6 not written: "
STRUCK = {
    "the loss": ("loss", 4, LOSS),
    "a bank's gradient": ("mlp_bank", 2, LOSS),
    "a bank's gradient before a validation": ("mlp_bank", 3, "step 3: the validation loss is nan"),
    "a gradient that waits": ("attn_lambdas", 3, LOSS),
    "a table's gradient": ("head", 4, LOSS),
    "a gradient that no loss shows": ("embed", 4, SAVE),
    "a gradient of the last step": ("attn_bank", 6, "step 6: the validation loss is nan"),
    "the last loss": ("loss", 6, LOSS),
}


@pytest.fixture
def poisoned(monkeypatch, runs):
    """Poisons the runs of one test."""

    def strike(name, at):
        for attribute in ("train_step", "backward_micro_batch"):
            monkeypatch.setattr(train_gpt, attribute, getattr(train_gpt, attribute))  # are put back
        poison(name, at)

    return strike


class OnGPU(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


@pytest.fixture
def late(monkeypatch, runs):
    """From its call on, what a step reports is read while the next one runs, as on a GPU."""

    def call():
        event = types.SimpleNamespace(synchronize=lambda: None)
        stream = types.SimpleNamespace(record_event=lambda: event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        step = train_gpt.train_step
        monkeypatch.setattr(train_gpt, "train_step", lambda *args: {
            name: x.as_subclass(OnGPU) for name, x in step(*args).items()})  # fmt: skip

    return call


@pytest.mark.parametrize("device", ["CPU", "GPU"])
@pytest.mark.parametrize("struck", STRUCK)
def test_what_is_not_finite_ends_the_run_and_reaches_no_checkpoint(
    cli, runs, poisoned, late, tmp_path, monkeypatch, struck, device
):
    monkeypatch.setattr(train_gpt, "KEEP_CHECKPOINTS", 9)
    name, at, words = STRUCK[struck]
    poisoned(name, at)
    if device == "GPU":
        late()
    result = cli(f"--data={runs.data}", f"--log_folder={tmp_path / 'logs'}", "--save_every=1")
    assert_refused(result, words, *(["not finite: "] if words == SAVE else []))
    (folder,) = (tmp_path / "logs").iterdir()
    assert all(math.isfinite(loss) for _, loss in metrics_of(folder, "val_loss"))
    saved = checkpoints(folder)
    assert [int(path.stem[-6:]) for path in saved] == list(range(1, at))
    assert all(map(finite, saved)) and not [*folder.glob("*.tmp")]


def test_without_checkpoints_a_loss_read_late_ends_the_run_as_well(cli, runs, poisoned, late, tmp_path):
    poisoned("loss", 2)
    late()
    result = cli(f"--data={runs.data}", f"--log_folder={tmp_path / 'logs'}", "--save_every=-1")
    assert_refused(result, "step 2: ", LOSS)
    assert "train_loss:" not in result[1].partition("step:3/6")[2]


def kill_at(stop, step):
    if step == stop:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_signal_that_is_seen_late_is_answered_with_a_save_too(runs, late, stop):
    """Also where the step after it is one that is validated."""
    late()
    begun = runs("--val_every=2", at_step=partial(kill_at, stop))
    done = len(begun.losses)
    assert done <= min(stop + 2, 6)
    assert [int(path.stem[-6:]) for path in begun.saved] == [done]
    assert ("stopped after step" in begun.log) == (done < 6)
    assert [step for step, _ in metrics_of(begun.folder, "train_loss")] == list(range(1, done + 1))


def test_diverged_training_is_one_line_that_says_what_to_do(cli, runs, tmp_path):
    flags = "--adam_lr=1e11", "--muon_lr=1e11"
    result = cli(f"--data={runs.data}", f"--log_folder={tmp_path / 'logs'}", *flags)
    assert_refused(result, "loss is", "step", "learning rates", "--resume=auto")
    assert not list(tmp_path.glob("logs/*/*.safetensors"))


# -------------------------------------------------------- failing saves


def fill_disk(monkeypatch, full):
    """Checkpoints of the steps for which full(step) can't be written."""
    write = train_gpt.write_checkpoint

    def fail(path, tensors, meta):
        if not full(int(path.stem[-6:])):
            return write(path, tensors, meta)
        path.with_name("part.tmp").write_bytes(b"half of it")
        path.with_name("part.tmp").unlink()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_gpt, "write_checkpoint", fail)


def test_save_that_fails_on_the_way_is_logged_and_training_goes_on(runs, monkeypatch):
    undisturbed = runs("--save_every=2")
    fill_disk(monkeypatch, lambda step: step == 4)
    done = runs("--save_every=2")
    assert "\ncheckpoint of step 4 not written: " in done.log and "No space left" in done.log
    assert [path.stem[-1] for path in done.saved] == ["2", "6"]
    assert done.losses == undisturbed.losses
    assert_same_checkpoint(done.saved[-1], undisturbed.saved[-1])


def test_save_that_fails_at_the_end_is_said_there(cli, runs, tmp_path, monkeypatch):
    fill_disk(monkeypatch, lambda step: step >= 4)
    flags = f"--data={runs.data}", f"--log_folder={tmp_path / 'logs'}", "--save_every=2"
    code, out, error = cli(*flags)
    assert_refused((code, out, error), "checkpoint of step 6 not written", "No space left", "--resume=auto")
    assert "step:6/6 val_loss" in out
    (path,) = tmp_path.glob("logs/*/checkpoint_*")
    assert path.stem[-1] == "2" and train_gpt.parse_config(["--resume=auto", *flags]).resume == str(path)


def test_save_that_fails_after_a_signal_is_said_too(cli, runs, tmp_path, monkeypatch):
    fill_disk(monkeypatch, lambda step: True)
    runs.at_step = partial(kill_at, 2)
    code, out, error = cli(f"--data={runs.data}", f"--log_folder={tmp_path / 'logs'}")
    assert_refused((code, out, error), "not written", "No space left")
    assert "stopped after step" in out and "step:6/6" not in out


# ----------------------------------------------------------------- kill -9


def train_until_killed(rank, folder, data, moment):
    """SIGKILL while the checkpoint of step 4 is written, or when it is there under its temporary name."""
    import safetensors.torch

    train_gpt.TRACKS["tiny"] = SMALL
    save, fsync = safetensors.torch.save_file, os.fsync

    def save_half(tensors, path, metadata):
        save(tensors, path, metadata)
        if moment == "writing" and "000004" in path.name:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def die(file):
        if moment == "renaming" and [*folder.glob("logs/*/*000004*.tmp")]:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(file)

    safetensors.torch.save_file, os.fsync = save_half, die
    run_main(f"--data={data}", f"--log_folder={folder / 'logs'}", "--save_every=2")


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_kill_during_a_save_loses_nothing_that_was_saved_before(runs, tmp_path, moment):
    codes, errors = fork_ranks(1, tmp_path / "killed", train_until_killed, runs.data, moment)
    assert codes == [-signal.SIGKILL], errors
    (path,) = tmp_path.glob("killed/logs/*/checkpoint_*.safetensors")
    assert [*path.parent.glob("*.tmp")]
    undisturbed = runs("--save_every=2")
    resumed = runs("--resume=auto", "--save_every=2", logs=tmp_path / "killed" / "logs")
    assert f"resumed: {path} at step 2" in resumed.log
    assert not [*tmp_path.glob("killed/logs/*/*.tmp")] and [*path.parent.iterdir()].count(path) == 1
    assert resumed.losses == undisturbed.losses[2:]
    assert_same_checkpoint(resumed.saved[-1], undisturbed.saved[-1])


def test_drafts_of_checkpoints_are_removed_only_if_their_writers_are_dead(tmp_path, monkeypatch):
    ended = subprocess.Popen(["true"])
    ended.wait()
    elsewhere, node = "another-host", platform.node()
    names = {(elsewhere, ended.pid): True, (node, os.getpid()): True, (node, ended.pid): False,
             (node, 1): True}  # fmt: skip
    for host, number in names:
        folder = tmp_path / "run" / f"checkpoint_000002.safetensors.{host}.{number}.tmp"
        folder.mkdir(parents=True)
        (folder / "draft").write_bytes(b"half")
    train_gpt.remove_leftovers(tmp_path)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {f"checkpoint_000002.safetensors.{host}.{number}.tmp"
                    for (host, number), stays in names.items() if stays}  # fmt: skip


# ------------------------------------------------------------------- data


@pytest.mark.parametrize("name, content, reached", [
    ("w_train_000000.bin", b"", True), ("w_train_000000.bin", b"x" * 100, True),
    ("x_train_000000_train_000000.bin", b"x" * 1024, True), ("x_train_000002.bin", b"", False),
])  # fmt: skip
def test_a_file_without_tokens_among_the_shards_is_refused_by_name_if_it_is_reached(
    cli, runs, tmp_path, name, reached, content
):
    """Before the first of the others, between them, or behind them, where the schedule doesn't come."""
    folder = copy_of(runs.data, tmp_path / "data")
    (folder / name).write_bytes(content)
    steps = "--scheduled_steps=12"  # 4,864 tokens, whose cut documents' rests are skipped: both shards
    result = cli(f"--data={folder}", f"--log_folder={tmp_path / 'logs'}", steps)
    if reached:
        assert_refused(result, name, "not a complete token shard")
        assert not (tmp_path / "logs").exists()
    else:
        assert result[0] == 0, result


def copy_of(data, folder):
    return Path(shutil.copytree(data, folder))


def change_token(path, at):
    """Another letter for the first one from token `at` on: no document starts elsewhere. Returns where."""
    shard = np.memmap(path, "<u2", "r+", offset=1024)
    at += int(np.argmax(shard[at:] != 256))
    shard[at] = 97 + (shard[at] == 97)
    shard.flush()


def hash_of(log):
    (found,) = re.findall("^training tokens: sha256:([0-9a-f]{64})$", log, re.M)
    return found


def test_log_and_checkpoint_name_the_tokens_that_were_read(runs, tmp_path):
    """Chained over the steps, as they are read: T + 1 tokens of each micro-batch."""
    first = runs("--save_every=6")
    cfg, expected, shards = first.model.cfg, "", first.job.shards
    stream = train_gpt.DocumentStream(shards, cfg)
    for step in range(6):
        text = expected.encode()
        for _ in range(4):
            text += train_gpt.pack(stream, step)[0].astype("<u2").tobytes()
        expected = hashlib.sha256(text).hexdigest()
    assert hash_of(first.log) == expected
    assert read_checkpoint(str(first.saved[-1]))[1]["progress"].read == expected
    runs.data = copy_of(runs.data, tmp_path / "data")
    change_token(runs.data / "x_train_000000.bin", 500)
    other = runs("--save_every=-1")
    header = [re.search("^data: .* (shards:.*)$", log, re.M)[1] for log in (first.log, other.log)]
    assert header[0] == header[1] and hash_of(other.log) != expected


def another_token(path):
    change_token(path / "x_train_000000.bin", 20)


def put_in_front(path):
    shutil.copy(path / "x_train_000001.bin", path / "w_train_000000.bin")


def other_order(path):
    names = [path / f"x_train_00000{i}.bin" for i in range(2)]
    contents = [name.read_bytes() for name in names]
    for name, content in zip(names, reversed(contents)):
        name.write_bytes(content)


def without_the_first(path):
    (path / "x_train_000001.bin").replace(path / "x_train_000000.bin")


@pytest.mark.parametrize("change", [another_token, put_in_front, other_order, without_the_first])
def test_a_run_is_not_resumed_on_other_tokens_than_it_has_read(runs, tmp_path, change):
    begun = runs("--save_every=3")
    folder = copy_of(runs.data, tmp_path / "data")
    change(folder)
    with pytest.raises(UserError, match=f"{begun.saved[0].name}: .*other training tokens.*--data="):
        runs(f"--resume={begun.saved[0]}", f"--data={folder}", logs=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_run_is_not_resumed_with_other_batches_of_the_same_tokens(runs, tmp_path, monkeypatch):
    """As if another version of the script cut them."""
    begun, write = runs("--save_every=3"), train_gpt.config_from_json
    monkeypatch.setattr(train_gpt, "config_from_json", lambda values: write(values | {"micro_batches": 2}))
    with pytest.raises(UserError, match="other training tokens"):
        runs(f"--resume={begun.saved[0]}", logs=tmp_path / "refused")


def test_a_run_goes_on_with_more_data_behind_and_says_that_the_validation_is_another(runs, tmp_path):
    begun = runs("--save_every=3")
    folder = copy_of(runs.data, tmp_path / "elsewhere")
    shutil.copy(folder / "x_train_000000.bin", folder / "x_train_000002.bin")
    resumed = runs(f"--resume={begun.saved[0]}", f"--data={folder}")
    assert resumed.losses == begun.losses[3:] and "warning: " not in resumed.log
    assert hash_of(resumed.log) == hash_of(begun.log)
    change_token(folder / "x_val_000000.bin", 20)
    resumed = runs(f"--resume={begun.saved[0]}", f"--data={folder}")
    assert resumed.losses == begun.losses[3:] and "\nwarning: validation losses are not" in resumed.log


# ------------------------------------------------------------------- ranks


def read_as_rank(rank, folder, data, *others):
    """Rank 1 has other data, whose documents start where the others' do."""
    train_gpt.TRACKS["tiny"] = SMALL
    run_main(f"--data={[data, *others][rank % len([data, *others])]}", f"--log_folder={folder / 'logs'}")


def test_ranks_that_read_other_tokens_are_told_at_the_next_validation(data, tmp_path):
    other = copy_of(data, tmp_path / "other")
    change_token(other / "x_train_000000.bin", 20)
    codes, errors = fork_ranks(2, tmp_path / "differ", read_as_rank, data, other)
    for code, error in zip(codes, errors):
        assert_refused((code, "", error), "training tokens: ranks [1] have another than rank 0")
    (log,) = tmp_path.glob("differ/logs/*/log.txt")
    assert "step:3/6 train_loss" in log.read_text() and "step:3/6 val_loss" not in log.read_text()


def test_hash_of_the_tokens_is_the_same_on_any_number_of_ranks(runs, data, tmp_path):
    assert fork_ranks(2, tmp_path / "two", read_as_rank, data)[0] == [0, 0]
    (log,) = tmp_path.glob("two/logs/*/log.txt")
    assert hash_of(log.read_text()) == hash_of(runs("--save_every=-1").log)


def train_as_rank(rank, folder, data, fault):
    """Two ranks: rank 1 has a gradient that isn't finite, or rank 0's disk is full."""
    train_gpt.TRACKS["tiny"] = SMALL
    if fault == "gradient":
        poison("mlp_bank", 3, rank=1)
    else:
        train_gpt.write_checkpoint = no_room
    run_main(f"--data={data}", f"--log_folder={folder / 'logs'}", "--save_every=1")


def no_room(path, tensors, meta):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fault, words", [
    ("gradient", ["the validation loss is nan"] * 2), ("disk", ["No space left"] * 2)
])  # fmt: skip
def test_fault_of_one_rank_ends_all_with_a_line(data, tmp_path, fault, words):
    codes, errors = fork_ranks(2, tmp_path / fault, train_as_rank, data, fault)
    for code, error, word in zip(codes, errors, words):
        assert_refused((code, "", error), word)
    saved = sorted((tmp_path / fault).glob("logs/*/checkpoint_*"))
    assert [path.stem[-1] for path in saved] == (["1", "2"] if fault == "gradient" else [])
    assert all(map(finite, saved))


def die_as_rank(rank, folder, data, at):
    """Rank 1 is killed in a step, if it is there."""
    train_gpt.TRACKS["tiny"], step = SMALL, train_gpt.train_step

    def train_step(*args):
        if (rank, args[5] + 1) == (1, at):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*args)

    train_gpt.train_step = train_step
    logs = folder.parent / ("logs" if at != 9 else "undisturbed")
    run_main(f"--data={data}", f"--log_folder={logs}", "--save_every=2", "--resume=auto")


def test_kill_of_a_rank_ends_the_other_and_the_run_goes_on_from_its_last_checkpoint(data, tmp_path):
    codes, errors = fork_ranks(2, tmp_path / "begun", die_as_rank, data, 4)
    assert codes == [1, -signal.SIGKILL] and errors[0]
    ends = []
    for name, at in (("resumed", 7), ("whole", 9)):  # neither comes so far
        assert fork_ranks(2, tmp_path / name, die_as_rank, data, at) == ([0, 0], ["", ""])
        ends.append(*tmp_path.glob(f"{'undisturbed' if name == 'whole' else 'logs'}/*/checkpoint_000006*"))
    assert_same_checkpoint(*ends)
    assert "at step 2; " in (ends[0].parent / "log.txt").read_text()


def refuse_as_rank(rank, folder, data, others):
    """Ranks 1 and 3 of four differ from the others, in one thing after the other."""
    train_gpt.TRACKS["tiny"] = SMALL
    source, differs = train_gpt.source, rank % 2 == 1
    for name, flags in others.items():
        flags = flags if differs else ()
        if name == "train_gpt.py" and differs:
            train_gpt.source = lambda: source().replace("sha256:", "sha256:0")
        given = {"data": data, "log_folder": folder / f"logs{rank}"} | dict(flag.split("=") for flag in flags)
        try:
            train_gpt.run([f"--{key}={value}" for key, value in given.items()])
            print(f"{name}: trained", flush=True)
        except UserError as error:
            print(error, flush=True)
        train_gpt.source = source
        dist.barrier()
        dist.destroy_process_group()
        # Elsewhere, as one that is fast would find rank 0's old store at the old port.
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)


def test_ranks_that_differ_are_refused_before_the_first_step(data, runs, tmp_path):
    """In a line that says what differs and which ranks; paths alone may differ."""
    rng = np.random.default_rng(9)
    for name in ("train", "val"):  # other data of the same size
        for split in ("train", "val"):
            parts = [np.fromfile(path, "<u2", offset=1024) for path in sorted(data.glob(f"*_{split}_*"))]
            if split == name:
                parts = [random_tokens(rng, len(part))[: len(part)] for part in parts]
            write_split(tmp_path / name, split, parts)
        (tmp_path / name / "token_bytes.npy").write_bytes((data / "token_bytes.npy").read_bytes())
    begun = runs("--save_every=3").saved
    others = {
        "seed": ("seed=1",), "val_tokens": ("val_tokens=200",), "muon_lr": ("muon_lr=0.02",),
        "train_gpt.py": (),
        "training data": (f"data={tmp_path / 'train'}",), "validation data": (f"data={tmp_path / 'val'}",),
        "checkpoint": (f"resume={begun[0]}",),
    }  # fmt: skip
    codes, errors = fork_ranks(4, tmp_path / "differ", refuse_as_rank, data, others)
    assert codes == [0] * 4, errors
    expected = list(others)
    for rank in range(4):
        lines = (tmp_path / "differ" / f"out{rank}").read_text().splitlines()
        assert [line.partition(":")[0] for line in lines] == expected
        assert all("[1, 3]" in line for line in lines), lines
    assert not [*(tmp_path / "differ").glob("logs*")]
