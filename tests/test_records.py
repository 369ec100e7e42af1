"""Every committed record verifies, and no digit of a record can change unnoticed."""

import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from time import gmtime, sleep, strftime
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy import stats

from small import SCRIPT, write_corpus

sys.path.insert(0, str(SCRIPT.parent / "records"))

import record  # noqa: E402
import runs as runs_of_a_record  # noqa: E402
from record import Group, Mismatch, UserError, verify  # noqa: E402
from runs import check_plan, check_run, p_below, p_below_known, parse_log, runs_needed, welch  # noqa: E402

# Stands in for train_gpt.py: the same logs in 50 ms. BASE and SPEED are its loss and milliseconds per step.
TRAINER = '''
import argparse, dataclasses, hashlib, json, math, os, random, sys, time
from pathlib import Path
from typing import NamedTuple

STARTED = time.time()
BASE, SPEED = 3.2770, 20.0


class Stage(NamedTuple):
    start: float
    batch_tokens: int


@dataclasses.dataclass(frozen=True)
class Config:
    track: str = "tiny"
    seed: int = 0
    log_folder: str = ""
    data: str = ""
    save_every: int = 0
    scheduled_steps: int = 20
    extension_steps: int = 4
    val_every: int = 6
    muon_lr: float = 0.023
    smear: bool = True
    val_tokens: int = 10485760
    stages: tuple = (Stage(0.0, 64),)


def parse_config(argv):
    parser = argparse.ArgumentParser("train_gpt.py")
    for field in dataclasses.fields(Config)[:-1]:
        kind = (lambda text: text == "on") if field.type is bool else field.type
        parser.add_argument("--" + field.name, type=kind, default=field.default)
    values = vars(parser.parse_args(argv))
    return Config(**(values | ({"val_tokens": 2097152} if values["track"] == "race300" else {})))


def main():
    cfg = dataclasses.asdict(parse_config(sys.argv[1:]))
    seed, total = cfg["seed"], cfg["scheduled_steps"] + cfg["extension_steps"]
    rng, pace = random.Random(seed), random.Random(f"{seed} {BASE}")
    if os.environ.get("FAIL") == str(seed):
        sys.exit("out of memory")
    stop = total // 2 if os.environ.get("STOP") == str(seed) else total
    folder = Path(cfg["log_folder"]) / f"{time.strftime('%Y%m%d-%H%M%S')}-{cfg['track']}-seed{seed}"
    while folder.exists():
        folder = folder.with_name(folder.name + "-1")
    folder.mkdir(parents=True)
    (folder / "train_gpt.py").write_bytes(Path(__file__).read_bytes())
    log, rows = open(folder / "log.txt", "w"), open(folder / "metrics.jsonl", "w")
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    sha = hashlib.sha256(os.environ.get("TOKENS", "tokens").encode()).hexdigest()
    machine = os.environ.get("MACHINE", "machine: gpu:0123456789ab boot:0123456789ab")
    print(f"source sha256:{source} git:none", "config " + json.dumps(cfg),
          f"python:3.11.7 torch:2.13.0+cu130 cuda:13.0 world_size:1 seed:{seed}",
          "device: cuda:0 (NVIDIA H100 80GB HBM3)", machine,
          "hardware: bfloat16, compile True, kernels large, attention fa3, float8 True, CUDA graphs True",
          f"data: text shards:9 sha256:{sha}",
          f"validation: tokens:{cfg['val_tokens']} bytes:47185920 sha256:{sha}",
          "model: 275,742,772 parameters, 11 x 768, vocabulary 28,900",
          "timed: training steps with their data", "untimed: set-up, validation", sep="\\n", file=log)
    seconds, luck = 0.0, rng.gauss(0, 0.0013) + float(os.environ.get("SHIFT", 0))
    for step in range(stop + 1):
        loss = BASE + luck + 7 * math.exp(-9 * step / total) - 7 * math.exp(-9)
        at = f"train_time:{seconds * 1e3:.0f}ms step_avg:{seconds * 1e3 / max(step, 1):.2f}ms"
        if step:
            noisy = loss + rng.gauss(0, 0.05)
            print(f"step:{step}/{total} train_loss:{noisy:.4f} {at}", file=log)
            print(json.dumps({"step": step, "train_loss": noisy, "train_time": seconds}), file=rows)
        if step % cfg["val_every"] == 0 or step == stop:
            bits = loss / math.log(2) * cfg["val_tokens"] / 47185920
            losses, scalar = f"val_loss:{loss:.4f} val_bpb:{bits:.4f}", f"smear_mtp_lambda:{0.01 * step:+.4f}"
            print(f"step:{step}/{total} {losses} {at} {scalar}", file=log)
            lambdas = {"smear_mtp_lambda": [0.01 * step], "skip_lambdas": [0.5, rng.random()]}
            print(json.dumps({"step": step, "val_loss": loss, "val_bpb": bits,
                              "train_time": round(seconds, 4), "lambdas": lambdas}), file=rows)
        seconds += SPEED / 1e3 * pace.uniform(0.9, 1.1)
    print(f"training tokens: sha256:{sha}", "peak memory: 19745 MiB",
          f"first step {time.time() - STARTED:.1f} s after the start of this process",
          f"log: {folder / 'log.txt'}", sep="\\n", file=log)


if __name__ == "__main__":
    main()
'''


def write_trainer(path: Path, base=3.2770, speed=20.0) -> Path:
    path.write_text(TRAINER.replace("= 3.2770, 20.0", f"= {base}, {speed}"))
    return path


