"""Turns text, JSON lines or parquet files into token shards, with a validation split by document.

    python data/tokenize_text.py my_texts/ --out data/mine
    python data/tokenize_text.py stories.txt --split-on '<|endoftext|>' --tokenizer bytes --name stories
    python data/tokenize_text.py dump.jsonl more.parquet --field content --processes 8

Folders are searched for .txt, .md, .jsonl and .parquet files. A plain text file is one document unless
--split-on says where documents end; then the white space around each is dropped. In JSON lines and parquet,
each row is one. Exact copies and empty documents are left out. A hash of its text decides which split a
document goes to, whatever else is in the input and however many processes work.
"""

import hashlib
import json
import multiprocessing
import os
import signal
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from shards import (MAX_TOKENS, Parser, ShardWriter, list_shards, main_guard, make_manifest, publish,
                    refuse_other_data, split_of, staging)
from token_tables import write_tables
from tokenizer import load_tokenizer

TEXT_SUFFIXES, ROW_SUFFIXES = {".txt", ".md"}, {".jsonl", ".parquet"}
READ_CHARS = 1 << 22  # of a text file that is split into documents
BATCH_BYTES = 1 << 20  # of text, sent to a process at once
BATCHES_AHEAD = 4  # per process; bounds the memory when reading outruns tokenizing


# ---------------------------------------------------------------------- input


def find_files(paths):
    """Returns the files to read: each path that is a file, and in each folder all of a known kind, sorted."""
    files = []
    for path in paths:
        if path.is_dir():
            files += sorted(file for file in path.rglob("*")
                            if file.suffix.lower() in TEXT_SUFFIXES | ROW_SUFFIXES and file.is_file())
        elif path.exists():
            files.append(path)
        else:
            raise ValueError(f"{path}: no such file or folder; check the path")
    if not files:
        raise ValueError(f"no .txt, .md, .jsonl or .parquet files in {', '.join(map(str, paths))}; "
                         "give other paths")
    return list(dict.fromkeys(files))


def read_file(path, field, split_on):
    """Yields (document, share) of a file of any kind; `share` is how many bytes of the file it stands for."""
    kind = path.suffix.lower()
    if kind == ".jsonl":
        yield from read_jsonl(path, field)
    elif kind == ".parquet":
        yield from read_parquet(path, field)
    else:
        try:
            yield from read_text(path, split_on)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error.reason}); convert it first, for example with "
                             "iconv -f latin1 -t utf-8") from None


def read_text(path, split_on):
    """Yields (document, share) of a plain text file, cut at each `split_on`, if given."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        if not split_on:
            yield file.read(), path.stat().st_size
            return
        rest = ""
        while chunk := file.read(READ_CHARS):
            *documents, rest = (rest + chunk).split(split_on)
            for document in documents:
                yield document.strip(), len((document + split_on).encode())
        yield rest.strip(), len(rest.encode())


def read_jsonl(path, field):
    """Yields (document, share) of a file that has one JSON object a line, with the text in `field`."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:  # also what the decoder raises
                raise ValueError(f"{path}: line {number} is not JSON in UTF-8 ({error}); "
                                 "mend or drop it") from None
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise ValueError(f"{path}: line {number} has no text in '{field}' (found: {found:.100}); "
                                 "name the right one with --field")
            yield row[field], len(line)


