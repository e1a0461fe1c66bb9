"""Drawing parameters so that a model is the same on every machine.

Each parameter is drawn whole, on the CPU, in fp32, by a generator of its own
that is seeded by the run's seed and the parameter's name. So neither the
device, nor the number of ranks, nor the order or presence of other parameters
changes a bit of it.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator seeded by 63 bits of sha256 of seed and name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def draw_normal(shape: torch.Size, std: float, seed: int, name: str) -> Tensor:
    """Normal values with mean 0, fp32 on the CPU."""
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator_for(seed, name))


def draw_orthogonal(shape: torch.Size, gain: float, seed: int, name: str) -> Tensor:
    """A matrix whose rows, or columns where there are fewer, are orthogonal and of length ``gain`` (Saxe et al. 2013, arXiv:1312.6120)."""
    return nn.init.orthogonal_(torch.empty(shape, dtype=torch.float32, device="cpu"), gain, generator=generator_for(seed, name))


def draw_uniform(shape: torch.Size, bound: float, seed: int, name: str) -> Tensor:
    """Uniform values within ±``bound``, fp32 on the CPU."""
    return torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator_for(seed, name))


def head_std(init_std: float, vocab_size: int, d_model: int, *, tied: bool) -> float:
    """The largest deviation up to ``init_std`` at which a fresh model's loss is within about 0.1 of ln V.

    A hidden state after the last norm has length √d, so a logit has deviation
    std·√d, which costs std²·d/2 nats; 0.3 is allowed, 0.045 nats. When the
    table is also the embedding, a hidden state may still point along the
    embedding of its own token, whose logit then reaches std·d and costs
    ln(1 + e^(std·d)/V) nats; it may reach ln(V/16), 0.06 nats.
    """
    std = min(init_std, 0.3 / math.sqrt(d_model))
    return min(std, max(math.log(vocab_size / 16), 1.0) / d_model) if tied else std
