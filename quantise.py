"""Rounds the matrices of a model to integers times a scale for each row. artifact.py packs what comes out.

Rounding to the nearest changes a product's outputs more than it must. GPTQ (arXiv 2210.17323) rounds column
after column and makes up for each one's error in the columns still to come, as far as the inputs of the two
are correlated. CalibratedGPT collects these correlations while it runs over training data.

A step between integers is k * RMS / top for a row with this root mean square, where top is the largest
integer. The integers are entropy-coded, so k decides their bytes: normally distributed weights take about
2.05 - log2(step / RMS) bits each. top only has to be large enough that few are cut off: 31 for k = 13.

Shape suffixes as in train_gpt.py, and R, C: rows (outputs) and columns (inputs) of a matrix
    F: factors k that are tried   B: columns of a block
"""

import numpy as np
import torch

from train_gpt import GPT, World, activation_region, build_rotary, plan_step

K_GRID = 2 ** np.linspace(0.5, 4.5, 33)  # what k = 0 tries
DAMPING = 0.01                           # of a Hessian's mean diagonal, added to the diagonal
BLOCK = 128                              # columns that are rounded before one product spreads their errors
SMALLEST = 2.0**-100                     # scale; rows with a smaller one become zeros


class CalibratedGPT(GPT):
    """A GPT that adds up x^T x of what each matrix reads: `hessians`, (C, C) float64 by name and layer."""

    def collect(self, name: str, layer: int, x_TC):
        x_TC = x_TC.float()
        self.hessians[name, layer] = self.hessians.get((name, layer), 0) + (x_TC.T @ x_TC).double()

    def project(self, name: str, a: int, x_TD):
        self.collect(name, a, x_TD)
        return super().project(name, a, x_TD)

    def mlp(self, i: int, h_TD, h8_TD):
        up_FD, down_FD = self.compute_weights["mlp_bank"][0][i]
        hidden_TF = activation_region(h_TD @ up_FD.T, self.cfg.leaky_slope)
        self.collect("up", i, h_TD)
        self.collect("down", i, hidden_TF)
        return hidden_TF @ down_FD

    def products(self, x_TD):
        self.collect("head", 0, x_TD)
        return super().products(x_TD)

    def calibrate(self, val) -> float:
        """Run over the tokens of a Validation; returns the mean loss."""
        self.hessians = {}
        return validate(self, val)["val_loss"]

    def hessians_of(self, name: str) -> list:
        """Those of a parameter's matrices, in the order of artifact.matrices; None for tables of rows."""
        if name == "attn_bank":
            parts, layers = ("qkv", "qkv", "qkv", "o"), len(self.attn_bank)
        elif name == "mlp_bank":
            parts, layers = ("up", "down"), len(self.mlp_bank)
        else:  # the pointer head reads what the head reads
            return [self.hessians["head", 0] if name in ("head", "pointer") else None]
        return [self.hessians[part, layer] for layer in range(layers) for part in parts]


def validate(model: GPT, val) -> dict:
    """{"val_loss", "val_bpb"} of a Validation, with the windows of the one after training."""
    rotary = build_rotary(model.cfg, val.positions, model.embed.device)
    return val.run(model, plan_step(model.cfg, model.cfg.total_steps).windows, rotary, World())


def nearest(x, scale, top: int):
    """The codes, integers from -top to top, whose products with the scale are nearest to x."""
    return (x / scale).round().clamp(-top, top)


def row_scales(w_RC, weights_C, k: float, top: int):
    """Scales (R,) bfloat16: k * RMS / top or, if k is 0, that of K_GRID with the least error.

    w_RC, weights_C: float64. The error is the square of rounding's, columns weighted by weights_C. Rows of
    zeros, and nearly so, get 1.
    """
    factors_F = torch.tensor([k] if k else K_GRID.tolist()).to(w_RC)
    scales_FR = (w_RC.square().mean(1).sqrt() * factors_F[:, None] / top).bfloat16()
    scales_FR[scales_FR < SMALLEST] = 1
    errors_FR = torch.stack([
        (nearest(w_RC, scale_R1, top) * scale_R1 - w_RC).square() @ weights_C
        for scale_R1 in scales_FR.double()[:, :, None]])
    return scales_FR.gather(0, errors_FR.argmin(0, keepdim=True))[0]


def gptq(w_RC, hessian_CC, scale_R, top: int):
    """Codes (R, C), integers, that times the scales give nearly the outputs of w. All float64.

    Minimises tr(E H E^T) for the error E, column after column, those with the largest inputs first. With
    H = M M^T, M upper triangular, that is the sum of squares of E M, whose column j depends on the errors of
    columns up to j alone. So code j is the nearest to w_j plus what these errors add to column j, over M_jj.
    The numbers are those of the paper, which instead keeps the weights up to date by the inverse of H.
    """
    h_CC = hessian_CC.clone()
    diagonal = h_CC.diagonal()
    diagonal[diagonal == 0] = 1  # inputs that never occurred: plain rounding
    diagonal += DAMPING * diagonal.mean()
    order = torch.argsort(diagonal, descending=True, stable=True)
    m_CC = torch.linalg.cholesky(h_CC[order][:, order].flip(0, 1)).flip(0, 1)
    m_CC = m_CC / m_CC.diagonal()
    w_RC = w_RC[:, order]
    codes_RC, error_RC = torch.zeros_like(w_RC), torch.zeros_like(w_RC)
    for lo in range(0, w_RC.size(1), BLOCK):
        hi = min(lo + BLOCK, w_RC.size(1))
        target_RB = w_RC[:, lo:hi] + error_RC[:, :lo] @ m_CC[:lo, lo:hi]
        for j in range(lo, hi):
            target_R = target_RB[:, j - lo] + error_RC[:, lo:j] @ m_CC[lo:j, j]
            codes_RC[:, j] = nearest(target_R, scale_R, top)
            error_RC[:, j] = w_RC[:, j] - codes_RC[:, j] * scale_R
    return codes_RC[:, torch.argsort(order)]


def quantise(w_RC, hessian_CC, k: float, top: int, rounding: bool = False):
    """Codes (R, C), an int8 array, and scales (R,), bfloat16 on the CPU, of a matrix.

    hessian_CC: None if rows are looked up; they are rounded. rounding: do so even if there is one.
    """
    w_RC = w_RC.double()
    weights_C = torch.ones_like(w_RC[0]) if hessian_CC is None else hessian_CC.diagonal()
    scale_R = row_scales(w_RC, weights_C, k, top)
    if rounding or hessian_CC is None:
        codes_RC = nearest(w_RC, scale_R.double()[:, None], top)
    else:
        codes_RC = gptq(w_RC, hessian_CC, scale_R.double(), top)
    return codes_RC.to(torch.int8).cpu().numpy(), scale_R.cpu()
