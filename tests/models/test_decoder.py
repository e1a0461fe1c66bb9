from __future__ import annotations

import copy
import math
import re
from dataclasses import replace

import pytest
import torch

from titanlm.batch import Batch
from titanlm.errors import TitanError
from titanlm.models.decoder import Decoder, DecoderConfig
from titanlm.registry import Component

VOCAB = 61
SMALL = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64, "max_positions": 64}


def build(seed: int = 0, vocab_size: int = VOCAB, **settings: object) -> Decoder:
    model = Decoder(DecoderConfig(**{**SMALL, **settings}), vocab_size=vocab_size, max_seq_len=64)  # type: ignore[arg-type]
    model.init_weights(seed)
    return model


def packed(*lengths: int, n_rows: int = 2, vocab_size: int = VOCAB) -> Batch:
    tokens = torch.randint(vocab_size, (n_rows, sum(lengths)), generator=torch.Generator().manual_seed(5))
    positions = torch.cat([torch.arange(length) for length in lengths]).repeat(n_rows, 1)
    ids = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)]).repeat(n_rows, 1)
    return Batch(tokens, tokens.roll(-1, 1), positions, ids, torch.ones_like(tokens))


def projected(hidden: torch.Tensor) -> torch.Tensor:
    """A number with gradients; the sum of squares has none behind a norm."""
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(7))
    return (hidden.float() * weight.to(hidden.device)).sum()


def logits_of(model: Decoder, batch: Batch) -> torch.Tensor:
    return model.head(model(batch))


# ---------------------------------------------------------------- what is seen
@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_packed_documents_equal_lone_ones(backend: str) -> None:
    model, batch = build(attention_backend=backend), packed(7, 11, 6)
    together = logits_of(model, batch)
    for part in (slice(0, 7), slice(7, 18), slice(18, 24)):
        alone = Batch(*(tensor[:, part] for tensor in (batch.tokens, batch.labels, batch.positions, batch.document_ids, batch.target_bytes)))
        torch.testing.assert_close(together[:, part], logits_of(model, alone), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together, logits_of(model, replace(batch, document_mask=False)), atol=1e-4)


@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize("document_mask", [True, False])
def test_nothing_leaks_from_other_documents_or_the_future(backend: str, document_mask: bool) -> None:
    model, batch = build(attention_backend=backend), replace(packed(16, 16), document_mask=document_mask)
    before = model(batch)

    def after(where: slice) -> torch.Tensor:
        tokens = batch.tokens.clone()
        tokens[:, where] = (tokens[:, where] + 1) % VOCAB
        return model(replace(batch, tokens=tokens))

    assert torch.equal(after(slice(20, 32))[:, :20], before[:, :20])
    first_changed = after(slice(0, 16))
    assert torch.equal(first_changed[:, 16:], before[:, 16:]) == document_mask
    assert not torch.equal(first_changed[:, :16], before[:, :16])


def test_a_full_cache_and_flex_on_the_cpu_are_errors() -> None:
    model, batch = build(), packed(8)
    cache = model.new_cache(2, 10, "cpu")
    model(batch, cache)
    with pytest.raises(TitanError, match="10 tokens and 16"):
        model(batch, cache)
    with pytest.raises(TitanError, match='use "auto" or "sdpa"'):
        build(attention_backend="flex", head_dim=16)(batch)
    with pytest.raises(ValueError, match='attention_backend: "flex" needs heads of a width of 16'):
        build(attention_backend="flex", head_dim=8)


# ---------------------------------------------------------------- parameters
def test_tied_parameters_are_one() -> None:
    for settings in ({}, {"embedding_rank": 8}):
        model = build(**settings)
        shared = {"embedding.weight"} | ({"embedding.projection"} if settings else set())
        names = [name for name, _ in model.named_parameters()]
        assert {name for name in names if not name.startswith("blocks")} == shared | {"norm.weight"}
        assert len(names) == len(set(names)) == len(set(map(id, model.parameters())))
        assert list(model.state_dict()) == names
        assert {id(p) for p in model.head.parameters()} == {id(p) for p in model.embedding.parameters()}

        other = build(seed=1, **settings)
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(logits_of(other, packed(9)), logits_of(model, packed(9)), rtol=0, atol=0)
        with torch.device("meta"):
            on_meta = Decoder(model.config, vocab_size=VOCAB, max_seq_len=64)
        for moved in (
            copy.deepcopy(on_meta).to_empty(device="cpu"),
            copy.deepcopy(model),
            copy.deepcopy(model).double(),
            copy.deepcopy(on_meta),
        ):
            if moved.embedding.weight.is_meta:
                moved.load_state_dict(model.state_dict(), assign=True)
            assert moved.head.weight is moved.embedding.weight
            assert moved.head.projection is moved.embedding.projection
    untied = build(embedding_rank=8, tie_embeddings=False)
    assert untied.head.weight.shape == (VOCAB, 32)
    assert "head.weight" in untied.state_dict()


