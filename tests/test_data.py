"""Tests of data/: shards, the offline sample, tokenizing, the FineWeb download, the tables. No network."""

import base64
import gzip
import inspect
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import tiktoken.load

DATA = Path(__file__).resolve().parents[1] / "data"
sys.path.insert(0, str(DATA))

import shards  # noqa: E402
import token_tables  # noqa: E402
from token_tables import TABLES  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402


def run_script(script, *args, code=0, cwd=None, **environment):
    """Runs a script of data/ in its own process, checks its exit status and returns (stdout, stderr)."""
    command = [sys.executable, DATA / script, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment})
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done.stdout, done.stderr


def error_of(script, *args, cwd=".", **environment):
    """Runs a script that must fail as a user's mistake does: status 2, one line. Returns that line."""
    if environment:
        _, stderr = run_script(script, *args, code=2, cwd=cwd, **environment)
    else:
        stderr = error_in_this_process(script, *args, cwd=cwd)
    assert stderr.count("\n") == 1 and stderr.startswith(f"{script}: "), stderr
    return stderr


def error_in_this_process(script, *args, cwd):
    """What a script writes to stderr before it ends with status 2."""
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(StringIO()) as printed:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [str(DATA / script), *map(str, args)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(sys.argv[0], run_name="__main__")
    assert end.value.code == 2
    return printed.getvalue()


def documents_of(folder, split):
    """Returns the documents of a split, token arrays without BOS, joined over its shards."""
    manifest = shards.check_folder(folder)
    files = [entry["file"] for entry in manifest["shards"] if re.search(rf"_{split}_\d+.bin$", entry["file"])]
    tokens = np.concatenate([shards.read_shard(folder / file) for file in files])
    assert tokens[0] == manifest["bos"]
    return np.split(tokens, np.flatnonzero(tokens == manifest["bos"]))[1:]


def texts_of(folder, split):
    """Returns the documents of a split of byte tokens as text."""
    return [bytes(document[1:].astype(np.uint8)).decode() for document in documents_of(folder, split)]


# --------------------------------------------------------------------- format


def header(magic=20240520, version=1, count=4):
    values = np.zeros(256, "<i4")
    values[:3] = magic, version, count
    return values.tobytes()


BODY = np.array([256, 1, 2, 255], "<u2").tobytes()
CORRUPT = {
    "empty": b"",
    "short header": header()[:1000],
    "odd header": header()[:3],
    "wrong magic": header(magic=20240521) + BODY,
    "wrong version": header(version=2) + BODY,
    "one token too few": header() + BODY[:-2],
    "one byte too many": header() + BODY + b"\0",
    "negative count": header(count=-4) + BODY,
    "zero count": header(count=0),
    "huge count": header(count=2**31 - 1) + BODY,
    "token outside the vocabulary": header() + np.array([256, 1, 2, 257], "<u2").tobytes(),
    "no BOS": header() + np.array([0, 1, 2, 255], "<u2").tobytes(),
}


def test_shard_round_trip(tmp_path):
    path, tokens = tmp_path / "a_train_000000.bin", np.arange(65536, dtype=np.uint16)
    shards.write_shard(path, tokens)
    assert path.stat().st_size == 1024 + 2 * 65536
    assert path.read_bytes()[:1024] == header(count=65536)
    assert shards.check_shard(path, vocab_size=65536, bos=50256) == 65536
    assert (shards.read_shard(path) == tokens).all()
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("kind", CORRUPT)
def test_corrupt_shard_is_refused(tmp_path, kind):
    path = tmp_path / "bad_train_000000.bin"
    path.write_bytes(header() + BODY)
    assert shards.check_shard(path, vocab_size=257, bos=256) == 4
    path.write_bytes(CORRUPT[kind])
    with pytest.raises(ValueError, match="bad_train_000000.bin.*;"):
        shards.check_shard(path, vocab_size=257, bos=256)


def test_random_headers_are_refused(tmp_path):
    path, random = tmp_path / "fuzz_train_000000.bin", np.random.default_rng(0)
    for _ in range(500):
        values = random.integers(-(2**31), 2**31, 256).astype("<i4")
        values[:2] = np.where(random.random(2) < 0.5, (20240520, 1), values[:2])
        path.write_bytes(values.tobytes()[: random.integers(0, 1025)] + BODY)
        with pytest.raises(ValueError):
            shards.check_shard(path, vocab_size=257, bos=256)


@pytest.mark.parametrize("tokens", [[], [-1], [65536], [[1, 2]], np.broadcast_to(1, 2**31)],
                         ids=["none", "negative", "17 bits", "rows", "2**31"])
def test_tokens_that_do_not_fit_are_not_written(tmp_path, tokens):
    with pytest.raises(ValueError, match="x_train"):
        shards.write_shard(tmp_path / "x_train_000000.bin", np.asarray(tokens, np.int64))
    assert not os.listdir(tmp_path)


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), shards.atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.bin"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    path, before = tmp_path / "x_train_000000.bin", os.umask(umask)
    try:
        shards.write_shard(path, [256, 1])
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


def test_what_killed_runs_left_goes_when_it_is_old(tmp_path):
    code = ("import os, sys; sys.path.insert(0, sys.argv[1]); import shards\n"
            "with shards.staging('.') as stage, shards.atomic_file('x.bin') as file: os.kill(os.getpid(), 9)")
    subprocess.run([sys.executable, "-c", code, DATA], cwd=tmp_path)
    half, stage = sorted(tmp_path.iterdir(), key=lambda path: path.is_dir())
    assert half.name.startswith(".x.bin.") and half.suffix == ".tmp" and stage.is_dir()
    other = tmp_path / ".y.bin.0.tmp"
    for keep in (True, False):
        with shards.staging(tmp_path), shards.atomic_file(tmp_path / "x.bin"):
            assert half.exists() == stage.exists() == keep  # of a run that may go on, or surely doesn't
        for path in (half, stage, other) if keep else ():
            path.mkdir(exist_ok=True) if path == stage else path.touch()
            os.utime(path, (0, 0))
    assert sorted(os.listdir(tmp_path)) == [other.name, "x.bin"]


