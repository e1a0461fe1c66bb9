"""The decoder against a second implementation: float64 numpy, one query at a time, from the formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from titanlm.batch import Batch
from titanlm.models.decoder import Decoder, DecoderConfig
from titanlm.models.layers.attention import Attention
from titanlm.models.layers.rope import rotary_tables

VOCAB = 23
SMALL = {"n_layers": 2, "d_model": 16, "n_heads": 4, "d_ff": 24, "max_positions": 64}
CONFIGS = {
    "plain": {},
    "gqa": {"n_kv_heads": 2},
    "mqa_wide_heads": {"n_kv_heads": 1, "head_dim": 6},
    "qk_norm": {"qk_norm": "learned", "n_kv_heads": 2},
    "relu2_untied": {"activation": "relu2", "tie_embeddings": False},
    "leaky_relu2": {"activation": "leaky_relu2"},
    "softcap": {"softcap": 1.5},
    "factorised": {"embedding_rank": 5},
    "factorised_untied": {"embedding_rank": 5, "tie_embeddings": False, "rope_theta": 100.0},
}


def two_documents(n_rows: int = 2, lengths: tuple[int, ...] = (5, 4), *, document_mask: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCAB, (n_rows, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths]).repeat(n_rows, 1)
    ids = torch.cat([torch.full((length,), 10 + i) for i, length in enumerate(lengths)]).repeat(n_rows, 1)
    return Batch(tokens, tokens.roll(-1, 1), positions, ids, torch.ones_like(tokens), document_mask)


def float64_decoder(**settings: object) -> Decoder:
    model = Decoder(DecoderConfig(**{**SMALL, **settings}), vocab_size=VOCAB, max_seq_len=64)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at initialisation, so that nothing is nearly linear
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4 + (parameter.ndim == 1))
    model.double()
    model.embedding.compute_dtype = torch.float64
    return model


# ---------------------------------------------------------------- the reference
def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return weight * x / np.sqrt((x * x).mean() + eps)


def turned(x: np.ndarray, position: int, theta: float) -> np.ndarray:
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        pair = complex(x[i], x[i + half]) * complex(np.cos(angle), np.sin(angle))
        out[i], out[i + half] = pair.real, pair.imag
    return out


def slice_of(batch: Batch, part: slice) -> Batch:
    return Batch(*(tensor[:, part].clone() for tensor in (batch.tokens, batch.labels, batch.positions, batch.document_ids, batch.target_bytes)))


def reference_logits(model: Decoder, batch: Batch) -> np.ndarray:
    c = model.config
    w = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    dh, heads, groups = model.head_dim, c.n_heads, c.n_heads // model.n_kv_heads
    rows = []
    for row in range(len(batch.tokens)):
        positions, ids = batch.positions[row].tolist(), batch.document_ids[row].tolist()
        stream = [w["embedding.weight"][token] for token in batch.tokens[row].tolist()]
        if "embedding.projection" in w:
            stream = [vector @ w["embedding.projection"] for vector in stream]
        for layer in range(c.n_layers):
            p = f"blocks.{layer}."
            normed = [norm(x, w[p + "attention_norm.weight"], c.norm_eps) for x in stream]
            per_head = {}
            for which, n_heads in (("q", heads), ("k", model.n_kv_heads), ("v", model.n_kv_heads)):
                vectors = np.array([(w[p + f"attention.{which}_proj.weight"] @ x).reshape(n_heads, dh) for x in normed])
                if which != "v":
                    for s, head in np.ndindex(len(stream), n_heads):
                        x = vectors[s, head]
                        if c.qk_norm == "learned":
                            x = norm(x, w[p + f"attention.{which}_norm.weight"], c.norm_eps)
                        vectors[s, head] = turned(x, positions[s], c.rope_theta)
                per_head[which] = vectors
            mixed = []
            for t in range(len(stream)):
                seen = [s for s in range(t + 1) if ids[s] == ids[t] or not batch.document_mask]
                parts = []
                for head in range(heads):
                    scores = np.array([per_head["q"][t, head] @ per_head["k"][s, head // groups] / np.sqrt(dh) for s in seen])
                    weights = np.exp(scores - scores.max())
                    parts.append(sum(weights[i] / weights.sum() * per_head["v"][s, head // groups] for i, s in enumerate(seen)))
                mixed.append(w[p + "attention.o_proj.weight"] @ np.concatenate(parts))
            stream = [x + y for x, y in zip(stream, mixed, strict=True)]
            for t, x in enumerate(stream):
                y = norm(x, w[p + "feed_forward_norm.weight"], c.norm_eps)
                up = w[p + "feed_forward.up_proj.weight"] @ y
                if c.activation == "swiglu":
                    gate = w[p + "feed_forward.gate_proj.weight"] @ y
                    inner = gate / (1 + np.exp(-gate)) * up
                else:
                    inner = np.where(up > 0, up**2, up**2 / 4 if c.activation == "leaky_relu2" else 0.0)
                stream[t] = x + w[p + "feed_forward.down_proj.weight"] @ inner
        logits = []
        for x in stream:
            x = norm(x, w["norm.weight"], c.norm_eps)
            if not c.tie_embeddings:
                z = w["head.weight"] @ x
            elif "embedding.projection" in w:
                z = w["embedding.weight"] @ (w["embedding.projection"] @ x)
            else:
                z = w["embedding.weight"] @ x
            logits.append(z if c.softcap is None else c.softcap * np.tanh(z / c.softcap))
        rows.append(logits)
    return np.array(rows)


# ---------------------------------------------------------------- tests
@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_reference(name: str, backend: str, document_mask: bool) -> None:
    model = float64_decoder(**CONFIGS[name], attention_backend=backend)
    batch = two_documents(document_mask=document_mask)
    expected = reference_logits(model, batch)
    logits = model.head(model(batch)).detach().numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-10, atol=1e-10)
    assert np.abs(expected).max() > 0.5


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_attention_gradients_equal_a_loop(backend: str) -> None:
    torch.manual_seed(0)
    layer = Attention(12, 4, 2, 6, qk_norm="none", norm_eps=1e-6, backend=backend).double()  # type: ignore[arg-type]
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, 7, 12, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(7)[None]
    y = layer(x, rotary_tables(positions, 6, 50.0, torch.float64), None)

    def turn(z: torch.Tensor, t: int) -> torch.Tensor:
        angle = t * 50.0 ** -(torch.arange(3, dtype=torch.float64) / 3)
        turned = torch.complex(z[:3], z[3:]) * torch.polar(torch.ones(3, dtype=torch.float64), angle)
        return torch.cat([turned.real, turned.imag])

    rows = []
    for t in range(7):
        parts = []
        for head in range(4):
            own, shared = slice(6 * head, 6 * head + 6), slice(6 * (head // 2), 6 * (head // 2) + 6)
            query = turn((layer.q_proj.weight @ x[0, t])[own], t)
            keys = torch.stack([turn((layer.k_proj.weight @ x[0, s])[shared], s) for s in range(t + 1)])
            values = torch.stack([(layer.v_proj.weight @ x[0, s])[shared] for s in range(t + 1)])
            parts.append(torch.softmax(keys @ query / 6**0.5, 0) @ values)
        rows.append(layer.o_proj.weight @ torch.cat(parts))
    expected = torch.stack(rows)[None]
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)

    inputs = [x, *layer.parameters()]
    weight = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_cached_decoding_equals_the_whole_forward_pass() -> None:
    for name, settings in CONFIGS.items():
        for backend in ("sdpa", "math"):
            model = float64_decoder(**settings, attention_backend=backend)
            batch = two_documents(lengths=(9,))
            whole = model.head(model(batch))
            cache = model.new_cache(2, 16, "cpu")
            steps = [slice(0, 4), slice(4, 5), slice(5, 7), slice(7, 9)]
            parts = [model.head(model(slice_of(batch, part), cache)) for part in steps]
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10, msg=f"{name} {backend}")


def test_prompts_of_different_lengths_share_a_cache() -> None:
    model = float64_decoder(n_kv_heads=2)
    whole = two_documents(lengths=(8,))
    expected = model(whole)
    lengths = torch.tensor([5, 3])
    prompt = slice_of(whole, slice(0, 5))
    prompt.tokens[1, 3:] = 0  # padding
    cache = model.new_cache(2, 8, "cpu")
    model(prompt, cache)
    for _ in range(3):
        at = lengths[:, None]
        step = Batch(whole.tokens.gather(1, at), at, at, torch.zeros_like(at), at)
        torch.testing.assert_close(model(step, cache), expected.gather(1, at[..., None].expand(-1, -1, 16)), rtol=1e-10, atol=1e-10)
        lengths = lengths + 1
