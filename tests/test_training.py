"""Tests of training: optimizer, ranks, schedule, data, validation, warm-up, checkpoint, clock, sampling."""

import base64
import hashlib
import json
import math
import os
import pickle
import types
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves

from small import (
    BOS, CPU, RESCALED, RESCALED_FLAGS, SMALL, checkpoint_of, count_as_prefixes, free_port, random_tokens,
    run_ranks, train_gpt,
    write_corpus, write_shard, write_split,
)  # fmt: skip
from train_gpt import (
    POLAR_EXPRESS, TRACKS, DocumentStream, GPT, Loader, Optimizer, Position, Row, Shards, Stage,
    UserError, Validation, World, adam_update, build_rotary, check_supply, gradient, load_tokenizer, nesterov,
    normuon_update, optimizer_table, pack, plan_step, polar_express, sample_text,
)  # fmt: skip


OK, SHARE = torch.tensor(True), torch.zeros(2)


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


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


# ------------------------------------------------------------------ optimizer


def polar_scalar(s):
    """What Polar Express makes of a singular value s of a matrix with Frobenius norm 1."""
    s = s / 1.02
    for a, b, c in POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    return s


def matrix_with_singular_values(shape, smallest, generator):
    """(.., R, C) float64 with Frobenius norm 1; its singular values lie between `smallest` and 1."""
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = torch.logspace(0, math.log10(smallest), s.size(-1), dtype=torch.float64)
    matrix = u * s @ vh
    return matrix / matrix.norm(dim=(-2, -1), keepdim=True)


def direction(g, dtype=torch.float32):
    """What a first step without momentum orthogonalises."""
    x = nesterov(g, torch.zeros_like(g), torch.tensor(0.0), OK, dtype)
    assert x.float().norm(dim=(-2, -1)).max() < 1
    return x


SHAPES = {
    "wide": (1, 12, 40), "tall": (1, 40, 12), "square": (1, 24, 24), "batch": (5, 16, 32), "row": (2, 1, 9),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype, lowest, highest, leak", [(torch.float32, 0.84, 1.15, 1e-4),
                                                          (torch.bfloat16, 0.75, 1.25, 0.06)])  # fmt: skip
def test_polar_express_has_the_singular_vectors_of_the_polar_factor_and_values_near_one(
    shape, dtype, lowest, highest, leak
):
    smallest = 2e-3 if dtype == torch.float32 else 2e-2
    g = matrix_with_singular_values(shape, smallest, torch.Generator().manual_seed(0))
    x = polar_express(direction(1000 * g.float(), dtype))
    assert x.shape == shape and x.dtype == dtype
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    inside = u.mT @ x.double() @ vh.mT
    values = inside.diagonal(dim1=-2, dim2=-1)
    assert values.min() >= lowest and values.max() <= highest
    assert (inside - torch.diag_embed(values)).abs().max() <= leak
    assert (u @ inside @ vh - x.double()).abs().max() <= leak
    polar = u @ vh
    cosine = (x.double() * polar).sum((-2, -1)) / (x.double().norm(dim=(-2, -1)) * polar.norm(dim=(-2, -1)))
    assert cosine.min() >= 0.99


def test_polar_express_of_zero_is_zero_and_of_a_stack_is_that_of_each_matrix():
    g = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(0))
    g[1] = 0
    x = polar_express(direction(g))
    assert not x[1].any()
    for i in (0, 2):
        alone = polar_express(direction(g[i : i + 1]))[0]
        torch.testing.assert_close(x[i], alone, rtol=1e-5, atol=1e-6)


def normuon_by_hand(p, g, momentum, second, lr, decay, mu, beta2):
    """One step on one float64 matrix, orthogonalised through its SVD, rows and elements one at a time."""
    momentum = mu * momentum + (1 - mu) * g
    ahead = mu * momentum + (1 - mu) * g
    u, s, vh = torch.linalg.svd(ahead, full_matrices=False)
    x = u * polar_scalar(s / s.norm()) @ vh
    scaled, second = x.clone(), second.clone()
    for r in range(len(x)):
        second[r] = beta2 * second[r] + (1 - beta2) * (x[r] ** 2).sum() / x.size(1)
        scaled[r] = x[r] / second[r].sqrt()
    x = scaled * x.norm() / scaled.norm()
    new = p.clone()
    for r in range(p.size(0)):
        for c in range(p.size(1)):
            agrees = p[r, c] * x[r, c] >= 0
            new[r, c] -= lr * (x[r, c] + (decay * p[r, c] if agrees else 0))
    return new, momentum, second


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 16, 6), (2, 6, 16)])
def test_normuon_equals_a_plain_implementation_per_matrix(shape):
    N, R, C = shape
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(shape, generator=generator)
    momentum, second = torch.zeros(shape), torch.zeros(N, R, 1)
    lr = torch.linspace(0.01, 0.05, N).view(N, 1, 1)
    expected = [(p[i].double(), momentum[i].double(), second[i].double()) for i in range(N)]
    for step, mu in enumerate((0.85, 0.9, 0.95)):
        g = torch.randn(shape, generator=generator)
        normuon_update(p, g, momentum, second, lr, torch.tensor(0.3), torch.tensor(mu), OK, 0.9,
                       torch.float32)
        for i in range(N):
            rate = lr[i].double().item()
            expected[i] = normuon_by_hand(expected[i][0], g[i].double(), *expected[i][1:], rate, 0.3, mu, 0.9)
            for found, wanted in zip((p[i], momentum[i], second[i]), expected[i]):
                torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_grouped_rows_of_q_and_k_are_orthogonalised_by_themselves_and_v_and_o_whole():
    table = optimizer_table(replace(narrow("short"), heads=4, muon_heads=2))
    groups = {row.name: row.groups for row in table}
    assert groups["attn_bank"] == (2, 2, 1, 1) and {*groups.values()} == {(), (2, 2, 1, 1)}
    cfg = replace(SMALL, heads=4, muon_heads=2, muon_weight_decay=0.0)
    model, optimizer = small_optimizer(cfg)
    add_gradients(model, random_gradients(model, torch.Generator().manual_seed(9)))
    with torch.no_grad():
        model.attn_bank.grad[0, 0, :16] *= 1e-3  # a weak pair of heads moves as far as the others
    before, grads = model.attn_bank.detach().clone(), model.attn_bank.grad.clone()
    optimizer.step(0, lr_multiplier=1.0, momentum=0.9, share=SHARE)
    moved = (before - model.attn_bank.detach()).double() / (cfg.attn_lr_ratio * cfg.muon_lr)
    for a in range(len(moved)):
        for m, count in enumerate((2, 2, 1, 1)):
            expected = []
            for part in grads[a, m].double().chunk(count):
                u, s, vh = torch.linalg.svd(part, full_matrices=False)
                expected.append(u * polar_scalar(s / s.norm()) @ vh)
            x = torch.cat(expected)
            scaled = x / x.norm(dim=1, keepdim=True)
            wanted = scaled * x.norm() / scaled.norm()
            torch.testing.assert_close(moved[a, m], wanted, rtol=1e-3, atol=1e-4)


