"""Tests of training: schedule, validation, warm-up, graphs, clock, checkpoint files."""

import itertools
import json
import math
import operator
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
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from small import BOS, CPU, SMALL, build_model, final_windows, random_tokens, train_gpt, write_corpus
from train_gpt import (
    TRACKS, GPT, Optimizer, Progress, UserError, Validation, World, build_rotary, cap,
    optimizer_table, plan_step, read_checkpoint,
)  # fmt: skip
from training import STEP_SAVERS, Runs, assert_equal, fork_ranks, metrics_of, randomise, run_main, weights_of

EVERYTHING = [*STEP_SAVERS, "--mtp_heads=1"]


# ------------------------------------------------------------------- schedule


def first_steps(cfg, column):
    """Steps at which a column of the plan changes."""
    values = [column(plan_step(cfg, step)) for step in range(cfg.total_steps)]
    return [step for step in range(1, cfg.total_steps) if values[step] != values[step - 1]]


@pytest.mark.parametrize("scheduled", [3, 10, 100, 200, 301, 2070, 2071])
def test_batch_windows_and_learning_rate_change_at_the_same_step(scheduled):
    cfg = replace(TRACKS["short"], scheduled_steps=scheduled, cooldown=0.0)
    thirds = [math.ceil(Fraction(k, 3) * scheduled) for k in (1, 2)]
    assert first_steps(cfg, lambda plan: plan.stage.batch_tokens) == thirds
    assert first_steps(cfg, lambda plan: plan.windows) == [*thirds, scheduled]
    assert first_steps(cfg, lambda plan: plan.lr) == [*thirds, scheduled]
    assert first_steps(cfg, lambda plan: len(plan.weights)) == thirds
    ends = [thirds[1], math.ceil(Fraction(93, 100) * scheduled)]
    assert first_steps(cfg, lambda plan: plan.stage.columns) == ends


@pytest.mark.parametrize("scheduled", [12, 100, 108, 200, 204, 240, 4700, 4800])
def test_stages_of_the_medium_track_start_at_twelfths(scheduled):
    cfg = replace(TRACKS["medium"], scheduled_steps=scheduled)
    twelfths = [math.ceil(Fraction(k * scheduled, 12)) for k in range(1, 9)]
    assert first_steps(cfg, lambda plan: plan.stage_index) == twelfths


# track, step, batch, (short, long) window, learning-rate multiplier, momentum, weights of the targets
PLAN = [
    ("race300", 0, 131_072, (128, 384), 1.0, 0.85, (1, 0.5, 0.25)),
    ("race300", 96, 131_072, (128, 384), 1.0, 0.85 + 0.1 * 96 / 300, (1, 0.5, 0.25 / 97)),
    ("race300", 97, 262_144, (384, 896), 1.52, 0.85 + 0.1 * 97 / 300, (1, 0.5)),
    ("race300", 193, 262_144, (384, 896), 0.3 + 1.22 * 97 / 174, 0.85 + 0.1 * 193 / 300, (1, 0.5 / 97)),
    ("race300", 194, 393_216, (640, 1408), 0.3 + 1.43 * 96 / 174, 0.85 + 0.1 * 194 / 300, (1,)),
    ("race300", 289, 393_216, (640, 1408), 0.3 + 1.43 / 174, 0.872, (1,)),
    ("race300", 290, 393_216, (768, 1664), 0.3, 0.87, (1,)),
    ("race300", 299, 393_216, (768, 1664), 0.3, 0.852, (1,)),
    ("short", 0, 131_072, (128, 384), 1.0, 0.85, (1, 0.5, 0.25)),
    ("short", 150, 131_072, (128, 384), 1.0, 0.9, (1, 0.5, 0.25 * (1 - 150 / 690))),
    ("short", 689, 131_072, (128, 384), 1.0, 0.95, (1, 0.5, 0.25 / 690)),
    ("short", 690, 262_144, (384, 896), 1.52, 0.95, (1, 0.5)),
    ("short", 931, 262_144, (384, 896), 0.3 + 1.22 * 1139 / 1242, 0.95, (1, 0.5 * (1 - 241 / 690))),
    ("short", 1380, 393_216, (640, 1408), 0.3 + 1.43 * 690 / 1242, 0.95, (1,)),
    ("short", 2060, 393_216, (640, 1408), 0.3 + 1.43 * 10 / 1242, 0.95, (1,)),
    ("short", 2070, 393_216, (768, 1664), 0.3, 0.93, (1,)),
    ("short", 2109, 393_216, (768, 1664), 0.3, 0.852, (1,)),
]