def count(v: int, layers: int, d: int, heads: int, kv: int, dh: int, ff: int, *, rank: int | None, tied: bool) -> int:
    table = v * d if rank is None else v * rank + rank * d
    block = 2 * d * heads * dh + 2 * d * kv * dh + 3 * d * ff + 2 * d
    return table + layers * block + d + (0 if tied else v * d)


@pytest.mark.parametrize(
    ("settings", "tied", "expected"),
    [
        ({"d_model": 768, "n_heads": 12, "n_kv_heads": 2, "d_ff": 2048}, True, 196_398_464),
        ({"d_model": 640, "n_heads": 10, "n_kv_heads": 2, "d_ff": 1712}, False, 273_284_480),
        ({"d_model": 640, "n_heads": 10, "n_kv_heads": 2, "d_ff": 1712}, True, 145_281_280),
    ],
)
def test_known_parameter_counts(settings: dict[str, int], tied: bool, expected: int) -> None:
    with torch.device("meta"):
        config = DecoderConfig(n_layers=28, head_dim=64, embedding_rank=128, tie_embeddings=tied, expect_params=expected, **settings)
        model = Decoder(config, vocab_size=200_005, max_seq_len=1024)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    d, heads, kv, ff = (settings[name] for name in ("d_model", "n_heads", "n_kv_heads", "d_ff"))
    assert count(200_005, 28, d, heads, kv, 64, ff, rank=128, tied=tied) == expected
    norms = 28 * 2 * d + d
    lookup = 0 if tied else 200_005 * 128  # tied: the table works in the head, and the projection twice
    used = expected - norms - lookup + (128 * d if tied else 0)
    assert model.matmul_parameters() == used
    assert model.flops_per_token(1024) == 6 * used + 12 * 28 * heads * 64 * 1024


def test_widths_by_default() -> None:
    model = build(d_model=96, n_heads=6, n_kv_heads=None, d_ff=None)
    assert (model.head_dim, model.n_kv_heads, model.d_ff) == (16, 6, 256)
    assert build(d_ff=None, activation="relu2").d_ff == 128
    assert build(vocab_size=60).vocab_size == 60
    padded = Decoder(DecoderConfig(**SMALL, vocab_size=64), vocab_size=VOCAB, max_seq_len=8)  # type: ignore[arg-type]
    assert padded.embedding.weight.shape[0] == padded.vocab_size == 64


def test_every_parameter_has_a_role() -> None:
    model = build(qk_norm="learned", tie_embeddings=False, embedding_rank=8)
    roles = model.parameter_roles()
    assert list(roles) == [name for name, _ in model.named_parameters()]
    assert {name for name, role in roles.items() if role == "norm"} == {name for name, p in model.named_parameters() if p.ndim == 1}
    assert roles["embedding.weight"] == "embedding"
    assert roles["head.weight"] == "head"
    assert roles["embedding.projection"] == roles["blocks.1.attention.q_proj.weight"] == "matrix"
    assert "head.weight" not in build().parameter_roles()


# ---------------------------------------------------------------- initialisation
def test_initialisation_depends_on_seed_and_name_alone() -> None:
    model, again, other, deeper = build(3), build(3), build(4), build(3, n_layers=3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(again.named_parameters())[name])
        if parameter.ndim == 2:
            assert not torch.equal(parameter, dict(other.named_parameters())[name])
    assert torch.equal(model.blocks[1].attention.q_proj.weight, deeper.blocks[1].attention.q_proj.weight)
    state = torch.random.get_rng_state()
    build(3)
    assert torch.equal(state, torch.random.get_rng_state())
    wide = build(d_model=256, n_layers=8, d_ff=512)
    assert wide.blocks[0].attention.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert wide.blocks[0].feed_forward.down_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert torch.equal(wide.norm.weight, torch.ones(256))


@pytest.mark.parametrize("vocab_size", [256, 8192])
@pytest.mark.parametrize("d_model", [64, 512])
@pytest.mark.parametrize("settings", [{}, {"tie_embeddings": False}, {"embedding_rank": 32}, {"embedding_rank": 32, "tie_embeddings": False}])
def test_a_fresh_model_knows_nothing(settings: dict[str, object], d_model: int, vocab_size: int) -> None:
    model = build(vocab_size=vocab_size, d_model=d_model, d_ff=2 * d_model, **settings)
    batch = packed(64, n_rows=4, vocab_size=vocab_size)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(logits_of(model, batch).flatten(0, 1), batch.labels.flatten()).item()
    assert loss == pytest.approx(math.log(vocab_size), abs=0.15)