def test_normuon_decays_only_where_decay_does_not_oppose_the_update():
    generator = torch.Generator().manual_seed(2)
    start, g = (torch.randn(2, 10, 10, generator=generator) for _ in range(2))
    lr, mu, decay = torch.full((2, 1, 1), 0.01), torch.tensor(0.9), 0.5

    def updated(decay):
        p, momentum, second = start.clone(), torch.zeros(2, 10, 10), torch.zeros(2, 10, 1)
        normuon_update(p, g, momentum, second, lr, torch.tensor(decay), mu, OK, 0.95, torch.float32)
        return p

    plain, decayed = updated(0.0), updated(decay)
    towards_zero = (start - plain) * start > 0
    assert 50 < towards_zero.sum() < 150
    assert torch.equal(decayed[~towards_zero], plain[~towards_zero])
    expected = (0.01 * decay * start)[towards_zero]
    torch.testing.assert_close((plain - decayed)[towards_zero], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("betas", [(0.65, 0.95), (0.9, 0.99)])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_adam_equals_torch_adamw_over_20_steps(betas, scale):
    generator = torch.Generator().manual_seed(3)
    p = torch.randn(50, generator=generator)
    oracle = torch.nn.Parameter(p.clone())
    optimizer = torch.optim.AdamW([oracle], lr=0.01, betas=betas, eps=1e-15, weight_decay=0)
    first, second = torch.zeros(50), torch.zeros(50)
    for t in range(1, 21):
        g = scale * torch.randn(50, generator=generator)
        adam_update(p, g, first, second, 0.01, 1 - betas[0] ** t, 1 - betas[1] ** t, OK, *betas)
        oracle.grad = g
        optimizer.step()
        torch.testing.assert_close(p, oracle.detach(), rtol=1e-6, atol=1e-6)


def test_adam_decays_tables_and_head_cautiously_by_their_learning_rate_squared():
    cfg = replace(SMALL, mtp_heads=1, adam_every=1, adam_weight_decay=0.005)
    moved = {}
    for name, changed in (("plain", replace(cfg, adam_weight_decay=0.0)), ("decayed", cfg)):
        model, optimizer = small_optimizer(changed)
        before = weights_of(model)
        add_gradients(model, random_gradients(model, torch.Generator().manual_seed(8)))
        optimizer.step(0, lr_multiplier=0.5, momentum=0.9, share=SHARE)
        moved[name] = {n: p.double() - before[n].double() for n, p in weights_of(model).items()}
    decays = {"embed": 1, "value_embeds": 5, "head": 150, "mtp_heads": 150}
    for row in optimizer_table(cfg):
        decayed, plain = moved["decayed"][row.name], moved["plain"][row.name]
        rate = (0.5 * row.lr[0]) ** 2 * 0.005 * decays.get(row.name, 0) * (row.algorithm == "adam")
        p = before[row.name].double()
        torch.testing.assert_close(decayed, plain - rate * p * (plain * p < 0), rtol=1e-5, atol=1e-7)
        assert (rate > 0) == (not torch.equal(decayed, plain)), row.name


def small_optimizer(cfg=SMALL, world=World()):
    model = randomise(GPT(cfg))
    return model, Optimizer(model, optimizer_table(cfg), world)


def random_gradients(model, generator):
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def add_gradients(model, grads):
    """As backward() does."""
    for name, p in model.named_parameters():
        gradient(p).add_(grads[name])


@pytest.mark.parametrize("every", [1, 2, 3])
def test_adam_rows_move_every_nth_step_by_the_sum_of_the_gradients_and_banks_move_at_each(every):
    model, optimizer = small_optimizer(replace(SMALL, adam_every=every))
    generator, waiting, moments, updates = torch.Generator().manual_seed(4), [], {}, 0
    rows = {row.name: row for row in optimizer_table(replace(SMALL, adam_every=every))}
    for step in range(6):
        grads, before = random_gradients(model, generator), weights_of(model)
        add_gradients(model, grads)
        waiting.append(grads)
        optimizer.step(step, lr_multiplier=0.5, momentum=0.9, share=SHARE)
        due = (step + 1) % every == 0
        updates += due
        for name, p in model.named_parameters():
            row, expected = rows[name], before[name].clone()
            if row.algorithm == "normuon":
                assert (p != expected).float().mean() > 0.99 and not p.grad.any()
                continue
            assert p.grad.any() != due
            if due:
                total = sum(g[name] for g in waiting)
                first, second = moments.setdefault(name, (torch.zeros_like(p), torch.zeros_like(p)))
                bias = [1 - beta**updates for beta in row.betas]
                adam_update(expected, total, first, second, 0.5 * row.lr[0], *bias, OK, *row.betas)
                torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(p, expected)
        waiting = [] if due else waiting


@pytest.mark.parametrize("step", [0, 1])
def test_gradients_stay_at_their_addresses(step):
    """Graphs write there. After step 0, Adam's rows keep what they have; after step 1 nothing waits."""
    cfg = replace(SMALL, mtp_heads=1)
    model, optimizer = small_optimizer(cfg)
    tokens = random_tokens(np.random.default_rng(0), 300).astype(np.uint16)
    warm_up = partial(train_gpt.warm_up, model, optimizer, Validation(cfg, tokens), CPU, World())
    warm_up()
    grads = [p.grad for p in model.parameters()]
    addresses = [grad.data_ptr() for grad in grads]
    warm_up()
    add_gradients(model, random_gradients(model, torch.Generator().manual_seed(6)))
    optimizer.step(step, lr_multiplier=0.5, momentum=0.9, share=SHARE)
    state = optimizer.state_dict(step + 1)
    left = [grad.clone() for grad in grads]
    add_gradients(model, random_gradients(model, torch.Generator().manual_seed(7)))
    optimizer.load_state_dict(state, step + 1)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads))
    assert [grad.data_ptr() for grad in grads] == addresses
    assert all(map(torch.equal, grads, left))
    assert any(grad.any() for grad in grads) == (step == 0)


def without(table, name):
    return [row for row in table if row.name != name]


@pytest.mark.parametrize("change, words", [
    (lambda table: without(table, "head"), "missing {'head'}"),
    (lambda table: [*table, table[0]], f"twice {{'{optimizer_table(SMALL)[0].name}'}}"),
    (lambda table: [*table, Row("heads", "adam", "sharded", (0.1,))], "not in the model {'heads'}"),
], ids=["missing", "doubled", "unknown"])  # fmt: skip
def test_table_that_does_not_cover_each_parameter_once_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Optimizer(GPT(SMALL), change(optimizer_table(SMALL)), World())


def narrow(track):
    return replace(TRACKS[track], width=32, heads=2, vocab_size=BOS + 1)


FLAGS = {
    "defaults": {},
    "mtp_heads": {"mtp_heads": 2},
    "bigrams_tied": {"bigram_ratio": 5.0, "untie_at": 0.5},
    "no_value_embeds": {"value_embeds": False},
    "no_smear_no_skip": {"smear": False, "skip": False},
    "no_gates_no_x0": {"attn_gate": False, "x0_mix": False},
    "untied_values": {"untied_values": True},
    "bare": {"value_embeds": False, "smear": False, "skip": False, "attn_gate": False, "x0_mix": False,
             "smear_mtp": False, "backout_from": -1},
    "everything": {"bigram_ratio": 5.0, "untie_at": 0.5, "mtp_heads": 2, "muon_heads": 1,
                   "untied_values": True, "draw_output": True, "late_attention": True,
                   **RESCALED, "prefix_weight": 0.25, "smooth_scalars": True, "adam_weight_decay": 0.005},
    "bare_and_mtp_heads": {"value_embeds": False, "smear_mtp": False, "backout_from": -1, "mtp_heads": 2},
}  # fmt: skip


@pytest.mark.parametrize("track", TRACKS)
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_table_has_one_row_for_each_parameter_of_every_track(track, flags):
    cfg = replace(narrow(track), **flags)
    with torch.device("meta"):
        names = [name for name, _ in GPT(cfg).named_parameters()]
    assert sorted(row.name for row in optimizer_table(cfg)) == sorted(names)


@pytest.mark.parametrize("track, embed", [("short", 0.6), ("sprint", 0.008)])  # where it is tied to the head
def test_effective_learning_rates_of_the_races(track, embed):
    table = optimizer_table(replace(narrow(track), mtp_heads=1, bigram_ratio=5.0))
    rates = {row.name: [round(lr, 9) for lr in row.lr] for row in table}
    assert rates == {
        "embed": [embed], "value_embeds": [0.6], "head": [0.008], "mtp_heads": [0.008],
        "bigram_embed": [0.6], "bigram_lambdas": [0.04], "attn_gate": [0.008], "smear_gate": [0.008],
        "attn_lambdas": [0.04], "resid_lambdas": [0.04], "x0_lambdas": [0.04],
        "smear_lambda": [0.04], "skip_lambdas": [0.04], "backout_lambda": [0.04], "smear_mtp_lambda": [0.04],
        "attn_bank": [0.046, 0.046, 0.046, 0.046], "mlp_bank": [0.046, 0.092],
    }  # fmt: skip


def test_smooth_scalars_raise_the_betas_of_every_scalar_and_gate_but_the_factors_on_x0_and_bigrams():
    cfg = replace(narrow("short"), **FLAGS["everything"])
    off, on = (optimizer_table(replace(cfg, smooth_scalars=smooth)) for smooth in (False, True))
    for before, row in zip(off, on, strict=True):
        smoothed = row.comms == "replicated" and row.name not in ("x0_lambdas", "bigram_lambdas")
        assert row == before._replace(betas=(0.9, 0.99) if smoothed else before.betas)
        always = (0.75 if row.name == "bigram_embed" else 0.65), 0.95
        assert row.algorithm == "normuon" or before.betas == always


def test_matrices_of_the_short_track_move_at_the_rates_of_the_table():
    cfg = replace(narrow("short"), muon_weight_decay=0.0)
    model, optimizer = small_optimizer(cfg)
    add_gradients(model, random_gradients(model, torch.Generator().manual_seed(5)))
    before = weights_of(model)
    optimizer.step(0, lr_multiplier=1.52, momentum=0.85, share=SHARE)
    for name, rates in (("attn_bank", [0.046] * 4), ("mlp_bank", [0.046, 0.092])):
        moved = (getattr(model, name).detach() - before[name]).norm(dim=(-2, -1))
        rms_singular_value = moved / math.sqrt(cfg.width) / 1.52 / torch.tensor(rates)
        assert rms_singular_value.min() > 0.7 and rms_singular_value.max() < 1.15