@pytest.mark.parametrize("track, step, batch, windows, lr, momentum, weights", PLAN, ids=lambda v: str(v)[:9])
def test_plan_of_a_step(track, step, batch, windows, lr, momentum, weights):
    plan = plan_step(TRACKS[track], step)
    assert (plan.stage.batch_tokens, plan.windows) == (batch, {"short": windows[0], "long": windows[1]})
    assert plan.stage is TRACKS[track].stages[plan.stage_index]
    assert (plan.lr, plan.momentum) == (pytest.approx(lr), pytest.approx(momentum))
    assert plan.weights == pytest.approx(weights)


def test_race300_is_the_short_track_in_fewer_steps():
    race300, short = vars(TRACKS["race300"]), vars(TRACKS["short"])
    assert {name for name, value in race300.items() if value != short[name]} == {
        "track", "scheduled_steps", "extension_steps", "val_tokens", "val_every"}  # fmt: skip


def test_plan_is_a_pure_function():
    cfg = TRACKS["race300"]
    forwards = [plan_step(cfg, step) for step in range(cfg.total_steps)]
    backwards = [plan_step(replace(cfg), step) for step in reversed(range(cfg.total_steps))]
    assert forwards == backwards[::-1]


def test_in_the_tiny_track_only_the_next_token_counts():
    cfg = TRACKS["tiny"]
    assert {plan_step(cfg, step).weights for step in range(cfg.total_steps)} == {(1.0,)}


def test_without_cooldown_and_extension_the_last_stage_runs_to_the_end():
    cfg = replace(TRACKS["tiny"], cooldown=0.0, scheduled_steps=7)
    assert [plan_step(cfg, step).stage_index for step in range(8)] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert plan_step(cfg, 6).lr == cfg.stages[-1].lr


# ----------------------------------------------------------------- validation


def whole_and_final(cfg, count):
    return final_windows(cfg), build_rotary(cfg, count, torch.device("cpu"))


def nats_by_hand(model, cfg, tokens):
    """Summed cross entropy of tokens[1:], chunk by chunk and one token at a time, in float64."""
    nats = 0.0
    for lo in range(0, len(tokens) - 1, cfg.val_chunk):
        chunk = torch.tensor(tokens[lo : lo + cfg.val_chunk + 1].astype(np.int64))
        bounds = sorted({0, *np.flatnonzero(chunk[:-1].numpy() == BOS), len(chunk) - 1})
        docs = train_gpt.Documents(torch.tensor(bounds, dtype=torch.int32), int(np.diff(bounds).max()))
        latents = model(chunk[:-1], docs, *whole_and_final(cfg, cfg.val_chunk))
        logp = F.log_softmax(cap(model.products(latents)).double(), -1)
        nats -= sum(logp[t, chunk[t + 1]].item() for t in range(len(chunk) - 1))
    return nats


@pytest.mark.parametrize("val_chunk, loss_chunk", [(100, 48), (64, 64), (10_000, 7)])
def test_validation_loss_and_bits_per_byte_by_hand(monkeypatch, val_chunk, loss_chunk):
    monkeypatch.setattr(train_gpt, "LOSS_CHUNK", loss_chunk)
    cfg = replace(SMALL, val_chunk=val_chunk)
    tokens = random_tokens(np.random.default_rng(0), 700).astype(np.uint16)
    sizes = np.arange(BOS + 1, dtype=np.int32) % 5  # of tokens' texts
    model = randomise(GPT(cfg))
    val = Validation(cfg, tokens, sizes)
    result = val.run(model, *whole_and_final(cfg, min(val_chunk, val.count)), World())
    nats = nats_by_hand(model, cfg, tokens)
    assert result["val_loss"] == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)
    assert result["val_bpb"] == pytest.approx(nats / math.log(2) / sizes[tokens[1:]].sum(), rel=1e-5)


