"""What can go wrong with a training run, done to real runs on purpose, and how many of them survive it.

    python benchmarks/reliability.py [--times=10] [--only=name,name] [--out=FILE]

Each fault strikes runs of train_gpt.py over gloo on CPUs, with a small model and corpus: 1, 2 or 4 ranks in
turn, most started without torchrun, so that nothing but the script ends them and their exit codes are their
own. What `survived` means is checked by each fault's function. Prints a Markdown table; exit code 1 if a run
was lost.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
for folder in ("", "tests", "benchmarks"):
    if str(ROOT / folder) not in sys.path:
        sys.path.insert(0, str(ROOT / folder))
# ruff: noqa: E402

import torch
import torch.distributed as dist

from small import CPU, SMALL, free_port, train_gpt, write_corpus

STEPS = 32
TRACK = replace(SMALL, vocab_size=0, scheduled_steps=STEPS, val_every=1000, sample_tokens=1)
PATIENCE = 180  # seconds after which a run that hasn't ended is lost


class NotStruck(Exception):
    """The run was over before the fault struck: that doesn't count as a try."""


def check(holds, otherwise):
    """A condition of survival."""
    if not holds:
        raise AssertionError(otherwise)


# ----------------------------------------------------------------------------------------------------------
# Ranks: what runs in their processes


def run_rank(rank: int, size: int, folder: Path, environment: dict, flags: list, inject):
    """Body of a process: the script's main() on the small track, what it prints in files.

    inject(rank, folder) is called before; what it returns, if anything, is called after.
    """
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    run_script(rank, folder, flags, inject)


def run_script(rank: int, folder: Path, flags: list, inject=None):
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    train_gpt.TRACKS["tiny"] = TRACK
    progress = os.open(folder / f"step{rank}", os.O_WRONLY | os.O_CREAT)

    def note(model, step):
        with contextlib.suppress(OSError):  # the disk is full
            os.pwrite(progress, f"{step + 1:06}".encode(), 0)

    around_step(after=note)
    at_end = inject and inject(rank, folder)
    sys.argv = ["train_gpt.py", *flags]
    try:
        train_gpt.main()
    finally:
        if at_end:
            at_end()


def around_step(before=lambda model, step: None, after=lambda model, step: None):
    """Have functions called with (model, step), where `step` counts from 0, around each training step."""
    inner = train_gpt.train_step

    def train_step(model, optimizer, batches, plan, rotary, step, guard=None):
        before(model, step)
        report = inner(model, optimizer, batches, plan, rotary, step, guard)
        after(model, step)
        return report

    train_gpt.train_step = train_step


def poison(rank: int, folder: Path, victim: int, at: int, tensor: str, value: float):
    """One value of the loss or of a gradient of one rank isn't finite; notes all weights before each step."""
    inner, now, notes = train_gpt.backward_micro_batch, {}, open(folder / f"weights{rank}", "w")

    def digest() -> str:
        weights = b"".join(p.detach().numpy().tobytes() for p in now["model"].parameters())
        return hashlib.sha256(weights).hexdigest()

    def before(model, step):
        now.update(model=model, step=step)
        print(step + 1, digest(), file=notes, flush=True)

    def backward(model, batch, plan, rotary, weights):
        loss = inner(model, batch, plan, rotary, weights)
        if (rank, at) != (victim, now["step"]):
            return loss
        if tensor == "loss":
            return loss * value
        model.get_parameter(tensor).grad.view(-1)[0] = value
        return loss

    around_step(before)
    train_gpt.backward_micro_batch = backward
    return lambda: print("end", digest(), file=notes, flush=True)


