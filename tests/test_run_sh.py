"""run.sh between fakes: one script plays Python, pip, the trainer and torchrun, and notes each call."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 60  # seconds; nothing here takes so long, even on a loaded machine
QUERY = "-m|pip|index|versions|torch|--retries|0|--timeout|5"
INSTALL = "-m|pip|install|-r|requirements.txt"
INDEX = "--extra-index-url=https://download.pytorch.org/whl/cpu"
TINY = ["data/sample.py", "train_gpt.py|--track=tiny"]

FAKE_PYTHON = r"""#!/usr/bin/env bash
wait_for_signal() {
    local stopped=0 name
    for name in INT TERM; do trap "stopped=1; echo got $name >>\"\$JOURNAL\"" $name; done
    echo ready >>"$JOURNAL"
    until ((stopped || SECONDS > 60)) || [[ -e $JOURNAL.go ]]; do sleep 0.02; done
    ((!stopped)) || { sleep 0.2; exit 7; } # time for a second signal
}
case "$*" in
    *version_info*) exit "${OLD_PYTHON:-0}" ;;
    *"import torch"*) exit "${NO_TORCH:-1}" ;;
esac
line=$(printf '|%s' "${@//"$REPO/"/}")
echo "${line:1}" >>"$JOURNAL"
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && touch "$3/pyvenv.cfg" && cp "$0" "$3/bin/python" ;;
    "-m pip index "*--extra-index-url*) echo "${INDEX_HAS-2.11.0+cpu}" ;;
    "-m pip index "*) echo "${PIP_HAS-2.11.0}" ;;
    "-m pip install "*) [[ -z ${SLOW_PIP-} ]] || wait_for_signal; exit "${PIP_FAILS:-0}" ;;
    */data/*) exit "${DATA_FAILS:-0}" ;;
    *) pwd >"$JOURNAL.cwd"; [[ -z ${SLOW-} ]] || wait_for_signal; exit "${EXIT:-0}" ;;
esac
"""


class Sandbox:
    """A copy of run.sh in a folder with a space in its name; the user stands in another."""

    def __init__(self, base):
        self.repo, self.here, self.bin = base / "my copy", base / "there", base / "bin"
        self.journal = base / "journal"
        for folder in (self.repo, self.here, self.bin):
            folder.mkdir()
        for name in ("run.sh", "requirements.txt"):
            shutil.copy(ROOT / name, self.repo)
        self.script("python3", FAKE_PYTHON)
        self.gpus(0)
        path = f"{self.bin}:{os.environ['PATH']}"
        self.env = {"PATH": path, "REPO": str(self.repo), "JOURNAL": str(self.journal)}

    def script(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def gpus(self, count):
        self.script("nvidia-smi", f"#!/bin/sh\nfor i in $(seq {count}); do echo GPU $i: Fake; done\nexit 9\n")

    def start(self, *args, **env):
        return subprocess.Popen(
            ["bash", self.repo / "run.sh", *args], cwd=self.here, env=self.env | env, start_new_session=True,
            text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # background jobs ignore it

    def start_slow(self, *args, **env):
        """Returns once something waits for a signal."""
        self.journal.unlink(missing_ok=True)
        process, end = self.start(*args, **env), time.monotonic() + PATIENCE
        while "ready" not in self.calls():
            assert time.monotonic() < end
            time.sleep(0.01)
        return process

    def run(self, *args, **env):
        """The exit status and the calls that were made."""
        self.journal.unlink(missing_ok=True)
        process = self.start(*args, **env)
        self.out, self.err = process.communicate(timeout=PATIENCE)
        return process.returncode, self.calls()

    def calls(self):
        return self.journal.read_text().splitlines() if self.journal.exists() else []

    def cwd(self):
        return Path(f"{self.journal}.cwd").read_text().strip()


@pytest.fixture
def fresh(tmp_path):
    return Sandbox(tmp_path)


@pytest.fixture
def box(fresh):
    """A sandbox that is set up already."""
    assert fresh.run("tiny")[0] == 0
    return fresh


def test_no_arguments_train_tiny_and_sample_a_text(box):
    assert box.run() == (0, [*TINY, "evaluate.py|--sample=The module "])
    assert re.fullmatch(r"setup: \d+ s\n", box.out)
    assert box.run(EXIT="3") == (3, TINY)


def test_arguments_folder_and_exit_status_pass_through(box):
    status, calls = box.run("race300", "--name=two words", "--star=*", EXIT="5")
    assert status == 5 and calls[-1] == "train_gpt.py|--track=race300|--name=two words|--star=*"
    assert box.cwd() == str(box.here)
    assert box.run("--seed=3") == (0, [TINY[0], f"{TINY[1]}|--seed=3"])


@pytest.mark.parametrize("track, script", [
    ("tiny", "sample.py"), ("race300", "fineweb.py|2"), ("short", "fineweb.py|9"),
    ("medium", "fineweb.py|22")])
def test_data_of_each_track(box, track, script):
    train = f"train_gpt.py|--track={track}"
    assert box.run(track, "--seed=1") == (0, [f"data/{script}", f"{train}|--seed=1"])
    assert box.run(track, DATA_FAILS="4") == (4, [f"data/{script}"])
    assert box.run(track, "--data=my data") == (0, [f"{train}|--data=my data"])


def test_help(box):
    for word in "help", "-h", "--help":
        assert box.run(word) == (0, []) and box.out.startswith("usage: ./run.sh") and "medium" in box.out
    assert box.run("short", "--help", NPROC="8") == (0, ["train_gpt.py|--track=short|--help"])


@pytest.mark.parametrize("args, env, found", [
    (["large"], {}, "'large'"), ([""], {}, "''"), (["short", "--track=tiny"], {}, "comes first"),
    ([], {"NPROC": "two"}, "NPROC=two"), ([], {"NPROC": "-1"}, "NPROC=-1"), ([], {"OLD_PYTHON": "1"}, "3.10"),
    ([], {"PYTHON": "/nowhere/python"}, "'/nowhere/python'")])
def test_what_a_user_gets_wrong_is_said_in_one_line(fresh, args, env, found):
    assert fresh.run(*args, **env) == (2, []) and not (fresh.repo / ".venv").exists()
    assert fresh.err.startswith("run.sh: ") and found in fresh.err and fresh.err.count("\n") == 1


def test_tests_run_in_the_repository(box):
    assert box.run("test", "-k", "a b", EXIT="1") == (1, ["-m|pytest|-q|-k|a b"])
    assert box.cwd() == str(box.repo)
    assert box.run("test") == (0, ["-m|pytest|-q|-n|2|--dist|loadfile|--no-loadscope-reorder"])


def test_ci_calls_exactly_run_sh_test(fresh):
    shutil.copytree(ROOT / ".ci", fresh.repo / ".ci")
    fresh.script("../my copy/run.sh", '#!/bin/sh\necho "$PWD: $*"; exit 4\n')
    result = subprocess.run([fresh.repo / ".ci/run"], cwd="/", capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (4, f"{fresh.repo}: test\n")


@pytest.mark.parametrize("gpus, env, processes", [
    (1, {}, 1), (3, {}, 2), (7, {}, 4), (8, {}, 8), (8, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 4),
    (8, {"CUDA_VISIBLE_DEVICES": ""}, 1), (0, {"CUDA_VISIBLE_DEVICES": "0,1"}, 1), (8, {"NPROC": "1"}, 1),
    (0, {"NPROC": "17"}, 16)])
def test_one_process_per_gpu(fresh, gpus, env, processes):
    fresh.gpus(gpus)
    status, calls = fresh.run("short", "--seed=1", **env)
    launcher = f"-m|torch.distributed.run|--standalone|--nproc_per_node={processes}|" if processes > 1 else ""
    assert status == 0 and calls[-1] == f"{launcher}train_gpt.py|--track=short|--seed=1"
    assert ("multiple of 8" in fresh.out) == (gpus in (3, 7) or env == {"NPROC": "17"})


@pytest.mark.parametrize("args", [[], ["tiny"]])
@pytest.mark.parametrize("send, number", [
    (os.kill, signal.SIGTERM), (os.killpg, signal.SIGINT)])  # Ctrl-C goes to the whole process group
def test_a_signal_reaches_the_training_once(box, args, send, number):
    process = box.start_slow(*args, SLOW="yes")
    send(process.pid, number)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 7 and box.calls() == [*TINY, "ready", f"got {number.name[3:]}"]


def test_the_first_run_installs_and_the_second_does_not(fresh):
    install = f"{INSTALL}|--no-compile|torch==2.11.0+cpu|{INDEX}"
    assert fresh.run("tiny") == (0, ["-m|venv|.venv", QUERY, f"{QUERY}|{INDEX}", install, *TINY])
    assert fresh.run("tiny") == (0, TINY)


@pytest.mark.parametrize("env, build", [
    ({"PIP_HAS": "2.11.0+cpu"}, "|torch==2.11.0+cpu"), ({"INDEX_HAS": ""}, "")])
def test_other_places_of_torch(fresh, env, build):
    assert fresh.run("tiny", **env)[1][-3:] == [f"{INSTALL}|--no-compile{build}", *TINY]


def test_a_gpu_gets_its_own_torch(box):
    (box.repo / ".venv/old").touch()
    box.gpus(1)
    assert box.run("tiny") == (0, ["-m|venv|.venv", QUERY, INSTALL, *TINY])
    assert not (box.repo / ".venv/old").exists()
    box.gpus(0)  # a login node that shares the folder
    assert box.run("tiny") == (0, TINY)


def test_changed_requirements_are_installed_into_the_same_environment(box):
    (box.repo / "requirements.txt").write_text("torch==3.0.0\n")
    install = f"{INSTALL}|--no-compile|torch==3.0.0+cpu"
    assert box.run("tiny", PIP_HAS="3.0.0+cpu")[1][1:] == [install, *TINY]
    assert box.run("tiny") == (0, TINY)


def test_an_interpreter_that_vanished_is_replaced(box):
    (box.repo / ".venv/bin/python").unlink()
    assert box.run("tiny")[1][0] == "-m|venv|.venv"


def test_an_environment_made_by_hand_is_left_alone(fresh):
    (fresh.repo / ".venv").mkdir()
    (fresh.repo / ".venv/pyvenv.cfg").touch()
    assert fresh.run("tiny") == (2, []) and "move it away" in fresh.err
    assert [path.name for path in (fresh.repo / ".venv").iterdir()] == ["pyvenv.cfg"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_installation_is_repaired(fresh, number):
    process = fresh.start_slow("tiny", SLOW_PIP="yes")
    process.send_signal(number)
    if number == signal.SIGKILL:  # pip goes on alone
        process.wait(timeout=PATIENCE)
        Path(f"{fresh.journal}.go").touch()
    process.communicate(timeout=PATIENCE)
    assert process.returncode in (7, -number) and TINY[0] not in fresh.calls()
    (fresh.repo / ".venv/half").touch()
    activated = f"{fresh.repo}/.venv/bin:{fresh.env['PATH']}"  # whose python3 goes away
    shutil.copy(fresh.repo / ".venv/bin/python", fresh.repo / ".venv/bin/python3")
    status, calls = fresh.run("tiny", PATH=activated)
    assert status == 0 and calls[0] == "-m|venv|.venv" and not (fresh.repo / ".venv/half").exists()
    assert fresh.run("tiny") == (0, TINY)


@pytest.mark.skipif(not shutil.which("flock"), reason="needs flock")
def test_two_first_runs_install_once(fresh):
    both = fresh.start_slow("tiny", SLOW_PIP="yes"), fresh.start("tiny", SLOW_PIP="yes")
    assert both[1].stdout.readline().startswith("setup: installing")
    time.sleep(0.2)  # for what it mustn't do now
    Path(f"{fresh.journal}.go").touch()
    for process in both:
        process.communicate(timeout=PATIENCE)
    assert [process.returncode for process in both] == [0, 0]
    assert fresh.calls().count("ready") == 1 and fresh.calls().count(TINY[1]) == 2


def test_what_cannot_be_installed_may_be_there_already(fresh):
    assert fresh.run("tiny", PIP_FAILS="1")[0] == 2 and "connect to a network" in fresh.err
    assert fresh.run("tiny", PIP_HAS="")[0] == 2 and "connect to a network" in fresh.err
    assert not any("|install|" in call for call in fresh.calls())  # which would try for minutes
    status, calls = fresh.run("tiny", PIP_FAILS="1", NO_TORCH="0")
    assert status == 0 and calls[-2:] == TINY and "used instead" in fresh.out
    assert fresh.run("tiny")[1][0] == "-m|venv|.venv"  # once there is a network
