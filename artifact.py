"""Packs a trained model into one file of at most 16,000,000 bytes, scripts included; evaluates such a file.

    python artifact.py pack CHECKPOINT OUT.golf [--bits=attn:6,mlp:6] [--k=mlp:11.5] [--evaluate]
    python artifact.py info FILE.golf
    python artifact.py evaluate FILE.golf --data=FOLDER --methods=packed,stride,ttt-lora

pack runs the model over training data, rounds its matrices to integers times a scale for each row by GPTQ,
and codes the integers with an entropy coder. --bits bounds the integers; --k decides how many bytes they take
(see quantise.py). Both are given by kind: attn, mlp, embed, head (also of a tied embedding, which is stored
once) and table (value and bigram embeddings). Small parameters stay float32, auxiliary heads are left out.
The same checkpoint gives the same bytes on the same machine, and every machine reads the same weights from
them. A file that would make more than 16,000,000 bytes with the scripts that it needs is not written.

evaluate takes the flags of evaluate.py. It needs the file, the scripts in SHIPPED and validation data.

A file has a magic word, its version and the header's length; the header, JSON with the config and the table
of tensors; the tensors' bytes in the order of the table; and the sha256 of all that. Nothing in it is
executed. A tensor is float32 or, quantised, what describes its codes, by lzma, and then the codes, by rANS.
What describes them: scales (bfloat16), the frequencies of codes in each class, and levels of the rows and
columns, which together decide a code's class. Everything is little-endian.

Shape suffixes: N: codes of a tensor   R, C: rows (outputs) and columns (inputs) of a matrix
    K: classes   S: symbols, the possible codes   P: parts of the range that rANS divides among symbols
"""

import argparse
import dataclasses
import hashlib
import json
import lzma
import math
import struct
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import evaluate
from train_gpt import (
    GPT, LEAST, Config, Hardware, Parser, UserError, Validation, World, check_config, choose_hardware,
    config_from_json, find_shards, load_weights, open_shard, optimizer_table, read_checkpoint, region,
    require,
)

BUDGET = 16_000_000
SHIPPED = ("artifact.py", "evaluate.py", "train_gpt.py", "data/__init__.py", "data/tokenizer.py")
HEAD, MAGIC, VERSION = struct.Struct("<8sII"), b"GPTGOLF\n", 1
KINDS = {  # of the quantised parameters
    "attn_bank": "attn", "mlp_bank": "mlp", "embed": "embed", "head": "head", "pointer": "head",
    "value_embeds": "table", "bigram_embed": "table",
}
BITS = {"attn": 6, "mlp": 6, "embed": 7, "head": 7, "table": 6}
K = {"attn": 13.0, "mlp": 11.5, "embed": 14.0, "head": 14.0, "table": 13.0}


class Refused(Exception):
    """A file that is no artifact, or a damaged one."""


# ----------------------------------------------------------------------------------------------------------
# Entropy coder: rANS (arXiv 1311.2540) with a state for each of many lanes, which numpy codes together

CLASSES = 24                   # of codes, by how large they are expected to be
BITS_OF_RANGE = 14
LOW = 2**16                    # of a state, which has 32 bits
FILTERS = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 22, "lc": 1, "lp": 1, "pb": 1}]  # 16-bit numbers


def lane_count(symbols: int) -> int:
    return min(max(symbols >> 12, 32), 1024)


def frequencies(symbols_N, classes_N, count: int) -> np.ndarray:
    """Parts of the range for each symbol, (K, S) uint16: none for what doesn't occur, else at least one.

    count: S. Classes that don't occur have no parts.
    """
    seen_KS = np.bincount(classes_N.astype(np.int64) * count + symbols_N, minlength=CLASSES * count)
    seen_KS = seen_KS.reshape(CLASSES, count)
    present_KS = seen_KS > 0
    room_K1 = (1 << BITS_OF_RANGE) - present_KS.sum(1, keepdims=True)
    freq_KS = seen_KS * room_K1 // np.maximum(seen_KS.sum(1, keepdims=True), 1) + present_KS
    rest_K = np.where(present_KS.any(1), (1 << BITS_OF_RANGE) - freq_KS.sum(1), 0)
    freq_KS[np.arange(CLASSES), seen_KS.argmax(1)] += rest_K
    return freq_KS.astype(np.uint16)