@pytest.mark.parametrize("shard_tokens", [5, 7, 64, 10_000])
def test_writer_cuts_exact_shards(tmp_path, shard_tokens):
    random = np.random.default_rng(1)
    documents = [random.integers(0, 256, n).astype(np.uint16) for n in random.integers(0, 4, 200)]
    writer = shards.ShardWriter(tmp_path, "cut", "train", shard_tokens, bos=256)
    for document in documents:
        writer.add(document, len(document))
    writer.close()
    stream = np.concatenate([np.append(np.uint16(256), document) for document in documents])
    written = [shards.read_shard(tmp_path / entry["file"]) for entry in writer.shards]
    assert (np.concatenate(written) == stream).all()
    assert all(len(tokens) == shard_tokens for tokens in written[:-1])
    assert all((tokens == 256).any() for tokens in written)
    assert writer.documents == 200 and writer.bytes == sum(map(len, documents))


def test_writer_gives_every_shard_a_document(tmp_path):
    writer = shards.ShardWriter(tmp_path, "tail", "train", 8, bos=256)
    writer.add(np.zeros(9, np.uint16), 9)  # its last two tokens would be a shard without BOS
    writer.close()
    assert [entry["tokens"] for entry in writer.shards] == [10]
    writer = shards.ShardWriter(tmp_path, "long", "train", 8, bos=256)
    with pytest.raises(ValueError, match="larger shards"):
        writer.add(np.zeros(100, np.uint16), 100)


def test_manifest_finds_a_flipped_bit(tmp_path):
    writer = shards.ShardWriter(tmp_path, "flip", "train", 100, bos=256)
    writer.add(np.arange(50), 50)
    writer.close()
    manifest = shards.make_manifest("flip", "bytes", 257, 256, {"train": writer}, "test")
    shards.write_manifest(tmp_path, manifest)
    assert shards.check_folder(tmp_path)["documents"] == {"train": 1}
    path = tmp_path / "flip_train_000000.bin"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="flip_train_000000.bin.*sha256"):
        shards.check_folder(tmp_path)
    shards.write_manifest(tmp_path, manifest | {"vocab_size": 256})
    with pytest.raises(ValueError, match="token 256 found"):
        shards.check_folder(tmp_path)


@pytest.mark.parametrize("content", [
    "", "[]", "{}",
    '{"shards": [], "name": "a", "bos": 1, "vocab_size": 2}',
    '{"shards": [], "name": "a", "bos": 1, "vocab_size": "2"}',
    '{"shards": [{"file": "../x"}], "name": "a", "bos": 1, "vocab_size": 2}',
])
def test_damaged_manifest_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="manifest.json"):
        shards.check_folder(tmp_path)


# --------------------------------------------------------------------- sample


@pytest.fixture(scope="session")
def sample_folder(tmp_path_factory):
    """The offline sample, built once, in a path with a space, from another current directory."""
    folder = tmp_path_factory.mktemp("with a space") / "sample"
    stdout, stderr = run_script("sample.py", "--out", folder, cwd=folder.parent, PYTHONHASHSEED="1")
    assert "built" in stdout and not stderr
    return folder


def test_sample_size_and_manifest(sample_folder):
    manifest = shards.check_folder(sample_folder)
    assert manifest["tokenizer"] == "bytes" and manifest["vocab_size"] == 257 and manifest["bos"] == 256
    assert 150_000 <= manifest["bytes"]["val"] <= 200_000
    assert manifest["bytes"]["train"] >= 1_000_000
    for split, count in manifest["documents"].items():
        texts = texts_of(sample_folder, split)
        assert len(texts) == count
        assert sum(len(text.encode()) for text in texts) == manifest["bytes"][split]
        assert min(len(text.encode()) for text in texts) >= 200
    assert all(1 < model["bpb"] < 3 for model in manifest["baseline"])
    files = ["manifest.json", "sample_train_000000.bin", "sample_val_000000.bin", *TABLES]
    assert sorted(os.listdir(sample_folder)) == sorted(files)
    assert load_tokenizer(sample_folder).vocab_size == len(np.load(sample_folder / "token_bytes.npy")) == 257


def test_sample_splits_share_nothing_long(sample_folder):
    def long_paragraphs(split):
        found = [" ".join(paragraph.split()).lower() for text in texts_of(sample_folder, split)
                 for paragraph in re.split(r"\n\s*\n", text)]
        found = [paragraph for paragraph in found if len(paragraph) >= 80]
        assert len(found) == len(set(found))
        return set(found)

    assert not set(texts_of(sample_folder, "train")) & set(texts_of(sample_folder, "val"))
    assert not long_paragraphs("train") & long_paragraphs("val")


