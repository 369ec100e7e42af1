"""Reads the logs of training runs, checks them, and computes the statistics that record.py reports."""

import hashlib
import itertools
import json
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats


class Track(NamedTuple):
    folder: str
    target: float | None = None   # validation loss that the mean must be shown to be below
    sd: float | None = None       # run-to-run, known from modded-nanogpt's logs
    val_tokens: int | None = None # on which the target is defined


TRACKS = {
    "race300": Track("track_0_race300"),
    "sprint": Track("track_0_sprint"),  # up to commit 47ba671: 480 steps of a quarter of the batch
    "short": Track("track_1_short", target=3.28, sd=0.0013, val_tokens=10_485_760),
    "medium": Track("track_2_medium", target=2.92, val_tokens=10_485_760),
    "tiny": Track("track_3_tiny"),
}
LEVEL = 0.01      # p below which a target counts as reached
NO_WORSE = 0.005  # nats: "no worse" means that the upper 95 % bound of the difference is below this
PER_RUN = {"seed", "log_folder"}  # fields of a run's configuration that may differ within a record
PER_PLACE = PER_RUN | {"data", "tokenizer", "save_every"}  # ... and between a record and its reproduction
SET_HERE = PER_RUN | {"track", "runs", "save_every", "resume"}  # flags that nobody may pass on


class UserError(Exception):
    """Something the user can mend: one line, exit code 2."""


class Mismatch(Exception):
    """A check that failed: what, found and expected in one line, exit code 1."""


def expect(where, what: str, found, expected):
    if found != expected:
        raise Mismatch(f"{where}: {what}: found {found}, expected {expected}")


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


class Run(NamedTuple):
    """A parsed log. One of modded-nanogpt has neither header nor config."""

    path: Path
    sha256: str
    source: str          # sha256 of the script that it names or contains
    header: dict         # name -> value of the lines before the first step
    config: dict
    steps: list[Step]
    validations: list    # this repo's rows with all digits and the learned scalars

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


STEP = re.compile(r"step:(\d+)/(\d+) (?:(train|val)_loss:(\S+) )?(?:val_bpb:\S+ )?train_time:(\d+)ms "
                  r"step_avg:([\d.]+|nan)ms")
EXACT = ["step", "val_loss", "train_time"]
HEADER = ["sha256", "torch", "device", "data", "validation", "timed", "untimed"]
CONFIG = ["track", "seed", "scheduled_steps", "extension_steps", "val_every"]
VERSIONS = re.compile(r"python:(\S+) torch:(\S+) cuda:(\S+) world_size:(\d+) seed:(\d+)$")


def log_text(folder: Path) -> str:
    """A finished run's log.txt, followed by the validation rows of its metrics.jsonl."""
    rows = [row for row in read(folder / "metrics.jsonl").splitlines() if '"val_loss"' in row]
    return read(folder / "log.txt") + "".join(f"validation {row}\n" for row in rows)


def parse_log(path: Path) -> Run:
    """Raises UserError if there is no step line with a validation loss."""
    beside = path.name == "log.txt" and (path.parent / "metrics.jsonl").exists()
    text = log_text(path.parent) if beside else read(path)
    parts = re.split(r"^={50,}$\n", text, maxsplit=1, flags=re.M)  # modded-nanogpt's logs begin so
    source, rest = parts if len(parts) == 2 else ("", text)
    header, config, steps, validations = {}, {}, [], []
    for line in rest.split("\n"):
        name, _, value = line.partition(" ")
        if match := STEP.match(line):
            step, total, kind, loss, ms, average = match.groups()
            steps.append(Step(int(step), int(total), kind or "train", float(loss or "nan"), int(ms),
                              float(average)))
        elif name == "validation":
            validations.append(read_json(value, path))
            expect(path, "validation row", [k for k in EXACT if k in validations[-1]], EXACT)
        elif name == "config" and not steps:
            config = read_json(value, path)
        elif name == "source" and not steps:
            header |= dict(part.split(":", 1) for part in value.split() if ":" in part)
        elif match := VERSIONS.match(line):
            header |= zip(("python", "torch", "cuda", "world_size", "seed"), match.groups())
        elif not steps and ": " in line and not source:
            header |= [line.split(": ", 1)]
    if not any(step.kind == "val" for step in steps):
        raise UserError(f"{path}: no line 'step:i/n val_loss:.. train_time:..ms step_avg:..ms'")
    named = sha256(source) if source else header.get("sha256", "")
    return Run(path, sha256(text), named, header, config, steps, validations)


def read_json(text: str, path: Path):
    try:
        return json.loads(text)
    except ValueError as error:
        raise Mismatch(f"{path}: not JSON: {error}") from None


