"""Keeps records of training runs: registers them, runs them, and verifies every figure from their logs.

    python records/record.py new NAME --track short --runs 5 --gpus 8 [-- --flag=value ..]
    python records/record.py import LOG_FOLDER.. NAME      # finished runs; marked as not pre-registered
    python records/record.py verify [FOLDER..]             # default: every record beside this file
    python records/record.py compare A B [--threshold .005] [--seconds_per_loss 164]
    python records/record.py plan --margin .0015 [--sd .0013 | --from FOLDER]
    python records/record.py race A.py B.py --runs 3       # A, B, A, B, .. on one machine; 3,5: two more of B
    python records/record.py keep FOLDER NAME              # one side of a race becomes a record
    python records/record.py reproduce FOLDER [--data=DIR] # runs the frozen script again
    python records/record.py refresh FOLDER..              # rewrites README and pictures from the logs
    python records/record.py table [--file FILE]           # rewrites the tables between the file's markers
    python records/record.py plot FOLDER.. [--out FILE]

compare and plot take records, folders of this repo's logs, and logs of modded-nanogpt (the source, a line of
'=', step lines). Standard deviations divide by n - 1.
Exit codes: 0 fine, 1 a check failed, 2 wrong usage.
"""

import argparse
import html
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unicodedata
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.shards import Parser, main_guard, user_path
from runs import (
    LEVEL, NO_WORSE, PER_PLACE, PER_RUN, SET_HERE, TRACKS, Difference, Mismatch, Run, UserError, check_apart,
    check_plan, check_run, check_same, comparable, demand, differences, expect, expect_text, log_text,
    mean_curve, moment, other_data, paired, parse_flag, parse_log, read, read_json, runs_needed, sd,
    seconds_per_loss, sha256, summarise, welch, without_names, write,
)  # fmt: skip

RECORDS = Path(__file__).resolve().parent
ROOT = RECORDS.parent
FORMAT = 2  # from 2 on, log folders name the registration, and logs the machine
FORMAT_1 = (  # sha256, 16 digits each, of what record.json says of the records that are older
    "2dd850cd9d609a8d 9fa0220d9a8bb53e fa9cf5bbbfa4f44d 26e354db4b38316f "
    "a79158b4d33249e7 64752e3d076fd8c5 1738277ade4cc22a 3063a575e50c7ffc "
    "6af8706fe1faac52 ede0ab0de96b275a 056bbd221542aa11"
).split()
NAMES = {  # of a log's header that record.json repeats, since format 2
    "training tokens", *"git python torch cuda world_size device machine hardware data".split(),
    *"validation model timed untimed".split(),
}  # fmt: skip
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
FLAG = re.compile(rf"--(?!(?:{'|'.join(sorted(SET_HERE))})\b)\w+(=[\w.,:/~=@%+-]*)?", re.ASCII)
MARKER = "<!-- evidence: record.py generates everything below from the logs -->"


class Unfinished(Mismatch):
    """A registered record that lacks runs, and in which nothing else is amiss."""


# ----------------------------------------------------------------------------------------------------------
# record.json and README.md


def complete(record: dict, runs: list[Run]) -> dict:
    """The record with everything that follows from its logs filled in."""
    kept = {name: record[name] for name in ("format", "name", "date", "track", "plan")}
    first = comparable(runs[0], PER_RUN)
    elsewhere = {name for name in first if name.startswith("config.")} | {"source", "sha256"}
    if record["format"] > 1:
        elsewhere |= first.keys() - NAMES
    environment = {name: value for name, value in first.items() if name not in elsewhere}
    rows = []
    for row, run in zip(record["runs"], runs):
        rows.append({name: row[name] for name in ("seed", "attempts", "started")}
                    | {"log": run.path.name, "log_sha256": run.sha256, "steps": run.steps[-1].step,
                       "loss": run.loss, "seconds": run.seconds}
                    | {name: value for name, value in run.header.items() if name == "machine"})
    return kept | {"environment": environment, "runs": rows, "results": summarise(runs, record["track"])}


def dump(record: dict) -> str:
    """The text of record.json, sealed with the sha256 of everything else in it."""
    body = {name: value for name, value in record.items() if name != "sha256"}
    return json.dumps(body | {"sha256": sha256(json.dumps(body))}, indent=1) + "\n"


def registration(record: dict) -> str:
    """The sha256 to publish before the first run: of all that is fixed by then."""
    return sha256(json.dumps([record["track"], record["plan"]]))


def work_folder(record: dict, seed: int) -> str:
    """The folder that a run's log is written in first. The log names it, and so the registration."""
    return f".run_{registration(record)[:12]}_seed{seed}"


def load_record(folder: Path) -> dict:
    """record.json of a folder. Raises UserError if there is none."""
    return read_json(read(folder / "record.json"), folder / "record.json")


def number(value: float | None, digits: int) -> str:
    return "unknown" if value is None else f"{value:.{digits}f}"


def target_text(results: dict) -> str:
    if "target" not in results:
        return "This track has no target loss, so no p-value is stated."
    p = results["p_t_test"]
    text = f"Target {results['target']}: "
    text += "no t-test with one run" if p is None else f"one-sided t-test p = {p:.4g}"
    if "known_sd" in results:
        text += f"; with modded-nanogpt's sd of {results['known_sd']}: p = {results['p_known_sd']:.4g}"
    verdict = "Reached" if results["reached"] else "**Not shown to be reached**"
    return f"{text}. {verdict} (t-test, p < {LEVEL})."


def statistics_of(record: dict, name: str) -> tuple[float, float | None]:
    """Mean and sd of "loss" or "seconds", from the digits of the runs: results are rounded."""
    values = [row[name] for row in record["runs"]]
    return float(np.mean(values)), sd(values)


def evidence(record: dict) -> str:
    """The generated part of a record's README; follows from record.json alone."""
    plan, env, results = record["plan"], record["environment"], record["results"]
    loss, seconds = (statistics_of(record, name) for name in ("loss", "seconds"))
    flags = " ".join(plan["flags"]) or "none"
    mark = f", sha256 {registration(record)}" * (record["format"] > 1)
    when = (f"Registered {plan['registered']}, before the first run by the author's clock{mark}"
            if plan["registered"] else "**Not pre-registered**: imported from finished logs")
    sides, n = " and ".join(plan.get("interleaved", [])), results["n"]
    machines = sorted({row.get("machine", "") for row in record["runs"]})
    machine = (f"{' and '.join(machines)} (hashes of GPU and boot)" if machines[0] else
               "unknown, so the times compare with no other record's")
    rows = [f"| {r['seed']} | {r['loss']:.5f} | {r['seconds']:.3f} | {r['steps']} | "
            f"{r['started'] or 'unknown'} | {r['attempts'] or 'unknown'} | [{r['log']}]({r['log']}) |"
            for r in record["runs"]]
    return "\n".join([
        MARKER, "", "## Evidence", "",
        "The text above is the author's. What follows was computed from the logs.", "",
        f"{when}: track {record['track']}, seeds {', '.join(map(str, plan['seeds']))}, flags: {flags}."
        + f" These runs are one side of a race, in which {sides} took turns." * bool(sides), "",
        f"{n} run{'s' * (n > 1)}, {env['device']}, world size {env['world_size']}, torch {env['torch']}, "
        f"CUDA {env['cuda']}:",
        f"validation loss {loss[0]:.5f}, sd {number(loss[1], 5)}; "
        f"training time {seconds[0]:.3f} s, sd {number(seconds[1], 3)} (sd divides by n - 1).",
        target_text(results), "",
        "| seed | validation loss | training s | steps | started | attempts | log |",
        "|--:|--:|--:|--:|---|--:|---|", *rows, "", "![loss](loss.png)", "",
        f"- Timed: {env['timed']}.", f"- Untimed: {env['untimed']}.", f"- Data: {env['data']}.",
        f"- Validation: {env['validation']}.", f"- Script: sha256 {plan['source_sha256']}.",
        f"- Machine: {machine}.", f"- To repeat it: {needs_text(plan)}.", "",
        "`python records/record.py verify FOLDER` recomputes all of this from the logs, "
        "`reproduce FOLDER` runs the script again.", ""])


