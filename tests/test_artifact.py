"""Tests of artifact.py and quantise.py: what is packed, what is read back, and what is refused."""

import argparse
import hashlib
import json
import lzma
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import artifact
import evaluate
import quantise
from small import CPU, SCRIPT, SMALL, final_windows, train_gpt, write_corpus
from training import Runs, metrics_of, randomise, weights_of

EVERYTHING = {"value_std": 0.01, "bigram_ratio": 2.0, "untie_at": 0.5, "pointer": True}
CONFIGS = {"defaults": {}, "everything on": EVERYTHING, "tied": {"untie_at": 1.0}}
ROOT = SCRIPT.parent
DEFAULTS = argparse.Namespace(bits=artifact.BITS, k=artifact.K, round=False)


def same_for_all(bits, k, rounding):
    """Options of pack."""
    return argparse.Namespace(bits=dict.fromkeys(artifact.BITS, bits), k=dict.fromkeys(artifact.K, k),
                              round=rounding)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data"))


def make_model(data, kind=quantise.CalibratedGPT, **changes):
    """A model of random weights. That of a configuration that never unties its head has the two alike."""
    model = randomise(kind(replace(SMALL, data=str(data), **changes)))
    if model.cfg.untie_at == 1:
        model.embed.data.copy_(model.head)
    return model.requires_grad_(False)


def training_tokens(model, count=1000):
    """The first ones, to calibrate on."""
    tokens = train_gpt.open_shard(train_gpt.find_shards(model.cfg, "train")[0], model.cfg)[0][: count + 1]
    return train_gpt.Validation(model.cfg, np.asarray(tokens))


