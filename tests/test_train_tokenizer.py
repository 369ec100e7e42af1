"""Tests of data/train_tokenizer.py: tiktoken and the library encode alike, and all bytes are counted."""

import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken.load

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))

import shards  # noqa: E402
import train_tokenizer as tt  # noqa: E402
from test_data import documents_of, error_of, run_script, texts_of  # noqa: E402
from token_tables import token_bytes  # noqa: E402
from tokenizer import Tokenizer, load_tokenizer  # noqa: E402

WORDS = [
    "the", "then", "a", "ananas", "banana", "naïve", "Straße", "日本語", "日本", "🙂", "🙃🙂", "1984",
    "don't", "we'll", "--", "...", "\r\n", "\n", "\n\n", "\t", "  ", " ", "é", "e\u0301", "x" * 70,
]
HARD = [
    "", " ", "  leading spaces", "trailing  ", "tabs\t\tand \t mixed", "CRLF\r\nand\r\n\r\nmore\r\n",
    "\n\n\n x", "naïve Straße 日本語のテキスト", "🙂🙃🙂 👩\u200d👩\u200d👧", "e\u0301 é", "don't we'll I'M",
    "1984 19 84", "...--... --", "banananananas", "a" * 10_000, "ab" * 3_000 + " " + "日本" * 1_000,
    "\u00a0no-break\u2003em\u3000wide\u0085next", "\x00\x01\x7f control", "\ufeffmark", "<|endoftext|>",
    "\U0010ffff\ue000",
]


def make_texts(seed, count=300):
    """Documents of words that share parts, at random lengths and with many kinds of white space."""
    chance = random.Random(seed)
    lengths = [chance.randint(1, 60) for _ in range(count)]
    return ["".join(chance.choice(WORDS) + chance.choice(["", " ", " ", "\n"]) for _ in range(length))
            for length in lengths]


@pytest.fixture(scope="module")
def trained():
    """The library's tokenizer, its tokens' bytes by id, and ours."""
    library, texts_by_id = tt.train(make_texts(0), 500)
    return library, texts_by_id, Tokenizer("x.tiktoken", tt.to_ranks(texts_by_id))


@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_hard_texts_are_encoded_as_the_library_does(trained, text):
    library, texts_by_id, ours = trained
    expected = [texts_by_id[i] for i in library.encode(text).ids]
    ids = ours.encode(text)
    assert [ours.texts[i] for i in ids] == expected
    assert ours.decode(ids) == text
    assert token_bytes(ours.texts)[ids].sum() == len(text.encode())


def test_other_texts_are_encoded_as_the_library_does(trained):
    library, texts_by_id, ours = trained
    tt.check_equality(library, texts_by_id, ours, make_texts(1))
    letters = random.Random(2)
    tt.check_equality(library, texts_by_id, ours,
                      ["".join(letters.choices("abnx ", k=letters.randint(1, 40))) for _ in range(500)])


def test_repeated_letters_whose_merges_overlap():
    chance = random.Random(0)
    texts = ["".join(chance.choices("ab", k=chance.randint(1, 30))) for _ in range(1000)]
    library, texts_by_id = tt.train(texts, 600)
    ours = Tokenizer("x.tiktoken", tt.to_ranks(texts_by_id))
    tt.check_equality(library, texts_by_id, ours, texts + ["a" * n for n in range(200)])


def test_ranks_are_in_the_order_of_merges(trained):
    """Each token is made of two earlier ones, and encodes to itself by merges alone."""
    library, _, ours = trained
    assert ours.texts[:256] == [bytes([byte]) for byte in range(256)]
    characters = tt.byte_of_character()
    merges = json.loads(library.to_str())["model"]["merges"]
    pairs = [[bytes(characters[c] for c in part) for part in pair] for pair in merges]
    assert [left + right for left, right in pairs] == ours.texts[256:-1]
    rank = {text: i for i, text in enumerate(ours.texts)}
    assert all(max(rank[left], rank[right]) < rank[left + right] for left, right in pairs)


def test_a_difference_between_the_libraries_is_found(trained):
    library, texts_by_id, ours = trained
    merged = next(text for text in ours.texts[256:-1] if text.isalpha())
    swapped = Tokenizer("x.tiktoken", [*ours.texts[:256], *reversed(ours.texts[256:-1])])
    with pytest.raises(ValueError, match="encode .* differently"):
        tt.check_equality(library, texts_by_id, swapped, [merged.decode(), *make_texts(0)])