# What sample.py does, with every tenth file of the library.
SMALLER_SAMPLE = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import sample
files = sample.library_files
sample.library_files, sample.VAL_BYTES = lambda root: files(root)[::10], 20_000
sample.main()
"""


def test_sample_is_rebuilt_only_if_damaged_and_then_identical(tmp_path):
    def build(seed):
        command = [sys.executable, "-c", SMALLER_SAMPLE, DATA, "--out", tmp_path]
        return subprocess.check_output(command, text=True, env={**os.environ, "PYTHONHASHSEED": seed})

    def files():
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.iterdir()}

    assert ": built (" in build("1")
    before, written = (tmp_path / "manifest.json").read_bytes(), files()
    stdout = build("2")
    assert "already there and valid" in stdout and ": built (" not in stdout and files() == written
    path = tmp_path / "sample_val_000000.bin"
    path.write_bytes(path.read_bytes()[:-1])
    stdout = build("2")
    assert "building again" in stdout and path.name in stdout
    assert (tmp_path / "manifest.json").read_bytes() == before  # it holds the sha256 of every shard
    shards.check_folder(tmp_path)


def test_sample_made_before_there_were_tables_gets_them(sample_folder, tmp_path):
    folder = tmp_path / "sample"
    shutil.copytree(sample_folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["version"]
    (folder / "manifest.json").write_text(json.dumps(manifest | {"builder": "a hash"}))
    for file in TABLES:
        (folder / file).unlink()
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}
    stdout, _ = run_script("sample.py", "--out", folder)
    assert "already there and valid" in stdout and "built" not in stdout
    for file in TABLES:
        assert (folder / file).read_bytes() == (sample_folder / file).read_bytes()
    assert before.items() < {path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
                             for path in folder.iterdir()}.items()


@pytest.mark.parametrize("changes", [{"version": 1}, {"version": 3}, {"version": None}])
def test_sample_of_another_version_is_not_taken_for_this_one(sample_folder, tmp_path, capsys, changes):
    import sample

    folder = tmp_path / "sample"
    shutil.copytree(sample_folder, folder)
    assert sample.existing(folder)
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    kept = {key: value for key, value in manifest.items() if value is not None}  # None: drop the key
    (folder / "manifest.json").write_text(json.dumps(kept))
    assert sample.existing(folder) is None
    assert "building again: another version of sample.py" in capsys.readouterr().out


def test_sample_ngram_against_a_direct_count():
    import sample

    random = np.random.default_rng(2)
    train, val = (np.append(256, random.choice([97, 98, 99], n, p=[0.6, 0.3, 0.1])) for n in (300, 40))

    def probability(history, token, n):
        if n == 0:
            return 1 / 257
        padded = [256] * (n - 1) + list(train)
        context = history[len(history) - n + 1 :]
        after = [padded[i + n - 1] for i in range(len(train)) if padded[i : i + n - 1] == context]
        lower = probability(history, token, n - 1)
        kinds = len(set(after))
        return (after.count(token) + kinds * lower) / (len(after) + kinds) if after else lower

    padded = [256] * 2 + list(val)
    bits = -sum(np.log2(probability(padded[i : i + 2], padded[i + 2], 3)) for i in range(len(val)))
    assert sample.ngram_bpb(train, val, 40, order=3) == pytest.approx(bits / 40)


def test_sample_does_not_replace_other_data(tmp_path):
    shards.write_shard(tmp_path / "mine_train_000000.bin", [256, 1])
    assert "another data set" in error_of("sample.py", "--out", tmp_path, "--force")
    assert os.listdir(tmp_path) == ["mine_train_000000.bin"]


# ------------------------------------------------------------------- tokenize

TEXTS = [f"Document {i}: {'the quick brown fox, ' * (i % 5)}naïve café 東京 🙂\r\n" for i in range(60)]


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


@pytest.fixture
def rank_file(tmp_path):
    """A tiny vocabulary: the 256 bytes, then merges that spell ' the', ' fo' and ' qu'."""
    merges = [b"th", b"the", b" the", b"fo", b" fo", b"qu", b" qu"]
    tokens = [bytes([byte]) for byte in range(256)] + merges
    path = tmp_path / "tiny.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path


def test_tokenize_bytes_round_trip_and_split(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS + TEXTS[:7] + ["", " \n"])
    for processes in (1, 2):
        out = tmp_path / f"out {processes}"
        _, stderr = run_script("tokenize_text.py", source, "--out", out, "--tokenizer", "bytes",
                               "--name", "t", "--val-fraction", 0.2, "--shard-tokens", 1000,
                               "--processes", processes)
        assert not stderr
        train, val = texts_of(out, "train"), texts_of(out, "val")
        assert sorted(train + val) == sorted(TEXTS) and len(train) > len(val) > 0
        manifest = shards.check_folder(out)
        assert manifest["documents"] == {"train": len(train), "val": len(val)}
        assert manifest["bytes"]["val"] == sum(len(text.encode()) for text in val)
        assert [entry["tokens"] for entry in manifest["shards"][:2]] == [1000, 1000]
    manifests = [(tmp_path / f"out {processes}" / "manifest.json").read_bytes() for processes in (1, 2)]
    assert manifests[0] == manifests[1]  # they hold the sha256 of every shard


@pytest.mark.parametrize("name", ["my_train", "my_val", "train_val"])
def test_a_name_may_hold_a_splits_name(tmp_path, name):
    source, out = write_jsonl(tmp_path / "in.jsonl", TEXTS), tmp_path / "out"
    stdout, _ = run_script("tokenize_text.py", source, "--out", out, "--tokenizer", "bytes", "--name", name,
                           "--val-fraction", 0.2, "--processes", 1)
    for line, split in zip(stdout.splitlines()[1:], ("train", "val"), strict=True):
        tokens = len(shards.read_shard(out / f"{name}_{split}_000000.bin"))
        assert line.split()[0] == split and f" {tokens:,} tokens" in line
    (out / f"._{name}_train_000000.bin").touch()  # macOS leaves such files
    files = [f"{name}_{split}_000000.bin" for split in ("train", "val")]
    assert shards.list_shards(out) == dict.fromkeys(files, name)


def test_tokenize_with_a_rank_file(tmp_path, rank_file):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_bytes(text.encode())
    out = tmp_path / "out"
    run_script("tokenize_text.py", folder, "--out", out, "--tokenizer", rank_file, "--val-fraction", 0.2,
               "--processes", 2)
    manifest = shards.check_folder(out)
    assert (manifest["vocab_size"], manifest["bos"]) == (264, 263)
    assert manifest["tokenizer"] == "tiny.tiktoken"
    assert load_tokenizer(out).texts == load_tokenizer(rank_file).texts
    words = [base64.b64decode(line.split()[0]) for line in rank_file.read_bytes().splitlines()]
    documents = documents_of(out, "train") + documents_of(out, "val")
    decoded = [b"".join(words[token] for token in document[1:]).decode() for document in documents]
    assert sorted(decoded) == sorted(TEXTS)
    assert any((document == 258).any() for document in documents)  # ' the' is one token


def test_tokenize_split_on_a_mark(tmp_path, monkeypatch):
    import tokenize_text

    texts = [text.strip() for text in TEXTS]
    source = tmp_path / "all.txt"
    source.write_bytes("\n<|endoftext|>\n".join(texts).encode())
    monkeypatch.setattr(tokenize_text, "READ_CHARS", 5)  # so that marks lie across reads
    pieces = list(tokenize_text.read_file(source, "text", "<|endoftext|>", Counter()))
    assert [text for text, _ in pieces] == texts
    assert sum(share for _, share in pieces) == source.stat().st_size
    run_script("tokenize_text.py", source, "--out", tmp_path / "out", "--tokenizer", "bytes",
               "--val-fraction", 0.2, "--split-on", "<|endoftext|>")
    assert sorted(texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "val")) == sorted(texts)


def test_tokenize_refuses_and_replaces_existing_shards(tmp_path, rank_file):
    source, out = write_jsonl(tmp_path / "in.jsonl", TEXTS), tmp_path / "out"
    arguments = [source, "--out", out, "--tokenizer", "bytes", "--processes", 1, "--val-fraction", 0.2]
    run_script("tokenize_text.py", *arguments, "--shard-tokens", 500)
    before = sorted(os.listdir(out))
    assert "--force" in error_of("tokenize_text.py", *arguments)
    # a run that fails half-way leaves the old data whole
    bad = write_jsonl(tmp_path / "bad.jsonl", [1])
    error_of("tokenize_text.py", bad, *arguments, "--force")
    assert sorted(os.listdir(out)) == before and shards.check_folder(out)
    run_script("tokenize_text.py", *arguments, "--force")
    files = ["manifest.json", "text_train_000000.bin", "text_val_000000.bin", *TABLES]
    assert sorted(os.listdir(out)) == sorted(files)
    assert len(np.load(out / "token_bytes.npy")) == 257
    run_script("tokenize_text.py", *arguments, "--force", "--tokenizer", rank_file)  # with its own tables
    assert sorted(os.listdir(out)) == sorted(files) and len(np.load(out / "token_bytes.npy")) == 264
    assert "another data set" in error_of("tokenize_text.py", *arguments, "--force", "--name", "other")


def test_no_shard_is_published_before_the_tables_of_its_tokenizer(tmp_path, monkeypatch):
    stage, folder = tmp_path / "stage", tmp_path / "folder"
    for place, tokenizer in ((stage, b"new"), (folder, b"old")):
        place.mkdir()
        shards.write_shard(place / "text_train_000000.bin", [256, 1])
        for file in TABLES:
            (place / file).write_bytes(tokenizer)
    shards.write_manifest(folder, {})
    replace = os.replace

    def fail_at_shards(source, target):
        if str(target).endswith(".bin"):
            raise OSError("killed")
        replace(source, target)

    monkeypatch.setattr(shards.os, "replace", fail_at_shards)
    with pytest.raises(OSError, match="killed"):
        shards.publish(stage, folder, {"name": "text"})
    found = {file: (folder / file).read_bytes() for file in os.listdir(folder)}
    assert found == dict.fromkeys(TABLES, b"new")


def read(path, split_on=None):
    import tokenize_text

    return [text for text, _ in tokenize_text.read_file(path, "text", split_on, Counter())]


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_text_is_read_packed_and_in_marked_encodings(tmp_path, coding, packed):
    pack = gzip.compress if packed else bytes
    path, rows = tmp_path / f"x.txt{packed}", tmp_path / f"x.jsonl{packed}"
    path.write_bytes(pack("".join(TEXTS).encode(coding)))
    rows.write_bytes(pack("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n"
                                  for text in TEXTS).encode(coding)))
    assert read(path) == ["".join(TEXTS)] and read(rows) == TEXTS


@pytest.mark.parametrize("mark", ["\n\n", "\r\n\r\n"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_marks_match_whatever_the_line_ends(tmp_path, mark, ends):
    path = tmp_path / "x.txt"
    path.write_bytes(f"a{ends}b{ends}{ends}c".encode())
    assert read(path, mark) == ["a\nb", "c"]


def test_rows_without_text_and_hidden_files_are_skipped_and_said(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    (source / ".ipynb_checkpoints").mkdir(parents=True)
    for hidden in (".ipynb_checkpoints/a.txt", "._a.txt"):
        (source / hidden).write_text("hidden")
    write_jsonl(source / "a.jsonl", [*TEXTS, None, 5])
    (source / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n[]\n{"body": "x"}\n'))
    stdout, _ = run_script("tokenize_text.py", source, "--out", out, "--tokenizer", "bytes",
                           "--val-fraction", 0.2, "--processes", 1)
    assert sorted(texts_of(out, "train") + texts_of(out, "val")) == sorted([*TEXTS, "packed"])
    assert "skipped 2 hidden files: " in stdout and "._a.txt" in stdout
    assert "skipped 4 rows without text in 'text' (a.jsonl: 2, b.jsonl.gz: 2)" in stdout


UNREADABLE = {
    "bytes": ("x.txt", "café".encode("latin-1"), "not utf-8 text .*ENCODING"),
    "half a UTF-16 unit": ("x.txt", "café".encode("utf-16")[:-1], "not utf-16"),
    "UTF-16 without a mark": ("x.txt", "plain".encode("utf-16-le"), "has zero bytes.*utf-16le"),
    "zstd": ("x.txt.zst", b"\x28\xb5\x2f\xfd\xff", "packed.*zstd -d"),
    "cut gzip": ("x.txt.gz", gzip.compress(b"text" * 99)[:-9], "damaged"),
    "all null": ("x.jsonl", b'{"text": null}\n' * 3, r"none of 3 rows .*text: NoneType.*--field"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_text_is_refused_with_advice(tmp_path, kind):
    name, content, expected = UNREADABLE[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: {expected}") as caught:
        read(tmp_path / name)
    assert "latin1" not in str(caught.value)


MISTAKES = {
    "no file": (["missing.txt"], "missing.txt: no such file"),
    "empty folder": (["folder"], "no .txt"),
    "empty file": (["empty.txt"], "no text"),
    "not UTF-8": (["latin.txt"], "latin.txt"),
    "not JSON": (["broken.jsonl"], "line 2"),
    "missing field": (["good.jsonl", "--field", "body"], "--field"),
    "one document": (["one.txt"], "--val-fraction"),
    "unknown tokenizer": (["good.jsonl", "--tokenizer", "gpt5"], "gpt5"),
    "bad rank file": (["good.jsonl", "--tokenizer", "bad.tiktoken"], "line 1"),
    "missing rank file": (["good.jsonl", "--tokenizer", "none.tiktoken"], "none.tiktoken"),
    "incomplete rank file": (["good.jsonl", "--tokenizer", "few.tiktoken"], "256 bytes"),
    "fraction above 1": (["good.jsonl", "--val-fraction", "2"], "--val-fraction must be"),
    "fraction below 0": (["good.jsonl", "--val-fraction=-.1"], "--val-fraction must be"),
    "all for validation": (["one.txt", "--val-fraction=.999999"], "0 training and 1 validation"),
    "bad processes": (["good.jsonl", "--processes", "0"], "--processes"),
    "bad name": (["good.jsonl", "--name", "a/b"], "--name"),
    "unknown flag": (["good.jsonl", "--nonsense"], "--nonsense"),
    "one token a shard": (["good.jsonl", "--shard-tokens", "1"], "--shard-tokens must be from 2"),
    "more than a header counts": (["good.jsonl", "--shard-tokens", str(2**31)], "--shard-tokens must be"),
    "shards too small": (["good.jsonl", "--shard-tokens", "10"], "larger shards"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_tokenize_mistakes_are_one_line(tmp_path, mistake):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "one.txt").write_text("A single document. " * 20)
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "bad.tiktoken").write_text("!!! what\n")
    (tmp_path / "few.tiktoken").write_text("IQ== 0\nIg== 1\n")
    write_jsonl(tmp_path / "good.jsonl", TEXTS)
    arguments, expected = MISTAKES[mistake]
    line = error_of("tokenize_text.py", "--tokenizer", "bytes", "--out", "out", "--processes", 1, *arguments,
                    cwd=tmp_path)
    assert expected in line
    assert not (tmp_path / "out").exists()


def test_validation_may_be_left_out_and_a_file_empty(tmp_path):
    source, empty = write_jsonl(tmp_path / "in.jsonl", TEXTS[:2]), write_jsonl(tmp_path / "none.jsonl", [])
    run_script("tokenize_text.py", source, empty, "--out", tmp_path / "out", "--tokenizer", "bytes",
               "--val-fraction", 0, "--processes", 1)
    assert shards.check_folder(tmp_path / "out")["documents"] == {"train": 2, "val": 0}


def test_a_process_that_dies_is_said(monkeypatch):
    import tokenize_text

    monkeypatch.setattr(tokenize_text, "start_worker", os._exit)
    encoded = tokenize_text.encode_all([(b"text", b"digest")], "bytes", load_tokenizer("bytes"), 2)
    with pytest.raises(ValueError, match="a tokenizing process died"):
        list(encoded)


def test_shards_of_another_name_that_came_meanwhile_are_kept(tmp_path):
    shards.write_shard(tmp_path / "mine_train_000000.bin", [256, 1])
    with pytest.raises(ValueError, match="another data set"):
        shards.publish(tmp_path / "stage", tmp_path, {"name": "text"})
    assert os.listdir(tmp_path) == ["mine_train_000000.bin"]


def test_tokenize_parquet_without_pyarrow(tmp_path):
    (tmp_path / "pyarrow.py").write_text("raise ImportError")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    line = error_of("tokenize_text.py", "x.parquet", "--tokenizer", "bytes", cwd=tmp_path,
                    PYTHONPATH=str(tmp_path))
    assert "pip install pyarrow" in line


def test_tokenize_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": TEXTS}), tmp_path / "x.parquet")
    arguments = [tmp_path / "x.parquet", "--tokenizer", "bytes", "--out", tmp_path / "out",
                 "--val-fraction", 0.2]
    run_script("tokenize_text.py", *arguments, "--field", "body")
    assert sorted(texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "val")) == sorted(TEXTS)
    assert "'text'" in error_of("tokenize_text.py", *arguments, "--force")
    parquet.write_table(pyarrow.table({"body": [*TEXTS, None]}), tmp_path / "x.parquet")
    stdout, _ = run_script("tokenize_text.py", *arguments, "--field", "body", "--force")
    assert "skipped 1 rows without text in 'body' (x.parquet: 1)" in stdout
    assert len(texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "val")) == len(TEXTS)
    parquet.write_table(pyarrow.table({"body": pyarrow.array([None] * 3, "string")}), tmp_path / "x.parquet")
    assert "none of 3 rows has text" in error_of("tokenize_text.py", *arguments, "--field", "body", "--force")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    assert "x.parquet" in error_of("tokenize_text.py", *arguments, "--force")


# ------------------------------------------------------------- tokenizer, tables


@pytest.fixture
def mine(tmp_path, rank_file):
    """A folder of two shards of the tiny vocabulary, without tables."""
    folder = tmp_path / "mine"
    folder.mkdir()
    shards.write_shard(folder / "x_train_000000.bin", [263, 258, 97])
    shards.write_shard(folder / "x_val_000000.bin", [263, 262])
    return folder


@pytest.mark.parametrize("source", ["bytes", "rank_file"])
def test_tokenizer_round_trip(source, request, tmp_path):
    given = source if source == "bytes" else request.getfixturevalue(source)
    token_tables.write_tables(tmp_path, load_tokenizer(given))
    for tokenizer in (load_tokenizer(given), load_tokenizer(tmp_path)):
        assert tokenizer.vocab_size == len(tokenizer.texts) == tokenizer.bos + 1
        assert tokenizer.texts[tokenizer.bos] == b""
        for text in [*TEXTS, "", " \n", "<|endoftext|> is only text"]:
            ids = tokenizer.encode(text)
            assert ids.dtype == np.uint16 and ids.ndim == 1 and (ids < tokenizer.bos).all()
            assert b"".join(tokenizer.texts[i] for i in ids) == text.encode()
            assert tokenizer.decode([tokenizer.bos, *ids]) == text
        assert tokenizer.decode([0xC3]) == "\ufffd"
    if source == "rank_file":
        assert tokenizer.encode("the quick fox the").tolist() == [257, 262, *b"ick", 260, *b"x", 258]


def test_tables_against_their_definition(tmp_path, rank_file):
    tokenizer = load_tokenizer(rank_file)
    token_tables.write_tables(tmp_path, tokenizer)
    token_bytes = np.load(tmp_path / "token_bytes.npy")
    assert token_bytes.dtype == np.int32
    assert token_bytes.tolist() == [len(text) for text in tokenizer.texts] and token_bytes[263] == 0
    texts = tokenizer.texts[:-1]
    ranks = tiktoken.load.load_tiktoken_bpe(str(tmp_path / "tokenizer.tiktoken"))
    assert ranks == {text: i for i, text in enumerate(texts)}
    assert (tmp_path / "tokenizer.tiktoken").read_bytes() == rank_file.read_bytes()


def test_tables_of_bytes(tmp_path):
    token_tables.write_tables(tmp_path, load_tokenizer("bytes"))
    assert np.load(tmp_path / "token_bytes.npy").tolist() == [1] * 256 + [0]
    assert (tmp_path / "tokenizer.tiktoken").read_bytes().startswith(b"AA== 0\nAQ== 1\n")


def test_tables_command(mine, rank_file):
    stdout, stderr = run_script("token_tables.py", mine, "--tokenizer", rank_file)
    assert "264 tokens" in stdout and not stderr
    assert sorted(os.listdir(mine)) == sorted([*TABLES, "x_train_000000.bin", "x_val_000000.bin"])
    assert len(np.load(mine / "token_bytes.npy")) == 264
    # a folder's own tokenizer can be named by the folder
    before = [(mine / file).read_bytes() for file in TABLES]
    run_script("token_tables.py", mine, "--tokenizer", mine)
    assert before == [(mine / file).read_bytes() for file in TABLES]


@pytest.mark.parametrize("val, shared", [
    ([263, 97, 98, 263, 99], "1 of 2 "), ([263, 1, 2, 3, 4, 263, 97], "1 of 2 "),
    ([263, 263, 97, 98, 99, 263, 97], ""), ([263, 2, 3, 4], "")])
def test_validation_documents_in_the_training_data_are_said(mine, rank_file, val, shared):
    for i, tokens in enumerate([[263, 263, 97, 98, 263, 1, 2], [3, 4, 263, 5]]):  # one runs over the end
        shards.write_shard(mine / f"x_train_{i:06d}.bin", tokens)
    shards.write_shard(mine / "x_val_000000.bin", val)
    stdout, _ = run_script("token_tables.py", mine, "--tokenizer", rank_file)
    warning = f"{mine}: {shared}validation documents are in the training data, too"
    assert (warning in stdout) == bool(shared) and stdout.count("\n") == 1 + bool(shared)


TABLES_MISTAKES = {
    "too few tokens": (["mine", "--tokenizer", "bytes"], r"x_train_000000.bin: token 263 .* 257"),
    "another tokenizer": (["mine", "--tokenizer", "more.tiktoken"], r"x_train_000000.bin.* 264 \(BOS\) not"),
    "no shards": (["fake", "--tokenizer", "bytes"], "fake: no shards here"),
    "no folder": (["nowhere", "--tokenizer", "bytes"], "nowhere: no shards here"),
    "unknown tokenizer": (["mine", "--tokenizer", "gpt5"], "gpt5.*FILE.tiktoken"),
    "no network": (["mine", "--tokenizer", "gpt2"], "cannot download GPT-2.*OSError: no network"),
    "damaged ranks": (["mine", "--tokenizer", "bad.tiktoken"], "bad.tiktoken: line 264 "),
    "gap in the ranks": (["mine", "--tokenizer", "gap.tiktoken"], "gap.tiktoken: its 263 tokens"),
    "a folder without": (["mine", "--tokenizer", "mine"], "tiktoken: not found; .*token_tables.py mine"),
    "no tokenizer": (["mine"], "--tokenizer"),
}


@pytest.mark.parametrize("mistake", TABLES_MISTAKES)
def test_tables_mistakes_are_one_line(mistake, mine, rank_file, fake_tiktoken, tmp_path):
    ranks = rank_file.read_bytes()
    (tmp_path / "bad.tiktoken").write_bytes(ranks + b"what\n")
    (tmp_path / "more.tiktoken").write_bytes(ranks + b"dGhlcmU= 263\n")
    (tmp_path / "gap.tiktoken").write_bytes(ranks.replace(b" 262\n", b" 263\n"))
    arguments, expected = TABLES_MISTAKES[mistake]
    line = error_of("token_tables.py", *arguments, cwd=tmp_path, **fake_tiktoken("offline"))
    assert re.search(expected, line), line
    assert sorted(os.listdir(mine)) == ["x_train_000000.bin", "x_val_000000.bin"]


def test_too_many_tokens_for_16_bits(tmp_path):
    tokens = [bytes([byte]) for byte in range(256)] + [b"%06d" % i for i in range(2**16 - 256)]
    path = tmp_path / "big.tiktoken"
    for count, fits in ((2**16 - 1, True), (2**16, False)):
        path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens[:count])))
        if fits:
            assert load_tokenizer(path).bos == 2**16 - 1
        else:
            with pytest.raises(ValueError, match="big.tiktoken: 65536 tokens.*16 bits"):
                load_tokenizer(path)


def test_bytes_need_no_tiktoken_and_the_package_can_be_imported_from_the_repository(tmp_path, sample_folder):
    (tmp_path / "tiktoken.py").write_text("raise ImportError")
    code = ("import sys; from data.tokenizer import Tokenizer, load_tokenizer\n"
            "for source in ('bytes', sys.argv[1]): print(load_tokenizer(source).encode('hé').tolist())\n"
            "load_tokenizer('gpt2')")
    done = subprocess.run([sys.executable, "-c", code, sample_folder], cwd=DATA.parent, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.stdout == "[104, 195, 169]\n" * 2
    assert done.stderr.splitlines()[-1].startswith("ValueError: tiktoken is not installed; pip install")


# -------------------------------------------------------------------- fineweb

FAKE_TIKTOKEN = """
import os
def get_encoding(name):
    assert name == "gpt2"
    if os.environ["FAKE_TIKTOKEN"] == "offline":
        raise OSError("no network\\n" * 50)
    return Encoding()