def test_without_sizes_of_tokens_there_is_a_loss_but_no_bits_per_byte():
    val = Validation(SMALL, random_tokens(np.random.default_rng(0), 200).astype(np.uint16))
    result = val.run(randomise(GPT(SMALL)), *whole_and_final(SMALL, 100), World())
    assert result["val_bpb"] is None and math.isfinite(result["val_loss"])


class Apart(World):
    """A rank that hears nothing of the others."""

    def all_reduce(self, x):
        return x


@pytest.mark.parametrize("size", [2, 3, 8, 16])
def test_chunks_of_the_validation_are_shared_out(size):
    val = Validation(SMALL, random_tokens(np.random.default_rng(1), 730).astype(np.uint16))
    run = partial(val.run, randomise(GPT(SMALL)), *whole_and_final(SMALL, 100))
    parts = [run(Apart(rank, size))["val_loss"] for rank in range(size)]
    assert sum(parts) == pytest.approx(run(World())["val_loss"], rel=1e-12)
    assert sum(part > 0 for part in parts) == min(size, 8)


def validation_loss(model):
    tokens = random_tokens(np.random.default_rng(0), 200).astype(np.uint16)
    return Validation(SMALL, tokens).run(model, *whole_and_final(SMALL, 100), World())["val_loss"]


def trained(model):
    """The loss of a step and the weights after it."""
    tokens = torch.from_numpy(random_tokens(np.random.default_rng(0), 65)[:65])
    batch = train_gpt.MicroBatch(tokens, train_gpt.to_documents(np.flatnonzero(tokens[:-1] == BOS), 64))
    rotary, optimizer = whole_and_final(SMALL, 64)[1], Optimizer(model, optimizer_table(SMALL), World())
    loss = train_gpt.train_step(model, optimizer, [batch], plan_step(SMALL, 1), rotary, 1)
    return loss["train_loss"].item(), *(p.tolist() for p in model.parameters())


@pytest.mark.parametrize("use", [validation_loss, trained])
def test_changed_weights_of_a_bfloat16_model_are_used_at_once(use):
    model, fresh = (randomise(GPT(SMALL, torch.bfloat16), seed) for seed in (0, 1))
    before, expected = use(model), use(fresh)
    randomise(model, 1)
    assert use(model) == expected != before


# ---------------------------------------------------------- runs of six steps


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def runs(monkeypatch, corpus, tmp_path):
    return Runs(monkeypatch, corpus, tmp_path)


def test_the_last_weights_are_averaged_into_the_final_ones(runs):
    plain, averaged = runs(), runs("--average=0.9")
    assert averaged.losses == plain.losses and averaged.validations[:-1] == plain.validations[:-1]
    assert averaged.validations[-1] != plain.validations[-1]


def test_a_slow_momentum_is_mixed_in_from_its_step_on(runs):
    plain, mixed = runs(), runs("--slow_momentum=0.5")  # of 6 steps
    assert mixed.losses[:4] == plain.losses[:4]  # the update of step 3 is the first that it changes
    assert all(map(operator.ne, mixed.losses[4:], plain.losses[4:])) and len(mixed.losses) == 6


def test_windows_of_validation_are_those_of_the_step_and_at_the_end_the_final_ones(runs, monkeypatch):
    seen, validate = [], Validation.run
    monkeypatch.setattr(Validation, "run", lambda *args: seen.append(args[2]) or validate(*args))
    runs("--val_every=2")
    assert seen == [*(plan_step(SMALL, step).windows for step in (0, 2, 4)), {"short": 16, "long": 64}]


def test_first_training_loss_is_that_of_a_uniform_guess_over_the_targets_there_are(runs):
    """Of 64 tokens in a micro-batch the last one has no second target and the last two no third."""
    share = (1 + 0.5 * 63 / 64 + 0.25 * 62 / 64) / 1.75
    assert metrics_of(runs().folder, "train_loss")[0] == (1, pytest.approx(share * math.log(384), abs=2e-5))


