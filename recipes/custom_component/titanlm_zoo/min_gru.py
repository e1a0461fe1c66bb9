"""A recurrent language model whose recurrence is a scan: minGRU (Feng et al. 2024, arXiv:2410.01201).

Gate and candidate depend on the input alone, not on the last state, so all
states of a row come out of one parallel scan and training is as parallel as a
transformer's, at a cost linear in the length of the text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanlm.batch import Batch
from titanlm.constraints import PositiveFloat, PositiveInt
from titanlm.models.layers.embedding import Embedding
from titanlm.models.layers.feed_forward import FeedForward, default_width
from titanlm.models.layers.head import Head
from titanlm.models.layers.init import draw_normal, head_std
from titanlm.models.layers.linear import Linear
from titanlm.models.layers.norm import RMSNorm
from titanlm.registry import register


@dataclass(frozen=True)
class MinGruConfig:
    n_layers: PositiveInt = 6
    d_model: PositiveInt = 384
    """Width of the residual stream and of the state."""
    longest_memory: PositiveInt = 256
    """Tokens after which the slowest unit of a fresh model has forgotten 63 % of what it held; the others lie between 2 and this. At least 2."""
    init_std: PositiveFloat = 0.02

    def __post_init__(self) -> None:
        if self.longest_memory < 2:
            raise ValueError("longest_memory: at least 2 tokens")


@register("model", "min_gru")
class MinGru(nn.Module):
    """B rows, T tokens, D width, V vocabulary."""

    def __init__(self, config: MinGruConfig, *, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.embedding = Embedding(vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config.d_model) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, 1e-6)
        self.head = Head(vocab_size, config.d_model)

    def forward(self, batch: Batch) -> Tensor:
        """(B, T, D). Positions restart where a document begins, and there the state is forgotten."""
        x = self.embedding(batch.tokens)
        goes_on = (batch.positions > 0)[..., None]
        for block in self.blocks:
            x = block(x, goes_on)
        hidden: Tensor = self.norm(x)
        return hidden

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        c = self.config
        memories = torch.logspace(math.log10(2), math.log10(c.longest_memory), c.d_model)
        for name, parameter in self.named_parameters():
            if name.endswith("gate_bias"):
                parameter.copy_(-(memories - 1).log())  # sigmoid gives 1 / memory
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                std = head_std(c.init_std, self.vocab_size, c.d_model, tied=False) if name == "head.weight" else c.init_std
                ends_branch = name.endswith(("out_proj.weight", "down_proj.weight"))
                parameter.copy_(draw_normal(parameter.shape, std / math.sqrt(2 * c.n_layers) if ends_branch else std, seed, name))

    def parameter_roles(self) -> dict[str, str]:
        whole = {"embedding.weight": "embedding", "head.weight": "head"}
        by_ndim = {name: "norm" if parameter.ndim == 1 else "matrix" for name, parameter in self.named_parameters()}
        return {name: whole.get(name, "bias" if name.endswith("gate_bias") else role) for name, role in by_ndim.items()}

    def flops_per_token(self, seq_len: int) -> float:
        """Six a matrix element; the scan's few a state element and doubling are left out."""
        return 6.0 * sum(parameter.numel() for name, parameter in self.named_parameters() if parameter.ndim == 2 and name != "embedding.weight")


class Block(nn.Module):
    """(B, T, D) → (B, T, D): the recurrence, then a feed-forward network, each on a norm and added to the stream."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(d_model, 1e-6)
        self.gate_proj, self.candidate_proj, self.out_proj = (Linear(d_model, d_model) for _ in range(3))
        self.gate_bias = nn.Parameter(torch.empty(d_model, dtype=torch.float32))
        self.feed_forward_norm = RMSNorm(d_model, 1e-6)
        self.feed_forward = FeedForward(d_model, default_width(d_model, "relu2"), "relu2")

    def forward(self, x: Tensor, goes_on: Tensor) -> Tensor:
        y = self.mixer_norm(x)
        # fp32 whatever the activations are: a state is a sum over many tokens.
        gate = torch.sigmoid(self.gate_proj(y).float() + self.gate_bias)
        states = scan((1.0 - gate) * goes_on, gate * self.candidate_proj(y).float())
        x = x + self.out_proj(F.silu(states).to(x.dtype))
        return x + self.feed_forward(self.feed_forward_norm(x))


def scan(keep: Tensor, add: Tensor) -> Tensor:
    """h_t = keep_t · h_{t−1} + add_t over dim 1 from h = 0, in log₂ T doublings (Hillis and Steele 1986).

    Before the doubling by s, ``add_t`` is the state at t as if tokens up to
    t − s had been zero, and ``keep_t`` what would be left of the one at t − s.
    """
    distance = 1
    while distance < add.shape[1]:
        add = torch.cat([add[:, :distance], add[:, distance:] + keep[:, distance:] * add[:, :-distance]], dim=1)
        keep = torch.cat([keep[:, :distance], keep[:, distance:] * keep[:, :-distance]], dim=1)
        distance *= 2
    return add