# ---------------------------------------------------------------- precision
def test_bf16_compute_over_fp32_masters() -> None:
    for settings in ({"qk_norm": "learned"}, {"embedding_rank": 8, "softcap": 20.0}):
        model, batch = build(**settings), packed(16, 16)
        exact = logits_of(model, batch)
        model.embedding.compute_dtype = torch.bfloat16
        hidden = model(batch)
        logits = model.head(hidden)
        assert hidden.dtype == logits.dtype == torch.bfloat16
        logits.float().square().mean().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.dtype == parameter.grad.dtype == torch.float32, name
        assert model.new_cache(1, 4, "cpu").layers[0].keys.dtype == torch.bfloat16
        torch.testing.assert_close(logits.float(), exact, rtol=0.05, atol=0.02)


# ---------------------------------------------------------------- mistakes
def test_every_problem_is_listed_at_once() -> None:
    config = DecoderConfig(d_model=100, n_heads=7, n_kv_heads=3, vocab_size=50, max_positions=16)
    with pytest.raises(ValueError, match="n_heads: 7 heads do not divide") as caught:
        Decoder(config, vocab_size=60, max_seq_len=32)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["n_heads", "n_kv_heads", "vocab_size", "max_positions"]
    for settings, field in (
        ({"d_model": 36, "n_heads": 4}, "head_dim: must be even for rotary positions, is 9 (d_model / n_heads)"),
        ({"head_dim": 7}, "head_dim: must be even for rotary positions, is 7"),
        ({"expect_params": 10_000}, "expect_params: 10,000, but the settings make"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(field)}"):
            build(**settings)
    n_params = sum(parameter.numel() for parameter in build().parameters())
    build(expect_params=round(n_params * 1.019))


def test_it_is_registered() -> None:
    with torch.device("meta"):
        model = Component.named("model", "decoder", n_layers=1, d_model=16, n_heads=2).build(vocab_size=11, max_seq_len=8)
    assert isinstance(model, Decoder)
    assert model.embedding.weight.is_meta


# ---------------------------------------------------------------- compile
def test_blocks_compile_whole() -> None:
    torch._dynamo.reset()
    model, batch = build(n_layers=2, qk_norm="learned", d_ff=32), packed(8, 8, n_rows=1)
    expected = model(batch)
    projected(expected).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    names = list(model.state_dict())
    model.zero_grad()
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    compiled = model(batch)
    projected(compiled).backward()
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == names


def test_the_whole_model_traces_without_a_break() -> None:
    torch._dynamo.reset()
    model, batch = build(n_layers=2, embedding_rank=8), packed(8, 8, n_rows=1)
    expected = model(batch)
    model.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(batch), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(replace(batch, document_mask=False)).shape, expected.shape)


@pytest.mark.slow
def test_blocks_compile_with_the_default_backend() -> None:
    torch._dynamo.reset()
    model, batch = build(n_layers=2), packed(8, 8, n_rows=1)
    expected = model(batch)
    for block in model.blocks:
        block.compile(fullgraph=True)
    compiled = model(batch)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)
    projected(compiled).backward()


@pytest.mark.gpu
@pytest.mark.parametrize("compile_what", ["none", "blocks", "model"])
def test_flex_equals_plain_attention_on_cuda(compile_what: str) -> None:
    """fp32 within 1e-3 of plain attention; bf16 no further from the fp32 truth than plain bf16 attention is."""
    torch._dynamo.reset()
    settings = {"head_dim": 32, "n_heads": 4, "n_kv_heads": 2, "d_model": 128, "max_positions": 512}
    batch = packed(100, 7, 149).to(torch.device("cuda"))
    plain, flex = build(**settings, attention_backend="math").cuda(), build(**settings, attention_backend="auto").cuda()
    if compile_what == "blocks":
        for block in flex.blocks:
            block.compile(fullgraph=True)
    elif compile_what == "model":
        flex.compile(dynamic=False)

    def results(model, batch, dtype):
        model.embedding.compute_dtype = dtype
        model.zero_grad()
        hidden = model(batch)
        projected(hidden).backward()
        with torch.no_grad():
            torch.testing.assert_close(model(batch), hidden, rtol=2e-2, atol=2e-2)
        return [hidden.detach().double(), *(parameter.grad.detach().double().clone() for parameter in model.parameters())]

    for document_mask in (True, False):
        changed = replace(batch, document_mask=document_mask)
        truth = results(plain, changed, torch.float32)
        for ours, exact in zip(results(flex, changed, torch.float32), truth, strict=True):
            assert (ours - exact).norm() <= 1e-3 * exact.norm()
        theirs = results(plain, changed, torch.bfloat16)
        for ours, other, exact in zip(results(flex, changed, torch.bfloat16), theirs, truth, strict=True):
            assert (ours - exact).norm() <= 1.5 * (other - exact).norm() + 1e-3 * exact.norm()
