"""Tests of the trainer's data: shards, document streams, batches of ranks, and what the schedule needs."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from small import BOS, SMALL, random_tokens, write_shard, write_split
from train_gpt import (
    DocumentStream, Progress, Shards, Stage, UserError, Validation, World, begin_stream, check_config,
    check_supply, choose_columns, find_shards, load_batches, pack, plan_step, read_ahead,
)  # fmt: skip


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
        for own, *_ in load_batches(DocumentStream(shards, cfg), world, torch.device("cpu")):
            out += [plain(batch) for batch in own]
    except UserError as error:
        assert "training tokens" in str(error)
        complete = False
    return out, complete


@pytest.mark.parametrize("rest", ["skip", "keep"])
def test_pack_gives_exactly_n_plus_one_tokens_of_documents_cut_at_the_maximum(tmp_path, rest):
    cfg = data_config(document_rest=rest, stages=(Stage(0, 2 * 64, 24, 8, 8, 1.0),))
    shards = shards_of(tmp_path, cfg, [random_tokens(np.random.default_rng(0), 6000)])
    stream = DocumentStream(shards, cfg)
    for _ in range(25):
        tokens, starts = pack(stream, 0)
        assert len(tokens) == 65 and tokens.dtype == np.uint16
        assert starts[0] == 0 and starts[-1] < 64
        assert np.diff([*starts, 64]).max() <= 24
        bos = np.flatnonzero(tokens[:64] == BOS)
        assert set(bos) <= set(starts)
        if rest == "skip":
            assert bos.tolist() == starts.tolist()


def next_piece(stream, limit):
    return stream.piece(limit).tolist()


def test_a_document_cut_by_the_maximum_is_skipped_or_kept(tmp_path):
    tokens = np.array([BOS, 1, 2, 3, 4, 5, 6, BOS, 7, 8, 9, BOS])
    first = {}
    for rest in ("skip", "keep"):
        cfg = data_config(document_rest=rest)
        stream = DocumentStream(shards_of(tmp_path / rest, cfg, [tokens]), cfg)
        first[rest] = [next_piece(stream, 3) for _ in range(3)]
    assert first == {"skip": [[BOS, 1, 2], [BOS, 7, 8], [BOS]], "keep": [[BOS, 1, 2], [3, 4, 5], [6]]}


def test_a_piece_that_begins_with_the_last_target_starts_no_document(tmp_path):
    cfg = data_config(stages=(Stage(0, 2 * 4, 8, 8, 8, 1.0),))
    stream = DocumentStream(shards_of(tmp_path, cfg, [np.array([BOS, 1, 2, 3, BOS, 1, 2, 3])]), cfg)
    tokens, starts = pack(stream, 0)
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
@pytest.mark.parametrize("parts", [2, 6])
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
    with pytest.raises(UserError, match="2 epochs"):
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


@pytest.mark.parametrize("size, fits", [(1, True), (2, True), (3, False), (4, True), (6, False), (8, True)])
def test_a_world_that_does_not_divide_the_micro_batches_is_refused(tmp_path, size, fits):
    cfg = data_config(micro_batches=8, scheduled_steps=2)
    shards = shards_of(tmp_path, cfg, [random_tokens(np.random.default_rng(2), 4000)])
    if fits:
        check_supply(cfg, World(0, size), shards)
    else:
        with pytest.raises(UserError, match=f"{size} processes.*micro.batches"):
            check_supply(cfg, World(0, size), shards)


@pytest.mark.parametrize("rest", ["skip", "keep"])
def test_restart_at_any_step_gives_the_same_continuation(tmp_path, rest):
    cfg = data_config(document_rest=rest, epochs=3)
    shards = shards_of(tmp_path, cfg, np.split(random_tokens(np.random.default_rng(3), 1500), [401, 777]))
    device = torch.device("cpu")
    whole = list(load_batches(DocumentStream(shards, cfg), World(), device))
    assert len(whole) == 20 and whole[-1][1][0] >= 1
    for step in range(1, 20):
        stream = begin_stream(cfg, shards, Progress(step, read=whole[step - 1][2]))
        rest_of_run = list(load_batches(stream, World(), device, step))
        assert [rest for _, *rest in rest_of_run] == [rest for _, *rest in whole[step:]]
        for (found, *_), (expected, *_) in zip(rest_of_run, whole[step:]):
            assert list(map(plain, found)) == list(map(plain, expected))
    with pytest.raises(UserError, match="other training tokens"):
        begin_stream(cfg, shards, Progress(2, read=whole[2][2]))


def test_columns_hold_all_targets_and_walk_through_the_vocabulary_the_same_at_every_world_size(tmp_path):
    """They also do from any step on."""
    stages = tuple(stage._replace(columns=64) for stage in data_config().stages)
    cfg, device = data_config(stages=stages, epochs=3), torch.device("cpu")
    shards = shards_of(tmp_path, cfg, [random_tokens(np.random.default_rng(3), 1500)])
    batches, *_ = zip(*load_batches(DocumentStream(shards, cfg), World(), device))
    whole = [batch for own in batches for batch in own]
    for turn, batch in enumerate(whole):
        columns, targets = batch.columns.tolist(), set(batch.tokens[1:].tolist())
        assert batch.columns.dtype == torch.int64 and len(set(columns)) == len(columns) == 64
        others = [token for token in (np.arange(384) + 20_011 * turn) % 384 if token not in targets]
        assert columns == [*sorted(targets, reverse=True), *others[: 64 - len(targets)]]
    assert {token for batch in whole[:10] for token in batch.columns.tolist()} == set(range(384))
    cases = [(World(rank, 2), 0, whole[rank::2]) for rank in range(2)] + [(World(), 7, whole[14:])]
    for world, first, expected in cases:
        stream = begin_stream(cfg, shards, Progress(first))
        found = [batch for own, *_ in load_batches(stream, world, device, first) for batch in own]
        for batch, other in zip(found, expected, strict=True):
            assert torch.equal(batch.tokens, other.tokens) and torch.equal(batch.columns, other.columns)


def test_columns_that_dont_hold_all_targets_or_are_all_tokens_are_left_out():
    def chosen(columns, targets):
        stage = cfg.stages[0]._replace(columns=columns)
        return choose_columns(cfg, stage, np.arange(targets, dtype=np.uint16), 5, torch.device("cpu"))

    cfg = data_config()
    assert chosen(0, 1) is None and chosen(16, 17) is None and chosen(384, 1) is None
    assert chosen(16, 16).tolist() == [*range(15, -1, -1)] and len(chosen(368, 1)) == 368
    with pytest.raises(UserError, match="stage table: 24 columns: must be a multiple of 16"):
        check_config(replace(cfg, stages=(cfg.stages[0]._replace(columns=24), cfg.stages[1])))


def test_each_epoch_reads_the_same_pieces_again(tmp_path):
    cfg = data_config(epochs=3)
    shards = shards_of(tmp_path, cfg, np.split(random_tokens(np.random.default_rng(4), 500), [200]))
    stream, epochs = DocumentStream(shards, cfg), {}
    with pytest.raises(UserError, match="3 epochs"):
        while True:
            piece = next_piece(stream, 24)
            epochs.setdefault(stream.epoch, []).append(piece)
    assert list(epochs) == [0, 1, 2] and epochs[0] == epochs[1] == epochs[2]


@pytest.mark.parametrize("rest", ["skip", "keep"])
@pytest.mark.parametrize("seed", range(15))
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
    for steps in (done, done + 1):  # the last schedule that fits, and the first that doesn't
        exact = replace(endless, scheduled_steps=steps)
        complete = micro_batches(exact, shards)[1]
        if complete:
            check_supply(exact, World(), shards)
        else:
            with pytest.raises(UserError, match=f"{epochs} epochs"):
                check_supply(exact, World(), shards)


@pytest.mark.parametrize("rest, length, told", [("skip", 200, 1), ("keep", 200, 0), ("skip", 1, 0)])
def test_too_few_tokens_names_document_rest_where_tokens_were_skipped(tmp_path, rest, length, told):
    cfg = data_config(document_rest=rest)
    stream = DocumentStream(shards_of(tmp_path, cfg, [np.tile([BOS, *[1] * length], 3)]), cfg)
    with pytest.raises(UserError, match="1 epochs") as caught:
        while True:
            stream.piece(24)
    assert ("--document_rest=keep: 531 tokens" in str(caught.value)) == told


def test_reader_keeps_the_order_and_is_three_items_ahead_at_most():
    made = []

    def items():
        for i in range(8):
            made.append(i)
            yield i

    take, taken = read_ahead(items()), []
    for i in range(8):
        taken.append(take())
        assert len(made) <= i + 4
    assert taken == made == list(range(8))
    with pytest.raises(StopIteration):
        take()


def test_error_in_the_readers_thread_reaches_the_consumer(tmp_path):
    cfg = data_config()
    tokens = random_tokens(np.random.default_rng(5), 900)
    first, second = write_split(tmp_path, "train", [tokens, tokens])
    second.write_bytes(b"")
    stream = DocumentStream(Shards([first, second], cfg), cfg)
    take = read_ahead(load_batches(stream, World(), torch.device("cpu")))
    got = 0
    with pytest.raises(UserError, match=second.name):
        while True:
            take()
            got += 1
    assert got > 2


@pytest.mark.parametrize("name", ["x", "my_train", "my_val", "train", "x_train_val", "x_val_000000"])
def test_a_shards_split_is_the_last_word_before_its_number(tmp_path, name):
    wanted = {split: [f"{name}_{split}_{i:06}.bin" for i in range(2)] for split in ("train", "val")}
    others = [f"{name}_train_00000.bin", f"{name}_train_000000.bin.bin", f"{name}_train_x_000000.bin",
              f".{name}_train_000000.bin", f"{name}_val_000000.bin.tmp"]
    for file in [*wanted["train"], *wanted["val"], *others]:
        (tmp_path / file).touch()
    cfg = replace(SMALL, data=str(tmp_path))
    assert {split: [path.name for path in find_shards(cfg, split)] for split in wanted} == wanted


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
    path = write_shard(tmp_path / "x_train_000000.bin", GOOD)
    assert Shards([path], SMALL)[0][0][:].tolist() == GOOD.tolist()
    corrupt(path)
    with pytest.raises(UserError) as caught:
        Shards([path], SMALL)[0]
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_shards_are_memory_maps_opened_when_they_are_needed(tmp_path):
    cfg = data_config(scheduled_steps=2)
    tokens = random_tokens(np.random.default_rng(7), 600)
    shards = shards_of(tmp_path, cfg, [tokens, tokens, tokens])
    check_supply(cfg, World(), shards)
    assert list(shards.opened) == [0]
    assert isinstance(shards[0][0], np.memmap) and not shards[0][0].flags.writeable
    for path in shards.paths:
        path.unlink()
    assert shards[0][0].tolist() == tokens.tolist()  # what is mapped stays


def mutated(rng, data, within):
    """The bytes with some of the first `within` changed, or an end cut off or added."""
    data = bytearray(data)
    for at in rng.integers(0, min(within, len(data)), rng.integers(1, 4)):
        data[at] = rng.choice([0, 1, 255, data[at] ^ (1 << int(rng.integers(8))), int(rng.integers(256))])
    kind = rng.integers(6)
    return bytes(data[: rng.integers(len(data))] if kind == 0 else data + rng.bytes(3) if kind == 1 else data)


def random_shard(rng, good):
    kind = rng.integers(4)
    if kind == 0:
        return rng.bytes(rng.integers(0, 1100))
    if kind == 1:  # a good beginning, so that what follows is looked at
        count = int(rng.choice([rng.integers(-3, 12), rng.integers(-(2**31), 2**31)]))
        header = np.array([20240520, rng.choice([1, 1, 1, 2]), count], "<i4").tobytes()
        letters = [0, 1, BOS, BOS, rng.choice([BOS - 1, BOS + 1])]
        tokens = rng.choice(letters, rng.integers(0, 12)).astype("<u2")
        return header.ljust(1024, b"\0") + tokens.tobytes()
    return mutated(rng, good, 12 if kind == 2 else 1024)


def is_shard(data, vocab_size):
    """What the format says, in other words than the script's."""
    magic, version, count = np.frombuffer(data[:12].ljust(12, b"\0"), "<i4").tolist()
    tokens = np.frombuffer(data[1024 : len(data) & ~1], "<u2")
    fits = len(data) >= 1024 and len(data) == 1024 + 2 * count
    return (magic, version) == (20240520, 1) and fits and BOS in tokens and bool((tokens < vocab_size).all())