@pytest.fixture(scope="module")
def packed(data):
    """A calibrated model and the bytes of its file."""
    model = make_model(data)
    model.calibrate(training_tokens(model))
    return model, artifact.write_artifact(model, model.cfg, DEFAULTS)


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs main() with arguments: (exit status, stdout, stderr)."""

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["artifact.py", *map(str, argv)])
        monkeypatch.setattr(artifact, "choose_hardware", lambda cfg, world: CPU)
        monkeypatch.setattr(evaluate, "choose_hardware", lambda cfg, world: CPU)
        capsys.readouterr()
        try:
            artifact.main()
            code = 0
        except SystemExit as end:
            code = end.code
        return (code, *capsys.readouterr())

    return call


def export(tmp_path, data, **changes):
    """A checkpoint without an optimizer of a model of random weights, and the model."""
    model = make_model(data, evaluate.AdaptedGPT, **changes)
    evaluate.export_model(tmp_path / "model.safetensors", model)
    return tmp_path / "model.safetensors", model


def assert_refused(result, *words):
    code, _, error = result
    assert code == 2, error
    assert re.fullmatch("artifact.py: .+\n", error), error
    assert [word for word in words if word not in error] == [], error


# ------------------------------------------------------------------------------------------- the whole path


def test_a_model_is_trained_packed_and_evaluated(tmp_path, data, monkeypatch, cli):
    run = Runs(monkeypatch, data, tmp_path)("--mtp_heads=1")
    trained = run.validations[-1]["val_loss"]
    file = tmp_path / "m.golf"
    code, printed, error = cli("pack", run.saved[-1], file, "--tokens=2000", "--evaluate")
    assert code == 0, error
    losses = [float(loss) for loss in re.findall(r"^val_loss:(\S+) ", printed, re.M)]
    assert losses[0] == pytest.approx(trained, abs=1e-5)
    assert 0 < abs(losses[1] - losses[0]) < 0.02
    total = file.stat().st_size + sum((ROOT / name).stat().st_size for name in artifact.SHIPPED)
    assert re.search(rf"total, of 16,000,000 at most +{total:,}\n", printed)
    assert printed.split("quantising\n")[1].startswith(cli("info", file)[1])
    tensors = {name: int(count.replace(",", "")) for name, count in
               re.findall(r"^(\w+) .* +([\d,]+) +[\d.]+$", printed, re.M)}
    assert tensors.keys() == weights_of(run.model).keys() - {"mtp_heads"}
    header = int(re.search(r"header and sha256 +([\d,]+)", printed)[1].replace(",", ""))
    assert sum(tensors.values()) + header == file.stat().st_size
    methods = "packed,document,stride,ttt-lora,ttt-sgd"
    windows = "--context=32", "--stride=8", "--batch=128", "--slots=3", "--lora_rank=2", "--sgd_chunk=64"
    code, printed, error = cli("evaluate", file, f"--data={data}", f"--methods={methods}", *windows,
                               f"--log_folder={tmp_path}/e")
    assert code == 0, error
    (folder,) = (tmp_path / "e").iterdir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == methods.split(",")
    assert rows[0]["loss"] == pytest.approx(losses[1], abs=1e-5)
    assert all(0 < row["bpb"] < 10 for row in rows)
    assert metrics_of(run.folder, "val_loss")


def test_a_folder_with_the_shipped_scripts_and_validation_data_is_enough(tmp_path, data, packed):
    model, content = packed
    for name in artifact.SHIPPED:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "val").mkdir()
    for file in ("x_val_000000.bin", "token_bytes.npy"):
        shutil.copy(data / file, tmp_path / "val" / file)
    (tmp_path / "m.golf").write_bytes(content)
    command = [sys.executable, "artifact.py", "evaluate", "m.golf", "--data=val", "--methods=packed"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weights = artifact.parse_artifact(content)[0]
    read = train_gpt.GPT(model.cfg)
    read.load_state_dict(weights)
    expected = quantise.validate(read, train_gpt.Validation.load(model.cfg))
    (row,) = (json.loads(line) for line in next(tmp_path.glob("logs/*/metrics.jsonl")).open())
    assert row["loss"] == pytest.approx(expected["val_loss"], abs=1e-5)
    assert row["bpb"] == pytest.approx(expected["val_bpb"], abs=1e-5)


# ------------------------------------------------------------------------------------------- round trip


def as_codes_times_scales(name, shape, codes, scales):
    """A tensor in numpy alone: bfloat16 is the upper half of a float32."""
    products = []
    for q_RC, scale_R in zip(codes, scales):
        bits = scale_R.view(torch.int16).numpy().astype(np.uint16).astype(np.uint32) << 16
        products.append(q_RC.astype(np.float32) * bits.view(np.float32)[:, None])
    if name == "mlp_bank":
        products[1::2] = [product.T for product in products[1::2]]
    return np.stack(products).reshape(shape)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_what_is_read_is_what_was_quantised_bit_by_bit(data, changes, monkeypatch):
    model = make_model(data, **changes)
    model.calibrate(training_tokens(model))
    found, original = [], quantise.quantise
    monkeypatch.setattr(quantise, "quantise", lambda *args: found.append(original(*args)) or found[-1])
    weights, cfg, rows = artifact.parse_artifact(artifact.write_artifact(model, model.cfg, DEFAULTS))
    assert cfg == model.cfg and weights.keys() == weights_of(model).keys()
    for row in rows:
        name, shape = row["name"], tuple(row["shape"])
        if row["bits"] == 32:
            assert torch.equal(weights[name], getattr(model, name))
            continue
        count = len(artifact.matrices(name, getattr(model, name)))
        own, found = found[:count], found[count:]
        expected = as_codes_times_scales(name, shape, *zip(*own))
        assert np.array_equal(weights[name].numpy().view(np.int32), expected.view(np.int32)), name
        error = (weights[name] - getattr(model, name)).norm() / getattr(model, name).norm()
        assert error < 0.2, (name, error)
    assert not found
    names = [row["name"] for row in rows]
    if changes.get("untie_at") == 1:
        assert "embed" not in names and torch.equal(weights["embed"], weights["head"])
    assert set(names) | {"embed"} == weights.keys()


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_every_number_of_bits_and_every_scale_is_read_back(packed, bits):
    model, _ = packed
    for k in (0.0, 0.1, 2.5, 500.0):  # cut off nearly everywhere, .., nearly all zeros
        content = artifact.write_artifact(model, model.cfg, same_for_all(bits, k, True))
        weights, _, rows = artifact.parse_artifact(content)  # packing has compared what it reads
        for row in rows:
            if row["name"] in artifact.KINDS:
                assert row["bits"] == bits
                parts = artifact.matrices(row["name"], weights[row["name"]])
                assert max(len(row_C.unique()) for part in parts for row_C in part[:4]) < 2**bits


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path, data, cli):
    checkpoint, _ = export(tmp_path, data)
    for name in ("a.golf", "b.golf"):
        assert cli("pack", checkpoint, tmp_path / name, "--tokens=500")[0] == 0
    assert (tmp_path / "a.golf").read_bytes() == (tmp_path / "b.golf").read_bytes()
    assert cli("pack", checkpoint, tmp_path / "c.golf", "--tokens=500", "--k=attn:12")[0] == 0
    assert (tmp_path / "a.golf").read_bytes() != (tmp_path / "c.golf").read_bytes()


# ------------------------------------------------------------------------------------------- quantising


def correlated(rng, rows=400, columns=40):
    """Inputs (T, C) whose columns are mixtures of a few, some large and one of zeros."""
    x_TC = rng.normal(size=(rows, 8)) @ rng.normal(size=(8, columns)) + 0.3 * rng.normal(size=(rows, columns))
    x_TC = x_TC * rng.uniform(0.2, 3, columns)
    x_TC[:, 5] = 0
    return torch.from_numpy(x_TC)


def gptq_by_definition(w_RC, hessian_CC, scale_R, top):
    """After each column those not yet rounded get their best values, by the inverse of H among them."""
    h_CC = hessian_CC.numpy().copy()
    h_CC[np.diag_indices(len(h_CC))] = np.where(np.diag(h_CC) == 0, 1, np.diag(h_CC))
    h_CC += 0.01 * np.diag(h_CC).mean() * np.eye(len(h_CC))
    w_RC, codes_RC = w_RC.numpy().copy(), np.zeros(w_RC.shape)
    left = sorted(range(len(h_CC)), key=lambda c: -h_CC[c, c])
    while left:
        j, *rest = left
        inverse = np.linalg.inv(h_CC[np.ix_(left, left)])
        codes_RC[:, j] = np.clip(np.round(w_RC[:, j] / scale_R.numpy()), -top, top)
        error_R = w_RC[:, j] - codes_RC[:, j] * scale_R.numpy()
        w_RC[:, rest] -= np.outer(error_R, inverse[0, 1:] / inverse[0, 0])
        left = rest
    return codes_RC


@pytest.mark.parametrize("block", [1, 7, 16, 40, 128])
@pytest.mark.parametrize("top", [1, 7, 31])
def test_gptq_gives_the_codes_of_its_definition(monkeypatch, block, top):
    rng = np.random.default_rng(top)
    x_TC, w_RC = correlated(rng), torch.from_numpy(rng.normal(size=(11, 40)))
    hessian_CC = x_TC.T @ x_TC
    scale_R = quantise.row_scales(w_RC, hessian_CC.diagonal(), 3.0, top).double()
    monkeypatch.setattr(quantise, "BLOCK", block)
    found = quantise.gptq(w_RC, hessian_CC, scale_R, top)
    np.testing.assert_array_equal(found.numpy(), gptq_by_definition(w_RC, hessian_CC, scale_R, top))


def output_error(x_TC, w_RC, codes_RC, scale_R):
    return (x_TC @ (torch.from_numpy(codes_RC).double() * scale_R.double()[:, None] - w_RC).T).square().sum()


@pytest.mark.parametrize("top, k", [(3, 3.0), (7, 4.0), (31, 13.0), (31, 0.0)])
def test_gptq_changes_outputs_less_than_rounding(top, k):
    rng = np.random.default_rng(0)
    x_TC, w_RC = correlated(rng), torch.from_numpy(rng.normal(size=(64, 40)))
    errors = [output_error(x_TC, w_RC, *quantise.quantise(w_RC, x_TC.T @ x_TC, k, top, rounding))
              for rounding in (False, True)]
    assert errors[0] < 0.5 * errors[1]
    other_TC = correlated(np.random.default_rng(1)) * 0 + torch.from_numpy(rng.normal(size=(400, 40)))
    gain = [output_error(other_TC, w_RC, *quantise.quantise(w_RC, x_TC.T @ x_TC, k, top, rounding))
            for rounding in (False, True)]
    assert gain[0] > gain[1]  # on inputs that aren't correlated it is worse


def test_inputs_without_correlation_are_rounded():
    w_RC = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 300)))
    diagonal_CC = torch.diag(torch.linspace(1, 2, 300).double())
    found, rounded = (quantise.quantise(w_RC, diagonal_CC, 13.0, 31, flag)[0] for flag in (False, True))
    np.testing.assert_array_equal(found, rounded)


def test_scales_of_rows():
    w_RC = torch.from_numpy(np.random.default_rng(0).standard_t(3, size=(50, 200)))
    w_RC[3], w_RC[4], w_RC[5] = 0, 0.5, 1e-38
    weights_C = torch.linspace(1, 3, 200).double()

    def error_R(scale_R):
        scale_R1 = scale_R.double()[:, None]
        return ((w_RC / scale_R1).round().clamp(-7, 7) * scale_R1 - w_RC).square() @ weights_C

    best_R = quantise.row_scales(w_RC, weights_C, 0.0, 7)
    fixed = [quantise.row_scales(w_RC, weights_C, k, 7) for k in quantise.K_GRID.tolist()]
    assert torch.equal(error_R(best_R), torch.stack([error_R(scale_R) for scale_R in fixed]).min(0).values)
    assert (best_R != fixed[0]).any() and (best_R != fixed[-1]).any()
    scale_R = quantise.row_scales(w_RC, weights_C, 3.5, 7)
    assert_close(scale_R.double(), torch.where(scale_R == 1, 1.0, w_RC.square().mean(1).sqrt() / 2),
                 rtol=2**-8, atol=0)
    assert (scale_R[[3, 5]] == 1).all() and scale_R[4] == 0.25  # a row of equal numbers has a scale, too


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_hessians_are_of_what_each_matrix_reads(data, changes, monkeypatch):
    """Against what goes into a plain model's products, in their order."""
    model, plain = make_model(data, **changes), make_model(data, train_gpt.GPT, **changes)
    val, inputs = training_tokens(model, 250), []
    loss = model.calibrate(val)
    apply, products = train_gpt.Linear.apply, plain.products
    monkeypatch.setattr(train_gpt.Linear, "apply", lambda x, *rest: inputs.append(x) or apply(x, *rest))
    monkeypatch.setattr(plain, "products", lambda x: inputs.append(x) or products(x))
    rotary = train_gpt.build_rotary(plain.cfg, 100, "cpu")
    result = val.run(plain, final_windows(plain.cfg), rotary, train_gpt.World())
    assert result["val_loss"] == pytest.approx(loss, rel=1e-6)
    order = [("qkv", 0), ("o", 0), ("up", 0), ("down", 0), ("qkv", 1), ("o", 1), ("up", 1), ("down", 1),
             ("up", 2), ("down", 2), *([("pointer", 0)] if plain.cfg.pointer else []), ("head", 0)]
    assert len(inputs) == 3 * len(order) and model.hessians.keys() == set(order) - {("pointer", 0)}
    for i, key in enumerate(order):
        expected = sum(x.double().T @ x.double() for x in inputs[i :: len(order)])
        assert_close(model.hessians["head" if key[0] == "pointer" else key[0], key[1]], expected,
                     rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    names = {id(h_CC): key for key, h_CC in model.hessians.items()} | {id(None): None}
    for name, keys in {"attn_bank": [("qkv", 0)] * 3 + [("o", 0)] + [("qkv", 1)] * 3 + [("o", 1)],
                       "mlp_bank": [(part, i) for i in range(3) for part in ("up", "down")],
                       "head": [("head", 0)], "pointer": [("head", 0)], "embed": [None]}.items():
        assert [names[id(h_CC)] for h_CC in model.hessians_of(name)] == keys


def test_packing_loses_less_by_gptq_than_by_rounding(data, monkeypatch, tmp_path):
    """The loss of a model that was trained, over its training data."""
    run = Runs(monkeypatch, data, tmp_path)("--scheduled_steps=30", "--epochs=30", "--save_every=-1")
    model = quantise.CalibratedGPT(run.model.cfg)
    model.load_state_dict({name: x for name, x in run.model.state_dict().items()})
    val = training_tokens(model.requires_grad_(False), 4000)
    loss = model.calibrate(val)
    gaps = []
    for rounding in (False, True):
        content = artifact.write_artifact(model, model.cfg, same_for_all(4, 6.0, rounding))
        plain = train_gpt.GPT(model.cfg)
        plain.load_state_dict(artifact.parse_artifact(content)[0])
        gaps.append(quantise.validate(plain, val)["val_loss"] - loss)
    assert gaps[0] < 0.8 * gaps[1] and gaps[1] > 0, gaps


# ------------------------------------------------------------------------------------------- entropy coder


def entropy(symbols_N):
    share = np.bincount(symbols_N) / len(symbols_N)
    return -(share[share > 0] * np.log2(share[share > 0])).sum()


def draw(count, kind):
    rng = np.random.default_rng(count)
    if kind == "normal":
        return np.clip(np.round(rng.normal(31, 2.4, count)), 0, 62).astype(int)
    if kind == "equal":
        return np.full(count, 17)
    return rng.integers(0, 63, count) if kind == "uniform" else np.where(rng.random(count) < 0.999, 5, 62)


@pytest.mark.parametrize("kind", ["normal", "equal", "uniform", "rare"])
@pytest.mark.parametrize("count", [1, 2, 1000, 100_001, 2**18])
def test_codes_are_read_back_and_take_hardly_more_than_their_entropy(kind, count):
    symbols_N = draw(count, kind)
    classes_N = np.where(np.arange(count) % 3 == 0, 0, 23).astype(np.uint8)
    freq_KS = artifact.frequencies(symbols_N, classes_N, 63)
    assert set(freq_KS.sum(1, dtype=int).tolist()) <= {0, 2**14}
    data = artifact.rans_encode(symbols_N, classes_N, freq_KS)
    np.testing.assert_array_equal(artifact.rans_decode(data, classes_N, freq_KS), symbols_N)
    assert 8 * len(data) <= 1.004 * count * entropy(symbols_N) + 48 * artifact.lane_count(count) + 1000


def test_classes_of_rows_and_columns_save_bytes():
    """Half the rows and a third of the columns are small, and some rows are zero."""
    rng = np.random.default_rng(0)
    q_RC = rng.normal(0, 8, (300, 300))
    q_RC[::2] /= 4
    q_RC[:, ::3] /= 3
    q_RC[100:150] = 0
    q_RC = np.clip(q_RC.round(), -31, 31).astype(np.int8)
    data, _ = artifact.encode_tensor([q_RC], [torch.ones(300, dtype=torch.bfloat16)], 31)
    assert 8 * len(data) < 0.85 * q_RC.size * entropy(q_RC.ravel().astype(int) + 31)


def test_damaged_codes_are_refused_or_read_as_others():
    """Whatever the bytes are, nothing but UserError comes of them, at once."""
    symbols_N, classes_N = draw(20_000, "normal"), np.zeros(20_000, np.uint8)
    freq_KS = artifact.frequencies(symbols_N, classes_N, 63)
    data = artifact.rans_encode(symbols_N, classes_N, freq_KS)
    rng, refused = np.random.default_rng(0), 0
    for i in range(60):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] ^= 1 << rng.integers(8)
        damaged = [damaged, data[: rng.integers(len(data))], data + b"\0\0", rng.bytes(len(data))][i % 4]
        try:
            artifact.rans_decode(bytes(damaged), classes_N, freq_KS)
        except train_gpt.UserError:
            refused += 1
    assert refused >= 50
    equal_KS = artifact.frequencies(symbols_N * 0, classes_N, 63)  # one symbol: states stay as they are
    data = bytearray(artifact.rans_encode(symbols_N * 0, classes_N, equal_KS))
    data[0] ^= 1
    with pytest.raises(train_gpt.UserError, match="don't end"):
        artifact.rans_decode(bytes(data), classes_N, equal_KS)
    for wrong in (freq_KS * 0, freq_KS + np.uint16(1), np.full_like(freq_KS, 2**16 - 1)):
        with pytest.raises(train_gpt.UserError):
            artifact.rans_decode(data, classes_N, wrong)


