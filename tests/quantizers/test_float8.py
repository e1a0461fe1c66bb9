"""Products in FP8: their numbers by hand, their place in model, loss and compiler, and that a run with them goes on as it began."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn

from titanlm import checkpoint
from titanlm.batch import Batch
from titanlm.check import check
from titanlm.config import load
from titanlm.distributed import activation_checkpointing
from titanlm.errors import CheckpointError
from titanlm.export import export_run
from titanlm.exporters.artifact import read_artifact
from titanlm.losses.chunked import chunk_size, loss_sums
from titanlm.models.decoder import Decoder, DecoderConfig
from titanlm.models.layers.head import Head, aligned_product, project
from titanlm.models.layers.linear import Linear
from titanlm.models.layers.product import multipliers, product_of
from titanlm.precision import set_precision
from titanlm.quantizers.float8 import Shape, float8_product, gains, has_float8, measure
from titanlm.registry import Component
from titanlm.train import Trainer
from titanlm.train_module import TrainModule

ROOT = Path(__file__).parents[2]
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
VOCAB = 61
SMALL = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64, "max_positions": 64, "attention_backend": "sdpa"}
IN_FP8 = '--quantizer=[{name="float8",select="all",recipe="%s",params=["@matrix","@embedding"]}]'
BF16 = "--train.precision=bf16"


@pytest.fixture(autouse=True)
def the_compilers_casts() -> Iterator[None]:
    """What compiled runs with scales a row set for their process is put back."""
    with torch._inductor.config.patch(emulate_precision_casts=False):
        yield


class Fresh:
    """Decides anew and keeps what was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def choice(self, key: str, decide: Callable[[], Any]) -> Any:
        self.asked.append(key)
        return decide()


def decoder(**settings: object) -> Decoder:
    model = Decoder(DecoderConfig(**{**SMALL, **settings}), vocab_size=VOCAB, max_seq_len=64)  # type: ignore[arg-type]
    model.init_weights(0)
    return model


def trained(model: Decoder, chunk_tokens: int = 16) -> TrainModule:
    module = TrainModule(model, Component.named("loss", "cross_entropy", chunk_tokens=chunk_tokens).build())
    set_precision(module, "bf16")
    return module


def matrices(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.ndim == 2]


def begun(model: Decoder, recipe: str = "tensorwise", *, select: str = "all", params: list[str] | None = None, tuned: Any = None, **facts: Any) -> list[str]:
    quantizer = Component.named("quantizer", "float8", recipe=recipe, select=select).build()
    params = [name for name in matrices(model) if model.head.tied or name != "embedding.weight"] if params is None else params
    quantizer.prepare(model, params)
    facts = {"device": torch.device("cpu"), "n_tokens": 48, "n_head_tokens": 16, "compiled": False, **facts}
    return quantizer.begin(model, params, tuned=tuned or Fresh(), **facts)


def batch() -> Batch:
    tokens = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(24).repeat(2, 1)
    return Batch(tokens, tokens.roll(-1, 1), positions, torch.zeros_like(tokens), torch.ones_like(tokens))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


# ---------------------------------------------------------------- numbers, by hand
def cast(values: np.ndarray, kind: str) -> np.ndarray:
    """To the nearest number of the format, ties to even, larger ones to the largest: from its bits of mantissa, exponents and end alone."""
    mantissa, least_exponent, largest = {"e4m3": (3, -6, 448.0), "e5m2": (2, -14, 57344.0)}[kind]
    exponent = np.floor(np.log2(np.maximum(np.abs(values), 2.0**-60)))
    step = 2.0 ** (np.maximum(exponent, least_exponent) - mantissa)
    return np.clip(np.rint(values / step) * step, -largest, largest)


def in_fp8(values: np.ndarray, kind: str, axis: int | None, powers_of_two: bool) -> np.ndarray:
    """What is left of the values: scaled in fp32, cast, scaled back."""
    largest = {"e4m3": 448.0, "e5m2": 57344.0}[kind]
    scale = (largest / np.abs(values).max(axis=axis, keepdims=axis is not None)).astype(np.float32)
    if powers_of_two:
        scale = np.exp2(np.floor(np.log2(scale.astype(np.float64)))).astype(np.float32)
    return cast((values.astype(np.float32) * scale).astype(np.float64), kind) / scale