def paths_of(plan: dict) -> dict:
    """Flags of a plan that are paths on the machine that made the record: name -> path."""
    flags = dict(map(parse_flag, plan["flags"]))
    return {name: flags[name] for name in ("data", "tokenizer") if "/" in flags.get(name, "")}


def needs_text(plan: dict) -> str:
    """What a stranger lacks to repeat a record."""
    paths = paths_of(plan)
    if not paths:
        return "everything is here, or is fetched or made by the scripts in data/"
    lacking = " and ".join(f"`--{name}={path}`" for name, path in paths.items())
    return (f"{lacking} of the author's machine, which this repository lacks. Data with another sha256 than "
            "the above give another loss: `reproduce --data=DIR` runs the record on them")


def write_record(folder: Path):
    """Checks the logs, then writes record.json, README.md and the pictures. Raises Mismatch."""
    record = load_record(folder)
    runs = [parse_log(folder / f"seed{seed}.txt") for seed in record["plan"]["seeds"]]
    check_plan(runs, record["plan"], record["track"])
    record = complete(record, runs)
    readme = folder / "README.md"
    author = read(readme).partition(MARKER)[0] if readme.exists() else (
        f"# {record['name']}\n\nWhat is new, and why it should help. (Yours to write: it is kept.)\n\n")
    write(folder / "record.json", dump(record))  # first: a record without results has no evidence
    write(readme, author + evidence(record))
    for name, draw in pictures_of(record, runs).items():
        draw(folder / name)
    print(f"{folder}: n = {len(runs)}, loss {statistics_of(record, 'loss')[0]:.5f}. "
          f"{target_text(record['results'])}")


def check_script(folder: Path, plan: dict):
    """Raises Mismatch unless the frozen script is the registered one."""
    found = sha256((folder / "train_gpt.py").read_bytes())
    expect(folder / "train_gpt.py", "sha256", found, plan["source_sha256"])


def check_logs(folder: Path, record: dict, rows: list[dict]) -> list[Run]:
    """The runs of these rows. Raises Mismatch unless script and logs are those that the record names."""
    plan = record["plan"]
    check_script(folder, plan)
    runs = []
    for row in rows:
        runs.append(parse_log(folder / f"seed{row['seed']}.txt"))
        expect(runs[-1].path, "sha256", runs[-1].sha256, row.get("log_sha256"))
    if runs:
        check_plan(runs, plan | {"seeds": [row["seed"] for row in rows]}, record["track"])
        check_starts(folder, record, rows, runs)
    return runs


def check_starts(folder: Path, record: dict, rows: list[dict], runs: list[Run]):
    """Raises Mismatch unless record.json, the logs' folders and the logs' times tell one order of events."""
    registered = record["plan"]["registered"]
    if not registered:  # nobody saw the starts: nothing is said of them but the day of the first seed's log
        expect(folder, "date", record["date"].replace("-", ""), runs[0].folder[:8])
        expect(folder, "attempts and starts", [(row["attempts"], row["started"]) for row in rows],
               [(None, None)] * len(rows))
        return
    expect(folder, "date", record["date"], registered[:10])
    for row, run in zip(rows, runs):
        demand(folder, f"attempts of seed {row['seed']}", row["attempts"],
               type(row["attempts"]) is int and row["attempts"] > 0, "1 or more")
        demand(folder, f"start of seed {row['seed']}", row["started"],
               moment(registered) <= moment(row["started"]) < time.time() + 86400,
               f"one after the registration, {registered}")
        after = run.began - moment(row["started"])
        demand(run.path, "stamp of its folder", run.folder[:15],
               -1 <= after <= run.launch + 60 and run.launch <= min(after + 600, 3600),
               f"one soon after {row['started']}, and the first step, at {run.launch} s, soon after it")
        expect(run.path, "folder of line log:", run.parent, run.config["log_folder"])
        if record["format"] > 1:
            expect(run.path, "config.log_folder", run.config["log_folder"].rpartition("/")[2],
                   work_folder(record, row["seed"]))
            for name in ("machine", "training tokens"):
                demand(run.path, name, "none", name in run.header, "a line of it")
    for (row, before), (later, after) in itertools.pairwise(zip(rows, runs)):
        took = before.launch + before.seconds
        demand(after.path, "start", later["started"],  # both are whole seconds
               moment(later["started"]) >= moment(row["started"]) + took - 1,
               f"one after the {took:.0f} s of {before.path.name}, {row['started']}")


def check_config(folder: Path, record: dict, run: Run):
    """Raises Mismatch unless the frozen script makes the run's configuration of the registered flags."""
    plan, track = record["plan"], record["track"]
    places = {name: value for name, value in map(parse_flag, plan["flags"]) if name in PER_PLACE}
    flags = [flag for flag in plan["flags"] if parse_flag(flag)[0] not in places]  # as files may be missing
    try:
        made = config_of(folder / "train_gpt.py", track, flags) | places
    except UserError as error:
        raise Mismatch(str(error)) from None
    elsewhere = PER_RUN | {"save_every", "vocab_size"}  # the last follows from the data
    if plan["gpus"] > 1:
        elsewhere = elsewhere | {"micro_batches"}  # at least one each
    for name in sorted((made.keys() | run.config.keys()) - elsewhere):
        expect(run.path, f"config.{name} by the frozen script", without_names(run.config.get(name)),
               without_names(made.get(name)))


BLOCK = re.compile(r"^((`|~)\2\2+)(?!\2)[^`\n]*\n(?:.*?\n)?? {0,3}\1\2*[ \t]*$", re.M | re.S)  # of code
EVIDENCE = re.compile(r"(?:\A|\n\s*\n)\W*evidence\W*$|^\W*#.*evidence", re.M)
TIME = re.compile(r"(?<![-+\w])(?<!\d[.,:])((?:\d+:(?=\d\d))*)(\d+(?:,\d{3})*(?:[.,]\d+)?)(?:(?<=:\d\d)(?!:)"
                  r"|[\s-]?(ms|s|secs?|seconds?|min|minutes?|h|hours?)\b(?!\s+per\s+unit))", re.A)