# ------------------------------------------------------------------------------------------- refusals


def sign(body):
    return bytes(body) + hashlib.sha256(body).digest()


def with_header(content, change):
    """The file with another header, JSON or bytes, and a sha256 that fits."""
    size = struct.unpack_from("<I", content, 12)[0]
    header = change(json.loads(content[16 : 16 + size]))
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return sign(content[:12] + struct.pack("<I", len(header)) + header + content[16 + size : -32])


def in_config(**values):
    return lambda header: header | {"config": header["config"] | values}


def in_row(i, **values):
    def change(header):
        header["tensors"][i] |= values
        return header

    return change


def without(name):
    def change(header):
        del header["config"][name]
        return header

    return change


def moved_byte(header):
    """A byte of the first tensor now is the second's."""
    header["tensors"][0]["bytes"] -= 1
    header["tensors"][1]["bytes"] += 1
    return header


def larger(header):
    """A table that fits the config, of more numbers than any file can hold."""
    header = in_config(width=2**14)(header)
    cfg = train_gpt.config_from_json(header["config"])
    shapes = dict(artifact.expected_table(cfg, False))
    return header | {"tensors": [row | {"shape": shapes[row["name"]]} for row in header["tensors"]]}


HEADERS = {
    "not JSON": lambda header: b"{", "no UTF-8": lambda header: b"\xff", "a list": lambda header: [],
    "empty": lambda header: b"", "deep": lambda header: b"[" * 100_000, "null": lambda header: None,
    "no config": lambda header: {"tensors": header["tensors"]}, "no layers": in_config(layers=[]),
    "a field missing": without("width"), "a field too many": in_config(code="print()"),
    "a number as text": in_config(width="32"), "absurd width": in_config(width=10**9),
    "absurd vocabulary": in_config(vocab_size=10**9),
    "absurd chunks": in_config(val_chunk=10**15), "all larger": larger,
    "no heads": in_config(heads=0), "negative heads": in_config(heads=-2),
    "no chunks": in_config(val_chunk=0),
    "a path as track": in_config(track="../../x"), "a folder for logs": in_config(log_folder="/tmp/x"),
    "a path as seed": in_config(seed="/../x"), "huge number": in_config(seed=float("1e400")),
    "another model": in_config(width=64), "a tensor missing": lambda h: h | {"tensors": h["tensors"][1:]},
    "a tensor too many": lambda h: h | {"tensors": h["tensors"] + h["tensors"][-1:]},
    "tensors in another order": lambda h: h | {"tensors": h["tensors"][::-1]},
    "another name": in_row(0, name="code"), "another shape": in_row(0, shape=[2, 2]),
    "absurd shape": in_row(0, shape=[10**9, 10**9]), "no bits": in_row(0, bits=0),
    "1 bit": in_row(0, bits=1), "9 bits": in_row(0, bits=9), "32 bits": in_row(0, bits=32),
    "bits as a fraction": in_row(0, bits=6.0), "other bits": in_row(0, bits=5),
    "small in 6 bits": in_row(-1, bits=6), "negative bytes": in_row(0, bytes=-1),
    "too many bytes": in_row(0, bytes=10**9), "side beyond": in_row(0, side=10**9),
    "no side": in_row(0, side=0), "negative side": in_row(0, side=-5),
    "a byte moved": moved_byte, "tied": lambda h: h | {"tied": True},
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADERS)
def test_a_wrong_header_is_refused_even_if_signed(tmp_path, packed, cli, kind):
    file = tmp_path / "m.golf"
    file.write_bytes(with_header(packed[1], lambda header: header))
    assert cli("info", file)[0] == 0
    file.write_bytes(with_header(packed[1], HEADERS[kind]))
    assert_refused(cli("info", file), str(file), "not an artifact: ")
    assert_refused(cli("evaluate", file, "--methods=packed"), str(file), "not an artifact: ")


