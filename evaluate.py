"""Evaluate a checkpoint of train_gpt.py, sample from it, or export its weights.

    python evaluate.py [CHECKPOINT] --methods=packed,document,stride,ttt-sgd,ttt-lora
    python evaluate.py [CHECKPOINT] --sample="Once upon"
    python evaluate.py [CHECKPOINT] --export=model.safetensors
    torchrun --standalone --nproc_per_node=8 evaluate.py CHECKPOINT --methods=ttt-lora

Every method scores each token of the validation data once, before anything learns from it, by a distribution
in which neither it nor a later token has a part:
    packed     as training validates: chunks of val_chunk tokens, in which documents lie side by side
    document   each document by itself
    stride     windows of --context tokens of one document, of which the last --stride are scored
    ttt-sgd    as stride; after every --sgd_chunk tokens of the data the model's weights learn from them
    ttt-lora   as stride; after every window low-rank adapters, each document's own, learn what it scored

Shape suffixes as in train_gpt.py, and B: tokens of a block   N: blocks of a batch   S: windows of a batch
    R: rows of a matrix, or scored positions of a batch
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data.tokenizer import Tokenizer, load_tokenizer


def refuse(message: str):
    """End the process with one line and exit code 2."""
    print("evaluate.py:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        refuse(f"{message}; --help lists the flags")


def import_as_train_gpt(path: str):
    path = os.path.expanduser(path)
    if not path.endswith(".py") or not os.path.isfile(path):
        refuse(f"--script={path}: no such Python file; give the train_gpt.py that made the checkpoint")
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    sys.modules["train_gpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["train_gpt"])


if __name__ == "__main__":  # before the next statement, so that it imports from --script
    early = Parser(add_help=False, allow_abbrev=False)
    early.add_argument("--script")
    if (script := early.parse_known_args()[0].script) is not None:
        import_as_train_gpt(script)

try:
    from train_gpt import (
        GPT, LOSS_CHUNK, POINTER_WINDOW, Config, Documents, Hardware, Log, UserError, Validation, World,
        activation_region, backward_micro_batch, build_rotary, cap, check_ranks_agree, choose_hardware,
        cut_at_bos, data_folder, gradient, load_token_table, load_weights, log_root, pinned,
        plan_step, read_checkpoint, region, source, to_device, write_checkpoint,
    )
except ImportError as error:
    refuse(f"{error}: older trainers evaluate checkpoints themselves, by --checkpoint=FILE --eval=METHODS")

# ----------------------------------------------------------------------------------------------------------
# Options

METHODS = ("packed", "document", "stride", "ttt-sgd", "ttt-lora")
MATRICES = ("q", "k", "v", "o", "up", "down", "head")


def flag(default, help: str, least: float = 0, below: float = 1e12):
    """A field of Options: its default, its help and the range of a number."""
    return dataclasses.field(default=default, metadata={"help": help, "least": least, "below": below})


@dataclass(frozen=True)
class Options:
    """Each field is a flag."""

    # what to do
    methods: str = flag("", f"evaluate: some of {','.join(METHODS)}")
    sample: str = flag(None, "continue this text")
    export: str = flag("", "write the weights, without auxiliary heads, to this .safetensors file, and the "
                       "config to a .json file beside it")
    # on what
    script: str = flag("", "the trainer that made the checkpoint, if not train_gpt.py beside this file")
    log_folder: str = flag("", "folder of the logs, if not logs/ beside the trainer")
    data: str = flag("", "folder of the shards, if not the checkpoint's")
    val_tokens: int = flag(None, "validation tokens, if not as many as in training; 0: all")
    every: int = flag(1, "evaluate every n-th document", 1)
    # sampling
    tokenizer: str = flag("", "bytes, gpt2 or FILE.tiktoken, if not the data folder's")
    sample_tokens: int = flag(200, "tokens to add, unless the document ends before", 1)
    temperature: float = flag(0.7, "divides the logits")
    seed: int = flag(None, "of samples and adapters, if not the checkpoint's")
    # windows
    context: int = flag(2048, "tokens of a window of stride, ttt-sgd and ttt-lora ..", 1)
    stride: int = flag(32, ".. of which the last are scored, and ttt-lora learns from them", 1)
    batch: int = flag(32_768, "tokens that run at a time", 1)
    slots: int = flag(64, "documents under way at a time", 1)
    # ttt-lora
    lora_rank: int = flag(16, "rank of the adapters", 1)
    lora_lr: float = flag(3e-4, "learning rate")
    lora_beta2: float = flag(0.999, "decay of RMSProp's mean of squared gradients", below=1)
    lora_matrices: str = flag(",".join(MATRICES), "which have adapters")
    # ttt-sgd
    sgd_chunk: int = flag(32_768, "tokens to score before learning from them", 1)
    sgd_lr: float = flag(0.002, "learning rate at the first chunk; falls as a cosine")
    sgd_epochs: int = flag(1, "steps for each chunk")
    sgd_momentum: float = flag(0.9, "momentum", below=1)
    sgd_clip: float = flag(1.0, "largest norm of the gradient; 0: any")
    sgd_weights: str = flag("all", "names of the parameters that learn, or all")


GROUPS = {  # of --help, by the first flag
    "methods": "what to do", "script": "on what", "tokenizer": "sampling", "context": "windows",
    "lora_rank": "ttt-lora", "sgd_chunk": "ttt-sgd",
}
TINY = {"context": 512, "batch": 8192, "lora_lr": 0.002, "sgd_chunk": 2048, "sgd_lr": 0.1}


def parse_options(argv: list[str]) -> tuple[str, dict]:
    """The checkpoint, "" if none is named, and the flags that are given. Raises UserError."""
    parser = Parser(usage="evaluate.py [CHECKPOINT] [--flag=value ..]", description=__doc__,
                    epilog=f"Defaults for checkpoints of the tiny track: {TINY}", allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    parser.add_argument("checkpoint", nargs="?", default="", metavar="CHECKPOINT",
                        help="a checkpoint, an export, or a log folder, whose last checkpoint is taken; if "
                        "there is none, the newest checkpoint of all logs")
    for field in dataclasses.fields(Options):
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        default = f" [{field.default}]" if field.default else ""
        group.add_argument(f"--{field.name}", type=field.type, metavar=field.type.__name__,
                           help=field.metadata["help"] + default)
    given = vars(parser.parse_args(argv))
    checkpoint = given.pop("checkpoint")
    for name, value in given.items():
        limits = Options.__dataclass_fields__[name].metadata
        if not isinstance(value, str) and not limits["least"] <= value < limits["below"]:
            expected = f"a number from {limits['least']} to below {limits['below']:g}"
            raise UserError(f"--{name}={value}: expected {expected}")
    if not given.keys() & {"methods", "sample", "export"}:
        raise UserError("nothing to do: give --methods=stride,ttt-lora, --sample=TEXT or --export=FILE")
    return checkpoint, given


def check_names(name: str, text: str, known: tuple):
    """Raise UserError unless `text`, the value of flag `name`, lists some of the known names, each once."""
    given = text.split(",")
    if len(set(given) & set(known)) < len(given):
        raise UserError(f"--{name}={text}: expected some of {','.join(known)}")


def check_options(options: Options, weights: tuple):
    """Raise UserError where options don't fit together or to the names of the model's weights."""
    if options.methods:
        check_names("methods", options.methods, METHODS)
    check_names("lora_matrices", options.lora_matrices, MATRICES)
    if options.sgd_weights != "all":
        check_names("sgd_weights", options.sgd_weights, weights)
    if options.stride > options.context:
        raise UserError(f"--stride={options.stride}: at most --context={options.context}")
    export = Path(options.export).expanduser()
    if options.export and export.suffix != ".safetensors":
        raise UserError(f"--export={options.export}: must end in .safetensors; the config goes to .json")
    for path in (export, export.with_suffix(".json")) if options.export else ():
        if path.exists():
            raise UserError(f"--export={options.export}: {path} exists already: name another file")


# ----------------------------------------------------------------------------------------------------------
# Windows: which tokens run together, and which of them are scored

BLOCK = 64  # tokens; a window is filled up to a multiple


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
    """This rank's part of documents (lists of windows); ranks differ by no more than the longest document."""
    some = [windows for windows in documents if windows]
    some.sort(key=lambda windows: -sum(window.blocks for window in windows))
    return some[world.rank :: world.size]