class Encoding:
    eot_token = 50256
    def decode_single_token_bytes(self, i):
        return bytes([i]) if i < 256 else b"%d" % i
"""

FAKE_HUB = """
import os, pathlib, types
SOURCE, MODE = pathlib.Path(os.environ["FAKE_SOURCE"]), os.environ["FAKE_MODE"]
ASKED = open(os.environ["FAKE_LOG"], "a")
REVISION = "0123456789" * 4

def dataset_info(repo, timeout):
    assert repo == "kjj0/fineweb10B-gpt2" and timeout <= 20
    print("info", file=ASKED, flush=True)
    if MODE == "offline":
        raise RuntimeError("could not connect\\n\\nmany lines") from OSError("Name or service not known")
    return types.SimpleNamespace(sha=REVISION)

def hf_hub_download(repo, file, repo_type, revision, local_dir):
    assert (repo, repo_type, revision) == ("kjj0/fineweb10B-gpt2", "dataset", REVISION)
    print(file, file=ASKED, flush=True)
    if not (SOURCE / file).exists():
        raise RuntimeError("404 Not Found")
    content, path = (SOURCE / file).read_bytes(), pathlib.Path(local_dir, file)
    assert not path.exists()  # what is damaged is gone: the real one may take it for a finished download
    path.parent.mkdir(parents=True, exist_ok=True)
    if MODE == "interrupted" and "train_000002" in file:
        raise ConnectionError("connection reset by peer")
    if MODE == "interrupt" and "train_000002" in file:
        raise KeyboardInterrupt
    path.write_bytes(content[:-2] if MODE == "truncated" else content)
    return str(path)