def by_hand(recipe: str, x: np.ndarray, w: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, ∂x and ∂w in float64 of (n, n_in), (n_out, n_in) and (n, n_out)."""
    if recipe == "tensorwise":
        x8, w8, g8 = in_fp8(x, "e4m3", None, False), in_fp8(w, "e4m3", None, False), in_fp8(g, "e5m2", None, False)
        return x8 @ w8.T, g8 @ w8, g8.T @ x8
    row = partial(in_fp8, kind="e4m3", powers_of_two=True)
    y = row(x, axis=1) @ row(w, axis=1).T
    if recipe == "rowwise":
        return y, row(g, axis=1) @ row(w, axis=0), row(g, axis=0).T @ row(x, axis=0)
    return y, row(g, axis=1) @ row(w, axis=None), g.T @ x


def operands(n: int, n_in: int, n_out: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """bf16, with rows and columns of very different size and a few outliers."""
    generator = torch.Generator().manual_seed(3)
    x, w, g = (torch.randn(shape, generator=generator) for shape in ((n, n_in), (n_out, n_in), (n, n_out)))
    x *= torch.logspace(-3, 2, n)[:, None]
    w *= torch.logspace(-2, 0, n_in)
    g *= torch.logspace(-6, -2, n_out)
    x[3, 5], w[2, 1], g[7, 4] = 700.0, -9.0, 0.3
    return x.bfloat16().to(device), w.bfloat16().to(device), g.bfloat16().to(device)


def passes(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor, g: Tensor) -> list[Tensor]:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = product(x, w)
    return [y.detach(), *torch.autograd.grad(y, (x, w), g)]


def test_the_casts_by_hand_are_those_of_the_formats() -> None:
    """Every number of both formats and every middle between two neighbours."""
    for kind, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        numbers = torch.arange(256, dtype=torch.uint8).view(dtype).double()
        numbers = numbers[numbers.isfinite()].unique()
        points = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2])
        np.testing.assert_array_equal(cast(points.numpy(), kind), points.float().to(dtype).double().numpy())


@pytest.mark.parametrize("n", [48, 37])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_three_products_of_a_recipe(recipe: str, n: int) -> None:
    """To the rounding of bf16 where they are large, and of the fp32 sums where terms cancel; also where tokens have to be padded."""
    x, w, g = operands(n, 64, 32)
    got = passes(float8_product(recipe, emulate=True), x, w, g)
    numbers = [tensor.double().numpy() for tensor in (x, w, g)]
    sizes = (np.abs(numbers[0]) @ np.abs(numbers[1]).T, np.abs(numbers[2]) @ np.abs(numbers[1]), np.abs(numbers[2]).T @ np.abs(numbers[0]))
    for tensor, expected, size in zip(got, by_hand(recipe, *numbers), sizes, strict=True):
        assert tensor.dtype == torch.bfloat16
        assert tensor.shape == expected.shape
        assert (np.abs(tensor.double().numpy() - expected) <= 2.0**-8 * np.abs(expected) + 1e-6 * size).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_is_not_the_product_of_bf16(recipe: str) -> None:
    x, w, g = operands(48, 64, 32)
    plain = passes(F.linear, x, w, g)
    for which, (a, b) in enumerate(zip(passes(float8_product(recipe, emulate=True), x, w, g), plain, strict=True)):
        off = float((a.double() - b.double()).norm() / b.double().norm())
        exact = recipe == "rowwise_with_gw_hp" and which == 2
        assert off < 1e-3 if exact else 1e-3 < off < 0.08, (which, off)


def test_rows_of_three_dimensions() -> None:
    x, w, g = operands(48, 64, 32)
    product = float8_product("rowwise", emulate=True)
    flat = passes(product, x, w, g)
    deep = passes(product, x.view(2, 24, 64), w, g.view(2, 24, 32))
    for a, b in zip(flat, deep, strict=True):
        assert torch.equal(a, b.view_as(a))


# ---------------------------------------------------------------- which shapes
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_the_policy_is_torchaos(recipe: str) -> None:
    from torchao.float8.float8_linear_utils import _auto_filter_for_recipe

    keeps = _auto_filter_for_recipe(recipe, [])
    for n_in in (512, 1024, 1040, 2048, 2064, 4096, 4112):
        for n_out in (512, 1024, 1040, 2048, 2064, 4096, 4112):
            assert gains(recipe, n_in, n_out) == keeps(nn.Linear(n_in, n_out, bias=False, device="meta"), "x"), (n_in, n_out)


def test_what_is_converted_and_why_is_told() -> None:
    def lines(select: str, recipe: str = "tensorwise", **settings: object) -> list[str]:
        with torch.device("meta"):
            model = Decoder(DecoderConfig(**{**SMALL, **settings}), vocab_size=VOCAB, max_seq_len=64)  # type: ignore[arg-type]
        told = begun(model, recipe, select=select)
        with_products = [name for name, module in model.named_modules() if getattr(module, "products", None)]
        assert sum(int(line.split()[1]) for line in told if " in FP8: " in line) == len(with_products)
        return told

    wide = {"d_model": 1056, "n_heads": 33, "n_kv_heads": 3, "d_ff": 1184, "tie_embeddings": False}
    assert lines("policy", **wide) == [
        "WARNING: float8: cpu has no FP8 products (compute capability 8.9): emulated in fp32, for tests, slower than bf16",
        "float8: tensorwise, policy: 96% of the multiply-adds with the matrices it was given are in FP8",
        "float8: 4 × (1,056 → 1,056) in FP8: gains on an H100; blocks.0.attention.q_proj.weight …",
        "float8: 4 × (1,056 → 96) in bf16: too small to gain on an H100; blocks.0.attention.k_proj.weight …",
        "float8: 4 × (1,056 → 1,184) in FP8: gains on an H100; blocks.0.feed_forward.gate_proj.weight …",
        "float8: 2 × (1,184 → 1,056) in FP8: gains on an H100; blocks.0.feed_forward.down_proj.weight …",
        "float8: 1 × (head 1,056 → 61) in bf16: too small to gain on an H100; head.weight",
    ]
    assert lines("policy")[0] == 'WARNING: float8: no matrix is computed in FP8; leave the quantizer out, or set select = "all"'
    uneven = lines("all", n_kv_heads=1, d_ff=72, recipe="rowwise")
    assert "float8: 4 × (32 → 8) in bf16: its sizes are no multiples of 16; blocks.0.attention.k_proj.weight …" in uneven
    assert "float8: 1 × (head 32 → 61) in FP8: aligned; embedding.weight" in uneven
    assert "compute capability 9.0" in uneven[0]


def test_measured_choices_are_asked_for_once_a_shape_and_kept() -> None:
    class Stored(Fresh):
        def choice(self, key: str, decide: Callable[[], Any]) -> Any:
            self.asked.append(key)
            return {"bf16": 2.0, "float8": 1.0 if "64 → 32" in key else 3.0}

    model, stored = decoder(), Stored()
    lines = begun(model, select="measured", tuned=stored)
    assert stored.asked == [
        "float8 tensorwise: 32 → 32, 48 tokens",
        "float8 tensorwise: 32 → 16, 48 tokens",
        "float8 tensorwise: 32 → 64, 48 tokens",
        "float8 tensorwise: 64 → 32, 48 tokens",
        "float8 tensorwise: head 32 → 61, 16 tokens",
    ]
    assert "float8: 2 × (64 → 32) in FP8: 1 ms against 2 in bf16; blocks.0.feed_forward.down_proj.weight …" in lines
    assert [name for name, module in model.named_modules() if getattr(module, "products", None)] == [f"blocks.{i}.feed_forward.down_proj" for i in (0, 1)]


def test_measuring_times_every_product_and_draws_no_number_of_the_run() -> None:
    before, calls = torch.get_rng_state(), []

    def counted(x: Tensor, weight: Tensor) -> Tensor:
        calls.append((x.shape, weight.shape, x.dtype))
        return F.linear(x, weight)

    times = measure(Shape(32, 48, 16, False), {"bf16": project, "float8": counted}, torch.device("cpu"), repeats=2)
    assert set(times) == {"bf16", "float8"}
    assert all(value > 0 for value in times.values())
    assert calls == [((32, 48), (16, 48), torch.bfloat16)] * 5
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- the model
def test_model_and_state_stay_as_they_are() -> None:
    plain, model = decoder(tie_embeddings=False, embedding_rank=16), decoder(tie_embeddings=False, embedding_rank=16)
    begun(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.embedding.products.keys() == {"projection"}  # type: ignore[union-attr]


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_layer_computes_with_its_own_weight(recipe: str) -> None:
    """Forward and backward through a factorised, tied model, against the product applied by hand."""
    model = decoder(embedding_rank=16)
    begun(model, recipe)
    product, hidden = float8_product(recipe, emulate=True), torch.randn(32, 32).bfloat16()
    down = model.blocks[0].feed_forward.down_proj
    wide = torch.randn(32, 64).bfloat16()
    assert torch.equal(down(wide), product(wide, down.weight.bfloat16()))
    head = model.head
    rows = F.pad(head.weight.bfloat16(), (0, 0, 0, 3))
    assert torch.equal(head(hidden), product(product(hidden, head.projection.bfloat16()), rows)[:, :VOCAB])
    set_precision(model, "bf16")
    looked_up = head.weight[torch.arange(32)].bfloat16()
    assert torch.equal(model.embedding(torch.arange(32)), product(looked_up, head.projection.bfloat16().T))


@pytest.mark.parametrize("tokens", [48, 40])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_head_in_chunks_with_its_vocabulary_padded(recipe: str, tokens: int) -> None:
    """Against autograd of each chunk, with the padding written out; the loss overwrites the logits, which must not show."""
    generator = torch.Generator().manual_seed(5)
    head = Head(VOCAB, 32, softcap=None)
    head.weight = nn.Parameter(torch.randn(VOCAB, 32, generator=generator))
    hidden = torch.randn(1, tokens, 32, generator=generator).bfloat16().requires_grad_()
    labels = torch.randint(VOCAB, (1, tokens), generator=generator)
    product = float8_product(recipe, emulate=True)
    head.products = {"weight": partial(aligned_product, product=product, multiple=16)}  # type: ignore[assignment]
    loss = loss_sums(hidden, labels, head, Component.named("loss", "cross_entropy", chunk_tokens=16).build()).loss
    got = torch.autograd.grad(loss, (hidden, head.weight))

    rows, weight, expected, size = hidden.detach()[0], head.weight.detach(), torch.zeros(()), chunk_size(tokens, 16)
    for_hidden, for_weight = [], torch.zeros_like(weight)
    for part, wanted in zip(rows.split(size), labels[0].split(size), strict=True):
        x, w = part.clone().requires_grad_(), weight.bfloat16().requires_grad_()
        logits = product(x, F.pad(w, (0, 0, 0, 3)))[:, :VOCAB]
        sums = F.cross_entropy(logits.float(), wanted, reduction="sum")
        for_x, for_w = torch.autograd.grad(sums, (x, w))
        expected, for_weight = expected + sums.detach(), for_weight + for_w.float()
        for_hidden.append(for_x)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)
    for gradient, wanted in zip(got, (torch.cat(for_hidden)[None], for_weight), strict=True):
        # Logit gradients are rounded to bf16 by two roads, and a cast may then fall on the next number of FP8.
        assert float((gradient.double() - wanted.double()).norm() / wanted.double().norm()) < 0.01


def test_the_aligned_product_keeps_its_gradients_when_its_result_is_overwritten() -> None:
    x, w, g = operands(16, 32, 13)
    x, w, g = x.double(), w.double(), g.double()
    plain = passes(F.linear, x, w, g)
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = aligned_product(a, b, F.linear, 16)
    assert torch.equal(y.detach(), plain[0])
    for written in (True, False):
        y = aligned_product(a, b, F.linear, 16)
        handed = y.detach().copy_(g) if written else g
        for got, expected in zip(torch.autograd.grad(y, (a, b), handed), plain[1:], strict=True):
            torch.testing.assert_close(got, expected)
    frozen = aligned_product(a, w, F.linear, 16)
    torch.testing.assert_close(torch.autograd.grad(frozen, a, g)[0], plain[1])


def test_rounded_weights_are_multiplied_in_fp8() -> None:
    """QAT and FP8 in one module: as a model that holds the rounded weights, and gradients go straight to the masters."""
    rounding, model, reference = Component.named("quantizer", "int6", qat=True).build(), decoder(), decoder()
    rounding.prepare(model, matrices(model))
    with torch.no_grad():
        for name in matrices(reference):
            reference.get_parameter(name).copy_(rounding.round_trip(reference.get_parameter(name)))
    for module in model.modules():
        if hasattr(module, "qat"):
            module.qat = True
    results = []
    for one in (model, reference):
        begun(one)
        sums, _ = trained(one)(batch())
        sums.loss.backward()
        results.append((sums.loss.detach(), gradients(one)))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[1][1].items():
        torch.testing.assert_close(results[0][1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


class Doubled(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.linear(x, self.weight)


def test_what_nobody_multiplies_by_is_named() -> None:
    model = decoder()
    quantizer = Component.named("quantizer", "float8").build()
    with pytest.raises(
        ValueError, match=r"^norm\.weight: RMSNorm does not multiply by its weight through titanlm\.models\.layers\.product\.product_of;.*`params`$"
    ):
        quantizer.prepare(model, ["norm.weight", *matrices(model)])
    with pytest.raises(ValueError, match="weight: Doubled does not multiply"):
        multipliers(Doubled(16, 16), ["weight"])
    with pytest.raises(ValueError, match="nobody: the model has no such parameter"):
        quantizer.prepare(model, ["nobody"])
    untied = decoder(tie_embeddings=False)
    with pytest.raises(ValueError, match=r"embedding\.weight: Embedding does not multiply"):
        quantizer.prepare(untied, ["embedding.weight"])
    assert product_of(untied.head, "weight", project) is project


# ---------------------------------------------------------------- the compiler
INDUCTOR = {("tensorwise", "none"), ("rowwise", "selective"), ("rowwise_with_gw_hp", "full")}
GRAPHS = [
    pytest.param(recipe, recompute, backend, marks=pytest.mark.slow)
    for recipe in RECIPES
    for recompute in ("none", "selective", "full")
    for backend in ("aot_eager", "inductor")
    if backend == "aot_eager" or (recipe, recompute) in INDUCTOR
]


@pytest.mark.parametrize(("recipe", "recompute", "backend"), GRAPHS)
def test_compiled_blocks_and_whole_models_compute_the_same(recipe: str, recompute: Any, backend: str) -> None:
    """One graph for the equal blocks and one for the model, without a break; with inductor the head's own graph as well."""
    results = []
    for mode in ("none", "block", "model"):
        torch._dynamo.reset()
        model = decoder()
        begun(model, recipe, compiled=mode != "none" and backend == "inductor")
        activation_checkpointing.apply(model.blocks, recompute)
        counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
        if mode == "model":
            model.compile(fullgraph=True, dynamic=False, backend=counter)
        elif mode == "block":
            for block in model.blocks:
                block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=counter)
        sums, _ = trained(model)(batch())
        sums.loss.backward()
        assert counter.frame_count == (mode != "none")
        results.append((sums.loss.detach(), gradients(model)))
    (loss, plain), *others = results
    for other, found in others:
        torch.testing.assert_close(other, loss, rtol=1e-3 if backend == "inductor" else 0, atol=0)
        for name, gradient in plain.items():
            off = float((found[name] - gradient).norm() / gradient.norm())
            # Fused code keeps bf16 intermediates in fp32, so numbers fall on the other side of a step of FP8: as much as the steps' own noise, 0.12 here.
            assert off <= (0.15 if backend == "inductor" else 0), (name, off)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_product_compiled_by_itself_is_the_same_to_the_bit(recipe: str) -> None:
    tensors = operands(40, 64, 32)
    plain, compiled = (passes(float8_product(recipe, emulate=True, compiled=compiled), *tensors) for compiled in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))