def test_decay_follows_the_learning_rate_and_the_multiplier_twice():
    model, optimizer = small_optimizer(replace(SMALL, muon_lr=0.1, attn_lr_ratio=1.5, muon_weight_decay=0.2))
    add_gradients(model, {name: torch.zeros_like(p) for name, p in model.named_parameters()})
    before = weights_of(model)
    optimizer.step(0, lr_multiplier=0.5, momentum=0.9, share=SHARE)  # no gradient, no update: only the decay is left
    for name, lr in (("attn_bank", torch.tensor([0.15] * 4)), ("mlp_bank", torch.tensor([0.2, 0.4]))):
        expected = before[name] * (1 - (0.5 * lr * 0.5 * 0.2)[:, None, None])
        torch.testing.assert_close(getattr(model, name).detach(), expected, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------- ranks


def train_as_rank(rank, jobs):
    """Process `rank` runs the jobs that it has a part in, in turn: (world size, port, logs, arguments)."""
    torch.set_num_threads(1)
    os.cpu_count = lambda: 1  # by which the script shares out threads
    train_gpt.TRACKS["tiny"] = RANKS
    train_gpt.build_model = lambda cfg, hardware: randomise(GPT(cfg))
    for size, port, logs, argv in jobs:
        if rank < size:
            train_gpt.finish = lambda cfg, model, *rest: save_file(weights_of(model), logs / f"rank{rank}")
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
            train_gpt.run([f"--log_folder={logs}", *(arg() if callable(arg) else arg for arg in argv)])


# 4 steps, of which Adam acts at the third: the other checkpoints hold gradients that wait.
# 6 matrices in mlp_bank: at 4 ranks the shares are 2, 2, 2 and 0.
RANKS = replace(SMALL, scheduled_steps=4, adam_every=3, mtp_heads=1, save_every=1, keep=0)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """{ranks: folder with logs and each rank's weights}; "resumed": two ranks go on from one's checkpoint."""
    root = tmp_path_factory.mktemp("ranks")
    folders = {name: root / str(name) for name in (1, 4, 2, "resumed")}
    for folder in folders.values():
        folder.mkdir()
    data = [f"--data={write_corpus(root / 'data')}"]
    jobs = [(size, free_port(), folders[size], data) for size in (4, 1, 2)]
    jobs.append((2, free_port(), folders["resumed"], [partial(resume_flag, folders[1], 2)]))
    run_ranks(train_as_rank, jobs, seconds=500)
    return folders


def resume_flag(logs, step):
    return f"--resume={checkpoint_of(logs, step)}"


def metrics_of(logs, key):
    (path,) = logs.glob("*/metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["step"], row[key]) for row in rows if key in row]


@pytest.mark.parametrize("size", [2, 4, "resumed"])
def test_ranks_end_with_the_weights_of_one_process(ranks, size):
    expected = load_file(ranks[1] / "rank0")
    for rank in range(size if size != "resumed" else 2):
        found = load_file(ranks[size] / f"rank{rank}")
        errors = {name: relative_error(found[name], expected[name]) for name in expected}
        assert found.keys() == expected.keys() and max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_hold_the_same_weights_bit_for_bit(ranks, size):
    for rank in range(1, size):
        assert_equal(load_file(ranks[size] / f"rank{rank}"), load_file(ranks[size] / "rank0"))


@pytest.mark.parametrize("size, step", [(2, 1), (2, 3), (4, 3), (4, 4), ("resumed", 4)])
def test_sharded_state_is_gathered_to_the_unsharded_state(ranks, size, step):
    expected, found = (load_file(checkpoint_of(ranks[s], step)) for s in (1, size))
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in expected.items()}
    assert ("optimizer.embed.grad" in found) == (step != 3)
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < 1e-4, errors  # gradients of single numbers are sums that cancel


@pytest.mark.parametrize("key", ["train_loss", "val_loss", "val_bpb"])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_log_the_losses_of_one_process(ranks, size, key):
    expected, found = metrics_of(ranks[1], key), metrics_of(ranks[size], key)
    assert len(expected) > 1 and [step for step, _ in found] == [step for step, _ in expected]
    assert [v for _, v in found] == pytest.approx([v for _, v in expected], abs=2e-5)


@pytest.mark.parametrize("size, units, shares", [
    (1, 6, [6]), (2, 6, [3, 3]), (4, 6, [2, 2, 2, 0]), (4, 7, [2, 2, 2, 1]), (8, 3, [1, 1, 1, 0, 0, 0, 0, 0]),
])  # fmt: skip
def test_shares_of_a_sharded_row_cover_its_units_once(size, units, shares):
    model, bank = torch.nn.Module(), torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.zeros(units, 2))
    bank.weight = torch.nn.Parameter(torch.zeros(units, 1, 2, 2))
    for module in (model, bank):
        module.dtype, module.kernels, module.embed = torch.float32, "reference", torch.zeros(1)
    row = Row("weight", "adam", "sharded", (0.1,))
    states = [Optimizer(model, [row], World(r, size)).states[0] for r in range(size)]
    assert [s.units for s in states] == [2 * units] * size
    assert np.concatenate([np.arange(s.lo, s.hi) for s in states]).tolist() == list(range(2 * units))
    states = [Optimizer(bank, [row._replace(algorithm="normuon")], World(r, size)).states[0]
              for r in range(size)]  # fmt: skip
    assert [s.hi - s.lo for s in states] == [len(s.buffers["momentum"]) for s in states] == shares


# ------------------------------------------------------------------- schedule


def first_steps(cfg, column):
    """Steps at which a column of the plan changes."""
    values = [column(plan_step(cfg, step)) for step in range(cfg.total_steps)]
    return [step for step in range(1, cfg.total_steps) if values[step] != values[step - 1]]


@pytest.mark.parametrize("scheduled", [3, 10, 100, 200, 301, 2070, 2071])
def test_batch_windows_and_learning_rate_change_at_the_same_step(scheduled):
    cfg = replace(TRACKS["short"], scheduled_steps=scheduled, cooldown=0.0, multi_target=True)
    thirds = [math.ceil(Fraction(k, 3) * scheduled) for k in (1, 2)]
    assert first_steps(cfg, lambda plan: plan.stage.batch_tokens) == thirds
    assert first_steps(cfg, lambda plan: plan.windows) == [*thirds, scheduled]
    assert first_steps(cfg, lambda plan: plan.lr) == [*thirds, scheduled]
    assert first_steps(cfg, lambda plan: len(plan.weights)) == thirds


@pytest.mark.parametrize("scheduled", [12, 100, 108, 200, 204, 240, 4700, 4800])
def test_stages_of_the_medium_track_start_at_twelfths(scheduled):
    cfg = replace(TRACKS["medium"], scheduled_steps=scheduled)
    twelfths = [math.ceil(Fraction(k * scheduled, 12)) for k in range(1, 9)]
    assert first_steps(cfg, lambda plan: plan.stage_index) == twelfths


# track, step, batch, (short, long) window, learning-rate multiplier, momentum, weights of the targets
PLAN = [
    ("sprint", 0, 32_768, (128, 384), 1.0, 0.85, (1, 0.5, 0.25)),
    ("sprint", 153, 32_768, (128, 384), 1.0, 0.85 + 0.1 * 153 / 1200, (1, 0.5, 0.25 / 154)),
    ("sprint", 154, 65_536, (384, 896), 1.52, 0.85 + 0.1 * 154 / 1200, (1, 0.5)),
    ("sprint", 306, 65_536, (384, 896), 0.15 + 1.37 * 154 / 253, 0.8755, (1, 0.5 / 153)),
    ("sprint", 307, 98_304, (640, 1408), 0.15 + 1.58 * 153 / 253, 0.85 + 0.1 * 307 / 1200, (1,)),
    ("sprint", 459, 98_304, (640, 1408), 0.15 + 1.58 / 253, 0.85 + 0.1 * 459 / 1200, (1,)),
    ("sprint", 460, 98_304, (768, 1664), 0.15, 0.85 + 0.1 * 460 / 1200, (1,)),
    ("sprint", 479, 98_304, (768, 1664), 0.15, 0.852, (1,)),
    ("short", 0, 131_072, (128, 384), 1.0, 0.85, (1, 0.5, 0.25)),
    ("short", 150, 131_072, (128, 384), 1.0, 0.9, (1, 0.5, 0.25 * (1 - 150 / 690))),
    ("short", 689, 131_072, (128, 384), 1.0, 0.95, (1, 0.5, 0.25 / 690)),
    ("short", 690, 262_144, (384, 896), 1.52, 0.95, (1, 0.5)),
    ("short", 931, 262_144, (384, 896), 1.52, 0.95, (1, 0.5 * (1 - 241 / 690))),
    ("short", 1380, 393_216, (640, 1408), 0.1 + 1.63 * 690 / 1138.5, 0.95, (1,)),
    ("short", 2060, 393_216, (640, 1408), 0.1 + 1.63 * 10 / 1138.5, 0.95, (1,)),
    ("short", 2070, 393_216, (768, 1664), 0.1, 0.93, (1,)),
    ("short", 2109, 393_216, (768, 1664), 0.1, 0.852, (1,)),
]


