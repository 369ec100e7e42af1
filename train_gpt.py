"""Train a GPT to a target validation loss in the least wall time, from one file.

    python train_gpt.py                                                    # tiny track: any CPU, minutes
    torchrun --standalone --nproc_per_node=1 train_gpt.py --track=race300  # 300 steps of short
    torchrun --standalone --nproc_per_node=8 train_gpt.py --track=short    # 3.28 on FineWeb
    python train_gpt.py --help                                             # every flag and what it does

evaluate.py evaluates a checkpoint, samples from it and exports it.

Shape suffixes: x_TD is (T, D).   T tokens of one packed micro-batch   D model width   H heads   E head width
    F hidden width of the MLP   V padded vocabulary   L layers   A layers with attention   K targets per token
    N matrices of a bank   R, C rows and columns of one matrix   P rotary positions   J = E/2   G gate inputs
    S columns of the logits that a training loss is taken over   B tokens of a block of the pointer head
"record 62" is record 62 of github.com/KellerJordan/modded-nanogpt, table "World record history".
"""

import argparse
import bisect
import dataclasses
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

STARTED = time.time()  # before torch is imported: that is part of the launch
# ruff: noqa: E402
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, lru_cache, partial, wraps
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # torch's CPU builds come without it
    triton = None

class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""

def require(condition, message: str):
    """Raise UserError unless the condition holds."""
    if not condition:
        raise UserError(message)

# ---- Config ---------------------------------------------------------------------------------------------

class Layer(NamedTuple):
    """One row of the per-layer table: the only place where a layer is singled out by its position."""
    window: str                  # "short", "long", or "none": a layer without attention
    value_embeds: tuple = ()     # value-embedding tables, 0, 1, .., whose rows are added to v
    key_offset: bool = False     # k[t] takes its stationary dims from k[t-1]: induction within one layer
    skip_from: int = -1          # earlier layer whose output is added before this layer; -1: none
    inject: bool = True          # x0 and bigrams are added before it

class Stage(NamedTuple):
    """One row of the stage table: in force from `start` until the next row's start, all columns together."""
    start: float                 # fraction of scheduled_steps
    batch_tokens: int            # tokens of one optimizer step, over all ranks
    max_doc: int                 # tokens; longer documents are cut
    window_short: int            # tokens a query looks back
    window_long: int
    lr: float                    # multiplier on every learning rate
    targets: tuple = ((1, 1),)   # loss weights of targets t+1, t+2, ..: each (at the stage's start, end)
    columns: int = 0             # tokens that the training loss chooses among; 0, or too few for a batch: all

