"""Trains a byte-level BPE tokenizer of N tokens on text, or on the text of shards, for tokenize_text.py.

    python data/train_tokenizer.py my_texts/ --vocab 8192 --out bpe8192.tiktoken
    python data/train_tokenizer.py data/fineweb10B --vocab 8192 --out bpe8192.tiktoken
    python data/tokenize_text.py my_texts/ --tokenizer bpe8192.tiktoken --out data/mine

N counts BOS, as vocab_size does everywhere: the file has N - 1 texts, all 256 bytes among them. The paths are
what tokenize_text.py takes, and folders of shards, which are decoded by the tokenizer.tiktoken beside them.
Documents of the validation split are left out: a shard's name says where it belongs, and for text
--val-fraction says it, as in tokenize_text.py.

The library `tokenizers` learns the merges within words, which GPT-2's pattern cuts here as in
tokenize_text.py. The tokens are written in the order of their merges. tiktoken takes that order as ranks, and
so encodes as the library does; the script checks this on the text that it has read first. A token stands for
its bytes and nothing else, so the bytes of all tokens of a text are the bytes of the text.
"""

import itertools
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from shards import Parser, atomic_file, list_shards, main_guard, read_documents, split_of, user_path
from token_tables import check_folder_tokens
from tokenize_text import choose_split, find_files, unique_documents
from tokenizer import GPT2_PATTERN, MAX_TEXTS, Tokenizer, byte_texts, format_ranks, load_tokenizer

CHECKED_CHARACTERS = 1_000_000  # of the text, which both libraries must encode alike


def import_tokenizers():
    """Returns the package `tokenizers`, which only this script needs."""
    try:
        import tokenizers
    except ImportError:
        raise ValueError("tokenizers is not installed; pip install -r requirements.txt") from None
    return tokenizers


def byte_of_character():
    """Returns {character: byte} of the 256 characters by which GPT-2, and the library, write bytes.

    A visible character of Latin-1 stands for its own byte, the characters from U+0100 on for the others.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(others)}


# ---------------------------------------------------------------------- input


def shard_texts(folder, progress):
    """Yields the training documents of a folder of shards as text; `progress` counts bytes of the files.

    Raises ValueError if the tokenizer beside the shards is missing or cannot be theirs.
    """
    tokenizer = load_tokenizer(folder)
    check_folder_tokens(folder, tokenizer)
    for document in read_documents(folder, "train", tokenizer.bos):
        progress.update(len(document))
        yield tokenizer.decode(memoryview(document).cast("H"))  # BOS has no text


def file_texts(files, args, progress):
    """Yields the documents of text files that tokenize_text.py puts into the training split."""
    skipped = Counter()
    for text, digest in unique_documents(files, args.field, args.split_on, progress, skipped):
        if choose_split(digest, args.val_fraction) == "train":
            yield text.decode()
    if count := skipped.total():
        print(f"skipped {count:,} rows without text in '{args.field}'")


def training_texts(args, progress):
    """Yields documents of all paths, about args.max_bytes of UTF-8 at most. Adds to `progress.total`."""
    folders = [path for path in args.inputs if list_shards(path)]
    others = [path for path in args.inputs if path not in folders]
    files = find_files(others) if others else []
    shards = [folder / file for folder in folders for file in list_shards(folder)
              if split_of(file) == "train"]
    progress.total = sum(file.stat().st_size for file in shards + files)
    sources = [shard_texts(folder, progress) for folder in folders]
    left = args.max_bytes
    for text in itertools.chain(*sources, file_texts(files, args, progress)):
        yield text
        left -= len(text.encode())
        if left <= 0:
            return


# ------------------------------------------------------------------- training


def new_library_tokenizer():
    """Returns the library's BPE without merges, which cuts text as data/tokenizer.py does."""
    library = import_tokenizers()
    cut = library.pre_tokenizers.Split(library.Regex(GPT2_PATTERN), "isolated")
    to_bytes = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence([cut, to_bytes])
    return tokenizer


