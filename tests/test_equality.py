"""Tests that runs are equal: on 1, 2 and 4 ranks, stopped and resumed, alone and after others."""

import json
import os
import signal
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from small import (
    BOS, SMALL, checkpoint_of, checkpoints, random_tokens, train_gpt, write_split, write_tables,
)  # fmt: skip
from train_gpt import (
    GPT, Optimizer, Progress, Stage, Validation, World, optimizer_table, read_checkpoint,
)  # fmt: skip
from training import (
    STEP_SAVERS, Runs, assert_equal, assert_same_checkpoint, fork_ranks, metrics_of, randomise,
    relative_errors, run_main, weights_of,
)  # fmt: skip

# 20 steps in four stages, which begin at steps 6, 12 and 18; two shards' ends lie within documents, and
# the second epoch begins on the way. Three chunks of validation: at 4 ranks one gets none. Nothing decays: a
# weight does only if its update agrees, which the last bit of a sum decides for an update next to 0.
STEPS = 20
EQUAL = replace(
    SMALL, stages=(*SMALL.stages, Stage(1.0, 256, 64, 16, 64, 0.5)), scheduled_steps=18, extension_steps=2,
    mtp_heads=1, epochs=2, val_every=5, bigram_ratio=1.5, heads=4, muon_weight_decay=0.0,
)  # fmt: skip
VARIANTS = {  # flags, steps between Adam's updates, while gradients wait; the head is untied at step 10
    "keep": (("--document_rest=keep", "--value_std=0.01", "--backout_from=0",
              "--untie_at=0.55", "--slow_momentum=0.5", "--average=0.4", "--save_every=7"), 3),
    "skip": (("--document_rest=skip", "--save_every=1"), 2),
}  # fmt: skip


def write_shards(folder):
    """Three training shards, of which two end within a document, a validation shard, and tables."""
    rng = np.random.default_rng(0)
    tokens = random_tokens(rng, 6000)
    cuts = [cut + 1 + int(tokens[cut + 1] == BOS) for cut in (2000, 4000)]
    assert not any(tokens[cut] == BOS for cut in cuts)
    write_split(folder, "train", np.split(tokens, cuts))
    write_split(folder, "val", [random_tokens(rng, 260)[:260]])
    write_tables(folder)
    return folder


# ---------------------------------------------------- runs on 1, 2 and 4 ranks


class Job(NamedTuple):
    """A run of a variant of EQUAL on so many ranks."""

    name: str
    size: int
    variant: str
    flags: tuple = ()
    resumed: tuple = ()          # (name of the job, step): from that checkpoint
    killed: tuple = ()           # (rank, step): that rank gets a SIGTERM in that step


def keep_results(function, results):
    """The function, with the loss that it returns kept, all its bits."""

    def called(*args):
        result = function(*args)
        results.append(result["val_loss"] if "val_loss" in result else result["train_loss"].item())
        return result

    return called


def train_as_rank(rank, folder, job, root):
    """Body of a process: the command line; weights and losses go to a file."""
    flags, train_gpt.ADAM_EVERY = VARIANTS[job.variant]
    train_gpt.TRACKS["tiny"], train_gpt.KEEP_CHECKPOINTS = EQUAL, 99
    GPT.initialise = lambda model, weights: randomise(model)
    losses, validations, step, train = [], [], train_gpt.train_step, train_gpt.train

    def step_or_die(*args):
        if (rank, args[5] + 1) == job.killed:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    def train_and_save(cfg, run, *args):
        stopped = train(cfg, run, *args)
        numbers = {"train": torch.tensor(losses), "val": torch.tensor(validations, dtype=torch.float64)}
        save_file(weights_of(run.model) | numbers, folder / f"rank{rank}")
        return stopped

    train_gpt.train_step, train_gpt.train = keep_results(step_or_die, losses), train_and_save
    Validation.run = keep_results(Validation.run, validations)
    if job.resumed:
        name, cut = job.resumed
        flags = *flags, f"--resume={checkpoint_of(root / name, cut)}"
    # a job that goes on where another was killed looks for it
    logs = folder if "--resume=auto" not in job.flags else root / "killed"
    run_main(f"--data={root / 'data'}", f"--log_folder={logs}", *flags, *job.flags)


def whole(variant, size):
    return Job(f"{variant}-{size}", size, variant)


