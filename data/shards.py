"""Token shards on disk: how they are written, checked and listed. Shared by the scripts in this folder.

A shard is 256 little-endian int32 (magic, version, token count, zeros) and then that many uint16 tokens.
Every document is preceded by its beginning-of-sequence token (BOS), and may run on into the next shard. A
data set is a folder of `NAME_train_000000.bin` and `NAME_val_000000.bin` files with one `manifest.json`.

Nothing is ever half-written under its final name: files are written beside their place, flushed and renamed.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
MAX_TOKENS = 2**31 - 1  # the header's count is an int32
MANIFEST = "manifest.json"
SHARD_NAME = re.compile(r"(?P<name>[^.].*)_(?P<split>train|val)_[0-9]{6}\.bin")
STALE_SECONDS = 24 * 3600  # an unfinished file or folder this old belongs to a run that was killed


# ---------------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_file(path):
    """Opens a binary file that appears as `path` only when the block ends without an error."""
    path = Path(path)
    remove_stale(path.parent, f".{path.name}.*.tmp")
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temp, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temp)
        raise


def remove_stale(folder, pattern):
    """Removes the files and folders that killed runs left in `folder` under names like `pattern`."""
    for old in folder.glob(pattern):
        with contextlib.suppress(OSError):  # another process may be removing it, too
            if time.time() - old.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(old) if old.is_dir() else old.unlink()


def sha256_file(path):
    """Returns the sha256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --------------------------------------------------------------------- shards


def write_shard(path, tokens):
    """Writes `tokens` (n,), integers from 0 to 65535, as a shard. ValueError if they do not fit."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not 0 < len(tokens) <= MAX_TOKENS:
        raise ValueError(f"{path}: a shard holds 1 to {MAX_TOKENS:,} tokens in one row, got {tokens.shape}")
    if tokens.dtype != np.uint16 and not (tokens.min() >= 0 and tokens.max() < 2**16):
        raise ValueError(f"{path}: tokens must lie in 0..65535, got {tokens.min()}..{tokens.max()}")
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with atomic_file(path) as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, "<u2").data)


def check_header(path):
    """Returns the token count in the header of a shard whose size agrees with it, else raises ValueError."""
    fix = "delete the file and make or download it again"
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES)[: size // 4 * 4], "<i4")
    if len(header) < HEADER_INTS:
        raise ValueError(f"{path}: a shard begins with {HEADER_BYTES} bytes of header, found {size}; {fix}")
    magic, version, count = (int(value) for value in header[:3])
    if magic != MAGIC:
        raise ValueError(f"{path}: not a token shard: magic number {magic}, expected {MAGIC}; {fix}")
    if version != VERSION:
        raise ValueError(f"{path}: shard version {version}, this code reads version {VERSION}; {fix}")
    if count <= 0:
        raise ValueError(f"{path}: the header promises {count} tokens, expected 1 or more; {fix}")
    expected = HEADER_BYTES + 2 * count
    if size != expected:
        raise ValueError(f"{path}: {count:,} tokens need {expected:,} bytes, found {size:,}; {fix}")
    return count


def read_shard(path):
    """Maps the tokens of a shard, (n,) uint16, read-only. Checks the header and the size only."""
    return np.memmap(path, "<u2", "r", offset=HEADER_BYTES, shape=(check_header(path),))


def check_shard(path, vocab_size, bos):
    """Checks a whole shard and returns its token count.

    Raises ValueError, naming the file, if the header is wrong, the size differs from the header's promise, a
    token is `vocab_size` or more, or `bos` never occurs (there would be no document to start at).
    """
    tokens = read_shard(path)
    if (largest := int(tokens.max())) >= vocab_size:
        raise ValueError(f"{path}: token {largest} found, the vocabulary has {vocab_size}; "
                         "use the data of this tokenizer, or make the file again")
    if not (tokens == bos).any():
        raise ValueError(f"{path}: no document begins here: token {bos} (BOS) not found; "
                         "use the data of this tokenizer, or make the file again with larger shards")
    return len(tokens)


class ShardWriter:
    """Cuts a stream of documents into shards of exactly `shard_tokens` tokens; the last one holds the rest.

    `shards`, `documents` and `bytes` describe what has been written, for the manifest.
    """

    def __init__(self, folder, name, split, shard_tokens, bos):
        self.folder, self.prefix, self.bos = Path(folder), f"{name}_{split}", bos
        self.buffer, self.fill, self.has_bos = np.empty(shard_tokens, np.uint16), 0, False
        self.shards, self.documents, self.bytes = [], 0, 0

    def add(self, tokens, n_bytes):
        """Appends BOS and one document: `tokens` (n,) uint16, which encode `n_bytes` bytes of UTF-8 text."""
        self._append(np.array([self.bos], np.uint16))
        self._append(np.asarray(tokens, np.uint16))
        self.documents += 1
        self.bytes += n_bytes

    def _append(self, tokens):
        while len(tokens):
            if self.fill == len(self.buffer):
                self._flush()
            taken = tokens[: len(self.buffer) - self.fill]
            self.buffer[self.fill : self.fill + len(taken)] = taken
            self.has_bos = self.has_bos or bool((taken == self.bos).any())
            self.fill += len(taken)
            tokens = tokens[len(taken) :]

    def _flush(self):
        path = self.folder / f"{self.prefix}_{len(self.shards):06d}.bin"
        if not self.has_bos:
            raise ValueError(f"{path.name}: one document fills a whole shard of {self.fill:,} tokens, "
                             "so none begins in it; use larger shards or split the document")
        write_shard(path, self.buffer[: self.fill])
        self.shards.append(describe_shard(path))
        self.fill, self.has_bos = 0, False

    def close(self):
        """Writes what is left. The last shard may be shorter than the others."""
        if self.fill and not self.has_bos and self.shards:
            self._extend_last()
        elif self.fill:
            self._flush()

    def _extend_last(self):
        # the tail of a document that began in the shard before: a shard of its own would have no BOS
        path = self.folder / self.shards.pop()["file"]
        write_shard(path, np.concatenate([read_shard(path), self.buffer[: self.fill]]))
        self.shards.append(describe_shard(path))
        self.fill = 0


def describe_shard(path):
    """Returns the manifest's entry for a shard: file name, token count, sha256."""
    return {"file": Path(path).name, "tokens": check_header(path), "sha256": sha256_file(path)}


