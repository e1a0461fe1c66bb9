"""sdclip against a loop, and against what theory says of normal weights: bits a level and squared error."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from titanlm.errors import ArtifactError
from titanlm.exporters.encoding import decode_tensors
from titanlm.quantizers.rowwise import Rowwise
from titanlm.registry import Component


def build(**settings: object) -> Rowwise:
    quantizer = Component.named("quantizer", "sdclip", **settings).build()
    assert isinstance(quantizer, Rowwise)
    return quantizer


def gaussian(rows: int = 64, n: int = 8192) -> Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(1)) * 0.03


def below(x: float) -> float:
    """P(X < x) of a standard normal."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


def lost(end: float, start: float) -> float:
    """∫ (x - end)² φ(x) dx over x > start: the squared error of what is put on the last level."""
    density = math.exp(-start * start / 2) / math.sqrt(2 * math.pi)
    return (1 + end * end) * below(-start) + (start - 2 * end) * density


def theory(bits: int, k: float) -> tuple[float, float]:
    """Entropy of a level in bits, and mean squared error over σ², of normal weights on this grid."""
    clip = 2 ** (bits - 1) - 1
    step = k / clip
    edges = [-math.inf, *((level - 0.5) * step for level in range(-clip, clip + 1)), math.inf]
    entropy = -sum(p * math.log2(p) for low, high in pairwise(edges) if (p := below(high) - below(low)) > 0)
    inside = below((clip + 0.5) * step) - below(-(clip + 1.5) * step)
    clipped = lost(clip * step, (clip + 0.5) * step) + lost((clip + 1) * step, (clip + 1.5) * step)
    return entropy, inside * step * step / 12 + clipped


def entropy_of(values: Tensor) -> float:
    p = torch.bincount(values.flatten().int() + 128).double() / values.numel()
    return float(-(p * p.clamp_min(1e-300).log2()).sum())


@pytest.mark.parametrize(("bits", "k"), [(6, 12.85), (8, 20.0), (5, 5.0), (6, 2.0), (7, 1.0)])
def test_matches_float64_loop(bits: int, k: float) -> None:
    w, clip = gaussian(20, 300), 2 ** (bits - 1) - 1
    encoded = build(bits=bits, k=k).encode(w)
    for row, values, scale in zip(w.double().numpy(), encoded.parts["values"].tolist(), encoded.parts["scale"].tolist()):
        exact = k * np.std(row, ddof=1) / clip
        assert scale == pytest.approx(exact, rel=2**-11)
        assert values == [max(-clip - 1, min(clip, round(weight / scale))) for weight in row.tolist()]
    assert encoded.bits == ({} if bits == 8 else {"values": bits})
    decoded = build().decode(encoded)  # whatever its bits
    assert torch.equal(decoded, decode_tensors({"w": encoded})["w"])
    assert torch.equal(decoded, encoded.parts["values"].float() * encoded.parts["scale"].float()[:, None])


@pytest.mark.parametrize(("bits", "k"), [(6, 12.85), (8, 20.0), (7, 15.0), (5, 6.0), (6, 3.0), (6, 2.0), (8, 1.5)])
def test_normal_rows_have_the_entropy_and_error_of_theory(bits: int, k: float) -> None:
    w = gaussian()
    quantizer = build(bits=bits, k=k)
    encoded = quantizer.encode(w)
    entropy, error = theory(bits, k)
    assert entropy_of(encoded.parts["values"]) == pytest.approx(entropy, abs=0.005)
    measured = (quantizer.decode(encoded) - w).double().square().mean() / w.double().var()
    assert float(measured) == pytest.approx(error, rel=0.04)  # of those clipped there are few


def test_the_numbers_of_the_record() -> None:
    """3.33 bits a weight at b = 6 and k = 12.85, where nothing is clipped and the error is s² / 12."""
    entropy, error = theory(6, 12.85)
    assert entropy == pytest.approx(3.33, abs=0.01)
    assert error == pytest.approx((12.85 / 31) ** 2 / 12, rel=1e-6)


def test_k_is_a_dial() -> None:
    """Twice the k, a bit less: log2(2^(b-1) - 1) - log2 k + log2 √(2πe) while a step is well below σ."""
    w = gaussian(32)
    for bits, k in ((5, 5.0), (5, 7.5), (6, 5.0), (6, 10.0), (6, 12.85), (7, 6.0), (7, 12.0), (7, 24.0), (8, 20.0), (8, 40.0)):
        entropy = entropy_of(build(bits=bits, k=k).encode(w).parts["values"])
        assert entropy == pytest.approx(math.log2(2 ** (bits - 1) - 1) - math.log2(k) + math.log2(math.sqrt(2 * math.pi * math.e)), abs=0.02)


def test_rows_without_a_deviation_of_their_own_are_not_lost() -> None:
    far = 5 + 1e-3 * torch.randn(64, generator=torch.Generator().manual_seed(2))
    w = torch.stack([torch.full((64,), 0.3), torch.zeros(64), far])
    decoded = build().decode(build().encode(w))
    assert torch.equal(decoded[1], w[1])
    assert float((decoded - w).abs().max()) <= float(far.max()) / 31 / 2 * 1.001
    single = torch.tensor([[0.7], [-2.0]])
    assert torch.allclose(build().decode(build().encode(single)), single, rtol=2**-11)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4), (0, 4), (4, 0)])
def test_shapes_come_back(shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    decoded = build().decode(build().encode(w))
    assert (decoded.shape, decoded.dtype) == (w.shape, w.dtype)
    # The last level is 12.85 deviations out, and no step is more than a 31st of that.
    assert torch.allclose(decoded.float(), w.float(), atol=0.5)


def test_a_grid_that_reaches_too_far_is_named() -> None:
    w = gaussian(2, 100) * 1e7
    with pytest.raises(ArtifactError, match='too large for a scale in float16; set scale_dtype = "float32"'):
        build().encode(w)
    wide = build(scale_dtype="float32")
    assert float((wide.decode(wide.encode(w)) - w).abs().max()) <= 12.85 * 3.5e5 / 31 / 2