# Of the variant "keep" Adam's gradients wait at 7 and 14; checkpoints are written in these steps.
JOBS = [
    *(whole("keep", size) for size in (1, 2, 4)), whole("skip", 1),
    Job("skip-4", 4, "skip", ("--micro_batches=2",)),  # raised to 4, as there are 4 ranks
    *(Job(f"keep-{a}-to-{b}", b, "keep", resumed=(f"keep-{a}", cut))
      for a, b, cut in ((4, 4, 14), (4, 1, 7), (2, 4, 14))),
    Job("killed", 2, "keep", killed=(1, 13)),  # which the ranks agree on in step 14
    Job("found", 2, "keep", ("--resume=auto",)),
]  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder that holds one for each of JOBS."""
    root = tmp_path_factory.mktemp("ranks")
    write_shards(root / "data")
    for job in JOBS:
        codes, errors = fork_ranks(job.size, root / job.name, train_as_rank, job, root)
        assert codes == [0] * job.size and not any(errors), (job, codes, errors)
    return root


def results_of(folder, rank=0):
    """Final weights, and every train and validation loss."""
    return load_file(folder / f"rank{rank}")


def losses_differ_by(found, expected):
    """The largest difference of the last losses, as many as there are."""
    pairs = [(found[key], expected[key][-len(found[key]) :]) for key in ("train", "val")]
    return max((losses - others).abs().max().item() for losses, others in pairs)


def test_the_runs_that_are_compared_pass_what_might_set_them_apart(ranks):
    folder = ranks / "skip-1"
    saved = [checkpoint_of(folder, step) for step in range(1, STEPS + 1)]
    waiting = ["optimizer.embed.grad" in load_file(path) for path in saved]
    assert waiting == [step % 2 > 0 for step in range(1, STEPS + 1)]
    shards = train_gpt.Shards(sorted((ranks / "data").glob("*_train_*")), SMALL)
    edges = np.cumsum([0, *(len(tokens) for tokens, _ in shards)])
    positions = [read_checkpoint(str(path))[1]["progress"].position for path in saved]
    passed = {(epoch, int(np.searchsorted(edges, offset, "right")) - 1) for epoch, offset in positions}
    assert passed >= {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)}
    for variant in VARIANTS:
        results = results_of(ranks / f"{variant}-1")
        assert len(results["train"]) == STEPS and len(results["val"]) == 5
        assert results["train"][0] > 10 and results["train"][-1] < 3


@pytest.mark.parametrize("variant, size", [("keep", 2), ("keep", 4), ("skip", 4)])
def test_runs_agree_on_1_2_and_4_ranks(ranks, variant, size):
    expected, found = (ranks / f"{variant}-{n}" for n in (1, size))
    assert losses_differ_by(results_of(found), results_of(expected)) < 1e-4
    for rank in range(1, size):
        assert_equal(results_of(found, rank), results_of(found))
    assert f"world_size:{size}" in next(found.glob("*/log.txt")).read_text()


def test_state_after_a_step_is_that_of_one_process(ranks):
    """Gathered from its shares: weights, moments and the gradients of Adam's rows, which wait for step 2."""
    expected, found = (load_file(checkpoint_of(ranks / f"skip-{n}", 1)) for n in (1, 4))
    errors = relative_errors(found, expected)
    assert sum(name.endswith(".grad") for name in errors) > 10
    assert max(errors.values()) < 1e-4, errors  # gradients of single numbers are sums that cancel
    assert max(errors[f"optimizer.{name}_bank.momentum"] for name in ("attn", "mlp")) < 1e-6


def test_more_ranks_than_micro_batches_get_one_each_and_the_configuration_says_so(ranks):
    configs = [read_checkpoint(str(checkpoint_of(ranks / f"skip-{size}", 1)))[1]["config"] for size in (1, 4)]
    assert [cfg.micro_batches for cfg in configs] == [4, 4]


@pytest.mark.parametrize("name", ["keep-4-to-4", "found"])
def test_run_resumed_on_as_many_ranks_ends_as_the_unbroken_one_that_saved_as_often(ranks, name):
    """"found" goes on by --resume=auto where a SIGTERM to one rank stopped "killed"."""
    size = 2 if name == "found" else 4
    for rank in range(size):
        found, expected = (results_of(ranks / folder, rank) for folder in (name, f"keep-{size}"))
        assert len(found["train"]) == STEPS - 14
        for key in ("train", "val"):
            assert torch.equal(found[key], expected[key][-len(found[key]) :])
    logs = ranks / ("killed" if name == "found" else name)
    assert_same_checkpoint(checkpoint_of(logs, STEPS), checkpoint_of(ranks / f"keep-{size}", STEPS))