def test_a_thousand_damaged_shards_are_refused_in_a_line_or_are_good(tmp_path):
    rng, path, opened = np.random.default_rng(0), tmp_path / "x_train_000000.bin", 0
    (good,) = write_split(tmp_path / "good", "train", [GOOD])
    good = good.read_bytes()
    for _ in range(1000):
        data = random_shard(rng, good)
        path.write_bytes(data)
        try:
            tokens, starts = Shards([path], SMALL)[0]
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error) and not is_shard(data, SMALL.vocab_size)
        else:
            opened += 1
            assert is_shard(data, SMALL.vocab_size) and tokens[:].tobytes() == data[1024:]
            assert starts.tolist() == np.flatnonzero(tokens[:] == BOS).tolist()
    assert 50 < opened < 950


def test_hash_of_the_data_is_that_of_what_the_schedule_reads(tmp_path):
    tokens = random_tokens(np.random.default_rng(8), 600)
    moved = tokens.copy()
    start = np.flatnonzero(tokens == BOS)[3]
    moved[start - 1], moved[start] = BOS, 97
    hashes, pairs = [], ([tokens, tokens], [tokens, moved], [moved, tokens], [tokens[:-1], tokens])
    for i, parts in enumerate(pairs):
        shards = shards_of(tmp_path / str(i), SMALL, parts)
        shards[0]
        hashes.append(shards.sha256())
    assert hashes[0] == hashes[1] and len({*hashes}) == 3


