"""Shared by all tests: the script's folder is importable, and one thread per process keeps runs alike."""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, whatever cores there are
# ruff: noqa: E402

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads this when it is imported: its kernels then run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: -item.path.stat().st_size)  # long files first: both cores end together
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes: run with --slow"))


@pytest.fixture(autouse=True)
def process_as_before():
    """A test that trains leaves signals and, if it wants regions compiled, the switch as they were."""
    import train_gpt

    numbers = signal.SIGTERM, signal.SIGINT
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)
    train_gpt.region.compile = False


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs main() with arguments: (exit status, stdout, stderr)."""

    import train_gpt

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["train_gpt.py", *map(str, argv)])
        capsys.readouterr()
        try:
            train_gpt.main()
            code = 0
        except SystemExit as end:
            code = end.code
        return (code, *capsys.readouterr())

    return call