@dataclass(frozen=True)
class Config:
    """Each field but the tuples is a command-line flag; the comment behind it is what --help says."""

    # run
    track: str = "tiny"                # decides the other defaults
    seed: int = 0                      # of the initial weights
    runs: int = 1                      # train this often, with seeds seed, seed + 1, .. after one compilation
    resume: str = ""                   # checkpoint to continue, or auto: the last of an unfinished equal run
    save_every: int = 0                # steps between checkpoints; 0: only at the end; -1: never
    log_folder: str = ""               # folder of the logs; by default logs/ beside this file
    # hardware: each is used where there is one
    compile: bool = True               # torch.compile on a GPU
    kernels: bool = True               # Triton kernels
    fa3: bool = True                   # FlashAttention 3, if flash_attn_interface is installed; else 2
    graphs: bool = True                # CUDA graphs of the micro-batches
    fp8: bool = True                   # products of the head and of the MLPs in float8
    # data
    data: str = "data/sample"          # folder with NAME_train_000000.bin, NAME_val_000000.bin, ..
    vocab_size: int = 0                # tokens; 0: as many as token_bytes.npy beside the data has, or 50257
    document_rest: str = "skip"        # what follows the cut of a long document
    epochs: int = 1                    # passes over the training data that the schedule may use
    micro_batches: int = 8             # micro-batches of a step over all ranks; more need less memory
    val_tokens: int = 0                # validation tokens; 0: all
    val_chunk: int = 131_072           # tokens of one validation forward pass
    val_every: int = 100               # steps between validations
    # schedule
    scheduled_steps: int = 100         # steps of the stage table and the cooldown
    extension_steps: int = 0           # steps after these, at the final learning rate and the last windows
    cooldown: float = 0.55             # last fraction of scheduled_steps: the learning rate falls linearly
    lr_floor: float = 0.1              # what the stages' lr falls to
    momentum_warmup: int = 300         # steps in which Muon's momentum rises from 0.85 to 0.95
    momentum_cooldown: int = 50        # last steps, in which it falls back
    stages: tuple = ()
    val_windows: tuple = (768, 2560)   # tokens that short and long layers look back, at the final validation
    # model
    layers: tuple = ()
    width: int = 768                   # width of the residual stream
    heads: int = 6                     # attention heads
    attn_scale: float = 0.115          # attention's scale: what multiplies normed queries
    value_std: float = 0.0             # standard deviation of value embeddings at the start
    backout_from: int = -1             # layer that later attention reads and the head partly not; -1: none
    smear_mtp: bool = True             # smear-MTP: mix the previous position into the final latents (PR 151)
    leaky_slope: float = 0.5           # MLP activation LeakyReLU(slope) squared; 0 is ReLU squared
    bigram_ratio: float = 0.0          # rows of the hashed bigram table over vocabulary; 0: off (record 62)
    untie_at: float = 0.0              # fraction of scheduled_steps with a tied head (records 51, 53)
    pointer: bool = False              # p(y) mixes in a copy distribution over the document (PR 379)
    mtp_heads: int = 0                 # auxiliary heads for t+2, t+3, ..: trained, not exported
    # optimizer: `parameter_table` has each parameter's own learning rate
    muon_lr: float = 0.023             # learning rate of NorMuon: attention x attn_lr_ratio, MLP x 2 and x 4
    muon_weight_decay: float = 0.0276  # per step lr * this, both times the schedule's multiplier
    slow_momentum: float = 1.0         # fraction of scheduled_steps after which Muon mixes a slow momentum in
    average: float = 0.0               # last fraction of steps whose weights are averaged in the final ones
    attn_lr_ratio: float = 2.0         # learning rate of the attention matrices over muon_lr
    adam_lr: float = 0.008             # learning rate of tables, heads, gates and scalars

    @property
    def padded_vocab(self):
        return -(-self.vocab_size // 128) * 128

    @property
    def bos(self):
        return self.vocab_size - 1

    @property
    def total_steps(self):
        return self.scheduled_steps + self.extension_steps

    @property
    def attention_layers(self):
        return [i for i, layer in enumerate(self.layers) if layer.window != "none"]

    @property
    def value_tables(self):
        return len({table for layer in self.layers for table in layer.value_embeds})

    @property
    def skips(self):
        """Layers with a skip connection."""
        return [i for i, layer in enumerate(self.layers) if layer.skip_from >= 0]

    @property
    def bigram_rows(self):
        return round(self.bigram_ratio * self.padded_vocab)

    def micro_tokens(self, stage):
        """Tokens of a micro-batch."""
        return stage.batch_tokens // self.micro_batches

    def reads_late(self, i):
        """Whether attention in layer i reads the output of backout_from (record 77)."""
        return 0 <= self.backout_from < i and i in self.attention_layers

SHORT_LAYERS = (
    Layer("short", value_embeds=(0,)),                                    # 0
    Layer("short", value_embeds=(1,)),                                    # 1
    Layer("short", value_embeds=(2,), inject=False),                      # 2
    Layer("long", key_offset=True, inject=False),                         # 3
    Layer("none"),                                                        # 4
    Layer("short"),                                                       # 5
    Layer("none", skip_from=3, inject=False),                             # 6
    Layer("short", inject=False),                                         # 7
    Layer("short", value_embeds=(3,), inject=False),                      # 8
    Layer("none"),                                                        # 9
    Layer("long", value_embeds=(4,), key_offset=True, inject=False),      # 10
)

SHORT_STAGES = (
    #     start  batch    max_doc  short  long  lr    weights of the targets t+1, t+2, t+3     columns
    Stage(0 / 3, 131_072, 896,     128,   384,  1.00, ((1, 1), (0.5, 0.5), (0.25, 0)),         10_240),
    Stage(1 / 3, 262_144, 2048,    384,   896,  1.52, ((1, 1), (0.5, 0)),                      10_240),
    Stage(2 / 3, 393_216, 2048,    640,   1408, 1.73, ((1, 1),),                               14_336),
    Stage(0.93,  393_216, 2048,    640,   1408, 1.73),
    Stage(1.0,   393_216, 2048,    768,   1664, 1.00),
)

MEDIUM_LAYERS = (
    Layer("long", value_embeds=(0,), key_offset=True),                    # 0
    Layer("short", value_embeds=(1,)),                                    # 1
    Layer("short", value_embeds=(2,)),                                    # 2
    Layer("short", value_embeds=(3,)),                                    # 3
    Layer("long", value_embeds=(4,), key_offset=True),                    # 4
    Layer("short"),                                                       # 5
    Layer("short"),                                                       # 6
    Layer("short"),                                                       # 7
    Layer("short"),                                                       # 8
    Layer("short", skip_from=6),                                          # 9
    Layer("short", skip_from=4),                                          # 10
    Layer("long", value_embeds=(0,), key_offset=True, skip_from=2),       # 11
    Layer("short", value_embeds=(1,)),                                    # 12
    Layer("short", value_embeds=(2,)),                                    # 13
    Layer("short", value_embeds=(3,)),                                    # 14
    Layer("long", value_embeds=(4,), key_offset=True),                    # 15
)

MEDIUM_STAGES = (
    Stage(0 / 12, 131_072, 4096,  128,  384, 1.00, ((1, 1), (0.5, 0.5), (0.25, 0))),
    Stage(1 / 12, 262_144, 4096,  384,  896, 1.52, ((1, 1), (0.5, 0))),
    Stage(2 / 12, 393_216, 4096,  640, 1408, 1.73),
    *(Stage(i / 12, 524_288, 4096, 384 + 128 * i, 896 + 256 * i, 2.00) for i in range(3, 9)),
)

TINY_LAYERS = (
    Layer("short", value_embeds=(0,)),                                    # 0
    Layer("long", value_embeds=(1,), key_offset=True),                    # 1
    Layer("short"),                                                       # 2
    Layer("none", skip_from=1),                                           # 3
    Layer("long", value_embeds=(1,), key_offset=True),                    # 4
)

TINY_STAGES = (
    Stage(0 / 3, 4_096, 1024,  64, 128, 1.0),
    Stage(1 / 3, 4_096, 1024, 128, 256, 1.0),
    Stage(2 / 3, 4_096, 1024, 128, 384, 1.0),
)

SHORT = Config(
    track="short", data="data/fineweb10B", layers=SHORT_LAYERS, stages=SHORT_STAGES,
    scheduled_steps=2070, extension_steps=40, val_tokens=10_485_760, val_every=250, backout_from=7,
    cooldown=0.6, lr_floor=0.3, slow_momentum=0.43, average=0.25, value_std=0.01, bigram_ratio=5.0,
    untie_at=2 / 3, pointer=True,
)

TRACKS = {
    "tiny": Config(
        layers=TINY_LAYERS, stages=TINY_STAGES, width=128, heads=2, scheduled_steps=200, backout_from=2,
        micro_batches=2, document_rest="keep", epochs=4, val_chunk=16_384, val_every=100,
        val_windows=(128, 512), attn_scale=0.15, adam_lr=0.016, attn_lr_ratio=1.0, momentum_warmup=100,
        momentum_cooldown=25,
    ),
    "race300": replace(
        SHORT, track="race300", scheduled_steps=290, extension_steps=10, val_tokens=2_097_152, val_every=100,
    ),
    "short": SHORT,
    "medium": Config(
        track="medium", data="data/fineweb10B", layers=MEDIUM_LAYERS, stages=MEDIUM_STAGES,
        scheduled_steps=4700, extension_steps=40, val_tokens=10_485_760, val_every=250, width=1024, heads=8,
        backout_from=11, cooldown=0.7, val_windows=(1408, 3456), muon_lr=0.015, muon_weight_decay=0.018,
        adam_lr=0.004,
    ),
}

# Constants that no track varies.
MLP_RATIO = 4          # hidden width of the MLP over the model's
CAP_HEIGHT = 11.5      # logits become height * tanh((z + shift) / width) (record 54)
CAP_SHIFT = 5.0
CAP_WIDTH = 15.0
ADAM_DECAY = 0.005     # weight decay of tables (x 5) and heads (x 150), times lr squared (record 50)
EPS = 1e-6             # of the RMS norm
GATE_INPUTS = 12       # leading channels that attention's gates and the smear's read
ROTARY_FRACTION = 0.5  # of the head dimensions that rotate; the rest are stationary
LOSS_CHUNK = 16_384    # tokens whose logits exist at a time
MTP_WEIGHT = 0.1       # of the mean loss of auxiliary heads
EMBED_LR_RATIO = 75.0  # learning rate of embedding tables over adam_lr
COLUMN_STEP = 20_011   # tokens that the window of a stage's columns moves on at each micro-batch: a prime
ADAM_EVERY = 2         # steps between Adam's updates; gradients add up meanwhile
KEEP_CHECKPOINTS = 2   # of a run, the last ones
POINTER_WIDTH = 128    # of the pointer head's queries and keys
POINTER_WINDOW = 2048, 8192  # tokens that the pointer head looks back: in training, in validation
POINTER_BLOCK = 512    # queries that look back together
POINTER_SCORES = 2**27  # that exist at a time

# What a resumed run may change, as well as `data`, the folder's place.
RUN_FLAGS = ("resume", "save_every", "log_folder", "compile", "kernels", "fa3", "graphs", "runs")

CHOICES = {"track": TRACKS, "document_rest": ("skip", "keep")}
LEAST = {  # values of flags; others' is 0
    "runs": 1, "save_every": -1, "epochs": 1, "micro_batches": 1, "val_chunk": 1, "val_every": 1,
    "scheduled_steps": 1, "width": 1, "heads": 1, "backout_from": -1,
}

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help lists the flags")

def on_or_off(text):
    if text not in ("on", "off", "true", "false", "1", "0"):
        raise ValueError(text)
    return text in ("on", "true", "1")

def parse_flags(argv):
    """The flags that are given, by name; --name alone means on. Raises UserError."""
    parser = Parser(usage="train_gpt.py [--flag=value ..]", description=f"{__doc__}\nDefaults are tiny's.",
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    helps = dict(re.findall(r"^    (\w+): \w+ = .*  # (.+)$", Path(__file__).read_text(), re.MULTILINE))
    for field in dataclasses.fields(Config):
        options = {"type": field.type, "choices": CHOICES.get(field.name)}
        if field.type is bool:
            options = {"type": on_or_off, "nargs": "?", "const": True}
        if field.type is not tuple:
            default = getattr(TRACKS["tiny"], field.name)
            parser.add_argument(f"--{field.name}", help=f"{helps[field.name]} [{default}]", **options)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        least = LEAST.get(name, 0)
        require(isinstance(value, str) or least <= value < 1e12,
                f"--{name}={value}: expected a number from {least} to 1e12")
    return given

def parse_config(argv, ranks: int = 1):
    """The track, or a resumed checkpoint's configuration, with the given flags. Raises UserError."""
    given = parse_flags(argv)
    cfg = replace(TRACKS[given.get("track", "tiny")], **given)
    cfg = check_config(replace(cfg, micro_batches=max(cfg.micro_batches, ranks)))
    if cfg.resume == "auto":
        cfg = replace(cfg, resume=find_unfinished(cfg))
    if not cfg.resume:
        return cfg
    require(cfg.runs == 1, "--runs: a resumed run is one; leave --resume out or give --runs=1")
    saved = read_checkpoint(cfg.resume)[1]["config"]
    resumed = replace(with_run_flags(saved, cfg), data=given.get("data", saved.data))
    for name in given:
        require(getattr(resumed, name) == getattr(cfg, name),
                f"--{name}: {cfg.resume} has {getattr(saved, name)}; leave the flag out")
    return resumed

def with_run_flags(saved, cfg):
    """saved, but RUN_FLAGS are those of cfg."""
    return replace(saved, **{name: getattr(cfg, name) for name in RUN_FLAGS})

def check_config(cfg):
    """Fill in the vocabulary's size. Raises UserError where fields don't fit together."""
    if not cfg.vocab_size:
        table = load_token_table(cfg, "token_bytes.npy")
        cfg = replace(cfg, vocab_size=50_257 if table is None else len(table))
    for stage in cfg.stages:
        require(stage.batch_tokens % cfg.micro_batches == 0,
                f"--micro_batches={cfg.micro_batches}: must divide {stage.batch_tokens} tokens of a batch")
        require(stage.columns % 16 == 0, f"stage table: {stage.columns} columns: must be a multiple of 16")
    tables = {table for layer in cfg.layers for table in layer.value_embeds}
    require(tables == set(range(len(tables))), f"layer table: value_embeds {tables} must be 0, 1, ..")
    require(cfg.width % (4 * cfg.heads) == 0, f"--width={cfg.width}: must be a multiple of 4 * heads")
    last = len(cfg.layers) - 1
    require(cfg.backout_from <= last, f"--backout_from={cfg.backout_from}: the last layer is {last}")
    require(not cfg.pointer or cfg.vocab_size < cfg.padded_vocab, "--pointer: no column is unused")
    return cfg

def tuples(value):
    """JSON's lists, of lists, as the tuples that were written."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value

def config_from_json(values: dict):
    """The Config whose vars() were written as JSON. Raises KeyError or TypeError on anything else."""
    values = {name: tuples(value) for name, value in values.items()}
    values["layers"] = tuple(Layer(*row) for row in values["layers"])
    values["stages"] = tuple(Stage(*row) for row in values["stages"])
    return Config(**values)

# ---- Hardware -------------------------------------------------------------------------------------------

class World(NamedTuple):
    """This process among its peers. A world of one takes the same code path without communication."""
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls):
        """This process as torchrun numbers it; alone without torchrun. Raises UserError on half of that."""
        found = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
        if not any(found):
            return cls()
        meant = all(map(str.isdecimal, found)) and int(found[0]) < int(found[1])
        meant &= found[1] == "1" or {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
        require(meant, f"RANK, WORLD_SIZE, LOCAL_RANK are {found}: they count together, with MASTER_ADDR and "
                "MASTER_PORT: start with torchrun, which sets all, or unset them")
        return cls(*map(int, found))

    def meet(self, hardware, minutes: int):
        """Begin the exchange with the others; one that waits longer than this ends."""
        if self.size > 1:
            cuda = hardware.device.type == "cuda"
            dist.init_process_group("nccl" if cuda else "gloo", device_id=hardware.device if cuda else None,
                                    timeout=timedelta(minutes=minutes))

    def all_reduce(self, x):
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather_objects(self, value):
        """Every rank's value, of whatever type."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def leave(self):
        """Wait for the others, then end the exchange with them."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()

class Hardware(NamedTuple):
    """What this process computes with."""
    device: torch.device
    dtype: torch.dtype           # of activations; parameters are always float32
    compile: bool                # regions and the optimizer's updates
    kernels: str                 # "large", "small" or "reference": see "Kernels"
    attention: str               # "fa3", "fa2" (FlashAttention, the latter inside torch) or "reference"
    fp8: bool                    # products of the head and of the MLPs in float8
    graphs: bool                 # training micro-batches as CUDA graphs

    @property
    def name(self):
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

def choose_hardware(cfg, world):
    """The fastest that this machine has and the flags allow. Raises UserError if a rank has no GPU."""
    torch.ones(1, requires_grad=True).backward(torch.ones(1))  # the first imports sympy: no clock runs yet
    if not torch.cuda.is_available():
        return Hardware(torch.device("cpu"), torch.float32, False, "reference", "reference", False, False)
    found = torch.cuda.device_count()
    require(world.local_rank < found, f"process {world.local_rank + 1} has no GPU: start {found} processes")
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)  # where Triton launches
    capability = torch.cuda.get_device_capability(device)
    hopper, modern = capability[0] == 9, capability >= (8, 0)
    kernels = "reference"
    if cfg.kernels and modern and triton:
        kernels = "large" if capability[0] in (9, 10) else "small"
    attention = "fa2" if modern else "reference"
    if cfg.fa3 and hopper and importlib.util.find_spec("flash_attn_interface"):
        attention = "fa3"
        torch.nn.attention.activate_flash_attention_impl("FA3")
        torch.utils.deterministic.fill_uninitialized_memory = False  # see attention_varlen
    fits = math.gcd(16, cfg.width, *map(cfg.micro_tokens, cfg.stages)) == 16
    fp8 = cfg.fp8 and kernels != "reference" and capability >= (8, 9) and fits
    dtype = torch.bfloat16 if modern else torch.float32
    graphs = cfg.graphs and cfg.compile and modern
    return Hardware(device, dtype, cfg.compile, kernels, attention, fp8, graphs)

def region(function=None, **options):
    """Decorator: compile a function of tensors by itself, once `region.compile` is set.

    Regions are the elementwise code between matrix products. Parameters with _T in their name have a dynamic
    first dimension, so no stage and no layer recompiles. options: of torch.compile.
    """
    if function is None:
        return partial(region, **options)
    names = inspect.signature(function).parameters
    compiled = cache(lambda: torch.compile(function, fullgraph=True, **options))

    @wraps(function)
    def call(*arguments):
        if not region.compile or torch.compiler.is_compiling():  # the latter: within another region
            return function(*arguments)
        torch._dynamo.config.recompile_limit = 64  # for all kinds of layers; backward's thread has its own
        for name, x in zip(names, arguments):
            if "_T" in name and x is not None and x.size(0) > 1:  # a single row is compiled for itself
                torch._dynamo.mark_dynamic(x, 0)
        return compiled()(*arguments)

    return call

region.compile = False

# ---- Kernels --------------------------------------------------------------------------------------------
# Each wrapper takes a mode: "reference" is plain torch, anything else the kernel. Only the MLP's has two:
# "large" tiles need the shared memory of datacenter GPUs since Hopper, "small" ones fit any.
# TRITON_INTERPRET=1 in the environment runs them on a CPU, slowly.

if triton:
    jit, constexpr = triton.jit, tl.constexpr
else:
    jit, constexpr = (lambda function: function), None

@jit
def mlp_kernel(a, b, aux, out, square, flipped, scale, M, N, K, SLOPE: constexpr, BACKWARD: constexpr,
               M_TILE: constexpr, N_TILE: constexpr, K_TILE: constexpr, PROGRAMS: constexpr):
    """u = scale a b^T tile by tile, with the activation fused. Matrices are tensor descriptors.

    a: (M, K) and b: (N, K) float8; aux: (M, N) bfloat16; scale: () float32.
    Lines marked "activation" here and below have it. Backward knows r alone, rounded to bfloat16.
    Forward: a is h, b is up; out = r = LeakyReLU(u), bfloat16, square = r^2, float8. aux, flipped: unused.
    Backward: a is the MLP's gradient, b is down, aux is r; out = u * 2 LeakyReLU(r), float8. flipped is out
    transposed and square is r^2 transposed, (N, M) both: products that sum over M read them.
    """
    HALF: constexpr = N_TILE // 2
    n_tiles = tl.cdiv(N, N_TILE)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, M_TILE) * n_tiles, PROGRAMS, flatten=True):
        m, n = tile // n_tiles * M_TILE, tile % n_tiles * N_TILE
        acc = tl.zeros((M_TILE, N_TILE), tl.float32)
        for k in range(tl.cdiv(K, K_TILE)):
            acc = tl.dot(a.load([m, k * K_TILE]), b.load([n, k * K_TILE]).T, acc)
        left, right = acc.reshape(M_TILE, 2, HALF).permute(0, 2, 1).split()  # halves need half the registers
        for half in tl.static_range(2):
            u = (left if half == 0 else right) * tl.load(scale)
            column = n + half * HALF
            if BACKWARD:
                r = aux.load([m, column]).to(tl.float32)
                u = tl.clamp(2 * u * tl.where(r > 0, r, SLOPE * r), -57344.0, 57344.0)  # activation
                eight = u.to(tl.float8e5)
                out.store([m, column], eight)
                flipped.store([column, m], eight.T)
                r = tl.where(u == u, r, u)  # so r has u's layout: in another, loads of r wait for each other
                square.store([column, m], tl.minimum(r * r, 448.0).to(tl.float8e4nv).T)
            else:
                u = tl.where(u > 0, u, SLOPE * u).to(tl.bfloat16)  # activation
                out.store([m, column], u)
                r = u.to(tl.float32)
                square.store([m, column], tl.minimum(r * r, 448.0).to(tl.float8e4nv))

def launch_mlp_kernel(a_MK, b_NK, aux_MN, scale, slope, mode: str):
    """Run mlp_kernel forward or, if aux_MN is given, backward. Returns out, square and flipped (or None)."""
    (M, K), N, backward, device = a_MK.shape, b_NK.size(0), aux_MN is not None, a_MK.device
    out_MN = torch.empty(M, N, dtype=torch.float8_e5m2 if backward else torch.bfloat16, device=device)
    square = torch.empty(*((N, M) if backward else (M, N)), dtype=b_NK.dtype, device=device)
    flipped_NM = torch.empty(N, M, dtype=out_MN.dtype, device=device) if backward else None
    n_tile, k_tile = (256, 128) if mode == "large" else (128, 64)
    programs = torch.cuda.get_device_properties(device).multi_processor_count if a_MK.is_cuda else 4
    tile, turned = [128, n_tile // 2], [n_tile // 2, 128]
    matrices = (
        (a_MK.contiguous(), [128, k_tile]), (b_NK.contiguous(), [n_tile, k_tile]),
        (aux_MN if backward else out_MN, tile), (out_MN, tile), (square, turned if backward else tile),
        (flipped_NM, turned) if backward else (out_MN, tile),
    )
    programs = min(programs, triton.cdiv(M, 128) * triton.cdiv(N, n_tile))
    mlp_kernel[programs,](
        *(TensorDescriptor.from_tensor(x, block) for x, block in matrices), scale, M, N, K, SLOPE=slope,
        BACKWARD=backward, M_TILE=128, N_TILE=n_tile, K_TILE=k_tile, PROGRAMS=programs, num_warps=8,
        num_stages=3,
    )
    return out_MN, square, flipped_NM

def mlp_forward(h_TD, up_FD, scale, slope, mode="reference"):
    """r = LeakyReLU(scale h up^T), bfloat16, and r^2, cut off at 448, float8_e4m3fn: both (T, F).

    h and up: float8_e4m3fn. r alone serves backward at any slope.
    """
    if mode != "reference":
        return launch_mlp_kernel(h_TD, up_FD, None, scale, slope, mode)[:2]
    r_TF = F.leaky_relu(h_TD.float() @ up_FD.float().T * scale, slope).bfloat16()  # activation
    return r_TF, r_TF.float().square().clamp_max(448).to(h_TD.dtype)

def mlp_backward(grad_TD, down_FD, r_TF, scale, slope, mode="reference"):
    """Gradient of the activation's input, scale grad down^T * 2 LeakyReLU(r), (T, F), cut off at its ends.

    grad and the result: float8_e5m2; down: float8_e4m3fn. Further r^2 as forward and the gradient again, both
    transposed, (F, T).
    """
    if mode != "reference":
        return launch_mlp_kernel(grad_TD, down_FD, r_TF, scale, slope, mode)
    u_grad_TF = grad_TD.float() @ down_FD.float().T * scale
    u_grad_TF = u_grad_TF * F.leaky_relu(r_TF.float(), slope) * 2  # activation
    u_grad_TF = float8_region(u_grad_TF, scale.new_ones(()), grad_TD.dtype)
    hidden_TF = r_TF.float().square().clamp_max(448).to(down_FD.dtype)
    return u_grad_TF, hidden_TF.T.contiguous(), u_grad_TF.T.contiguous()

@region
def activation_region(u_TF, slope):
    """The MLP's activation without float8: on a CPU and in validation. Others: "activation" above."""
    return F.leaky_relu(u_TF, slope).square()  # activation

def cap(logits):
    """Soft-capped logits, at least float32."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return CAP_HEIGHT * torch.tanh((z + CAP_SHIFT) / CAP_WIDTH)

@jit
def soft_tanh(x, APPROXIMATE: constexpr):
    """tanh in one instruction, to 2^-11, finer than bfloat16; or exactly, for checks."""
    if APPROXIMATE:
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        y = 1 - 2 / (1 + tl.exp(2 * x))
    return y

@jit
def softmax_kernel(logits, lse, places, pulls, scale, grad, V, K: constexpr, HEIGHT: constexpr,
                   SHIFT: constexpr, WIDTH: constexpr, APPROXIMATE: constexpr, BLOCK: constexpr):
    """One row: log_sum into lse or, if grad is given, logits_gradient into it, in its own dtype."""
    LOG2E: constexpr = 1.4426950408889634
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)  # column by column
    if grad is not None:
        steepest = HEIGHT / WIDTH / tl.load(scale)
        weight = 0.0
        for k in tl.static_range(K):
            weight += tl.load(pulls + row * K + k)
        offset = (tl.log(weight * steepest) - tl.load(lse + row)) * LOG2E  # into the exponent
    for first in range(0, V, BLOCK):
        at = first + columns
        z = tl.load(logits + row * V + at, at < V, other=-float("inf")).to(tl.float32)
        t = soft_tanh(z * (1 / WIDTH) + SHIFT / WIDTH, APPROXIMATE)
        if grad is None:
            total += tl.where(at < V, tl.exp2((t - 1) * (HEIGHT * LOG2E)), 0.0)  # never above 1
        else:
            g = tl.exp2(t * (HEIGHT * LOG2E) + offset)
            for k in tl.static_range(K):
                place = tl.load(places + row * K + k)
                if (place >= first) & (place < first + BLOCK):
                    g -= tl.where(at == place, tl.load(pulls + row * K + k) * steepest, 0.0)
            tl.store(grad + row * V + at, (g * (1 - t * t)).to(grad.dtype.element_ty), at < V)
    if grad is None:
        tl.store(lse + row, tl.log(tl.sum(total)) + HEIGHT)

def launch_softmax_kernel(logits_TV, lse_T, places_TK=None, pulls_TK=None, scale=None, grad_TV=None):
    T, V = logits_TV.shape
    K = 0 if grad_TV is None else places_TK.size(1)
    softmax_kernel[T,](
        logits_TV, lse_T, places_TK, pulls_TK, scale, grad_TV, V, K=K, HEIGHT=CAP_HEIGHT,
        SHIFT=CAP_SHIFT, WIDTH=CAP_WIDTH, APPROXIMATE=logits_TV.is_cuda, BLOCK=4096, num_warps=16,
    )

@region
def log_sum_region(logits_TV):
    return cap(logits_TV).logsumexp(1)

def log_sum(logits_TV, mode="reference"):
    """Log of the sum of each row's exponentials after the soft cap: (T,), at least float32."""
    if mode == "reference":
        return log_sum_region(logits_TV)
    lse_T = torch.empty(len(logits_TV), device=logits_TV.device)
    launch_softmax_kernel(logits_TV.contiguous(), lse_T)
    return lse_T

@region
def gradient_region(logits_TV, lse_T, places_TK, pulls_TK, scale, dtype):
    q_TV = cap(logits_TV)
    grad_TV = pulls_TK.sum(1, keepdim=True) * (q_TV - lse_T[:, None]).exp()
    grad_TV = grad_TV.scatter_add(1, places_TK.clamp_min(0), -pulls_TK.to(grad_TV.dtype))
    slope_TV = (1 - (q_TV / CAP_HEIGHT).square()) * (CAP_HEIGHT / CAP_WIDTH)
    return (grad_TV * slope_TV / scale).to(dtype)

def logits_gradient(logits_TV, lse_T, places_TK, pulls_TK, scale, dtype, mode="reference"):
    """Gradient by the logits of cross entropies with columns places, (T, K), times pulls, (T, K): (T, V).

    It is divided by `scale`, (), and in `dtype`. lse: log_sum. Where a place is -1, the pull is 0. The kernel
    never writes float32 logits.
    """
    if mode == "reference":
        return gradient_region(logits_TV, lse_T, places_TK, pulls_TK, scale, dtype)
    grad_TV = torch.empty(logits_TV.shape, dtype=dtype, device=logits_TV.device)
    launch_softmax_kernel(logits_TV.contiguous(), lse_T, places_TK.contiguous(), pulls_TK.contiguous(), scale,
                          grad_TV)
    return grad_TV

@region
def loss_region(logits_TV, lse_T, targets_TK, weights_K, masses_T2=None, slot=0):
    """Cross entropy of each row, (T,), summed over k with weights[k], none where target k is -1.

    masses_T2: of pointer_masses, or None. With c and s, the pointer's mass on copies of target 0 and on its
    sink, that target's probability is a mixture, p(y) = q(y) A + a c (PR 379). Here q is the softmax, a its
    mass on column `slot`, which is no token, and A = (1 - a (1 - s)) / (1 - a), so p sums to 1.
    Also returns places and pulls, (T, K or K + 1) each, for logits_gradient, and the gradient by the masses.
    """
    weights_TK = weights_K * (targets_TK >= 0)
    nll_TK = lse_T[:, None] - cap(logits_TV.gather(1, targets_TK.clamp_min(0)))
    loss_T = (weights_TK * nll_TK).sum(1)
    if masses_T2 is None:
        return loss_T, targets_TK, weights_TK, None
    c_T, s_T = masses_T2.unbind(1)
    a_T = (cap(logits_TV[:, slot]) - lse_T).exp().clamp_max(1 - 1e-6)
    kept_T = (1 - a_T * (1 - s_T)) / (1 - a_T)
    inverse_T = nll_TK[:, 0].clamp_max(80).exp()  # 1 / q(y)
    ratio_T = kept_T + a_T * c_T * inverse_T  # p(y) / q(y)
    weight_T = weights_TK[:, 0]
    share_T = weight_T / ratio_T  # log p has derivatives by log q, by log a, and by c and s:
    slot_T = share_T * a_T * (s_T / (1 - a_T).square() + c_T * inverse_T)
    mass_grads_T2 = -torch.stack([share_T * a_T * inverse_T, share_T * a_T / (1 - a_T)], dim=1)
    pulls_T = torch.cat([(share_T * kept_T)[:, None], weights_TK[:, 1:], slot_T[:, None]], dim=1)
    return loss_T - weight_T * ratio_T.log(), F.pad(targets_TK, (0, 1), value=slot), pulls_T, mass_grads_T2

@jit
def transpose_kernel(x, out, R, C, TILE: constexpr):
    r = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    c = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)[None]
    inside = (r < R) & (c < C)
    tile = tl.load(x + r * C + c, inside)
    tl.store(out + (c * R + r).T, tile.T, inside.T)

def transpose(x_RC, mode="reference"):
    """Contiguous (C, R) of 8-bit elements, several times as fast as torch's copy."""
    if mode == "reference":
        return x_RC.T.contiguous()
    R, C = x_RC.shape
    out_CR = x_RC.new_empty(C, R)
    source, out = x_RC.contiguous().view(torch.uint8), out_CR.view(torch.uint8)
    grid = triton.cdiv(R, 128), triton.cdiv(C, 128)
    transpose_kernel[grid](source, out, R, C, TILE=128, num_warps=8)
    return out_CR

# ---- Model ----------------------------------------------------------------------------------------------

class Documents(NamedTuple):
    """Where the documents of a packed micro-batch begin; attention never leaves a document."""
    cu_seqlens: Tensor           # (documents + 1,) int32: 0, starts of the others, T
    longest: int                 # tokens
    first_T: Tensor | None = None  # (T,) bool: smear, bigrams, key offset don't look back; None: at BOS

def norm(x):
    """RMS norm over the last dimension, without a weight."""
    return F.rms_norm(x, (x.size(-1),), eps=EPS)

def shift(x, edges_T):
    """x[t-1] at position t; zero where edges_T (bool) is true."""
    previous = torch.cat([x[:1], x[:-1]])
    return previous.masked_fill(edges_T.view(-1, *[1] * (x.dim() - 1)), 0)

def rotate(x_THE, cos_TJ, sin_TJ):
    """Rotary embedding, pairs (j, j + E/2), J = E/2."""
    a, b = x_THE.float().chunk(2, dim=-1)
    cos, sin = cos_TJ[:, None], sin_TJ[:, None]
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).type_as(x_THE)

