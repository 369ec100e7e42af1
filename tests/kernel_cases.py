"""What the kernels' tests share: error bounds, NaN in and around the kernels' tensors, one check per kernel.

A check draws its inputs, calls a kernel and compares every element with float64: the reference on inputs in
double precision. It knows no device: the generator it draws from does.
"""

from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import train_gpt as t
from small import rms_normed


class Bound(NamedTuple):
    """Largest errors of a result in some precision."""

    each: float                  # of one element, relative to itself: up to three roundings ...
    floor: float                 # ... plus this, relative to the largest: sums in float32 that cancel
    whole: float                 # of the whole, relative, in the Euclidean norm
    chain: float                 # the same after several products, each rounded


BOUNDS = {
    torch.float32: Bound(2e-6, 2e-6, 5e-7, 2e-6),
    torch.float64: Bound(1e-12, 1e-12, 1e-12, 1e-12),
    torch.float16: Bound(1.5e-3, 2e-5, 8e-4, 2e-3),
    torch.bfloat16: Bound(1.2e-2, 2e-5, 5e-3, 1e-2),
    torch.float8_e4m3fn: Bound(0.063, 2e-5, 0.04, 0.065),
    torch.float8_e5m2: Bound(0.126, 0, 0.126, 0.065),
}
# Triton's interpreter cuts bfloat16 off, by up to 2^-7, and forgets a carry in float8: 1.99 becomes 1, not 2.
INTERPRETED = BOUNDS | {torch.bfloat16: BOUNDS[torch.bfloat16]._replace(whole=2**-7),
                        torch.float8_e4m3fn: Bound(0.5, 2e-5, 0.2, 0.2),
                        torch.float8_e5m2: Bound(0.5, 2e-5, 0.3, 0.2)}
FLOAT8_SUM = 2e-3  # a floor: Hopper sums products of float8 in 14 bits
# Of cross entropy's exponentials, whatever the precision of its result: in float32; and with an approximate
# tanh, whose relative error of 2^-11 a softcap of 15 raises to 0.7 % in a probability and in their sum.
EXACT, APPROXIMATE = 2e-5, 2e-2
LOSS = 3e-3  # of the sum over rows
CAP = t.CAP_HEIGHT, t.CAP_SHIFT, t.CAP_WIDTH
SOFTCAPS = [(15.0, 0.0, 15.0), CAP]
# Whether there are a delta, a skip connection, x0 and bigrams, where streams are mixed.
STREAMS = [(True,) * 4, (False, True, True, True), (True, False, True, True), (True, False, True, False)]

MARGIN = 256  # elements: rows stay aligned, as the copy engine needs
NAN = float("nan")


def within_nan(x):
    """The same tensor between NaN, which reads beyond either end would spread."""
    buffer = torch.full((x.numel() + 2 * MARGIN,), NAN, dtype=x.dtype, device=x.device)
    inside = buffer[MARGIN:-MARGIN].view(x.shape)
    return inside.copy_(x)


