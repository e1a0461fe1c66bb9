"""The way through the kernels, with the kernels' twins in their place: what is wired to what, and whether the compiler takes it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from titanlm.batch import Batch
from titanlm.distributed import activation_checkpointing
from titanlm.distributed.code_gather import CodeGather
from titanlm.kernels import mix, product_onto, relu2, rotate
from titanlm.kernels.fused import fused, use_kernels
from titanlm.models import decoder, golf
from titanlm.models.layers import attention, feed_forward, linear, rope
from titanlm.models.layers.product import compute_with, multipliers
from titanlm.quantizers.float8 import float8_product


def _through_norm(x, g, eps):
    """The gradient of x / √(mean(x²) + eps) over the last dimension."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return scale * (g - x * scale.square() * (g * x).mean(-1, keepdim=True))


def _mix_backward(terms, weights, eps, g_out, g_normed, carried):
    g = g_out + _through_norm(mix.plain_mix(terms, weights, eps)[0], g_normed, eps)
    of_terms = [weight * g + (0 if extra is None else extra) for weight, extra in zip(weights, carried, strict=True)]
    return of_terms, torch.stack([(g * term).flatten(0, -2).sum(0) for term in terms])


def _rotated(*arguments):
    *made, _ = rotate.plain_rotated_heads(*arguments)
    return [each.clone() for each in (made[:2] if arguments[-1] == 1 else made)]


def _rotated_backward(g_q, g_k, g_v, g_own, qkv, cos, sin, norms, gain, n_heads, n_kv_heads, eps, copies):
    g_k, g_v = (g.unflatten(2, (-1, copies)).sum(3) for g in (g_k, g_v))
    if g_own is not None:
        g_v = g_v + g_own
    q, k, _ = qkv.unflatten(-1, (n_heads + 2 * n_kv_heads, -1)).split([n_heads, n_kv_heads, n_kv_heads], -2)
    of_gain = (g_q * rotate.plain_rotated_heads(qkv, cos, sin, norms, None, n_heads, n_kv_heads, eps)[0]).sum((0, 1, 3))
    back = [rope.rotate(g, cos, -sin) for g in (g_q if gain is None else g_q * gain[:, None], g_k)]
    of_norms = torch.zeros(2, q.shape[-1])
    if norms is not None:
        units = [x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) for x in (q, k)]
        of_norms = torch.stack([(g * unit).sum((0, 1, 2)) for g, unit in zip(back, units, strict=True)])
        back = [g * weight for g, weight in zip(back, norms, strict=True)]
    back = [g if eps is None else _through_norm(x, g, eps) for x, g in zip((q, k), back, strict=True)]
    return torch.cat((*back, g_v), -2).flatten(-2), of_norms, of_gain


def _relu2(a, b, kept, slope):
    u = a @ b.T
    if kept is not None:
        return [u * (torch.where(kept > 0, 2, 2 * slope**2) * kept if slope else 2 * kept.sqrt())]
    return [F.leaky_relu(u, slope).square(), u] if slope else [F.relu(u).square()]


sums = []
"""Of each sum inside a product, its shape."""


def _product_onto(x, weight, onto):
    sums.append(tuple(onto.shape))
    return onto + F.linear(x, weight)


@pytest.fixture(autouse=True)
def nothing_seen():
    sums.clear()
    seen.clear()


@pytest.fixture(scope="module", autouse=True)
def twins():
    """On the CPU the operators compute what the kernels are to compute."""
    library = torch.library.Library("titanlm", "IMPL")
    for name, function in {
        "mix": mix.plain_mix,
        "mix_backward": _mix_backward,
        "rotated_heads": _rotated,
        "rotated_heads_backward": _rotated_backward,
        "relu2_product": _relu2,
        "product_onto": _product_onto,
    }.items():
        library.impl(name, function, "CPU")
    yield
    library._destroy()


PRODUCT = float8_product("tensorwise", emulate=True)
FIELDS = ("tokens", "labels", "positions", "document_ids", "target_bytes")


seen = []
"""Of each attention, its mask, its kernels, and how many heads of keys and of values it was given."""


class PlainCausal:
    @staticmethod
    def apply(q, k, v, mask, *kernels):
        seen.append((mask, kernels, k.shape[2], v.shape[2]))
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)


