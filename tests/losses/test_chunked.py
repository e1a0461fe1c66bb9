"""The chunked engine against plain torch in float64, and what it never allocates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from titanlm.batch import IGNORE
from titanlm.kernels import logits_triton
from titanlm.losses import chunked
from titanlm.losses.chunked import LossSums, chunk_size, loss_sums
from titanlm.losses.cross_entropy import CrossEntropy, CrossEntropyConfig
from titanlm.models.layers import head as head_module
from titanlm.models.layers.embedding import Embedding
from titanlm.models.layers.head import Head

VOCAB, WIDTH = 37, 12
HEADS: dict[str, dict[str, object]] = {
    "untied": {},
    "softcap": {"softcap": 2.0},
    "tied": {"tied": True},
    "factorised": {"tied": True, "rank": 5, "softcap": 3.0},
}
CHUNKS = [1, 4, 7, 26, 1000]


class Smoothed:
    """Cross-entropy with label smoothing, to exercise the mean logit."""

    needs_mean = True

    def __init__(self, smoothing: float, chunk_tokens: int) -> None:
        self.smoothing, self.chunk_tokens = smoothing, chunk_tokens

    def per_token(self, z_y: Tensor, lse: Tensor, z_mean: Tensor | None) -> Tensor:
        assert z_mean is not None
        return lse - (1 - self.smoothing) * z_y - self.smoothing * z_mean


def make_head(tied: bool = False, rank: int | None = None, softcap: float | None = None, dtype: torch.dtype = torch.float64) -> Head:
    torch.manual_seed(1)
    embedding = Embedding(VOCAB, WIDTH, rank)
    head = Head(VOCAB, WIDTH, tied_to=embedding if tied else None, softcap=softcap)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.7)
    return head.to(dtype)


def make_batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 13, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, (2, 13), generator=generator)
    labels[0, 3:6] = labels[1, -1] = IGNORE
    return hidden, labels


def cross_entropy(chunk_tokens: int, z_loss: float = 0.0) -> CrossEntropy:
    return CrossEntropy(CrossEntropyConfig(chunk_tokens=chunk_tokens, z_loss=z_loss))


def gradients_of(total: Tensor, hidden: Tensor, head: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(total * 0.37, [hidden, *head.parameters()]))  # a factor, as the mean over tokens is


def plain_logits(hidden: Tensor, head: Head) -> Tensor:
    """The head written out once more."""
    z = hidden if head.projection is None else hidden @ head.projection.T
    z = z @ head.weight.T
    return z if head.softcap is None else head.softcap.cap * torch.tanh(z / head.softcap.cap)


def agree(ours: LossSums, total: Tensor, nll: Tensor, hidden: Tensor, head: Head) -> None:
    assert ours.loss.dtype == ours.nll.dtype == torch.float64
    assert not ours.nll.requires_grad
    torch.testing.assert_close(ours.loss, total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.nll, nll[None], rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(gradients_of(ours.loss, hidden, head), gradients_of(total, hidden, head), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_tokens", [0, *CHUNKS])
@pytest.mark.parametrize("name", HEADS)
def test_cross_entropy_equals_torch(name: str, chunk_tokens: int) -> None:
    head, (hidden, labels) = make_head(**HEADS[name]), make_batch()  # type: ignore[arg-type]
    total = F.cross_entropy(plain_logits(hidden, head).flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    agree(loss_sums(hidden, labels, head, cross_entropy(chunk_tokens)), total, total.detach(), hidden, head)


@pytest.mark.parametrize("chunk_tokens", [0, 7, 26])
def test_z_loss_and_label_smoothing_equal_autograd(chunk_tokens: int) -> None:
    for name in HEADS:
        head, (hidden, labels) = make_head(**HEADS[name]), make_batch()  # type: ignore[arg-type]
        logits, trained = plain_logits(hidden, head).flatten(0, 1), labels.flatten() != IGNORE
        nll = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")
        total = nll + 0.01 * (torch.log(torch.exp(logits).sum(-1)) ** 2)[trained].sum()
        agree(loss_sums(hidden, labels, head, cross_entropy(chunk_tokens, z_loss=0.01)), total, nll.detach(), hidden, head)
        total = F.cross_entropy(plain_logits(hidden, head).flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum", label_smoothing=0.1)
        agree(loss_sums(hidden, labels, head, Smoothed(0.1, chunk_tokens)), total, nll.detach(), hidden, head)


@pytest.mark.parametrize("chunk_tokens", [0, 7])
@pytest.mark.parametrize("name", HEADS)
def test_aligned_rows_change_nothing(name: str, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # What an odd vocabulary gets on CUDA: logits that are a view of longer rows.
    head, (hidden, labels) = make_head(**HEADS[name]), make_batch()  # type: ignore[arg-type]
    total = F.cross_entropy(plain_logits(hidden, head).flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    monkeypatch.setattr(head_module, "needs_alignment", lambda x, weight: True)
    assert head.softcap is not None or head(hidden.flatten(0, 1)).stride() == (VOCAB + 1, 1)
    for shape in ((2, 13, WIDTH), (26, WIDTH), (WIDTH,)):
        x = hidden.flatten(0, 1)[0] if len(shape) == 1 else hidden.view(shape)
        torch.testing.assert_close(head(x), plain_logits(x, head), rtol=1e-12, atol=1e-12)
    agree(loss_sums(hidden, labels, head, cross_entropy(chunk_tokens)), total, total.detach(), hidden, head)


@pytest.mark.parametrize("chunk_tokens", [0, 7])
@pytest.mark.parametrize("training", [True, False])
def test_the_nll_is_told_apart_by_source(chunk_tokens: int, training: bool) -> None:
    head, (hidden, labels) = make_head(**HEADS["factorised"]), make_batch()  # type: ignore[arg-type]
    sources = torch.randint(3, labels.shape, generator=torch.Generator().manual_seed(1))
    each = F.cross_entropy(plain_logits(hidden, head).flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    with torch.set_grad_enabled(training):
        sums = loss_sums(hidden, labels, head, cross_entropy(chunk_tokens), sources=sources, n_sources=4)
    expected = torch.stack([each[sources.flatten() == source].sum() for source in range(4)])
    torch.testing.assert_close(sums.nll, expected.detach(), rtol=1e-12, atol=1e-12)
    assert sums.nll[3] == 0
    torch.testing.assert_close(sums.loss, each.sum(), rtol=1e-12, atol=1e-12, check_dtype=False)


@pytest.mark.parametrize("chunk_tokens", [0, 7])
def test_nothing_trained_is_zero(chunk_tokens: int) -> None:
    head, (hidden, labels) = make_head(**HEADS["factorised"]), make_batch()  # type: ignore[arg-type]
    sums = loss_sums(hidden, torch.full_like(labels, IGNORE), head, cross_entropy(chunk_tokens, z_loss=0.1))
    assert sums.loss.item() == sums.nll.item() == 0.0
    assert all(gradient.count_nonzero() == 0 for gradient in gradients_of(sums.loss, hidden, head))


def test_a_loss_that_is_not_finite_where_untrained_does_no_harm() -> None:
    class Fragile:
        chunk_tokens = 7

        def per_token(self, z_y: Tensor, lse: Tensor, z_mean: Tensor | None) -> Tensor:
            return torch.log(lse - z_y)

    head, (hidden, labels) = make_head(), make_batch()
    with torch.no_grad():
        head.weight[0] = 100.0
        hidden[0, 3] = 1.0  # untrained, and as sure of label 0, which an untrained row is read at, as float64 can be
    sums = loss_sums(hidden, labels, head, Fragile())
    assert sums.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients_of(sums.loss, hidden, head))


def test_only_what_requires_gradients_is_differentiated() -> None:
    head, (hidden, labels) = make_head(**HEADS["factorised"]), make_batch()  # type: ignore[arg-type]
    everything = gradients_of(loss_sums(hidden, labels, head, cross_entropy(7)).loss, hidden, head)
    head.weight.requires_grad_(False)
    loss = loss_sums(hidden, labels, head, cross_entropy(7)).loss * 0.37
    assert head.projection is not None
    for_hidden, for_projection = torch.autograd.grad(loss, [hidden, head.projection])
    assert torch.equal(for_hidden, everything[0])
    assert torch.equal(for_projection, everything[2])
    loss = loss_sums(hidden.detach(), labels, head, cross_entropy(7)).loss * 0.37
    assert torch.equal(torch.autograd.grad(loss, head.projection)[0], everything[2])
    with torch.no_grad():
        assert not loss_sums(hidden, labels, head, cross_entropy(7)).loss.requires_grad


def test_values_do_not_depend_on_gradients_and_masters_are_not_touched() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        head, (hidden, labels) = make_head(**HEADS["factorised"], dtype=torch.float32), make_batch(dtype)  # type: ignore[arg-type]
        head = head.double() if dtype == torch.float64 else head
        before = [parameter.clone() for parameter in head.parameters()]
        trained = loss_sums(hidden, labels, head, cross_entropy(7))
        with torch.no_grad():
            validated = loss_sums(hidden, labels, head, cross_entropy(7))
        assert torch.equal(trained.loss, validated.loss)
        assert torch.equal(trained.nll, validated.nll)
        assert all(torch.equal(a, b) for a, b in zip(before, head.parameters(), strict=True))


@pytest.mark.parametrize("name", HEADS)
def test_bf16_hidden_with_fp32_masters(name: str) -> None:
    head, (hidden, labels) = make_head(**HEADS[name], dtype=torch.float32), make_batch(torch.bfloat16)  # type: ignore[arg-type]
    sums = loss_sums(hidden, labels, head, cross_entropy(7))
    ours = gradients_of(sums.loss, hidden, head)
    exact_head, exact_hidden = make_head(**HEADS[name]), hidden.detach().double().requires_grad_()  # type: ignore[arg-type]
    exact = loss_sums(exact_hidden, labels, exact_head, cross_entropy(0))
    assert sums.loss.dtype == torch.float32
    assert ours[0].dtype == torch.bfloat16
    torch.testing.assert_close(sums.loss.double(), exact.loss, rtol=5e-3, atol=0)
    for mine, theirs in zip(ours, gradients_of(exact.loss, exact_hidden, exact_head), strict=True):
        assert mine is ours[0] or mine.dtype == torch.float32
        assert (mine.double() - theirs).norm() < 0.02 * theirs.norm()


def test_gradients_of_a_sure_token_survive_bf16() -> None:
    # softmax = 1 - 0.0009: rounded to bf16 before 1 is taken off, the label's gradient would vanish.
    hidden = torch.tensor([[[1.0, 0.0]]], dtype=torch.bfloat16).requires_grad_()
    head = Head(2, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[7.0, 0.0], [0.0, 0.0]]))
    loss_sums(hidden, torch.tensor([[0]]), head, cross_entropy(1)).loss.backward()
    assert head.weight.grad is not None
    assert head.weight.grad[0, 0].item() == pytest.approx(-1 / (1 + torch.e**7), rel=0.01)


def test_parameters_used_outside_the_head_add_up() -> None:
    head, (hidden, labels) = make_head(**HEADS["tied"]), make_batch()  # type: ignore[arg-type]
    tokens = torch.randint(VOCAB, labels.shape)
    gradients = []
    for chunk_tokens in (0, 5):
        sums = loss_sums(hidden * F.embedding(tokens, head.weight), labels, head, cross_entropy(chunk_tokens))
        gradients.append(torch.autograd.grad(sums.loss, head.weight)[0])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_other_heads_will_do_and_one_that_keeps_its_output_is_told() -> None:
    torch.manual_seed(0)
    hidden, labels = make_batch()
    head: nn.Module = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)).double()
    total = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    ours = loss_sums(hidden, labels, head, cross_entropy(7)).loss
    for mine, theirs in zip(gradients_of(ours, hidden, head), gradients_of(total, hidden, head), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss_sums(hidden, labels, nn.Sequential(*head, nn.Tanh()), cross_entropy(7))


def test_a_second_backward_pass_is_refused() -> None:
    head, (hidden, labels) = make_head(), make_batch()
    loss = loss_sums(hidden, labels, head, cross_entropy(7)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward pass"):
        loss.backward()


class Largest(TorchDispatchMode):
    """Remembers the most elements that any operation gave."""

    numel = 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_full_logits_never_exist() -> None:
    n, vocab, width, chunk = 512, 4000, 4, 16
    head, hidden = Head(vocab, width), torch.randn(2, n // 2, width, requires_grad=True)
    nn.init.normal_(head.weight)
    labels = torch.randint(vocab, (2, n // 2))
    with Largest() as chunked:
        loss_sums(hidden, labels, head, cross_entropy(chunk)).loss.backward()
    with Largest() as validated, torch.no_grad():
        loss_sums(hidden, labels, head, cross_entropy(chunk))
    with Largest() as full:
        loss_sums(hidden, labels, head, cross_entropy(0)).loss.backward()
    assert chunked.numel == validated.numel == chunk * vocab
    assert full.numel == n * vocab


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced, not generated: a code generator adds nothing here but the time of a C compiler.
    torch._dynamo.reset()
    monkeypatch.setattr("titanlm.losses.chunked.compiled", lambda function: torch.compile(function, fullgraph=True, backend="aot_eager"))
    head, (hidden, labels) = make_head(dtype=torch.float32), make_batch(dtype)
    for loss in (cross_entropy(13, z_loss=0.01), Smoothed(0.1, 13)):
        plain = loss_sums(hidden, labels, head, loss)
        fused = loss_sums(hidden, labels, head, loss, compile_kernels=True)
        torch.testing.assert_close(fused.loss, plain.loss)
        for mine, theirs in zip(gradients_of(fused.loss, hidden, head), gradients_of(plain.loss, hidden, head), strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("chunk_tokens", [0, 7])
@pytest.mark.parametrize("loss_of", [lambda chunk: cross_entropy(chunk, z_loss=0.01), lambda chunk: Smoothed(0.1, chunk)])
def test_kernels_take_what_is_differentiated_by_chunks(loss_of: Any, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the kernels, by the passes in plain torch; autograd cannot see into them, so where it is asked they are not."""
    asked = []

    def read(logits: Tensor, labels: Tensor, needs_mean: bool, cap: float | None) -> Any:
        asked.append("read")
        return chunked.statistics(logits, labels, needs_mean, cap)

    def overwrite(logits: Tensor, labels: Tensor, lse: Tensor, g_zy: Tensor, g_lse: Tensor, g_mean: Tensor | None, cap: float | None) -> None:
        asked.append("overwrite")
        places, entries = chunked.label_entries(logits, labels, logits.gather(1, labels.clamp_min(0)[:, None]).squeeze(1), lse, g_zy, g_lse, g_mean, cap)
        chunked.write_gradient(logits, lse, g_lse, g_mean, cap)
        logits.scatter_(1, places, entries)

    monkeypatch.setattr(chunked, "fused", lambda x: torch.is_grad_enabled())
    monkeypatch.setattr(logits_triton, "statistics", read)
    monkeypatch.setattr(logits_triton, "write_gradient", overwrite)
    head, (hidden, labels) = make_head(), make_batch()
    plain, mine = (loss_sums(hidden, labels, head, loss_of(chunk_tokens), fuses=fuses) for fuses in (False, True))
    assert sorted(set(asked)) == (["overwrite", "read"] if chunk_tokens else [])
    for got, wanted in zip(gradients_of(mine.loss, hidden, head), gradients_of(plain.loss, hidden, head), strict=True):
        torch.testing.assert_close(got, wanted)
    asked.clear()
    with torch.no_grad():
        torch.testing.assert_close(loss_sums(hidden, labels, head, loss_of(chunk_tokens), fuses=True).loss, plain.loss.detach())
    assert asked == []