# -------------------------------------------------------------------- folders


def write_manifest(folder, manifest):
    """Writes `manifest` (a dict) as the folder's manifest.json."""
    with atomic_file(Path(folder) / MANIFEST) as file:
        file.write((json.dumps(manifest, indent=2) + "\n").encode())


def read_manifest(folder):
    """Returns the folder's manifest as a dict. FileNotFoundError without one, ValueError if it is damaged."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        files = [entry["file"] for entry in manifest["shards"]]
        intact = (all(Path(file).name == file for file in files) and isinstance(manifest["name"], str)
                  and isinstance(manifest["vocab_size"], int) and isinstance(manifest["bos"], int))
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise ValueError(f"{path}: not a manifest, or damaged; delete it and make the data again")
    return manifest


def check_folder(folder):
    """Returns the manifest after checking every shard in it. ValueError or OSError if one is bad."""
    manifest = read_manifest(folder)
    if not manifest["shards"]:
        raise ValueError(f"{Path(folder) / MANIFEST}: lists no shards; make the data again")
    for entry in manifest["shards"]:
        path = Path(folder) / entry["file"]
        check_shard(path, manifest["vocab_size"], manifest["bos"])
        if sha256_file(path) != entry.get("sha256"):
            raise ValueError(f"{path}: not the tokens that the manifest lists (sha256); make the data again")
    return manifest


def list_shards(folder):
    """Returns {file: data-set name} of the files in `folder` that are named as shards, sorted by name."""
    names = sorted(os.listdir(folder)) if Path(folder).is_dir() else []
    return {file: match["name"] for file in names if (match := SHARD_NAME.fullmatch(file))}


def split_of(file):
    """Returns the split that a shard's file name states, "train" or "val"; the data set's may hold both."""
    return SHARD_NAME.fullmatch(file)["split"]


def read_documents(folder, split, bos):
    """Yields the tokens of each document of a split, bytes with BOS, joined where shards cut it."""
    document = b""
    for file in list_shards(folder):
        if split_of(file) != split:
            continue
        tokens = read_shard(Path(folder) / file)
        rest, *pieces = np.split(tokens, np.flatnonzero(tokens == bos))
        document += rest.tobytes()
        for piece in pieces:
            yield document
            document = piece.tobytes()
    yield document


def warn_of_shared_documents(folder, bos):
    """Prints a line if documents of the validation split are in the training split, too."""
    train, val = ({hashlib.blake2b(document, digest_size=16).digest()
                   for document in read_documents(folder, split, bos) if len(document) > 2}  # more than BOS
                  for split in ("train", "val"))
    if train & val:
        print(f"{folder}: {len(train & val):,} of {len(val):,} validation documents are in the training "
              "data, too: its loss would be too low; data/tokenize_text.py drops copies if it gets all text",
              flush=True)


def refuse_other_data(folder, name):
    """Raises ValueError if `folder` holds shards of another data set: one folder has one manifest."""
    for file, owner in list_shards(folder).items():
        if owner != name:
            raise ValueError(f"{folder}: holds another data set ({file}); choose another --out")


@contextlib.contextmanager
def staging(folder):
    """Makes `folder` if need be and a hidden folder in it to build in, which goes when the block ends."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale(folder, ".partial-*")
    try:
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder, ignore_cleanup_errors=True) as stage:
            yield Path(stage)
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # succeeds only if nothing came of it


def publish(stage, folder, manifest):
    """Moves all files from `stage` to `folder` in place of all older shards, and writes `manifest` there.

    The manifest goes first and comes last, so that a folder with a manifest is a finished one. No shard comes
    before the tables of its tokenizer.
    """
    folder = Path(folder)
    refuse_other_data(folder, manifest["name"])
    for file in (MANIFEST, *list_shards(folder)):
        (folder / file).unlink(missing_ok=True)
    for path in sorted(Path(stage).iterdir(), key=lambda path: (path.suffix == ".bin", path.name)):
        os.replace(path, folder / path.name)
    write_manifest(folder, manifest)


def make_manifest(name, tokenizer, vocab_size, bos, writers, source):
    """Returns the manifest of the data set that `writers`, {split: ShardWriter}, wrote."""
    return {
        "name": name,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "bos": bos,
        "shards": [entry for writer in writers.values() for entry in writer.shards],
        "documents": {split: writer.documents for split, writer in writers.items()},
        "bytes": {split: writer.bytes for split, writer in writers.items()},
        "source": source,
    }


# --------------------------------------------------------------- command line


def user_path(text):
    """Returns the path that a user wrote. Shells leave the ~ of --out=~/x to the program."""
    return Path(os.path.expanduser(text))


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        raise ValueError(f"{message}; see --help")


def main_guard(main):
    """Runs a script's `main()`. A user's error is one line on stderr and status 2, Ctrl-C status 130."""
    script = Path(sys.argv[0]).name
    try:
        main()
    except KeyboardInterrupt:
        print(f"{script}: interrupted; run the same command again", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"{script}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