def test_a_model_that_no_file_can_hold_is_refused_before_it_is_made(packed):
    with pytest.raises(train_gpt.UserError, match="more numbers than bits"):
        artifact.parse_artifact(with_header(packed[1], larger))


def test_every_damaged_place_is_refused(tmp_path, packed, cli):
    content, file = packed[1], tmp_path / "m.golf"
    size, end = struct.unpack_from("<I", content, 12)[0], len(content)
    places = [0, 7, 8, 12, 16, 16 + size // 2, 16 + size, (16 + size + end) // 2, end - 33, end - 32, end - 1]
    damaged = [content[:i] + bytes([content[i] ^ 4]) + content[i + 1 :] for i in places]
    damaged += [content[:length] for length in (0, 1, 8, 15, 16, 47, 48, 100, 16 + size, end // 2, end - 1)]
    damaged += [content + b"\0", content + content, b"\0" + content, bytes(end), sign(content[:-33])]
    damaged += [sign(content[:-32] + b"\0"), sign(content[:8] + b"\2" + content[9:-32])]
    damaged += [sign(content[:12] + b"\xff" * 4 + content[16:-32]), sign(content[:16])]
    damaged += [b"PK\3\4" + bytes(100)]
    for number, other in enumerate(damaged):
        file.write_bytes(other)
        with pytest.raises(artifact.Refused, match="not an artifact: ") as refusal:
            artifact.read_artifact(file)
        assert "\n" not in str(refusal.value), number
    assert_refused(cli("info", file), "not an artifact: another kind of file")
    assert_refused(cli("info", tmp_path / "none.golf"), "none.golf", "No such file")
    assert_refused(cli("info", tmp_path), "not an artifact")


def test_a_signed_file_with_damaged_tensors_is_refused_or_finite(packed):
    """Nothing but UserError comes of them, or errors that read_artifact makes Refused of."""
    content, rng, refused = packed[1], np.random.default_rng(0), 0
    size = struct.unpack_from("<I", content, 12)[0]
    for _ in range(60):
        body = bytearray(content[:-32])
        body[rng.integers(16 + size, len(body))] ^= 1 << rng.integers(8)
        try:
            weights = artifact.parse_artifact(sign(body))[0]
            assert all(x.isfinite().all() for x in weights.values())
        except Exception as error:
            assert not isinstance(error, AssertionError), error
            refused += 1
    assert refused > 30


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_scales_that_are_not_finite_are_refused(tmp_path, packed, cli, monkeypatch, scale):
    model, _ = packed
    original = quantise.quantise
    for name in ("dequantise", "decode_tensor"):  # so that packing doesn't see it
        monkeypatch.setattr(artifact, name, lambda *args: torch.zeros(1))
    monkeypatch.setattr(quantise, "quantise", lambda *args: (original(*args)[0], original(*args)[1] * scale))
    content = artifact.write_artifact(model, model.cfg, DEFAULTS)
    monkeypatch.undo()
    (tmp_path / "m.golf").write_bytes(content)
    assert_refused(cli("info", tmp_path / "m.golf"), "a scale isn't finite")


def test_small_tensors_that_are_not_finite_are_refused(tmp_path, packed, cli):
    content = packed[1]
    (tmp_path / "m.golf").write_bytes(sign(content[:-36] + struct.pack("<f", math.nan)))
    assert_refused(cli("info", tmp_path / "m.golf"), "isn't finite")


def test_lzma_unpacks_no_more_than_the_table_says():
    bomb, four = (lzma.compress(text, lzma.FORMAT_RAW, filters=artifact.FILTERS)
                  for text in (bytes(10**7), b"1234"))
    assert len(bomb) < 10**4 and artifact.unpack(four, 4) == b"1234"
    for packed, size in ((bomb, 0), (bomb, 10**6), (bomb[:-1], 10**7), (four + b"0", 4), (four, 5)):
        with pytest.raises(train_gpt.UserError, match="another size"):
            artifact.unpack(packed, size)
    tracemalloc.start()
    with pytest.raises(train_gpt.UserError, match="another size"):
        artifact.unpack(bomb, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 10**6  # of which 4 MiB are the decoder's dictionary


def test_a_file_over_the_budget_is_not_written_and_the_advice_helps(tmp_path, data, cli, monkeypatch):
    checkpoint, _ = export(tmp_path, data)
    file = tmp_path / "m.golf"
    printed = cli("pack", checkpoint, file, "--tokens=500")[1]
    total = int(re.search(r"total, .* ([\d,]+)\n", printed)[1].replace(",", ""))
    file.unlink()
    monkeypatch.setattr(artifact, "BUDGET", total)
    assert cli("pack", checkpoint, file, "--tokens=500")[0] == 0
    file.unlink()
    monkeypatch.setattr(artifact, "BUDGET", total - 1000)
    result = cli("pack", checkpoint, file, "--tokens=500")
    assert_refused(result, "1,000 bytes too many", "multiply every --k by")
    assert not file.exists() and not list(tmp_path.glob("*.tmp"))
    factor = 1.02 * float(re.search(r"--k by (\S+)", result[2])[1])
    more = ",".join(f"{kind}:{factor * k:.3f}" for kind, k in artifact.K.items())
    assert cli("pack", checkpoint, file, "--tokens=500", f"--k={more}")[0] == 0 and file.exists()


MISTAKES = {
    "no command": ([], "COMMAND"), "unknown command": (["squash"], "squash"),
    "unknown kind": (["pack", "C", "O", "--bits=head:6,neck:6"], "neck"),
    "too many bits": (["pack", "C", "O", "--bits=attn:9"], "2 to 8"),
    "bits of a fraction": (["pack", "C", "O", "--bits=attn:5.5"], "--bits"),
    "negative k": (["pack", "C", "O", "--k=mlp:-1"], "0 to 1000"),
    "no number": (["pack", "C", "O", "--k=mlp"], "--k"),
    "k is no number": (["pack", "C", "O", "--k=mlp:nan"], "--k"),
    "no tokens": (["pack", "C", "O", "--tokens=0"], "--tokens"),
    "no checkpoint": (["pack", "none.safetensors", "O"], "none.safetensors"),
    "no data": (["pack", "model.safetensors", "O", "--data=nowhere"], "nowhere"),
    "another file there": (["pack", "model.safetensors", "text.txt"], "is no artifact"),
    "a folder there": (["pack", "model.safetensors", "."], "is no artifact"),
    "no folder": (["pack", "model.safetensors", "no/x.golf"], "no such folder"),
    "a checkpoint": (["info", "model.safetensors"], "another kind of file"),
    "a script": (["evaluate", "O", "--script=x.py", "--methods=packed"], "--script"),
    "evaluating a checkpoint": (["evaluate", "model.safetensors", "--methods=packed"], "another kind"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(tmp_path, data, cli, monkeypatch, mistake):
    export(tmp_path, data)
    (tmp_path / "text.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    arguments, words = MISTAKES[mistake]
    assert_refused(cli(*arguments), words)
    assert (tmp_path / "text.txt").read_text() == "text"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors", "text.txt"]


def test_one_process_packs(tmp_path, data, cli, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2" if name == "WORLD_SIZE" else "1")
    assert_refused(cli("pack", export(tmp_path, data)[0], tmp_path / "m.golf"), "one process")


def test_an_artifact_is_replaced_and_stays_if_packing_fails(tmp_path, data, cli, monkeypatch):
    checkpoint, _ = export(tmp_path, data)
    file = tmp_path / "m.golf"
    file.write_bytes(artifact.MAGIC + b"old")
    monkeypatch.setattr(artifact, "BUDGET", 100_000)
    assert_refused(cli("pack", checkpoint, file, "--tokens=500"), "too many")
    assert file.read_bytes() == artifact.MAGIC + b"old"
    monkeypatch.undo()
    assert cli("pack", checkpoint, file, "--tokens=500")[0] == 0
    assert cli("info", file)[0] == 0