"""


@pytest.fixture
def fake_tiktoken(tmp_path):
    """Makes stand-ins for tiktoken and the hub; returns a function of the environment that uses them."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "tiktoken.py").write_text(FAKE_TIKTOKEN)
    (tmp_path / "fake" / "huggingface_hub.py").write_text(FAKE_HUB)
    return lambda mode: {"PYTHONPATH": str(tmp_path / "fake"), "FAKE_TIKTOKEN": mode}


@pytest.fixture
def hub(tmp_path, fake_tiktoken):
    """A stand-in for the hub: .run(mode, *args) runs fineweb.py, .asked() lists what it was asked since."""

    class Hub:
        source, out, log = tmp_path / "source", tmp_path / "out", tmp_path / "log"

        def environment(self, mode):
            return {**fake_tiktoken(mode), "FAKE_SOURCE": str(self.source), "FAKE_MODE": mode,
                    "FAKE_LOG": str(self.log)}

        def run(self, mode, *args):
            return run_script("fineweb.py", "--out", self.out, *args, **self.environment(mode))[0]

        def fail(self, mode, *args):
            return error_of("fineweb.py", "--out", self.out, *args, **self.environment(mode))

        def asked(self):
            files = self.log.read_text().split() if self.log.exists() else []
            self.log.write_text("")
            return [re.sub("fineweb_|.bin", "", file) for file in files]

    Hub.source.mkdir()
    for i, file in enumerate(["val_000000", "train_000001", "train_000002"]):
        shards.write_shard(Hub.source / f"fineweb_{file}.bin", np.append(50256, np.arange(1000 + i)))
    return Hub()


