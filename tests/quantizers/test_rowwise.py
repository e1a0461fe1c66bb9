"""int8 and int6 against loops, against theory, and at the edges of the scale's dtype."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from titanlm.errors import ArtifactError, NonFiniteError
from titanlm.exporters.encoding import decode_tensors
from titanlm.quantizers.rowwise import at_quantile
from titanlm.registry import Component, lookup

CLIP = {"int8": 127, "int6": 31, "int5": 15}


def build(name: str, **settings):
    return Component.named("quantizer", name, **settings).build()


@pytest.fixture(params=["int8", "int6", "int5"])
def name(request) -> str:
    return request.param


def reference(rows: np.ndarray, clip: int) -> tuple[list[list[int]], list[float]]:
    """The definition, an element at a time, in float64 from the stored fp16 scale on."""
    all_q, scales = [], []
    for row in rows:
        scale = float(np.float16(np.float32(np.abs(row).max()) / np.float32(clip)))
        scales.append(scale)
        all_q.append([max(-clip - 1, min(clip, round(float(w) / scale))) for w in row])
    return all_q, scales


@pytest.mark.parametrize("std", [1e-3, 0.03, 1.0, 300.0])
def test_matches_float64_loop(name: str, std: float) -> None:
    w = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)) * std
    encoded = build(name).encode(w)
    q, scales = reference(w.numpy(), CLIP[name])
    assert encoded.parts["scale"].dtype == torch.float16
    assert encoded.parts["scale"].tolist() == scales
    assert encoded.parts["values"].tolist() == q
    decoded = build(name).decode(encoded)
    assert decoded.dtype == torch.float32
    expected = [[float(np.float32(level * scale)) for level in row] for row, scale in zip(q, scales, strict=True)]
    assert decoded.tolist() == expected


def test_ties_round_to_even() -> None:
    w = torch.tensor([[31.0, 0.5, 1.5, 2.5, -0.5, -1.5, -31.0]])
    assert build("int6").encode(w).parts["values"].tolist() == [[31, 0, 2, 2, 0, -2, -31]]


def test_gaussian_rows_have_the_error_of_theory(name: str) -> None:
    """Root-mean-square error s / √12 with s = max|row| / c, for each row."""
    w = torch.randn(200, 4096, generator=torch.Generator().manual_seed(2)) * 0.03
    quantizer = build(name)
    error = (quantizer.decode(quantizer.encode(w)) - w).double()
    theory = w.abs().amax(1).double() / CLIP[name] / math.sqrt(12)
    ratio = error.square().mean(1).sqrt() / theory
    assert abs(float(ratio.mean()) - 1) < 0.01
    relative = float(error.norm() / w.norm())
    # max of 4096 gaussians is about 3.7 sigma; a scale floored at 1/31 would give 0.31 here.
    assert relative == pytest.approx(3.7 / CLIP[name] / math.sqrt(12), rel=0.1)


@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
def test_error_is_at_most_half_a_step_at_every_magnitude(name: str, scale_dtype: str) -> None:
    generator = torch.Generator().manual_seed(3)
    exponents = torch.linspace(-44, 5, 400)[:, None]
    w = (torch.randn(400, 33, generator=generator).double() * 10**exponents).float()
    quantizer = build(name, scale_dtype=scale_dtype)
    encoded = quantizer.encode(w)
    scale = encoded.parts["scale"].double()[:, None]
    error = (quantizer.decode(encoded).double() - w.double()).abs()
    smallest = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps  # what float32 itself cannot resolve
    assert bool((error <= scale * 0.5 * (1 + 1e-5) + smallest).all())
    tiny = 2.0**-24 if scale_dtype == "float16" else 2.0**-149
    # Never more than one number above max / c, however small the row: no floor.
    exact = w.abs().amax(1, keepdim=True).double() / CLIP[name]
    assert bool((scale <= exact * (1 + 2**-10) + tiny).all())


def test_rows_too_small_for_fp16_are_not_clipped() -> None:
    step = 2.0**-24
    w = torch.tensor([[1.4 * 31 * step, -1.4 * 31 * step], [1e-12, -1e-13]])
    quantizer = build("int6")
    encoded = quantizer.encode(w)
    # 1.4 steps would round to one step, on which the row's ends would reach 43 of 31 levels.
    assert encoded.parts["scale"].tolist() == [2 * step, step]
    assert encoded.parts["values"].tolist() == [[22, -22], [0, 0]]
    assert float((quantizer.decode(encoded) - w).abs().max()) <= step
    exact = build("int6", scale_dtype="float32")
    assert torch.allclose(exact.decode(exact.encode(w)), w, rtol=0.01, atol=2e-14)


def test_zero_rows_are_exact(name: str) -> None:
    w = torch.zeros(3, 8)
    w[1, 2] = 5.0
    quantizer = build(name)
    encoded = quantizer.encode(w)
    assert encoded.parts["scale"][0] == 0
    assert torch.equal(quantizer.decode(encoded)[[0, 2]], torch.zeros(2, 8))


def test_huge_rows(name: str) -> None:
    most = 65504.0 * CLIP[name]
    w = torch.tensor([[most, -most, most / 2]])
    quantizer = build(name)
    assert torch.allclose(quantizer.decode(quantizer.encode(w)), w, rtol=1 / CLIP[name])
    with pytest.raises(ArtifactError, match='too large for a scale in float16; set scale_dtype = "float32"'):
        quantizer.encode(w * 1.01)
    wide = build(name, scale_dtype="float32")
    w = torch.tensor([[torch.finfo(torch.float32).max, -1e38]])
    decoded = wide.decode(wide.encode(w))
    assert bool(torch.isfinite(decoded).all())
    assert torch.allclose(decoded, w, rtol=2 / CLIP[name])


def test_the_grid_never_leaves_a_narrow_dtype() -> None:
    w = torch.tensor([[65504.0, -65504.0]], dtype=torch.float16)
    decoded = build("int6").decode(build("int6").encode(w))
    assert decoded.dtype == torch.float16
    assert bool(torch.isfinite(decoded).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (0, 4), (4, 0), (0,)])
def test_shapes_and_dtypes_come_back(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    quantizer = build(name)
    encoded = quantizer.encode(w)
    assert encoded.parts["values"].shape == shape
    assert encoded.parts["scale"].shape == shape[:-1]
    assert encoded.quantizer == name
    decoded = quantizer.decode(encoded)
    assert decoded.shape == shape
    assert decoded.dtype == dtype
    assert torch.allclose(decoded.float(), w.float(), atol=5 / CLIP[name])
    assert torch.equal(decode_tensors({"w": encoded, "plain": w})["w"], decoded)


def test_higher_rank_is_rows_along_the_last_dimension(name: str) -> None:
    w = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(5))
    quantizer = build(name)
    flat, cube = quantizer.encode(w.reshape(6, 5)), quantizer.encode(w)
    assert torch.equal(flat.parts["values"].reshape(2, 3, 5), cube.parts["values"])
    transposed = w.transpose(1, 2)  # not contiguous
    assert torch.equal(quantizer.encode(transposed).parts["values"], quantizer.encode(transposed.contiguous()).parts["values"])


def test_encoding_twice_changes_nothing(name: str) -> None:
    quantizer = build(name)
    once = quantizer.decode(quantizer.encode(torch.randn(16, 32, generator=torch.Generator().manual_seed(6))))
    assert torch.equal(quantizer.decode(quantizer.encode(once)), once)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_input_is_named(name: str, bad: float) -> None:
    w = torch.ones(4, 4, requires_grad=True).detach()
    w[2, 1] = bad
    with pytest.raises(NonFiniteError, match="nan or inf .first in row 2."):
        build(name).encode(w)


def test_integers_are_refused(name: str) -> None:
    with pytest.raises(ArtifactError, match="not int64; leave this tensor out"):
        build(name).encode(torch.arange(4))


def test_bits(name: str) -> None:
    assert dict(build(name).encode(torch.ones(2, 2)).bits) == {"int5": {"values": 5}, "int6": {"values": 6}, "int8": {}}[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": {}}, "stores the parts"),
        ({"shape": (4, 2)}, "needs torch.int8"),
        ({"shape": (2, 2**40)}, "needs torch.int8"),
        ({"dtype": "int64"}, "not to 'int64'"),
        ({"dtype": "__class__"}, "not to '__class__'"),
        ({"parts": {"values": torch.ones(2, 4, dtype=torch.int8), "scale": torch.tensor([1.0, 1.0])}}, "needs torch.float16"),
        ({"parts": {"values": torch.ones(2, 4, dtype=torch.int8), "scale": torch.tensor([1.0, float("nan")]).half()}}, "not finite"),
        ({"parts": {"values": torch.ones(2, 4, dtype=torch.int8), "scale": torch.tensor([1.0, -1.0]).half()}}, "negative"),
        ({"parts": {"values": torch.ones(2, 4), "scale": torch.ones(2).half()}}, "needs torch.int8"),
        ({"settings": {"scale_dtype": "float64"}}, "scale_dtype"),
        ({"settings": {"scale_dtype": "float32"}}, "needs torch.float32"),
        ({"settings": {"clip": 31}}, "clip: Unexpected"),
        ({"settings": {"params": 3}}, "params"),
        ({"settings": {"x": object()}}, "no JSON"),
        ({"quantizer": "int66"}, "did you mean 'int6'"),
        ({"quantizer": "rowwise"}, "no quantizer named"),
        ({"quantizer": "../int6"}, "no quantizer named"),
        ({"quantizer": ""}, "no quantizer named"),
    ],
)
def test_what_does_not_decode_is_named(change: dict, message: str) -> None:
    encoded = dataclasses.replace(build("int6").encode(torch.ones(2, 4)), **change)
    with pytest.raises(ArtifactError, match=message) as caught:
        decode_tensors({"blocks.0.w": encoded})
    assert "'blocks.0.w'" in str(caught.value)


def test_defaults_claim_matrices_and_clip_nothing(name: str) -> None:
    config = lookup("quantizer", name).settings()
    assert config.params == ("@matrix", "@embedding", "@head")
    assert config.scale_dtype == "float16"
    assert config.clip_quantile is None
    assert build(name).takes(torch.empty(1))
    assert not build(name).calibrated


# ---------------------------------------------------------------- clipping and size
@pytest.mark.parametrize("n", [1, 2, 5, 512, 3001])
@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9, 0.999, 0.9999984, 1.0])
def test_quantiles_are_those_of_numpy(n: int, quantile: float) -> None:
    rows = torch.randn(7, n, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    expected = np.quantile(rows.abs().numpy(), quantile, axis=1)
    np.testing.assert_allclose(at_quantile(rows, quantile), expected, rtol=1e-8)
    # torch takes the place between two magnitudes in fp32.
    narrow = at_quantile(rows.float(), quantile)
    assert narrow.dtype == torch.float32
    np.testing.assert_allclose(narrow, np.quantile(rows.float().abs().double().numpy(), quantile, axis=1), rtol=1e-7)
    torch.testing.assert_close(narrow, rows.float().abs().quantile(quantile, 1), rtol=1e-4, atol=0)


def test_more_elements_than_torch_had_a_quantile_for() -> None:
    """It refused more than 2^24."""
    rows = torch.arange(1.0, 2.0**20 + 1).expand(17, -1)
    assert at_quantile(rows, 1 - 2.0**-19).tolist() == pytest.approx([2.0**20 - 2 + 2.0**-19] * 17, rel=1e-7)


def test_rows_are_clipped_at_the_quantile(name: str) -> None:
    w = torch.randn(20, 1000, generator=torch.Generator().manual_seed(9))
    encoded = build(name, clip_quantile=0.99).encode(w)
    reach = np.quantile(w.abs().numpy(), 0.99, axis=1)
    scale = encoded.parts["scale"].double().numpy()
    np.testing.assert_allclose(scale, reach / CLIP[name], rtol=2**-11)
    q = np.clip(np.round(w.double().numpy() / scale[:, None]), -CLIP[name] - 1, CLIP[name])
    assert encoded.parts["values"].tolist() == q.tolist()
    # What exceeds the last level is put on it: about a hundredth, on the negative side one level further out.
    assert 0.005 < float((np.abs(q) >= CLIP[name]).mean()) < 0.05
    everything = build(name, clip_quantile=1.0).encode(w)
    assert all(torch.equal(part, build(name).encode(w).parts[key]) for key, part in everything.parts.items())


def test_sparse_rows_are_not_clipped_at_nothing(name: str) -> None:
    w = torch.zeros(2, 100)
    w[0, 3] = 5.0
    quantizer = build(name, clip_quantile=0.9)
    assert torch.allclose(quantizer.decode(quantizer.encode(w)), w, rtol=2**-11)


def test_a_tensor_that_is_no_larger_is_left(name: str) -> None:
    quantizer = build(name, above_elements=65_536)
    assert not quantizer.takes(torch.empty(512, 128, device="meta"))
    assert quantizer.takes(torch.empty(512, 129, device="meta"))


def test_settings_of_the_encoder_alone_are_not_stored(name: str) -> None:
    """So that artifacts written before there were any are read, and a decoder need not know them."""
    w = torch.randn(4, 8, generator=torch.Generator().manual_seed(10))
    quantizer = build(name, clip_quantile=0.5, above_elements=3, rounding="gptq")
    encoded = quantizer.encode(w)
    assert encoded.settings == {"scale_dtype": "float16"}
    assert torch.equal(decode_tensors({"w": encoded})["w"], quantizer.decode(encoded))
