"""Train a GPT to a target validation loss in the least wall time, from one file.

    python train_gpt.py                                                        # tiny track: any CPU, bytes
    torchrun --standalone --nproc_per_node=1 train_gpt.py --track=sprint       # 480 steps on one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py --track=short        # 3.28 on FineWeb
    python train_gpt.py --checkpoint=FILE --sample="Once upon"                 # or --export=model.safetensors
    python train_gpt.py --checkpoint=FILE --eval=document,stride,ttt-lora      # test-time training

`./run.sh [track]` sets everything up first. Any field of `Config` is a flag: --name=value.

Shape suffixes: x_TD is (T, D).   T tokens of one packed micro-batch   D model width   H heads   E head width
    F hidden width of the MLP   V padded vocabulary   L layers   A layers with attention   K targets per token
    N matrices of a bank   R, C rows and columns of one matrix   P rotary positions   J = E/2   G gate inputs
"""

import base64
import bisect
import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import platform
import queue
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

STARTED = time.time()  # before torch is imported: that is part of the launch
# ruff: noqa: E402

from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, partial
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


# ----------------------------------------------------------------------------------------------------------
# Config


class Layer(NamedTuple):
    """One row of the per-layer table: the only place where a layer is singled out by its position."""

    window: str                  # "short", "long", or "none": a layer without attention
    value_embed: int = -1        # value-embedding table added to v; -1: none
    key_offset: bool = False     # k[t] takes its stationary dims from k[t-1]: one-layer induction
    skip_from: int = -1          # earlier layer whose output is added before this layer; -1: none


class Stage(NamedTuple):
    """One row of the stage table: in force from `start` until the next row's start, all columns together."""

    start: float                 # fraction of scheduled_steps
    batch_tokens: int            # tokens of one optimizer step, over all ranks
    max_doc: int                 # tokens; longer documents are cut
    window_short: int            # tokens a query looks back
    window_long: int
    lr: float                    # multiplier on every learning rate
    targets: tuple = ((1, 1),)   # loss weights of targets t+1, t+2, ..: each (at the stage's start, end)


class Target(NamedTuple):
    """Loss weight of one target."""

    first: float                 # at the stage's start
    last: float                  # towards its end


class Softcap(NamedTuple):
    """Logits become height * tanh((z + shift) / width); height 0: they stay as they are."""

    height: float
    shift: float = 0.0
    width: float = 1.0

    @property
    def slope(self) -> float:
        """The steepest."""
        return self.height / self.width if self.height else 1.0


@dataclass(frozen=True)
class Config:
    # what to do
    track: str = "tiny"
    check: bool = False          # only check configuration and data
    checkpoint: str = ""         # a checkpoint or export to sample from or export; no training
    resume: str = ""             # a checkpoint to continue; auto: the last one of an unfinished run like this
    sample: str = ""             # prompt of the sampled text; "" takes a default after training
    sample_tokens: int = 200
    temperature: float = 0.7
    export: str = ""             # file for the trained weights, without auxiliary heads
    save_every: int = 0          # steps between checkpoints; 0: only at the end; -1: never
    keep: int = 2                # checkpoints of this run that stay, the last ones; 0: all
    stop_after: int = 0          # stop after this many steps of the unchanged schedule; 0: run to its end
    profile: int = 0             # steps to profile, from the third on
    watchdog: float = 600.0      # seconds without progress after which a run ends and names the rank; 0: off
    seed: int = 0
    log_folder: str = ""         # "": logs/ beside this file
    # hardware: "auto" is decided once at the start and logged with its reason
    device: str = "auto"         # auto, cuda, cpu
    dtype: str = "auto"          # auto, bfloat16, float32: activations; parameters are always float32
    compile: str = "auto"        # auto, on, off
    attention: str = "auto"      # auto, fa3, fa2, reference
    kernels: str = "auto"        # auto, tma, pointer, reference: see "Kernels"
    fp8: str = "auto"            # auto, on, off: products in float8: the head's and, with fp8_mlp, the MLP's
    graphs: str = "auto"         # auto, on, off: a micro-batch is launched as one CUDA graph
    warmup: str = "auto"         # auto, on, off: untimed steps on synthetic tokens, state restored after
    deterministic: bool = False  # sums in one fixed order: the same bits again, on any number of processes
    # evaluation of a checkpoint
    eval: str = ""               # any of packed, document, stride, ttt-sgd, ttt-lora, by commas
    eval_every: int = 1          # every n-th document of the validation tokens
    eval_context: int = 2048     # tokens of a window (stride, ttt-sgd, ttt-lora) ..
    eval_stride: int = 32        # .. of which the last are scored, and learnt from by ttt-lora
    eval_batch: int = 32_768     # tokens that run at a time
    eval_slots: int = 64         # documents under way at a time
    lora_rank: int = 16
    lora_lr: float = 3e-4
    lora_beta2: float = 0.999
    lora_matrices: str = "q,k,v,o,up,down,head"  # some of these
    sgd_chunk: int = 32_768      # tokens scored before each learning
    sgd_lr: float = 0.002        # of the first chunk; falls as a cosine
    sgd_epochs: int = 1
    sgd_momentum: float = 0.9
    sgd_clip: float = 1.0        # largest norm of the gradient; 0: any
    sgd_weights: str = "all"     # or names of parameters, by commas
    # data
    data: str = ""               # folder with *_train_*.bin and *_val_*.bin; "": data/<dataset>
    dataset: str = "sample"
    tokenizer: str = "bytes"     # bytes, gpt2, or a FILE.tiktoken of mergeable ranks
    vocab_size: int = 0          # derived from the tokenizer, then padded to a multiple of 128
    document_rest: str = "skip"  # what follows a cut: skip it, or keep it as the next piece
    epochs: int = 1              # passes over the training shards, if the schedule needs them
    micro_batches: int = 8       # per optimizer step, over all ranks; finer beyond that many ranks
    val_tokens: int = 0          # from the start of the validation shards; 0: all
    val_chunk: int = 262_144     # tokens of one validation forward
    val_every: int = 100         # steps
    # schedule
    scheduled_steps: int = 100
    extension_steps: int = 0     # at the final learning rate, with the last stage's windows
    stages: tuple = ()
    cooldown: float = 0.55       # last fraction of scheduled_steps: learning rate falls linearly ...
    lr_floor: float = 0.1        # ... to this multiplier
    momentum_warmup: int = 300   # steps from momentum 0.85 to 0.95
    momentum_cooldown: int = 50  # last steps, back to 0.85
    val_window_short: int = 768  # tokens, at the final validation
    val_window_long: int = 2560
    # model
    layers: tuple = ()
    width: int = 768
    heads: int = 6
    mlp_ratio: int = 4
    attn_scale: float = 0.1      # of the first stage; YaRN raises it ...
    yarn_window: int = 1664      # ... up to this long window in tokens
    loss_chunk: int = 16_384     # tokens whose logits exist at a time
    # mechanisms
    value_embeds: bool = True
    untied_values: bool = False  # a table for each layer that reads one, drawn at std 0.01 (63, 70)
    sliding_window: bool = True
    yarn: bool = True
    key_offset: str = "table"    # table (the layers marked in the layer table), all, off
    key_offset_dims: str = "stationary"  # stationary, all
    x0_mix: bool = True
    smear: bool = True
    skip: bool = True
    backout_from: int = -1       # layer whose output is partly subtracted before the head; -1: none
    draw_output: bool = False    # O starts like Q, K and V instead of at 0 (64)
    late_attention: bool = False # attention in layers after backout_from reads that layer's output (77)
    attn_gate: bool = True
    gate_inputs: int = 12        # leading channels read by the attention and smear gates
    qk_norm: bool = True
    rotary_fraction: float = 0.5 # of the head dims that rotate; the rest are stationary
    softcap: float = 15.0        # logits become softcap * tanh((z + shift) / width); 0: off (54: 11.5, 5, 15)
    softcap_shift: float = 0.0
    softcap_width: float = 0.0   # 0: as large as softcap
    smear_mtp: bool = True
    fp8_mlp: bool = True         # forward products of the MLP in float8, in training, where fp8 is on
    multi_target: bool = False   # use the stages' target weights; off: next token only
    mtp_heads: int = 0           # auxiliary heads for t+2, t+3, ..: trained, not exported
    mtp_weight: float = 0.1      # of the mean auxiliary loss
    prefix_weight: float = 0.0   # of predicting the next token's prefix: for 1/3, falling to 0 at 2/3 (88)
    leaky_slope: float = 0.5     # MLP activation LeakyReLU(slope)^2; 0 is ReLU^2
    bigram_ratio: float = 0.0    # rows of the table of hashed token pairs over padded_vocab; 0: off (62)
    untie_at: float = 0.0        # part of scheduled_steps in which head and embedding are one (51, 53)
    cut_smear: bool = False      # these four stop where a document starts (BOS)
    cut_key_offset: bool = False
    cut_smear_mtp: bool = False
    cut_bigram: bool = False
    # optimizer: the table built from these is `optimizer_table`
    muon_lr: float = 0.023
    muon_weight_decay: float = 0.0276  # per step: lr * weight_decay, both times the schedule's multiplier
    muon_heads: int = 0          # heads of Q, and of K, that are orthogonalised together; 0: all
    adam_lr: float = 0.008
    attn_lr_ratio: float = 2.0   # learning rate of the attention matrices over muon_lr
    embed_lr_ratio: float = 75.0 # learning rate of embedding tables over adam_lr, but of embed with untie_at
    adam_weight_decay: float = 0.0  # of tables and head, times lr squared, x 5 and x 150 (50: 0.005)
    adam_every: int = 2          # steps between Adam updates; gradients add up meanwhile
    smooth_scalars: bool = False # Adam's betas for scalars and gates 0.9, 0.99, not 0.65, 0.95 (52)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // 128) * 128

    @property
    def bos(self) -> int:
        return self.vocab_size - 1

    @property
    def total_steps(self) -> int:
        return self.scheduled_steps + self.extension_steps

    @property
    def logit_cap(self) -> Softcap:
        return Softcap(self.softcap, self.softcap_shift, self.softcap_width or self.softcap or 1.0)

    @property
    def attention_layers(self) -> list[int]:
        return [i for i, layer in enumerate(self.layers) if layer.window != "none"]

    @property
    def value_layers(self) -> list[int]:
        return [i for i in self.attention_layers if self.value_embeds and self.layers[i].value_embed >= 0]

    def value_table(self, i: int) -> int:
        return self.value_layers.index(i) if self.untied_values else self.layers[i].value_embed

    @property
    def value_tables(self) -> int:
        return 1 + max(map(self.value_table, self.value_layers), default=-1)

    @property
    def skips(self) -> list[int]:
        return [i for i, layer in enumerate(self.layers) if self.skip and layer.skip_from >= 0]

    def reads_late(self, i: int) -> bool:
        return self.late_attention and 0 <= self.backout_from < i and i in self.attention_layers

    @property
    def bigram_rows(self) -> int:
        return max(2, round(self.bigram_ratio * self.padded_vocab)) if self.bigram_ratio else 0

    def offsets_keys(self, layer: Layer) -> bool:
        return {"off": False, "all": True, "table": layer.key_offset}[self.key_offset]


SHORT_LAYERS = (
    Layer("short", value_embed=1),
    Layer("short", value_embed=2),
    Layer("short"),
    Layer("long", key_offset=True),
    Layer("short"),
    Layer("short"),
    Layer("none", skip_from=3),
    Layer("short"),
    Layer("short", value_embed=0),
    Layer("short", value_embed=1),
    Layer("long", value_embed=2, key_offset=True),
)

SHORT_STAGES = (
    #     start  batch    max_doc  short  long  lr    weights of the targets t+1, t+2, t+3
    Stage(0 / 3, 131_072, 2048,    128,   384,  1.00, ((1, 1), (0.5, 0.5), (0.25, 0))),
    Stage(1 / 3, 262_144, 2048,    384,   896,  1.52, ((1, 1), (0.5, 0))),
    Stage(2 / 3, 393_216, 2048,    640,  1408,  1.73, ((1, 1),)),
    Stage(1.0,   393_216, 2048,    768,  1664,  1.00, ((1, 1),)),
)

# A quarter of the batch: so few tokens are better spent in more steps.
SPRINT_STAGES = (
    Stage(0 / 3,  32_768,  896,    128,   384,  1.00, ((1, 1), (0.5, 0.5), (0.25, 0))),
    Stage(1 / 3,  65_536, 2048,    384,   896,  1.52, ((1, 1), (0.5, 0))),
    Stage(2 / 3,  98_304, 2048,    640,  1408,  1.73, ((1, 1),)),
    Stage(1.0,    98_304, 2048,    768,  1664,  1.00, ((1, 1),)),
)

MEDIUM_LAYERS = (
    Layer("long", value_embed=0, key_offset=True),
    Layer("short", value_embed=1),
    Layer("short", value_embed=2),
    Layer("short", value_embed=3),
    Layer("long", value_embed=4, key_offset=True),
    Layer("short"),
    Layer("short"),
    Layer("short"),
    Layer("short"),
    Layer("short", skip_from=6),
    Layer("short", skip_from=4),
    Layer("long", value_embed=0, key_offset=True, skip_from=2),
    Layer("short", value_embed=1),
    Layer("short", value_embed=2),
    Layer("short", value_embed=3),
    Layer("long", value_embed=4, key_offset=True),
)

MEDIUM_STAGES = (
    Stage(0 / 12, 131_072, 4096,  128,  384, 1.00, ((1, 1), (0.5, 0.5), (0.25, 0))),
    Stage(1 / 12, 262_144, 4096,  384,  896, 1.52, ((1, 1), (0.5, 0))),
    Stage(2 / 12, 393_216, 4096,  640, 1408, 1.73),
    Stage(3 / 12, 524_288, 4096,  768, 1664, 2.00),
    Stage(4 / 12, 524_288, 4096,  896, 1920, 2.00),
    Stage(5 / 12, 524_288, 4096, 1024, 2176, 2.00),
    Stage(6 / 12, 524_288, 4096, 1152, 2432, 2.00),
    Stage(7 / 12, 524_288, 4096, 1280, 2688, 2.00),
    Stage(8 / 12, 524_288, 4096, 1408, 2944, 2.00),
)

TINY_LAYERS = (
    Layer("short", value_embed=0),
    Layer("long", value_embed=1, key_offset=True),
    Layer("short"),
    Layer("none", skip_from=1),
    Layer("long", value_embed=1, key_offset=True),
)

TINY_STAGES = (
    Stage(0 / 3, 4_096, 1024,  64, 128, 1.0, ((1, 1), (0.5, 0.5), (0.25, 0))),
    Stage(1 / 3, 4_096, 1024, 128, 256, 1.0, ((1, 1), (0.5, 0))),
    Stage(2 / 3, 4_096, 1024, 128, 384, 1.0),
)

SHORT = Config(
    track="short", dataset="fineweb10B", tokenizer="gpt2", layers=SHORT_LAYERS, stages=SHORT_STAGES,
    scheduled_steps=2070, extension_steps=40, val_tokens=10_485_760, val_every=250, backout_from=7,
)

TRACKS = {
    "tiny": Config(
        layers=TINY_LAYERS, stages=TINY_STAGES, width=128, heads=2, scheduled_steps=250, backout_from=2,
        micro_batches=2, document_rest="keep", epochs=4, loss_chunk=4096, val_chunk=16_384, val_every=50,
        val_window_short=128, val_window_long=512, attn_scale=0.15, adam_lr=0.016, attn_lr_ratio=1.0,
        momentum_warmup=100, momentum_cooldown=25, sample="The module ", eval_context=512, eval_batch=8192,
        lora_lr=0.002, sgd_chunk=2048, sgd_lr=0.1,
    ),
    "sprint": replace(
        SHORT, track="sprint", stages=SPRINT_STAGES, micro_batches=2, scheduled_steps=460, extension_steps=20,
        momentum_warmup=1200, val_tokens=2_097_152, val_every=120, lr_floor=0.15, untied_values=True,
        draw_output=True, late_attention=True, softcap=11.5, softcap_shift=5.0, softcap_width=15.0,
        prefix_weight=0.25, bigram_ratio=5.0, untie_at=2 / 3, muon_heads=2, adam_weight_decay=0.005,
        smooth_scalars=True,
    ),
    "short": SHORT,
    "medium": replace(
        SHORT, track="medium", layers=MEDIUM_LAYERS, stages=MEDIUM_STAGES, width=1024, heads=8,
        scheduled_steps=4700, backout_from=11, cooldown=0.7, val_window_short=1408, val_window_long=3456,
        muon_lr=0.015, muon_weight_decay=0.018, adam_lr=0.004, fp8_mlp=False,
    ),
}

CHOICES = dict.fromkeys(("compile", "fp8", "graphs", "warmup"), ("auto", "on", "off")) | {
    "track": tuple(TRACKS), "device": ("auto", "cuda", "cpu"), "dtype": ("auto", "bfloat16", "float32"),
    "attention": ("auto", "fa3", "fa2", "reference"), "kernels": ("auto", "tma", "pointer", "reference"),
    "document_rest": ("skip", "keep"), "key_offset": ("table", "all", "off"),
    "key_offset_dims": ("stationary", "all"),
}
# Flags that change neither the model nor its schedule: what goes with --checkpoint and --resume.
RUN_FLAGS = ("check", "checkpoint", "resume", "sample", "sample_tokens", "temperature", "seed", "export",
             "save_every", "keep", "stop_after", "profile", "log_folder", "device", "dtype", "compile",
             "attention", "kernels", "fp8", "graphs", "warmup", "deterministic", "watchdog", "data",
             "tokenizer", "eval")
# And with --checkpoint alone: what --eval does.
EVAL_FLAGS = ("val_tokens", *(f.name for f in dataclasses.fields(Config)
                              if f.name.startswith(("eval_", "lora_", "sgd_"))))
EVALUATIONS = "packed", "document", "stride", "ttt-sgd", "ttt-lora"
LORA_MATRICES = tuple(Config.lora_matrices.split(","))
MINIMUM = {"save_every": -1, "backout_from": -1} | dict.fromkeys(
    ("epochs", "micro_batches", "val_chunk", "val_every", "scheduled_steps", "width", "heads", "mlp_ratio",
     "loss_chunk", "adam_every", "sample_tokens", "gate_inputs", "eval_every", "eval_context", "eval_stride",
     "eval_batch", "eval_slots", "lora_rank", "sgd_chunk"), 1)  # every other number: 0
BOOLEANS = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}


def parse_value(name: str, kind: type, text: str):
    """`text` as a value of field `name`; raises UserError in one line if it isn't one."""
    try:
        value = BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        expected = {bool: "on or off", int: "a whole number", float: "a number"}[kind]
        raise UserError(f"--{name}={text}: expected {expected}") from None
    if name in CHOICES and value not in CHOICES[name]:
        raise UserError(f"--{name}={text}: expected one of {', '.join(CHOICES[name])}")
    if kind in (int, float) and not MINIMUM.get(name, 0) <= value < 1e12:
        raise UserError(f"--{name}={text}: expected a number from {MINIMUM.get(name, 0)} to 1e12")
    return value


def parse_config(argv: list[str]) -> Config:
    """The chosen track with --name=value overrides (`--name` alone means on).

    With --checkpoint or --resume the file's own configuration, where only RUN_FLAGS can be overridden.
    """
    overrides = parse_overrides(argv)
    track = TRACKS[overrides.get("track", "tiny")]
    if overrides.get("resume") == "auto":
        overrides["resume"] = find_unfinished(resolve_config(replace(track, **overrides)))
    saved = overrides.get("checkpoint") or overrides.get("resume")
    if not saved:
        return resolve_config(replace(track, **overrides))
    base = read_safetensors(saved, tensors=False)[1]["config"]
    for name, value in overrides.items():
        free = RUN_FLAGS + EVAL_FLAGS if overrides.get("checkpoint") else RUN_FLAGS
        if name not in free and value != getattr(base, name):
            raise UserError(f"--{name}: fixed by {saved}, where it is {getattr(base, name)}; leave it out")
    kept = {"data", "seed", "tokenizer"}
    if overrides.get("resume"):
        kept |= {"sample", "dtype", "fp8", "deterministic"}
    fresh = {name: getattr(Config, name) for name in RUN_FLAGS if name not in kept}
    if overrides.get("checkpoint") and overrides.get("resume"):
        raise UserError("--checkpoint is used without training, --resume to train on: give one of them")
    return resolve_config(replace(base, **fresh | overrides))


def flag_kinds() -> dict:
    """Name -> type of each field that is a flag."""
    return {f.name: f.type for f in dataclasses.fields(Config) if f.type in (str, int, float, bool)}


def parse_overrides(argv: list[str]) -> dict:
    fields, overrides = flag_kinds(), {}
    for arg in argv:
        name, given, text = arg.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not arg.startswith("--") or name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"did you mean --{near[0]}=..?" if near else "--help lists the flags"
            raise UserError(f"unknown argument {arg!r}: {hint}")
        if not given and fields[name] is not bool:
            raise UserError(f"{arg}: needs a value, as {arg}={fields[name].__name__}")
        overrides[name] = parse_value(name, fields[name], text if given else "on")
    return overrides


def resolve_config(cfg: Config) -> Config:
    """Fill in what follows from other fields, and refuse what doesn't fit together."""
    if not cfg.vocab_size:  # gpt2's without fetching anything
        size = 50_257 if cfg.tokenizer == "gpt2" else load_tokenizer(cfg.tokenizer).vocab_size
        cfg = replace(cfg, vocab_size=size)
    if cfg.width % cfg.heads or cfg.head_dim % 4:
        raise UserError(f"--width={cfg.width} --heads={cfg.heads}: width/heads must be a multiple of 4")
    if cfg.rotary_fraction > 1:
        raise UserError(f"--rotary_fraction={cfg.rotary_fraction}: expected 0 to 1")
    if cfg.backout_from >= len(cfg.layers):
        raise UserError(f"--backout_from={cfg.backout_from}: the model has layers 0 to {len(cfg.layers) - 1}")
    if cfg.late_attention and not any(map(cfg.reads_late, range(len(cfg.layers)))):
        raise UserError(f"--late_attention: no attention after --backout_from={cfg.backout_from}: "
                        "turn it off")
    if not cfg.attention_layers or any(layer.skip_from >= i for i, layer in enumerate(cfg.layers)):
        raise UserError("layer table: needs a layer with attention, and skips only from earlier layers")
    if any(layer.window not in ("short", "long", "none") for layer in cfg.layers):
        raise UserError("layer table: a window is short, long or none")
    if cfg.muon_heads and cfg.heads % cfg.muon_heads:
        raise UserError(f"--muon_heads={cfg.muon_heads}: must divide the {cfg.heads} heads")
    if not cfg.stages or cfg.stages[0].start != 0:
        raise UserError("stage table: the first stage must start at 0")
    if any(min(stage.batch_tokens, stage.max_doc) < 1 or not stage.targets for stage in cfg.stages):
        raise UserError("stage table: batch_tokens and max_doc must be 1 or more, and targets one or more")
    if cfg.gate_inputs > cfg.width:
        raise UserError(f"--gate_inputs={cfg.gate_inputs}: at most the width, {cfg.width}")
    if cfg.eval:
        check_evaluation(cfg)
    return cfg


