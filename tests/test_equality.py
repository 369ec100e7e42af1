"""Tests that runs are equal: on 1, 2 and 4 ranks, stopped and resumed, and whatever is put in their way."""

import io
import json
import os
import signal
import subprocess
import sys
import types
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from small import (
    BOS, RESCALED_FLAGS, SCRIPT, SMALL, checkpoint_of, count_as_prefixes, free_port, random_tokens,
    run_ranks, train_gpt,
    write_split,
)  # fmt: skip
from test_training import assert_equal, randomise, relative_error, weights_of
from train_gpt import GPT, Stage, UserError, Validation

# 20 steps in four stages, which begin at steps 6, 12 and 18; two shards' ends lie within documents, and
# the second epoch begins on the way. Three chunks of validation: at 4 ranks one gets none.
STEPS, SIZES = 20, (1, 2, 4)
EQUAL = replace(
    SMALL, stages=(*SMALL.stages, Stage(1.0, 256, 64, 16, 64, 0.5)), scheduled_steps=18, extension_steps=2,
    mtp_heads=1, epochs=2, val_every=5, yarn_window=48, save_every=1, keep=0, bigram_ratio=1.5,
    muon_heads=1,
)  # fmt: skip
# The head is untied at step 10.
VARIANTS = {  # Adam acts every third step in one, every second in the other: between, its gradients wait
    "keep": ("--document_rest=keep", "--adam_every=3", "--smooth_scalars", "--untied_values", "--draw_output",
             "--adam_weight_decay=0.005", "--late_attention", "--backout_from=0", "--prefix_weight=0.25",
             "--untie_at=0.55"),
    "skip": ("--document_rest=skip", "--adam_every=2", *RESCALED_FLAGS, "--cut_smear", "--cut_key_offset",
             "--cut_smear_mtp", "--cut_bigram"),
}


def write_shards(folder):
    """Three training shards, of which two end within a document, and a validation shard."""
    rng = np.random.default_rng(0)
    tokens = random_tokens(rng, 6000)
    cuts = [cut + 1 + int(tokens[cut + 1] == BOS) for cut in (2000, 4000)]
    assert not any(tokens[cut] == BOS for cut in cuts)
    write_split(folder, "train", np.split(tokens, cuts))
    write_split(folder, "val", [random_tokens(rng, 260)[:260]])
    return folder


# ---------------------------------------------------- runs on 1, 2 and 4 ranks


class Job(NamedTuple):
    """A run of EQUAL on so many ranks, from its start or from a checkpoint of an earlier job."""

    name: str
    size: int
    flags: tuple = ()
    resumed: tuple = ()          # (name of the job, step)


def keep_results(function, results):
    """The function, with the first number of what it returns kept, all its bits."""

    def called(*args):
        result = function(*args)
        results.append(result["val_loss"] if isinstance(result, dict) else result[0].item())
        return result

    return called


def train_as_rank(rank, root, jobs):
    """Process `rank` runs the jobs that it has a part in, in turn; each leaves what it found in a file."""
    torch.set_num_threads(1)
    os.cpu_count = lambda: 1  # by which the script shares out threads
    train_gpt.TRACKS["tiny"] = EQUAL
    train_gpt.build_model = lambda cfg, hardware: randomise(GPT(cfg))
    train_gpt.token_prefixes = count_as_prefixes
    step, validate, models = train_gpt.train_step, Validation.run, []
    train_gpt.finish = lambda cfg, model, *rest: models.append(model)
    for job, port in jobs:
        if rank < job.size:
            losses, validations, folder = [], [], root / job.name
            train_gpt.train_step = keep_results(step, losses)
            Validation.run = keep_results(validate, validations)
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(job.size), LOCAL_RANK=str(rank),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
            source = f"--data={root / 'data'}"
            if job.resumed:
                name, cut = job.resumed
                source = f"--resume={checkpoint_of(root / name, cut)}"
            train_gpt.run([source, f"--log_folder={folder}", *job.flags])
            numbers = {"train": torch.tensor(losses), "val": torch.tensor(validations, dtype=torch.float64)}
            save_file(weights_of(models[-1]) | numbers, folder / f"rank{rank}")


def run_jobs(root, jobs):
    """Run the jobs in turn, on the first of four processes that serve for all."""
    for job in jobs:
        (root / job.name).mkdir()
    jobs = [(job, free_port()) for job in jobs]
    run_ranks(train_as_rank, root, jobs, seconds=1500)