def train(texts, vocab):
    """Returns the library's tokenizer, trained on an iterable of texts, and the bytes of its tokens by id.

    Raises ValueError if the text does not have enough pairs that occur twice for `vocab` - 1 tokens.
    """
    tokenizer = new_library_tokenizer()
    characters = byte_of_character()
    trainer = import_tokenizers().trainers.BpeTrainer(
        vocab_size=vocab - 1, min_frequency=2, initial_alphabet=sorted(characters), special_tokens=[],
        show_progress=sys.stderr.isatty())
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found != vocab - 1:
        raise ValueError(f"the text has pairs for {found + 1:,} tokens, not for --vocab {vocab}; "
                         "give more text or a smaller --vocab")
    written = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return tokenizer, [bytes(characters[character] for character in word) for word, _ in written]


def to_ranks(texts_by_id):
    """Returns the tokens' bytes in the order of the file: the 256 bytes, then merges as they were learnt."""
    return byte_texts() + [text for text in texts_by_id if len(text) > 1]


def check_equality(library_tokenizer, texts_by_id, tokenizer, texts):
    """Raises ValueError if the tokenizer, by tiktoken, encodes one of the texts unlike the library."""
    for text in texts:
        expected = [texts_by_id[i] for i in library_tokenizer.encode(text).ids]
        if [tokenizer.texts[i] for i in tokenizer.encode(text)] != expected:
            raise ValueError(f"tiktoken and tokenizers encode {text[:40]!a}.. differently; "
                             "install the versions in requirements.txt")


def build(args):
    """Trains on args.inputs and returns the Tokenizer."""
    first, kept = [], CHECKED_CHARACTERS

    def counted(texts):
        nonlocal kept
        for text in texts:
            if kept > 0:
                first.append(text[:kept])
                kept -= len(text)
            yield text
        progress.close()
        print("read; learning the merges, which takes minutes for gigabytes of text", flush=True)

    with tqdm(unit="B", unit_scale=True, disable=None) as progress:
        library_tokenizer, texts_by_id = train(counted(training_texts(args, progress)), args.vocab)
    tokenizer = Tokenizer(args.out.name, to_ranks(texts_by_id))
    check_equality(library_tokenizer, texts_by_id, tokenizer, first)
    tokens = sum(len(tokenizer.encode(text)) for text in first)
    size = sum(len(text.encode()) for text in first)
    print(f"{size / max(tokens, 1):.3f} bytes per token on the first {size:,} bytes of the text")
    return tokenizer


def parse_args():
    """Returns the command line's arguments, checked."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", type=user_path, nargs="+", metavar="PATH",
                        help="text files, folders of them, or folders of shards")
    parser.add_argument("--vocab", type=int, required=True, metavar="N", help="tokens, BOS included")
    parser.add_argument("--out", type=user_path, required=True, metavar="FILE.tiktoken", help="to write")
    parser.add_argument("--field", default="text",
                        help="where .jsonl and .parquet rows have the text (default: text)")
    parser.add_argument("--split-on", metavar="MARK", help="what separates the documents of text files")
    parser.add_argument("--val-fraction", type=float, default=0.01, metavar="F",
                        help="share of the documents of text that is left out (default: %(default)s)")
    parser.add_argument("--max-bytes", type=int, default=10**9, metavar="N",
                        help="of text to read, the first ones (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace FILE.tiktoken")
    args = parser.parse_args()
    if not 257 <= args.vocab <= MAX_TEXTS + 1:
        parser.error(f"--vocab must be from 257 to {MAX_TEXTS + 1}, got {args.vocab}")
    if not 0 <= args.val_fraction < 1:
        parser.error(f"--val-fraction must be from 0 to below 1, got {args.val_fraction}")
    if args.max_bytes < 1:
        parser.error(f"--max-bytes must be 1 or more, got {args.max_bytes}")
    if args.out.suffix != ".tiktoken":
        parser.error(f"--out must end in .tiktoken, got {args.out}")
    return args


def main():
    args = parse_args()
    if args.out.exists() and not args.force:
        raise ValueError(f"{args.out}: exists; choose another --out, or --force to replace it")
    if not Path(args.out.parent).is_dir():
        raise ValueError(f"{args.out.parent}: no such folder; make it first")
    tokenizer = build(args)
    with atomic_file(args.out) as file:
        file.write(format_ranks(tokenizer))
    print(f"{args.out}: {tokenizer.vocab_size:,} tokens, BOS included; "
          f"use it by python data/tokenize_text.py PATH --tokenizer {args.out}")


if __name__ == "__main__":
    main_guard(main)