def offset_keys(k_THE, dims_E, edges_T):
    """Partial key offset (record 49): k[t] with dims_E taken from k[t-1], but not at edges_T; bool both."""
    return torch.where(dims_E & ~edges_T[:, None, None], shift(k_THE, edges_T), k_THE)

def gradient(p):
    """The parameter's gradient, float32, which products and look-ups add to in place."""
    if p.grad is None:
        p.grad = torch.zeros_like(p)
    return p.grad

def add_product(grad_RC, a_TR, b_TC):
    """grad += a^T b, summed in the precision of grad."""
    if not grad_RC.is_contiguous():  # the other way round its transpose is
        add_product(grad_RC.T, b_TC, a_TR)
    elif a_TR.is_cuda and a_TR.dtype != grad_RC.dtype:
        torch.ops.aten.addmm.dtype_out(grad_RC, a_TR.T, b_TC, grad_RC.dtype, out=grad_RC)
    else:
        grad_RC.addmm_(a_TR.T.to(grad_RC.dtype), b_TC.to(grad_RC.dtype))

@region
def rows_region(tokens_T, table_VD, dtype):
    return F.embedding(tokens_T, table_VD).to(dtype)

@region
def add_rows_region(total_VD, tokens_T, rows_TD):
    """total[tokens[t]] += rows[t] for every t, in total's precision; on a GPU usually in any order."""
    total_VD.index_add_(0, tokens_T, rows_TD.to(total_VD.dtype))

class Lookup(torch.autograd.Function):
    """Rows of a table in `dtype`: (T, D). Their gradients are added to the table's, which stays dense."""

    @staticmethod
    def forward(ctx, tokens_T, table_VD: nn.Parameter, dtype: torch.dtype):
        ctx.table = table_VD
        ctx.save_for_backward(tokens_T)
        return rows_region(tokens_T, table_VD, dtype)

    @staticmethod
    def backward(ctx, grad_TD):
        (tokens_T,) = ctx.saved_tensors
        add_rows_region(gradient(ctx.table), tokens_T, grad_TD)
        return None, None, None

class Linear(torch.autograd.Function):
    """x_TC @ weight_RC.T. The weight's gradient is added to grad_RC, if given, by its own product."""

    @staticmethod
    def forward(ctx, x_TC, weight_RC, grad_RC):
        ctx.grad_RC = grad_RC
        ctx.save_for_backward(x_TC, weight_RC)
        return x_TC @ weight_RC.T

    @staticmethod
    def backward(ctx, grad_TR):
        x_TC, weight_RC = ctx.saved_tensors
        if ctx.grad_RC is not None:
            add_product(ctx.grad_RC, grad_TR, x_TC)
        return grad_TR @ weight_RC, None, None

def weighted(x_TD, weight):
    """weight * x. As (T, 1) the weight makes the product float32 and gets its gradient row by row."""
    return x_TD if weight is None else weight.expand(x_TD.size(0), 1) * x_TD

@region
def read_region(x_TD):
    """What a layer reads of the stream: its norm, (T, D), and of that the leading channels, (T, G)."""
    h_TD = norm(x_TD)
    return h_TD, h_TD[:, :GATE_INPUTS].contiguous()

@region
def mix_region(x_TD, delta_TD, skip_TD, x0_TD, bigram_TD, weights: tuple, reads: bool):
    """Weighted sum of the streams that enter a layer, (T, D); None streams are skipped, None weights are 1.

    delta: what is added to x before, or None. If `reads`, also the sum's norm and its leading channels.
    """
    if delta_TD is not None:
        x_TD = x_TD + delta_TD
    streams = zip((x_TD, skip_TD, x0_TD, bigram_TD), weights)
    sum_TD = sum(weighted(stream, weight) for stream, weight in streams if stream is not None).type_as(x_TD)
    if not reads:
        return sum_TD, None, None
    return sum_TD, *read_region(sum_TD)

@region
def float8_region(x_TD, scale, dtype=torch.float8_e4m3fn):
    """x / scale in float8, cut off at the largest value: 448 or, of float8_e5m2, 57344."""
    largest = torch.finfo(dtype).max
    return (x_TD.float() / scale).clamp(-largest, largest).to(dtype)

def as_float8(weight):
    """The weight over its scale, whose largest value float8 can just hold, and the scale, ()."""
    scale = (torch.linalg.vector_norm(weight, math.inf) / 448).clamp_min(1e-12)
    return float8_region(weight, scale), scale

@region
def branch_region(x_TD, o_TD, scale8):
    """Residual stream after attention, the same normed, and that in float8, if its scale is given."""
    sum_TD = x_TD + o_TD
    h_TD = norm(sum_TD)
    return sum_TD, h_TD, None if scale8 is None else float8_region(h_TD.detach(), scale8)

class MLP(torch.autograd.Function):
    """LeakyReLU(slope)(h @ up.T)^2 @ down with all products in float8 (PRs 344 and 360): (T, D).

    scales: of h8, and of the gradients that are rounded. float8_e5m2 has the range of float16, so one scale,
    known beforehand, serves both. eight: see GPT.refresh. Weights' gradients are added to grad_2FD.
    """

    @staticmethod
    def forward(ctx, h_TD, h8_TD, scales: tuple, eight: tuple, grad_2FD, slope, mode: str):
        up8_FD, up8_DF, up_scale, down8_FD, down8_DF, down_scale = eight
        h_scale, grad_scale = scales
        r_TF, hidden_TF = mlp_forward(h8_TD, up8_FD, h_scale * up_scale, slope, mode)
        ctx.grad_2FD, ctx.slope, ctx.mode = grad_2FD, slope, mode
        ctx.save_for_backward(h8_TD, h_scale, r_TF, grad_scale, up8_DF, up_scale, down8_FD, down_scale)
        return float8_product(hidden_TF, down8_DF.T, torch.ones_like(down_scale), down_scale, h_TD.dtype)

    @staticmethod
    def backward(ctx, grad_TD):
        h8_TD, h_scale, r_TF, scale, up8_DF, up_scale, down8_FD, down_scale = ctx.saved_tensors
        grad8_TD = float8_region(grad_TD, scale, torch.float8_e5m2)
        u_grad_TF, hidden_FT, u_grad_FT = mlp_backward(
            grad8_TD, down8_FD, r_TF, down_scale, ctx.slope, ctx.mode)
        h8_DT, grad8_DT = transpose(h8_TD, ctx.mode), transpose(grad8_TD, ctx.mode)
        up_grad_FD, down_grad_FD = ctx.grad_2FD
        up_grad_FD += float8_product(u_grad_FT, h8_DT.T, scale, h_scale, torch.float32)
        down_grad_FD += float8_product(hidden_FT, grad8_DT.T, torch.ones_like(scale), scale, torch.float32)
        h_grad_TD = float8_product(u_grad_TF, up8_DF.T, scale, up_scale, grad_TD.dtype)
        return h_grad_TD, None, None, None, None, None, None

def attention_reference(q_THE, k_THE, v_THE, docs, window, block: int = 128):
    """Causal attention within documents, at most `window` tokens back; scores q.k are unscaled. (T, H, E).

    Plain torch on any device; works block by block, so memory is linear in T.
    """
    T = q_THE.size(0)
    position = torch.arange(T, device=q_THE.device)
    document = torch.searchsorted(docs.cu_seqlens[1:].long(), position, right=True)
    q_blocks, k_blocks, v_blocks = (x.transpose(0, 1)[None].split(block, 2) for x in (q_THE, k_THE, v_THE))
    out = []
    for i, q in enumerate(q_blocks):
        lo, hi = i * block, i * block + q.size(2)
        first = max(0, lo - window) // block
        back = position[lo:hi, None] - position[None, first * block : hi]
        mask = (back >= 0) & (back <= window) & (document[lo:hi, None] == document[None, first * block : hi])
        k, v = (torch.cat(blocks[first : i + 1], dim=2) for blocks in (k_blocks, v_blocks))
        out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0))
    return torch.cat(out, dim=2)[0].transpose(0, 1)

def attention_varlen(q_THE, k_THE, v_THE, docs, window):
    """The same through torch's variable-length FlashAttention."""
    from torch.nn.attention.varlen import varlen_attn
    cu = docs.cu_seqlens  # of queries and of keys
    torch.set_deterministic_debug_mode("error")  # else FlashAttention 3 splits keys, which takes longer
    y_THE = varlen_attn(q_THE, k_THE, v_THE, cu, cu, docs.longest, docs.longest, scale=1.0,
                        window_size=(window, 0))
    torch.set_deterministic_debug_mode("default")
    return y_THE

class Rotary(NamedTuple):
    """Rotary tables, of which half the dims are stationary."""
    cos_PJ: Tensor               # (positions, E/2) float32; stationary dims have cos 1, sin 0
    sin_PJ: Tensor
    offset_E: Tensor             # (E,) bool: dims that the key offset moves, the stationary ones

def build_rotary(cfg, positions, device):
    """Tables for `positions` tokens."""
    half = cfg.width // cfg.heads // 2
    moving = round(half * ROTARY_FRACTION)
    frequency = torch.cat([(1 / 1024) ** torch.linspace(0, 1, moving), torch.zeros(half - moving)])
    angle_PJ = torch.arange(positions).double()[:, None] * frequency.double()
    tables = angle_PJ.cos().float(), angle_PJ.sin().float(), (frequency == 0).repeat(2)
    return Rotary(*(table.to(device) for table in tables))

@region
def embed_region(embed_TD, gate_G, smear_lambda, edges_T):
    """Token embeddings smeared with their predecessor, normed: (T, D)."""
    gate_T1 = torch.sigmoid(embed_TD[:, :GATE_INPUTS] @ gate_G.to(embed_TD.dtype))[:, None]
    return norm(embed_TD + smear_lambda * gate_T1 * shift(embed_TD, edges_T))

@region
def bigram_region(tokens_T, edges_T, rows):
    """Row of each token and the one before in a hashed table (record 62), the last for none; int32 wraps."""
    row_T = ((36313 * tokens_T.int()) ^ (27191 * shift(tokens_T, edges_T).int())) % (rows - 1)
    return row_T.masked_fill(edges_T, rows - 1).long()

@region
def qkv_region(qkv_TC, v_lambda, value_TD, cos_PJ, sin_PJ, scale: float, offset_E, edges_T, heads):
    """What attention reads: q, k, v with its value embeddings, (T, H, E) each, from the product (T, 3 D).

    value_TD: rows of value embeddings, or None. offset_E: dims of the key offset, or None for none.
    """
    T = qkv_TC.size(0)
    q_THE, k_THE, v_THE = qkv_TC.view(T, 3, heads, -1).unbind(1)
    q_THE = rotate(norm(q_THE) * scale, cos_PJ[:T], sin_PJ[:T])
    k_THE = rotate(norm(k_THE), cos_PJ[:T], sin_PJ[:T])
    if offset_E is not None:
        k_THE = offset_keys(k_THE, offset_E, edges_T)
    v_THE = v_lambda.expand(T, 1, 1) * v_THE
    if value_TD is not None:
        v_THE = v_THE + value_TD.view_as(v_THE)
    return q_THE, k_THE, v_THE.type_as(qkv_TC).contiguous()

