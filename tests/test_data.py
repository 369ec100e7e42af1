"""Tests of data/: the shard format, the offline sample, tokenizing, the FineWeb download. No network."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).resolve().parents[1] / "data"
sys.path.insert(0, str(DATA))

import shards  # noqa: E402


def run_script(script, *args, code=0, cwd=None, **environment):
    """Runs a script of data/ in its own process, checks its exit status and returns (stdout, stderr)."""
    command = [sys.executable, DATA / script, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment})
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done.stdout, done.stderr


def error_of(script, *args, **keywords):
    """Runs a script that must fail as a user's mistake does: status 2, one line. Returns that line."""
    _, stderr = run_script(script, *args, code=2, **keywords)
    assert stderr.count("\n") == 1 and stderr.startswith(f"{script}: "), stderr
    return stderr


def documents_of(folder, split):
    """Returns the documents of a split, token arrays without BOS, joined over its shards."""
    manifest = shards.check_folder(folder)
    files = [entry["file"] for entry in manifest["shards"] if f"_{split}_" in entry["file"]]
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
            shards.check_shard(path)


@pytest.mark.parametrize("tokens", [[], [-1], [65536], [[1, 2]]])
def test_tokens_that_do_not_fit_are_not_written(tmp_path, tokens):
    with pytest.raises(ValueError, match="x_train"):
        shards.write_shard(tmp_path / "x_train_000000.bin", np.array(tokens, np.int64))
    assert not os.listdir(tmp_path)


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), shards.atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.bin"]


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
    files = ["manifest.json", "sample_train_000000.bin", "sample_val_000000.bin"]
    assert sorted(os.listdir(sample_folder)) == files


def test_sample_splits_share_nothing_long(sample_folder):
    def long_paragraphs(split):
        found = [" ".join(paragraph.split()).lower() for text in texts_of(sample_folder, split)
                 for paragraph in re.split(r"\n\s*\n", text)]
        found = [paragraph for paragraph in found if len(paragraph) >= 80]
        assert len(found) == len(set(found))
        return set(found)

    assert not set(texts_of(sample_folder, "train")) & set(texts_of(sample_folder, "val"))
    assert not long_paragraphs("train") & long_paragraphs("val")


def test_sample_is_rebuilt_only_if_damaged_and_then_identical(sample_folder):
    def files():
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sample_folder.iterdir()}

    before, written = (sample_folder / "manifest.json").read_bytes(), files()
    stdout, _ = run_script("sample.py", "--out", sample_folder)
    assert "already there and valid" in stdout and "built" not in stdout and files() == written
    path = sample_folder / "sample_val_000000.bin"
    path.write_bytes(path.read_bytes()[:-1])
    stdout, _ = run_script("sample.py", "--out", sample_folder, PYTHONHASHSEED="2")
    assert "building again" in stdout and path.name in stdout
    assert (sample_folder / "manifest.json").read_bytes() == before  # it holds the sha256 of every shard
    shards.check_folder(sample_folder)


def test_sample_of_another_version_of_the_script_is_built_again(sample_folder, tmp_path):
    folder = tmp_path / "sample"
    shutil.copytree(sample_folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"builder": "another"}))
    stdout, _ = run_script("sample.py", "--out", folder)
    assert "another version of sample.py" in stdout and "built" in stdout
    assert json.loads((folder / "manifest.json").read_text()) == manifest


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
    assert manifest["tokenizer"] == "tiny.tiktoken, 263 ranks"
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
    pieces = list(tokenize_text.read_file(source, "text", "<|endoftext|>"))
    assert [text for text, _ in pieces] == texts
    assert sum(share for _, share in pieces) == source.stat().st_size
    run_script("tokenize_text.py", source, "--out", tmp_path / "out", "--tokenizer", "bytes",
               "--val-fraction", 0.2, "--split-on", "<|endoftext|>")
    assert sorted(texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "val")) == sorted(texts)


def test_tokenize_refuses_and_replaces_existing_shards(tmp_path):
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
    assert sorted(os.listdir(out)) == ["manifest.json", "text_train_000000.bin", "text_val_000000.bin"]
    assert "another data set" in error_of("tokenize_text.py", *arguments, "--force", "--name", "other")