# ---------------------------------------------------------------- runs
def run(config: Path, *overrides: str) -> Path:
    settings = load(config, overrides)
    with Trainer(settings) as trainer:
        trainer.train()
    return Path(settings.run.dir) / settings.run.name


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


@pytest.mark.parametrize("recipe", ["tensorwise", *(pytest.param(recipe, marks=pytest.mark.slow) for recipe in RECIPES[1:])])
def test_a_run_learns_as_in_bf16_and_resumes_exactly(tiny: Path, recipe: str) -> None:
    """Twenty steps: each loss within 5 % of the bf16 run's, on average 2 %, and not the same; from step seven they go on again bit for bit."""
    plain = losses(run(tiny, BF16, "--run.name=plain"))
    straight = run(tiny, BF16, IN_FP8 % recipe, "--run.name=straight")
    found = losses(straight)
    apart = [abs(a / b - 1) for a, b in zip(found, plain, strict=True)]
    assert 0 < max(apart) < 0.05
    assert sum(apart) / len(apart) < 0.02
    assert plain[-1] < 0.75 * plain[0]
    common = (BF16, IN_FP8 % recipe, "--run.name=resumed")
    resumed = run(tiny, *common)
    for step in (14, 20):
        (resumed / "checkpoints" / f"step-{step:08d}").rename(tiny.parent / f"{recipe}-{step}")
    run(tiny, *common)
    assert losses(resumed) == found
    states = [checkpoint.load(folder / "checkpoints" / "step-00000020").state["model"] for folder in (straight, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_run_goes_on_in_bf16_and_back_from_the_same_checkpoints(tiny: Path) -> None:
    in_fp8, name = IN_FP8 % "tensorwise", "--run.name=both"
    allowed = '--checkpoint.allow_changes=["quantizer"]'
    first = ("--scheduler=constant", BF16, name)
    folder = run(tiny, *first, "--train.steps=7")
    with pytest.raises(CheckpointError, match="quantizer"):
        run(tiny, *first, in_fp8, "--train.steps=14")
    run(tiny, *first, in_fp8, "--train.steps=14", allowed)
    run(tiny, *first, "--train.steps=20", allowed)
    both, plain = losses(folder), losses(run(tiny, "--scheduler=constant", BF16, "--run.name=plain"))
    assert both[:7] == plain[:7]
    assert both[7:14] != plain[7:14]
    assert all(math.isclose(a, b, rel_tol=0.05) for a, b in zip(both, plain, strict=True))


def test_an_artifact_does_not_know(tiny: Path) -> None:
    """float8 before int6: the same matrices are stored as int6, as without float8; what reads the file computes in bf16."""
    with_both = '--quantizer=[{name="float8",select="all"},{name="int6"}]'
    folder = run(tiny, BF16, with_both, "--train.steps=3", "--run.name=x")
    artifacts = []
    for index, overrides in enumerate(([], ["--quantizer=int6"])):
        path = folder / f"{index}.titanlm"
        export_run(folder, output=path, overrides=overrides)
        artifacts.append(read_artifact(path).tensors)
    assert artifacts[0].keys() == artifacts[1].keys()
    assert any(getattr(tensor, "quantizer", "") == "int6" for tensor in artifacts[0].values())
    for name, tensor in artifacts[0].items():
        other = artifacts[1][name]
        for part, values in tensor.parts.items() if hasattr(tensor, "parts") else [("", tensor)]:
            assert torch.equal(values, other.parts[part] if part else other), name


def test_measured_choices_are_stored_and_used_again(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import titanlm.quantizers.float8 as module

    measured: list[Shape] = []

    def measure(shape: Shape, *_: Any) -> dict[str, float]:
        measured.append(shape)
        return {"bf16": 2.0, "float8": 1.0 if len(measured) % 2 else 3.0}

    monkeypatch.setattr(module, "measure", measure)
    settings = (BF16, '--quantizer=[{name="float8",select="measured"}]', "--scheduler=constant", "--run.name=x")
    folder = run(tiny, *settings, "--train.steps=2")
    assert [tuple(shape) for shape in measured] == [(192, 32, 32, False), (192, 32, 16, False), (192, 32, 64, False), (192, 64, 32, False)]
    run(tiny, *settings, "--train.steps=4")
    assert len(measured) == 4
    told = [line.partition("float8: ")[2] for line in (folder / "log.txt").read_text().splitlines() if " × (" in line] if (folder / "log.txt").exists() else []
    assert told[:4] == told[4:]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["block", "model"])
def test_a_compiled_run(tiny: Path, mode: str) -> None:
    """Training and scoring through the trainer, head and projections compiled by themselves: as uncompiled, but for FP8's noise."""
    common = (BF16, IN_FP8 % "rowwise", "--model.embedding_rank=16", "--train.steps=4", "--scheduler=constant")
    folders = [run(tiny, *common, f"--train.compile={how}", f"--run.name={how}") for how in ("none", mode)]
    assert all(math.isclose(a, b, rel_tol=0.01) for a, b in zip(*map(losses, folders), strict=True))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["replicate", "fsdp2"])
def test_two_ranks_are_one_process(tiny: Path, zygote: Any, strategy: str) -> None:
    """Scales are those of a micro-batch, so with equal ones FP8 computes the same."""
    common = (BF16, IN_FP8 % "tensorwise", "--train.micro_batch=1", "--train.steps=4", "--scheduler=constant")
    zygote.train(tiny, "--run.name=one", *common).expect(0)
    zygote.train(tiny, "--run.name=two", f"--parallel.strategy={strategy}", *common, ranks=2).expect(0)
    one, two = (losses(tiny.parent / "runs" / name) for name in ("one", "two"))
    assert all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(one, two, strict=True))


