"""Weights gathered as the codes that products make of them: one byte a number on the wire instead of two.

With one scale a matrix, a product in FP8 multiplies by codes that are the same
on every rank, so codes are all it needs to be sent. A unit's shards are encoded
by the largest magnitude of the whole matrix, which ranks agree on first,
gathered, and decoded to bf16, of which the product makes the codes that were
sent (``Codes``). So losses are those of gathering in bf16 to the bit, and
modules, parameters, optimizers and checkpoints do not know of it. Norms,
matrices that are multiplied in bf16 and those of which a module makes another
one first, whose scale is not their own, travel as they are.

The alternative, torchao's, is parameters of a class of its own, which hold an
fp32 shard and are gathered as codes (``fsdp_pre_all_gather``), with scales agreed
on once a step. That spares decoding, three bytes of device memory a number, and
all but one of the agreements; but whoever handles parameters would have to know
the class, and whoever changes them, that scales are to be found anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titanlm.models.layers.product import Codes, codes_of, remade

ALIGNMENT = 16
"""Bytes, of each rank's part of what is received."""
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # as it was called before torch 2.13


class Span(NamedTuple):
    """Of one parameter in a rank's share of a unit, [start, end)."""

    name: str
    parameter: nn.Parameter
    start: int
    end: int
    codes: Codes | None
    """None: it travels as it is."""


class CodeGather:
    """What FSDP2 is to gather the parameters of ``unit`` with, cast to bf16 before (``FSDPModule.set_custom_all_gather``)."""

    def __init__(self, unit: nn.Module) -> None:
        self.unit, self.coded, self.plain = unit, list[Span](), list[Span]()

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> Any:
        """``input_tensor`` (n,) bf16 of each rank, one after the other, into ``output_tensor`` (ranks · n,).

        Done when the stream is, also if ``async_op``, but where nothing travels
        as codes. Raises RuntimeError, at the first call, if FSDP2 sends other
        things than the unit's parameters in the expected order.
        """
        if not self.coded and not self.plain:
            spans = list(self.spans(group.size()))
            _require_these(spans, input_tensor)
            self.coded, self.plain = [span for span in spans if span.codes], [span for span in spans if not span.codes]
        if not self.coded:
            return _gather(output_tensor, input_tensor, group, async_op)
        largest = torch.stack([torch.linalg.vector_norm(input_tensor[span.start : span.end], torch.inf, dtype=torch.float32) for span in self.coded])
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        scaled = list(zip(self.coded, largest.unbind(), strict=True))
        sent = [span.codes.encode(input_tensor[span.start : span.end], most) for span, most in scaled if span.codes]
        sent += [input_tensor[span.start : span.end].view(torch.uint8) for span in self.plain]
        sizes = [len(part) for part in sent]
        packed = torch.cat([*sent, input_tensor.new_empty(-sum(sizes) % ALIGNMENT, dtype=torch.uint8)])
        received = packed.new_empty(group.size() * len(packed))
        _gather(received, packed, group)
        # Read before it is written: ``input_tensor`` is a part of ``output_tensor``.
        whole = output_tensor.view(group.size(), -1)
        came = received.view(group.size(), -1)[:, : sum(sizes)].split(sizes, 1)
        for (span, most), part in zip(scaled, came[: len(scaled)], strict=True):
            if span.codes:
                span.codes.decode(part, most, whole[:, span.start : span.end])
        for span, part in zip(self.plain, came[len(scaled) :], strict=True):
            whole[:, span.start : span.end].view(torch.uint8).copy_(part)
        return None

    def sent_bytes(self, n_ranks: int) -> int:
        """Of a rank's share, but for a largest magnitude a matrix."""
        return sum((span.end - span.start) * (1 if span.codes else 2) for span in self.spans(n_ranks))

    def spans(self, n_ranks: int) -> Iterator[Span]:
        """In FSDP2's order, a module's own parameters after those of its parts; it pads rows to a multiple of the ranks."""
        modules = list(_parts_first(self.unit, set()))
        others = {parameter for module in modules for part in remade(module) for parameter in part.parameters()}
        holders: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module in modules:
            for name, parameter in module.named_parameters(recurse=False):
                holders.setdefault(parameter, []).append((module, name))
        names = {parameter: name for name, parameter in self.unit.named_parameters()}
        start = 0
        for parameter, held in holders.items():
            end = start + -(-parameter.shape[0] // n_ranks) * (parameter.numel() // parameter.shape[0])
            codes = {codes_of(module, name) for module, name in held}
            yield Span(names[parameter], parameter, start, end, codes.pop() if len(codes) == 1 and parameter not in others else None)
            start = end


def _parts_first(module: nn.Module, seen: set[nn.Module]) -> Iterator[nn.Module]:
    seen.add(module)
    for part in module.children():
        if part not in seen:
            yield from _parts_first(part, seen)
    yield module


def _require_these(spans: list[Span], sent: Tensor) -> None:
    """That they are what is sent, bit for bit: FSDP2 promises no order."""
    found = sent.split([span.end - span.start for span in spans]) if spans[-1].end == len(sent) and sent.dtype == torch.bfloat16 else ()
    for span, part in zip(spans, found, strict=False):
        own: Any = span.parameter.detach()
        own = (own.to_local() if hasattr(own, "to_local") else own).to(sent.device, sent.dtype).flatten()
        if not torch.equal(part[: len(own)].view(torch.int16), own.view(torch.int16)):
            break
    else:
        if found:
            return
    raise RuntimeError('parallel.gather_dtype: this torch gathers parameters in an order that "float8" does not know; set "compute"')
