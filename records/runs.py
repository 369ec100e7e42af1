"""Reads the logs of training runs, checks them, and computes the statistics that record.py reports."""

import hashlib
import itertools
import json
import math
import os
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats


class Track(NamedTuple):
    folder: str
    target: float | None = None   # validation loss that the mean must be shown to be below
    sd: float | None = None       # run-to-run, known from modded-nanogpt's logs
    val_tokens: int | None = None # on which losses of the track compare
    again: float | None = None    # nats by which a seed's loss differs elsewhere, ten times what was seen


TRACKS = {
    "race300": Track("track_0_race300", val_tokens=2_097_152),
    "sprint": Track("track_0_sprint"),  # up to commit 47ba671: 480 steps of a quarter of the batch
    "short": Track("track_1_short", target=3.28, sd=0.0013, val_tokens=10_485_760),
    "medium": Track("track_2_medium", target=2.92, val_tokens=10_485_760),
    "tiny": Track("track_3_tiny", again=0.005),
}
LEVEL = 0.01      # p below which a target counts as reached
NO_WORSE = 0.005  # nats: "no worse" means that the upper 95 % bound of the difference is below this
PER_RUN = {"seed", "log_folder"}  # fields of a run's configuration that may differ within a record
PER_PLACE = PER_RUN | {"data", "tokenizer", "save_every"}  # ... and between a record and its reproduction
SET_HERE = PER_RUN | {"track", "runs", "save_every", "resume"}  # flags that nobody may pass on


class UserError(ValueError):
    """Something the user can mend: one line, exit code 2."""


class Mismatch(Exception):
    """A check that failed: what, found and expected in one line, exit code 1."""


def demand(where, what: str, found, condition: bool, expected):
    if not condition:
        raise Mismatch(f"{where}: {what}: found {found}, expected {expected}")


def expect(where, what: str, found, expected):
    demand(where, what, found, found == expected, expected)


def expect_text(place, found: str, expected: str):
    for line, pair in enumerate(itertools.zip_longest(found.split("\n"), expected.split("\n")), 1):
        expect(place, f"generated text, line {line}", *map(repr, pair))


def sha256(content: bytes | str) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def read(path: Path) -> str:
    """The text of a file, newlines as they are. Raises UserError."""
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read {path}: {getattr(error, 'strerror', None) or 'not text'}") from None


def write(path: Path, text: str):
    """All of it or nothing, also if the machine stops meanwhile."""
    draft = path.with_name(f".{path.name}.new")
    draft.write_bytes(text.encode())
    os.replace(draft, path)


# ----------------------------------------------------------------------------------------------------------
# Logs


class Step(NamedTuple):
    step: int
    total: int
    kind: str     # train or val
    loss: float   # nan where modded-nanogpt's logs state none
    ms: int
    average: float
    bpb: float | None = None
    tail: str = ""  # behind the numbers: learned scalars


class Run(NamedTuple):
    """A parsed log. One of modded-nanogpt has neither header nor config."""

    path: Path
    sha256: str
    source: str          # sha256 of the script that it names or contains
    header: dict         # name -> value of the lines before the first step
    config: dict
    steps: list[Step]
    validations: list    # this repo's rows with all digits and the learned scalars
    folder: str = ""     # that the trainer wrote the log to, YYYYMMDD-HHMMSS-TRACK-seedN
    launch: float = 0.0  # seconds from the process's start to the first step
    parent: str = ""     # of the folder

    @property
    def began(self) -> float | None:
        """When the log was begun, in seconds since 1970, by a clock that record.py sets to UTC."""
        stamp = self.folder[:15]
        return datetime.strptime(stamp + "+0000", "%Y%m%d-%H%M%S%z").timestamp() if stamp else None

    @property
    def train_losses(self) -> list[float]:
        return [step.loss for step in self.steps if step.kind == "train"]

    @property
    def train_ms(self) -> list[int]:
        return [step.ms for step in self.steps if step.kind == "train"]

    @property
    def curve(self) -> dict:
        """step -> (validation loss, seconds), with all the digits there are."""
        exact = {row["step"]: (row["val_loss"], row["train_time"]) for row in self.validations}
        return exact or {s.step: (s.loss, s.ms / 1e3) for s in self.steps if s.kind == "val"}

    @property
    def loss(self) -> float:
        return list(self.curve.values())[-1][0]

    @property
    def seconds(self) -> float:
        return list(self.curve.values())[-1][1]


