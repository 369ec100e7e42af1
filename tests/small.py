"""A model, a schedule and a corpus small enough to train many times in a test."""

import itertools
import multiprocessing
import multiprocessing.connection
import os
import re
import socket
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import train_gpt
from train_gpt import Layer, Stage

SCRIPT = Path(train_gpt.__file__)
BOS = 256
LAYERS = (
    Layer("short", value_embeds=(0,)),
    Layer("long", value_embeds=(1,), key_offset=True),
    Layer("none", skip_from=0),
)
STAGES = (  # 64, 128, 128 tokens in each of 4 micro-batches
    Stage(0 / 3, 256, 32, 8, 16, 1.0, ((1, 1), (0.5, 0.5), (0.25, 0))),
    Stage(1 / 3, 512, 48, 16, 32, 1.5, ((1, 1), (0.5, 0)), columns=32),
    Stage(2 / 3, 512, 64, 16, 48, 1.2),
)
SMALL = replace(
    train_gpt.TRACKS["tiny"], layers=LAYERS, stages=STAGES, width=32, heads=2, vocab_size=BOS + 1, epochs=1,
    scheduled_steps=6, micro_batches=4, val_chunk=100, val_every=3, val_windows=(16, 64), backout_from=1,
)  # fmt: skip
CPU = train_gpt.Hardware(
    torch.device("cpu"), torch.float32, compile=False, kernels="reference", attention="reference", fp8=False,
    graphs=False,
)  # fmt: skip


def build_model(cfg, hardware):
    """A GPT with its initial weights."""
    model = train_gpt.new_model(cfg, hardware)
    model.initialise(train_gpt.draw_weights(cfg))
    return model


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return path


def write_split(folder, split, shards):
    """One file for each array of tokens; returns their paths."""
    folder.mkdir(exist_ok=True)
    return [write_shard(folder / f"x_{split}_{i:06}.bin", tokens) for i, tokens in enumerate(shards)]


def random_document(rng, shortest=1, longest=80):
    """BOS and letters, with runs that a model can learn."""
    letters = rng.integers(97, 105, rng.integers(shortest, longest + 1)).repeat(2)[: longest - 1]
    return np.append(BOS, letters[: max(rng.integers(shortest, longest + 1) - 1, 0)])


def random_tokens(rng, count):
    """Whole documents, of `count` tokens or a few more."""
    documents = []
    while sum(map(len, documents)) < count:
        documents.append(random_document(rng))
    return np.concatenate(documents)


def write_tables(folder):
    """token_bytes.npy of bytes."""
    np.save(folder / "token_bytes.npy", np.append(np.ones(BOS, np.int32), 0))


def write_corpus(folder, train_tokens=8_000, val_tokens=300, seed=0):
    """Two training shards cut within a document, a validation shard, and tables of the tokens."""
    rng = np.random.default_rng(seed)
    train = random_tokens(rng, train_tokens)
    middle = len(train) // 2 + int(train[len(train) // 2] == BOS)
    write_split(folder, "train", [train[:middle], train[middle:]])
    write_split(folder, "val", [random_tokens(rng, val_tokens)])
    write_tables(folder)
    return folder


PORTS = itertools.cycle(range(20_000, 32_000))
for _ in range(os.getpid() * 997 % 12_000):  # processes begin at different ones
    next(PORTS)


def free_port():
    """Of this machine, where processes can meet; below those that any connection might be given meanwhile."""
    while True:
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port := next(PORTS)))
                return port
            except OSError:
                continue


def running(processes):
    """Whether some haven't ended yet and none has failed."""
    codes = {process.exitcode for process in processes}
    return None in codes and codes <= {None, 0}


def run_ranks(target, *args, seconds, method="spawn", preload=()):
    """target(rank, *args) in each of four processes, which must end well within the time.

    One that fails ends the others, which might wait for it.
    """
    context = multiprocessing.get_context(method)
    if preload:
        context.set_forkserver_preload(list(preload))
    processes = [context.Process(target=target, args=(rank, *args), daemon=True) for rank in range(4)]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    while time.monotonic() < end and running(processes):
        multiprocessing.connection.wait([p.sentinel for p in processes if p.exitcode is None], 1)
    codes = [p.exitcode for p in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * 4, codes


def assert_refused(result, *words):
    """(exit status, stdout, stderr): status 2 and one line that holds the words."""
    code, _, error = result
    assert code == 2, error
    assert re.fullmatch("train_gpt.py: .+\n", error), error
    assert [word for word in words if word not in error] == [], error


def checkpoint_of(logs, step):
    """The one that the only run in `logs` wrote after `step` steps."""
    (path,) = logs.glob(f"*/checkpoint_{step:06d}.safetensors")
    return path


def checkpoints(folder):
    """Those of one run, by step."""
    return sorted(folder.glob("checkpoint_*.safetensors"))


def final_windows(cfg):
    """Of the validation after training."""
    return train_gpt.plan_step(cfg, cfg.total_steps).windows


def rms_normed(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def layers_without(cfg, *names):
    """The same configuration, of whose layers none has the named columns of the table, as value_embeds."""
    defaults = {name: default for name, default in Layer._field_defaults.items() if name in names}
    return replace(cfg, layers=tuple(layer._replace(**defaults) for layer in cfg.layers))
