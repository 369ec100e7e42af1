"""The byte-level tokenizers: the only place that reads files of token texts, encodes and decodes."""

import base64
import os
from functools import cached_property
from pathlib import Path

import numpy as np

RANKS = "tokenizer.tiktoken"  # what a data folder's own tokenizer is called
MAX_TEXTS = 2**16 - 1  # a shard's tokens have 16 bits, and BOS needs one id
# GPT-2's rule for cutting text into words; the possessive `++` keeps long runs of one kind from backtracking
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class Tokenizer:
    """Turns text into token ids and back.

    name: "bytes", "gpt2" or the file's name, as a manifest states it
    texts: the bytes of each token, by id. The last one is BOS, which precedes each document and has no text.
    vocab_size, bos: the number of ids, BOS included; the last of them
    """

    def __init__(self, name: str, texts: list[bytes]):
        """`texts` are those of all tokens but BOS, in the order of their ids."""
        self.name, self.texts = name, [*texts, b""]
        self.vocab_size = len(self.texts)
        self.bos = self.vocab_size - 1
        self.plain_bytes = texts == byte_texts()

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of a text, (n,) uint16, without BOS. "<|endoftext|>" in it is text like any other.

        Raises ValueError if tiktoken, which all but "bytes" need, cannot be imported.
        """
        if self.plain_bytes:
            return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.uint16)
        return np.array(self.encoding.encode_ordinary(text), np.uint16)

    def decode(self, ids) -> str:
        """Returns the text of some ids, integers of any kind. Bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.texts[i] for i in ids).decode("utf-8", "replace")

    @cached_property
    def encoding(self):
        """tiktoken's encoder of these texts."""
        ranks = {text: rank for rank, text in enumerate(self.texts[:-1])}
        return import_tiktoken().Encoding(self.name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                          special_tokens={})


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Returns the tokenizer "bytes" or "gpt2", of a FILE.tiktoken, or of a data folder that has one.

    tiktoken downloads GPT-2's texts when they are first asked for, and keeps them. Raises ValueError, with a
    message of one line, if the tokenizer cannot be had or its file is damaged.
    """
    if str(source) == "bytes":
        return Tokenizer("bytes", byte_texts())
    if str(source) == "gpt2":
        return Tokenizer("gpt2", fetch_gpt2())
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        path = path / RANKS
        if not path.exists():
            raise ValueError(f"{path}: not found; python data/token_tables.py {source} "
                             "--tokenizer bytes|gpt2|FILE.tiktoken writes it")
    if not path.is_file():
        raise ValueError(f"unknown tokenizer '{source}'; give bytes, gpt2, a FILE.tiktoken or a data folder")
    return Tokenizer(path.name, read_ranks(path))


def byte_texts():
    """Returns the texts of the tokenizer "bytes": token i is the byte i."""
    return [bytes([byte]) for byte in range(256)]


def fetch_gpt2():
    """Returns the texts of GPT-2's 50,256 tokens."""
    tiktoken = import_tiktoken()
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever its downloader raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise ValueError(f"tiktoken cannot download GPT-2's tokenizer ({reason}); connect to the network, "
                         "or give a FILE.tiktoken as the tokenizer") from None
    return [encoding.decode_single_token_bytes(rank) for rank in range(encoding.eot_token)]


def import_tiktoken():
    """Returns the package tiktoken, which the tokenizer "bytes" does not need."""
    try:
        import tiktoken
    except ImportError:
        raise ValueError("tiktoken is not installed; pip install tiktoken "
                         "(only --tokenizer bytes works without it)") from None
    return tiktoken


def read_ranks(path):
    """Returns the texts of a file that has a base64 token and its rank on each line. ValueError if damaged.

    The ranks must be 0 to n-1. BOS becomes token n, which is 50,256 for GPT-2's file.
    """
    ranks = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                raise ValueError(f"{path}: line {number} is not a base64 token and a rank; "
                                 "use an intact file") from None
    n = len(ranks)
    if sorted(ranks.values()) != list(range(n)) or not ranks.keys() >= set(byte_texts()):
        raise ValueError(f"{path}: its {n} tokens must have ranks 0 to {n - 1} and include all 256 bytes; "
                         "use an intact file")
    if n > MAX_TEXTS:
        raise ValueError(f"{path}: {n} tokens, but a shard's tokens have 16 bits; "
                         f"use {MAX_TEXTS:,} tokens at most")
    return sorted(ranks, key=ranks.get)


def format_ranks(tokenizer: Tokenizer) -> bytes:
    """Returns what `read_ranks` reads: the texts of all tokens but BOS, in tiktoken's format."""
    lines = [base64.b64encode(text) + b" %d\n" % rank for rank, text in enumerate(tokenizer.texts[:-1])]
    return b"".join(lines)