ALL = ["val_000000", "train_000001", "train_000002"]
ALL_FILES = [f"fineweb_{file}.bin" for file in ALL]


def test_fineweb_download(hub):
    assert "1 training shards, 2 of them downloaded" in hub.run("good", "1")
    assert hub.asked() == ["info", *ALL[:2]]
    hub.run("good", "2")
    assert hub.asked() == ["info", ALL[2]]
    assert sorted(os.listdir(hub.out)) == sorted([*ALL_FILES, *TABLES])
    for file in ALL_FILES:
        assert (hub.out / file).read_bytes() == (hub.source / file).read_bytes()
    assert len(np.load(hub.out / "token_bytes.npy")) == load_tokenizer(hub.out).vocab_size == 50257
    hub.run("offline", "2")  # all there: no question asked
    assert not hub.asked()


def test_fineweb_says_what_validation_shares_with_training(hub):
    shutil.copy(hub.source / ALL_FILES[0], hub.source / ALL_FILES[1])
    assert "1 of 1 validation documents are in the training data" in hub.run("good", "1")
    assert "training data" not in hub.run("good", "1")  # nothing new: not looked at again


def test_fineweb_calls_the_hub_as_it_wants_to_be_called():
    hub = pytest.importorskip("huggingface_hub")
    inspect.signature(hub.dataset_info).bind("owner/name", timeout=10)
    inspect.signature(hub.hf_hub_download).bind("owner/name", "file", repo_type="dataset", revision="0" * 40,
                                                local_dir=Path("folder"))