def test_a_sigterm_to_one_rank_stops_all_after_the_same_step_and_saves_it(ranks):
    found, expected = ranks / "killed", ranks / "keep-2"
    assert [len(results_of(found, rank)["train"]) for rank in range(2)] == [14, 14]
    assert_same_checkpoint(checkpoint_of(found, 14), checkpoint_of(expected, 14))
    first, second = sorted(found.glob("*/log.txt"))
    assert "stopped after step 14: " in first.read_text()
    assert f"resumed: {first.parent / 'checkpoint_000014.safetensors'} at step 14" in second.read_text()


@pytest.mark.parametrize("name, origin", [("keep-4-to-1", "keep-4"), ("keep-2-to-4", "keep-2")])
def test_run_resumed_on_another_number_of_ranks_agrees_with_the_unbroken_one(ranks, name, origin):
    found, expected = results_of(ranks / name), results_of(ranks / origin)
    assert len(found["train"]) in (STEPS - 7, STEPS - 14)
    assert losses_differ_by(found, expected) < 1e-4


# ----------------------------------------------------- runs of one process


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture
def runs(monkeypatch, data, tmp_path):
    return Runs(monkeypatch, data, tmp_path)


@pytest.mark.parametrize("every, flags", [(2, [*STEP_SAVERS, "--mtp_heads=1", "--seed=7"]),
                                          (3, ["--document_rest=skip"])])  # fmt: skip
def test_resume_at_every_step_is_bit_exact(runs, monkeypatch, every, flags):
    monkeypatch.setattr(train_gpt, "KEEP_CHECKPOINTS", 9)
    monkeypatch.setattr(train_gpt, "ADAM_EVERY", every)
    whole = runs("--save_every=1", *flags)
    for step, path in enumerate(whole.saved[:-1], 1):
        assert ("optimizer.embed.grad" in load_file(path)) == (step % every > 0)
        resumed = runs(f"--resume={path}")
        assert resumed.losses == whole.losses[step:]
        assert resumed.validations[-1] == whole.validations[-1]
        assert resumed.model.cfg.seed == whole.model.cfg.seed
        assert_same_checkpoint(resumed.saved[-1], whole.saved[-1])
        times = [metrics_of(run.folder, "train_time") for run in (whole, resumed)]
        assert times[1][-1][1] > dict(times[0])[step]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_run_stopped_by_a_signal_is_continued_to_the_same_bits(runs, tmp_path, number):
    def kill(step):
        if step == 2:
            os.kill(os.getpid(), number)

    whole, logs = runs(), tmp_path / "logs"
    begun = runs("--resume=auto", logs=logs, at_step=kill)
    stopped = len(begun.losses)
    assert stopped in (2, 3)
    assert [path.name for path in begun.saved] == [f"checkpoint_{stopped:06d}.safetensors"]
    assert f"stopped after step {stopped}: " in begun.log and "resumed: " not in begun.log
    ended = runs("--resume=auto", logs=logs)
    assert f"resumed: {begun.saved[0]} at step {stopped}" in ended.log
    assert begun.losses + ended.losses == whole.losses
    assert_same_checkpoint(ended.saved[-1], whole.saved[-1])
    again = runs("--resume=auto", logs=logs)  # that run is over
    assert "resumed: " not in again.log and again.losses == whole.losses


def test_a_signal_ends_a_process_of_several_runs(runs, tmp_path):
    def kill(step):
        os.kill(os.getpid(), signal.SIGTERM)

    begun = runs("--runs=3", at_step=kill)
    assert len(begun.folders) == 1 and "stopped after step" in begun.log


def test_several_runs_in_a_process_are_single_ones_of_their_seeds_bit_by_bit(runs):
    both = runs("--runs=2", "--mtp_heads=1")
    assert len(both.folders) == 2
    for seed, folder in enumerate(both.folders):
        alone = runs(f"--seed={seed}", "--mtp_heads=1")
        assert folder.name.endswith(f"-tiny-seed{seed}")
        assert both.losses[6 * seed : 6 * seed + 6] == alone.losses
        assert both.validations[3 * seed : 3 * seed + 3] == alone.validations
        assert_same_checkpoint(checkpoint_in(folder), alone.saved[-1])
        config = json.loads((folder / "log.txt").read_text().partition("\nconfig ")[2].partition("\n")[0])
        assert config["seed"] == seed
        assert [step for step, _ in metrics_of(folder, "train_loss")] == [1, 2, 3, 4, 5, 6]