def continuous_batches(documents: list, slots: int, tokens: int):
    """Batches of turns: a document that ends is replaced at once, and those with most windows left go first.

    A document runs one window at a time, a batch has at most `tokens` tokens or one window. Longest first and
    always on: the longest document is not what is left at the end.
    """
    waiting = sorted(documents, key=len, reverse=True)
    active = {}  # slot -> windows of its document, number of the next one
    while waiting or active:
        free = [slot for slot in range(slots) if slot not in active]
        active |= {slot: (windows, 0) for slot, windows in zip(free, waiting)}
        waiting = waiting[len(free) :]
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
    following: Tensor            # (T,) int64: the tokens after them
    docs: Documents
    window: Tensor               # (N,) int64: number of each block's window
    rows: Tensor                 # (R,) int64: where the latents of the scored targets are
    targets: Tensor              # (R,) int64; -1: none
    places: Tensor               # (R,) int64: of the targets in the stream; 0: none


def upload(data, device) -> Tensor:
    return pinned(data, device).to(device, non_blocking=True)


def lay_out(tokens: np.ndarray, windows: list[Window], rows: int, bos: int, device) -> WindowBatch:
    """A batch of windows with `rows` rows for each, or, if that is 0, with as many as it scores."""
    blocks = np.array([window.blocks for window in windows])
    ends = BLOCK * np.cumsum(blocks)
    inputs_T, following_T = np.full((2, ends[-1]), bos)
    first_T = np.zeros(ends[-1], bool)
    at, places = [], []
    for window, start in zip(windows, ends - BLOCK * blocks):
        length = window.hi - window.lo
        inputs_T[start : start + length] = tokens[window.lo : window.hi]
        following_T[start : start + length] = tokens[window.lo + 1 : window.hi + 1]
        first_T[start] = True
        own = np.arange(window.first, window.hi)
        at.append(np.resize(own, rows or len(own)) - window.lo + start)
        places.append(np.pad(own + 1, (0, max(rows - len(own), 0))))
    places_R = np.concatenate(places)
    targets_R = np.where(places_R > 0, tokens[places_R], -1)
    cu_seqlens = upload(np.append(0, ends).astype(np.int32), device)
    docs = Documents(cu_seqlens, BLOCK * int(blocks.max()), upload(first_T, device))
    window_N = np.repeat(np.arange(len(windows)), blocks)
    others = (upload(x, device) for x in (window_N, np.concatenate(at), targets_R, places_R))
    return WindowBatch(upload(inputs_T, device), upload(following_T, device), docs, *others)