# ---------------------------------------------------------------- configs
def test_mistakes_are_found_before_a_device_is_touched(tiny: Path) -> None:
    fp32 = check(load(tiny, [IN_FP8 % "tensorwise"]))
    assert [problem.partition(":")[0] for problem in fp32.problems] == ["train.precision"]
    assert "'float8'" in fp32.problems[0]
    on_gpu = check(load(tiny, [IN_FP8 % "tensorwise", "--train.device=cuda"]))
    assert [any(warning.startswith("train.compile: 'none'") for warning in report.warnings) for report in (fp32, on_gpu)] == [False, True]
    norms = check(load(tiny, [BF16, '--quantizer=[{name="float8",params=["*"]}]'])).problems
    assert norms
    assert all("norm" in problem and "leave it out of the quantizer's `params`" in problem for problem in norms)
    odd = check(load(tiny, [BF16, "--quantizer=float8", "--model.d_model=36", "--model.n_heads=3", "--model.n_kv_heads=3"])).problems
    assert odd == [
        "model: quantizer 'float8' needs sizes that are multiples of 16, and has 36 → 36, 36 → 64, 64 → 36; change widths and head_dim, or leave it out"
    ]
    assert not check(load(tiny, [BF16, '--quantizer=[{name="float8"},{name="int6",qat=true}]', "--train.compile=block"])).problems
    twice = check(load(tiny, [BF16, '--quantizer=[{name="float8"},{name="int6"},{name="float8",recipe="rowwise"}]'])).problems
    assert [problem.partition(":")[0] for problem in twice] == ["quantizer.2.params"]


