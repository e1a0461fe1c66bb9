"""Attention kernels against a loop over documents in float64.

On the CPU the packages are played by plain products; what is tested there is
everything around a kernel: lengths, shapes, gradients, compiling, recomputing.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from titanlm import attention_choice
from titanlm.batch import Batch, Row, document_bound
from titanlm.distributed import activation_checkpointing
from titanlm.errors import TitanError
from titanlm.kernels import fused
from titanlm.kernels.causal_attention import KERNELS, CausalAttention, Kernel, copies
from titanlm.kernels.lengths import cumulative_lengths
from titanlm.kernels.refusals import WIDTHS, refusals
from titanlm.models.decoder import Decoder, DecoderConfig
from titanlm.models.golf import Golf, GolfConfig
from titanlm.models.layers import attention
from titanlm.models.layers.attention import _kernels, attend_by_torch, attention_mask
from titanlm.packers.boundaries import finish
from titanlm.precision import set_precision

IDS = torch.tensor([[7] * 12, [3] * 5 + [4] * 1 + [9] * 6, [9] * 4 + [-1] * 8])
"""One document; three; one that goes on, and padding."""
BEGINS = [[0, 12], [0, 5, 6, 12], [0, 4, 12]]
BATCH = Batch(IDS, IDS.roll(-1, 1), torch.arange(12).expand(3, -1), IDS, torch.zeros_like(IDS))


def exact(q: Tensor, k: Tensor, v: Tensor, begins: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Output (B, T, H, dh) and lse (B, H, T), a row, a document and a head at a time."""
    y, lse = torch.empty_like(q), q.new_empty(*q.shape[:1], q.shape[2], q.shape[1])
    for row, edges in enumerate(begins):
        for start, end in zip(edges, edges[1:], strict=False):
            for head in range(q.shape[2]):
                group = head // (q.shape[2] // k.shape[2])
                for place in range(start, end):
                    scores = k[row, start : place + 1, group] @ q[row, place, head] / q.shape[-1] ** 0.5
                    weights = scores.softmax(0)
                    y[row, place, head] = weights @ v[row, start : place + 1, group]
                    lse[row, head, place] = scores.logsumexp(0)
    return y, lse


def drawn(rows: int = 3, seq_len: int = 12, heads: int = 4, kv_heads: int = 2, width: int = 16, **options: Any) -> list[Tensor]:
    """q, k, v and a gradient."""
    generator = torch.Generator(options.get("device", "cpu")).manual_seed(1)
    return [torch.randn(rows, seq_len, n, width, generator=generator, **options) for n in (heads, kv_heads, kv_heads, heads)]


