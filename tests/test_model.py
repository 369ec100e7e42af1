"""Tests of the model: mechanisms against their formulas, attention, causality, chunked loss, initialisation.

Many parameters start at 0 and would hide what they multiply, so `make_model` draws all of them at random. A
test marked with `mechanism` also names arguments that make its mechanism inert: forced on any one of the
functions, they must fail it.
"""

import contextlib
import dataclasses
import inspect
import math
import os
import random
import re
import tempfile
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import train_gpt as t
from small import BOS, CPU, build_model, final_windows, layers_without, random_tokens, rms_normed, write_split

WIDE = {"short": 1000, "long": 1000}
LAYERS = (
    t.Layer("short", value_embeds=(0,)),
    t.Layer("long", value_embeds=(1,), key_offset=True),
    t.Layer("none", skip_from=0),
    t.Layer("short"),
)
STAGES = (
    t.Stage(0.0, 64, 32, 4, 8, 1.0, ((1, 1), (0.5, 0.5), (0.25, 0))),
    t.Stage(0.5, 64, 32, 8, 16, 1.0),
)
CFG = t.Config(
    layers=LAYERS, stages=STAGES, width=32, heads=2, vocab_size=BOS + 1, scheduled_steps=4, backout_from=1,
    val_windows=(10, 20),
)  # fmt: skip
OFFSET = tuple(layer._replace(key_offset=True) for layer in LAYERS)
ALL_ON = replace(CFG, layers=OFFSET, mtp_heads=2, bigram_ratio=2.0, pointer=True)
# With a smear_lambda of 0, too.
ATTENTION_ONLY = replace(layers_without(CFG, "value_embeds", "key_offset"), smear_mtp=False)
NEXT_ALONE = tuple(stage._replace(targets=((1, 1),)) for stage in STAGES)

NO_REPORT = {"loss": torch.zeros(())}  # of an optimizer's step
MECHANISM_TESTS = {}
INERT = {}


def float8_product(a, b, a_scale, b_scale, dtype, fast=False):
    """What torch computes on a GPU alone. See tests/gpu for its own."""
    return (a.float() @ b.float() * (a_scale * b_scale)).to(dtype)


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(t, "float8_product", float8_product)


def mechanism(name, **inert):
    """Registers the test of a mechanism, and what makes it inert.

    That is, by name: the arguments of a function of the script, or the value of a constant.
    """

    def register(test):
        MECHANISM_TESTS[name], INERT[name] = test, inert
        return test

    return register


def having(**changes):
    return lambda cfg: replace(cfg, **changes)


def make_inert(monkeypatch, name, values):
    """Replaces a constant of the script, or a function by one with these arguments.

    Arguments are values, or functions of the old ones.
    """
    owner, _, method = name.rpartition("__")
    owner = getattr(t, owner) if owner else t
    original = getattr(owner, method)
    if not callable(original):
        return monkeypatch.setattr(owner, method, values)
    signature = inspect.signature(original)

    def forced(*args, **keywords):
        bound = signature.bind(*args, **keywords)
        bound.apply_defaults()
        for key, value in values.items():
            bound.arguments[key] = value(bound.arguments[key]) if callable(value) else value
        return original(*bound.args, **bound.kwargs)

    monkeypatch.setattr(owner, method, forced)


def make_model(cfg, std=0.3, dtype=torch.float32, fp8=False, kernels="reference", **values):
    """A model with parameters drawn by name, the same in every configuration, except for `values`."""
    model = t.GPT(cfg, dtype, kernels=kernels, fp8=fp8).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, std, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            if name in values:
                p.copy_(torch.as_tensor(values[name]))
    return model


def make_silent_model(cfg, **values):
    """Zero output and down projections: every layer reads the same stream, whatever the earlier ones do."""
    model = make_model(cfg, **values)
    with torch.no_grad():
        model.attn_bank[:, 3] = 0
        model.mlp_bank[:, 1] = 0
    return model