def test_from_text_to_shards_and_from_shards_to_the_same_tokens(tmp_path):
    """The file serves tokenize_text.py, whose shards give their text back, with all bytes counted."""
    texts = list(dict.fromkeys(make_texts(3)))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = tmp_path / "bpe.tiktoken"
    printed, _ = run_script("train_tokenizer.py", tmp_path / "texts.jsonl", "--vocab", 400, "--out", out,
                            "--val-fraction", 0)
    assert "400 tokens, BOS included" in printed and "bytes per token" in printed
    assert len(tiktoken.load.load_tiktoken_bpe(str(out))) == 399
    data = tmp_path / "data"
    run_script("tokenize_text.py", tmp_path / "texts.jsonl", "--tokenizer", out, "--out", data, "--name", "x",
               "--processes", 1, "--val-fraction", 0.1)
    tokenizer, manifest = load_tokenizer(data), shards.read_manifest(data)
    assert manifest["vocab_size"] == 400 and manifest["bos"] == 399
    lengths = np.load(data / "token_bytes.npy")
    for split in ("train", "val"):
        documents = documents_of(data, split)
        assert sum(lengths[document].sum() for document in documents) == manifest["bytes"][split]
        assert {tokenizer.decode(document) for document in documents} <= set(texts)
    again = tmp_path / "again.tiktoken"
    run_script("train_tokenizer.py", data, "--vocab", 300, "--out", again)
    train = [tokenizer.decode(document) for document in documents_of(data, "train")]
    assert load_tokenizer(again).texts[:-1] == tt.to_ranks(tt.train(train, 300)[1])


def test_documents_of_the_validation_split_are_left_out(tmp_path, monkeypatch):
    texts = [f"document number {i} of many {'xyz' * i}\n" for i in range(50)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i:02}.txt").write_text(text)
    run_script("tokenize_text.py", tmp_path, "--tokenizer", "bytes", "--out", tmp_path / "data",
               "--processes", 1, "--val-fraction", 0.5)
    command = ["train_tokenizer.py", str(tmp_path), "--vocab=300", "--val-fraction=0.5", "--out=x.tiktoken"]
    monkeypatch.setattr(sys, "argv", command)
    args = tt.parse_args()
    found = list(tt.training_texts(args, tt.tqdm(disable=True)))
    assert found == texts_of(tmp_path / "data", "train")
    args.max_bytes = 100
    few = list(tt.training_texts(args, tt.tqdm(disable=True)))
    assert few == found[: len(few)] and sum(map(len, few[:-1])) < 100 <= sum(map(len, few))


MISTAKES = {
    "too few pairs": (["few.txt", "--vocab", 9000, "--out", "x.tiktoken"], "pairs for [0-9]+ tokens"),
    "vocabulary too small": (["few.txt", "--vocab", 256, "--out", "x.tiktoken"], "--vocab must be from 257"),
    "vocabulary too large": (["few.txt", "--vocab", 65537, "--out", "x.tiktoken"], "to 65536"),
    "another suffix": (["few.txt", "--vocab", 300, "--out", "x.txt"], "must end in .tiktoken"),
    "no such file": (["none.txt", "--vocab", 300, "--out", "x.tiktoken"], "none.txt: no such file"),
    "exists": (["few.txt", "--vocab", 300, "--out", "old.tiktoken"], "--force"),
    "no such folder": (["few.txt", "--vocab", 300, "--out", "no/x.tiktoken"], "no such folder"),
    "shards without a tokenizer": (["bare", "--vocab", 300, "--out", "x.tiktoken"], "tiktoken: not found"),
    "not text": (["zeros.txt", "--vocab", 300, "--out", "x.tiktoken"], "zeros.txt: has zero bytes"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(tmp_path, mistake):
    (tmp_path / "few.txt").write_text("few words, few words\n")
    (tmp_path / "zeros.txt").write_bytes(b"a\0b")
    (tmp_path / "old.tiktoken").write_text("old")
    (tmp_path / "bare").mkdir()
    shards.write_shard(tmp_path / "bare" / "x_train_000000.bin", [256, 1, 2])
    arguments, words = MISTAKES[mistake]
    line = error_of("train_tokenizer.py", *arguments, cwd=tmp_path)
    assert re.search(words, line), line
    assert (tmp_path / "old.tiktoken").read_text() == "old" and not (tmp_path / "x.tiktoken").exists()
