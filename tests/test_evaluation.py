"""Tests of the evaluation of a trained model: that it is legal, what it learns, how it is dealt and batched.

The weights are drawn at random and the learning rates are high, so that whatever is learnt shows in scores.
The vocabulary is so small that a token can take every value.
"""

import base64
import contextlib
import itertools
import json
import math
import os
import random
import re
import time
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from small import CPU, RESCALED, SMALL, assert_refused, checkpoint_of, free_port, run_ranks, write_corpus
from test_model import CFG, PLAIN, cross_entropies, make_model
from torch.testing import assert_close

import train_gpt as t

EVAL = replace(
    CFG, layers=CFG.layers[:3], vocab_size=8, multi_target=False, val_window_short=16, val_window_long=64,
    val_chunk=100, loss_chunk=40, micro_batches=4, eval_context=48, eval_stride=8, eval_batch=256,
    eval_slots=3, lora_rank=2, lora_lr=0.01, sgd_chunk=64, sgd_lr=0.1,
)  # fmt: skip
CUTS = {"cut_smear": True, "cut_key_offset": True, "cut_smear_mtp": True, "cut_bigram": True}
EVERYTHING = {
    **RESCALED, "layers": CFG.layers, "key_offset": "all", "multi_target": True,
    "untied_values": True, "draw_output": True, "late_attention": True, "prefix_weight": 0.25,
    "bigram_ratio": 2.0, "untie_at": 0.5, "muon_heads": 1, "smooth_scalars": True, "adam_weight_decay": 0.005,
}  # fmt: skip
both = pytest.mark.parametrize("model", ({}, EVERYTHING), ids=("defaults", "everything on"))
METHODS = "document", "stride", "ttt_lora", "ttt_sgd"
BY_DOCUMENT = METHODS[:3]
RATE = {"ttt_lora": "lora_lr", "ttt_sgd": "sgd_lr"}
MATRICES = "q", "k", "v", "o", "up", "down", "head"


def stream(*lengths, inside=0, seed=0):
    """Documents of these lengths, each after its BOS, behind `inside` tokens of one that began before."""
    rng = np.random.default_rng(seed)
    documents = [np.append(EVAL.bos, rng.integers(0, EVAL.bos, length - 1)) for length in lengths]
    return np.concatenate([rng.integers(0, EVAL.bos, inside), *documents])


STREAM = stream(150, 1, 2, 30, 48, 49, 7, 64, inside=5)  # documents begin at 0, 5, 155, 156, 158, 188, ..
DOCUMENTS = t.find_documents(STREAM, EVAL.bos)
BRIEF = stream(20, 30, 1, 2, 40, seed=1)
ODD = {
    "one token after its BOS": [EVAL.bos, 3], "two tokens of a document": [3, 4], "two BOS": [EVAL.bos] * 2,
    "a token and a BOS": [3, EVAL.bos], "one BOS": [EVAL.bos], "only short documents": stream(1, 2, 1, 2),
}  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def exact(monkeypatch):
    """What the script casts to float32 becomes float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture
def all_exact(exact):
    """What it makes anew, too."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def evaluation(tokens, **changes):
    model = make_model(replace(EVAL, **changes), dtype=torch.get_default_dtype())
    return t.Evaluation(model, np.asarray(tokens), t.World())


def scores(method, tokens, **changes):
    return getattr(evaluation(tokens, **changes), method)()


@cache
def expected_scores(method, everything=False):
    return scores(method, STREAM, **(EVERYTHING if everything else {}))


def changed(tokens, place, value=None):
    """With another token at `place`, one that is no BOS, or with this value."""
    tokens = tokens.copy()
    tokens[place] = (tokens[place] + 1) % EVAL.bos if value is None else value
    return tokens


@contextlib.contextmanager
def recorded():
    """For each place of the stream, while in force, the log-probabilities that its score is taken from."""
    rows, original = {}, t.window_losses

    def window_losses(model, batch, *rest):
        regions, given = model.regions, []

        def loss_region(logits_TV, targets_T, softcap):
            height, shift, width = softcap
            given.append(height * torch.tanh((logits_TV.detach() + shift) / width))
            return regions["loss_region"](logits_TV, targets_T, softcap)

        model.regions = {**regions, "loss_region": loss_region}
        losses = original(model, batch, *rest)
        model.regions = regions
        found = torch.cat(given).log_softmax(-1).numpy()
        for place, row in zip(batch.places.tolist(), found, strict=True):
            assert place == 0 or place not in rows
            rows[place] = row
        return losses

    with mock.patch.object(t, "window_losses", window_losses):
        yield rows


def nats_of_window(model, tokens, window):
    """Of the targets that it scores, by the model on the window's tokens alone."""
    with torch.no_grad():
        logits = model.logits(latents_of_window(model, tokens, window))
    return cross_entropy(logits, tokens, window)


def latents_of_window(model, tokens, window):
    """Where its scored targets are predicted."""
    inputs = torch.from_numpy(tokens[window.lo : window.hi])
    docs = t.Documents(torch.tensor([0, len(inputs)], dtype=torch.int32), len(inputs))
    rotary = t.build_rotary(model.cfg, len(model.cfg.stages) - 1, len(inputs), CPU.device)
    return model(inputs, docs, t.final_windows(model.cfg), rotary)[window.first - window.lo :]


def cross_entropy(logits, tokens, window):
    targets = torch.from_numpy(tokens[window.first + 1 : window.hi + 1])
    return F.cross_entropy(logits, targets, reduction="none")


# ----------------------------------------------------------------------------------------------------------
# Legality

# Of the long document: its first token, one in the middle, both sides of the borders between chunks of
# ttt-sgd (64), windows (69) and pieces of a document beyond val_chunk (105). Then tokens of others.
PLACES = 6, 64, 65, 69, 70, 90, 105, 106, 154, 157, 200, 355, 1


@both
@pytest.mark.parametrize("method", METHODS)
def test_a_token_changes_no_score_before_it_and_not_the_distribution_that_it_is_scored_with(method, model):
    with recorded() as before:
        original = scores(method, STREAM, **model)
    for place in PLACES:
        with recorded() as after:
            found = scores(method, changed(STREAM, place), **model)
        assert np.array_equal(found[:place], original[:place]), place
        assert np.array_equal(after[place], before[place]), place
        assert not np.array_equal(found[place:], original[place:]), place
        if method in RATE and 5 < place < 140:
            later = DOCUMENTS[-1][0] if method == "ttt_sgd" else place + 9
            assert not np.array_equal(found[later:], original[later:]), place


@pytest.mark.parametrize("method", METHODS)
def test_scores_of_all_values_of_a_token_make_up_a_distribution_with_the_ids_that_have_no_score(method):
    tokens, changes = stream(75, 20, inside=3, seed=1), {"sgd_chunk": 20}
    with recorded() as rows:
        scores(method, tokens, **changes)
    for place in (30, 60):
        nats = [scores(method, changed(tokens, place, v), **changes)[place] for v in range(EVAL.bos)]
        with recorded() as others:
            scores(method, changed(tokens, place), **changes)
        probabilities, values = np.exp(rows[place].astype(float)), np.exp(-np.array(nats))
        assert np.array_equal(rows[place], others[place])
        np.testing.assert_allclose(values, probabilities[: EVAL.bos], rtol=1e-5)
        assert sum(values) + probabilities[EVAL.bos :].sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_score_is_the_targets_in_the_recorded_distribution(method):
    with recorded() as rows:
        found = scores(method, STREAM)
    wanted = [-rows[place][STREAM[place]] if STREAM[place] != EVAL.bos and place else 0
              for place in range(len(STREAM))]  # fmt: skip
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@both
@pytest.mark.parametrize("method", RATE)
def test_learning_matters_at_these_learning_rates(method, model):
    learnt = expected_scores(method, model != {})
    still = scores(method, STREAM, **model, **{RATE[method]: 0.0})
    assert np.count_nonzero(np.abs(learnt - still) > 0.01) > len(STREAM) / 2
    first_to_learn = 14 if method == "ttt_lora" else 65
    assert np.array_equal(learnt[:first_to_learn], still[:first_to_learn])


