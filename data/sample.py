"""Builds a small English data set from the documentation inside this Python installation, without a network.

    python data/sample.py            # writes data/sample/: seconds, about 2 MB

Documents are the help topics of `pydoc_data` and the docstrings of the standard library's modules, for
training cut at paragraph ends into pieces of about 1,000 bytes and shuffled. Tokens are the bytes of the
UTF-8 text, 0 to 255, with 256 (BOS) before each document. The same Python version gives the same files. No
document is in both splits, nor is any paragraph of 80 characters or more.
"""

import ast
import hashlib
import lzma
import platform
import re
import sysconfig
import warnings
from pathlib import Path

import numpy as np
from tqdm import tqdm

from shards import (MANIFEST, Parser, ShardWriter, check_folder, main_guard, make_manifest, publish,
                    read_shard, refuse_other_data, staging, user_path)
from token_tables import add_tables

NAME, BOS, VOCAB_SIZE = "sample", 256, 257
VERSION = 2  # raise it with every change that gives other shards
SHARD_TOKENS = 100_000_000
MIN_DOCUMENT_BYTES = 200
MIN_PARAGRAPH = 80  # characters; a longer paragraph appears once in the whole data set
MIN_FRESH = 0.5  # a document that has less than this share of new text is dropped whole
VAL_BYTES = 150_000
PIECE_BYTES = 1_000  # training documents are cut at paragraph ends and shuffled, so that a batch mixes many
MAX_VAL_DOCUMENT = 25_000  # bytes; so that no single module is most of the validation split
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


# ------------------------------------------------------------------ documents


def library_files(root):
    """Returns the paths of the standard library's modules under `root`, sorted, without its own tests."""
    files = [path.relative_to(root) for path in root.rglob("*.py")]
    return sorted((path for path in files if not NOT_LIBRARY & set(path.parts)), key=Path.as_posix)