def test_initial_weights_depend_on_the_seed_alone():
    cfg = replace(SMALL, value_std=0.01, seed=3)
    torch.manual_seed(0)
    expected = weights_of(build_model(cfg, CPU))
    torch.manual_seed(1)
    torch.randn(5)
    model = train_gpt.new_model(cfg, CPU)
    assert not any(p.any() for p in model.parameters())
    randomise(model).initialise(train_gpt.draw_weights(cfg))
    assert_equal(weights_of(model), expected)
    model.initialise(train_gpt.draw_weights(replace(cfg, seed=4)))
    drawn = {"embed", "value_embeds", "attn_bank", "mlp_bank"}
    assert {name for name, p in weights_of(model).items() if not torch.equal(p, expected[name])} == drawn


# ------------------------------------------------------------------- warm-up

def warm_up_first(monkeypatch):
    """Have runs begin as those on a GPU do."""
    set_up, moved = train_gpt.set_up, []

    def set_up_and_warm_up(cfg, hardware, world):
        job = set_up(cfg, hardware, world)
        before = weights_of(randomise(job.model))  # those of a new model are 0, and then all gradients are
        train_gpt.warm_up(job.model, job.optimizer, job.val, world)
        moved.append(not any(torch.equal(p, before[name]) for name, p in job.model.named_parameters()))
        return job

    monkeypatch.setattr(train_gpt, "set_up", set_up_and_warm_up)
    return moved


def test_warm_up_leaves_no_trace(runs, monkeypatch):
    cold = runs("--save_every=3", *EVERYTHING)
    moved = warm_up_first(monkeypatch)
    warm = runs("--save_every=3", *EVERYTHING)
    resumed = runs(f"--resume={warm.saved[0]}")
    assert moved == [True, True]
    assert warm.losses[-6:] == cold.losses and warm.validations[-3:] == cold.validations
    assert resumed.losses[-3:] == cold.losses[3:]
    for run in (warm, resumed):
        assert_equal(read_checkpoint(run.saved[-1], True)[0], read_checkpoint(cold.saved[-1], True)[0])


def test_warm_up_runs_each_kind_of_step_and_reset_clears_what_it_left():
    cfg = replace(SMALL, untie_at=0.5, mtp_heads=1)
    model = build_model(cfg, CPU)
    optimizer = Optimizer(model, optimizer_table(cfg), World())
    stages, step = [], optimizer.step
    optimizer.step = lambda *args: stages.append(model.embed.grad.any().item()) or step(*args)
    tokens = random_tokens(np.random.default_rng(0), 300).astype(np.uint16)
    train_gpt.warm_up(model, optimizer, Validation(cfg, tokens), World())
    kinds = {plan_step(cfg, step).kind for step in range(cfg.total_steps)}
    assert len(stages) == train_gpt.ADAM_EVERY * len(kinds) and all(stages)
    assert all(moment.any() for part in optimizer.parts for moment in part.moments.values())
    model.initialise(train_gpt.draw_weights(cfg))
    optimizer.reset()
    assert_equal(weights_of(model), weights_of(build_model(cfg, CPU)))
    assert not any(moment.any() for part in optimizer.parts for moment in part.moments.values())
    assert not any(p.grad.any() for p in model.parameters())


def compile_as_rank(rank, folder, data):
    """With dynamo's own backend, which makes the graphs and their guards but generates no code."""
    train_gpt.TRACKS["tiny"] = SMALL
    train_gpt.choose_hardware = lambda cfg, world: CPU._replace(compile=True)
    compile, warm_up, graphs = torch.compile, train_gpt.warm_up, torch._dynamo.utils.counters["stats"]
    torch.compile = partial(compile, backend="eager")

    def warm_up_and_count(*args):
        warm_up(*args)
        (folder / "before").write_text(str(graphs["unique_graphs"]))

    train_gpt.warm_up = warm_up_and_count
    flags = *EVERYTHING, "--bigram_ratio=1.5", "--untie_at=0.5"
    run_main(f"--data={data}", f"--log_folder={folder / 'logs'}", *flags)
    (folder / "after").write_text(str(graphs["unique_graphs"]))


