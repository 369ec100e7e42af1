"""Compile the kernels as their wrappers launch them, for GPUs that aren't there.

    python tests/compile_kernels.py CAPABILITY ..     # 90: an H100

Prints what they take, as JSON: for each capability [kernel, bytes of shared memory], launch by launch.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as t  # noqa: E402

taken, run = [], JITFunction.run


class Driver:
    """Of a GPU with this compute capability (90 for 9.0), as far as compiling needs one."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # of which Triton keeps what is compiled apart

    def get_current_stream(self, device):
        return 0


def compile_only(kernel, *args, grid, warmup, **options):
    compiled = run(kernel, *args, grid=grid, warmup=True, **options)
    taken.append([kernel.__name__, compiled.metadata.shared])


def launch(cfg: t.Config, kernels: str, fp8: bool):
    """Each wrapper at the sizes of this model, in the mode and the precisions that were chosen."""
    half, eight, scale = torch.bfloat16, torch.float8_e4m3fn, torch.ones(())
    T, D, F = 256, cfg.width, t.MLP_RATIO * cfg.width
    h_TD, weight_FD, r_TF = (torch.zeros(size, dtype=half) for size in ((T, D), (F, D), (T, F)))
    if fp8:
        t.transpose(h_TD.to(eight), kernels)
        t.mlp_forward(h_TD.to(eight), weight_FD.to(eight), scale, cfg.leaky_slope, kernels)
        grad_TD = h_TD.to(torch.float8_e5m2)
        t.mlp_backward(grad_TD, weight_FD.to(eight), r_TF, scale, cfg.leaky_slope, kernels)
    logits_TV = torch.zeros(16, cfg.padded_vocab, dtype=half)
    lse_T = t.log_sum(logits_TV, kernels)
    for dtype in (half, torch.float8_e5m2) if fp8 else (half,):
        for count in (1, 4):
            places_TK, pulls_TK = torch.zeros(16, count, dtype=torch.int64), torch.ones(16, count)
            t.logits_gradient(logits_TV, lse_T, places_TK, pulls_TK, scale, dtype, kernels)


def compile_all(capability: int) -> list:
    taken.clear()
    torch.cuda.get_device_capability = lambda device: divmod(capability, 10)
    triton.runtime.driver.set_active(Driver(capability))
    cfg = t.parse_config(["--track=race300", "--fa3=off"])
    hardware = t.choose_hardware(cfg, t.World())
    launch(cfg, hardware.kernels, hardware.fp8)
    return list(taken)


if __name__ == "__main__":
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    torch.Tensor.is_cuda = True  # so that the wrappers choose what they choose on a GPU
    JITFunction.run = compile_only
    print(json.dumps({capability: compile_all(int(capability)) for capability in sys.argv[1:]}))