def check_author(folder: Path, record: dict, text: str):
    """Raises Mismatch if the author's text could pass for evidence, or names a time that is no record's.

    A time is one of at least a tenth of this record's; a sign makes it a difference.
    """
    plain = unicodedata.normalize("NFKC", html.unescape(text)).lower()
    unseen = r"(?<=\])\([^)\n]*\)|[][$*_`\\\u00ad\u200b-\u200f\u2060\ufeff]"
    plain = re.sub(unseen, "", plain)
    found = re.findall("\r", text) + re.findall("<[A-Za-z/!?]|```|~~~", BLOCK.sub("", text))
    found += EVIDENCE.findall(plain)
    expect(folder / "README.md", "HTML, open code or Evidence in the author's text", found, [])
    others = [other for other in map(load_record, all_records(RECORDS)) if "results" in other]
    own, *means = (statistics_of(each, "seconds")[0] for each in (record, *others))
    means += [own, *(row["seconds"] for row in record["runs"])]
    for clock, digits, unit in TIME.findall(plain):
        digits = re.sub(r",(?=\d{3}(?!\d))", "", digits).replace(",", ".")
        factor = {"ms": 1e-3, "m": 60, "h": 3600}.get(unit if unit == "ms" else unit[:1], 1)
        seconds = float(digits) * factor
        seconds += sum(int(part) * 60**i for i, part in enumerate(clock.split(":")[-2::-1], 1))
        form = f".{len(digits.partition('.')[2])}f"
        demand(folder / "README.md", "training time", f"{seconds:.6g} s", seconds < own / 10
               or format(seconds / factor, form) in {format(mean / factor, form) for mean in means},
               f"a record's, as this one's {own:.2f} s")


def pictures_of(record: dict, runs: list[Run]) -> dict:
    """name -> what draws it to a path."""
    target = TRACKS[record["track"]].target
    pictures = {"loss.png": lambda path: draw_losses({record["name"]: runs}, path, target)}
    if any(row.get("lambdas") for run in runs for row in run.validations):
        pictures["lambdas.png"] = lambda path: draw_lambdas(runs, path)
    return pictures


def check_pictures(folder: Path, record: dict, runs: list[Run]) -> list[Path]:
    """Raises Mismatch unless the pictures show what is drawn anew; returns those of another matplotlib."""
    apart, pictures = [], pictures_of(record, runs)
    expect(folder, "pictures", sorted(path.name for path in folder.glob("*.png")), sorted(pictures))
    with tempfile.TemporaryDirectory() as place:
        for name, draw in pictures.items():
            draw(Path(place, name))
            with Image.open(folder / name) as found, Image.open(Path(place, name)) as drawn:
                by = str(found.info.get("Software"))
                demand(folder / name, "picture by", by, by.startswith("Matplotlib version"), "matplotlib")
                if by != drawn.info["Software"]:
                    print(f"{folder / name}: not compared: by {by}, here is {drawn.info['Software']}")
                    apart.append(folder / name)
                    continue
                expect(folder / name, "form", *((each.mode, each.size, each.info) for each in (found, drawn)))
                pixels = [np.asarray(each.convert("RGBA"), float) for each in (found, drawn)]
            same = (abs(pixels[0] - pixels[1]) > 8).any(axis=-1).mean() < 1e-6
            demand(folder / name, "picture", "another", same, "one of these logs: refresh draws it")
    return apart


def check_form(folder: Path, record: dict):
    """Raises Mismatch unless the folder is in its place, has a record's files, and names are only names."""
    place, plan, seeds = folder / "record.json", record["plan"], record["plan"]["seeds"]
    links = [path.name for path in [folder, *folder.rglob("*")] if path.is_symlink()]
    expect(folder, "symbolic links", links, [])
    demand(place, "format", record["format"],
           record["format"] == FORMAT or (record["format"] == 1 and record["sha256"][:16] in FORMAT_1),
           f"{FORMAT}: format 1 is left to the records that had it")
    if folder.resolve().parent.name.startswith("track_"):
        expect(folder, "place", "/".join(folder.resolve().parts[-2:]),
               f"{TRACKS[record['track']].folder}/{record['date']}_{record['name']}")
    sides = plan.get("interleaved", ["A", "B"])
    expect(place, "sides of a race", len(sides), 2)
    wrong = [name for name in (record["name"], record["date"], *sides) if not NAME.fullmatch(name)]
    wrong += [flag for flag in plan["flags"] if not FLAG.fullmatch(flag)]
    wrong += plan.keys() - {"registered", "runs", "seeds", "flags", "gpus", "source_sha256", "interleaved"}
    expect(place, "names and flags of another form", wrong, [])
    expect(place, "number of seeds", len(seeds), plan["runs"])
    if plan["registered"]:
        expect(place, "seeds", seeds, list(range(plan["runs"])))
    expect(place, "seeds of the runs", [row["seed"] for row in record["runs"]], seeds)
    known = {"record.json", "train_gpt.py", *(f"seed{seed}.txt" for seed in seeds)}
    known |= ({"README.md", "loss.png", "lambdas.png"} if "results" in record else
              {work_folder(record, seed) for seed in seeds})  # which an interrupted run leaves
    files = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()}
    expect(folder, "other files", sorted(files - known), [])


def verify(folder: Path, readme: bool = True, apart: list | None = None) -> dict:
    """The record, if everything in it follows from its raw logs. Raises Mismatch at the first that doesn't.

    Raises Unfinished if it is registered, lacks runs and is in order so far. readme=False leaves out what
    `refresh` can make anew: README.md and the pictures. `apart` takes pictures that can't be compared.
    """
    record = load_record(folder)
    try:
        check_form(folder, record)
        if "results" not in record and record["plan"]["registered"]:
            expect(folder, "seal of record.json", record["sha256"], json.loads(dump(record))["sha256"])
            done = check_logs(folder, record, [row for row in record["runs"] if "log_sha256" in row])
            raise Unfinished(f"{folder}: unfinished, {len(done)} of {record['plan']['runs']} runs done")
        runs = check_logs(folder, record, record["runs"])
        rebuilt = complete(record, runs)
        expect_text(folder / "record.json", read(folder / "record.json"), dump(rebuilt))
        if readme:
            author, *generated = read(folder / "README.md").partition(MARKER)
            expect_text(folder / "README.md", "".join(generated), evidence(rebuilt))
            check_author(folder, record, author)
        check_config(folder, record, runs[0])
        if readme:
            skipped = check_pictures(folder, record, runs)
            if apart is not None:
                apart += skipped
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise Mismatch(f"{folder}: not the form of a record: {type(error).__name__} {error}") from None
    return record