def test_fineweb_without_the_tokenizer(hub):
    environment = {**hub.environment("good"), "FAKE_TIKTOKEN": "offline"}
    stdout, stderr = run_script("fineweb.py", "--out", hub.out, "1", **environment)
    assert sorted(os.listdir(hub.out)) == sorted(ALL_FILES[:2]) and not stderr
    line = stdout.splitlines()[-1]
    assert "no network" in line and "token_bytes.npy" in line
    assert f"python data/token_tables.py {hub.out} --tokenizer gpt2" in line
    hub.run("good", "1")  # the next run makes up for it, and downloads nothing
    assert hub.asked() == ["info", *ALL[:2]] and set(TABLES) < set(os.listdir(hub.out))


def test_fineweb_offline_and_missing(hub):
    for shown in (hub.fail("offline"), hub.fail("good", "3")):
        assert "--track=tiny" in shown and "run the same command again" in shown
    assert hub.asked() == ["info", "info", *ALL, "train_000003"]
    assert "could not connect many lines" in hub.fail("offline", "5")
    for count in ("104", "0"):
        assert f"1 to 103, got {count}" in hub.fail("good", count)
    assert sorted(os.listdir(hub.out)) == sorted(ALL_FILES)


def test_fineweb_interrupted_goes_on(hub):
    assert "connection reset" in hub.fail("interrupted", "2")
    assert hub.asked() == ["info", *ALL] and sorted(os.listdir(hub.out)) == sorted(ALL_FILES[:2])
    _, stderr = run_script("fineweb.py", "--out", hub.out, "2", code=130, **hub.environment("interrupt"))
    assert stderr.count("\n") == 1 and hub.asked() == ["info", ALL[2]]
    hub.run("good", "2")
    assert hub.asked() == ["info", ALL[2]] and set(ALL_FILES) < set(os.listdir(hub.out))