LOSS = r"[\d.]+|nan|inf"
STEP = re.compile(rf"step:(\d+)/(\d+) (?:(train|val)_loss:({LOSS}) )?(?:val_bpb:({LOSS}) )?"
                  r"train_time:(\d+)ms step_avg:([\d.]+|nan)ms", re.ASCII)
LOG = re.compile(r"log: (?:(.*)/)?(\d{8}-\d{6}-\w+-seed\d+)(?:-1)*/log\.txt$", re.ASCII)
LAUNCH = re.compile(r"(?:launch to first step: |first step )([\d.]+) s", re.ASCII)
FORMS = {name: re.compile(form, re.ASCII) for name, form in {  # of what READMEs and tables repeat
    "data": r"\S+ shards:\d+ sha256:[0-9a-f]{64}",
    "validation": r"tokens:(\d+) bytes:(\d+|unknown) sha256:[0-9a-f]{64}",
    "device": r"(cpu|cuda(:\d+)?) \([\w .,:/()@+-]+\)",
    "machine": r"gpu:[0-9a-f]{12} boot:[0-9a-f]{12}(, gpu:[0-9a-f]{12} boot:[0-9a-f]{12})*",
    **dict.fromkeys(("timed", "untimed"), r"[\w ,.:;'()/+-]+"),
}.items()}  # fmt: skip
OFF = {  # flag: words of the line `hardware` that it rules out when it is off
    "compile": "compile True", "fp8": "float8 True", "graphs": "graphs True", "fa3": "fa3",
}  # fmt: skip
EXACT = ["step", "val_loss", "val_bpb", "train_time", "lambdas"]
HEADER = ["sha256", "torch", "seed", "device", "data", "validation", "timed", "untimed"]
CONFIG = ["track", "seed", "log_folder", "scheduled_steps", "extension_steps", "val_every"]
VERSIONS = re.compile(r"python:(\S+) torch:([\w.+]+) cuda:([\w.]+) world_size:(\d+) seed:(\d+)$", re.ASCII)


def log_text(folder: Path) -> str:
    """A finished run's log.txt, followed by the validation rows of its metrics.jsonl."""
    rows = [row for row in read(folder / "metrics.jsonl").splitlines() if '"val_loss"' in row]
    return read(folder / "log.txt") + "".join(f"validation {row}\n" for row in rows)


def name_once(header: dict, path: Path, items):
    """Adds the items. Raises Mismatch if a name is there already, as where two logs are one file."""
    for name, value in items:
        demand(path, name, "it twice", name not in header, "one header")
        header[name] = value


def parse_log(path: Path) -> Run:
    """Raises UserError if there is no step line with a validation loss, Mismatch if a line is malformed."""
    beside = path.name == "log.txt" and (path.parent / "metrics.jsonl").exists()
    text = log_text(path.parent) if beside else read(path)
    body = re.sub(r"\A\s*={50,}\n", "", text)  # modded-nanogpt's logs may begin so
    parts = re.split(r"^={50,}$\n", body, maxsplit=1, flags=re.M)
    source, rest = parts if len(parts) == 2 else ("", body)
    header, steps, validations, parent, folder, launch = {}, [], [], "", "", 0.0
    expect(path, "control characters", re.findall(r"[\0-\x08\x0b-\x1f\x7f]", text) * (not source), [])
    if not any((match := STEP.match(line)) and match[3] == "val" for line in rest.split("\n")):
        raise UserError(f"{path}: no line 'step:i/n val_loss:.. train_time:..ms step_avg:..ms'")
    for line in rest.split("\n"):
        name, _, value = line.partition(" ")
        if match := STEP.match(line):
            step, total, kind, loss, bpb, ms, average = match.groups()
            steps.append(Step(int(step), int(total), kind or "train", float(loss or "nan"), int(ms),
                              float(average), bpb and float(bpb), line[match.end():]))
        elif source:
            continue
        elif line.startswith("step:"):
            raise Mismatch(f"{path}: step line: found {line[:60]!r}, expected digits and units")
        elif name == "validation":
            validations.append(read_json(value, path))
            expect(path, "validation row", [k for k in EXACT if k in validations[-1]], EXACT)
        elif name == "config":
            name_once(header, path, [(name, read_json(value, path))])
        elif name == "source":
            name_once(header, path, [part.split(":", 1) for part in value.split() if ":" in part])
        elif match := VERSIONS.match(line):
            name_once(header, path, zip(("python", "torch", "cuda", "world_size", "seed"), match.groups()))
        elif match := LOG.match(line):
            parent, folder = match.groups()
        elif match := LAUNCH.match(line):
            launch = float(match[1])
        elif line.startswith(("resumed:", "stopped after")):
            header["resumed"] = line
        elif ": " in line and (not steps or name == "training"):  # "training tokens: sha256:.."
            name_once(header, path, [line.split(": ", 1)])
        elif "machine" in header:
            expect(path, "line about a loss", re.findall(r".*loss(?!\.png).*", line), [])
    named = sha256(source) if source else header.get("sha256", "")
    config = header.pop("config", {})
    return Run(path, sha256(text), named, header, config, steps, validations, folder, launch, parent)


