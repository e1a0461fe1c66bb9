"""Causal attention with grouped queries, inside documents, by one of several backends.

What a query may see is decided once a forward pass (:func:`attention_mask`)
and handed to every layer in the form that its kernel wants:

* None: plain causal.
* a bool tensor (B, 1, T, S), True where seen: document masking through SDPA
  or plain matrix products, with memory quadratic in T.
* a ``BlockMask``: document masking through FlexAttention, which skips blocks
  without a visible pair. Its backward exists on CUDA alone.
* cumulative lengths, (n + 1,) int32: document masking by the kernels of
  FlashAttention, to which a document is a sequence (``titanlm.kernels.lengths``).

A backend that a config names serves training and scoring, or refuses
(``titanlm.kernels.refusals``). Decoding with a cache is SDPA's under any name
but "math". What "auto" is, the trainer may decide by measurement
(``titanlm.attention_choice``): a name, or two of kernels, "cudnn+flash4" for
the forward pass of one and the backward pass of the other.

Grouped queries: Ainslie et al. 2023, arXiv:2305.13245. Query and key norms:
Henry et al. 2020, arXiv:2010.04245. FlexAttention: Dong et al. 2024,
arXiv:2412.05496. Gains of queries and exclusive attention: the records of
openai/parameter-golf (pull requests 369 and before).
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanlm.environment import c_compiler
from titanlm.kernels.causal_attention import KERNELS, CausalAttention, copies
from titanlm.kernels.flash4 import HAS_FLASH4
from titanlm.kernels.fused import fused
from titanlm.kernels.lengths import cumulative_lengths
from titanlm.kernels.refusals import FLEX_HEAD_DIM, require
from titanlm.kernels.rotate import RotatedHeads
from titanlm.models.layers.compiled import compiled
from titanlm.models.layers.linear import Linear, scaled
from titanlm.models.layers.norm import RMSNorm
from titanlm.models.layers.product import Product, shared_product
from titanlm.models.layers.rope import rotate
from titanlm.precision import multiplied_in

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from titanlm.batch import Batch
    from titanlm.models.layers.cache import KVCache, LayerCache

Backend: TypeAlias = Literal["auto", "cudnn", "flash4", "flash3", "sdpa", "flex", "varlen", "math"]
QkNorm: TypeAlias = Literal["none", "learned", "plain"]
Mask: TypeAlias = "Tensor | BlockMask | None"


NAMED = frozenset({*KERNELS, "flex"})
"""Backends that may refuse."""


def usable_backend(backend: Backend, head_dim: int) -> str:
    """ "auto" as it is where FlexAttention can be compiled (triton, a C compiler, heads wide enough), else "sdpa"."""
    if backend == "auto" and (head_dim < FLEX_HEAD_DIM or importlib.util.find_spec("triton") is None or c_compiler() is None):
        return "sdpa"
    return backend


class Attention(nn.Module):
    """Multi-head attention with rotary positions; legend as in the package, S keys, dh head_dim.

    ``qk_norm`` is of queries and keys before they are rotated, ``plain``
    without a weight. With ``q_gain`` rotated queries are multiplied by a
    learned number a head. ``exclusive`` takes out of what a position has
    gathered the part along its own value (:func:`exclude_own_value`).
    """

    remakes: ClassVar = (("q_proj", "k_proj", "v_proj"),)

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        *,
        qk_norm: QkNorm,
        norm_eps: float,
        backend: str,
        q_gain: bool = False,
        exclusive: bool = False,
    ) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.fuses = head_dim & (head_dim - 1) == 0  # what the kernel's tiles can be
        self.backend = backend
        self.exclusive = exclusive
        self.q_proj = Linear(d_model, n_heads * head_dim)
        self.k_proj = Linear(d_model, n_kv_heads * head_dim)
        self.v_proj = Linear(d_model, n_kv_heads * head_dim)
        self.o_proj = Linear(n_heads * head_dim, d_model)
        self.q_norm, self.k_norm = (None if qk_norm == "none" else RMSNorm(head_dim, norm_eps, learned=qk_norm == "learned") for _ in range(2))
        self.q_gain = nn.Parameter(torch.empty(n_heads, dtype=torch.float32)) if q_gain else None

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Mask,
        past: tuple[LayerCache, Tensor, int] | None = None,
        scale: Tensor | None = None,
        onto: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) → (B, T, D), times ``scale`` (D,), added to ``onto`` (B, T, D).

        ``past`` is this layer's cache, the positions (B, T) of ``x`` and the
        number of slots in use, for decoding.
        """
        product = shared_product(self.q_proj, self.k_proj, self.v_proj) if past is None and self.fuses and fused(x) else None
        kernels = _kernels(self.backend, mask, x, self.head_dim) if past is None else None
        q, k, v, own = self._heads(x, rotary) if product is None else self._fused_heads(x, rotary, product, self._copies(kernels, x.device))
        if past is not None:
            cache, positions, used = past
            k, v = cache.update(positions, k, v, used)
        if kernels is not None:
            y = CausalAttention.apply(q, k, v, mask, *kernels)
        else:
            y = attend_by_torch(self.backend, q, k, v, mask)
        if self.exclusive:
            y = exclude_own_value(y, own)
        return scaled(self.o_proj, y.flatten(2), scale, onto)

    def _copies(self, kernels: tuple[str, str] | None, device: torch.device) -> int:
        return 1 if kernels is None else copies(kernels[1], self.n_heads, self.n_kv_heads, self.head_dim, device)

    def _heads(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        heads = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = self.q_proj(x).view(heads), self.k_proj(x).view(heads), self.v_proj(x).view(heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        return (q if self.q_gain is None else q * self.q_gain[:, None].to(q.dtype)), k, v, v

    def _fused_heads(self, x: Tensor, rotary: tuple[Tensor, Tensor], product: Product, n_copies: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One product for all three, one kernel for what follows; as ``_heads`` but for rounding, and for keys and values ``n_copies`` times in a row."""
        qkv = product(x, torch.cat([each.used_weight(x.dtype) for each in (self.q_proj, self.k_proj, self.v_proj)]))
        weights: list[Tensor] = [norm.weight for norm in (self.q_norm, self.k_norm) if norm is not None and norm.weight is not None]
        eps = None if self.q_norm is None else self.q_norm.eps
        norms = torch.stack(weights) if weights else None
        made = RotatedHeads.apply(qkv, *rotary, norms, self.q_gain, self.n_heads, self.n_kv_heads, eps, n_copies, self.exclusive)
        return *made[:3], made[-1]


def exclude_own_value(y: Tensor, v: Tensor) -> Tensor:
    """``y − (y · v̂) v̂`` with v̂ the unit vector of the position's own value: exclusive attention (XSA).

    (B, T, H, dh) and (B, T, K, dh) → (B, T, H, dh). Each query head excludes
    the value of its own group; values are not repeated for it. Computed in
    fp32, or fp64, and rounded once to the dtype of ``y``.
    """
    wide = torch.promote_types(y.dtype, torch.float32)
    groups = y.to(wide).unflatten(2, (v.shape[2], -1))
    unit = F.normalize(v.to(wide), dim=-1, eps=1e-12)[..., None, :]
    return (groups - (groups * unit).sum(-1, keepdim=True) * unit).flatten(2, 3).to(y.dtype)


def _kernels(backend: str, mask: Mask, x: Tensor, head_dim: int) -> tuple[str, str] | None:
    """Names of the kernels, forward and backward, on the device and in the dtype of ``x``; None where torch's own functions serve.

    On the meta device one stands for all: none keeps scores, and torch's own would there.
    """
    if x.is_meta:
        return "cudnn", "cudnn"
    if backend == "auto":
        if mask is not None or not fused(x) or head_dim % 8 or head_dim > 128:
            return None
        if HAS_FLASH4:
            return "cudnn", "flash4"
        return None if torch.are_deterministic_algorithms_enabled() else ("cudnn", "cudnn")
    forward, _, backward = backend.partition("+")
    return (forward, backward or forward) if forward in KERNELS else None


def attention_mask(batch: Batch, backend: str, cache: KVCache | None, head_dim: int, dtype: torch.dtype) -> Mask:
    """What each position of ``batch`` sees, for every layer of one forward pass.

    With a cache the batch is a continuation of one document a row, and a
    position sees the slots up to its own. On the meta device, where ids say
    nothing, it is None. Raises TitanError where the backend cannot serve heads
    of this width and dtype on the batch's device.
    """
    positions, ids = batch.positions, batch.document_ids
    if cache is not None:
        slots = torch.arange(cache.used, device=positions.device)
        return (slots <= positions[..., None])[:, None]
    if positions.is_meta:
        return None
    if backend in NAMED and not torch.compiler.is_compiling():
        deterministic = torch.is_grad_enabled() and torch.are_deterministic_algorithms_enabled()
        require(backend, head_dim, documents=batch.document_mask, dtype=dtype, deterministic=deterministic, device=positions.device)
    if backend == "flex" or (backend == "auto" and positions.is_cuda and batch.document_mask):
        return _build_block_mask(ids if batch.document_mask else torch.zeros_like(ids))
    if not batch.document_mask:
        return None
    if backend.partition("+")[0] in KERNELS:
        return cumulative_lengths(ids, batch.max_documents)
    n = ids.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool, device=ids.device).tril()
    return (causal & (ids[:, :, None] == ids[:, None, :]))[:, None]


def _block_mask(ids: Tensor) -> BlockMask:
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (ids[b, q] == ids[b, k])

    # Uncompiled, create_block_mask writes the whole (B, T, T) mask first.
    create: Any = compiled(create_block_mask)
    n_rows, n = ids.shape
    block_mask: BlockMask = create(sees, n_rows, None, n, n, device=ids.device)
    return block_mask


_build_block_mask = _block_mask


def keep_block_masks_outside_graphs() -> None:
    """To be called before a whole model is compiled: the mask becomes an input of its graph.

    Traced into the graph, the mask made a forward pass without gradients read
    outside its memory (torch 2.11, H200). Not a decorator, because
    ``torch.compiler.disable`` imports the compiler, which takes a second that
    only those who compile should wait.
    """
    global _build_block_mask
    _build_block_mask = torch.compiler.disable(_block_mask)


def attend_by_torch(backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """q (B, T, H, dh), k and v (B, S, K, dh) → (B, T, H, dh), by torch's own functions: "math", else FlexAttention or SDPA as the mask is."""
    attend = _attend_math if backend == "math" else _attend_sdpa if mask is None or isinstance(mask, Tensor) else _attend_flex
    dtype = multiplied_in(q)
    wide_q, wide_k, wide_v = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
    return attend(wide_q, wide_k, wide_v, mask).transpose(1, 2).to(q.dtype)


# Each takes q (B, H, T, dh), k and v (B, K, S, dh) and gives (B, H, T, dh) in the dtype of q.
def _attend_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])


def _attend_flex(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    attend: Any = flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)
    y: Tensor = attend(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return y


def _attend_math(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-1, -2)).to(wide) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(q.dtype) @ v
