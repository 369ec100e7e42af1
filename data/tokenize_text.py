"""Turns text, JSON lines or parquet files into token shards, with a validation split by document.

    python data/tokenize_text.py my_texts/ --out data/mine
    python data/tokenize_text.py stories.txt --split-on '<|endoftext|>' --tokenizer bytes --name stories
    python data/tokenize_text.py dump.jsonl more.parquet --field content --processes 8

Folders are searched for .txt, .md, .jsonl and .parquet files. A plain text file is one document unless
--split-on says where documents end; then the white space around each is dropped and line ends become LF. In
JSON lines and parquet, each row is one; rows without text are skipped and counted. Files packed by gzip
(.txt.gz, ..) are read as they are, hidden ones in folders are skipped. Exact copies and empty documents are
left out. A hash of its text decides which split a document goes to, whatever else is in the input and
however many processes work.
"""

import codecs
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import signal
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from shards import (MAX_TOKENS, Parser, ShardWriter, list_shards, main_guard, make_manifest, publish,
                    refuse_other_data, split_of, staging, user_path)
from token_tables import write_tables
from tokenizer import load_tokenizer

TEXT_SUFFIXES, ROW_SUFFIXES = {".txt", ".md"}, {".jsonl", ".parquet"}
PACKED_SUFFIXES = {".gz", ".zst", ".xz", ".bz2"}
UNPACK = {b"\x28\xb5\x2f\xfd": "zstd -d", b"\xfd7zXZ": "xz -d", b"BZh9": "bzip2 -d", b"PK\3\4": "unzip"}
MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",  # before UTF-16's, which begin alike
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
READ_CHARS = 1 << 22  # of a text file that is split into documents
BATCH_BYTES = 1 << 20  # of text, sent to a process at once
BATCHES_AHEAD = 4  # per process; bounds the memory when reading outruns tokenizing


# ---------------------------------------------------------------------- input


def find_files(paths):
    """Returns the files to read: each path that is a file, and in each folder all of a known kind, sorted."""
    files, hidden = [], []
    for path in paths:
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                if kind_of(file) in TEXT_SUFFIXES | ROW_SUFFIXES and file.is_file():
                    is_hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
                    (hidden if is_hidden else files).append(file)
        elif path.exists():
            files.append(path)
        else:
            raise ValueError(f"{path}: no such file or folder; check the path")
    if hidden:
        print(f"skipped {len(hidden)} hidden files: {', '.join(map(str, hidden)):.200}")
    if not files:
        raise ValueError(f"no .txt, .md, .jsonl or .parquet files in {', '.join(map(str, paths))}; "
                         "give other paths")
    return list(dict.fromkeys(files))


def kind_of(path):
    """Returns the last part of a file's name, in lower case; of x.txt.gz it is .txt."""
    return (Path(path.stem) if path.suffix.lower() in PACKED_SUFFIXES else path).suffix.lower()


def read_file(path, field, split_on, skipped):
    """Yields (document, share) of a file of any kind; `share` is how many bytes of the file it stands for.

    skipped: a Counter to which the file's rows without text are added
    """
    if kind_of(path) == ".parquet":
        yield from rows_with_text(path, read_parquet(path, field), field, skipped)
        return
    with open(path, "rb") as file:
        try:
            stream, encoding = open_packed(path, file)
            if kind_of(path) == ".jsonl":
                rows = with_shares(read_jsonl(path, stream, encoding), file)
                yield from rows_with_text(path, rows, field, skipped)
            else:
                yield from with_shares(read_text(stream, encoding, split_on), file)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not {error.encoding} text ({error.reason}); convert it first: "
                             f"`file {path}` guesses its encoding, iconv -f ENCODING -t utf-8") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: damaged: {error}; get it again") from None


def open_packed(path, file):
    """Returns what is in a binary file, unpacked if gzip packed it, and its encoding."""
    if file.peek(2)[:2] == b"\x1f\x8b":
        file = io.BufferedReader(gzip.GzipFile(fileobj=file))
    head = file.peek(4096)
    for magic, command in UNPACK.items():
        if head.startswith(magic):
            raise ValueError(f"{path}: packed; unpack it first: {command} {path}")
    encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and b"\0" in head:
        raise ValueError(f"{path}: has zero bytes: no text, or UTF-16 without a mark; leave it out, or "
                         "convert it: iconv -f utf-16le -t utf-8")
    return file, encoding