def unbroken(variant, size, mode="deterministic", every=1):
    flags = ("--deterministic",) if mode == "deterministic" else ()
    saves = f"--save_every={every}", "--keep=0"
    return Job(f"{mode}-{variant}-{size}", size, (*saves, *VARIANTS[variant], *flags))


def resumed(variant, sizes, cut, mode="deterministic", every=1):
    """From the checkpoint of an unbroken run on sizes[0] ranks, on sizes[1] ranks.

    A fast run has to save as often: a save adds up the gradients that wait on the ranks.
    """
    flags = ("--deterministic",) if mode == "deterministic" else (f"--save_every={every}", "--keep=0")
    name = f"{mode}-{variant}-{sizes[0]}-{sizes[1]}-at-{cut}"
    return Job(name, sizes[1], flags, (unbroken(variant, sizes[0], mode).name, cut))


# Adam's gradients wait at 1, 10, 17 and 19; 6 and 18 are changes of stage.
CUTS = {1: ((2, 1), (4, 2)), 6: ((4, 1),), 10: ((1, 2),), 17: ((1, 4), (2, 2)), 19: ((4, 4), (1, 1), (2, 4))}
RESUMED = [resumed("keep", sizes, cut) for cut, pairs in CUTS.items() for sizes in pairs]
FAST_RESUMED = [resumed("keep", (size, size), cut, "fast", every=7) for size in (2, 4) for cut in (7, 14)]
FIRST_STEPS = [Job(f"first-{size}", size, ("--stop_after=1",)) for size in SIZES]
FINER = Job("finer", 4, ("--deterministic", "--micro_batches=2", "--stop_after=3"))
FOUR = Job("four", 1, ("--deterministic", "--micro_batches=4", "--stop_after=3"))
JOBS = [*(unbroken("keep", size) for size in SIZES), *(unbroken("skip", size, every=0) for size in (1, 4)),
        *(unbroken("keep", size, "fast", every=7) for size in SIZES), *RESUMED, *FAST_RESUMED, *FIRST_STEPS,
        FINER, FOUR]  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder that holds one for each of JOBS."""
    root = tmp_path_factory.mktemp("ranks")
    write_shards(root / "data")
    run_jobs(root, JOBS)
    return root


def results_of(folder, rank=0):
    """Final weights, and every train and validation loss."""
    return load_file(folder / f"rank{rank}")


def saved_steps(folder):
    return sorted(int(path.stem[-6:]) for path in folder.glob("*/checkpoint_*"))


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return {name: json.loads(text) for name, text in file.metadata().items()}


def assert_same_checkpoint(found, expected):
    """Weights, moments, waiting gradients, step and position are equal bit for bit."""
    assert_equal(load_file(found), load_file(expected))
    found, expected = metadata_of(found), metadata_of(expected)
    assert [found[key] for key in ("step", "position")] == [expected[key] for key in ("step", "position")]


@pytest.mark.parametrize("variant, size", [("keep", 2), ("keep", 4), ("skip", 4)])
def test_deterministic_runs_are_equal_on_1_2_and_4_ranks(ranks, variant, size):
    expected = ranks / unbroken(variant, 1).name
    found = ranks / unbroken(variant, size).name
    for rank in range(size):
        assert_equal(results_of(found, rank), results_of(expected))
    for step in saved_steps(expected):
        assert_same_checkpoint(checkpoint_of(found, step), checkpoint_of(expected, step))


def test_the_runs_that_are_compared_pass_what_might_set_them_apart(ranks):
    saved = [checkpoint_of(ranks / unbroken("keep", 1).name, step) for step in range(1, STEPS + 1)]
    waiting = ["optimizer.embed.grad" in load_file(path) for path in saved]
    assert waiting == [step % 3 > 0 for step in range(1, STEPS + 1)]
    edges = train_gpt.Shards(sorted((ranks / "data").glob("*_train_*")), SMALL).edges
    positions = [metadata_of(path)["position"] for path in saved]
    passed = {(epoch, int(np.searchsorted(edges, offset, "right")) - 1) for epoch, offset in positions}
    assert passed == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)}
    for variant in VARIANTS:
        folder = ranks / unbroken(variant, 1).name
        results = results_of(folder)
        assert metadata_of(checkpoint_of(folder, STEPS))["position"][0] == 1
        assert len(results["train"]) == STEPS and len(results["val"]) == 5
        assert results["train"][0] > 10 and results["train"][-1] < 2


def test_ranks_beyond_the_micro_batches_make_them_finer_and_are_equal_to_one_process_with_as_many(ranks):
    """So beyond cfg.micro_batches ranks a run is not that of fewer: its micro-batches are others."""
    for rank in range(FINER.size):
        assert_equal(results_of(ranks / FINER.name, rank), results_of(ranks / FOUR.name))
    logs = ["".join(path.read_text() for path in (ranks / job.name).glob("*/log.txt")) for job in (FINER, FOUR)]
    assert [f"micro-batches of a step: {FINER.size}, not " in log for log in logs] == [True, False]


def gradients_of_step_1(folder):
    """After reduction: those of Adam's rows wait in the checkpoint, NorMuon's are 1 / (1 - 0.85) momenta."""
    tensors = load_file(checkpoint_of(folder, 1))
    found = {name: t for name, t in tensors.items() if name.endswith((".grad", ".momentum"))}
    assert len(found) == sum(name.startswith("model.") for name in tensors)
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_fast_runs_agree_on_1_2_and_4_ranks(ranks, size):
    expected, found = (gradients_of_step_1(ranks / f"first-{n}") for n in (1, size))
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < 1e-6, errors
    folders = [ranks / unbroken("keep", n, "fast").name for n in (1, size)]
    for key in ("train", "val"):
        losses = [results_of(folder)[key] for folder in folders]
        torch.testing.assert_close(*losses, rtol=0, atol=1e-4)
        print(key, "differs by up to", (losses[0] - losses[1]).abs().max())
    print("gradients differ by up to", max(errors.values()))
    for rank in range(1, size):
        assert_equal(results_of(folders[1], rank), results_of(folders[1]))


# ----------------------------------------------------------------------- resume


def assert_continued(ranks, job):
    """The job ends as the unbroken run from which it went on."""
    name, cut = job.resumed
    whole, found = ranks / name, ranks / job.name
    for rank in range(job.size):
        expected, results = results_of(whole), results_of(found, rank)
        assert torch.equal(results["train"], expected["train"][cut:])
        assert torch.equal(results["val"], expected["val"][-(-cut // 5) :])
    assert_same_checkpoint(checkpoint_of(found, STEPS), checkpoint_of(whole, STEPS))
    clocks = metadata_of(checkpoint_of(whole, cut)), metadata_of(checkpoint_of(found, STEPS))
    assert clocks[0]["train_seconds"] < clocks[1]["train_seconds"]
    assert len(metrics_of(found)) == STEPS - cut
    assert metrics_of(found) == metrics_of(whole)[-len(metrics_of(found)) :]


def metrics_of(folder):
    """What metrics.jsonl says of the training steps, but for times."""
    (path,) = folder.glob("*/metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["step"], row["train_loss"], row["lr"]) for row in rows if "train_loss" in row]


@pytest.mark.parametrize("job", RESUMED, ids=lambda job: job.name)
def test_deterministic_run_resumed_on_any_number_of_ranks_ends_as_the_unbroken_one(ranks, job):
    assert_continued(ranks, job)


@pytest.mark.parametrize("job", FAST_RESUMED, ids=lambda job: job.name)
def test_fast_run_resumed_on_as_many_ranks_ends_as_the_unbroken_one_that_saved_as_often(ranks, job):
    assert_continued(ranks, job)


GRID = [resumed(variant, (a, b), cut) for variant in VARIANTS for a in SIZES for b in SIZES
        for cut in range(1, STEPS) if variant == "keep" or a == b]  # fmt: skip
FAST_GRID = [resumed("keep", (size, size), cut, "fast") for size in SIZES for cut in range(1, STEPS)]


@pytest.mark.slow
def test_resume_at_every_step_from_and_to_every_number_of_ranks(tmp_path):
    write_shards(tmp_path / "data")
    modes = "deterministic", "fast"
    whole = [unbroken(variant, size, mode) for variant in VARIANTS for size in SIZES for mode in modes]
    run_jobs(tmp_path, [*whole, *GRID, *FAST_GRID])
    for job in (*GRID, *FAST_GRID):
        assert_continued(tmp_path, job)


# -------------------------------------------------------------- --resume=auto


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(train_gpt.TRACKS, "tiny", SMALL)


def write_run(logs, name, steps, **changes):
    """A run's folder with checkpoints, younger than those before; returns their paths."""
    cfg, age = replace(SMALL, keep=0, **changes), 1000 - len(list(logs.glob("*/*")))
    model = GPT(cfg)
    optimizer = train_gpt.Optimizer(model, train_gpt.optimizer_table(cfg), train_gpt.World())
    for p in model.parameters():
        train_gpt.gradient(p)
    paths = [logs / name / f"checkpoint_{step:06d}.safetensors" for step in steps]
    for step, path in zip(steps, paths):
        progress = {"step": step, "position": train_gpt.Position(), "train_seconds": 1.0}
        assert not train_gpt.save_checkpoint(path, model, optimizer, train_gpt.World(), progress)
        os.utime(path, (2e9 - age, 2e9 - age))
        age -= 1
    return paths


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def cut_in_header(path):
    path.write_bytes(path.read_bytes()[:500])


