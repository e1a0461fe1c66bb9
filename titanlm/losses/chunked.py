"""Losses over a large vocabulary without its logits.

With V = 200,000 the logits of 65,536 tokens take 26 GB in bf16, and a plain
loss holds them several times. But a loss over next tokens needs three numbers
a token: z_y, the label's logit; lse, the logarithm of Σ exp z; and, for label
smoothing, z̄, the mean logit. Every loss here is a function f(z_y, lse, z̄) of
these, and its gradient with respect to the logits is

    ∂f/∂lse · softmax(z) + ∂f/∂z_y · onehot(y) + ∂f/∂z̄ / V,

three small vectors and one pass over z. So the forward pass takes
``chunk_tokens`` tokens at a time: logits, the three numbers, the derivatives
of f by autograd, the gradient written over the logits, the head's own
backward, and the chunk is gone. What is left for the real backward pass is
the gradient of the hidden states and of the head's weights, to be multiplied
by the incoming factor. Nothing as wide as the vocabulary outlives a chunk but
the weight gradients, and no logit is computed twice.

Alternatives: recomputing logits in the backward pass (Wijmans et al. 2024,
arXiv:2411.09009) saves passes over memory but costs a fourth matrix product,
which pays only for narrow models. Chunked autograd through checkpointing costs
the same product.

Precision: logits stay in the dtype of the hidden states; statistics, the
loss and the logit gradient are computed in fp32 (fp64 for fp64 input), and the
weight gradients of the chunks are summed in fp32. So a bf16 run's weight
gradient is, if anything, closer to the truth than the unchunked one.

A head that says ``casts_weights`` gets its weights in the dtype of the hidden
states, cast once rather than once a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from titanlm.batch import IGNORE
from titanlm.kernels.fused import fused
from titanlm.models.layers.compiled import compiled
from titanlm.models.layers.rounding import rounded_once
from titanlm.registry import Loss


class LossSums(NamedTuple):
    """Sums over the labels that are not −100, in fp32, or fp64 for fp64 input."""

    loss: Tensor
    """Σ of the loss, 0-d, differentiable."""
    nll: Tensor
    """(M,) Σ (lse − z_y) over the labels of each source, the negative log-likelihood in nats; carries no gradient."""


def loss_sums(
    hidden: Tensor,
    labels: Tensor,
    head: nn.Module,
    loss: Loss,
    *,
    sources: Tensor | None = None,
    n_sources: int = 1,
    compile_kernels: bool = False,
    fuses: bool = False,
) -> LossSums:
    """The loss summed over all trained labels.

    ``hidden`` is (B, T, D), ``labels`` (B, T) with −100 where nothing is
    trained, ``head`` maps (n, D) to (n, V) and must not keep its output for
    its backward pass, which is overwritten. A head with a ``cap`` is called with
    ``capped=False``, and the cap applied where logits are passed over anyway. ``loss.chunk_tokens`` tokens are
    taken at a time, evenly split; 0 takes all at once by plain autograd.
    Without gradients only the sums are computed. ``sources`` (B, T) says which
    of ``n_sources`` each label is of. ``compile_kernels`` compiles the passes over
    the logits; where ``fuses`` is set and kernels serve, those of a chunk that is
    trained on are ``titanlm.kernels.logits_triton``.
    """
    flat, targets = hidden.flatten(0, -2), labels.flatten()
    groups = torch.zeros_like(targets) if sources is None else sources.flatten()
    run = _Run(head, loss, n_sources, compile_kernels, fuses and fused(flat), getattr(head, "cap", None))
    if loss.chunk_tokens == 0:
        return run._replace(cap=None).sums(head(flat), targets, groups)
    parameters = dict(head.named_parameters())
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (flat, *parameters.values())):
        with rounded_once(head) as weights:  # for all chunks
            return LossSums(*_Chunked.apply(run, tuple(weights), flat, targets, groups, *weights.values()))
    chunks = [run.sums(run.logits(rows), wanted, group) for rows, wanted, group in _chunks(loss.chunk_tokens, flat, targets, groups)]
    return LossSums(*(torch.stack(sums).sum(0) for sums in zip(*chunks, strict=True)))


# ---------------------------------------------------------------- the passes over the logits
def statistics(logits: Tensor, labels: Tensor, needs_mean: bool, cap: float | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(z_y, lse, z̄ or None) of (n, V) logits, which are capped first, and (n,) labels; each (n,) in fp32 or fp64.

    Where the label is −100, z_y is some finite number.
    """
    z = _wide(logits) if cap is None else torch.tanh(_wide(logits) / cap) * cap
    z_y = z.gather(-1, labels.clamp_min(0)[:, None]).squeeze(-1)
    return z_y, torch.logsumexp(z, -1), z.mean(-1) if needs_mean else None