def read_parquet(path, field):
    """Yields (document, share) of a parquet file, with the text in the column `field`."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError("pyarrow is not installed; pip install pyarrow "
                         "(only parquet files need it)") from None
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise ValueError(f"no column '{field}' (found: {', '.join(file.schema_arrow.names):.100}); "
                                 "name the right one with --field")
            share = path.stat().st_size / max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        raise ValueError(f"column '{field}' holds a {type(text).__name__}, not text; "
                                         "name the right one with --field")
                    yield text, share
    except ValueError as error:  # pyarrow's own error for a damaged file is one, too
        raise ValueError(f"{path}: {error}") from None


def unique_documents(files, field, split_on, progress):
    """Yields each document, bytes of UTF-8, and its digest; no copies, none without visible text."""
    seen = set()
    for file in files:
        for document, share in read_file(file, field, split_on):
            progress.update(share)
            text = document.encode("utf-8", "replace")  # JSON can spell half of a surrogate pair
            digest = hashlib.blake2b(text, digest_size=16).digest()
            if digest not in seen and document.strip():
                seen.add(digest)
                yield text, digest


def choose_split(digest, val_fraction):
    """Returns "val" for the given fraction of all digests, "train" for the others."""
    return "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else "train"


# ------------------------------------------------------------------ processes


def batches(documents):
    """Groups (text, digest) pairs into lists of about BATCH_BYTES of text."""
    batch, size = [], 0
    for text, digest in documents:
        batch.append((text, digest))
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


worker_tokenizer = None  # one per process: building it anew for every batch would cost more than tokenizing


def start_worker(source):
    """Prepares a process. It ignores Ctrl-C, which the main process answers for all."""
    global worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker_tokenizer = load_tokenizer(source)


def encode_in_worker(texts):
    """Returns the tokens of each text, (n,) uint16 arrays."""
    return [worker_tokenizer.encode(text.decode()) for text in texts]


def encode_all(documents, source, tokenizer, processes):
    """Yields (tokens, n_bytes, digest) of each document, in order, by several processes if asked."""
    if processes == 1:
        for text, digest in documents:
            yield tokenizer.encode(text.decode()), len(text), digest
        return
    # spawn, not fork: tiktoken and the progress bar have threads running by now
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, start_worker, (source,)) as pool:
        waiting = deque()
        try:
            for batch in batches(documents):
                waiting.append((batch, pool.submit(encode_in_worker, [text for text, _ in batch])))
                if len(waiting) > BATCHES_AHEAD * processes:
                    yield from collect(*waiting.popleft())
            while waiting:
                yield from collect(*waiting.popleft())
        except BrokenProcessPool:
            raise ValueError("a tokenizing process died, perhaps for want of memory; "
                             "use fewer --processes, or --split-on for very long documents") from None
        finally:
            pool.shutdown(cancel_futures=True)


def collect(batch, future):
    """Waits for a batch and yields (tokens, n_bytes, digest) of its documents."""
    for (text, digest), tokens in zip(batch, future.result()):
        yield tokens, len(text), digest


# ----------------------------------------------------------------------- main


def build(args, files, tokenizer):
    """Tokenizes `files` into shards in args.out and returns the manifest."""
    total = sum(file.stat().st_size for file in files)
    with staging(args.out) as stage, tqdm(total=total, unit="B", unit_scale=True, disable=None) as progress:
        writers = {split: ShardWriter(stage, args.name, split, args.shard_tokens, tokenizer.bos)
                   for split in ("train", "val")}
        documents = unique_documents(files, args.field, args.split_on, progress)
        for tokens, n_bytes, digest in encode_all(documents, args.tokenizer, tokenizer, args.processes):
            writers[choose_split(digest, args.val_fraction)].add(tokens, n_bytes)
        for writer in writers.values():
            writer.close()
        check_splits(writers, args.val_fraction)
        write_tables(stage, tokenizer)
        manifest = make_manifest(args.name, tokenizer.name, tokenizer.vocab_size, tokenizer.bos, writers,
                                 f"{len(files)} files: {', '.join(file.name for file in files):.200}")
        publish(stage, args.out, manifest)
    return manifest


def check_splits(writers, val_fraction):
    """Raises ValueError if a split that was asked for has no document."""
    train, val = writers["train"].documents, writers["val"].documents
    if not train + val:
        raise ValueError("the input has no text; give other files")
    if not train or (val_fraction > 0 and not val):
        raise ValueError(f"{train} training and {val} validation documents; change --val-fraction "
                         f"({val_fraction}), or give more documents, for example by --split-on")


def parse_args():
    """Returns the command line's arguments, checked."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", type=Path, nargs="+", metavar="PATH", help="files or folders")
    parser.add_argument("--tokenizer", default="gpt2",
                        help="gpt2 (default), bytes, a .tiktoken file, or a data folder that has one")
    parser.add_argument("--name", default="text", help="name of the data set (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder to write (default: NAME, beside this script)")
    parser.add_argument("--field", default="text",
                        help="where .jsonl and .parquet rows have the text (default: text)")
    parser.add_argument("--split-on", metavar="MARK", help="what separates the documents of text files")
    parser.add_argument("--val-fraction", type=float, default=0.01, metavar="F",
                        help="share of the documents that goes to validation (default: %(default)s; 0: none)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N",
                        help="tokens in a shard (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1), metavar="N",
                        help="processes that tokenize (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace the shards that are in the folder")
    args = parser.parse_args()
    args.out = args.out or Path(__file__).resolve().parent / args.name
    if not 0 <= args.val_fraction < 1:
        parser.error(f"--val-fraction must be from 0 to below 1, got {args.val_fraction}")
    if not 2 <= args.shard_tokens <= MAX_TOKENS:
        parser.error(f"--shard-tokens must be from 2 to {MAX_TOKENS}, got {args.shard_tokens}")
    if args.processes < 1:
        parser.error(f"--processes must be 1 or more, got {args.processes}")
    if not args.name.replace("-", "").replace("_", "").isalnum():
        parser.error(f"--name must be of letters, digits, - and _, got '{args.name}'")
    return args


def main():
    args = parse_args()
    refuse_other_data(args.out, args.name)
    if list_shards(args.out) and not args.force:
        raise ValueError(f"{args.out}: already has shards; choose another --out, or --force to replace them")
    manifest = build(args, find_files(args.inputs), load_tokenizer(args.tokenizer))
    print(f"{args.out}: {len(manifest['shards'])} shards, tokenizer {manifest['tokenizer']}")
    for split, count in manifest["documents"].items():
        tokens = sum(entry["tokens"] for entry in manifest["shards"] if split_of(entry["file"]) == split)
        print(f"{split:5} {manifest['bytes'][split]:>13,} bytes  {tokens:>13,} tokens  {count:>9,} documents")


if __name__ == "__main__":
    main_guard(main)