@region
def gate_region(y_THE, lead_TG, gate_HG, out_lambda):
    """Attention output times each head's gate, a function of the leading channels, and a factor: (T, D)."""
    factor_TH = out_lambda.expand(y_THE.size(0), 1) * torch.sigmoid(lead_TG.float() @ gate_HG.float().T)
    return (y_THE * factor_TH[..., None]).type_as(y_THE).flatten(1)

@region
def final_region(x_TD, delta_TD, backout_TD, backout_lambda, smear_mtp_lambda, edges_T):
    """Latents that the head reads: backout, norm, and smear_mtp's y'[t] = y[t] + lambda y[t-1] (PR 151)."""
    if delta_TD is not None:
        x_TD = x_TD + delta_TD
    if backout_TD is not None:
        x_TD = (x_TD - weighted(backout_TD, backout_lambda)).type_as(x_TD)
    x_TD = norm(x_TD)
    if smear_mtp_lambda is None:
        return x_TD
    return (x_TD + weighted(shift(x_TD, edges_T), smear_mtp_lambda)).type_as(x_TD)

@region
def pointer_region(qk_TC, gain):
    """Normed queries, scaled, and keys of the pointer head."""
    q_TE, k_TE = (norm(x) for x in qk_TC.chunk(2, dim=1))
    return weighted(q_TE, gain * POINTER_WIDTH**-0.5).type_as(q_TE), k_TE

@region
def copy_region(q_TBE, k_TBE, sink, own_TB, targets_TB, reach_TB, behind):
    """pointer_masses of blocks of B queries, (blocks, B, 2). k and targets begin `behind` blocks earlier."""
    blocks, B, _ = q_TBE.shape
    keys_TJE = torch.cat([k_TBE[i : i + blocks] for i in range(behind + 1)], dim=1)
    targets_TJ = torch.cat([targets_TB[i : i + blocks] for i in range(behind + 1)], dim=1)
    position = torch.arange(behind * B + B, device=q_TBE.device, dtype=torch.int32)
    back_BJ = position[-B:, None] - position
    scores_TBJ = torch.bmm(q_TBE, keys_TJE.mT).to(sink.dtype)
    scores_TBJ = scores_TBJ.masked_fill((back_BJ <= 0) | (back_BJ > reach_TB[:, :, None]), -math.inf)
    top_TB = torch.maximum(scores_TBJ.amax(2), sink).detach()
    masses_TBJ, sink_TB = (scores_TBJ - top_TB[:, :, None]).exp(), (sink - top_TB).exp()
    copied_TB = (masses_TBJ * (targets_TJ[:, None] == own_TB[:, :, None])).sum(2)
    return torch.stack([copied_TB, sink_TB], dim=2) / (masses_TBJ.sum(2) + sink_TB)[:, :, None]