def check_between(folder: Path, record: dict, others: list[Path]):
    """Raises Mismatch if others of its track have other data, or a run of others is one of its runs."""
    runs = [parse_log(folder / row["log"]) for row in record["runs"]]
    for place in others:
        other = load_record(place)
        if other["track"] == record["track"] and "results" in other:
            why = other_data(record["environment"], other["environment"])
            demand(folder, f"data (against {place})", why, not why, "one")
        for row in (row for row in other["runs"] if "log_sha256" in row):
            before = parse_log(place / f"seed{row['seed']}.txt")
            for run in runs:
                check_apart(run, before)


def witness(folder: Path, record: dict) -> str:
    """The first commit that holds this plan, if it holds no run and is older than all of them; else ""."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True).stdout

    starts = [moment(row["started"]) for row in record["runs"] if row["started"]]
    for line in git("log", "--reverse", "--format=%h %ct", "--", "record.json").splitlines():
        commit, committed = line.split()
        then = json.loads(git("show", f"{commit}:./record.json") or "{}")
        if then.get("plan") == record["plan"]:
            begun = any("log_sha256" in row for row in then["runs"])
            return "" if begun or int(committed) > min(starts, default=math.inf) else commit
        if then:
            return ""  # registered again: after another plan, and perhaps after its runs
    return ""


def when_registered(folder: Path, record: dict) -> str:
    if not record["plan"]["registered"]:
        return "no"
    commit = witness(folder, record)
    return f"before, by commit {commit}" if commit else "by its own clock"


# ----------------------------------------------------------------------------------------------------------
# Running


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def check_flags(flags: list[str], track: str, *scripts: Path):
    """Raises UserError if a record may not have these flags, or a script refuses them."""
    forbidden = SET_HERE | ({"val_tokens"} if TRACKS[track].val_tokens else set())
    for flag in flags:
        name, value = parse_flag(flag)
        if not FLAG.fullmatch(flag) or name in forbidden:
            raise UserError(f"flag {flag!r}: expected --name=word of train_gpt.py, but none of those that a "
                            f"record sets or rules out: {', '.join(sorted(forbidden))}")
        if name == "data" and not user_path(value).is_dir():
            raise UserError(f"{flag}: found no such folder")
    for script in scripts:
        config_of(script, track, flags)


def find_folder(records: Path, track: str, name: str, date: str) -> Path:
    """The folder of this record, whenever it was begun; a new one is named by `date`."""
    if not NAME.fullmatch(name):
        raise UserError(f"name {name!r}: expected letters, digits, '_', '-' and '.'")
    parent = records / TRACKS[track].folder
    begun = [p for p in parent.glob("*") if re.fullmatch(r"\d{4}-\d\d-\d\d_" + re.escape(name), p.name)]
    return begun[0] if begun else parent / f"{date}_{name}"


def register(folder: Path, name: str, track: str, script: Path, plan: dict):
    """Freezes the script and writes down the plan; if that has been done, checks that they are the same."""
    frozen = folder / "train_gpt.py"
    source = sha256(script.read_bytes())
    if (folder / "record.json").exists():
        before = load_record(folder)["plan"]
        for key, value in plan.items():
            if before.get(key) != value and key != "registered":
                raise UserError(f"{folder}: is registered with {key} {before.get(key)}, found {value}: give "
                                "the registered one, or begin another record")
        if script != frozen and source != before["source_sha256"]:
            raise UserError(f"{script}: isn't the script that {folder} froze: leave it out, or give another "
                            "name")
        return
    attempts = 0 if plan["registered"] else None
    rows = [{"seed": seed, "attempts": attempts, "started": None} for seed in plan["seeds"]]
    date = folder.name.partition("_")[0] if folder.name.endswith(f"_{name}") else now()[:10]
    record = {"format": FORMAT, "name": name, "date": date, "track": track,
              "plan": plan | {"source_sha256": source}, "runs": rows}
    check_form(folder, record)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(script, frozen)
    write(folder / "record.json", dump(record))


CONFIG_OF = """
import dataclasses, importlib.util, json, sys
sys.argv = sys.argv[1:]
spec = importlib.util.spec_from_file_location("train_gpt", sys.argv[0])
script = sys.modules["train_gpt"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
print(json.dumps(dataclasses.asdict(script.parse_config(sys.argv[1:])), default=str))
"""


def config_of(script: Path, track: str, flags: list[str] = ()) -> dict:
    """The configuration that a script makes of its flags. Raises UserError with the reason if it refuses."""
    if not script.is_file():
        raise UserError(f"{script}: found no such file: give the path of a train_gpt.py")
    run = subprocess.run([sys.executable, "-c", CONFIG_OF, script, f"--track={track}", *flags], text=True,
                         capture_output=True, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
    if run.returncode:
        reason = (run.stderr.strip() or "no reason given").splitlines()[-1]
        raise UserError(f"{script}: can't be loaded, or refuses its flags: "
                        f"{reason.removeprefix('train_gpt.UserError: ')}")
    return json.loads(run.stdout.splitlines()[-1])


def train(script: Path, gpus: int, flags: list[str], work: Path) -> Path:
    """One run of a script; its log folder. Raises UserError if it fails or stops early."""
    launcher = [sys.executable]
    if gpus > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    shutil.rmtree(work, ignore_errors=True)
    command = [*launcher, str(script), *flags, "--save_every=-1", f"--log_folder={os.path.relpath(work)}"]
    code = subprocess.run(command, env=os.environ | {"TZ": "UTC"}).returncode  # for the log folder's stamp
    logs = list(work.glob("*/log.txt"))
    if code or len(logs) != 1:
        raise UserError(f"{script}: ended with exit code {code} and {len(logs)} logs, expected 0 and 1: mend "
                        "what it complained of above, then give the command again")
    return logs[0].parent


def run_seed(folder: Path, seed: int):
    """Runs one seed of a registered record, unless its log is there and whole."""
    record, path = load_record(folder), folder / f"seed{seed}.txt"
    plan = record["plan"]
    check_script(folder, plan)
    with suppress(UserError, Mismatch, KeyError, TypeError):  # there is no log, or none that is whole
        check_run(run := parse_log(path))
        if run.source == plan["source_sha256"]:
            return
    row = next(row for row in record["runs"] if row["seed"] == seed)
    row |= {"attempts": row["attempts"] + 1, "started": now()}
    write(folder / "record.json", dump(record))
    print(f"{folder.name}: seed {seed}, attempt {row['attempts']}", flush=True)
    work = folder / work_folder(record, seed)
    flags = [f"--track={record['track']}", *plan["flags"], f"--seed={seed}"]
    try:
        write(path, log_text(train(folder / "train_gpt.py", plan["gpus"], flags, work)))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    run = parse_log(path)
    check_run(run)
    row["log_sha256"] = run.sha256
    write(folder / "record.json", dump(record))


def plan_of(runs: int, flags: list[str], gpus: int) -> dict:
    return {"registered": now(), "runs": runs, "seeds": list(range(runs)), "flags": flags, "gpus": gpus}


def announce(folder: Path, commit: bool = False):
    """Says what to publish before the first run, and commits it if asked. Raises UserError."""
    record = load_record(folder)
    if any(row["attempts"] for row in record["runs"]):
        return
    print(f"{folder}: registered with the sha256 {registration(record)}: publish it, or commit record.json "
          "and train_gpt.py (new --commit does), so that others can witness it", flush=True)
    files = ["record.json", "train_gpt.py"]
    commands = ["add", "-f", *files], ["commit", "-qm", f"Register {folder.name}", "--", *files]
    for command in commands * commit:
        git = subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True)
        if git.returncode:
            raise UserError(f"--commit: git {command[0]}: {git.stderr or git.stdout}: mend that, or leave "
                            "--commit out")


def run_all(sides: dict[Path, int]):
    """Runs the seeds of registered records, in turn where there are two, and completes the records."""
    for seed in range(max(sides.values())):
        for folder in (folder for folder, runs in sides.items() if seed < runs):
            run_seed(folder, seed)
    for folder in sides:
        write_record(folder)


def new(options, flags):
    """Registers a record and runs what it lacks of its seeds."""
    folder = find_folder(options.records, options.track, options.name, now()[:10])
    known = [path for path in (folder / "train_gpt.py", ROOT / "train_gpt.py") if path.exists()]
    script = options.script or known[0]
    check_flags(flags, options.track, script)
    register(folder, options.name, options.track, script, plan_of(options.runs, flags, options.gpus or 1))
    announce(folder, options.commit)
    run_all({folder: options.runs})


def flags_of(script: Path, config: dict) -> list[str]:
    """The flags that turn the script's defaults into this configuration."""
    defaults = config_of(script, config["track"])
    return [f"--{name}={value}" for name, value in config.items() if value != defaults.get(name)
            and name not in SET_HERE | {"vocab_size"} and not isinstance(value, list)]


def import_logs(options, flags):
    """A record, not pre-registered, from the folders of finished runs of train_gpt.py."""
    runs = [parse_log(source / "log.txt") for source in options.logs]
    for run in runs:
        check_run(run)
    check_same(runs)
    runs.sort(key=lambda run: run.config["seed"])
    track, script = runs[0].config["track"], runs[0].path.parent / "train_gpt.py"
    expect(script, "sha256", sha256(read(script)), runs[0].source)
    day = runs[0].folder
    folder = find_folder(options.records, track, options.name, f"{day[:4]}-{day[4:6]}-{day[6:8]}")
    if folder.exists():
        raise UserError(f"{folder}: is there already: give another name")
    seeds = [run.config["seed"] for run in runs]
    plan = {"registered": None, "runs": len(runs), "seeds": seeds, "flags": flags_of(script, runs[0].config),
            "gpus": int(runs[0].header["world_size"])}
    register(folder, options.name, track, script, plan)
    for run in runs:
        write(folder / f"seed{run.config['seed']}.txt", log_text(run.path.parent))
    write_record(folder)


def race(options, flags):
    """Makes two records whose runs alternate, so that a machine's drift meets both, and compares them.

    With two numbers of runs, A's and B's, those that one has more come last.
    """
    check_flags(flags, options.track, options.a, options.b)
    place = options.out or ROOT / "logs" / f"race_{options.a.stem}_{options.b.stem}"
    sides = {place / f"A_{options.a.stem}": options.runs[0], place / f"B_{options.b.stem}": options.runs[-1]}
    for (folder, runs), script in zip(sides.items(), (options.a, options.b)):
        plan = plan_of(runs, flags, options.gpus or 1) | {"interleaved": [side.name for side in sides]}
        register(folder, folder.name, options.track, script, plan)
        announce(folder)
    run_all(sides)
    print(comparison(*map(load_group, sides)))


def keep(options, flags):
    """Copies a record from elsewhere, such as a side of a race, into the records under a name."""
    record = verify(options.folder)
    folder = find_folder(options.records, record["track"], options.name, record["date"])
    twins = [path for path in all_records(options.records) if load_record(path)["runs"] == record["runs"]]
    if folder.exists() or twins:
        raise UserError(f"{folder}: is there already: give another name" if folder.exists() else
                        f"{twins[0]}: has these runs already")
    folder.mkdir(parents=True)
    for name in ["train_gpt.py", *(row["log"] for row in record["runs"])]:
        shutil.copyfile(options.folder / name, folder / name)
    title, readme = f"# {record['name']}\n", read(options.folder / "README.md")
    own = f"# {options.name}\n" + readme.removeprefix(title) if readme.startswith(title) else readme
    write(folder / "README.md", own)
    write(folder / "record.json", dump(record | {"name": options.name}))
    write_record(folder)


def expected_loss(record: dict, seed: int) -> tuple[float, float, str]:
    """The lowest and highest loss of a reproduction, and why these.

    Mean +- t(n - 1) * sd * sqrt(1 + 1/n), or on tiny within Track.again of the same seed's.
    """
    losses = {row["seed"]: row["loss"] for row in record["runs"]}
    again = TRACKS[record["track"]].again
    if again and seed in losses:
        return losses[seed] - again, losses[seed] + again, f"within {again} of this seed in the record"
    if len(losses) < 2:
        raise UserError(f"{record['name']}: has one run: to judge a reproduction, a record needs 2 or more")
    values = list(losses.values())
    reach = float(stats.t.ppf(0.995, len(values) - 1)) * sd(values) * math.sqrt(1 + 1 / len(values))
    return np.mean(values) - reach, np.mean(values) + reach, "99 % prediction interval of the record"


def find_paths(options, plan: dict) -> list[str]:
    """The flags for data and tokenizer that were given. Raises UserError if one is missing here."""
    given = {name: value for name in ("data", "tokenizer") if (value := getattr(options, name))}
    for name, path in (paths_of(plan) | given).items():
        kind = "a folder of shards" if name == "data" else "a file of tiktoken ranks, such as gpt2.tiktoken"
        whose = "given" if name in given else "a path of the machine that made the record"
        if "/" in path and not Path(path).exists():
            raise UserError(f"--{name}={path}: {whose}, not found here: give reproduce --{name}= and {kind}")
    return [f"--{name}={value}" for name, value in given.items()]


def reproduce(options, flags):
    """Runs one seed of a record again and judges it.

    Reproduced means: same script, configuration, data and validation tokens, and a loss within the 99 %
    prediction interval of the record's, or on tiny near the same seed's. Versions and hardware may differ,
    and are printed.
    """
    record = verify(options.folder)
    old = parse_log(options.folder / record["runs"][0]["log"])
    seed = old.config["seed"] if options.seed is None else options.seed
    low, high, why = expected_loss(record, seed)
    flags = [f"--track={record['track']}", *record["plan"]["flags"], f"--seed={seed}"]
    flags += find_paths(options, record["plan"])
    gpus = options.gpus or record["plan"]["gpus"]
    with tempfile.TemporaryDirectory() as work:
        logs = train(options.folder / "train_gpt.py", gpus, flags, Path(work) / "logs")
        again = parse_log(logs / "log.txt")
    check_run(again)
    for name, after, before in differences(old, again, PER_PLACE):
        if name.startswith("config.") or name in ("source", "data", "validation", "timed", "untimed"):
            expect("reproduction", name, after, before)
        print(f"differs, may: {name}: {after}, in the record {before}")
    found = f"loss {again.loss:.5f}, {why} {low:.5f} to {high:.5f}"
    seconds = record["results"]["seconds"]["mean"]
    print(f"seed {seed}: {found}; {again.seconds:.3f} s, in the record {seconds:.3f}")
    if not low <= again.loss <= high:
        raise Mismatch(f"{options.folder}: not reproduced: {found}")
    print("reproduced")


# ----------------------------------------------------------------------------------------------------------
# Comparing, planning, listing


class Group(NamedTuple):
    name: str
    runs: list[Run]
    sides: list = []  # of the race that its runs were in, and when each was started, by seed
    started: dict = {}

    @property
    def losses(self) -> list[float]:
        return [run.loss for run in self.runs]

    @property
    def seconds(self) -> list[float]:
        return [run.seconds for run in self.runs]


def load_group(path: Path) -> Group:
    """Runs of a record (verified first), a log, or a folder with logs. Raises UserError if there are none."""
    if (path / "record.json").exists():
        record = verify(path)
        started = {row["seed"]: row["started"] for row in record["runs"]}
        return Group(record["name"], [parse_log(path / row["log"]) for row in record["runs"]],
                     record["plan"].get("interleaved", []), started)
    ours = [*path.glob("log.txt"), *path.glob("*/log.txt")]
    logs = [path] if path.is_file() else sorted(ours or path.glob("*.txt"))
    if not logs:
        raise UserError(f"{path}: found no record and no log: give a record, a log or a folder with logs")
    runs = [parse_log(log) for log in logs]
    for run in runs[1:]:
        for name, here, first in differences(runs[0], run):
            raise UserError(f"{path}: mixes experiments: {name} of {run.path.name} is {here}, of "
                            f"{runs[0].path.name} {first}: give a folder with the logs of one")
    return Group(path.name, runs)


def in_pairs(a: Group, b: Group) -> tuple[Group, Group] | None:
    """The runs of A and of B by seed, if one has all seeds of the other and those are 2 or more."""
    mine, other = ({run.config.get("seed"): run for run in group.runs} for group in (a, b))
    seeds = sorted((mine.keys() & other.keys()) - {None})
    unique = len(mine) == len(a.runs) and len(other) == len(b.runs)
    if not unique or len(seeds) < max(2, min(len(mine), len(other))):
        return None
    return a._replace(runs=[mine[s] for s in seeds]), b._replace(runs=[other[s] for s in seeds])


def in_one_race(pairs: tuple[Group, Group] | None) -> bool:
    """Whether the pairs' runs were started in turn; other races may have called their sides alike."""
    if not pairs or not pairs[0].sides or pairs[0].sides != pairs[1].sides:
        return False
    starts = list(zip(*([group.started[run.config["seed"]] for run in group.runs] for group in pairs)))
    orders = ([start for pair in starts for start in pair[::way]] for way in (1, -1))  # either was first
    return any(order == sorted(order) for order in orders)


def net_seconds(timing: Difference, gap: Difference, slope: float) -> Difference:
    """B's time less A's, with the difference in loss worth `slope` seconds per unit."""
    spread = None if None in (timing.sd, gap.sd) else math.hypot(timing.sd, slope * gap.sd)
    how = timing.how if timing.how == gap.how else f"time {timing.how}, loss {gap.how}"
    return Difference(timing.mean + slope * gap.mean, spread, min(timing.df, gap.df), how)


def losses_apart(a: Group, b: Group) -> str:
    """Why the losses of two groups don't compare, or "". modded-nanogpt's logs have no header."""
    first, other = (group.runs[0].header for group in (a, b))
    if bool(first) != bool(other):
        return "one side is modded-nanogpt's, whose logs name neither data nor machine"
    return other_data(first, other) if first else ""


def loss_lines(a: Group, b: Group, gap: Difference, threshold: float | None) -> list[str]:
    """What the final losses say beyond their difference, and those at equal steps."""
    out = []
    if gap.sd:
        upper = gap.bounds(0.95)[1]
        out.append(f"  no worse by {NO_WORSE} or more (upper 95 % bound {upper:+.5f}): "
                   f"{'shown' if upper < NO_WORSE else 'not shown'}")
    if threshold is not None:
        out.append(f"  B at least {threshold} lower: "
                   + (f"p = {gap.p_less(threshold):.6f}" if gap.sd else "no test without a spread"))
    curve, other = mean_curve(a.runs), mean_curve(b.runs)
    shared = [f"{step}: {other[step][0] - loss:+.4f}" for step, (loss, _) in curve.items() if step in other]
    return [*out, "loss at equal steps, B - A: " + (", ".join(shared) or "no step in common")]


def comparison(a: Group, b: Group, threshold: float | None = None, slope: float | None = None) -> str:
    """Plain words on B against the baseline A. `slope`: seconds per unit of loss; None: A's at its end."""
    out, (first, other) = [], (group.runs[0].header for group in (a, b))
    for name in ("device", "world_size", "torch"):
        if first and other and first[name] != other[name]:
            out.append(f"differs: {name} of A is {first[name]}, of B {other[name]}")
    for letter, group in (("A", a), ("B", b)):
        out.append(f"{letter} = {group.name}: n = {len(group.runs)}, loss {np.mean(group.losses):.5f} sd "
                   f"{number(sd(group.losses), 5)}, time {np.mean(group.seconds):.3f} s sd "
                   f"{number(sd(group.seconds), 3)}")
    if why := losses_apart(a, b):
        return "\n".join([*out, f"losses and times: not comparable: {why}", "verdict on B: none"])
    gap, pairs, n = welch(a.losses, b.losses), in_pairs(a, b), len(a.runs)
    out.append(f"final loss, B - A: {gap.text('', 5)}: {gap.verdict(n)}")
    if pairs:
        out.append(f"  by seed: {paired(pairs[0].losses, pairs[1].losses).text('', 5)}")
    out += loss_lines(a, b, gap, threshold)
    machines = {run.header.get("machine") for run in a.runs + b.runs}
    if None in machines or len(machines) > 1:
        why = "machine unknown: a log doesn't name it" if None in machines else f"{len(machines)} machines"
        return "\n".join([*out, f"times and net seconds: not comparable: {why}", "verdict on B: none"])
    raced = in_one_race(pairs)
    timed = pairs if raced else (a, b)
    timing, timed_n = (paired if raced else welch)(*(group.seconds for group in timed)), len(timed[0].runs)
    out.append(f"train time, B - A: {timing.text(' s', 3)}: {timing.verdict(timed_n)}")
    if not raced:
        out.append("  not of one race: what changed on the machine between the two is in it and below")
    origin = "given"
    if slope is None:
        ends = seconds_per_loss(a.runs)
        if ends is None:
            return "\n".join([*out, "net seconds: unknown, as A has no validation near its end or doesn't "
                              "fall there: see --val_every, or give compare --seconds_per_loss"])
        slope, origin = ends[0], f"A, steps {ends[1]} to {ends[2]}"
    net = net_seconds(timing, gap, slope)
    alone = net_seconds(Difference(0.0, 0.0, gap.df, gap.how), gap, slope)
    out.append(f"net seconds, B - A: {net.text(' s', 2)}, at {slope:.1f} s per unit of loss ({origin})")
    out.append(f"  the loss alone: {alone.text(' s', 2)}: {alone.verdict(n)}")
    return "\n".join([*out, f"verdict on B: {net.verdict(timed_n)}"])


def compare(options, flags):
    """Says whether B is better than the baseline A: final loss, training time, and both in seconds."""
    slope = options.seconds_per_loss
    if slope is not None and not 0 < slope < 1e6:
        raise UserError(f"--seconds_per_loss={slope}: expected a number above 0 and below a million")
    if not math.isfinite(options.threshold or 0):
        raise UserError(f"--threshold={options.threshold}: expected a number")
    print(comparison(load_group(options.a), load_group(options.b), options.threshold, slope))


def plan(options, flags):
    """Says how many runs a p-value below 0.01 takes."""
    spread, origin = options.sd, "given"
    if options.source:
        group = load_group(options.source)
        spread = sd([run.loss for run in group.runs])
        origin = f"of the {len(group.runs)} runs of {group.name}"
    elif spread is None:
        spread, origin = TRACKS["short"].sd, "modded-nanogpt's on the short track"
    if not spread or not 0 < spread < math.inf or not 0 < options.margin < math.inf:
        raise UserError(f"margin {options.margin}, sd {spread}: expected both above 0 (an sd needs 2 runs)")
    rows = [[f"{power:.0%}", *(runs_needed(options.margin, spread, power, *how)
                               for how in ((True,), (False,), (True, 2)))] for power in (0.5, 0.8, 0.9)]
    print(f"runs for p < {LEVEL}, true gap {options.margin}, sd {spread:.6f} ({origin}):\n\n"
          "| power | below a target, sd known | below a target, t-test | each of two scripts, sd known |\n"
          "|--:|--:|--:|--:|")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def all_records(records: Path) -> list[Path]:
    return sorted(path.parent for path in records.glob("track_*/*/record.json"))


def verify_all(options, flags):
    """Checks each folder (all records if none is given), what they say of each other, and the tables."""
    known = all_records(options.records)
    verified, unfinished, apart = [], 0, []
    for folder in options.folders or known:
        try:
            record = verify(folder, apart=apart)
        except Unfinished as state:
            print(state)
            unfinished += 1
            continue
        inside = folder.resolve() in {path.resolve() for path in known}
        others = known if options.folders and inside else verified
        check_between(folder, record, [path for path in others if path.resolve() != folder.resolve()])
        verified.append(folder)
        print(f"{folder}: verified. {target_text(record['results'])} Registered: "
              f"{when_registered(folder, record)}.")
    page = options.records / "README.md"
    if not options.folders and page.is_file():
        expect_text(page, read(page), with_tables(page, options.records)[0])
    print(f"records verified: {len(verified)}" + f", but for {len(apart)} pictures" * bool(apart)
          + f"; unfinished: {unfinished}" * bool(unfinished))


def refresh(options, flags):
    """README.md and pictures anew, as after a change of this program, of records whose logs verify."""
    for folder in options.folders:
        verify(folder, readme=False)
        write_record(folder)


def with_tables(file: Path, records: Path) -> tuple[str, int]:
    """A page with the history of each track that it has markers for, and their number. Raises UserError."""
    def rows(match) -> str:
        track = match[2]
        if track not in TRACKS:
            raise UserError(f"{file}: marker of {track!r}: expected one of {', '.join(TRACKS)}")
        parent = records / TRACKS[track].folder
        paths = [path for path in all_records(records) if path.parent == parent]
        listed = [(path, record) for path in paths if "results" in (record := load_record(path))]
        return match[1] + history(listed, file.resolve().parent) + match[3]

    old = read(file)
    text, tables = re.subn(r"(<!-- records:(\w+) -->\n).*?(<!-- /records:\2 -->)", rows, old, flags=re.S)
    if not tables or tables != old.count("<!-- records:"):
        raise UserError(f"{file}: found {tables} tables: each needs a line <!-- records:TRACK --> "
                        "and, below it, <!-- /records:TRACK -->")
    return text, tables


def table(options, flags):
    """Writes the tables of a page, of records that verify."""
    text, tables = with_tables(options.file, options.records)
    for path in all_records(options.records):
        with suppress(Unfinished):
            verify(path)
    write(options.file, text)
    print(f"{options.file}: {tables} tables")


def history(records: list, base: Path) -> str:
    if not records:
        return "No record yet.\n"
    rows = ["| date | record | training s | validation loss | n | p (t-test) | hardware | registered first |",
            "|---|---|--:|--:|--:|--:|---|---|"]
    for folder, record in records:
        results, env = record["results"], record["environment"]
        p, missed = results.get("p_t_test"), " (target not shown)" * (not results.get("reached", True))
        (loss, loss_sd), (seconds, seconds_sd) = (statistics_of(record, name) for name in ("loss", "seconds"))
        rows.append(
            f"| {record['date']} | [{record['name']}]({os.path.relpath(folder, base)}) "
            f"| {seconds:.2f}, sd {number(seconds_sd, 2)} | {loss:.4f}, sd {number(loss_sd, 4)} "
            f"| {results['n']} | {'-' if p is None else f'{p:.2g}'}{missed} "
            f"| {env['world_size']} x {env['device']} "
            f"| {'yes' if record['plan']['registered'] else 'no'} |")  # as it says: a clone may lack history
    return "\n".join(rows) + "\n"


# ----------------------------------------------------------------------------------------------------------
# Pictures


def draw_losses(groups: dict, path: Path, target: float | None = None):
    """Training and validation loss of every run by step and by time, and the final losses."""
    picture = Figure(figsize=(15, 4), layout="tight")
    by_step, by_time, final = picture.subplots(1, 3)
    shown = []
    for i, (name, runs) in enumerate(groups.items()):
        color = f"C{i}"
        for run in runs:
            losses = smooth(run.train_losses)
            by_step.plot(range(1, len(losses) + 1), losses, color=color, lw=0.6, alpha=0.4)
            by_time.plot(np.array(run.train_ms) / 1e3, losses, color=color, lw=0.6, alpha=0.4)
            points = [(step, seconds, loss) for step, (loss, seconds) in run.curve.items() if step]
            for axes, column in ((by_step, 0), (by_time, 1)):
                axes.plot([p[column] for p in points], [p[2] for p in points], "o", color=color, ms=4)
            shown += [p[2] for p in points] + [x for x in losses[len(losses) // 20 :] if math.isfinite(x)]
        by_step.plot([], [], "-", color=color, label=f"{name}, n = {len(runs)}: training")
        by_step.plot([], [], "o", color=color, label=f"{name}: validation")
        final.plot([i] * len(runs), [run.loss for run in runs], "o", color=color, ms=5, alpha=0.6)
        final.plot([i - 0.2, i + 0.2], [np.mean([run.loss for run in runs])] * 2, color=color)
    for axes in (by_step, by_time, final):
        if target:
            axes.axhline(target, color="black", ls="--", lw=0.8, label=f"target {target}")
        axes.grid(alpha=0.3)
    low, high = min([*shown, target or math.inf]), max(shown)
    for axes in (by_step, by_time):  # the first steps' losses would leave no room for the others
        axes.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    by_step.set(xlabel="step", ylabel="loss (nats per token)", title="training: running means")
    by_time.set(xlabel="training seconds")
    final.set(xticks=range(len(groups)), title="last validation, bar: mean", xlim=(-0.6, len(groups) - 0.4))
    final.set_xticklabels(groups, fontsize=8)
    by_step.legend(fontsize=8)
    picture.savefig(path, dpi=110)


def smooth(losses: list[float]) -> np.ndarray:
    """Running means over a fiftieth of the steps, over fewer at both ends."""
    width, values = max(len(losses) // 50, 1) | 1, np.array(losses)
    counts = np.convolve(np.ones(len(values)), np.ones(width), "same")
    return np.convolve(values, np.ones(width), "same") / counts


def draw_lambdas(runs: list[Run], path: Path):
    """Learned scalars at every validation: one colour and legend entry a scalar, one line a run."""
    first = next(row["lambdas"] for run in runs for row in run.validations if row.get("lambdas"))
    names = sorted({name for run in runs for row in run.validations for name in row.get("lambdas", {})})
    rows, columns = math.ceil(len(names) / 3), min(3, len(names))
    picture = Figure(figsize=(5.5 * columns, 3.4 * rows), layout="tight")
    for i, name in enumerate(names):
        axes = picture.add_subplot(rows, columns, i + 1)
        count = len(first.get(name, [0]))
        for run in runs:
            rows_with = [row for row in run.validations if name in row.get("lambdas", {})]
            at = [row["step"] for row in rows_with]
            for j, values in enumerate(zip(*(row["lambdas"][name] for row in rows_with))):
                style = {"color": colormaps["viridis"](j / max(count - 1, 1)), "ls": ("-", "--", ":")[j % 3]}
                label = {"label": str(j)} if run is runs[0] else {}
                axes.plot(at, values, ".", lw=0.8, ms=3, **style, **label)
        axes.set(title=name, xlabel="step")
        if count > 1:
            axes.legend(fontsize=6, ncol=math.ceil(count / 12), loc="center left", bbox_to_anchor=(1, 0.5))
        axes.grid(alpha=0.3)
    picture.savefig(path, dpi=80)


def plot(options, flags):
    """Draws the losses of records or logs into one picture."""
    groups = [load_group(path) for path in options.folders]
    names = [f"{g.name} ({i})" if [h.name for h in groups].count(g.name) > 1 else g.name
             for i, g in enumerate(groups)]
    draw_losses({name: group.runs for name, group in zip(names, groups)}, options.out, options.target)
    print(options.out)


# ----------------------------------------------------------------------------------------------------------
# Command line


def at_least_one(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found {text!r}")
    return int(text)


def one_or_two(text: str) -> list[int]:
    numbers = [at_least_one(part) for part in text.split(",")]
    if len(numbers) > 2:
        raise argparse.ArgumentTypeError(f"expected one number for both or A's and B's, found {text!r}")
    return numbers


HELP = {
    "runs": "how many; of race also A's and B's, as 3,5", "gpus": "of each run (1)",
    "script": "to freeze (train_gpt.py of this repository)", "records": "where the tracks' folders are",
    "commit": "commit the registration before the first run", "margin": "true distance to the target, nats",
    "sd": "of the losses from run to run (modded-nanogpt's)", "from": "take the sd of this record or logs",
    "threshold": "nats by which B shall be lower", "seconds_per_loss": "instead of the end of A's curve",
    "data": "folder of shards, where the record's is missing", "seed": "to repeat (the record's first)",
    "tokenizer": "FILE.tiktoken, where the record's is missing", "target": "loss to draw a line at",
}  # fmt: skip


def parser() -> Parser:
    top = Parser("record.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, function, *positional: str, needs=(), **flags):
        """Positional arguments are name or name:nargs. A flag has a type, or is a path with this default."""
        sub = commands.add_parser(name, description=function.__doc__)
        sub.set_defaults(run=function)
        for argument in positional:
            dest, _, nargs = argument.partition(":")
            sub.add_argument(dest, type=str if dest == "name" else user_path, nargs=nargs or None)
        for flag, kind in flags.items():
            given = {"type": kind} if callable(kind) else {"type": user_path, "default": kind}
            sub.add_argument(f"--{flag}", help=HELP.get(flag), required=flag in needs, **given)
        return sub

    path = os.path.expanduser  # or the name of a tokenizer
    sub = command("new", new, "name", runs=at_least_one, gpus=at_least_one, script=user_path, records=RECORDS,
                  needs=["runs"])
    sub.add_argument("--track", choices=TRACKS, required=True)
    sub.add_argument("--commit", action="store_true", help=HELP["commit"])
    sub = command("race", race, "a", "b", runs=one_or_two, gpus=at_least_one, out=user_path, needs=["runs"])
    sub.add_argument("--track", choices=TRACKS, default="race300")
    sub = command("plan", plan, margin=float, sd=float, needs=["margin"])
    sub.add_argument("--from", type=user_path, dest="source", help=HELP["from"])
    command("import", import_logs, "logs:+", "name", records=RECORDS)
    command("verify", verify_all, "folders:*", records=RECORDS)
    command("refresh", refresh, "folders:+")
    command("compare", compare, "a", "b", threshold=float, seconds_per_loss=float)
    command("keep", keep, "folder", "name", records=RECORDS)
    command("reproduce", reproduce, "folder", data=path, tokenizer=path, seed=int, gpus=at_least_one)
    command("table", table, file=RECORDS / "README.md", records=RECORDS)
    command("plot", plot, "folders:+", out=Path("plot.png"), target=float)
    return top


def run_command():
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    options, flags = parser().parse_args(argv[:cut]), argv[cut + 1:]
    if flags and options.run not in (new, race):
        raise UserError(f"found {flags[0]!r} after --: only new and race take flags of train_gpt.py")
    try:
        options.run(options, flags)
    except Mismatch as error:
        print("record.py:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)


def main():
    main_guard(run_command)


if __name__ == "__main__":
    main()