def rans_encode(symbols_N, classes_N, freq_KS) -> bytes:
    """The lanes' last states, and words of 16 bits in the order in which `rans_decode` reads them."""
    first_KS = np.cumsum(freq_KS, axis=1, dtype=np.uint64) - freq_KS
    place_N = classes_N.astype(np.int64) * freq_KS.shape[1] + symbols_N
    lanes = lane_count(len(symbols_N))
    state, words = np.full(lanes, LOW, np.uint64), []
    for lo in reversed(range(0, len(symbols_N), lanes)):
        place = place_N[lo : lo + lanes]
        freq, first = freq_KS.ravel()[place].astype(np.uint64), first_KS.ravel()[place]
        x = state[: len(place)]  # a view
        full = x >= freq << (32 - BITS_OF_RANGE)
        words.append(x[full].astype("<u2"))  # the low half
        x[full] >>= 16
        x[:] = (x // freq << BITS_OF_RANGE) + x % freq + first
    return state.astype("<u4").tobytes() + np.concatenate(words[::-1]).tobytes()


def rans_decode(data: bytes, classes_N, freq_KS) -> np.ndarray:
    """The symbols, (N,) uint8, of bytes that `rans_encode` made. Raises UserError on others."""
    count, lanes = len(classes_N), lane_count(len(classes_N))
    require(len(data) >= 4 * lanes and len(data) % 2 == 0, "codes end too early")
    state = np.frombuffer(data, "<u4", lanes).astype(np.uint64)
    words, at = np.frombuffer(data, "<u2", offset=4 * lanes), 0
    first_KS = np.cumsum(freq_KS, axis=1, dtype=np.uint64) - freq_KS
    size = 1 << BITS_OF_RANGE
    table_KP = np.zeros((CLASSES, size), np.uint8)  # which symbol each part of the range stands for
    for table, freq in zip(table_KP, freq_KS):
        require(freq.sum(dtype=np.int64) in (0, size), "frequencies don't add up")
        table[: freq.sum(dtype=np.int64)] = np.repeat(np.arange(len(freq)), freq)
    symbols_N = np.empty(count, np.uint8)
    for lo in range(0, count, lanes):
        kind = classes_N[lo : lo + lanes].astype(np.int64)
        x = state[: len(kind)]
        slot = x & (size - 1)
        symbol = table_KP[kind, slot.astype(np.int64)]
        x[:] = freq_KS[kind, symbol] * (x >> BITS_OF_RANGE) + slot - first_KS[kind, symbol]
        empty = np.flatnonzero(x < LOW)
        require(at + len(empty) <= len(words), "codes end too early")
        x[empty] = x[empty] << 16 | words[at : at + len(empty)]
        at += len(empty)
        symbols_N[lo : lo + lanes] = symbol
    require(at == len(words) and (state == LOW).all(), "codes don't end where they should")
    return symbols_N


# ----------------------------------------------------------------------------------------------------------
# Tensors


def matrices(name: str, tensor) -> list:
    """The (R, C) matrices of a tensor, as views: rows are outputs of a product, or entries of a table."""
    if name == "attn_bank":
        return list(tensor.flatten(0, 1))
    if name == "mlp_bank":  # down lies transposed
        return [matrix for up_FD, down_FD in tensor for matrix in (up_FD, down_FD.T)]
    return [tensor]


def level(size, mean):
    """Mean sizes of codes over their mean in general, in half octaves, int8."""
    return np.round(2 * np.log2(size / max(mean, 1e-30) + 2**-6)).clip(-12, 12).astype(np.int8)


def classes_of(row_levels: list, column_levels: list) -> np.ndarray:
    """Classes (N,) uint8 of the codes of matrices whose rows and columns have these levels."""
    sums = [rows[:, None].astype(int) + columns for rows, columns in zip(row_levels, column_levels)]
    return np.concatenate([(x + CLASSES // 2).clip(0, CLASSES - 1).astype(np.uint8).ravel() for x in sums])


def encode_tensor(codes: list, scales: list, top: int) -> tuple[bytes, int]:
    """Bytes of a quantised tensor, and how many of them come before the codes.

    codes: (R, C) int8 for each matrix, from -top to top; scales: (R,) bfloat16
    """
    sizes = [np.abs(q_RC.astype(np.float64)) for q_RC in codes]
    mean = sum(x.sum() for x in sizes) / sum(x.size for x in sizes)
    row_levels = [level(x.mean(1), mean) for x in sizes]
    column_levels = [level(x.mean(0), x.mean()) for x in sizes]
    classes_N = classes_of(row_levels, column_levels)
    symbols_N = np.concatenate([q_RC.ravel() for q_RC in codes]).astype(np.int64) + top
    freq_KS = frequencies(symbols_N, classes_N, 2 * top + 1)
    scale_R, levels = torch.cat(scales), np.concatenate(row_levels + column_levels)
    parts = scale_R.view(torch.int16).numpy().astype("<i2"), freq_KS.astype("<u2"), levels
    side = b"".join(part.tobytes() for part in parts)
    side = lzma.compress(side, lzma.FORMAT_RAW, filters=FILTERS)
    return side + rans_encode(symbols_N, classes_N, freq_KS), len(side)


def unpack(data: bytes, size: int) -> bytes:
    """What lzma packed, of `size` bytes; no more is ever made of it. Raises UserError."""
    reader = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=FILTERS)
    found = reader.decompress(data, size + 1)
    require(len(found) == size and reader.eof and not reader.unused_data, "a section has another size")
    return found


def decode_tensor(data: bytes, side: int, name: str, shape: tuple, top: int) -> torch.Tensor:
    """The tensor, float32, of what `encode_tensor` made. Raises UserError."""
    parts = matrices(name, torch.empty(shape, device="meta"))
    rows, columns = [m.size(0) for m in parts], [m.size(1) for m in parts]
    sizes = [2 * sum(rows), 2 * CLASSES * (2 * top + 1), sum(rows), sum(columns)]
    found = np.frombuffer(unpack(data[:side], sum(sizes)), np.int8)
    scale_part, freq_part, row_part, column_part = np.split(found, np.cumsum(sizes)[:-1])
    scale_R = torch.from_numpy(scale_part.view("<i2").astype(np.int16)).view(torch.bfloat16)
    require(bool(scale_R.isfinite().all()), f"{name}: a scale isn't finite")
    row_levels, column_levels = (
        np.split(part, np.cumsum(counts)[:-1]) for part, counts in ((row_part, rows), (column_part, columns)))
    freq_KS = freq_part.view("<u2").reshape(CLASSES, -1)
    symbols_N = rans_decode(data[side:], classes_of(row_levels, column_levels), freq_KS)
    codes = np.split(symbols_N.astype(np.int16) - top, np.cumsum([m.numel() for m in parts])[:-1])
    codes = [q_N.reshape(m.shape) for q_N, m in zip(codes, parts)]
    return dequantise(name, shape, codes, scale_R.split(rows))


def dequantise(name: str, shape: tuple, codes: list, scales) -> torch.Tensor:
    """The tensor, float32: each code times its row's scale."""
    tensor = torch.empty(shape)
    for matrix_RC, q_RC, scale_R in zip(matrices(name, tensor), codes, scales):
        matrix_RC.copy_(torch.from_numpy(q_RC).float() * scale_R.float()[:, None])
    return tensor


# ----------------------------------------------------------------------------------------------------------
# File


def expected_table(cfg: Config, tied: bool) -> list:
    """(name, shape) of each tensor of a file, in order."""
    return [(row.name, row.shape) for row in optimizer_table(cfg) if not (tied and row.name == "embed")]


def write_artifact(model, cfg: Config, options: argparse.Namespace) -> bytes:
    """The bytes of a file with this configuration and the weights of a CalibratedGPT, quantised."""
    from quantise import quantise  # evaluating does without

    tied = torch.equal(model.embed, model.head)
    rows, parts = [], []
    for name, shape in expected_table(cfg, tied):
        bits, side = options.bits.get(KINDS.get(name), 32), 0
        if bits == 32:
            data = getattr(model, name).detach().cpu().numpy().astype("<f4").tobytes()
        else:
            top, k = 2 ** (bits - 1) - 1, options.k[KINDS[name]]
            pairs = zip(matrices(name, getattr(model, name)), model.hessians_of(name))
            codes, scales = zip(*(quantise(w_RC, h_CC, k, top, options.round) for w_RC, h_CC in pairs))
            data, side = encode_tensor(codes, scales, top)
            expected = dequantise(name, shape, codes, scales)
            assert torch.equal(decode_tensor(data, side, name, shape, top), expected), name
        rows.append({"name": name, "shape": shape, "bits": bits, "side": side, "bytes": len(data)})
        parts.append(data)
    header = {"config": vars(replace(cfg, resume="", log_folder="")), "tied": tied, "tensors": rows}
    header = json.dumps(header, separators=(",", ":")).encode()
    body = b"".join([HEAD.pack(MAGIC, VERSION, len(header)), header, *parts])
    return body + hashlib.sha256(body).digest()


def check_header(header: dict) -> tuple[Config, list]:
    """The config and the table of a header. Raises UserError, or whatever another JSON value leads to."""
    cfg = config_from_json(header["config"])
    for field in dataclasses.fields(Config):
        kinds = (int, float) if field.type is float else field.type
        require(isinstance(getattr(cfg, field.name), kinds), f"{field.name} isn't of its type")
    for name, least in LEAST.items():
        require(getattr(cfg, name) >= least, f"{name} is below {least}")
    require(cfg.track.isidentifier() and not cfg.log_folder, "it names a folder for logs")
    require(0 < cfg.vocab_size <= 2**16 and cfg.val_chunk <= 2**24, "sizes are absurd")
    check_config(cfg)
    rows = header["tensors"]
    shapes = [(row["name"], tuple(row["shape"])) for row in rows]
    require(shapes == expected_table(cfg, header["tied"]), "the tensors aren't the model's")
    require(sum(math.prod(shape) for _, shape in shapes) <= 8 * BUDGET, "more numbers than bits")
    for row in rows:
        quantised = row["name"] in KINDS
        require(row["bits"] in range(2, 9) if quantised else row["bits"] == 32, "bits are impossible")
        require(0 <= row["side"] <= row["bytes"] and
                (quantised or row["bytes"] == 4 * math.prod(row["shape"])), "sizes are impossible")
    return cfg, rows


def parse_artifact(data: bytes) -> tuple[dict, Config, list]:
    """Weights by name, config and table of a file's bytes. Raises UserError."""
    require(len(data) >= HEAD.size + 32, "too short")
    magic, version, size = HEAD.unpack_from(data)
    require(magic == MAGIC and version == VERSION, "another kind of file, or of another version")
    require(hashlib.sha256(data[:-32]).digest() == data[-32:], "damaged: its sha256 is another")
    at, end = HEAD.size + size, len(data) - 32
    require(size <= 2**20 and at <= end, "the header is too long")
    header = json.loads(data[HEAD.size : at])
    cfg, rows = check_header(header)
    require(sum(row["bytes"] for row in rows) == end - at, "the tensors have other sizes")
    weights = {}
    for row in rows:
        part, shape = data[at : at + row["bytes"]], tuple(row["shape"])
        at += row["bytes"]
        if row["bits"] == 32:
            numbers = np.frombuffer(part, "<f4").astype(np.float32).reshape(shape)
            weights[row["name"]] = torch.from_numpy(numbers)
        else:
            top = 2 ** (row["bits"] - 1) - 1
            weights[row["name"]] = decode_tensor(part, row["side"], row["name"], shape, top)
        require(bool(weights[row["name"]].isfinite().all()), f"{row['name']} isn't finite")
    if header["tied"]:
        weights["embed"] = weights["head"].clone()
    return weights, cfg, rows


def read_artifact(path, tensors=True) -> tuple[dict, dict]:
    """What train_gpt.read_checkpoint gives of a checkpoint. Raises Refused: one line says what is wrong."""
    path = Path(path).expanduser()
    try:
        require(path.stat().st_size <= BUDGET, f"larger than {BUDGET:,} bytes")
        weights, cfg, rows = parse_artifact(path.read_bytes())
    except Exception as error:  # whatever the file holds
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__} "
        raise Refused(f"{path}: not an artifact: {kind}{' '.join(str(error).split())[:120]}") from None
    return {f"model.{name}": x for name, x in weights.items()}, {"config": cfg, "tensors": rows}


# ----------------------------------------------------------------------------------------------------------
# Commands


def account(size: int, rows: list) -> tuple[str, int]:
    """A table of a file's bytes and the scripts', and their total."""
    lines = [f"{'tensor':16}{'shape':>20}{'bits':>6}{'bytes':>12}{'bits/number':>13}"]
    for row in rows:
        shape, count = "x".join(map(str, row["shape"])), math.prod(row["shape"])
        lines.append(f"{row['name']:16}{shape:>20}{row['bits']:>6}{row['bytes']:>12,}"
                     f"{8 * row['bytes'] / max(count, 1):>13.3f}")
    others = {"header and sha256": size - sum(row["bytes"] for row in rows)}
    others |= {name: (Path(__file__).resolve().parent / name).stat().st_size for name in SHIPPED}
    total = sum(row["bytes"] for row in rows) + sum(others.values())
    others[f"total, of {BUDGET:,} at most"] = total
    return "\n".join(lines + [f"{name:42}{count:>12,}" for name, count in others.items()]), total


def load_model(kind: type, tensors: dict, cfg: Config, hardware: Hardware, path) -> GPT:
    """A model with these weights. Raises UserError."""
    region.compile = False  # compiling would take longer than these few passes
    with hardware.device:
        model = kind(cfg, hardware.dtype, hardware.attention, hardware.kernels)
    load_weights(model, tensors, path)
    return model.requires_grad_(False)


def pack(options: argparse.Namespace):
    """Write the file. Raises UserError if it would be too large or replace something else."""
    from data.shards import atomic_file  # evaluating does without these
    from quantise import CalibratedGPT

    out, start = options.out, time.perf_counter()
    foreign = out.exists() and not (out.is_file() and out.open("rb").read(len(MAGIC)) == MAGIC)
    require(World.from_environment().size == 1, "pack is for one process: start it without torchrun")
    require(not foreign, f"{out}: exists and is no artifact: name another file")
    require(out.parent.is_dir(), f"{out.parent}: no such folder: make it first")
    tensors, meta = read_checkpoint(options.checkpoint, tensors=True)
    tensors.pop("model.mtp_heads", None)
    cfg = replace(meta["config"], mtp_heads=0)
    ran = replace(cfg, data=options.data or cfg.data)
    hardware = choose_hardware(ran, World())
    model = load_model(CalibratedGPT, tensors, ran, hardware, options.checkpoint)
    tokens = np.asarray(open_shard(find_shards(ran, "train")[0], ran)[0][: options.tokens + 1])
    loss = model.calibrate(Validation(ran, tokens))
    print(f"calibrated on {len(tokens) - 1:,} tokens with loss {loss:.4f}, "
          f"{time.perf_counter() - start:.1f} s; quantising", flush=True)
    data = write_artifact(model, cfg, options)
    rows = parse_artifact(data)[2]
    text, total = account(len(data), rows)
    print(f"{text}\n{time.perf_counter() - start:.1f} s", flush=True)
    numbers = sum(math.prod(row["shape"]) for row in rows if row["bits"] < 32)
    factor = 2 ** (8 * (total - BUDGET) / numbers)
    require(total <= BUDGET, f"{total - BUDGET:,} bytes too many: multiply every --k by {factor:.3f} or more")
    with atomic_file(out) as file:
        file.write(data)
    if options.evaluate:
        print_losses(tensors, ran, hardware, options)


def print_losses(tensors: dict, cfg: Config, hardware: Hardware, options: argparse.Namespace):
    """Losses of training's last validation, without float8: of the checkpoint's weights and of the file's."""
    from quantise import validate

    val = Validation.load(cfg)
    for path, weights in ((options.checkpoint, tensors), (options.out, read_artifact(options.out)[0])):
        result = validate(load_model(GPT, weights, cfg, hardware, path), val)
        bpb = "" if result["val_bpb"] is None else f" val_bpb:{result['val_bpb']:.5f}"
        print(f"val_loss:{result['val_loss']:.5f}{bpb} {path}", flush=True)


def info(options: argparse.Namespace):
    rows = read_artifact(options.file)[1]["tensors"]
    print(account(options.file.stat().st_size, rows)[0])


def by_kind(defaults: dict, least: float, most: float):
    """A parser of text like attn:6,mlp:5: the defaults with these changes."""

    def parse(text: str) -> dict:
        pairs = [item.split(":") for item in text.split(",")]
        given = {kind: type(defaults[kind])(value) for kind, value in pairs if kind in defaults}
        if len(given) < len(pairs) or not all(least <= value <= most for value in given.values()):
            example = ",".join(f"{kind}:{value:g}" for kind, value in defaults.items())
            raise argparse.ArgumentTypeError(f"'{text}': expected some of {example}, {least} to {most}")
        return defaults | given

    return parse


def parse_options(argv: list[str]) -> argparse.Namespace:
    """The command to `run` and its flags. Raises UserError."""

    def path(text):
        return Path(text).expanduser()

    parser = Parser(usage="artifact.py pack|info|evaluate ..", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    command = commands.add_parser("pack", allow_abbrev=False)
    command.set_defaults(run=pack)
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint or an export")
    command.add_argument("out", type=path, metavar="OUT", help="to write; replaced if an artifact")
    command.add_argument("--data", help="folder of the shards, if not the checkpoint's")
    command.add_argument("--tokens", type=int, default=2**18, help="training tokens to run over [262144]")
    command.add_argument("--bits", type=by_kind(BITS, 2, 8), default=BITS, help=f"by kind {BITS}")
    command.add_argument("--k", type=by_kind(K, 0, 1000), default=K, help=f"by kind, 0: search {K}")
    command.add_argument("--round", action="store_true", help="to the nearest, without GPTQ")
    command.add_argument("--evaluate", action="store_true", help="validate the checkpoint and the file")
    command = commands.add_parser("info", allow_abbrev=False)
    command.set_defaults(run=info)
    command.add_argument("file", type=path, metavar="FILE")
    options = parser.parse_args(argv)
    require(options.command != "pack" or options.tokens > 0, "--tokens: must be 1 or more")
    return options


def refuse(message: str):
    """End the process with one line and exit code 2."""
    print("artifact.py:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def main():
    try:
        if sys.argv[1:2] == ["evaluate"]:
            require(not any(flag.startswith("--script") for flag in sys.argv), "--script: use evaluate.py")
            evaluate.run(sys.argv[2:], read_artifact)
        else:
            options = parse_options(sys.argv[1:])
            options.run(options)
    except (Refused, UserError, OSError) as error:
        refuse(str(error))
    except torch.OutOfMemoryError as error:
        refuse(f"{str(error).split('. ')[0]}: lower evaluate's --batch=, --slots= or --lora_rank=")


if __name__ == "__main__":
    main()
