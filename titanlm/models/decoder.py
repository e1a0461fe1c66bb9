"""The plain decoder: pre-norm, rotary, grouped queries; most families are settings of it.

Llama, Qwen3 and their kin are this file: SwiGLU, relu² or leaky relu², heads of any size,
optional norms on queries and keys, an embedding that is whole or factorised,
tied to the head or not, logits capped or not. The head is held but not run
here: ``forward`` gives hidden states and the loss turns them into logits chunk
by chunk (``titanlm.losses.chunked``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from titanlm.constraints import PositiveFew, PositiveFloat, PositiveInt, Size
from titanlm.kernels.refusals import refusals
from titanlm.models.layers.attention import NAMED, Attention, attention_mask, usable_backend
from titanlm.models.layers.block import Block
from titanlm.models.layers.cache import KVCache
from titanlm.models.layers.embedding import Embedding
from titanlm.models.layers.feed_forward import FeedForward, default_width
from titanlm.models.layers.head import Head
from titanlm.models.layers.init import draw_normal, head_std
from titanlm.models.layers.language_model import LanguageModel
from titanlm.models.layers.norm import RMSNorm
from titanlm.models.layers.rope import rotary_tables
from titanlm.registry import register

if TYPE_CHECKING:
    from titanlm.batch import Batch


@dataclass(frozen=True)
class DecoderConfig:
    n_layers: PositiveFew = 12
    d_model: Size = 768
    """Width of the residual stream."""
    n_heads: PositiveFew = 12
    n_kv_heads: PositiveFew | None = None
    """Heads of keys and values, a divisor of n_heads; unset: n_heads."""
    head_dim: PositiveFew | None = None
    """Even; unset: d_model / n_heads."""
    d_ff: Size | None = None
    """Inner width of the feed-forward networks; unset: about 8·d_model² parameters each."""
    activation: Literal["swiglu", "relu2", "leaky_relu2"] = "swiglu"
    """Of the feed-forward networks; leaky_relu2: leaky relu with slope 1/2, squared."""
    qk_norm: Literal["none", "learned"] = "none"
    """Root-mean-square norm of queries and keys per head, with a weight; steadier at high learning rates."""
    embedding_rank: Size | None = None
    """Factorise the embedding into (vocabulary × rank) and (rank × d_model)."""
    tie_embeddings: bool = True
    """The head shares the embedding's matrix (both, when factorised); else it is a full one of its own."""
    softcap: PositiveFloat | None = None
    """Logits are bounded to ± this by tanh."""
    norm_eps: PositiveFloat = 1e-6
    rope_theta: PositiveFloat = 10_000.0
    max_positions: Size = 4096
    """Longest sequence the model may be given, in tokens."""
    vocab_size: Size | None = None
    """Rows of the embedding; unset: the tokenizer's. More than the tokenizer's pads it, to a multiple of 128 for speed, say."""
    init_std: PositiveFloat = 0.02
    """Deviation of fresh matrices; those that end a residual branch have 1/sqrt(2·n_layers) of it, embedding tables and heads at most it."""
    attention_backend: Literal["auto", "cudnn", "flash4", "flash3", "sdpa", "flex", "varlen", "math"] = "auto"
    """auto: what a measurement at the start of training finds fastest. sdpa: torch's own choice. varlen: FlashAttention 2. math: plain matrix products."""
    expect_params: PositiveInt | None = None
    """What you believe the parameter count to be; off by more than 2 % is an error."""