def test_after_the_warm_up_nothing_is_compiled(corpus, tmp_path):
    codes, errors = fork_ranks(1, tmp_path, compile_as_rank, corpus)
    assert codes == [0], errors
    before, after = (int((tmp_path / name).read_text()) for name in ("before", "after"))
    assert before == after > 20


# --------------------------------------------------------------------- graphs


class Recorder(TorchDispatchMode):
    """In the place of a CUDA graph and of its recording: notes operations, which a replay repeats.

    As on a GPU, what they read and wrote stays where it was, and recording changes nothing.
    """

    events = []  # of all recorders

    def __init__(self):
        super().__init__()
        self.operations, self.before = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        arguments, given = function._schema.arguments, [*args, *(kwargs or {}).values()]
        written = [x for x, argument in zip(given, arguments) if argument.is_write]
        for x in written:
            storage = x.untyped_storage()
            self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = function(*args, **(kwargs or {}))
        new = not any(result.alias_info for result in function._schema.returns)
        if new or written:  # else it is a view
            self.operations.append((function, args, kwargs or {}, out if new else None))
        return out

    def __enter__(self):
        self.events.append("capture")
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        for storage, content in self.before.values():
            storage.copy_(content)

    @torch.no_grad()
    def replay(self):
        self.events.append("replay")
        for function, args, kwargs, out in self.operations:
            again = function(*args, **kwargs)
            for x, value in zip(tree_leaves(out), tree_leaves(again)):
                if isinstance(x, torch.Tensor):
                    x.copy_(value)


@pytest.fixture
def graphs(monkeypatch, runs):
    """From its call on, runs have graphs, and warm up; returns what happens in turn."""

    def on_cpu(x, *args, **kwargs):
        return to(x, *("cpu" if value == "cuda" else value for value in args), **kwargs)

    def note_and_validate(*args):
        Recorder.events.append("validate")
        return validate(*args)

    def replace_all():
        for name, stand_in in {
            "CUDAGraph": Recorder, "graph": lambda graph, **options: graph, "graph_pool_handle": lambda: None,
            "empty_cache": lambda: Recorder.events.append("release"),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch.Tensor, "to", on_cpu)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
        monkeypatch.setattr(Validation, "run", note_and_validate)
        runs.hardware = runs.hardware._replace(graphs=True)
        warm_up_first(monkeypatch)
        Recorder.events.clear()
        return Recorder.events

    to, validate = torch.Tensor.to, Validation.run
    return replace_all


def test_training_with_graphs_is_training_without_bit_for_bit(runs, graphs, monkeypatch):
    """In bfloat16, where products read copies of the weights, as they do on every GPU that has graphs."""
    monkeypatch.setattr(train_gpt, "KEEP_CHECKPOINTS", 9)
    monkeypatch.setattr(train_gpt, "ADAM_EVERY", 3)
    runs.hardware = CPU._replace(dtype=torch.bfloat16)
    plain = runs("--val_every=2", "--save_every=1", *EVERYTHING)
    events = graphs()
    whole = runs("--val_every=2", "--save_every=1", *EVERYTHING)
    capture, step, check = ["capture"] * 3, ["replay"] * SMALL.micro_batches, ["release", "validate"]
    warm_up, to_validation = ["validate"], [*capture, *step, *step]
    to_save = [*capture, *step, "release"]  # each step's checkpoint, too, is given the memory
    assert events == warm_up + (check + to_save + [*capture, *step]) * 3 + check
    events.clear()
    resumed = runs(f"--resume={whole.saved[0]}", "--save_every=0")
    assert events == [*warm_up, "release", *capture, *step] + (check + to_validation) * 2 + check
    for run, steps in ((whole, 6), (resumed, 5)):
        assert run.losses[-steps:] == plain.losses[-steps:]
        assert run.validations[-3:] == plain.validations[-3:]
        assert_equal(weights_of(run.model), weights_of(plain.model))