def without_names(value):
    """A stage or layer as a list, which logs of November 2026 have as a dict."""
    values = list(value.values()) if isinstance(value, dict) else value
    return [without_names(part) for part in values] if isinstance(values, list) else values


def named_once(pairs: list) -> dict:
    """Of JSON's names and values. Raises ValueError: readers differ in which of two they take."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"a name twice in {[name for name, _ in pairs]}")
    return dict(pairs)


def read_json(text: str, path: Path):
    try:
        return json.loads(text, object_pairs_hook=named_once)
    except ValueError as error:
        raise Mismatch(f"{path}: not JSON: {error}") from None


def check_run(run: Run):
    """Raises Mismatch unless the log is whole and agrees with itself."""
    check_header(run)
    check_steps(run)
    check_times(run)
    check_validations(run)


def check_header(run: Run):
    """What the header, the configuration and the log's own folder say of each other."""
    for part, found, names in (("header", run.header, HEADER), ("config", run.config, CONFIG)):
        expect(run.path, f"{part} of train_gpt.py", [name for name in names if name in found], names)
    track, seed = run.config["track"], run.config["seed"]
    expect(run.path, "known track", [t for t in TRACKS if t == track], [track])
    expect(run.path, "seed of the header", run.header["seed"], str(seed))
    expect(run.path, "resumed", run.header.get("resumed", "no"), "no")
    for name, form in FORMS.items():
        found = run.header.get(name)  # format 1 has no machine
        demand(run.path, name, found, found is None or form.fullmatch(found), form.pattern)
    shown = run.header.get("hardware", "")
    found = [flag for flag, words in OFF.items() if run.config.get(flag) is False and words in shown]
    expect(run.path, f"flags that are off, but on in hardware: {shown}", found, [])
    folder = str(run.config.get("data", "")).rstrip("/").rpartition("/")[2]
    named = run.header["data"].split()[0]
    expect(run.path, "folder of the data", named, folder or named)
    tokens = FORMS["validation"].fullmatch(run.header["validation"])[1]
    expect(run.path, "validation tokens", tokens, str(run.config.get("val_tokens") or tokens))  # 0: all
    expect(run.path, "line log:", run.folder[15:] or "none", f"-{track}-seed{seed}")


def check_steps(run: Run):
    """Every step once and in order, with a finite loss that fits the validations'."""
    every, total = run.config["val_every"], run.config["scheduled_steps"] + run.config["extension_steps"]
    for step in run.steps:
        expect(run.path, f"schedule of step {step.step}", step.total, total)
        demand(run.path, f"loss of step {step.step}", step.loss, 0 < step.loss < math.inf,
               "a number above 0")
    order = [s for i in range(total + 1)
             for s in [(i, "train")] * (i > 0) + [(i, "val")] * (i % every == 0 or i == total)]
    found = [(step.step, step.kind) for step in run.steps]
    for have, want in itertools.zip_longest(found, order, fillvalue="the end of the log"):
        expect(run.path, "order of step lines", have, want)
    for step in run.steps:
        if step.kind == "val" and step.step:
            near = float(np.mean(run.train_losses[max(step.step - 10, 0) : step.step]))
            demand(run.path, f"training loss before validation {step.step}", round(near, 4),
                   step.loss / 2 < near < 2 * step.loss, f"about its {step.loss}")


