"""run.sh with everything around it faked: pip, venv, torch and the GPUs; what it calls is read from a journal."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 60  # seconds; nothing here takes so long, and a loaded machine may take many times as long as usual

# Every fake writes one line to $JOURNAL: who was called, with what, where.
FAKES = {
    "journal.py": """
import json, os, sys
def note(who, **more):
    with open(os.environ["JOURNAL"], "a") as file:
        call = {"who": who, "args": sys.argv[1:], "cwd": os.getcwd(), "pid": os.getpid(), **more}
        print(json.dumps(call), file=file)
""",
    # pip: 'install' makes the fake torch importable; $FAKE_PIP says what goes wrong
    "pip/__main__.py": """
import os, sys, time
from journal import note
mode = os.environ.get("FAKE_PIP", "")
if "--version" not in sys.argv:
    note("pip")
    if mode == "offline" or (mode == "offline-later" and "install" in sys.argv):
        sys.exit("WARNING: retrying\\nERROR: No matching distribution found for tqdm")
    if mode == "only-cuda" and "torch==2.13.0+cpu" in sys.argv:
        sys.exit("ERROR: No matching distribution found for torch==2.13.0+cpu")
    if "install" in sys.argv:
        end = time.monotonic() + (600 if mode == "hang" else 0)
        while time.monotonic() < end and not os.path.exists(os.environ["INSTALLED"] + ".now"):
            time.sleep(0.01)
        open(os.environ["INSTALLED"], "w").close()
        note("pip done")
""",
    "pip/__init__.py": "",  # without it the real pip would win
    "venv/__init__.py": "",
    "venv/__main__.py": """
import os, sys
from journal import note
note("venv")
if os.environ.get("FAKE_VENV"):
    sys.exit("ensurepip is not available")
os.makedirs(sys.argv[1] + "/bin", exist_ok=True)
if not os.path.lexists(sys.argv[1] + "/bin/python"):
    os.symlink(sys.executable, sys.argv[1] + "/bin/python")
""",
    # python runs this at its start, so they can be counted
    "sitecustomize.py": """
import os
with open(os.environ["JOURNAL"] + ".starts", "a") as file:
    file.write(".")
""",
    "torch/__init__.py": """
import os
__version__ = os.environ.get("FAKE_TORCH", "2.13.0+fake")
if "FAKE_TORCH" not in os.environ and not os.path.exists(os.environ["INSTALLED"]):
    raise ImportError("no torch yet")
""",
    "torch/distributed/__init__.py": "",
    "torch/distributed/run.py": "from journal import note\nif __name__ == '__main__': note('launcher')\n",
    "torch-2.13.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n",
    "pytest/__init__.py": "",
    "pytest/__main__.py": """
import os, sys
from journal import note
note("pytest")
sys.exit(int(os.environ.get("EXIT", 0)))
""",
    **{f"{name}.py": "" for name in ("numpy", "safetensors", "tqdm", "xdist")},
    **{f"{name}/__init__.py": "" for name in ("scipy", "matplotlib")},
    "scipy/stats.py": "",
    "matplotlib/pyplot.py": "",
}

TRAIN = """
import os, signal, sys, time
from journal import note
check = "--check" in sys.argv
note("check" if check else "train", int_ignored=signal.getsignal(signal.SIGINT) == signal.SIG_IGN)
def stop(number, frame):
    note("stopped", signal=number)
    time.sleep(0.3)  # as if a checkpoint were written
    sys.exit(7)
if "--hang" in sys.argv:
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    note("ready")
    time.sleep(600)
if check and "--bad" in sys.argv:
    sys.exit(print("train_gpt.py: unknown flag --bad", file=sys.stderr) or 2)