def played() -> ModuleType:
    """What titanlm calls of ``flash_attn.cute.interface``, by plain products over packed sequences."""

    def sequences(q: Tensor, lengths: Tensor | None) -> list[slice]:
        edges = list(range(0, q.shape[0] * q.shape[1] + 1, q.shape[1])) if lengths is None else lengths.tolist()
        assert edges[-1] == (q.shape[0] if lengths is not None else q.shape[0] * q.shape[1])
        return [slice(start, end) for start, end in zip(edges, edges[1:], strict=False) if start < end]

    def heads(x: Tensor, part: slice, n_heads: int) -> Tensor:
        flat = x.reshape(-1, *x.shape[-2:])[part].transpose(0, 1)
        return flat.repeat_interleave(n_heads // len(flat), 0)

    def weights(q: Tensor, k: Tensor, part: slice) -> Tensor:
        scores = heads(q, part, q.shape[-2]) @ heads(k, part, q.shape[-2]).mT / q.shape[-1] ** 0.5
        return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)

    def forward(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any, causal: bool, return_lse: bool):
        assert causal
        assert return_lse
        assert cu_seqlens_q is cu_seqlens_k
        assert max_seqlen_q == max_seqlen_k
        y, lse = torch.zeros(q.shape, dtype=q.dtype), torch.zeros(q.shape[-2], q.numel() // q.shape[-1] // q.shape[-2])
        for part in sequences(q, cu_seqlens_q):
            scores = weights(q, k, part)
            y.view(-1, *q.shape[-2:])[part] = (scores.softmax(-1) @ heads(v, part, q.shape[-2])).transpose(0, 1)
            lse[:, part] = scores.logsumexp(-1).float()
        return y, lse if cu_seqlens_q is not None else lse.view(-1, *q.shape[:2]).transpose(0, 1).contiguous(), None, None, None

    def backward(q: Tensor, k: Tensor, v: Tensor, y: Tensor, g: Tensor, lse: Tensor, *, cu_seqlens_q: Any, deterministic: bool, causal: bool, **same: Any):
        assert causal
        assert same["cu_seqlens_k"] is cu_seqlens_q
        if cu_seqlens_q is None:
            assert lse.is_contiguous()
            lse = lse.transpose(0, 1).flatten(1)
        dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v))
        n, groups = q.shape[-2], (k.shape[-2], -1)
        for part in sequences(q, cu_seqlens_q):
            p = (weights(q, k, part) - lse[:, part, None]).exp().to(q.dtype)
            gradient, out = heads(g, part, n), heads(y, part, n)
            ds = p * (gradient @ heads(v, part, n).mT - (gradient * out).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
            dq.view(-1, *q.shape[-2:])[part] = (ds @ heads(k, part, n)).transpose(0, 1)
            dk.view(-1, *k.shape[-2:])[part] = (ds.mT @ heads(q, part, n)).unflatten(0, groups).sum(1).transpose(0, 1)
            dv.view(-1, *v.shape[-2:])[part] = (p.mT @ gradient).unflatten(0, groups).sum(1).transpose(0, 1)
        results = [same.get(name, fresh).copy_(fresh) for name, fresh in (("dq", dq), ("dk", dk), ("dv", dv))]
        return tuple(results)

    module = ModuleType("flash_attn.cute.interface")
    module._flash_attn_fwd, module._flash_attn_bwd = forward, backward  # type: ignore[attr-defined]
    return module


@pytest.fixture
def flash4(monkeypatch: pytest.MonkeyPatch) -> None:
    interface, cute = played(), ModuleType("flash_attn.cute")
    cute.interface = interface  # type: ignore[attr-defined]
    for module in (ModuleType("flash_attn"), cute, interface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("titanlm.models.layers.attention.require", lambda *_, **__: None)  # of a device that there is not


# ---------------------------------------------------------------- lengths
def test_lengths_are_where_documents_begin() -> None:
    expected = [0, 12, 17, 18, 24, 28, 36]
    for n, lengths in ((6, expected), (9, [*expected, 36, 36, 36]), (None, expected)):
        found = cumulative_lengths(IDS, n)
        assert found.dtype == torch.int32
        assert found.tolist() == lengths
    with pytest.raises(RuntimeError, match="more documents than its max_documents"):
        cumulative_lengths(IDS, 5)
    generator = np.random.default_rng(0)
    for _ in range(20):
        ids = generator.integers(3, size=(generator.integers(1, 5), generator.integers(1, 40)))
        begins = [row * ids.shape[1] + at for row in range(len(ids)) for at in range(ids.shape[1]) if at == 0 or ids[row, at] != ids[row, at - 1]]
        bound = document_bound(ids)
        assert cumulative_lengths(torch.from_numpy(ids), bound).tolist() == begins + [ids.size] * (bound + 1 - len(begins))
        assert len(begins) <= bound < 2 * max(len(begins), 1)


def test_the_bound_is_the_same_for_batch_after_batch() -> None:
    generator = np.random.default_rng(0)
    drawn_ids = [(generator.random((64, 1024)) < 1 / mean).cumsum(1) for mean in (4000, 2000, 1500)]
    assert {document_bound(ids) for ids in drawn_ids} == {128}  # 65,536 positions / 512; 64 rows and 16 to 44 boundaries
    batch = Batch.of(finish(row_of(IDS.numpy()), document_mask=True))
    assert batch.max_documents == 8
    assert Batch.of(finish(row_of(IDS.numpy()), document_mask=False), document_mask=False).max_documents is None


def row_of(ids: np.ndarray) -> Row:
    nothing = np.zeros(ids.shape, dtype=np.int64)
    return Row(nothing, nothing, nothing.astype(np.int32), ids, nothing.astype(np.int32))


# ---------------------------------------------------------------- around a kernel
@pytest.mark.parametrize("documents", [True, False])
def test_values_and_gradients_are_those_of_a_loop(flash4: None, documents: bool) -> None:
    begins = BEGINS if documents else [[0, 12]] * 3
    lengths = cumulative_lengths(IDS, 8) if documents else None
    q, k, v, g = drawn(dtype=torch.float64)
    ours, theirs = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    y, lse = exact(*theirs, begins)
    found = KERNELS["flash4"].forward(q, k, v, lengths)
    torch.testing.assert_close(found[0], y)
    torch.testing.assert_close(found[1], (lse.transpose(0, 1).flatten(1) if documents else lse).float())
    y.backward(g)
    CausalAttention.apply(*ours, lengths, "flash4", "flash4").backward(g)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6, atol=1e-6)  # lse is fp32


@pytest.mark.parametrize("documents", [True, False])
def test_operators_are_what_they_say(flash4: None, documents: bool) -> None:
    q, k, v, g = drawn()
    lengths = cumulative_lengths(IDS, 8) if documents else None
    torch.library.opcheck(torch.ops.titanlm.flash4_forward.default, (q, k, v, lengths))
    y, lse = torch.ops.titanlm.flash4_forward(q, k, v, lengths)
    torch.library.opcheck(torch.ops.titanlm.flash4_backward.default, (g, q, k, v, y, lse, lengths))


@pytest.mark.parametrize("name", KERNELS)
def test_shapes_of_all_kernels(name: str) -> None:
    """As torch and the operators declare them, which is what a compiler goes by."""
    with torch._subclasses.FakeTensorMode():
        for documents in (False, True) if name != "cudnn" else (False,):
            q, k, v, g = drawn_fakes()
            lengths = torch.zeros(9, dtype=torch.int32, device="cuda") if documents else None
            y, lse = KERNELS[name].forward(q, k, v, lengths)
            assert (y.shape, y.dtype, y.is_contiguous()) == (q.shape, q.dtype, True)
            assert lse.dtype == torch.float32
            assert lse.shape == ((4, 36) if documents or name == "varlen" else (3, 4, 12))
            gradients = KERNELS[name].backward(g, q, k, v, y, lse, lengths)
            assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("forward", KERNELS)
@pytest.mark.parametrize("backward", KERNELS)
def test_any_two_are_one_graph(forward: str, backward: str) -> None:
    """Without values, so that kernels of a GPU can be traced on a CPU."""
    torch._dynamo.reset()
    documents = "cudnn" not in (forward, backward)
    lengths = torch.zeros(9, dtype=torch.int32, device="meta") if documents else None
    inputs = [torch.empty(3, 12, n, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (4, 2, 2)]
    attend = torch.compile(lambda q, k, v, lengths: CausalAttention.apply(q, k, v, lengths, forward, backward) * 2, fullgraph=True, backend="aot_eager")
    y = attend(*inputs, lengths)
    y.sum().backward()
    assert y.shape == inputs[0].shape
    assert [x.grad.shape for x in inputs] == [x.shape for x in inputs]  # type: ignore[union-attr]


@pytest.mark.parametrize(("heads", "head_dim", "backend", "documents", "major", "n"), [
    ((8, 4), 64, "cudnn+flash4", False, 9, 2), ((8, 4), 64, "flash4", False, 9, 2), ((8, 4), 64, "flash4", True, 9, 2),
    ((8, 4), 64, "cudnn", False, 9, 1), ((8, 4), 64, "flash4+cudnn", False, 9, 1), ((8, 4), 128, "flash4", False, 9, 1),
    ((8, 2), 64, "flash4", False, 9, 1), ((4, 4), 64, "flash4", False, 9, 1), ((8, 4), 64, "flash4", False, 10, 1),
])  # fmt: skip
def test_keys_are_written_out_where_that_was_measured_to_gain(
    heads: tuple[int, int], head_dim: int, backend: str, documents: bool, major: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "_major", lambda index: major)
    made = attention.Attention(64, *heads, head_dim, qk_norm="none", norm_eps=1e-6, backend=backend)
    mask = torch.zeros(3, dtype=torch.int32) if documents else None
    device = torch.device("cuda", 0)
    assert made._copies(_kernels(backend, mask, torch.empty(1, 2, 64), head_dim), device) == n
    assert made._copies(None, device) == 1
    # What is measured is what runs.
    drawn: list[tuple[int, ...]] = []
    shape = attention_choice.Shape(2, 8, *heads, head_dim, documents, torch.float32)
    kernel = Kernel(lambda q, k, v, lengths: drawn.append(k.shape) or (q, q), lambda *_: None)  # type: ignore[func-returns-value, arg-type, return-value]
    monkeypatch.setitem(KERNELS, backend.rpartition("+")[2], kernel)
    monkeypatch.setattr(attention_choice, "attention_mask", lambda *_: mask)
    monkeypatch.setattr(attention_choice, "copies", lambda backend, *rest: copies(backend, *rest[:-1], device))
    attention_choice.passes(backend.rpartition("+")[2], shape, attention_choice.drawn_batch(shape), torch.device("cpu"))
    assert drawn == [(2, 8, heads[1] * n, head_dim)]


def test_what_auto_is_without_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(1, 2, 256)
    assert _kernels("auto", None, x, 64) is None  # on the CPU
    monkeypatch.setattr(attention, "fused", lambda q: True)
    for has_flash4, deterministic, chosen in ((True, False, "flash4"), (True, True, "flash4"), (False, False, "cudnn"), (False, True, None)):
        monkeypatch.setattr(attention, "HAS_FLASH4", has_flash4)
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda deterministic=deterministic: deterministic)
        assert _kernels("auto", None, x, 64) == (chosen and ("cudnn", chosen))
        assert _kernels("auto", None, x, 256) is None
        assert _kernels("auto", torch.ones(1, 1, 2, 2, dtype=torch.bool), x, 64) is None
    assert _kernels("cudnn+flash4", None, x, 64) == ("cudnn", "flash4")
    assert _kernels("varlen", None, x, 64) == ("varlen", "varlen")
    assert _kernels("sdpa", None, x, 64) is _kernels("flex", None, x, 64) is _kernels("math", None, x, 64) is None


def drawn_fakes() -> list[Tensor]:
    return [torch.empty(3, 12, n, 64, dtype=torch.bfloat16, device="cuda") for n in (4, 2, 2, 4)]


def model_of(kind: str, backend: str, width: int = 16) -> Any:
    settings: dict[str, Any] = {"n_layers": 2, "d_model": 4 * width, "d_ff": 256, "n_heads": 4, "n_kv_heads": 2, "attention_backend": backend}
    model: Any = Decoder(DecoderConfig(**settings), vocab_size=16, max_seq_len=12) if kind == "decoder" else None
    model = model or Golf(GolfConfig(**settings, exclusive_last=1, output="mup", init="orthogonal"), vocab_size=16, max_seq_len=12)
    model.init_weights(0)
    return model


def results(model: Any, batch: Batch) -> list[Tensor]:
    """Hidden states and every gradient."""
    hidden = model(batch)
    model.zero_grad()
    (hidden * torch.linspace(-1, 1, hidden.shape[-1])).square().sum().backward()
    return [hidden.detach(), *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]


def agree(ours: Tensor, other: Tensor) -> None:
    """But for rounding, which is of sums and so goes by the largest."""
    torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("kind", ["decoder", "golf"])
@pytest.mark.parametrize("document_mask", [True, False])
def test_models_compute_the_same(flash4: None, kind: str, document_mask: bool) -> None:
    batch = replace(BATCH, tokens=IDS.abs() % 16, document_mask=document_mask)
    expected = results(model_of(kind, "math"), batch)
    for max_documents in (None, 8):
        for ours, other in zip(results(model_of(kind, "flash4"), replace(batch, max_documents=max_documents)), expected, strict=True):
            agree(ours, other)


@pytest.mark.parametrize("how", ["block", "model", "selective", "full"])
def test_compiled_and_recomputed(flash4: None, how: str) -> None:
    torch._dynamo.reset()
    batch = replace(BATCH, tokens=IDS.abs() % 16, max_documents=8)
    expected = results(model_of("decoder", "math"), batch)
    model = model_of("decoder", "flash4")
    calls, forward = [], sys.modules["flash_attn.cute.interface"]._flash_attn_fwd
    sys.modules["flash_attn.cute.interface"]._flash_attn_fwd = lambda *a, **k: calls.append(1) or forward(*a, **k)  # type: ignore[attr-defined]
    if how == "block":
        for block in model.blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    elif how == "model":
        model.compile(dynamic=False, backend="aot_eager")
    else:
        activation_checkpointing.apply(model.blocks, how)  # type: ignore[arg-type]
    for ours, other in zip(results(model, batch), expected, strict=True):
        agree(ours, other)
    assert len(calls) == (4 if how == "full" else 2)  # "selective" keeps what attention gave


def test_other_document_counts_are_no_other_graph(flash4: None) -> None:
    torch._dynamo.reset()
    model = model_of("decoder", "flash4")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model.compile(dynamic=False, backend=counter)
    for begins in (1, 2, 3):
        batch = Batch.of(finish(row_of((np.arange(8192) % 4096 < begins).cumsum()[None].repeat(2, 0).reshape(2, -1)), document_mask=True))
        model(replace(batch, **{name: getattr(batch, name)[:, :12] for name in ("tokens", "labels", "positions", "document_ids", "target_bytes")}))
    assert counter.frame_count == 1


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("backend", "circumstances", "words"),
    [
        ("cudnn", {"head_dim": 136}, 'a multiple of 8 up to 128, and they are 136 wide; use "auto"'),
        ("flash4", {"head_dim": 20}, "a multiple of 8 up to 256, and they are 20 wide"),
        ("flex", {"head_dim": 8}, "16 or more, and they are 8 wide"),
        ("cudnn", {"documents": True}, "knows no documents; set data.document_mask = false"),
        ("cudnn", {"deterministic": True}, "no deterministic backward pass; set train.deterministic = false"),
        ("varlen", {"dtype": torch.float32}, 'not in float32; set train.precision = "bf16"'),
        ("flash3", {"device": torch.device("cpu")}, 'runs on CUDA alone, not on cpu; use "auto" or "sdpa"'),
        ("flex", {"device": torch.device("cpu")}, 'runs on CUDA alone, not on cpu; use "auto" or "sdpa"'),
        ("flash4", {"device": torch.device("cuda")}, 'not installed: pip install "flash-attn-4>=4.0.0b36"'),
        ("flash3", {"device": torch.device("cuda")}, "not installed: build hopper/"),
    ],
)
def test_what_a_backend_refuses(backend: str, circumstances: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titanlm.kernels.refusals.HAS_FLASH4", False)
    (found,) = refusals(backend, **{"head_dim": 64, **circumstances})
    assert words in found
    assert found.startswith(f'"{backend}" ')


@pytest.mark.parametrize(
    ("backend", "capability", "head_dim", "words"),
    [
        ("flash4", (8, 0), 64, "no kernels for a GPU of capability 8.0"),
        ("flash4", (10, 0), 192, "up to 128, or of 256"),
        ("flash4", (12, 0), 64, "no deterministic"),
        ("flash3", (10, 0), 64, "no kernels"),
        ("varlen", (7, 5), 64, "no kernels"),
    ],
)
def test_what_a_gpu_does_not_serve(backend: str, capability: tuple[int, int], head_dim: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titanlm.kernels.refusals.missing_package", lambda backend: None)
    for served, found in ((capability, words), ((9, 0), "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, served=served: served)
        assert found in "".join(refusals(backend, head_dim, deterministic=True, device=torch.device("cuda")))
        assert bool(found) == any(refusals(backend, head_dim, deterministic=True, device=torch.device("cuda")))


def test_models_refuse_by_the_name_of_the_key() -> None:
    for kind in ("decoder", "golf"):
        for backend in WIDTHS:
            with pytest.raises(TitanError, match=f'model.attention_backend: "{backend}" '):
                model_of(kind, backend)(BATCH)
    with pytest.raises(ValueError, match='attention_backend: "cudnn" needs heads of a width'):
        Decoder(DecoderConfig(n_heads=4, head_dim=20, attention_backend="cudnn"), vocab_size=16, max_seq_len=12)
    with pytest.raises(ValueError, match='attention_backend: "flash4" needs heads of a width'):
        Golf(GolfConfig(n_heads=8, n_kv_heads=4, d_model=160, attention_backend="flash4"), vocab_size=16, max_seq_len=12)


# ---------------------------------------------------------------- on a GPU
PAIRS = [*WIDTHS, "sdpa", "auto", "cudnn+flash4", "flash4+cudnn", "varlen+flash4", "flash4+flash3"]


def rows_of_320(documents: bool) -> Tensor:
    """A document, many, one before padding, and as many as there are tokens; or a document each."""
    rows = [[7] * 320, [at // 3 if at < 90 else 100 + at // 77 for at in range(320)], [5] * 200 + [-1] * 120, list(range(320))]
    return torch.tensor(rows if documents else [[7] * 320] * 4, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("backend", PAIRS)
def test_kernels_agree_with_plain_products(backend: str, documents: bool, width: int) -> None:
    """bf16 no further from plain attention in fp32 than plain attention in bf16 is, half as much again; values and gradients."""
    device = torch.device("cuda")
    names = [name for name in backend.split("+") if name in WIDTHS]
    if why := [text for name in names for text in refusals(name, width, documents=documents, dtype=torch.bfloat16, device=device)]:
        pytest.skip(why[0])
    if not documents and backend == "varlen+flash4":
        pytest.skip("without documents their intermediates have different shapes")
    ids = rows_of_320(documents)
    positions = torch.arange(320, device=device).expand(4, -1)
    batch = Batch(ids, ids, positions, ids, ids, document_mask=documents, max_documents=document_bound(ids.cpu().numpy()))
    q, k, v, g = drawn(4, 320, 8, 4, width, device="cuda", dtype=torch.bfloat16)

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        mask = attention_mask(batch, backend, None, width, dtype)
        kernels = _kernels(backend, mask, inputs[0], width)
        y = CausalAttention.apply(*inputs, mask, *kernels) if kernels else attend_by_torch(backend, *inputs, mask)
        y.backward(g.to(dtype))
        return [y.detach().double(), *(x.grad.double() for x in inputs)]

    truth = run("math", torch.float32)
    for ours, plain, true in zip(run(backend, torch.bfloat16), run("math", torch.bfloat16), truth, strict=True):
        assert (ours - true).norm() <= 1.5 * (plain - true).norm() + 1e-3 * true.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["none", "block", "model", "selective"])
@pytest.mark.parametrize("backend", ["cudnn", "flash4", "varlen", "cudnn+flash4"])
@pytest.mark.parametrize("kind", ["decoder", "golf"])
def test_whole_models_on_a_gpu(kind: str, backend: str, how: str) -> None:
    """Hidden states and gradients of bf16 models against the same in fp32 by plain products."""
    torch._dynamo.reset()
    documents = "cudnn" not in backend
    names = [name for name in backend.split("+") if any(refusals(name, 64, documents=documents, device=torch.device("cuda")))]
    if names:
        pytest.skip(f"{names[0]} does not serve here")
    # A number that came back later in a row would be the same document to a mask, and another one to lengths.
    ids = (IDS[:, None] + 100 * torch.arange(8)[:, None]).flatten(1).cuda()
    # Drawn: where all tokens of a document are the same, true gradients of queries and keys are nearly 0, and bf16 leaves its rounding only.
    tokens = torch.randint(16, ids.shape, generator=torch.Generator().manual_seed(0)).cuda()
    batch = Batch(tokens, ids, torch.arange(96, device="cuda").expand(3, -1), ids, ids, document_mask=documents, max_documents=64)

    def run(backend: str, precision: Any, how: str) -> list[Tensor]:
        model = model_of(kind, backend.partition("+")[0], 64).cuda()
        set_precision(model, precision)
        model.attention_backend = backend
        for block in model.blocks:
            block.attention.backend = backend
        if how == "block":
            for block in model.blocks:
                block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
        elif how == "model":
            model.compile(dynamic=False)
        elif how == "selective":
            activation_checkpointing.apply(model.blocks, "selective")
        return [x.double() for x in results_on(model, batch)]

    truth = run("math", "fp32", "none")
    for ours, plain, true in zip(run(backend, "bf16", how), run("math", "bf16", "none"), truth, strict=True):
        assert (ours - true).norm() <= 2 * (plain - true).norm() + 2e-2 * true.norm()


def results_on(model: Any, batch: Batch) -> list[Tensor]:
    hidden = model(batch)
    weight = torch.linspace(-1, 1, hidden.shape[-1], device=hidden.device)
    (hidden.float() * weight).square().sum().backward()
    return [hidden.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]
