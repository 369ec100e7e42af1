"""Downloads FineWeb as GPT-2 tokens from the Hugging Face hub: kjj0/fineweb10B-gpt2, 200 MB a shard.

    python data/fineweb.py            # validation and 9 training shards, 2 GB, into data/fineweb10B/
    python data/fineweb.py 2          # validation and 2 training shards

A shard holds 100M tokens. Files that are there and whole are left alone, so an interrupted run loses one
file's download at most.
"""

from pathlib import Path

from shards import (Parser, check_header, main_guard, refuse_other_data, user_path,
                    warn_of_shared_documents)
from token_tables import add_tables

REPO, NAME = "kjj0/fineweb10B-gpt2", "fineweb"
BOS = 50256  # GPT-2's end of text
DEFAULT_SHARDS, MAX_SHARDS = 9, 103  # 9 are enough for the short track
ANSWER_SECONDS = 10  # how long the hub may take to answer at all
AGAIN = "run the same command again, or train without a network: --track=tiny"


def is_whole(path):
    """Whether a shard is there and as long as its header says. Prints what is wrong with one that isn't."""
    try:
        return path.exists() and check_header(path) > 0
    except ValueError as error:
        print(f"downloading again: {error}", flush=True)
        return False


def download(files, folder):
    """Downloads files into a folder. ValueError if the hub cannot be reached or a file isn't whole."""
    try:
        from huggingface_hub import dataset_info, hf_hub_download

        # one quick question first: hf_hub_download itself asks an unreachable hub again for 24 seconds
        place = {"repo_type": "dataset", "revision": dataset_info(REPO, timeout=ANSWER_SECONDS).sha}
        for file in files:
            (folder / file).unlink(missing_ok=True)  # a damaged one
            hf_hub_download(REPO, file, local_dir=folder, **place)
            check_header(folder / file)
    except Exception as error:  # the hub's exceptions differ from version to version and have no common base
        raise ValueError(f"cannot download from {REPO}: {type(error).__name__}: {error!s:.250}; "
                         f"finished files are kept: {AGAIN}") from None


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", type=int, nargs="?", default=DEFAULT_SHARDS, metavar="N",
                        help=f"training shards to have, 1 to {MAX_SHARDS} (default: %(default)s)")
    parser.add_argument("--out", type=user_path, default=Path(__file__).resolve().parent / "fineweb10B",
                        help="folder to write (default: %(default)s)")
    args = parser.parse_args()
    if not 1 <= args.shards <= MAX_SHARDS:
        parser.error(f"the number of shards must be from 1 to {MAX_SHARDS}, got {args.shards}")
    refuse_other_data(args.out, NAME)
    files = [f"{NAME}_val_000000.bin", *(f"{NAME}_train_{i:06d}.bin" for i in range(1, args.shards + 1))]
    missing = [file for file in files if not is_whole(args.out / file)]
    if missing:
        download(missing, args.out)
        warn_of_shared_documents(args.out, BOS)
    print(f"{args.out}: validation and {args.shards} training shards, {len(missing)} of them downloaded now")
    add_tables(args.out, "gpt2")


if __name__ == "__main__":
    main_guard(main)
