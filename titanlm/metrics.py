"""How fast a run goes and how good it is; nothing here waits for a device.

Speed is measured on the host's clock between reports. CUDA work runs behind
the host, so a caller waits for the device (reading the loss does) before
``report`` and before entering ``pause``; then the interval is exact.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GIB = 1 << 30

PEAK_FLOPS = {
    r"GB200": 2500e12,
    r"B200": 2250e12,
    r"GH200|H200(?! NVL)": 989e12,
    r"H200 NVL|H100 NVL": 835e12,
    r"H100 PCIe": 756e12,
    r"H100": 989e12,
    r"H20": 148e12,
    r"A100|A800": 312e12,
    r"A30": 165e12,
    r"A40": 150e12,
    r"A10": 125e12,
    r"L40S": 362e12,
    r"L40": 181e12,
    r"L4": 121e12,
    r"RTX A6000": 155e12,
    r"RTX 5090": 209e12,
    r"RTX 4090(?! D)": 165e12,
    r"RTX 3090(?! Ti)": 71e12,
}
"""Dense bf16 FLOP/s with fp32 accumulation, from the makers' data sheets, by device name; the first match counts."""

MEMORY_GIB = {
    r"GH200|H200(?! NVL)": 139.7,
    r"H100(?! NVL)|A100.* 80GB|A100.*-80GB": 79.1,
    r"A100.* 40GB|A100.*-40GB": 39.3,
    r"RTX 5090": 31.3,
    r"RTX 4090(?! D)": 23.6,
}
"""GiB that torch finds in a device, by its name, rounded down: some less than is printed on it. The first match counts."""


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a device, FLOP/s; None for CPUs and GPUs that are not in the table."""
    if device.type != "cuda":
        return None
    import torch

    return peak_flops_of(torch.cuda.get_device_name(device))


def peak_flops_of(device_name: str) -> float | None:
    """The table by name, as ``torch.cuda.get_device_name`` gives it. Laptop chips and slices of a GPU are others."""
    return _by_name(PEAK_FLOPS, device_name)


def memory_of(device_name: str) -> int | None:
    """Bytes that a device has, by its name as torch gives it; None where the table does not know it."""
    found = _by_name(MEMORY_GIB, device_name)
    return None if found is None else int(found * GIB)


def _by_name(table: dict[str, float], device_name: str) -> float | None:
    if re.search(r"\b(Laptop|Max-Q|MIG)\b", device_name):
        return None
    return next((value for pattern, value in table.items() if re.search(rf"\b(?:{pattern})\b", device_name)), None)


def bits_per_byte(nll_sum: float, n_bytes: int) -> float:
    """``nll_sum`` nats over text of ``n_bytes`` UTF-8 bytes, in bits a byte."""
    return nll_sum / (math.log(2) * n_bytes)


def perplexity(nll_mean: float) -> float:
    """exp of the mean negative log-likelihood of a token (nats); infinite where a float cannot hold it."""
    try:
        return math.exp(nll_mean)
    except OverflowError:
        return math.inf


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: by tensors on a CUDA device, by the whole process on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / GIB
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            # getrusage would count the parent's memory if this process was forked from a large one.
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024 / GIB
    except (OSError, StopIteration, ValueError):
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / GIB


class StepMeter:
    """Times steps, leaving out what runs inside ``pause`` (validation, saving).

    ``flops_per_token`` is of forward and backward, and may be set anew where
    rows change their length; ``peak_flops`` of all devices that the counted
    tokens are trained on, None if unknown.
    """

    def __init__(self, flops_per_token: float, peak_flops: float | None, device: torch.device, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.flops_per_token, self.peak_flops, self.device = flops_per_token, peak_flops, device
        self.elapsed_s = 0.0
        """Training time up to the last step, pause or report; set it to what earlier starts of the run took."""
        self._clock = clock
        self._mark: float | None = None
        self._pauses = 0
        self._reset()

    def _reset(self) -> None:
        self._interval_s = self._stall_s = self._flops = 0.0
        self._steps = self._tokens = 0

    def _tick(self) -> None:
        if self._mark is not None and not self._pauses:
            now = self._clock()
            self.elapsed_s += now - self._mark
            self._interval_s += now - self._mark
            self._mark = now

    def start(self) -> None:
        """Time counts from here on."""
        self._mark = self._clock()

    def forget(self) -> None:
        """What was counted since the last report has not been."""
        self._reset()

    def step(self, tokens: int, stall_s: float) -> None:
        """A step over ``tokens`` positions is done; the loader kept it waiting for ``stall_s``."""
        self._tick()
        self._steps += 1
        self._tokens += tokens
        self._flops += tokens * self.flops_per_token
        self._stall_s += stall_s

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside does not count; pauses may nest."""
        self._tick()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if self._mark is not None and not self._pauses:
                self._mark = self._clock()

    def report(self, remaining_flops: float | None = None) -> dict[str, float]:
        """Metrics of the interval since the last report, which ends here.

        ``step_s``, ``tokens_per_s``, ``stall`` (share of the time, 0 to 1),
        ``mfu`` (0 to 1; only with a known peak), ``eta_s`` (of
        ``remaining_flops`` at the rate of the interval), ``elapsed_s``,
        ``memory_gib`` and, on a CUDA device, ``reserved_gib``. An interval
        without a step has only those from ``elapsed_s`` on.
        """
        self._tick()
        report: dict[str, float] = {}
        if self._steps and self._interval_s > 0:
            report["step_s"] = self._interval_s / self._steps
            report["tokens_per_s"] = self._tokens / self._interval_s
            report["stall"] = min(1.0, self._stall_s / self._interval_s)
            if self.peak_flops:
                report["mfu"] = self._flops / self._interval_s / self.peak_flops
            if remaining_flops is not None and self._flops:
                report["eta_s"] = remaining_flops / self._flops * self._interval_s
        report["elapsed_s"] = self.elapsed_s
        report["memory_gib"] = peak_memory_gib(self.device)
        if self.device.type == "cuda":
            import torch

            report["reserved_gib"] = torch.cuda.max_memory_reserved(self.device) / GIB
        self._reset()
        return report