def check_times(run: Run):
    """Averages follow from times, which go on; nine steps in ten take plausible times."""
    for step in run.steps:
        average = step.ms / max(step.step, 1)
        demand(run.path, f"step_avg of step {step.step}", step.average,
               abs(step.average - average) <= 0.006 + 0.5 / max(step.step, 1), f"{average:.2f}")
    for before, after in itertools.pairwise(run.steps):
        demand(run.path, f"train_time of step {after.step}", f"{after.ms} ms", after.ms >= before.ms,
               f"at least the {before.ms} ms before it")
    took, usual = np.diff([0, *run.train_ms]), 0.0
    starts, tokens = zip(*(stage[:2] for stage in without_names(run.config.get("stages", [[0, 0]]))))
    first = [math.ceil(start * run.config["scheduled_steps"] - 1e-9) for start in starts]
    batches = np.array(tokens)[np.searchsorted(first, range(len(took)), "right") - 1]
    for batch in np.unique(batches):
        least, fast, middle = np.percentile(took[batches == batch], [0, 10, 50])
        usual = max(usual, middle)  # of as many tokens or fewer
        demand(run.path, f"fast steps of {batch} tokens", f"{least:.0f}, {fast:.0f} ms",  # seen: 0.18, 0.72
               least > usual / 10 and fast > usual / 5, f"a tenth, a fifth of the usual {usual:.0f} ms")


def check_validations(run: Run):
    """The rows with all digits are those of the step lines; bits per byte follow from the loss."""
    lines = [step for step in run.steps if step.kind == "val"]
    exact = [(row["step"], f"{row['val_loss']:.4f}") for row in run.validations]
    expect(run.path, "validation rows", exact, [(line.step, f"{line.loss:.4f}") for line in lines])
    tokens, size = FORMS["validation"].fullmatch(run.header["validation"]).groups()
    vocabulary = re.search(r"vocabulary ([\d,]+)$", run.header.get("model", ""))
    if vocabulary:
        even = math.log(int(vocabulary[1].replace(",", "")))
        demand(run.path, "loss before training", lines[0].loss, abs(lines[0].loss / even - 1) < 0.05,
               f"about {even:.4f}, as weights are still random")
    scalars = {row["step"]: {f"{name}:{values[0]:+.4f}" for name, values in row["lambdas"].items()}
               for row in run.validations}
    for line in run.steps:
        known, bpb = (scalars[line.step], None) if line.kind == "val" else (set(), line.bpb)
        demand(run.path, f"end of the line of step {line.step}", repr(line.tail),
               bpb is None and {*line.tail.split(" ")} <= known | {""}, "scalars of its row")
    for row, line in zip(run.validations, lines):
        demand(run.path, f"train_time of validation {line.step}", f"{row['train_time']} s",
               abs(row["train_time"] * 1e3 - line.ms) <= 0.6, f"{line.ms} ms")
        bpb = None if size == "unknown" else row["val_loss"] / math.log(2) * int(tokens) / int(size)
        for found, close in ((row["val_bpb"], 1e-9), (line.bpb, 6e-5)):
            demand(run.path, f"val_bpb of validation {line.step}", found,
                   found is bpb if None in (found, bpb) else abs(found - bpb) < close, f"{bpb}")


def moment(text: str) -> float:
    """Seconds since 1970 of 2026-11-28T03:04:05Z. Raises ValueError."""
    if not text.isascii():
        raise ValueError(f"{text!r} isn't ASCII")
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc).timestamp()


def same_losses(a: Run, b: Run) -> bool:
    """Whether the final losses agree in all digits, or over a quarter of the training losses.

    Runs on a GPU agree in a twentieth. The first two steps don't count: all runs begin with the same loss.
    """
    pairs = list(zip(a.train_losses, b.train_losses))[2:]
    return a.loss == b.loss or bool(pairs) and float(np.mean([x == y for x, y in pairs])) > 0.25


def same_times(a: Run, b: Run) -> bool:
    """Whether b's times are a's times a constant, which are never those of two runs."""
    mine, other = (np.array(run.train_ms, float) for run in (a, b))
    if len(mine) != len(other) or len(mine) < 20:
        return False
    ratio = other[-1] / mine[-1]
    return bool(np.abs(mine * ratio - other).max() <= 1 + ratio)  # all are rounded


def overlap(a: Run, b: Run) -> bool:
    """Whether one began before the other's training can have ended, on one machine."""
    first, second = sorted((a, b), key=lambda run: (run.began, -run.seconds))
    same = first.header.get("machine") == second.header.get("machine", "unknown")
    return same and second.began < first.began + first.seconds - 1  # stamps are whole seconds