@pytest.mark.gpu
@pytest.mark.parametrize("fuses", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_on_cuda_with_compiled_and_with_fused_kernels(name: str, fuses: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        head, (hidden, labels) = make_head(**HEADS[name], dtype=torch.float32).cuda(), make_batch(dtype)  # type: ignore[arg-type]
        if head.softcap is not None:
            head.softcap.compile_kernels = True
        hidden, labels = hidden.detach().cuda().requires_grad_(), labels.cuda()
        fused = loss_sums(hidden, labels, head, cross_entropy(7, z_loss=0.01), compile_kernels=True, fuses=fuses)
        exact_head, exact_hidden = make_head(**HEADS[name]).cuda(), hidden.detach().double().requires_grad_()  # type: ignore[arg-type]
        exact = loss_sums(exact_hidden, labels, exact_head, cross_entropy(0, z_loss=0.01))
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(fused.loss.double(), exact.loss, rtol=tolerance, atol=0)
        for mine, theirs in zip(gradients_of(fused.loss, hidden, head), gradients_of(exact.loss, exact_hidden, exact_head), strict=True):
            assert (mine.double() - theirs).norm() < tolerance * theirs.norm()


def test_chunks_are_even_and_no_larger_than_asked() -> None:
    assert [chunk_size(10, chunk) for chunk in (0, 1, 4, 5, 7, 10, 99)] == [10, 1, 4, 5, 5, 10, 10]
    assert chunk_size(0, 0) == chunk_size(0, 7) == 1