sys.exit(int(os.environ.get("EXIT", 0)))
"""

DATA = "import os, sys\nfrom journal import note\nnote({name!r})\nsys.exit(int(os.environ.get('DATA_EXIT', 0)))\n"


class Sandbox:
    """A copy of run.sh in a folder with spaces, between fakes; `here` is the user's directory, elsewhere."""

    def __init__(self, base):
        self.repo, self.here, self.bin = base / "my copy", base / "some where", base / "bin"
        self.journal, self.env = base / "journal", {}
        for folder in (self.repo / "data", self.here, self.bin):
            folder.mkdir(parents=True)
        for name in ("run.sh", "requirements.txt"):
            shutil.copy(ROOT / name, self.repo)
        (self.repo / "train_gpt.py").write_text(TRAIN)
        for name in ("sample", "fineweb"):
            (self.repo / "data" / f"{name}.py").write_text(DATA.format(name=name))
        for name, text in FAKES.items():
            (base / "fakes" / name).parent.mkdir(parents=True, exist_ok=True)
            (base / "fakes" / name).write_text(text)
        self.script("torchrun", "echo '{\"who\": \"torchrun\"}' >>\"$JOURNAL\"; exit 99")
        self.gpus(0)
        ours = ("NPROC", "PYTHON", "CUDA_VISIBLE_DEVICES", "PIP_", "FAKE_", "EXIT", "DATA_EXIT", "BASH_ENV")
        self.base_env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        self.base_env |= {
            "PATH": f"{self.bin}:{os.environ['PATH']}", "PYTHON": sys.executable, "PYTHONPATH": str(base / "fakes"),
            "JOURNAL": str(self.journal), "INSTALLED": str(base / "installed"), "PYTHONDONTWRITEBYTECODE": "1",
        }

    def script(self, name, body):
        path = self.bin / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
        return path

    def gpus(self, count):
        lines = "".join(f"GPU {i}: Fake (UUID: GPU-{i})\\n" for i in range(count))
        self.script("nvidia-smi", f"printf '{lines}'" if count else "echo 'no driver'; exit 9")

    def start(self, *args, stdout=subprocess.PIPE, **env):
        return subprocess.Popen(
            ["bash", str(self.repo / "run.sh"), *args], cwd=self.here, text=True, stdin=subprocess.DEVNULL,
            stdout=stdout, stderr=subprocess.PIPE, env={**self.base_env, **self.env, **env},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a background job ignores it

    def run(self, *args, **env):
        """Returns the finished process; its journal is that of this call alone."""
        self.journal.unlink(missing_ok=True)
        Path(f"{self.journal}.starts").unlink(missing_ok=True)
        process = self.start(*args, **env)
        process.out, process.err = process.communicate(timeout=PATIENCE)
        return process

    def calls(self, *whom):
        text = self.journal.read_text() if self.journal.exists() else ""
        lines = text.split("\n")[:-1]  # without one that is being written
        return [call for call in map(json.loads, lines) if not whom or call["who"] in whom]

    def names(self):
        return [call["who"] for call in self.calls()]

    def await_call(self, who, args=()):
        """The first call with these among its arguments."""
        def made():
            return [call for call in self.calls(who) if {*args} <= {*call["args"]}]

        assert comes_true(made), f"{who} was never called"
        return made()[0]

    def refused(self, *args, **env):
        """Runs what must be refused, before anything is started, and returns the one line that says why."""
        result = self.run(*args, **env)
        assert result.returncode == 2 and not self.calls("train", "launcher", "sample", "fineweb")
        assert result.err.startswith("run.sh: ") and result.err.count("\n") == 1
        return result.err


@pytest.fixture
def fresh(tmp_path):
    return Sandbox(tmp_path)


@pytest.fixture
def box(fresh):
    """A sandbox that is set up already."""
    assert fresh.run("tiny").returncode == 0
    return fresh


def comes_true(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def gone(pid):
    """Whether a process has ended; a zombie, for its new parent to collect, has."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] == "Z"
    except OSError:
        return True


# ------------------------------------------------------------------- arguments


def test_no_arguments_train_tiny_on_its_sample(box):
    result = box.run()
    assert result.returncode == 0 and box.names() == ["sample", "train"]
    assert box.calls("train")[0]["args"] == ["--track=tiny"]
    lines = result.out.splitlines()
    assert re.fullmatch(r"setup: \d+ s \(already installed\)", lines[0])
    assert re.fullmatch(r"run: \d+ s", lines[-1])


def test_arguments_directory_and_exit_code_pass_through(box):
    result = box.run("sprint", "--name=two words", "--out=rel/path", "--star=*", EXIT="5")
    train = box.calls("train")[0]
    assert result.returncode == 5
    assert train["args"] == ["--track=sprint", "--name=two words", "--out=rel/path", "--star=*"]
    assert train["cwd"] == str(box.here)


def test_flags_alone_mean_tiny(box):
    box.run("--steps=3")
    assert box.calls("train")[0]["args"] == ["--track=tiny", "--steps=3"]


@pytest.mark.parametrize("track, script, args", [
    ("tiny", "sample", []), ("sprint", "fineweb", ["1"]), ("short", "fineweb", ["9"]), ("medium", "fineweb", ["22"])])
def test_data_of_each_track(box, track, script, args):
    box.run(track)
    assert box.names() == [script, "train"] and box.calls(script)[0]["args"] == args


@pytest.mark.parametrize("flag", ["--data=mine", "--checkpoint=c", "--help"])
def test_flags_that_bring_their_own_data(box, flag):
    assert box.run("short", "--x=1", flag).returncode == 0 and box.names() == ["train"]


def test_data_that_fails_stops_the_run(box):
    assert box.run("short", DATA_EXIT="2").returncode == 2 and box.names() == ["fineweb"]


@pytest.mark.parametrize("args, found", [
    (["large"], "'large'"), ([""], "''"), (["short", "8"], "'8'"), (["tiny", "--track=short"], "./run.sh short")])
def test_bad_arguments_are_refused_in_one_line(fresh, args, found):
    assert found in fresh.refused(*args) and not (fresh.repo / ".venv").exists()


@pytest.mark.parametrize("word", ["help", "-h", "--help"])
def test_help(fresh, word):
    result = fresh.run(word)
    assert result.returncode == 0 and result.out.startswith("usage: ./run.sh") and not (fresh.repo / ".venv").exists()


def test_tests_run_from_the_repository(box):
    result = box.run("test", "-k", "a b", EXIT="1")
    call = box.calls("pytest")[0]
    assert result.returncode == 1 and call["cwd"] == str(box.repo)
    assert call["args"] == ["-q", f"--rootdir={box.repo}", "tests", "-k", "a b"]


def test_all_tests_run_in_two_processes_if_there_is_xdist(box, tmp_path):
    plain = ["-q", f"--rootdir={box.repo}", "tests"]
    assert box.run("test").returncode == 0
    assert box.calls("pytest")[0]["args"] == [*plain, "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    (tmp_path / "fakes/xdist.py").write_text("raise ImportError")
    assert box.run("test").returncode == 0 and box.calls("pytest")[0]["args"] == plain


def test_ci_calls_exactly_run_sh_test(tmp_path):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci")
    (tmp_path / "run.sh").write_text('#!/usr/bin/env bash\nprintf "%s|" "$PWD" "$@"\nexit 4\n')
    (tmp_path / "run.sh").chmod(0o755)
    result = subprocess.run([tmp_path / ".ci/run"], cwd="/", capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (4, f"{tmp_path}|test|")


# ------------------------------------------------------------------- processes


@pytest.mark.parametrize("gpus, env, processes", [
    (0, {}, 1), (1, {}, 1), (2, {}, 2), (3, {}, 2), (7, {}, 4), (8, {}, 8),
    (8, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 4), (8, {"CUDA_VISIBLE_DEVICES": "5"}, 1),
    (8, {"CUDA_VISIBLE_DEVICES": ""}, 1), (8, {"CUDA_VISIBLE_DEVICES": "0,1,-1,2"}, 2),
    (2, {"CUDA_VISIBLE_DEVICES": "0,9,1"}, 1), (4, {"CUDA_VISIBLE_DEVICES": "GPU-0,GPU-3"}, 2),
    (0, {"CUDA_VISIBLE_DEVICES": "0,1"}, 1), (0, {"NPROC": "4"}, 4), (8, {"NPROC": "1"}, 1), (8, {"NPROC": "2"}, 2),
    (0, {"NPROC": "12"}, 8), (0, {"NPROC": "16"}, 16), (4, {"NPROC": "8", "CUDA_VISIBLE_DEVICES": ""}, 8)])
def test_one_process_per_gpu(fresh, gpus, env, processes):
    fresh.gpus(gpus)
    result = fresh.run("short", "--seed=1", **env)
    assert result.returncode == 0 and not fresh.calls("torchrun")
    asked = int(env.get("NPROC", 0)) or (gpus if "CUDA_VISIBLE_DEVICES" not in env else processes)
    assert (f"{processes} processes instead of {asked}" in result.out) == (asked > processes)
    if processes == 1:
        assert fresh.names()[-2:] == ["fineweb", "train"]
    else:
        check, launcher = fresh.calls("check", "launcher")
        assert fresh.names()[-3:] == ["fineweb", "check", "launcher"]
        assert check["args"] == ["--check", "--track=short", "--seed=1"]
        assert launcher["args"] == ["--standalone", f"--nproc_per_node={processes}",
                                    str(fresh.repo / "train_gpt.py"), "--track=short", "--seed=1"]


def test_several_processes_start_only_after_the_check(box):
    result = box.run("tiny", "--bad", NPROC="2")
    assert result.returncode == 2 and result.err == "train_gpt.py: unknown flag --bad\n"
    assert box.names() == ["sample", "check"]


@pytest.mark.parametrize("flag", ["--help", "--check", "--checkpoint=c"])
def test_help_check_and_checkpoint_take_one_process(box, flag):
    assert box.run("tiny", flag, NPROC="8").returncode == 0 and not box.calls("launcher")


@pytest.mark.parametrize("gpus, value, found", [
    (0, "two", "'two'"), (0, "0", "'0'"), (0, "-1", "'-1'"), (2, "4", "NPROC=4")])
def test_bad_nproc(fresh, gpus, value, found):
    fresh.gpus(gpus)
    assert found in fresh.refused("tiny", NPROC=value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_training_once_and_its_exit_code_comes_back(box, number):
    box.journal.unlink()
    process = box.start("tiny", "--hang")
    pid = box.await_call("ready")["pid"]
    process.send_signal(number)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 7 and comes_true(partial(gone, pid)) and "run: " in out
    assert [call["signal"] for call in box.calls("stopped")] == [number]
    assert not box.calls("train")[0]["int_ignored"]


# ------------------------------------------------------------------- set-up


def test_first_run_installs_and_the_second_does_not(fresh):
    first = fresh.run("tiny")
    assert fresh.names() == ["pip", "venv", "pip", "pip done", "sample", "train"]
    probe, install = fresh.calls("pip")
    assert "download" in probe["args"] and probe["args"][-1].startswith("tqdm==")
    assert install["args"][-3:] == ["torch==2.13.0+cpu", "-r", str(fresh.repo / "requirements.txt")]
    assert "(installed torch 2.13.0, python 3." in first.out
    second = fresh.run("tiny", FAKE_PIP="offline")
    assert fresh.names() == ["sample", "train"] and "(already installed)" in second.out
    # and quick: it starts Python for these, and once to ask for its version
    assert Path(f"{fresh.journal}.starts").read_text() == "..."


def test_a_gpu_gets_the_normal_torch(fresh):
    fresh.gpus(1)
    fresh.run("tiny")
    assert not any("+cpu" in word for call in fresh.calls("pip") for word in call["args"])
    fresh.gpus(0)  # a login node with the same folder
    fresh.run("tiny")
    assert fresh.names() == ["sample", "train"]


def test_a_gpu_that_appears_later_gets_its_torch(box):
    box.gpus(1)
    box.run("tiny")
    assert box.names() == ["pip", "venv", "pip", "pip done", "sample", "train"]


def test_without_a_cpu_build_pip_takes_its_own_choice(fresh):
    # the CPU index is out of reach: a proxy that is not there
    result = fresh.run("tiny", FAKE_PIP="only-cuda", https_proxy="http://127.0.0.1:9", no_proxy="")
    assert result.returncode == 0
    assert fresh.calls("pip")[-1]["args"][-2:] == ["-r", str(fresh.repo / "requirements.txt")]


def test_changed_requirements_are_installed_into_the_same_environment(box):
    with open(box.repo / "requirements.txt", "a") as file:
        file.write("extra==1\n")
    box.run("tiny")
    assert box.names() == ["pip", "pip", "pip done", "sample", "train"]
    box.run("tiny")
    assert box.names() == ["sample", "train"]


def test_an_environment_made_by_hand_is_kept(fresh):
    (fresh.repo / ".venv/bin").mkdir(parents=True)
    (fresh.repo / ".venv/bin/python").symlink_to(sys.executable)
    (fresh.repo / ".venv/mine").touch()
    assert fresh.run("tiny").returncode == 0 and "venv" not in fresh.names()
    assert (fresh.repo / ".venv/mine").exists()


def test_an_interpreter_that_vanished_is_replaced(box):
    (box.repo / ".venv/bin/python").unlink()
    (box.repo / ".venv/bin/python").symlink_to("/nowhere/python")
    assert box.run("tiny").returncode == 0 and "venv" in box.names()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_set_up_is_repaired(fresh, number, code):
    process = fresh.start("tiny", FAKE_PIP="hang")
    pip = fresh.await_call("pip", ["install"])["pid"]
    process.send_signal(number)
    process.communicate(timeout=PATIENCE) if number != signal.SIGKILL else process.wait(timeout=PATIENCE)
    assert process.returncode == code and not fresh.calls("train")
    if number == signal.SIGKILL:
        os.kill(pip, signal.SIGKILL)  # it would go on, and hold the lock until it ends
    assert comes_true(partial(gone, pip))
    (fresh.repo / ".venv/half").touch()
    assert fresh.run("tiny").returncode == 0 and "venv" in fresh.names()
    assert not (fresh.repo / ".venv/half").exists()
    fresh.run("tiny")
    assert fresh.names() == ["sample", "train"]


@pytest.mark.skipif(not shutil.which("flock"), reason="needs flock: without it two first runs can't see each other")
def test_two_first_runs_install_once(fresh, tmp_path):
    """pip goes on once one of the two waits for the other."""
    outs = [tmp_path / "out0", tmp_path / "out1"]
    both = [fresh.start("tiny", FAKE_PIP="hang", stdout=path.open("w")) for path in outs]

    def waiting():
        return sum("another run.sh is installing" in path.read_text() for path in outs)

    assert comes_true(waiting)
    Path(fresh.base_env["INSTALLED"] + ".now").touch()
    for process in both:
        process.communicate(timeout=PATIENCE)
    assert [process.returncode for process in both] == [0, 0]
    assert len(fresh.calls("pip done")) == waiting() == 1 and len(fresh.calls("train")) == 2


def test_no_index_and_no_torch_is_one_line(fresh):
    line = fresh.refused("tiny", FAKE_PIP="offline")
    assert "No matching distribution" in line and "no torch" in line and "PYTHON=" in line
    assert not (fresh.repo / ".venv").exists()


def test_an_index_that_gives_up_halfway_is_one_line(fresh):
    line = fresh.refused("tiny", FAKE_PIP="offline-later")
    assert "pip cannot install requirements.txt" in line
    assert fresh.run("tiny").returncode == 0


def test_no_index_but_a_torch_of_ones_own(fresh):
    for _ in range(2):
        result = fresh.run("tiny", "--a=1", FAKE_PIP="offline", FAKE_TORCH="2.11.0+own")
        assert result.returncode == 0 and fresh.calls("train")[0]["args"] == ["--track=tiny", "--a=1"]
        assert f"using torch 2.11.0+own of {sys.executable}" in result.out.splitlines()[0]


def test_no_index_and_a_torch_too_old(fresh):
    assert "torch 2.9.1" in fresh.refused("tiny", FAKE_PIP="offline", FAKE_TORCH="2.9.1")


def test_no_venv_module(fresh):
    assert "apt install python3-venv" in fresh.refused("tiny", FAKE_VENV="broken")


def test_python_too_old_or_absent(fresh):
    old = fresh.script("old", 'if [[ $1 == -c ]]; then echo 3.8.10; else cat >/dev/null; exit 1; fi')
    assert "3.8.10" in fresh.refused("tiny", PYTHON=str(old))
    assert "'/nowhere/python'" in fresh.refused("tiny", PYTHON="/nowhere/python")


def test_python3_of_the_path_is_the_default(fresh):
    fresh.script("python3", f'touch "$INSTALLED.by-path"; exec "{sys.executable}" "$@"')
    fresh.base_env.pop("PYTHON")
    assert fresh.run("tiny").returncode == 0 and Path(fresh.base_env["INSTALLED"] + ".by-path").exists()