def check_apart(run: Run, before: Run):
    """Raises Mismatch if a run is another one again, or was on its machine at the same time."""
    repeatable = run.config["seed"] == before.config["seed"] and (  # with the same losses, not the same times
        run.header["device"].startswith("cpu") or run.config.get("deterministic"))
    same = same_times(run, before) or (same_losses(run, before) and not repeatable)
    demand(run.path, "run", f"that of {before.path}", not same, "one of its own")
    demand(run.path, "start", f"during {before.path}", not overlap(run, before), "one run at a time")


def comparable(run: Run, apart: set) -> dict:
    """What must be the same in every run, by name: configuration, versions, hardware, data, clock."""
    header = {name: value for name, value in run.header.items() if name not in {"seed", "git", "machine"}}
    if "data" in header:
        header["data"] = re.sub(r"^.* (?=shards:)", "", header["data"])  # without the folder
    config = {f"config.{name}": value for name, value in run.config.items() if name not in apart}
    return header | config | {"source": run.source}


def differences(a: Run, b: Run, apart: set = PER_RUN) -> list[tuple]:
    """Name, b's value and a's value of all that makes them different experiments."""
    first, here = comparable(a, apart), comparable(b, apart)
    return [(name, here.get(name), first.get(name)) for name in sorted(first.keys() | here.keys())
            if here.get(name) != first.get(name)]


def other_data(a: dict, b: dict) -> str:
    """Why losses of runs with these headers don't compare, or "".

    The sha256 of the training data is of the shards that a run opened: it says nothing where one opened more.
    """
    if a["validation"] != b["validation"]:
        return f"validation {a['validation']} and {b['validation']}"
    mine, other = (re.search(r"shards:(\d+) (\S+)", header["data"], re.ASCII).groups() for header in (a, b))
    return f"training data {mine[1]} and {other[1]}" if mine[0] == other[0] and mine != other else ""


def check_same(runs: list[Run]):
    """Raises Mismatch at the first run that isn't a repetition of the first one with another seed."""
    for run in runs[1:]:
        for name, here, first in differences(runs[0], run):
            expect(run.path, f"{name} (against {runs[0].path.name})", here, first)
    for a, b in itertools.combinations(runs, 2):
        if a.config["seed"] == b.config["seed"]:
            raise Mismatch(f"{b.path}: seed: found {b.config['seed']} as in {a.path}, expected another")
        check_apart(b, a)


def check_plan(runs: list[Run], plan: dict, track: str):
    """Raises Mismatch unless all runs follow the plan."""
    spec = TRACKS[track]
    for run in runs:
        check_run(run)
        expect(run.path, "source sha256", run.source, plan["source_sha256"])
        expect(run.path, "track", run.config["track"], track)
        expect(run.path, "world_size", run.header["world_size"], str(plan["gpus"]))
        if spec.val_tokens:
            found = run.header["validation"].split()[0]
            expect(run.path, "validation tokens", found, f"tokens:{spec.val_tokens}")
    expect("the logs", "seeds", [run.config["seed"] for run in runs], plan["seeds"])
    check_same(runs)


def parse_flag(flag: str) -> tuple[str, str]:
    """Name and value of --name=value; --name alone means on."""
    name, _, text = flag.removeprefix("--").partition("=")
    return name.replace("-", "_"), text if "=" in flag else "on"


# ----------------------------------------------------------------------------------------------------------
# Statistics


def sd(values) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def p_below(values, target: float) -> float | None:
    """One-sided t-test: how likely a mean this far below the target would be if it weren't below."""
    return float(stats.ttest_1samp(values, target, alternative="less").pvalue) if sd(values) else None


def p_below_known(values, target: float, known: float) -> float:
    return float(stats.norm.cdf((np.mean(values) - target) / known * math.sqrt(len(values))))


def summarise(runs: list[Run], track: str) -> dict:
    """Means, sds and tests; p-values only where the track has a target."""
    losses, seconds, spec = [run.loss for run in runs], [run.seconds for run in runs], TRACKS[track]
    out = {"n": len(runs), "sd_divides_by": "n - 1"}
    for name, values, digits in (("loss", losses, 6), ("seconds", seconds, 3)):
        spread = sd(values)
        out[name] = {"mean": round(float(np.mean(values)), digits),
                     "sd": None if spread is None else round(spread, digits)}
    if spec.target:
        p = p_below(losses, spec.target)
        out |= {"target": spec.target, "p_t_test": None if p is None else float(f"{p:.4g}")}
        if spec.sd:
            known = p_below_known(losses, spec.target, spec.sd)
            out |= {"known_sd": spec.sd, "p_known_sd": float(f"{known:.4g}")}
        out["reached"] = p is not None and out["p_t_test"] < LEVEL
    return out


