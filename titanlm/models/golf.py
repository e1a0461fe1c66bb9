"""The model of the Parameter Golf records: the naive baseline by default, pull request 369 and its kin by settings.

    e = rms(embedding + bigram hash), smeared over two positions
    x0 = x = e
    for each block:  x ← skip from the encoder half; x ← m0·x + m1·x0
                     x ← x + a·attention(rms x);  x ← x + f·feed_forward(rms x)
    logits = softcap(head(rms x))

Norms have no weights; m, a, f, the skips and the queries' gains are learned a
channel (a head). All of it is from openai/parameter-golf: `train_gpt.py` of the
baseline, and the records that led to pull request 369.

What differs from the records, on purpose: BigramHash is computed in int64;
root-mean-square norms, rotation and exclusive attention are computed in fp32
and rounded once, where the records leave some of it to bf16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanlm.constraints import NonNegativeFew, PositiveFew, PositiveFloat, PositiveInt, Size
from titanlm.kernels.fused import fused
from titanlm.kernels.mix import Mix
from titanlm.kernels.refusals import refusals
from titanlm.models.layers.attention import NAMED, Attention, Mask, attention_mask, usable_backend
from titanlm.models.layers.bigram_hash import BigramHash
from titanlm.models.layers.cache import KVCache, LayerCache
from titanlm.models.layers.embedding import Embedding
from titanlm.models.layers.feed_forward import FeedForward
from titanlm.models.layers.head import Head
from titanlm.models.layers.init import draw_normal, draw_orthogonal, draw_uniform
from titanlm.models.layers.language_model import LanguageModel
from titanlm.models.layers.norm import RMSNorm
from titanlm.models.layers.rope import ntk_theta, rotary_tables
from titanlm.models.layers.smear_gate import SmearGate
from titanlm.models.layers.unet_skips import UNetSkips
from titanlm.registry import PYDANTIC_CONFIG, register

if TYPE_CHECKING:
    from titanlm.batch import Batch

CONTEXT = 2
"""Tokens before a position that its input depends on: SmearGate looks at the one before, whose bigram at one more."""


@dataclass(frozen=True)
class Rope:
    """Rotary positions."""

    theta: PositiveFloat = 10_000.0
    reference_tokens: Size | None = None
    """Rows longer than this get a larger base (`ntk_theta`), in training and evaluation alike; unset: `theta` for all."""


Rope.__pydantic_config__ = PYDANTIC_CONFIG  # type: ignore[attr-defined]


@dataclass(frozen=True)
class GolfConfig:
    """The defaults are the naive baseline's, 17,059,912 parameters with a vocabulary of 1,024."""

    n_layers: PositiveFew = 9
    d_model: Size = 512
    n_heads: PositiveFew = 8
    n_kv_heads: PositiveFew = 4
    """Heads of keys and values, a divisor of n_heads."""
    d_ff: Size = 1024
    """Inner width of the feed-forward networks."""
    activation: Literal["relu2", "leaky_relu2"] = "relu2"
    """leaky_relu2: with slope 1/2 below 0, as later records have it."""
    q_gain: PositiveFloat = 1.5
    """What the gains of queries, one a head, start at."""
    rope: Rope = field(default_factory=Rope)
    exclusive_last: NonNegativeFew = 0
    """So many of the last layers have exclusive attention (XSA)."""
    smear_gate: Literal["none", "recorded", "masked"] = "none"
    """recorded: also across documents, as the records have it. masked: shut at the start of every document."""
    bigram_buckets: Size | None = None
    """Rows of the BigramHash table; unset: no BigramHash. With data.document_mask it does not see the document before."""
    bigram_dim: Size = 128
    tie_embeddings: bool = True
    softcap: PositiveFloat | None = 30.0
    """Logits are bounded to ± this by tanh."""
    embedding_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the tables of tokens and bigrams and of their optimizer state. The records have bfloat16; fsdp2 and hsdp need float32."""
    embedding_std: PositiveFloat = 0.005
    """Deviation of the fresh token table."""
    init: Literal["uniform", "orthogonal"] = "uniform"
    """Of matrices: uniform within ±1/√n_in (torch's default), or orthogonal."""
    output: Literal["zero", "mup"] = "zero"
    """How matrices that end a residual branch start: zero, or orthogonal divided by √(2·n_layers). The records say the latter and do the former."""
    norm_eps: PositiveFloat = 1.1920929e-07
    """torch's default for fp32."""
    vocab_size: Size | None = None
    """Rows of the embedding; unset: the tokenizer's."""
    attention_backend: Literal["auto", "cudnn", "flash4", "flash3", "sdpa", "flex", "varlen", "math"] = "auto"
    """auto: what a measurement at the start of training finds fastest. sdpa: torch's own choice. varlen: FlashAttention 2. math: plain matrix products."""
    expect_params: PositiveInt | None = None
    """What you believe the parameter count to be; off by more than 2 % is an error."""


class GolfBlock(nn.Module):
    """(B, T, D) → (B, T, D). The unit that is compiled, checkpointed and sharded."""

    remakes: ClassVar = (("attention.o_proj",), ("feed_forward.down_proj",))

    def __init__(self, config: GolfConfig, attention: Attention) -> None:
        super().__init__()
        c = config
        self.fuses = True
        self.residual_mix = nn.Parameter(torch.empty(2, c.d_model, dtype=torch.float32))
        self.attention_norm = RMSNorm(c.d_model, c.norm_eps, learned=False)
        self.attention = attention
        self.attention_scale = nn.Parameter(torch.empty(c.d_model, dtype=torch.float32))
        self.feed_forward_norm = RMSNorm(c.d_model, c.norm_eps, learned=False)
        self.feed_forward = FeedForward(c.d_model, c.d_ff, c.activation)
        self.feed_forward_scale = nn.Parameter(torch.empty(c.d_model, dtype=torch.float32))

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Mask,
        past: tuple[LayerCache, Tensor, int] | None = None,
        skip: tuple[Tensor, Tensor] | None = None,
        handed_on: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``x0`` (B, T, D) is what the first block got, ``skip`` a stream (B, T, D) and its weight (D,), added first.

        Gives the output, and ``x`` and ``x0`` again, through which the gradients of their later uses come back;
        ``x`` has one if it is ``handed_on``.
        """
        if past is None and self.fuses and fused(x):
            return self._fused_forward(x, x0, rotary, mask, skip, handed_on)
        mix, given = self.residual_mix.to(x.dtype), x
        if skip is not None:
            x = x + skip[1].to(x.dtype) * skip[0]
        x = mix[0] * x + mix[1] * x0
        x = x + self.attention_scale.to(x.dtype) * self.attention(self.attention_norm(x), rotary, mask, past)
        return x + self.feed_forward_scale.to(x.dtype) * self.feed_forward(self.feed_forward_norm(x)), given, x0

    def _fused_forward(
        self, x: Tensor, x0: Tensor, rotary: tuple[Tensor, Tensor], mask: Mask, skip: tuple[Tensor, Tensor] | None, handed_on: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same with the first sum and norm fused, and the branches' weights inside their last products, where a kernel can with the sums."""
        mix, eps = self.residual_mix, self.attention_norm.eps
        terms, weights = ((x, x0), mix) if skip is None else ((x, skip[0], x0), torch.stack((mix[0], mix[0] * skip[1], mix[1])))
        # What is passed through and not used again would come back as zeros, to be read.
        passes = (handed_on, *(False for _ in terms[2:]), True)
        mixed, normed, *passed = Mix.apply(weights, eps, passes, *terms)
        given, x0 = (x, *passed)[-2:]
        x = self.attention(normed, rotary, mask, scale=self.attention_scale, onto=mixed)
        return self.feed_forward(self.feed_forward_norm(x), self.feed_forward_scale, onto=x), given, x0


class GolfCache(KVCache):
    """Keys and values, and the tokens themselves, which later positions' inputs depend on."""

    def __init__(self, *shape: Any) -> None:
        super().__init__(*shape)
        keys = self.layers[0].keys
        self.tokens = torch.zeros(keys.shape[:2], dtype=torch.long, device=keys.device)

    def with_context(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (B, T) tokens and gives them with the CONTEXT tokens before them: ids and positions, (B, CONTEXT + T); a position below 0 holds no token."""
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        self.tokens[rows, positions] = tokens
        before = positions[:, :1] + torch.arange(-CONTEXT, 0, device=positions.device)
        return torch.cat((self.tokens[rows, before.clamp_min(0)], tokens), 1), torch.cat((before, positions), 1)


@register("model", "golf")
class Golf(LanguageModel):
    """B rows, T tokens, D width, V vocabulary.

    Raises ValueError with every problem of the settings, one a line, each
    starting with the field's name. May be built on the meta device; parameters
    are empty until ``init_weights``.
    """

    def __init__(self, config: GolfConfig, *, vocab_size: int, max_seq_len: int) -> None:
        super().__init__()
        problems = _problems(config, vocab_size)
        if problems:
            raise ValueError("\n".join(problems))
        c = self.config = config
        self.vocab_size, self.max_seq_len = c.vocab_size or vocab_size, max_seq_len
        self.head_dim = c.d_model // c.n_heads
        self.attention_backend = usable_backend(c.attention_backend, self.head_dim)
        table_dtype = getattr(torch, c.embedding_dtype)
        self.embedding = Embedding(self.vocab_size, c.d_model).to(table_dtype)
        self.bigram = None
        if c.bigram_buckets is not None:
            self.bigram = BigramHash(c.bigram_buckets, c.bigram_dim, c.d_model)
            self.bigram.table.to(table_dtype)
        self.norm = RMSNorm(c.d_model, c.norm_eps, learned=False)  # of the embedding, and of the last layer's output
        self.smear = None if c.smear_gate == "none" else SmearGate(c.d_model, c.smear_gate)
        self.skips = UNetSkips(c.n_layers, c.d_model)
        self.blocks = nn.ModuleList(GolfBlock(c, self._attention(layer)) for layer in range(c.n_layers))
        self.head = Head(self.vocab_size, c.d_model, tied_to=self.embedding if c.tie_embeddings else None, softcap=c.softcap)
        self.require_params(c.expect_params)

    def _attention(self, layer: int) -> Attention:
        c = self.config
        return Attention(
            c.d_model,
            c.n_heads,
            c.n_kv_heads,
            self.head_dim,
            qk_norm="plain",
            norm_eps=c.norm_eps,
            backend=self.attention_backend,
            q_gain=True,
            exclusive=layer >= c.n_layers - c.exclusive_last,
        )

    def forward(self, batch: Batch, cache: GolfCache | None = None) -> Tensor:
        """Hidden states after the last norm, (B, T, D) in the compute dtype; with a cache as ``Decoder.forward``."""
        tokens, ids, seq_len = batch.tokens, batch.document_ids, batch.tokens.shape[1]
        if cache is None:
            row_starts = F.pad(torch.zeros_like(tokens[:, 1:], dtype=torch.bool), (1, 0), value=True)
            document_starts = row_starts | (ids != ids.roll(1, 1))
        else:
            cache.reserve(seq_len)
            seq_len = max(self.max_seq_len, cache.max_len)  # one base for all of a text that grows
            tokens, places = cache.with_context(tokens, batch.positions)
            row_starts = document_starts = places == 0
        # First, because a block mask is built outside the graph of a compiled model: what follows is then one graph.
        mask = attention_mask(batch, self.attention_backend, cache, self.head_dim, self.embedding.compute_dtype)
        x = self.embedding(tokens)
        if self.bigram is not None:
            starts = document_starts if batch.document_mask else row_starts
            x = x + self.bigram(tokens, starts)
        x = self.norm(x)
        if self.smear is not None:
            x = self.smear(x, row_starts if self.smear.kind == "recorded" else document_starts)
        x = x if cache is None else x[:, CONTEXT:]
        x0 = x.view_as(x)  # a compiler's graph wants different objects for a function's arguments
        theta = self.config.rope.theta
        if self.config.rope.reference_tokens is not None:
            theta = ntk_theta(theta, self.head_dim, seq_len, self.config.rope.reference_tokens)
        cos, sin = rotary_tables(batch.positions, self.head_dim, theta, x.dtype)
        rotary = (cos, -sin)  # the records turn the other way than Llama
        kept: list[Tensor] = []
        for layer, block in enumerate(self.blocks):
            past = None if cache is None else (cache.layers[layer], batch.positions, cache.used)
            handed_on = 0 < layer < self.skips.n_encoder  # what the layer is given is kept for a later one
            x, given, x0 = block(x, x0, rotary, mask, past, self.skips(layer, kept), handed_on)
            if handed_on:
                kept[-1] = given
            if layer < self.skips.n_encoder:
                kept.append(x.view_as(x))
        hidden: Tensor = self.norm(x)
        return hidden

    def new_cache(self, batch_size: int, max_len: int, device: torch.device | str) -> GolfCache:
        """Room for ``max_len`` tokens in each of ``batch_size`` rows, in the compute dtype."""
        c = self.config
        return GolfCache(c.n_layers, batch_size, max_len, c.n_kv_heads, self.head_dim, self.embedding.compute_dtype, device)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every parameter: equal for equal seed on every device and at every world size."""
        for name, parameter in self.named_parameters():
            parameter.copy_(self._initial(name, parameter.shape, seed))

    def _initial(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        c = self.config
        constants = {"bigram.table.weight": 0.0, "bigram.scale": 0.05, "smear.weight": 0.0, "head.weight": 0.0}
        if name in constants:
            return torch.full(shape, constants[name])
        if name == "embedding.weight":
            return draw_normal(shape, c.embedding_std, seed, name)
        if name.endswith("residual_mix"):
            return torch.tensor([[1.0], [0.0]]).expand(shape)
        if len(shape) == 1 or name == "skips.weight":
            return torch.full(shape, c.q_gain if name.endswith("q_gain") else 1.0)
        depth = 1 / math.sqrt(2 * c.n_layers)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return torch.zeros(shape) if c.output == "zero" else draw_orthogonal(shape, depth, seed, name)
        if c.init == "uniform":
            return draw_uniform(shape, 1 / math.sqrt(shape[1]), seed, name)
        return draw_orthogonal(shape, depth if name == "bigram.projection.weight" else 1.0, seed, name)

    def parameter_roles(self) -> dict[str, str]:
        """Every parameter's name → embedding | head | matrix | gain."""
        roles = {"embedding.weight": "embedding", "bigram.table.weight": "embedding", "head.weight": "head"}
        return {name: roles.get(name, "matrix" if name.endswith(("_proj.weight", "projection.weight")) else "gain") for name, _ in self.named_parameters()}

    def matmul_parameters(self) -> int:
        """Multiply-adds a token in matrix products: every matrix once, the head also when tied, lookups never."""
        roles = self.parameter_roles()
        matrices = sum(parameter.numel() for name, parameter in self.named_parameters() if roles[name] == "matrix")
        return matrices + self.vocab_size * self.config.d_model

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of forward and backward a token: 6·matmul_parameters + 12·n_layers·d_model·seq_len, as ``Decoder.flops_per_token``."""
        return 6.0 * self.matmul_parameters() + 12.0 * self.config.n_layers * self.config.d_model * seq_len


def _problems(config: GolfConfig, vocab_size: int) -> list[str]:
    c, problems = config, []
    if c.d_model % c.n_heads or c.d_model // c.n_heads % 2:
        problems.append(f"n_heads: d_model = {c.d_model} must be {c.n_heads} heads of equal, even width; change either")
    elif c.rope.reference_tokens is not None and c.d_model // c.n_heads == 2:
        problems.append("rope.reference_tokens: heads of width 2 have one frequency, which no base changes; leave it unset")
    if c.n_heads % c.n_kv_heads:
        problems.append(f"n_kv_heads: {c.n_kv_heads} does not divide n_heads = {c.n_heads}")
    if c.attention_backend in NAMED:
        problems += (f"attention_backend: {why}" for why in refusals(c.attention_backend, c.d_model // c.n_heads))
    if c.exclusive_last > c.n_layers:
        problems.append(f"exclusive_last: {c.exclusive_last} layers of {c.n_layers}")
    if c.bigram_buckets == 1:
        problems.append("bigram_buckets: needs 2 or more, the last being for positions without a previous token")
    if c.vocab_size is not None and c.vocab_size < vocab_size:
        problems.append(f"vocab_size: {c.vocab_size} is smaller than the tokenizer's {vocab_size}; leave it unset to take that")
    return problems