@both
@pytest.mark.parametrize("method", BY_DOCUMENT)
def test_a_document_has_no_part_in_the_scores_of_another(method, model):
    """Nor by way of a slot that both have, one after the other: there are three."""
    original = expected_scores(method, model != {})
    for lo, hi in DOCUMENTS:
        inner = [place for place in range(lo, hi) if STREAM[place] != EVAL.bos]
        if inner:
            found = scores(method, changed(STREAM, inner), **model)
            outside = np.r_[:lo, hi : len(STREAM)]
            assert np.array_equal(found[outside], original[outside])
            assert hi - lo < 2 or not np.array_equal(found[lo:hi], original[lo:hi])


@pytest.mark.parametrize("method", BY_DOCUMENT)
def test_a_document_in_a_slot_that_was_used_before_has_the_scores_that_it_has_alone(method):
    for slots in (1, 2):
        together = scores(method, STREAM, eval_slots=slots)
        for lo, hi in DOCUMENTS:
            np.testing.assert_allclose(together[lo:hi], scores(method, STREAM[lo:hi]), atol=1e-5)


def test_ttt_sgd_learns_across_documents_but_only_from_chunks_that_are_scored():
    original = expected_scores("ttt_sgd")
    for place in (30, 100, 150):
        found, chunk = scores("ttt_sgd", changed(STREAM, place)), (place - 1) // EVAL.sgd_chunk
        still = [scores("ttt_sgd", tokens, sgd_lr=0.0) for tokens in (STREAM, changed(STREAM, place))]
        ends = (chunk + 1) * EVAL.sgd_chunk
        other = max(hi for lo, hi in DOCUMENTS if lo <= place)  # where documents begin that it isn't in
        assert np.array_equal(found[:place], original[:place])
        assert np.array_equal(*(x[other:] for x in still))
        learnt = np.flatnonzero(found[other:] != original[other:]) + other
        assert len(learnt) > len(STREAM[other:]) / 2 and learnt.min() > ends


@both
@pytest.mark.parametrize("method", METHODS)
def test_a_bos_put_into_a_document_changes_no_score_before_it(method, model):
    """Of documents shorter and longer than the context."""
    original = expected_scores(method, model != {})
    for place in (6, 20, 120, 130, 152, 159, 170, 187, 189, 230, 237):
        found = scores(method, changed(STREAM, place, EVAL.bos), **model)
        np.testing.assert_allclose(found[:place], original[:place], atol=1e-5)
        assert found[place] == 0


def test_a_targets_window_begins_where_it_does_wherever_the_document_ends():
    for context, stride in ((48, 8), (48, 48), (10, 3), (5, 1)):
        begins = {}
        for hi in range(9, 150):
            for window in t.document_windows(7, hi, context, stride):
                for target in range(window.first + 1, window.hi + 1):
                    assert begins.setdefault(target, window.lo) == window.lo, (context, stride, hi, target)


# ----------------------------------------------------------------------------------------------------------
# Every token is scored once


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ODD)
def test_streams_with_next_to_nothing_in_them_are_scored(name, method):
    tokens = np.array(ODD[name])
    found = scores(method, tokens)
    assert found.shape == tokens.shape and np.isfinite(found).all()
    assert (found[1:] > 0).tolist() == (tokens[1:] != EVAL.bos).tolist() and found[0] == 0


@both
@pytest.mark.parametrize("method, context, stride", [("document", 100, 100), ("stride", 48, 8),
                                                     ("stride", 20, 7), ("stride", 200, 200)])  # fmt: skip
def test_scores_are_those_of_the_model_on_each_window_alone(method, context, stride, model):
    found = scores(method, STREAM, eval_context=context, eval_stride=stride, **model)
    model = make_model(replace(EVAL, **model))
    for lo, hi in DOCUMENTS:
        for window in t.document_windows(lo, hi, context, stride):
            own = found[window.first + 1 : window.hi + 1]
            np.testing.assert_allclose(own, nats_of_window(model, STREAM, window), atol=1e-5)


def put_into(tokens, *pieces):
    """Scores of a stream, for each piece of it put once."""
    found = t.Scores(len(tokens), CPU.device)
    for lo, hi in pieces:
        batch = t.lay_out(tokens, [t.Window(lo, lo, hi)], 0, EVAL.bos, CPU.device)
        found.put(batch, torch.ones(len(batch.places)))
    return found


def test_a_token_that_is_scored_twice_or_never_is_an_error():
    tokens, world, once = stream(10), t.World(), "every token once"
    assert put_into(tokens, (0, 4), (4, 9)).collect(tokens, EVAL.bos, world).tolist() == [0, *[1] * 9]
    for pieces in ([(0, 4)], [(0, 4), (5, 9)], [(1, 9)], [(0, 5), (4, 9)], [(0, 9), (0, 9)], []):
        with pytest.raises(RuntimeError, match=once):
            put_into(tokens, *pieces).collect(tokens, EVAL.bos, world)
    with pytest.raises(RuntimeError, match=once):  # both ranks scored all
        put_into(tokens, (0, 9)).collect(tokens, EVAL.bos, SimpleNamespace(all_reduce=lambda x: x.mul_(2)))


def test_windows_cover_the_targets_of_a_document_once_and_in_order():
    draw = random.Random(0)
    for _ in range(2000):
        context = draw.choice((1, 2, 3, 48, draw.randint(1, 200)))
        stride = draw.choice((1, context, draw.randint(1, context)))
        lo, length = draw.randint(0, 50), draw.choice((1, 2, context, context + 1, draw.randint(1, 300)))
        windows = t.document_windows(lo, lo + length, context, stride)
        targets = [target for w in windows for target in range(w.first + 1, w.hi + 1)]
        assert targets == list(range(lo + 1, lo + length))
        for window in windows:
            assert lo <= window.lo <= window.first < window.hi
            assert window.hi - window.lo <= context and window.hi - window.first <= stride
            assert window.blocks == math.ceil((window.hi - window.lo) / t.BLOCK)
            assert window.lo == lo or window.first + 1 - window.lo > context - stride  # all context there is


def test_documents_of_a_stream_begin_at_its_start_and_at_each_bos():
    assert t.find_documents(np.array([1, 2, 7, 3, 7, 7, 4]), 7) == [(0, 2), (2, 4), (4, 5), (5, 7)]
    assert t.find_documents(np.array([7, 3]), 7) == [(0, 2)]