def cli(*arguments) -> SimpleNamespace:
    """record.py in this process."""
    out, err, before, code = StringIO(), StringIO(), sys.argv, 0
    sys.argv = ["record.py", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            record.main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A record of three runs of the short track, where it is, and the stand-in trainer."""
    place = tmp_path_factory.mktemp("made")
    trainer = write_trainer(place / "trainer.py")
    result = cli("new", "idea", "--track=short", "--runs=3", f"--script={trainer}",
                 f"--records={place / 'records'}", "--", "--muon_lr=0.03", "--smear=off")
    assert result.code == 0, result.err
    folder = next(place.glob("records/track_1_short/*_idea"))
    return SimpleNamespace(folder=folder, place=place, trainer=trainer)


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made.folder, tmp_path / made.folder.name))


def without_pictures(monkeypatch):
    for name in ("draw_losses", "draw_lambdas"):
        monkeypatch.setattr(record, name, lambda groups, path, *_: path.write_bytes(b""))
    monkeypatch.setattr(record, "check_pictures", lambda *_: [])


# ----------------------------------------------------------------------------------------------------------
# What is committed, and what was published


def test_committed_records_verify():
    """The last one, of a script with another parser; `record.py verify` does all in more than a minute."""
    finished = [path for path in record.all_records(record.RECORDS) if "results" in record.load_record(path)]
    result = cli("verify", finished[-1])
    assert result.code == 0 and result.out.endswith("\nrecords verified: 1\n"), (result.out, result.err)
    assert len(finished) > 3
    page = record.RECORDS / "README.md"
    assert record.with_tables(page, record.RECORDS)[0] == page.read_text()


def test_p_value_of_the_partial_key_offset_record():
    """Short track, December 2025: losses and p-value as its author published them."""
    losses = [3.2788, 3.2774, 3.2786, 3.2792, 3.2762, 3.2769, 3.2781, 3.2778, 3.2761, 3.2783, 3.2809]
    assert f"{p_below(losses, 3.28):.4f}" == "0.0004"
    assert runs_of_a_record.sd(losses) == pytest.approx(0.0014, abs=5e-5)


def test_p_value_of_the_smear_mtp_record():
    """Medium track, November 2025: losses, sd and p-value as its author published them."""
    losses = [2.921089, 2.918772, 2.919393, 2.920201, 2.919555, 2.918825, 2.91906, 2.918602, 2.919583,
              2.920038, 2.91947, 2.918655, 2.919565, 2.919967, 2.919333, 2.919548, 2.919505, 2.918065,
              2.91992, 2.919905, 2.918552, 2.919111, 2.918989, 2.919336, 2.91804, 2.91896]
    assert f"{p_below(losses, 2.92):.4e}" == "1.1266e-05"
    assert f"{runs_of_a_record.sd(losses):.6f}" == "0.000678"


def test_p_value_of_the_varlen_attention_submission():
    """parameter-golf, April 2026: a Welch test with a threshold; its stated sds divide by n."""
    baseline, new = [1.8828, 1.8816, 1.8822], [1.87397897, 1.87277334, 1.87202097]
    stated = (1.88220, 0.000490, 1.872924, 0.000806)
    found = np.mean(baseline), np.std(baseline), np.mean(new), np.std(new)
    assert found == pytest.approx(stated, abs=6e-7)
    gap = welch(baseline, new)
    assert f"{gap.mean:.6f}" == "-0.009276"
    assert f"{gap.p_less(0.005):.6f}" == "0.002870"
    by_n_minus_1 = (3 / 2) ** 0.5
    rounded = stats.ttest_ind_from_stats(stated[2], stated[3] * by_n_minus_1, 3, stated[0] - 0.005,
                                         stated[1] * by_n_minus_1, 3, equal_var=False, alternative="less")
    assert gap.p_less(0.005) == pytest.approx(rounded.pvalue, rel=5e-3)


@pytest.mark.parametrize("seed", range(20))
def test_welch_agrees_with_scipy(seed):
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(3.28, 0.002, rng.integers(2, 9)) for _ in range(2))
    gap, scipy = welch(a, b), stats.ttest_ind(b, a, equal_var=False)
    assert gap.bounds() == pytest.approx(tuple(scipy.confidence_interval(0.95)))
    assert gap.p_less() == pytest.approx(stats.ttest_ind(b, a, equal_var=False, alternative="less").pvalue)


def test_known_sd():
    """By modded-nanogpt's rule, (3.28 - mean) sqrt(n) >= 0.003025 is p <= 0.01 at an sd of 0.0013."""
    expected = stats.norm.cdf(-0.00175 * 2**0.5 / 0.0013)
    assert p_below_known([3.278, 3.2785], 3.28, 0.0013) == pytest.approx(expected)
    for n in (1, 4, 9):
        assert p_below_known([3.28 - 0.0030243 / n**0.5] * n, 3.28, 0.0013) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("margin, n", [(0.001, 10), (0.0015, 5), (0.002, 3)])
def test_runs_needed_by_modded_nanogpt_s_formula(margin, n):
    assert runs_needed(margin, 0.0013, power=0.5, known=True) == n


def test_runs_needed_reach_the_power():
    assert runs_needed(0.001, 0.0013, 0.5, True, sides=2) == 19
    n = runs_needed(0.0015, 0.0013, power=0.8, known=False)
    rng = np.random.default_rng(0)
    reached = [np.mean(stats.ttest_1samp(rng.normal(-0.0015, 0.0013, (20_000, k)), 0, axis=1,
                                         alternative="less").pvalue < 0.01) for k in (n - 1, n)]
    assert reached[0] < 0.8 < reached[1] + 0.01


# ----------------------------------------------------------------------------------------------------------
# A record


def test_new_record_holds_everything(made):
    stored = verify(made.folder)
    assert {path.name for path in made.folder.iterdir()} == {
        "README.md", "record.json", "train_gpt.py", "loss.png", "lambdas.png",
        "seed0.txt", "seed1.txt", "seed2.txt"}  # fmt: skip
    assert stored["plan"]["flags"] == ["--muon_lr=0.03", "--smear=off"]
    assert stored["plan"]["seeds"] == [0, 1, 2]
    losses = [row["loss"] for row in stored["runs"]]
    p = stats.ttest_1samp(losses, 3.28, alternative="less").pvalue
    assert stored["results"]["p_t_test"] == pytest.approx(p, rel=1e-3)
    assert stored["results"]["loss"]["sd"] == pytest.approx(np.std(losses, ddof=1), abs=1e-6)
    text = (made.folder / "README.md").read_text()
    assert "Registered" in text and "one-sided t-test p =" in text and "Timed: training steps" in text
    assert "def " not in (made.folder / "seed0.txt").read_text()  # the source is stored once


def digits_of(path: Path) -> list[int]:
    return [i for i, byte in enumerate(path.read_bytes()) if 48 <= byte <= 57]


def changed_digit(path: Path, at: int, rng: random.Random) -> bytes:
    content = bytearray(path.read_bytes())
    content[at] = rng.choice([d for d in b"0123456789" if d != content[at]])
    return bytes(content)


def unnoticed(folder: Path, name: str, positions: list) -> list:
    """Positions at which another digit gets past verify."""
    path, rng, missed = folder / name, random.Random(1), []
    before = path.read_bytes()
    for at in positions:
        path.write_bytes(changed_digit(path, at, rng))
        try:
            verify(folder)
            missed.append(at)
        except Mismatch as error:
            assert str(error).startswith(str(folder)) and "\n" not in str(error)
        path.write_bytes(before)
    return missed


def test_every_digit_of_record_json_counts(folder):
    positions = digits_of(folder / "record.json")
    assert len(positions) > 400
    assert unnoticed(folder, "record.json", positions) == []


@pytest.mark.parametrize("name", ["seed0.txt", "seed1.txt", "train_gpt.py", "README.md"])
def test_digits_of_logs_script_and_generated_readme_count(folder, name):
    """100 of them, drawn at random; the script has fewer."""
    text = (folder / name).read_text()
    start = text.index(record.MARKER) if name == "README.md" else 0
    positions = [i for i in digits_of(folder / name) if i > start]
    assert len(positions) > (70 if name == "train_gpt.py" else 200)
    positions = random.Random(0).sample(positions, min(100, len(positions)))
    assert unnoticed(folder, name, positions) == []


def test_author_s_part_of_the_readme_is_kept(folder, monkeypatch):
    without_pictures(monkeypatch)
    path = folder / "README.md"
    path.write_text("# Mine\n\nIn 2026 I thought of 3 things.\n\n" + path.read_text().partition("\n\n")[2])
    verify(folder)
    assert cli("refresh", folder).code == 0
    assert path.read_text().startswith("# Mine\n\nIn 2026 I thought of 3 things.\n\n")
    path.write_text(path.read_text().replace("validation loss", "loss", 1))
    assert "README.md: generated text" in cli("verify", folder).err
    assert cli("refresh", folder).code == cli("verify", folder).code == 0


CHANGES = {
    "order of step lines": [(r"step:7/24 train.*\n", "")],
    "the end of the log": [(r"step:24/24 (.*\n)", "")],
    "train_time of step 9": [(r"(step:9/24 .*)train_time:.*", r"\1train_time:9ms step_avg:1.00ms")],
    "step_avg of step 11": [(r"(step:11/24 .*step_avg:)\d", r"\g<1>9")],
    "schedule of step 5": [("step:5/24", "step:5/25")],
    "loss of step 4": [(r"step:4/24 train_loss:\S+", "step:4/24 train_loss:nan")],
    "validation rows": [(r"(step:12/24 val_loss:\d\.\d)\d", r"\g<1>")],
    "train_time of validation 18": [(r'("step": 18, "val_loss".*"train_time": )0\.', r"\g<1>2.")],
    "torch": [("torch:2.13.0", "torch:2.11.0")],
    "device": [("H100", "H200")],
    "hardware": [("fa3", "fa2")],
    "world_size": [("world_size:1", "world_size:2")],
    "resumed": [("(device: .*\n)", r"resumed: x at step 9\n\1")],
    "resumed: found stopped after step 7": [("(step:8/24 .*\n)", r"stopped after step 7: a signal\n\1")],
    "line log:": [("short-seed1", "short-seed2")],
    "val_bpb of validation 24": [(r'("step": 24, .*"val_bpb": )\d', r"\g<1>2")],
    "training loss before validation 24": [(r"(step:(?:1[6-9]|2\d)/24 train_loss:)\S+", r"\g<1>0.0001")],
    "config: found it twice": [("(config .*\n)", r"\1\1")],
    "sha256: found it twice": [("(source .*\n)", r"\1\1")],
    "python: found it twice": [("(python:.*\n)", r"\1\1")],
    "device: found it twice": [("(device: .*\n)", r"\1\1")],
    "validation row": [(r'(validation .*"step": 12, .*), "train_time": [\d.]+', r"\1")],
    "known track": [('"track": "short"', '"track": "huge"'), ("-short-seed", "-huge-seed")],
    "seed of the header": [("seed:1\n", "seed:7\n")],
    "validation: found tokens": [("(validation: .*) sha256:.*", r"\1")],
    "expected tokens:10485760": [("tokens:10485760", "tokens:5242880"), (r"bytes:\d+", "bytes:23592960"),
                                 ('"val_tokens": 10485760', '"val_tokens": 5242880')],
    "step line": [("step:9/24", "step:\u0669/24")],
    "config.muon_lr": [('"muon_lr": 0.03', '"muon_lr": 0.04')],
    "validation tokens": [("tokens:10485760", "tokens:1048576")],
    "validation (against": [(r"(validation: .*sha256:)\w", r"\1f")],
    "data": [("shards:9", "shards:8")],
    "untimed": [("untimed: set-up", "untimed: data, set-up")],
    "header of train_gpt.py: found ['sha256', 'device'": [("torch:", "torch:**new**")],
    "header of train_gpt.py": [("timed: training.*\n", "")],
    "source sha256": [("source sha256:.{4}", "source sha256:0000")],
    "track": [('"track": "short"', '"track": "sprint"'), ("-short-seed", "-sprint-seed")],
    "seeds": [("seed:1\n", "seed:7\n"), ('"seed": 1', '"seed": 7'), ("-seed1", "-seed7")],
    "not JSON": [("config {", "config {{")],
}  # fmt: skip


@pytest.mark.parametrize("reason", CHANGES)
def test_checks_hold_without_the_hashes(folder, reason):
    """An author who seals a changed log anew is still refused."""
    path = folder / "seed1.txt"
    text = path.read_text()
    for pattern, new in CHANGES[reason]:
        text, count = re.subn(pattern, new, text)
        assert count
    path.write_text(text)
    with pytest.raises(Mismatch, match=re.escape(reason)):
        check_logs(folder)


def check_logs(folder: Path):
    plan = json.loads((folder / "record.json").read_text())["plan"]
    check_plan([parse_log(folder / f"seed{seed}.txt") for seed in range(3)], plan, "short")


def test_steps_may_take_as_much_longer_as_their_batches_grow(folder):
    run = parse_log(folder / "seed0.txt")
    config = run.config | {"scheduled_steps": 24, "stages": [[0, 64], [1 / 3, 256], [2 / 3, 512]]}
    for took, reason in (((20, 90, 200), ""), ((20, 15, 15), ""), ((20, 90, 10), "fast steps of 512 tokens"),
                         ((20, 10, 2), "fast steps of 512"), ((0, 1, 1), "fast steps of 64")):
        ends = np.cumsum(np.repeat(took, 8)).tolist()
        steps = [runs_of_a_record.Step(i, 24, "train", 3.0, ms, ms / i) for i, ms in enumerate(ends, 1)]
        with pytest.raises(Mismatch, match=reason) if reason else nullcontext():
            runs_of_a_record.check_times(run._replace(config=config, steps=steps))


def test_the_same_run_twice_is_refused(folder):
    text = (folder / "seed0.txt").read_text().replace("seed:0\n", "seed:1\n").replace("-seed0", "-seed1")
    (folder / "seed1.txt").write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(Mismatch, match="run: found that of .*seed0.txt"):
        check_logs(folder)


def test_runs_can_t_be_left_out_or_added(folder):
    shutil.copy(folder / "seed2.txt", folder / "seed3.txt")
    assert "other files: found ['seed3.txt']" in cli("verify", folder).err
    for seed in (2, 3):
        (folder / f"seed{seed}.txt").unlink()
    result = cli("verify", folder)
    assert result.code == 1 and "seed2.txt: No such file" in result.err
    stored = json.loads((folder / "record.json").read_text())
    stored["plan"] |= {"runs": 2, "seeds": [0, 2]}
    (folder / "record.json").write_text(record.dump(stored))
    assert "seeds: found [0, 2], expected [0, 1]" in cli("verify", folder).err


def test_records_stand_where_they_belong(folder, tmp_path):
    for place in ("track_0_sprint/" + folder.name, "track_1_short/" + folder.name + "x"):
        shutil.copytree(folder, tmp_path / place)
        assert f"place: found {place}, expected track_1_short/20" in cli("verify", tmp_path / place).err


def test_a_target_that_is_missed_is_said(tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    trainer = write_trainer(tmp_path / "trainer.py", base=3.4)
    new = "new", "idea", "--track=short", "--runs=3", f"--script={trainer}", f"--records={tmp_path}"
    assert cli(*new).code == 0
    (folder,) = tmp_path.glob("track_1_short/*")
    result = cli("verify", folder)
    assert result.code == 0 and "**Not shown to be reached**" in result.out
    assert "(target not shown)" in record.history([(folder, verify(folder))], folder)


def test_start_before_the_registration_is_refused(folder):
    stored = json.loads((folder / "record.json").read_text())
    stored["runs"][1]["started"] = "2020-01-01T00:00:00Z"
    (folder / "record.json").write_text(record.dump(stored))
    assert "found 2020-01-01T00:00:00Z, expected one after the registration" in cli("verify", folder).err


def test_records_of_a_track_share_their_validation_tokens(made, tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    first = "new", "first", "--track=tiny", "--runs=1", f"--script={made.trainer}"
    assert cli(*first, f"--records={tmp_path}").code == 0
    monkeypatch.setenv("TOKENS", "others")
    other = write_trainer(tmp_path / "other.py", base=3.1)
    new = "new", "other", "--track=tiny", "--runs=1", f"--script={other}"
    assert cli(*new, f"--records={tmp_path}").code == 0
    (other,) = tmp_path.glob("track_3_tiny/*_other")
    for folders in ([], [other]):
        result = cli("verify", *folders, "--records", tmp_path)
        assert result.code == 1 and "_first): found validation tokens:10485760" in result.err


def in_logs(pattern, new, seeds=(0, 1, 2)):
    def forge(folder):
        for seed in seeds:
            path = folder / f"seed{seed}.txt"
            text, count = re.subn(pattern, new, path.read_text())
            assert count
            path.write_text(text)
    return forge


def in_record(change):
    def forge(folder):
        stored = json.loads((folder / "record.json").read_text())
        change(stored)
        (folder / "record.json").write_text(record.dump(stored))
    return forge


def another_seed(folder):
    """seed0's log as seed1's, with all times x 1.0005."""
    text = (folder / "seed0.txt").read_text()
    for old, new in ((r"seed:0\b", "seed:1"), ('"seed": 0', '"seed": 1'), ("seed0", "seed1")):
        text = re.sub(old, new, text)
    (folder / "seed1.txt").write_text(text)


def link(folder):
    (folder / "seed1.txt").rename(folder.parent / "outside.txt")
    (folder / "seed1.txt").symlink_to(folder.parent / "outside.txt")


def claim(text):
    def forge(folder):
        path = folder / "README.md"
        path.write_text(f"It trains in {text}.\n\n{path.read_text()}")
    return forge


def change_plan(folder, seeds=(0, 1, 2), **changes):
    """Registers the runs anew: their logs name the plan's sha256."""
    stored = json.loads((folder / "record.json").read_text())
    before = record.registration(stored)[:12]
    stored["plan"] |= changes
    (folder / "record.json").write_text(record.dump(stored))
    in_logs(before, record.registration(stored)[:12], seeds)(folder)


def plan_of(**changes):
    return lambda folder: change_plan(folder, **changes)


def at_once(folder):
    """seed 1 as begun a second before seed 0."""
    stored = json.loads((folder / "record.json").read_text())
    earlier = gmtime(record.moment(stored["runs"][0]["started"]) - 1)
    stored["runs"][1]["started"] = strftime("%Y-%m-%dT%H:%M:%SZ", earlier)
    (folder / "record.json").write_text(record.dump(stored))
    in_logs(r"\d{8}-\d{6}(?=-short-seed1)", strftime("%Y%m%d-%H%M%S", earlier), [1])(folder)
    change_plan(folder, registered=stored["runs"][1]["started"])


def unloadable(folder):
    script, before = folder / "train_gpt.py", record.sha256((folder / "train_gpt.py").read_text())
    script.write_text("import a_module_that_nobody_has\n")
    change_plan(folder, source_sha256=record.sha256(script.read_text()))
    in_logs(before, record.sha256(script.read_text()))(folder)


def in_author(text):
    def forge(folder):
        path = folder / "README.md"
        record.write(path, record.read(path).replace(record.MARKER, f"{text}\n\n{record.MARKER}"))
    return forge


def seed0_s_validations(folder):
    """In seed1's log: losses and scalars of seed0's, at the own times."""
    lines = re.compile(r"^(step:\d+/24 val_loss:\S+ \S+)(.*)(smear.*)$"
                       r"|^(validation .*)(, .train_time.*?)(, .lamb.*)$", re.M)
    path, others = folder / "seed1.txt", lines.finditer((folder / "seed0.txt").read_text())

    def mixed(own):
        other = next(others)
        return "".join((own if i in (2, 5) else other)[i] or "" for i in range(1, 7))

    path.write_text(lines.sub(mixed, path.read_text()))


def fast_steps(folder, count=12):
    """A millisecond for each of the last ones."""
    for path in folder.glob("seed*.txt"):
        text = path.read_text()
        before = 24 - count
        middle = int(re.search(rf"step:{before}/24 .*train_time:(\d+)ms", text)[1])
        for step in range(before + 1, 25):
            ms = middle + step - before
            at = f"train_time:{ms}ms step_avg:{ms / step:.2f}ms"
            text = re.sub(rf"(step:{step}/24 .*)train_time:\S+ \S+", rf"\g<1>{at}", text)
            text = re.sub(rf'("step": {step}, "val.*"train_time": )[\d.]+', rf"\g<1>{ms / 1000}", text)
        path.write_text(text)


def hours_later(folder):
    """seed 2's log and first step, 2 hours after its start."""
    row = json.loads((folder / "record.json").read_text())["runs"][2]
    stamp = strftime("%Y%m%d-%H%M%S", gmtime(record.moment(row["started"]) + 7200))
    in_logs(r"\d{8}-\d{6}(?=-short-seed2)", stamp, [2])(folder)
    in_logs("first step .* s a", "first step 7200.0 s a", [2])(folder)


def other_loss(match):
    return f"{match[1]}{float(match[2]) - 0.1:.4f}"


FORGERIES = {  # name: (what is changed, before all is sealed anew; what verify says)
    "final loss lowered": (in_logs(r"(step:24/24 val_loss:|step\": 24, \"val_loss\": )([\d.]+)", other_loss),
                           "val_bpb of validation 24"),
    "bits per byte halved": (in_logs(r"(val_bpb:|val_bpb\": )([\d.]+)", other_loss), "val_bpb"),
    "one run twice": (another_seed, "run: found that of"),
    "validation tokens halved": (in_logs("tokens:10485760", "tokens:5242880"), "validation tokens"),
    "training loss zero": (in_logs(r"(step:2\d/24 train_loss:)\S+", r"\g<1>0.0000"), "a number above 0"),
    "Arabic digits": (in_logs("step:12/24", "step:\u0661\u0662/24"), "step line"),
    "symbolic link": (link, "symbolic links"),
    "resumed": (in_logs('"track"', '"resume": "x", "track"'), "config.resume"),
    "author's claim": (claim("0.31 s"), "training time: found 0.31 s"),
    "author's minutes": (claim("0.7 minutes"), "training time: found 42 s"),
    "author's milliseconds": (claim("310 ms"), "training time: found 0.31 s"),
    "negative attempts": (in_record(lambda row: row["runs"][0].update(attempts=-3)), "attempts of seed 0"),
    "no attempts": (in_record(lambda row: row["runs"][0].update(attempts=0.5)), "attempts of seed 0"),
    "earlier": (in_record(lambda row: row["plan"].update(registered="2026-01-01T00:00:00Z")), "date"),
    "another start": (in_record(lambda row: row["runs"][1].update(started=record.now()[:-6] + "59:59Z")),
                      "start of seed 1|stamp of its folder"),
    "a start in Arabic digits": (in_record(lambda row: row["runs"][1].update(
        started=row["runs"][1]["started"].replace("0", "\u0660"))), "isn't ASCII"),
    "runs at once": (at_once, "start: found .*one after the [01] s of seed0.txt"),
    "another picture": (lambda folder: (folder / "loss2.png").touch(), "other files: found .'loss2.png'."),
    "a faster script": (lambda folder: (folder / "fast.py").touch(), "other files: found .'fast.py'."),
    "a rate twice": (in_logs("config {", 'config {"muon_lr": 0.5, '), "a name twice"),
    "a row left out": (in_record(lambda row: row["runs"].pop()), "seeds of the runs"),
    "another plan": (in_record(lambda row: row["plan"].update(flags=["--smear=off"])), "config.log_folder"),
    "another configuration": (in_logs('"muon_lr": 0.03', '"muon_lr": 0.04'), "config.muon_lr"),
    "unregistered setting": (in_logs('"save_every": -1', '"save_every": -1, "trick": 1'), "config.trick"),
    "another track": (in_logs("short-seed", "sprint-seed"), "line log:"),
    "no machine": (in_logs("machine: .*\n", ""), "machine"),
    "data without a hash": (in_logs("(data: text shards:9) sha256:.*", r"\1"), "data"),
    "a step back": (in_logs(r"(step:8/24 .*train_time:).*", r"\g<1>1ms step_avg:0.12ms"), "train_time"),
    "the older format": (in_record(lambda row: row.update(format=1)), "format: found 1"),
    "a script that nobody can load": (unloadable, "train_gpt.py: can't be loaded.*a_module_that_nobody_has"),
    "two headers": (in_logs("(config .*\n)", r"\1\1"), "one header"),
    "a name of two cells": (in_record(lambda row: row.update(name="idea](x) | 9.1")), "of another form"),
    "a name of Cyrillic letters": (in_record(lambda row: row.update(name="ide\u0430")), "of another form"),
    "a flag of words": (plan_of(flags=["--data=x **Reached**"]), "of another form"),
    "a flag that the record sets": (plan_of(flags=["--seed=3"]), "of another form"),
    "a side of words": (plan_of(interleaved=["A", "B (better)"]), "of another form"),
    "three sides": (plan_of(interleaved=["A", "B", "C"]), "sides of a race"),
    "a device of two cells": (in_logs("HBM3\\)", "HBM3) | before"), "device: found"),
    "a machine of words": (in_logs("machine: .*", "machine: eight of them"), "machine: found eight"),
    "a clock with emphasis": (in_logs("untimed: ", "untimed: **nothing** "), "untimed: found"),
    "evidence by the author": (in_author("## The *Evidence*"), "in the author's text: found"),
    "markup by the author": (in_author("p < 0.1\n\n`<details>`"), "in the author's text: found ..<d.."),
    "code without an end": (in_author("```\n<b>\n```\n\n~~~~\n```\n~~~"), "author's text: found ..~~~"),
    "author's seconds in bold": (claim("**0.31**&nbsp;sec"), "training time: found 0.31 s"),
    "author's comma": (claim("`0,31`-second runs"), "training time: found 0.31 s"),
    "author's hours": (claim("0.0114 hours"), "training time: found 41.04 s"),
    "author's clock": (claim("about 1:00:41"), "training time: found 3641 s"),
    "seconds below half": (claim("0.2 s"), "training time: found 0.2 s"),
    "validations of another seed": (seed0_s_validations, "seed1.txt: run: found that of"),
    "other data": (plan_of(flags=["--muon_lr=0.03", "--smear=off", "--data=web"]), "config.data by the"),
    "fast steps": (fast_steps, "fast steps of 64 tokens: found 1, 1 ms"),
    "a fast step": (partial(fast_steps, count=1), "fast steps of 64 tokens: found 1, [1-9][0-9]* ms"),
    "weights that were trained": (in_logs("28,900", "999,999"), "loss before training: found"),
    "float8 that is off": (in_logs('(config .*)"muon_lr"', r'\1"fp8": false, "muon_lr"'), "flags that are"),
    "data by another name": (in_logs('"data": ""', '"data": "data/web/"'), "folder of the data"),
    "a line with a loss": (in_logs("(peak .*)", r"\1\nbest loss so far 1.0"), "line about a loss"),
    "no hash of what was read": (in_logs("training tokens: .*\n", ""), "training tokens: found none"),
    "a name in the plan": (plan_of(witness="many"), "names and flags of another form"),
    "code that ends early": (in_author("```\n  ```\n<h2>Best</h2>\n```\n```"), "author's text: found ..<h"),
    "lines that end otherwise": (in_author("a\rb"), "author's text: found ..\\\\r"),
    "author's formula": (claim("$0.31$ s"), "training time: found 0.31 s"),
    "bits of unknown bytes": (in_logs("bytes:47185920", "bytes:unknown"), "val_bpb of validation 0"),
    "bits of a training loss": (in_logs(r"(step:9/24 train_loss:\S+)", r"\1 val_bpb:1.0"), "line of step 9"),
    "words behind a step": (in_logs("(step:9/24 .*)", r"\1 (the best)"), "end of the line of step 9"),
    "another scalar in the line": (in_logs("(lambda:.0.2)4", r"\g<1>5"), "end of the line of step 24"),
    "a line over another": (in_logs("(peak .*)", r"\1\rstep:24/24 val_loss:1.0"), "control characters"),
    "a launch of minutes": (in_logs("first step .* s a", "first step 900.0 s a", [2]), "stamp of its folder"),
    "a launch beyond the next start": (in_logs("first step .* s a", "first step 500.0 s a", [0]),
                                       "start: found .*one after the 50[01] s of seed0.txt"),
    "a log of hours later": (hours_later, "stamp of its folder"),
    "a log from another folder": (in_logs(r"log: .*(?=/\d{8})", "log: /elsewhere"), "folder of line log:"),
}  # fmt: skip


def reseal(folder: Path):
    """Everything that the tool generates, without its checks."""
    stored = json.loads((folder / "record.json").read_text())
    runs = [parse_log(folder / f"seed{seed}.txt") for seed in stored["plan"]["seeds"]]
    stored = record.complete(stored, runs)
    (folder / "record.json").write_text(record.dump(stored))
    author = record.read(folder / "README.md").partition(record.MARKER)[0]
    record.write(folder / "README.md", author + record.evidence(stored))


@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries_sealed_anew_are_caught(folder, name, monkeypatch):
    without_pictures(monkeypatch)  # so that none is caught by its picture
    forge, reason = FORGERIES[name]
    forge(folder)
    with pytest.raises(Mismatch, match=reason):
        reseal(folder)
        verify(folder)


def test_pictures_of_others_are_caught(folder):
    path, software = folder / "loss.png", PngInfo()
    with Image.open(path) as picture:
        genuine = picture.convert("RGBA")
        software.add_text("Software", picture.info["Software"])
    hidden, dot = genuine.copy(), genuine.copy()
    hidden.putalpha(128)
    dot.paste("red", (500, 200, 502, 202))
    for forged, more, reason in (
        (hidden, {}, "picture: found another"), (dot, {}, "picture: found another"),
        (genuine, {"save_all": True, "append_images": [dot], "default_image": True}, "form: found"),
        (genuine.resize((90, 90)), {}, "form: found"), (genuine, {"pnginfo": None}, "picture by: found None"),
    ):
        forged.save(path, **{"dpi": (110, 110), "pnginfo": software} | more)
        with pytest.raises(Mismatch, match=f"loss.png: {reason}"):
            verify(folder)
    old = PngInfo()
    old.add_text("Software", "Matplotlib version3.0.0, https://matplotlib.org/")
    dot.save(path, pnginfo=old)
    assert cli("verify", folder).out.endswith("\nrecords verified: 1, but for 1 pictures\n")
    path.unlink()
    assert "pictures: found ['lambdas.png']" in cli("verify", folder).err


def test_no_log_is_in_two_records_and_no_two_runs_are_at_once(made, folder):
    stored = record.load_record(folder)
    with pytest.raises(Mismatch, match="run: found that of"):
        record.check_between(folder, stored, [made.folder])
    other = [write_trainer(folder.parent / "t.py", base=3.1)]
    assert cli("new", "other", "--track=short", "--runs=1", f"--script={other[0]}",
               f"--records={folder.parent / 'r'}").code == 0
    (other,) = (folder.parent / "r").glob("track_1_short/*")
    record.check_between(folder, stored, [other])
    stamp = re.search(r"\d{8}-\d{6}", (folder / "seed0.txt").read_text())[0]
    path = other / "seed0.txt"
    text = re.sub(r"\d{8}-\d{6}", stamp, path.read_text())
    path.write_text(re.sub(r'("train_time": )0\.', r"\g<1>9.", text))  # nine seconds more
    with pytest.raises(Mismatch, match="start: found during"):
        record.check_between(folder, stored, [other])


def test_a_commit_before_the_first_run_is_a_witness(made, tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    for command in (["init", "-q"], ["config", "user.name", "x"], ["config", "user.email", "x@x"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    result = cli("new", "seen", "--track=tiny", "--runs=2", "--commit", f"--script={made.trainer}",
                 f"--records={tmp_path}")
    assert result.code == 0 and "registered with the sha256" in result.out, result.err
    (folder,) = tmp_path.glob("track_3_tiny/*")
    assert "Registered: before, by commit " in cli("verify", folder).out
    assert record.witness(made.folder, verify(made.folder)) == ""


def test_reproduce_says_what_is_missing(folder):
    plan = {"flags": ["--tokenizer=/tmp/nowhere/gpt2.tiktoken"]}
    none, data = SimpleNamespace(data=None, tokenizer=None), SimpleNamespace(data="/no/data", tokenizer=None)
    with pytest.raises(UserError, match="of the machine that made the record.*give reproduce --tokenizer="):
        record.find_paths(none, plan)
    with pytest.raises(UserError, match="--data=/no/data: given, not found"):
        record.find_paths(data, {"flags": []})
    assert "this repository lacks" in record.needs_text(plan)
    stored = {"name": "x", "track": "tiny", "runs": [{"seed": 0, "loss": 1.3}, {"seed": 1, "loss": 1.4}]}
    assert record.expected_loss(stored, 0)[:2] == pytest.approx((1.295, 1.305))
    assert record.expected_loss(stored, 7)[0] < 1
    with pytest.raises(UserError, match="has one run"):
        record.expected_loss(stored | {"runs": stored["runs"][:1]}, 7)


# ----------------------------------------------------------------------------------------------------------
# Running


def test_new_with_the_real_trainer(tmp_path, monkeypatch):
    """The tiny track squeezed to four steps, then verified from the folder alone."""
    monkeypatch.setattr(record, "check_flags", lambda *_: None)  # verify has the script parse them, too
    data = write_corpus(tmp_path / "data")
    flags = [f"--data={data}", "--scheduled_steps=4", "--val_every=2", "--width=32", "--epochs=50"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = cli("new", "real", "--track=tiny", "--runs=1", f"--records={tmp_path}", "--", *flags)
    assert result.code == 0, result.err
    assert "no target loss, so no p-value" in result.out
    folder = next(tmp_path.glob("track_3_tiny/*_real"))
    shutil.rmtree(data)
    stored = verify(folder)
    assert stored["results"].keys() == {"n", "sd_divides_by", "loss", "seconds"}
    assert stored["environment"]["device"].startswith("cpu")
    assert (folder / "lambdas.png").stat().st_size > 10_000
    assert sum(path.stat().st_size for path in folder.glob("*.txt")) < 20_000
    assert (folder / "train_gpt.py").read_bytes() == SCRIPT.read_bytes()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def start(made, place, *more):
    return cli("new", "idea", "--track=short", "--runs=3", f"--script={made.trainer}", f"--records={place}",
               *more)


def test_new_goes_on_where_it_stopped(made, tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    monkeypatch.setenv("FAIL", "1")
    result = start(made, tmp_path)
    assert result.code == 2 and "ended with exit code 1" in result.err and result.err.count("\n") == 1
    folder = next(tmp_path.glob("track_1_short/*"))
    first = (folder / "seed0.txt").stat()
    assert "1 of 3 runs done\nrecords verified: 0; unfinished: 1\n" in cli("verify", folder).out
    monkeypatch.delenv("FAIL")
    monkeypatch.setenv("STOP", "1")
    result = start(made, tmp_path)
    assert result.code == 1 and "order of step lines" in result.err
    assert (folder / "seed1.txt").exists() and not (folder / "seed2.txt").exists()
    monkeypatch.delenv("STOP")
    assert start(made, tmp_path).code == 0
    stored = verify(folder)
    assert [row["attempts"] for row in stored["runs"]] == [1, 3, 1]
    assert (folder / "seed0.txt").stat().st_mtime_ns == first.st_mtime_ns
    before = (folder / "record.json").read_bytes()
    assert start(made, tmp_path).code == 0  # nothing left to do
    assert (folder / "record.json").read_bytes() == before


def test_plan_is_written_before_the_first_run_and_binds(made, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL", "0")
    start(made, tmp_path, "--", "--muon_lr=0.03")
    stored = json.loads(next(tmp_path.glob("track_1_short/*/record.json")).read_text())
    assert stored["plan"]["seeds"] == [0, 1, 2] and stored["plan"]["flags"] == ["--muon_lr=0.03"]
    assert stored["plan"]["registered"] <= stored["runs"][0]["started"]
    assert stored["runs"][1]["started"] is None
    monkeypatch.delenv("FAIL")
    for reason, *arguments in (("flags", "--", "--muon_lr=0.04"),
                               ("runs", "--runs=4", "--", "--muon_lr=0.03")):
        result = start(made, tmp_path, *arguments)
        assert result.code == 2 and f"is registered with {reason}" in result.err
    other = write_trainer(tmp_path / "other.py", base=3.0)
    result = start(made, tmp_path, f"--script={other}", "--", "--muon_lr=0.03")
    assert result.code == 2 and "isn't the script" in result.err
    frozen = next(tmp_path.glob("track_1_short/*/train_gpt.py"))
    frozen.write_text(frozen.read_text() + "\n")
    result = start(made, tmp_path, "--", "--muon_lr=0.03")
    assert result.code == 1 and "train_gpt.py: sha256: found" in result.err


def test_several_gpus_go_through_torchrun(made, tmp_path, monkeypatch):
    commands = []
    failed = SimpleNamespace(returncode=1)
    monkeypatch.setattr(record, "config_of", lambda *arguments: {})
    monkeypatch.setattr(record.subprocess, "run", lambda command, **_: commands.append(command) or failed)
    assert start(made, tmp_path, "--gpus=8").code == 2
    assert commands[0][1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=8"]
    assert "--seed=0" in commands[0] and "--track=short" in commands[0]


def finished_logs(made, place, seeds=(4, 9), track="short"):
    for seed in seeds:
        command = [sys.executable, made.trainer, f"--track={track}", f"--seed={seed}", "--muon_lr=0.01",
                   "--smear=off", f"--log_folder={place}"]
        subprocess.run(command, check=True)
    return sorted(place.glob("2*"))


def test_imported_logs_are_marked(made, tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    logs = finished_logs(made, tmp_path / "logs")
    result = cli("import", *logs, "late", "--records", tmp_path / "records")
    assert result.code == 0, result.err
    folder = tmp_path / "records" / "track_1_short" / f"{record.now()[:10]}_late"
    stored = verify(folder)
    assert stored["plan"]["registered"] is None and stored["plan"]["seeds"] == [4, 9]
    assert stored["plan"]["flags"] == ["--muon_lr=0.01", "--smear=False"]
    assert "**Not pre-registered**" in (folder / "README.md").read_text()
    assert "Registered: no." in cli("verify", folder).out
    for change, reason in (({"date": "2026-01-01"}, "date"), ({"runs": 1}, "attempts and starts")):
        text = (folder / "record.json").read_text()
        for row in stored["runs"] * ("runs" in change):
            row["started"] = record.now()
        (folder / "record.json").write_text(record.dump(stored | change if "date" in change else stored))
        with pytest.raises(Mismatch, match=f"late: {reason}: found|place: found"):
            record.check_logs(folder, record.load_record(folder), stored["runs"])
        (folder / "record.json").write_text(text)
    change_plan(folder, [], runs=3)
    assert "number of seeds: found 2, expected 3" in cli("verify", folder).err
    again = cli("import", *logs, "late", "--records", tmp_path / "records")
    assert again.code == 2 and "is there already" in again.err
    (logs[0] / "train_gpt.py").write_text("pass")
    assert "train_gpt.py: sha256" in cli("import", *logs, "later", "--records", tmp_path / "records").err


def test_logs_that_are_no_record_are_not_imported(made, tmp_path):
    logs = [*finished_logs(made, tmp_path / "logs"), *finished_logs(made, tmp_path / "tiny", [1], "tiny")]
    into = "late", "--records", tmp_path / "records"
    assert "config.track (against log.txt)" in cli("import", logs[0], logs[2], *into).err
    assert "seed: found 4 as in" in cli("import", logs[0], logs[0], *into).err
    slow = SimpleNamespace(trainer=write_trainer(tmp_path / "slow.py", speed=400.0))  # as the clock says
    at_once = finished_logs(slow, tmp_path / "slow")
    assert "start: found during" in cli("import", *at_once, *into).err
    log = logs[0] / "log.txt"
    log.write_text(re.sub("step:7/.*\n", "", log.read_text()))
    assert "order of step lines" in cli("import", *logs[:2], *into).err
    assert not (tmp_path / "records").exists()


def test_runs_that_differ_are_no_record(made, tmp_path, monkeypatch):
    """As where torch is another when an interrupted command is given again."""
    monkeypatch.setenv("FAIL", "1")
    assert start(made, tmp_path).code == 2
    monkeypatch.delenv("FAIL")
    monkeypatch.setenv("TOKENS", "others")
    result = start(made, tmp_path)
    assert result.code == 1 and "seed1.txt: data (against seed0.txt)" in result.err
    assert not list(tmp_path.glob("track_1_short/*/README.md"))


def test_commit_needs_a_repository(made, tmp_path):
    result = cli("new", "x", "--track=tiny", "--runs=1", "--commit", f"--script={made.trainer}",
                 f"--records={tmp_path}")
    assert result.code == 2 and "--commit: git add: " in result.err


def test_verify_looks_at_all_records_and_the_page_beside_them(made, folder, tmp_path):
    result = cli("verify", made.folder, folder)
    assert result.code == 1 and "seed0.txt: run: found that of" in result.err
    records = tmp_path / "records"
    shutil.copytree(made.place / "records", records)
    (records / "README.md").write_text("<!-- records:short -->\nold\n<!-- /records:short -->\n")
    result = cli("verify", "--records", records)
    assert result.code == 1 and "README.md: generated text, line 2: found 'old'" in result.err


def test_reproduce(folder, monkeypatch):
    without_pictures(monkeypatch)
    result = cli("reproduce", folder, "--seed=5")
    assert result.code == 0 and result.out.endswith("reproduced\n"), result.err
    monkeypatch.setenv("MACHINE", "machine: gpu:000000000002 boot:000000000002\nextra: 1")
    assert "differs, may: extra: 1, in the record None" in cli("reproduce", folder).out
    monkeypatch.setenv("TOKENS", "others")
    assert "reproduction: data: found shards:9 sha256:" in cli("reproduce", folder).err
    monkeypatch.setenv("STOP", "0")
    assert "order of step lines" in cli("reproduce", folder).err
    for name in ("STOP", "TOKENS", "MACHINE"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("SHIFT", "0.2")
    result = cli("reproduce", folder)
    assert result.code == 1 and "not reproduced: loss" in result.err
    assert "99 % prediction interval" in result.err


def test_race_interleaves_and_goes_on(made, tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    order, train = [], record.train

    def noted(script, *rest):
        order.append(script.parent.name)
        return train(script, *rest)

    monkeypatch.setattr(record, "train", noted)
    a, b = write_trainer(tmp_path / "a.py"), write_trainer(tmp_path / "b.py", base=3.2670, speed=18.0)
    race = "race", a, b, "--runs=3", "--out", tmp_path / "race"
    monkeypatch.setenv("FAIL", "2")
    assert cli(*race).code == 2
    monkeypatch.delenv("FAIL")
    result = cli(*race)
    assert result.code == 0, result.err
    assert order == ["A_a", "B_b"] * 2 + ["A_a"] + ["A_a", "B_b"]
    assert "verdict on B: better" in result.out and "paired" in result.out
    assert "  by seed: -0.01000" in result.out
    assert verify(tmp_path / "race" / "A_a")["plan"]["interleaved"] == ["A_a", "B_b"]
    sleep(1)  # starts are whole seconds
    race = "race", a, b, "--runs=2,3", "--out", tmp_path / "uneven"
    order.clear()
    result = cli(*race)
    assert result.code == 0 and order == ["A_a", "B_b"] * 2 + ["B_b"], result.err
    assert "A_a: n = 2," in result.out and "B_b: n = 3," in result.out and "  by seed: -0.01000" in result.out
    assert "paired, n = 2" in result.out and result.out.endswith("the baseline has n = 2, an sd needs 3\n")
    assert "not of one race" not in result.out and "the loss alone" in result.out
    assert cli("race", a, b, "--runs=3,2", "--out", tmp_path / "uneven").code == 2  # registered with others

    later = tmp_path / "uneven" / "B_b"  # of another race whose sides have the same names
    for pair in itertools.permutations((tmp_path / "race" / "A_a", later)):
        assert "not of one race" in cli("compare", *pair).out
    result = cli("race", a, b, "--runs=1,2,3")
    assert result.code == 2 and "one number for both or A's and B's" in result.err


def test_keep_takes_a_side_of_a_race_into_the_records(tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    sides = write_trainer(tmp_path / "old.py"), write_trainer(tmp_path / "idea.py", base=3.26)
    assert cli("race", *sides, "--runs=2", "--track=short", "--out", tmp_path / "race").code == 0
    side = tmp_path / "race" / "B_idea"
    row = verify(side)
    result = cli("keep", side, "better_name", "--records", tmp_path / "records")
    assert result.code == 0, result.err
    (kept,) = (tmp_path / "records" / "track_1_short").iterdir()
    assert kept.name == f"{row['date']}_better_name" and verify(kept)["name"] == "better_name"
    readme = (kept / "README.md").read_text()
    assert readme.startswith("# better_name\n") and "in which A_old and B_idea took turns" in readme
    assert verify(side)["name"] == "B_idea"
    result = cli("keep", side, "better_name", "--records", tmp_path / "records")
    assert result.code == 2 and "is there already: give another name" in result.err
    (side / "seed1.txt").write_text((side / "seed1.txt").read_text().replace("3.2", "3.1", 1))
    assert cli("keep", side, "again", "--records", tmp_path / "records").code == 1
    assert [path.name for path in (tmp_path / "records").iterdir()] == ["track_1_short"]
    assert len(list((tmp_path / "records" / "track_1_short").iterdir())) == 1


def test_keep_copies_all_of_a_record_and_nothing_else(made, folder, tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    (folder / "logs").mkdir()
    result = cli("keep", folder, "twin", "--records", made.place / "records")
    assert result.code == 2 and "has these runs already" in result.err
    assert cli("keep", folder, "kept", "--records", tmp_path / "records").code == 0
    (kept,) = (tmp_path / "records" / "track_1_short").iterdir()
    assert {path.name for path in kept.iterdir()} == {path.name for path in folder.iterdir()} - {"logs"}


def test_a_race_registers_both_sides_or_none(made, tmp_path):
    a, missing = write_trainer(tmp_path / "a.py"), tmp_path / "missing.py"
    result = cli("race", a, missing, "--runs=2", "--out", tmp_path / "race")
    assert result.code == 2 and "missing.py: found no such file" in result.err
    assert not (tmp_path / "race").exists()
    (tmp_path / "b c.py").write_text(a.read_text())
    result = cli("race", a, tmp_path / "b c.py", "--runs=2", "--out", tmp_path / "race")
    assert result.code == 1 and "another form: found ['B_b c']" in result.err
    assert not (tmp_path / "race").exists()
    result = cli("race", a, a, "--runs=2", "--out=/proc/nowhere")
    assert result.code == 2 and "/proc/nowhere" in result.err and result.err.count("\n") == 1


def test_logs_of_an_unfinished_record_are_checked(made, tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    monkeypatch.setenv("FAIL", "2")
    new = ("new", "cut", "--track=short", "--runs=3", f"--script={made.trainer}", "--records", tmp_path)
    assert cli(*new).code == 2
    (folder,) = (tmp_path / "track_1_short").iterdir()
    result = cli("verify", folder)
    assert result.code == 0 and "unfinished, 2 of 3 runs done" in result.out
    result = cli("keep", folder, "half", "--records", tmp_path / "other")
    assert result.code == 1 and "unfinished, 2 of 3 runs done" in result.err
    log = (folder / "seed0.txt").read_text()
    (folder / "seed0.txt").write_text(log.replace("val_loss:3.2", "val_loss:3.1", 1))
    result = cli("verify", folder)
    assert result.code == 1 and "seed0.txt: sha256" in result.err
    (folder / "seed0.txt").write_text(log)
    text = (folder / "record.json").read_text()
    (folder / "record.json").write_text(text.replace('"attempts": 1', '"attempts": 2', 1))
    assert cli("verify", folder).code == 1
    (folder / "record.json").write_text(text)
    monkeypatch.delenv("FAIL")
    assert cli(*new).code == 0 and cli("verify", folder).code == 0


# ----------------------------------------------------------------------------------------------------------
# Comparing, listing, drawing


def group(name, losses, seconds, first_seed=0):
    """Runs whose curves fall by 0.1 in the last tenth of their time."""
    made = []
    for i, (loss, time) in enumerate(zip(losses, seconds)):
        rows = [{"step": step, "val_loss": loss + gap, "train_time": time * step / 100}
                for step, gap in ((0, 7.0), (50, 0.5), (90, 0.1), (100, 0.0))]
        header = {"machine": "one", "device": "d", "world_size": "1", "torch": "2", "validation": "tokens:1",
                  "data": "x shards:1 sha256:0"}
        config = {"seed": first_seed + i}
        made.append(runs_of_a_record.Run(Path(f"{name}{i}"), "", "", header, config, [], rows))
    return Group(name, made)


def verdict(b_losses, b_seconds, first_seed=10) -> str:
    a = group("a", [3.280, 3.281, 3.279], [100.0, 100.1, 99.9])
    return record.comparison(a, group("b", b_losses, b_seconds, first_seed), threshold=0.005)


def test_verdicts():
    text = verdict([3.270, 3.271, 3.269], [100.0, 100.1, 99.9])
    assert text.endswith("verdict on B: better") and "-0.01000 (sd 0.00082" in text
    assert "at equal steps, B - A: 0: -0.0100, 50: -0.0100" in text
    assert "no worse" in text and ": shown" in text
    expected = stats.ttest_ind([3.270, 3.271, 3.269], [3.275, 3.276, 3.274], alternative="less").pvalue
    assert f"at least 0.005 lower: p = {expected:.6f}" in text
    assert verdict([3.290, 3.291, 3.289], [100.0, 100.1, 99.9]).endswith("worse")
    assert verdict([3.2801, 3.2811, 3.2791], [100.0, 100.1, 99.9]).endswith("not resolved: under 2 sd")
    assert ": not shown" in verdict([3.284, 3.285, 3.283], [100.0, 100.1, 99.9])
    assert verdict([3.2773, 3.2783, 3.2763], [100.0, 100.1, 99.9]).endswith("includes 0: more runs")
    two = record.comparison(group("a", [3.28, 3.281], [1, 2]), group("b", [3.0, 3.1], [1, 2]))
    assert two.endswith("not resolved: the baseline has n = 2, an sd needs 3")
    single = record.comparison(group("a", [3.28], [1]), group("b", [3.0], [1]))
    assert "(one run each)" in single and single.endswith("an sd needs 3")


def test_net_seconds():
    """The last 0.1 of loss takes 10 s: 100 s per unit, so 0.01 less loss is worth one second."""
    text = verdict([3.270, 3.271, 3.269], [102.0, 102.1, 101.9])
    assert "net seconds, B - A: +1.00 s" in text
    assert "at 100.0 s per unit of loss (A, steps 90 to 100)" in text
    assert "the loss alone: -1.00 s (sd 0.08, 95 % -1.23 to -0.77, Welch): better" in text
    assert "not of one race" in text
    assert verdict([3.270, 3.271, 3.269], [102.0, 102.1, 101.9], first_seed=0).endswith("worse")
    flat = group("flat", [3.28] * 3, [1, 2, 3])
    for run in flat.runs:
        run.validations[2]["val_loss"] = 3.28
    assert "net seconds: unknown" in record.comparison(flat, flat)
    assert "net seconds, B - A: +0.00 s" in (text := record.comparison(flat, flat, slope=149.0))
    assert "at 149.0 s per unit of loss (given)" in text


def modded_nanogpt_log(path: Path, loss: float, seconds: float) -> Path:
    """The common form: source, '=' line, environment, '=' line, steps without a training loss, memory."""
    lines = ["import torch", "print('step:1/2 val_loss:1.0 train_time:1ms step_avg:1ms')", "=" * 100,
             "Running Python 3.10.12, PyTorch 2.10.0", "=" * 100,
             "step:0/100 val_loss:10.8258 train_time:0ms step_avg:0.04ms"]
    for step in range(1, 101):
        at = f"train_time:{seconds * 10 * step:.0f}ms step_avg:{seconds * 10:.2f}ms"
        lines += [f"step:{step}/100 {at}"]
        lines += [f"step:{step}/100 val_loss:{loss + 0.05 * (100 - step):.4f} {at}"] * (step % 25 == 0)
    path.write_text("\n".join([*lines, "peak memory allocated: 30054 MiB reserved: 44936 MiB", ""]))
    return path


def test_modded_nanogpt_s_logs(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(record, "check_pictures", lambda *_: [])
    logs = [modded_nanogpt_log(tmp_path / f"{i}.txt", 3.278 + i / 1000, 128.8 + i) for i in range(3)]
    run = parse_log(logs[1])
    assert run.loss == 3.279 and run.seconds == 129.8 and list(run.curve) == [0, 25, 50, 75, 100]
    assert run.source == record.sha256("\n".join(logs[0].read_text().split("\n")[:2]) + "\n")
    (tmp_path / "modded").mkdir()
    for log in logs:
        log.rename(tmp_path / "modded" / log.name)
    result = cli("compare", tmp_path / "modded", folder)
    assert result.code == 0 and "A = modded: n = 3, loss 3.27900" in result.out and "B = idea" in result.out
    assert "losses and times: not comparable: one side is modded" in result.out
    assert result.out.endswith("verdict on B: none\n")
    first = (tmp_path / "modded" / "0.txt").read_text()
    (tmp_path / "line.txt").write_text("=" * 100 + "\nconfig = 1\n" + first)
    assert parse_log(tmp_path / "line.txt").loss == 3.278
    (tmp_path / "mixed").mkdir()
    for name, text in (("0.txt", first), ("1.txt", "# another\n" + first)):
        (tmp_path / "mixed" / name).write_text(text)
    assert "mixes experiments" in cli("compare", tmp_path / "mixed", folder).err
    assert cli("plot", tmp_path / "modded", folder, "--out", tmp_path / "both.png", "--target=3.28").code == 0
    assert (tmp_path / "both.png").stat().st_size > 10_000
    planned = cli("plan", "--margin=.001", "--from", tmp_path / "modded").out
    assert "sd 0.001000 (of the 3 runs of modded)" in planned
    assert cli("import", tmp_path / "modded", "x", "--records", tmp_path).code == 2


def test_compare_refuses_what_is_no_number():
    assert "--threshold=nan: expected a number" in cli("compare", "a", "b", "--threshold=nan").err
    assert "expected a number above 0" in cli("compare", "a", "b", "--seconds_per_loss=0").err


def test_comparison_names_other_hardware_and_refuses_other_validation_tokens(folder, tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    shutil.copytree(folder, tmp_path / "other")
    for seed in range(3):
        path = tmp_path / "other" / f"seed{seed}.txt"
        path.write_text(path.read_text().replace("H100", "H200"))
    (tmp_path / "other" / "record.json").unlink()
    text = cli("compare", folder, tmp_path / "other").out
    assert text.startswith("differs: device of A is cuda:0 (NVIDIA H100") and "H200" in text
    for line, reason in (("machine: gpu:two boot:one", "2 machines"), ("x: y", "machine unknown")):
        for seed in range(3):
            path = tmp_path / "other" / f"seed{seed}.txt"
            path.write_text(re.sub("(?m)^(machine|x): .*", line, path.read_text()))
        text = cli("compare", folder, tmp_path / "other").out
        assert f"times and net seconds: not comparable: {reason}" in text and text.endswith("B: none\n")
    for seed in range(3):
        path = tmp_path / "other" / f"seed{seed}.txt"
        path.write_text(path.read_text().replace("validation: tokens:1", "validation: tokens:2"))
    assert "losses and times: not comparable: valid" in cli("compare", folder, tmp_path / "other").out


def test_table(made, tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    file = tmp_path / "README.md"
    file.write_text("top\n<!-- records:short -->\nold\n<!-- /records:short -->\nmiddle\n"
                    "<!-- records:tiny -->\n<!-- /records:tiny -->\nend\n")
    assert cli("table", "--file", file, "--records", made.place / "records").code == 0
    text = file.read_text()
    assert "old" not in text and text.startswith("top\n") and text.endswith("<!-- /records:tiny -->\nend\n")
    assert f"[idea]({os.path.relpath(made.folder, tmp_path)})" in text and "1 x cuda:0 (NVIDIA H100" in text
    assert "<!-- records:tiny -->\nNo record yet.\n" in text
    cli("table", "--file", file, "--records", made.place / "records")
    assert file.read_text() == text
    for broken in ("no marker", "<!-- records:tiny -->\n", "<!-- records:big -->\n<!-- /records:big -->"):
        file.write_text(broken)
        result = cli("table", "--file", file, "--records", made.place / "records")
        assert result.code == 2 and result.err.count("\n") == 1 and file.read_text() == broken


BAD = [
    [], ["frobnicate"], ["new"], ["new", "x", "--track=short"], ["new", "x", "--track=short", "--runs=0"],
    ["new", "x", "--track=short", "--runs=two"], ["new", "x", "--track=none", "--runs=2"],
    ["new", "../x", "--track=tiny", "--runs=2"],
    ["new", "x", "--track=tiny", "--runs=2", "--script=/nowhere.py"],
    ["new", "x", "--track=tiny", "--runs=2", "--", "--seed=3"],
    ["new", "x", "--track=tiny", "--runs=2", "--", "lr"], ["verify", "--", "--muon_lr=1"],
    ["new", "x", "--track=short", "--runs=2", "--", "--val_tokens=100"], ["verify", "/nowhere"],
    ["compare", "a", "b", "--seconds_per_loss=0"], ["compare", "a", "b", "--threshold=nan"],
    ["keep", "/nowhere", "x"],
    ["compare", "/nowhere", "/nowhere"], ["compare", "a"], ["compare", SCRIPT, SCRIPT], ["plan"],
    ["plan", "--margin=0"], ["plan", "--margin=x"], ["plan", "--margin=.001", "--sd=-1"],
    ["plan", "--margin=1e-9"], ["plan", "--margin=nan"], ["table", "--file=/nowhere/README.md"],
    ["plot", "/nowhere"], ["import", "/nowhere", "x"], ["reproduce", "/nowhere"],
    ["race", "/nowhere", "/nowhere"], ["race", "/nowhere", "/nowhere", "--runs=1"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", BAD, ids=lambda arguments: " ".join(map(str, arguments)) or "nothing")
def test_bad_input_is_one_line(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = [f"--records={tmp_path}"] * (arguments[:1] in (["new"], ["import"]))
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    result = cli(*arguments[:cut], *records, *arguments[cut:])
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("record.py: ") and result.err.count("\n") == 1
    assert not list(tmp_path.glob("track_*/*"))


def test_folders_that_are_no_records(folder, tmp_path):
    with pytest.raises(UserError):
        verify(tmp_path)
    for text in ("{}", "[]", "not JSON", "null"):
        (folder / "record.json").write_text(text)
        with pytest.raises(Mismatch):
            verify(folder)


def test_a_record_that_is_only_registered_is_said_to_be(made, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL", "1")
    assert cli("new", "begun", "--track=tiny", "--runs=3", f"--script={made.trainer}",
               f"--records={tmp_path}").code
    (folder,) = tmp_path.glob("track_3_tiny/*_begun")
    done = cli("verify", folder)
    assert done.code == 0 and f"{folder}: unfinished, 1 of 3 runs done" in done.out
    work = folder / record.work_folder(record.load_record(folder), 1)  # as after a kill
    work.mkdir()
    (work / "log.txt").touch()
    shutil.copy(folder / "seed0.txt", folder / "seed1.txt")
    assert cli("verify", folder).code == 0
    for name in ("README.md", "loss.png", "seed3.txt", ".run_fast/log.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
        result = cli("verify", folder)
        found = name.partition("/")[0]
        assert result.code == 1 and f"other files: found ['{found}']" in result.err
        (folder / name).unlink()
    (folder / "train_gpt.py").write_text("# another")
    assert cli("verify", folder).code == 1


def test_a_finished_record_without_its_results_is_not_taken_for_an_unfinished_one(folder):
    in_record(lambda stored: stored.pop("results"))(folder)
    assert "other files: found ['README.md', 'lambdas.png', 'loss.png']" in cli("verify", folder).err


def test_an_interrupted_end_is_made_up_for(made, tmp_path, monkeypatch):
    """record.json comes first, so an unfinished record never has a README."""
    def full(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(record, "draw_losses", full)
    assert start(made, tmp_path).code == 2
    (folder,) = tmp_path.glob("track_1_short/*")
    assert "results" in record.load_record(folder)
    assert "pictures: found []" in cli("verify", folder).err
    without_pictures(monkeypatch)
    assert start(made, tmp_path).code == cli("verify", folder).code == 0


def test_a_complete_record_without_a_log_is_not_taken_for_one_that_is_only_registered(folder):
    for log in folder.glob("seed*.txt"):
        log.unlink()
    assert cli("verify", folder).code == 1


@pytest.mark.parametrize("flag, reason", [
    ("--smaer=off", "unrecognized arguments: --smaer=off"),
    ("--muon_lr=fast", "invalid float value: 'fast'"),
    ("--seed=3", "none of those that a record sets"),
    ("--data=/nowhere", "found no such folder"),
])  # fmt: skip
def test_nothing_is_registered_that_the_script_refuses(made, tmp_path, flag, reason):
    done = cli("new", "idea", "--track=tiny", "--runs=2", f"--script={made.trainer}", f"--records={tmp_path}",
               "--", flag)
    assert done.code == 2 and reason in done.err and done.err.count("\n") == 1
    assert not [*tmp_path.rglob("*.json"), *tmp_path.rglob("*.py")]


def test_single_runs_are_what_their_rows_say():
    """Of the sprints with n = 1: the logs are whole, of the named scripts, and end at these losses."""
    folder = record.ROOT / "benchmarks" / "results" / "single_runs"
    rows = json.loads((folder / "runs.json").read_text())["runs"]
    assert {row["log"] for row in rows} == {path.name for path in folder.glob("*.txt")} and len(rows) == 9
    for row in rows:
        run = parse_log(folder / row["log"])
        check_run(run)
        assert (run.sha256, run.source, run.loss, run.seconds) == (
            row["log_sha256"], row["source_sha256"], row["loss"], row["seconds"])
        assert run.config["seed"] == row["seed"]
        for name, value in map(runs_of_a_record.parse_flag, row["flags"]):
            found = run.config[name]
            found = ("off", "on")[found] if isinstance(found, bool) else found
            assert value == found or float(value) == found