def write_gradient(logits: Tensor, lse: Tensor, g_lse: Tensor, g_mean: Tensor | None, cap: float | None) -> None:
    """Overwrite (n, V) logits by g_lse·softmax + g_z̄/V, through the cap; the label's entry is set apart, see :func:`label_entries`."""
    gradient = _wide(logits)  # the logits themselves when they are as wide: every step is in place
    tanh = None
    if cap is not None:
        tanh = torch.tanh(gradient / cap)
        gradient.copy_(tanh).mul_(cap)
    gradient.sub_(lse[:, None]).exp_().mul_(g_lse[:, None])
    if g_mean is not None:
        gradient.add_((g_mean / logits.shape[-1])[:, None])
    if tanh is not None:
        gradient.mul_(tanh.square_().neg_().add_(1.0))
    if gradient is not logits:
        logits.copy_(gradient)


def label_entries(
    logits: Tensor, labels: Tensor, z_y: Tensor, lse: Tensor, g_zy: Tensor, g_lse: Tensor, g_mean: Tensor | None, cap: float | None
) -> tuple[Tensor, Tensor]:
    """Where the label of each row is, (n, 1), and the gradient there: g_lse·softmax + g_z_y + g_z̄/V, through the cap, summed before it is rounded.

    In bf16, 1 − 0.001 is 1: adding −1 to the rounded softmax of a sure token would leave 0.
    """
    places = labels.clamp_min(0)[:, None]
    entry = (z_y - lse).exp() * g_lse + g_zy
    if g_mean is not None:
        entry = entry + g_mean / logits.shape[-1]
    if cap is not None:
        entry = entry * (1 - torch.tanh(_wide(logits.gather(1, places).squeeze(1)) / cap).square())
    return places, entry.to(logits.dtype)[:, None]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------- one chunk, all chunks
