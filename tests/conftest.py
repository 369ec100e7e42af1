"""Shared by all tests: the script's folder is importable, and one thread per process keeps runs alike."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)
