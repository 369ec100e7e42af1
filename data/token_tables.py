"""Writes what the trainer and evaluate.py need to know of the tokenizer beside the shards that it made.

    python data/token_tables.py data/mine --tokenizer gpt2      # or bytes, or FILE.tiktoken

The scripts that make or fetch shards write these files, too; the command is for shards that have none. It
also says so if documents of the validation split are in the training split.

    token_bytes.npy      (vocab,) int32: bytes of text per token; 0 for BOS, the last id
    tokenizer.tiktoken   texts and ids of all tokens but BOS, in tiktoken's format; for evaluate.py
"""

from pathlib import Path

import numpy as np

from shards import (Parser, atomic_file, check_shard, list_shards, main_guard, user_path,
                    warn_of_shared_documents)
from tokenizer import RANKS, Tokenizer, format_ranks, load_tokenizer

TABLES = ("token_bytes.npy", RANKS)


def token_bytes(texts):
    """Returns the length of each text in bytes, (len(texts),) int32."""
    return np.array([len(text) for text in texts], np.int32)


def write_tables(folder: Path, tokenizer: Tokenizer):
    """Writes both files into a folder, in place of older ones. Does not look at the shards."""
    with atomic_file(folder / "token_bytes.npy") as file:
        np.save(file, token_bytes(tokenizer.texts))
    with atomic_file(folder / RANKS) as file:
        file.write(format_ranks(tokenizer))


def add_tables(folder: Path, source: str):
    """Writes the tables of a tokenizer, as `load_tokenizer` knows it, unless they are in the folder.

    If the tokenizer cannot be had, prints a line that says so: the shards are useful without.
    """
    if all((folder / file).exists() for file in TABLES):
        return
    try:
        write_tables(folder, load_tokenizer(source))
    except ValueError as error:
        print(f"{folder}: the shards are usable, but {', '.join(TABLES)} are missing: {error}; later: "
              f"python data/token_tables.py {folder} --tokenizer {source}", flush=True)


def check_folder_tokens(folder: Path, tokenizer: Tokenizer):
    """Raises ValueError if a shard in the folder cannot be the tokenizer's, or there is none."""
    files = list_shards(folder)
    if not files:
        raise ValueError(f"{folder}: no shards here (*_train_000000.bin); give the folder that has them")
    for file in files:
        check_shard(folder / file, tokenizer.vocab_size, tokenizer.bos)


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=user_path, metavar="FOLDER", help="where the shards are")
    parser.add_argument("--tokenizer", required=True, help="bytes, gpt2 or a FILE.tiktoken")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    check_folder_tokens(args.folder, tokenizer)
    warn_of_shared_documents(args.folder, tokenizer.bos)
    write_tables(args.folder, tokenizer)
    print(f"{args.folder}: {', '.join(TABLES)} written, {tokenizer.vocab_size:,} tokens")


if __name__ == "__main__":
    main_guard(main)