def test_fineweb_downloads_a_truncated_file_again(hub):
    line = hub.fail("truncated", "1")
    assert "fineweb_val_000000.bin: 1,001 tokens need 3,026 bytes, found 3,024" in line
    hub.asked()
    assert ALL_FILES[0] in hub.run("good", "1")  # says which file, and why
    assert hub.asked() == ["info", *ALL[:2]]
    assert (hub.out / ALL_FILES[0]).read_bytes() == (hub.source / ALL_FILES[0]).read_bytes()


def test_fineweb_does_not_mix_with_other_data(hub):
    hub.out.mkdir()
    shards.write_shard(hub.out / "mine_train_000000.bin", [256, 1])
    assert "another data set" in hub.fail("good", "1")
    assert os.listdir(hub.out) == ["mine_train_000000.bin"] and not hub.asked()


# ----------------------------------------------------------------- every script


@pytest.mark.parametrize("script, arguments", [
    ("sample.py", []), ("fineweb.py", ["1"]), ("tokenize_text.py", ["1"]),
    ("token_tables.py", ["1", "--tokenizer", "bytes"])])
def test_help_and_unknown_flags(script, arguments, tmp_path):
    stdout, stderr = run_script(script, "--help", cwd=tmp_path)
    assert stdout.startswith(f"usage: {script}") and not stderr
    assert "--nonsense" in error_of(script, *arguments, "--nonsense", cwd=tmp_path)


@pytest.mark.parametrize("script, arguments", [
    ("sample.py", ["--out=~/out"]), ("fineweb.py", ["--out=~/out"]),
    ("tokenize_text.py", ["~/in.txt", "--out=~/out"]),
    ("token_tables.py", ["~/out", "--tokenizer=~/tiny.tiktoken"])])
def test_a_tilde_is_the_home_folder(script, arguments, tmp_path, rank_file):
    """Each names the folder in refusing its shard, which is another data set's and has no document."""
    (tmp_path / "out").mkdir()
    shards.write_shard(tmp_path / "out" / "mine_train_000000.bin", [1])
    assert f"{tmp_path}/out" in error_of(script, *arguments, cwd="/", HOME=str(tmp_path))