def check_evaluation(cfg: Config):
    """Raise UserError if --eval can't be done as its flags say."""
    if not cfg.checkpoint:
        raise UserError(f"--eval={cfg.eval}: needs a model, --checkpoint=FILE")
    if cfg.sample or cfg.export:
        raise UserError("--eval: without --sample and --export, which are for a command of their own")
    weights = ["all"] if cfg.sgd_weights == "all" else [row.name for row in optimizer_table(cfg)]
    for flag, known in (("eval", EVALUATIONS), ("lora_matrices", LORA_MATRICES), ("sgd_weights", weights)):
        given = getattr(cfg, flag).split(",")
        if len(set(given) & set(known)) < len(given):  # one is unknown, or there twice
            raise UserError(f"--{flag}={getattr(cfg, flag)}: expected some of {','.join(known)}")
    if cfg.eval_stride > cfg.eval_context:
        raise UserError(f"--eval_stride={cfg.eval_stride}: at most --eval_context={cfg.eval_context}")
    if cfg.lora_beta2 >= 1 or cfg.sgd_momentum >= 1:
        raise UserError(f"--lora_beta2={cfg.lora_beta2} --sgd_momentum={cfg.sgd_momentum}: must be below 1")


def config_to_json(cfg: Config) -> dict:
    return vars(cfg) | {name: [row._asdict() for row in getattr(cfg, name)] for name in ("layers", "stages")}


def config_from_json(values: dict) -> Config:
    """Inverse of config_to_json. Raises KeyError, TypeError, ValueError or UserError on anything else."""
    layers = tuple(Layer(**row) for row in values["layers"])
    stages = tuple(Stage(**row | {"targets": tuple(map(tuple, row["targets"]))}) for row in values["stages"])
    for row in (*layers, *stages, *(Target(*pair) for stage in stages for pair in stage.targets)):
        for value, kind in zip(row, row.__annotations__.values()):
            if not isinstance(value, (int, float) if kind is float else kind):
                raise TypeError(f"{value!r} in {row}")
    cfg = Config(**values | {"layers": layers, "stages": stages})
    for name, kind in flag_kinds().items():
        value = getattr(cfg, name)
        if parse_value(name, kind, str(value)) != value:
            raise TypeError(f"{name} {value!r}")
    return cfg


# ----------------------------------------------------------------------------------------------------------
# Hardware


# torch 2.13 renamed these two and warns about the old names.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class World(NamedTuple):
    """This process among its peers. At size 1 every collective is the identity: the same path everywhere."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's tensor: (size, *x.shape)."""
        if self.size == 1:
            return x[None]
        out = x.new_empty(self.size, *x.shape)
        all_gather(out.view(-1), x.contiguous().view(-1))
        return out

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    def leave(self):
        """Wait for the others, then end the exchange with them."""
        self.barrier()
        if self.size > 1:
            dist.destroy_process_group()


class Hardware(NamedTuple):
    device: torch.device
    dtype: torch.dtype           # of activations
    compile: bool
    attention: str               # "fa3", "fa2" (FlashAttention, the latter inside torch) or "reference"
    kernels: str                 # "tma", "pointer" or "reference": see "Kernels"
    fp8: bool                    # products in float8
    graphs: bool                 # training micro-batches as CUDA graphs
    warmup: bool
    reasons: dict                # decision -> why, for the log

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def choose_hardware(cfg: Config, world: World) -> Hardware:
    """Every decision on hardware, made once. Raises UserError if a forced one can't be had."""
    cuda = torch.cuda.is_available() if cfg.device == "auto" else cfg.device == "cuda"
    if cuda and (found := torch.cuda.device_count()) <= world.local_rank:
        raise UserError(f"process {world.local_rank + 1} has no GPU, {found} found: one process per GPU")
    device = torch.device("cuda", world.local_rank) if cuda else torch.device("cpu")
    capability = torch.cuda.get_device_capability(device) if cuda else (0, 0)
    bfloat16 = capability >= (8, 0) if cfg.dtype == "auto" else cfg.dtype == "bfloat16"
    modern = capability >= (8, 0) and bfloat16
    flash, triton_runs = modern and "window_size" in varlen_parameters(), modern and triton is not None
    fa3 = flash and capability[0] == 9 and importlib.util.find_spec("flash_attn_interface") is not None
    sizes = cfg.width, cfg.loss_chunk, *(micro_tokens(cfg, world, stage) for stage in cfg.stages)
    options = {  # the best first: (option, whether it can be had, what it needs); the last choice always can
        "compile": [("on", cuda or cfg.compile == "on", "a GPU")],
        "attention": [("fa3", fa3, "a Hopper GPU and the package flash_attn_interface"),
                      ("fa2", flash, "compute capability 8.0, bfloat16 and torch 2.11 or newer")],
        "kernels": [("tma", triton_runs and capability[0] == 9, "a Hopper GPU, Triton and bfloat16"),
                    ("pointer", triton_runs, "compute capability 8.0, Triton and bfloat16")],
        "fp8": [("on", modern and capability >= (8, 9) and not any(size % 16 for size in sizes),
                 "compute capability 8.9, bfloat16, and widths and micro-batches that are multiples of 16")],
        "graphs": [("on", cuda and flash and cfg.attention != "reference" and not cfg.deterministic,
                    "a GPU and FlashAttention, and --deterministic off")],
    }
    chosen, reasons = {}, {"device": torch.cuda.get_device_name(device) if cuda else "no GPU found",
                           "dtype": "tensor cores with bfloat16" if modern else "no fast bfloat16"}
    for name, ranked in options.items():
        option, reasons[name] = choose(name, getattr(cfg, name), ranked)
        chosen[name] = BOOLEANS.get(option, option)
    if chosen["attention"] == "fa3":  # what torch's variable-length attention is to run, or else its own 2
        torch.nn.attention.activate_flash_attention_impl("FA3")
    elif flash and torch.nn.attention.current_flash_attention_impl():
        torch.nn.attention.restore_flash_attention_impl()
    chosen["warmup"] = chosen["compile"] if cfg.warmup == "auto" else cfg.warmup == "on"
    reasons["warmup"] = "compiled code" if chosen["compile"] else "nothing to compile"
    if chosen["graphs"] and not chosen["warmup"]:
        if cfg.graphs == "on":
            raise UserError("--graphs=on: needs --warmup=on, which records them")
        chosen["graphs"], reasons["graphs"] = False, "on needs --warmup=on"
    reasons |= {name: "forced" for name in ("dtype", "warmup") if getattr(cfg, name) != "auto"}
    return Hardware(device, torch.bfloat16 if bfloat16 else torch.float32, **chosen, reasons=reasons)


def choose(name: str, wanted: str, ranked: list) -> tuple[str, str]:
    """The wanted option, for "auto" the first that can be had, and why. Raises UserError if it can't be."""
    for option, can, needs in ranked:
        if option == wanted and not can:
            raise UserError(f"--{name}={option}: needs {needs}")
    if wanted != "auto":
        return wanted, "forced"
    best = next((option for option, can, _ in ranked if can), CHOICES[name][-1])
    return best, "the fastest" if best == ranked[0][0] else f"{ranked[0][0]} needs {ranked[0][2]}"


def make_deterministic(hardware: Hardware):
    """The same bits in every run of the same operations. Before anything runs on a GPU."""
    if hardware.device.type == "cpu":
        torch.set_num_threads(1)  # sums are split among threads
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch._inductor.config.deterministic = True  # nothing is chosen by its speed


@cache
def varlen_parameters() -> tuple:
    """What this torch's varlen_attn takes; nothing if it has no such function."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return ()
    return tuple(inspect.signature(varlen_attn).parameters)


# ----------------------------------------------------------------------------------------------------------
# Kernels. Each wrapper takes a mode: "reference" is plain torch, anything else the kernel. Only the MLP's has
# two: "tma" moves tiles with Hopper's copy engine, "pointer" with ordinary loads, on any GPU of Triton's.


jit, constexpr = (triton.jit, tl.constexpr) if triton else (lambda function: function, None)


@jit
def load_tile(x, row, column, rows, columns, ROWS: constexpr, COLUMNS: constexpr,
              TMA: constexpr):
    """Tile of a row-major matrix, zero outside of it. x: its tensor descriptor (TMA) or pointer."""
    if TMA:
        tile = x.load([row, column])
    else:
        r, c = row + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None]
        tile = tl.load(x + r.to(tl.int64) * columns + c, (r < rows) & (c < columns), other=0.0)
    return tile


@jit
def store_tile(x, tile, row, column, rows, columns, ROWS: constexpr, COLUMNS: constexpr,
               TMA: constexpr):
    if TMA:
        x.store([row, column], tile)
    else:
        r, c = row + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None]
        tl.store(x + r.to(tl.int64) * columns + c, tile, (r < rows) & (c < columns))


@jit
def mlp_kernel(a, b, aux, out, square, scale, M, N, K, SLOPE: constexpr, BACKWARD: constexpr,
               DTYPE: constexpr, FLOAT8: constexpr, TMA: constexpr, M_TILE: constexpr, N_TILE: constexpr,
               K_TILE: constexpr, PROGRAMS: constexpr):
    """u = a b^T, tile by tile. Forward: r = LeakyReLU(u). Backward: r from aux, out = u * 2 LeakyReLU(r).

    FLOAT8: a and b are, their product is multiplied by `scale`, and the square is float8, too.
    """
    HALF: constexpr = N_TILE // 2
    n_tiles = tl.cdiv(N, N_TILE)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, M_TILE) * n_tiles, PROGRAMS, flatten=True):
        m, n = tile // n_tiles * M_TILE, tile % n_tiles * N_TILE
        acc = tl.zeros((M_TILE, N_TILE), tl.float32)
        for k in range(tl.cdiv(K, K_TILE)):
            x = load_tile(a, m, k * K_TILE, M, K, M_TILE, K_TILE, TMA)
            y = load_tile(b, n, k * K_TILE, N, K, N_TILE, K_TILE, TMA)
            acc = tl.dot(x, y.T, acc, input_precision="ieee")
        left, right = acc.reshape(M_TILE, 2, HALF).permute(0, 2, 1).split()  # halves need half the registers
        for half in tl.static_range(2):
            u = left if half == 0 else right
            if BACKWARD:
                r = load_tile(aux, m, n + half * HALF, M, N, M_TILE, HALF, TMA).to(tl.float32)
                u = 2 * u * tl.where(r > 0, r, SLOPE * r)
            else:
                if FLOAT8:
                    u *= tl.load(scale)
                u = tl.where(u > 0, u, SLOPE * u)
                r = u.to(DTYPE).to(tl.float32)
            store_tile(out, u.to(DTYPE), m, n + half * HALF, M, N, M_TILE, HALF, TMA)
            if FLOAT8:
                post = tl.minimum(r * r, 448.0).to(tl.float8e4nv)
            else:
                post = (r * r).to(DTYPE)
            store_tile(square, post, m, n + half * HALF, M, N, M_TILE, HALF, TMA)


class Tiles(NamedTuple):
    """A frozen configuration of mlp_kernel; benchmarks/kernels.py --tune looks for better ones."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


MLP_TILES = {("tma", False): Tiles(128, 256, 64, 8, 4), ("tma", True): Tiles(128, 256, 64, 8, 3),
             ("pointer", False): Tiles(128, 128, 32, 8, 4), ("pointer", True): Tiles(128, 128, 32, 8, 4)}