def test_micro_batch_with_more_documents_than_a_graph_holds_runs_plainly(runs, graphs, monkeypatch):
    """Each of 64 tokens: 63 documents are fewer than 64 and their end."""
    counts = iter([1, 63, 64, 2])

    def pack_letters(stream, step):
        tokens = SMALL.micro_tokens(plan_step(stream.cfg, step).stage)
        starts = np.arange(next(counts, 3))
        letters = np.full(tokens + 1, 97, np.uint16)
        letters[starts] = BOS
        return letters, starts

    monkeypatch.setattr(train_gpt, "pack", pack_letters)
    flags = "--scheduled_steps=1", "--save_every=-1"
    plain, counts = runs(*flags), iter([1, 63, 64, 2])
    events = graphs()
    replayed = runs(*flags)
    assert events.count("replay") == 3
    assert replayed.losses[-1:] == plain.losses
    assert_equal(weights_of(replayed.model), weights_of(plain.model))


def test_micro_batch_with_more_targets_than_columns_has_all_and_no_graph(runs, graphs, monkeypatch):
    """If all have, the stage's columns change nothing."""

    def pack_letters(stream, step):
        tokens = SMALL.micro_tokens(plan_step(stream.cfg, step).stage)
        letters = 97 + np.arange(tokens + 1, dtype=np.uint16) % next(counts)
        letters[0] = BOS
        return letters, np.zeros(1, np.int64)

    def train(columns, letters):
        nonlocal counts
        counts = itertools.cycle(letters)
        stages = tuple(stage._replace(columns=columns) for stage in SMALL.stages)
        monkeypatch.setitem(TRACKS, "tiny", replace(SMALL, stages=stages))
        run = runs("--scheduled_steps=2", "--save_every=-1")
        return run.losses[-2:], weights_of(run.model)

    counts = None
    monkeypatch.setattr(train_gpt, "pack", pack_letters)
    none, mixed, overfull = train(0, [20]), train(16, [5, 20, 16, 17]), train(16, [20])
    assert none[0] == overfull[0]
    assert_equal(none[1], overfull[1])
    events = graphs()
    replayed = train(16, [5, 20, 16, 17])
    assert events.count("replay") == 4
    assert replayed[0] == mixed[0]
    assert_equal(replayed[1], mixed[1])


def test_a_configuration_from_before_the_stage_table_had_columns_is_read():
    old = json.loads(json.dumps(vars(SMALL)))
    old["stages"] = [row[:7] for row in old["stages"]]
    stages = tuple(stage._replace(columns=0) for stage in SMALL.stages)
    assert train_gpt.config_from_json(old) == replace(SMALL, stages=stages)


# ---------------------------------------------------------------------- clock


class Time:
    """A clock that only moves when told to."""

    def __init__(self, monkeypatch):
        self.now, self.slowed, self.monkeypatch = 1000.0, set(), monkeypatch
        monkeypatch.setattr(train_gpt, "time", types.SimpleNamespace(
            perf_counter=lambda: self.now, time=lambda: self.now, strftime=lambda form: "now"))  # fmt: skip

    def slow(self, owner, name, seconds):
        function = getattr(owner, name)

        def slowed(*args, **keywords):
            self.now += seconds
            self.slowed.add(name)
            return function(*args, **keywords)

        self.monkeypatch.setattr(owner, name, slowed)


UNTIMED = (Validation, "run"), (train_gpt, "save_checkpoint"), (train_gpt, "new_model"), \
    (train_gpt, "warm_up"), (Optimizer, "__init__")
TIMED = {(train_gpt, "train_step"): 100, (train_gpt, "backward_micro_batch"): 1, (Optimizer, "step"): 0.1}


def test_clock_runs_in_training_and_only_there(runs, monkeypatch):
    """What is slow shows in a digit of its own, where it is timed: 1 of 4 micro-batches as 4."""
    time, read_ahead = Time(monkeypatch), train_gpt.read_ahead

    def slow_read_ahead(batches):
        take = read_ahead(batches)

        def slow_take():
            time.now += 1000
            return take()

        return slow_take

    monkeypatch.setattr(train_gpt, "read_ahead", slow_read_ahead)
    for owner, name in UNTIMED:
        time.slow(owner, name, 1e6)
    for (owner, name), seconds in TIMED.items():
        time.slow(owner, name, seconds)
    warm_up_first(monkeypatch)
    folder = runs("--save_every=2", "--val_every=2").folder
    assert time.slowed == {name for _, name in (*UNTIMED, *TIMED)}
    rows = [step for step in range(7) for _ in range((step > 0) + (step % 2 == 0))]  # steps and validations
    assert metrics_of(folder, "train_time") == [(step, pytest.approx(step * 1104.1)) for step in rows]