def fill_disk(rank: int, folder: Path, first: int, last: int, room: int):
    """During the steps from `first` to `last` no file can be written beyond `room` bytes."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def before(model, step):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room if first <= step <= last else hard, hard))

    around_step(before)


def hang(rank: int, folder: Path, victim: int, at: int, where: str):
    """One rank sleeps for ever, in its data loader or in a training step."""
    if rank != victim:
        return
    inner, batches = train_gpt.Loader.batch, []

    def batch(loader, stage):
        batches.append(1)
        sleep_from(len(batches))
        return inner(loader, stage)

    def sleep_from(step):
        while step >= at:
            time.sleep(1)

    if where == "data":
        train_gpt.Loader.batch = batch
    else:
        around_step(before=lambda model, step: sleep_from(step))


def jolt(rank: int, folder: Path, at: int):
    """The model suddenly predicts the opposite of what it learned."""

    @torch.no_grad()
    def before(model, step):
        if step == at:
            model.head.mul_(-3)

    around_step(before)


def same_second(rank: int, folder: Path):
    train_gpt.time.strftime = lambda form: "20260101-000000"


def close_console(rank: int, folder: Path):
    """Standard output is a pipe that nobody reads."""
    read, write = os.pipe()
    os.dup2(write, 1)
    os.close(read)


def interrupt_early(rank: int, folder: Path):
    """SIGINT while the model is built."""
    inner = train_gpt.build_model

    def build_model(cfg, hardware):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
        os.kill(os.getpid(), signal.SIGINT)
        return inner(cfg, hardware)

    train_gpt.build_model = build_model


def save_in_a_loop(folder: Path):
    """Body of a process that only writes checkpoints of 4 MB, each with its step as every embedding."""
    cfg = replace(SMALL, width=160)
    model = train_gpt.build_model(cfg, CPU)
    optimizer = train_gpt.Optimizer(model, train_gpt.optimizer_table(cfg), train_gpt.World())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    done = os.open(folder / "done", os.O_WRONLY | os.O_CREAT)
    for step in range(1, 100_000):
        model.embed.data.fill_(step)
        progress = {"step": step, "position": train_gpt.Position(), "train_seconds": 0.0}
        path = folder / f"checkpoint_{step:06d}.safetensors"
        if train_gpt.save_checkpoint(path, model, optimizer, train_gpt.World(), progress):
            sys.exit(1)
        os.pwrite(done, f"{step:06}".encode(), 0)


# ----------------------------------------------------------------------------------------------------------
# Runs, seen from outside


@cache
def processes():
    """Starts processes as forks of one that has imported torch and this module."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    paths = [str(ROOT / folder) for folder in ("", "tests", "benchmarks")]
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    context = multiprocessing.get_context("forkserver")
    slow_imports = "torch._dynamo", "safetensors.torch", "matplotlib.pyplot"
    context.set_forkserver_preload(["reliability", *slow_imports])
    return context


class Run:
    """The ranks of one run; its folder holds their output and how far they are."""

    def __init__(self, scene, *flags: str, size: int = 2, inject=None, store_in_rank: bool = False):
        self.size, self.folder = size, scene.new_folder("run")
        self.store = None  # rank 0 makes it, or this process, as torchrun does
        if not store_in_rank:
            self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = self.store.port if self.store else free_port()
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                       "TORCHELASTIC_USE_AGENT_STORE": str(not store_in_rank)}
        arguments = size, self.folder, environment, [*scene.flags, *flags], inject
        self.ranks = [processes().Process(target=run_rank, args=(rank, *arguments)) for rank in range(size)]
        for process in self.ranks:
            process.start()

    def wait(self, seconds: float = PATIENCE, of=None) -> list:
        """Exit codes once all ranks, or those of `of`, have ended; None for one that hadn't: it is killed."""
        end = time.monotonic() + seconds
        for rank in self.ranks if of is None else [self.ranks[i] for i in of]:
            rank.join(max(0.0, end - time.monotonic()))
        codes = [rank.exitcode for rank in self.ranks]
        for rank in self.ranks:
            rank.kill()  # SIGKILL also ends a stopped process
            rank.join()
        return codes

    def step(self, rank: int = 0) -> int:
        """Training steps that a rank has done."""
        path = self.folder / f"step{rank}"
        return int(path.read_text() or 0) if path.exists() else 0

    def await_step(self, step: int):
        end = time.monotonic() + PATIENCE
        while self.step() < step:
            check(time.monotonic() < end and self.alive(), f"never came to step {step}: {self.errors()}")
            time.sleep(0.002)

    def alive(self) -> bool:
        return any(rank.is_alive() for rank in self.ranks)

    def strike(self, number: int, ranks):
        """Send a signal to ranks still training, even once it is sent: the machine may be busy."""
        with contextlib.suppress(ProcessLookupError):
            for rank in ranks:
                os.kill(int((self.folder / f"pid{rank}").read_text()), number)
        self.struck_before(STEPS)

    def struck_before(self, step: int):
        """Note how far the ranks are; too far, and the fault came too late."""
        self.struck_at = max(self.step(rank) for rank in range(self.size))
        if self.struck_at >= step:
            self.wait(10)
            raise NotStruck

    def errors(self) -> list[str]:
        paths = [self.folder / f"err{rank}" for rank in range(self.size)]
        return [path.read_text() if path.exists() else "" for path in paths]

    def finished(self, otherwise: str = "didn't finish"):
        codes = self.wait()
        check(codes == [0] * self.size, f"{otherwise}: exit codes {codes}: {self.errors()}")
        return self