@contextmanager
def poisoned():
    """Floating tensors that the block makes start as NaN, and lie between NaN that it must leave there."""
    makers = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]
    originals, buffers = [getattr(*maker) for maker in makers], []
    empty = torch.empty

    def poisoning(make):
        def made(*args, **options):
            x = make(*args, **options)
            if not x.is_floating_point():
                return x
            buffers.append(empty(x.numel() + 2 * MARGIN, dtype=x.dtype, device=x.device).fill_(NAN))
            return buffers[-1][MARGIN:-MARGIN].view(x.shape)

        return made

    for (owner, name), original in zip(makers, originals):
        setattr(owner, name, poisoning(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(makers, originals):
            setattr(owner, name, original)
    for buffer in buffers:
        margins = torch.cat([buffer[:MARGIN].float(), buffer[-MARGIN:].float()])
        assert margins.isnan().all(), "a kernel wrote outside of its result"


def seeded(seed, device):
    return torch.Generator(device).manual_seed(seed)


def normal(rng, *shape, dtype=torch.float32, std=1.0):
    return within_nan((torch.randn(*shape, generator=rng, device=rng.device) * std).to(dtype))


def integers(rng, low, high, *shape):
    return torch.randint(low, high, shape, generator=rng, device=rng.device)


def error(actual, expected) -> float:
    """Relative, of the whole."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def bound_of(x) -> Bound:
    return (BOUNDS if x.is_cuda else INTERPRETED)[x.dtype]


def check(actual, expected, dtype, shape=None, floor=0.0):
    """floor: of the bound, if sums were in less than float32; the largest is about 5 times the RMS."""
    assert actual.dtype == dtype and actual.shape == (shape or expected.shape) and actual.is_contiguous()
    bound = bound_of(actual)
    allowed = bound.each * expected.abs() + max(bound.floor, floor) * expected.abs().max()
    assert ((actual.double() - expected).abs() <= allowed).all()  # and so no NaN
    few = expected.numel() < 1000
    assert error(actual, expected) <= (bound.each if few else bound.whole) + 5 * floor or expected.norm() == 0


def check_mlp(rng, M, N, K, slope, mode):
    """From float8 factors, so large that some squares are cut off at 448 and some gradients at 57344."""
    h = within_nan(normal(rng, M, K, std=20).to(torch.float8_e4m3fn))
    up = within_nan(normal(rng, N, K, std=20).to(torch.float8_e4m3fn))
    scale = torch.full((), 12 / 400 * K**-0.5, device=rng.device)
    with poisoned():
        r, square = t.mlp_forward(h, up, scale, slope, mode)
    wide = F.leaky_relu(h.double() @ up.double().T * scale.double(), slope)
    check(r, wide, torch.bfloat16, (M, N), FLOAT8_SUM)
    check(square, r.double().square().clamp_max(448), torch.float8_e4m3fn, (M, N))
    grad, scale = within_nan(normal(rng, M, K, std=20).to(torch.float8_e5m2)), 128 * scale
    with poisoned():
        before, square, flipped = t.mlp_backward(grad, up, r, scale, slope, mode)
    wide = grad.double() @ up.double().T * scale.double() * 2 * F.leaky_relu(r.double(), slope)
    floor = FLOAT8_SUM * max(1, wide.abs().max().item() / 57344)  # of the sums, before they are cut off
    check(before, wide.clamp(-57344, 57344), torch.float8_e5m2, (M, N), floor)
    check(square, r.T.double().square().clamp_max(448), torch.float8_e4m3fn, (N, M))
    assert flipped.is_contiguous() and torch.equal(flipped.view(torch.uint8), before.view(torch.uint8).T)


def targets_of(rng, T, V, K):
    """Random, a fifth missing; row 0 has duplicates, rows 1 to 3 block and vocabulary ends, the last none."""
    targets = integers(rng, 0, V, T, K)
    targets[integers(rng, 0, 5, T, K) == 0] = -1
    targets[:1] = targets[:1, -1:].clamp_min(0)
    for row, target in enumerate((0, 4095, 4096), start=1):
        targets[row : row + 1, 0] = min(target, V - 1)
    targets[T // 2, -1] = V - 1
    if T > 4:
        targets[-1] = -1
    return targets


def cross_entropy(logits, targets, weights, softcap, scale, dtype, mode="reference", masses=None, slot=0):
    """What head_chunk makes of logits: losses, their gradient over `scale` and that by the masses."""
    with mock.patch.multiple(t, **dict(zip(("CAP_HEIGHT", "CAP_SHIFT", "CAP_WIDTH"), softcap))):
        lse = t.log_sum(logits, mode)
        loss, places, pulls, mass_grads = t.loss_region(logits, lse, targets, weights, masses, slot)
        return loss, t.logits_gradient(logits, lse, places, pulls, scale, dtype, mode), mass_grads


def check_cross_entropy(rng, T, V, weights, softcap, dtype, grad_dtype, mode, std=4.0):
    """Every element of the loss and of the gradient against what its exponentials may be wrong by."""
    logits, targets = normal(rng, T, V, dtype=dtype, std=std), targets_of(rng, T, V, len(weights))
    weights = within_nan(torch.tensor(weights, device=rng.device) / 512)
    scale = weights.sum() * 2.0**-14 if grad_dtype == torch.float8_e5m2 else weights.sum() * 0.75
    with poisoned():
        loss, grad, _ = cross_entropy(logits, targets, weights, softcap, scale, grad_dtype, mode)
    expected_loss, expected, _ = cross_entropy(
        logits.double(), targets, weights.double(), softcap, scale.double(), torch.float64)
    rough = APPROXIMATE if logits.is_cuda else EXACT
    assert loss.dtype == torch.float32 and loss.shape == (T,)
    assert grad.dtype == grad_dtype and grad.shape == (T, V) and grad.is_contiguous()
    present = targets >= 0
    counted = weights.double() * present
    height, shift, width = softcap
    capped = height * torch.tanh((logits.double() + shift) / width)
    terms = counted.sum(1, keepdim=True) * capped.softmax(1)  # what the gradient is the difference of
    terms.scatter_add_(1, targets.clamp_min(0), counted)
    smallest = torch.finfo(grad_dtype).tiny * torch.finfo(grad_dtype).eps
    bound = bound_of(grad)
    allowed = bound.each * expected.abs() + rough * terms / scale.double() + smallest
    assert ((grad.double() - expected).abs() <= allowed).all()
    assert error(grad, expected) <= bound.whole + rough / 4
    assert ((loss.double() - expected_loss).abs() <= rough * counted.sum(1) * (1 + expected_loss.abs())).all()
    assert loss.double().sum().item() == pytest.approx(expected_loss.sum().item(), rel=LOSS)
    absent = ~present.any(1)
    assert not loss[absent].any() and not grad.double()[absent].any()
    if grad_dtype == torch.float8_e5m2:
        assert 2**11 < grad.double().abs().max() <= 2**14


def check_copying(rng, T, V, weights, softcap, dtype, grad_dtype, mode):
    """Target 0 has the mixture's probability: losses and gradients against autograd of its formula."""
    slot, logits = V - 2, normal(rng, T, V, dtype=dtype, std=4)
    targets = targets_of(rng, T, slot, len(weights))
    weights, one = within_nan(torch.tensor(weights, device=rng.device)), torch.ones((), device=rng.device)
    masses = within_nan(normal(rng, T, 3, std=3).softmax(1)[:, :2])
    masses[:2, 0] = 0  # nothing to copy
    masses[1, 1] = 1
    with poisoned():
        loss, grad, grads = cross_entropy(
            logits, targets, weights, softcap, one, grad_dtype, mode, masses, slot)
    wide, c_s = logits.double().requires_grad_(), masses.double().requires_grad_()
    height, shift, width = softcap
    q = (height * torch.tanh((wide + shift) / width)).softmax(1)
    a, (c, s) = q[:, slot], c_s.unbind(1)
    probabilities = q.gather(1, targets.clamp_min(0)).unbind(1)
    probabilities = probabilities[0] / (1 - a) * (1 - a * (1 - s)) + a * c, *probabilities[1:]
    losses = -torch.stack(probabilities, dim=1).log() * weights * (targets >= 0)
    losses.sum().backward()
    rough = APPROXIMATE if logits.is_cuda else EXACT
    assert grad.dtype == grad_dtype and grad.shape == (T, V) and grad.is_contiguous()
    assert error(loss, losses.sum(1).detach()) < rough
    assert error(grad, wide.grad) < bound_of(grad).whole + rough
    assert error(grads, c_s.grad) < rough
    assert not grads[targets[:, 0] < 0].any()


def check_transpose(rng, R, C, dtype, mode):
    """Every bit, those of NaN included."""
    x = within_nan(integers(rng, 0, 256, R, C).to(torch.uint8).view(dtype))
    with poisoned():
        y = t.transpose(x, mode)
    assert y.dtype == dtype and y.shape == (C, R) and y.is_contiguous()
    assert torch.equal(y.view(torch.uint8), x.view(torch.uint8).T)


def check_lookup(rng, V, D, N, dtype):
    """N rows for a few of V tokens, and their gradients added to those of an earlier backward."""
    few = max(1, N // 8)
    table, tokens = torch.nn.Parameter(normal(rng, V, D)), integers(rng, 0, V, few)[integers(rng, 0, few, N)]
    wide = table.detach().double().requires_grad_()
    for _ in range(2):
        grad = normal(rng, N, D, dtype=dtype)
        rows = t.Lookup.apply(tokens, table, dtype)
        assert torch.equal(rows, table.detach()[tokens].to(dtype))
        rows.backward(grad)
        wide[tokens].backward(grad.double())
    check(table.grad, wide.grad, torch.float32)


def check_branch(rng, T, D):
    """Of bfloat16, against float64; the norm in float8 is the norm's."""
    x, o, *grads = (normal(rng, T, D, dtype=torch.bfloat16, std=std) for std in (3, 1, 1, 1))
    scale8 = torch.tensor(4 / 448, device=x.device)
    total, h, h8 = t.branch_region(x.requires_grad_(), o.requires_grad_(), scale8)
    torch.autograd.backward((total, h), grads)
    wide = [v.detach().double().requires_grad_() for v in (x, o)]
    sum64 = wide[0] + wide[1]
    h64 = rms_normed(sum64)
    torch.autograd.backward((sum64, h64), [g.double() for g in grads])
    expected = sum64.detach(), h64.detach(), wide[0].grad, wide[1].grad
    for actual, wanted in zip((total, h, x.grad, o.grad), expected):
        assert actual.dtype == torch.bfloat16
        assert error(actual.detach(), wanted) < BOUNDS[torch.bfloat16].chain
    assert h8.dtype == torch.float8_e4m3fn and not h8.requires_grad
    assert error(h8.double() * scale8, h64.detach().clamp(-4, 4)) < BOUNDS[torch.float8_e4m3fn].whole


def check_mixing(rng, T, D, present, reads):
    """Of bfloat16, against float64. present: whether there are delta, skip, x0 and bigrams."""
    streams = [normal(rng, T, D, dtype=torch.bfloat16, std=std).requires_grad_() for std in (1, 1, 2, 1, 2)]
    streams = [x if there else None for x, there in zip(streams, (True, *present))]
    factors = normal(rng, 4).requires_grad_()
    x, delta, *others = streams
    weights = tuple(factors.unbind()) if present[-1] else (factors[0], None, factors[2], None)
    found = [y for y in t.mix_region(x, delta, *others, weights, reads) if y is not None]
    wide = [None if x is None else x.detach().double().requires_grad_() for x in (*streams, factors)]
    x, delta, *others, factors64 = wide
    factors64 = factors64.where(torch.tensor([w is not None for w in weights], device=x.device), 1.0)
    mixed = [x if delta is None else x + delta, *others]
    total = sum(factor * y for factor, y in zip(factors64, mixed) if y is not None)
    expected = [total, rms_normed(total), rms_normed(total)[:, : t.GATE_INPUTS]][: 3 if reads else 1]
    directions = [normal(rng, *y.shape) for y in expected]
    for out in (found, expected):
        torch.autograd.backward(out, [g.to(y.dtype) for g, y in zip(directions, out, strict=True)])
    pairs = [*zip(found, expected), *((v.grad, w.grad) for v, w in zip(streams, wide) if v is not None)]
    bound = BOUNDS[torch.bfloat16].chain
    for actual, wanted in pairs:
        assert error(actual.detach(), wanted.detach()) < bound
    assert (factors.grad - wide[-1].grad).abs().max() < 3 * bound * (T * D) ** 0.5  # sums that may cancel


def naive_masses(q, k, sink, targets, cu_seqlens, window):
    """t.pointer_masses by a dense (T, T) matrix; the distribution over the targets' positions comes first."""
    place = torch.arange(len(q), device=q.device)
    document = torch.zeros_like(place)
    for end in cu_seqlens[1:-1].tolist():
        document += place >= end
    back = place[:, None] - place
    allowed = (back > 0) & (back <= window) & (document[:, None] == document)
    exps = (q @ k.T).exp() * allowed
    total = exps.sum(1) + sink.exp()
    masses = exps / total[:, None]
    return masses, torch.stack([(masses * (targets[:, None] == targets)).sum(1), sink.exp() / total], dim=1)


def pointer_inputs(rng, T, E, few, dtype):
    """Queries and keys whose scores are of size 2, a sink, and few different targets."""
    q, k = normal(rng, T, E, dtype=dtype, std=2 * E**-0.5), normal(rng, T, E, dtype=dtype)
    sink = normal(rng, 1)[0].to(torch.promote_types(dtype, torch.float32))
    return q, k, sink, integers(rng, 0, few, T)


def check_pointer(rng, lengths, E, window, few, dtype):
    """Masses, and gradients of all that has one, by a direction for each mass."""
    T, ends = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    *floating, targets = pointer_inputs(rng, T, E, few, dtype)
    cu_seqlens, direction = ends.to(rng.device, torch.int32), normal(rng, T, 2)
    narrow, wide = ([x.detach().to(kind or x.dtype).requires_grad_() for x in floating]
                    for kind in (None, torch.float64))  # fmt: skip
    masses = t.pointer_masses(*narrow, targets, cu_seqlens, window)
    masses.backward(direction)
    _, expected = naive_masses(*wide, targets, cu_seqlens, window)
    expected.backward(direction.double())
    rough = 1e-10 if dtype == torch.float64 else EXACT
    wider = torch.promote_types(dtype, torch.float32)
    check(masses.detach().contiguous(), expected.detach(), wider, floor=rough)
    for x, w in zip(narrow, wide, strict=True):
        assert x.grad.dtype == x.dtype and x.grad.shape == x.shape
        size = w.grad.norm() if x.dim() else direction.norm()  # the sink's is a sum that cancels
        assert (x.grad.double() - w.grad).norm() <= max(bound_of(x).chain, rough) * size + 1e-9