class _Run(NamedTuple):
    head: nn.Module
    loss: Loss
    n_sources: int
    compile_kernels: bool
    fused: bool
    """Only of what is differentiated here and by no autograd."""
    cap: float | None
    """Of logits that ``logits`` gives as they are before it."""

    def logits(self, rows: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        """(n, D) → (n, V). The cap is left to the passes over them, which come by anyway."""
        before_cap = {} if self.cap is None else {"capped": False}
        found: Tensor = self.head(rows, **before_cap) if weights is None else functional_call(self.head, weights, (rows,), before_cap)
        return found

    def statistics(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        compute = compiled(statistics) if self.compile_kernels else statistics
        z_y, lse, z_mean = compute(logits, labels, getattr(self.loss, "needs_mean", False), self.cap)
        return z_y, lse, z_mean

    def sums(self, logits: Tensor, labels: Tensor, sources: Tensor) -> LossSums:
        return self._summed(labels, sources, *self.statistics(logits, labels))

    def _summed(self, labels: Tensor, sources: Tensor, z_y: Tensor, lse: Tensor, z_mean: Tensor | None) -> LossSums:
        trained = labels != IGNORE
        loss = torch.where(trained, self.loss.per_token(z_y, lse, z_mean), 0.0).sum()
        nll = torch.where(trained, lse - z_y, 0.0).detach()
        # One masked sum a source: no atomic additions, whose order changes the last bits.
        per_source = [nll if self.n_sources == 1 else torch.where(sources == source, nll, 0.0) for source in range(self.n_sources)]
        return LossSums(loss, torch.stack([part.sum() for part in per_source]))

    def differentiate(self, logits: Tensor, labels: Tensor, sources: Tensor) -> LossSums:
        """The sums of a chunk; its (n, V) logits are overwritten by the gradient of the loss."""
        with torch.no_grad():
            numbers = self._read(logits, labels)
        leaves = [number.requires_grad_() for number in numbers if number is not None]
        with torch.enable_grad():
            sums = self._summed(labels, sources, *numbers)
        trained = labels != IGNORE
        gradients = torch.autograd.grad(sums.loss, leaves, materialize_grads=True)
        # A row that is not trained is zero even where its loss is not finite.
        g_zy, g_lse, *rest = (torch.where(trained, gradient, 0.0) for gradient in gradients)
        g_mean = rest[0] if rest else None
        z_y, lse = (number.detach() for number in numbers[:2])
        with torch.no_grad():
            self._overwrite(logits, labels, z_y, lse, g_zy, g_lse, g_mean)
        return LossSums(sums.loss.detach(), sums.nll)

    def _read(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if not self.fused:
            return self.statistics(logits, labels)
        from titanlm.kernels.logits_triton import statistics

        return statistics(logits, labels, getattr(self.loss, "needs_mean", False), self.cap)

    def _overwrite(self, logits: Tensor, labels: Tensor, z_y: Tensor, lse: Tensor, g_zy: Tensor, g_lse: Tensor, g_mean: Tensor | None) -> None:
        if self.fused:
            from titanlm.kernels import logits_triton

            logits_triton.write_gradient(logits, labels, lse, g_zy, g_lse, g_mean, self.cap)
            return
        write = compiled(write_gradient) if self.compile_kernels else write_gradient
        places, entries = label_entries(logits, labels, z_y, lse, g_zy, g_lse, g_mean, self.cap)
        write(logits, lse, g_lse, g_mean, self.cap)
        logits.scatter_(1, places, entries)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, names: tuple[str, ...], hidden: Tensor, labels: Tensor, sources: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        needs_hidden, needs = ctx.needs_input_grad[2], ctx.needs_input_grad[5:]
        casts = getattr(run.head, "casts_weights", False)
        weights = [parameter.detach().to(hidden.dtype if casts else parameter.dtype) for parameter in parameters]
        for weight, need in zip(weights, needs, strict=True):
            weight.requires_grad_(need)
        trained = [i for i, need in enumerate(needs) if need]
        hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
        sums: list[LossSums] = []
        totals: list[Tensor] = []
        start = 0
        for rows, wanted, group in _chunks(run.loss.chunk_tokens, hidden, labels, sources):
            rows = rows.detach().requires_grad_(needs_hidden)
            with torch.enable_grad():
                logits = run.logits(rows, dict(zip(names, weights, strict=True)))
            gradient = logits.detach()  # the same memory, and autograd's count of changes to it
            sums.append(run.differentiate(gradient, wanted, group))
            inputs = [weights[i] for i in trained] + ([rows] if needs_hidden else [])
            gradients = list(torch.autograd.grad(logits, inputs, gradient, materialize_grads=True))
            del logits, gradient
            if hidden_gradient is not None:
                hidden_gradient[start : start + len(rows)] = gradients.pop()
            start += len(rows)
            if totals:
                for total, part in zip(totals, gradients, strict=True):
                    total.add_(part)
            else:
                totals = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in gradients]
            del gradients
        by_position: list[Tensor | None] = [None] * len(parameters)
        for i, total in zip(trained, totals, strict=True):
            by_position[i] = total.to(parameters[i].grad_dtype if parameters[i].is_leaf else parameters[i].dtype)
        ctx.gradients = [hidden_gradient, None, None, *by_position]
        loss, nll = (torch.stack(column).sum(0) for column in zip(*sums, strict=True))
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of a chunked loss are given away by the first backward pass; compute the loss again")
        return (None, None, *(None if gradient is None else gradient.mul_(outer[0]) for gradient in gradients))


def _chunks(chunk_tokens: int, *arrays: Tensor) -> list[tuple[Tensor, ...]]:
    size = chunk_size(len(arrays[0]), chunk_tokens)
    return list(zip(*(array.split(size) for array in arrays), strict=True))


def chunk_size(n_tokens: int, chunk_tokens: int) -> int:
    """Tokens of a chunk: even parts of at most ``chunk_tokens``, 0 for all. A short rest would be slow, and compile once more."""
    return max(1, -(-n_tokens // max(1, -(-n_tokens // (chunk_tokens or max(1, n_tokens))))))