class TorchRun(Run):
    """The same under torchrun, whose exit code counts."""

    def __init__(self, scene, *flags: str, size: int = 2):
        self.size, self.folder = size, scene.new_folder("run")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}",
                   __file__, f"--worker={self.folder}", *scene.flags, *flags]
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        with open(self.folder / "err0", "w") as output:
            self.agent = subprocess.Popen(command, stdout=output, stderr=output, env=environment)

    def wait(self, seconds: float = PATIENCE) -> list:
        try:
            return [self.agent.wait(seconds)] * self.size
        except subprocess.TimeoutExpired:
            self.agent.kill()
            return [None] * self.size

    def alive(self) -> bool:
        return self.agent.poll() is None


class Scene:
    """Where one fault strikes once: a folder, data, flags, and what is drawn at random."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.random, self.i = folder, random.Random(seed), seed
        self.logs, self.data = folder / "logs", write_corpus(self.new_folder("data"), train_tokens=20_000)
        self.flags = ["--device=cpu", "--save_every=2", "--deterministic", f"--data={self.data}",
                      f"--log_folder={self.logs}"]

    def new_folder(self, name: str) -> Path:
        path = self.folder / f"{name}{len(list(self.folder.iterdir()))}"
        path.mkdir()
        return path

    def size(self) -> int:
        """Number of ranks: 2, 1, 4 in turn."""
        return (2, 1, 4)[self.i % 3]

    def moment(self) -> int:
        """A random step in the middle of training."""
        return self.random.randint(3, STEPS - 10)

    def log(self) -> str:
        """All that the runs logged."""
        return "".join(path.read_text() for path in sorted(self.logs.glob("*/log.txt"), key=os.path.getmtime))

    def checkpoints(self) -> list[Path]:
        """Of all runs, the newest last."""
        return sorted(self.logs.glob("*/checkpoint_*.safetensors"), key=lambda p: (p.stat().st_mtime_ns, p))

    def check_result(self, otherwise: str, checkpoint: Path | None = None):
        """A finished run's weights and optimizer state are the undisturbed run's, bit for bit."""
        found = train_gpt.read_safetensors(str(checkpoint or self.checkpoints()[-1]))[0]
        wanted = undisturbed()
        check(set(found) == set(wanted), f"{otherwise}: other tensors")
        differ = [name for name in wanted if not torch.equal(found[name], wanted[name])]
        check(not differ, f"{otherwise}: {differ[:3]} differ")

    def check_resumed(self, size: int = 2):
        """--resume=auto goes on to the end, to the undisturbed run's result."""
        Run(self, "--resume=auto", size=size).finished("the resumed run didn't finish")
        self.check_result("the resumed run has another result")


@cache
def undisturbed() -> dict:
    """Final tensors of a run that nothing happens to."""
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(Path(folder), 0)
        Run(scene, size=1).finished()
        return train_gpt.read_safetensors(str(scene.checkpoints()[-1]))[0]


