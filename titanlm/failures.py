"""What torch's errors mean, for the user who meets them."""

from __future__ import annotations

import torch

from titanlm.config import RunConfig

CPU_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory")
"""What torch says where no CUDA allocator is asked."""
LOST_CONNECTION = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")
"""What torch says where the other end of a collective is gone."""


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in CPU_OUT_OF_MEMORY)


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone or does not answer."""
    return isinstance(error, torch.distributed.DistError) or any(words in str(error) for words in LOST_CONNECTION)


def out_of_memory(config: RunConfig, error: BaseException) -> str:
    """What to change, from the cheapest remedy on."""
    train, tokens = config.train, config.train.micro_batch_tokens
    rows = f"train.micro_batch = {train.micro_batch}: halve it" if tokens is None else f"train.micro_batch_tokens = {tokens}: halve it"
    if tokens == "auto":
        rows = "train.micro_batch_tokens = 'auto' was too much: give half of what tuned.json in the run folder says"
    return (
        f"out of memory: {str(error).splitlines()[0]}\n"
        f"  {rows}; train.global_batch stays and accumulation doubles\n"
        f"  train.activation_checkpointing = {train.activation_checkpointing!r}: 'selective' or 'full' recompute instead of keeping\n"
        f"  loss.chunk_tokens = {config.loss.config.chunk_tokens}: fewer positions of logits at once (0 keeps all of them)"
    )