def test_clock_that_is_resumed_while_it_runs_loses_nothing(monkeypatch):
    time, clock = Time(monkeypatch), train_gpt.Clock(CPU, 5.0)
    for act in (clock.resume, clock.resume, clock.pause):
        act()
        time.now += 2
    assert clock.read() == 9.0


def test_clock_goes_on_from_the_checkpoint(runs, monkeypatch):
    Time(monkeypatch).slow(Optimizer, "step", 1)
    begun = runs("--save_every=4")
    resumed = runs(f"--resume={begun.saved[0]}")
    assert metrics_of(resumed.folder, "train_time")[0] == (5, 5)
    assert "the clock goes on from 4.0 s" in resumed.log


def test_share_of_the_peak_is_that_of_the_products_with_weights():
    model, gpu = GPT(SMALL), types.SimpleNamespace(name="NVIDIA H100 80GB HBM3")
    job = types.SimpleNamespace(model=model, hardware=gpu, world=World(0, 2))
    metrics = train_gpt.step_metrics(job, tokens=10**12, seconds=2.0)
    products = 384 * 32 + 2 * 4 * 32 * 32 + 3 * 2 * 128 * 32  # head, attention, MLPs
    share = 6 * products * 5e11 / (2 * 989e12)
    assert metrics == {"tokens_per_s": 500_000_000_000, "mfu": pytest.approx(share, abs=1e-4)}


# ----------------------------------------------------------------- checkpoint


@pytest.mark.parametrize("every, kept, steps", [(-1, 9, []), (0, 9, [6]), (2, 9, [2, 4, 6]), (4, 9, [4, 6]),
                                                (1, 2, [5, 6]), (1, 4, [3, 4, 5, 6])])  # fmt: skip
def test_checkpoints_are_written_when_asked_for_and_the_last_ones_kept(runs, monkeypatch, every, kept, steps):
    monkeypatch.setattr(train_gpt, "KEEP_CHECKPOINTS", kept)
    folder = runs(f"--save_every={every}").folder
    expected = [f"checkpoint_{step:06d}.safetensors" for step in steps]
    assert sorted(path.name for path in folder.glob("*safetensors*")) == expected


def small_checkpoint(folder, cfg=SMALL, seed=0):
    """Of two steps. Returns its file and why it wasn't written, if so."""
    folder.mkdir(exist_ok=True)
    model = randomise(GPT(cfg), seed)
    optimizer = Optimizer(model, optimizer_table(cfg), World())
    failed = train_gpt.save_checkpoint(folder, model, optimizer, World(), Progress(2, (0, 0), 1.0))
    return folder / "checkpoint_000002.safetensors", failed