def pointer_masses(q_TE, k_TE, sink, targets_T, cu_seqlens, window):
    """Attention as a distribution over earlier targets: (T, 2) float32, of which autograd knows the gradient.

    Query t attends to positions i < t of its document, at most `window` back, and to a sink of score `sink`,
    () float32. Scores are q.k, unscaled. Column 0: the mass on positions with the same target as t, column 1:
    the sink's. Target i is token i + 1, so it is known at t. cu_seqlens: see Documents.
    """
    T = len(q_TE)
    behind = max(2, -(-window // POINTER_BLOCK))  # with 1, torch 2.11's compilation fails on a GPU
    position = torch.arange(T, device=q_TE.device)
    document = torch.searchsorted(cu_seqlens[1:].long(), position, right=True)
    reach_T = (position - cu_seqlens[document]).clamp_max(window).int()

    def blocks(x, before=0):
        padding = (0, 0) * (x.dim() - 1) + (before * POINTER_BLOCK, -T % POINTER_BLOCK)
        return F.pad(x, padding).unflatten(0, (-1, POINTER_BLOCK))

    q_TBE, own_TB, reach_TB = blocks(q_TE), blocks(targets_T), blocks(reach_T)
    k_TBE, targets_TB = blocks(k_TE, behind), blocks(targets_T, behind)
    count = max(1, POINTER_SCORES // (POINTER_BLOCK**2 * (behind + 1)))
    masses = []
    for lo in range(0, len(q_TBE), count):
        own, read = slice(lo, lo + count), slice(lo, lo + count + behind)
        masses.append(copy_region(
            q_TBE[own], k_TBE[read], sink, own_TB[own], targets_TB[read], reach_TB[own], behind))
    return torch.cat(masses).flatten(0, 1)[:T]

def float8_product(a, b, a_scale, b_scale, dtype, fast=False):
    """a_scale a @ b_scale b in `dtype`; a row-major, b column-major. fast: lower precision of long sums."""
    from torch.nn.functional import ScalingType, scaled_mm
    whole = ScalingType.TensorWise
    return scaled_mm(a, b, a_scale, whole, b_scale, whole, output_dtype=dtype, use_fast_accum=fast)

def head_chunk(model, x_TD, head: tuple, grad_VD, targets_TK, weights_K, masses_T2, slot):
    """head_step of tokens whose logits exist together. head: its compute_weights; grad_VD: its gradient.

    The logits' gradient leaves the loss in the precision that the next products read; for float8 (record 20)
    it is scaled to use the range.
    """
    mode = model.kernels
    weight_VD, *rest = head
    if model.fp8:
        weight_DV, scale = rest
        x_scale = model.latent_scale
        dtype = torch.float8_e5m2
        x8_TD = float8_region(x_TD, x_scale)
        logits_TV = float8_product(x8_TD, weight_VD.T, x_scale, scale, x_TD.dtype, fast=True)
        steepest = max(1.0, CAP_HEIGHT / CAP_WIDTH)
        grad_scale = (weights_K.sum() * steepest).clamp_min(1e-30) * 2.0**-14
    else:
        logits_TV = x_TD @ weight_VD.T
        grad_scale = torch.ones((), device=x_TD.device)
        dtype = x_TD.dtype
    lse_T = log_sum(logits_TV, mode)
    loss_T, places_TK, pulls_TK, mass_grads_T2 = loss_region(
        logits_TV, lse_T, targets_TK, weights_K, masses_T2, slot)
    grad_TV = logits_gradient(logits_TV, lse_T, places_TK, pulls_TK, grad_scale, dtype, mode)
    del logits_TV
    if model.fp8:
        x_grad_TD = float8_product(grad_TV, weight_DV.T, grad_scale, scale, x_TD.dtype)
        x8_DT, grad_VT = transpose(x8_TD, mode), transpose(grad_TV, mode)
        grad_VD += float8_product(grad_VT, x8_DT.T, grad_scale, x_scale, torch.float32)
    else:
        x_grad_TD = grad_TV @ weight_VD
        add_product(grad_VD, grad_TV, x_TD)
    return loss_T.sum(), x_grad_TD, mass_grads_T2

def head_step(model, x_TD, k, targets_TK, weights_K, columns_S=None, masses_T2=None):
    """Loss of head k (0: the main one) on latents, (), its gradient by them, (T, D), and by the masses.

    The head's own gradient is added in place. Chunks are backpropagated at once, so only LOSS_CHUNK tokens
    have logits at a time. masses_T2: of pointer_masses, or None.
    columns_S: distinct tokens, int64, among which the loss chooses (record 92, PR 360); None: all. Other
    targets give no loss.
    """
    head_grad_VD = gradient(model.mtp_heads)[k - 1] if k else gradient(model.head)
    head = model.compute_weights["head", k]
    grad_VD = head_grad_VD
    slot = model.cfg.vocab_size
    if columns_S is not None:
        V, S = len(grad_VD), len(columns_S)
        places = torch.full((V + 1,), -1, device=x_TD.device)  # the last is that of no target, -1
        places[columns_S] = torch.arange(S, device=x_TD.device)
        targets_TK = places[targets_TK]
        weight_SD = head[0].view(torch.uint8)[columns_S].view(head[0].dtype)  # not every float8 has indexing
        rest = (transpose(weight_SD, model.kernels), head[2]) if model.fp8 else ()
        head = weight_SD, *rest
        grad_VD = grad_VD.new_zeros(S, grad_VD.size(1))
        slot = 0
    results = []
    for lo in range(0, x_TD.size(0), LOSS_CHUNK):
        chunk = slice(lo, lo + LOSS_CHUNK)
        masses = None if masses_T2 is None else masses_T2[chunk]
        results.append(head_chunk(
            model, x_TD[chunk], head, grad_VD, targets_TK[chunk], weights_K, masses, slot))
    if columns_S is not None:
        head_grad_VD.index_add_(0, columns_S, grad_VD)
    losses, x_grads, mass_grads = zip(*results)
    return sum(losses), torch.cat(x_grads), None if masses_T2 is None else torch.cat(mass_grads)

class GPT(nn.Module):
    """Parameters: see parameter_table; float32, and 0 until `initialise`. forward runs in `dtype`."""

    def __init__(self, cfg, dtype=torch.float32, attention="reference", kernels="reference", fp8=False):
        super().__init__()
        self.cfg, self.dtype, self.kernels, self.fp8 = cfg, dtype, kernels, fp8
        self.attention = attention_reference if attention == "reference" else attention_varlen
        self.compute_weights, self.graphs = {}, None
        self.tap_layers = {layer.skip_from for layer in cfg.layers} | {cfg.backout_from}
        for row in parameter_table(cfg):
            self.register_parameter(row.name, nn.Parameter(torch.zeros(row.shape)) if row.used else None)
        scale = torch.tensor(2 * math.sqrt(cfg.width) / 448)  # 2: smear_mtp adds two latents up
        self.register_buffer("latent_scale", scale, persistent=False)
        self.register_buffer("grad_scale", torch.ones(()), persistent=False)

    @torch.no_grad()
    def initialise(self, weights: dict):
        """Give parameters their initial values: see draw_weights."""
        for name, p in self.named_parameters():
            p.copy_(weights[name])
        if self.cfg.untie_at:
            self.head.copy_(self.embed)

    def forward(self, tokens_T, docs, windows: dict, rotary):
        """Final latents (T, D) of packed tokens (T,) int64, in `dtype`; the head is applied by the caller.

        windows: tokens that the "short" and the "long" layers look back.
        """
        cfg = self.cfg
        if not self.compute_weights:
            self.refresh()
        edges_T = tokens_T == cfg.bos if docs.first_T is None else docs.first_T
        edges_T[:1].fill_(True)  # "= True" would copy from the host, which no graph can record
        embed_TD = Lookup.apply(tokens_T, self.embed, self.dtype)
        x_TD = embed_region(embed_TD, self.smear_gate, self.smear_lambda, edges_T)
        x0_TD = x_TD
        values = self.value_rows(tokens_T)
        bigram_TD = self.bigrams(tokens_T, edges_T)
        stream_weights = self.stream_weights()
        lambdas = self.attn_lambdas.flatten().unbind()
        v_lambdas, out_lambdas = lambdas[::2], lambdas[1::2]
        attn_gates = self.attn_gate.unbind()
        scale8 = self.latent_scale if self.fp8 and torch.is_grad_enabled() else None
        outputs = {}
        delta_TD = None
        late_TD = None
        late_lead_TG = None
        for i, layer in enumerate(cfg.layers):
            skip_TD = outputs[layer.skip_from] if i in cfg.skips else None
            reads = not cfg.reads_late(i)
            injected = (x0_TD, bigram_TD) if layer.inject else (None, None)
            x_TD, h_TD, lead_TG = mix_region(  # h = norm(x); lead = what gates read of it
                x_TD, delta_TD, skip_TD, *injected, stream_weights[i], reads)
            h8_TD = None
            if layer.window != "none":
                if not reads:
                    h_TD, lead_TG = late_TD, late_lead_TG
                a = cfg.attention_layers.index(i)  # its row in attn_bank, attn_gate, attn_lambdas
                qkv_TC = self.project("qkv", a, h_TD)
                own_values = [values[table] for table in layer.value_embeds if values]
                value_TD = sum(own_values[1:], own_values[0]) if own_values else None
                offset_E = rotary.offset_E if layer.key_offset else None
                q_THE, k_THE, v_THE = qkv_region(
                    qkv_TC, v_lambdas[a], value_TD, rotary.cos_PJ, rotary.sin_PJ, cfg.attn_scale, offset_E,
                    edges_T, cfg.heads)
                y_THE = self.attention(q_THE, k_THE, v_THE, docs, windows[layer.window])
                y_TD = gate_region(y_THE, lead_TG, attn_gates[a], out_lambdas[a])
                o_TD = self.project("o", a, y_TD)
                x_TD, h_TD, h8_TD = branch_region(x_TD, o_TD, scale8)
            elif scale8 is not None:
                h8_TD = float8_region(h_TD.detach(), scale8)
            delta_TD = self.mlp(i, h_TD, h8_TD)  # added by the next kernel that reads x
            if i in self.tap_layers:
                x_TD, delta_TD = x_TD + delta_TD, None
                outputs[i] = x_TD
            if i == cfg.backout_from:
                late_TD, late_lead_TG = read_region(x_TD)
        backout_TD = outputs.get(cfg.backout_from)
        return final_region(x_TD, delta_TD, backout_TD, self.backout_lambda, self.smear_mtp_lambda, edges_T)

    def project(self, name: str, a: int, x_TD):
        """Product with Q, K and V ("qkv": (T, 3 D)) or O ("o": (T, D)) of attention layer a."""
        matrices = slice(0, 3) if name == "qkv" else slice(3, 4)
        weight_RC = self.compute_weights["attn_bank"][0][a, matrices].flatten(0, 1)
        grad_4DD = self.bank_gradient(self.attn_bank, a)
        grad_RC = None if grad_4DD is None else grad_4DD[matrices].flatten(0, 1)
        return Linear.apply(x_TD, weight_RC, grad_RC)

    def mlp(self, i: int, h_TD, h8_TD):
        """What the MLP of layer i adds to the residual stream, whose norm h is; h8: h as float8, or None."""
        grad_2FD = self.bank_gradient(self.mlp_bank, i)
        slope = self.cfg.leaky_slope
        if h8_TD is not None:
            scales, eight = (self.latent_scale, self.grad_scale), self.compute_weights["mlp8", i]
            return MLP.apply(h_TD, h8_TD, scales, eight, grad_2FD, slope, self.kernels)
        up_FD, down_FD = self.compute_weights["mlp_bank"][0][i]
        up_grad_FD, down_grad_FD = (None, None) if grad_2FD is None else grad_2FD
        hidden_TF = activation_region(Linear.apply(h_TD, up_FD, up_grad_FD), slope)
        return Linear.apply(hidden_TF, down_FD.T, None if down_grad_FD is None else down_grad_FD.T)

    def bank_gradient(self, bank: nn.Parameter, layer: int):
        """What the products of a layer add their weights' gradients to; None where nothing is trained."""
        return gradient(bank)[layer] if torch.is_grad_enabled() and bank.requires_grad else None

    @torch.no_grad()
    def refresh(self):
        """Refresh the low-precision copies of the weights. Call it after any change of weights."""
        for name in ("attn_bank", "mlp_bank"):
            bank = getattr(self, name).detach()
            first = name not in self.compute_weights
            self.keep(name, bank.to(self.dtype) if first else bank)
        for k, head_VD in enumerate([self.head, *(self.mtp_heads if self.cfg.mtp_heads else ())]):
            if not self.fp8:
                self.keep(("head", k), head_VD.detach().to(self.dtype))
            else:  # as float8, also transposed
                weight8_VD, scale = as_float8(head_VD)
                self.keep(("head", k), weight8_VD, transpose(weight8_VD, self.kernels), scale)
        for i, (up_FD, down_FD) in enumerate(self.mlp_bank if self.fp8 else ()):
            up8_FD, up_scale = as_float8(up_FD)
            down8_FD, down_scale = as_float8(down_FD)
            self.keep(("mlp8", i), up8_FD, transpose(up8_FD, self.kernels), up_scale,
                      down8_FD, transpose(down8_FD, self.kernels), down_scale)

    def keep(self, name, *tensors):
        """Copy tensors over those of compute_weights[name], which stay in place: CUDA graphs read them."""
        for old, new in zip(self.compute_weights.setdefault(name, tensors), tensors):
            if old.data_ptr() != new.data_ptr():
                old.copy_(new)

    def value_rows(self, tokens_T):
        """Rows of every value-embedding table, (T, D) each."""
        first = range(0, self.cfg.value_tables * self.cfg.padded_vocab, self.cfg.padded_vocab)
        return [Lookup.apply(tokens_T + row, self.value_embeds, self.dtype) for row in first]

    def bigrams(self, tokens_T, edges_T):
        """What each token and the one before look up together: (T, D)."""
        if not self.cfg.bigram_rows:
            return None
        row_T = bigram_region(tokens_T, edges_T, self.cfg.bigram_rows)
        return Lookup.apply(row_T, self.bigram_embed, self.dtype)

    def stream_weights(self):
        """Of each layer: what mix_region multiplies the stream, a skip connection, x0 and bigrams with."""
        cfg, layers = self.cfg, len(self.cfg.layers)
        x, x0 = self.resid_lambdas.unbind(), self.x0_lambdas.unbind()  # by one operation, not [i] for each i
        bigram = self.bigram_lambdas.unbind() if cfg.bigram_rows else [None] * layers
        skip = [None] * layers
        for i, factor in zip(cfg.skips, self.skip_lambdas.sigmoid().unbind() if cfg.skips else ()):
            skip[i] = x[i] * factor
        return list(zip(x, skip, x0, bigram))

    def pointer_heads(self, x_TD):
        """Queries and keys of the pointer head, (T, 128) each, from final latents."""
        grad_CD = self.bank_gradient(self.pointer, slice(None))
        qk_TC = Linear.apply(x_TD, self.pointer.detach().to(x_TD.dtype), grad_CD)
        return pointer_region(qk_TC, self.pointer_gain)

    def copy_masses(self, x_TD, targets_T, docs, window):
        """pointer_masses of final latents and the tokens that follow; None without a pointer head."""
        if not self.cfg.pointer:
            return None
        q_TE, k_TE = self.pointer_heads(x_TD)
        return pointer_masses(q_TE, k_TE, self.pointer_sink, targets_T, docs.cu_seqlens, window)

    def token_losses(self, x_TD, targets_T, masses_T2, chunk):
        """Yields the cross entropies of `chunk` targets at a time, float32; 0 where a target is -1."""
        masses = itertools.repeat(None) if masses_T2 is None else masses_T2.split(chunk)
        one = torch.ones(1, device=x_TD.device)
        for x, targets, own in zip(x_TD.split(chunk), targets_T.split(chunk), masses):
            logits_TV = self.products(x)
            lse_T = log_sum(logits_TV)  # by plain torch: exactly
            yield loss_region(logits_TV, lse_T, targets[:, None], one, own, self.cfg.vocab_size)[0]

    def products(self, x_TD):
        """Logits before the soft cap, (T, V), of final latents, in their dtype."""
        return x_TD @ self.head.to(x_TD.dtype).T

    def lambdas(self):
        """Learned scalars by name, for the log."""
        named = {name: p for name, p in self.named_parameters() if "lambda" in name}
        return {name: [round(v, 5) for v in p.detach().flatten().tolist()] for name, p in named.items()}

def new_model(cfg, hardware):
    """A GPT whose weights are 0, and the switch that has regions compiled or not."""
    region.compile = hardware.compile
    with hardware.device:
        model = GPT(cfg, hardware.dtype, hardware.attention, hardware.kernels, hardware.fp8)
    model.graphs = Graphs() if hardware.graphs else None
    return model

# ---- Optimizer ------------------------------------------------------------------------------------------

def frobenius(x_NRC):
    """Norm of each matrix, (N, 1, 1)."""
    return x_NRC.norm(dim=(-2, -1), keepdim=True)

# Polar Express, five iterations (arXiv 2505.16932, safety 2 %): X <- a X + (b A + c A A) X with A = X X^T.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169301323),
)

def polar_express(x_NRC):
    """Nearly orthogonal factor, singular values about 1, of each matrix of Frobenius norm below 1."""
    tall = x_NRC.size(-2) > x_NRC.size(-1)
    x = x_NRC.mT if tall else x_NRC
    for a, b, c in POLAR_EXPRESS:
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x

AVERAGE_BLEND = 0.5                   # share of the averaged weights in the final ones
SLOW_BETA, SLOW_SHARE = 0.98, 0.5615  # of the slow momentum; the fast one's beta is 0.85 beside it

# The updates only add and multiply: unlike those of lerp_, the results don't depend on where a shard begins.
@region(dynamic=False)
def nesterov(g_NRC, momentum_NRC, slow_NRC, mu, beta, share, dtype: torch.dtype):
    """Update the momenta in place; the direction to orthogonalise, of Frobenius norm below 1, in `dtype`."""
    momentum_NRC.add_((1 - beta) * (g_NRC - momentum_NRC))
    both_NRC = momentum_NRC
    if slow_NRC is not None:
        slow_NRC.add_((1 - SLOW_BETA) * (g_NRC - slow_NRC))
        both_NRC = momentum_NRC + share * (slow_NRC - momentum_NRC)
    x_NRC = g_NRC + mu * (both_NRC - g_NRC)
    return (x_NRC / (1.02 * frobenius(x_NRC) + 1e-12)).to(dtype)

def normalise_rows(x_NRC, second_NR1, beta2):
    """What NorMuon adds to Muon: each row over its running RMS, with each matrix's norm kept."""
    second_NR1.add_((1 - beta2) * (x_NRC.square().mean(-1, keepdim=True) - second_NR1))
    scaled = x_NRC * second_NR1.clamp_min(1e-10).rsqrt()
    return scaled * (frobenius(x_NRC) / frobenius(scaled).clamp_min(1e-10))

@region(dynamic=False)
def apply_update(p_NRC, x_NRC, second_NR1, lr_N11, decay, beta2):
    """Step along the normalised rows of x (plain Muon: along x), with decay where it doesn't oppose that."""
    x = normalise_rows(x_NRC.to(p_NRC.dtype), second_NR1, beta2)
    p_NRC.sub_(lr_N11 * (x + decay * p_NRC * (x * p_NRC >= 0)))

def normuon_update(p_NRC, g_NRC, moments: dict, lr_N11, decay, mu, share, beta2, dtype: torch.dtype):
    """One NorMuon step (arXiv 2510.05491) in place on a stack of matrices, e.g. (44, 768, 768).

    Nesterov momentum, orthogonalisation, division of each row by its running RMS with the matrix's norm kept,
    and decoupled decay only where it does not oppose the update. A row is an output of Q, K, V, O and up, and
    an input of down, which is stored transposed. mu, decay: () float32; lr_N11: one per matrix.
    moments: "momentum", (N, R, C), "second", (N, R, 1), and "slow", as momentum, whose part is share.
    """
    beta = scalar(0.85) if share else mu.clone()  # were it mu itself, that would be compiled for itself
    x_NRC = nesterov(g_NRC, moments["momentum"], moments.get("slow"), mu, beta, scalar(share), dtype)
    apply_update(p_NRC, polar_express(x_NRC), moments["second"], lr_N11, decay, beta2)

@region(dynamic=True)
def adam_update(p, g, first, second, lr, bias1, bias2, beta1, beta2, decay=0.0):
    """One Adam step in place, any shape; bias = 1 - beta^t. Decay where it doesn't oppose the step."""
    first.add_((1 - beta1) * (g - first))
    second.add_((1 - beta2) * (g * g - second))
    x = lr * (first.type_as(p) / bias1) / ((second.type_as(p) / bias2).sqrt() + 1e-15)
    p.sub_(x + lr * decay * p * (x * p > 0))

def scalar(value):
    """A number that changes from step to step, on the CPU: as a tensor it needs no recompilation."""
    return torch.tensor(value, dtype=torch.float32)

class Row(NamedTuple):
    """One parameter: its shape, its initial value and how it is trained."""
    name: str
    shape: tuple
    algorithm: type              # NorMuon, Adam or another subclass of Part
    comms: str                   # "sharded" (reduce-scatter, update own part, all-gather) or "replicated"
    lr: tuple                    # effective learning rates, one per matrix of a bank's layer, or one
    start: object = 0.0          # a number, numbers that broadcast, or a function that draws: normal, uniform
    betas: tuple = (0.0, 0.95)   # of the moments; NorMuon's first is the schedule's momentum instead
    weight_decay: float = 0.0
    every: int = 1               # steps between updates; gradients add up meanwhile
    copy_of: str = ""            # a row of this shape, of which this is a copy, with moments both have ..
    copy_until: int = 0          # .. until this step; its gradient is added to that row's
    averaged: bool = False       # over the last steps, see Optimizer.finish
    used: bool = True            # False: its mechanism is off

class Part:
    """The part of one parameter that this rank updates, units lo to hi - 1, and their moments.

    An algorithm is a subclass. It defines
    as_units(x): static; a tensor of the parameter's shape as equal parts that ranks may share, (units, ..);
    make_moments(p): the moments of the own units p, by name;
    update(p, grad, step, lr_multiplier, muon_momentum): changes the own units p in place. grad is theirs, in
    p's dtype, summed over ranks and over `row.every` steps.
    """

    def __init__(self, row, p, model, world):
        self.row, self.parameter, self.world = row, p, world
        self.cfg, self.dtype = model.cfg, model.dtype
        self.units = len(self.as_units(p))
        self.per_rank = -(-self.units // world.size)  # the last ranks may have fewer
        self.lo, self.hi = 0, self.units
        if row.comms == "sharded":
            self.lo = min(self.per_rank * world.rank, self.units)
            self.hi = min(self.lo + self.per_rank, self.units)
        own = self.as_units(p.data)[self.lo : self.hi]
        self.moments = self.make_moments(own)
        if row.averaged:
            self.moments["average"] = torch.zeros_like(own)

    def reduce(self):
        """Start summing the gradient over ranks: (own part once the work is done, work or None)."""
        grad = self.as_units(self.parameter.grad)
        if self.world.size == 1:
            return grad, None
        if self.row.comms == "replicated":
            return grad, dist.all_reduce(grad, async_op=True)
        padded = grad.new_zeros(self.per_rank * self.world.size, *grad.shape[1:], dtype=self.dtype)
        padded[: self.units] = grad
        own = torch.empty_like(padded[: self.per_rank])
        work = dist.reduce_scatter_tensor(own, padded, async_op=True)
        return own[: self.hi - self.lo], work

    def gather(self):
        """Start sharing the updated parts; returns the function that finishes it."""
        if self.world.size == 1 or self.row.comms == "replicated":
            return lambda: None
        p = self.as_units(self.parameter.data)
        whole = self.per_rank * self.world.size
        full = p if whole == self.units else p.new_empty(whole, *p.shape[1:])
        own = full[self.per_rank * self.world.rank : self.per_rank * (self.world.rank + 1)]
        if full is not p:
            own[: self.hi - self.lo] = p[self.lo : self.hi]
        work = dist.all_gather_into_tensor(full, own, async_op=True)  # own is in full: nothing is copied

        def finish():
            work.wait()
            if full is not p:
                p.copy_(full[: self.units])

        return finish

    def add_average(self, own, step):
        """Take the weights after `step` into their exponential average, if it has begun."""
        count = math.ceil(self.cfg.average * self.cfg.total_steps)
        taken = step - (self.cfg.total_steps - count)
        if 0 <= taken < self.row.every:
            self.moments["average"].copy_(own)
        elif taken >= 0:
            rate = 2 / (count / self.row.every + 1)
            self.moments["average"].mul_(1 - rate).add_(own, alpha=rate)

    def unshard(self, part):
        """A moment of all units, on the CPU; collective."""
        if self.world.size == 1 or self.row.comms == "replicated":
            return part.to("cpu", copy=True)
        own = part.new_zeros(self.per_rank, *part.shape[1:])
        own[: part.size(0)] = part
        whole = own.new_empty(self.per_rank * self.world.size, *part.shape[1:])
        dist.all_gather_into_tensor(whole, own)
        return whole[: self.units].cpu()

class NorMuon(Part):
    """normuon_update on matrices of a bank, e.g. (11, 4, 768, 768): 44 units."""

    @staticmethod
    def as_units(x):
        return x.view(-1, *x.shape[2:])

    def make_moments(self, p_NRC):
        layers = self.parameter.size(0)
        lr = torch.tensor(self.row.lr, device=p_NRC.device).repeat(layers)
        self.lr_N11 = lr[self.lo : self.hi].view(-1, 1, 1)
        moments = {"momentum": torch.zeros_like(p_NRC), "second": torch.zeros_like(p_NRC[..., :1])}
        if self.cfg.slow_momentum < 1:
            moments["slow"] = torch.zeros_like(p_NRC)
        return moments

    def update(self, p, grad, step, lr_multiplier, muon_momentum):
        if len(p):  # else there are more ranks than matrices
            lr_N11 = self.lr_N11 * lr_multiplier
            decay = scalar(self.row.weight_decay * lr_multiplier)
            mixed = "slow" in self.moments and step >= self.cfg.slow_momentum * self.cfg.scheduled_steps
            share = SLOW_SHARE if mixed else 0.0
            normuon_update(p, grad, self.moments, lr_N11, decay, scalar(muon_momentum), share,
                           self.row.betas[1], self.dtype)

class Adam(Part):
    """adam_update on elements of a parameter of any shape."""

    @staticmethod
    def as_units(x):
        return x.view(-1)

    def make_moments(self, p):
        dtype = self.dtype if self.row.comms == "sharded" else torch.float32  # tables are many numbers
        return {name: torch.zeros_like(p, dtype=dtype) for name in ("first", "second")}

    def update(self, p, grad, step, lr_multiplier, muon_momentum):
        row = self.row
        updates = (step + 1) // self.row.every
        lr, decay = scalar(row.lr[0] * lr_multiplier), scalar(row.weight_decay * lr_multiplier)
        bias1, bias2 = (scalar(1 - beta**updates) for beta in row.betas)
        # single numbers aren't compiled: torch 2.11 fails on them
        update = adam_update if row.comms == "sharded" else adam_update.__wrapped__
        update(p, grad, self.moments["first"], self.moments["second"], lr, bias1, bias2, *row.betas, decay)

def normal(std):
    return lambda shape, random: torch.randn(shape, generator=random) * std

def uniform(std, matrices: int):
    """The first `matrices` of each layer of a bank; the others are 0."""

    def draw(shape, random: torch.Generator):
        values, bound = torch.zeros(shape), math.sqrt(3) * std
        values[:, :matrices].uniform_(-bound, bound, generator=random)
        return values

    return draw

@lru_cache(1)  # what set_up draws beside the compilation serves the first run
def draw_weights(cfg):
    """Initial values by parameter, on the CPU, to broadcast to its shape. They depend on the seed alone."""
    random = torch.Generator().manual_seed(cfg.seed)
    return {row.name: row.start(row.shape, random) if callable(row.start) else torch.tensor(row.start)
            for row in optimizer_table(cfg)}

def parameter_table(cfg):
    """Every possible parameter. Learning rates are final: nothing rescales them by shape.

    A new one needs a row here and its use, as attn_gate: unbound in GPT.forward and handed to a region. It is
    None if its row isn't used.
    Banks: Q, K, V, O of each layer with attention (muon_lr times attn_lr_ratio); up (times 2) and down^T
    (times 4) of each layer.
    """
    L, A, D, V = len(cfg.layers), len(cfg.attention_layers), cfg.width, cfg.padded_vocab
    muon, adam, std = cfg.muon_lr, cfg.adam_lr, 0.5 / math.sqrt(cfg.width)

    def table(name: str, shape: tuple, ratio=1.0, decay=1.0, betas=(0.65, 0.95), algorithm=Adam, **more):
        lr = ratio * adam
        decay *= ADAM_DECAY * lr
        return Row(name, shape, algorithm, "sharded", (lr,), betas=betas, weight_decay=decay,
                   every=ADAM_EVERY, **more)

    def bank(name: str, shape: tuple, lr: tuple, **more):
        return Row(name, shape, NorMuon, "sharded", lr, betas=(0.0, 0.9), weight_decay=cfg.muon_weight_decay,
                   averaged=cfg.average > 0, **more)

    def scalars(name: str, shape: tuple, start=0.0, lr=5 * adam, betas=(0.9, 0.99), used: bool = True):
        return Row(name, shape, Adam, "replicated", (lr,), start, betas, every=ADAM_EVERY, used=used)

    head = table("head", (V, D), decay=150, betas=(0.5, 0.95), averaged=cfg.average > 0)
    if cfg.untie_at:  # short: a copy of the head up to a step (record 53), with its rate, decay, average
        untied = math.ceil(cfg.untie_at * cfg.scheduled_steps - 1e-9)
        embed = head._replace(name="embed", start=normal(0.005), copy_of="head", copy_until=untied)
    else:
        embed = table("embed", (V, D), ratio=EMBED_LR_RATIO, start=normal(1))
    values = normal(cfg.value_std) if cfg.value_std else 0.0
    pairs = bool(cfg.bigram_rows)
    return [
        embed,
        head,
        bank("attn_bank", (A, 4, D, D), (cfg.attn_lr_ratio * muon,) * 4, start=uniform(std, 4)),
        bank("mlp_bank", (L, 2, MLP_RATIO * D, D), (2 * muon, 4 * muon), start=uniform(std, 1)),
        table("value_embeds", (cfg.value_tables * V, D), ratio=EMBED_LR_RATIO, decay=5, start=values,
              betas=(0.75, 0.95), used=cfg.value_tables > 0),
        table("bigram_embed", (cfg.bigram_rows, D), ratio=EMBED_LR_RATIO, decay=5, betas=(0.75, 0.95),
              used=pairs),
        table("mtp_heads", (cfg.mtp_heads, V, D), decay=150, used=cfg.mtp_heads > 0),
        scalars("attn_gate", (A, cfg.heads, GATE_INPUTS), lr=adam),
        scalars("smear_gate", (GATE_INPUTS,), lr=0.01 * adam),
        scalars("attn_lambdas", (A, 2), (0.5, 1.0)),  # on v, on the output
        scalars("resid_lambdas", (L,), 1.1, betas=(0.9, 0.95)),
        scalars("x0_lambdas", (L,), betas=(0.65, 0.95)),  # never smoothed (record 52)
        scalars("bigram_lambdas", (L,), 0.1, betas=(0.65, 0.95), used=pairs),
        scalars("smear_lambda", ()),
        scalars("skip_lambdas", (len(cfg.skips),), -1.5, used=bool(cfg.skips)),  # before a sigmoid
        scalars("backout_lambda", (), 0.5, used=cfg.backout_from >= 0),
        scalars("smear_mtp_lambda", (), used=cfg.smear_mtp),
        scalars("pointer", (2 * POINTER_WIDTH, D), uniform(std, D), adam, used=cfg.pointer),
        scalars("pointer_gain", (), 1.0, adam, used=cfg.pointer),
        scalars("pointer_sink", (), 0.0, adam, used=cfg.pointer),
    ]

def optimizer_table(cfg):
    """The parameters of this configuration."""
    return [row for row in parameter_table(cfg) if row.used]

class Optimizer:
    """Every parameter's algorithm over one table; state is sharded over ranks.

    A step launches all reductions, updates each part as it arrives (Adam's first, to overlap the banks'
    communication) and starts each gather at once. Gradients are summed in float32 on a rank and in the
    activations' dtype across ranks. The loss is already divided by the step's tokens.
    Raises ValueError unless every parameter is in exactly one row.
    """

    def __init__(self, model, table: list[Row], world):
        parameters = dict(model.named_parameters())
        names = [row.name for row in table]
        if sorted(names) != sorted(parameters):
            wrong = set(parameters) ^ set(names) or [name for name in names if names.count(name) > 1]
            raise ValueError(f"optimizer table: missing, unknown or there twice: {wrong}")
        self.world = world
        adam_first = sorted(table, key=lambda row: issubclass(row.algorithm, NorMuon))
        self.parts = [row.algorithm(row, parameters[row.name], model, world) for row in adam_first]

    def due(self, step):
        """Parts to update at the end of `step` (0, 1, ..), and those still a copy, each with its original."""
        by_name = {part.row.name: part for part in self.parts}
        at_turn = [part for part in self.parts if (step + 1) % part.row.every == 0]
        due = [part for part in at_turn if step >= part.row.copy_until]
        return due, [(part, by_name[part.row.copy_of]) for part in at_turn if step < part.row.copy_until]

    @torch.no_grad()
    def step(self, step, lr_multiplier, momentum, report: dict):
        """Update the parameters that are due at the end of `step` and clear their gradients.

        report: numbers by name, () each, to be summed over ranks and logged. Returns the sums.
        """
        due, copies = self.due(step)
        for copy, original in copies:
            original.parameter.grad += copy.parameter.grad
            copy.parameter.grad.zero_()
        reductions = [part.reduce() for part in due]
        gathers = []
        for part, (grad, work) in zip(due, reductions):
            if work is not None:
                work.wait()
            own = part.as_units(part.parameter.data)[part.lo : part.hi]
            grad = grad.to(own.dtype)
            # A metric of grad goes into the report here, summed over ranks: a square norm, rooted in StepLog.
            part.update(own, grad, step, lr_multiplier, momentum)
            if part.row.averaged:
                part.add_average(own, step)
            gathers.append(part.gather())
            part.parameter.grad.zero_()  # in place: graphs know its address
        sums = self.world.all_reduce(torch.stack(list(report.values())))
        for finish in gathers:
            finish()
        for copy, original in copies:
            copy.parameter.copy_(original.parameter)
            for name in copy.moments.keys() & original.moments.keys():
                copy.moments[name].copy_(original.moments[name])
        return dict(zip(report, sums))

    @torch.no_grad()
    def finish(self):
        """After the last step: weights half way to their average, with their norms kept (record 92)."""
        for part in (part for part in self.parts if part.row.averaged):
            p = part.parameter.data
            norm = frobenius(p)
            own = part.as_units(p)[part.lo : part.hi]
            own.mul_(1 - AVERAGE_BLEND).add_(part.moments["average"], alpha=AVERAGE_BLEND)
            part.gather()()
            p.mul_(norm / frobenius(p).clamp_min(1e-12))

    @torch.no_grad()
    def reset(self):
        """As before the first step, with all gradients 0."""
        for part in self.parts:
            gradient(part.parameter).zero_()
            for moment in part.moments.values():
                moment.zero_()

    def state_dict(self, step):
        """Full, unsharded state after `step` steps, on the CPU, the same at every world size; collective."""
        state = {}
        for part in self.parts:
            name = f"optimizer.{part.row.name}"
            state |= {f"{name}.{kind}": part.unshard(moment) for kind, moment in part.moments.items()}
            if step % part.row.every:  # gradients of a row that is not due yet are state, too
                grad = self.world.all_reduce(part.parameter.grad)
                state[f"{name}.grad"] = grad.to("cpu", copy=True)
                if self.world.rank:
                    grad.zero_()  # from now on as after a resume: rank 0 has them all
        return state

    @torch.no_grad()
    def load_state_dict(self, tensors: dict, step):
        """Take own parts of the full state after `step` steps. Raises UserError if something is missing."""
        self.reset()
        try:
            for part in self.parts:
                name = f"optimizer.{part.row.name}"
                for kind, moment in part.moments.items():
                    moment.copy_(tensors[f"{name}.{kind}"][part.lo : part.hi])
                if step % part.row.every and self.world.rank == 0:  # summed over ranks when due
                    part.parameter.grad.copy_(tensors[f"{name}.grad"])
        except (KeyError, RuntimeError) as error:
            raise UserError(f"checkpoint of another version of this script: {error}") from None

# ---- Data -----------------------------------------------------------------------------------------------

def data_folder(cfg):
    """cfg.data as given, or else beside this file or further up, if it is there."""
    given = Path(cfg.data).expanduser()
    places = (parent / given for parent in (Path(), *Path(__file__).resolve().parents))
    return next(filter(Path.is_dir, places), given)

def load_token_table(cfg, name):
    """A table with an entry for each token that lies beside the shards, or None if there is none."""
    path = data_folder(cfg) / name
    return np.load(path) if path.exists() else None

def find_shards(cfg, split):
    """Paths of a split's shards, in order. Raises UserError if there are none."""
    folder = data_folder(cfg)
    shards = sorted(folder.glob(f"[!.]*_{split}_{'[0-9]' * 6}.bin"))
    maker = "sample.py" if folder.name == "sample" else "fineweb.py"
    require(shards, f"no {folder}/*_{split}_000000.bin: make them with python data/{maker}, or give --data=")
    return shards

def open_shard(path, cfg):
    """A checked shard's tokens, uint16 in a memory map, and its documents' starts. Raises UserError."""
    size = path.stat().st_size - 1024  # bytes behind the header
    header = np.fromfile(path, "<i4", 3).tolist()
    require(size > 0 and header == [20240520, 1, size / 2],
            f"{path}: not a complete token shard of version 1: fetch or make it again")
    tokens = np.memmap(path, "<u2", "r", offset=1024)
    require(tokens.max() < cfg.vocab_size, f"{path}: token {tokens.max()}, but the vocabulary has "
            f"{cfg.vocab_size}: damaged, or token_bytes.npy beside it is of another tokenizer")
    starts = np.flatnonzero(tokens == cfg.bos)
    require(len(starts), f"{path}: no document start, token {cfg.bos}; "
            "python data/token_tables.py FOLDER --tokenizer=.. says what the tokens are")
    return tokens, starts

class Shards:
    """A sequence of (tokens, document starts) of training shards, each opened and checked when first used."""

    def __init__(self, paths, cfg):
        self.paths, self.cfg, self.opened = paths, cfg, {}

    def __getitem__(self, i: int):
        if i not in self.opened:
            self.opened[i] = open_shard(self.paths[i], self.cfg)
        return self.opened[i]

    def sha256(self):
        """Of names, sizes and document starts of the shards opened so far: those that the schedule needs."""
        digest = hashlib.sha256()
        for i, (tokens, starts) in sorted(self.opened.items()):
            digest.update(f"{self.paths[i].name} {len(tokens)} ".encode() + starts.astype("<i8").tobytes())
        return digest.hexdigest()

    def documents(self):
        """Generates what lies before the first document, or nothing, then each document, in file order."""
        document = np.empty(0, "<u2")
        for tokens, starts in self:
            document = np.append(document, tokens[: starts[0]])  # which runs over the shard's end
            tokens = np.asarray(tokens)  # parts of a memory map are made slowly
            for lo, hi in itertools.pairwise([*starts.tolist(), len(tokens)]):
                yield document
                document = tokens[lo:hi]
        yield document

class DocumentStream:
    """Pieces of documents, epoch after epoch."""

    def __init__(self, shards, cfg):
        self.cfg = cfg
        self.documents = self.all_documents(shards)
        self.rest = ()  # of the document that was read last
        self.epoch, self.offset = 0, 0  # of the next unread token
        self.skipped = 0  # tokens of long documents
        self.sha256 = ""  # of the tokens read so far: see read_step

    def all_documents(self, shards):
        """Generates them. Raises UserError after the last epoch."""
        for epoch in range(self.cfg.epochs):
            documents = shards.documents()
            self.epoch, self.offset = epoch, len(next(documents))
            yield from documents
        keep = f"; or --document_rest=keep: {self.skipped:,} tokens of cut documents were skipped"
        raise UserError(f"{self.offset:,} training tokens don't last for {self.cfg.epochs} epochs: add "
                        f"shards, raise --epochs or lower --scheduled_steps{keep if self.skipped else ''}")

    def piece(self, limit):
        """The next one, of at most `limit` tokens."""
        document = self.rest if len(self.rest) else next(self.documents)
        piece, self.rest = document[:limit], document[limit:]
        self.offset += len(piece)
        if self.cfg.document_rest == "skip":
            self.skipped += len(self.rest)
            self.offset += len(self.rest)
            self.rest = ()
        return piece

    def pieces(self, step):
        """Those of the next micro-batch, which belongs to this step: one token more than it has inputs."""
        stage = plan_step(self.cfg, step).stage
        pieces, room = [], self.cfg.micro_tokens(stage) + 1
        while room:
            pieces.append(self.piece(min(stage.max_doc, room)))
            room -= len(pieces[-1])
        return pieces

class MicroBatch(NamedTuple):
    tokens: Tensor               # (T + 1,) int64: inputs are [:-1], targets [1:]
    docs: Documents
    columns: Tensor | None = None  # (S,) int64: see choose_columns

def pack(stream, step):
    """Tokens of a micro-batch of a step, one more than inputs, and where documents start among the inputs."""
    pieces = stream.pieces(step)
    starts = np.cumsum([0, *map(len, pieces)])
    return np.concatenate(pieces), starts[starts < starts[-1] - 1]

def read_step(stream, step):
    """What `pack` gives for each micro-batch of a step; stream.sha256 then stands for all batches so far."""
    packed = [pack(stream, step) for _ in range(stream.cfg.micro_batches)]
    digest = hashlib.sha256(stream.sha256.encode())
    for tokens, _ in packed:
        digest.update(tokens)
    stream.sha256 = digest.hexdigest()
    return packed

def to_documents(starts: np.ndarray, tokens, bound: int | None = None):
    """bound: on the documents' lengths, where it is known; a constant one lets CUDA graphs be replayed."""
    cu_seqlens = np.append(starts, tokens).astype(np.int32)
    return Documents(torch.from_numpy(cu_seqlens), bound or int(np.diff(cu_seqlens).max()))

def choose_columns(cfg, stage, targets: np.ndarray, turn, device):
    """Distinct tokens among which the loss of micro-batch `turn` chooses (record 92, PR 360): (S,) int64.

    All targets, then others from a window that walks through the padded vocabulary from turn to turn. None
    if the stage wants all tokens or there are too many targets.
    """
    V = cfg.padded_vocab
    if not 0 < stage.columns < V:
        return None
    needed = np.flatnonzero(np.bincount(targets))[::-1]
    if cfg.pointer:
        needed = np.append(cfg.vocab_size, needed)  # its slot comes first
    if len(needed) > stage.columns:
        return None
    window = np.roll(np.arange(V), -turn * COLUMN_STEP % V)
    others = np.setdiff1d(window, needed, assume_unique=True)  # in the window's order
    return pinned(np.append(needed, others[: stage.columns - len(needed)]), device)

def load_batches(stream, world, device, first=0):
    """Generates, for each step from `first` on: this rank's micro-batches, position and sha256 after them.

    Ranks take turns, but each walks the whole stream: the same micro-batches at every world size.
    """
    cfg = stream.cfg
    for step in range(first, cfg.total_steps):
        stage = plan_step(cfg, step).stage
        packed = read_step(stream, step)
        own = []
        for i in range(world.rank, cfg.micro_batches, world.size):
            tokens, starts = packed[i]
            docs = to_documents(starts, len(tokens) - 1, stage.max_doc)
            columns = choose_columns(cfg, stage, tokens[1:], step * cfg.micro_batches + i, device)
            own.append(MicroBatch(pinned(tokens.astype(np.int64), device), docs, columns))
        yield own, (stream.epoch, stream.offset), stream.sha256

def read_ahead(batches):
    """A function that returns a generator's next item, or raises its error; a thread works 3 items ahead."""
    reader = ThreadPoolExecutor(1)
    ahead = [reader.submit(next, batches) for _ in range(3)]

    def take():
        ahead.append(reader.submit(next, batches))
        return ahead.pop(0).result()

    return take

def check_supply(cfg, world, shards):
    """Open and check the shards that the schedule needs (short: 1.5 s). Raises UserError if it needs more."""
    require(cfg.micro_batches % world.size == 0,
            f"{world.size} processes don't divide --micro_batches={cfg.micro_batches}: start a divisor of it")
    stream = DocumentStream(shards, cfg)
    for step in range(cfg.total_steps):
        for _ in range(cfg.micro_batches):
            stream.pieces(step)

def begin_stream(cfg, shards, progress):
    """The stream after what a resumed run has read. Raises UserError if that is something else now."""
    stream = DocumentStream(shards, cfg)
    for step in range(progress.step):
        read_step(stream, step)
    folder = shards.paths[0].parent
    require(progress.read in ("", stream.sha256), f"{cfg.resume}: its run has read other training tokens "
            f"than those first in {folder}: give their folder as --data=, or leave --resume out")
    return stream

# ---- Schedule -------------------------------------------------------------------------------------------

class StepPlan(NamedTuple):
    """All that the schedule says of one step."""
    stage: Stage
    stage_index: int
    windows: dict                # "short", "long" -> tokens
    lr: float                    # multiplier on the table's learning rates
    momentum: float              # of NorMuon
    weights: tuple               # of the losses of targets t+1, t+2, ..

    @property
    def kind(self):
        """Steps of a kind run the same code on the same shapes."""
        return self.stage_index, len(self.weights)

def plan_step(cfg, step):
    """The schedule at `step`, 0 .. total_steps - 1; at total_steps the last stage's end, with val_windows."""
    last = step == cfg.total_steps
    starts = [math.ceil(stage.start * cfg.scheduled_steps - 1e-9) for stage in cfg.stages] + [cfg.total_steps]
    index = bisect.bisect_right(starts, step - last) - 1
    stage = cfg.stages[index]
    done = (step - starts[index]) / (starts[index + 1] - starts[index])
    weights = tuple(a + (b - a) * done for a, b in stage.targets)
    left = max(0.0, 1 - step / cfg.scheduled_steps)
    height = min(1.0, left / cfg.cooldown) if cfg.cooldown else 1.0  # the learning rate's, from 1 to 0
    lr = stage.lr * height + cfg.lr_floor * (1 - height)
    warm = step / max(cfg.momentum_warmup, 1)
    cold = (cfg.total_steps - step) / max(cfg.momentum_cooldown, 1)
    momentum = 0.85 + 0.1 * min(1.0, warm, cold)
    short, long = cfg.val_windows if last else (stage.window_short, stage.window_long)
    return StepPlan(stage, index, {"short": short, "long": long}, lr, momentum, weights)

# ---- Training step and validation -----------------------------------------------------------------------

def pinned(data, device):
    """As a tensor, pinned if bound for a GPU, so that copies don't block."""
    tensor = torch.as_tensor(data)
    return tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor

def to_device(batch, device):
    def move(x):
        return None if x is None else x.to(device, non_blocking=True)

    docs = batch.docs._replace(cu_seqlens=move(batch.docs.cu_seqlens), first_T=move(batch.docs.first_T))
    return MicroBatch(move(batch.tokens), docs, move(batch.columns))

def multi_targets(targets_T, count):
    """(T, count): column k is the target k positions further on, in whatever document; -1 past the end."""
    return torch.stack([F.pad(targets_T[k:], (0, k), value=-1) for k in range(count)], dim=1)

def loss_weights(cfg, plan, device):
    """Weights of the head's targets (K,) and of an auxiliary head (1,), over the tokens of the whole step."""
    auxiliary = MTP_WEIGHT / max(cfg.mtp_heads, 1)
    both = torch.tensor([*plan.weights, auxiliary]) / plan.stage.batch_tokens
    both = pinned(both, device).to(device, non_blocking=True)
    return both[:-1], both[-1:]

def backward_micro_batch(model, batch, plan, rotary, weights):
    """Add the gradient of this micro-batch's part of the step's mean loss; returns that part, ()."""
    cfg, tokens = model.cfg, batch.tokens
    main_weights, auxiliary_weight = weights
    # Over the weights' sum, MLPs' gradients were measured to be 1.2 at most, with an RMS of 0.0002 to 0.024.
    # float8_e5m2 holds 57344: this scale leaves a factor of 180.
    model.grad_scale.copy_(main_weights.sum() * 2.0**-8)
    x_TD = model(tokens[:-1], batch.docs, plan.windows, rotary)
    targets_TK = multi_targets(tokens[1:], max(len(plan.weights), cfg.mtp_heads + 1))
    own_TK = targets_TK[:, : len(plan.weights)]
    masses_T2 = model.copy_masses(x_TD, tokens[1:], batch.docs, POINTER_WINDOW[0])
    masses = None if masses_T2 is None else masses_T2.detach()
    latent_TD = x_TD.detach()
    loss, grad_TD, mass_grads_T2 = head_step(
        model, latent_TD, 0, own_TK, main_weights, batch.columns, masses)
    for k in range(1, cfg.mtp_heads + 1):
        further_T1 = targets_TK[:, k : k + 1]
        _, more_TD, _ = head_step(model, latent_TD, k, further_T1, auxiliary_weight, batch.columns)
        grad_TD = grad_TD + more_TD
    outputs, grads = ([x_TD], [grad_TD]) if masses is None else ([x_TD, masses_T2], [grad_TD, mass_grads_T2])
    torch.autograd.backward(outputs, grads)
    return loss

def graph_inputs(batch, weights):
    """What changes from one micro-batch to the next, in fixed shapes; None if it has too many documents."""
    tokens = len(batch.tokens) - 1
    starts = batch.docs.cu_seqlens
    room = max(64, tokens // 256)
    if len(starts) > room:
        return None
    padded = F.pad(starts, (0, room - len(starts)), value=tokens)  # with documents of no tokens
    columns = [] if batch.columns is None else [batch.columns]
    return [batch.tokens, padded, *weights, *columns]

class Graphs:
    """CUDA graphs of micro-batches, one a kind of step: launched one by one, kernels keep a GPU waiting."""

    def __init__(self):
        self.recipes, self.captured = {}, {}

    def add(self, model, batch, plan, rotary, weights):
        """Register this plan's kind of micro-batch for capture(); one must have run before."""
        inputs = [x.to("cuda", copy=True) for x in graph_inputs(batch, weights)]

        def run():
            tokens, cu_seqlens, main_weights, auxiliary_weight, *columns = inputs
            packed = MicroBatch(tokens, Documents(cu_seqlens, batch.docs.longest), *columns)
            return backward_micro_batch(model, packed, plan, rotary, (main_weights, auxiliary_weight))

        self.recipes[self.key(batch, plan)] = run, inputs

    @staticmethod
    def key(batch, plan):
        """A micro-batch without columns, in a stage that has them, finds no graph."""
        return *plan.kind, batch.columns is None

    def capture(self):
        """Record what was added, unless it is."""
        pool = torch.cuda.graph_pool_handle()  # of memory, for all: one runs at a time
        for key, (run, _) in self.recipes.items():  # the largest was added first: others fit in
            if key not in self.captured:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    output = run()
                self.captured[key] = graph, output

    def release(self):
        """Give the memory back until the next capture()."""
        self.captured.clear()
        torch.cuda.empty_cache()

    def replay(self, key, inputs: list):
        """The output for these inputs, valid until the next replay."""
        graph, output = self.captured[key]
        _, static_inputs = self.recipes[key]
        for static, given in zip(static_inputs, inputs):
            static.copy_(given, non_blocking=True)
        graph.replay()
        return output

def run_micro_batch(model, batch, plan, rotary, weights):
    """backward_micro_batch, as a graph where there is one. batch: on the CPU; it is copied here."""
    key = Graphs.key(batch, plan)
    inputs = graph_inputs(batch, weights) if model.graphs and key in model.graphs.captured else None
    if inputs is None:
        return backward_micro_batch(model, to_device(batch, model.embed.device), plan, rotary, weights)
    inputs[1] = pinned(inputs[1], model.embed.device)
    return model.graphs.replay(key, inputs)

def train_step(model, optimizer: Optimizer, batches: list, plan, rotary, step, stop=False):
    """One optimizer step over this rank's micro-batches. The one step function: warm-up and training call it.

    Returns numbers for the log, on the device, summed over ranks: the training loss "train_loss" (over the
    stage's columns), the number of ranks that were asked to "stop", and what else is added to the report.
    """
    device = model.embed.device
    weights = loss_weights(model.cfg, plan, device)
    loss = torch.zeros((), device=device)
    model.refresh()
    for batch in batches:
        loss += run_micro_batch(model, batch, plan, rotary, weights)
    report = {"train_loss": loss, "stop": torch.full_like(loss, stop)}
    return optimizer.step(step, plan.lr, plan.momentum, report)

def cut_at_bos(tokens, bos: int):
    """Successive tokens of the validation stream, a document from each BOS to the next.

    The first may begin inside a document. Other cuts: other starts for to_documents, and first_T, true there.
    """
    starts = np.append(0, np.flatnonzero(tokens[1:-1].numpy() == bos) + 1)
    return MicroBatch(tokens, to_documents(starts, len(tokens) - 1))

class Validation:
    """The fixed validation tokens, the same at every world size, cut into chunks that ranks share."""

    def __init__(self, cfg, tokens: np.ndarray, token_bytes: np.ndarray | None = None):
        self.cfg = cfg
        self.count = len(tokens) - 1
        self.tokens = torch.from_numpy(tokens.astype(np.int64))
        self.sha256 = hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest()
        self.bytes = 0 if token_bytes is None else int(token_bytes[tokens[1:]].sum())

    @classmethod
    def load(cls, cfg):
        """The first val_tokens of the validation shards. Raises UserError if there are fewer."""
        token_bytes = load_token_table(cfg, "token_bytes.npy")
        require(token_bytes is None or len(token_bytes) == cfg.vocab_size,
                f"token_bytes.npy is of another vocabulary than {cfg.vocab_size} tokens: wrong --data?")
        shards = [open_shard(path, cfg)[0] for path in find_shards(cfg, "val")]
        have = sum(map(len, shards)) - 1
        count = cfg.val_tokens or have
        require(0 < count <= have, f"--val_tokens={cfg.val_tokens}: the validation shards hold only {have}")
        tokens = np.concatenate([shard[: count + 1] for shard in shards])[: count + 1]
        return cls(cfg, tokens, token_bytes)

    @property
    def positions(self):
        """Tokens of the longest forward pass, training's included: how far the rotary tables must reach."""
        training = max(self.cfg.micro_tokens(stage) for stage in self.cfg.stages)
        return max(training, min(self.cfg.val_chunk, self.count))

    @torch.no_grad()
    def run(self, model, windows: dict, rotary, world):
        """{"val_loss": nats per token, "val_bpb": bits per byte of text, None without token_bytes.npy}."""
        device = model.embed.device
        chunks = self.tokens[:-1].split(self.cfg.val_chunk)
        totals = torch.zeros(len(chunks), dtype=torch.float64, device=device)
        model.refresh()
        for i in range(world.rank, len(chunks), world.size):
            lo = i * self.cfg.val_chunk
            chunk = self.tokens[lo : lo + len(chunks[i]) + 1]
            tokens, docs, _ = to_device(cut_at_bos(chunk, self.cfg.bos), device)
            x_TD = model(tokens[:-1], docs, windows, rotary)
            masses_T2 = model.copy_masses(x_TD, tokens[1:], docs, POINTER_WINDOW[1])
            for loss_T in model.token_losses(x_TD, tokens[1:], masses_T2, LOSS_CHUNK):
                totals[i] += loss_T.sum(dtype=torch.float64)
        nats = world.all_reduce(totals).sum().item()  # in the order of chunks, at every world size
        bpb = nats / math.log(2) / self.bytes if self.bytes else None
        return {"val_loss": nats / self.count, "val_bpb": bpb}

# ---- Checkpoint: a safetensors file, tensors and JSON only; nothing is ever unpickled

class Progress(NamedTuple):
    """How far a run is."""
    step: int = 0                # steps done
    position: tuple = (0, 0)     # epoch and offset of the next unread training token, for readers
    train_seconds: float = 0.0
    read: str = ""               # sha256 of the training tokens so far, see read_step; "": unknown
    val_sha256: str = ""         # of the validation tokens

def write_checkpoint(path, tensors: dict, meta: dict):
    """Atomic: the final name appears only when everything is on disk. meta: JSON values by name."""
    from safetensors.torch import save_file
    check_finite(tensors, path)
    folder = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.tmp")  # safetensors has drafts, too
    temporary = folder / path.name
    folder.mkdir()
    try:
        text = {name: json.dumps(value) for name, value in meta.items()}
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, temporary, text)
        temporary.chmod(folder.stat().st_mode & 0o666)  # as the umask says
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

def remove_leftovers(root):
    """Delete what processes of this machine that were killed left of checkpoints in the runs of a folder."""
    for folder in root.glob(f"*/checkpoint_*.{platform.node()}.*.tmp"):
        try:
            os.kill(int(folder.suffixes[-2][1:]), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except PermissionError:
            pass  # it lives, and is another user's

def check_finite(tensors: dict, path):
    """Raise UserError if a number of these isn't finite: neither saved nor taken from a file."""
    bad = [name for name, x in tensors.items() if not x.isfinite().all()]
    require(not bad, f"{path}: not finite: {', '.join(bad)}; take an earlier checkpoint")

def read_checkpoint(path, tensors=False):
    """Tensors, if wanted, and metadata: "config" and, but for an export, "progress". Raises UserError."""
    from safetensors import safe_open
    path = Path(path).expanduser()
    try:
        with safe_open(path, "pt") as file:
            meta = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            found = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}
        meta["config"] = config_from_json(meta["config"])
        if "progress" in meta:
            meta["progress"] = Progress(*tuples(meta["progress"]))
    except Exception as error:  # whatever the file holds
        reason = f"{type(error).__name__} {' '.join(str(error).split())[:120]}"
        raise UserError(f"{path}: not a checkpoint of this script: {reason}") from None
    check_finite(found, path)
    return found, meta

def load_weights(model, tensors: dict, path):
    """Copy weights into the model. Raises UserError unless names and shapes are exactly the model's."""
    weights = {name[6:]: x for name, x in tensors.items() if name.startswith("model.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path}: of another version of this script: {error}") from None

def save_checkpoint(folder, model, optimizer, world, progress):
    """Collective: rank 0 writes all that a run needs to go on; the folder's last ones stay.

    Returns "" or why nothing was written, on every rank: what isn't finite isn't saved.
    """
    state, failed = optimizer.state_dict(progress.step), ""
    if world.rank == 0:
        tensors = {f"model.{name}": p for name, p in model.named_parameters()} | state
        path = folder / f"checkpoint_{progress.step:06d}.safetensors"
        try:
            write_checkpoint(path, tensors, {"config": vars(model.cfg), "progress": progress})
            for old in sorted(folder.glob("checkpoint_*.safetensors"))[:-KEEP_CHECKPOINTS]:
                old.unlink()
        except Exception as error:  # a full disk is an error of safetensors' own
            failed = f"checkpoint of step {progress.step} not written: {error}"
    return world.gather_objects(failed)[0]

def log_root(cfg):
    return Path(cfg.log_folder or Path(__file__).resolve().with_name("logs")).expanduser()

def find_unfinished(cfg):
    """Last checkpoint of the newest run with this configuration that has one; "" if that run is over."""
    paths = log_root(cfg).glob("*/checkpoint_*.safetensors")
    for path in sorted(paths, reverse=True):  # a run's folder begins with its time
        try:
            meta = read_checkpoint(path)[1]
        except UserError:  # damaged: the one before may serve
            continue
        if "progress" in meta and with_run_flags(meta["config"], cfg) == cfg:
            return str(path) if meta["progress"].step < cfg.total_steps else ""
    return ""

# ---- Run: clock, log, training loop ---------------------------------------------------------------------

class Clock:
    """Training time in seconds; `log_header` says what it covers. seconds -= x leaves x idle seconds out."""

    def __init__(self, hardware, seconds):
        self.hardware, self.seconds, self.since = hardware, seconds, None

    def resume(self):
        self.hardware.synchronize()
        self.seconds, self.since = self.read(), time.perf_counter()

    def pause(self):
        """Waits for the GPU: pausing in every step would slow training."""
        self.hardware.synchronize()
        self.seconds = self.read()
        self.since = None

    def read(self):
        return self.seconds + (time.perf_counter() - self.since if self.since else 0)

class Log:
    """log.txt and metrics.jsonl in a folder of their own, and the console; silent except on rank 0."""

    def __init__(self, cfg, world):
        self.folder = None
        if world.rank:
            return
        folder = log_root(cfg) / f"{time.strftime('%Y%m%d-%H%M%S')}-{cfg.track}-seed{cfg.seed}"
        try:
            while folder.exists():  # of a run that started in the same second
                folder = folder.with_name(f"{folder.name}-1")
            folder.mkdir(parents=True)
            shutil.copy(__file__, folder / "train_gpt.py")
            remove_leftovers(log_root(cfg))
            self.text = open(folder / "log.txt", "w", buffering=1)
            self.metrics = open(folder / "metrics.jsonl", "w", buffering=1)
        except OSError as error:
            raise UserError(f"can't write {folder}: {error.strerror}; give --log_folder=") from None
        self.folder = folder

    def line(self, text, console=True):
        if self.folder:
            print(text, file=self.text)
            if console:
                print(text, flush=True)

    def metric(self, **values):
        if self.folder:
            print(json.dumps(values), file=self.metrics)

def source():
    """This file's hash and its folder's commit, for the log."""
    path = Path(__file__).resolve()
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=path.parent, capture_output=True, text=True)
    return f"source sha256:{hashlib.sha256(path.read_bytes()).hexdigest()} git:{git.stdout.strip() or 'none'}"

def machine(device):
    """Hashes of this rank's GPU and of the host's boot: times of others don't compare."""
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "none"
    boot = Path("/proc/sys/kernel/random/boot_id")
    facts = {"gpu": gpu, "boot": boot.read_text() if boot.exists() else platform.node()}
    return " ".join(f"{name}:{hashlib.sha256(x.encode()).hexdigest()[:12]}" for name, x in facts.items())

PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "RTX 3090": 71}  # bf16

def step_metrics(job, tokens, seconds):
    """Tokens per second and, on a known GPU, the share of its peak that the weights' products use."""
    rate = tokens / max(seconds, 1e-9)
    metrics = {"tokens_per_s": round(rate)}
    for name, tflops in PEAK_TFLOPS.items():
        if name in job.hardware.name:
            weights = sum(p.numel() for p in (job.model.attn_bank, job.model.mlp_bank, job.model.head))
            metrics["mfu"] = round(6 * weights * rate / job.world.size / (tflops * 1e12), 4)
    return metrics

class StepLog:
    """Lines of training steps, on a GPU one step late: a report is read while the next step runs."""

    def __init__(self, log, clock, job):
        self.log, self.clock, self.job = log, clock, job
        self.queued, self.before, self.stop = [], clock.read(), False

    def add(self, step, report: dict, plan):
        """Queue the line of `step` (1, 2, ..) and print the one before it. report: see train_step."""
        values = torch.stack(list(report.values()))
        on_host = values.to("cpu", non_blocking=True)
        event = torch.cuda.current_stream().record_event() if values.is_cuda else None
        self.flush()
        self.queued.append((step, plan, list(report), on_host, event))
        if event is None:
            self.flush()

    def flush(self):
        """Print the line that is queued. Raises UserError if its loss isn't finite."""
        if not self.queued:
            return
        step, plan, names, values, event = self.queued.pop()
        if event is not None:
            event.synchronize()
        report = dict(zip(names, values.tolist()))
        self.stop |= report.pop("stop") > 0
        loss = report.pop("train_loss") / sum(plan.weights)
        cfg, now = self.job.model.cfg, self.clock.read()
        seconds, self.before = now - self.before, now
        speed = step_metrics(self.job, plan.stage.batch_tokens, seconds)
        line = f"step:{step}/{cfg.total_steps} train_loss:{loss:.4f}"
        self.log.line(f"{line} train_time:{now * 1e3:.0f}ms step_avg:{now * 1e3 / step:.2f}ms", console=False)
        self.log.metric(step=step, train_loss=round(loss, 5), train_time=round(now, 4), lr=round(plan.lr, 5),
                        **speed, **report)  # a metric of the host goes here
        if self.log.folder and step % max(cfg.val_every // 5, 1) == 0:
            rates = [f"{name}:{value:,}" for name, value in speed.items()]
            print(line, *rates, f"eta:{now / step * (cfg.total_steps - step):.0f}s", flush=True)
        require(math.isfinite(loss), f"step {step}: the training loss is {loss}: lower the learning rates, "
                "or go on from the last checkpoint with --resume=auto")

def write_plot(folder):
    """Draw loss.png from metrics.jsonl; returns the file, or why it isn't drawn."""
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    try:
        from matplotlib.figure import Figure
        figure = Figure()
        axes = figure.subplots()
        for key in ("train_loss", "val_loss"):
            points = [(row["step"], row[key]) for row in rows if key in row]
            axes.plot(*zip(*points), label=key)
        axes.set(title=folder.name, xlabel="step", ylabel="loss (nats per token)")
        axes.legend()
        figure.savefig(folder / "loss.png")
    except (ImportError, OSError) as error:
        return f"not drawn: {error}"
    return str(folder / "loss.png")

def warm_up(model, optimizer, val, world):
    """Run, and so compile, each kind of step and a validation chunk. Changes weights and optimizer state."""
    cfg, device, generator = model.cfg, model.embed.device, np.random.default_rng(0)
    plans = [plan_step(cfg, step) for step in range(cfg.total_steps)]
    kinds = {plan.kind: plan for plan in plans}
    rotary = build_rotary(cfg, val.positions, device)
    # Those that need most memory come first; 0 columns are all.
    for plan in sorted(kinds.values(), key=lambda plan: (-plan.stage.batch_tokens, plan.stage.columns)):
        T, length = cfg.micro_tokens(plan.stage), min(512, plan.stage.max_doc)
        tokens = generator.integers(0, cfg.vocab_size, T + 1)
        tokens[::length] = cfg.bos
        docs = to_documents(np.arange(0, T, length), T, plan.stage.max_doc)
        columns = choose_columns(cfg, plan.stage, tokens[:1], 0, device)  # all targets might be too many
        batch = MicroBatch(torch.from_numpy(tokens), docs, columns)
        for step in range(cfg.total_steps, cfg.total_steps + ADAM_EVERY):  # no parameter is a copy then
            train_step(model, optimizer, [batch], plan, rotary, step)
        weights = loss_weights(cfg, plan, device)
        if model.graphs and graph_inputs(batch, weights):
            model.graphs.add(model, batch, plan, rotary, weights)
    chunk = min(cfg.val_chunk, val.count)
    synthetic = Validation(cfg, np.resize(tokens, chunk * world.size + 1))
    synthetic.run(model, plan_step(cfg, cfg.total_steps).windows, rotary, world)

def validate(job, rotary, step, clock, log):
    """Validate with the windows of `step`, or the final ones after training, and log it with the lambdas."""
    cfg, lambdas = job.model.cfg, job.model.lambdas()
    result = job.val.run(job.model, plan_step(cfg, step).windows, rotary, job.world)
    loss, seconds = result["val_loss"], clock.read()  # which may go on meanwhile
    require(math.isfinite(loss), f"step {step}: the validation loss is {loss}: lower the learning rates, "
            "or go on from the last checkpoint with --resume=auto")
    bpb = "" if result["val_bpb"] is None else f" val_bpb:{result['val_bpb']:.4f}"
    single = "".join(f" {name}:{values[0]:+.4f}" for name, values in lambdas.items() if len(values) == 1)
    log.line(f"step:{step}/{cfg.total_steps} val_loss:{loss:.4f}{bpb} "
             f"train_time:{seconds * 1e3:.0f}ms step_avg:{seconds * 1e3 / max(step, 1):.2f}ms{single}")
    log.metric(step=step, **result, train_time=round(seconds, 4), lambdas=lambdas)

def check_ranks_agree(facts: dict, world):
    """Raise UserError unless all ranks have the same facts, by name."""
    found = world.gather_objects(facts)
    for name, first in found[0].items():
        others = [rank for rank, other in enumerate(found) if other[name] != first]
        require(not others, f"{name}: ranks {others} have another than rank 0: start all with the same")

class Job(NamedTuple):
    """What the runs of a process share."""
    model: GPT
    hardware: Hardware
    world: World
    optimizer: Optimizer
    shards: Shards
    val: Validation
    progress: Progress           # of a resumed run
    tensors: dict                # of its checkpoint; empty if none is resumed
    asked: threading.Event       # by a signal, to stop after the running step

def log_header(log, job):
    """What a reader needs to judge and repeat the run. records/ parses these lines and those of the steps."""
    cfg, hardware, shards, progress = job.model.cfg, job.hardware, job.shards, job.progress
    log.line(f"{source()}\nconfig {json.dumps(vars(cfg))}", console=False)
    log.line(
        f"python:{platform.python_version()} torch:{torch.__version__} cuda:{torch.version.cuda} "
        f"world_size:{job.world.size} seed:{cfg.seed}\n"
        f"device: {hardware.device.type} ({hardware.name})\n"
        f"machine: {', '.join(sorted(set(job.world.gather_objects(machine(hardware.device)))))}\n"
        f"hardware: {str(hardware.dtype)[6:]}, compile {hardware.compile}, kernels {hardware.kernels}, "
        f"attention {hardware.attention}, float8 {hardware.fp8}, CUDA graphs {hardware.graphs}\n"
        f"data: {shards.paths[0].parent.name} shards:{len(shards.opened)} sha256:{shards.sha256()}\n"
        f"validation: tokens:{job.val.count} bytes:{job.val.bytes or 'unknown'} sha256:{job.val.sha256}\n"
        f"model: {sum(p.numel() for p in job.model.parameters()):,} parameters, "
        f"{len(cfg.layers)} x {cfg.width}, vocabulary {cfg.padded_vocab}\n"
        "timed: training steps with their data (3 steps' are read ahead, also in pauses), final averaging\n"
        "untimed: set-up, compilation, warm-up on synthetic tokens, validation, graph capture, saving"
    )
    if progress.step:
        log.line(f"resumed: {cfg.resume} at step {progress.step}; the clock goes on from "
                 f"{progress.train_seconds:.1f} s: later steps of the earlier run don't count")
        if progress.val_sha256 != job.val.sha256:
            log.line("warning: validation losses are not of the earlier run's tokens, or those are unknown")

def set_up(cfg, hardware, world):
    """Check the data, read the checkpoint of a resumed run, build and compile. Raises UserError."""
    shards = Shards(find_shards(cfg, "train"), cfg)
    check_supply(cfg, world, shards)
    val = Validation.load(cfg)
    progress, tensors = Progress(), {}
    if cfg.resume:
        tensors, meta = read_checkpoint(cfg.resume, tensors=True)
        require("progress" in meta, f"{cfg.resume}: an export, which can't be trained on: give a checkpoint")
        progress = meta["progress"]
        require(progress.step < cfg.total_steps, f"{cfg.resume}: is at step {progress.step}: nothing left")
        begin_stream(cfg, shards, progress)  # so that other tokens are refused before anything is compiled
    flags = vars(replace(cfg, data="", log_folder="", resume=""))  # paths may differ between hosts
    facts = {"train_gpt.py": source().split()[1], "checkpoint": progress, "training data": shards.sha256(),
             "validation data": val.sha256}
    check_ranks_agree(flags | facts, world)
    drawing = ThreadPoolExecutor(1).submit(draw_weights, cfg)  # takes seconds, beside the compilation
    model = new_model(cfg, hardware)
    optimizer = Optimizer(model, optimizer_table(cfg), world)
    if hardware.compile:
        warm_up(model, optimizer, val, world)
    drawing.result()
    return Job(model, hardware, world, optimizer, shards, val, progress, tensors, threading.Event())

def train(cfg, job):
    """One run, with validations and checkpoints off the clock. Returns whether a signal ended it."""
    model, optimizer, device = job.model, job.optimizer, job.hardware.device
    start, position, seconds, read, _ = job.progress
    model.cfg = cfg
    if job.tensors:
        load_weights(model, job.tensors, cfg.resume)
        optimizer.load_state_dict(job.tensors, start)
    else:
        model.initialise(draw_weights(cfg))
        optimizer.reset()
    log = Log(cfg, job.world)
    log_header(log, job)
    clock = Clock(job.hardware, seconds)
    stream = begin_stream(cfg, job.shards, job.progress)
    next_batches = read_ahead(load_batches(stream, job.world, device, start))
    steps = StepLog(log, clock, job)
    rotary = build_rotary(cfg, job.val.positions, device)
    unsaved = ""
    for step in range(start, cfg.total_steps + 1):
        last = step == cfg.total_steps
        plan = plan_step(cfg, step)
        validating = last or step % cfg.val_every == 0
        saving = cfg.save_every > 0 and step % cfg.save_every == 0
        if validating or saving or steps.stop or step == start:
            steps.flush()  # a GPU's report is read here at last
            if last:
                optimizer.finish()
            clock.pause()  # until clock.resume() below
            check_ranks_agree({"training tokens": read}, job.world)
            if model.graphs:
                model.graphs.release()  # what follows needs the memory
            saving = saving or (cfg.save_every >= 0 and (last or steps.stop))
            if saving and step > start:  # before a validation that might fail
                done = Progress(step, position, clock.read(), read, job.val.sha256)
                unsaved = save_checkpoint(log.folder, model, optimizer, job.world, done)
                log.line(unsaved or f"checkpoint of step {step} written")
            if steps.stop and not last:
                log.line(f"stopped after step {step}: a signal asked for it; --resume=auto goes on")
                break
            if validating:
                validate(job, rotary, step, clock, log)
            if model.graphs and not last:
                model.graphs.capture()
            if step == start:
                log.line(f"first step {time.time() - STARTED:.1f} s after the start of this process")
            clock.resume()
        if not last:
            batches, position, read = next_batches()  # waits only if the reader isn't ahead
            report = train_step(model, optimizer, batches, plan, rotary, step, job.asked.is_set())
            steps.add(step + 1, report, plan)
    log.line(f"training tokens: sha256:{read}\npeak memory: {torch.cuda.max_memory_allocated() >> 20} MiB")
    if log.folder:
        log.line(f"plot: {write_plot(log.folder)}\nlog: {log.folder / 'log.txt'}")
    require(not unsaved, f"{unsaved}; --resume=auto goes on from the one before")
    return steps.stop

def run(argv):
    world = World.from_environment()
    cfg = parse_config(argv, world.size)
    hardware = choose_hardware(cfg, world)
    world.meet(hardware, minutes=10)
    job = set_up(cfg, hardware, world)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: job.asked.set())
    for i in range(cfg.runs):
        if train(replace(cfg, seed=cfg.seed + i), job):
            break
    world.leave()

def main():
    try:
        run(sys.argv[1:])
    except (UserError, OSError) as error:  # as of a full disk
        print("train_gpt.py:", " ".join(str(error).split()), file=sys.stderr)  # one line, whatever was quoted
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        print(f"train_gpt.py: {str(error).split('. ')[0]}: raise --micro_batches=, which makes them smaller,",
              "or lower --val_chunk= or --bigram_ratio=", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    main()