# ----------------------------------------------------------------------------------------------------------
# Adapters: low-rank updates y += (x A^T) B^T of products, a set for each window of a batch


class AdaptedGPT(GPT):
    """A GPT whose products have adapters added, if there are any; they then learn in place of its weights."""

    adapters = {}                # matrix -> per layer: A (S, r, C), B (S, R, r), in the activations' dtype
    window_N = None              # number of each block's window

    def add(self, names, layer: int, x_TC, y_TR) -> Tensor:
        """y with the updates of the named matrices, whose outputs lie side by side in it."""
        x_NBC = x_TC.view(-1, BLOCK, x_TC.size(1))
        parts = list(y_TR.view(-1, BLOCK, y_TR.size(1)).chunk(len(names), dim=2))
        for j, name in enumerate(names):
            if name in self.adapters:
                a, b = (factor.index_select(0, self.window_N) for factor in self.adapters[name][layer])
                parts[j] = torch.baddbmm(parts[j], x_NBC @ a.mT, b.mT)
        return (torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]).view_as(y_TR)

    def project(self, name: str, a: int, x_TD) -> Tensor:
        y_TR = super().project(name, a, x_TD)
        return self.add(name, a, x_TD, y_TR) if self.adapters else y_TR  # the letters of "qkv" are names

    def mlp(self, i: int, h_TD, h8_TD) -> Tensor:
        if not self.adapters:
            return super().mlp(i, h_TD, h8_TD)
        up_FD, down_FD = self.compute_weights["mlp_bank"][0][i]
        z_TF = self.add(["up"], i, h_TD, h_TD @ up_FD.T)
        hidden_TF = activation_region(z_TF, self.cfg.leaky_slope)
        return self.add(["down"], i, hidden_TF, hidden_TF @ down_FD)

    def products(self, x_RD) -> Tensor:
        """Logits before the soft cap; with adapters the same number of rows for each window."""
        logits_RV = super().products(x_RD)
        if "head" not in self.adapters:
            return logits_RV
        a, b = self.adapters["head"][0]
        return logits_RV + (x_RD.view(len(a), -1, x_RD.size(1)) @ a.mT @ b.mT).flatten(0, 1)