def test_interrupted_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path, failed = small_checkpoint(tmp_path)
    assert failed == ""
    before = path.read_bytes()

    def fail_halfway(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(before[: len(before) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail_halfway)
    assert "checkpoint of step 2 not written: " in small_checkpoint(tmp_path, seed=1)[1]
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_a_checkpoint_is_for_whom_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        path, _ = small_checkpoint(tmp_path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


def test_a_checkpoint_is_on_the_disk_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    path, _ = small_checkpoint(tmp_path)
    before, seen = path.read_bytes(), []
    monkeypatch.setattr(train_gpt.os, "fsync", lambda file: seen.append(path.read_bytes()))
    small_checkpoint(tmp_path, seed=1)
    assert seen[0] == before != path.read_bytes()


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


def write_nothing(path, bomb):
    path.write_bytes(b"")


def write_huge_header(path, bomb):
    path.write_bytes(b"\xff" * 8 + b"{}")


def write_foreign(path, bomb):
    save_file({"model.embed": torch.zeros(2)}, path, {"config": json.dumps("pt")})


def write_plain_metadata(path, bomb):
    save_file({"model.embed": torch.zeros(2)}, path, {"format": "pt"})


def write_without_metadata(path, bomb):
    save_file({"model.embed": torch.zeros(2)}, path)


def write_half(path, bomb):
    small, _ = small_checkpoint(path.parent)
    path.write_bytes(small.read_bytes()[:-1000])


def write_config_of_another_version(path, bomb):
    small, _ = small_checkpoint(path.parent)
    with safe_open(small, "pt") as file:
        meta = file.metadata()
    config = json.loads(meta["config"]) | {"sliding_window": 128}
    save_file({"model.embed": torch.zeros(2)}, path, meta | {"config": json.dumps(config)})


@pytest.mark.parametrize("write", [
    write_pickle, write_torch, write_noise, write_nothing, write_huge_header, write_foreign,
    write_plain_metadata, write_without_metadata, write_half, write_config_of_another_version])  # fmt: skip
def test_file_that_is_no_checkpoint_is_refused_and_never_unpickled(tmp_path, write):
    path, triggered = tmp_path / "file", tmp_path / "triggered"
    write(path, Bomb(triggered))
    with pytest.raises(UserError) as caught:
        train_gpt.parse_config([f"--resume={path}"])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not triggered.exists()


@pytest.mark.parametrize("name", ["model.mlp_bank", "optimizer.head.second", "optimizer.attn_bank.momentum"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_neither_saved_nor_gone_on_from(runs, tmp_path, monkeypatch, name, value):
    path, _ = small_checkpoint(tmp_path / "run", replace(SMALL, data=str(runs.data)))
    with safe_open(path, "pt") as file:
        tensors, meta = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    tensors[name].view(-1)[-1] = value
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"{path.name}: not finite: {name};"):
        train_gpt.write_checkpoint(path, tensors, meta)
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]
    save_file(tensors, path, meta)
    with pytest.raises(UserError, match=f"{path}: not finite: {name};"):
        runs(f"--resume={path}")
    assert not [*tmp_path.glob("logs*")]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite_is_no_result(runs, tmp_path, monkeypatch, loss):
    monkeypatch.setattr(Validation, "run", lambda *args: {"val_loss": loss, "val_bpb": loss})
    with pytest.raises(UserError, match=f"step 0: the validation loss is {loss}"):
        runs()
    (log,) = tmp_path.glob("logs*/*/log.txt")
    assert "val_loss" not in log.read_text().partition("untimed")[2]
    assert (log.parent / "metrics.jsonl").read_text() == ""


def test_export_is_refused_as_it_has_no_optimizer_state(runs, tmp_path):
    path = tmp_path / "export.safetensors"
    cfg = replace(SMALL, data=str(runs.data))
    tensors = {f"model.{name}": p for name, p in GPT(cfg).named_parameters()}
    train_gpt.write_checkpoint(path, tensors, {"config": vars(cfg)})
    with pytest.raises(UserError, match="export"):
        runs(f"--resume={path}")
    assert not [*tmp_path.glob("logs*")]


@pytest.mark.parametrize("change, words", [
    (lambda t: t.update({"model.head": torch.zeros(383, 32)}), "head"),
    (lambda t: t.pop("model.attn_bank"), "attn_bank"),
    (lambda t: t.update({"model.extra": torch.zeros(2)}), "extra"),
    (lambda t: t.pop("optimizer.attn_bank.momentum"), "attn_bank.momentum"),
    (lambda t: t.update({"optimizer.head.first": torch.zeros(5)}), "another version"),
], ids=["shape", "missing", "unknown", "moment_missing", "moments_shape"])  # fmt: skip
def test_checkpoint_that_does_not_fit_the_model_is_refused(runs, tmp_path, change, words):
    path, _ = small_checkpoint(tmp_path / "run", replace(SMALL, data=str(runs.data)))
    with safe_open(path, "pt") as file:
        tensors, meta = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    change(tensors)
    save_file(tensors, path, meta)
    with pytest.raises(UserError, match=words):
        runs(f"--resume={path}")
    assert not [*tmp_path.glob("logs*")]
