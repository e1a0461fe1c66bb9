"""Each Triton kernel against its twin in plain torch, values and gradients.

Run by hand on a CUDA device, or without one in Triton's interpreter:
``TRITON_INTERPRET=1 pytest -m gpu tests/kernels/test_triton.py``.
"""

import importlib.util
import math
import os

import pytest
import torch

from titanlm.kernels import logits_triton
from titanlm.kernels.mix import Mix, plain_mix
from titanlm.kernels.relu2 import Relu2Network, plain_relu2_network
from titanlm.kernels.rotate import RotatedHeads, plain_rotated_heads
from titanlm.losses import chunked
from titanlm.models.layers.rope import rotary_tables

pytestmark = pytest.mark.gpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def device():
    if importlib.util.find_spec("triton") is None or not (torch.cuda.is_available() or INTERPRETED):
        pytest.skip("needs Triton, and a CUDA device or TRITON_INTERPRET=1")
    torch.manual_seed(0)
    return "cpu" if INTERPRETED else "cuda"


def rounded(*shape, device, scale=1.0):
    """Normal numbers that bf16 holds exactly, in fp32."""
    return (scale * torch.randn(*shape, device=device)).bfloat16().float()


def close(got, wanted, tolerance):
    """To a share of the largest magnitude: bf16 rounds to 2⁻⁸ of a number, sums are larger than what they lose."""
    wanted = wanted.float()
    assert (got.float() - wanted).abs().max() <= tolerance * wanted.abs().max()


def both(fused, plain, inputs, dtype, tolerance):
    """Values and gradients of two functions of tensors that return tuples, the second computed in fp32 from the same numbers."""
    mine = [x.to(dtype if x.ndim > 2 else torch.float32).requires_grad_() for x in inputs]
    theirs = [x.clone().requires_grad_() for x in inputs]
    results, references = fused(*mine), plain(*theirs)
    seeds = [rounded(*reference.shape, device=reference.device) for reference in references]
    for result, reference in zip(results, references, strict=True):
        assert result.dtype == dtype
        close(result, reference, tolerance)
    gradients = torch.autograd.grad(results, mine, [seed.to(dtype) for seed in seeds])
    for gradient, reference in zip(gradients, torch.autograd.grad(references, theirs, seeds), strict=True):
        close(gradient, reference, tolerance)


PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])


@PRECISIONS
@pytest.mark.parametrize("width", [32, 48, 512])
@pytest.mark.parametrize("n_terms", [2, 3])
@pytest.mark.parametrize("every", [1, 2])
def test_mix(device, dtype, tolerance, width, n_terms, every):
    passes = tuple(k % every == 0 for k in range(n_terms))

    def fused(weights, *terms):
        # What is passed through is used again, so that a second gradient comes to it.
        out, normed, *passed = Mix.apply(weights, 1e-6, passes, *terms)
        return (out, normed, *(term * 2 for term in passed))

    def plain(weights, *terms):
        return (*plain_mix(terms, weights, 1e-6), *(term * 2 for term, wanted in zip(terms, passes) if wanted))

    terms = [rounded(3, 7, width, device=device) for _ in range(n_terms)]
    both(fused, plain, [rounded(n_terms, width, device=device), *terms], dtype, tolerance)


@PRECISIONS
@pytest.mark.parametrize("gained", [True, False])
@pytest.mark.parametrize("norm", ["none", "plain", "learned"])
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "head_dim", "copies", "own"), [
    (4, 2, 8, 1, False), (3, 3, 16, 1, False), (8, 4, 64, 1, False), (4, 2, 8, 2, False), (6, 2, 8, 3, True), (8, 4, 64, 2, True),
])  # fmt: skip
def test_rotated_heads(device, dtype, tolerance, gained, norm, n_heads, n_kv_heads, head_dim, copies, own):
    positions = torch.stack([torch.arange(11), torch.arange(11) % 4]).to(device)
    tables = rotary_tables(positions, head_dim, 100.0, dtype)
    shape = (n_heads, n_kv_heads, None if norm == "none" else 1e-6, copies)

    def arguments(qkv, *rest):
        norms, gain = rest[: norm == "learned"], rest[norm == "learned" :]
        return (qkv, *tables, *(norms or (None,)), *(gain or (None,)), *shape)

    inputs = [rounded(2, 11, (n_heads + 2 * n_kv_heads) * head_dim, device=device)]
    inputs += [rounded(2, head_dim, device=device)] * (norm == "learned") + [rounded(n_heads, device=device)] * gained
    n_results = 4 if own else 3
    both(lambda *x: RotatedHeads.apply(*arguments(*x), own), lambda *x: plain_rotated_heads(*arguments(*x))[:n_results], inputs, dtype, tolerance)


def test_gradients_of_any_layout(device):
    """Attention gives its gradients heads first or positions first, and by plain products those of keys with positions last."""
    positions = torch.arange(8, device=device).expand(2, 8)
    tables = rotary_tables(positions, 16, 100.0, torch.float32)
    qkv = torch.randn(2, 8, 4 * 16, device=device, requires_grad=True)
    heads = RotatedHeads.apply(qkv, *tables, None, None, 2, 1, 1e-6, 1, False)
    seeds = [torch.randn_like(each) for each in heads]
    (wanted,) = torch.autograd.grad(heads, qkv, seeds, retain_graph=True)
    for a, b in ((1, 2), (1, 3), (2, 3)):
        (got,) = torch.autograd.grad(heads, qkv, [seed.transpose(a, b).contiguous().transpose(a, b) for seed in seeds], retain_graph=True)
        assert torch.equal(got, wanted)


