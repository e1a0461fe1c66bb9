"""The golf model against a plain loop in float64, piece by piece and as a whole."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from titanlm.batch import Batch
from titanlm.models.golf import Golf, GolfConfig, Rope
from titanlm.models.layers.attention import exclude_own_value
from titanlm.models.layers.bigram_hash import BigramHash
from titanlm.models.layers.rope import ntk_theta
from titanlm.models.layers.smear_gate import SmearGate
from titanlm.models.layers.unet_skips import UNetSkips
from titanlm.precision import set_precision

VOCAB = 37
SMALL = {"n_layers": 5, "d_model": 24, "n_heads": 4, "n_kv_heads": 2, "d_ff": 40}
ALL = {**SMALL, "exclusive_last": 2, "smear_gate": "recorded", "bigram_buckets": 11, "bigram_dim": 6, "rope": Rope(reference_tokens=8)}


def build(**settings: object) -> Golf:
    model = Golf(GolfConfig(**settings), vocab_size=VOCAB, max_seq_len=8)  # type: ignore[arg-type]
    model.init_weights(0)
    return model


def shaken(**settings: object) -> Golf:
    """In float64, with every parameter moved off its initial value, so that no piece is hidden by a 0 or a 1."""
    model = build(**settings).double()
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float64
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def text(*lengths: int, n_rows: int = 2, document_mask: bool = False) -> Batch:
    tokens = torch.randint(VOCAB, (n_rows, sum(lengths)), generator=torch.Generator().manual_seed(3))
    whole, parts = torch.arange(sum(lengths)), torch.cat([torch.arange(length) for length in lengths])
    ids = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)]).repeat(n_rows, 1)
    positions = (parts if document_mask else whole).repeat(n_rows, 1)
    return Batch(tokens, tokens.roll(-1, 1), positions, ids, torch.ones_like(tokens), document_mask=document_mask)


def count(**settings: object) -> int:
    with torch.device("meta"):
        model = Golf(GolfConfig(**settings), vocab_size=1024, max_seq_len=1024)  # type: ignore[arg-type]
    return sum(parameter.numel() for parameter in model.parameters())


PR369 = {"n_layers": 11, "d_ff": 1536, "exclusive_last": 4, "smear_gate": "recorded", "bigram_buckets": 4096}


def test_published_parameter_counts() -> None:
    assert count() == 17_059_912  # the naive baseline
    assert count(**PR369) == 27_092_057
    assert count(**{**PR369, "bigram_buckets": 2048}) == 26_829_913  # pull requests 287 and 315


# ---------------------------------------------------------------- pieces
def test_ntk_base_of_the_record() -> None:
    assert ntk_theta(10_000.0, 64, 2048, 1024) == pytest.approx(20_452.2, abs=0.05)
    assert ntk_theta(10_000.0, 16, 2048, 1024) / 10_000 == pytest.approx(2.208, abs=5e-4)  # with 16 rotated dimensions
    assert ntk_theta(10_000.0, 64, 1024, 1024) == ntk_theta(10_000.0, 64, 100, 1024) == 10_000.0


def test_bigram_buckets_are_those_of_plain_integers() -> None:
    layer = BigramHash(4096, 8, 16)
    tokens = torch.tensor([[1, 5, 1023, 0, 70_000, 199_999]])
    starts = torch.tensor([[True, False, False, False, True, False]])
    row = tokens[0].tolist()
    expected = [4095 if start else (36313 * row[t] ^ 27191 * row[t - 1]) % 4095 for t, start in enumerate(starts[0].tolist())]
    assert layer.buckets(tokens, starts).tolist() == [expected]
    assert 36313 * 199_999 > 2**31  # what int32 could not hold


def test_smear_gate_as_recorded_and_masked() -> None:
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    for kind in ("recorded", "masked"):
        starts = torch.tensor([True, False, False, kind == "masked", False, False]).expand(2, 6)
        layer = SmearGate(4, kind).double()  # type: ignore[arg-type]
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([0.0, 1.0, -2.0, 0.5]))
        out, g = layer(x, starts), torch.sigmoid(layer.weight)
        for t in range(6):
            before = x[:, t - 1] if t else torch.zeros_like(x[:, 0])
            expected = (1 - g) * x[:, t] + g * before
            if kind == "masked" and starts[0, t]:
                expected = x[:, t]
            torch.testing.assert_close(out[:, t], expected, rtol=1e-12, atol=1e-12)


def test_excluding_ones_own_value_is_by_group_and_leaves_nothing_along_it() -> None:
    y, v = torch.randn(2, 5, 6, 8, dtype=torch.float64), torch.randn(2, 5, 3, 8, dtype=torch.float64)
    out = exclude_own_value(y, v)
    for head in range(6):
        own = v[:, :, head // 2]
        along = (y[:, :, head] * own).sum(-1, keepdim=True) / own.square().sum(-1, keepdim=True) * own
        torch.testing.assert_close(out[:, :, head], y[:, :, head] - along, rtol=1e-12, atol=1e-12)
        assert (out[:, :, head] * own).sum(-1).abs().max() < 1e-12
    assert torch.equal(exclude_own_value(y, torch.zeros_like(v)), y)  # a value of nothing excludes nothing
    assert exclude_own_value(y.bfloat16(), v.bfloat16()).dtype == torch.bfloat16


def test_skips_are_last_out_first_in() -> None:
    layer = UNetSkips(5, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]]))
    kept = [torch.full((1, 1, 3), 1.0), torch.full((1, 1, 3), 7.0)]
    assert layer(1, kept) is None  # encoder
    found = [layer(2, kept), layer(3, kept)]
    assert [stream.flatten().tolist() for stream, _ in found] == [[7.0] * 3, [1.0] * 3]
    assert [weight.tolist() for _, weight in found] == [[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]]
    assert layer(4, kept) is None  # the decoder's odd layer
    assert kept == []


# ---------------------------------------------------------------- the whole
def plain_forward(model: Golf, batch: Batch) -> Tensor:
    """Row by row and head by head, from the names of the parameters alone."""
    p, c = {name: parameter.detach() for name, parameter in model.named_parameters()}, model.config
    dh = c.d_model // c.n_heads

    def rms(x: Tensor) -> Tensor:
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + c.norm_eps)

    rows = []
    for tokens, ids in zip(batch.tokens, batch.document_ids, strict=True):
        n = len(tokens)
        x = p["embedding.weight"][tokens]
        if c.bigram_buckets:
            last = c.bigram_buckets - 1
            crossing = [t == 0 or (batch.document_mask and ids[t] != ids[t - 1]) for t in range(n)]
            hashed = [last if crossing[t] else (36313 * int(tokens[t]) ^ 27191 * int(tokens[t - 1])) % last for t in range(n)]
            x = x + p["bigram.scale"] * (p["bigram.table.weight"][hashed] @ p["bigram.projection.weight"].T)
        x = rms(x)
        if c.smear_gate != "none":
            g = torch.sigmoid(p["smear.weight"])
            previous = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
            smeared = (1 - g) * x + g * previous
            if c.smear_gate == "masked":
                starts = torch.tensor([t == 0 or bool(ids[t] != ids[t - 1]) for t in range(n)])
                smeared = torch.where(starts[:, None], x, smeared)
            x = smeared
        x0 = x
        theta = c.rope.theta
        if c.rope.reference_tokens and n > c.rope.reference_tokens:
            theta *= (n / c.rope.reference_tokens) ** (dh / (dh - 2))
        positions = torch.arange(n) if not batch.document_mask else torch.tensor([int((ids[:t] == ids[t]).sum()) for t in range(n)])
        angles = positions[:, None] * torch.tensor([theta ** (-2 * i / dh) for i in range(dh // 2)], dtype=torch.float64)
        cos, sin = angles.cos(), angles.sin()

        def rotated(z: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> Tensor:  # as the records write it
            z1, z2 = z[:, : dh // 2], z[:, dh // 2 :]
            return torch.cat((z1 * cos + z2 * sin, -z1 * sin + z2 * cos), 1)

        kept = []
        n_encoder = c.n_layers // 2
        for layer in range(c.n_layers):
            b = f"blocks.{layer}."
            if 0 <= layer - n_encoder < n_encoder:
                x = x + p["skips.weight"][layer - n_encoder] * kept.pop()
            x = p[b + "residual_mix"][0] * x + p[b + "residual_mix"][1] * x0
            h, out = rms(x), []
            for head in range(c.n_heads):
                group = head // (c.n_heads // c.n_kv_heads)
                q, k, v = (
                    h @ p[f"{b}attention.{name}_proj.weight"][index * dh : (index + 1) * dh].T for name, index in (("q", head), ("k", group), ("v", group))
                )
                q, k = rotated(rms(q)) * p[b + "attention.q_gain"][head], rotated(rms(k))
                scores = q @ k.T / math.sqrt(dh)
                seen = torch.ones(n, n, dtype=torch.bool).tril()
                if batch.document_mask:
                    seen &= ids[:, None] == ids[None]
                y = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ v
                if layer >= c.n_layers - c.exclusive_last:
                    unit = v / v.norm(dim=-1, keepdim=True)
                    y = y - (y * unit).sum(-1, keepdim=True) * unit
                out.append(y)
            x = x + p[b + "attention_scale"] * (torch.cat(out, 1) @ p[b + "attention.o_proj.weight"].T)
            u = rms(x) @ p[b + "feed_forward.up_proj.weight"].T
            inner = torch.where(u > 0, u**2, {"relu2": 0.0, "leaky_relu2": 0.25}[c.activation] * u**2)
            x = x + p[b + "feed_forward_scale"] * (inner @ p[b + "feed_forward.down_proj.weight"].T)
            if layer < n_encoder:
                kept.append(x)
        logits = rms(x) @ p["embedding.weight" if c.tie_embeddings else "head.weight"].T
        rows.append(c.softcap * torch.tanh(logits / c.softcap) if c.softcap else logits)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("settings", "batch"),
    [
        (SMALL, text(9)),
        (ALL, text(9, 4)),  # longer than the reference: the base grows
        (ALL, text(5, 3)),
        ({**ALL, "n_layers": 4, "exclusive_last": 4}, text(7)),
        ({**ALL, "smear_gate": "masked"}, text(6, 7)),
        ({**ALL, "smear_gate": "masked"}, text(6, 7, document_mask=True)),
        ({**ALL, "tie_embeddings": False, "softcap": None}, text(8)),
        ({**ALL, "attention_backend": "math"}, text(9)),
        ({**ALL, "activation": "leaky_relu2"}, text(9)),
    ],
)
def test_forward_equals_a_plain_loop(settings: dict[str, object], batch: Batch) -> None:
    model = shaken(**settings)
    torch.testing.assert_close(model.head(model(batch)), plain_forward(model, batch), rtol=1e-9, atol=1e-9)


def test_one_document_does_not_change_another_unless_as_recorded() -> None:
    batch = text(6, 7, document_mask=True)
    changed = replace(batch, tokens=torch.cat(((batch.tokens[:, :6] + 1) % VOCAB, batch.tokens[:, 6:]), 1))
    for smear, apart in (("masked", True), ("recorded", False)):
        model = shaken(**{**ALL, "smear_gate": smear})
        assert torch.equal(model(batch)[:, 6:], model(changed)[:, 6:]) == apart
        assert torch.equal(model(text(6, 7))[:, :5], model(replace(text(6, 7), tokens=text(6, 7).tokens.clone().index_fill_(1, torch.tensor([5]), 3)))[:, :5])


def test_packed_documents_equal_lone_ones() -> None:
    model, batch = shaken(**{**ALL, "smear_gate": "masked", "rope": Rope()}), text(6, 7, document_mask=True)
    together = model(batch)
    for part in (slice(0, 6), slice(6, 13)):
        alone = Batch(*(tensor[:, part] for tensor in (batch.tokens, batch.labels, batch.positions, batch.document_ids, batch.target_bytes)))
        torch.testing.assert_close(together[:, part], model(alone), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("smear", ["none", "recorded", "masked"])
@pytest.mark.parametrize("cuts", [(1, 1, 1, 1, 1, 1, 1, 1), (5, 1, 2), (1, 7)])
def test_token_by_token_equals_all_at_once(smear: str, cuts: tuple[int, ...]) -> None:
    model, batch = shaken(**{**ALL, "smear_gate": smear}), text(8)
    cache = model.new_cache(2, 8, "cpu")
    start, parts = 0, []
    for length in cuts:
        piece = slice(start, start + length)
        part = Batch(*(tensor[:, piece] for tensor in (batch.tokens, batch.labels, batch.positions, batch.document_ids, batch.target_bytes)))
        parts.append(model(part, cache))
        start += length
    torch.testing.assert_close(torch.cat(parts, 1), model(batch), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_compiled_by_block_and_whole_equals_eager() -> None:
    from titanlm.distributed.compile import compile_module
    from titanlm.losses.cross_entropy import CrossEntropy, CrossEntropyConfig
    from titanlm.train_module import TrainModule

    losses, gradients = [], []
    for mode in ("none", "block", "model"):
        torch.manual_seed(0)
        model = build(**ALL)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        module = TrainModule(model, CrossEntropy(CrossEntropyConfig()))
        compile_module(module, mode)  # type: ignore[arg-type]
        sums, _ = module(text(9, 4))
        sums.loss.backward()
        losses.append(float(sums.loss.detach()))
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})  # type: ignore[union-attr]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=2e-4, atol=2e-4)


# ---------------------------------------------------------------- initial weights
def test_initial_weights() -> None:
    orthogonal = dict(build(**{**ALL, "init": "orthogonal", "output": "mup", "d_ff": 48}).named_parameters())
    depth = 1 / math.sqrt(2 * 5)
    for name, gain in (
        ("blocks.3.attention.q_proj.weight", 1.0),
        ("blocks.0.feed_forward.up_proj.weight", 1.0),
        ("blocks.1.attention.o_proj.weight", depth),
        ("blocks.4.feed_forward.down_proj.weight", depth),
        ("bigram.projection.weight", depth),
    ):
        weight = orthogonal[name].detach()
        short = weight if weight.shape[0] <= weight.shape[1] else weight.T
        torch.testing.assert_close(short @ short.T, gain**2 * torch.eye(len(short)), rtol=1e-5, atol=1e-5)
    plain = dict(build(**{**ALL, "tie_embeddings": False}).named_parameters())
    assert all(
        not plain[name].any() for name in plain if name.endswith(("o_proj.weight", "down_proj.weight")) or name in ("bigram.table.weight", "head.weight")
    )
    bound = 1 / math.sqrt(24)
    up = plain["blocks.0.feed_forward.up_proj.weight"]
    assert 0.9 * bound < float(up.abs().max()) <= bound
    assert plain["blocks.2.residual_mix"].tolist() == [[1.0] * 24, [0.0] * 24]
    assert plain["blocks.2.attention.q_gain"].tolist() == [1.5] * 4
    assert float(plain["bigram.scale"]) == pytest.approx(0.05)
    assert float(plain["embedding.weight"].std()) == pytest.approx(0.005, rel=0.1)


def test_the_first_loss_is_that_of_the_logs() -> None:
    """6.9286 to 6.9320 in the logs of the records, ln 1024 = 6.9315."""
    model = Golf(GolfConfig(n_layers=2, n_kv_heads=2, n_heads=2, d_model=128, d_ff=128), vocab_size=1024, max_seq_len=64)
    model.init_weights(1337)
    tokens = torch.randint(1024, (8, 65), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(64).repeat(8, 1), torch.zeros(8, 64, dtype=torch.long), torch.ones(8, 64), document_mask=False)
    loss = torch.nn.functional.cross_entropy(model.head(model(batch)).flatten(0, 1), batch.labels.flatten())
    assert float(loss) == pytest.approx(math.log(1024), abs=0.01)


def test_tables_in_bf16() -> None:
    model = build(**{**ALL, "embedding_dtype": "bfloat16"})
    tables = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}
    assert tables == {"embedding.weight", "bigram.table.weight"}
    assert model.head.weight is model.embedding.weight
    set_precision(model, "bf16")
    assert model(text(9)).dtype == torch.bfloat16
    set_precision(model, "fp32")
    assert model.head(model(text(9))).dtype == torch.float32


def test_roles_and_work() -> None:
    model = build(**ALL)
    roles = model.parameter_roles()
    assert set(roles) == {name for name, _ in model.named_parameters()}
    matrices = {name for name, role in roles.items() if role == "matrix"}
    assert matrices == {name for name, parameter in model.named_parameters() if parameter.ndim == 2} - {"embedding.weight", "bigram.table.weight"} - {
        name for name in roles if name.endswith(("residual_mix", "skips.weight"))
    }
    in_matrices = sum(parameter.numel() for name, parameter in model.named_parameters() if name in matrices)
    assert model.flops_per_token(100) == 6 * (in_matrices + VOCAB * 24) + 12 * 5 * 24 * 100


def test_settings_that_do_not_fit_are_named_all_at_once() -> None:
    wrong = {**SMALL, "n_heads": 5, "n_kv_heads": 2, "exclusive_last": 9, "bigram_buckets": 1, "vocab_size": 3}
    with pytest.raises(ValueError, match="n_heads: d_model = 24") as caught:
        build(**wrong)
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == ["n_heads", "n_kv_heads", "exclusive_last", "bigram_buckets", "vocab_size"]
    with pytest.raises(ValueError, match="expect_params: 1,000"):
        build(**SMALL, expect_params=1000)