def fill_with_noise(path):
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def empty(path):
    path.write_bytes(b"")


def export_over(path):
    path.unlink()
    train_gpt.export_model(path, GPT(SMALL))


def name_as_temporary(path):
    path.rename(path.with_name(path.name + ".123.tmp"))


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def replace_by_dangling_link(path):
    path.unlink()
    path.symlink_to(path.with_name("gone"))


DAMAGES = (truncate, cut_in_header, fill_with_noise, empty, export_over, name_as_temporary, replace_by_folder,
           replace_by_dangling_link)  # fmt: skip


def found_by_auto(logs, *flags):
    return train_gpt.parse_config(["--resume=auto", f"--log_folder={logs}", *flags]).resume


@pytest.mark.parametrize("damage", DAMAGES)
def test_auto_takes_the_checkpoint_before_one_that_is_incomplete_or_an_export(tiny, tmp_path, damage):
    older, first, last = *write_run(tmp_path, "older", [2]), *write_run(tmp_path, "newer", [2, 4])
    assert found_by_auto(tmp_path) == str(last)
    damage(last)
    assert found_by_auto(tmp_path) == str(first)
    damage(first)
    assert found_by_auto(tmp_path) == str(older)
    damage(older)
    assert found_by_auto(tmp_path) == ""


OTHERS = {
    "finished": {"steps": [4, SMALL.total_steps]}, "other seed": {"seed": 1}, "other width": {"width": 64},
    "other layers": {"layers": SMALL.layers[:2]}, "other schedule": {"scheduled_steps": 9},
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_auto_ignores_a_newer_run_that_is(tiny, tmp_path, other):
    (path,) = write_run(tmp_path, "this", [3])
    write_run(tmp_path, "another", **{"steps": [4], **OTHERS[other]})
    assert found_by_auto(tmp_path) == str(path)


def test_auto_takes_the_newest_of_the_runs_that_were_stopped(tiny, tmp_path):
    first, second = *write_run(tmp_path, "b", [5]), *write_run(tmp_path, "a", [3])
    assert found_by_auto(tmp_path) == str(second)
    os.utime(first, (3e9, 3e9))
    assert found_by_auto(tmp_path) == str(first)


@pytest.mark.parametrize("flags", [("--val_every=2",), ("--seed=1",), ("--width=64",), ("--data=elsewhere",)])
def test_auto_starts_afresh_where_nothing_fits(tiny, tmp_path, flags):
    write_run(tmp_path / "logs", "run", [3])
    assert found_by_auto(tmp_path / "logs", *flags) == found_by_auto(tmp_path / "none", *flags) == ""


def test_auto_goes_on_whatever_flags_say_that_change_no_result(tiny, tmp_path):
    (path,) = write_run(tmp_path, "run", [3], save_every=5, sample="a")
    flags = "--save_every=2", "--sample=b", "--sample_tokens=3", "--watchdog=0", "--keep=1"
    assert found_by_auto(tmp_path, *flags) == str(path)


class Runs:
    """Runs of SMALL in this process, each with a folder for logs of its own unless told otherwise."""

    def __init__(self, monkeypatch, root):
        self.monkeypatch, self.root, self.count, self.step = monkeypatch, root, 0, train_gpt.train_step
        monkeypatch.setattr(train_gpt, "finish", lambda *args: None)

    def __call__(self, *flags, logs=None, at_step=lambda step: None):
        self.count += 1
        logs, losses = logs or self.root / str(self.count), []

        def step(model, optimizer, batches, plan, rotary, step, guard=None):
            at_step(step + 1)
            return self.step(model, optimizer, batches, plan, rotary, step, guard)

        self.monkeypatch.setattr(train_gpt, "train_step", keep_results(step, losses))
        before = set(logs.glob("*"))
        train_gpt.run([f"--data={self.root / 'data'}", f"--log_folder={logs}", *flags])
        (folder,) = set(logs.glob("*")) - before
        return types.SimpleNamespace(losses=losses, folder=folder, log=(folder / "log.txt").read_text(),
                                     saved=sorted(folder.glob("checkpoint_*")))  # fmt: skip


@pytest.fixture
def runs(tiny, monkeypatch, tmp_path):
    write_shards(tmp_path / "data")
    return Runs(monkeypatch, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_run_stopped_by_a_signal_is_continued_to_the_same_bits(runs, tmp_path, stop, number):
    def kill(step):
        if step == stop:
            os.kill(os.getpid(), number)

    whole, logs, handlers = runs(), tmp_path / "logs", [signal.getsignal(n) for n in (signal.SIGTERM, number)]
    begun = runs("--resume=auto", logs=logs, at_step=kill)
    assert [path.name for path in begun.saved] == [f"checkpoint_{stop:06d}.safetensors"]
    assert f"stopped after step {stop}: " in begun.log and "resumed: " not in begun.log
    assert [signal.getsignal(n) for n in (signal.SIGTERM, number)] == handlers
    ended = runs("--resume=auto", logs=logs)
    assert f"resumed: {begun.saved[0]} at step {stop}" in ended.log
    assert begun.losses + ended.losses == whole.losses
    assert_same_checkpoint(ended.saved[-1], whole.saved[-1])
    assert found_by_auto(logs, f"--data={tmp_path / 'data'}") == ""


def test_auto_does_not_go_back_to_a_run_that_another_went_on_from(runs, tmp_path):
    logs = tmp_path / "logs"
    runs("--stop_after=3", logs=logs)
    (path,) = runs("--resume=auto", "--stop_after=5", logs=logs).saved
    assert found_by_auto(logs, f"--data={tmp_path / 'data'}") == str(path)
    runs("--resume=auto", logs=logs)
    assert found_by_auto(logs, f"--data={tmp_path / 'data'}") == ""


@pytest.mark.parametrize("flags, steps", [([], [5, 6]), (["--keep=0"], [1, 2, 3, 4, 5, 6]),
                                          (["--keep=1"], [6]), (["--keep=4"], [3, 4, 5, 6])])  # fmt: skip
def test_so_many_checkpoints_stay_the_last_ones(runs, flags, steps):
    saved = runs("--save_every=1", *flags).saved
    assert [path.name for path in saved] == [f"checkpoint_{step:06d}.safetensors" for step in steps]


# ---------------------------------------------- gradients that aren't finite

ROWS = [row.name for row in train_gpt.optimizer_table(EQUAL)]
BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


class Steps:
    """An optimizer of EQUAL with gradients drawn at random, step by step."""

    def __init__(self, deterministic=False, **changes):
        cfg, world = replace(EQUAL, **changes), train_gpt.World()
        self.model, self.count = randomise(GPT(cfg)), 0
        table = train_gpt.optimizer_table(cfg)
        self.optimizer = train_gpt.Optimizer(self.model, table, world, deterministic=deterministic)
        self.random = torch.Generator().manual_seed(0)

    def state(self):
        """Weights and moments."""
        moments = {f"{s.row.name}.{name}": moment.clone() for s in self.optimizer.states
                   for name, moment in s.buffers.items()}  # fmt: skip
        return weights_of(self.model) | moments

    def __call__(self, share=(1.0, 0.0), spoil=None, value=0.0):
        """One step, with `value` somewhere in the gradient of `spoil`; its report."""
        for name, p in self.model.named_parameters():
            grad = train_gpt.gradient(p)
            grad += torch.randn(p.shape, generator=self.random)
            if name == spoil:
                grad.view(-1)[self.count * 7919 % grad.numel()] = value
        self.count += 1
        return self.optimizer.step(self.count - 1, 1.0, 0.9, torch.tensor(share))


@pytest.mark.parametrize("deterministic", [False, True])
def test_finite_step_changes_every_weight_and_moment(deterministic):
    steps = Steps(deterministic, adam_every=1)
    before = steps.state()
    report = steps()
    assert report.tolist() == [1.0, 0.0, *[0.0] * len(ROWS)]
    assert [name for name, x in steps.state().items() if torch.equal(x, before[name])] == []


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", ROWS)
def test_bad_number_in_a_gradient_stops_all_changes_for_good_and_is_reported(name, value, deterministic):
    steps = Steps(deterministic, adam_every=1)
    steps()
    before = steps.state()
    report = steps(spoil=name, value=value)
    assert report.tolist() == [1.0, 0.0, *(float(row == name) for row in ROWS)]
    assert_equal(steps.state(), before)
    for _ in range(2):  # finite ones
        assert not steps()[2:].any()
        assert_equal(steps.state(), before)


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("at", [0, 1])
def test_bad_number_in_what_else_is_shared_stops_all_changes_for_good(value, at):
    steps, share = Steps(adam_every=1), [1.0, 0.0]
    steps()
    before, share[at] = steps.state(), value
    report = steps(share)
    assert not report[at].isfinite() and not report[2:].any()
    assert_equal(steps.state(), before)
    assert steps().isfinite().all()
    assert_equal(steps.state(), before)


def test_bad_number_that_waits_stops_all_changes_when_it_is_due():
    steps = Steps(adam_every=2)
    start = steps.state()
    steps(spoil="embed", value=float("nan"))
    before = steps.state()
    assert torch.equal(before["embed"], start["embed"])
    assert not torch.equal(before["attn_bank"], start["attn_bank"])
    assert steps()[2 + ROWS.index("embed")] == 1
    assert_equal(steps.state(), before)


@pytest.mark.parametrize("size", [3, 8, 16])
def test_state_of_every_row_is_shared_among_any_number_of_ranks(size):
    """At 16 ranks most have no part of a bank's 6 or 8 matrices."""
    model, table = GPT(EQUAL), train_gpt.optimizer_table(EQUAL)
    optimizers = [train_gpt.Optimizer(model, table, train_gpt.World(rank, size)) for rank in range(size)]
    for parts in zip(*(optimizer.states for optimizer in optimizers)):
        row, units = parts[0].row, parts[0].units
        lengths = [len(buffer) for part in parts for buffer in part.buffers.values()]
        if row.comms == "replicated":
            assert lengths == [units] * 2 * size
            continue
        assert np.concatenate([np.arange(part.lo, part.hi) for part in parts]).tolist() == list(range(units))
        assert lengths == [part.hi - part.lo for part in parts for _ in range(2)]
        padded = optimizers[0].padded(optimizers[0].as_units(parts[0], parts[0].parameter.data))
        assert len(padded) == size * parts[0].share and padded[units:].eq(0).all()
        if row.algorithm == "normuon":
            assert [part.hi - part.lo for part in parts] == [len(part.lr) for part in parts]
            assert size < 16 or [part.hi - part.lo for part in parts] == [1] * units + [0] * (16 - units)


# ------------------------------------------------------- whatever is read


def mutated(rng, data, within):
    """The bytes with some of the first `within` changed, or an end cut off or added."""
    data = bytearray(data)
    for at in rng.integers(0, min(within, len(data)), rng.integers(1, 4)):
        data[at] = rng.choice([0, 1, 255, data[at] ^ (1 << int(rng.integers(8))), int(rng.integers(256))])
    kind = rng.integers(6)
    return bytes(data[: rng.integers(len(data))] if kind == 0 else data + rng.bytes(3) if kind == 1 else data)


def random_shard(rng, good):
    kind = rng.integers(4)
    if kind == 0:
        return rng.bytes(rng.integers(0, 1100))
    if kind == 1:  # a good beginning, so that what follows is looked at
        count = int(rng.choice([rng.integers(-3, 12), rng.integers(-(2**31), 2**31)]))
        header = np.array([20240520, rng.choice([1, 1, 1, 2]), count], "<i4").tobytes()
        letters = [0, 1, BOS, BOS, rng.choice([BOS - 1, BOS + 1])]
        tokens = rng.choice(letters, rng.integers(0, 12)).astype("<u2")
        return header.ljust(1024, b"\0") + tokens.tobytes()
    return mutated(rng, good, 12 if kind == 2 else 1024)


def is_shard(data, vocab_size):
    """What the format says, in other words than the script's."""
    magic, version, count = np.frombuffer(data[:12].ljust(12, b"\0"), "<i4").tolist()
    tokens = np.frombuffer(data[1024 : len(data) & ~1], "<u2")
    fits = len(data) >= 1024 and len(data) == 1024 + 2 * count
    return (magic, version) == (20240520, 1) and fits and BOS in tokens and bool((tokens < vocab_size).all())


def test_ten_thousand_damaged_shards_are_refused_in_a_line_or_are_good(tmp_path):
    rng, path, opened = np.random.default_rng(0), tmp_path / "x_train_000.bin", 0
    (good,) = write_split(tmp_path / "good", "train", [np.array([BOS, 1, 2, BOS, 3])])
    good = good.read_bytes()
    for _ in range(10_000):
        data = random_shard(rng, good)
        path.write_bytes(data)
        try:
            tokens, starts = train_gpt.Shards([path], SMALL)[0]
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error) and not is_shard(data, SMALL.vocab_size)
        else:
            opened += 1
            assert is_shard(data, SMALL.vocab_size) and tokens[:].tobytes() == data[1024:]
            assert starts.tolist() == np.flatnonzero(tokens[:] == BOS).tolist()
    assert 500 < opened < 9500


ODD = [None, True, -1, 0, 10**400, 1e30, float("nan"), "", "a", "\n", "\ud800", [], [[]], {}, {"start": 1}]


def leaves(tree, path=()):
    """Where the values of nested lists and dicts are."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path] * bool(path) + [leaf for key, value in items for leaf in leaves(value, (*path, key))]


def with_odd_value(rng, tree):
    """A copy of the metadata with something unexpected, or nothing, in one place."""
    tree = json.loads(json.dumps(tree))
    paths = leaves(tree)
    *path, last = paths[rng.integers(len(paths))]
    branch = tree
    for key in path:
        branch = branch[key]
    if rng.integers(8):
        branch[last] = ODD[rng.integers(len(ODD))]
    else:
        del branch[last]
    return {name: json.dumps(value) for name, value in tree.items()}


def assert_read_or_refused(path):
    """Whether the file passes as a checkpoint."""
    try:
        meta = train_gpt.read_safetensors(str(path))[1]
        assert "step" not in meta or min(meta["step"], *meta["position"], meta["train_seconds"]) >= 0
        for flag in ("resume", "checkpoint"):
            cfg = train_gpt.parse_config([f"--{flag}={path}", "--sample=a"])
            assert isinstance(cfg.width, int) and all(cfg.stages) and cfg.seed >= 0
    except UserError as error:
        assert "\n" not in str(error)
        return False
    return True


def test_damaged_checkpoints_are_refused_in_a_line_or_read(tmp_path):
    (good,), path, rng = write_run(tmp_path, "run", [2]), tmp_path / "damaged", np.random.default_rng(0)
    data, passed = good.read_bytes(), 0
    header = 8 + int.from_bytes(data[:8], "little")
    for i in range(400):
        path.write_bytes(mutated(rng, data, 8 if i % 8 == 0 else header))
        passed += assert_read_or_refused(path)
    assert 0 < passed < 200


def test_checkpoints_with_odd_values_are_refused_in_a_line_or_read(tmp_path):
    (good,), path, rng = write_run(tmp_path, "run", [2]), tmp_path / "odd", np.random.default_rng(0)
    meta, weights, passed = metadata_of(good), {"model.embed": torch.zeros(2)}, 0
    for _ in range(1500):
        save_file(weights, path, with_odd_value(rng, meta))
        passed += assert_read_or_refused(path)
    save_file(weights, path, {"config": "[" * 100_000})
    assert not assert_read_or_refused(path)
    assert 0 < passed < 750


@pytest.mark.parametrize("offset, fits", [(2, True), (4, True), (5, True), (6, False), (10**9, False)])
def test_position_beyond_the_shards_is_refused(tmp_path, offset, fits):
    paths = write_split(tmp_path, "train", [np.array([BOS, 1, 2]), np.array([BOS, 3])])
    begin = partial(train_gpt.DocumentStream, train_gpt.Shards(paths, SMALL), replace(SMALL, epochs=2))
    if fits:
        span = begin(train_gpt.Position(0, offset)).advance(1)
        assert span == ((0, 1) if offset == 5 else (offset, offset + 1))  # or the next epoch's first
    else:
        with pytest.raises(UserError, match="the shards have 5"):
            begin(train_gpt.Position(0, offset))


ABSURD = [
    "", " ", "nan", "inf", "-inf", "-1", "-0", "1e30", "1e-300", "9" * 5000, "0x10", "1_0", "a=b", "=", "==",
    "\n", "a\nb", "\r\n", "é", "٣", "🙂" * 300, "\ud800", "\0", "true", "None", "[]", "--", "/", ".",
]  # fmt: skip



@pytest.mark.parametrize("name", train_gpt.flag_kinds())
def test_absurd_value_of_a_flag_is_refused_in_a_line_or_taken(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "run", train_gpt.parse_config)
    for value in ABSURD:
        for more in ([], ["--resume=auto", "--log_folder=logs"]):
            monkeypatch.setattr(sys, "argv", ["train_gpt.py", f"--{name}={value}", *more])
            monkeypatch.setattr(sys, "stderr", io.StringIO())
            try:
                train_gpt.main()
            except SystemExit as end:
                assert end.code == 2 and len(sys.stderr.getvalue().splitlines()) == 1
    assert os.listdir() == []


LARGE = 99_999_999_999
CHECKED = {  # flag: exit status
    f"--epochs={LARGE}": 0, f"--val_every={LARGE}": 0, f"--save_every={LARGE}": 0, f"--val_chunk={LARGE}": 0,
    f"--loss_chunk={LARGE}": 0, f"--mtp_heads={LARGE}": 0, f"--keep={LARGE}": 0, f"--seed={LARGE}": 0,
    "--cooldown=99": 0, "--temperature=1e-300": 0, "--sample=\n=🙂": 0, "--adam_lr=1e11": 0,
    "--attn_scale=0": 0, "--watchdog=1e-9": 0, "--yarn_window=0": 0, "--width=800000000000": 0,
    "--dataset=..": 0, f"--scheduled_steps={LARGE}": 2, f"--extension_steps={LARGE}": 2,
    f"--micro_batches={LARGE}": 2, f"--val_tokens={LARGE}": 2, f"--heads={LARGE}": 2,
    f"--vocab_size={LARGE}": 2, "--vocab_size=1": 2, "--data=/": 2, "--data=.": 2, "--tokenizer=/": 2,
    "--resume=/": 2, "--checkpoint=.": 2, "--export=/": 2,
}  # fmt: skip


@pytest.mark.parametrize("flag", CHECKED)
def test_check_of_an_absurd_flag_ends_in_a_line(tmp_path, monkeypatch, capsys, flag):
    write_shards(tmp_path / "data")
    monkeypatch.setitem(train_gpt.TRACKS, "tiny", replace(SMALL, vocab_size=0))
    argv = [f"--data={tmp_path / 'data'}", "--scheduled_steps=15", "--epochs=2", "--check", flag]
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *argv])
    code = 0
    try:
        train_gpt.main()
    except SystemExit as end:
        code = end.code
    out, error = capsys.readouterr()
    assert code == CHECKED[flag], error
    assert (out + error).count("\n") == 1 and "Traceback" not in error


# -------------------------------------------------------------- several nodes


def start_node(rank, port, argv):
    """One of two torchrun agents, each with one process."""
    meeting = "--nnodes=2", f"--node_rank={rank}", "--master_addr=127.0.0.1", f"--master_port={port}"
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, "--nproc_per_node=1", SCRIPT, *argv]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes)


NARROW = ("--width=32", "--heads=2", "--scheduled_steps=4", "--micro_batches=4", "--mtp_heads=1",
          "--adam_every=3", "--device=cpu", "--deterministic", "--sample_tokens=1")  # fmt: skip


def test_two_nodes_train_as_one_process_does(tmp_path):
    write_shards(tmp_path / "data")
    argv, port = [*NARROW, f"--data={tmp_path / 'data'}", "--epochs=9"], free_port()
    nodes = [start_node(rank, port, [*argv, f"--log_folder={tmp_path / 'two'}"]) for rank in range(2)]
    try:
        train_gpt.run([*argv, f"--log_folder={tmp_path / 'one'}"])
        for node in nodes:
            assert node.wait(300) == 0, node.stderr.read()
    finally:
        for node in nodes:
            node.kill()
    assert_same_checkpoint(checkpoint_of(tmp_path / "two", 4), checkpoint_of(tmp_path / "one", 4))
    assert metrics_of(tmp_path / "two") == metrics_of(tmp_path / "one")
    assert "world_size:2" in next((tmp_path / "two").glob("*/log.txt")).read_text()