def one_line(text: str, pattern: str):
    """Check that what a rank printed to stderr is one line with this pattern; the match."""
    found = re.fullmatch(rf"train_gpt\.py: .*{pattern}.*\n", text)
    check(found, f"expected one line with {pattern!r} in stderr, found {text!r}")
    return found


def contents(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------------------------------------
# Faults: each function strikes once and raises unless the run survives


def kill_rank(scene: Scene):
    size = scene.random.choice((2, 4))
    victim = scene.random.randrange(size)
    run = Run(scene, size=size, store_in_rank=scene.random.random() < 0.5)
    run.await_step(scene.moment())
    time.sleep(scene.random.random() * 0.1)
    run.strike(signal.SIGKILL, [victim])
    codes = run.wait()
    check(codes == [-9 if rank == victim else 1 for rank in range(size)], f"exit codes {codes}")
    for rank in set(range(size)) - {victim}:
        one_line(run.errors()[rank], "lost contact with another rank.*--resume=auto")
    scene.check_resumed()


def kill_under_torchrun(scene: Scene):
    run = TorchRun(scene)
    run.await_step(scene.moment())
    run.strike(signal.SIGKILL, [scene.random.randrange(2)])
    check(run.wait()[0] == 1, "torchrun didn't end")
    TorchRun(scene, "--resume=auto").finished("the resumed run didn't finish")
    scene.check_result("the resumed run has another result")


def send_signal(scene: Scene, number: int, everyone: bool):
    size = scene.size()
    run = Run(scene, size=size)
    run.await_step(scene.moment())
    run.strike(number, range(size) if everyone else [scene.random.randrange(size)])
    codes = run.wait()
    check(codes == [0] * size, f"exit codes {codes}: {run.errors()}")
    check_stopped(scene, run)
    scene.check_resumed(size=size)


def check_stopped(scene: Scene, run: Run, within: int = 4):
    """The ranks stopped together, within a few steps, and no step is lost that was done before."""
    steps = {run.step(rank) for rank in range(run.size)}
    check(len(steps) == 1, f"the ranks stopped after different steps: {steps}")
    step = steps.pop()
    if step == STEPS and run.struck_at >= STEPS - within:
        raise NotStruck
    check(step <= run.struck_at + within, f"stopped after step {step}, asked to in step {run.struck_at + 1}")
    saved = train_gpt.read_safetensors(str(scene.checkpoints()[-1]))[1]["step"]
    check(saved == step, f"stopped after step {step}, saved step {saved}")
    check(f"stopped after step {step}: a signal asked for it" in scene.log(), "no line about the stop")


def stop_torchrun(scene: Scene):
    run = TorchRun(scene)
    run.await_step(scene.moment())
    run.strike(signal.SIGTERM, [])
    run.agent.terminate()
    check(run.wait()[0] is not None, "torchrun didn't end")
    check_stopped(scene, run, within=15)  # it takes its time to hand the signal on
    scene.check_resumed()


def not_finite(scene: Scene, gradient: bool):
    size, at = scene.size(), scene.moment()
    names = [name for name, _ in train_gpt.build_model(SMALL, CPU).named_parameters()]
    tensor = scene.random.choice(names) if gradient else "loss"
    value = scene.random.choice((float("nan"), float("inf"), -float("inf")))
    inject = partial(poison, victim=scene.random.randrange(size), at=at, tensor=tensor, value=value)
    flags = ["--deterministic=" + scene.random.choice(("on", "off")), "--save_every=1"]
    run = Run(scene, *flags, size=size, inject=inject)
    codes = run.wait()
    check(codes == [2] * size, f"exit codes {codes}: {run.errors()}")
    named = f"the gradient of {tensor} on" if gradient else "the training loss is (nan|-?inf)"
    for rank, text in enumerate(run.errors()):
        step = re.search(r"step (\d+) wasn't applied", one_line(text, f"wasn't applied.*{named}")[0])[1]
        check(int(step) - at in (1, 2), f"step {at + 1} was hit, step {step} named")
        weights = dict(line.split() for line in (run.folder / f"weights{rank}").read_text().splitlines())
        check(weights["end"] == weights[step], f"rank {rank}: the weights aren't those before step {step}")
    tensors = train_gpt.read_safetensors(str(scene.checkpoints()[-1]))[0]
    check(all(x.isfinite().all() for x in tensors.values()), "the last checkpoint isn't finite")


def disk_full_for_a_while(scene: Scene):
    """With no room at all the logs can't be written either: they are once there is room again."""
    at, room = scene.moment(), scene.random.choice((0, 200_000))
    Run(scene, size=scene.size(), inject=partial(fill_disk, first=at, last=at + 1, room=room)).finished()
    check(re.search(r"checkpoint of step \d+ not written", scene.log()), "no line about it in the log")
    check(not list(scene.logs.glob("*/*.tmp")), "a temporary file is left")
    scene.check_result("training was disturbed")


def disk_full_at_the_end(scene: Scene):
    at, size = scene.moment(), scene.size()
    run = Run(scene, size=size, inject=partial(fill_disk, first=at, last=STEPS, room=200_000))
    codes = run.wait()
    check(codes == [2] * size, f"exit codes {codes}: {run.errors()}")
    for text in run.errors():
        one_line(text, "the last checkpoint couldn't be written")
    check(f"step:{STEPS}/{STEPS} val_loss" in scene.log(), "training didn't go on to its end")
    check(not list(scene.logs.glob("*/*.tmp")), "a temporary file is left")
    saved = [train_gpt.read_safetensors(str(path))[1]["step"] for path in scene.checkpoints()]
    check(saved and max(saved) in (at - 1, at), f"full from step {at} on, but saved are {saved}")
    scene.check_resumed()


def stopped_rank(scene: Scene):
    victim = scene.random.randrange(2)
    run = Run(scene, "--watchdog=3", "--deterministic=off", store_in_rank=scene.random.random() < 0.5)
    run.await_step(scene.moment())
    run.strike(signal.SIGSTOP, [victim])
    codes = run.wait(of=[1 - victim])
    check(codes[1 - victim] == 3, f"exit codes {codes}: {run.errors()}")
    one_line(run.errors()[1 - victim], f"no progress for 3 s; without a sign of life: rank {victim}\\b[^;]*")


def stuck_rank(scene: Scene, where: str):
    size, at = scene.random.choice((2, 4)), scene.moment()
    victim = scene.random.randrange(size)
    run = Run(scene, "--watchdog=3", "--deterministic=off", size=size,
              inject=partial(hang, victim=victim, at=at, where=where))
    codes = run.wait()
    check(3 in codes and set(codes) <= {1, 3}, f"exit codes {codes}: {run.errors()}")
    for code, text in zip(codes, run.errors()):
        expected = rf"behind or stuck: rank {victim} in step \d+, {where}: " if code == 3 else "lost contact"
        one_line(text, expected)


def same_folder_name(scene: Scene):
    runs = [Run(scene, size=size, inject=same_second) for size in (1, 2)]
    for run in runs:
        run.finished()
    last = sorted(scene.logs.glob(f"*/checkpoint_{STEPS:06}.safetensors"))
    check(len(list(scene.logs.iterdir())) == len(last) == 2, "not two folders with two results")
    for path in last:
        scene.check_result("a run was disturbed", path)


def shard_removed(scene: Scene):
    run = Run(scene, size=scene.size())
    run.await_step(scene.random.randint(1, STEPS // 3))
    scene.random.choice(sorted(scene.data.glob("*_train_*.bin"))).unlink()
    run.finished()
    scene.check_result("training was disturbed")


def shard_truncated(scene: Scene):
    """Ranks read it on their own: one finds it cut short, others may first find that one gone."""
    run, shard = Run(scene, size=scene.size()), sorted(scene.data.glob("*_train_*.bin"))[-1]
    whole = shard.read_bytes()
    run.await_step(scene.random.randint(2, STEPS // 3))
    os.truncate(shard, scene.random.randrange(1024, len(whole) // 4))
    run.struck_before(STEPS * 2 // 3)  # while what was cut off is still to be read
    codes = run.wait()
    check(2 in codes and set(codes) <= {1, 2}, f"exit codes {codes}: {run.errors()}")
    for code, text in zip(codes, run.errors()):
        cut = rf"{re.escape(str(shard))}: was cut short while in use, at token [\d,]+ of"
        one_line(text, cut if code == 2 else "lost contact with another rank")
    shard.write_bytes(whole)
    scene.check_resumed()


def too_few_tokens(scene: Scene):
    before, size = contents(scene.data), scene.size()
    run = Run(scene, f"--scheduled_steps={scene.random.randint(100, 10_000)}", size=size)
    codes = run.wait()
    check(codes == [2] * size, f"exit codes {codes}: {run.errors()}")
    for text in run.errors():
        one_line(text, r"training tokens last for \d+ of \d+ steps")
    check(not scene.logs.exists() and contents(scene.data) == before, "something was written")


def damaged_checkpoint(scene: Scene):
    stop = scene.random.randrange(5, 15)
    Run(scene, f"--stop_after={stop}", size=1).finished()
    before, last = scene.checkpoints()[-2:]
    data = last.read_bytes()
    damage = scene.random.choice((
        data[: scene.random.randrange(len(data))], b"", bytes(len(data)), scene.random.randbytes(len(data)),
        data + b"\0", scene.random.randbytes(64) + data[64:]))
    last.write_bytes(damage)
    scene.check_resumed(size=scene.size())
    check(f"resumed: {before} at step" in scene.log(), "didn't resume from the checkpoint before")


def loss_spike(scene: Scene):
    at = scene.random.randint(25, STEPS - 3)
    Run(scene, size=scene.size(), inject=partial(jolt, at=at)).finished()
    check(f"loss spike at step {at + 1}: " in scene.log(), "not reported")


def console_closed(scene: Scene):
    Run(scene, size=scene.size(), inject=close_console).finished()
    scene.check_result("training was disturbed")


def early_interrupt(scene: Scene):
    size = scene.size()
    run = Run(scene, size=size, inject=interrupt_early)
    codes = run.wait()
    check(codes == [130] * size and not any(run.errors()), f"exit codes {codes}: {run.errors()}")
    check(not scene.logs.exists(), "something was written")


def kill_save(scene: Scene):
    """Counts only kills between the first and the last write of a save."""
    folder = scene.new_folder("saves")
    process = processes().Process(target=save_in_a_loop, args=(folder,))
    process.start()
    done = folder / "done"
    while not done.exists() or not done.read_text():
        check(process.exitcode is None, "no checkpoint could be saved")
        time.sleep(0.001)
    time.sleep(scene.random.random() * 0.2)
    process.kill()
    process.join()
    reported, found = int(done.read_text()), train_gpt.checkpoints(folder)
    for path in found:
        tensors, meta = train_gpt.read_safetensors(str(path))
        check(path.stem == f"checkpoint_{meta['step']:06d}", f"{path.name} is of step {meta['step']}")
        check((tensors["model.embed"] == meta["step"]).all(), f"{path.name} holds another step's weights")
    check(found and meta["step"] >= reported, f"step {reported} was saved, the newest is {found[-1:]}")
    if not list(folder.glob("*.tmp")):
        raise NotStruck


class Fault(NamedTuple):
    what: str
    how: str
    strike: object               # called with a Scene
    slow: bool = False           # left out of quick tests


FAULTS = {
    "kill": Fault("a rank dies", "kill -9 of 1 of 2 or 4 ranks at a random moment", kill_rank),
    "kill-torchrun": Fault("a rank dies under torchrun", "kill -9 of 1 of 2", kill_under_torchrun, slow=True),
    "sigterm": Fault("preemption", "SIGTERM to every rank",
                     partial(send_signal, number=signal.SIGTERM, everyone=True)),
    "sigterm-one": Fault("preemption of one rank", "SIGTERM to one rank",
                         partial(send_signal, number=signal.SIGTERM, everyone=False)),
    "sigint": Fault("Ctrl-C", "SIGINT to every rank",
                    partial(send_signal, number=signal.SIGINT, everyone=True)),
    "sigint-early": Fault("Ctrl-C before training", "SIGINT while the model is built", early_interrupt),
    "console": Fault("console closed", "stdout is a pipe without a reader", console_closed),
    "sigterm-torchrun": Fault("preemption under torchrun", "SIGTERM to torchrun", stop_torchrun, slow=True),
    "loss": Fault("loss not finite", "NaN or Inf on one rank", partial(not_finite, gradient=False)),
    "gradient": Fault("gradient not finite", "NaN or Inf in a random parameter on one rank",
                      partial(not_finite, gradient=True)),
    "disk-full": Fault("disk full during a save, then room again", "file size limit", disk_full_for_a_while),
    "disk-full-end": Fault("disk full to the end", "file size limit", disk_full_at_the_end),
    "stopped": Fault("a rank gives no sign of life", "SIGSTOP of 1 of 2 ranks", stopped_rank),
    "stuck-data": Fault("a data loader hangs", "sleeps for ever on 1 of 2 or 4 ranks",
                        partial(stuck_rank, where="data")),
    "stuck": Fault("a computation hangs", "sleeps for ever on 1 of 2 or 4 ranks",
                   partial(stuck_rank, where="computation")),
    "folder": Fault("two runs in the same second", "same log folder, clock stopped", same_folder_name),
    "removed": Fault("a shard is removed", "unlink during training", shard_removed),
    "truncated": Fault("a shard is cut short", "truncate during training, then restore", shard_truncated),
    "tokens": Fault("too few tokens", "a schedule of up to 10,000 steps", too_few_tokens),
    "damaged": Fault("last checkpoint damaged", "cut short, emptied, overwritten", damaged_checkpoint),
    "spike": Fault("loss spike", "head times -3 once", loss_spike),
    "kill-save": Fault("killed during a save", "kill -9 between its first and last write", kill_save),
}


def strike(name: str, times: int, seed: int = 0) -> dict:
    """{"tried", "survived", "lost": why} of a fault; tries in which it came too late are repeated."""
    tried, lost, attempt = 0, [], 0
    while tried < times and attempt < 20 * times:
        with tempfile.TemporaryDirectory() as folder:
            try:
                FAULTS[name].strike(Scene(Path(folder), seed + attempt))
            except NotStruck:
                tried -= 1
            except Exception as error:
                expected = isinstance(error, AssertionError)
                lost.append(str(error) if expected else traceback.format_exc())
        tried, attempt = tried + 1, attempt + 1
    return {"tried": tried, "survived": tried - len(lost), "attempts": attempt, "lost": lost}


def table(results: dict) -> str:
    rows = [f"| {FAULTS[name].what} | {FAULTS[name].how} | {r['tried']} | {r['survived']} |"
            for name, r in results.items()]
    return "\n".join(["| fault | how injected | tried | survived |", "|---|---|---|---|", *rows])


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--times", type=int, default=10, help="tries of each fault, of kill-save 10 x")
    parser.add_argument("--only", default=",".join(FAULTS), help=", ".join(FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    results = {}
    for name in args.only.split(","):
        begin = time.monotonic()
        results[name] = strike(name, args.times * (10 if name == "kill-save" else 1), args.seed)
        results[name]["seconds"] = round(time.monotonic() - begin, 1)
        print(f"{name}: {json.dumps(results[name])}", file=sys.stderr, flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    sys.exit(any(r["lost"] or not r["tried"] for r in results.values()))


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("--worker="):  # a rank that torchrun started
        run_script(int(os.environ["RANK"]), Path(sys.argv[1].partition("=")[2]), sys.argv[2:])
    else:
        main()
