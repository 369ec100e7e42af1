"""The kernels on the CPU, in Triton's interpreter, against float64; its products of bfloat16 are wrong."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kernel_cases as cases
import train_gpt as t
from kernel_cases import poisoned, seeded

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(t.triton is None, reason="Triton is not installed"),
    pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1; on a GPU see tests/gpu"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log"),  # of rows without a target
]
DTYPES = [torch.float32, torch.float16]
MODES = ["large", "small"]
# M, N, K of the MLP's product; a tile is 128 x 256 x 128 or 128 x 128 x 64. Only the last is made of whole
# tiles; the one before has more tiles than there are programs.
SHAPES = [(16, 16, 32), (48, 272, 80), (144, 544, 144), (272, 1040, 48), (128, 256, 128)]


@pytest.fixture
def rng(request):
    return seeded(zlib.crc32(request.node.name.encode()), "cpu")


def test_poison_fills_what_the_block_makes_and_notices_writes_beside_it():
    with poisoned():
        made = [torch.empty(2, 3), torch.empty_like(torch.ones(5)), torch.ones(1).new_empty((4, 1))]
        made += [torch.empty(7, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float8_e5m2)]
        assert not torch.empty(3, dtype=torch.int64).is_floating_point()
    assert [list(x.shape) for x in made[:3]] == [[2, 3], [5], [4, 1]]
    assert all(x.float().isnan().all() for x in made)
    kept = torch.empty, torch.empty_like, torch.Tensor.new_empty
    with pytest.raises(AssertionError, match="outside"), poisoned():
        torch.empty(6).as_strided((7,), (1,), cases.MARGIN).zero_()
    assert (torch.empty, torch.empty_like, torch.Tensor.new_empty) == kept


@pytest.mark.parametrize("damage", ["element", "row", "nan"])
def test_checks_notice_one_wrong_element(damage):
    expected = cases.normal(seeded(0, "cpu"), 40, 50).double()
    actual = expected.float()
    cases.check(actual, expected, torch.float32)
    actual[-1, -1 if damage != "row" else slice(None)] = cases.NAN if damage == "nan" else 0
    with pytest.raises(AssertionError):
        cases.check(actual, expected, torch.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("slope", [0, 0.5, 0.75])
@pytest.mark.parametrize("mode", MODES)
def test_mlp_forward_and_backward_equal_float64(rng, mode, slope, shape):
    cases.check_mlp(rng, *shape, slope, mode)


# 9095 = 2 * 4096 + 903: the third block is part of one
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("softcap", cases.SOFTCAPS, ids=str)
@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.5), (1.0, 0.5, 0.25)], ids=len)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_and_its_gradient_equal_float64(rng, dtype, weights, softcap, grad_dtype):
    cases.check_cross_entropy(rng, 7, 9095, weights, softcap, dtype, grad_dtype, "large")


@pytest.mark.parametrize("softcap", cases.SOFTCAPS, ids=str)
@pytest.mark.parametrize("T, V, weights, spread", [
    (5, 4096, (1.0,), 4), (3, 3, (1.0, 0.5), 4), (3, 4097, (1.0, 0.5), 4), (6, 131, (1.0, 0.0), 4),
    (9, 131, (1.0, 0.5, 0.0), 40), (1, 7, (0.5,), 4)])  # fmt: skip
def test_cross_entropy_at_block_ends_with_weight_zero_and_large_logits(rng, T, V, weights, spread, softcap):
    cases.check_cross_entropy(rng, T, V, weights, softcap, torch.float32, torch.float32, "large", spread)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("softcap", cases.SOFTCAPS, ids=str)
def test_rows_without_a_target_have_loss_and_gradient_zero(rng, softcap, grad_dtype):
    logits, targets, weights = cases.normal(rng, 4, 300), torch.full((4, 2), -1), torch.tensor([1, 0.5])
    targets[2, 1] = 299
    with poisoned():
        loss, grad, _ = cases.cross_entropy(
            logits, targets, weights, softcap, torch.ones(()), grad_dtype, "large")
    assert loss.ne(0).tolist() == [False, False, True, False]
    assert grad.float().ne(0).any(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("softcap", cases.SOFTCAPS, ids=str)
def test_cross_entropy_is_that_of_torch_and_its_gradient_that_of_autograd(rng, softcap):
    """Kernel and reference compute the gradient by one formula; this is another."""
    logits, targets = cases.normal(rng, 9, 300, std=4), cases.targets_of(rng, 9, 300, 2)
    weights, scale = torch.tensor([1, 0.5]), torch.tensor(0.5)
    loss, grad, _ = cases.cross_entropy(logits, targets, weights, softcap, scale, torch.float32, "large")
    wide = logits.double().requires_grad_()
    height, shift, width = softcap
    capped = height * torch.tanh((wide + shift) / width)
    losses = [F.cross_entropy(capped, column, ignore_index=-1, reduction="none") for column in targets.T]
    expected = losses[0] + losses[1] / 2
    expected.sum().backward()
    assert cases.error(loss, expected.detach()) < 1e-6 and cases.error(grad / 2, wide.grad) < 1e-6


@pytest.mark.parametrize("softcap", cases.SOFTCAPS, ids=str)
@pytest.mark.parametrize("weights", [(1.0,), (0.5, 1.0, 0.25)], ids=len)
@pytest.mark.parametrize("mode, dtype, grad_dtype", [
    ("reference", torch.float64, torch.float64), ("large", torch.float32, torch.float32),
    ("large", torch.float16, torch.float8_e5m2)], ids=str)  # fmt: skip
def test_cross_entropy_of_a_mixture_with_copies_is_that_of_its_formula(rng, mode, dtype, grad_dtype, weights,
                                                                       softcap):
    cases.check_copying(rng, 9, 4500, weights, softcap, dtype, grad_dtype, mode)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("R, C", [(1, 1), (3, 300), (131, 129), (128, 256), (259, 37)])
def test_transpose_keeps_every_bit(rng, R, C, dtype):
    cases.check_transpose(rng, R, C, dtype, "large")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V, D, N", [(11, 33, 90), (5, 1, 7), (300, 64, 1), (9, 130, 40)])
def test_lookup_adds_the_rows_gradients_to_the_table(rng, V, D, N, dtype):
    cases.check_lookup(rng, V, D, N, dtype)


@pytest.mark.parametrize("T, D", [(7, 40), (129, 72)])
def test_branches_have_the_gradients_of_float64(rng, T, D):
    cases.check_branch(rng, T, D)


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("present", cases.STREAMS, ids=str)
def test_mixed_streams_have_the_gradients_of_float64(rng, present, reads):
    cases.check_mixing(rng, 129, 72, present, reads)


# Several blocks in a document, windows shorter than that, and documents of no tokens, as a graph's.
POINTERS = [((1,), 16, 10), ((150,), 16, 1), ((5, 0, 64, 70, 1, 0, 0), 32, 40), ((130, 3, 64, 0), 128, 1000)]


@pytest.mark.parametrize("scores", [2**27, 1], ids=["at once", "in turn"])
@pytest.mark.parametrize("lengths, E, window", POINTERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_pointer_masses_and_their_gradients_are_those_of_a_dense_formula(
    rng, dtype, lengths, E, window, scores, monkeypatch
):
    monkeypatch.setattr(t, "POINTER_BLOCK", 64)
    monkeypatch.setattr(t, "POINTER_SCORES", scores)
    cases.check_pointer(rng, lengths, E, window, 5, dtype)


# Bytes of shared memory that a block can have, by compute capability (CUDA programming guide): an A100 and an
# RTX 3090, 4090, H100, B200 and RTX 5090.
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


@pytest.mark.parametrize("capabilities", [(86, 90, 120), pytest.param((80, 89, 100), marks=pytest.mark.slow)])
def test_kernels_compile_and_fit_without_the_gpu(tmp_path, capabilities):
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, script, *map(str, capabilities)],
                          env=own | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert list(compiled) == [*map(str, capabilities)]
    for capability, launches in zip(capabilities, compiled.values()):
        kernels = {"softmax_kernel"} | ({"mlp_kernel", "transpose_kernel"} if capability >= 89 else set())
        assert {name for name, _ in launches} == kernels
        assert max(taken for _, taken in launches) <= SHARED_MEMORY[capability]
