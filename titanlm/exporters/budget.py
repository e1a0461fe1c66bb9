"""Where the bytes of an artifact go: by kind of tensor, and what else counts against the limit.

A payload is one compressed stream, which no codec takes apart by tensor. So
each group is compressed once more, alone, with the codec, level and layout
that were kept; the rows are measurements, and the difference to the one stream
is a row of its own. That costs as much time as one of the exporter's trials.

Beside it stands the order-0 entropy of the quantized integers, each tensor by
its own histogram: H = -Σ p log2 p bits a weight (Shannon 1948). A coder that
knows nothing but how often each integer occurs cannot be below it. A group far
above its entropy needs another codec; one at its entropy needs fewer bits or
more zeros.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from titanlm.exporters import compression, storage
from titanlm.exporters.encoding import Encoded, ExportReport, ExportRequest

__all__ = ["Budget", "Group", "entropy_bits", "group_of", "measure"]

_PLURAL = {"norm": "norms", "bias": "biases", "gain": "gains"}
_CHUNK = 1 << 24
"""Values counted at a time: numpy widens them to 64 bits for it."""


@dataclass(frozen=True)
class Group:
    """Tensors of one kind, stored in one way."""

    name: str
    stored_as: str
    """A quantizer or a dtype."""
    n_parameters: int
    n_bytes: int
    """Compressed alone, scales included."""
    entropy: float | None
    """Bits a weight of the quantized integers, order 0; None where nothing is quantized to a byte a weight."""

    @property
    def bits(self) -> float:
        """A weight, compressed."""
        return 8 * self.n_bytes / self.n_parameters if self.n_parameters else 0.0


@dataclass(frozen=True)
class Budget:
    """Everything that counts. Groups, ``together_bytes``, tokenizer (if it counts), header and code add up to ``total_bytes``."""

    groups: tuple[Group, ...]
    """The largest first."""
    together_bytes: int
    """By which the one stream is larger (smaller: below 0) than its pieces compressed alone."""
    header_bytes: int
    """Config and tables, compressed by themselves."""
    tokenizer: str
    """"embed" | "beside"."""
    tokenizer_bytes: int
    """Compressed if embedded."""
    tokenizer_counts: bool
    code_bytes: int
    total_bytes: int
    max_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        """Of numbers and texts, for JSON."""
        groups = [dataclasses.asdict(group) | {"bits": group.bits} for group in self.groups]
        return dataclasses.asdict(self) | {"groups": groups}

    def lines(self) -> Iterator[str]:
        """The table, for people."""
        yield f"{'tensors':<18} {'stored as':<10} {'parameters':>15} {'entropy':>8} {'bits':>8} {'bytes':>15} {'share':>7}"
        for group in self.groups:
            entropy = "" if group.entropy is None else f"{group.entropy:.3f}"
            yield (
                f"  {group.name:<16} {group.stored_as:<10} {group.n_parameters:>15,} {entropy:>8} {group.bits:>8.3f} "
                f"{group.n_bytes:>15,} {group.n_bytes / max(self.total_bytes, 1):>7.1%}"
            )
        counted = "" if self.tokenizer_counts else ", not counted"
        rows = [("in one stream", self.together_bytes), ("header", self.header_bytes), (f"tokenizer ({self.tokenizer}{counted})", self.tokenizer_bytes)]
        rows += [("code", self.code_bytes), ("total", self.total_bytes)]
        if self.max_bytes is not None:
            rows.append((f"left of {self.max_bytes:,}", self.max_bytes - self.total_bytes))
        for name, n_bytes in rows:
            yield f"  {name:<61} {n_bytes:>15,}"


def measure(tensors: Mapping[str, Encoded | Tensor], roles: Mapping[str, str], report: ExportReport, request: ExportRequest) -> Budget:
    """The budget of a written artifact; ``report.trials`` says how it was compressed and must not be empty.

    ``roles`` are the model's: name → embedding | head | matrix | norm | bias | gain.
    """
    kept = report.trials[0]

    def alone(pieces: list[Any]) -> int:
        return len(compression.compress(kept.codec, kept.level, pieces, sum(map(len, pieces))))

    members: dict[tuple[str, str], list[str]] = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        stored_as = tensor.quantizer if isinstance(tensor, Encoded) else str(tensor.dtype).removeprefix("torch.")
        members.setdefault((group_of(name, roles.get(name, "")), stored_as), []).append(name)
    groups = [
        Group(
            name,
            stored_as,
            sum(math.prod(tensors[one].shape) for one in names),
            alone(_stored([tensors[one] for one in names], kept.layout)),
            _mean_entropy([tensors[one] for one in names]),
        )
        for (name, stored_as), names in members.items()
    ]
    files = [content for _, content in sorted(request.tokenizer_files.items())]
    embedded = request.tokenizer == "embed"
    tokenizer_bytes = alone(files) if embedded and files else sum(map(len, files))
    beside = 0 if embedded or not request.count_tokenizer else tokenizer_bytes
    return Budget(
        groups=tuple(sorted(groups, key=lambda group: (-group.n_bytes, group.name, group.stored_as))),
        together_bytes=kept.n_bytes - sum(group.n_bytes for group in groups) - embedded * tokenizer_bytes,
        header_bytes=report.n_bytes - kept.n_bytes - beside - request.code_bytes,
        tokenizer=request.tokenizer,
        tokenizer_bytes=tokenizer_bytes,
        tokenizer_counts=embedded or request.count_tokenizer,
        code_bytes=request.code_bytes,
        total_bytes=report.n_bytes,
        max_bytes=request.max_bytes,
    )


def group_of(name: str, role: str) -> str:
    """What a parameter is counted under: gains, norms and biases by role, the rest by the module that it belongs to.

    ``blocks.3.attention.q_proj.weight`` is attention's, ``bigram.table.weight`` bigram's.
    """
    parts = name.split(".")
    while len(parts) > 2 and (parts[0].isdigit() or parts[1].isdigit()):  # a list of modules, and which
        parts = parts[1:]
    return _PLURAL.get(role, parts[0])


def entropy_bits(values: Tensor) -> float:
    """Order-0 entropy of 8-bit integers of any shape, in bits an element; 0 for none."""
    raw = values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    counts = np.zeros(256, np.int64)
    for start in range(0, len(raw), _CHUNK):
        counts += np.bincount(raw[start : start + _CHUNK], minlength=256)
    shares = counts[counts > 0] / max(len(raw), 1)
    return float(-(shares * np.log2(shares)).sum()) + 0.0  # not -0.0


def _mean_entropy(tensors: list[Encoded | Tensor]) -> float | None:
    """A weight; None unless each tensor has one part with a byte-wide integer a weight."""
    bits, n = 0.0, 0
    for tensor in tensors:
        parts = tensor.parts.values() if isinstance(tensor, Encoded) else ()
        integers = [part for part in parts if part.dtype in (torch.int8, torch.uint8) and part.numel() == math.prod(tensor.shape)]
        if len(integers) != 1:
            return None
        bits += entropy_bits(integers[0]) * integers[0].numel()
        n += integers[0].numel()
    return bits / n if n else None


def _stored(tensors: list[Encoded | Tensor], layout: str) -> list[np.ndarray]:
    """The bytes of their parts, by name of the part and then by tensor, as the artifact has them."""
    found = []
    for index, tensor in enumerate(tensors):
        parts, bits = (tensor.parts, tensor.bits) if isinstance(tensor, Encoded) else ({"tensor": tensor}, {})
        found += [(name, index, part, None if bits.get(name) == 8 * part.itemsize else bits.get(name)) for name, part in parts.items()]
    return [storage.to_bytes(part, used, layout) for _, _, part, used in sorted(found, key=lambda one: one[:2])]