class LoRA:
    """A set of adapters for each slot, and the RMSProp (Adam with beta1 = 0) that trains it.

    For the (R, C) matrices of n layers A is (slots, n, r, C), at first uniform in +-1/sqrt(C), and B
    (slots, n, R, r), at first 0.
    """

    def __init__(self, model: GPT, options: Options):
        matrices = dict.fromkeys("qkvo", model.attn_bank[:, 0])
        matrices["up"] = model.mlp_bank[:, 0]
        matrices["down"] = model.mlp_bank[:, 1].mT
        matrices["head"] = model.head[None]
        self.options = options
        self.names = options.lora_matrices.split(",")
        self.first = []
        generator = torch.Generator().manual_seed(options.seed)
        for name in self.names:
            layers, rows, columns = matrices[name].shape
            draws = torch.rand(layers, options.lora_rank, columns, generator=generator)
            self.first.append(((2 * draws - 1) / math.sqrt(columns)).to(model.head.device))
            self.first.append(model.head.new_zeros(layers, rows, options.lora_rank))
        self.factors = [x.new_zeros(options.slots, *x.shape) for x in self.first]
        self.seconds = [torch.zeros_like(x) for x in self.factors]
        self.steps = model.head.new_zeros(options.slots)

    def reset(self, slot: int):
        """Forget the slot's document."""
        for factor, second, first in zip(self.factors, self.seconds, self.first):
            factor[slot] = first
            second[slot] = 0
        self.steps[slot] = 0

    def take(self, slots: Tensor, dtype: torch.dtype) -> tuple[dict, list]:
        """AdaptedGPT.adapters for windows in these slots, and the leaves that they are made of."""
        leaves = [x[slots].requires_grad_() for x in self.factors]
        layers = [x.to(dtype).unbind(1) for x in leaves]
        pairs = zip(layers[::2], layers[1::2])
        return {name: list(zip(*pair)) for name, pair in zip(self.names, pairs)}, leaves

    @torch.no_grad()
    def learn(self, slots: Tensor, leaves: list, grads: tuple):
        """One step of these slots' adapters, each with its own count of steps."""
        beta = self.options.lora_beta2
        self.steps[slots] += 1
        bias = (1 - beta ** self.steps[slots]).view(-1, 1, 1, 1)
        for factor, second, leaf, grad in zip(self.factors, self.seconds, leaves, grads):
            moment = beta * second[slots] + (1 - beta) * grad * grad
            second[slots] = moment
            factor[slots] = leaf - self.options.lora_lr * grad / ((moment / bias).sqrt() + 1e-10)


# ----------------------------------------------------------------------------------------------------------
# Methods


def final_windows(cfg: Config) -> dict:
    return plan_step(cfg, cfg.total_steps).windows


