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
fp32 shard and are gathered as codes (``fsdp_pre_all_gather``). That spares
decoding, three bytes of device memory a number, and whoever handles parameters
would have to know the class.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titanlm.models.layers.product import Codes, codes_of, remade

_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # as it was called before torch 2.13


class Span(NamedTuple):
    """Of one parameter in a rank's share of a unit, [start, end)."""

    start: int
    end: int
    codes: Codes | None
    """None: it travels as it is."""


class CodeGather:
    """What FSDP2 is to gather the parameters of ``unit`` with, cast to bf16 before (``FSDPModule.set_custom_all_gather``)."""

    def __init__(self, unit: nn.Module) -> None:
        self.unit, self.spans = unit, list[Span]()

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> None:
        """``input_tensor`` (n,) bf16 of each rank, one after the other, into ``output_tensor`` (ranks · n,); done when the stream is, also if ``async_op``."""
        n = group.size()
        self.spans = self.spans or list(self._spans(n))
        assert self.spans[-1].end == len(input_tensor), "FSDP2 gathers other parameters than the unit has"
        parts = [input_tensor[span.start : span.end] for span in self.spans]
        largest = torch.stack([torch.linalg.vector_norm(part, torch.inf, dtype=torch.float32) for part in parts])
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        scaled = list(zip(self.spans, parts, largest.unbind(), strict=True))
        sent = [part.view(torch.uint8) if span.codes is None else span.codes.encode(part, most) for span, part, most in scaled]
        packed = torch.cat(sent)
        received = packed.new_empty(n * len(packed))
        _gather(received, packed, group)
        whole, came = output_tensor.view(n, -1), received.view(n, -1).split([len(part) for part in sent], 1)
        for (span, _, most), part in zip(scaled, came, strict=True):
            into = whole[:, span.start : span.end]
            if span.codes is None:
                into.copy_(part.contiguous().view(into.dtype))
            else:
                span.codes.decode(part, most, into)

    def sent_bytes(self, n_ranks: int) -> int:
        """Of a rank's share, but for a largest magnitude a parameter."""
        return sum((span.end - span.start) * (2 if span.codes is None else 1) for span in self._spans(n_ranks))

    def _spans(self, n_ranks: int) -> Iterator[Span]:
        """In FSDP2's order, that of the modules; it pads rows to a multiple of the ranks."""
        modules = list(self.unit.modules())
        others = {parameter for module in modules for part in remade(module) for parameter in part.parameters()}
        seen, start = set[nn.Parameter](), 0
        for module in modules:
            for name, parameter in module.named_parameters(recurse=False):
                if parameter in seen:
                    continue
                seen.add(parameter)
                rows = -(-parameter.shape[0] // n_ranks)
                end = start + rows * (parameter.numel() // parameter.shape[0])
                yield Span(start, end, None if parameter in others else codes_of(module, name))
                start = end
