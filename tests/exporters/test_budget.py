"""The budget adds up to the byte, its rows are measurements, and entropies are those of theory and of a record's simulation."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard

from titanlm.exporters.budget import Budget, entropy_bits, group_of, measure
from titanlm.exporters.compression import compress
from titanlm.exporters.encoding import Encoded, ExportReport, ExportRequest
from titanlm.registry import Component

ROLES = {"blocks.0.norm.weight": "norm", "blocks.0.attention.q_gain": "gain", "embedding.weight": "embedding"}
FILES = {"tokenizer.model": b"pieces of words " * 100}


def quantized(name: str, *shape: int, seed: int = 0) -> Encoded:
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    encoded: Encoded = Component.named("quantizer", name).build().encode(weights)
    return encoded


def tensors() -> dict[str, Encoded | torch.Tensor]:
    return {
        "embedding.weight": quantized("int8", 64, 32, seed=1),
        "blocks.0.attention.q_proj.weight": quantized("int6", 128, 128, seed=2),
        "blocks.0.attention.o_proj.weight": quantized("int6", 128, 128, seed=3),
        "blocks.0.feed_forward.up_proj.weight": quantized("int5", 256, 128, seed=4),
        "blocks.0.attention.q_gain": torch.linspace(0, 1, 8).half(),
        "blocks.0.norm.weight": torch.ones(64).half(),
    }


def written(path: Path, codec: str = "zstd", **request: Any) -> tuple[Budget, ExportReport]:
    order = ExportRequest(path, "a = 1\n", request.pop("max_bytes", 99_999), request.pop("tokenizer", "embed"), FILES, "spm:1", **request)
    report = Component.named("exporter", "artifact", codec=codec).build().write(tensors(), order)
    return measure(tensors(), ROLES, report, order), report


# ---------------------------------------------------------------- sums
@pytest.mark.parametrize("codec", ["zstd", "lzma", "none", "auto"])
@pytest.mark.parametrize(
    "counting",
    [{}, {"code_bytes": 1234}, {"tokenizer": "beside"}, {"tokenizer": "beside", "count_tokenizer": False, "code_bytes": 77}],
)
def test_it_adds_up_to_what_was_counted(tmp_path: Path, codec: str, counting: dict[str, Any]) -> None:
    budget, report = written(tmp_path / "a", codec, **counting)
    tokenizer = budget.tokenizer_bytes if budget.tokenizer_counts else 0
    rows = sum(group.n_bytes for group in budget.groups) + budget.together_bytes
    assert rows + budget.header_bytes + tokenizer + budget.code_bytes == budget.total_bytes == report.n_bytes
    beside = sum(map(len, FILES.values())) if counting.get("count_tokenizer", True) and "tokenizer" in counting else 0
    assert budget.total_bytes == (tmp_path / "a").stat().st_size + beside + counting.get("code_bytes", 0)
    assert budget.header_bytes == (tmp_path / "a").stat().st_size - report.trials[0].n_bytes
    assert abs(budget.together_bytes) < 0.02 * budget.total_bytes  # frames and tables of a few small pieces
    assert sum(group.n_parameters for group in budget.groups) == 64 * 32 + 2 * 128 * 128 + 256 * 128 + 8 + 64


def test_rows_are_measured(tmp_path: Path) -> None:
    budget, report = written(tmp_path / "a")
    assert report.layout == "bytes"
    groups = {(group.name, group.stored_as): group for group in budget.groups}
    assert set(groups) == {("embedding", "int8"), ("attention", "int6"), ("feed_forward", "int5"), ("gains", "float16"), ("norms", "float16")}
    attention = [quantized("int6", 128, 128, seed=seed) for seed in (3, 2)]  # o_proj comes before q_proj
    raw = b"".join(
        [np.frombuffer(one.parts["scale"].numpy().tobytes(), np.uint8).reshape(-1, 2).T.tobytes() for one in attention]
        + [one.parts["values"].numpy().tobytes() for one in attention]
    )
    assert groups["attention", "int6"].n_bytes == len(zstandard.ZstdCompressor(level=report.trials[0].level).compress(raw))
    assert groups["attention", "int6"].bits == 8 * groups["attention", "int6"].n_bytes / (2 * 128 * 128)
    assert groups["gains", "float16"].entropy is None
    assert [group.n_bytes for group in budget.groups] == sorted((group.n_bytes for group in budget.groups), reverse=True)


def test_the_table_and_the_json(tmp_path: Path) -> None:
    budget, report = written(tmp_path / "a", tokenizer="beside", count_tokenizer=False, code_bytes=500)
    lines = list(budget.lines())
    assert lines[0].split() == ["tensors", "stored", "as", "parameters", "entropy", "bits", "bytes", "share"]
    said = {line.rsplit(None, 1)[0].strip(): int(line.rsplit(None, 1)[1].replace(",", "")) for line in lines[1 + len(budget.groups) :]}
    assert said == {
        "in one stream": budget.together_bytes,
        "header": budget.header_bytes,
        "tokenizer (beside, not counted)": 1600,
        "code": 500,
        "total": report.n_bytes,
        "left of 99,999": 99_999 - report.n_bytes,
    }
    assert len({len(line) for line in lines[1 + len(budget.groups) :]}) == 1
    read = json.loads(json.dumps(budget.as_dict()))
    assert read["groups"][0]["bits"] == budget.groups[0].bits
    assert read["total_bytes"] == report.n_bytes


# ---------------------------------------------------------------- groups
@pytest.mark.parametrize(
    ("name", "role", "group"),
    [
        ("blocks.10.attention.q_proj.weight", "matrix", "attention"),
        ("blocks.0.feed_forward.experts.3.up_proj.weight", "matrix", "feed_forward"),
        ("embedding.weight", "embedding", "embedding"),
        ("bigram.table.weight", "embedding", "bigram"),
        ("bigram.projection.weight", "matrix", "bigram"),
        ("bigram.scale", "gain", "gains"),
        ("head.weight", "head", "head"),
        ("blocks.1.norm.weight", "norm", "norms"),
        ("blocks.1.attention.q_proj.bias", "bias", "biases"),
        ("layers.0.1.mixer.weight", "", "mixer"),
        ("0.weight", "matrix", "0"),
        ("weights.0", "matrix", "weights"),
    ],
)
def test_groups_by_role_and_module(name: str, role: str, group: str) -> None:
    assert group_of(name, role) == group


# ---------------------------------------------------------------- entropy
def test_entropy_by_counting() -> None:
    values = torch.randint(-20, 12, (37, 53), generator=torch.Generator().manual_seed(0), dtype=torch.int8) // 3
    counts = Counter(values.flatten().tolist())
    expected = -sum(n / values.numel() * math.log2(n / values.numel()) for n in counts.values())
    assert entropy_bits(values) == pytest.approx(expected, abs=1e-12)
    assert entropy_bits(torch.zeros(100, dtype=torch.int8)) == 0
    assert entropy_bits(torch.empty(0, dtype=torch.int8)) == 0
    assert entropy_bits(torch.arange(256).to(torch.uint8)) == 8


def theory(clip: int, row: int) -> float:
    """Entropy of round(w / s), s = max|row| / clip, for standard normal w: each integer's chance, over the distribution of a row's maximum."""
    maxima = np.linspace(1.0, 7.0, 2001)
    weight = np.diff(np.array([math.erf(m / math.sqrt(2)) for m in maxima]) ** row)
    step = (maxima[1:] + maxima[:-1]) / 2 / clip
    kept = weight > 1e-6
    weight, step = weight[kept] / weight[kept].sum(), step[kept]
    tail = [float(weight @ [math.erf((k + 0.5) * s / math.sqrt(2)) for s in step]) for k in range(clip + 1)]  # chance of |q| <= k
    chances = [tail[0]] + [(high - low) / 2 for low, high in zip(tail, tail[1:], strict=False) for _ in range(2)]
    total = sum(chances)
    return -sum(p / total * math.log2(p / total) for p in chances if p > 0)


@pytest.mark.parametrize(
    ("name", "clip", "row", "published"),
    [("int5", 15, 512, 4.27), ("int5", 15, 1536, 4.14), ("int6", 31, 512, 5.31), ("int8", 127, 512, 7.34)],
)
def test_entropy_of_gaussian_rows(name: str, clip: int, row: int, published: float) -> None:
    encoded = quantized(name, 500_000 // row, row)
    found = entropy_bits(encoded.parts["values"])
    assert found == pytest.approx(theory(clip, row), abs=0.01)
    assert found == pytest.approx(published, abs=0.03)


@pytest.mark.parametrize("name", ["int5", "int6", "int8"])
def test_zstd_comes_close_to_the_entropy(name: str) -> None:
    """Within 1.3 %: nothing but the frequencies of single integers is there to be used."""
    values = quantized(name, 400, 512).parts["values"]
    for level in (1, 22):
        bits = 8 * len(compress("zstd", level, [values.numpy()], values.numel())) / values.numel()
        assert 1 < bits / entropy_bits(values) < 1.013