# ------------------------------------------------------------------ validation


@pytest.mark.parametrize("val_tokens", [0, 150, 499])
def test_validation_count_and_hash_are_of_the_first_tokens_over_shards(tmp_path, val_tokens):
    tokens = random_tokens(np.random.default_rng(6), 600)[:600]
    write_split(tmp_path, "val", np.split(tokens, [100, 333]))
    val = Validation.load(replace(SMALL, data=str(tmp_path), val_tokens=val_tokens))
    count = val_tokens or 599
    assert val.count == count and val.tokens.tolist() == tokens[: count + 1].tolist()
    assert val.sha256 == hashlib.sha256(tokens[: count + 1].astype("<u2").tobytes()).hexdigest()


def test_bytes_of_the_validation_text_are_those_of_its_targets(tmp_path):
    tokens = random_tokens(np.random.default_rng(6), 600)[:600]
    write_split(tmp_path, "val", [tokens])
    cfg = replace(SMALL, data=str(tmp_path))
    assert Validation.load(cfg).bytes == 0  # unknown
    sizes = np.arange(BOS + 1, dtype=np.int32) % 7
    np.save(tmp_path / "token_bytes.npy", sizes)
    assert Validation.load(cfg).bytes == sum(int(sizes[token]) for token in tokens[1:])
    np.save(tmp_path / "token_bytes.npy", sizes[:-1])
    with pytest.raises(UserError, match="token_bytes.npy.* 257"):
        Validation.load(cfg)