def checkpoint_in(folder):
    (path,) = checkpoints(folder)
    return path


def test_losses_depend_on_the_seed_alone(runs):
    first, again, other = (runs(f"--seed={seed}").losses for seed in (3, 3, 4))
    assert first == again
    assert first[:2] == other[:2] and not set(first[2:]) & set(other[2:])  # the head is 0 for two steps


# -------------------------------------------------------------- --resume=auto


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(train_gpt.TRACKS, "tiny", SMALL)


def write_run(logs, name, steps, **changes):
    """A run's folder with checkpoints; returns their paths."""
    cfg, folder = replace(SMALL, **changes), logs / name
    folder.mkdir(parents=True)
    model = GPT(cfg)
    optimizer = Optimizer(model, optimizer_table(cfg), World())
    optimizer.reset()
    for step in steps:
        progress = Progress(step, (0, 0), 1.0)
        assert not train_gpt.save_checkpoint(folder, model, optimizer, World(), progress)
    return checkpoints(folder)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def cut_in_header(path):
    path.write_bytes(path.read_bytes()[:500])


def fill_with_noise(path):
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def empty(path):
    path.write_bytes(b"")


def export_over(path):
    """A file without progress and optimizer state, like an export."""
    cfg = read_checkpoint(str(path))[1]["config"]
    train_gpt.write_checkpoint(path, {"model.head": torch.zeros(2)}, {"config": vars(cfg)})


def name_as_temporary(path):
    path.rename(path.with_name(path.name + ".123.tmp"))


def replace_by_dangling_link(path):
    path.unlink()
    path.symlink_to(path.with_name("gone"))


DAMAGES = (truncate, cut_in_header, fill_with_noise, empty, export_over, name_as_temporary,
           replace_by_dangling_link)  # fmt: skip


def found_by_auto(logs, *flags):
    return train_gpt.parse_config(["--resume=auto", f"--log_folder={logs}", *flags]).resume


@pytest.mark.parametrize("damage", DAMAGES)
def test_auto_skips_what_is_damaged_or_no_checkpoint(tiny, tmp_path, damage):
    older, first, last = *write_run(tmp_path, "1", [2]), *write_run(tmp_path, "2", [2, 4])
    for path, before in ((last, first), (first, older), (older, "")):
        assert found_by_auto(tmp_path) == str(path)
        damage(path)
        assert found_by_auto(tmp_path) == str(before)


OTHERS = {
    "other seed": {"seed": 1}, "other width": {"width": 64}, "other layers": {"layers": SMALL.layers[:2]},
    "other schedule": {"scheduled_steps": 9}, "other data": {"data": "elsewhere"},
    "other validation": {"val_every": 2},
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_auto_ignores_a_newer_run_that_has(tiny, tmp_path, other):
    (path,) = write_run(tmp_path, "1", [3])
    write_run(tmp_path, "2", [4], **OTHERS[other])
    assert found_by_auto(tmp_path) == str(path)


def test_auto_takes_the_newest_run_and_starts_anew_if_that_is_over(tiny, tmp_path):
    """So it does not go back to a run that another went on from."""
    assert found_by_auto(tmp_path / "none") == ""
    write_run(tmp_path, "20260101-000000-tiny-seed0", [5])
    (path,) = write_run(tmp_path, "20260102-000000-tiny-seed0", [3])
    assert found_by_auto(tmp_path) == str(path)
    write_run(tmp_path, "20260102-000000-tiny-seed0-1", [4, SMALL.total_steps])
    assert found_by_auto(tmp_path) == ""


def test_auto_goes_on_whatever_flags_say_that_change_no_result(tiny, tmp_path):
    (path,) = write_run(tmp_path, "run", [3], save_every=5, compile=False)
    assert found_by_auto(tmp_path, "--save_every=2", "--kernels=off", "--graphs=off") == str(path)


def test_auto_goes_on_with_the_micro_batches_that_the_ranks_needed(tiny, tmp_path):
    """The same command finds its run, though its flag isn't what the configuration says."""
    (path,) = write_run(tmp_path, "run", [3])
    flags = ["--resume=auto", f"--log_folder={tmp_path}", "--micro_batches=2"]
    cfg = train_gpt.parse_config(flags, ranks=4)
    assert (cfg.resume, cfg.micro_batches) == (str(path), 4)
    assert train_gpt.parse_config(flags, ranks=2).resume == ""