SLOPES = pytest.mark.parametrize("slope", [0.0, 0.5])


@SLOPES
@pytest.mark.parametrize("n_rows", [1, 256, 300])
@pytest.mark.parametrize(("width", "d_ff"), [(64, 192), (512, 1536)])
def test_relu2_network(device, n_rows, width, d_ff, slope):
    if INTERPRETED and width > 64:
        pytest.skip("too much for the interpreter")
    x, up, down = rounded(n_rows, width, device=device), rounded(d_ff, width, device=device, scale=0.1), rounded(width, d_ff, device=device, scale=0.1)
    dtype = torch.float32 if INTERPRETED else torch.bfloat16  # its products of bf16 are wrong
    mine = [each.to(dtype).requires_grad_() for each in (x, up, down)]
    theirs = [each.double().requires_grad_() for each in (x, up, down)]
    seed = rounded(n_rows, width, device=device)
    result, reference = Relu2Network.apply(*mine, slope), plain_relu2_network(*theirs, slope)
    close(result, reference, 0.02)
    for got, wanted in zip(torch.autograd.grad(result, mine, seed.to(dtype)), torch.autograd.grad(reference, theirs, seed.double()), strict=True):
        close(got, wanted, 0.02)


@pytest.mark.parametrize("slope", [0.5, 0.25])
def test_leaky_relu2_element_by_element(device, slope):
    """Through products with the identity, which leave every number as it is: bf16 holds each u, and h and its slopes to their own rounding."""
    n = 128
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    eye = torch.eye(n, device=device, dtype=dtype)
    x = torch.linspace(-3, 3, n * n, device=device).view(n, n).to(dtype).requires_grad_()
    got = Relu2Network.apply(x, eye, eye, slope)
    seed = torch.ones_like(got)
    (g,) = torch.autograd.grad(got, x, seed)
    u = x.detach().double().requires_grad_()
    wanted = torch.nn.functional.leaky_relu(u, slope).square()
    (g_wanted,) = torch.autograd.grad(wanted.sum(), u)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    assert ((got.double() - wanted).abs() <= rounding * wanted + 1e-12).all()
    assert ((g.double() - g_wanted).abs() <= rounding * g_wanted.abs() + 1e-12).all()


@SLOPES
def test_nan_stays_nan(device, slope):
    """A guard against steps that are not finite looks at the loss and the gradients."""
    x, up, down = (rounded(32, 32, device=device).to(torch.float32 if INTERPRETED else torch.bfloat16).requires_grad_() for _ in range(3))
    with torch.no_grad():
        up[3, 5] = torch.nan
    result = Relu2Network.apply(x, up, down, slope)
    assert result.isnan().all()
    assert all(gradient.isnan().any() for gradient in torch.autograd.grad(result.sum(), (x, up, down)))


@PRECISIONS
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("needs_mean", [False, True])
@pytest.mark.parametrize(("n_rows", "vocab", "apart"), [(3, 50, 0), (5, 5000, 3)])
def test_logits(device, dtype, tolerance, cap, needs_mean, n_rows, vocab, apart):
    """Against the plain passes of the chunked loss, in fp64; a row whose label is not trained, and space between rows that must stay."""
    logits = rounded(n_rows, vocab + apart, device=device, scale=3.0)
    labels = torch.arange(n_rows, device=device) * 7
    labels[1] = -100
    wide, narrow = logits.double()[:, :vocab], logits.to(dtype)
    found, wanted = logits_triton.statistics(narrow[:, :vocab], labels, needs_mean, cap), chunked.statistics(wide, labels, needs_mean, cap)
    for got, reference in zip(found, wanted, strict=True):
        assert (got is None) == (reference is None)
        if got is not None:
            close(got, reference, 1e-5)
    g_zy, g_lse, g_mean = (rounded(n_rows, device=device) for _ in range(3))
    weights = g_zy.double(), g_lse.double(), g_mean.double() if needs_mean else None
    places, entries = chunked.label_entries(wide, labels, *wanted[:2], *weights, cap)
    keep = wide.clone()
    chunked.write_gradient(keep, wanted[1], weights[1], weights[2], cap)
    trained = labels >= 0
    keep[trained] = keep[trained].scatter(1, places[trained], entries[trained])
    logits_triton.write_gradient(narrow[:, :vocab], labels, found[1], g_zy, g_lse, g_mean if needs_mean else None, cap)
    close(narrow[:, :vocab], keep, tolerance / 2)
    assert torch.equal(narrow[:, vocab:], logits.to(dtype)[:, vocab:])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 4500])
def test_logits_that_are_not_finite(device, value, column):
    """One among others comes out of the logarithm of the sum as torch has it: NaN, inf, or as if it were not there."""
    logits = rounded(3, 5000, device=device)
    logits[1, column], logits[2] = value, value
    _, found, _ = logits_triton.statistics(logits, torch.ones(3, dtype=torch.int64, device=device), False, None)
    torch.testing.assert_close(found, torch.logsumexp(logits, -1), equal_nan=True)