def with_shares(items, file):
    """Yields (item, how many bytes of `file` were read for it)."""
    before = 0
    for item in items:
        place = file.tell()
        yield item, place - before
        before = place


def rows_with_text(path, rows, field, skipped):
    """Yields (row[field], share) of (row, share) pairs, and counts rows without. ValueError if none has."""
    count = missing = 0
    for row, share in rows:
        count += 1
        if isinstance(row, dict) and isinstance(row.get(field), str):
            yield row[field], share
            continue
        missing += 1
        found = row if isinstance(row, dict) else {"row": row}
    if count and missing == count:
        found = ", ".join(f"{key}: {type(value).__name__}" for key, value in found.items())
        raise ValueError(f"{path}: none of {count} rows has text in '{field}' (the last has {found:.100}); "
                         "name the right one with --field, or leave the file out")
    skipped[path.name] += missing


def read_text(stream, encoding, split_on):
    """Yields the documents of plain text, cut at each `split_on`, if given; line ends are then made equal."""
    text = io.TextIOWrapper(stream, encoding, newline=None if split_on else "")
    if not split_on:
        yield text.read()
        return
    rest, split_on = "", split_on.replace("\r\n", "\n")
    while chunk := text.read(READ_CHARS):
        *documents, rest = (rest + chunk).split(split_on)
        yield from map(str.strip, documents)
    yield rest.strip()


def read_jsonl(path, stream, encoding):
    """Yields the rows of text that has one JSON value a line."""
    lines = stream if encoding == "utf-8-sig" else io.TextIOWrapper(stream, encoding, newline="\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line if isinstance(line, str) else line.decode(encoding))
        except ValueError as error:  # also what the decoder raises
            raise ValueError(f"{path}: line {number} is not JSON in UTF-8 ({error}); "
                             "mend or drop it") from None
        yield row


def read_parquet(path, field):
    """Yields (row, share) of a parquet file, rows with the column `field` alone."""
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
                    yield {field: text}, share
    except ValueError as error:  # pyarrow's own error for a damaged file is one, too
        raise ValueError(f"{path}: {error}") from None


def unique_documents(files, field, split_on, progress, skipped):
    """Yields each document, bytes of UTF-8, and its digest; no copies, none without visible text."""
    seen = set()
    for file in files:
        for document, share in read_file(file, field, split_on, skipped):
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
    total, skipped = sum(file.stat().st_size for file in files), Counter()
    with staging(args.out) as stage, tqdm(total=total, unit="B", unit_scale=True, disable=None) as progress:
        writers = {split: ShardWriter(stage, args.name, split, args.shard_tokens, tokenizer.bos)
                   for split in ("train", "val")}
        documents = unique_documents(files, args.field, args.split_on, progress, skipped)
        for tokens, n_bytes, digest in encode_all(documents, args.tokenizer, tokenizer, args.processes):
            writers[choose_split(digest, args.val_fraction)].add(tokens, n_bytes)
        for writer in writers.values():
            writer.close()
        check_splits(writers, args.val_fraction)
        write_tables(stage, tokenizer)
        manifest = make_manifest(args.name, tokenizer.name, tokenizer.vocab_size, tokenizer.bos, writers,
                                 f"{len(files)} files: {', '.join(file.name for file in files):.200}")
        publish(stage, args.out, manifest)
    if count := skipped.total():
        some = ", ".join(f"{file}: {n}" for file, n in skipped.items() if n)
        print(f"skipped {count:,} rows without text in '{args.field}' ({some:.200})")
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
    parser.add_argument("inputs", type=user_path, nargs="+", metavar="PATH", help="files or folders")
    parser.add_argument("--tokenizer", default="gpt2",
                        help="gpt2 (default), bytes, a .tiktoken file, or a data folder that has one")
    parser.add_argument("--name", default="text", help="name of the data set (default: %(default)s)")
    parser.add_argument("--out", type=user_path, help="folder to write (default: NAME, beside this script)")
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
