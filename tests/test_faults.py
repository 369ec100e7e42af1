"""Tests of what goes wrong on the way: numbers that aren't finite, full disks, kills, ranks that differ."""

import math
import os
import signal
import types
from functools import partial

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
        event = types.SimpleNamespace(record=lambda: None, synchronize=lambda: None)
        monkeypatch.setattr(torch.cuda, "Event", lambda: event)
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
    assert resumed.losses == undisturbed.losses[2:]
    assert_same_checkpoint(resumed.saved[-1], undisturbed.saved[-1])


# ------------------------------------------------------------------- ranks


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
        dist.destroy_process_group()


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
        "seed": ("seed=1",), "flags": ("muon_lr=0.02",), "train_gpt.py": (),
        "training data": (f"data={tmp_path / 'train'}",), "validation data": (f"data={tmp_path / 'val'}",),
        "checkpoint": (f"resume={begun[0]}",),
    }  # fmt: skip
    codes, errors = fork_ranks(4, tmp_path / "differ", refuse_as_rank, data, others)
    assert codes == [0] * 4, errors
    expected = ["muon_lr" if name == "flags" else name for name in others]
    for rank in range(4):
        lines = (tmp_path / "differ" / f"out{rank}").read_text().splitlines()
        assert [line.partition(":")[0] for line in lines] == expected
        assert all("[1, 3]" in line for line in lines), lines
    assert not [*(tmp_path / "differ").glob("logs*")]
