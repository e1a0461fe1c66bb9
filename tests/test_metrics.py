"""Throughput against a clock that the test turns, peaks by name, and the two measures of quality."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

from titanlm.metrics import StepMeter, bits_per_byte, peak_flops, peak_flops_of, peak_memory_gib, perplexity

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass only when told to; quarters are exact in binary."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def meter(clock: Clock, peak: float | None = None) -> StepMeter:
    return StepMeter(flops_per_token=1e9, peak_flops=peak, device=CPU, clock=clock)


def test_rates_are_of_the_interval() -> None:
    clock = Clock()
    made = meter(clock, peak=1e13)
    clock.now += 50  # building and compiling come before the start
    made.start()
    for seconds, stall in ((0.5, 0.25), (0.25, 0.0), (0.25, 0.0)):
        clock.now += seconds
        made.step(1000, stall)
    clock.now += 1.0  # waiting for the device in a log step
    report = made.report(remaining_flops=6 * 1000 * 1e9)
    assert report.pop("memory_gib") > 0
    assert report == {
        "step_s": pytest.approx(2 / 3),
        "tokens_per_s": 1500.0,
        "stall": 0.125,
        "mfu": pytest.approx(1e9 * 1500 / 1e13),
        "eta_s": pytest.approx(4.0),
        "elapsed_s": 2.0,
    }
    clock.now += 0.25
    made.step(1000, 0.0)
    report = made.report()
    assert (report["tokens_per_s"], report["stall"], report["elapsed_s"]) == (4000.0, 0.0, 2.25)
    assert "eta_s" not in report


def test_steps_before_and_after_a_change_of_length_count_with_their_own_flops() -> None:
    clock = Clock()
    made = meter(clock, peak=1e13)
    made.start()
    clock.now += 2
    made.step(1000, 0.0)
    made.flops_per_token = 3e9
    made.step(500, 0.0)
    assert made.report()["mfu"] == pytest.approx((1000 * 1e9 + 500 * 3e9) / 2 / 1e13)
    clock.now += 1
    made.step(10, 0.0)
    assert made.report()["mfu"] == pytest.approx(10 * 3e9 / 1e13)


def test_pauses_do_not_count_and_may_nest() -> None:
    clock = Clock()
    made = meter(clock)
    made.start()
    clock.now += 1
    made.step(100, 0.0)
    with made.pause():
        clock.now += 10
        with made.pause():
            clock.now += 10
        clock.now += 10
        assert made.elapsed_s == 1.0
    clock.now += 1
    made.step(100, 0.0)
    with contextlib.suppress(RuntimeError), made.pause():
        clock.now += 10
        raise RuntimeError
    report = made.report()
    assert (report["elapsed_s"], report["tokens_per_s"], report["step_s"]) == (2.0, 100.0, 1.0)


def test_pause_before_the_start_counts_nothing() -> None:
    clock = Clock()
    made = meter(clock)
    with made.pause():
        clock.now += 5
    clock.now += 5
    made.start()
    clock.now += 1
    made.step(1, 0.0)
    assert made.elapsed_s == 1.0


def test_elapsed_goes_on_after_a_resume() -> None:
    clock = Clock()
    made = meter(clock)
    made.elapsed_s = 100.0
    made.start()
    clock.now += 2
    made.step(10, 0.0)
    assert made.elapsed_s == 102.0
    assert made.report()["tokens_per_s"] == 5.0


def test_no_mfu_without_a_peak_and_no_rates_without_a_step() -> None:
    clock = Clock()
    made = meter(clock)
    made.start()
    clock.now += 1
    made.step(1, 5.0)
    report = made.report()
    assert "mfu" not in report
    assert report["stall"] == 1.0  # a stall that began before the interval is cut
    clock.now += 1
    assert made.report(remaining_flops=3e9).keys() == {"elapsed_s", "memory_gib"}


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989), ("NVIDIA H20", 148), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500), ("NVIDIA L40S", 362), ("NVIDIA L40", 181), ("NVIDIA L4", 121), ("NVIDIA A10", 125), ("NVIDIA A40", 150),
        ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10G", None), ("Tesla V100-SXM2-16GB", None), ("NVIDIA GeForce GTX 1080", None), ("", None),
    ],
)  # fmt: skip
def test_peaks_by_name(name: str, teraflops: float | None) -> None:
    peak = peak_flops_of(name)
    assert (None if peak is None else peak / 1e12) == teraflops


def test_cpu_has_no_peak() -> None:
    assert peak_flops(CPU) is None


def test_memory_grows_with_what_is_held() -> None:
    before = peak_memory_gib(CPU)
    held = torch.ones(1 << 28, dtype=torch.uint8) if before < 16 else None
    assert 0.01 < before <= peak_memory_gib(CPU) < 1024
    del held


def test_bits_per_byte_and_perplexity() -> None:
    # 8 equally likely symbols a byte are 3 bits.
    assert bits_per_byte(100 * math.log(8), 100) == pytest.approx(3.0, rel=1e-15)
    assert perplexity(math.log(64)) == pytest.approx(64.0, rel=1e-14)
    assert perplexity(0.0) == 1.0
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))


@pytest.mark.parametrize(("loss", "shown"), [(12.26, 210_732), (10.02, 22_444), (9.75, 17_180), (9.69, 16_152)])
def test_perplexity_is_the_exponential_of_the_loss_however_high(loss: float, shown: int) -> None:
    """Rows of a published log (Yxanul 197M, steps 100, 500, 1000 and 1400): losses to two digits, perplexities to whole numbers."""
    assert perplexity(loss - 0.005) < shown < perplexity(loss + 0.005)
    assert perplexity(math.log(shown)) == pytest.approx(shown, rel=1e-13), "not capped at a loss of 10"
