"""Every rank holds the whole model; gradients are added up while the backward pass runs (torch's DistributedDataParallel)."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from titanlm.distributed.strategy import Strategy


class Replicate(Strategy):
    """`replicate`"""

    def wrap(self, module: nn.Module) -> DistributedDataParallel:
        # By default torch splits compiled graphs at the borders of gradient buckets, which FlexAttention's and checkpointing's operators do not survive.
        torch._dynamo.config.optimize_ddp = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames broadcast_buffers, 2.11 knows no other name
            self.module = DistributedDataParallel(
                module,
                init_sync=False,  # weights are drawn by seed and name, and so equal
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        self.module.register_comm_hook(None, _sum)
        return self.module

    def synchronise(self, on: bool) -> None:
        self.module.require_backward_grad_sync = on  # what `no_sync()` sets


def _sum(state, bucket):  # type: ignore[no-untyped-def] # torch compares annotations with classes, and ours are strings
    """Sums, where the default averages: the loss is already divided by the labels of all ranks."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
