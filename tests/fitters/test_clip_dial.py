"""The dial against sizes that are known exactly, against the entropy that theory gives, and in a real export."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from titanlm.errors import ArtifactError
from titanlm.exporters.budget import entropy_bits
from titanlm.exporters.encoding import Candidate, ExportRequest
from titanlm.fitters.clip_dial import ClipDialConfig
from titanlm.registry import Component

N = 100_000


def sdclip(k: float, **settings: Any) -> Component:
    return Component.named("quantizer", "sdclip", k=k, **settings)


def candidate(*quantizers: Component) -> Candidate:
    return Candidate({"w": torch.zeros(N)}, quantizers or (sdclip(12.0),))


def by_entropy(candidate: Candidate) -> int:
    """b - log2 k + a constant, a weight: what theory says of fine steps."""
    return round(N / 8 * (8 - math.log2(candidate.quantizers[0].config.k)))


def fit(max_bytes: int, of: Candidate, size_bytes: Callable[[Candidate], int] = by_entropy, **settings: Any) -> Candidate:
    fitted: Candidate = Component.named("fitter", "clip_dial", **settings).build(max_bytes=max_bytes).fit(of, size_bytes)
    return fitted


def trials(text: str) -> list[tuple[float, int, str]]:
    return [(float(factor), int(size), verdict) for factor, size, verdict in re.findall(r"^clip_trial:(\S+) artifact:(\d+) (\w+)", text, re.MULTILINE)]


@pytest.mark.parametrize("needed", [0.55, 0.8, 0.999, 1.001, 1.3, 1.99])
def test_the_limit_is_used_up(needed: float, capsys: pytest.CaptureFixture[str]) -> None:
    limit = round(N / 8 * (8 - math.log2(12 * needed)))
    fitted = fit(limit, candidate())
    assert 0 <= limit - by_entropy(fitted) <= 0.0005 * limit
    assert fitted.quantizers[0].config.k == pytest.approx(12 * needed, rel=0.005)
    assert fitted.chosen["clip_factor"] == pytest.approx(needed, rel=0.005)
    assert len(trials(capsys.readouterr().err)) <= 4  # the line is straight


@pytest.mark.parametrize("share", [0.7, 0.25, 0.05])
@pytest.mark.parametrize("needed", [0.55, 1.1, 1.9])
def test_most_of_the_model_may_be_left_untouched(share: float, needed: float, capsys: pytest.CaptureFixture[str]) -> None:
    """The line falls by less than a bit a weight, by how much two trials tell."""

    def partly(candidate: Candidate) -> int:
        return round((1 - share) * N + share * by_entropy(candidate))

    limit = partly(candidate(sdclip(12 * needed)))
    fitted = fit(limit, candidate(), partly)
    assert 0 <= limit - partly(fitted) <= 0.0005 * limit
    assert len(trials(capsys.readouterr().err)) <= 4


def test_what_was_kept_was_measured_and_is_the_finest_that_fitted(capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes that bend, jump and fall back: no line meets them."""
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randint(-400, 400, (4096,), generator=generator).tolist()

        def rugged(candidate: Candidate, noise: list[int] = noise) -> int:
            k = candidate.quantizers[0].config.k
            return round(N / 8 * (8 - 0.4 * math.log2(k) ** 1.2)) + noise[int(k * 100) % 4096]

        limit = round(N / 8 * (8 - 0.4 * math.log2(12 * (0.6 + seed / 25)) ** 1.2))
        fitted = fit(limit, candidate(), rugged, trials=12)
        assert rugged(fitted) <= limit
        tried = trials(capsys.readouterr().err)
        assert fitted.chosen["clip_factor"] == pytest.approx(min(factor for factor, _, verdict in tried if verdict == "VALID"), rel=1e-4)
        assert len(tried) <= 12