def packed(*lengths, seed=0):
    """Documents of random bytes with these lengths, each after its BOS: tokens (T,) and where they are."""
    tokens = torch.randint(256, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    cu_seqlens = torch.tensor(np.cumsum((0, *lengths)), dtype=torch.int32)
    tokens[cu_seqlens[:-1].long()] = BOS
    return tokens, t.Documents(cu_seqlens, max(lengths))


def make_batch(*lengths, seed=0, columns=0):
    tokens, docs = packed(*lengths, seed=seed)
    tokens, stage = torch.cat([tokens, tokens[1:2]]), STAGES[0]._replace(columns=columns)
    return t.MicroBatch(tokens, docs, t.choose_columns(CFG, stage, tokens[1:].numpy(), 3, CPU.device))


def build_rotary(cfg, positions):
    return t.build_rotary(cfg, positions, CPU.device)


def latents(model, tokens, docs, windows=WIDE):
    return model(tokens, docs, windows, build_rotary(model.cfg, len(tokens)))


def changed(token):
    """Another byte; never BOS."""
    return (token + 1) % 256


def influence(model, tokens, docs, position, windows=WIDE):
    """Positions whose latents change in any bit when the token at `position` does."""
    other = tokens.clone()
    other[position] = changed(tokens[position])
    with torch.no_grad():
        difference = latents(model, tokens, docs, windows) != latents(model, other, docs, windows)
    return difference.any(-1).nonzero().flatten().tolist()


class Trace:
    """One forward pass with what its parts produced: x0, by layer inputs, the MLP's inputs and outputs, and
    by layer with attention (q, k, v) and the attention's output before and after its gates."""

    def __init__(self, model, tokens, docs, windows=WIDE, training=False):
        self.inputs, self.mlp_inputs, self.outputs, self.heads, self.gated = [], [], [], [], []
        names = "embed_region", "mix_region", "qkv_region", "gate_region", "branch_region"
        with torch.set_grad_enabled(training), contextlib.ExitStack() as patched:
            patched.enter_context(mock.patch.object(model, "mlp", partial(self.call, "mlp", model.mlp)))
            for name in names:
                patched.enter_context(mock.patch.object(t, name, partial(self.call, name, getattr(t, name))))
            self.latents = latents(model, tokens, docs, windows)

    def call(self, name, function, *args):
        result = function(*args)
        if name == "embed_region":
            self.x0 = result
        if name == "mix_region":
            self.inputs.append(result[0])
        if name in ("mix_region", "branch_region"):
            self.stream = result[0]
        if name == "qkv_region":
            self.heads.append(result)
        if name == "gate_region":
            self.gated.append((args[0], result.view_as(args[0])))
        if name == "mlp":
            self.mlp_inputs.append((self.stream, args[1]))
            self.outputs.append(self.stream + result)
        return result


def mixed(model, logits_TV, x_TD, tokens_T):
    """Logits, capped, of the token after each of these, copies mixed in by a dense formula."""
    if not model.cfg.pointer:
        return logits_TV
    slot, edge, place = model.cfg.vocab_size, t.POINTER_WIDTH, torch.arange(len(tokens_T))
    q, k = (rms_normed(x_TD @ matrix.T) for matrix in (model.pointer[:edge], model.pointer[edge:]))
    document = (tokens_T == model.cfg.bos).cumsum(0)
    allowed = (document[:, None] == document) & (place[:, None] > place)
    weights = (model.pointer_gain * (q @ k.T) / edge**0.5).exp() * allowed
    total = weights.sum(1, keepdim=True) + model.pointer_sink.exp()
    copied = weights[:, :-1] / total @ F.one_hot(tokens_T[1:], logits_TV.size(1)).to(weights.dtype)
    q, s = logits_TV.softmax(1), model.pointer_sink.exp() / total
    a = q[:, slot, None]
    p = q / (1 - a) * (1 - a * (1 - s)) + a * copied
    return p.log().masked_fill(torch.arange(p.size(1)) == slot, -1e9)


def cross_entropies(model, head, x_TD, tokens, ahead):
    """Sum over t of the cross entropy of `head` at t with the token at t + ahead, where there is one."""
    height, shift, width = t.CAP_HEIGHT, t.CAP_SHIFT, t.CAP_WIDTH
    logits = height * torch.tanh((x_TD @ head.T + shift) / width)
    if ahead == 1:
        logits = mixed(model, logits, x_TD, tokens[: len(x_TD)])
    pairs = [(row, tokens[i + ahead]) for i, row in enumerate(logits) if i + ahead < len(tokens)]
    return sum(row.logsumexp(0) - row[token] for row, token in pairs)


def micro_backward(model, batch, step=0, weights=None):
    """Gradients of one micro-batch in the model; returns its loss."""
    plan = t.plan_step(model.cfg, step)
    rotary = build_rotary(model.cfg, 100)
    weights = weights or t.loss_weights(model.cfg, plan, CPU.device)
    return t.backward_micro_batch(model, batch, plan._replace(windows=WIDE), rotary, weights)


# ----------------------------------------------------------------------------------------------------------
# Mechanisms


def values_added(cfg, text):
    """What a model with these layers adds to v, and its tables: both (.., T, H, E)."""
    model = make_silent_model(cfg)
    tables = model.value_embeds.detach().view(-1, cfg.padded_vocab, cfg.heads, cfg.width // cfg.heads)
    traces = Trace(model, *text).heads, Trace(make_silent_model(cfg, value_embeds=0), *text).heads
    return zip(*traces, strict=True), tables[:, text[0]]


@mechanism("value_embeds", qkv_region={"value_TD": None})
def test_value_embeds_are_added_to_v_in_the_layers_of_the_table_and_start_inert():
    tokens, _ = text = packed(9, 12)
    fresh = make_model(CFG, value_embeds=0)
    assert not build_model(CFG, CPU).value_embeds.any()
    off = make_model(layers_without(CFG, "value_embeds"))
    assert torch.equal(latents(fresh, *text), latents(off, *text))
    latents(fresh, *text).square().sum().backward()
    assert fresh.value_embeds.grad is not None and fresh.value_embeds.grad[tokens].any()
    assert not torch.equal(latents(make_model(CFG), *text), latents(fresh, *text))
    layers, rows = values_added(CFG, text)
    assert len(rows) == 2
    for ((_, _, v), (_, _, v_without)), table in zip(layers, (0, 1, None), strict=True):
        assert torch.equal(v, v_without if table is None else v_without + rows[table])


def first_table_alone(cfg):
    layers = [layer._replace(value_embeds=layer.value_embeds[:1]) for layer in cfg.layers]
    return replace(cfg, layers=tuple(layers))


def tables_apart(cfg):
    """The same number of tables, but layers read others."""
    layers = [layer._replace(value_embeds=tuple(1 - i for i in layer.value_embeds)) for layer in cfg.layers]
    return replace(cfg, layers=(cfg.layers[0], *layers[1:]))


@mechanism("several value tables", GPT={"cfg": first_table_alone})
@mechanism("shared value tables", GPT={"cfg": tables_apart})
def test_a_layer_adds_the_sum_of_its_value_tables_and_layers_may_share_them():
    text, tables = packed(9, 12), ((1,), (), (0, 1), (1,))
    layers = [t.Layer("short", value_embeds=own) for own in tables]
    cfg = replace(CFG, layers=(*layers, t.Layer("none")))
    layers, rows = values_added(cfg, text)
    assert len(rows) == cfg.value_tables == 2
    for ((_, _, v), (_, _, v_without)), own in zip(layers, tables, strict=True):
        assert torch.equal(v, v_without + sum(rows[table] for table in own) if own else v_without)


@mechanism("value_std", draw_weights={"cfg": having(value_std=0.0)})
def test_value_std_is_that_of_value_embeddings_at_the_start():
    fresh = build_model(replace(CFG, value_std=0.01), CPU).value_embeds
    assert_close(fresh.std().item(), 0.01, rtol=0.02, atol=0)


@mechanism("windows", attention_reference={"window": 10**6})
def test_windows_end_influence_exactly():
    text = packed(40)
    plan, final = t.plan_step(CFG, 0).windows, final_windows(CFG)
    cases = ("short", plan, 4), ("long", plan, 8), ("short", final, 10), ("long", final, 20)
    for kind, windows, reach in cases:
        cfg = replace(ATTENTION_ONLY, layers=(t.Layer(kind),), backout_from=-1)
        assert influence(make_model(cfg, smear_lambda=0), *text, 5, windows) == list(range(5, 5 + reach + 1))


def first_windows(plan):
    return plan._replace(windows={"short": 4, "long": 8})


GROWING = t.Stage(0.0, 64, 32, 4, 8, 1.0, ((1, 1), (1, 1))), t.Stage(0.5, 128, 48, 8, 16, 1.5)


@mechanism("stages", read_step={"step": 0}, backward_micro_batch={"plan": first_windows},
           plan_step={"step": 0})  # fmt: skip
def test_batch_documents_windows_rate_and_targets_change_at_one_step():
    seen, windows = [], set()

    def attention(q, k, v, docs, window):
        windows.add(window)
        return t.attention_reference(q, k, v, docs, window)

    with tempfile.TemporaryDirectory() as folder:
        write_split(Path(folder), "train", [random_tokens(np.random.default_rng(0), 2000)])
        cfg = replace(CFG, stages=GROWING, data=folder, micro_batches=2, cooldown=0.0)
        model = build_model(cfg, CPU)
        model.attention, optimizer = attention, t.Optimizer(model, t.optimizer_table(cfg), t.World())
        stream = t.DocumentStream(t.Shards(t.find_shards(cfg, "train"), cfg), cfg)
        loader = t.load_batches(stream, t.World(), CPU.device)
        for step, (batches, *_) in enumerate(loader):
            plan = t.plan_step(cfg, step)
            t.train_step(model, optimizer, batches, plan, build_rotary(cfg, 64), step)
            sizes = [(len(batch.tokens) - 1, batch.docs.longest) for batch in batches]
            seen.append((sizes, sorted(windows), plan.lr, plan.weights))
            windows.clear()
    assert seen[:2] == [([(32, 32)] * 2, [4, 8], 1.0, (1.0, 1.0))] * 2
    assert seen[2:] == [([(64, 48)] * 2, [8, 16], 1.5, (1.0,))] * 2


def without_last_layer(cfg):
    return replace(cfg, layers=cfg.layers[:-1])


@mechanism("layers", GPT={"cfg": without_last_layer})
def test_every_row_of_a_layer_table_is_a_layer_eleven_in_the_short_track():
    text = packed(9, 12)
    for track, count in (("short", 11), ("race300", 11), ("medium", 16), ("tiny", 5)):
        cfg = replace(t.TRACKS[track], width=32, heads=2, vocab_size=BOS + 1)
        trace = Trace(make_model(cfg), *text)
        assert len(cfg.layers) == len(trace.outputs) == count
        for x, out in zip(trace.inputs, trace.outputs, strict=True):
            assert not torch.allclose(x, out, atol=1e-2)
        assert len(trace.heads) == len(cfg.attention_layers)
        assert all(layer.window == "long" for layer in cfg.layers if layer.key_offset)


def traced_keys(cfg, text):
    """Keys of each layer with attention, from a stream that doesn't depend on them."""
    return [k for _, k, _ in Trace(make_silent_model(cfg), *text).heads]


def keys_by_loop(k_THE, dims, tokens):
    """Key offset written position by position."""
    out = k_THE.clone()
    for i in range(1, len(k_THE)):
        for e in dims if tokens[i] != BOS else ():
            out[i, :, e] = k_THE[i - 1, :, e]
    return out


STATIONARY = (4, 5, 6, 7, 12, 13, 14, 15)  # of 16 head dims with half of the pairs rotating


@mechanism("key_offset", offset_keys={"dims_E": torch.zeros_like})
def test_key_offset_takes_the_stationary_dims_of_the_marked_layers_from_the_previous_key():
    tokens, _ = text = packed(9, 12)
    plain = traced_keys(layers_without(CFG, "key_offset"), text)
    for cfg, offset in ((CFG, (1,)), (replace(CFG, layers=OFFSET), (0, 1, 2))):
        for i, (own, k) in enumerate(zip(plain, traced_keys(cfg, text), strict=True)):
            assert torch.equal(k, keys_by_loop(own, STATIONARY, tokens) if i in offset else own)

    k, stationary = plain[0], build_rotary(CFG, 1).offset_E
    before = k.clone()
    t.offset_keys(k, stationary, tokens == BOS)
    assert torch.equal(k, before)


def mixing_factors(model):
    """On the stream and on x0, by layer: (L, 2)."""
    return torch.stack([model.resid_lambdas, model.x0_lambdas], dim=1).detach()


@mechanism("x0", mix_region={"x0_TD": None})
def test_the_embedding_is_added_to_the_stream_in_front_of_every_layer():
    text = packed(9, 12)
    model = make_model(layers_without(CFG, "skip_from"))
    trace = Trace(model, *text)
    lambdas = mixing_factors(model)
    for stream, x, own in zip((trace.x0, *trace.outputs), trace.inputs, lambdas):
        assert torch.equal(x, own[0] * stream + own[1] * trace.x0)
    assert_close(trace.inputs[0], lambdas[0].sum() * trace.x0)  # layer 0: one factor would do
    latents(model, *text).square().sum().backward()
    on_stream, on_x0 = model.resid_lambdas.grad, model.x0_lambdas.grad
    assert on_stream.all() and on_x0.all() and on_stream[0] == on_x0[0] and on_stream[1] != on_x0[1]


def everywhere(cfg):
    return replace(cfg, layers=tuple(layer._replace(inject=True) for layer in cfg.layers))


@mechanism("inject", GPT={"cfg": everywhere})
def test_the_layer_table_says_where_the_embedding_and_bigrams_are_added():
    layers = tuple(layer._replace(inject=i == 2, skip_from=-1) for i, layer in enumerate(LAYERS))
    cfg, text = replace(CFG, layers=layers, bigram_ratio=1.5), packed(9, 12)
    model, without = make_model(cfg), make_model(cfg, bigram_lambdas=0)
    trace, lambdas = Trace(model, *text), mixing_factors(model)
    for i, (stream, x, own) in enumerate(zip((trace.x0, *trace.outputs), trace.inputs, lambdas)):
        added = x - own[0] * stream
        assert added.any() == (i == 2) and (i == 2 or torch.equal(x, own[0] * stream))
    added = Trace(without, *text).inputs[2] - lambdas[2, 0] * Trace(without, *text).outputs[1]
    assert_close(added, lambdas[2, 1] * trace.x0)


@mechanism("smear", embed_region={"smear_lambda": torch.zeros_like})
def test_smear_adds_the_gated_previous_embedding():
    tokens, _ = text = packed(9, 12)
    model = make_model(CFG, std=0.5)
    e, gate = model.embed.detach()[tokens], model.smear_gate.detach()
    expected = e.clone()
    for i in range(1, len(e)):
        if tokens[i] != BOS:
            expected[i] += model.smear_lambda.item() * torch.sigmoid(e[i, : len(gate)].dot(gate)) * e[i - 1]
    assert_close(Trace(model, *text).x0, rms_normed(expected))
    assert_close(Trace(make_model(CFG, std=0.5, smear_lambda=0), *text).x0, rms_normed(e))


@mechanism("skip", mix_region={"skip_TD": None})
def test_skip_adds_the_source_layers_output_through_a_sigmoid():
    text = packed(9, 12)
    alone = {"x0_lambdas": 0, "resid_lambdas": 1}
    model, plain = (make_model(cfg, **alone) for cfg in (CFG, layers_without(CFG, "skip_from")))
    trace, off = Trace(model, *text), Trace(plain, *text)
    factor = torch.sigmoid(model.skip_lambdas[0])
    assert torch.equal(trace.inputs[2], trace.outputs[1] + factor * trace.outputs[0])
    assert torch.equal(trace.inputs[3], trace.outputs[2])
    assert torch.equal(off.inputs[2], off.outputs[1])


@mechanism("backout_from", final_region={"backout_TD": None})
def test_backout_subtracts_its_layers_output_before_the_last_norm():
    text = packed(9, 12)
    for source in (0, 1, 3):
        model = make_model(replace(CFG, backout_from=source, smear_mtp=False))
        trace, factor = Trace(model, *text), model.backout_lambda.detach()
        assert_close(trace.latents, rms_normed(trace.outputs[3] - factor * trace.outputs[source]))
    off = Trace(make_model(replace(CFG, backout_from=-1, smear_mtp=False)), *text)
    assert_close(off.latents, rms_normed(off.outputs[3]))


@mechanism("drawn output matrices", uniform={"matrices": lambda count: min(count, 3)})
def test_output_matrices_start_as_q_k_and_v():
    bound = math.sqrt(3) * 0.5 / math.sqrt(32)
    o = build_model(CFG, CPU).attn_bank[:, 3]
    assert 0.95 * bound < o.abs().max() <= bound
    assert_close(o.std(), torch.tensor(0.5 / math.sqrt(32)), rtol=0.03, atol=0)


@mechanism("late attention", Config__reads_late={"i": -1})
def test_late_attention_and_its_gates_read_the_backout_layers_output():
    text, layers = packed(9, 12), (*LAYERS, t.Layer("short"))
    cfg = layers_without(replace(CFG, layers=layers), "value_embeds")
    for source in (0, 2, 3, -1):
        model = make_model(replace(cfg, backout_from=source))
        trace, factors = Trace(model, *text), model.attn_lambdas.detach()
        for a, i in enumerate(cfg.attention_layers):
            stream = trace.inputs[i]
            h = rms_normed(trace.outputs[source] if 0 <= source < i else stream)
            w, gate = model.attn_bank.detach()[a], model.attn_gate.detach()[a]
            assert_close(trace.heads[a][2].flatten(1), factors[a, 0] * h @ w[2].T)
            y = trace.gated[a][0] * torch.sigmoid(h[:, : t.GATE_INPUTS] @ gate.T)[..., None]
            after = stream + factors[a, 1] * y.flatten(1) @ w[3].T
            assert_close(trace.mlp_inputs[i][0], after)
            assert_close(trace.mlp_inputs[i][1], rms_normed(after))
        assert_close(trace.mlp_inputs[2][1], rms_normed(trace.inputs[2]))  # of the layer without attention


@mechanism("attention gates", gate_region={"gate_HG": torch.zeros_like})
def test_attention_gates_scale_each_head_and_start_at_one_half():
    text, cfg = packed(9, 12), replace(CFG, backout_from=-1)
    assert not build_model(CFG, CPU).attn_gate.any()
    start, (_, factors) = Trace(make_model(CFG, attn_gate=0), *text), make_model(CFG).attn_lambdas.T
    for (y, out), factor in zip(start.gated, factors.detach(), strict=True):
        assert torch.equal(out, factor * 0.5 * y)

    model = make_model(cfg, std=0.5)
    trace, (_, factors) = Trace(model, *text), model.attn_lambdas.detach().unbind(1)
    layers = zip(trace.gated, (0, 1, 3), model.attn_gate.detach(), factors, strict=True)
    for (y, out), i, weight, factor in layers:
        gates = torch.sigmoid(rms_normed(trace.inputs[i])[:, : t.GATE_INPUTS] @ weight.T)
        assert_close(out, torch.stack([factor * gates[:, h, None] * y[:, h] for h in range(2)], dim=1))


@mechanism("attn_scale", qkv_region={"scale": 1.0})
def test_queries_have_the_rms_of_attn_scale_and_keys_of_one_whatever_the_weights():
    text = packed(9, 12)
    for std in (0.1, 1.0):
        for q, k, _ in Trace(make_model(layers_without(CFG, "key_offset"), std), *text).heads:
            for x, rms in ((q, CFG.attn_scale), (k, 1.0)):
                assert_close(x.square().mean(-1).sqrt(), torch.full((21, 2), rms), atol=0, rtol=1e-3)


@mechanism("rotary", rotate={"cos_TJ": torch.ones_like, "sin_TJ": torch.zeros_like})
def test_rotary_turns_its_fraction_of_pairs_by_relative_position_and_no_other_dim():
    T = 24
    x, q, k = (torch.randn(n, 2, 16) for n in (T, 1, 1))

    def with_fraction(fraction):
        with mock.patch.object(t, "ROTARY_FRACTION", fraction):
            return build_rotary(CFG, T)

    for fraction, moving in ((0.0, 0), (0.5, 4), (1.0, 8)):
        cos, sin, still = with_fraction(fraction)
        assert still.tolist() == [j >= moving for j in range(8)] * 2
        turned = t.rotate(x, cos, sin)
        assert torch.equal(turned[..., still], x[..., still])
        frequency = torch.tensor([1024 ** (-j / max(moving - 1, 1)) if j < moving else 0.0 for j in range(8)])
        turn = torch.polar(torch.ones(T, 1, 8), -torch.arange(T)[:, None, None] * frequency)
        expected = torch.complex(x[..., :8], x[..., 8:]) * turn
        assert_close(turned, torch.cat([expected.real, expected.imag], dim=-1), atol=1e-5, rtol=0)
        scores = torch.einsum("ihe,jhe->hij", *(t.rotate(y.expand(T, -1, -1), cos, sin) for y in (q, k)))
        assert_close(scores[:, 1:, 1:], scores[:, :-1, :-1], atol=1e-4, rtol=0)
        assert (scores.std(dim=(1, 2)).min() > 0.1) == (moving > 0)

    model, (tokens, docs) = make_model(layers_without(CFG, "key_offset")), packed(T)
    real, unturned = with_fraction(0.5), with_fraction(0.0)
    seen = []
    model.attention = lambda q, k, v, docs, window: seen.append((q, k)) or v
    for rotary in (real, unturned):
        model(tokens, docs, WIDE, rotary)
    for turned, plain in zip(seen[0], seen[3]):
        assert_close(turned, t.rotate(plain, real.cos_PJ, real.sin_PJ))
        assert not torch.allclose(turned, plain, atol=1e-3)


@mechanism("softcap", CAP_HEIGHT=1e4, CAP_SHIFT=0.0, CAP_WIDTH=1e4)
@mechanism("softcap shift", CAP_SHIFT=0.0)
@mechanism("softcap width", CAP_WIDTH=11.5)
def test_the_softcap_of_scores_and_losses_is_a_sigmoid_up_to_a_constant():
    x, model, targets = torch.randn(11, 32), make_model(CFG, std=3.0), torch.arange(11)[:, None]
    z = x @ model.head.detach().T
    assert z.abs().max() > 50
    logits = 23 * torch.sigmoid((z + 5) / 7.5) - 11.5
    loss_T = F.cross_entropy(logits, targets[:, 0], reduction="none")
    model.refresh()
    assert_close(t.cap(model.products(x)), logits)
    assert_close(torch.cat([*model.token_losses(x, targets[:, 0], None, 4)]), loss_T)
    assert_close(t.head_step(model, x, 0, targets, torch.ones(1))[0], loss_T.sum())


@mechanism("smear_mtp", final_region={"smear_mtp_lambda": None})
def test_smear_mtp_adds_lambda_times_the_previous_latent():
    tokens, _ = text = packed(9, 12)
    y = latents(make_model(replace(CFG, smear_mtp=False)), *text)
    model = make_model(CFG, smear_mtp_lambda=0.7)
    out, lam = latents(model, *text), torch.tensor(0.7)
    expected = torch.stack([y[i] if tokens[i] == BOS else y[i] + lam * y[i - 1] for i in range(len(y))])
    assert torch.equal(out, expected)
    start = make_model(CFG, smear_mtp_lambda=build_model(CFG, CPU).smear_mtp_lambda)
    assert torch.equal(latents(start, *text), y)
    latents(start, *text).square().sum().backward()
    assert start.smear_mtp_lambda.grad != 0


def first_target_only(weights_K):
    return weights_K * (torch.arange(len(weights_K)) == 0)


@mechanism("further targets", loss_region={"weights_K": first_target_only})
def test_the_loss_is_the_weighted_sum_of_the_cross_entropies_of_the_next_tokens():
    batch = make_batch(9, 12)
    tokens, docs = batch.tokens[:-1], batch.docs
    for stages, step, weights in ((STAGES, 0, (1, 0.5, 0.25)), (STAGES, 1, (1, 0.5, 0.125)),
                                  (NEXT_ALONE, 0, (1,))):  # fmt: skip
        model, plain = (make_model(replace(CFG, stages=stages)) for _ in range(2))
        x = latents(plain, tokens, docs)
        terms = [cross_entropies(plain, plain.head, x, batch.tokens, 1 + k) for k in range(len(weights))]
        loss = sum(weight * term for weight, term in zip(weights, terms)) / 64
        loss.backward()
        assert_close(micro_backward(model, batch, step), loss.detach())
        assert_close(model.head.grad, plain.head.grad)


@mechanism("mtp_heads", MTP_WEIGHT=0.0)
def test_mtp_heads_learn_reach_the_trunk_and_can_be_left_out():
    cfg = replace(CFG, mtp_heads=2, scheduled_steps=12, cooldown=0.0)
    model, plan = build_model(cfg, CPU), t.plan_step(cfg, 0)
    with mock.patch.object(t, "ADAM_EVERY", 1):
        table = t.optimizer_table(cfg)
    assert [row.algorithm for row in table if row.name == "mtp_heads"] == [t.Adam]
    optimizer = t.Optimizer(model, table, t.World())
    pattern = torch.tensor([BOS, 3, 141, 59, 26, 53]).repeat(7)
    batch = t.MicroBatch(torch.cat([pattern, pattern[:1]]), packed(42)[1])

    def from_heads_alone():
        own, auxiliary = t.loss_weights(cfg, plan, CPU.device)
        micro_backward(model, batch, weights=(torch.zeros_like(own), auxiliary))
        gradient = model.attn_bank.grad.norm(), model.embed.grad.norm(), model.mtp_heads.grad.norm()
        model.zero_grad(set_to_none=True)
        return [norm.item() for norm in gradient]

    attn, embed, heads = from_heads_alone()
    assert attn == embed == 0 and heads > 0
    for step in range(cfg.scheduled_steps):
        micro_backward(model, batch)
        optimizer.step(step, plan.lr, plan.momentum, NO_REPORT)
    assert all(norm > 0 for norm in from_heads_alone())
    with torch.no_grad():
        x = latents(model, batch.tokens[:-1], batch.docs)
        for k, head in enumerate(model.mtp_heads):
            count = 42 - 1 - k
            assert cross_entropies(model, head, x, batch.tokens, k + 2) / count < math.log(cfg.vocab_size) / 2

    without = t.GPT(replace(cfg, mtp_heads=0))  # as evaluate.py exports it
    t.load_weights(without, {f"model.{n}": p for n, p in model.named_parameters() if n != "mtp_heads"}, "")
    with torch.no_grad():
        assert torch.equal(latents(without, batch.tokens[:-1], batch.docs), x)


@mechanism("MTP_WEIGHT", MTP_WEIGHT=0.0)
def test_the_mean_loss_of_mtp_heads_counts_with_its_weight():
    batch = make_batch(9, 12)
    for count in (1, 2):
        model, plain = (make_model(replace(CFG, mtp_heads=count)) for _ in range(2))
        micro_backward(model, batch)
        x = latents(plain, batch.tokens[:-1], batch.docs)
        loss = sum(cross_entropies(plain, plain.mtp_heads[k], x, batch.tokens, 2 + k) for k in range(count))
        (0.1 * loss / count / 64).backward()
        assert_close(model.mtp_heads.grad, plain.mtp_heads.grad)


def losses_among(columns, x_TD, head_VD, targets_TK, weights):
    """Sum of weight * cross entropy among the columns alone, in float64; other targets are left out."""
    height, shift, width = t.CAP_HEIGHT, t.CAP_SHIFT, t.CAP_WIDTH
    logits = height * torch.tanh((x_TD.double() @ head_VD.double()[columns].T + shift) / width)
    places = {token: place for place, token in enumerate(columns.tolist())}
    rows = [(row, zip(weights, targets)) for row, targets in zip(logits, targets_TK.tolist(), strict=True)]
    return sum(weight * (row.logsumexp(0) - row[places[target]])
               for row, pairs in rows for weight, target in pairs if target in places)  # fmt: skip


NO_COLUMNS = {"stage": lambda stage: stage._replace(columns=0)}


@mechanism("columns", choose_columns=NO_COLUMNS, head_step={"columns_S": None},
           MicroBatch={"columns": None})  # fmt: skip
def test_columns_are_the_tokens_among_which_all_training_losses_choose():
    batch = t.to_device(make_batch(9, 12, columns=48), CPU.device)
    assert batch.columns is not None and len(batch.columns) == 48
    following = batch.tokens[1:]
    further = [F.pad(following[k:], (0, k), value=-1) for k in range(3)]
    assert torch.isin(following, batch.columns).all()
    for stages, weights in ((STAGES, (1, 0.5, 0.25)), (NEXT_ALONE, (1,))):
        cfg = replace(CFG, mtp_heads=2, stages=stages)
        model, plain = make_model(cfg), make_model(cfg)
        with mock.patch.object(t, "LOSS_CHUNK", 5):
            found = micro_backward(model, batch)
        x = latents(plain, batch.tokens[:-1], batch.docs)
        losses = partial(losses_among, batch.columns, x)
        own_TK = torch.stack(further[: len(weights)], dim=1)
        own = losses(plain.head, own_TK, weights) / 64
        heads = [losses(plain.mtp_heads[k], further[k + 1][:, None], [0.05]) for k in range(2)]
        (own + sum(heads) / 64).backward()
        assert_close(found.double(), own.detach(), rtol=1e-5, atol=0)
        for (name, p), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert_close(p.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)
        others = [token for token in range(384) if token not in batch.columns]
        assert not model.head.grad[others].any() and not model.mtp_heads.grad[:, others].any()


@pytest.mark.parametrize("k", [0, 2])
def test_a_head_step_among_columns_has_the_loss_and_gradients_of_float64(k, exact, monkeypatch):
    monkeypatch.setattr(t, "LOSS_CHUNK", 7)
    cfg = replace(ALL_ON, mtp_heads=2)
    model, plain = (make_model(cfg, dtype=torch.float64) for _ in range(2))
    x, columns = torch.randn(20, 32, dtype=torch.float64, requires_grad=True), torch.randperm(384)[:80]
    targets, weights = torch.randint(-1, 384, (20, 2)), torch.tensor([1.0, 0.5], dtype=torch.float64)
    targets[:5, 0] = columns[:5]
    model.refresh()
    (model.mtp_heads if k else model.head).grad = torch.ones_like(model.mtp_heads if k else model.head)
    loss, x_grad, _ = t.head_step(model, x.detach(), k, targets, weights, columns)
    head, own = [plain.head, *plain.mtp_heads][k], [model.head.grad, *t.gradient(model.mtp_heads)][k]
    expected = losses_among(columns, x, head, targets, weights)
    head_grad, expected_grad = torch.autograd.grad(expected, (head, x))
    assert_close(loss, expected.detach())
    assert_close(x_grad, expected_grad)
    assert_close(own - 1, head_grad, rtol=1e-7, atol=1e-12)


def rounded(x, scale, dtype=torch.float8_e4m3fn):
    """What float8 keeps of x / scale, times scale."""
    largest = 448 if dtype == torch.float8_e4m3fn else 57344
    return (x / scale).clamp(-largest, largest).to(dtype).float() * scale


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@mechanism("fp8", GPT={"fp8": False})
def test_float8_rounds_the_operands_of_the_mlps_products_in_training_alone():
    text, slope = packed(9, 12), CFG.leaky_slope
    model, plain = make_model(CFG, fp8=True), make_model(CFG)
    assert torch.equal(Trace(model, *text).latents, Trace(plain, *text).latents)
    model.grad_scale.fill_(0.01)
    trace, grads = Trace(model, *text, training=True), t.gradient(model.mlp_bank)
    layers = zip(trace.mlp_inputs, trace.outputs, model.mlp_bank.detach(), grads, strict=True)
    for (x, h), out, (up, down), found in layers:
        h8, up8, down8 = (rounded(x, scale) for x, scale in (
            (h, 2 * math.sqrt(CFG.width) / 448), (up, up.abs().max() / 448), (down, down.abs().max() / 448)))
        r, direction = F.leaky_relu(h8 @ up8.T, slope).bfloat16().float(), torch.randn_like(out)
        assert relative_error(out - x, rounded(r**2, 1) @ down8) < 1e-3
        assert 0.01 < relative_error(out - x, F.leaky_relu(h @ up.T, slope) ** 2 @ down) < 0.1

        out_grad = rounded(direction, 0.01, torch.float8_e5m2)
        before = rounded(out_grad @ down8.T * 2 * F.leaky_relu(r, slope), 0.01, torch.float8_e5m2)
        (h_grad,) = torch.autograd.grad(out, h, direction)
        wanted = before @ up8, before.T @ h8, rounded(r**2, 1).T @ out_grad
        for result, expected in zip((h_grad, *found), wanted):
            assert relative_error(result, expected) < 1e-3
        exact = direction @ down.T * 2 * F.leaky_relu(r, slope)
        for result, expected in zip((h_grad, *found), (exact @ up, exact.T @ h, (r**2).T @ direction)):
            assert 0.01 < relative_error(result, expected) < 0.15


@mechanism("leaky_slope", **dict.fromkeys(("activation_region", "mlp_forward", "mlp_backward"),
                                          {"slope": 0.0}))  # fmt: skip
def test_leaky_slope_gives_squared_leaky_relu_and_its_derivative():
    x = torch.linspace(-3, 3, 40, dtype=torch.float64)[:, None].requires_grad_()
    u8, one, text = x.detach().to(torch.float8_e4m3fn), torch.ones(1, 1), packed(9, 12)
    u, one8 = u8.float(), one.to(torch.float8_e4m3fn)
    for slope in (0.0, 0.5, 0.75):
        assert_close(t.activation_region(x, slope), torch.where(x > 0, x, slope * x) ** 2)
        assert torch.autograd.gradcheck(t.activation_region, (x, slope), raise_exception=False)

        r, y = t.mlp_forward(u8, one8, one[0, 0], slope)
        assert_close(y.float(), rounded(torch.where(u > 0, u, slope * u) ** 2, 1))
        gradient, *_ = t.mlp_backward(torch.ones_like(u).to(torch.float8_e5m2), one8, r, one[0, 0], slope)
        expected = torch.where(u > 0, 2 * u, 2 * slope**2 * u)
        assert_close(gradient.float(), rounded(expected, 1, torch.float8_e5m2))

        model = make_model(replace(CFG, leaky_slope=slope), dtype=torch.float64)
        trace, (up, down) = Trace(model, *text), model.mlp_bank.detach()[2]
        hidden = rms_normed(trace.inputs[2]) @ up.T
        hidden = torch.where(hidden > 0, hidden, slope * hidden) ** 2
        assert_close(trace.outputs[2] - trace.inputs[2], hidden @ down)


def test_gradients_in_float8_are_scaled_to_the_weights_of_the_loss_and_added_up():
    batch = make_batch(17, 1, 20)
    exact, eight = make_model(ALL_ON), make_model(ALL_ON, fp8=True)
    for part in (1.0, 2.0**-20):
        weights = [part * w for w in t.loss_weights(ALL_ON, t.plan_step(ALL_ON, 0), CPU.device)]
        for model in (exact, eight) * 2:  # the second time adds to the gradients of the first
            micro_backward(model, batch, weights=weights)
        assert_close(eight.grad_scale, part * torch.tensor(1.75 / 64 / 256), atol=0, rtol=1e-6)
        for name in ("embed", "attn_bank", "mlp_bank"):
            gradients = (model.get_parameter(name).grad for model in (eight, exact))
            assert 0.01 < relative_error(*gradients) < 0.25
        for p in (*exact.parameters(), *eight.parameters()):
            p.grad = None


def wrapped(n):
    """As int32."""
    return (n + 2**31) % 2**32 - 2**31


def pair_by_hand(token, before, rows):
    """Row of a pair of tokens; of a token alone, if none is before."""
    return rows - 1 if before is None else (wrapped(36313 * token) ^ wrapped(27191 * before)) % (rows - 1)


@mechanism("bigram_ratio", mix_region={"bigram_TD": None}, bigram_region={"tokens_T": torch.zeros_like})
def test_bigrams_add_the_row_of_each_pair_of_tokens_in_front_of_every_layer_and_start_inert():
    tokens, _ = text = packed(9, 12)
    cfg = layers_without(replace(CFG, bigram_ratio=1.5), "skip_from")
    fresh, off = make_model(cfg, bigram_embed=0), make_model(replace(cfg, bigram_ratio=0.0))
    assert cfg.bigram_rows == 576 and torch.equal(latents(fresh, *text), latents(off, *text))
    model = make_model(cfg)
    before = [None if tokens[i] == BOS else int(tokens[i - 1]) for i in range(len(tokens))]
    rows = torch.tensor([pair_by_hand(*pair, 576) for pair in zip(tokens.tolist(), before)])
    bigram = model.bigram_embed.detach()[rows]
    trace, lambdas = Trace(model, *text), mixing_factors(model)
    streams = [trace.x0, *trace.outputs[:-1]]
    for x, stream, (own, first), factor in zip(trace.inputs, streams, lambdas, model.bigram_lambdas.detach()):
        assert_close(x, own * stream + first * trace.x0 + factor * bigram)
    latents(model, *text).square().sum().backward()
    assert set(model.bigram_embed.grad.any(-1).nonzero().flatten().tolist()) == set(rows.tolist())
    assert model.bigram_lambdas.grad.all()

    tokens = torch.randint(2**16, (500,))
    rows = t.bigram_region(tokens, torch.arange(500) == 0, 10_007)
    before = [None, *tokens[:-1].tolist()]
    assert rows.tolist() == [pair_by_hand(*pair, 10_007) for pair in zip(tokens.tolist(), before)]


@mechanism("untie_at", GPT={"cfg": having(untie_at=0.0)}, optimizer_table={"cfg": having(untie_at=0.0)})
def test_head_and_embedding_are_one_weight_until_they_are_untied_with_the_moments_they_have():
    for untie_at, decay, updates in ((0.5, 0.0, ("tied", "tied", "own", "own")), (0.1, 0.0, ("own",) * 4),
                                     (0.6, 20.0, ("tied", "tied", "own", "own")),
                                     (9.0, 20.0, ("tied",) * 4)):  # fmt: skip
        cfg = replace(CFG, untie_at=untie_at, scheduled_steps=8)
        model, names = build_model(cfg, CPU), ("embed", "head")
        with mock.patch.object(t, "ADAM_DECAY", decay):
            optimizer = t.Optimizer(model, t.optimizer_table(cfg), t.World())
        expected = {name: model.get_parameter(name).detach().clone() for name in names}
        assert torch.equal(*expected.values())
        assert_close(model.head.std().item(), 0.005, rtol=0.02, atol=0)
        moments = {name: torch.zeros(2, *model.head.shape) for name in names}
        for step in range(8):
            micro_backward(model, make_batch(17, 1, 20, seed=step))
            if step % 2:
                grads, lr = {name: model.get_parameter(name).grad.clone() for name in names}, cfg.adam_lr
                if updates[step // 2] == "tied":
                    grads = dict.fromkeys(names, grads["head"] + grads["embed"])
                biases = (1 - beta ** (step // 2 + 1) for beta in (0.5, 0.95))
                rest = lr, *biases, 0.5, 0.95, 150 * decay * lr
                for name in names:
                    t.adam_update(expected[name], grads[name], *moments[name], *rest)
            optimizer.step(step, 1.0, 0.9, NO_REPORT)
            for name in names:
                assert_close(model.get_parameter(name).detach(), expected[name], rtol=1e-5, atol=1e-8)
            tied = updates[step // 2] == "tied" if step % 2 else step == 0 or updates[step // 2 - 1] == "tied"
            assert torch.equal(model.embed, model.head) == tied
    assert t.optimizer_table(replace(CFG, untie_at=0.5))[0].lr == (CFG.adam_lr,)


LEAKS = {  # of a configuration
    "smear": ({}, 0.3), "smear-MTP": ({"smear_mtp": True}, 0.0), "bigrams": ({"bigram_ratio": 1.5}, 0.0),
    "key offset": ({"layers": tuple(layer._replace(value_embeds=()) for layer in OFFSET)}, 0.0),
}  # fmt: skip


@mechanism("cuts at document starts",
           **dict.fromkeys(("embed_region", "offset_keys", "final_region", "bigram_region"),
                           {"edges_T": torch.zeros_like}))  # fmt: skip
def test_what_reads_the_previous_position_never_looks_back_over_a_document_start():
    for changes, smear in LEAKS.values():
        model = make_model(replace(ATTENTION_ONLY, **changes), smear_lambda=smear)
        for position in (3, 8):
            assert max(influence(model, *packed(9, 12), position)) == 8, changes


@mechanism("betas of scalars", Row={"betas": (0.65, 0.95)})
def test_scalars_average_over_more_steps_but_for_factors_on_x0_and_bigrams():
    cfg = replace(CFG, bigram_ratio=1.5, mtp_heads=1)
    model = make_model(cfg)
    optimizer = t.Optimizer(model, t.optimizer_table(cfg), t.World())
    optimizer.reset()
    for p in model.parameters():
        p.grad.fill_(1.0)
    optimizer.step(1, 1.0, 0.9, NO_REPORT)
    found = {part.row.name: part.moments["first"].mean().item() for part in optimizer.parts
             if part.row.algorithm is t.Adam}  # fmt: skip
    quick = {"head": 0.5, "value_embeds": 0.25, "bigram_embed": 0.25}
    quick |= dict.fromkeys(("embed", "mtp_heads", "x0_lambdas", "bigram_lambdas"), 0.35)
    smooth = {"attn_gate", "smear_gate", "attn_lambdas", "resid_lambdas", "smear_lambda", "skip_lambdas",
              "backout_lambda", "smear_mtp_lambda"}  # fmt: skip
    assert found == pytest.approx(quick | dict.fromkeys(smooth, 0.1))


@mechanism("fused MLP kernel", mlp_forward={"mode": "reference"}, mlp_backward={"mode": "reference"})
def test_the_fused_kernel_computes_every_mlp_forward_and_backward():
    """The interpreter rounds to float8 badly."""
    if t.triton is None or os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter; on a GPU see tests/gpu")
    batch = make_batch(9, 7)
    model, plain = (make_model(CFG, fp8=True, kernels=mode) for mode in ("small", "reference"))
    with mock.patch.object(t, "launch_mlp_kernel", wraps=t.launch_mlp_kernel) as launch:
        loss, expected = micro_backward(model, batch), micro_backward(plain, batch)
    assert launch.call_count == 2 * len(LAYERS)
    assert_close(loss, expected, rtol=0.1, atol=0)
    assert relative_error(model.mlp_bank.grad, plain.mlp_bank.grad) < 0.5


def test_factors_on_bigrams_reach_no_late_attention_but_the_stream():
    text, cfg = packed(9, 12), replace(CFG, bigram_ratio=1.5)
    lambdas = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.8]])
    model, other = (make_model(cfg, bigram_lambdas=x) for x in lambdas)
    trace, changed = Trace(model, *text), Trace(other, *text)
    assert all(torch.equal(x, y) for x, y in zip(trace.heads[-1], changed.heads[-1], strict=True))
    assert not torch.allclose(trace.inputs[3], changed.inputs[3], atol=1e-2)


def test_a_tied_embedding_has_the_heads_rate_and_decay_and_value_tables_keep_theirs():
    cfg = replace(CFG, untie_at=0.5, bigram_ratio=1.5)
    rows = {row.name: row for row in t.optimizer_table(cfg)}
    assert rows["embed"].weight_decay == rows["head"].weight_decay == 150 * 0.005 * cfg.adam_lr
    assert rows["embed"].lr == rows["head"].lr == (cfg.adam_lr,)
    for row in (rows["value_embeds"], rows["bigram_embed"]):
        assert row.lr == (75 * cfg.adam_lr,) and row.weight_decay == 5 * 0.005 * 75 * cfg.adam_lr


def uncopied(masses_T2):
    return None if masses_T2 is None else torch.zeros_like(masses_T2)


@mechanism("pointer", loss_region={"masses_T2": uncopied}, head_step={"masses_T2": uncopied},
           pointer_masses={"sink": lambda sink: sink + 50})
def test_a_pointer_mixes_copies_of_the_document_into_a_distribution_that_sums_to_1():
    cfg = replace(CFG, pointer=True, stages=NEXT_ALONE)
    batch, model, plain = make_batch(9, 12), make_model(cfg), make_model(cfg)
    tokens, docs = batch.tokens[:-1], batch.docs
    tokens[1:9], tokens[10:] = tokens[1:9] % 3, tokens[10:] % 3  # a view: so that there is much to copy
    expected = cross_entropies(plain, plain.head, latents(plain, tokens, docs), batch.tokens, 1)
    expected.backward()
    assert_close(64 * micro_backward(model, batch), expected.detach())
    for name, p in model.named_parameters():
        assert_close(64 * p.grad, plain.get_parameter(name).grad, rtol=1e-4, atol=1e-4, msg=name)
    validated = t.Validation(cfg, batch.tokens.numpy()).run(model, WIDE, build_rotary(cfg, 100), t.World())
    assert_close(21 * validated["val_loss"], expected.item(), rtol=1e-5, atol=0)
    with torch.no_grad():
        x, total, log_p = latents(model, tokens, docs), 0, {}
        logits = mixed(model, t.cap(model.products(x)), x, tokens)[-1]
        for token in (token for token in range(cfg.padded_vocab) if token != cfg.vocab_size):
            following = batch.tokens[1:].index_fill(0, torch.tensor(20), token)
            masses = model.copy_masses(x, following, docs, 2048)
            (losses,) = model.token_losses(x, following, masses, 100)
            total += losses[-1].neg().exp().item()
            log_p[token] = -losses[-1]
    assert total == pytest.approx(1, abs=1e-5)
    assert_close(torch.stack([*log_p.values()]), logits[torch.tensor([*log_p])])


def one_document(docs):
    return t.Documents(docs.cu_seqlens[[0, -1]], int(docs.cu_seqlens[-1]))


@mechanism("documents", attention_reference={"docs": one_document})
def test_attention_never_leaves_a_document():
    model, text = make_model(ATTENTION_ONLY, smear_lambda=0), packed(9, 12, 1, 8)
    for position, end in ((1, 9), (8, 9), (10, 21), (23, 30)):
        assert influence(model, *text, position) == list(range(position, end))


def test_every_mechanism_of_the_config_has_a_test():
    names = [field.name for field in dataclasses.fields(t.Config)]
    flags = {*names[names.index("attn_scale") : names.index("muon_lr")]}
    others = {"documents", "cuts at document starts", "windows", "stages", "layers", "rotary",
              "value_embeds", "several value tables", "shared value tables", "key_offset", "skip", "x0",
              "inject", "smear", "late attention", "attention gates", "drawn output matrices",
              "betas of scalars", "softcap", "softcap shift", "softcap width",
              "further targets", "columns", "MTP_WEIGHT", "fp8", "fused MLP kernel"}  # fmt: skip
    assert set(MECHANISM_TESTS) == flags | others


@pytest.mark.parametrize("name, place", [(name, place) for name in INERT for place in INERT[name]])
def test_of_a_mechanism_fails_when_the_mechanism_is_inert_in_any_one_place(name, place, monkeypatch):
    make_inert(monkeypatch, place, INERT[name][place])
    with pytest.raises(AssertionError):
        MECHANISM_TESTS[name]()


def test_final_windows_are_used_by_the_validation_after_training_and_lambdas_are_logged():
    cfg, seen, lines, metrics = replace(CFG, extension_steps=1), [], [], []
    result = {"val_loss": 2.5, "val_bpb": None}
    val = SimpleNamespace(run=lambda model, windows, *rest: seen.append(windows) or result)
    log = SimpleNamespace(line=lines.append, metric=lambda **values: metrics.append(values))
    model = make_model(cfg, smear_mtp_lambda=-0.125)
    job = SimpleNamespace(model=model, val=val, world=t.World())
    for step in (0, cfg.total_steps - 1, cfg.total_steps):
        t.validate(job, None, step, t.Clock(CPU, 0.0), log)
    assert seen == [{"short": 4, "long": 8}, {"short": 8, "long": 16}, {"short": 10, "long": 20}]
    assert all("val_loss:2.5000" in line and "smear_mtp_lambda:-0.1250" in line for line in lines)
    assert [row["lambdas"] for row in metrics] == [model.lambdas()] * 3


# ----------------------------------------------------------------------------------------------------------
# Attention


def naive_attention(q, k, v, lengths, window):
    """Masked softmax, query by query."""
    document = [i for i, length in enumerate(lengths) for _ in range(length)]
    rows = []
    for i in range(len(q)):
        seen = [j for j in range(max(0, i - window), i + 1) if document[j] == document[i]]
        weights = torch.einsum("he,jhe->hj", q[i], k[seen]).softmax(-1)
        rows.append(torch.einsum("hj,jhe->he", weights, v[seen]))
    return torch.stack(rows)


@pytest.mark.parametrize("seed", range(40))
def test_attention_reference_equals_a_masked_softmax(seed):
    """Blocks that don't divide T, documents of one token and of none, window 0, windows beyond T."""
    draw = random.Random(seed)
    lengths = [draw.choice((0, 1, 1, 1, 2, draw.randint(3, 20))) for _ in range(draw.randint(1, 6))] + [1]
    T, block = sum(lengths), draw.choice((1, 2, 3, 5, 8, 256))
    window = draw.choice((0, 1, draw.randint(1, T), T, 5 * T))
    docs = t.Documents(torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32), max(lengths))
    torch.manual_seed(seed)
    *qkv, out_gradient = torch.randn(4, T, 3, 4, dtype=torch.float64)
    results = []
    for attention, where in ((partial(t.attention_reference, block=block), docs), (naive_attention, lengths)):
        inputs = [x.clone().requires_grad_() for x in qkv]
        out = attention(*inputs, where, window)
        results.append((out.detach(), *torch.autograd.grad(out, inputs, out_gradient)))
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, atol=1e-12, rtol=1e-10)


def test_attention_varlen_hands_documents_and_window_to_torch(monkeypatch):
    """Its result is tested on a GPU."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    tokens, docs = packed(9, 12)
    starts = torch.zeros(21, dtype=torch.bool)

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size, **options):
        assert cu_q is cu_k and (max_q, max_k, scale) == (12, 12, 1.0) and options.get("num_splits", 1) == 1
        return t.attention_reference(q, k, v, t.Documents(cu_q, max_q), window_size[0])

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    q, k, v = torch.randn(3, 21, 2, 8)
    for some in (docs, docs._replace(first_T=starts)):
        found = t.attention_varlen(q, k, v, some, 5)
        assert torch.equal(found, t.attention_reference(q, k, v, docs, 5))


def test_a_layer_adds_gated_attention_then_the_mlp_of_the_normed_stream():
    lengths = 9, 12
    model = make_model(replace(layers_without(CFG, "value_embeds"), backout_from=-1))
    trace, lambdas = Trace(model, *packed(*lengths)), model.attn_lambdas.detach()
    for a, i in enumerate(CFG.attention_layers):
        x, (q, k, v) = trace.inputs[i], trace.heads[a]
        w, (up, down) = model.attn_bank.detach()[a], model.mlp_bank.detach()[i]
        assert_close(v, lambdas[a, 0] * (rms_normed(x) @ w[2].T).view(21, 2, 16))
        gates = torch.sigmoid(rms_normed(x)[:, : t.GATE_INPUTS] @ model.attn_gate.detach()[a].T)
        y = naive_attention(q, k, v, lengths, 1000) * gates[..., None]
        x = x + lambdas[a, 1] * y.flatten(1) @ w[3].T
        mlp = F.leaky_relu(rms_normed(x) @ up.T, model.cfg.leaky_slope) ** 2 @ down
        assert_close(trace.outputs[i], x + mlp, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------
# Causality


@pytest.mark.parametrize("window", [1, 6, 2048])
def test_losses_of_a_mixture_with_copies_stay_before_a_changed_token_and_in_other_documents(window):
    model, (tokens, docs) = make_model(replace(CFG, pointer=True)), packed(17, 1, 25, 20)
    tokens = tokens.where(tokens == BOS, tokens % 4)  # so that there is much to copy
    edges = docs.cu_seqlens.tolist()

    def losses(tokens):
        with torch.no_grad():
            x, following = latents(model, tokens, docs), tokens.roll(-1)
            masses = model.copy_masses(x, following, docs, window)
            return torch.cat([*model.token_losses(x, following, masses, 7)])

    before = losses(tokens)
    for place in (3, 15, 16, 19, 30, 60):
        other = tokens.clone()
        other[place] = (other[place] + 1) % 4
        differ = (losses(other) != before).nonzero().flatten().tolist()
        end = min(edge for edge in edges if edge > place)
        assert differ[0] == place - 1 and differ[-1] < end and (place + 1 == end or place in differ)


@pytest.mark.parametrize("cfg", (ALL_ON, CFG), ids=("all on", "default"))
def test_latents_before_a_changed_token_and_in_other_documents_stay_bit_for_bit(cfg):
    tokens, docs = text = packed(17, 1, 25, 20)
    model = make_model(cfg)
    inner = [i for i in range(len(tokens)) if tokens[i] != BOS]
    for position in random.Random(0).sample(inner, 20):
        reached = influence(model, *text, position)
        end = min(edge for edge in docs.cu_seqlens.tolist() if edge > position)
        assert reached[0] == position and reached[-1] < end


# ----------------------------------------------------------------------------------------------------------
# Loss, gradients and compilation


PLAIN = {
    "Lookup": lambda tokens, table, dtype: table[tokens].to(dtype),
    "Linear": lambda x, weight, grad: x @ weight.T,
}


@pytest.fixture
def exact(monkeypatch):
    """What the script casts to float32 becomes float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


BARE = replace(layers_without(CFG, "value_embeds", "key_offset", "skip_from"), smear_mtp=False,
               backout_from=-1)  # fmt: skip
CHUNKED = {
    "chunks of 1": (1, replace(ALL_ON, leaky_slope=0.0)),
    "chunks of 7": (7, ALL_ON),
    "one chunk": (10**6, replace(ALL_ON, leaky_slope=0.75)),
    "bare": (7, BARE),
}


@pytest.mark.parametrize("chunk, cfg", CHUNKED.values(), ids=CHUNKED)
def test_gradients_of_chunks_are_added_and_equal_those_of_one_plain_pass(chunk, cfg, exact, monkeypatch):
    monkeypatch.setattr(t, "LOSS_CHUNK", chunk)
    monkeypatch.setattr(t, "MTP_WEIGHT", 0.25)
    batch = make_batch(17, 1, 20)
    model, plain = (make_model(cfg, dtype=torch.float64) for _ in range(2))
    before = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = before[name].clone()
    loss = micro_backward(model, batch)

    for name, function in PLAIN.items():
        monkeypatch.setattr(t, name, SimpleNamespace(apply=function))
    plain.compute_weights = {name: (plain.get_parameter(name),) for name in ("attn_bank", "mlp_bank")}
    x = latents(plain, batch.tokens[:-1], batch.docs)
    terms = partial(cross_entropies, plain, x_TD=x, tokens=batch.tokens)
    own = sum(weight * terms(plain.head, ahead=k + 1) for k, weight in enumerate((1, 0.5, 0.25))) / 64
    auxiliary = sum(0.125 * terms(plain.mtp_heads[k], ahead=k + 2) for k in range(cfg.mtp_heads)) / 64
    (own + auxiliary).backward()
    assert_close(loss.item(), own.item(), rtol=1e-6, atol=0)
    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_close(found.grad - before[name], expected.grad, rtol=1e-9, atol=1e-13, msg=name)


def test_gradients_are_finite_differences_of_the_loss(exact, monkeypatch):
    monkeypatch.setattr(t, "MTP_WEIGHT", 0.25)
    model, batch = make_model(ALL_ON, dtype=torch.float64), make_batch(17, 1, 20)

    def loss():
        x = latents(model, batch.tokens[:-1], batch.docs)
        heads = [(1, model.head, 1), (0.5, model.head, 2), (0.25, model.head, 3),
                 *((0.125, model.mtp_heads[k], k + 2) for k in range(2))]  # fmt: skip
        return sum(share * cross_entropies(model, head, x, batch.tokens, k) for share, head, k in heads) / 64

    micro_backward(model, batch)
    for name, p in model.named_parameters():
        start, step, losses = p.detach().clone(), 3e-6 * torch.randn_like(p), []
        with torch.no_grad():
            for value in (start + step, start - step, start):
                p.copy_(value)
                losses.append(loss())
        assert_close(losses[0] - losses[1], 2 * (p.grad * step).sum(), rtol=1e-5, atol=0, msg=name)


REPEATED = torch.tensor([3, 1, 3, 3, 0, 1])
FUNCTIONS = {  # of a Function or its plain form, a weight, its gradient and inputs; shapes of the tensors
    "Lookup": (lambda apply, w, grad: apply(REPEATED, w, w.dtype), (5, 4)),
    "Linear": (lambda apply, w, grad, x: apply(x, w, grad), (3, 4), (7, 4)),
    "Linear of a transposed weight": (lambda apply, w, grad, x: apply(x, w.T, grad.T), (4, 3), (7, 4)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_adds_the_gradients_of_its_plain_form_in_place(name):
    (form, *shapes), kind = FUNCTIONS[name], re.match(r"\w+", name)[0]
    weight, *inputs = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    weight.grad = grad = torch.randn_like(weight)
    before = grad.clone()
    out, expected = (form(apply, weight, grad, *inputs) for apply in (getattr(t, kind).apply, PLAIN[kind]))
    assert_close(out, expected)
    direction = torch.randn_like(out)
    wanted = torch.autograd.grad(expected, (weight, *inputs), direction)
    out.backward(direction)
    assert weight.grad is grad
    assert_close((grad - before, *(x.grad for x in inputs)), wanted)


def test_gradients_of_bfloat16_products_and_rows_are_summed_in_float32():
    weight, table = (torch.nn.Parameter(torch.randn(3, 4)) for _ in range(2))
    x, direction = torch.rand(1000, 4).bfloat16().requires_grad_(), torch.rand(1000, 3).bfloat16()
    t.Linear.apply(x, weight.detach().bfloat16(), t.gradient(weight)).backward(direction)
    assert_close(weight.grad, direction.float().T @ x.detach().float())
    tokens = torch.arange(1000) % 2
    rows = t.Lookup.apply(tokens, table, torch.bfloat16)
    rows.backward(x.detach())
    assert rows.dtype == torch.bfloat16
    assert_close(table.grad, torch.stack([x.detach()[tokens == i].float().sum(0) for i in range(3)]))


@pytest.mark.parametrize("columns", [0, 64])
@pytest.mark.parametrize("softcap, bound", [((11.5, 5.0, 15.0), 0.27), ((60.0, 0.0, 15.0), 0.4)],
                         ids=["real", "steep"])  # fmt: skip
def test_a_model_in_float8_has_nearly_the_loss_and_gradients_of_one_in_float32(softcap, bound, columns,
                                                                               monkeypatch):  # fmt: skip
    """Also where the soft cap is so steep, 4, that gradients would not fit."""
    monkeypatch.setattr(t, "LOSS_CHUNK", 16)
    monkeypatch.setattr(t, "MTP_WEIGHT", 0.25)
    for name, value in zip(("CAP_HEIGHT", "CAP_SHIFT", "CAP_WIDTH"), softcap):
        monkeypatch.setattr(t, name, value)
    batch = make_batch(17, 1, 20, columns=columns)
    assert (batch.columns is None) == (columns == 0)
    exact, rounded = make_model(ALL_ON), t.GPT(ALL_ON, fp8=True)
    rounded.load_state_dict(exact.state_dict())
    for _ in range(2):  # the second adds to the gradients of the first
        loss, expected = micro_backward(rounded, batch), micro_backward(exact, batch)
        assert 0 < abs(loss / expected - 1) < 0.02
        for name in ("head", "mtp_heads", "embed", "attn_bank", "mlp_bank"):
            gradients = (model.get_parameter(name).grad for model in (rounded, exact))
            assert 0 < relative_error(*gradients) < bound, name


def test_a_float8_head_of_weight_zero_gets_no_gradient(monkeypatch):
    monkeypatch.setattr(t, "MTP_WEIGHT", 0.0)
    model = make_model(ALL_ON, fp8=True)
    micro_backward(model, make_batch(17, 1, 20))
    assert model.head.grad.isfinite().all() and model.head.grad.any() and not model.mtp_heads.grad.any()


def products_of(model):
    """The tensors that products read."""
    return [x for tensors in model.compute_weights.values() for x in tensors]


@pytest.mark.parametrize("fp8, count", [(False, 2 + 3), (True, 2 + 3 * 3 + 4 * 6)])
def test_refresh_shows_changed_weights_to_the_products_at_the_same_addresses(fp8, count):
    text, (first, second) = packed(9, 12), (make_model(ALL_ON, std).state_dict() for std in (0.3, 0.2))
    model, fresh = (t.GPT(ALL_ON, torch.bfloat16, fp8=fp8) for _ in range(2))
    model.load_state_dict(first)
    fresh.load_state_dict(second)
    latents(model, *text)
    addresses, expected = [x.data_ptr() for x in products_of(model)], latents(fresh, *text)
    model.load_state_dict(second)
    assert not torch.equal(latents(model, *text), expected)
    model.refresh()
    assert torch.equal(latents(model, *text), expected)
    assert [x.data_ptr() for x in products_of(model)] == addresses
    for found, wanted in zip(products_of(model), products_of(fresh), strict=True):
        assert found.dtype == wanted.dtype and torch.equal(found.float(), wanted.float())
    assert len(addresses) == count


def test_products_of_a_float32_model_read_the_parameters_themselves():
    model = make_model(ALL_ON)
    model.refresh()
    parameters = model.attn_bank, model.mlp_bank, model.head, *model.mtp_heads
    assert [x.data_ptr() for x in products_of(model)] == [p.data_ptr() for p in parameters]
    written = [p._version for p in model.parameters()]
    model.refresh()
    assert [p._version for p in model.parameters()] == written  # not even with what they hold


def test_compiled_regions_give_the_same_results_and_one_graph_serves_every_length(monkeypatch):
    """With dynamo's own backend, which makes the graphs and their guards but generates no code."""
    names = [name for name in vars(t) if name.endswith("_region")]
    used, graphs = set(), []

    def use(name, region, *args):
        used.add(name)
        return region(*args)

    with mock.patch.object(torch, "compile", partial(torch.compile, backend="eager")):
        for name in names:
            monkeypatch.setattr(t, name, partial(use, name, t.region(getattr(t, name).__wrapped__)))
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        eager, compiled = (make_model(ALL_ON, fp8=True) for _ in range(2))
        for lengths in ((20, 28), (17, 1, 12), (40, 40)):
            batch, results = make_batch(*lengths), []
            val, rotary = t.Validation(ALL_ON, batch.tokens.numpy()), build_rotary(ALL_ON, 100)
            for model in (eager, compiled):
                t.region.compile = model is compiled
                losses = micro_backward(model, batch), val.run(model, WIDE, rotary, t.World())["val_loss"]
                results.append((*losses, *(p.grad for p in model.parameters())))
            for found, expected in zip(*results, strict=True):
                assert_close(found, expected)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert used == set(names) and graphs[0] >= len(names) and graphs == graphs[:1] * 3


# ----------------------------------------------------------------------------------------------------------
# Initialisation and shapes


def test_initial_weights_depend_on_the_seed_alone():
    models = []
    for seed in (0, 0, 1):
        torch.rand(7)
        models.append(build_model(replace(ALL_ON, seed=seed), CPU))
    first, again, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name in ("embed", "attn_bank", "mlp_bank"):
        assert not torch.equal(first[name], other[name])


def test_initial_values_are_the_documented_ones():
    model = build_model(ALL_ON, CPU)
    bound = math.sqrt(3) * 0.5 / math.sqrt(32)
    zero = ("value_embeds", "head", "mtp_heads", "attn_gate", "smear_gate", "smear_lambda", "x0_lambdas",
            "smear_mtp_lambda", "bigram_embed", "pointer_sink")  # fmt: skip
    constant = dict.fromkeys(zero, 0.0) | {"skip_lambdas": -1.5, "backout_lambda": 0.5, "bigram_lambdas": 0.1,
                                           "resid_lambdas": torch.tensor(1.1),
                                           "pointer_gain": 1.0}  # fmt: skip
    rest = {"embed", "attn_bank", "mlp_bank", "attn_lambdas", "pointer"}
    assert {name for name, _ in model.named_parameters()} == set(constant) | rest
    for name, value in constant.items():
        assert (model.get_parameter(name) == value).all(), name
    assert model.attn_lambdas.tolist() == [[0.5, 1.0]] * 3
    assert not model.mlp_bank[:, 1].any()
    for weights in (model.attn_bank, model.mlp_bank[:, 0], model.pointer):
        assert weights.abs().max() <= bound
        assert_close(weights.std().item(), 0.5 / math.sqrt(32), rtol=0.02, atol=0)
    assert_close(model.embed.std().item(), 1.0, rtol=0.02, atol=0)


def test_every_parameter_receives_a_gradient_within_four_steps():
    """Every matrix of a bank, every table and every scalar by itself."""
    model = build_model(ALL_ON, CPU)
    with mock.patch.object(t, "ADAM_EVERY", 1):
        optimizer = t.Optimizer(model, t.optimizer_table(ALL_ON), t.World())
    shapes = {"attn_bank": (3, 4, -1), "mlp_bank": (4, 2, -1), "attn_gate": (3, 2, -1), "mtp_heads": (2, -1),
              "value_embeds": (2, -1), "embed": (1, -1), "head": (1, -1), "smear_gate": (1, -1),
              "bigram_embed": (1, -1), "pointer": (2, -1)}  # fmt: skip
    reached = {name: False for name, _ in model.named_parameters()}
    for step in range(4):
        micro_backward(model, make_batch(17, 1, 20, seed=step))
        for name, p in model.named_parameters():
            parts = p.grad.reshape(shapes.get(name, (-1, 1))).any(-1)
            reached[name] = parts | reached[name]
        optimizer.step(step, 1.0, 0.9, NO_REPORT)
    assert {name: parts.all().item() for name, parts in reached.items()} == dict.fromkeys(reached, True)


OFF = {
    "value_embeds": {"value_embeds"}, "skip_from": {"skip_lambdas"}, "smear_mtp": {"smear_mtp_lambda"},
    "mtp_heads": {"mtp_heads"}, "pointer": {"pointer", "pointer_gain", "pointer_sink"},
    "backout_from": {"backout_lambda"}, "bigram_ratio": {"bigram_embed", "bigram_lambdas"},
}  # fmt: skip


@pytest.mark.parametrize("name", OFF)
def test_a_mechanism_that_is_off_has_no_parameters_and_the_optimizer_table_follows(name):
    cfg = layers_without(ALL_ON, name)
    if name not in t.Layer._fields:
        cfg = replace(ALL_ON, **{name: -1 if name == "backout_from" else 0})
    with_it, without = ({name for name, _ in t.GPT(c).named_parameters()} for c in (ALL_ON, cfg))
    assert with_it - without == OFF[name] and without <= with_it
    t.Optimizer(t.GPT(cfg), t.optimizer_table(cfg), t.World())


def test_lambdas_are_every_learned_scalar_by_name():
    sizes = {"attn_lambdas": 6, "resid_lambdas": 4, "x0_lambdas": 4, "smear_lambda": 1, "skip_lambdas": 1,
             "backout_lambda": 1, "smear_mtp_lambda": 1, "bigram_lambdas": 4}  # fmt: skip
    model = make_model(ALL_ON)
    found = model.lambdas()
    assert {name: len(values) for name, values in found.items()} == sizes
    for name, values in found.items():
        assert_close(values, model.get_parameter(name).flatten().tolist(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_latents_have_the_activation_dtype_and_logits_are_float32_over_the_padded_vocabulary(dtype):
    model = t.GPT(ALL_ON, dtype)
    x = latents(model, *packed(9, 12))
    assert (x.shape, x.dtype) == ((21, 32), dtype)
    logits = t.cap(model.products(x))
    assert (logits.shape, logits.dtype) == ((21, 384), torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