@pytest.mark.parametrize("track, step, batch, windows, lr, momentum, weights", PLAN, ids=lambda v: str(v)[:9])
def test_plan_of_a_step(track, step, batch, windows, lr, momentum, weights):
    plan = plan_step(replace(TRACKS[track], multi_target=True, prefix_weight=0.0), step)
    assert (plan.stage.batch_tokens, plan.windows) == (batch, {"short": windows[0], "long": windows[1]})
    assert plan.stage is TRACKS[track].stages[plan.stage_index]
    assert (plan.lr, plan.momentum) == (pytest.approx(lr), pytest.approx(momentum))
    assert plan.weights == pytest.approx(weights)


def test_only_the_sprints_first_stage_has_shorter_documents():
    limits = {track: [stage.max_doc for stage in TRACKS[track].stages] for track in ("sprint", "short")}
    assert limits == {"sprint": [896, 2048, 2048, 2048], "short": [2048] * 4}


def test_plan_is_a_pure_function():
    cfg = TRACKS["sprint"]
    forwards = [plan_step(cfg, step) for step in range(cfg.total_steps)]
    backwards = [plan_step(replace(cfg), step) for step in reversed(range(cfg.total_steps))]
    assert forwards == backwards[::-1]


def test_without_multi_target_only_the_next_token_counts():
    cfg = replace(TRACKS["short"], multi_target=False)
    assert {plan_step(cfg, step).weights for step in range(cfg.total_steps)} == {(1.0,)}


def test_without_cooldown_and_extension_the_last_stage_runs_to_the_end():
    cfg = replace(TRACKS["tiny"], cooldown=0.0, scheduled_steps=7)
    assert [plan_step(cfg, step).stage_index for step in range(8)] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert plan_step(cfg, 6).lr == cfg.stages[-1].lr


# ----------------------------------------------------------------------- data


def data_config(**changes):
    """20 steps of one micro-batch of 40 tokens, then of two of 60; changes of rest, epochs and the like."""
    stages = (Stage(0, 80, 24, 8, 8, 1.0), Stage(0.5, 120, 40, 8, 8, 1.0))
    return replace(SMALL, **{"stages": stages, "micro_batches": 2, "scheduled_steps": 20, **changes})


def shards_of(folder, cfg, parts):
    return Shards(write_split(folder, "train", parts), cfg)


def reference_micro_batches(tokens, cfg):
    """[(tokens, starts of the pieces)] of the schedule, from one array of tokens, until it is used up."""
    starts = np.flatnonzero(tokens == BOS)
    documents = [d.tolist() for d in np.split(tokens[starts[0] :], starts[1:] - starts[0])] * cfg.epochs
    out = []
    for step in range(cfg.total_steps):
        stage = plan_step(cfg, step).stage
        for _ in range(cfg.micro_batches):
            batch, begins = [], []
            room = stage.batch_tokens // cfg.micro_batches + 1
            while len(batch) < room:
                if not documents:
                    return out
                limit = min(stage.max_doc, room - len(batch))
                begins.append(len(batch))
                batch += documents[0][:limit]
                rest = documents[0][limit:] if cfg.document_rest == "keep" else []
                documents[:1] = [rest] if rest else []
            out.append((batch, [b for b in begins if b < room - 1]))
    return out


def plain(batch):
    """(tokens, starts of the pieces) of a micro-batch."""
    *starts, end = batch.docs.cu_seqlens.tolist()
    assert end == len(batch.tokens) - 1
    return batch.tokens.tolist(), starts


def micro_batches(cfg, shards, world=World()):
    """[(tokens, starts of the pieces)] that a rank gets, and whether the data lasted for the schedule."""
    out, complete = [], True
    try:
        for own, _ in Loader(cfg, world, shards, torch.device("cpu")):
            out += [plain(batch) for batch in own]
    except UserError as error:
        assert "training data used up" in str(error)
        complete = False
    return out, complete


@pytest.mark.parametrize("rest", ["skip", "keep"])
def test_pack_gives_exactly_n_plus_one_tokens_of_documents_cut_at_the_maximum(tmp_path, rest):
    cfg = data_config(document_rest=rest)
    shards = shards_of(tmp_path, cfg, [random_tokens(np.random.default_rng(0), 6000)])
    stream = DocumentStream(shards, cfg)
    for _ in range(25):
        tokens, starts = pack(stream, 64, 24)
        assert len(tokens) == 65 and tokens.dtype == np.uint16
        assert starts[0] == 0 and starts[-1] < 64
        assert np.diff([*starts, 64]).max() <= 24
        bos = np.flatnonzero(tokens[:64] == BOS)
        assert set(bos) <= set(starts)
        if rest == "skip":
            assert bos.tolist() == starts.tolist()


def next_piece(stream, limit):
    return stream.shards.read(*stream.advance(limit)).tolist()


def test_a_document_cut_by_the_maximum_is_skipped_or_kept(tmp_path):
    tokens = np.array([BOS, 1, 2, 3, 4, 5, 6, BOS, 7, 8, 9, BOS])
    first = {}
    for rest in ("skip", "keep"):
        cfg = data_config(document_rest=rest)
        stream = DocumentStream(shards_of(tmp_path / rest, cfg, [tokens]), cfg)
        first[rest] = [next_piece(stream, 3) for _ in range(3)]
    assert first == {"skip": [[BOS, 1, 2], [BOS, 7, 8], [BOS]], "keep": [[BOS, 1, 2], [3, 4, 5], [6]]}


def test_a_piece_that_begins_with_the_last_target_starts_no_document(tmp_path):
    cfg = data_config()
    stream = DocumentStream(shards_of(tmp_path, cfg, [np.array([BOS, 1, 2, 3, BOS, 1, 2, 3])]), cfg)
    tokens, starts = pack(stream, 4, 8)
    assert (tokens.tolist(), starts.tolist()) == ([BOS, 1, 2, 3, BOS], [0])


def cuts_within_documents(tokens, parts, rng):
    inside = np.flatnonzero(tokens != BOS)
    return sorted(rng.choice(inside, parts - 1, replace=False))


def cuts_at_documents(tokens, parts, rng):
    return sorted(rng.choice(np.flatnonzero(tokens == BOS)[1:], parts - 1, replace=False))


def cuts_after_bos(tokens, parts, rng):
    return [cut + 1 for cut in cuts_at_documents(tokens, parts, rng)]


def split(tokens, cuts):
    """Shards of `tokens`, each of which has a document start, or None."""
    parts = np.split(tokens, cuts)
    return parts if all((part == BOS).any() for part in parts) else None


@pytest.mark.parametrize("rest", ["skip", "keep"])
@pytest.mark.parametrize("parts", [2, 3, 6])
@pytest.mark.parametrize("cuts", [cuts_within_documents, cuts_at_documents, cuts_after_bos])
def test_documents_that_run_over_shard_ends_are_joined(tmp_path, cuts, parts, rest):
    rng, tried = np.random.default_rng(parts), 0
    for attempt in range(12):
        tokens = random_tokens(rng, 2500)
        shards = split(tokens, cuts(tokens, parts, rng))
        if shards is None:
            continue
        cfg, tried = data_config(document_rest=rest, epochs=2), tried + 1
        folder = tmp_path / str(attempt)
        folder.mkdir()
        found = micro_batches(cfg, shards_of(folder / "many", cfg, shards))
        assert found == micro_batches(cfg, shards_of(folder / "one", cfg, [tokens]))
        assert found[0] == reference_micro_batches(tokens, cfg)
    assert tried >= 3


def test_tokens_before_the_first_document_start_are_never_read(tmp_path):
    tokens = random_tokens(np.random.default_rng(0), 1500)
    cfg = data_config(epochs=3, document_rest="keep")
    found = micro_batches(cfg, shards_of(tmp_path / "dirty", cfg, [np.append([1, 2, 3], tokens)]))
    assert found == micro_batches(cfg, shards_of(tmp_path / "clean", cfg, [tokens]))
    assert sum(len(batch) for batch, _ in found[0]) > len(tokens)  # into the second epoch


def test_keep_gives_every_token_once_and_in_order(tmp_path):
    cfg = data_config(document_rest="keep", epochs=2)
    tokens = random_tokens(np.random.default_rng(1), 900)
    stream, read = DocumentStream(shards_of(tmp_path, cfg, np.split(tokens, [301, 602])), cfg), []
    with pytest.raises(UserError, match="used up after 2 epochs"):
        while True:
            read.extend(next_piece(stream, int(7 + len(read) % 13)))
    assert read == [*tokens, *tokens]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("rest", ["skip", "keep"])
