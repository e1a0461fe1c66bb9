"""Pruning against numpy's quantiles and loops, fits against sizes that are known, and the sizes of the Parameter Golf record's shape."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from titanlm.errors import ArtifactError
from titanlm.exporters.encoding import Candidate, Encoded, ExportRequest
from titanlm.fitters.prune_bisect import PruneBisectConfig
from titanlm.fitters.prune_ladder import PruneLadderConfig
from titanlm.fitters.pruning import edge, prunable, prune_each, prune_rows
from titanlm.registry import Component


def gaussian(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


class Fitted:
    """A fitter that is given tensors and a size of tensors, and gives tensors."""

    def __init__(self, name: str, max_bytes: int, **settings: Any) -> None:
        self.fitter = Component.named("fitter", name, **settings).build(max_bytes=max_bytes)
        self.chosen: dict[str, float] = {}

    def fit(self, tensors: dict[str, Tensor], size: Callable[[dict[str, Tensor]], int]) -> dict[str, Tensor]:
        found = self.fitter.fit(Candidate(tensors), lambda candidate: size(candidate.tensors))
        self.chosen |= found.chosen
        return found.tensors  # type: ignore[no-any-return]


def nonzeros(tensors: dict[str, Tensor]) -> int:
    """A size that is known exactly: a byte for every weight that is not 0."""
    return sum(int(tensor.count_nonzero()) for tensor in tensors.values())


def zeros(tensor: Tensor) -> int:
    return int((tensor == 0).sum())


# ---------------------------------------------------------------- quantiles
@pytest.mark.parametrize("n", [1, 2, 3, 10, 31, 1000, 4097])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.12, 0.14, 0.16, 0.5, 0.999, 1.0])
def test_below_the_edge_is_below_the_interpolated_quantile(n: int, fraction: float) -> None:
    for numbers in (np.random.default_rng(n).random(n), np.random.default_rng(n).integers(0, 5, n).astype(float)):  # the second has ties
        expected = numbers < np.quantile(numbers, fraction) - 1e-12  # its interpolation may err in the last bit
        assert ((numbers < edge(numbers, fraction)) == expected).all()
        assert ((numbers < edge(numbers, fraction)) == (torch.from_numpy(numbers) < torch.quantile(torch.from_numpy(numbers), fraction) - 1e-12).numpy()).all()


def test_a_product_that_is_off_by_its_last_bit() -> None:
    assert 0.14 * 50 > 7
    assert edge(np.arange(51.0), 0.14) == 7.0


def test_more_elements_than_torch_quantile_takes() -> None:
    n = (1 << 24) + 1
    tensor = torch.arange(n, dtype=torch.float32).flip(0).reshape(1, n)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(tensor, 0.12)
    pruned = prune_each({"w": tensor}, ["w"], 0.125)["w"]
    assert zeros(pruned) == (n - 1) // 8  # the smallest is 0 already, and one of rank (n - 1) / 8 stays
    assert pruned[0, 0] == tensor[0, 0]


def test_equal_weights_stay_together() -> None:
    levels = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    assert zeros(prune_each({"w": levels}, ["w"], 0.4)["w"]) == 0  # the quantile is among the ones
    assert zeros(prune_each({"w": levels}, ["w"], 0.5)["w"]) == 5
    same = torch.full((20, 20), -0.5)
    assert torch.equal(prune_each({"w": same}, ["w"], 0.9)["w"], same)


# ---------------------------------------------------------------- what is pruned
def mixed() -> dict[str, Tensor]:
    return {
        "large": gaussian(40, 30), "other": gaussian(30, 50, seed=1, std=20), "edge": gaussian(20, 50, seed=2), "vector": gaussian(5000, seed=3),
        "cube": gaussian(20, 20, 20, seed=4), "counts": torch.arange(4000).reshape(40, 100), "half": gaussian(40, 40, seed=5).bfloat16(),
    }  # fmt: skip


def test_large_floating_matrices_only() -> None:
    tensors = mixed()
    names = prunable(tensors, 1000)
    assert names == ["large", "other", "half"]
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for prune in (prune_each, prune_rows):
        pruned = prune(tensors, names, 0.25)
        assert list(pruned) == list(tensors)
        assert all(pruned[name] is tensor for name, tensor in tensors.items() if name not in names)
        assert all(pruned[name].dtype == tensors[name].dtype and zeros(pruned[name]) > 0 for name in names)
        assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())
        again = prune(tensors, names, 0.25)
        assert all(torch.equal(pruned[name], again[name]) for name in names)


def test_each_matrix_by_its_own_quantile() -> None:
    tensors = mixed()
    pruned = prune_each(tensors, ["large", "other"], 0.12)
    for name in ("large", "other"):
        numbers = sorted(abs(float(w)) for w in tensors[name].flatten())
        position = 0.12 * (len(numbers) - 1)
        below, share = int(position), position - int(position)
        quantile = numbers[below] + share * (numbers[below + 1] - numbers[below])
        expected = [[0.0 if abs(w) < quantile else w for w in row] for row in tensors[name].tolist()]
        assert pruned[name].tolist() == expected
        assert zeros(pruned[name]) == pytest.approx(0.12 * len(numbers), abs=1)


def test_rows_together_by_their_largest_weight() -> None:
    tensors = {"a": gaussian(6, 8), "b": gaussian(5, 12, seed=1, std=30.0), "zero": torch.zeros(2, 4)}
    tensors["a"][2, 3] = 50.0  # an outlier makes the rest of its row small
    pruned = prune_rows(tensors, list(tensors), 0.3)
    ranked = sorted(abs(w) / max(max(map(abs, row)), 1e-30) for tensor in tensors.values() for row in tensor.tolist() for w in row)
    quantile = float(np.quantile(ranked, 0.3))
    for name, tensor in tensors.items():
        for row, after in zip(tensor.tolist(), pruned[name].tolist(), strict=True):
            assert after == [0.0 if abs(w) / max(max(map(abs, row)), 1e-30) < quantile else w for w in row]
    assert zeros(pruned["a"][2]) == 7  # all but the outlier
    assert sum(zeros(tensor) for tensor in pruned.values()) == pytest.approx(0.3 * len(ranked), abs=1)


@pytest.mark.parametrize("prune", [prune_each, prune_rows])
def test_the_quantizers_grid_does_not_move(prune: Callable[..., dict[str, Tensor]]) -> None:
    tensors = {"w": gaussian(64, 96)}
    int6 = Component.named("quantizer", "int6").build()
    pruned = prune(tensors, ["w"], 0.3)
    before, after = int6.encode(tensors["w"]), int6.encode(pruned["w"])
    assert torch.equal(before.parts["scale"], after.parts["scale"])
    kept = pruned["w"] != 0
    assert torch.equal(before.parts["values"][kept], after.parts["values"][kept])
    assert (after.parts["values"][~kept] == 0).all()


# ---------------------------------------------------------------- the ladder
def test_the_first_rung_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {"w": gaussian(100, 100), "b": torch.ones(50)}
    fitted = Fitted("prune_ladder", 10_050 - 1100, above_elements=1000, fractions=(0.10, 0.12, 0.14, 0.16)).fit(tensors, nonzeros)
    assert torch.equal(fitted["w"], prune_each(tensors, ["w"], 0.12)["w"])
    assert fitted["b"] is tensors["b"]
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"[0-9.]+ s\)", "s)", line) for line in lines] == [
        "prune_trial:0.1 artifact:9050 OVER (100 bytes over; trial 1 of at most 4, s)",
        "prune_trial:0.12 artifact:8850 VALID (100 bytes left; trial 2 of at most 4, s)",
    ]


def test_nothing_is_pruned_that_fits_unless_the_ladder_begins_above_zero() -> None:
    tensors = {"w": gaussian(100, 100)}
    assert torch.equal(Fitted("prune_ladder", 10_000, above_elements=9_999).fit(tensors, nonzeros)["w"], tensors["w"])
    recorded = Fitted("prune_ladder", 10_000, above_elements=9_999, fractions=(0.10, 0.12)).fit(tensors, nonzeros)
    assert zeros(recorded["w"]) == 1000
    assert zeros(Fitted("prune_ladder", 9_999, above_elements=9_999).fit(tensors, nonzeros)["w"]) == 1000


def test_no_rung_fits() -> None:
    tensors = {"w": gaussian(100, 100), "b": torch.ones(50)}
    message = (
        r"with 0.16 of the large matrices' weights at zero the artifact takes 8,450 bytes, 50 over export.max_bytes = 8,400; nothing was written\n"
        r"  10,000 of 10,050 weights can be pruned: .* fitter.above_elements = 9,999\nraise fitter.fractions, use fewer bits"
    )
    with pytest.raises(ArtifactError, match=message):
        Fitted("prune_ladder", 8400, above_elements=9_999).fit(tensors, nonzeros)
    for name in ("prune_ladder", "prune_bisect"):
        with pytest.raises(ArtifactError, match=r"0 of 10,050 weights .*65,536\nlower fitter.above_elements"):
            Fitted(name, 8400).fit(tensors, nonzeros)


@pytest.mark.parametrize("fractions", [(), (0.1, 0.1), (0.2, 0.1)])
def test_a_ladder_goes_up(fractions: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="fractions: at least one, each larger"):
        PruneLadderConfig(fractions=fractions)


# ---------------------------------------------------------------- bisection
@pytest.mark.parametrize("smallest", ["row", "tensor"])
@pytest.mark.parametrize("needed", [0.0005, 0.0613, 0.1, 0.1999])
def test_the_smallest_fraction_to_the_tolerance(smallest: str, needed: float, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {"w": gaussian(200, 100), "v": gaussian(300, 100, seed=1, std=9)}
    max_bytes = 50_000 - int(needed * 50_000)
    fitted = Fitted("prune_bisect", max_bytes, above_elements=10_000, smallest=smallest).fit(tensors, nonzeros)
    assert 0 <= max_bytes - nonzeros(fitted) <= 0.001 * 50_000 + 2
    trials = re.findall(r"prune_trial:(\S+) artifact:(\d+) (VALID|OVER)", capsys.readouterr().err)
    assert len(trials) <= 10
    kept = min(float(fraction) for fraction, _, verdict in trials if verdict == "VALID")
    refused = max(float(fraction) for fraction, _, verdict in trials if verdict == "OVER")
    assert kept - refused == pytest.approx(0.001)
    assert [int(size) for fraction, size, _ in trials if float(fraction) == kept] == [nonzeros(fitted)]


def test_bisection_prunes_nothing_that_fits() -> None:
    tensors = {"w": gaussian(100, 100)}
    trials: list[dict[str, Tensor]] = []

    def size(tensors: dict[str, Tensor]) -> int:
        trials.append(tensors)
        return nonzeros(tensors)

    fitted = Fitted("prune_bisect", 10_000, above_elements=1).fit(tensors, size)
    assert torch.equal(fitted["w"], tensors["w"])
    assert len(trials) == 1


def test_sizes_that_go_up_and_down() -> None:
    """Whatever the sizes do, what is returned was measured to fit, and nothing smaller that was tried did."""
    tensors = {"w": gaussian(100, 100)}
    for seed in range(20):
        noise = np.random.default_rng(seed).integers(-300, 300, 10_001)
        tried: dict[int, int] = {}

        def rugged(tensors: dict[str, Tensor], noise: np.ndarray = noise, tried: dict[int, int] = tried) -> int:
            n_zeros = zeros(tensors["w"])
            tried[n_zeros] = nonzeros(tensors) + (int(noise[n_zeros]) if 0 < n_zeros < 2000 else 0)
            return tried[n_zeros]

        fitted = Fitted("prune_bisect", 9_000, above_elements=1).fit(tensors, rugged)
        assert tried[zeros(fitted["w"])] <= 9_000
        assert zeros(fitted["w"]) == min(n_zeros for n_zeros, size in tried.items() if size <= 9_000)


def test_too_much_would_have_to_go() -> None:
    tensors = {"w": gaussian(100, 100)}
    with pytest.raises(ArtifactError, match=r"with 0.2 of .* takes 8,000 bytes, 1 over export.max_bytes = 7,999; .*\n.*\nraise fitter.max_fraction"):
        Fitted("prune_bisect", 7_999, above_elements=1).fit(tensors, nonzeros)
    assert PruneBisectConfig().max_fraction == 0.2


@pytest.mark.parametrize(("setting", "value"), [("max_fraction", 0.0), ("tolerance", 1e-320)])
def test_a_bisection_that_cannot_be(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{setting}: "):
        Component.named("fitter", "prune_bisect", **{setting: value})


# ---------------------------------------------------------------- the record's shape
def record_shape() -> dict[str, Tensor]:
    """The 27,092,057 weights of Parameter Golf's pull request 369 as Gaussians: matrices, tables, and 25,689 gains."""
    shapes = {"embedding.weight": (1024, 512), "bigram.table.weight": (4096, 128), "bigram.projection.weight": (512, 128)}
    for layer in range(11):
        shapes |= {f"blocks.{layer}.attention.{name}_proj.weight": (n, 512) for name, n in (("q", 512), ("k", 256), ("v", 256), ("o", 512))}
        shapes |= {f"blocks.{layer}.feed_forward.up_proj.weight": (1536, 512), f"blocks.{layer}.feed_forward.down_proj.weight": (512, 1536)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | {"gains": torch.randn(25_689, generator=generator)}


def as_recorded(tensors: dict[str, Tensor]) -> dict[str, Encoded | Tensor]:
    """int5 feed-forward, int8 embedding, int6 the other matrices, the rest fp16."""
    quantizers = {name: Component.named("quantizer", name).build() for name in ("int5", "int6", "int8")}

    def encoded(name: str, tensor: Tensor) -> Encoded | Tensor:
        if tensor.ndim == 1:
            return tensor.half()
        return quantizers["int5" if "feed_forward" in name else "int8" if name == "embedding.weight" else "int6"].encode(tensor)

    return {name: encoded(name, tensor) for name, tensor in tensors.items()}


def size_of(tensors: dict[str, Tensor], level: int) -> int:
    exporter = Component.named("exporter", "artifact", codec="zstd", level=level).build()
    return exporter.size_bytes(as_recorded(tensors), ExportRequest(Path("a"), "", None, "embed", {}, ""))


SIMULATED_MB = {0.0: 15.85, 0.10: 15.71, 0.12: 15.58, 0.14: 15.47}
"""Independent simulation of the record's scheme: fraction at zero → zstd-22, decimal MB."""


@pytest.mark.slow
def test_the_records_shape_has_the_simulated_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    tensors = record_shape()
    assert sum(tensor.numel() for tensor in tensors.values()) == 27_092_057
    names = prunable(tensors, 65_536)
    assert len(names) == 11 * 6 + 2  # bigram.projection has exactly 65,536
    sizes = {fraction: size_of(prune_each(tensors, names, fraction), 1) for fraction in SIMULATED_MB}
    assert {fraction: size / 1e6 for fraction, size in sizes.items()} == pytest.approx(SIMULATED_MB, rel=0.03)
    assert sorted(sizes.values(), reverse=True) == list(sizes.values())
    assert size_of(prune_each(tensors, names, 0.12), 22) / 1e6 == pytest.approx(SIMULATED_MB[0.12], rel=0.03)
    # The fitters on it.
    limit = sizes[0.12] + 1
    capsys.readouterr()
    fitted = Fitted("prune_ladder", limit).fit(tensors, lambda tensors: size_of(tensors, 1))
    assert re.findall(r"prune_trial:(\S+) \S+ (\w+)", capsys.readouterr().err) == [("0", "OVER"), ("0.1", "OVER"), ("0.12", "VALID")]
    assert zeros(fitted["blocks.3.attention.q_proj.weight"]) == pytest.approx(0.12 * 512 * 512, abs=1)
    finer = Fitted("prune_bisect", limit).fit(tensors, lambda tensors: size_of(tensors, 1))
    assert size_of(finer, 1) <= limit