SETTINGS = golf.GolfConfig(
    n_layers=5, d_model=32, n_heads=4, n_kv_heads=2, d_ff=64, exclusive_last=2, smear_gate="recorded", bigram_buckets=17, bigram_dim=16, init="orthogonal"
)  # fmt: skip


DECODER = decoder.DecoderConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=64, activation="relu2", qk_norm="learned", init_std=0.2)


@pytest.fixture(params=[("golf", "relu2"), ("decoder", "relu2"), ("decoder", "leaky_relu2")], ids="-".join)
def model(request):
    """Golf of five layers: two whose outputs are handed on, a third that is given what it is given anyway, and a last one without."""
    name, activation = request.param
    kind, settings = (golf.Golf, SETTINGS) if name == "golf" else (decoder.Decoder, DECODER)
    made = kind(replace(settings, activation=activation), vocab_size=50, max_seq_len=16)
    made.init_weights(0)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def batch():
    tokens = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(16, dtype=torch.int32).expand(2, 16)
    return Batch(tokens=tokens, labels=tokens, positions=positions, document_ids=torch.zeros_like(tokens), target_bytes=tokens, document_mask=False)


def outcome(model):
    model.zero_grad()
    hidden = model(batch())
    (hidden * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum().backward()
    return hidden.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.fixture
def through_kernels(monkeypatch):
    def begin(adds=False):
        """From now on; ``adds``: as on a device that adds inside products."""
        for module in (golf, attention, feed_forward, linear):
            monkeypatch.setattr(module, "fused", lambda x: True)
        monkeypatch.setattr(product_onto, "serves", lambda x: adds)

    return begin


def test_weights_that_travelled_as_codes_multiply_as_those_that_did_not(model, through_kernels):
    """To the bit, where queries, keys and values are joined and rows scaled: what a module makes another matrix of does not travel so."""
    through_kernels()
    names = [name for name, parameter in model.blocks.named_parameters() if "_proj" in name]
    for each in multipliers(model.blocks, names):
        compute_with(each, PRODUCT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    hidden, gradients = outcome(model)
    coded = [span for block in model.blocks for span in CodeGather(block).spans(1) if span.codes]
    assert len(coded) == len(model.blocks) * (1 if isinstance(model, golf.Golf) else 3)
    with torch.no_grad():
        for span in coded:
            weight, largest = span.parameter.bfloat16(), span.parameter.abs().max()
            span.codes.decode(span.codes.encode(weight, largest), largest, weight)
            assert not torch.equal(weight.float(), span.parameter)
            span.parameter.copy_(weight)
    again, others = outcome(model)
    assert torch.equal(again, hidden)
    assert gradients.keys() == others.keys()
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


@pytest.mark.parametrize(("adds", "copies"), [(False, 1), (True, 2)], ids=["", "adds and copies"])
@pytest.mark.parametrize("compile", ["none", pytest.param("block", marks=pytest.mark.slow), "model"])
def test_same_as_the_plain_way(model, monkeypatch, through_kernels, compile, adds, copies):
    hidden, gradients = outcome(model)
    through_kernels(adds)
    monkeypatch.setattr(attention, "copies", lambda *_: copies)
    monkeypatch.setattr(attention, "_kernels", lambda *_: ("one", "another"))
    monkeypatch.setattr(attention, "CausalAttention", PlainCausal)
    torch.compiler.reset()  # graphs of other models would count towards the limit of these
    if compile == "block":
        for block in model.blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    if compile == "model":
        model.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    fused_hidden, fused_gradients = outcome(model)
    torch.testing.assert_close(fused_hidden, hidden, rtol=1e-4, atol=1e-5)
    assert fused_gradients.keys() == gradients.keys()
    assert sums == ([(32, 32)] * 10 if adds and isinstance(model, golf.Golf) else [])  # two in each block
    # The compiler traces what is in Python once; blocks of one kind share it.
    assert set(seen) == {(None, ("one", "another"), 2 * copies, 2 * copies)}
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            fused_gradients[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (mix.mix_forward, ([torch.ones(2, 3, 8), torch.ones(2, 3, 8)], torch.ones(2, 8), 1e-6)),
        (mix.mix_backward, ([torch.ones(2, 3, 8)] * 2, torch.ones(2, 8), 1e-6, torch.ones(2, 3, 8), torch.ones(2, 3, 8), [None, torch.ones(2, 3, 8)])),
        (rotate.heads_forward, (torch.ones(2, 3, 32), torch.ones(2, 3, 1, 4), torch.ones(2, 3, 1, 4), None, torch.ones(2), 2, 1, 1e-6, 1)),
        (rotate.heads_forward, (torch.ones(2, 3, 32), torch.ones(2, 3, 1, 4), torch.ones(2, 3, 1, 4), None, torch.ones(2), 2, 1, 1e-6, 2)),
        (relu2.relu2_product, (torch.ones(4, 8), torch.ones(6, 8), None, 0.0)),
        (relu2.relu2_product, (torch.ones(4, 8), torch.ones(6, 8), None, 0.5)),
        (relu2.relu2_product, (torch.ones(4, 8), torch.ones(6, 8), torch.ones(4, 6), 0.5)),
        (product_onto.product_onto, (torch.ones(4, 8), torch.ones(6, 8), torch.ones(4, 6))),
    ],
)
def test_shapes_told_to_the_compiler(operator, arguments):
    torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_rows_that_the_device_does_not_copy_are_added_outside(through_kernels):
    through_kernels(adds=True)
    layer, onto, x = linear.Linear(8, 12), torch.randn(2, 12), torch.randn(2, 8)
    torch.nn.init.normal_(layer.weight)
    torch.testing.assert_close(linear.scaled(layer, x, None, onto), onto + layer(x))
    assert sums == []


@pytest.mark.parametrize("onto", [torch.zeros(2, 16, dtype=torch.float64), torch.zeros(16), torch.zeros(1, 16)])
def test_what_is_not_alike_is_added_outside(through_kernels, onto):
    """Not in another dtype, and not broadcast."""
    through_kernels(adds=True)
    layer, x = linear.Linear(8, 16), torch.randn(2, 8)
    torch.nn.init.normal_(layer.weight)
    torch.testing.assert_close(linear.scaled(layer, x, None, onto), onto + layer(x), rtol=0, atol=0)
    assert sums == []


def test_sums_inside_products_are_not_repeated_when_memory_is_saved(through_kernels):
    through_kernels(adds=True)
    made = golf.Golf(SETTINGS, vocab_size=50, max_seq_len=16)
    made.init_weights(0)
    activation_checkpointing.apply(made.blocks, "selective")
    outcome(made)
    assert len(sums) == 2 * len(made.blocks)


def test_plain_if_asked_for(model, monkeypatch, through_kernels):
    through_kernels(adds=True)
    calls = []
    monkeypatch.setattr(rotate, "heads_forward", lambda *arguments: calls.append(arguments) or _rotated(*arguments))
    use_kernels(model, "fused")
    model(batch())
    assert calls
    calls.clear()
    use_kernels(model, "plain")
    sums.clear()
    model(batch())
    assert calls == sums == []


class Doubled(linear.Linear):
    """As an adapter changes what a matrix does."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(("changed", "n_sums"), [(("attention.k_proj", "feed_forward.up_proj"), 10), (("attention.o_proj", "feed_forward.down_proj"), 0)])
def test_who_does_more_than_multiply_is_not_joined(model, through_kernels, changed, n_sums):
    through_kernels(adds=True)
    for block in model.blocks:
        for name in changed:
            block.get_submodule(name).__class__ = Doubled
    fused_hidden, fused_gradients = outcome(model)
    assert len(sums) == (n_sums if isinstance(model, golf.Golf) else 0)
    use_kernels(model, "plain")
    hidden, gradients = outcome(model)
    torch.testing.assert_close(fused_hidden, hidden, rtol=1e-4, atol=1e-5)
    assert fused_gradients.keys() == gradients.keys()


def test_a_cache_is_filled_with_gradients_on_too(monkeypatch):
    made = golf.Golf(SETTINGS, vocab_size=50, max_seq_len=16)
    made.init_weights(0)
    for module in (golf, attention, feed_forward):
        monkeypatch.setattr(module, "fused", lambda x: torch.is_grad_enabled())
    whole = batch()
    cache = made.new_cache(2, 16, "cpu")
    halves = [replace(whole, **{name: getattr(whole, name)[:, part] for name in FIELDS}) for part in (slice(0, 8), slice(8, 16))]
    hidden = torch.cat([made(half, cache) for half in halves], 1)
    torch.testing.assert_close(hidden, made(whole), rtol=1e-4, atol=1e-5)


def test_kernels_are_for_training_on_cuda():
    assert not fused(torch.ones(2, dtype=torch.bfloat16))
