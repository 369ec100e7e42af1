"""Shared by all tests: the script's folder is importable, and one thread per process keeps runs alike."""

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():  # Triton reads this when it is imported: its kernels then run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)