def launch_mlp_kernel(a_MK, b_NK, aux_MN, slope: float, mode: str, tiles: Tiles | None = None, scale=None):
    (M, K), N, float8, backward = a_MK.shape, b_NK.size(0), scale is not None, aux_MN is not None
    dtype = torch.bfloat16 if float8 else a_MK.dtype
    out = torch.empty(M, N, dtype=dtype, device=a_MK.device)
    square = torch.empty(M, N, dtype=a_MK.dtype, device=a_MK.device)
    a_MK, b_NK = a_MK.contiguous(), b_NK.contiguous()
    if mode == "tma" and (K * a_MK.element_size() % 16 or N * a_MK.element_size() % 16):
        mode = "pointer"  # the copy engine wants rows of whole 16 bytes
    tiles = tiles or MLP_TILES[mode, backward]
    k_tile = 2 * tiles.k if float8 else tiles.k  # the same bytes
    operands = a_MK, b_NK, aux_MN if backward else out, out, square
    if mode == "tma":
        blocks = (tiles.m, k_tile), (tiles.n, k_tile), *[(tiles.m, tiles.n // 2)] * 3
        operands = [TensorDescriptor.from_tensor(x, list(block)) for x, block in zip(operands, blocks)]
    count = triton.cdiv(M, tiles.m) * triton.cdiv(N, tiles.n)
    cuda = a_MK.is_cuda
    programs = min(count, torch.cuda.get_device_properties(a_MK.device).multi_processor_count if cuda else 4)
    mlp_kernel[programs,](*operands, scale, M, N, K, slope, backward, getattr(tl, str(dtype)[6:]), float8,
                          mode == "tma", tiles.m, tiles.n, k_tile, programs, num_warps=tiles.warps,
                          num_stages=tiles.stages - float8)
    return out, square


def mlp_forward(h_TD, up_FD, slope: float, mode: str = "reference", scale: Tensor | None = None):
    """r = LeakyReLU(h up^T) and r^2, both (T, F) in the dtype of h. r alone serves backward at any slope.

    With a scale, (), h and up are float8_e4m3fn, their product is multiplied by it, r is bfloat16 and r^2,
    cut off at 448, float8_e4m3fn.
    """
    if mode != "reference":
        return launch_mlp_kernel(h_TD, up_FD, None, slope, mode, scale=scale)
    if scale is not None:
        r_TF = F.leaky_relu(h_TD.float() @ up_FD.float().T * scale, slope).bfloat16()
        return r_TF, r_TF.float().square().clamp_max(448).to(h_TD.dtype)
    r_TF = F.leaky_relu(h_TD @ up_FD.T, slope)
    return r_TF, r_TF * r_TF


def mlp_backward(grad_TD, down_FD, r_TF, slope: float, mode: str = "reference") -> tuple[Tensor, Tensor]:
    """Gradient of the activation's input, grad down^T * 2 LeakyReLU(r), and r^2 again: both (T, F)."""
    if mode != "reference":
        return launch_mlp_kernel(grad_TD, down_FD, r_TF, slope, mode)
    return grad_TD @ down_FD.T * F.leaky_relu(r_TF, slope).mul_(2), r_TF * r_TF


@jit
def soft_tanh(x, APPROXIMATE: constexpr):
    """tanh in one instruction, to 2^-11, finer than bfloat16; or exactly, for checks."""
    if APPROXIMATE:
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        y = 1 - 2 / (1 + tl.exp(2 * x))
    return y


@jit
def cross_entropy_kernel(logits, targets, weights, scale, loss, grad, V, K: constexpr, SOFTCAP: constexpr,
                         SHIFT: constexpr, WIDTH: constexpr, APPROXIMATE: constexpr, BLOCK: constexpr):
    """One row: loss, and the gradient divided by `scale`, written in grad's own dtype."""
    LOG2E: constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    top, total = tl.full((BLOCK,), -1e30, tl.float32), tl.zeros((BLOCK,), tl.float32)  # column by column
    for first in range(0, V, BLOCK):
        inside = first + columns < V
        q = tl.load(logits + row * V + first + columns, inside, other=-float("inf"),
                    eviction_policy="evict_last").to(tl.float32)
        if SOFTCAP > 0:  # bounded, so its maximum needn't be known
            t = soft_tanh(q * (1 / WIDTH) + SHIFT / WIDTH, APPROXIMATE)
            total += tl.where(inside, tl.exp2((t - 1) * (SOFTCAP * LOG2E)), 0.0)
        else:
            higher = tl.maximum(top, q)
            total = total * tl.exp2((top - higher) * LOG2E) + tl.exp2((q - higher) * LOG2E)
            top = higher
    highest = tl.max(top) if SOFTCAP == 0 else SOFTCAP
    if SOFTCAP == 0:
        total *= tl.exp2((top - highest) * LOG2E)
    lse = tl.log(tl.sum(total)) + highest
    weight_sum, value = 0.0, 0.0
    for k in tl.static_range(K):
        target = tl.load(targets + row * K + k)
        weight = tl.where(target >= 0, tl.load(weights + k), 0.0)
        picked = tl.load(logits + row * V + tl.maximum(target, 0)).to(tl.float32)
        if SOFTCAP > 0:
            picked = SOFTCAP * soft_tanh(picked * (1 / WIDTH) + SHIFT / WIDTH, APPROXIMATE)
        value += weight * (lse - picked)
        weight_sum += weight
    tl.store(loss + row, value)
    inverse = (SOFTCAP / WIDTH if SOFTCAP > 0 else 1.0) / tl.load(scale)  # the softcap's steepest slope
    offset = (tl.log(weight_sum * inverse) - lse) * LOG2E  # weights and scale go into the exponent
    for first in range(0, V, BLOCK):
        inside = first + columns < V
        z = tl.load(logits + row * V + first + columns, inside, other=0.0,
                    eviction_policy="evict_first").to(tl.float32)
        if SOFTCAP > 0:
            t = soft_tanh(z * (1 / WIDTH) + SHIFT / WIDTH, APPROXIMATE)
            g = tl.exp2(t * (SOFTCAP * LOG2E) + offset)
        else:
            g = tl.exp2(z * LOG2E + offset)
        for k in tl.static_range(K):
            at = tl.load(targets + row * K + k) - first
            if (at >= 0) & (at < BLOCK):
                g -= tl.where(columns == at, tl.load(weights + k) * inverse, 0.0)
        if SOFTCAP > 0:
            g *= 1 - t * t
        tl.store(grad + row * V + first + columns, g.to(grad.dtype.element_ty), inside)


def cross_entropy_region(logits_TV, targets_TK, weights_K, softcap: Softcap, scale, dtype):
    """cross_entropy in plain torch, compiled as a region where there is a GPU without Triton."""
    z = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    t = torch.tanh((z + softcap.shift) / softcap.width) if softcap.height else None
    q = softcap.height * t if softcap.height else z
    lse, at = q.logsumexp(1, keepdim=True), targets_TK.clamp_min(0)
    weights_TK = weights_K * (targets_TK >= 0)
    grad = weights_TK.sum(1, keepdim=True) * (q - lse).exp()
    grad = grad.scatter_add(1, at, -weights_TK.to(grad.dtype))
    grad = grad * softcap.slope * (1 - t * t) if softcap.height else grad
    return (weights_TK * (lse - q.gather(1, at))).sum(1), (grad / scale).to(dtype)


def cross_entropy(logits_TV, targets_TK, weights_K, softcap: Softcap, scale, dtype=None, mode="reference",
                  reference=cross_entropy_region):
    """Soft-capped cross entropy, sum over k of weights[k] * loss with target k (none where it is -1).

    Returns the loss of each row (T,) float32 and its gradient by the logits (T, V), divided by `scale`, (),
    in `dtype` (None: the logits'). The kernel never writes float32 logits.
    """
    dtype = dtype or logits_TV.dtype
    if mode == "reference":
        return reference(logits_TV, targets_TK, weights_K, softcap, scale, dtype)
    (T, V), K = logits_TV.shape, targets_TK.size(1)
    loss_T = torch.empty(T, device=logits_TV.device)
    grad_TV = torch.empty(T, V, dtype=dtype, device=logits_TV.device)
    inputs = (x.contiguous() for x in (logits_TV, targets_TK, weights_K))
    cross_entropy_kernel[T,](*inputs, scale, loss_T, grad_TV, V, K, *map(float, softcap),
                             logits_TV.is_cuda, 4096, num_warps=16)
    return loss_T, grad_TV


@jit
def transpose_kernel(x, out, R, C, ROWS: constexpr, COLUMNS: constexpr):
    r, c = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1).to(tl.int64) * COLUMNS
    tile = load_tile(x, r, c, R, C, ROWS, COLUMNS, False)
    store_tile(out, tile.T, c, r, C, R, COLUMNS, ROWS, False)


def transpose(x_RC: Tensor, mode: str = "reference") -> Tensor:
    """Contiguous (C, R) of 8-bit elements, several times as fast as torch's copy."""
    if mode == "reference":
        return x_RC.T.contiguous()
    (R, C), out = x_RC.shape, x_RC.new_empty(x_RC.T.shape)
    grid = triton.cdiv(R, 128), triton.cdiv(C, 128)
    transpose_kernel[grid](*(x.contiguous().view(torch.uint8) for x in (x_RC, out)), R, C, 128, 128,
                           num_warps=8)
    return out


@jit
def polynomial_kernel(x, out, a, b, c, R: constexpr, TILE: constexpr, K_TILE: constexpr):
    """Tile (i, j), i <= j, of a I + b X + c X X for a symmetric X, stored with its mirror image."""
    i, j = tl.program_id(0), 0
    while i > j:  # column j of the triangle has j + 1 tiles
        j += 1
        i -= j
    matrix = tl.program_id(1).to(tl.int64) * R * R
    x, out = x + matrix, out + matrix
    acc = tl.zeros((TILE, TILE), tl.float32)
    for k in range(0, R, K_TILE):
        left = load_tile(x, i * TILE, k, R, R, TILE, K_TILE, False)
        right = load_tile(x, j * TILE, k, R, R, TILE, K_TILE, False)
        acc = tl.dot(left, right.T, acc, input_precision="ieee")
    rows, columns = i * TILE + tl.arange(0, TILE)[:, None], j * TILE + tl.arange(0, TILE)[None]
    acc = c * acc + b * load_tile(x, i * TILE, j * TILE, R, R, TILE, TILE, False).to(tl.float32)
    y = (acc + tl.where(rows == columns, a, 0.0)).to(out.dtype.element_ty)
    store_tile(out, y, i * TILE, j * TILE, R, R, TILE, TILE, False)
    if i < j:
        store_tile(out, y.T, j * TILE, i * TILE, R, R, TILE, TILE, False)


def polynomial(x_NRR: Tensor, a: float, b: float, c: float, mode: str = "reference") -> Tensor:
    """a I + b X + c X X of each symmetric matrix: dense (N, R, R) in the dtype of x."""
    if mode == "reference":
        out_NRR = torch.baddbmm(x_NRR, x_NRR, x_NRR, beta=b, alpha=c)
        out_NRR.diagonal(dim1=-2, dim2=-1).add_(a)
        return out_NRR
    (N, R, _), out_NRR = x_NRR.shape, torch.empty_like(x_NRR, memory_format=torch.contiguous_format)
    tiles = triton.cdiv(R, 128)
    polynomial_kernel[tiles * (tiles + 1) // 2, N](x_NRR.contiguous(), out_NRR, a, b, c, R, 128,
                                                   128 // x_NRR.element_size(), num_warps=4, num_stages=3)
    return out_NRR


# ----------------------------------------------------------------------------------------------------------
# Model


class Documents(NamedTuple):
    """Where the documents of a packed micro-batch begin; attention never leaves a document."""

    cu_seqlens: Tensor           # (documents + 1,) int32: 0, starts of the others, T
    longest: int                 # tokens
    first_T: Tensor | None = None  # (T,) bool: where nothing at all crosses; None: cfg.cut_*, at BOS


EPS = 1e-6


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension, without a weight."""
    return F.rms_norm(x, (x.size(-1),), eps=EPS)


def shift(x: Tensor, starts_T: Tensor | None = None) -> Tensor:
    """x[t-1] at position t; zero at t = 0 and, if `starts_T` is given, where a document starts."""
    previous = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    if starts_T is None:
        return previous
    return previous.masked_fill(starts_T.view(-1, *[1] * (x.dim() - 1)), 0)


def rotate(x_THE: Tensor, cos_TJ: Tensor, sin_TJ: Tensor) -> Tensor:
    """Rotary embedding, pairs (j, j + E/2), J = E/2."""
    a, b = x_THE.float().chunk(2, dim=-1)
    cos, sin = cos_TJ[:, None], sin_TJ[:, None]
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).type_as(x_THE)


def offset_keys(k_THE: Tensor, dims: Tensor, starts_T: Tensor | None) -> Tensor:
    """Partial key offset (record 49): k[t] with the marked dims taken from k[t-1]; t = 0 keeps its own.

    dims: (E,) bool. starts_T: (T,) bool, positions that keep their own key too, or None to cross documents.
    """
    take = dims.expand(k_THE.size(0), -1)[:, None].clone()
    take[0] = False
    if starts_T is not None:
        take = take & ~starts_T[:, None, None]
    return torch.where(take, shift(k_THE), k_THE)


def gradient(p: nn.Parameter) -> Tensor:
    """The parameter's gradient, float32, which products and look-ups add to in place."""
    if p.grad is None:
        p.grad = torch.zeros_like(p)
    return p.grad


def add_product(grad_RC: Tensor, a_TR: Tensor, b_TC: Tensor):
    """grad += a^T b, summed in the precision of grad."""
    if a_TR.is_cuda and a_TR.dtype != grad_RC.dtype:
        torch.ops.aten.addmm.dtype_out(grad_RC, a_TR.T, b_TC, grad_RC.dtype, out=grad_RC)
    else:
        grad_RC.addmm_(a_TR.T.to(grad_RC.dtype), b_TC.to(grad_RC.dtype))


class Lookup(torch.autograd.Function):
    """Rows of a table in `dtype`: (T, D). Their gradients are added to the table's, which stays dense."""

    @staticmethod
    def forward(ctx, tokens_T: Tensor, table_VD: nn.Parameter, dtype: torch.dtype, regions: dict) -> Tensor:
        ctx.table, ctx.regions = table_VD, regions
        ctx.save_for_backward(tokens_T)
        return regions["rows_region"](tokens_T, table_VD, dtype)

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        ctx.regions["add_rows_region"](gradient(ctx.table), *ctx.saved_tensors, grad_TD)
        return None, None, None, None


class Linear(torch.autograd.Function):
    """x_TC @ weight_RC.T. The weight's gradient is added to grad_RC, if given, by its own product."""

    @staticmethod
    def forward(ctx, x_TC: Tensor, weight_RC: Tensor, grad_RC: Tensor) -> Tensor:
        ctx.grad_RC = grad_RC
        ctx.save_for_backward(x_TC, weight_RC)
        return x_TC @ weight_RC.T

    @staticmethod
    def backward(ctx, grad_TR: Tensor):
        x_TC, weight_RC = ctx.saved_tensors
        if ctx.grad_RC is not None:
            add_product(ctx.grad_RC, grad_TR, x_TC)
        return grad_TR @ weight_RC, None, None


def split_attention(x_4DD: Tensor | None) -> tuple:
    """Q, K and V as one matrix, (3 D, D), and O, (D, D); of a layer's weights or gradients, if there are."""
    return (None, None) if x_4DD is None else (x_4DD[:3].flatten(0, 1), x_4DD[3])


class Mixing(torch.autograd.Function):
    """Sum of the streams that a layer's residual stream is made of, (T, D), each times its weight, ().

    Streams and weights may be None: there is no such stream, or it counts as it is. Returns the sum, the same
    normed and its leading channels (unless `gate_inputs` is None), and x0 and bigrams as they are, for the
    next layer to read: the gradients of all later layers then arrive here as one, and the kernel that
    computes this layer's adds them up.
    """

    @staticmethod
    def forward(ctx, x_TD, skip_TD, x0_TD, bigram_TD, *rest):
        streams, (*weights, gate_inputs, ctx.regions) = (x_TD, skip_TD, x0_TD, bigram_TD), rest
        sum_TD, h_TD, scale_T1, lead_TG = ctx.regions["mix_region"](*streams, tuple(weights), gate_inputs)
        ctx.save_for_backward(*streams, h_TD, scale_T1, *weights)
        ctx.set_materialize_grads(False)
        return sum_TD, h_TD, lead_TG, x0_TD, bigram_TD

    @staticmethod
    def backward(ctx, *grads):
        saved, weights = ctx.saved_tensors[:-4], ctx.saved_tensors[-4:]
        return *ctx.regions["mix_backward_region"](*saved, *grads, weights), None, None


class Branch(torch.autograd.Function):
    """x + o, the same normed, and that as float8 over `scale8`, if given: one kernel.

    Backward keeps the normed sum and its scale; the sum itself may be changed in place.
    """

    @staticmethod
    def forward(ctx, x_TD: Tensor, o_TD: Tensor, scale8: Tensor | None, regions: dict):
        ctx.regions = regions
        sum_TD, h_TD, scale_T1, h8_TD = regions["branch_region"](x_TD, o_TD, scale8)
        ctx.save_for_backward(h_TD, scale_T1)
        ctx.set_materialize_grads(False)
        if h8_TD is not None:
            ctx.mark_non_differentiable(h8_TD)
        return sum_TD, h_TD, h8_TD

    @staticmethod
    def backward(ctx, grad_TD: Tensor, h_grad_TD: Tensor, _):
        grad_TD = ctx.regions["branch_backward_region"](*ctx.saved_tensors, grad_TD, h_grad_TD)
        return grad_TD, grad_TD, None, None


class Float8MLP(NamedTuple):
    """What the forward products of one MLP read in float8, each with its scale, ()."""

    up_FD: Tensor
    up_scale: Tensor
    down_DF: Tensor
    down_scale: Tensor
    h_TD: Tensor | None = None
    h_scale: Tensor | None = None


class MLP(torch.autograd.Function):
    """x += LeakyReLU(slope)(h @ up.T)^2 @ down: (T, D). Backward needs only h and r."""

    @staticmethod
    def forward(ctx, x_TD, h_TD, weight_2FD, grad_2FD, eight: Float8MLP | None, slope: float, kernels: str):
        ctx.grad_2FD, ctx.slope, ctx.kernels = grad_2FD, slope, kernels
        if eight is None:
            r_TF, hidden_TF = mlp_forward(h_TD, weight_2FD[0], slope, kernels)
            x_TD.addmm_(hidden_TF, weight_2FD[1])
        else:
            scale = eight.h_scale * eight.up_scale
            r_TF, hidden_TF = mlp_forward(eight.h_TD, eight.up_FD, slope, kernels, scale)
            down = hidden_TF, eight.down_DF.T, torch.ones_like(scale), eight.down_scale
            x_TD += float8_product(*down, x_TD.dtype)
        ctx.save_for_backward(h_TD, weight_2FD, r_TF)
        ctx.mark_dirty(x_TD)
        return x_TD

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        h_TD, (up_FD, down_FD), r_TF = ctx.saved_tensors
        before_TF, hidden_TF = mlp_backward(grad_TD, down_FD, r_TF, ctx.slope, ctx.kernels)
        add_product(ctx.grad_2FD[1], hidden_TF, grad_TD)
        add_product(ctx.grad_2FD[0], before_TF, h_TD)
        return grad_TD, before_TF @ up_FD, None, None, None, None, None


def attention_reference(q_THE, k_THE, v_THE, docs: Documents, window: int, block: int = 128) -> Tensor:
    """Causal attention within documents and within `window` tokens back, scores q.k unscaled.

    Plain torch on any device; works block by block, so memory is linear in T. Returns (T, H, E).
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


def attention_varlen(q_THE, k_THE, v_THE, docs: Documents, window: int) -> Tensor:
    """The same through torch's variable-length FlashAttention."""
    from torch.nn.attention.varlen import varlen_attn

    cu, longest, _ = docs
    options = {"scale": 1.0, "window_size": (window, 0)}
    if "num_splits" in varlen_parameters():
        options["num_splits"] = 1  # FlashAttention 3 would split, which costs more than it gives here
    return varlen_attn(q_THE, k_THE, v_THE, cu, cu, longest, longest, **options)


ATTENTION = {"fa3": attention_varlen, "fa2": attention_varlen, "reference": attention_reference}


class Rotary(NamedTuple):
    """Half-truncated rotary tables and attention scale of one stage; pure function of the stage table."""

    cos_PJ: Tensor               # (positions, E/2) float32; stationary dims have cos 1, sin 0
    sin_PJ: Tensor
    scale: Tensor                # () float32, multiplies q
    still_E: Tensor              # (E,) bool: stationary dims


def build_rotary(cfg: Config, stage: int, positions: int, device) -> Rotary:
    """Tables for `positions` tokens after the window changes of stages 1..`stage` (YaRN, arXiv 2309.00071).

    The longer windows of the final validation are used without a change of tables.
    """
    half = cfg.head_dim // 2
    moving = round(half * cfg.rotary_fraction)
    frequency = torch.cat([(1 / 1024) ** torch.linspace(0, 1, moving), torch.zeros(half - moving)]).double()
    scale = cfg.attn_scale
    for old, new in zip(cfg.stages[:stage], cfg.stages[1:]):
        stretch = new.window_long / old.window_long
        if not (cfg.yarn and cfg.sliding_window) or new.window_long > cfg.yarn_window:
            continue
        turns = old.window_long * frequency / (2 * math.pi)
        keep = ((turns - 1) / 31).clamp(0, 1)
        frequency = frequency * (1 / stretch + keep * (1 - 1 / stretch))
        scale *= 1 + 0.2 * math.log(stretch)
    angle_PJ = torch.arange(positions).double()[:, None] * frequency
    still_E = (frequency == 0).repeat(2)
    tables = angle_PJ.cos().float(), angle_PJ.sin().float(), torch.tensor(scale).float(), still_E
    return Rotary(*(table.to(device) for table in tables))


# What lies between the matrix products is cut into regions: plain functions of tensors, each compiled by
# itself with T dynamic, so layers of a kind share code and no stage needs a compilation of its own. A learned
# factor is expanded to (T, 1): its gradient is then summed row by row, in the kernel that has the row.


def embed_region(embed_TD, gate_G, smear_lambda, starts_T, cut: bool) -> Tensor:
    """Token embeddings smeared with their predecessor, normed: (T, D)."""
    if gate_G is not None:
        gate = torch.sigmoid(embed_TD[:, : gate_G.numel()] @ gate_G.to(embed_TD.dtype))
        embed_TD = embed_TD + smear_lambda * gate[:, None] * shift(embed_TD, starts_T if cut else None)
    return norm(embed_TD)


BIGRAM_SIGNS = 8192


def draw_signs(width: int) -> Tensor:
    """+-1 as int8, (8192, D): the same in every model, as they aren't saved."""
    random = torch.Generator().manual_seed(0)
    return (2 * torch.randint(2, (BIGRAM_SIGNS, width), generator=random, device="cpu") - 1).to(torch.int8)


def bigram_region(tokens_T, starts_T, rows: int, cut: bool):
    """Hashes of each token and the one before: its row of the table (record 62), of the signs (record 83).

    Where nothing is before, the last row and the first signs. Products wrap around as int32.
    """
    alone_T = torch.arange(tokens_T.size(0), device=tokens_T.device) == 0
    alone_T = alone_T | starts_T if cut else alone_T
    token_T, before_T = tokens_T.int(), shift(tokens_T).int()
    row_T = ((36313 * token_T) ^ (27191 * before_T)) % (rows - 1)
    sign_T = (token_T ^ before_T) % BIGRAM_SIGNS
    return row_T.masked_fill(alone_T, rows - 1).long(), sign_T.masked_fill(alone_T, 0).long()


def sign_region(rows_TD, signs_SD, sign_T) -> Tensor:
    """Rows with their signs: pairs that share a row are told apart by them."""
    return rows_TD * signs_SD[sign_T]


def scaled_norm(x_TD) -> tuple[Tensor, Tensor]:
    """norm(x), and what x was multiplied by, (T, 1)."""
    x = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    scale_T1 = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return (x * scale_T1).type_as(x_TD), scale_T1


def norm_backward(h_TD, scale_T1, grad_TD) -> Tensor:
    """Gradient of x by that of h = norm(x), in the precision of its scale (Jacobian of h = x scale(x))."""
    h, g = h_TD.type_as(scale_T1), grad_TD.type_as(scale_T1)
    return scale_T1 * (g - h * (g * h).mean(-1, keepdim=True))


def mix_region(x_TD, skip_TD, x0_TD, bigram_TD, weights: tuple, gate_inputs: int | None):
    """Mixing: the sum and, for a layer that reads it, the same normed, its scale and leading channels."""
    streams = zip((x_TD, skip_TD, x0_TD, bigram_TD), weights)
    sum_TD = sum(weighted(stream, weight) for stream, weight in streams if stream is not None).type_as(x_TD)
    if gate_inputs is None:
        return sum_TD, None, None, None
    h_TD, scale_T1 = scaled_norm(sum_TD)
    return sum_TD, h_TD, scale_T1, h_TD[:, :gate_inputs].contiguous()


def weighted(x_TD, weight) -> Tensor:
    """weight * x; the weight as (T, 1), as one of shape () would leave the product in bfloat16."""
    return x_TD if weight is None else weight.expand(x_TD.size(0), 1) * x_TD


def mix_backward_region(x_TD, skip_TD, x0_TD, bigram_TD, h_TD, scale_T1, grad_TD, h_grad_TD, lead_grad_TG,
                        x0_grad_TD, bigram_grad_TD, weights: tuple):
    """Gradients of the streams, later layers' of x0 and bigrams included, then of the weights."""
    grad_TD = grad_TD.to(torch.promote_types(grad_TD.dtype, torch.float32))
    if h_grad_TD is not None:
        if lead_grad_TG is not None:
            h_grad_TD = h_grad_TD + F.pad(lead_grad_TG, (0, h_grad_TD.size(1) - lead_grad_TG.size(1)))
        grad_TD = grad_TD + norm_backward(h_TD, scale_T1, h_grad_TD)
    streams, later = (x_TD, skip_TD, x0_TD, bigram_TD), (None, None, x0_grad_TD, bigram_grad_TD)
    stream_grads, weight_grads, rows = [None] * 4, [None] * 4, {}
    for i, (stream, weight, more) in enumerate(zip(streams, weights, later)):
        if stream is not None:
            own = weighted(grad_TD, weight)
            stream_grads[i] = (own if more is None else own + more).type_as(stream)
            if weight is not None:
                rows[i] = (grad_TD * stream).sum(1)
    if rows:  # summed together, by one kernel
        for i, total in zip(rows, torch.stack([*rows.values()]).sum(1).unbind()):
            weight_grads[i] = total
    return *stream_grads, *weight_grads


def late_region(x_TD, gate_inputs: int):
    """What attention in late layers reads, (T, D), and its leading channels."""
    h_TD = norm(x_TD)
    return h_TD, h_TD[:, :gate_inputs].contiguous()


def qkv_region(qkv_TC, v_lambda, value_TD, cos_PJ, sin_PJ, scale, still_E, starts_T, cfg: Config,
               offset: bool):
    """What attention needs, q, k, v: (T, H, E), from the product with Q, K, V: (T, 3 D)."""
    T = qkv_TC.size(0)
    q_THE, k_THE, v_THE = qkv_TC.view(T, 3, cfg.heads, cfg.head_dim).unbind(1)
    if cfg.qk_norm:
        q_THE, k_THE = norm(q_THE), norm(k_THE)
    q_THE = rotate(q_THE * scale, cos_PJ[:T], sin_PJ[:T])
    k_THE = rotate(k_THE, cos_PJ[:T], sin_PJ[:T])
    if offset:
        dims_E = still_E if cfg.key_offset_dims == "stationary" else torch.ones_like(still_E)
        k_THE = offset_keys(k_THE, dims_E, starts_T if cfg.cut_key_offset else None)
    v_THE = (v_lambda.expand(T, 1, 1) * v_THE).type_as(qkv_TC)
    if value_TD is not None:
        v_THE = v_THE + value_TD.view_as(v_THE)
    return q_THE, k_THE, v_THE.contiguous()


def gate_region(y_THE, lead_TG, gate_HG, out_lambda) -> Tensor:
    """Attention output times each head's gate, a function of the leading channels, and a factor: (T, D)."""
    factor_TH = out_lambda.expand(y_THE.size(0), 1)
    if gate_HG is not None:
        factor_TH = factor_TH * torch.sigmoid(lead_TG.float() @ gate_HG.float().T)
    return (y_THE * factor_TH[..., None]).type_as(y_THE).flatten(1)


def rows_region(tokens_T, table_VD, dtype) -> Tensor:
    return F.embedding(tokens_T, table_VD).to(dtype)


def add_rows_region(total_VD, tokens_T, rows_TD):
    """total[tokens[t]] += rows[t] for every t, in total's precision; on a GPU usually in any order."""
    total_VD.index_add_(0, tokens_T, rows_TD.to(total_VD.dtype))


def branch_region(x_TD, o_TD, scale8):
    """Residual stream after attention, the same normed, what it was multiplied by, (T, 1), and in float8."""
    sum_TD = x_TD + o_TD
    h_TD, scale_T1 = scaled_norm(sum_TD)
    return sum_TD, h_TD, scale_T1, None if scale8 is None else float8_region(h_TD, scale8)


def branch_backward_region(h_TD, scale_T1, grad_TD, h_grad_TD) -> Tensor:
    """Gradient of the sum: its own, plus what comes back through the norm."""
    return (grad_TD + norm_backward(h_TD, scale_T1, h_grad_TD)).type_as(grad_TD)


def activation_region(z_TF, slope: float) -> Tensor:
    """LeakyReLU(z)^2: (T, F)."""
    r_TF = F.leaky_relu(z_TF, slope)
    return r_TF * r_TF


def final_region(x_TD, backout_TD, backout_lambda, mtp_lambda, starts_T, cut: bool) -> Tensor:
    """Latents that the head reads: backout, norm, and smear-MTP y'[t] = y[t] + lambda y[t-1] (PR 151)."""
    if backout_TD is not None:
        x_TD = (x_TD - backout_lambda.expand(x_TD.size(0), 1) * backout_TD).type_as(x_TD)
    x_TD = norm(x_TD)
    if mtp_lambda is None:
        return x_TD
    shifted_TD = shift(x_TD, starts_T if cut else None)
    return (x_TD + mtp_lambda.expand(x_TD.size(0), 1) * shifted_TD).type_as(x_TD)


def loss_region(logits_TV, targets_T, softcap: Softcap) -> Tensor:
    """Cross entropy in an evaluation, before the soft cap: (T,) float32, 0 where the target is -1."""
    return F.cross_entropy(cap(logits_TV, softcap), targets_T, ignore_index=-1, reduction="none")


def float8_region(x_TD, scale) -> Tensor:
    """x / scale as float8 of four exponent bits, largest value 448."""
    return (x_TD.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


class Head(NamedTuple):
    """An output head as its products read it."""

    weight_VD: Tensor            # in the activations' dtype, or float8: weight / scale
    weight_DV: Tensor | None = None  # the transpose, which float8 products need
    scale: Tensor | None = None  # ()


def head_step(model, x_TD: Tensor, k: int, targets_TK: Tensor, weights_K: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of head k on latents, (), and their gradient, (T, D); the head's own gradient is added in place.

    The logits' gradient leaves the loss in the precision that the next products read; for float8 (record 20)
    it is scaled to use the range.
    """
    head, softcap, mode = model.weights["heads"][k], model.cfg.logit_cap, model.kernels
    reference = model.regions["cross_entropy_region"]
    grad_VD = gradient(model.mtp_heads)[k - 1] if k else gradient(model.head)
    if head.scale is None:
        logits_TV, one = x_TD @ head.weight_VD.T, torch.ones((), device=x_TD.device)
        loss_T, grad_TV = cross_entropy(logits_TV, targets_TK, weights_K, softcap, one, None, mode, reference)
        add_product(grad_VD, grad_TV, x_TD)
        return loss_T.sum(), grad_TV @ head.weight_VD
    x_scale, largest = model.latent_scale, weights_K.sum() * max(1.0, softcap.slope)
    grad_scale = largest.clamp_min(1e-30) * 2.0**-14
    x8_TD = model.regions["float8_region"](x_TD, x_scale)
    logits_TV = float8_product(x8_TD, head.weight_VD.T, x_scale, head.scale, x_TD.dtype, fast=True)
    loss_T, grad_TV = cross_entropy(logits_TV, targets_TK, weights_K, softcap, grad_scale, torch.float8_e5m2,
                                    mode, reference)
    del logits_TV
    x_grad_TD = float8_product(grad_TV, head.weight_DV.T, grad_scale, head.scale, x_TD.dtype)
    x8_DT, grad_VT = transpose(x8_TD, mode), transpose(grad_TV, mode)
    grad_VD += float8_product(grad_VT, x8_DT.T, grad_scale, x_scale, torch.float32)
    return loss_T.sum(), x_grad_TD


def float8_product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype, fast=False) -> Tensor:
    """a_scale a @ b_scale b in `dtype`; a row-major, b column-major. fast: lower precision of long sums."""
    from torch.nn.functional import ScalingType, scaled_mm

    whole = ScalingType.TensorWise
    return scaled_mm(a, b, a_scale, whole, b_scale, whole, output_dtype=dtype, use_fast_accum=fast)


def cap(logits: Tensor, softcap: Softcap) -> Tensor:
    height, shift, width = softcap
    logits = logits.float()
    return height * torch.tanh((logits + shift) / width) if height else logits


REGIONS = {f.__name__: f for f in (embed_region, bigram_region, sign_region, rows_region, add_rows_region,
                                   mix_region, mix_backward_region, late_region, qkv_region, gate_region,
                                   branch_region, branch_backward_region, activation_region, final_region,
                                   loss_region, float8_region, cross_entropy_region)}


def slices(p: nn.Parameter | None, count: int) -> tuple:
    """p[0], p[1], .. by one operation, whose backward is one stack; None for each if there is no p.

    p[i] by itself would add a gradient as large as p for each i.
    """
    return (None,) * count if p is None else p.unbind()


def compile_region(function):
    """torch.compile with the T dimension (parameters named ..._T..) dynamic from the first call on."""
    names = list(inspect.signature(function).parameters)
    tokens = [i for i, name in enumerate(names) if "_T" in name]
    compiled = torch.compile(function, fullgraph=True)

    def call(*args):
        torch._dynamo.config.recompile_limit = 64  # of layers' kinds; here, as backward's thread has its own
        for i in tokens:
            if args[i] is not None and args[i].size(0) > 1:  # a single row is compiled for itself
                torch._dynamo.mark_dynamic(args[i], 0)
        return compiled(*args)

    return call


def mechanism_parameters(cfg: Config) -> dict:
    """Names of the parameters that only some configurations have: true if this one does."""
    return {
        "value_embeds": cfg.value_tables, "mtp_heads": cfg.mtp_heads, "attn_gate": cfg.attn_gate,
        "smear_gate": cfg.smear, "smear_lambda": cfg.smear, "smear_mtp_lambda": cfg.smear_mtp,
        "skip_lambdas": cfg.skips, "backout_lambda": cfg.backout_from >= 0,
        "resid_lambdas": cfg.x0_mix, "x0_lambdas": cfg.x0_mix,
        "bigram_embed": cfg.bigram_rows, "bigram_lambdas": cfg.bigram_rows,
    }


class GPT(nn.Module):
    """Parameters are float32; forward runs in `dtype`. Mechanisms that are off have no parameters.

    | parameter                 | shape             | initial value                                       |
    |---------------------------|-------------------|-----------------------------------------------------|
    | embed                     | (V, D)            | normal(0, 1); with untie_at normal(0, 0.005)        |
    | value_embeds              | (tables * V, D)   | 0; untied: normal(0, 0.01)                          |
    | head, mtp_heads           | (V, D), (n, V, D) | 0; with untie_at the head is embed                  |
    | bigram_embed              | (bigram_rows, D)  | 0                                                   |
    | attn_bank: Q, K, V, O     | (A, 4, D, D)      | uniform, std 0.5 / sqrt(D); O 0 but for draw_output |
    | mlp_bank: up, down^T      | (L, 2, F, D)      | up uniform, std 0.5 / sqrt(D); down 0               |
    | attn_gate                 | (A, H, G)         | 0: every gate starts at 1/2                         |
    | attn_lambdas              | (A, 2)            | 0.5 on v, 1 on the output                           |
    | resid_lambdas, x0_lambdas | (L,)              | 1.1 on the stream, 0 on x0                          |
    | smear_gate, smear_lambda  | (G,), ()          | 0                                                   |
    | bigram_lambdas            | (L,)              | 0.1                                                 |
    | skip_lambdas              | (skips,)          | -1.5, before a sigmoid                              |
    | backout_lambda            | ()                | 0.5                                                 |
    | smear_mtp_lambda          | ()                | 0                                                   |
    """

    def __init__(self, cfg: Config, dtype: torch.dtype = torch.float32, attention: str = "reference",
                 kernels: str = "reference", fp8: bool = False):
        super().__init__()
        self.cfg, self.dtype, self.attention = cfg, dtype, ATTENTION[attention]
        cuts = "cut_smear", "cut_key_offset", "cut_smear_mtp", "cut_bigram"
        self.isolated_cfg = replace(cfg, **dict.fromkeys(cuts, True))
        self.regions, self.kernels, self.fp8 = REGIONS, kernels, fp8
        self.weights, self.graphs = {}, None
        self.prefix_V = None  # of every token, for prefix_weight: set before training
        scale = torch.tensor(2 * math.sqrt(cfg.width) / 448)  # y + lambda * shift(y) fits while |lambda| <= 1
        self.register_buffer("latent_scale", scale, persistent=False)
        self.tap_layers = {layer.skip_from for layer in cfg.layers} | {cfg.backout_from}
        L, A, D, V = len(cfg.layers), len(cfg.attention_layers), cfg.width, cfg.padded_vocab
        bound = math.sqrt(3) * 0.5 / math.sqrt(D)

        self.embed = nn.Parameter(torch.randn(V, D) * (0.005 if cfg.untie_at else 1))
        self.head = nn.Parameter(self.embed.detach().clone() if cfg.untie_at else torch.zeros(V, D))
        attn_bank, mlp_bank = torch.zeros(A, 4, D, D), torch.zeros(L, 2, cfg.mlp_ratio * D, D)
        self.attn_bank = nn.Parameter(attn_bank)
        self.mlp_bank = nn.Parameter(mlp_bank)
        attn_bank[:, : 4 if cfg.draw_output else 3].uniform_(-bound, bound)
        mlp_bank[:, 0].uniform_(-bound, bound)
        self.attn_lambdas = nn.Parameter(torch.tensor([0.5, 1.0]).repeat(A, 1))

        present = mechanism_parameters(cfg)

        def add(name: str, initial: Tensor):
            self.register_parameter(name, nn.Parameter(initial) if present[name] else None)

        values = torch.zeros(cfg.value_tables * V, D)
        add("value_embeds", values.normal_(0, 0.01) if cfg.untied_values else values)
        add("attn_gate", torch.zeros(A, cfg.heads, cfg.gate_inputs))
        add("resid_lambdas", torch.full((L,), 1.1))
        add("x0_lambdas", torch.zeros(L))
        add("bigram_embed", torch.zeros(cfg.bigram_rows, D))
        add("bigram_lambdas", torch.full((L,), 0.1))
        signs = draw_signs(D).to(self.embed.device) if cfg.bigram_rows else None
        self.register_buffer("bigram_signs", signs, persistent=False)
        add("smear_gate", torch.zeros(cfg.gate_inputs))
        add("smear_lambda", torch.zeros(()))
        add("skip_lambdas", torch.full((len(cfg.skips),), -1.5))
        add("backout_lambda", torch.tensor(0.5))
        add("smear_mtp_lambda", torch.zeros(()))
        add("mtp_heads", torch.zeros(cfg.mtp_heads, V, D))

    def forward(self, tokens_T: Tensor, docs: Documents, windows: dict, rotary: Rotary,
                adapters=None) -> Tensor:
        """Final latents (T, D) of packed tokens (T,) int64, in `dtype`; the head is applied by the caller.

        windows: tokens that the "short" and the "long" layers look back. adapters: low-rank updates of the
        weights (Adapters), which are trained in their place.
        """
        cfg = self.cfg if docs.first_T is None else self.isolated_cfg
        weights = self.weights or self.refresh()
        training = torch.is_grad_enabled() and adapters is None
        attn_grad, mlp_grad = (gradient(bank) if training else [None] * len(bank)
                               for bank in (self.attn_bank, self.mlp_bank))
        scale8 = self.latent_scale if training and cfg.fp8_mlp and self.fp8 else None  # of the MLPs' inputs
        starts_T = tokens_T == cfg.bos if docs.first_T is None else docs.first_T
        embed_TD = Lookup.apply(tokens_T, self.embed, self.dtype, self.regions)
        smear = self.smear_gate, self.smear_lambda
        x_TD = x0_TD = self.regions["embed_region"](embed_TD, *smear, starts_T, cfg.cut_smear)
        values, bigram_TD = self.value_rows(tokens_T), self.bigrams(tokens_T, starts_T, cfg.cut_bigram)
        handed_on, outputs = (x0_TD if cfg.x0_mix else None, bigram_TD), {}
        stream_weights, attn_lambdas = self.stream_weights(), self.attn_lambdas.flatten().unbind()
        gates = slices(self.attn_gate, len(cfg.attention_layers))
        for i, layer in enumerate(cfg.layers):
            streams = x_TD, outputs[layer.skip_from] if i in cfg.skips else None, *handed_on
            reads = None if cfg.reads_late(i) else cfg.gate_inputs
            x_TD, h_TD, lead_TG, *handed_on = Mixing.apply(*streams, *stream_weights[i], reads, self.regions)
            if reads is None:
                h_TD, lead_TG = late
            if layer.window != "none":
                a = cfg.attention_layers.index(i)
                (qkv_CD, o_DD), grads = map(split_attention, (weights["attn_bank"][a], attn_grad[a]))
                value_TD = values[cfg.value_table(i)] if i in cfg.value_layers else None
                v_lambda, out_lambda = attn_lambdas[2 * a : 2 * a + 2]
                qkv_TC = Linear.apply(h_TD, qkv_CD, grads[0])
                qkv_TC = adapters.add("q k v", a, h_TD, qkv_TC) if adapters else qkv_TC
                q_THE, k_THE, v_THE = self.regions["qkv_region"](
                    qkv_TC, v_lambda, value_TD, *rotary, starts_T, cfg, cfg.offsets_keys(layer))
                window = windows[layer.window] if cfg.sliding_window else tokens_T.numel()
                y_THE = self.attention(q_THE, k_THE, v_THE, docs, window)
                y_TD = self.regions["gate_region"](y_THE, lead_TG, gates[a], out_lambda)
                o_TD = Linear.apply(y_TD, o_DD, grads[1])
                o_TD = adapters.add("o", a, y_TD, o_TD) if adapters else o_TD
                x_TD, h_TD, h8_TD = Branch.apply(x_TD, o_TD, scale8, self.regions)
            else:
                h8_TD = None if scale8 is None else self.regions["float8_region"](h_TD.detach(), scale8)
            if adapters:
                x_TD = self.adapted_mlp(i, x_TD, h_TD, adapters)
            else:
                eight = None if h8_TD is None else weights["mlp8"][i]._replace(h_TD=h8_TD, h_scale=scale8)
                x_TD = MLP.apply(x_TD, h_TD, weights["mlp_bank"][i], mlp_grad[i], eight, cfg.leaky_slope,
                                 self.kernels)
            if i in self.tap_layers:
                outputs[i] = x_TD
            if i == cfg.backout_from and cfg.late_attention:
                late = self.regions["late_region"](x_TD, cfg.gate_inputs)
        last = outputs.get(cfg.backout_from), self.backout_lambda, self.smear_mtp_lambda
        return self.regions["final_region"](x_TD, *last, starts_T, cfg.cut_smear_mtp)

    def adapted_mlp(self, i: int, x_TD: Tensor, h_TD: Tensor, adapters) -> Tensor:
        """Layer i's MLP with low-rank updates of both matrices, for autograd; its weights get no gradient."""
        up_FD, down_FD = self.weights["mlp_bank"][i]
        z_TF = adapters.add("up", i, h_TD, h_TD @ up_FD.T)
        hidden_TF = self.regions["activation_region"](z_TF, self.cfg.leaky_slope)
        return adapters.add("down", i, hidden_TF, torch.addmm(x_TD, hidden_TF, down_FD))

    @torch.no_grad()
    def refresh(self) -> dict:
        """Update the weights as the products read them, which stay at their addresses. Due after a change."""
        for name in ("attn_bank", "mlp_bank"):
            bank = getattr(self, name)
            if bank.dtype == self.dtype:
                self.weights[name] = bank.detach()
            else:
                self.weights.setdefault(name, torch.empty_like(bank, dtype=self.dtype)).copy_(bank)
        heads = [self.head, *(self.mtp_heads if self.cfg.mtp_heads else ())]
        self.replace_weights("heads", [self.head_as_read(head_VD) for head_VD in heads])
        if self.cfg.fp8_mlp and self.fp8:
            self.replace_weights("mlp8", [self.mlp_as_read(*weight_2FD) for weight_2FD in self.mlp_bank])
        return self.weights

    def replace_weights(self, name: str, new: list):
        for kept, item in zip(self.weights.setdefault(name, new), new):
            for old, value in ((a, b) for a, b in zip(kept, item) if a is not None):
                if old.data_ptr() != value.data_ptr():
                    old.copy_(value)

    def as_float8(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The weight over its scale, whose largest value float8 can just hold, and the scale, ()."""
        scale = (torch.linalg.vector_norm(weight, math.inf) / 448).clamp_min(1e-12)
        return self.regions["float8_region"](weight, scale), scale

    def head_as_read(self, head_VD: Tensor) -> Head:
        if not self.fp8:
            return Head(head_VD.detach().to(self.dtype))
        weight_VD, scale = self.as_float8(head_VD)
        return Head(weight_VD, transpose(weight_VD, self.kernels), scale)

    def mlp_as_read(self, up_FD: Tensor, down_FD: Tensor) -> Float8MLP:
        down8_FD, down_scale = self.as_float8(down_FD)
        return Float8MLP(*self.as_float8(up_FD), transpose(down8_FD, self.kernels), down_scale)

    def value_rows(self, tokens_T: Tensor) -> list:
        """Rows of every value-embedding table, (T, D) each."""
        first = range(0, self.cfg.value_tables * self.cfg.padded_vocab, self.cfg.padded_vocab)
        return [Lookup.apply(tokens_T + row, self.value_embeds, self.dtype, self.regions) for row in first]

    def bigrams(self, tokens_T: Tensor, starts_T: Tensor, cut: bool) -> Tensor | None:
        """What each token and the one before look up together: (T, D)."""
        if not self.cfg.bigram_rows:
            return None
        row_T, sign_T = self.regions["bigram_region"](tokens_T, starts_T, self.cfg.bigram_rows, cut)
        rows_TD = Lookup.apply(row_T, self.bigram_embed, self.dtype, self.regions)
        return self.regions["sign_region"](rows_TD, self.bigram_signs, sign_T)

    def stream_weights(self) -> list:
        """Of each layer: what Mixing multiplies the stream, a skip connection, x0 and bigrams with."""
        cfg, layers = self.cfg, len(self.cfg.layers)
        lambdas = self.resid_lambdas, self.x0_lambdas, self.bigram_lambdas
        x, x0, bigram = (slices(p, layers) for p in lambdas)
        skip = [None] * layers
        for i, factor in zip(cfg.skips, self.skip_lambdas.sigmoid().unbind() if cfg.skips else ()):
            skip[i] = factor if x[i] is None else x[i] * factor
        return list(zip(x, skip, x0, bigram))

    def products(self, x_TD: Tensor) -> Tensor:
        """Logits before the soft cap, (T, V), of final latents, in their dtype."""
        return x_TD @ self.head.to(x_TD.dtype).T

    def logits(self, x_TD: Tensor) -> Tensor:
        """Soft-capped float32 logits (T, V) of final latents."""
        return cap(self.products(x_TD), self.cfg.logit_cap)

    def lambdas(self) -> dict:
        """Learned scalars by name, for the log."""
        named = ((n, p) for n, p in self.named_parameters() if "lambda" in n)
        return {n: [round(v, 5) for v in p.detach().flatten().tolist()] for n, p in named}


def build_model(cfg: Config, hardware: Hardware) -> GPT:
    """A GPT with initial weights that depend on the seed alone: drawn on the CPU, equal on every rank."""
    torch.manual_seed(cfg.seed)
    model = GPT(cfg, hardware.dtype, hardware.attention, hardware.kernels, hardware.fp8).to(hardware.device)
    model.graphs = Graphs() if hardware.graphs else None
    if hardware.compile:
        model.regions = {name: compile_region(function) for name, function in REGIONS.items()}
    return model


# ----------------------------------------------------------------------------------------------------------
# Optimizer


class Row(NamedTuple):
    """How one parameter is trained: one row of the optimizer table."""

    name: str                    # of the model's parameter
    algorithm: str               # "normuon" or "adam"
    comms: str                   # "sharded" (reduce-scatter, update own part, all-gather) or "replicated"
    lr: tuple                    # effective learning rates, one per matrix of a bank's layer, or one
    betas: tuple = (0.0, 0.95)   # of the moments; normuon's first is the schedule's momentum instead
    weight_decay: float = 0.0
    every: int = 1               # steps between updates; gradients add up meanwhile
    groups: tuple = ()           # of rows, orthogonalised apart: as many for each matrix as lr; (): one
    copy_of: str = ""            # a row of the same shape, of which this is a copy, moments and all ..
    copy_until: int = 0          # .. until this step; its gradient is added to that row's


def optimizer_table(cfg: Config) -> list[Row]:
    """One row per parameter; the learning rates here are final: no shape multiplies them later.

    NorMuon's rates: 1 x for square matrices, 2 x for the MLP's up, 4 x for its down projection.
    """
    muon, adam = cfg.muon_lr, cfg.adam_lr

    def table(name: str, ratio: float = 1.0, decay: float = 1.0) -> Row:
        lr = ratio * adam
        return Row(name, "adam", "sharded", (lr,), (0.65, 0.95), decay * cfg.adam_weight_decay * lr,
                   cfg.adam_every)

    betas = (0.9, 0.99) if cfg.smooth_scalars else (0.65, 0.95)
    scalar = partial(Row, algorithm="adam", comms="replicated", betas=betas, every=cfg.adam_every)
    bank = partial(Row, algorithm="normuon", comms="sharded", weight_decay=cfg.muon_weight_decay)
    groups = (cfg.heads // cfg.muon_heads,) * 2 + (1, 1) if cfg.muon_heads else ()  # record 80
    embed = table("embed", cfg.embed_lr_ratio)
    if cfg.untie_at:  # from then on a weight of its own, at the head's rate and decay (record 53)
        untied = math.ceil(cfg.untie_at * cfg.scheduled_steps - 1e-9)
        embed = table("embed", decay=150)._replace(copy_of="head", copy_until=untied)
    rows = [
        embed,
        table("value_embeds", cfg.embed_lr_ratio, decay=5),
        table("bigram_embed", cfg.embed_lr_ratio, decay=5)._replace(betas=(0.75, 0.95)),
        table("head", decay=150),
        table("mtp_heads", decay=150),
        scalar("attn_gate", lr=(adam,)),
        scalar("smear_gate", lr=(adam,)),
        scalar("attn_lambdas", lr=(5 * adam,)),
        scalar("resid_lambdas", lr=(5 * adam,)),
        scalar("x0_lambdas", lr=(5 * adam,), betas=(0.65, 0.95)),  # never smoothed (52)
        scalar("bigram_lambdas", lr=(5 * adam,), betas=(0.65, 0.95)),
        scalar("smear_lambda", lr=(5 * adam,)),
        scalar("skip_lambdas", lr=(5 * adam,)),
        scalar("backout_lambda", lr=(5 * adam,)),
        scalar("smear_mtp_lambda", lr=(5 * adam,)),
        bank("attn_bank", lr=(cfg.attn_lr_ratio * muon,) * 4, groups=groups),
        bank("mlp_bank", lr=(2 * muon, 4 * muon)),
    ]
    present = mechanism_parameters(cfg)
    return [row for row in rows if present.get(row.name, True)]


# Polar Express, five iterations (arXiv 2505.16932, safety 2 %): X <- a X + (b A + c A A) X with A = X X^T.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def frobenius(x_NRC: Tensor) -> Tensor:
    return x_NRC.norm(dim=(-2, -1), keepdim=True)


# The updates change nothing unless ok, a () bool: not weights nor moments. They only add and multiply, whose
# results don't depend on where a shard begins, as those of lerp_ do on a CPU.


def nesterov(g_NRC, momentum_NRC, mu, ok, dtype: torch.dtype) -> Tensor:
    """Update the momentum in place; the direction to orthogonalise, of Frobenius norm below 1, in `dtype`."""
    momentum_NRC.add_(torch.where(ok, (1 - mu) * (g_NRC - momentum_NRC), 0.0))
    x_NRC = g_NRC + mu * (momentum_NRC - g_NRC)
    return (x_NRC / (1.02 * frobenius(x_NRC) + 1e-12)).to(dtype)


def polar_express(x_NRC: Tensor, kernels: str = "reference") -> Tensor:
    """Nearly orthogonal factor, singular values about 1, of each matrix of Frobenius norm below 1."""
    tall = x_NRC.size(-2) > x_NRC.size(-1)
    x = x_NRC.mT if tall else x_NRC
    for a, b, c in POLAR_EXPRESS:
        x = polynomial(x @ x.mT, a, b, c, kernels) @ x
    return x.mT if tall else x


def orthogonalise(x_NRC: Tensor, groups: tuple, kernels: str = "reference") -> Tensor:
    """polar_express of each of the groups[i] parts into which matrix i is cut along its rows; (): whole.

    A part is normed again, as it is smaller than its matrix. Stacked, as an index would have to be uploaded.
    """
    out = {}
    for count in sorted(set(groups)):
        own = [i for i, n in enumerate(groups) if n == count]
        x = torch.stack([x_NRC[i] for i in own]).unflatten(1, (count, -1)).flatten(0, 1)
        x = polar_express(x / (1.02 * frobenius(x) + 1e-12) if count > 1 else x, kernels)
        out |= zip(own, x.unflatten(0, (-1, count)).flatten(1, 2))
    return torch.stack([out[i] for i in range(len(out))]) if out else polar_express(x_NRC, kernels)


def apply_update(p_NRC, x_NRC, second_NR1, lr_N11, decay, ok, beta2: float):
    """Divide each row of x by its running RMS, keep each matrix's norm, and step with cautious decay."""
    x = x_NRC.to(p_NRC.dtype)
    change_NR1 = (1 - beta2) * (x.square().mean(-1, keepdim=True) - second_NR1)
    second_NR1.add_(torch.where(ok, change_NR1, 0.0))
    scaled = x * second_NR1.clamp_min(1e-10).rsqrt()
    x = scaled * (frobenius(x) / frobenius(scaled).clamp_min(1e-10))
    p_NRC.sub_(torch.where(ok, lr_N11 * (x + decay * p_NRC * (x * p_NRC >= 0)), 0.0))


def normuon_update(p_NRC, g_NRC, momentum_NRC, second_NR1, lr_N11, decay, mu, ok, beta2: float, dtype,
                   kernels: str = "reference", parts=(nesterov, apply_update), groups: tuple = ()):
    """One NorMuon step (arXiv 2510.05491) in place on a stack of matrices, e.g. (44, 768, 768).

    Nesterov momentum, orthogonalisation, division of each row by its running RMS with the matrix's norm kept,
    and decoupled decay only where it does not oppose the update. A row is an output of Q, K, V, O and up, and
    an input of down, which is stored transposed. mu, decay: () float32; lr_N11: one per matrix.
    parts: the steps before and after the orthogonalisation, compiled or not. groups: one for each matrix.
    """
    x_NRC = orthogonalise(parts[0](g_NRC, momentum_NRC, mu, ok, dtype), groups, kernels)
    parts[1](p_NRC, x_NRC, second_NR1, lr_N11, decay, ok, beta2)


def adam_update(p, g, first, second, lr, bias1, bias2, ok, beta1: float, beta2: float, decay=0.0):
    """One Adam step in place; bias = 1 - beta^t. eps is far below any gradient.

    Cautious decay, as in normuon_update; a row of a table that nothing has read yet (x = 0) has none.
    """
    first.add_(torch.where(ok, (1 - beta1) * (g - first), 0.0))
    second.add_(torch.where(ok, (1 - beta2) * (g * g - second), 0.0))
    x = lr * (first.type_as(p) / bias1) / ((second.type_as(p) / bias2).sqrt() + 1e-15)
    p.sub_(torch.where(ok, x + lr * decay * p * (x * p > 0), 0.0))


class RowState(NamedTuple):
    row: Row
    parameter: nn.Parameter
    units: int                   # equal parts that sharding may separate: matrices, or elements
    share: int                   # units of a rank; the last ones may have fewer
    lo: int                      # own units: lo..hi
    hi: int
    buffers: dict                # name -> own part of a moment: float32, of tables the activations' dtype
    lr: Tensor | float           # per own unit (normuon), or a number (adam)
    groups: tuple                # row.groups of each own unit


class Optimizer:
    """NorMuon and Adam over one table; state is sharded over ranks.

    A step launches all reductions, updates own parts as they arrive (Adam first, while the banks' reductions
    fly), launches each gather at once and waits for the gathers at the end. A rank sums its gradients in
    float32; those of sharded rows are summed over ranks in the activations' dtype. Nothing is divided then:
    the loss already is, by the tokens of the whole step.
    From the first loss or gradient on that isn't finite, on any rank, no step changes anything.
    deterministic: gradients come summed over all ranks, and matrices are updated one by one, as the results
    for a stack of them depend on their number.
    Raises ValueError unless every parameter of the model is in exactly one row.
    """

    def __init__(self, model: GPT, table: list[Row], world: World, compile: bool = False,
                 deterministic: bool = False):
        parameters = dict(model.named_parameters())
        names = [row.name for row in table]
        if sorted(names) != sorted(parameters):
            missing, twice = set(parameters) - set(names), {n for n in names if names.count(n) > 1}
            unknown = set(names) - set(parameters)
            raise ValueError(f"optimizer table: missing {missing}, twice {twice}, not in the model {unknown}")
        self.world, self.dtype, self.kernels = world, model.dtype, model.kernels
        self.deterministic = deterministic
        self.healthy = torch.ones((), dtype=torch.bool, device=model.embed.device)
        parts = nesterov, apply_update
        self.normuon_parts = [torch.compile(part, dynamic=False) for part in parts] if compile else parts
        self.adam = {"replicated": adam_update,  # single numbers, which torch 2.11 compiles to an error
                     "sharded": torch.compile(adam_update, dynamic=True) if compile else adam_update}
        self.states = [self.make_state(row, parameters[row.name]) for row in table]

    def make_state(self, row: Row, p: nn.Parameter) -> RowState:
        muon = row.algorithm == "normuon"
        units = p.shape[:2].numel() if muon else p.numel()
        share = -(-units // self.world.size)
        lo = min(share * self.world.rank, units) if row.comms == "sharded" else 0
        hi = min(lo + share, units) if row.comms == "sharded" else units
        shape = (hi - lo, *p.shape[2:]) if muon else (hi - lo,)
        zeros = partial(torch.zeros, device=p.device)
        if muon:
            buffers = {"momentum": zeros(shape), "second": zeros(*shape[:-1], 1)}
            lr = torch.tensor(row.lr, device=p.device).repeat(p.size(0))[lo:hi].view(-1, 1, 1)
        else:
            dtype = self.dtype if row.comms == "sharded" else torch.float32  # tables are many numbers
            buffers, lr = {name: zeros(shape, dtype=dtype) for name in ("first", "second")}, row.lr[0]
        groups = (row.groups * p.size(0))[lo:hi] if muon else ()
        return RowState(row, p, units, share, lo, hi, buffers, lr, groups)

    def due(self, step: int) -> list[RowState]:
        """Rows that are updated at the end of `step` (0, 1, ..)."""
        return [s for s in self.at_turn(step) if step >= s.row.copy_until]

    def copies(self, step: int) -> list[tuple]:
        """Rows that are still copied at the end of `step`, each with the row that it is a copy of."""
        rows = {s.row.name: s for s in self.states}
        return [(s, rows[s.row.copy_of]) for s in self.at_turn(step) if step < s.row.copy_until]

    def at_turn(self, step: int) -> list[RowState]:
        return [s for s in self.states if (step + 1) % s.row.every == 0]

    @torch.no_grad()
    def step(self, step: int, lr_multiplier: float, momentum: float, share: Tensor) -> Tensor:
        """Update the rows that are due at the end of `step` and clear their gradients.

        share: what else to sum over ranks, of which nothing may be infinite or NaN either. Returns its sum,
        and for each due row the number of ranks whose gradient isn't finite: (share.numel() + rows,).
        """
        due, copies = self.due(step), self.copies(step)
        for state in (*due, *(copy for copy, _ in copies)):
            if state.parameter.grad is None:
                raise RuntimeError(f"parameter {state.row.name} is trained but got no gradient")
        for copy, original in copies:
            original.parameter.grad += copy.parameter.grad
            copy.parameter.grad.zero_()
        reduced = [self.reduce(due[0])]  # which hides the search for what isn't finite
        norms = torch.stack(torch._foreach_norm([s.parameter.grad for s in due]))
        report = torch.cat([share, (~norms.isfinite()).type_as(share)])
        reported = dist.all_reduce(report, async_op=True) if self.world.size > 1 else None
        reduced += [self.reduce(s) for s in due[1:]]
        if reported:
            reported.wait()
        self.healthy &= report.isfinite().all() & ~report[share.numel() :].any()
        gathers = []
        for state, (grad, work) in zip(due, reduced):
            if work is not None:
                work.wait()
            self.update(state, grad, step, lr_multiplier, momentum)
            gathers.append(self.gather(state))
            state.parameter.grad.zero_()  # in place: graphs know its address
        for finish in gathers:
            finish()
        for copy, original in copies:
            copy.parameter.copy_(original.parameter)
            for name, moment in original.buffers.items():
                copy.buffers[name].copy_(moment)
        return report

    def reduce(self, state: RowState):
        """Start summing the gradient over ranks: (own part once the work is done, work or None)."""
        grad = self.as_units(state, state.parameter.grad)
        if self.world.size == 1 or self.deterministic:
            return grad[state.lo : state.hi], None
        if state.row.comms == "replicated":
            return grad, dist.all_reduce(grad, async_op=True)
        grad = self.padded(grad.to(self.dtype))
        own = torch.empty_like(grad[: state.share])
        return own[: state.hi - state.lo], reduce_scatter(own, grad, async_op=True)

    def update(self, state: RowState, grad: Tensor, step: int, lr_multiplier: float, momentum: float):
        row, scalar = state.row, partial(torch.tensor, dtype=torch.float32)  # on the CPU: no recompilation
        p = self.as_units(state, state.parameter.data)[state.lo : state.hi]
        grad = grad.to(p.dtype)
        if row.algorithm == "normuon":
            numbers = scalar(row.weight_decay * lr_multiplier), scalar(momentum), self.healthy, row.betas[1]
            tensors = p, grad, *state.buffers.values(), state.lr * lr_multiplier
            one_by_one = [slice(i, i + 1) for i in range(len(p))]
            for own in one_by_one if self.deterministic else [slice(None)]:
                stack, rest = (x[own] for x in tensors), (self.normuon_parts, state.groups[own])
                normuon_update(*stack, *numbers, self.dtype, self.kernels, *rest)
        else:
            updates = (step + 1) // row.every
            bias1, bias2 = (scalar(1 - beta**updates) for beta in row.betas)
            lr, decay = scalar(state.lr * lr_multiplier), scalar(row.weight_decay * lr_multiplier)
            numbers = lr, bias1, bias2, self.healthy, *row.betas, decay
            self.adam[row.comms](p, grad, *state.buffers.values(), *numbers)

    def gather(self, state: RowState):
        """Start sharing the updated parts; returns the function that finishes it."""
        if self.world.size == 1 or state.row.comms == "replicated":
            return lambda: None
        p = self.as_units(state, state.parameter.data)
        whole = state.share * self.world.size
        full = p if whole == state.units else p.new_empty(whole, *p.shape[1:])
        own = full[state.share * self.world.rank : state.share * (self.world.rank + 1)]
        if full is not p:
            own[: state.hi - state.lo] = p[state.lo : state.hi]
        work = all_gather(full, own, async_op=True)  # own is a part of full: nothing is copied

        def finish():
            work.wait()
            if full is not p:
                p.copy_(full[: state.units])

        return finish

    def as_units(self, state: RowState, x: Tensor) -> Tensor:
        """A parameter-shaped tensor as (units, ..): a bank as its matrices, anything else flat."""
        return x.view(state.units, *x.shape[2:]) if state.row.algorithm == "normuon" else x.view(-1)

    def padded(self, x: Tensor) -> Tensor:
        """With zero units appended until the ranks divide them."""
        short = -x.size(0) % self.world.size
        return x if not short else torch.cat([x, x.new_zeros(short, *x.shape[1:])])

    def state_dict(self, step: int) -> dict:
        """Full, unsharded state after `step` steps, on the CPU, the same at every world size; collective."""
        out = {}
        for s in self.states:
            for name, part in s.buffers.items():
                out[f"optimizer.{s.row.name}.{name}"] = self.unshard(s, part)
            if step % s.row.every:  # gradients of a row that is not due yet are state, too
                grad = s.parameter.grad
                summed = grad if self.deterministic else self.world.all_reduce(grad)
                out[f"optimizer.{s.row.name}.grad"] = summed.to("cpu", copy=True)
                if not self.deterministic and self.world.rank:
                    grad.zero_()  # from now on as after a resume: rank 0 has them all
        return out

    def unshard(self, state: RowState, part: Tensor) -> Tensor:
        if self.world.size == 1 or state.row.comms == "replicated":
            return part.to("cpu", copy=True)
        own = part.new_zeros(state.share, *part.shape[1:])
        own[: part.size(0)] = part
        return self.world.all_gather(own).flatten(0, 1)[: state.units].cpu()

    @torch.no_grad()
    def load_state_dict(self, tensors: dict, step: int):
        """Take own parts of the full state after `step` steps.

        Raises UserError on a missing tensor or a wrong shape.
        """
        def find(s: RowState, name: str, shape) -> Tensor:
            key = f"optimizer.{s.row.name}.{name}"
            if key not in tensors or tensors[key].shape != shape:
                found = tuple(tensors[key].shape) if key in tensors else "missing"
                raise UserError(f"{key} is {found}, not {tuple(shape)}: damaged, or of another version")
            return tensors[key]

        for s in self.states:
            for name, part in s.buffers.items():
                part.copy_(find(s, name, (s.units, *part.shape[1:]))[s.lo : s.hi])
            gradient(s.parameter).zero_()
            if step % s.row.every:
                grad = find(s, "grad", s.parameter.shape)
                if self.deterministic or self.world.rank == 0:  # else they are summed when due
                    s.parameter.grad.copy_(grad)


# ----------------------------------------------------------------------------------------------------------
# Data


class Tokenizer(NamedTuple):
    vocab_size: int              # the last id is BOS
    texts: list                  # bytes of each token, by id, without BOS
    encode: object               # str -> list of ids
    decode: object               # list of ids -> str

    @property
    def token_bytes(self) -> np.ndarray:
        """Bytes of text per token, (vocab_size,); 0 for BOS."""
        return np.array([*map(len, self.texts), 0])

    @property
    def prefixes(self) -> np.ndarray:
        """The token whose text is the longest proper prefix of each token's, (vocab_size,); -1: none."""
        ids = {text: i for i, text in enumerate(self.texts)}

        def longest(text: bytes) -> int:
            return next((ids[text[:n]] for n in range(len(text) - 1, 0, -1) if text[:n] in ids), -1)

        return np.array([*map(longest, self.texts), -1])


def load_tokenizer(name: str) -> Tokenizer:
    """`bytes`, `gpt2` (tiktoken fetches and caches it) or a file of tiktoken ranks, or else a UserError."""
    if name == "bytes":
        return Tokenizer(257, [bytes([i]) for i in range(256)], lambda text: list(text.encode()),
                         lambda ids: bytes(i for i in ids if i < 256).decode(errors="replace"))
    try:
        import tiktoken

        if name == "gpt2":
            encoding = tiktoken.get_encoding("gpt2")
        elif not Path(name).is_file():
            raise UserError(f"--tokenizer={name}: no such file; give bytes, gpt2 or a file of tiktoken ranks")
        else:
            pairs = (line.split() for line in Path(name).read_bytes().splitlines())
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
            pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
            encoding = tiktoken.Encoding("file", pat_str=pattern, mergeable_ranks=ranks,
                                         special_tokens={"<|endoftext|>": len(ranks)})
    except UserError:
        raise
    except Exception as error:  # tiktoken raises many kinds: no network, damaged file, missing package
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise UserError(f"--tokenizer={name}: {reason}; a FILE.tiktoken works offline") from None
    texts = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab - 1)]
    return Tokenizer(encoding.n_vocab, texts, encoding.encode_ordinary, encoding.decode)


def find_shards(cfg: Config, split: str) -> list[Path]:
    """Shards of a split in order; the default folder is data/<dataset> beside this file or further up."""
    above = [p / "data" / cfg.dataset for p in Path(__file__).resolve().parents]
    folder = Path(cfg.data) if cfg.data else next((p for p in above if p.is_dir()), above[0])
    how = "python data/sample.py" if cfg.dataset == "sample" else "python data/fineweb.py"
    if not folder.is_dir():
        raise UserError(f"no data folder {folder}: make it with {how}, or give another with --data=FOLDER")
    shards = sorted(folder.glob(f"[!.]*_{split}_*.bin"))
    if not shards:
        raise UserError(f"no *_{split}_*.bin in {folder}: make them with {how}, or give another with --data=")
    return shards


class TokenFile:
    """Tokens of a shard, (count,) uint16, read as slices of it are asked for.

    Raises UserError if the file has become shorter; a memory map would end the process (SIGBUS).
    """

    def __init__(self, path: Path, count: int):
        self.path, self.count, self.file = path, count, open(path, "rb", buffering=0)

    def __len__(self):
        return self.count

    def __getitem__(self, part: slice) -> np.ndarray:
        lo, hi, _ = part.indices(self.count)
        data, wanted = bytearray(), 2 * max(hi - lo, 0)
        while len(data) < wanted:  # one read gives 2 GiB at most
            more = os.pread(self.file.fileno(), wanted - len(data), 1024 + 2 * lo + len(data))
            if not more:
                raise UserError(f"{self.path}: was cut short while in use, at token {lo + len(data) // 2:,} "
                                f"of {self.count:,}: fetch or make it again, then resume")
            data += more
        return np.frombuffer(data, "<u2")


@contextlib.contextmanager
def readable(path: Path):
    """Turns what the system says of a file inside into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: fetch or make it again") from None


def open_shard(path: Path, cfg: Config) -> tuple[TokenFile, np.ndarray]:
    """A checked shard and where its documents start, read once. Raises UserError that names the file."""
    with readable(path):
        size = path.stat().st_size
        header = np.fromfile(path, "<i4", 256) if size >= 1024 else np.zeros(3, "<i4")
    mend = "fetch or make it again"
    if header[0] != 20240520 or header[1] != 1:
        raise UserError(f"{path}: not a version 1 token shard ({size} bytes, magic {header[0]}): {mend}")
    if size != 1024 + 2 * int(header[2]) or header[2] <= 0:
        raise UserError(f"{path}: header says {header[2]} tokens, the file has {(size - 1024) / 2:g}: {mend}")
    tokens, starts, largest = TokenFile(path, int(header[2])), [], 0
    for first in range(0, len(tokens), 2**24):
        block = tokens[first : first + 2**24]
        largest = max(largest, int(block.max()))
        starts.append(first + np.flatnonzero(block == cfg.bos))
    if largest >= cfg.vocab_size:
        raise UserError(f"{path}: token {largest} >= {cfg.vocab_size}: damaged, or the wrong --tokenizer")
    return tokens, np.concatenate(starts)


class Shards:
    """Training shards as one array of tokens, each opened and checked when first used."""

    def __init__(self, paths: list[Path], cfg: Config):
        self.paths, self.cfg, self.opened = paths, cfg, {}
        self.edges = [0]  # shard i: edges[i] to edges[i + 1]
        for path in paths:
            with readable(path):  # 1,024 bytes of header, then 2 for each token
                self.edges.append(self.edges[-1] + (path.stat().st_size - 1024) // 2)

    def sha256(self) -> str:
        """Of names, sizes and document starts of the shards opened so far: those that the schedule needs."""
        digest = hashlib.sha256()
        for i, (tokens, starts) in sorted(self.opened.items()):
            digest.update(f"{self.paths[i].name} {len(tokens)} ".encode() + np.array(starts, "<i8").tobytes())
        return digest.hexdigest()

    def __getitem__(self, i: int) -> tuple[TokenFile, memoryview]:
        """Tokens of shard i and where its documents start."""
        if i not in self.opened:
            tokens, starts = open_shard(self.paths[i], self.cfg)
            if not len(starts):
                raise UserError(f"{self.paths[i]}: no document start ({self.cfg.bos}): wrong --tokenizer?")
            self.opened[i] = tokens, starts.data
        return self.opened[i]

    def next_start(self, offset: int) -> int:
        """Where the first document after token `offset` starts; where the tokens end if there is none."""
        for i in range(max(bisect.bisect_right(self.edges, offset) - 1, 0), len(self.paths)):
            starts = self[i][1]
            following = bisect.bisect_right(starts, offset - self.edges[i])
            if following < len(starts):
                return self.edges[i] + starts[following]
        return self.edges[-1]

    def read(self, lo: int, hi: int) -> np.ndarray:
        """Tokens lo to hi - 1."""
        some = range(bisect.bisect_right(self.edges, lo) - 1, bisect.bisect_left(self.edges, hi))
        return np.concatenate([self[i][0][max(lo - self.edges[i], 0) : hi - self.edges[i]] for i in some])


class UsedUp(UserError):
    """The training data doesn't last."""


class Position(NamedTuple):
    """The next unread token."""

    epoch: int = 0
    offset: int = 0


class DocumentStream:
    """Pieces of documents in file order; a document that runs over a shard's end is read on in the next."""

    def __init__(self, shards: Shards, cfg: Config, position: Position = Position()):
        self.shards, self.cfg, self.position = shards, cfg, position
        if position == Position():
            self.position = Position(0, shards.next_start(-1))
        if position.offset > shards.edges[-1]:
            raise UserError(f"training goes on at token {position.offset:,}, the shards have "
                            f"{shards.edges[-1]:,}: are they those that it began with?")

    def advance(self, limit: int) -> tuple[int, int]:
        """First and end of the next piece, at most `limit` tokens. Raises UsedUp at the end of the epochs."""
        epoch, lo = self.position
        if lo == self.shards.edges[-1]:
            epoch, lo = epoch + 1, self.shards.next_start(-1)
        if epoch >= self.cfg.epochs:
            raise UsedUp(f"training data used up after {epoch} epochs: add shards or raise --epochs")
        end = self.shards.next_start(lo)
        hi = min(lo + limit, end)
        self.position = Position(epoch, end if self.cfg.document_rest == "skip" else hi)
        return lo, hi

    def spans(self, tokens: int, max_doc: int) -> list[tuple]:
        """The pieces of a micro-batch."""
        spans, room = [], tokens + 1
        while room:
            spans.append(self.advance(min(max_doc, room)))
            room -= spans[-1][1] - spans[-1][0]
        return spans


class MicroBatch(NamedTuple):
    tokens: Tensor               # (T + 1,) int64: inputs are [:-1], targets [1:]
    docs: Documents


def pack(stream: DocumentStream, tokens: int, max_doc: int) -> tuple[np.ndarray, np.ndarray]:
    """Exactly tokens + 1 tokens of documents, whole or cut, and where they start among the first `tokens`."""
    pieces = [stream.shards.read(*span) for span in stream.spans(tokens, max_doc)]
    starts = np.cumsum([0, *map(len, pieces)])
    return np.concatenate(pieces), starts[starts < tokens]


def to_documents(starts: np.ndarray, tokens: int, longest: int | None = None) -> Documents:
    """longest: a bound on the lengths, where it is known; a constant one keeps attention's launches alike."""
    cu_seqlens = np.append(starts, tokens).astype(np.int32)
    return Documents(torch.from_numpy(cu_seqlens), longest or int(np.diff(cu_seqlens).max()))


def cut_at_bos(tokens: Tensor, bos: int) -> MicroBatch:
    """Successive tokens of a stream, which may begin inside a document."""
    inner = np.flatnonzero(tokens[1:-1].numpy() == bos) + 1
    return MicroBatch(tokens, to_documents(np.append(0, inner), len(tokens) - 1))


def micro_count(cfg: Config, world: World) -> int:
    """Micro-batches of one optimizer step over all ranks: at least one a rank."""
    return max(cfg.micro_batches, world.size)


def micro_tokens(cfg: Config, world: World, stage: Stage) -> int:
    return stage.batch_tokens // micro_count(cfg, world)


class Loader:
    """Prefetched batches from step `first` on. Iterating gives (micro-batches of this rank, position after).

    Micro-batches are dealt in turn to the ranks, each of which walks the whole stream: the same micro-batches
    at every world size up to cfg.micro_batches.
    """

    def __init__(self, cfg: Config, world: World, shards: Shards, device, first=0, position=Position()):
        self.cfg, self.world, self.device, self.first = cfg, world, device, first
        self.stream = DocumentStream(shards, cfg, position)
        self.queue = queue.Queue(maxsize=2)
        threading.Thread(target=self.fill, daemon=True).start()

    def fill(self):
        try:
            for step in range(self.first, self.cfg.total_steps):
                self.queue.put(self.batch(plan_step(self.cfg, step).stage))
        except BaseException as error:  # handed to the consumer, which raises it
            self.queue.put(error)

    def batch(self, stage: Stage):
        T, own = micro_tokens(self.cfg, self.world, stage), []
        for i in range(micro_count(self.cfg, self.world)):
            tokens, starts = pack(self.stream, T, stage.max_doc)
            if i % self.world.size == self.world.rank:
                docs = to_documents(starts, T, stage.max_doc)
                own.append(MicroBatch(pinned(tokens.astype(np.int64), self.device), docs))
        return own, self.stream.position

    def __iter__(self):
        for _ in range(self.first, self.cfg.total_steps):
            item = self.queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item


def check_supply(cfg: Config, world: World, shards: Shards):
    """Raise UserError if the schedule needs more documents than there are; opens the shards it needs.

    Packs them as the loader does, but reads no tokens: some 1.5 s for the short track, 5 s for medium.
    """
    stream = DocumentStream(shards, cfg)
    for step in range(cfg.total_steps):
        stage = plan_step(cfg, step).stage
        try:
            for _ in range(micro_count(cfg, world)):
                stream.spans(micro_tokens(cfg, world, stage), stage.max_doc)
        except UsedUp:
            total = shards.edges[-1]
            raise UserError(f"{total:,} training tokens last for {step} of {cfg.total_steps} steps: "
                            f"add shards, raise --epochs={cfg.epochs} or lower --scheduled_steps") from None


def check_world(cfg: Config, world: World):
    """Raise UserError unless the ranks share a step's micro-batches evenly, and these its tokens."""
    micro = micro_count(cfg, world)
    if micro % world.size:
        raise UserError(f"{world.size} processes don't divide the {micro} micro-batches of a step: "
                        f"start a divisor of {micro}")
    for stage in cfg.stages:
        if stage.batch_tokens % micro:
            raise UserError(f"{micro} micro-batches don't divide a batch of {stage.batch_tokens} tokens")


# ----------------------------------------------------------------------------------------------------------
# Schedule


class StepPlan(NamedTuple):
    """All that the schedule says of one step."""

    stage: Stage
    stage_index: int
    windows: dict                # "short", "long" -> tokens
    lr: float                    # multiplier on the table's learning rates
    momentum: float              # of NorMuon
    weights: tuple               # of the targets t+1, t+2, .. and, if `prefix`, of t+1's prefix
    prefix: bool

    @property
    def kind(self) -> tuple:
        """Steps of a kind run the same code on the same shapes."""
        return self.stage_index, len(self.weights)


def plan_step(cfg: Config, step: int) -> StepPlan:
    """Pure function of the step, 0 .. total_steps - 1; total_steps itself means 'after training'."""
    starts = [math.ceil(stage.start * cfg.scheduled_steps - 1e-9) for stage in cfg.stages] + [cfg.total_steps]
    index = max(i for i in range(len(cfg.stages)) if starts[i] <= step)
    stage = cfg.stages[index]
    done = (step - starts[index]) / max(starts[index + 1] - starts[index], 1)
    weights = tuple(a + (b - a) * done for a, b in stage.targets) if cfg.multi_target else (1.0,)
    prefix = cfg.prefix_weight * min(1.0, max(0.0, 2 - 3 * step / cfg.scheduled_steps))
    weights = (*weights, prefix) if prefix else weights

    left = max(0.0, 1 - step / cfg.scheduled_steps)
    share = min(1.0, left / cfg.cooldown) if cfg.cooldown else 1.0
    lr = stage.lr * share + cfg.lr_floor * (1 - share)

    rise = step / max(cfg.momentum_warmup, 1)
    fall = (cfg.total_steps - step) / max(cfg.momentum_cooldown, 1)
    momentum = 0.85 + 0.1 * max(0.0, min(1.0, rise, fall))
    windows = {"short": stage.window_short, "long": stage.window_long}
    return StepPlan(stage, index, windows, lr, momentum, weights, prefix > 0)


# ----------------------------------------------------------------------------------------------------------
# Training step and validation


def multi_targets(targets_T: Tensor, count: int) -> Tensor:
    """(T, count): column k is the target k positions further on, -1 past the end of the micro-batch.

    Further targets may lie in the next document: they are not cut at document starts.
    """
    columns = [F.pad(targets_T[k:], (0, k), value=-1) for k in range(count)]
    return torch.stack(columns, dim=1)


def loss_weights(cfg: Config, plan: StepPlan, device) -> tuple[Tensor, Tensor]:
    """Weights of the head's targets (K,) and of an auxiliary head (1,), over the tokens of the whole step."""
    both = torch.tensor([*plan.weights, cfg.mtp_weight / max(cfg.mtp_heads, 1)]) / plan.stage.batch_tokens
    both = upload(both, device)
    return both[:-1], both[-1:]


def backward_micro_batch(model: GPT, batch: MicroBatch, plan: StepPlan, rotary: Rotary, weights) -> Tensor:
    """Add the gradient of this micro-batch's share of the step's mean loss; returns that share, ().

    Heads are done in chunks that are backpropagated at once, so only loss_chunk tokens have logits at a time.
    """
    cfg, tokens = model.cfg, batch.tokens
    x_TD = model(tokens[:-1], batch.docs, plan.windows, rotary)
    latent_TD, count = x_TD.detach(), len(plan.weights) - plan.prefix
    targets_TK = multi_targets(tokens[1:], max(count, cfg.mtp_heads + 1))
    own_TK = targets_TK[:, :count]
    if plan.prefix:
        own_TK = torch.cat([own_TK, model.prefix_V[tokens[1:], None]], dim=1)
    total, grads = torch.zeros((), device=tokens.device), []
    for lo in range(0, latent_TD.size(0), cfg.loss_chunk):
        x, targets = latent_TD[lo : lo + cfg.loss_chunk], targets_TK[lo : lo + cfg.loss_chunk]
        loss, grad = head_step(model, x, 0, own_TK[lo : lo + cfg.loss_chunk], weights[0])
        for k in range(1, cfg.mtp_heads + 1):
            grad = grad + head_step(model, x, k, targets[:, k : k + 1], weights[1])[1]
        total += loss
        grads.append(grad)
    x_TD.backward(torch.cat(grads))
    return total


class Graphs:
    """CUDA graphs of micro-batches, one per kind of step, in one pool of memory, as one runs at a time.

    Launching the kernels one by one takes the host longer than running them takes a fast GPU.
    """

    def __init__(self):
        self.recipes, self.captured = {}, {}

    def add(self, key, function, inputs: list):
        """Have function(*inputs), which must have run before, recorded by capture()."""
        self.recipes[key] = function, [x.to("cuda", copy=True) for x in inputs]

    def capture(self):
        """Record what was added, unless it is. What the functions read stays alive: graphs know addresses."""
        if self.captured:
            return
        pool = torch.cuda.graph_pool_handle()
        for key, (function, inputs) in self.recipes.items():  # the largest was added first: others fit in
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                output = function(*inputs)
            self.captured[key] = graph, output

    def release(self):
        """Give the memory back until the next capture()."""
        self.captured.clear()
        torch.cuda.empty_cache()

    def replay(self, key, inputs: list) -> Tensor:
        """The output for these inputs, valid until the next replay."""
        graph, output = self.captured[key]
        for static, given in zip(self.recipes[key][1], inputs):
            static.copy_(given, non_blocking=True)
        graph.replay()
        return output


def graph_inputs(batch: MicroBatch, weights) -> list | None:
    """What changes from one micro-batch to the next, in fixed shapes; None if it has too many documents."""
    tokens, starts = len(batch.tokens) - 1, batch.docs.cu_seqlens
    room = max(64, tokens // 256)
    if len(starts) > room:
        return None
    padded = F.pad(starts, (0, room - len(starts)), value=tokens)  # with documents of no tokens
    return [batch.tokens, padded, *weights]


def add_graph(model: GPT, batch: MicroBatch, plan: StepPlan, rotary: Rotary, weights):
    """Have micro-batches of this plan's kind run as a graph from the next capture() on."""

    def run(tokens, cu_seqlens, *weights):
        packed = MicroBatch(tokens, Documents(cu_seqlens, batch.docs.longest))
        return backward_micro_batch(model, packed, plan, rotary, weights)

    model.graphs.add(plan.kind, run, graph_inputs(batch, weights))


def run_micro_batch(model: GPT, batch: MicroBatch, plan: StepPlan, rotary: Rotary, weights) -> Tensor:
    """backward_micro_batch, as a graph where there is one."""
    inputs = graph_inputs(batch, weights) if model.graphs and plan.kind in model.graphs.captured else None
    if inputs is None:
        return backward_micro_batch(model, to_device(batch, model.embed.device), plan, rotary, weights)
    return model.graphs.replay(plan.kind, [inputs[0], inputs[1].pin_memory(), *inputs[2:]])


def pinned(data, device) -> Tensor:
    """A tensor, array or list as a tensor that a GPU, if it is for one, can fetch while the host goes on."""
    tensor = torch.as_tensor(data)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def upload(data, device) -> Tensor:
    return pinned(data, device).to(device, non_blocking=True)


def to_device(batch: MicroBatch, device) -> MicroBatch:
    tokens, docs = batch
    cu_seqlens = docs.cu_seqlens.to(device, non_blocking=True)
    return MicroBatch(tokens.to(device, non_blocking=True), docs._replace(cu_seqlens=cu_seqlens))


def train_step(model: GPT, optimizer, batches: list, plan: StepPlan, rotary: Rotary, step: int,
               guard=None) -> Tensor:
    """One optimizer step over this rank's micro-batches. The one step function: warm-up and training call it.

    Returns what all ranks agree on, on the device: the training loss, how many of them were asked to stop,
    and for each row of optimizer.due(step) the number whose gradient isn't finite: (2 + rows,).
    """
    device, world = model.embed.device, optimizer.world
    weights, loss = loss_weights(model.cfg, plan, device), torch.zeros((), device=device)
    at = partial(guard.at, step) if guard else lambda phase: None
    model.refresh()
    run = partial(run_micro_batch, model, plan=plan, rotary=rotary, weights=weights)
    if optimizer.deterministic:
        everyones = add_in_order(model, batches, run, world, at)
        loss = everyones if world.rank == 0 else loss  # to be counted once
    else:
        for batch in batches:
            loss += run(batch)
    stop = torch.full_like(loss, bool(guard and guard.signal))
    at("exchange")
    return optimizer.step(step, plan.lr, plan.momentum, torch.stack([loss, stop]))


def add_in_order(model: GPT, batches: list, run, world: World, at=lambda phase: None) -> Tensor:
    """Loss and gradients of all ranks' micro-batches, added one by one in the order of the stream.

    Returns the loss, (); leaves the gradients in every rank's parameters. The same bits at every world size.
    """
    parameters = list(model.parameters())
    totals, loss = [gradient(p).clone() for p in parameters], torch.zeros((), device=model.embed.device)
    for batch in batches:
        at("computation")
        for p in parameters:
            p.grad.zero_()
        own = run(batch)
        at("exchange")
        for share in world.all_gather(own):
            loss = loss + share
        for p, total in zip(parameters, totals):
            for grad in world.all_gather(p.grad):
                total += grad
    for p, total in zip(parameters, totals):
        p.grad.copy_(total)
    return loss


class Validation:
    """The fixed validation tokens, the same at every world size, cut into chunks that ranks share."""

    def __init__(self, cfg: Config, tokens: np.ndarray, tokenizer: Tokenizer | None = None):
        self.cfg, self.count, self.tokens = cfg, len(tokens) - 1, torch.from_numpy(tokens.astype(np.int64))
        self.sha256 = hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest()
        self.bytes = int(tokenizer.token_bytes[tokens[1:]].sum()) if tokenizer else 0

    @classmethod
    def load(cls, cfg: Config, tokenizer: Tokenizer | None = None):
        shards = [open_shard(path, cfg)[0] for path in find_shards(cfg, "val")]
        have = sum(map(len, shards)) - 1
        count = cfg.val_tokens or have
        if count > have:
            raise UserError(f"--val_tokens={cfg.val_tokens}: the validation shards hold only {have}")
        return cls(cfg, np.concatenate([s[: count + 1] for s in shards])[: count + 1], tokenizer)

    @classmethod
    def load_documents(cls, cfg: Config, tokenizer: Tokenizer | None = None):
        """The same for every eval_every-th document alone."""
        whole = cls.load(cfg)
        return whole.part(find_documents(whole.tokens.numpy(), cfg.bos)[:: cfg.eval_every], tokenizer)

    def part(self, documents: list[tuple], tokenizer: Tokenizer | None):
        """The same for these documents alone, (first token, end) each."""
        return Validation(self.cfg, np.concatenate([self.tokens[lo:hi] for lo, hi in documents]), tokenizer)

    @property
    def positions(self) -> int:
        """Tokens of the longest forward pass, training's included: how far the rotary tables must reach."""
        training = max(stage.batch_tokens for stage in self.cfg.stages) // self.cfg.micro_batches
        return max(training, min(self.cfg.val_chunk, self.count))

    def chunks(self, world: World):
        for i, lo in enumerate(range(0, self.count, self.cfg.val_chunk)):
            if i % world.size == world.rank:
                tokens = self.tokens[lo : min(lo + self.cfg.val_chunk, self.count) + 1]
                yield i, cut_at_bos(tokens, self.cfg.bos)

    @torch.no_grad()
    def run(self, model: GPT, windows: dict, rotary: Rotary, world: World, beat=lambda: None) -> dict:
        """{"val_loss": nats per token, "val_bpb": bits per byte of text, or None without a tokenizer}.

        beat is called after each chunk: a sign of life.
        """
        count, device = -(-self.count // self.cfg.val_chunk), model.embed.device
        totals = torch.zeros(count, dtype=torch.float64, device=device)
        model.refresh()
        for i, batch in self.chunks(world):
            tokens, docs = to_device(batch, device)
            x_TD = model(tokens[:-1], docs, windows, rotary)
            for x, targets in zip(x_TD.split(self.cfg.loss_chunk), tokens[1:].split(self.cfg.loss_chunk)):
                loss_T = model.regions["loss_region"](model.products(x), targets, self.cfg.logit_cap)
                totals[i] += loss_T.sum(dtype=torch.float64)
            beat()
        nats = world.all_reduce(totals).sum().item()  # in the order of chunks, at every world size
        bpb = nats / math.log(2) / self.bytes if self.bytes else None
        return {"val_loss": nats / self.count, "val_bpb": bpb}


def final_windows(cfg: Config) -> dict:
    return {"short": cfg.val_window_short, "long": cfg.val_window_long}


@torch.no_grad()
def sample_text(model: GPT, tokenizer: Tokenizer, prompt: str, count: int, seed: int = 0) -> str:
    """The prompt continued by `count` tokens, or up to the end of the document. Plain regions, no cache."""
    cfg, device = model.cfg, model.embed.device
    ids = [cfg.bos, *tokenizer.encode(prompt)]
    rotary = build_rotary(cfg, len(cfg.stages) - 1, len(ids) + count, device)
    generator = torch.Generator().manual_seed(seed)
    compiled, model.regions = model.regions, REGIONS  # compiling for every length would take longer
    model.refresh()
    try:
        for _ in range(count):
            tokens = torch.tensor(ids, device=device)
            docs = Documents(torch.tensor([0, len(ids)], dtype=torch.int32, device=device), len(ids))
            x_TD = model(tokens, docs, final_windows(cfg), rotary)
            logits = model.logits(x_TD[-1:])[0, : cfg.vocab_size].cpu() / max(cfg.temperature, 1e-6)
            ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
            if ids[-1] == cfg.bos:
                break
    finally:
        model.regions = compiled
    return tokenizer.decode([i for i in ids if i != cfg.bos])


# ----------------------------------------------------------------------------------------------------------
# Evaluation of a trained model, by documents and with test-time training. Every token is scored once, before
# anything learns from it, with a distribution that nothing from this token on has a part in.


BLOCK = 64                       # tokens; a window is filled up to a multiple


class Window(NamedTuple):
    """Tokens lo .. hi - 1 of a stream, with nothing before them; the targets first + 1 .. hi are scored."""

    lo: int
    first: int
    hi: int

    @property
    def blocks(self) -> int:
        return -(-(self.hi - self.lo) // BLOCK)


class Turn(NamedTuple):
    """A document's next window, in its slot of a batch."""

    slot: int
    window: Window
    fresh: bool                  # the document's first window
    more: bool                   # not its last


def find_documents(tokens: np.ndarray, bos: int) -> list[tuple]:
    """(first token, end) of each document of a stream, which may begin inside one."""
    starts = np.union1d([0], np.flatnonzero(tokens == bos)).tolist()
    return list(itertools.pairwise([*starts, len(tokens)]))


def document_windows(lo: int, hi: int, context: int, stride: int) -> list[Window]:
    """Windows of at most `context` tokens that score the targets lo + 1 .. hi - 1, `stride` at a time.

    Where a window begins doesn't depend on where the document ends, which its tokens must not know.
    """
    return [Window(max(lo, first + stride - context), first, min(first + stride, hi - 1))
            for first in range(lo, hi - 1, stride)]


def deal_documents(documents: list, world: World) -> list:
    """This rank's part of documents (lists of windows), longest first, each to the rank with least work."""
    work, own = [0] * world.size, []
    for windows in sorted(documents, key=lambda windows: -sum(w.blocks for w in windows)):
        rank = work.index(min(work))
        work[rank] += sum(w.blocks for w in windows)
        if rank == world.rank and windows:
            own.append(windows)
    return own


def continuous_batches(documents: list, slots: int, tokens: int):
    """Batches of turns: a document that ends is replaced at once, and those with most windows left go first.

    A document runs one window at a time, a batch has at most `tokens` tokens or one window. Longest first and
    always on: the longest document is not what is left at the end.
    """
    waiting, active = iter(sorted(documents, key=len, reverse=True)), {}
    while True:
        for slot in range(slots):
            if slot not in active and (windows := next(waiting, None)):
                active[slot] = windows, 0
        if not active:
            return
        batch, room = [], tokens
        for slot, (windows, i) in sorted(active.items(), key=lambda item: item[1][1] - len(item[1][0])):
            if batch and windows[i].blocks * BLOCK > room:
                continue
            room -= windows[i].blocks * BLOCK
            batch.append(Turn(slot, windows[i], i == 0, i + 1 < len(windows)))
            active[slot] = windows, i + 1
            if i + 1 == len(windows):
                del active[slot]
        yield batch


class WindowBatch(NamedTuple):
    """Windows one after the other, each filled up with BOS, which changes nothing before it."""

    tokens: Tensor               # (T,) int64
    docs: Documents
    window: Tensor               # (T / BLOCK,) int64: number of each block's window
    rows: Tensor                 # (R,) int64: where the latents of the scored targets are
    targets: Tensor              # (R,) int64; -1: none
    places: Tensor               # (R,) int64: of the targets in the stream; 0: none


def lay_out(tokens: np.ndarray, windows: list[Window], rows: int, bos: int, device) -> WindowBatch:
    """A batch of windows with `rows` rows for each, or, if that is 0, with as many as it scores."""
    blocks = np.array([w.blocks for w in windows])
    ends = np.cumsum(blocks) * BLOCK
    out, first_T = np.full(ends[-1], bos), np.zeros(ends[-1], bool)
    at, places = [], []
    for window, start in zip(windows, ends - blocks * BLOCK):
        out[start : start + window.hi - window.lo] = tokens[window.lo : window.hi]
        first_T[start] = True
        own = np.arange(window.first, window.hi)
        at.append(np.resize(own, rows or len(own)) - window.lo + start)
        places.append(np.pad(own + 1, (0, max(rows - len(own), 0))))
    at, places = np.concatenate(at), np.concatenate(places)
    targets, put = np.where(places > 0, tokens[places], -1), partial(upload, device=device)
    docs = Documents(put(np.append(0, ends).astype(np.int32)), int(blocks.max()) * BLOCK, put(first_T))
    of_block = np.repeat(np.arange(len(windows)), blocks)
    return WindowBatch(put(out), docs, put(of_block), put(at), put(targets), put(places))


def window_losses(model: GPT, batch: WindowBatch, rotary: Rotary, adapters=None) -> Tensor:
    """Cross entropy of the batch's targets, (R,) float32; 0 where there is none."""
    cfg, loss_region = model.cfg, model.regions["loss_region"]
    x_TD = model(batch.tokens, batch.docs, final_windows(cfg), rotary, adapters)
    x_RD = x_TD.index_select(0, batch.rows)
    if adapters:
        return loss_region(adapters.add_head(x_RD, model.products(x_RD)), batch.targets, cfg.logit_cap)
    chunks = zip(x_RD.split(cfg.loss_chunk), batch.targets.split(cfg.loss_chunk))
    return torch.cat([loss_region(model.products(x), targets, cfg.logit_cap) for x, targets in chunks])


class Scores:
    """Nats of a stream's tokens, and how often each was scored."""

    def __init__(self, tokens: int, device):
        self.nats, self.times = torch.zeros(tokens, device=device), torch.zeros(tokens, device=device)

    def put(self, batch: WindowBatch, losses: Tensor):
        self.nats.index_add_(0, batch.places, losses.detach())
        self.times.index_add_(0, batch.places, (batch.targets >= 0).float())

    def collect(self, tokens: np.ndarray, bos: int, world: World) -> np.ndarray:
        """The nats of all ranks, (tokens,) float64. Raises RuntimeError unless each was scored once."""
        times = world.all_reduce(self.times).cpu().numpy()
        if not np.array_equal(times[1:], tokens[1:] != bos):
            raise RuntimeError("an evaluation didn't score every token once")
        return world.all_reduce(self.nats).double().cpu().numpy() * (times == 1)


class Adapters(NamedTuple):
    """Low-rank updates y += (x A^T) B^T as a forward pass reads them, a set for each window of its batch."""

    pairs: dict                  # matrix -> per layer: A (S, r, C), B (S, R, r), in the activations' dtype
    window: Tensor               # (T / BLOCK,) as in WindowBatch

    def add(self, names: str, layer: int, x_TC: Tensor, y_TR: Tensor) -> Tensor:
        """y with the updates of the named matrices, whose outputs lie side by side in it."""
        names = names.split()
        x_NBC, y_NBR = x_TC.view(-1, BLOCK, x_TC.size(1)), y_TR.view(-1, BLOCK, y_TR.size(1))
        parts = list(y_NBR.chunk(len(names), dim=2))
        for j, name in enumerate(names):
            if name in self.pairs:
                a, b = (x.index_select(0, self.window) for x in self.pairs[name][layer])
                parts[j] = torch.baddbmm(parts[j], x_NBC @ a.mT, b.mT)
        return (torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]).view_as(y_TR)

    def add_head(self, x_RD: Tensor, logits_RV: Tensor) -> Tensor:
        """Logits with the update of the head; the same number of rows for each window."""
        if "head" not in self.pairs:
            return logits_RV
        a, b = self.pairs["head"][0]
        return logits_RV + (x_RD.view(a.size(0), -1, x_RD.size(1)) @ a.mT @ b.mT).flatten(0, 1)


class LoRA:
    """A set of adapters for each slot, and the RMSProp (Adam with beta1 = 0) that trains it.

    For the (R, C) matrices of n layers A is (slots, n, r, C), at first uniform in +-1/sqrt(C), and B
    (slots, n, R, r), at first 0.
    """

    def __init__(self, cfg: Config, slots: int, device):
        L, A, D, r = len(cfg.layers), len(cfg.attention_layers), cfg.width, cfg.lora_rank
        wide = cfg.mlp_ratio * D
        shapes = dict.fromkeys("qkvo", (A, D, D))
        shapes |= {"up": (L, wide, D), "down": (L, D, wide), "head": (1, cfg.padded_vocab, D)}
        self.cfg, generator = cfg, torch.Generator().manual_seed(cfg.seed)
        self.names, self.first = cfg.lora_matrices.split(","), []
        for layers, rows, columns in (shapes[name] for name in self.names):
            a = (2 * torch.rand(layers, r, columns, generator=generator) - 1) / math.sqrt(columns)
            self.first += [a.to(device), torch.zeros(layers, rows, r, device=device)]
        self.factors = [x.new_zeros(slots, *x.shape) for x in self.first]
        self.seconds = [torch.zeros_like(x) for x in self.factors]
        self.steps = torch.zeros(slots, device=device)

    def reset(self, slot: int):
        """Forget the slot's document."""
        for factor, second, first in zip(self.factors, self.seconds, self.first):
            factor[slot] = first
            second[slot] = 0
        self.steps[slot] = 0

    def take(self, slots: Tensor, dtype: torch.dtype, window: Tensor) -> tuple[Adapters, list]:
        """The adapters of these slots, and the leaves that they are made of."""
        leaves = [x[slots].requires_grad_() for x in self.factors]
        layers = [x.to(dtype).unbind(1) for x in leaves]
        pairs = {name: list(zip(*layers[2 * i : 2 * i + 2])) for i, name in enumerate(self.names)}
        return Adapters(pairs, window), leaves

    @torch.no_grad()
    def learn(self, slots: Tensor, leaves: list, grads: tuple):
        """One step of these slots' adapters, each with its own count of steps."""
        beta = self.cfg.lora_beta2
        self.steps[slots] += 1
        bias = (1 - beta ** self.steps[slots]).view(-1, 1, 1, 1)
        for factor, second, leaf, grad in zip(self.factors, self.seconds, leaves, grads):
            moment = beta * second[slots] + (1 - beta) * grad * grad
            second[slots] = moment
            factor[slots] = leaf - self.cfg.lora_lr * grad / ((moment / bias).sqrt() + 1e-10)


class Evaluation:
    """Ways to score a stream of tokens. Each returns the nats of each token, (tokens,) float64; 0 for BOS."""

    def __init__(self, model: GPT, tokens: np.ndarray, world: World):
        self.model, self.cfg, self.tokens, self.world = model, model.cfg, tokens, world
        self.device, cfg = model.embed.device, model.cfg
        self.documents = find_documents(tokens, cfg.bos)
        positions = max(cfg.eval_batch, cfg.val_chunk, cfg.eval_context, cfg.sgd_chunk) + BLOCK
        self.rotary = build_rotary(cfg, len(cfg.stages) - 1, positions, self.device)
        model.requires_grad_(False)
        model.refresh()

    def windows(self, context: int, stride: int) -> list[list]:
        return [document_windows(lo, hi, context, stride) for lo, hi in self.documents]

    def document(self) -> np.ndarray:
        """Each document by itself, in one window; those beyond val_chunk tokens in several."""
        return self.score(self.windows(self.cfg.val_chunk, self.cfg.val_chunk))

    def stride(self) -> np.ndarray:
        """Windows of eval_context tokens, of which the last eval_stride are scored."""
        return self.score(self.windows(self.cfg.eval_context, self.cfg.eval_stride))

    def score(self, documents: list[list]) -> np.ndarray:
        scores = Scores(len(self.tokens), self.device)
        own = deal_documents(documents, self.world)
        self.run(scores, continuous_batches(own, self.cfg.eval_slots, self.cfg.eval_batch))
        return scores.collect(self.tokens, self.cfg.bos, self.world)

    @torch.no_grad()
    def run(self, scores: Scores, batches):
        for turns in batches:
            batch = lay_out(self.tokens, [turn.window for turn in turns], 0, self.cfg.bos, self.device)
            scores.put(batch, window_losses(self.model, batch, self.rotary))

    def ttt_lora(self, schedule=continuous_batches) -> np.ndarray:
        """As stride; after each window adapters of the document's own learn from what it has just scored."""
        cfg, scores = self.cfg, Scores(len(self.tokens), self.device)
        lora, own = LoRA(cfg, cfg.eval_slots, self.device), self.windows(cfg.eval_context, cfg.eval_stride)
        for turns in schedule(deal_documents(own, self.world), cfg.eval_slots, cfg.eval_batch):
            for turn in turns:
                if turn.fresh:
                    lora.reset(turn.slot)
            self.adapt(turns, lora, scores)
        return scores.collect(self.tokens, cfg.bos, self.world)

    def adapt(self, turns: list[Turn], lora: LoRA, scores: Scores):
        cfg, device = self.cfg, self.device
        windows, learning = [turn.window for turn in turns], any(turn.more for turn in turns)
        batch = lay_out(self.tokens, windows, cfg.eval_stride, cfg.bos, device)
        slots = upload([turn.slot for turn in turns], device)
        with torch.set_grad_enabled(learning):
            adapters, leaves = lora.take(slots, self.model.dtype, batch.window)
            losses = window_losses(self.model, batch, self.rotary, adapters)
        scores.put(batch, losses)
        if learning:  # a document that has ended learns, too, and is then forgotten
            counts = (batch.targets >= 0).view(len(turns), -1).sum(1).clamp_min(1)
            means = losses.view(len(turns), -1).sum(1) / counts
            lora.learn(slots, leaves, torch.autograd.grad(means.sum(), leaves))

    def ttt_sgd(self) -> np.ndarray:
        """As stride, chunk by chunk of the stream; after each the model's weights learn from it."""
        cfg, model, scores = self.cfg, self.model, Scores(len(self.tokens), self.device)
        kept = {name: p.clone() for name, p in model.state_dict().items()}
        chosen = cfg.sgd_weights.split(",")
        weights = [p for name, p in model.named_parameters() if name in chosen or chosen == ["all"]]
        optimizer = torch.optim.SGD(weights, lr=cfg.sgd_lr, momentum=cfg.sgd_momentum)
        chunks = self.chunks()
        try:
            for i, windows in enumerate(chunks):
                own = [[window] for window in windows[self.world.rank :: self.world.size]]
                self.run(scores, continuous_batches(own, len(own), cfg.eval_batch))
                optimizer.param_groups[0]["lr"] = cfg.sgd_lr * 0.5 * (1 + math.cos(math.pi * i / len(chunks)))
                for _ in range(cfg.sgd_epochs if i + 1 < len(chunks) else 0):
                    self.descend(i, optimizer, weights)
        finally:
            model.load_state_dict(kept)
            model.zero_grad()
            model.requires_grad_(False)
            model.refresh()
        return scores.collect(self.tokens, cfg.bos, self.world)

    def chunks(self) -> list[list]:
        """The windows of stride, by the chunk of sgd_chunk tokens that their first scored target is in."""
        chunks = [[] for _ in range(0, len(self.tokens) - 1, self.cfg.sgd_chunk)]
        for window in itertools.chain(*self.windows(self.cfg.eval_context, self.cfg.eval_stride)):
            chunks[window.first // self.cfg.sgd_chunk].append(window)
        return chunks

    def descend(self, chunk: int, optimizer: torch.optim.SGD, weights: list):
        """One step of SGD on a chunk, all of whose targets have been scored."""
        cfg, model = self.cfg, self.model
        lo, hi = chunk * cfg.sgd_chunk, min((chunk + 1) * cfg.sgd_chunk, len(self.tokens) - 1)
        plan = plan_step(cfg, cfg.total_steps)._replace(windows=final_windows(cfg), weights=(1.0,))
        loss = torch.tensor([1 / (hi - lo)], device=self.device), torch.zeros(1, device=self.device)
        edges = np.linspace(lo, hi, micro_count(cfg, self.world) + 1).astype(int)
        model.requires_grad_(True)
        pieces = [(first, end) for first, end in zip(edges, edges[1:]) if first < end]
        for first, end in pieces[self.world.rank :: self.world.size]:
            batch = cut_at_bos(torch.from_numpy(self.tokens[first : end + 1].astype(np.int64)), cfg.bos)
            backward_micro_batch(model, to_device(batch, self.device), plan, self.rotary, loss)
        for p in weights:
            self.world.all_reduce(gradient(p))
        if cfg.sgd_clip:
            nn.utils.clip_grad_norm_(weights, cfg.sgd_clip)
        optimizer.step()
        model.requires_grad_(False)
        model.zero_grad(set_to_none=False)
        model.refresh()


def measure(name: str, model: GPT, val: Validation, hardware: Hardware, world: World) -> tuple:
    """One row of the table of evaluations, and the nats of each token, None for packed."""
    if hardware.warmup:
        score_with(name, model, synthetic_documents(model.cfg), world)
    if hardware.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(hardware.device)
    world.barrier()
    hardware.synchronize()
    start = time.perf_counter()
    total, tokens, nats = score_with(name, model, val, world)
    hardware.synchronize()
    seconds = time.perf_counter() - start
    bpb = total / math.log(2) / val.bytes if val.bytes else None
    return {"loss": total / tokens, "bpb": bpb, "tokens": tokens, "seconds": round(seconds, 2),
            "peak_mib": memory_mib(hardware)}, nats


def score_with(name: str, model: GPT, val: Validation, world: World) -> tuple:
    """The sum of nats, the number of tokens scored, and the nats of each, None for packed."""
    evaluation = Evaluation(model, val.tokens.numpy(), world)
    if name == "packed":
        result = val.run(model, final_windows(model.cfg), evaluation.rotary, world)
        return result["val_loss"] * val.count, val.count, None
    nats = getattr(evaluation, name.replace("-", "_"))()
    return nats.sum(), int((val.tokens[1:] != model.cfg.bos).sum()), nats


def synthetic_documents(cfg: Config) -> Validation:
    """Random tokens of the lengths that evaluations meet, for what is compiled or allocated at first use."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, cfg.bos, 2 * max(cfg.sgd_chunk, cfg.eval_batch))
    starts = np.cumsum(generator.integers(2, 2 * cfg.eval_context, len(tokens)))
    tokens[starts[starts < len(tokens)]] = cfg.bos
    return Validation(cfg, tokens)


def evaluation_table(results: dict) -> str:
    lines = [f"{'method':10}{'tokens':>11}{'loss':>9}{'bpb':>9}{'gain':>9}{'seconds':>9}{'peak MiB':>10}"]
    for name, row in results.items():
        bpb = "-" if row["bpb"] is None else f"{row['bpb']:.4f}"
        gain = f"{results['stride']['loss'] - row['loss']:+.4f}" if "stride" in results else "-"
        gain = "-" if name == "packed" else gain  # it scores BOS, too
        lines.append(f"{name:10}{row['tokens']:>11,}{row['loss']:>9.4f}{bpb:>9}{gain:>9}"
                     f"{row['seconds']:>9.1f}{row['peak_mib']:>10,}")
    return "\n".join(lines)


def plot_gains(folder: Path, documents: list, gains: dict) -> str:
    """gain.png: nats per token gained over stride, by position in the document."""
    position = np.concatenate([np.arange(hi - lo) for lo, hi in documents])
    bucket = np.floor(2 * np.log2(np.maximum(position, 1))).astype(int)  # two to a doubling
    count = np.bincount(bucket, position > 0)
    some = np.flatnonzero(count)
    curves = {name: (2 ** (some / 2), np.bincount(bucket, gain)[some] / count[some], "o-")
              for name, gain in gains.items()}
    return write_plot(folder / "gain.png", curves, xscale="log", ylabel="nats gained over stride",
                      xlabel="position in the document (tokens)")


# ----------------------------------------------------------------------------------------------------------
# Checkpoint and export: safetensors files, tensors and JSON only; nothing is ever unpickled


def make_parent(path: Path):
    """Raise UserError unless a file can be written there: asked before the work, not after it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise PermissionError(13, "is a folder" if path.is_dir() else "folder not writable")
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}: give another name") from None


def check_export(path: Path):
    """Raise UserError unless the weights can be written to `path` and their config beside it."""
    if path.suffix != ".safetensors":
        raise UserError(f"--export={path}: must end in .safetensors (the config goes to .json)")
    make_parent(path)


def write_safetensors(path: Path, tensors: dict, meta: dict):
    """Atomic: the final name appears only when everything is on disk."""
    from safetensors.torch import save_file

    make_parent(path)
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary,
                  {k: json.dumps(v) for k, v in meta.items()})
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the name, too
        os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def read_safetensors(path: str, tensors: bool = True) -> tuple[dict, dict]:
    """Tensors (on the CPU) and metadata of a checkpoint or export. Raises UserError if it isn't one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            meta = {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
            found = {k: file.get_tensor(k) for k in file.keys()} if tensors else {}
        meta["config"] = config_from_json(meta["config"])
        if "step" in meta:
            check_progress(**{k: v for k, v in meta.items() if k != "config"})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: no checkpoint: {' '.join(str(error).split())[:120]}") from None
    except (KeyError, TypeError, ValueError, RecursionError, UserError) as error:
        reason = f"{type(error).__name__} {' '.join(str(error).split())[:120]}"
        raise UserError(f"{path}: not a checkpoint of this script: {reason}") from None
    return found, meta


def check_progress(step, position, train_seconds):
    """Raise ValueError or TypeError unless these are what save_checkpoint was given."""
    whole = [step, *Position(*position)]
    if any(type(n) is not int or n < 0 for n in whole) or not 0 <= train_seconds < math.inf:
        raise ValueError(f"step {step}, position {position}, {train_seconds} seconds")


def load_weights(model: GPT, tensors: dict, path: str):
    """Copy weights into the model. Raises UserError unless names and shapes are exactly the model's."""
    wanted = dict(model.named_parameters())
    found = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    for name in sorted(wanted.keys() ^ found.keys()):
        raise UserError(f"{path}: parameter {name} is {'missing' if name in wanted else 'not in this model'}")
    with torch.no_grad():
        for name, parameter in wanted.items():
            if found[name].shape != parameter.shape:
                raise UserError(f"{path}: {name} is {tuple(found[name].shape)}, not {tuple(parameter.shape)}")
            parameter.copy_(found[name])


def save_checkpoint(path: Path, model: GPT, optimizer: Optimizer, world: World, progress: dict) -> str:
    """All a run needs to go on; `progress`: step, position, train_seconds.

    Collective: rank 0 writes, and removes all but the last cfg.keep of the folder. Returns why it couldn't,
    "" if it could.
    """
    from safetensors import SafetensorError

    state, failed = optimizer.state_dict(progress["step"]), ""
    if world.rank == 0:
        tensors = {f"model.{name}": p for name, p in model.named_parameters()} | state
        try:
            for name, x in tensors.items():
                if not x.isfinite().all():  # a gradient that isn't due: a run couldn't go on from it
                    raise UserError(f"{name} isn't finite")
            write_safetensors(path, tensors, {"config": config_to_json(model.cfg)} | progress)
            for old in checkpoints(path.parent)[: -model.cfg.keep]:  # none for 0
                with contextlib.suppress(OSError):  # the new one is written all the same
                    old.unlink()
        except (OSError, SafetensorError, UserError) as error:
            failed = " ".join(str(error).split())[:200] or type(error).__name__
    ranks = world.all_reduce(torch.tensor(float(bool(failed)), device=model.embed.device)).item()
    return failed or ("rank 0 couldn't write it" if ranks else "")


def checkpoints(folder: Path) -> list[Path]:
    """Those of one run, by step."""
    return sorted(folder.glob("checkpoint_*.safetensors"))


def last_complete(folder: Path) -> tuple[Path | None, dict]:
    """The last checkpoint of a run that can be read, and its metadata."""
    for path in reversed(checkpoints(folder)):
        with contextlib.suppress(UserError):  # damaged
            meta = read_safetensors(str(path), tensors=False)[1]
            if "step" in meta:
                return path, meta
    return None, {}


def modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # a run just removed it
        return 0.0


def find_unfinished(cfg: Config) -> str:
    """Last complete checkpoint of the newest run with this configuration that is neither over nor continued.

    "" if there is none.
    """
    paths = sorted(log_root(cfg).glob("*/checkpoint_*.safetensors"), key=modified, reverse=True)
    same = {f.name for f in dataclasses.fields(cfg)} - set(RUN_FLAGS) | {"seed", "data", "tokenizer"}
    continued = set()
    for folder in dict.fromkeys(path.parent for path in paths):
        path, meta = last_complete(folder)
        if not path or any(getattr(meta["config"], name) != getattr(cfg, name) for name in same):
            continue
        if meta["step"] < cfg.total_steps and folder.resolve() not in continued:
            return str(path)
        continued.add(Path(meta["config"].resume).resolve().parent)
    return ""


def export_model(path: Path, model: GPT):
    """Weights for inference, without auxiliary heads, and beside them the config as FILE.json."""
    check_export(path)
    config = config_to_json(replace(model.cfg, mtp_heads=0, checkpoint="", resume="", export=""))
    weights = {f"model.{name}": p for name, p in model.named_parameters() if name != "mtp_heads"}
    write_safetensors(path, weights, {"config": config})
    path.with_suffix(".json").write_text(json.dumps(config, indent=1))


def load_model(path: str, cfg: Config, hardware: Hardware) -> GPT:
    """The model of a checkpoint or an export, in the precision of validations."""
    model = build_model(cfg, hardware._replace(fp8=False, graphs=False))
    load_weights(model, read_safetensors(path)[0], path)
    return model


# ----------------------------------------------------------------------------------------------------------
# Run: log, clock, training loop


class Clock:
    """Training time in seconds. Running: training steps with their data. Paused: validation, checkpoints, and
    the recording of CUDA graphs, which give their memory back to a validation.

    Never running: set-up, compilation, warm-up, sampling, export.
    """

    def __init__(self, hardware: Hardware, seconds: float = 0.0):
        self.hardware, self.seconds, self.since = hardware, seconds, None

    def resume(self):
        """Run, unless it runs already."""
        if self.since is None:
            self.hardware.synchronize()
            self.since = time.perf_counter()

    def pause(self):
        """Stop, if it runs."""
        self.hardware.synchronize()
        self.seconds, self.since = self.read(), None

    def read(self) -> float:
        return self.seconds + (time.perf_counter() - self.since if self.since is not None else 0.0)


def log_root(cfg: Config) -> Path:
    return Path(cfg.log_folder or Path(__file__).resolve().parent / "logs")


class Log:
    """log.txt and metrics.jsonl in a folder of their own, and the console; silent except on rank 0."""

    def __init__(self, cfg: Config, world: World):
        self.active, self.folder = world.rank == 0, None
        self.stopped, self.unsaved = False, ""  # by a signal before the end; why a checkpoint couldn't be
        if not self.active:
            return
        root = log_root(cfg)
        kind = "-eval" if cfg.eval else ""
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{cfg.track}-seed{cfg.seed}{kind}"
        try:
            root.mkdir(parents=True, exist_ok=True)
            for attempt in itertools.count():  # runs that start in the same second get names of their own
                self.folder = root / (f"{name}-{attempt}" if attempt else name)
                with contextlib.suppress(FileExistsError):
                    self.folder.mkdir()
                    break
            shutil.copy(__file__, self.folder / "train_gpt.py")
            self.text = open(self.folder / "log.txt", "w")
            self.metrics = open(self.folder / "metrics.jsonl", "w")
        except OSError as error:
            raise UserError(f"can't write logs in {root}: {error.strerror}; give --log_folder=") from None

    def line(self, text: str, console: bool = True):
        if self.active:
            self.write(self.text, text)
            if console:
                self.write(sys.stdout, text)

    def metric(self, **values):
        if self.active:
            self.write(self.metrics, json.dumps(values))

    def write(self, file, text: str, end: str = "\n"):
        """What can't be written, as on a full disk or to a closed pipe, doesn't end the run."""
        try:
            print(text, file=file, end=end, flush=True)
        except OSError as error:
            if file is sys.stdout:
                sys.stdout = open(os.devnull, "w")  # Python's own last flush would fail, too
            with contextlib.suppress(OSError):
                print(f"can't write {file.name}: {error.strerror}; training goes on", file=sys.stderr)


def source() -> str:
    """This file's hash and its folder's commit, for the log."""
    path, commit = Path(__file__).resolve(), ""
    command = ["git", "-C", str(path.parent), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    return f"source sha256:{hashlib.sha256(path.read_bytes()).hexdigest()} git:{commit or 'none'}"


def log_header(log: Log, hardware: Hardware, world: World, model: GPT, shards: Shards, val: Validation):
    """What a reader needs to judge and repeat the run."""
    cfg = model.cfg
    log.line(source(), console=False)
    log.line(f"config {json.dumps(config_to_json(cfg))}", console=False)
    log.line(f"python:{platform.python_version()} torch:{torch.__version__} cuda:{torch.version.cuda} "
             f"world_size:{world.size} seed:{cfg.seed}")
    if micro_count(cfg, world) > cfg.micro_batches:
        log.line(f"micro-batches of a step: {world.size}, not {cfg.micro_batches}, one a process: other "
                 "pieces of documents than on fewer processes")
    for name, reason in hardware.reasons.items():
        log.line(f"{name}: {getattr(hardware, name)} ({reason})")
    log.line(f"data: {shards.paths[0].parent.name} shards:{len(shards.opened)} sha256:{shards.sha256()}")
    log.line(f"validation: tokens:{val.count} bytes:{val.bytes or 'unknown'} sha256:{val.sha256}")
    size = sum(p.numel() for p in model.parameters())
    log.line(f"model: {size:,} parameters, {len(cfg.layers)} x {cfg.width}, vocabulary {cfg.padded_vocab}")
    log.line("timed: training steps with their data, of which up to 3 steps' are read ahead, also in pauses")
    log.line("untimed: set-up, compilation, warm-up on synthetic tokens, validation, recording of graphs, "
             "checkpoints, sampling")


PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "RTX 3090": 71}  # bf16


def step_metrics(model: GPT, hardware: Hardware, world: World, tokens: int, seconds: float) -> dict:
    """Tokens per second and, on a known GPU, the share of its peak that the weights' products use."""
    out = {"tokens_per_s": round(tokens / max(seconds, 1e-9))}
    peak = next((v for k, v in PEAK_TFLOPS.items() if k in hardware.reasons["device"]), None)
    if peak and hardware.dtype == torch.bfloat16:
        heads = model.head.numel() * (1 + model.cfg.mtp_heads)
        flops = 6 * (model.attn_bank.numel() + model.mlp_bank.numel() + heads) * tokens
        out["mfu"] = round(flops / max(seconds, 1e-9) / world.size / (peak * 1e12), 4)
    return out


def memory_mib(hardware: Hardware) -> int:
    if hardware.device.type == "cuda":
        return torch.cuda.max_memory_allocated(hardware.device) // 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 1024)


class StepLog:
    """Training lines, and what follows from a step's report: an end, if it isn't finite or one is asked for.

    On a GPU one step late: a report is read while the next step runs, so nothing stalls.
    """

    def __init__(self, log: Log, clock: Clock, model: GPT, hardware: Hardware, world: World):
        self.log, self.clock, self.model, self.hardware, self.world = log, clock, model, hardware, world
        self.pending, self.before, self.stop, self.losses = None, clock.read(), False, []

    def add(self, step: int, report: Tensor, rows: list, plan: StepPlan):
        """Queue the line of `step` (1, 2, ..) and print the one before it. rows: names of those due."""
        if not report.is_cuda:
            return self.print(step, report, rows, plan)
        event = torch.cuda.Event()
        following = step, report.to("cpu", non_blocking=True), rows, plan, event
        event.record()
        self.flush()
        self.pending = following

    def flush(self):
        if self.pending:
            self.print(*self.pending)
        self.pending = None

    def print(self, step: int, report: Tensor, rows: list, plan: StepPlan, event=None):
        if event is not None:
            event.synchronize()
        now, total = self.clock.read(), self.model.cfg.total_steps
        tokens, self.before, seconds = plan.stage.batch_tokens, now, now - self.before
        speed = step_metrics(self.model, self.hardware, self.world, tokens, seconds)
        loss, stop, *bad = report.tolist()
        self.check(step, loss, dict(zip(rows, bad)))
        self.stop = self.stop or stop > 0
        loss /= sum(plan.weights)
        self.note_spike(step, loss)
        line = f"step:{step}/{total} train_loss:{loss:.4f}"
        self.log.line(f"{line} train_time:{now * 1e3:.0f}ms step_avg:{now * 1e3 / step:.2f}ms", console=False)
        self.log.metric(step=step, train_loss=round(loss, 5), train_time=round(now, 4), lr=round(plan.lr, 5),
                        **speed)
        terminal = sys.stdout.isatty()
        if self.log.active and (terminal or step % max(self.model.cfg.val_every // 5, 1) == 0):
            left = now / step * (total - step)
            line = f"{line} {speed['tokens_per_s']:,} tokens/s eta:{left:.0f}s "
            self.log.write(sys.stdout, line, end="\r" if terminal else "\n")

    def check(self, step: int, loss: float, bad: dict):
        """Raise UserError if the step's report says that it, and all after it, changed nothing."""
        names = [f"the gradient of {name} on {ranks:.0f} of {self.world.size} ranks"
                 for name, ranks in bad.items() if ranks]
        names = names if math.isfinite(loss) else [f"the training loss is {loss}", *names]
        if names:
            text = f"step {step} wasn't applied: not finite: {', '.join(names)}"
            self.log.line(text, console=False)
            raise UserError(f"{text}; the weights are those before it; lower the learning rates")

    def note_spike(self, step: int, loss: float):
        """A line where the loss is more than 1 nat above the mean of the 20 steps before."""
        mean = sum(self.losses) / 20
        if len(self.losses) == 20 and loss > mean + 1:
            self.log.line(f"loss spike at step {step}: {loss:.4f}, the 20 steps before {mean:.4f}")
        self.losses = [*self.losses[-19:], loss]


class Guard:
    """While in force: signals ask for a stop after the running step, and a run without progress is ended.

    `signal` is when the first SIGTERM or SIGINT came, of which the ranks inform each other; a second SIGINT,
    more than 3 s later, ends the process at once. Ranks publish how far they are in the key-value store that
    they met at; one that is stuck for `seconds` names those behind, or those without a sign of life, and
    ends the process with code 3.
    """

    PHASES = "data", "computation", "exchange", "validation", "checkpoint"

    def __init__(self, seconds: float, world: World):
        self.seconds, self.world, self.over = seconds, world, threading.Event()
        self.signal, self.before, self.store = 0.0, {}, None
        self.at(0, "data")

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.before = {n: signal.signal(n, self.note) for n in (signal.SIGTERM, signal.SIGINT)}
        if self.seconds:
            threading.Thread(target=self.watch, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.over.set()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        if not self.signal:
            self.signal = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.signal > 3:
            raise KeyboardInterrupt

    def at(self, step: int, phase: str):
        """A sign of progress."""
        self.progress, self.since = (step, self.PHASES.index(phase)), time.monotonic()

    def watch(self):
        pause = min(1.0, self.seconds / 5)
        while not self.over.wait(pause):
            if self.world.size > 1:
                self.store = self.store or in_time(self.connect)
            self.publish(time.time())
            if time.monotonic() - self.since > self.seconds:
                self.end(pause)

    def connect(self):
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(*address, is_master=False, wait_for_workers=False)

    def publish(self, beat: float):
        """beat: differs each time; 0 from a rank that ends itself, so that the others don't blame it."""
        if self.store:
            in_time(self.store.set, f"progress/{self.world.rank}", json.dumps([beat, *self.progress]))

    def ask(self) -> list:
        """What each rank published last, (beat, step, phase)."""
        if not self.store:
            return [(0, *self.progress)] if self.world.size == 1 else []
        store, keys = self.store, [f"progress/{rank}" for rank in range(self.world.size)]
        return [json.loads(store.get(key)) if store.check([key]) else (-1, 0, 0) for key in keys]

    def end(self, pause: float):
        """Name the culprits in one line and end this process."""
        first = last = in_time(self.ask)
        if first:
            for _ in range(3):
                time.sleep(pause)
                self.publish(time.time())
            last = in_time(self.ask)
        culprits = "without a sign of life: rank 0, or torchrun, where the ranks tell how far they are"
        if last:
            culprits = self.blame(first, last)
            self.publish(0)
        print(f"train_gpt.py: no progress for {self.seconds:g} s; {culprits}: restart with --resume=auto",
              file=sys.stderr, flush=True)
        os._exit(3)

    def blame(self, first: list, last: list) -> str:
        """The ranks that published nothing from `first` to `last`; if all did, those that are least far."""
        silent = [rank for rank, (a, b) in enumerate(zip(first, last)) if a == b and a[0]]
        least = min(tuple(progress) for _, *progress in last)
        behind = [rank for rank, (_, *progress) in enumerate(last) if tuple(progress) == least]
        where = [f"rank {rank} in step {last[rank][1]}, {self.PHASES[last[rank][2]]}"
                 for rank in silent or behind]
        return f"{'without a sign of life' if silent else 'behind or stuck'}: {'; '.join(where)}"


def in_time(function, *args):
    """function(*args), or None if it hasn't returned after 5 s or has lost its peer."""
    results = []

    def call():
        with contextlib.suppress(RuntimeError):
            results.append(function(*args))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(5)
    return results[0] if results else None


class Launch:
    """Seconds from the start of the process to the first step, by phase."""

    def __init__(self):
        self.phases, self.last = {}, STARTED

    def mark(self, phase: str):
        """The time since the last mark was spent on `phase`."""
        self.phases[phase], self.last = time.time() - self.last, time.time()

    def __str__(self):
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.phases.items())
        return f"launch to first step: {sum(self.phases.values()):.1f} s ({phases})"


def compilations() -> int:
    """Graphs that torch.compile has made so far in this process."""
    dynamo = sys.modules.get("torch._dynamo")  # whose import takes a second
    return dynamo.utils.counters["stats"]["unique_graphs"] if dynamo else 0


class Profiler:
    """--profile=K: a trace of K steps, from the third of this run on, and the kernels that take the time."""

    def __init__(self, steps: int, log: Log, hardware: Hardware):
        self.steps, self.log, self.hardware, self.seen, self.running = steps, log, hardware, 0, None

    def step(self, last: bool):
        """Called after each step."""
        self.seen += 1
        if self.steps and self.seen == 2 and not last:
            self.hardware.synchronize()
            self.running = new_profile(self.hardware)
            self.running.start()
        elif self.running and (last or self.seen == 2 + self.steps):
            self.hardware.synchronize()
            self.running.stop()
            if self.log.active:
                self.running.export_chrome_trace(str(self.log.folder / "trace.json"))
                self.log.line(kernel_table(self.running, self.seen - 2))
                self.log.line(f"trace: {self.log.folder / 'trace.json'} (open in ui.perfetto.dev)")
            self.running = None


def new_profile(hardware: Hardware) -> torch.profiler.profile:
    """A profile of the host and, if there is one, the GPU; not started."""
    kinds = torch.profiler.ProfilerActivity
    gpu = {kinds.CUDA} if hardware.device.type == "cuda" else set()
    return torch.profiler.profile(activities={kinds.CPU} | gpu)


def kernel_table(profile, steps: int, rows: int = 20) -> str:
    """The kernels (on a CPU the operators) that took longest, in milliseconds and calls per step."""
    events = [e for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]

    def spent(e):
        return e.self_device_time_total if events else e.self_cpu_time_total

    ranked = sorted(events or profile.key_averages(), key=lambda e: -spent(e))
    lines = [f"profile of {steps} steps: {sum(map(spent, ranked)) / 1e3 / steps:.2f} ms a step"]
    return "\n".join(lines + [f"{spent(e) / 1e3 / steps:9.3f} ms {e.count / steps:7.1f} x  {e.key[:80]}"
                              for e in ranked[:rows]])


def warm_up(model: GPT, optimizer: Optimizer, val: Validation, hardware: Hardware, world: World):
    """Run each kind of step and a validation chunk on synthetic tokens: compiles all that training will use.

    Weights and the optimizer's state, which is zero before training, are restored exactly.
    """
    cfg, saved = model.cfg, [p.detach().cpu().clone() for p in model.parameters()]
    generator = np.random.default_rng(0)
    shapes = {}
    for step in range(cfg.total_steps):
        plan = plan_step(cfg, step)
        shapes.setdefault(plan.kind, plan)
    for plan in sorted(shapes.values(), key=lambda plan: -plan.stage.batch_tokens):  # most memory first
        T = micro_tokens(cfg, world, plan.stage)
        tokens = generator.integers(0, cfg.vocab_size, T + 1)
        tokens[:: min(512, plan.stage.max_doc)] = cfg.bos
        starts = np.arange(0, T, min(512, plan.stage.max_doc))
        docs = to_documents(starts, T, plan.stage.max_doc)
        batch = MicroBatch(torch.from_numpy(tokens), docs)
        rotary = build_rotary(cfg, plan.stage_index, val.positions, hardware.device)
        for step in range(cfg.adam_every):
            train_step(model, optimizer, [batch], plan, rotary, step)
        weights = loss_weights(cfg, plan, hardware.device)
        if model.graphs and graph_inputs(batch, weights):
            add_graph(model, batch, plan, rotary, weights)
    chunk = min(cfg.val_chunk, val.count)
    Validation(cfg, np.resize(tokens, chunk * world.size + 1)).run(model, final_windows(cfg), rotary, world)
    with torch.no_grad():
        for parameter, kept in zip(model.parameters(), saved):
            parameter.copy_(kept)
            parameter.grad.zero_()
    for state in optimizer.states:
        for buffer in state.buffers.values():
            buffer.zero_()
    optimizer.healthy.fill_(True)  # synthetic steps may have gone beyond what is finite
    hardware.synchronize()


def write_plot(path: Path, curves: dict, **options) -> str:
    """The file with the curves, name -> (x, y, style), or why it isn't drawn."""
    try:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4))
        axes = figure.subplots()
        for name, (x, y, style) in curves.items():
            axes.plot(x, y, style, label=name, lw=1, ms=3)
        axes.set(**options)
        axes.legend()
        axes.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(path, dpi=120)
    except (ImportError, OSError) as error:
        return f"not drawn: {error}"
    return str(path)


def plot_losses(folder: Path) -> str:
    """loss.png from metrics.jsonl."""
    curves = {}
    try:
        rows = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    except (OSError, ValueError) as error:  # of a disk that was full
        return f"not drawn: {error}"
    for key, style in (("train_loss", "-"), ("val_loss", "o-")):
        points = np.array([(r["step"], r[key]) for r in rows if key in r and r["step"]]).reshape(-1, 2)
        curves[key.replace("_", " ")] = *points.T, style
    return write_plot(folder / "loss.png", curves, title=folder.name, xlabel="step",
                      ylabel="loss (nats per token)")


def baseline_line(shards: Shards) -> str:
    """The trivial baselines that the data folder's manifest states, for judging the bits per byte."""
    try:
        found = json.loads((shards.paths[0].parent / "manifest.json").read_text()).get("baseline") or []
        return ", ".join(f"{b['name']} {b['bpb']:.3f}" for b in found)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return ""


def optional_tokenizer(cfg: Config, log_line=print) -> Tokenizer | None:
    """The tokenizer, or None with a line that says why: bits per byte, samples and prefixes need one."""
    try:
        tokenizer = load_tokenizer(cfg.tokenizer)
    except UserError as error:
        log_line(f"no bits per byte and no sample: {error}")
        return None
    if tokenizer.vocab_size != cfg.vocab_size:
        raise UserError(f"--tokenizer={cfg.tokenizer}: {tokenizer.vocab_size} tokens, not {cfg.vocab_size}")
    return tokenizer


def token_prefixes(cfg: Config, tokenizer: Tokenizer | None) -> Tensor | None:
    """Tokenizer.prefixes for --prefix_weight, None without it; raises UserError where there are none."""
    if not cfg.prefix_weight:
        return None
    if tokenizer is None:
        raise UserError(f"--tokenizer={cfg.tokenizer}: can't be loaded, but --prefix_weight needs its texts: "
                        "give a FILE.tiktoken, or --prefix_weight=0")
    prefixes = tokenizer.prefixes
    if (prefixes < 0).all():
        raise UserError(f"--prefix_weight={cfg.prefix_weight:g}: no token of --tokenizer={cfg.tokenizer} "
                        "begins with another: give --prefix_weight=0")
    return torch.from_numpy(prefixes)


def validate(val: Validation, model: GPT, rotary: Rotary, step: int, clock: Clock, log: Log, world: World,
             guard: Guard):
    """Validate with the windows of `step`, or the final ones after training, and log it with the lambdas."""
    cfg, seconds = model.cfg, clock.read()
    windows = final_windows(cfg) if step == cfg.total_steps else plan_step(cfg, step).windows
    guard.at(step, "validation")
    result = val.run(model, windows, rotary, world, partial(guard.at, step, "validation"))
    lambdas = model.lambdas()
    bpb = "" if result["val_bpb"] is None else f" val_bpb:{result['val_bpb']:.4f}"
    mtp = f" smear_mtp_lambda:{lambdas['smear_mtp_lambda'][0]:+.4f}" if cfg.smear_mtp else ""
    log.line(f"step:{step}/{cfg.total_steps} val_loss:{result['val_loss']:.4f}{bpb} "
             f"train_time:{seconds * 1e3:.0f}ms step_avg:{seconds * 1e3 / max(step, 1):.2f}ms{mtp}")
    log.metric(step=step, **result, train_time=round(seconds, 4), lambdas=lambdas)


def last_step(cfg: Config) -> int:
    return min(cfg.total_steps, cfg.stop_after or cfg.total_steps)


def set_up(cfg: Config, hardware: Hardware, world: World, launch: Launch):
    """Everything before the first step: (model, optimizer, shards, validation, log, progress)."""
    check_world(cfg, world)
    shards = Shards(find_shards(cfg, "train"), cfg)
    check_supply(cfg, world, shards)
    tokenizer = optional_tokenizer(cfg, print if world.rank == 0 else lambda text: None)
    prefixes, val = token_prefixes(cfg, tokenizer), Validation.load(cfg, tokenizer)
    progress = {"step": 0, "position": Position(), "train_seconds": 0.0}
    if cfg.resume:
        tensors, meta = read_safetensors(cfg.resume)
        if "step" not in meta:
            raise UserError(f"{cfg.resume}: an export, which has no optimizer state: give a checkpoint")
        progress = {name: meta[name] for name in progress} | {"position": Position(*meta["position"])}
    if torch.unique(world.all_gather(torch.tensor(progress["step"], device=hardware.device))).numel() > 1:
        raise UserError("the ranks found different checkpoints: --resume=auto needs a shared --log_folder")
    if progress["step"] >= last_step(cfg):
        raise UserError(f"{cfg.resume}: is at step {progress['step']} of {last_step(cfg)}: nothing left")
    launch.mark("data")
    model = build_model(cfg, hardware)
    model.prefix_V = None if prefixes is None else prefixes.to(hardware.device)
    optimizer = Optimizer(model, optimizer_table(cfg), world, hardware.compile, cfg.deterministic)

    def restore():
        if cfg.resume:
            load_weights(model, tensors, cfg.resume)
            optimizer.load_state_dict(tensors, progress["step"])

    restore()  # refuses what doesn't fit before anything is written
    log = Log(cfg, world)
    log_header(log, hardware, world, model, shards, val)
    if cfg.resume:
        log.line(f"resumed: {cfg.resume} at step {progress['step']}; the clock goes on from "
                 f"{progress['train_seconds']:.1f} s, so steps after it in the earlier run don't count")
    launch.mark("model")
    if hardware.warmup:
        warm_up(model, optimizer, val, hardware, world)
        restore()
        launch.mark("warm-up")
    return model, optimizer, shards, val, log, progress


def train(cfg: Config, hardware: Hardware, world: World, launch: Launch) -> tuple[GPT, Log]:
    """The whole run: set up, then steps on the clock, with validations and checkpoints off it."""
    model, optimizer, shards, val, log, progress = set_up(cfg, hardware, world, launch)
    start, position, seconds = progress.values()
    compiled, profiler = compilations(), Profiler(cfg.profile, log, hardware)
    clock = Clock(hardware, seconds)
    loader = iter(Loader(cfg, world, shards, hardware.device, start, position))
    steps = StepLog(log, clock, model, hardware, world)
    stop = last_step(cfg)
    stage, rotary = None, None
    with Guard(cfg.watchdog, world) as guard:
        for step in range(start, stop + 1):
            plan = plan_step(cfg, min(step, cfg.total_steps - 1))
            if plan.stage_index != stage:
                stage = plan.stage_index
                rotary = build_rotary(cfg, stage, val.positions, hardware.device)
            validating = step == stop or step % cfg.val_every == 0
            may_save = step > start and cfg.save_every >= 0
            saving = may_save and (step == stop or cfg.save_every and step % cfg.save_every == 0)
            if validating or saving or steps.stop or step == start:
                steps.flush()
                clock.pause()
                log.stopped = steps.stop and step < stop
                if model.graphs and (saving or validating or log.stopped):
                    model.graphs.release()  # what follows needs the memory
                if saving or (log.stopped and may_save):
                    guard.at(step, "checkpoint")  # before a validation that might fail
                    done = {"step": step, "position": position, "train_seconds": clock.seconds}
                    log.unsaved = save(done, model, optimizer, log, world)
                if log.stopped:
                    log.line(f"stopped after step {step}: a signal asked for it; --resume=auto goes on; "
                             f"log: {log.folder}")
                    return model, log
                if validating:
                    validate(val, model, rotary, step, clock, log, world, guard)
                if model.graphs and step < stop:
                    model.graphs.capture()
                if step == start:
                    launch.mark("validation and graphs")
                    log.line(str(launch))
            if step < stop:
                clock.resume()
                guard.at(step, "data")
                batches, position = next(loader)
                guard.at(step, "computation")
                report = train_step(model, optimizer, batches, plan, rotary, step, guard)
                steps.add(step + 1, report, [s.row.name for s in optimizer.due(step)], plan)
                profiler.step(last=step == stop - 1)
    log.line(f"compilations after the first step: {compilations() - compiled}")
    log.line(f"peak memory: {memory_mib(hardware)} MiB")
    if baselines := baseline_line(shards):
        log.line(f"for comparison, bits per byte on the same text: {baselines}")
    return model, log


def save(progress: dict, model: GPT, optimizer: Optimizer, log: Log, world: World) -> str:
    """Write a checkpoint into the log's folder; a line, and the reason returned, if that fails."""
    path = log.folder and log.folder / f"checkpoint_{progress['step']:06d}.safetensors"
    failed = save_checkpoint(path, model, optimizer, world, progress)
    if failed:
        log.line(f"checkpoint of step {progress['step']} not written: {failed}")
    return failed


def finish(cfg: Config, model: GPT, log: Log, world: World):
    """After training: sample, export, plot; rank 0 only."""
    if world.rank != 0 or log.stopped:
        return
    if tokenizer := optional_tokenizer(cfg):
        text = sample_text(model, tokenizer, cfg.sample or "The", cfg.sample_tokens, cfg.seed)
        log.line("sample:\n" + textwrap.indent(text, "    "))
    if cfg.export:
        export_model(Path(cfg.export), model)
        log.line(f"export: {cfg.export}")
    log.line(f"log: {log.folder / 'log.txt'}")
    log.line(f"plot: {plot_losses(log.folder)}")


def use_checkpoint(cfg: Config, hardware: Hardware):
    """--checkpoint=FILE with --sample and/or --export: no training."""
    if not cfg.sample and not cfg.export:
        raise UserError("--checkpoint: say what to do with it: --eval=, --sample= or --export=")
    model = load_model(cfg.checkpoint, cfg, hardware._replace(compile=False))
    if cfg.sample:
        tokenizer = load_tokenizer(model.cfg.tokenizer)
        print(sample_text(model, tokenizer, cfg.sample, cfg.sample_tokens, cfg.seed))
    if cfg.export:
        export_model(Path(cfg.export), model)
        print(f"export: {cfg.export}")


def evaluate(cfg: Config, hardware: Hardware, world: World):
    """--eval: the validation tokens scored by a checkpoint's model in several ways; a table and a plot."""
    model = load_model(cfg.checkpoint, cfg, hardware)
    tokenizer = optional_tokenizer(cfg, print if world.rank == 0 else lambda text: None)
    val = Validation.load_documents(cfg, tokenizer)
    documents = find_documents(val.tokens.numpy(), cfg.bos)
    if (val.tokens[1:] == cfg.bos).all():
        raise UserError(f"--eval_every={cfg.eval_every}: no token to score in {len(documents)} documents")
    log = Log(cfg, world)
    log.line(f"config {json.dumps(config_to_json(cfg))}", console=False)
    log.line(f"{source()} torch:{torch.__version__} {hardware.reasons['device']} world_size:{world.size}")
    which = f", one in {cfg.eval_every} of the validation's" if cfg.eval_every > 1 else ""
    log.line(f"{cfg.checkpoint}: {len(documents)} documents{which}; "
             f"tokens:{val.count} bytes:{val.bytes or 'unknown'} sha256:{val.sha256}")
    results, nats = {}, {}
    for name in cfg.eval.split(","):
        try:
            results[name], nats[name] = measure(name, model, val, hardware, world)
        except torch.OutOfMemoryError:
            raise UserError(f"{name}: too little GPU memory: lower --eval_slots=, --lora_rank= or "
                            "--eval_batch=") from None
        log.line(f"{name}: loss {results[name]['loss']:.4f}, {results[name]['seconds']:.1f} s")
        log.metric(method=name, **results[name])
    log.line(evaluation_table(results))
    gains = {name: nats["stride"] - x for name, x in nats.items() if x is not None and "stride" in nats}
    if log.active and len(gains) > 1:
        log.line(f"plot: {plot_gains(log.folder, documents, gains)}")
    log.line(f"log: {log.folder}")


def help_text() -> str:
    """The docstring and the flags with tiny's defaults; what they mean stands beside them in Config."""
    flags = " ".join(f"--{name}={getattr(TRACKS['tiny'], name)}" for name in flag_kinds())
    return f"{__doc__}\nFlags, with the tiny track's values (see Config here):\n{textwrap.fill(flags, 110)}"


def run(argv: list[str]):
    if {"-h", "--help"} & set(argv):
        print(help_text())
        return
    launch = Launch()
    launch.mark("import")
    cfg = parse_config(argv)
    env = os.environ
    world = World(int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_RANK", 0)))
    hardware = choose_hardware(cfg, world)
    if hardware.device.type == "cuda":
        torch.cuda.set_device(hardware.device)  # where Triton launches
    if cfg.export:
        check_export(Path(cfg.export))
    if cfg.check:
        check_world(cfg, world)
        check_supply(cfg, world, Shards(find_shards(cfg, "train"), cfg))
        if cfg.prefix_weight:
            token_prefixes(cfg, optional_tokenizer(cfg))
        Validation.load(cfg)
        print("configuration and data are fine")
        return
    if hardware.device.type == "cpu" and world.size > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.size))
    if cfg.deterministic:
        make_deterministic(hardware)
    if cfg.checkpoint and not cfg.eval:
        use_checkpoint(cfg, hardware)
        return
    if world.size > 1:
        cuda, patience = hardware.device.type == "cuda", 2 * cfg.watchdog + 600 if cfg.watchdog else 86_400
        dist.init_process_group("nccl" if cuda else "gloo", device_id=hardware.device if cuda else None,
                                timeout=timedelta(seconds=patience))  # the watchdog comes first
    launch.mark("process group")
    if cfg.eval:
        evaluate(cfg, hardware, world)
        world.leave()
        return
    model, log = train(cfg, hardware, world, launch)
    world.leave()
    finish(cfg, model, log, world)  # nobody waits for rank 0 meanwhile
    if log.unsaved:
        raise UserError(f"the last checkpoint couldn't be written: {log.unsaved}; --resume=auto goes on from "
                        "the one before")


def lost_contact(error: RuntimeError) -> bool:
    """Whether a collective failed as it does when another process is gone."""
    signs = "gloo/transport", "ncclRemoteError", "ncclSystemError"
    return isinstance(error, dist.DistNetworkError) or any(sign in str(error) for sign in signs)


def main():
    try:
        run(sys.argv[1:])
    except UserError as error:
        print("train_gpt.py:", " ".join(str(error).split()), file=sys.stderr)  # one line, whatever was quoted
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except torch.OutOfMemoryError as error:
        print(f"train_gpt.py: {str(error).split('. ')[0]}: raise --micro_batches=, which makes them smaller,",
              "or lower --loss_chunk=, --val_chunk= or --bigram_ratio=", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        print("train_gpt.py: lost contact with another rank: restart with --resume=auto",
              f"({' '.join(str(error).split())[:200]})", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