class Difference(NamedTuple):
    """Of two means, B - A."""

    mean: float
    sd: float | None  # of the difference; None where there is only one run each
    df: float
    how: str

    def p_less(self, threshold: float = 0.0) -> float | None:
        """One-sided: that B - A is below -threshold."""
        return float(stats.t.cdf((self.mean + threshold) / self.sd, self.df)) if self.sd else None

    def bounds(self, level: float = 0.975) -> tuple[float, float]:
        reach = float(stats.t.ppf(level, self.df)) * self.sd if self.sd is not None else math.inf
        return self.mean - reach, self.mean + reach

    def verdict(self, baseline_runs: int) -> str:
        """B less than A is 'better'."""
        word = "better" if self.mean < 0 else "worse"
        if self.sd is None or baseline_runs < 3:
            return f"not resolved: the baseline has n = {baseline_runs}, an sd needs 3"
        if abs(self.mean) < 2 * self.sd or not self.mean:
            return "not resolved: under 2 sd"
        low, high = self.bounds()
        return f"{word}, but the 95 % interval includes 0: more runs" if low < 0 < high else word

    def text(self, unit: str, digits: int) -> str:
        if self.sd is None:
            return f"{self.mean:+.{digits}f}{unit} (one run each)"
        low, high = self.bounds()
        return (f"{self.mean:+.{digits}f}{unit} (sd {self.sd:.{digits}f}, 95 % {low:+.{digits}f} to "
                f"{high:+.{digits}f}, {self.how})")


def welch(a, b) -> Difference:
    """B - A of independent runs; a single run is given the other side's sd."""
    mean = float(np.mean(b) - np.mean(a))
    if len(a) < 2 and len(b) < 2:
        return Difference(mean, None, 0, "one run each")
    if min(len(a), len(b)) < 2:
        many = max(a, b, key=len)
        spread = sd(many) * math.sqrt(1 / len(a) + 1 / len(b))
        return Difference(mean, spread, len(many) - 1, "sd of one side")
    va, vb = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    df = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1)) if va + vb else len(a) + len(b) - 2
    return Difference(mean, float(np.sqrt(va + vb)), float(df), "Welch")


def paired(a, b) -> Difference:
    """B - A of runs that belong together one by one."""
    gaps, n = np.subtract(b, a), len(a)
    return Difference(float(gaps.mean()), sd(gaps) / math.sqrt(n), n - 1, f"paired, n = {n}")


def seconds_per_loss(runs: list[Run]) -> tuple[float, int, int] | None:
    """Seconds that one unit of loss costs at the end of the mean curve, and the steps it is taken between.

    Between the last validation and the latest one in the first 95 % of the steps; None if it doesn't fall.
    """
    curve = mean_curve(runs)
    last = max(curve)
    early = [step for step in curve if 0 < step <= 0.95 * last]
    if not early or curve[early[-1]][0] <= curve[last][0]:
        return None
    (loss, seconds), (end_loss, end_seconds) = curve[early[-1]], curve[last]
    return (end_seconds - seconds) / (loss - end_loss), early[-1], last


def mean_curve(runs: list[Run]) -> dict:
    common = [step for step in runs[0].curve if all(step in run.curve for run in runs)]
    return {step: tuple(np.mean([run.curve[step] for run in runs], axis=0)) for step in common}


def runs_needed(margin: float, spread: float, power: float, known: bool, sides: int = 1) -> int:
    """Smallest n for which p < LEVEL has this probability if the true gap is `margin`; sides=2: n of each."""
    reach = (stats.norm.isf(LEVEL) + stats.norm.ppf(power)) * spread / margin
    if reach > 300:
        raise UserError(f"--margin={margin}: at sd {spread} it needs over 90,000 runs: give a larger one")
    n = max(1, math.ceil(sides * reach**2))
    if known:
        return n
    n = max(n, 2)  # the t-test needs a few more
    while True:
        df, gap = sides * (n - 1), margin / spread * math.sqrt(n / sides)
        if stats.nct.sf(stats.t.isf(LEVEL, df), df, gap) >= power:
            return n
        n += 1
