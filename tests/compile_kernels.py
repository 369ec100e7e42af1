"""Compile the kernels as their wrappers launch them, for a GPU that isn't there.

    python tests/compile_kernels.py CAPABILITY        # 90: an H100

Prints what they take, as JSON: [kernel, bytes of shared memory], launch by launch.
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
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(kernel, *args, grid, warmup, **options):
    compiled = run(kernel, *args, grid=grid, warmup=True, **options)
    taken.append([kernel.__name__, compiled.metadata.shared])


def launch(capability: int):
    """Each wrapper at the sizes of GPT-2 small, in the mode and the precisions that this GPU would choose."""
    half, eight, scale, has_float8 = torch.bfloat16, torch.float8_e4m3fn, torch.ones(()), capability >= 89
    h_TD, weight_FD, r_TF = (torch.zeros(size, dtype=half) for size in ((256, 768), (3072, 768), (256, 3072)))
    mode = "tma" if capability == 90 else "pointer"
    t.mlp_forward(h_TD, weight_FD, 0.5, mode)
    t.mlp_backward(h_TD, weight_FD, r_TF, 0.5, mode)
    if has_float8:
        t.mlp_forward(h_TD.to(eight), weight_FD.to(eight), 0.5, mode, scale)
    logits_TV, softcap = torch.zeros(16, 50304, dtype=half), t.Softcap(11.5, 5.0, 15.0)
    for dtype in (half, torch.float8_e5m2) if has_float8 else (half,):
        for count in (1, 3):
            targets_TK, weights_K = torch.zeros(16, count, dtype=torch.int64), torch.ones(count)
            t.cross_entropy(logits_TV, targets_TK, weights_K, softcap, scale, dtype, "pointer")
    if has_float8:
        t.transpose(h_TD.to(eight), "pointer")
    t.polynomial(torch.zeros(2, 768, 768, dtype=half), 8.0, -22.0, 15.0, "pointer")


if __name__ == "__main__":
    torch.Tensor.is_cuda = True  # so that the wrappers choose what they choose on a GPU
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    triton.runtime.driver.set_active(Driver(int(sys.argv[1])))
    JITFunction.run = compile_only
    launch(int(sys.argv[1]))
    print(json.dumps(taken))