MISTAKES = {
    "no file": (["missing.txt"], "missing.txt"),
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
    "bad fraction": (["good.jsonl", "--val-fraction", "2"], "--val-fraction"),
    "bad processes": (["good.jsonl", "--processes", "0"], "--processes"),
    "bad name": (["good.jsonl", "--name", "a/b"], "--name"),
    "unknown flag": (["good.jsonl", "--nonsense"], "--nonsense"),
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
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    assert "x.parquet" in error_of("tokenize_text.py", *arguments, "--force")


# -------------------------------------------------------------------- fineweb

FAKE_HUB = '''
import hashlib, os, pathlib, types
SOURCE, MODE = pathlib.Path(os.environ["FAKE_SOURCE"]), os.environ["FAKE_MODE"]
ASKED = open(os.environ["FAKE_LOG"], "a")

def hf_hub_url(repo, file, repo_type):
    assert (repo, repo_type) == ("kjj0/fineweb10B-gpt2", "dataset")
    return file

def get_hf_file_metadata(url, timeout):
    assert timeout <= 20
    if MODE == "offline":
        raise RuntimeError("could not connect\\n\\nmany lines") from OSError("Name or service not known")
    if not (SOURCE / url).exists():
        raise RuntimeError("404 Not Found")
    content = (SOURCE / url).read_bytes()
    return types.SimpleNamespace(size=len(content), etag=hashlib.sha256(content).hexdigest())

def hf_hub_download(repo, file, repo_type, local_dir):
    print(file, file=ASKED, flush=True)
    content, path = (SOURCE / file).read_bytes(), pathlib.Path(local_dir, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    if MODE == "interrupted" and "train_000002" in file:
        path.with_suffix(".incomplete").write_bytes(content[:-100])
        raise ConnectionError("connection reset by peer")
    if MODE == "interrupt" and "train_000002" in file:
        raise KeyboardInterrupt
    if MODE == "truncated":
        content = content[:-2]
    if MODE == "flipped":
        content = content[:-1] + bytes([content[-1] ^ 1])
    path.write_bytes(content)
    return str(path)
'''


@pytest.fixture
def hub(tmp_path):
    """A stand-in for the hub: .run(mode, *args) runs fineweb.py, .asked() lists what it downloaded since."""

    class Hub:
        source, out, log = tmp_path / "source", tmp_path / "out", tmp_path / "log"

        def environment(self, mode):
            return {"PYTHONPATH": str(tmp_path / "fake"), "FAKE_SOURCE": str(self.source), "FAKE_MODE": mode,
                    "FAKE_LOG": str(self.log)}

        def run(self, mode, *args):
            return run_script("fineweb.py", "--out", self.out, *args, **self.environment(mode))[0]

        def fail(self, mode, *args):
            return error_of("fineweb.py", "--out", self.out, *args, **self.environment(mode))

        def asked(self):
            files = self.log.read_text().split() if self.log.exists() else []
            self.log.write_text("")
            return [re.sub("fineweb_|.bin", "", file) for file in files]

    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "huggingface_hub.py").write_text(FAKE_HUB)
    Hub.source.mkdir()
    for i, file in enumerate(["val_000000", "train_000001", "train_000002"]):
        shards.write_shard(Hub.source / f"fineweb_{file}.bin", np.append(50256, np.arange(1000 + i)))
    return Hub()


ALL = ["val_000000", "train_000001", "train_000002"]


def test_fineweb_download(hub):
    hub.run("good", "1")
    assert hub.asked() == ALL[:2]
    hub.run("good", "--shards", "2")
    assert hub.asked() == ALL[2:]
    manifest = shards.check_folder(hub.out)
    assert [entry["tokens"] for entry in manifest["shards"]] == [1002, 1003, 1001]
    assert manifest["documents"] == {"train": 2, "val": 1} and manifest["tokenizer"] == "gpt2"
    assert sorted(os.listdir(hub.out)) == sorted([f"fineweb_{file}.bin" for file in ALL] + ["manifest.json"])
    hub.run("offline", "2")  # all there: no question asked
    hub.run("offline", "2", "--verify")
    (hub.out / "manifest.json").unlink()
    hub.run("offline", "2")  # found good, listed anew
    assert shards.check_folder(hub.out) == manifest and not hub.asked()


def test_fineweb_offline_and_missing(hub):
    for shown in (hub.fail("offline"), hub.fail("good", "3")):
        assert "--track=tiny" in shown and "run the same command again" in shown
    assert "Name or service not known" in hub.fail("offline", "5")  # the cause, not the library's paragraph
    assert "1 to 103" in hub.fail("good", "104") and "1 to 103" in hub.fail("good", "1", "--shards", "2")
    assert not [file for file in os.listdir(hub.out) if "000003" in file]


def test_fineweb_interrupted_goes_on(hub):
    assert "connection reset" in hub.fail("interrupted", "2")
    assert hub.asked() == ALL
    assert not (hub.out / "fineweb_train_000002.bin").exists()
    assert len(shards.check_folder(hub.out)["shards"]) == 2
    _, stderr = run_script("fineweb.py", "--out", hub.out, "2", code=130, **hub.environment("interrupt"))
    assert stderr.count("\n") == 1 and hub.asked() == ALL[2:]
    hub.run("good", "2")
    assert hub.asked() == ALL[2:] and not (hub.out / ".partial").exists()


@pytest.mark.parametrize("mode", ["truncated", "flipped"])
def test_fineweb_bad_download_is_never_kept(hub, mode):
    line = hub.fail(mode, "1")
    assert "fineweb_val_000000.bin" in line and "announced" in line
    assert not shards.list_shards(hub.out) and not shards.list_shards(hub.out / ".partial")
    hub.run("good", "1")
    assert len(shards.check_folder(hub.out)["shards"]) == 2


def test_fineweb_bad_shard_at_the_source(hub):
    shards.write_shard(hub.source / "fineweb_val_000000.bin", [50256, 50257])
    assert "50257" in hub.fail("good", "1")
    assert not shards.list_shards(hub.out)


def test_fineweb_mends_a_corrupt_file(hub):
    hub.run("good", "2")
    hub.asked()
    path = hub.out / "fineweb_train_000001.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\x01")  # a flipped bit that only the sha256 shows
    assert path.name in hub.fail("good", "--verify")
    hub.fail("truncated", "2")
    assert path.exists() and path.read_bytes() != content  # not lost before a better one is there
    assert path.name in hub.run("good", "2")
    assert path.read_bytes() == content and hub.asked() == [ALL[1]] * 2
    path.unlink()
    assert path.name in hub.fail("good", "--verify")


# ----------------------------------------------------------------- every script


@pytest.mark.parametrize("script", ["sample.py", "fineweb.py", "tokenize_text.py"])
def test_help_and_unknown_flags(script, tmp_path):
    stdout, stderr = run_script(script, "--help", cwd=tmp_path)
    assert "--out" in stdout and not stderr
    assert "--nonsense" in error_of(script, "1", "--nonsense", cwd=tmp_path)
