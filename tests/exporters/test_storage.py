"""Exact bit patterns of packed integers and byte planes, and what planes save beside a byte shuffle of the whole."""

from __future__ import annotations

import importlib.util
import lzma

import numpy as np
import pytest
import torch
import zstandard
from torch import Tensor

from titanlm.errors import ArtifactError
from titanlm.exporters import storage
from titanlm.exporters.compression import DEFAULT_LEVELS
from titanlm.registry import Component

CODECS = ["zstd", "lzma"] + ["brotli"] * (importlib.util.find_spec("brotli") is not None)


def packed_by_hand(values: list[int], bits: int) -> bytes:
    """One long integer, value i shifted by i·bits, written low byte first."""
    total = sum((value & ((1 << bits) - 1)) << (index * bits) for index, value in enumerate(values))
    return total.to_bytes((len(values) * bits + 7) // 8, "little")


def test_int6_bits_written_out() -> None:
    values = torch.tensor([1, -1, -32, 31], dtype=torch.int8)
    # value 3 … 0:  011111 100000 111111 000001
    assert storage.to_bytes(values, 6, "packed").tobytes() == bytes([0b11000001, 0b00001111, 0b01111110])
    assert storage.to_bytes(values[:2], 6, "packed").tobytes() == bytes([0b11000001, 0b00001111])
    assert storage.to_bytes(values, 6, "bytes").tobytes() == bytes([1, 255, 224, 31])


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1000])
def test_packing_against_long_integers(bits: int, n: int) -> None:
    edge = 1 << (bits - 1)
    values = torch.randint(-edge, edge, (n,), generator=torch.Generator().manual_seed(n), dtype=torch.int8)
    raw = storage.to_bytes(values, bits, "packed")
    assert raw.tobytes() == packed_by_hand(values.tolist(), bits)
    assert len(raw) == storage.stored_bytes((n,), "int8", bits, "packed")
    assert torch.equal(storage.from_bytes(raw, (n,), "int8", bits, "packed"), values)


def test_packing_over_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_CHUNK", 16)
    values = torch.randint(-16, 16, (1003,), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    raw = storage.to_bytes(values, 5, "packed")
    assert raw.tobytes() == packed_by_hand(values.tolist(), 5)
    assert torch.equal(storage.from_bytes(raw, (17, 59), "int8", 5, "packed"), values.reshape(17, 59))


def test_wide_numbers_are_byte_planes() -> None:
    values = torch.tensor([0x0102, 0x0304, -1], dtype=torch.int16)
    assert storage.to_bytes(values, None, "bytes").tobytes() == bytes([0x02, 0x04, 0xFF, 0x01, 0x03, 0xFF])
    half = torch.tensor([1.0, -2.0]).bfloat16()  # 3f80 c000
    assert storage.to_bytes(half, None, "packed").tobytes() == bytes([0x80, 0x00, 0x3F, 0xC0])


@pytest.mark.parametrize("dtype", storage.DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)])
def test_every_dtype_comes_back_bit_for_bit(dtype: str, shape: tuple[int, ...]) -> None:
    n_bytes = storage.stored_bytes(shape, dtype, None, "bytes")
    raw = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 256, n_bytes, dtype=np.uint8)
    tensor = storage.from_bytes(raw.copy(), shape, dtype, None, "bytes")
    assert tensor.shape == shape
    assert tensor.dtype == storage.DTYPES[dtype]
    assert storage.to_bytes(tensor, None, "bytes").tobytes() == raw.tobytes()


def test_strides_and_gradients_do_not_matter() -> None:
    tensor = torch.arange(12.0, requires_grad=True).reshape(3, 4).T
    assert torch.equal(storage.from_bytes(storage.to_bytes(tensor, None, "bytes"), (4, 3), "float32", None, "bytes"), tensor)


def test_what_is_out_of_range_is_refused() -> None:
    with pytest.raises(ArtifactError, match="from -33 to 5 do not fit in 6 bits"):
        storage.to_bytes(torch.tensor([-33, 5], dtype=torch.int8), 6, "bytes")
    with pytest.raises(ArtifactError, match="from 0 to 32 do not fit in 6 bits"):
        storage.from_bytes(np.array([0, 32], np.uint8), (2,), "int8", 6, "bytes")
    with pytest.raises(ArtifactError, match="unused bits"):
        storage.from_bytes(np.array([0b01000001], np.uint8), (1,), "int8", 6, "packed")
    with pytest.raises(ArtifactError, match="0 or 1"):
        storage.from_bytes(np.array([0, 2], np.uint8), (2,), "bool", None, "bytes")


# ---------------------------------------------------------------- beside the shuffle of Parameter Golf's records
def shuffled(tensors: list[Tensor]) -> bytes:
    """As the records do it: tensors one after the other, then all bytes at even places before all at odd ones."""
    plain = b"".join(tensor.numpy().tobytes() for tensor in tensors)
    return plain[0::2] + plain[1::2]


def planes(tensors: list[Tensor]) -> bytes:
    return b"".join(storage.to_bytes(tensor, None, "bytes").tobytes() for tensor in tensors)


def compressed(codec: str, data: bytes, levels: tuple[int, ...]) -> int:
    """Bytes by the codec's own package."""
    if codec == "zstd":
        return min(len(zstandard.ZstdCompressor(level=level).compress(data)) for level in levels)
    if codec == "lzma":
        return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    import brotli

    return len(brotli.compress(data, quality=11, lgwin=24))


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.03


@pytest.mark.parametrize("codec", CODECS)
def test_planes_are_as_good_as_a_shuffle_by_two_and_better_for_fp32(codec: str) -> None:
    half = [gaussian(128, 256, seed=0).half()]
    assert planes(half) == shuffled(half)  # one fp16 tensor: the same bytes
    wide = [gaussian(128, 256, seed=1)]
    best = DEFAULT_LEVELS[codec]
    assert compressed(codec, planes(wide), best) < 0.99 * compressed(codec, shuffled(wide), best)


@pytest.mark.parametrize("codec", CODECS)
def test_a_payload_of_int6_fp16_and_fp32_is_smaller_than_shuffled(codec: str) -> None:
    """The parts of an artifact in its order, against the records' order, shuffle and highest level."""
    matrices = [Component.named("quantizer", "int6").build().encode(gaussian(100 if codec != "zstd" else 400, 512, seed=seed)) for seed in range(3)]
    controls = [gaussian(512, seed=seed) for seed in range(3, 6)]
    values, scales = ([matrix.parts[part] for matrix in matrices] for part in ("values", "scale"))
    recorded = shuffled([part for pair in zip(values, scales, strict=True) for part in pair] + controls)
    ours = planes([*scales, *controls, *values])
    assert len(ours) == len(recorded)
    assert compressed(codec, ours, DEFAULT_LEVELS[codec]) < compressed(codec, recorded, (22,))
