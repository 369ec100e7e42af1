"""Downloads FineWeb as GPT-2 tokens from the Hugging Face hub: kjj0/fineweb10B-gpt2, 200 MB a shard.

    python data/fineweb.py            # validation and 9 training shards, 2 GB, into data/fineweb10B/
    python data/fineweb.py 2          # validation and 2 training shards
    python data/fineweb.py --verify   # check what is there, without a network

A shard holds 100M tokens. Every file is downloaded to a hidden folder, checked there (size, sha256, header,
tokens) and only then moved to its place. Files that are there and good are left alone, so an interrupted run
loses one file's download at most.
"""

import re
import shutil
from importlib import import_module
from pathlib import Path

from shards import (MANIFEST, Parser, check_entry, check_shard, describe_shard, list_shards, main_guard,
                    read_manifest, read_shard, refuse_other_data, rename, sha256_file, write_manifest)

REPO, NAME = "kjj0/fineweb10B-gpt2", "fineweb"
BOS, VOCAB_SIZE = 50256, 50257
DEFAULT_SHARDS, MAX_SHARDS = 9, 103  # 9 are enough for the short track
PROBE_SECONDS = 10  # how long the hub may take to answer at all
SPARE_BYTES = 100_000_000  # disk space to leave free
AGAIN = "finished files are kept: run the same command again, or train without a network: --track=tiny"


def wanted_files(shards):
    """Returns the names of the validation shard and the first `shards` training shards, from 1."""
    return [f"{NAME}_val_000000.bin"] + [f"{NAME}_train_{i:06d}.bin" for i in range(1, shards + 1)]


# ------------------------------------------------------------------- manifest


def load_entries(folder):
    """Returns {file: manifest entry} of a folder, {} without a sound manifest: it only records checks."""
    try:
        entries = read_manifest(folder)["shards"]
    except (ValueError, OSError):
        return {}
    keys = {"file", "tokens", "sha256", "size", "documents"}
    return {entry["file"]: entry for entry in entries if keys <= set(entry)}


def make_entry(path):
    """Checks a shard and returns its manifest entry. ValueError if it is bad."""
    check_shard(path, VOCAB_SIZE, BOS)
    documents = int((read_shard(path) == BOS).sum())
    return {**describe_shard(path), "size": path.stat().st_size, "documents": documents}


def save_entries(folder, entries):
    """Writes the manifest of the files in `entries`, {file: entry}."""
    documents = {split: sum(entry["documents"] for file, entry in entries.items() if f"_{split}_" in file)
                 for split in ("train", "val")}
    write_manifest(folder, {
        "name": NAME,
        "tokenizer": "gpt2",
        "vocab_size": VOCAB_SIZE,
        "bos": BOS,
        "shards": [entries[file] for file in sorted(entries)],
        "documents": documents,
        "bytes": {"train": None, "val": None},  # of the text: not published with the tokens
        "source": f"{REPO} on the Hugging Face hub",
    })


def check_existing(path, entry):
    """Returns the entry of a file: checked against `entry`, or made if that is None. ValueError if bad."""
    if entry is None:
        return make_entry(path)
    check_entry(path.parent, entry, VOCAB_SIZE, BOS)
    return entry


def keep_existing(path, entry):
    """Returns the entry of a file that is there and good, None, saying why, if it must be downloaded."""
    try:
        return check_existing(path, entry) if path.exists() else None
    except ValueError as error:
        print(f"downloading again: {error}", flush=True)
        return None


# ------------------------------------------------------------------- download


def load_hub():
    """Imports huggingface_hub, which only a download needs."""
    try:
        return import_module("huggingface_hub")
    except ImportError as error:
        raise ValueError(f"huggingface_hub cannot be imported ({error}); "
                         "pip install -r requirements.txt") from None


def ask_hub(request, file):
    """Returns what `request()` returns; whatever goes wrong at the hub becomes a one-line ValueError."""
    try:
        return request()
    except Exception as error:  # its exceptions differ from version to version and have no common base
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split()).split(" For more information")[0] or type(cause).__name__
        raise ValueError(f"cannot download {file} from {REPO}: {reason:.250}; {AGAIN}") from None