@pytest.mark.parametrize("name", ["decoder_3b", "decoder_3b_float8"])
def test_the_train_configs(name: str) -> None:
    config = load(ROOT / f"train_configs/{name}.toml")
    report = check(config)
    assert not report.problems
    assert sum(parameter.numel() for parameter in report.model.parameters()) == config.model.config.expect_params == 3_029_840_640
    if name.endswith("float8"):
        assert [dataclasses.asdict(quantizer.config).get("recipe") for quantizer in config.quantizer] == ["tensorwise", None]
        params = [name for name, role in report.model.parameter_roles().items() if role in ("matrix", "head")]
        lines = begun(report.model, select="policy", params=params, n_tokens=32_768, n_head_tokens=8192)
        assert "98% of the multiply-adds" in lines[1]
        assert [line.partition(":")[2].partition(":")[0].strip() for line in lines[2:]] == [
            "14 × (3,840 → 3,584) in FP8",
            "28 × (3,840 → 512) in bf16",
            "14 × (3,584 → 3,840) in FP8",
            "28 × (3,840 → 10,240) in FP8",
            "14 × (10,240 → 3,840) in FP8",
            "1 × (head 3,840 → 122,112) in FP8",
        ]


# ---------------------------------------------------------------- on a GPU
@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_devices_products_are_the_emulated_ones(recipe: str, compiled: bool) -> None:
    """Within what the device's sums in the forward pass lose (it may keep 14 bits of them) and the rounding to bf16."""
    device = torch.device("cuda")
    if not has_float8(device, recipe):
        pytest.skip("no FP8 on this GPU")
    x, w, g = operands(256, 512, 1024, "cuda")
    emulated, real = (passes(float8_product(recipe, emulate=emulate, compiled=compiled and not emulate), x, w, g) for emulate in (True, False))
    for a, b in zip(real, emulated, strict=True):
        assert a.dtype == torch.bfloat16
        assert float((a.double() - b.double()).norm() / b.double().norm()) < 1e-2
    again = passes(float8_product(recipe, emulate=False, compiled=compiled), x, w, g)
    assert all(torch.equal(a, b) for a, b in zip(again, real, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_the_head_on_the_device(compiled: bool) -> None:
    """A vocabulary that has to be padded, in chunks, against the same head in bf16."""
    torch.manual_seed(0)
    head = Head(5003, 512).cuda()
    nn.init.normal_(head.weight, std=0.05)
    hidden = torch.randn(1, 1000, 512, device="cuda").bfloat16().requires_grad_()
    labels, loss = torch.randint(5003, (1, 1000), device="cuda"), Component.named("loss", "cross_entropy", chunk_tokens=500).build()
    results = []
    for product in (None, float8_product("tensorwise", emulate=False, compiled=compiled)):
        head.products = {} if product is None else {"weight": partial(aligned_product, product=product, multiple=16)}  # type: ignore[assignment]
        total = loss_sums(hidden, labels, head, loss, compile_kernels=compiled).loss
        results.append((total.detach(), *torch.autograd.grad(total, (hidden, head.weight))))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=2e-3, atol=0)
    for a, b in zip(results[1][1:], results[0][1:], strict=True):
        assert 1e-3 < float((a.double() - b.double()).norm() / b.double().norm()) < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["block", "model"])
def test_a_compiled_run_on_the_device_learns(tiny: Path, mode: str) -> None:
    device = ("--train.device=cuda", "--train.deterministic=false", "--model.attention_backend=sdpa", f"--train.compile={mode}", BF16)
    plain = losses(run(tiny, *device, "--run.name=plain"))
    for recipe in RECIPES:
        found = losses(run(tiny, *device, IN_FP8 % recipe, f"--run.name={recipe}"))
        assert all(math.isclose(a, b, rel_tol=0.05) for a, b in zip(found, plain, strict=True)), recipe


@pytest.mark.gpu
def test_measured_on_the_device() -> None:
    """FP8 gains where a product takes a millisecond and loses where it takes microseconds; by ratios far from one."""
    product = float8_product("tensorwise", emulate=False, compiled=True)
    products = {"bf16": project, "float8": product}
    large, small = (measure(Shape(n, n_in, n_out, False), products, torch.device("cuda")) for n, n_in, n_out in ((32_768, 4096, 8192), (1024, 256, 128)))
    assert large["float8"] < large["bf16"]
    assert small["float8"] > small["bf16"]