def test_ranks_are_dealt_the_micro_batches_of_one_process(tmp_path, size, rest):
    cfg = data_config(document_rest=rest, micro_batches=4, scheduled_steps=12)
    shards = shards_of(tmp_path, cfg, np.split(random_tokens(np.random.default_rng(2), 8000), [2501, 5003]))
    whole, complete = micro_batches(cfg, shards)
    assert complete and len(whole) == 48
    for rank in range(size):
        assert micro_batches(cfg, shards, World(rank, size)) == (whole[rank::size], True)


def test_more_ranks_than_micro_batches_share_the_tokens_of_the_step(tmp_path):
    cfg = data_config(micro_batches=2, scheduled_steps=4)
    shards = shards_of(tmp_path, cfg, [random_tokens(np.random.default_rng(2), 4000)])
    whole, _ = micro_batches(replace(cfg, micro_batches=8), shards)
    dealt = [micro_batches(cfg, shards, World(rank, 8))[0] for rank in range(8)]
    assert [batch for step in zip(*dealt) for batch in step] == whole
    assert len(whole[0][0]) == 80 // 8 + 1


@pytest.mark.parametrize("rest", ["skip", "keep"])
def test_restart_from_a_saved_position_gives_the_same_continuation_at_every_step(tmp_path, rest):
    cfg = data_config(document_rest=rest, epochs=3)
    shards = shards_of(tmp_path, cfg, np.split(random_tokens(np.random.default_rng(3), 1500), [401, 777]))
    device = torch.device("cpu")
    whole = [(batches, position) for batches, position in Loader(cfg, World(), shards, device)]
    assert len(whole) == 20 and whole[-1][1].epoch >= 1
    for step in range(1, 20):
        position = Position(*json.loads(json.dumps(whole[step - 1][1])))
        rest_of_run = list(Loader(cfg, World(), shards, device, step, position))
        assert [p for _, p in rest_of_run] == [p for _, p in whole[step:]]
        for (found, _), (expected, _) in zip(rest_of_run, whole[step:]):
            assert list(map(plain, found)) == list(map(plain, expected))


def test_each_epoch_reads_the_same_pieces_again(tmp_path):
    cfg = data_config(epochs=3)
    shards = shards_of(tmp_path, cfg, np.split(random_tokens(np.random.default_rng(4), 500), [200]))
    stream, epochs = DocumentStream(shards, cfg), {}
    with pytest.raises(UserError, match="after 3 epochs"):
        while True:
            piece = next_piece(stream, 24)
            epochs.setdefault(stream.position.epoch, []).append(piece)
    assert list(epochs) == [0, 1, 2] and epochs[0] == epochs[1] == epochs[2]


@pytest.mark.parametrize("rest", ["skip", "keep"])
@pytest.mark.parametrize("seed", range(30))
def test_check_supply_agrees_exactly_with_running_the_loader(tmp_path, seed, rest):
    rng = np.random.default_rng(seed)
    tokens = random_tokens(rng, 1200)
    parts = split(tokens, cuts_within_documents(tokens, 3, rng)) or [tokens]
    epochs, micro = int(rng.integers(1, 4)), int(rng.choice([1, 2, 4]))
    cfg = data_config(document_rest=rest, epochs=epochs, micro_batches=micro)
    shards = shards_of(tmp_path, cfg, parts)
    endless = replace(cfg, scheduled_steps=200, stages=(cfg.stages[0], cfg.stages[1]._replace(start=0.05)))
    done = len(micro_batches(endless, shards)[0]) // cfg.micro_batches
    assert 4 < done < 200
    with pytest.raises(UserError, match=f"last for {done} of 200 steps"):
        check_supply(endless, World(), shards)
    for steps in (done, done + 1):  # the last schedule that fits, and the first that doesn't
        exact = replace(endless, scheduled_steps=steps)
        complete = micro_batches(exact, shards)[1]
        if complete:
            check_supply(exact, World(), shards)
        else:
            with pytest.raises(UserError, match=f"of {steps} steps"):
                check_supply(exact, World(), shards)


def test_error_in_the_loaders_thread_reaches_the_consumer(tmp_path):
    cfg = data_config()
    tokens = random_tokens(np.random.default_rng(5), 900)
    first, second = write_split(tmp_path, "train", [tokens, tokens])
    second.write_bytes(b"")
    loader = Loader(cfg, World(), Shards([first, second], cfg), torch.device("cpu"))
    loader.queue.get = partial(loader.queue.get, timeout=100)  # rather than to wait for ever
    got = 0
    with pytest.raises(UserError, match=second.name):
        for _ in loader:
            got += 1
    assert got > 2