def download(hub, file, folder):
    """Downloads one file into `folder` and returns its manifest entry. ValueError if it is not intact."""
    url = hub.hf_hub_url(REPO, file, repo_type="dataset")
    # one quick question first: hf_hub_download itself tries an unreachable hub for over 20 seconds
    remote = ask_hub(lambda: hub.get_hf_file_metadata(url, timeout=PROBE_SECONDS), file)
    free = shutil.disk_usage(folder).free
    if remote.size and free < remote.size + SPARE_BYTES:
        raise ValueError(f"{folder}: {free:,} bytes free, {file} needs {remote.size + SPARE_BYTES:,}; "
                         "make room or choose another --out")
    place = {"repo_type": "dataset", "local_dir": folder / ".partial"}
    path = Path(ask_hub(lambda: hub.hf_hub_download(REPO, file, **place), file))
    try:
        entry = check_arrived(path, remote)
    except ValueError:
        path.unlink()  # else the next run would take it for a finished download
        raise
    rename(path, folder / file)
    return entry


def check_arrived(path, remote):
    """Returns the manifest entry of a downloaded file. ValueError if it is not what the hub announced."""
    size, etag = path.stat().st_size, remote.etag or ""
    if remote.size and size != remote.size:
        raise ValueError(f"{path.name}: got {size:,} bytes, the hub announced {remote.size:,}; {AGAIN}")
    # for a file of this size the hub's etag is its sha256
    if re.fullmatch("[0-9a-f]{64}", etag) and (found := sha256_file(path)) != etag:
        raise ValueError(f"{path.name}: got sha256 {found}, the hub announced {etag}; {AGAIN}")
    try:
        return make_entry(path)
    except ValueError as error:
        raise ValueError(f"{path.name}: the downloaded file is not a good shard ({error})") from None


def fetch(folder, shards):
    """Makes sure that the validation shard and `shards` training shards are in `folder` and good."""
    folder.mkdir(parents=True, exist_ok=True)
    recorded, hub = load_entries(folder), None
    # files that are not asked for this time stay listed
    entries = {file: entry for file, entry in recorded.items() if (folder / file).exists()}
    for file in wanted_files(shards):
        entry = keep_existing(folder / file, recorded.get(file))
        if entry is None:
            hub = hub or load_hub()
            entry = download(hub, file, folder)
        entries[file] = entry
        if entry != recorded.get(file):
            save_entries(folder, entries)
        print(f"{folder / file}: {entry['tokens']:,} tokens, good", flush=True)
    shutil.rmtree(folder / ".partial", ignore_errors=True)


def verify(folder):
    """Checks every shard in `folder`, against the manifest where there is one. ValueError if any is bad."""
    recorded, bad = load_entries(folder), []
    files = sorted({*list_shards(folder), *recorded})
    if not files:
        raise ValueError(f"{folder}: no shards here; run without --verify to download them")
    if not recorded:
        print(f"{folder}: no sound {MANIFEST}, so no sha256 to compare with", flush=True)
    for file in files:
        try:
            entry = check_existing(folder / file, recorded.get(file))
            print(f"{folder / file}: {entry['tokens']:,} tokens, good", flush=True)
        except (ValueError, OSError) as error:
            bad.append(str(error))
    if bad:
        raise ValueError(f"{len(bad)} of {len(files)} files are bad: {'; '.join(bad)}; "
                         "run without --verify to mend them")


# ----------------------------------------------------------------------- main


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", type=int, nargs="?", default=None, metavar="N",
                        help=f"training shards to have, 1 to {MAX_SHARDS} (default: {DEFAULT_SHARDS})")
    parser.add_argument("--shards", type=int, dest="shards_flag", metavar="N", help="the same, as a flag")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "fineweb10B",
                        help="folder to write (default: %(default)s)")
    parser.add_argument("--verify", action="store_true", help="check what is there; download nothing")
    args = parser.parse_args()
    given = {args.shards, args.shards_flag} - {None} or {DEFAULT_SHARDS}
    shards = given.pop()
    if given or not 1 <= shards <= MAX_SHARDS:
        parser.error(f"the number of shards must be one number from 1 to {MAX_SHARDS}")
    refuse_other_data(args.out, NAME)
    if args.verify:
        verify(args.out)
    else:
        fetch(args.out, shards)


if __name__ == "__main__":
    main_guard(main)