def parse(path):
    """Returns the syntax tree of a Python file, or None if it has none. Nothing is imported or run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old modules are no concern of ours
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # deliberately broken or unreadable files exist in some builds
        return None


def docstrings(tree):
    """Returns the docstrings of a module, its classes and its functions, cleaned, in source order."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, owners)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def help_topics(tree):
    """Returns the texts of the dictionary that `pydoc_data.topics` assigns, sorted by topic."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return [text for _, text in sorted(ast.literal_eval(node.value).items())]
    return []


def collect_documents():
    """Returns the raw documents, str each: help topics first, then modules by path."""
    root = Path(sysconfig.get_path("stdlib"))
    topics, modules = [], []
    for file in tqdm(library_files(root), desc="reading the standard library", unit=" files", disable=None):
        tree = parse(root / file)
        if tree is None:
            continue
        if file.as_posix() == "pydoc_data/topics.py":
            topics = help_topics(tree)
        else:
            modules.append("\n\n".join(docstrings(tree)))
    return topics + modules


def normalise(text):
    """Returns the text as it is compared with others."""
    return " ".join(text.split()).lower()


def fresh_documents(documents):
    """Yields each document without the long paragraphs seen before, unless too little of it is left.

    Texts are compared in lower case with white space collapsed, so that indentation hides no copy.
    """
    seen = set()
    for document in documents:
        kept, new = [], set()
        paragraphs = re.split(r"\n\s*\n", document.strip("\n"))
        for paragraph in paragraphs:
            key = normalise(paragraph)
            if len(key) >= MIN_PARAGRAPH:
                if key in seen or key in new:
                    continue
                new.add(key)
            kept.append(paragraph.rstrip())
        text = "\n\n".join(kept)
        long_enough = len(text.encode("utf-8", "replace")) >= MIN_DOCUMENT_BYTES
        if long_enough and len(text) >= MIN_FRESH * len(document) and normalise(text) not in seen:
            seen |= new | {normalise(text)}
            yield text


def pieces(document):
    """Cuts a document (bytes) at paragraph ends into pieces of about PIECE_BYTES, none of them tiny."""
    kept = [b""]
    for paragraph in document.split(b"\n\n"):
        if len(kept[-1]) < MIN_DOCUMENT_BYTES or len(kept[-1]) + 2 + len(paragraph) <= PIECE_BYTES:
            kept[-1] = (kept[-1] + b"\n\n" + paragraph).lstrip(b"\n")
        else:
            kept.append(paragraph)
    if len(kept) > 1 and len(kept[-1]) < MIN_DOCUMENT_BYTES:
        kept[-2:] = [kept[-2] + b"\n\n" + kept[-1]]
    return kept


def shuffled(texts):
    """Returns texts (bytes) in an order that depends on their content alone, without repetitions."""
    return sorted(set(texts), key=lambda text: hashlib.sha256(text).digest())


def split_documents(documents):
    """Shuffles documents (str); returns (pieces to train on, whole documents to validate on), lists of bytes.

    Validation takes documents in that order until it has VAL_BYTES; very long ones stay in training.
    """
    texts = shuffled(document.encode("utf-8", "replace") for document in documents)
    train, val, val_bytes = [], [], 0
    for text in texts:
        if val_bytes < VAL_BYTES and len(text) <= MAX_VAL_DOCUMENT:
            val.append(text)
            val_bytes += len(text)
        else:
            train.append(text)
    if val_bytes < VAL_BYTES or sum(map(len, train)) < VAL_BYTES:
        root = sysconfig.get_path("stdlib")
        raise ValueError(f"{root}: too little documentation in this Python installation "
                         f"({sum(map(len, texts)):,} bytes); use one that has the standard library's source")
    return shuffled(piece for text in train for piece in pieces(text)), val


# ------------------------------------------------------------------ baselines


def xz_bpb(train, val, val_bytes):
    """Bits per byte that `xz -9e` needs for the validation tokens (n,) after the training tokens (m,)."""

    def packed_size(tokens):
        text = np.where(tokens == BOS, 0, tokens).astype(np.uint8).tobytes()
        return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))  # a dictionary of 64 MB

    return (packed_size(np.concatenate([train, val])) - packed_size(train)) * 8 / val_bytes


def ngram_keys(tokens, n):
    """Packs the `n` tokens that end at each position, 9 bits a token, into (len(tokens),) int64."""
    padded = np.concatenate([np.full(n - 1, BOS), tokens]).astype(np.int64)
    keys = np.zeros(len(tokens), np.int64)
    for i in range(n):
        keys = keys << 9 | padded[i : i + len(tokens)]
    return keys


def look_up(keys, table, values):
    """Returns the value beside each key in the sorted `table`, 0 where it is missing."""
    rows = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return np.where(table[rows] == keys, values[rows], 0)


def ngram_bpb(train, val, val_bytes, order=5):
    """Bits per byte of the validation tokens under an interpolated n-gram model with Witten-Bell smoothing.

    p_n(c | h) = (count(h c) + kinds(h) p_{n-1}(c | h')) / (count(h) + kinds(h)), where kinds(h) is the number
    of different tokens seen after h and h' is h without its first token. Only training tokens are counted.
    """
    p = np.full(len(val), 1 / VOCAB_SIZE)
    for n in range(1, order + 1):
        grams, gram_counts = np.unique(ngram_keys(train, n), return_counts=True)
        contexts, first, kinds = np.unique(grams >> 9, return_index=True, return_counts=True)
        context_counts = np.add.reduceat(gram_counts, first)
        keys = ngram_keys(val, n)
        seen, kind = (look_up(keys >> 9, contexts, values) for values in (context_counts, kinds))
        mixed = (look_up(keys, grams, gram_counts) + kind * p) / np.maximum(seen + kind, 1)
        p = np.where(seen > 0, mixed, p)
    return -np.log2(p).sum() / val_bytes


def baselines(train, val, val_bytes):
    """Returns the bits per byte of text, document ends paid for, of two models without a training loop."""
    return [
        {"name": "xz -9e after the training text", "bpb": round(xz_bpb(train, val, val_bytes), 4)},
        {"name": "byte 5-gram, Witten-Bell", "bpb": round(float(ngram_bpb(train, val, val_bytes)), 4)},
    ]


# ----------------------------------------------------------------------- main


def build(folder):
    """Builds the data set in `folder` and returns its manifest."""
    train, val = split_documents(fresh_documents(collect_documents()))
    with staging(folder) as stage:
        writers = {}
        for split, documents in (("train", train), ("val", val)):
            writers[split] = ShardWriter(stage, NAME, split, SHARD_TOKENS, BOS)
            for text in documents:
                writers[split].add(np.frombuffer(text, np.uint8), len(text))
            writers[split].close()
        source = f"documentation inside Python {platform.python_version()}: help topics and docstrings"
        manifest = make_manifest(NAME, "bytes", VOCAB_SIZE, BOS, writers, source)
        tokens = [np.array(read_shard(stage / f"{NAME}_{split}_000000.bin")) for split in ("train", "val")]
        manifest["version"] = VERSION
        manifest["baseline"] = baselines(*tokens, writers["val"].bytes)
        publish(stage, folder, manifest)
    return manifest


def existing(folder):
    """Returns the manifest of a complete data set in `folder`, or None after saying why there is none."""
    if not (folder / MANIFEST).exists():
        return None
    try:
        manifest = check_folder(folder)
    except (ValueError, OSError) as error:
        print(f"building again: {error}")
        return None
    # before versions were numbered, version 2 wrote its hash as "builder", and version 1 nothing
    if manifest.get("version", 2 if "builder" in manifest else 1) != VERSION:
        print("building again: another version of sample.py built what is there")
        return None
    return manifest


def describe(manifest):
    """Prints a data set's size and its baselines."""
    for split, count in manifest.get("documents", {}).items():
        print(f"{split:5} {manifest['bytes'][split]:>9,} bytes  {count:>4} documents")
    for model in manifest.get("baseline", []):
        print(f"baseline {model['bpb']:.3f} bits per byte: {model['name']}")


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=user_path, default=Path(__file__).resolve().parent / NAME,
                        help="folder to write (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="build again even if the data is there")
    args = parser.parse_args()
    refuse_other_data(args.out, NAME)
    manifest = None if args.force else existing(args.out)
    if manifest:
        print(f"{args.out}: already there and valid ({manifest['source']})")
    else:
        manifest = build(args.out)
        print(f"{args.out}: built ({manifest['source']})")
    add_tables(args.out, "bytes")
    describe(manifest)


if __name__ == "__main__":
    main_guard(main)