@register("model", "decoder")
class Decoder(LanguageModel):
    """B rows, T tokens, D width, V vocabulary.

    Raises ValueError with every problem of the settings, one a line, each
    starting with the field's name. May be built on the meta device; parameters
    are empty until ``init_weights``.
    """

    def __init__(self, config: DecoderConfig, *, vocab_size: int, max_seq_len: int) -> None:
        super().__init__()
        problems = _problems(config, vocab_size, max_seq_len)
        if problems:
            raise ValueError("\n".join(problems))
        self.config = config
        self.vocab_size = config.vocab_size or vocab_size
        self.head_dim = config.head_dim or config.d_model // config.n_heads
        self.n_kv_heads = config.n_kv_heads or config.n_heads
        self.attention_backend = usable_backend(config.attention_backend, self.head_dim)
        self.d_ff = config.d_ff or default_width(config.d_model, config.activation)
        self.embedding = Embedding(self.vocab_size, config.d_model, config.embedding_rank)
        self.blocks = nn.ModuleList(self._block() for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = Head(self.vocab_size, config.d_model, tied_to=self.embedding if config.tie_embeddings else None, softcap=config.softcap)
        self.require_params(config.expect_params)

    def _block(self) -> Block:
        c = self.config
        attention = Attention(
            c.d_model,
            c.n_heads,
            self.n_kv_heads,
            self.head_dim,
            qk_norm=c.qk_norm,
            norm_eps=c.norm_eps,
            backend=self.attention_backend,
        )
        return Block(c.d_model, c.norm_eps, attention, FeedForward(c.d_model, self.d_ff, c.activation))

    def forward(self, batch: Batch, cache: KVCache | None = None) -> Tensor:
        """Hidden states after the last norm, (B, T, D) in the compute dtype.

        With a cache the batch holds only the new tokens, with their absolute
        positions; each row is one document. Raises TitanError when the cache is
        full or the attention backend cannot run on the device.
        """
        if cache is not None:
            cache.reserve(batch.tokens.shape[1])
        # First, because a block mask is built outside the graph of a compiled model: what follows is then one graph.
        mask = attention_mask(batch, self.attention_backend, cache, self.head_dim, self.embedding.compute_dtype)
        x = self.embedding(batch.tokens)
        rotary = rotary_tables(batch.positions, self.head_dim, self.config.rope_theta, x.dtype)
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, mask) if cache is None else block(x, rotary, mask, (cache.layers[i], batch.positions, cache.used))
        hidden: Tensor = self.norm(x)
        return hidden

    def new_cache(self, batch_size: int, max_len: int, device: torch.device | str) -> KVCache:
        """Room for ``max_len`` tokens in each of ``batch_size`` rows, in the compute dtype."""
        return KVCache(self.config.n_layers, batch_size, max_len, self.n_kv_heads, self.head_dim, self.embedding.compute_dtype, device)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every parameter: equal for equal seed on every device and at every world size.

        Norms are 1. Matrices are normal with ``init_std``, scaled by
        1/sqrt(2·n_layers) where they end a residual branch (GPT-2). The loss
        starts near ln V: see ``head_std``.
        """
        for name, parameter in self.named_parameters():
            std = self._std(name)
            whole = torch.ones(parameter.shape) if std is None else draw_normal(parameter.shape, std, seed, name)
            parameter.copy_(whole)

    def _std(self, name: str) -> float | None:
        c, role = self.config, self.parameter_roles()[name]
        if role == "norm":
            return None
        if name == "embedding.projection":
            return 1 / math.sqrt(self.embedding.weight.shape[1])  # so that table times projection is as large as a whole table
        if role == "head" or (role == "embedding" and c.tie_embeddings):
            return head_std(c.init_std, self.vocab_size, c.d_model, tied=c.tie_embeddings)
        ends_branch = name.endswith(("o_proj.weight", "down_proj.weight"))
        return c.init_std / math.sqrt(2 * c.n_layers) if ends_branch else c.init_std

    def parameter_roles(self) -> dict[str, str]:
        """Every parameter's name → embedding | head | matrix | norm."""
        roles = {}
        for name, parameter in self.named_parameters():
            top = {"embedding.weight": "embedding", "head.weight": "head"}
            roles[name] = top.get(name, "norm" if parameter.ndim == 1 else "matrix")
        return roles

    def matmul_parameters(self) -> int:
        """Multiply-adds a token in matrix products: every matrix once for each use, the head also when tied, the lookup never."""
        in_blocks = sum(parameter.numel() for parameter in self.blocks.parameters() if parameter.ndim == 2)
        in_embedding = 0 if self.embedding.projection is None else self.embedding.projection.numel()
        return in_blocks + in_embedding + sum(parameter.numel() for parameter in self.head.parameters())

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of forward and backward a token: 6·matmul_parameters + 12·n_layers·n_heads·head_dim·seq_len.

        PaLM's count (arXiv:2204.02311): causal and document masks are not deducted.
        """
        c = self.config
        return 6.0 * self.matmul_parameters() + 12.0 * c.n_layers * c.n_heads * self.head_dim * seq_len


def _problems(config: DecoderConfig, vocab_size: int, max_seq_len: int) -> list[str]:
    c, problems = config, []
    if c.head_dim is None and c.d_model % c.n_heads:
        problems.append(f"n_heads: {c.n_heads} heads do not divide d_model = {c.d_model}; change either or set head_dim")
    elif (head_dim := c.head_dim or c.d_model // c.n_heads) % 2:
        problems.append(f"head_dim: must be even for rotary positions, is {head_dim}{'' if c.head_dim else ' (d_model / n_heads)'}")
    if c.attention_backend in NAMED:
        problems += (f"attention_backend: {why}" for why in refusals(c.attention_backend, c.head_dim or c.d_model // c.n_heads))
    if c.n_kv_heads is not None and c.n_heads % c.n_kv_heads:
        problems.append(f"n_kv_heads: {c.n_kv_heads} does not divide n_heads = {c.n_heads}")
    if c.vocab_size is not None and c.vocab_size < vocab_size:
        problems.append(f"vocab_size: {c.vocab_size} is smaller than the tokenizer's {vocab_size}; leave it unset to take that")
    if max_seq_len > c.max_positions:
        problems.append(f"max_positions: {c.max_positions}, but sequences of {max_seq_len} tokens are asked for; raise it or shorten them")
    return problems
