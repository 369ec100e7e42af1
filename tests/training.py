"""What the tests of training share: models that hide nothing, runs in this process, ranks in others."""

import contextlib
import json
import multiprocessing
import os
import sys
import time
import types
from pathlib import Path

import torch

from small import CPU, SMALL, checkpoints, free_port, train_gpt
from train_gpt import Validation

TESTS = Path(__file__).resolve().parent
STEP_SAVERS = ["--untie_at=0.5", "--bigram_ratio=2", "--heads=4", "--value_std=0.01",
               "--lr_floor=0.15", "--backout_from=0", "--slow_momentum=0.5", "--average=0.4",
               "--pointer"]  # fmt: skip


def randomise(model, seed=0):
    """Fills every parameter, so that nothing is hidden by the zeros that training starts from."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(found, expected):
    """Two dicts of tensors are equal bit for bit."""
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def relative_errors(found, expected):
    """Of each of two dicts' tensors."""
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in expected.items()}
    errors = {name: (found[name] - x).norm() / x.norm().clamp_min(1e-30) for name, x in expected.items()}
    return {name: error.item() for name, error in errors.items()}


def assert_same_checkpoint(found, expected):
    """Weights, moments, waiting gradients, step and position are equal bit for bit."""
    (tensors, meta), (expected_tensors, expected_meta) = (
        train_gpt.read_checkpoint(str(path), tensors=True) for path in (found, expected))  # fmt: skip
    assert_equal(tensors, expected_tensors)
    assert meta["progress"][:2] == expected_meta["progress"][:2]


def metrics_of(folder, key):
    """(step, value) of every row of a run's metrics.jsonl that has the key."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row[key]) for row in rows if key in row]


class Runs:
    """Runs of SMALL on the CPU of this process, each with a folder for logs of its own unless told otherwise.

    Keeps losses with all their bits, and what the runs had in common.
    """

    def __init__(self, monkeypatch, data, root):
        self.monkeypatch, self.data, self.root, self.count = monkeypatch, data, root, 0
        self.hardware, self.losses, self.validations, self.at_step = CPU, [], [], lambda step: None
        monkeypatch.setitem(train_gpt.TRACKS, "tiny", SMALL)
        monkeypatch.setattr(train_gpt, "choose_hardware", lambda cfg, world: self.hardware)
        monkeypatch.setattr(train_gpt, "write_plot", lambda folder: "not drawn: a test")
        for owner, name in ((train_gpt, "train_step"), (Validation, "run"), (train_gpt, "train")):
            monkeypatch.setattr(owner, name, self.keeping(name, getattr(owner, name)))

    def keeping(self, name, function):
        def called(*args):
            if name == "train":
                self.job = args[1]
            if name == "train_step":
                self.at_step(args[5] + 1)
            result = function(*args)
            if name == "train_step":
                self.losses.append(result["train_loss"].item())
            if name == "run":
                self.validations.append(result)
            return result

        return called

    def __call__(self, *flags, logs=None, at_step=lambda step: None):
        """at_step(step), where `step` counts from 1, is called before each training step."""
        self.count += 1
        self.losses, self.validations, self.at_step = [], [], at_step
        logs = logs or self.root / f"logs{self.count}"
        before = set(logs.glob("*"))
        resumed = any(flag.startswith("--resume=") and flag != "--resume=auto" for flag in flags)
        data = [] if resumed else [f"--data={self.data}"]
        train_gpt.run([*data, f"--log_folder={logs}", *flags])
        folders = sorted(set(logs.glob("*")) - before)
        return types.SimpleNamespace(
            losses=self.losses, validations=self.validations, job=self.job, model=self.job.model,
            folders=folders, folder=folders[-1], log=(folders[-1] / "log.txt").read_text(),
            saved=checkpoints(folders[-1]),
        )  # fmt: skip


# -------------------------------------------------------------- ranks in processes of their own


@contextlib.contextmanager
def importable(*folders):
    """By the processes that begin meanwhile."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, [*folders, *([before] if before else [])]))
    yield
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


def serve_as_rank(rank, size, port, folder, body, args):
    """A process of fork_ranks: what it prints is in files."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))  # fmt: skip
    torch.set_num_threads(1)
    train_gpt.choose_hardware = lambda cfg, world: CPU
    train_gpt.write_plot = lambda folder: "not drawn: a test"
    body(rank, folder, *args)


def fork_ranks(size, folder, body, *args, seconds=300):
    """body(rank, folder, *args) in each of `size` processes: their exit codes and what they wrote to stderr.

    They are forks of one process that has imported all that is slow to import.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training", "torch._dynamo", "safetensors.torch"])
    folder.mkdir(exist_ok=True)
    rest = size, free_port(), folder, body, args
    arguments = [(rank, *rest) for rank in range(size)]
    processes = [context.Process(target=serve_as_rank, args=own, daemon=True) for own in arguments]
    with importable(TESTS, TESTS.parent):
        for process in processes:
            process.start()
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes, [(folder / f"err{rank}").read_text() for rank in range(size)]


def run_main(*flags):
    """What the command line does."""
    sys.argv = ["train_gpt.py", *map(str, flags)]
    train_gpt.main()
