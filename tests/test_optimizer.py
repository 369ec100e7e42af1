"""Tests of the optimizer: its two updates, its table, what is due when, copies, and shares of ranks."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from small import BOS, SMALL, layers_without, random_tokens, train_gpt
from train_gpt import (
    POLAR_EXPRESS, TRACKS, Adam, GPT, NorMuon, Optimizer, Validation, World, adam_update, gradient,
    nesterov, normuon_update, optimizer_table, polar_express,
)  # fmt: skip
from training import assert_equal, randomise, weights_of

REPORT = {"train_loss": torch.zeros(())}


def small_optimizer(cfg=SMALL, world=World()):
    model = randomise(GPT(cfg))
    return model, Optimizer(model, optimizer_table(cfg), world)


def random_gradients(model, generator):
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def add_gradients(model, grads):
    """As backward() does."""
    for name, p in model.named_parameters():
        gradient(p).add_(grads[name])


def narrow(track):
    return replace(TRACKS[track], width=32, heads=2, vocab_size=BOS + 1)


# -------------------------------------------------------------------- updates


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
    x = nesterov(g, torch.zeros_like(g), None, *torch.zeros(3), dtype)
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


def normuon_by_hand(p, g, momentum, second, slow, lr, decay, mu, share, beta2):
    """One step on one float64 matrix, orthogonalised through its SVD, rows and elements one at a time."""
    beta = 0.85 if share else mu
    momentum, slow = beta * momentum + (1 - beta) * g, 0.98 * slow + 0.02 * g
    ahead = mu * ((1 - share) * momentum + share * slow) + (1 - mu) * g
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
    return new, momentum, second, slow


@pytest.mark.parametrize("shares", [(0.0,) * 3, (0.0, 0.5, 0.5)], ids=["one momentum", "and a slow one"])
@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 16, 6), (2, 6, 16)])
def test_normuon_equals_a_plain_implementation_per_matrix(shape, shares):
    N, R, C = shape
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(shape, generator=generator)
    moments = {"momentum": torch.zeros(shape), "second": torch.zeros(N, R, 1), "slow": torch.zeros(shape)}
    if not any(shares):
        del moments["slow"]
    lr = torch.linspace(0.01, 0.05, N).view(N, 1, 1)
    zero = torch.zeros(R, C, dtype=torch.float64)
    expected = [(p[i].double(), zero, zero[:, :1], zero) for i in range(N)]
    for mu, share in zip((0.85, 0.9, 0.95), shares):
        g = torch.randn(shape, generator=generator)
        normuon_update(p, g, moments, lr, torch.tensor(0.3), torch.tensor(mu), share, 0.9, torch.float32)
        for i in range(N):
            rate = lr[i].double().item()
            before, *own = expected[i]
            expected[i] = normuon_by_hand(before, g[i].double(), *own, rate, 0.3, mu, share, 0.9)
            for found, wanted in zip((p[i], *(moment[i] for moment in moments.values())), expected[i]):
                torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_attention_matrices_are_orthogonalised_each_by_itself():
    cfg = replace(SMALL, muon_weight_decay=0.0)
    model, optimizer = small_optimizer(cfg)
    add_gradients(model, random_gradients(model, torch.Generator().manual_seed(9)))
    with torch.no_grad():
        model.attn_bank.grad[0, 0] *= 1e-3  # a weak matrix moves as far as the others
    before, grads = model.attn_bank.detach().clone(), model.attn_bank.grad.clone()
    optimizer.step(0, lr_multiplier=1.0, momentum=0.9, report=REPORT)
    moved = (before - model.attn_bank.detach()).double() / (cfg.attn_lr_ratio * cfg.muon_lr)
    for found, grad in zip(moved.flatten(0, 1), grads.double().flatten(0, 1), strict=True):
        u, s, vh = torch.linalg.svd(grad, full_matrices=False)
        x = u * polar_scalar(s / s.norm()) @ vh
        scaled = x / x.norm(dim=1, keepdim=True)
        torch.testing.assert_close(found, scaled * x.norm() / scaled.norm(), rtol=1e-3, atol=1e-4)


def test_normuon_decays_only_where_decay_does_not_oppose_the_update():
    generator = torch.Generator().manual_seed(2)
    start, g = (torch.randn(2, 10, 10, generator=generator) for _ in range(2))
    lr, mu, decay = torch.full((2, 1, 1), 0.01), torch.tensor(0.9), 0.5

    def updated(decay):
        p, moments = start.clone(), {"momentum": torch.zeros(2, 10, 10), "second": torch.zeros(2, 10, 1)}
        normuon_update(p, g, moments, lr, torch.tensor(decay), mu, 0.0, 0.95, torch.float32)
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
        adam_update(p, g, first, second, 0.01, 1 - betas[0] ** t, 1 - betas[1] ** t, *betas)
        oracle.grad = g
        optimizer.step()
        torch.testing.assert_close(p, oracle.detach(), rtol=1e-6, atol=1e-6)


def test_adam_decays_tables_and_head_cautiously_by_their_learning_rate_squared(monkeypatch):
    monkeypatch.setattr(train_gpt, "ADAM_EVERY", 1)
    cfg = replace(SMALL, mtp_heads=1)
    moved = {}
    for name, decay in (("plain", 0.0), ("decayed", 0.005)):
        monkeypatch.setattr(train_gpt, "ADAM_DECAY", decay)
        model, optimizer = small_optimizer(cfg)
        before = weights_of(model)
        add_gradients(model, random_gradients(model, torch.Generator().manual_seed(8)))
        optimizer.step(0, lr_multiplier=0.5, momentum=0.9, report=REPORT)
        moved[name] = {n: p.double() - before[n].double() for n, p in weights_of(model).items()}
    decays = {"embed": 1, "value_embeds": 5, "head": 150, "mtp_heads": 150}
    for row in optimizer_table(cfg):
        decayed, plain = moved["decayed"][row.name], moved["plain"][row.name]
        rate = (0.5 * row.lr[0]) ** 2 * 0.005 * decays.get(row.name, 0) * (row.algorithm is Adam)
        p = before[row.name].double()
        torch.testing.assert_close(decayed, plain - rate * p * (plain * p < 0), rtol=1e-5, atol=1e-7)
        assert (rate > 0) == (not torch.equal(decayed, plain)), row.name


@pytest.mark.parametrize("every", [1, 2, 3])
def test_adam_rows_move_every_nth_step_by_the_sum_of_the_gradients_and_banks_at_each(monkeypatch, every):
    monkeypatch.setattr(train_gpt, "ADAM_EVERY", every)
    model, optimizer = small_optimizer()
    generator, waiting, moments, updates = torch.Generator().manual_seed(4), [], {}, 0
    rows = {row.name: row for row in optimizer_table(SMALL)}
    for step in range(6):
        grads, before = random_gradients(model, generator), weights_of(model)
        add_gradients(model, grads)
        waiting.append(grads)
        optimizer.step(step, lr_multiplier=0.5, momentum=0.9, report=REPORT)
        due = (step + 1) % every == 0
        updates += due
        for name, p in model.named_parameters():
            row, expected = rows[name], before[name].clone()
            if row.algorithm is NorMuon:
                assert (p != expected).float().mean() > 0.99 and not p.grad.any()
                continue
            assert p.grad.any() != due
            if due:
                total = sum(g[name] for g in waiting)
                first, second = moments.setdefault(name, (torch.zeros_like(p), torch.zeros_like(p)))
                bias = [1 - beta**updates for beta in row.betas]
                adam_update(expected, total, first, second, 0.5 * row.lr[0], *bias, *row.betas,
                            0.5 * row.weight_decay)
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
    warm_up = partial(train_gpt.warm_up, model, optimizer, Validation(cfg, tokens), World())
    warm_up()
    grads = [p.grad for p in model.parameters()]
    addresses = [grad.data_ptr() for grad in grads]
    warm_up()
    add_gradients(model, random_gradients(model, torch.Generator().manual_seed(6)))
    optimizer.step(step, lr_multiplier=0.5, momentum=0.9, report=REPORT)
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


@pytest.mark.parametrize("change, name", [
    (lambda table: without(table, "head"), "head"),
    (lambda table: [*table, table[0]], optimizer_table(SMALL)[0].name),
    (lambda table: [*table, table[0]._replace(name="heads")], "heads"),
], ids=["missing", "doubled", "unknown"])  # fmt: skip
def test_table_that_does_not_cover_each_parameter_once_is_refused(change, name):
    with pytest.raises(ValueError, match=f"['{{]{name}['}}]"):
        Optimizer(GPT(SMALL), change(optimizer_table(SMALL)), World())


FLAGS = {  # columns that the layer table lacks, flags
    "defaults": ((), {}),
    "mtp_heads": ((), {"mtp_heads": 2}),
    "no_value_embeds": (("value_embeds",), {}),
    "no_skip": (("skip_from",), {}),
    "bare": (("value_embeds", "skip_from"), {"smear_mtp": False, "backout_from": -1, "pointer": False,
                                             "bigram_ratio": 0.0, "untie_at": 0.0}),
    "everything": ((), {"bigram_ratio": 5.0, "untie_at": 0.5, "mtp_heads": 2, "value_std": 0.01,
                        "pointer": True, "slow_momentum": 0.5, "average": 0.5}),
}  # fmt: skip


@pytest.mark.parametrize("track", TRACKS)
@pytest.mark.parametrize("columns, flags", FLAGS.values(), ids=FLAGS)
def test_table_has_one_row_for_each_parameter_of_every_track(track, columns, flags):
    cfg = replace(layers_without(narrow(track), *columns), **flags)
    with torch.device("meta"):
        names = [name for name, _ in GPT(cfg).named_parameters()]
    assert sorted(row.name for row in optimizer_table(cfg)) == sorted(names)


@pytest.mark.parametrize("untie_at, embed", [(0.5, 0.008), (0.0, 0.6)], ids=["tied", "apart"])
@pytest.mark.parametrize("track", ["short", "race300"])
def test_effective_learning_rates_of_the_races(track, untie_at, embed):
    table = optimizer_table(replace(narrow(track), mtp_heads=1, untie_at=untie_at))
    rates = {row.name: [round(lr, 9) for lr in row.lr] for row in table}
    assert rates == {
        "embed": [embed], "value_embeds": [0.6], "head": [0.008], "mtp_heads": [0.008],
        "bigram_embed": [0.6], "bigram_lambdas": [0.04], "attn_gate": [0.008], "smear_gate": [0.00008],
        "attn_lambdas": [0.04], "resid_lambdas": [0.04], "x0_lambdas": [0.04],
        "smear_lambda": [0.04], "skip_lambdas": [0.04], "backout_lambda": [0.04], "smear_mtp_lambda": [0.04],
        "attn_bank": [0.046, 0.046, 0.046, 0.046], "mlp_bank": [0.046, 0.092],
        "pointer": [0.008], "pointer_gain": [0.008], "pointer_sink": [0.008],
    }  # fmt: skip


def test_matrices_of_the_short_track_move_at_the_rates_of_the_table():
    cfg = replace(narrow("short"), muon_weight_decay=0.0)
    model, optimizer = small_optimizer(cfg)
    add_gradients(model, random_gradients(model, torch.Generator().manual_seed(5)))
    before = weights_of(model)
    optimizer.step(0, lr_multiplier=1.52, momentum=0.85, report=REPORT)
    for name, rates in (("attn_bank", [0.046] * 4), ("mlp_bank", [0.046, 0.092])):
        moved = (getattr(model, name).detach() - before[name]).norm(dim=(-2, -1))
        rms_singular_value = moved / math.sqrt(cfg.width) / 1.52 / torch.tensor(rates)
        assert rms_singular_value.min() > 0.7 and rms_singular_value.max() < 1.15


def test_decay_follows_the_learning_rate_and_the_multiplier_twice():
    model, optimizer = small_optimizer(replace(SMALL, muon_lr=0.1, attn_lr_ratio=1.5, muon_weight_decay=0.2))
    add_gradients(model, {name: torch.zeros_like(p) for name, p in model.named_parameters()})
    before = weights_of(model)
    optimizer.step(0, lr_multiplier=0.5, momentum=0.9, report=REPORT)  # without gradients: decay alone
    for name, lr in (("attn_bank", torch.tensor([0.15] * 4)), ("mlp_bank", torch.tensor([0.2, 0.4]))):
        expected = before[name] * (1 - (0.5 * lr * 0.5 * 0.2)[:, None, None])
        torch.testing.assert_close(getattr(model, name).detach(), expected, rtol=1e-6, atol=1e-7)


# --------------------------------------------------------------------- copies


def test_a_copy_is_its_original_until_its_step_and_a_parameter_of_its_own_from_then_on():
    cfg = replace(SMALL, untie_at=0.5, scheduled_steps=8)  # the embedding is a copy of the head until step 4
    model, optimizer = small_optimizer(cfg)
    apart, expected = small_optimizer(replace(cfg, untie_at=0.0))  # begins with the same weights
    moments = {part.row.name: part.moments for part in optimizer.parts}
    generator = torch.Generator().manual_seed(10)
    for step in range(8):
        grads = random_gradients(model, generator)
        add_gradients(model, grads)
        optimizer.step(step, 0.5, 0.9, REPORT)
        if step in (1, 3):
            assert torch.equal(model.embed, model.head)
            assert_equal(moments["embed"], moments["head"])
        if step < 4:  # the gradients of both are the original's
            add_gradients(apart, grads | {"head": grads["head"] + grads["embed"]})
            expected.step(step, 0.5, 0.9, REPORT)
            torch.testing.assert_close(model.head, apart.head, rtol=1e-5, atol=1e-6)
    assert not torch.equal(model.embed, model.head)
    assert not torch.equal(moments["embed"]["first"], moments["head"]["first"])


# ------------------------------------------------------------------- averages


def test_final_weights_are_half_way_to_the_average_of_the_last_steps_and_keep_their_norms():
    """Of head and embedding every second step's, as they move."""
    cfg = replace(SMALL, average=0.7, scheduled_steps=8)  # of steps 2 to 7
    model, optimizer = small_optimizer(cfg)
    generator, seen = torch.Generator().manual_seed(11), []
    for step in range(8):
        add_gradients(model, random_gradients(model, generator))
        optimizer.step(step, 0.5, 0.9, REPORT)
        seen.append(weights_of(model))
    optimizer.finish()
    every = {"attn_bank": 1, "mlp_bank": 1, "head": 2}
    for name, found in weights_of(model).items():
        last = seen[-1][name]
        if name not in every:
            assert torch.equal(found, last) or name == "embed"
            continue
        own = [weights[name] for weights in seen[2:]][every[name] - 1 :: every[name]]
        average, rate = own[0], 2 / (6 / every[name] + 1)
        for weights in own[1:]:
            average = average + rate * (weights - average)
        blend = (last + average) / 2
        expected = blend * last.norm(dim=(-2, -1), keepdim=True) / blend.norm(dim=(-2, -1), keepdim=True)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found, last, rtol=1e-3)


# --------------------------------------------------------------------- shares


@pytest.mark.parametrize("size, matrices", [
    (1, [6]), (2, [3, 3]), (3, [2, 2, 2]), (4, [2, 2, 2, 0]), (8, [1] * 6 + [0] * 2),
])  # fmt: skip
def test_shares_of_every_row_cover_its_units_once(size, matrices):
    cfg = replace(SMALL, mtp_heads=1, bigram_ratio=1.5)
    model, table = GPT(cfg), optimizer_table(cfg)
    optimizers = [Optimizer(model, table, World(rank, size)) for rank in range(size)]
    for parts in zip(*(optimizer.parts for optimizer in optimizers)):
        row, units = parts[0].row, len(parts[0].as_units(parts[0].parameter))
        lengths = [{len(moment) for moment in part.moments.values()} for part in parts]
        if row.comms == "replicated":
            assert lengths == [{units}] * size
            continue
        assert np.concatenate([np.arange(part.lo, part.hi) for part in parts]).tolist() == list(range(units))
        assert lengths == [{part.hi - part.lo} for part in parts]
        if row.name == "mlp_bank":
            assert [part.hi - part.lo for part in parts] == matrices