def random_documents(draw, longest=12):
    """Windows of up to so many documents; some have none."""
    context = draw.choice((48, 100, 300))
    stride = draw.choice((context, draw.randint(context // 10, context)))
    lengths = [draw.choice((1, 2, draw.randint(1, 400))) for _ in range(draw.randint(0, longest))]
    ends = np.cumsum([0, *lengths]).tolist()
    return [t.document_windows(lo, hi, context, stride) for lo, hi in itertools.pairwise(ends)]


def work_of(documents):
    return sum(window.blocks for windows in documents for window in windows)


def test_documents_are_dealt_to_one_rank_each_with_work_in_balance():
    draw = random.Random(0)
    for _ in range(300):
        documents, size = random_documents(draw, 30), draw.randint(1, 5)
        parts = [t.deal_documents(documents, t.World(rank, size)) for rank in range(size)]
        dealt = [windows for part in parts for windows in part]
        assert sorted(dealt) == sorted(windows for windows in documents if windows)
        loads = [work_of(part) for part in parts]
        assert max(loads) - min(loads) <= max((work_of([windows]) for windows in documents), default=0)


def check_batches(documents, slots, tokens):
    """Batches of these documents, after all that must be true of each has been checked."""
    documents = [windows for windows in documents if windows]
    document_of = {window: i for i, windows in enumerate(documents) for window in windows}
    done, place, batches = [0] * len(documents), {}, []
    for turns in t.continuous_batches(documents, slots, tokens):
        batches.append(turns)
        assert len(batches) <= sum(map(len, documents))
        used = sum(turn.window.blocks * t.BLOCK for turn in turns)
        assert turns and (used <= tokens or len(turns) == 1)
        under_way = [i for i in place if done[i] < len(documents[i])]
        own_slots = {turn.slot for turn in turns}
        assert len(own_slots) == len(turns) and own_slots <= set(range(slots))
        for turn in turns:
            i = document_of[turn.window]
            assert documents[i][done[i]] == turn.window
            assert (turn.fresh, turn.more) == (done[i] == 0, done[i] + 1 < len(documents[i]))
            if turn.fresh:
                assert turn.slot not in [place[j] for j in under_way]
            assert place.setdefault(i, turn.slot) == turn.slot
            done[i] += 1
        here = {document_of[turn.window] for turn in turns}
        assert len(here) == len(turns)
        for i in set(under_way) - here:  # it didn't fit
            assert documents[i][done[i]].blocks * t.BLOCK > tokens - used
    assert done == [len(windows) for windows in documents]
    return batches


def test_continuous_batches_run_every_documents_windows_in_order_within_slots_and_tokens():
    draw = random.Random(0)
    for _ in range(400):
        check_batches(random_documents(draw), draw.randint(1, 5), draw.choice((1, 64, 200, 640, 5000)))


def test_without_a_limit_of_tokens_no_slot_is_idle_and_the_longest_document_is_in_every_batch_until_it_ends():
    draw = random.Random(1)
    for _ in range(300):
        documents, slots = random_documents(draw), draw.randint(1, 5)
        batches = check_batches(documents, slots, 10**9)
        lengths = sorted((len(windows) for windows in documents if windows), reverse=True)
        left, total = list(lengths), sum(lengths)
        for turns in batches:
            assert len(turns) == min(slots, sum(count > 0 for count in left))
            for turn in turns:
                own = next(windows for windows in documents if turn.window in windows)
                left[left.index(len(own) - own.index(turn.window))] -= 1
        longest = max(lengths, default=0)
        assert longest <= len(batches) <= math.ceil((total - longest) / slots + longest)
        if lengths.count(longest) == 1:
            (own,) = (windows for windows in documents if len(windows) == longest)
            assert all({turn.window for turn in turns} & set(own) for turns in batches[:longest])


def test_with_a_limit_of_tokens_a_document_with_most_windows_left_goes_first():
    draw = random.Random(2)
    for _ in range(300):
        documents = [windows for windows in random_documents(draw) if windows]
        left = {i: len(windows) for i, windows in enumerate(documents)}
        for turns in check_batches(documents, 20, draw.choice((64, 200, 640))):
            own = [next(i for i, windows in enumerate(documents) if turn.window in windows) for turn in turns]
            assert left[own[0]] == max(left.values())
            for i in own:
                left[i] -= 1


# ----------------------------------------------------------------------------------------------------------
# Learning rate 0


@both
@pytest.mark.parametrize("context, stride", [(48, 8), (48, 48), (48, 7), (300, 32)])
@pytest.mark.parametrize("matrices", [*MATRICES, ",".join(MATRICES)])
def test_adapters_that_learn_nothing_change_nothing(matrices, context, stride, model):
    changes = {"eval_context": context, "eval_stride": stride, **model}
    found = scores("ttt_lora", STREAM, lora_lr=0.0, lora_matrices=matrices, **changes)
    np.testing.assert_allclose(found, scores("stride", STREAM, **changes), rtol=1e-6)  # products of other row counts


@both
@pytest.mark.parametrize("matrices", MATRICES)
def test_adapters_of_one_matrix_alone_learn(matrices, model):
    learnt = scores("ttt_lora", STREAM, lora_matrices=matrices, **model)
    difference = np.abs(learnt - expected_scores("stride", model != {}))
    assert np.count_nonzero(difference > (1e-4 if model else 1e-3)) > len(STREAM) / 3
    assert not difference[:14].any()


@both
@pytest.mark.parametrize("epochs, rate", [(1, 0.0), (0, 0.1)])
def test_sgd_that_learns_nothing_scores_as_stride_does(epochs, rate, model):
    found = scores("ttt_sgd", STREAM, sgd_lr=rate, sgd_epochs=epochs, **model)
    np.testing.assert_allclose(found, expected_scores("stride", model != {}), atol=1e-5)


def test_sgd_learns_to_predict_tokens_not_their_prefixes_nor_further_ones():
    """Also after a schedule that ends in the stage where these count."""
    one, off = {**EVERYTHING, "stages": EVAL.stages[:1]}, {"prefix_weight": 0.0, "multi_target": False}
    assert not t.plan_step(replace(EVAL, **one), EVAL.total_steps).prefix
    assert np.array_equal(scores("ttt_sgd", STREAM, **one), scores("ttt_sgd", STREAM, **{**one, **off}))


# ----------------------------------------------------------------------------------------------------------
# LoRA


def random_lora(cfg, slots, dtype=torch.float32, std=0.1):
    """Both factors drawn at random."""
    lora = t.LoRA(cfg, slots, CPU.device)
    lora.factors = [std * torch.randn_like(x, dtype=dtype) for x in lora.factors]
    return lora


def pairs_of(cfg, factors):
    """Matrix -> its A (layers, r, C) and B (layers, R, r), of the factors of one document."""
    return dict(zip(cfg.lora_matrices.split(","), zip(factors[::2], factors[1::2])))


def merged(model, pairs):
    """Weights with the products B A added: attn_bank (A, 4, D, D), mlp_bank (L, 2, F, D), head (V, D)."""

    def updated(name, weights):
        return weights + pairs[name][1] @ pairs[name][0] if name in pairs else weights

    attn = [updated(name, model.attn_bank[:, i]) for i, name in enumerate("qkvo")]
    mlp = updated("up", model.mlp_bank[:, 0]), updated("down", model.mlp_bank[:, 1].mT).mT
    head = updated("head", model.head[None])[0]
    return {"attn_bank": torch.stack(attn, dim=1), "mlp_bank": torch.stack(mlp, dim=1), "head": head}


SOME_WINDOWS = [t.Window(5, 5, 13), t.Window(30, 70, 78), t.Window(158, 160, 161), t.Window(188, 228, 235)]


def adapted_losses(model, lora, slots, windows=SOME_WINDOWS, rows=8):
    """Losses of the windows, (windows, rows), each with the adapters of its slot, and the leaves."""
    model.requires_grad_(False)
    batch = t.lay_out(STREAM, windows, rows, EVAL.bos, CPU.device)
    adapters, leaves = lora.take(torch.tensor(slots), model.dtype, batch.window)
    rotary = t.build_rotary(model.cfg, len(model.cfg.stages) - 1, 1000, CPU.device)
    return t.window_losses(model, batch, rotary, adapters).view(len(windows), -1), leaves


@both
@pytest.mark.parametrize("matrices", [*MATRICES, "down,head,q", ",".join(MATRICES)])
def test_adapters_are_the_weights_plus_b_a_for_each_window_its_own(matrices, exact, model):
    cfg, slots = replace(EVAL, lora_matrices=matrices, **model), (3, 0, 4, 1)
    model, lora = make_model(cfg, dtype=torch.float64), random_lora(cfg, 5, torch.float64)
    losses, _ = adapted_losses(model, lora, slots)
    for window, slot, found in zip(SOME_WINDOWS, slots, losses, strict=True):
        other = make_model(cfg, dtype=torch.float64)
        weights = merged(model, pairs_of(cfg, [x[slot] for x in lora.factors]))
        other.load_state_dict(other.state_dict() | weights)
        expected = nats_of_window(other, STREAM, window)
        assert_close(found[: len(expected)].detach(), expected, rtol=1e-9, atol=1e-9)
        assert not found[len(expected) :].any()
        assert (expected - nats_of_window(model, STREAM, window)).abs().max() > 1e-7


@both
def test_gradients_of_adapters_are_finite_differences_of_their_own_windows_loss(exact, model):
    cfg = replace(EVAL, **model)
    model, lora = make_model(cfg, dtype=torch.float64), random_lora(cfg, 4, torch.float64)
    losses, leaves = adapted_losses(model, lora, range(4))
    shares = torch.tensor([1.0, 0.5, 2.0, 0.25], dtype=torch.float64)
    grads = torch.autograd.grad((shares * losses.sum(1)).sum(), leaves, retain_graph=True)
    one = torch.autograd.grad(losses[1].sum(), leaves)
    for i, (grad, alone) in enumerate(zip(grads, one, strict=True)):
        assert alone[1].any() and not alone[[0, 2, 3]].any()
        start, step, values = lora.factors[i], torch.randn_like(grad), []
        for sign in (1, -1):
            lora.factors[i] = start + sign * 1e-5 * step
            values.append(adapted_losses(model, lora, range(4))[0].detach().sum(1))
        lora.factors[i] = start
        expected = (values[0] - values[1]) / 2e-5 * shares
        assert_close((grad * step).flatten(1).sum(1), expected, rtol=1e-5, atol=1e-8)


@both
def test_ttt_lora_leaves_the_models_weights_alone_and_gives_them_no_gradient(model):
    run = evaluation(BRIEF, **model)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    run.ttt_lora()
    for name, p in run.model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None, name


def reference_ttt_lora(tokens, cfg, monkeypatch):
    """By plain autograd through W + B A, document by document, with torch's Adam."""
    for name, function in PLAIN.items():
        monkeypatch.setattr(t, name, SimpleNamespace(apply=function))
    model, out = make_model(cfg, dtype=torch.float64), np.zeros(len(tokens))
    model.requires_grad_(False)
    for lo, hi in t.find_documents(tokens, EVAL.bos):
        leaves = [x.clone().requires_grad_() for x in t.LoRA(cfg, 1, CPU.device).first]
        adam = torch.optim.Adam(leaves, lr=EVAL.lora_lr, betas=(0.0, EVAL.lora_beta2), eps=1e-10)
        for window in t.document_windows(lo, hi, EVAL.eval_context, EVAL.eval_stride):
            model.weights = merged(model, pairs_of(EVAL, leaves))
            z = latents_of_window(model, tokens, window) @ model.weights["head"].T
            logits = 23 * torch.sigmoid((z + 5) / 7.5) if cfg.softcap_shift else 15 * torch.tanh(z / 15)
            nats = cross_entropy(logits, tokens, window)
            out[window.first + 1 : window.hi + 1] = nats.detach()
            adam.zero_grad()
            nats.mean().backward()
            adam.step()
    return out


@both
def test_ttt_lora_is_adam_on_merged_weights_document_by_document(monkeypatch, model, all_exact):
    """In float64: where a gradient is next to 0, Adam makes much of how it was rounded."""
    expected = scores("ttt_lora", STREAM, **model)
    found = reference_ttt_lora(STREAM, replace(EVAL, **model), monkeypatch)
    np.testing.assert_allclose(expected, found, atol=1e-9)


@pytest.mark.parametrize("beta", (0.0, 0.9, 0.999))
def test_each_slot_is_trained_as_by_adam_on_its_own_gradients_whenever_it_joins(beta):
    cfg = replace(EVAL, lora_beta2=beta, lora_matrices="k,down,head")
    lora = t.LoRA(cfg, 4, CPU.device)
    adams, expected = {}, {}
    joins = [((0, 2), (0, 2)), ((3,), (2, 3, 0)), ((), (3,)), ((0,), (0, 3)), ((1,), (1, 0, 2, 3))]
    for fresh, slots in joins:
        for slot in fresh:
            lora.reset(slot)
            expected[slot] = [x.clone() for x in lora.first]
            adams[slot] = torch.optim.Adam(expected[slot], lr=cfg.lora_lr, betas=(0.0, beta), eps=1e-10)
        _, leaves = lora.take(torch.tensor(slots), torch.float32, torch.zeros(1, dtype=torch.int64))
        grads = [torch.randn_like(x) * 10 ** torch.randn(()) for x in leaves]
        lora.learn(torch.tensor(slots), leaves, grads)
        for i, slot in enumerate(slots):
            for x, grad in zip(expected[slot], grads):
                x.grad = grad[i].clone()
            adams[slot].step()
        for slot, factors in expected.items():
            assert_close([x[slot] for x in lora.factors], factors)


def test_reset_makes_a_slot_as_new_and_touches_no_other():
    lora = random_lora(EVAL, 3)
    lora.seconds, lora.steps = [torch.randn_like(x) for x in lora.factors], torch.tensor([4.0, 5.0, 6.0])
    kept = [[x[[0, 2]].clone() for x in group] for group in (lora.factors, lora.seconds)]
    lora.reset(1)
    for factor, second, first in zip(lora.factors, lora.seconds, lora.first, strict=True):
        assert torch.equal(factor[1], first) and not second[1].any()
    assert lora.steps.tolist() == [4, 0, 6]
    for group, before in zip((lora.factors, lora.seconds), kept):
        assert all(torch.equal(x[[0, 2]], y) for x, y in zip(group, before, strict=True))


def test_adapters_begin_as_documented():
    L, A, D, r, wide, V = 3, 2, 32, 2, 64, 128
    lora = t.LoRA(EVAL, 3, CPU.device)
    assert lora.names == [*MATRICES]
    others = {"up": (L, wide, D), "down": (L, D, wide), "head": (1, V, D)}
    for name, a, b in zip(MATRICES, lora.factors[::2], lora.factors[1::2], strict=True):
        layers, rows, columns = others.get(name, (A, D, D))
        assert (a.shape, b.shape) == ((3, layers, r, columns), (3, layers, rows, r))
    for a, b in zip(lora.first[::2], lora.first[1::2]):
        bound = a.size(-1) ** -0.5
        assert not b.any() and 0.8 * bound < a.abs().max() <= bound
    assert all(torch.equal(x, y) for x, y in zip(lora.first, t.LoRA(EVAL, 1, CPU.device).first))
    other = t.LoRA(replace(EVAL, seed=1), 1, CPU.device)
    assert not torch.equal(lora.first[0], other.first[0])


# ----------------------------------------------------------------------------------------------------------
# SGD


class Steps:
    """A run of ttt_sgd: scores, the weights at the scoring of each chunk, and (chunk, rate) of each step."""

    def __init__(self, monkeypatch, tokens=STREAM, **changes):
        self.weights, self.steps = [], []
        self.evaluation = evaluation(tokens, **changes)
        run, descend = t.Evaluation.run, t.Evaluation.descend

        def spy_run(own, *args):
            self.weights.append({name: p.detach().clone() for name, p in own.model.named_parameters()})
            return run(own, *args)

        def spy_descend(own, chunk, optimizer, weights):
            self.steps.append((chunk, optimizer.param_groups[0]["lr"]))
            return descend(own, chunk, optimizer, weights)

        with monkeypatch.context() as patch:
            patch.setattr(t.Evaluation, "run", spy_run)
            patch.setattr(t.Evaluation, "descend", spy_descend)
            self.scores = self.evaluation.ttt_sgd()


def reference_sgd(tokens, cfg, monkeypatch):
    """Weights at the scoring of each chunk, and each gradient's norm, by plain autograd and torch's SGD."""
    for name, function in PLAIN.items():
        monkeypatch.setattr(t, name, SimpleNamespace(apply=function))
    model, states, norms = make_model(cfg), [], []
    model.weights = {name: model.get_parameter(name) for name in ("attn_bank", "mlp_bank")}
    optimizer = torch.optim.SGD(model.parameters(), lr=cfg.sgd_lr, momentum=cfg.sgd_momentum)
    count = math.ceil((len(tokens) - 1) / cfg.sgd_chunk)
    rotary = t.build_rotary(cfg, len(cfg.stages) - 1, 200, CPU.device)
    for chunk in range(count):
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
        optimizer.param_groups[0]["lr"] = cfg.sgd_lr * (1 + math.cos(math.pi * chunk / count)) / 2
        for _ in range(cfg.sgd_epochs):
            optimizer.zero_grad()
            size = cfg.sgd_chunk // cfg.micro_batches
            for lo in range(chunk * cfg.sgd_chunk, min((chunk + 1) * cfg.sgd_chunk, len(tokens) - 1), size):
                piece = torch.from_numpy(tokens[lo : lo + size + 1])
                starts = [0, *(i for i in range(1, len(piece) - 1) if piece[i] == cfg.bos)]
                docs = t.to_documents(np.array(starts), len(piece) - 1)
                x_TD = model(piece[:-1], docs, t.final_windows(cfg), rotary)
                (cross_entropies(model, model.head, x_TD, piece, 1) / cfg.sgd_chunk).backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.sgd_clip).item())
            optimizer.step()
    return states, norms


@both
@pytest.mark.parametrize("epochs, clip", [(1, 1.0), (2, 1e9)])
def test_sgd_takes_torchs_steps_on_the_mean_loss_of_each_chunk_after_its_scoring(monkeypatch, epochs, clip,
                                                                                 model):  # fmt: skip
    changes = {"sgd_epochs": epochs, "sgd_clip": clip, "sgd_lr": 0.1 if clip == 1 else 0.003, **model}
    found = Steps(monkeypatch, **changes)
    expected, norms = reference_sgd(STREAM, replace(EVAL, **changes), monkeypatch)
    assert min(norms) > 1  # clipping at 1 matters
    for i, (weights, wanted) in enumerate(zip(found.weights, expected, strict=True)):
        for name, p in weights.items():
            assert_close(p, wanted[name], rtol=1e-4, atol=1e-4, msg=f"{name} at chunk {i}")
            assert i == 0 or not torch.equal(p, found.weights[i - 1][name]), name
    states = [make_model(replace(EVAL, **model)) for _ in expected]
    for model, weights in zip(states, found.weights):
        model.load_state_dict(weights)
    for lo, hi in DOCUMENTS:
        for window in t.document_windows(lo, hi, EVAL.eval_context, EVAL.eval_stride):
            nats = nats_of_window(states[window.first // EVAL.sgd_chunk], STREAM, window)
            np.testing.assert_allclose(found.scores[window.first + 1 : window.hi + 1], nats, atol=1e-5)


def test_sgd_learns_from_every_chunk_but_the_last_at_a_rate_that_falls_as_a_cosine(monkeypatch):
    for epochs, chunk in ((1, 64), (3, 100)):
        found, count = Steps(monkeypatch, sgd_epochs=epochs, sgd_chunk=chunk), math.ceil(355 / chunk)
        assert len(found.weights) == count
        steps = [i for i in range(count - 1) for _ in range(epochs)]
        rates = [0.1 * (1 + math.cos(math.pi * i / count)) / 2 for i in steps]
        assert found.steps == [(i, pytest.approx(rate)) for i, rate in zip(steps, rates)]
    assert Steps(monkeypatch, sgd_chunk=355).steps == []


def test_a_target_is_learnt_from_only_when_it_is_scored():
    """Also where a stride is longer than a chunk, and windows reach from one into the next."""
    for stride, chunk in ((8, 64), (7, 64), (48, 20), (48, 48), (1, 5)):
        run = evaluation(STREAM, eval_stride=stride, sgd_chunk=chunk)
        scored = np.full(len(STREAM), -1)
        for i, windows in enumerate(run.chunks()):
            for window in windows:
                assert (scored[window.first + 1 : window.hi + 1] == -1).all()
                scored[window.first + 1 : window.hi + 1] = i
        learnt = np.maximum(np.arange(len(STREAM)) - 1, 0) // chunk  # by the chunk of the input before it
        has_score = STREAM != EVAL.bos
        has_score[0] = False
        assert (scored[has_score] >= 0).all() and (scored[~has_score] == -1).all()
        assert (scored <= learnt).all()


@pytest.mark.parametrize("chosen", ("attn_bank", "head,smear_lambda"))
def test_sgd_moves_only_the_weights_that_are_chosen(monkeypatch, chosen):
    weights = Steps(monkeypatch, sgd_weights=chosen).weights
    moved = {name for name, p in weights[-1].items() if not torch.equal(p, weights[0][name])}
    assert moved == set(chosen.split(","))


@pytest.mark.parametrize("fails", (None, "run", "descend", "backward_micro_batch"))
def test_sgd_restores_the_weights_bit_for_bit_whatever_happens(monkeypatch, fails):
    run, calls = evaluation(STREAM), []
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    owner = t if fails == "backward_micro_batch" else t.Evaluation
    if fails:
        original = getattr(owner, fails)

        def failing(*args):
            calls.append(fails)
            if len(calls) == 7 if fails == "backward_micro_batch" else len(calls) == 3:
                raise ZeroDivisionError
            return original(*args)

        monkeypatch.setattr(owner, fails, failing)
        with pytest.raises(ZeroDivisionError):
            run.ttt_sgd()
        monkeypatch.undo()
        assert calls
    else:
        run.ttt_sgd()
    for name, p in run.model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None and (fails or not p.requires_grad), name
    assert np.array_equal(run.stride(), expected_scores("stride"))
    assert np.array_equal(run.ttt_sgd(), expected_scores("ttt_sgd"))


def test_sgd_in_bfloat16_restores_what_the_products_read():
    cfg = replace(EVAL, sgd_lr=0.01)
    model = t.GPT(cfg, torch.bfloat16)
    model.load_state_dict(make_model(cfg).state_dict())
    run = t.Evaluation(model, BRIEF, t.World())
    before, learnt = run.stride(), run.ttt_sgd()
    assert not np.array_equal(learnt, before) and np.array_equal(run.stride(), before)


def test_sgd_learns_from_chunks_whose_micro_batches_are_longer_than_a_batch_of_windows():
    scores("ttt_sgd", stream(*[30] * 30), sgd_chunk=800, eval_batch=64)


def test_sgd_learns_from_chunks_of_fewer_tokens_than_micro_batches():
    assert (scores("ttt_sgd", BRIEF, sgd_chunk=3)[1:] > 0).tolist() == (BRIEF[1:] != EVAL.bos).tolist()


# ----------------------------------------------------------------------------------------------------------
# Ranks

STREAMS = {"STREAM": STREAM, "few documents": stream(60, 20, seed=2)}


GENTLE = replace(EVAL, sgd_lr=0.02)  # high rates magnify how a sum of two ranks' parts is rounded


def evaluate_as_rank(rank, folder, jobs):
    """Process `rank` evaluates among 2 and among 4, and leaves what it found in files."""
    torch.set_num_threads(1)
    for size, port in jobs:
        if rank < size:
            dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
            world, model = t.World(rank, size), make_model(GENTLE)
            found = {f"{method} {name}": getattr(t.Evaluation(model, tokens, world), method)()
                     for method in METHODS for name, tokens in STREAMS.items()}  # fmt: skip
            np.savez(folder / f"{rank}-of-{size}.npz", **found)
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder with the scores of each rank. Its processes are forked from one that has imported torch."""
    folder, jobs = tmp_path_factory.mktemp("ranks"), [(size, free_port()) for size in (2, 4)]
    run_ranks(evaluate_as_rank, folder, jobs, seconds=600, method="forkserver", preload=["torch._dynamo"])
    return folder


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("method", METHODS)
def test_ranks_together_find_the_scores_of_one(ranks, method, name):
    expected = scores(method, STREAMS[name], sgd_lr=GENTLE.sgd_lr)
    for rank, size in [(0, 2), (1, 2), (0, 4), (3, 4)]:
        found = np.load(ranks / f"{rank}-of-{size}.npz")[f"{method} {name}"]
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=f"rank {rank} of {size}")


# ----------------------------------------------------------------------------------------------------------
# Bits per byte

TEXTS = ["naïve café 東京 🙂 the the\r\n", " leading  spaces ", "a", "日本 and that 日", "x" * 70]


@pytest.fixture
def rank_file(tmp_path, monkeypatch):
    """256 byte tokens and merges, some of which end within a character; its BOS is 261."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    path = tmp_path / "ranks.tiktoken"
    merges = [b"th", b" a", "é".encode(), "日".encode()[:2], "日".encode()]
    entries = [bytes([i]) for i in range(256)] + merges
    path.write_text("".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(entries)))
    return str(path)


@pytest.mark.parametrize("kind", ("bytes", "merged"))
def test_bits_per_byte_are_of_the_raw_text_and_of_its_tokens_alone(kind, rank_file):
    tokenizer = t.load_tokenizer("bytes" if kind == "bytes" else rank_file)
    cfg = replace(EVAL, vocab_size=tokenizer.vocab_size)
    pieces = [[cfg.bos, *tokenizer.encode(text)] for text in TEXTS]
    tokens, model = np.concatenate(pieces), make_model(cfg)
    size = sum(len(text.encode()) for text in TEXTS)
    assert (len(tokens) < size) == (kind == "merged")
    val = t.Validation(cfg, tokens, tokenizer)
    for name in ("document", "stride", "ttt-lora", "ttt-sgd"):
        result, nats = t.measure(name, model, val, CPU, t.World())
        assert result["tokens"] == len(tokens) - len(TEXTS) and not nats[tokens == cfg.bos].any()
        assert result["loss"] == pytest.approx(nats.sum() / result["tokens"], rel=1e-12)
        assert result["bpb"] == pytest.approx(nats.sum() / math.log(2) / size, rel=1e-12)
        if name == "document":
            whole = ((np.array(piece), t.Window(0, 0, len(piece) - 1)) for piece in pieces)
            alone = sum(nats_of_window(model, *document).sum().item() for document in whole)
            assert nats.sum() == pytest.approx(alone, rel=1e-6)


def test_bytes_before_the_first_target_of_a_stream_do_not_count():
    cfg, tokenizer = replace(EVAL, vocab_size=257), t.load_tokenizer("bytes")
    tokens = np.array([*"é which began before".encode(), 256, *b"next"])[1:]
    val = t.Validation(cfg, tokens, tokenizer)
    result, nats = t.measure("stride", make_model(cfg), val, CPU, t.World())
    assert result["tokens"] == val.bytes == len(tokens) - 2
    assert result["bpb"] == pytest.approx(nats.sum() / math.log(2) / (len(tokens) - 2), rel=1e-12)
    part = val.part([(0, 3), (20, 25)], tokenizer)
    assert (part.count, part.bytes, part.tokens.tolist()) == (7, 6, [*tokens[:3], *tokens[20:25]])


def test_warm_up_of_packed_has_the_rotary_tables_of_what_is_timed(monkeypatch):
    """Those of another length would be compiled for again, within the clock."""
    cfg, lengths, run = replace(EVAL, val_chunk=1000), [], t.Validation.run

    def recording(val, model, windows, rotary, world):
        lengths.append([table.shape for table in rotary])
        return run(val, model, windows, rotary, world)

    monkeypatch.setattr(t.Validation, "run", recording)
    t.measure("packed", make_model(cfg), t.Validation(cfg, BRIEF), CPU._replace(warmup=True), t.World())
    assert len(lengths) == 2 and lengths[0] == lengths[1]


# ----------------------------------------------------------------------------------------------------------
# Isolation


def latents(model, tokens, lengths, isolated):
    """Of pieces side by side; isolated: nothing crosses from one to the next."""
    cu_seqlens = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    first = torch.zeros(len(tokens), dtype=torch.bool)
    first[cu_seqlens[:-1].long()] = True
    docs = t.Documents(cu_seqlens, max(lengths), first if isolated else None)
    rotary = t.build_rotary(model.cfg, 1, len(tokens), CPU.device)
    with torch.no_grad():
        return model(tokens, docs, t.final_windows(model.cfg), rotary)


@both
@pytest.mark.parametrize("cuts", [{}, CUTS, {"cut_smear": True}], ids=("off", "all on", "one on"))
def test_pieces_that_are_isolated_are_the_same_alone_whatever_is_cut_and_whether_they_begin_with_bos(
        cuts, model):  # fmt: skip
    model, lengths = make_model(replace(EVAL, **cuts, **model)), (9, 1, 14, 2, 12)
    tokens = torch.from_numpy(STREAM[20 : 20 + sum(lengths)].copy())
    tokens[10] = tokens[14] = EVAL.bos  # where a piece begins, and within it
    found = latents(model, tokens, lengths, isolated=True)
    for piece, own in zip(tokens.split(lengths), found.split(lengths)):
        assert_close(own, latents(model, piece, (len(piece),), isolated=False) if not cuts else
                     latents(model, piece, (len(piece),), isolated=True), rtol=1e-4, atol=1e-5)  # fmt: skip
    for isolated in (True, False):
        other = tokens.clone()
        other[8] = (other[8] + 1) % EVAL.bos
        same = latents(model, other, lengths, isolated) == latents(model, tokens, lengths, isolated)
        assert same[:8].all() and not same[8].all() and same[9:].all() == isolated


@both
@pytest.mark.parametrize("rows", (0, 8))
def test_filling_windows_up_to_whole_blocks_changes_nothing(rows, model):
    cfg = replace(EVAL, **model)
    model, windows = make_model(cfg), [*SOME_WINDOWS, t.Window(30, 90, 94), t.Window(5, 141, 149)]
    batch = t.lay_out(STREAM, windows, rows, EVAL.bos, CPU.device)
    assert batch.tokens.numel() == t.BLOCK * sum(w.blocks for w in windows) == 8 * t.BLOCK
    assert batch.window.tolist() == [0, 1, 2, 3, 4, 5, 5, 5]
    rotary = t.build_rotary(cfg, 1, len(batch.tokens), CPU.device)
    losses = t.window_losses(model.requires_grad_(False), batch, rotary)
    found = {int(place): loss.item() for place, loss in zip(batch.places, losses) if place}
    assert not losses[batch.places == 0].any()
    assert len(losses) == (rows * len(windows) if rows else sum(w.hi - w.first for w in windows))
    for window in windows:
        expected = nats_of_window(model, STREAM, window)
        own = [found.pop(place) for place in range(window.first + 1, window.hi + 1)]
        np.testing.assert_allclose(own, expected, atol=1e-5)
    assert not found


# ----------------------------------------------------------------------------------------------------------
# Command line

QUICK = ("--eval_context=48", "--eval_stride=8", "--eval_batch=256", "--eval_slots=3", "--lora_rank=2",
         "--lora_lr=0.01", "--sgd_chunk=64", "--sgd_lr=0.1", "--device=cpu")  # fmt: skip
ALL = "packed", "document", "stride", "ttt-sgd", "ttt-lora"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The last checkpoint of six steps of a small tiny track, and the folder that it is in."""
    root = tmp_path_factory.mktemp("trained")
    data = write_corpus(root / "data")
    with mock.patch.dict(t.TRACKS, tiny=replace(SMALL, vocab_size=0)):
        t.run([f"--data={data}", f"--log_folder={root / 'logs'}", f"--export={root / 'model.safetensors'}"])
    return checkpoint_of(root / "logs", 6), root


def only_folder(logs):
    (folder,) = logs.iterdir()
    return folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_time(rows):
    return [{key: value for key, value in row.items() if key not in ("seconds", "peak_mib")} for row in rows]


def validation_of(path):
    """The model of a checkpoint, as the flags in QUICK have it evaluated, and its validation."""
    cfg = t.parse_config([f"--checkpoint={path}", "--eval=stride", *QUICK])
    return t.load_model(str(path), cfg, CPU), t.Validation.load(cfg, t.load_tokenizer("bytes"))


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """A checkpoint evaluated in every way: (the run's folder, what it printed, the checkpoint as it was)."""
    logs, before = tmp_path_factory.mktemp("logs"), trained[0].read_bytes()
    printed = []
    with mock.patch.object(t.Log, "line", printing(t.Log.line, printed)):
        t.run([f"--checkpoint={trained[0]}", f"--eval={','.join(ALL)}", f"--log_folder={logs}", *QUICK])
    return only_folder(logs), "\n".join(printed), before


def printing(line, printed):
    def called(log, text, console=True):
        if console:
            printed.append(text)
        return line(log, text, console)

    return called


def test_evaluation_leaves_its_files_in_a_folder_of_its_own_and_the_checkpoint_as_it_is(trained, evaluated):
    folder, _, before = evaluated
    assert re.fullmatch(r"\d{8}-\d{6}-tiny-seed0-eval", folder.name)
    assert sorted(os.listdir(folder)) == ["gain.png", "log.txt", "metrics.jsonl", "train_gpt.py"]
    assert (folder / "gain.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert trained[0].read_bytes() == before


def test_packed_is_the_last_validation_of_training(trained, evaluated):
    last = rows_of(trained[0].parent)[-1]
    packed = rows_of(evaluated[0])[0]
    assert last["step"] == 6 and packed["method"] == "packed"
    assert (packed["loss"], packed["bpb"]) == pytest.approx((last["val_loss"], last["val_bpb"]), rel=1e-12)


def test_metrics_are_those_of_the_methods_by_themselves(trained, evaluated):
    model, val = validation_of(trained[0])
    rows, size = rows_of(evaluated[0]), int((val.tokens[1:] != SMALL.bos).sum())
    assert [row["method"] for row in rows] == [*ALL] and rows[0]["tokens"] == val.count
    for row in rows[1:]:
        nats = getattr(t.Evaluation(model, val.tokens.numpy(), t.World()), row["method"].replace("-", "_"))()
        assert row["tokens"] == size and row["loss"] == pytest.approx(nats.sum() / size, rel=1e-12)
        assert row["bpb"] == pytest.approx(nats.sum() / math.log(2) / size, rel=1e-12)
        assert row["seconds"] >= 0 and row["peak_mib"] > 0
    assert len({row["loss"] for row in rows}) == 5


def test_the_table_shows_the_metrics_and_the_gain_over_stride(evaluated):
    folder, printed, _ = evaluated
    rows, table = rows_of(folder), printed[printed.index("method  ") :].splitlines()[:6]
    assert table[0].split() == ["method", "tokens", "loss", "bpb", "gain", "seconds", "peak", "MiB"]
    for row, line in zip(rows, table[1:], strict=True):
        gain = "-" if row["method"] == "packed" else f"{rows[2]['loss'] - row['loss']:+.4f}"
        shown = row["method"], f"{row['tokens']:,}", f"{row['loss']:.4f}", f"{row['bpb']:.4f}", gain
        assert line.split() == [*shown, f"{row['seconds']:.1f}", f"{row['peak_mib']:,}"]
    assert f"plot: {folder / 'gain.png'}" in printed and f"log: {folder}" in printed
    assert set(printed.splitlines()) < set((folder / "log.txt").read_text().splitlines())


def test_a_table_without_stride_or_tokenizer_has_no_gain_or_bits():
    row = {"loss": 1.5, "bpb": None, "tokens": 1000, "seconds": 2.0, "peak_mib": 3}
    (line,) = t.evaluation_table({"document": row}).splitlines()[1:]
    assert line.split() == ["document", "1,000", "1.5000", "-", "-", "2.0", "3"]


def test_an_export_has_the_scores_of_its_checkpoint(trained, evaluated, cli, tmp_path):
    export = trained[1] / "model.safetensors"
    flags = f"--eval={','.join(ALL)}", f"--log_folder={tmp_path}", f"--data={trained[1] / 'data'}", *QUICK
    code, _, error = cli(f"--checkpoint={export}", *flags)
    assert (code, error) == (0, "")
    assert without_time(rows_of(only_folder(tmp_path))) == without_time(rows_of(evaluated[0]))


def test_every_third_document_is_what_eval_every_3_takes_and_says(trained, cli, tmp_path):
    code, out, error = cli(f"--checkpoint={trained[0]}", "--eval=stride", "--eval_every=3",
                           f"--log_folder={tmp_path}", *QUICK)  # fmt: skip
    assert (code, error) == (0, "")
    model, val = validation_of(trained[0])
    tokens = val.tokens.numpy()
    documents = t.find_documents(tokens, SMALL.bos)[::3]
    part = np.concatenate([tokens[lo:hi] for lo, hi in documents])
    nats = t.Evaluation(model, tokens, t.World()).stride()
    total = sum(nats[lo:hi].sum() for lo, hi in documents)
    (row,) = rows_of(only_folder(tmp_path))
    assert row["tokens"] == np.count_nonzero(part != SMALL.bos)
    assert row["loss"] == pytest.approx(total / row["tokens"], rel=1e-6)
    assert f"{len(documents)} documents, one in 3 of the validation's" in out
    assert f"tokens:{len(part) - 1} bytes:{row['tokens']} " in out


MISTAKES = {
    "no checkpoint": (["--eval=stride"], "--eval=stride", "--checkpoint="),
    "unknown method": (["{checkpoint}", "--eval=stride,strid"], "--eval=stride,strid", "ttt-lora"),
    "underscore in the name": (["{checkpoint}", "--eval=ttt_lora"], "--eval=ttt_lora", "ttt-lora"),
    "method twice": (["{checkpoint}", "--eval=stride,packed,stride"], "--eval=stride,packed,stride"),
    "comma too many": (["{checkpoint}", "--eval=stride,"], "--eval=stride,"),
    "unknown matrix": (["{checkpoint}", "--eval=ttt-lora", "--lora_matrices=q,w"], "=q,w", "down"),
    "matrix twice": (["{checkpoint}", "--eval=ttt-lora", "--lora_matrices=q,q"], "--lora_matrices=q,q"),
    "no matrix": (["{checkpoint}", "--eval=ttt-lora", "--lora_matrices="], "--lora_matrices="),
    "stride beyond context": (["{checkpoint}", "--eval=stride", "--eval_context=8", "--eval_stride=9"],
                              "--eval_stride=9", "--eval_context=8"),
    "stride 0": (["{checkpoint}", "--eval=stride", "--eval_stride=0"], "--eval_stride=0"),
    "rank 0": (["{checkpoint}", "--eval=ttt-lora", "--lora_rank=0"], "--lora_rank=0"),
    "no slots": (["{checkpoint}", "--eval=ttt-lora", "--eval_slots=0"], "--eval_slots=0"),
    "beta2 of 1": (["{checkpoint}", "--eval=ttt-lora", "--lora_beta2=1"], "--lora_beta2=1"),
    "momentum of 1": (["{checkpoint}", "--eval=ttt-sgd", "--sgd_momentum=1"], "--sgd_momentum=1"),
    "negative rate": (["{checkpoint}", "--eval=ttt-lora", "--lora_lr=-1"], "--lora_lr=-1"),
    "resume and its rate": (["{resume}", "--lora_lr=0.5"], "--lora_lr", "fixed by"),
    "resume and an evaluation": (["{resume}", "--eval=stride"], "--eval"),
    "another width": (["{checkpoint}", "--eval=stride", "--width=64"], "--width", "32"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line_and_leaves_no_log(trained, cli, tmp_path, mistake):
    argv, *words = MISTAKES[mistake]
    names = {"checkpoint": f"--checkpoint={trained[0]}", "resume": f"--resume={trained[0]}"}
    assert_refused(cli(*(arg.format(**names) for arg in argv), f"--log_folder={tmp_path / 'logs'}"), *words)
    assert not (tmp_path / "logs").exists()


def test_unknown_weights_and_more_tokens_than_there_are_get_one_line(trained, cli, tmp_path):
    flags = f"--checkpoint={trained[0]}", f"--log_folder={tmp_path}", *QUICK
    assert_refused(cli("--eval=ttt-sgd", "--sgd_weights=heads", *flags), "--sgd_weights=heads", "attn_bank")
    assert_refused(cli("--eval=stride", "--sample=The", *flags), "--eval", "--sample")
    assert_refused(cli("--eval=stride", "--val_tokens=1000000", *flags), "--val_tokens=1000000")


def test_the_warm_up_sees_no_token_of_the_validation_and_changes_no_result(trained, evaluated, cli, tmp_path,
                                                                           monkeypatch):  # fmt: skip
    forward, clock, events = t.GPT.forward, time.perf_counter, []
    monkeypatch.setattr(t.GPT, "forward", lambda *args: events.append(args[1].tolist()) or forward(*args))
    noted = {"perf_counter": lambda: events.append("clock") or clock()}
    monkeypatch.setattr(t, "time", SimpleNamespace(**vars(time) | noted))
    flags = f"--eval={','.join(ALL)}", f"--log_folder={tmp_path}", "--warmup=on", *QUICK
    assert cli(f"--checkpoint={trained[0]}", *flags)[::2] == (0, "")
    phases = [[]]
    for event in events:
        if event == "clock":
            phases.append([])
        else:
            phases[-1].append(event)
    assert len(phases) == 2 * len(ALL) + 1 and phases.pop() == []
    _, val = validation_of(trained[0])
    runs = runs_of_four(val.tokens.tolist())
    for warm_up, measured in zip(phases[::2], phases[1::2], strict=True):
        assert warm_up and not any(runs_of_four(tokens) & runs for tokens in warm_up)
        assert measured and all(runs_of_four(tokens) <= runs for tokens in measured)
    assert without_time(rows_of(only_folder(tmp_path))) == without_time(rows_of(evaluated[0]))


def runs_of_four(tokens):
    """Every four tokens one after the other within a document."""
    runs = zip(tokens, tokens[1:], tokens[2:], tokens[3:])
    return {run for run in runs if SMALL.bos not in run and len({*run}) > 1}


def test_synthetic_documents_are_as_long_as_those_that_evaluations_meet():
    for changes in ({}, {"eval_context": 2048, "eval_batch": 32_768, "sgd_chunk": 32_768}):
        cfg = replace(EVAL, **changes)
        tokens = t.synthetic_documents(cfg).tokens.numpy()
        lengths = [hi - lo for lo, hi in t.find_documents(tokens, cfg.bos)]
        assert len(tokens) >= 2 * cfg.eval_batch
        assert max(lengths) > cfg.eval_context and np.mean(lengths) > cfg.eval_context / 2


def plotted(tmp_path, monkeypatch, documents, gains):
    """By label, the points of gain.png."""
    from matplotlib.axes import Axes

    lines, plot = {}, Axes.plot

    def spy(axes, x, y, *args, **options):
        lines[options["label"]] = dict(zip(np.round(x, 3), y))
        return plot(axes, x, y, *args, **options)

    monkeypatch.setattr(Axes, "plot", spy)
    assert t.plot_gains(tmp_path, documents, gains) == str(tmp_path / "gain.png")
    return lines


def test_the_plot_shows_mean_gains_by_position_in_the_document(tmp_path, monkeypatch):
    documents = [(0, 9), (9, 14), (14, 15)]
    gain = np.array([0.0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 10, 20, 30, 40, 0])
    lines = plotted(tmp_path, monkeypatch, documents, {"stride": 0 * gain, "ttt-lora": gain})
    shown = lines["ttt-lora"]
    means = {1: 5.5, 2: 11, 2.828: 16.5, 4: (4 + 40 + 5) / 3, 5.657: 6.5, 8: 8}  # 4: positions 4, 4 and 5
    assert {x: shown[x] for x in means} == pytest.approx(means)
    assert not any(lines["stride"].values())


def test_the_plot_shows_no_gain_where_there_is_no_token(tmp_path, monkeypatch):
    shown = plotted(tmp_path, monkeypatch, [(0, 9)], {"ttt-lora": np.ones(9)})["ttt-lora"]
    assert all(value != 0 for value in shown.values())


# ----------------------------------------------------------------------------------------------------------
# Compilation


@both
def test_compiled_regions_give_the_same_scores_and_the_same_graphs_serve_all_batches(monkeypatch, model):
    """With dynamo's own backend, which makes the graphs and their guards but generates no code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    changes = {**model, "layers": EVAL.layers[:2], "backout_from": 0}
    cfg = replace(EVAL, **changes)
    compiled = t.build_model(cfg, CPU._replace(compile=True))
    compiled.load_state_dict(make_model(cfg).state_dict())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    for rest in ((2, 9), (30, 1, 20), (60, 60, 60, 60), (5, 6, 2, 2, 33)):
        tokens = stream(60, *rest)
        for method in ("stride", "ttt_lora"):
            found = getattr(t.Evaluation(compiled, tokens, t.World()), method)()
            expected = scores(method, tokens, **changes)
            np.testing.assert_allclose(found, expected, atol=1e-5)
        graphs.append(t.compilations())
    assert graphs[0] >= 10 and graphs == graphs[:1] * 4
    torch._dynamo.reset()


def test_the_shape_of_no_table_depends_on_the_documents():
    assert evaluation(STREAM).rotary.cos_PJ.shape == evaluation(BRIEF).rotary.cos_PJ.shape