def check_run(run: Run):
    """Raises Mismatch unless the log is whole and agrees with itself."""
    for part, found, names in (("header", run.header, HEADER), ("config", run.config, CONFIG)):
        expect(run.path, f"{part} of train_gpt.py", [name for name in names if name in found], names)
    expect(run.path, "known track", [t for t in TRACKS if t == run.config["track"]], [run.config["track"]])
    expect(run.path, "seed of the header", run.header["seed"], str(run.config["seed"]))
    total = run.config["scheduled_steps"] + run.config["extension_steps"]
    for step in run.steps:
        expect(run.path, f"schedule of step {step.step}", step.total, total)
        if not math.isfinite(step.loss):
            raise Mismatch(f"{run.path}: loss of step {step.step}: found {step.loss}, expected a number")
        if abs(step.average - step.ms / max(step.step, 1)) > 0.006 + 0.5 / max(step.step, 1):
            raise Mismatch(f"{run.path}: step_avg of step {step.step}: found {step.average}, "
                           f"expected {step.ms / max(step.step, 1):.2f}")
    every = run.config["val_every"]
    order = [s for i in range(total + 1)
             for s in [(i, "train")] * (i > 0) + [(i, "val")] * (i % every == 0 or i == total)]
    found = [(step.step, step.kind) for step in run.steps]
    for have, want in itertools.zip_longest(found, order, fillvalue="the end of the log"):
        expect(run.path, "order of step lines", have, want)
    for before, after in itertools.pairwise(run.steps):
        if after.ms < before.ms:
            raise Mismatch(f"{run.path}: train_time of step {after.step}: found {after.ms} ms, expected at "
                           f"least the {before.ms} ms before it")
    printed = [(s.step, f"{s.loss:.4f}") for s in run.steps if s.kind == "val"]
    exact = [(row["step"], f"{row['val_loss']:.4f}") for row in run.validations]
    expect(run.path, "validation rows", exact, printed)
    for (step, (_, seconds)), line in zip(run.curve.items(), [s for s in run.steps if s.kind == "val"]):
        if abs(seconds * 1e3 - line.ms) > 1:
            raise Mismatch(f"{run.path}: train_time of validation {step}: found {seconds} s, "
                           f"expected {line.ms} ms")


def comparable(run: Run, apart: set) -> dict:
    """What must be the same in every run, by name: configuration, versions, hardware, data, clock."""
    header = {name: value for name, value in run.header.items() if name not in {"seed", "git"}}
    header["data"] = re.sub(r"^.* (?=shards:)", "", header["data"])  # without the folder
    config = {f"config.{name}": value for name, value in run.config.items() if name not in apart}
    return header | config | {"source": run.source}


def check_same(runs: list[Run], apart: set = PER_RUN):
    """Raises Mismatch at the first run that isn't a repetition of the first one with another seed."""
    first = comparable(runs[0], apart)
    for run in runs[1:]:
        here = comparable(run, apart)
        for name in sorted(first.keys() | here.keys()):
            expect(run.path, f"{name} (against {runs[0].path.name})", here.get(name), first.get(name))
    for a, b in itertools.combinations(runs, 2):
        if a.config["seed"] == b.config["seed"]:
            raise Mismatch(f"{b.path}: seed: found {b.config['seed']} as in {a.path}, expected another")
        if [s.ms for s in a.steps] == [s.ms for s in b.steps]:
            raise Mismatch(f"{b.path}: times: found those of {a.path}, expected a run of its own")


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
        for flag in plan["flags"]:
            name, value = parse_flag(flag)
            if not same_value(run.config.get(name), value):
                raise Mismatch(f"{run.path}: config.{name}: found {run.config.get(name)}, expected {flag}")
    expect("the logs", "seeds", [run.config["seed"] for run in runs], plan["seeds"])
    check_same(runs)


def parse_flag(flag: str) -> tuple[str, str]:
    """Name and value of --name=value; --name alone means on."""
    name, _, text = flag.removeprefix("--").partition("=")
    return name.replace("-", "_"), text if "=" in flag else "on"


def same_value(value, text: str) -> bool:
    """Whether a configuration's value is what a flag's text says."""
    if isinstance(value, bool):
        return text.lower() in (("true", "on", "1") if value else ("false", "off", "0"))
    try:
        return float(text) == value if isinstance(value, (int, float)) else text == value
    except ValueError:
        return False


# ----------------------------------------------------------------------------------------------------------
# Statistics


def sd(values) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def p_below(values, target: float) -> float | None:
    """One-sided t-test: how likely a mean this far below the target would be if it weren't below."""
    return float(stats.ttest_1samp(values, target, alternative="less").pvalue) if sd(values) else None


def p_below_known(values, target: float, known: float) -> float:
    return float(stats.norm.cdf((np.mean(values) - target) / known * math.sqrt(len(values))))


def round_p(p: float | None) -> float | None:
    return None if p is None else float(f"{p:.4g}")


def summarise(runs: list[Run], track: str) -> dict:
    """Means, sds and tests; p-values only where the track has a target."""
    losses, seconds, spec = [run.loss for run in runs], [run.seconds for run in runs], TRACKS[track]
    out = {"n": len(runs), "sd_divides_by": "n - 1"}
    for name, values, digits in (("loss", losses, 6), ("seconds", seconds, 3)):
        spread = sd(values)
        out[name] = {"mean": round(float(np.mean(values)), digits),
                     "sd": None if spread is None else round(spread, digits)}
    if spec.target:
        out["target"] = spec.target
        out["p_t_test"] = round_p(p_below(losses, spec.target))
        if spec.sd:
            out["known_sd"] = spec.sd
            out["p_known_sd"] = round_p(p_below_known(losses, spec.target, spec.sd))
        out["reached"] = out["p_t_test"] is not None and out["p_t_test"] < LEVEL
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
