"""Whole tensors into parameters of which a rank holds a part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.overrides import TorchFunctionMode


class SlicedCopies(TorchFunctionMode):
    """Inside, ``parameter.copy_(whole)`` takes this rank's part of ``whole`` where the parameter is sharded.

    So a model's ``init_weights`` knows nothing of sharding: it draws every
    parameter whole, from seed and name, on every rank.
    """

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if function is Tensor.copy_ and isinstance(args[0], DTensor) and not isinstance(args[1], DTensor):
            target, whole = args[0], args[1].expand(args[0].shape).to(args[0].dtype)
            # No rank sends anything: each has the same tensor and takes its own part.
            part = distribute_tensor(whole.to(target.to_local().device), target.device_mesh, target.placements, src_data_rank=None)
            return target.copy_(part)
        return function(*args, **(kwargs or {}))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on the CPU; collective where it is sharded."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().to("cpu", copy=True)