def test_the_ends_of_the_dial(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(2 * N, candidate(), finest=0.75).chosen["clip_factor"] == 0.75  # smaller than it has to be even so
    untouched = fit(2 * N, candidate(), finest=1.0)
    assert untouched.quantizers == (sdclip(12.0),)
    assert [factor for factor, _, _ in trials(capsys.readouterr().err)] == [1.0, 0.75, 1.0]
    with pytest.raises(
        ArtifactError,
        match=r"with steps 2 times as wide the artifact takes 42,688 bytes \(55,188 as it was\), 12,688 over .* 30,000; .*\nraise fitter.coarsest",
    ):
        fit(30_000, candidate())
    with pytest.raises(ArtifactError, match=r"with steps 1 times as wide .*\nraise fitter.trials"):
        fit(30_000, candidate(), trials=1)
    capsys.readouterr()
    with pytest.raises(ArtifactError, match=r"with steps 2 times as wide .* 30,001 bytes \(30,001 as it was\)"):
        fit(30_000, candidate(), lambda _: 30_001)  # the dial turns nothing: the end is tried at once
    assert [factor for factor, _, _ in trials(capsys.readouterr().err)][2:] == [2.0]


def test_all_that_can_be_turned_is_turned_by_one_factor() -> None:
    int8 = Component.named("quantizer", "int8")
    before = candidate(sdclip(12.0), int8, sdclip(20.0, bits=8))
    fitted = fit(52_000, before)
    factor = fitted.chosen["clip_factor"]
    assert factor != 1
    assert fitted.quantizers == (sdclip(12.0 * factor), int8, sdclip(20.0 * factor, bits=8))
    assert fitted.tensors is before.tensors
    with pytest.raises(ArtifactError, match="'clip_dial' turns quantizers such as 'sdclip', and the config has none"):
        fit(52_000, candidate(int8))


@pytest.mark.parametrize(("finest", "coarsest"), [(1.0, 1.0), (1.1, 2.0), (0.5, 0.9)])
def test_a_dial_that_cannot_turn(finest: float, coarsest: float) -> None:
    with pytest.raises(ValueError, match="finest: the factor goes from finest over 1 to coarsest"):
        ClipDialConfig(finest=finest, coarsest=coarsest)


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_below_the_least_k_finer_steps_do_not_pay(bits: int) -> None:
    """The squared error of normal weights is smallest there, to the flatness of a minimum."""
    weights = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))

    def error(k: float) -> float:
        quantizer = sdclip(k, bits=bits).build()
        return float((quantizer.decode(quantizer.encode(weights)) - weights).square().mean())

    least = sdclip(1.0, bits=bits).config.least_k
    assert error(least) < 1.02 * min(error(least * factor) for factor in (0.9, 0.94, 0.97, 1.03, 1.06, 1.1))
    assert error(0.8 * least) > 1.2 * error(least)


@pytest.mark.parametrize("beyond", [{"coarsest": math.inf}, {"coarsest": 1e300}, {"finest": 1e-300}])
def test_a_dial_ends_before_numbers_do(beyond: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="coarsest: at most 1024, and finest at least 1/1024"):
        ClipDialConfig(**beyond)


def test_real_sizes_of_gaussian_weights() -> None:
    """Each factor of two on k takes a bit a weight, and the artifact comes to the limit by it."""
    weights: dict[str, Tensor] = {"w": torch.randn(1024, 512, generator=torch.Generator().manual_seed(0))}
    exporter = Component.named("exporter", "artifact", level=1).build()

    def encoded(candidate: Candidate) -> dict[str, Any]:
        return {"w": candidate.quantizers[0].build().encode(candidate.tensors["w"])}

    def size_bytes(candidate: Candidate) -> int:
        return int(exporter.size_bytes(encoded(candidate), ExportRequest(Path("a"), "", None, "embed", {}, "")))

    before = Candidate(weights, (sdclip(12.85),))
    limit = size_bytes(before) - round(0.25 * 1024 * 512 / 8)  # a quarter of a bit a weight less
    fitted = fit(limit, before, size_bytes)
    assert 0 <= limit - size_bytes(fitted) <= 0.0005 * limit
    assert math.log2(fitted.chosen["clip_factor"]) == pytest.approx(0.25, abs=0.06)
    bits = [entropy_bits(encoded(one)["w"].parts["values"]) for one in (before, fitted)]
    assert bits[0] - bits[1] == pytest.approx(math.log2(fitted.chosen["clip_factor"]), abs=0.01)