class Evaluation:
    """Scores the validation tokens once, by one method."""

    def __init__(self, model: AdaptedGPT, val: Validation, options: Options, world: World):
        self.model = model
        self.cfg = model.cfg
        self.val = val
        self.tokens = val.tokens.numpy()
        self.options = options
        self.world = world
        self.device = model.embed.device
        longest = max(options.batch, options.context, options.sgd_chunk, model.cfg.val_chunk)
        self.rotary = build_rotary(model.cfg, longest + BLOCK, self.device)
        self.nats = torch.zeros(len(self.tokens), device=self.device)
        self.times = torch.zeros_like(self.nats)  # that each token was scored
        model.requires_grad_(False)
        model.refresh()

    def run(self, method: str) -> tuple:
        """The sum of nats, over how many tokens, and the nats of each, (tokens,) float64; None for packed."""
        if method == "packed":
            result = self.val.run(self.model, final_windows(self.cfg), self.rotary, self.world)
            return result["val_loss"] * self.val.count, self.val.count, None
        getattr(self, method.replace("-", "_"))()
        nats = self.collect()
        return nats.sum(), int((self.tokens[1:] != self.cfg.bos).sum()), nats

    def windows(self, context: int, stride: int) -> list[list]:
        """Those of each document."""
        documents = find_documents(self.tokens, self.cfg.bos)
        return [document_windows(lo, hi, context, stride) for lo, hi in documents]

    def strides(self) -> list[list]:
        return self.windows(self.options.context, self.options.stride)

    def score(self, windows: list[Window], rows: int = 0) -> Tensor:
        """Run windows as one batch: cross entropy of each target, (R,), 0 for none. rows: see lay_out."""
        batch = lay_out(self.tokens, windows, rows, self.cfg.bos, self.device)
        self.model.window_N = batch.window
        x_TD = self.model(batch.tokens, batch.docs, final_windows(self.cfg), self.rotary)
        x_RD = x_TD.index_select(0, batch.rows)
        size = LOSS_CHUNK if rows == 0 else len(x_RD)  # adapters of the head need all windows' rows
        window = min(POINTER_WINDOW[1], batch.docs.longest)
        masses_R2 = self.model.copy_masses(x_TD, batch.following, batch.docs, window)
        if masses_R2 is not None:
            masses_R2 = masses_R2.index_select(0, batch.rows)
        losses_R = torch.cat([*self.model.token_losses(x_RD, batch.targets, masses_R2, size)])
        self.nats.index_add_(0, batch.places, losses_R.detach())
        self.times.index_add_(0, batch.places, (batch.targets >= 0).float())
        return losses_R

    def collect(self) -> np.ndarray:
        """The nats of each token, over all ranks, (tokens,) float64; 0 for BOS and the first.

        Raises RuntimeError unless every other token was scored once.
        """
        times = self.world.all_reduce(self.times).cpu().numpy()
        if not np.array_equal(times[1:], self.tokens[1:] != self.cfg.bos):
            raise RuntimeError("an evaluation didn't score every token once")
        return self.world.all_reduce(self.nats).double().cpu().numpy() * (times == 1)

    @torch.no_grad()
    def score_documents(self, documents: list[list]):
        """Score this rank's documents, lists of windows, without learning."""
        for turns in continuous_batches(documents, self.options.slots, self.options.batch):
            self.score([turn.window for turn in turns])

    def document(self):
        """Each document in one window; those beyond val_chunk tokens in several."""
        size = self.cfg.val_chunk
        self.score_documents(deal_documents(self.windows(size, size), self.world))

    def stride(self):
        self.score_documents(deal_documents(self.strides(), self.world))

    def ttt_lora(self, schedule=continuous_batches):
        own = deal_documents(self.strides(), self.world)
        lora = LoRA(self.model, self.options)
        for turns in schedule(own, self.options.slots, self.options.batch):
            for turn in turns:
                if turn.fresh:
                    lora.reset(turn.slot)
            self.adapt(turns, lora)

    def adapt(self, turns: list[Turn], lora: LoRA):
        """Score a batch of windows, then have the adapters of their documents learn from them."""
        windows = [turn.window for turn in turns]
        learning = any(turn.more for turn in turns)
        slots = upload([turn.slot for turn in turns], self.device)
        with torch.set_grad_enabled(learning):
            self.model.adapters, leaves = lora.take(slots, self.model.dtype)
            losses_R = self.score(windows, self.options.stride)
            self.model.adapters = {}
        if learning:  # a document's last window may have fewer targets, but what learns from it is forgotten
            means = losses_R.sum() / self.options.stride
            lora.learn(slots, leaves, torch.autograd.grad(means, leaves))

    def ttt_sgd(self):
        options, model = self.options, self.model
        kept = {name: p.clone() for name, p in model.state_dict().items()}
        chosen = options.sgd_weights.split(",")
        weights = [p for name, p in model.named_parameters() if name in chosen or chosen == ["all"]]
        optimizer = torch.optim.SGD(weights, lr=options.sgd_lr, momentum=options.sgd_momentum)
        chunks = self.chunks()
        for i, windows in enumerate(chunks):
            self.score_documents([[window] for window in windows[self.world.rank :: self.world.size]])
            falling = 0.5 * (1 + math.cos(math.pi * i / len(chunks)))
            optimizer.param_groups[0]["lr"] = options.sgd_lr * falling
            for _ in range(options.sgd_epochs if i + 1 < len(chunks) else 0):
                self.descend(i, optimizer, weights)
        model.load_state_dict(kept)
        model.zero_grad()
        model.refresh()

    def chunks(self) -> list[list]:
        """The windows of stride, by the chunk of sgd_chunk tokens that their first scored target is in."""
        size = self.options.sgd_chunk
        chunks = [[] for _ in range(0, len(self.tokens) - 1, size)]
        for window in itertools.chain(*self.strides()):
            chunks[window.first // size].append(window)
        return chunks

    def descend(self, chunk: int, optimizer: torch.optim.SGD, weights: list):
        """One step of SGD on a chunk, all of whose targets have been scored."""
        cfg, model, world = self.cfg, self.model, self.world
        size = self.options.sgd_chunk
        inputs = chunk * size + np.arange(size)
        pieces = np.array_split(inputs, max(cfg.micro_batches, world.size))
        plan = plan_step(cfg, cfg.total_steps)._replace(weights=(1.0,))
        loss_weights = torch.tensor([[1 / size], [0.0]], device=self.device)  # auxiliary heads don't count
        model.requires_grad_(True)
        for piece in pieces[world.rank :: world.size]:
            if len(piece):
                tokens = torch.from_numpy(self.tokens[piece[0] : piece[-1] + 2])
                batch = to_device(cut_at_bos(tokens, cfg.bos), self.device)
                backward_micro_batch(model, batch, plan, self.rotary, loss_weights)
        for p in weights:
            world.all_reduce(gradient(p))
        if self.options.sgd_clip:
            nn.utils.clip_grad_norm_(weights, self.options.sgd_clip)
        optimizer.step()
        model.requires_grad_(False)
        model.zero_grad(set_to_none=False)
        model.refresh()


# ----------------------------------------------------------------------------------------------------------
# Results


def load_documents(cfg: Config, every: int) -> Validation:
    """Every n-th document of the validation tokens. Raises UserError."""
    tokens = Validation.load(cfg).tokens.numpy()
    documents = find_documents(tokens, cfg.bos)[::every]
    tokens = np.concatenate([tokens[lo:hi] for lo, hi in documents])
    if (tokens[1:] == cfg.bos).all():
        raise UserError(f"--every={every}: no token to score in {len(documents)} documents")
    return Validation(cfg, tokens, load_token_table(cfg, "token_bytes.npy"))


def synthetic_documents(cfg: Config, options: Options) -> Validation:
    """Random tokens of the lengths that evaluations meet, for what is compiled or allocated at first use."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, cfg.bos, 2 * max(options.sgd_chunk, options.batch))
    starts = np.cumsum(generator.integers(2, 2 * options.context, len(tokens)))
    tokens[starts[starts < len(tokens)]] = cfg.bos
    return Validation(cfg, tokens)


def measure(method: str, model: AdaptedGPT, val: Validation, options: Options, hardware: Hardware,
            world: World) -> tuple[dict, np.ndarray | None]:
    """One row of the table of results, and the nats of each token, None for packed."""
    if hardware.compile:
        Evaluation(model, synthetic_documents(model.cfg, options), options, world).run(method)
    if hardware.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(hardware.device)
    evaluation = Evaluation(model, val, options, world)
    world.all_reduce(torch.zeros(1, device=hardware.device))  # all start together
    hardware.synchronize()
    start = time.perf_counter()
    total, tokens, nats = evaluation.run(method)
    hardware.synchronize()
    seconds = time.perf_counter() - start
    bpb = total / math.log(2) / val.bytes if val.bytes else None
    row = {"loss": total / tokens, "bpb": bpb, "tokens": tokens, "seconds": round(seconds, 2)}
    return row | {"peak_mib": torch.cuda.max_memory_allocated() // 2**20}, nats


def result_table(rows: dict) -> str:
    lines = [f"{'method':10}{'tokens':>11}{'loss':>9}{'bpb':>9}{'gain':>9}{'seconds':>9}{'peak MiB':>10}"]
    for method, row in rows.items():
        bpb = "-" if row["bpb"] is None else f"{row['bpb']:.4f}"
        gain = "-"
        if "stride" in rows and method != "packed":  # which scores BOS, too
            gain = f"{rows['stride']['loss'] - row['loss']:+.4f}"
        lines.append(f"{method:10}{row['tokens']:>11,}{row['loss']:>9.4f}{bpb:>9}{gain:>9}"
                     f"{row['seconds']:>9.1f}{row['peak_mib']:>10,}")
    return "\n".join(lines)


def plot_gains(folder: Path, documents: list, nats: dict) -> str:
    """Draw gain.png: nats per token that methods gain over stride, by position in the document."""
    from matplotlib.figure import Figure

    position = np.concatenate([np.arange(hi - lo) for lo, hi in documents])
    bucket = np.floor(2 * np.log2(np.maximum(position, 1))).astype(int)  # two to a doubling
    count = np.bincount(bucket, position > 0)
    some = np.flatnonzero(count)
    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.subplots()
    for method in nats:
        gain = np.bincount(bucket, nats["stride"] - nats[method])
        axes.plot(2 ** (some / 2), gain[some] / count[some], "o-", label=method, lw=1, ms=3)
    axes.set(xscale="log", xlabel="position in the document (tokens)", ylabel="nats gained over stride")
    axes.legend()
    figure.savefig(folder / "gain.png", dpi=120)
    return str(folder / "gain.png")


def evaluate(path: Path, model: AdaptedGPT, options: Options, hardware: Hardware, world: World):
    """Score the validation tokens with each method. A log folder gets the table, metrics.jsonl and a plot."""
    val = load_documents(model.cfg, options.every)
    facts = {"flags": str(options), "checkpoint": path.name, "validation data": val.sha256}
    check_ranks_agree(facts, world)
    log = Log(replace(model.cfg, track=f"{model.cfg.track}-eval"), world)  # names the folder
    log.line(f"{source()} torch:{torch.__version__} {hardware.name} world_size:{world.size}")
    log.line(f"options {json.dumps(vars(options))}", console=False)
    documents = find_documents(val.tokens.numpy(), model.cfg.bos)
    log.line(f"{path}: {len(documents)} documents, every:{options.every} tokens:{val.count} "
             f"bytes:{val.bytes or 'unknown'} sha256:{val.sha256}")
    rows, nats = {}, {}
    for method in options.methods.split(","):
        row, nats[method] = measure(method, model, val, options, hardware, world)
        rows[method] = row
        if not math.isfinite(row["loss"]):
            raise UserError(f"{method}: the loss is {row['loss']}, which is no result: lower its rate")
        log.line(f"{method}: loss {row['loss']:.4f}, {row['seconds']:.1f} s")
        log.metric(method=method, **row)
    log.line(result_table(rows))
    nats.pop("packed", None)
    if log.folder and "stride" in nats and len(nats) > 1:
        log.line(f"plot: {plot_gains(log.folder, documents, nats)}")
    log.line(f"log: {log.folder}")


# ----------------------------------------------------------------------------------------------------------
# Checkpoints


def find_checkpoint(given: str, log_folder: str) -> Path:
    """`given`, or the last checkpoint of that log folder, or the newest of all logs. Raises UserError."""
    place = Path(given).expanduser() if given else log_root(Config(log_folder=log_folder))
    if place.is_file():
        return place
    found = [*place.glob("checkpoint_*.safetensors"), *place.glob("*/checkpoint_*.safetensors")]
    if not found:
        raise UserError(f"no checkpoint in {place}: train first, or name a checkpoint or a log folder")
    return max(found, key=lambda path: (path.parent.name, path.name))  # a run's folder begins with its time


def load(checkpoint: str, given: dict, world: World,
         read=read_checkpoint) -> tuple[Path, AdaptedGPT, Options, Hardware]:
    """What parse_options has found, ready for use. read: see run. Raises UserError."""
    path = find_checkpoint(checkpoint, given.get("log_folder", ""))
    try:
        tensors, meta = read(str(path), tensors=True)
        cfg = meta["config"]
        defaults = TINY if cfg.track == "tiny" else {}
        options = Options(**{"seed": cfg.seed} | defaults | given)
        changes = {name: given[name] for name in ("data", "val_tokens") if name in given}
        cfg = replace(cfg, log_folder=options.log_folder, **changes)
        hardware = choose_hardware(cfg, world)
        region.compile = hardware.compile
        with hardware.device:
            model = AdaptedGPT(cfg, hardware.dtype, hardware.attention, hardware.kernels)
        load_weights(model, tensors, str(path))
    except UserError as error:
        own = path.parent / "train_gpt.py"
        script = own if own.is_file() else "FILE"
        raise UserError(f"{error}; if another trainer made it, give that as --script={script}") from None
    check_options(options, tuple(name for name, _ in model.named_parameters()))
    return path, model, options, hardware


def find_tokenizer(options: Options, cfg: Config) -> Tokenizer:
    """Raises UserError if there is none, or another than the model's."""
    try:
        tokenizer = load_tokenizer(os.path.expanduser(options.tokenizer or data_folder(cfg)))
    except ValueError as error:
        raise UserError(f"--sample: {error}; or give --tokenizer=") from None
    if tokenizer.vocab_size != cfg.vocab_size:
        raise UserError(f"--sample: the model has {cfg.vocab_size} tokens, the tokenizer {tokenizer.name} "
                        f"{tokenizer.vocab_size}: give the model's as --tokenizer=")
    return tokenizer


def next_token_logits(model: GPT, x_TD, targets_T) -> Tensor:
    """Logits (V,), soft-capped, of the token after one document with these latents, copies mixed in.

    targets_T: of all but its last position.
    """
    logits_V = cap(model.products(x_TD[-1:]))[0]
    if not model.cfg.pointer:
        return logits_V
    q_TE, k_TE = model.pointer_heads(x_TD)
    scores_T = (k_TE[:-1] @ q_TE[-1]).float()[-POINTER_WINDOW[1] :]
    masses_T = torch.cat([scores_T, model.pointer_sink[None]]).softmax(0)
    copied_V = torch.zeros_like(logits_V).index_add_(0, targets_T[-POINTER_WINDOW[1] :], masses_T[:-1])
    q_V = logits_V.softmax(0).clamp_min(1e-30)
    a = q_V[model.cfg.vocab_size].clamp_max(1 - 1e-6)
    kept = (1 - a * (1 - masses_T[-1])) / (1 - a)
    return logits_V + (kept + a * copied_V / q_V).log()  # the mixture of train_gpt.loss_region


@torch.no_grad()
def sample_text(model: AdaptedGPT, tokenizer: Tokenizer, options: Options) -> str:
    """The text continued by sample_tokens tokens, or up to the end of the document. Nothing is cached."""
    cfg, device = model.cfg, model.embed.device
    ids = [cfg.bos, *tokenizer.encode(options.sample).tolist()]
    rotary = build_rotary(cfg, len(ids) + options.sample_tokens, device)
    generator = torch.Generator().manual_seed(options.seed)
    region.compile = False  # compiling takes longer than these few tokens
    model.refresh()
    while len(ids) < len(rotary.cos_PJ):
        batch = to_device(cut_at_bos(torch.tensor([*ids, 0]), cfg.bos), device)
        x_TD = model(batch.tokens[:-1], batch.docs, final_windows(cfg), rotary)
        logits_V = next_token_logits(model, x_TD, batch.tokens[1:-1])[: cfg.vocab_size].cpu()
        probabilities_V = (logits_V / max(options.temperature, 1e-6)).softmax(-1)
        token = int(torch.multinomial(probabilities_V, 1, generator=generator))
        if token == cfg.bos:
            break
        ids.append(token)
    return tokenizer.decode(ids[1:])


def export_model(path: Path, model: GPT):
    """Write the weights without auxiliary heads, and the config beside them. Raises UserError."""
    from safetensors import SafetensorError

    config = vars(replace(model.cfg, mtp_heads=0, resume="", log_folder=""))
    weights = {f"model.{name}": p for name, p in model.named_parameters() if name != "mtp_heads"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(path, weights, {"config": config})
        with open(path.with_suffix(".json"), "x") as file:
            file.write(json.dumps(config, indent=1))
    except (OSError, SafetensorError) as error:
        raise UserError(f"can't write {path}: {error}") from None


def run(argv: list[str], read=read_checkpoint):
    """read: what reads the file, if it is another kind than a checkpoint; see read_checkpoint."""
    checkpoint, given = parse_options(argv)
    world = World.from_environment()
    path, model, options, hardware = load(checkpoint, given, world, read)
    world.meet(hardware, minutes=60)
    if world.size > 1 and hardware.device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.size))
    failed = ""
    if options.export and world.rank == 0:
        try:
            export_model(Path(options.export).expanduser(), model)
            print(f"export: {options.export}")
        except UserError as error:  # the rest is done first
            failed = str(error)
    if options.methods:
        evaluate(path, model, options, hardware, world)
    if options.sample is not None and world.rank == 0:
        print(sample_text(model, find_tokenizer(options, model.cfg), options))
    world.leave()
    if failed:
        raise UserError(failed)


def main():
    try:
        run(sys.argv[1:])
    except (UserError, OSError) as error:  # as of a full disk
        refuse(str(error))
    except torch.OutOfMemoryError as error:
        refuse(f"{str(error).split('. ')[0]}: lower --batch=, --slots= or --lora_rank=")


if __name__ == "__main__":
    main()