GOOD = np.array([BOS, 1, 2, BOS, 3], "<u2")
CORRUPTIONS = {
    "empty": lambda path: path.write_bytes(b""),
    "short_header": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "wrong_magic": lambda path: write_shard(path, GOOD, magic=20240521),
    "wrong_version": lambda path: write_shard(path, GOOD, version=2),
    "one_token_too_few": lambda path: write_shard(path, GOOD[:-1], count=len(GOOD)),
    "one_token_too_many": lambda path: write_shard(path, [*GOOD, 1], count=len(GOOD)),
    "half_a_token": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "no_tokens": lambda path: write_shard(path, []),
    "negative_count": lambda path: write_shard(path, GOOD, count=-5),
    "token_out_of_vocabulary": lambda path: write_shard(path, [*GOOD, BOS + 1]),
    "no_document_start": lambda path: write_shard(path, GOOD[1:3]),
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_corrupted_shard_is_refused_by_name(tmp_path, corrupt):
    path = write_shard(tmp_path / "x_train_000.bin", GOOD)
    assert Shards([path], SMALL)[0][0][:].tolist() == GOOD.tolist()
    corrupt(path)
    with pytest.raises(UserError) as caught:
        Shards([path], SMALL)[0]
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# ----------------------------------------------------------------- validation


def whole_and_final(cfg, count):
    return train_gpt.final_windows(cfg), build_rotary(cfg, len(cfg.stages) - 1, count, torch.device("cpu"))


def nats_by_hand(model, cfg, tokens):
    """Summed cross entropy of tokens[1:], chunk by chunk and one token at a time, in float64."""
    nats = 0.0
    for lo in range(0, len(tokens) - 1, cfg.val_chunk):
        chunk = torch.tensor(tokens[lo : lo + cfg.val_chunk + 1].astype(np.int64))
        bounds = sorted({0, *np.flatnonzero(chunk[:-1].numpy() == BOS), len(chunk) - 1})
        docs = train_gpt.Documents(torch.tensor(bounds, dtype=torch.int32), int(np.diff(bounds).max()))
        latents = model(chunk[:-1], docs, *whole_and_final(cfg, cfg.val_chunk))
        logp = F.log_softmax(model.logits(latents).double(), -1)
        nats -= sum(logp[t, chunk[t + 1]].item() for t in range(len(chunk) - 1))
    return nats


def text_tokens(texts, encode):
    return np.array([token for text in texts for token in (BOS, *encode(text))], np.uint16)


TEXTS = ["naïve café", "日本語のテキスト", "plain words and more of them " * 8, "", "🙂"] * 3


@pytest.mark.parametrize("val_chunk, loss_chunk", [(100, 48), (64, 64), (10_000, 7)])
def test_validation_loss_and_bits_per_byte_by_hand(val_chunk, loss_chunk):
    cfg = replace(SMALL, val_chunk=val_chunk, loss_chunk=loss_chunk)
    tokenizer = load_tokenizer("bytes")
    tokens = np.append(text_tokens(TEXTS, tokenizer.encode), BOS).astype(np.uint16)
    model = randomise(GPT(cfg))
    val = Validation(cfg, tokens, tokenizer)
    result = val.run(model, *whole_and_final(cfg, min(val_chunk, val.count)), World())
    nats = nats_by_hand(model, cfg, tokens)
    size = sum(len(text.encode()) for text in TEXTS)
    assert (val.count, val.bytes) == (len(tokens) - 1, size) and size < val.count
    assert result["val_loss"] == pytest.approx(nats / val.count, rel=1e-5)
    assert result["val_bpb"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


@pytest.fixture
def rank_file(tmp_path, monkeypatch):
    """256 byte tokens and merges, some of which end within a character; its BOS is 261."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    merges = ["é".encode(), "日".encode(), "日".encode()[:2], b"th", b" a"]
    path = tmp_path / "ranks.tiktoken"
    entries = [bytes([i]) for i in range(256)] + sorted(merges, key=len)
    path.write_text("".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(entries)))
    return path


def test_bytes_of_merged_tokens_are_those_of_the_raw_text(rank_file):
    tokenizer = load_tokenizer(str(rank_file))
    cfg = replace(SMALL, vocab_size=tokenizer.vocab_size)
    assert tokenizer.vocab_size == 262 and cfg.bos == 261
    tokens = np.array([t for text in TEXTS for t in (cfg.bos, *tokenizer.encode(text))], np.uint16)
    size = sum(len(text.encode()) for text in TEXTS)
    assert len(tokens) - len(TEXTS) < size
    assert Validation(cfg, tokens, tokenizer).bytes == size


def test_prefix_of_a_token_is_the_one_with_its_longest_proper_beginning(rank_file):
    tokenizer = load_tokenizer(str(rank_file))
    prefixes = {text: int(tokenizer.prefixes[i]) for i, text in enumerate(tokenizer.texts)}
    assert prefixes == {bytes([i]): -1 for i in range(256)} | {
        b"th": ord("t"), b" a": ord(" "), "é".encode(): 0xC3, "日".encode()[:2]: 0xE6,
        "日".encode(): tokenizer.texts.index("日".encode()[:2])}  # fmt: skip
    assert len(tokenizer.prefixes) == 262 and tokenizer.prefixes[261] == -1
    assert load_tokenizer("bytes").prefixes.tolist() == [-1] * 257
    cfg = replace(SMALL, tokenizer=str(rank_file), prefix_weight=0.25)
    assert train_gpt.token_prefixes(cfg, tokenizer).tolist() == tokenizer.prefixes.tolist()
    assert train_gpt.token_prefixes(replace(cfg, prefix_weight=0.0), None) is None


@pytest.mark.parametrize("tokenizer, words", [
    ("bytes", "no token of --tokenizer=bytes begins with another: give --prefix_weight=0"),
    (None, "can't be loaded, but --prefix_weight needs its texts: give a FILE.tiktoken, or --prefix_weight=0"),
])  # fmt: skip
def test_prefixes_that_no_tokenizer_gives_are_refused(tokenizer, words):
    cfg = replace(SMALL, prefix_weight=0.25)
    with pytest.raises(UserError, match=words):
        train_gpt.token_prefixes(cfg, tokenizer and load_tokenizer(tokenizer))


def test_rank_file_that_changed_is_read_again(rank_file, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    assert load_tokenizer(str(rank_file)).vocab_size == 262
    rank_file.write_text("".join(rank_file.read_text().splitlines(keepends=True)[:-1]))
    assert load_tokenizer(str(rank_file)).vocab_size == 261


def test_without_a_tokenizer_there_is_a_loss_but_no_bits_per_byte():
    tokens = random_tokens(np.random.default_rng(0), 200).astype(np.uint16)
    val = Validation(SMALL, tokens)
    result = val.run(randomise(GPT(SMALL)), *whole_and_final(SMALL, 100), World())
    assert result["val_bpb"] is None and math.isfinite(result["val_loss"])


def validation_loss(model):
    tokens = random_tokens(np.random.default_rng(0), 200).astype(np.uint16)
    return Validation(SMALL, tokens).run(model, *whole_and_final(SMALL, 100), World())["val_loss"]


def sampled(model):
    return sample_text(model, load_tokenizer("bytes"), "ab", 8)


def trained(model):
    """The loss of a step and the weights after it."""
    tokens = torch.from_numpy(random_tokens(np.random.default_rng(0), 65)[:65])
    batch = train_gpt.MicroBatch(tokens, train_gpt.to_documents(np.flatnonzero(tokens[:-1] == BOS), 64))
    rotary, optimizer = whole_and_final(SMALL, 64)[1], Optimizer(model, optimizer_table(SMALL), World())
    loss = train_gpt.train_step(model, optimizer, [batch], plan_step(SMALL, 1), rotary, 1)
    return loss[0].item(), *(p.tolist() for p in model.parameters())


@pytest.mark.parametrize("use", [validation_loss, sampled, trained])
def test_changed_weights_of_a_bfloat16_model_are_used_at_once(use):
    model, fresh = (randomise(GPT(SMALL, torch.bfloat16), seed) for seed in (0, 1))
    before, expected = use(model), use(fresh)
    randomise(model, 1)
    assert use(model) == expected != before


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_validation_chunks_are_dealt_once_and_cover_every_target(size):
    tokens = random_tokens(np.random.default_rng(1), 730).astype(np.uint16)
    val = Validation(SMALL, tokens)
    dealt = [[chunk.tokens.tolist() for _, chunk in val.chunks(World(rank, size))] for rank in range(size)]
    chunks = [dealt[i % size][i // size] for i in range(math.ceil(val.count / 100))]
    assert sum(map(len, dealt)) == len(chunks)
    assert [t for chunk in chunks for t in chunk[1:]] == tokens[1:].tolist()
    assert all(chunk[0] == before[-1] for before, chunk in zip(chunks, chunks[1:]))


@pytest.mark.parametrize("val_tokens", [0, 150, 499])
def test_validation_count_and_hash_are_of_the_first_tokens_over_shards(tmp_path, val_tokens):
    tokens = random_tokens(np.random.default_rng(6), 600)[:600]
    write_split(tmp_path, "val", np.split(tokens, [100, 333]))
    val = Validation.load(replace(SMALL, data=str(tmp_path), val_tokens=val_tokens), None)
    count = val_tokens or 599
    assert val.count == count and val.tokens.tolist() == tokens[: count + 1].tolist()
    assert val.sha256 == hashlib.sha256(tokens[: count + 1].astype("<u2").tobytes()).hexdigest()


# ---------------------------------------------------------- runs of six steps


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


class Runs:
    """Runs of SMALL, each with folders of its own, that keep the losses bit for bit and the trained model."""

    def __init__(self, monkeypatch, corpus, folder):
        self.corpus, self.folder, self.count = corpus, folder, 0
        monkeypatch.setitem(TRACKS, "tiny", SMALL)
        step, finish, validate = train_gpt.train_step, train_gpt.finish, Validation.run
        monkeypatch.setattr(train_gpt, "train_step", partial(self.keep, step, "losses"))
        monkeypatch.setattr(Validation, "run", lambda *args: self.keep(validate, "validations", *args))
        monkeypatch.setattr(train_gpt, "finish", lambda *args: self.keep_model(finish, *args))

    def keep(self, function, name, *args):
        result = function(*args)
        getattr(self, name).append(result[0].item() if name == "losses" else result)
        return result

    def keep_model(self, finish, cfg, model, log, world):
        self.model, self.log = model, log.folder

    def __call__(self, *flags):
        self.count += 1
        self.losses, self.validations = [], []
        self.logs = self.folder / f"logs{self.count}"
        data = [] if any("resume" in flag for flag in flags) else [f"--data={self.corpus}"]
        train_gpt.run([*data, f"--log_folder={self.logs}", *flags])
        return types.SimpleNamespace(losses=self.losses, validations=self.validations, model=self.model,
                                     folder=self.log, checkpoint=partial(checkpoint_of, self.logs),
                                     metrics=partial(metrics_of, self.logs))  # fmt: skip


@pytest.fixture
def runs(monkeypatch, corpus, tmp_path):
    return Runs(monkeypatch, corpus, tmp_path)


def test_windows_of_validation_are_those_of_the_step_and_at_the_end_the_final_ones(runs, monkeypatch):
    seen, validate = [], Validation.run
    monkeypatch.setattr(Validation, "run", lambda *args: seen.append(args[2]) or validate(*args))
    runs("--val_every=2")
    assert seen == [*(plan_step(SMALL, step).windows for step in (0, 2, 4)), {"short": 16, "long": 64}]


def test_first_training_loss_is_that_of_a_uniform_guess_over_the_targets_there_are(runs):
    """Of 64 tokens in a micro-batch the last one has no second target and the last two no third."""
    share = (1 + 0.5 * 63 / 64 + 0.25 * 62 / 64) / 1.75
    assert runs().metrics("train_loss")[0] == (1, pytest.approx(share * math.log(384), abs=2e-5))


@pytest.mark.parametrize("adam_every", [2, 3])
def test_warm_up_leaves_no_trace(runs, adam_every):
    cold = runs("--warmup=off", f"--adam_every={adam_every}")
    warm = runs("--warmup=on", f"--adam_every={adam_every}")
    assert len(cold.losses) == 6 and len(warm.losses) > 6
    assert warm.losses[-6:] == cold.losses
    assert warm.validations[1:] == cold.validations
    assert_equal(weights_of(warm.model), weights_of(cold.model))


@pytest.mark.parametrize("changes", [{"mtp_heads": 1}, {"untie_at": 0.5, "untied_values": True}], ids=str)
def test_warm_up_restores_weights_gradients_and_state(changes):
    cfg = replace(SMALL, **changes)
    model, optimizer = small_optimizer(cfg)
    before = weights_of(model)
    moved = []
    step = optimizer.step

    def step_and_note(*args):
        report = step(*args)
        moved.append(model.embed.detach().clone())
        return report

    optimizer.step = step_and_note
    tokens = random_tokens(np.random.default_rng(0), 300).astype(np.uint16)
    train_gpt.warm_up(model, optimizer, Validation(cfg, tokens), CPU, World())
    assert len(moved) == 6 and not torch.equal(moved[-1], before["embed"])
    assert_equal(weights_of(model), before)
    assert optimizer.healthy
    assert not any(p.grad.any() for p in model.parameters())
    assert not any(buffer.any() for state in optimizer.states for buffer in state.buffers.values())


def test_warm_up_beyond_what_is_finite_does_not_keep_training_from_updating(runs, monkeypatch):
    rates = [f"--{name}=9e11" for name in ("muon_lr", "adam_lr", "embed_lr_ratio", "muon_weight_decay")]
    for warmup in ("on", "off"):  # training comes to the same end
        with pytest.raises(UserError, match="step [23] wasn't applied: not finite"):
            runs(f"--warmup={warmup}", *rates)


# --------------------------------------------------------------------- graphs


class Replayed(train_gpt.Graphs):
    """Graphs on the CPU: a replay runs the function on the inputs that stay, and gives one output for all.

    Keeps what happened in turn, and insists that nothing that a graph reads or writes has moved.
    """

    def __init__(self, model):
        super().__init__()
        self.model, self.events, self.output = model, [], torch.zeros(())

    def addresses(self):
        read = [x for x in tree_leaves(self.model.weights) if x is not None]
        written = [p.grad for p in self.model.parameters()]
        return [x.data_ptr() for x in (*self.model.parameters(), *written, *read)]

    def add(self, key, function, inputs):
        self.recipes[key] = function, [x.clone() for x in inputs]

    def capture(self):
        if not self.captured:
            self.events.append("capture")
            self.captured = dict.fromkeys(self.recipes, self.addresses())

    def release(self):
        self.events.append("release")
        self.captured.clear()

    def replay(self, key, inputs):
        self.events.append("replay")
        function, static = self.recipes[key]
        assert self.captured[key] == self.addresses()
        assert [(x.shape, x.dtype) for x in static] == [(x.shape, x.dtype) for x in inputs]
        for x, given in zip(static, inputs):
            x.copy_(given)
        return self.output.copy_(function(*static))


@pytest.fixture
def replay_graphs(monkeypatch):
    """From its call on, models have such graphs."""
    build, validate = train_gpt.build_model, Validation.run

    def build_with_graphs(*args):
        model = build(*args)
        model.graphs = Replayed(model)
        return model

    def note_and_validate(val, model, *args):
        model.graphs.events.append("validate")
        return validate(val, model, *args)

    def replace_all():
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
        monkeypatch.setattr(train_gpt, "build_model", build_with_graphs)
        monkeypatch.setattr(Validation, "run", note_and_validate)

    return replace_all


STEP_SAVERS = ["--untie_at=0.5", "--bigram_ratio=2", "--muon_heads=1", "--prefix_weight=0.25", "--draw_output",
               "--untied_values", "--smooth_scalars", "--adam_weight_decay=0.005", "--lr_floor=0.15",
               "--late_attention", "--backout_from=0", *RESCALED_FLAGS]


@pytest.mark.parametrize("flags", [[], ["--dtype=bfloat16", "--mtp_heads=1", "--adam_every=3"],
                                   ["--dtype=bfloat16", *STEP_SAVERS]])  # fmt: skip
def test_training_with_graphs_is_training_without_bit_for_bit(runs, replay_graphs, monkeypatch, flags):
    monkeypatch.setattr(train_gpt, "token_prefixes", count_as_prefixes)
    plain = runs("--val_every=2", "--save_every=1", "--keep=0", *flags)
    replay_graphs()
    whole = runs("--val_every=2", "--save_every=1", "--keep=0", "--warmup=on", *flags)
    step, check = ["replay"] * SMALL.micro_batches, ["release", "validate"]
    warm_up, to_validation = ["validate"], ["capture", *step, *step]
    to_save = ["capture", *step, "release"]  # each step's checkpoint, too, is given the memory
    assert whole.model.graphs.events == warm_up + (check + to_save + ["capture", *step]) * 3 + check
    sizes = [len(inputs[0]) for _, inputs in whole.model.graphs.recipes.values()]
    targets = (4, 3, 1) if flags[1:] == STEP_SAVERS else (3, 2, 1)
    assert sorted(whole.model.graphs.recipes) == [*enumerate(targets)] and sizes == [129, 129, 65]
    resumed = runs(f"--resume={whole.checkpoint(1)}", "--warmup=on", *flags[:1])
    assert resumed.model.graphs.events == [*warm_up, "capture", *step] + (check + to_validation) * 2 + check
    for run, steps in ((whole, 6), (resumed, 5)):
        assert run.losses[-steps:] == plain.losses[-steps:]
        assert run.validations[-3:] == plain.validations[-3:]
        assert_equal(weights_of(run.model), weights_of(plain.model))


def letters_with(documents, seed):
    """A micro-batch of 64 letters, of which the first begin a document each."""
    tokens = torch.randint(97, 105, (65,), generator=torch.Generator().manual_seed(seed))
    tokens[:documents] = BOS
    return train_gpt.MicroBatch(tokens, train_gpt.to_documents(np.arange(documents), 64)._replace(longest=64))


@pytest.mark.parametrize("documents, events", [(1, ["replay"]), (63, ["replay"]), (64, [])])
def test_micro_batch_with_more_documents_than_a_graph_holds_runs_plainly(replay_graphs, documents, events):
    replay_graphs()
    plan, rotary = plan_step(SMALL, 1), whole_and_final(SMALL, 64)[1]
    plans = plan_step(SMALL, 0), plan
    warm, later = (train_gpt.loss_weights(SMALL, plan, torch.device("cpu")) for plan in plans)
    batch, results = letters_with(documents, seed=0), []
    for graphs in (True, False):
        model = randomise(train_gpt.build_model(SMALL, CPU))
        model.refresh()
        add_gradients(model, random_gradients(model, torch.Generator().manual_seed(8)))
        if graphs:
            train_gpt.add_graph(model, letters_with(5, seed=1), plan, rotary, warm)
            model.graphs.capture()
        loss = train_gpt.run_micro_batch(model, batch, plan, rotary, later)
        assert model.graphs.events == (["capture", *events] if graphs else [])
        results.append({"loss": loss} | {name: p.grad for name, p in model.named_parameters()})
    assert_equal(*results)


# ----------------------------------------------------------------- checkpoint


@pytest.mark.parametrize("flags", [["--mtp_heads=1"], ["--adam_every=3", "--document_rest=skip"],
                                   STEP_SAVERS])  # fmt: skip
def test_resume_at_every_step_is_bit_exact(runs, monkeypatch, flags):
    monkeypatch.setattr(train_gpt, "token_prefixes", count_as_prefixes)
    whole = runs("--save_every=1", "--keep=0", *flags)
    waiting = []
    for step in range(1, 6):
        tensors = load_file(whole.checkpoint(step))
        waiting.append("optimizer.embed.grad" in tensors)
        resumed = runs(f"--resume={whole.checkpoint(step)}")
        assert resumed.losses == whole.losses[step:]
        assert resumed.validations[-1] == whole.validations[-1]
        assert_equal(load_file(resumed.checkpoint(6)), load_file(whole.checkpoint(6)))
        assert resumed.metrics("train_time")[-1][1] > whole.metrics("train_time")[step - 1][1]
    assert any(waiting) and not all(waiting)


def test_stop_after_and_resume_is_bit_exact(runs):
    whole, begun = runs(), runs("--stop_after=3")
    assert begun.losses == whole.losses[:3]
    resumed = runs(f"--resume={begun.checkpoint(3)}")
    assert begun.losses + resumed.losses == whole.losses
    assert_equal(load_file(resumed.checkpoint(6)), load_file(whole.checkpoint(6)))


def test_resume_keeps_the_seed_in_the_saved_configuration(runs):
    begun = runs("--stop_after=3", "--seed=7")
    resumed = runs(f"--resume={begun.checkpoint(3)}")
    assert resumed.model.cfg.seed == 7


@pytest.mark.parametrize("save_every, steps", [(-1, []), (0, [6]), (2, [2, 4, 6]), (4, [4, 6])])
def test_checkpoints_are_written_when_asked_for(runs, save_every, steps):
    folder = runs(f"--save_every={save_every}", "--keep=0").folder
    expected = [f"checkpoint_{step:06d}.safetensors" for step in steps]
    assert sorted(path.name for path in folder.glob("*safetensors*")) == expected


def small_checkpoint(path, cfg=SMALL, seed=0):
    model, optimizer = small_optimizer(cfg)
    progress = {"step": 2, "position": Position(), "train_seconds": 1.0}
    failed = train_gpt.save_checkpoint(path, randomise(model, seed), optimizer, World(), progress)
    return path, failed or model


def test_interrupted_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path, _ = small_checkpoint(tmp_path / "a" / "checkpoint.safetensors")
    before = path.read_bytes()

    def fail_halfway(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(before[: len(before) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail_halfway)
    assert "No space" in small_checkpoint(path, seed=1)[1]
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_killed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path, _ = small_checkpoint(tmp_path / "checkpoint.safetensors")
    before, seen = path.read_bytes(), []
    monkeypatch.setattr(train_gpt.os, "fsync", lambda file: seen.append(path.read_bytes()))
    small_checkpoint(path, seed=1)
    written, named = seen  # the file, then its folder
    assert written == before and named == path.read_bytes() != before


def test_export_has_no_auxiliary_heads_and_equal_logits(tmp_path):
    cfg = replace(SMALL, mtp_heads=2)
    model, path = randomise(GPT(cfg)), tmp_path / "out" / "model.safetensors"
    train_gpt.export_model(path, model)
    with safe_open(path, "pt") as file:
        assert {name.removeprefix("model.") for name in file.keys()} == set(weights_of(model)) - {"mtp_heads"}
    saved = train_gpt.config_from_json(json.loads(path.with_suffix(".json").read_text()))
    assert saved == replace(cfg, mtp_heads=0)
    assert saved == train_gpt.read_safetensors(str(path), tensors=False)[1]["config"]
    loaded = train_gpt.load_model(str(path), saved, CPU)
    tokens = torch.tensor([BOS, *b"some tokens to judge by"])
    docs = train_gpt.Documents(torch.tensor([0, len(tokens)], dtype=torch.int32), len(tokens))
    logits = [m.logits(m(tokens, docs, *whole_and_final(cfg, len(tokens)))) for m in (model, loaded)]
    assert torch.equal(*logits) and logits[0].std() > 0


def test_export_to_a_json_name_is_refused_or_keeps_the_weights(tmp_path):
    path = tmp_path / "model.json"
    try:
        train_gpt.export_model(path, GPT(SMALL))
    except UserError:
        assert not path.exists()
    else:
        train_gpt.read_safetensors(str(path))


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def write_pickle(path, bomb):
    path.write_bytes(pickle.dumps({"model": bomb}))


def write_torch(path, bomb):
    torch.save({"model": bomb}, path)


def write_noise(path, bomb):
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def write_huge_header(path, bomb):
    path.write_bytes(b"\xff" * 8 + b"{}")


def write_foreign(path, bomb):
    save_file({"model.embed": torch.zeros(2)}, path, {"format": json.dumps("pt")})


def write_plain_metadata(path, bomb):
    save_file({"model.embed": torch.zeros(2)}, path, {"format": "pt"})


def write_half(path, bomb):
    small_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("flag", ["checkpoint", "resume"])
@pytest.mark.parametrize("write", [write_pickle, write_torch, write_noise, write_huge_header, write_foreign,
                                   write_plain_metadata, write_half])  # fmt: skip
def test_file_that_is_no_checkpoint_is_refused_and_never_unpickled(tmp_path, write, flag):
    path, triggered = tmp_path / "file", tmp_path / "triggered"
    write(path, Bomb(triggered))
    with pytest.raises(UserError) as caught:
        train_gpt.parse_config([f"--{flag}={path}", "--sample=a"])
        train_gpt.read_safetensors(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not triggered.exists()


def change_checkpoint(path, change):
    with safe_open(path, "pt") as file:
        tensors, meta = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    change(tensors)
    save_file(tensors, path, meta)


@pytest.mark.parametrize("flag", ["checkpoint", "resume"])
@pytest.mark.parametrize("change, words", [
    (lambda t: t.update({"model.head": torch.zeros(383, 32)}), r"head is \(383, 32\), not \(384, 32\)"),
    (lambda t: t.pop("model.attn_bank"), "parameter attn_bank is missing"),
    (lambda t: t.update({"model.extra": torch.zeros(2)}), "parameter extra is not in this model"),
], ids=["shape", "missing", "unknown"])  # fmt: skip
def test_checkpoint_that_does_not_fit_the_model_is_refused_by_name(tmp_path, corpus, change, words, flag):
    path, _ = small_checkpoint(tmp_path / "file", replace(SMALL, data=str(corpus)))
    change_checkpoint(path, change)
    with pytest.raises(UserError, match=words) as caught:
        train_gpt.run([f"--{flag}={path}", "--sample=a", f"--log_folder={tmp_path / 'logs'}"])
    assert str(path) in str(caught.value) and not (tmp_path / "logs").exists()


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("optimizer.attn_bank.momentum"), "attn_bank.momentum"),
    (lambda t: t.update({"optimizer.head.first": torch.zeros(5)}), "head.first"),
], ids=["missing", "shape"])  # fmt: skip
def test_checkpoint_with_wrong_optimizer_state_is_refused_by_name(tmp_path, corpus, change, words):
    path, _ = small_checkpoint(tmp_path / "file", replace(SMALL, data=str(corpus)))
    change_checkpoint(path, change)
    with pytest.raises(UserError, match=words):
        train_gpt.run([f"--resume={path}", f"--log_folder={tmp_path / 'logs'}"])


# ---------------------------------------------------------------------- clock


class Time:
    """A clock that only moves when told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(train_gpt, "time", types.SimpleNamespace(
            perf_counter=lambda: self.now, monotonic=lambda: self.now, time=lambda: self.now, strftime=lambda form: "now"))  # fmt: skip

    def slow(self, monkeypatch, owner, name, seconds):
        function = getattr(owner, name)

        def slowed(*args, **keywords):
            self.now += seconds
            return function(*args, **keywords)

        monkeypatch.setattr(owner, name, slowed)


SLOW = [  # what takes long, seconds each time, seconds timed over six steps
    (Validation, "run", 100, 0),
    (train_gpt, "save_checkpoint", 100, 0),
    (train_gpt, "build_model", 100, 0),
    (train_gpt, "warm_up", 100, 0),
    (Optimizer, "__init__", 100, 0),
    (train_gpt, "train_step", 1, 6),
    (train_gpt, "backward_micro_batch", 1, 24),
    (Optimizer, "step", 1, 6),
]


@pytest.mark.parametrize("owner, name, seconds, timed", SLOW, ids=[row[1] for row in SLOW])
def test_clock_runs_in_training_and_only_there(runs, monkeypatch, owner, name, seconds, timed):
    time = Time(monkeypatch)
    flags = ["--save_every=2", "--val_every=2", "--warmup=on" if name == "warm_up" else "--warmup=off"]
    time.slow(monkeypatch, owner, name, seconds)
    done = runs(*flags)
    assert time.now > 1000
    assert done.metrics("train_time")[-1] == (6, timed)


def test_clock_runs_while_the_loader_is_waited_for(runs, monkeypatch):
    time, iterate = Time(monkeypatch), Loader.__iter__

    def slow(self):
        for item in iterate(self):
            time.now += 10
            yield item

    monkeypatch.setattr(Loader, "__iter__", slow)
    assert runs("--val_every=2").metrics("train_time")[-1] == (6, 60)


def test_clock_goes_on_from_the_checkpoint(runs, monkeypatch):
    time = Time(monkeypatch)
    time.slow(monkeypatch, Optimizer, "step", 1)
    begun = runs("--stop_after=4")
    assert runs(f"--resume={begun.checkpoint(4)}").metrics("train_time")[-1] == (6, 6)


# ------------------------------------------------------------------- sampling


@pytest.fixture
def sampler():
    model = randomise(GPT(replace(SMALL, temperature=1.0)))
    return partial(sample_text, model, load_tokenizer("bytes")), model


def test_sample_depends_on_the_seed_alone(sampler):
    sample, _ = sampler
    torch.manual_seed(1)
    first = sample("some ", 30, seed=5)
    torch.manual_seed(2)
    assert first == sample("some ", 30, seed=5) != sample("some ", 30, seed=6)
    assert first.startswith("some ")


def test_sample_changes_no_state_of_the_model(sampler):
    sample, model = sampler
    model.regions = regions = dict(model.regions)  # stands for the compiled ones
    before, attributes = weights_of(model), set(vars(model))
    generator = torch.get_rng_state()
    sample("some ", 10)
    assert_equal(weights_of(model), before)
    assert model.regions is regions and set(vars(model)) == attributes and model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_sample_ends_with_the_document(sampler, stop):
    sample, model = sampler
    likely, calls = [*[ord("x")] * stop, BOS, *[ord("y")] * 20], []

    def logits(x):
        calls.append(x.shape)
        return 1e4 * F.one_hot(torch.tensor([likely[len(calls) - 1]]), model.cfg.padded_vocab)

    model.logits = logits
    assert sample("a", 10) == "a" + "x" * stop
    assert len(calls) == stop + 1


def test_sample_ends_after_the_count(sampler):
    sample, model = sampler
    model.logits = lambda x: 1e4 * F.one_hot(torch.tensor([ord("x")]), model.cfg.padded_vocab)
    assert sample("é", 7) == "é" + "x" * 7


def test_sample_never_draws_padding(sampler):
    sample, model = sampler
    logits = torch.zeros(1, model.cfg.padded_vocab)
    logits[:, model.cfg.vocab_size :] = 1e6
    logits[:, ord("z")] = 1e4
    model.logits = lambda x: logits
    assert sample("", 5) == "zzzzz"
