"""Yxanul: sizes, start, what is computed in which precision, and the machines that it fits."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from titanlm import checkpoint, cli
from titanlm.batch import Batch
from titanlm.check import optimizer_claims, quantizer_claims, roles_of
from titanlm.config import RunConfig, load
from titanlm.course import legs_of
from titanlm.curriculum import curriculum_problems
from titanlm.distributed.world import World
from titanlm.epochs import read_again
from titanlm.kernels.fused import use_kernels
from titanlm.metrics import memory_of
from titanlm.micro_batch import SHARE, made_up
from titanlm.models.layers.attention import attention_mask
from titanlm.models.layers.norm import RMSNorm
from titanlm.models.layers.product import multipliers
from titanlm.pass_memory import pass_bytes
from titanlm.patterns import NamedParam
from titanlm.precision import set_precision
from titanlm.quantizers import float8
from titanlm.recipe_plan import Layout, planned_model
from titanlm.run_choices import begin_quantizers
from titanlm.train import Trainer
from titanlm.train_module import TrainModule
from titanlm.weights import initialise

CONFIGS = Path(__file__).parents[1] / "train_configs" / "yxanul"
MODELS = ("yxanul_197m", "yxanul_270m")
VOCAB = 200_005
PROJECTIONS = (*(f"attention.{one}_proj" for one in "qkvo"), *(f"feed_forward.{one}_proj" for one in ("gate", "up", "down")))
"""The document's list of what is computed in FP8."""
NARROW = {"n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 64, "embedding_rank": 16, "vocab_size": 272}
SMALL = (
    *("--train.seq_len=48", "--train.global_batch=8", "--train.micro_batch_tokens=192", "--train.log_every=1", "--train.device=cpu", "--train.compile=none"),
    *("--train.threads=1", "--train.deterministic=true", "--validation=[]", "--loss.chunk_tokens=64", "--data.n_streams=8", "--scheduler.warmup_steps=3"),
    *("--model.attention_backend=sdpa", "--optimizer.0.lr=1e-2", "--tokenizer=byte", "--curriculum=[]", "--checkpoint.best="),
)


def shaped(*, tied: bool = False, **settings: int) -> list[str]:
    """Overrides that give a model these sizes, and say how many parameters it then has: heads in full, two of keys and values."""
    n, d, rank, vocab = (settings[name] for name in ("n_layers", "d_model", "embedding_rank", "vocab_size"))
    block = 2 * d * d + 2 * d * 2 * (d // settings["n_heads"]) + 3 * d * settings["d_ff"] + 2 * d
    count = vocab * rank + rank * d + n * block + d + (0 if tied else vocab * d)
    return [*(f"--model.{name}={value}" for name, value in settings.items()), f"--model.tie_embeddings={str(tied).lower()}", f"--model.expect_params={count}"]


SHALLOW = shaped(n_layers=2, d_model=640, n_heads=10, d_ff=1712, embedding_rank=128, vocab_size=VOCAB)
BF16 = "--quantizer=[]"
"""The document's --disable-fp8."""


def yxanul(name: str, *overrides: str) -> RunConfig:
    return load(CONFIGS / f"{name}.toml", overrides)


# ---------------------------------------------------------------- sizes
@pytest.mark.parametrize(("name", "tied", "untied"), [("yxanul_197m", 196_398_464, 350_002_304), ("yxanul_270m", 145_281_280, 273_284_480)])
def test_the_head_is_tied_as_the_config_says(name: str, tied: int, untied: int) -> None:
    """Tied, it holds nothing of its own; and a count that is off by more than 2 % is refused, which is how the document's two models became one."""
    config = yxanul(name)
    assert config.model.config.expect_params == (tied if config.model.config.tie_embeddings else untied)
    for shared, count in ((True, tied), (False, untied)):
        model = planned_model(yxanul(name, f"--model.tie_embeddings={str(shared).lower()}", f"--model.expect_params={count}"))
        assert sum(parameter.numel() for parameter in model.parameters()) == count
        assert (model.head.weight is model.embedding.weight) is shared
        assert (model.head.projection is model.embedding.projection) is shared
        assert ("head.weight" in model.state_dict()) is not shared
        assert (model.embedding.weight.shape, model.embedding.projection.shape) == ((VOCAB, 128), (128, config.model.config.d_model))
        assert model.head.weight.shape == (VOCAB, 128 if shared else config.model.config.d_model)
    other = str(not config.model.config.tie_embeddings).lower()
    with pytest.raises(ValueError, match="expect_params"):
        planned_model(yxanul(name, f"--model.tie_embeddings={other}"))
    assert (
        planned_model(config).embedding.weight.numel() + planned_model(config).embedding.projection.numel() == VOCAB * 128 + 128 * config.model.config.d_model
    )


def test_values_are_the_documents() -> None:
    for name, d, heads, d_ff in (("yxanul_197m", 768, 12, 2048), ("yxanul_270m", 640, 10, 1712)):
        config = yxanul(name)
        m, train, (adamw,) = config.model.config, config.train, config.optimizer
        assert (m.n_layers, m.d_model, m.n_heads, m.n_kv_heads, m.d_ff, m.vocab_size) == (28, d, heads, 2, d_ff, VOCAB)
        assert (m.norm_eps, m.rope_theta, m.max_positions, m.activation, m.qk_norm) == (1e-6, 10_000.0, 4096, "swiglu", "none")
        assert (adamw.config.lr, adamw.config.betas, adamw.config.weight_decay) == (2e-4, (0.9, 0.95), 0.1)
        scheduler = config.scheduler.build(total_steps=train.steps)
        rates = [2e-4 * scheduler.factor(type("At", (), {"step": step})) for step in (499, train.steps - 1)]
        assert rates == pytest.approx([2e-4, 1e-5], rel=1e-3)
        assert (train.seq_len, train.seed, train.precision) == (2048, 42, "bf16")
        legs = legs_of(config)
        assert [(leg.seq_len, leg.rows, leg.clip) for leg in (legs[0], legs[-1])] == [(128, 256, 1.0), (2048, 32, 0.3)]
        assert config.data.n_tokens is not None
        assert 0 <= config.data.n_tokens - sum(leg.tokens for leg in legs) < 65_536  # one epoch, of the 95 % that are trained on
        assert (train.validate_every, config.checkpoint.every, config.checkpoint.keep_last) == (2000, 10_000, 5)


def start_loss(config: RunConfig, rows: int, seq_len: int) -> float:
    """Mean loss of fresh weights over drawn tokens, in fp32, by torch's own cross-entropy."""
    model = planned_model(config).to_empty(device="cpu")
    initialise(model, config.train.seed)
    batch = made_up(rows, seq_len, VOCAB, 1, document_mask=False)
    with torch.no_grad():
        return F.cross_entropy(model.head(model(batch)).flatten(0, 1), batch.labels.flatten()).item()


@pytest.mark.parametrize("tied", [True, False])
def test_a_fresh_narrow_model_knows_nothing_of_the_real_vocabulary(tied: bool) -> None:
    narrow = shaped(tied=tied, n_layers=4, d_model=64, n_heads=4, d_ff=176, embedding_rank=16, vocab_size=VOCAB)
    assert start_loss(yxanul("yxanul_270m", *narrow), 2, 32) == pytest.approx(math.log(VOCAB), abs=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_model_knows_nothing(name: str) -> None:
    """The document says about 12.3 of one and about 11 of another model; ln V is 12.206."""
    assert start_loss(yxanul(name), 1, 64) == pytest.approx(math.log(VOCAB), abs=0.15)


# ---------------------------------------------------------------- precision
def in_fp8(config: RunConfig) -> tuple[Any, list[str]]:
    """The model on the meta device, which is taken to have FP8, and what the start says of it."""
    model = planned_model(config)
    set_precision(model, config.train.precision)
    said = begin_quantizers(config, model, config.train.seq_len, device=torch.device("meta"), compiled=False, tuned=None)  # type: ignore[arg-type]
    return model, said


@pytest.mark.parametrize(("name", "shares"), [("yxanul_197m", (0.86893, 0.60)), ("yxanul_270m", (0.43750, 0.37241))])
def test_exactly_the_seven_projections_are_converted(name: str, shares: tuple[float, float]) -> None:
    """7 × 28, also those that are too small to gain; the shares are measured and are not the document's 60 %."""
    config = yxanul(name)
    model, said = in_fp8(config)
    converted = {f"{where}.{own}" for where, module in model.named_modules() for own in getattr(module, "products", {})}
    assert converted == {f"blocks.{layer}.{projection}.weight" for layer in range(28) for projection in PROJECTIONS}
    assert len(converted) == 7 * 28
    per_layer = [model.get_parameter(f"blocks.0.{projection}.weight").numel() for projection in PROJECTIONS]
    of_parameters = 28 * sum(per_layer) / config.model.config.expect_params
    of_flops = 6 * 28 * sum(per_layer) / model.flops_per_token(2048)
    assert (of_parameters, of_flops) == pytest.approx(shares, abs=5e-4)
    assert said[-1] == f"float8: 196 matrices, {of_parameters:.2%} of the parameters and {of_flops:.2%} of the FLOPs of a token in rows of 2,048"
    # What a policy by size would leave of them, and what a config without the quantizer does.
    assert in_fp8(yxanul(name, "--quantizer.0.select=policy"))[1][0].startswith("WARNING: float8: no matrix is computed in FP8")
    assert in_fp8(yxanul(name, BF16))[1] == []


def test_shares_of_everything_are_the_models_own_count() -> None:
    """A tied table counts once among the parameters; its projection is multiplied by twice."""
    config = yxanul("yxanul_197m", '--quantizer.0.params=["@matrix","@embedding"]')
    model, said = in_fp8(config)
    norms = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    of_parameters, of_flops = 1 - norms / 196_398_464, 6 * model.matmul_parameters() / model.flops_per_token(2048)
    assert said[-1].startswith(f"float8: 198 matrices, {of_parameters:.2%} of the parameters and {of_flops:.2%} of the FLOPs")


class Operators(TorchDispatchMode):
    """Dtypes of the tensors that each operator is given and makes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple[list[torch.dtype], list[torch.dtype]]]] = defaultdict(list)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(map(is_traceable_wrapper_subclass, args)):
            return NotImplemented  # operands in FP8 are of a class of their own, whose insides come by next
        results = operator(*args, **(kwargs or {}))
        made = results if isinstance(results, tuple | list) else (results,)
        given, kept = ([value.dtype for value in values if isinstance(value, Tensor)] for values in (args, made))
        self.calls[operator.overloadpacket.__name__].append((given, kept))
        return results

    def given(self, name: str) -> set[torch.dtype]:
        return {dtype for given, _ in self.calls[name] for dtype in given}


def test_every_class_of_tensors_has_the_dtype_of_the_policy() -> None:
    """A step of two layers of the real widths with two micro-batches, by the operators that a GPU would run, on the meta device."""
    config = yxanul("yxanul_270m", *SHALLOW)
    model, _ = in_fp8(config)
    module = TrainModule(model, config.loss.build())
    set_precision(module, config.train.precision)
    seen: dict[str, set[torch.dtype]] = defaultdict(set)

    def note(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen[name].update((inputs[0].dtype, output.dtype))

    for each in model.modules():
        if isinstance(each, RMSNorm):
            each.register_forward_hook(note("norm"))
    model.embedding.register_forward_hook(lambda module, inputs, output: seen["embedding"].add(output.dtype))
    model.head.register_forward_hook(note("head"))
    wide, narrow = (torch.empty(1, 32, dtype=dtype, device="meta") for dtype in (torch.int64, torch.int32))
    batch = Batch(wide, wide, narrow, wide, narrow)
    with Operators() as run:
        losses = [module(batch)[0].loss for _ in range(2)]
        for loss in losses:
            loss.backward()
    fp8, bf16, fp32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32

    # FP8: both operands of all three products of the seven projections, and of nothing else; scales and sums are fp32, results bf16.
    assert len(run.calls["_scaled_mm"]) == 2 * 3 * 7 * 2
    assert {tuple(given[:2]) for given, _ in run.calls["_scaled_mm"]} == {(fp8, fp8)}
    assert {dtype for given, _ in run.calls["_scaled_mm"] for dtype in given[2:]} == {fp32}
    assert {dtype for _, made in run.calls["_scaled_mm"] for dtype in made} == {bf16}
    # bf16: every other product (embedding, head), norms from outside, logits, attention and with it the weights of softmax, whose sums are fp32.
    assert len(run.calls["mm"]) == 2 * 3 * 2
    assert run.given("mm") == seen["norm"] == seen["embedding"] == seen["head"] == {bf16}
    attention = run.calls["_scaled_dot_product_cudnn_attention"]
    assert len(attention) == 2 * 2
    assert {(*given, *made[:2]) for given, made in attention} == {(bf16, bf16, bf16, bf16, fp32)}
    # fp32: statistics of norms and loss, the loss, weights, their gradients and the sums of those over micro-batches.
    assert run.given("logsumexp") == {fp32}
    assert run.given("rsqrt") == {fp32}
    assert len(run.calls["rsqrt"]) == 2 * (2 * 2 + 1)
    assert {loss.dtype for loss in losses} == {fp32}
    assert {parameter.dtype for parameter in model.parameters()} == {parameter.grad.dtype for parameter in model.parameters()} == {fp32}
    # fp32: both moments of every parameter.
    parameters, roles, (names,) = dict(model.named_parameters()), roles_of(model), optimizer_claims(config, model).claimed
    optimizer = config.optimizer[0].build(named_params=[NamedParam(name, parameters[name], roles[name]) for name in names])
    optimizer.step()
    moments = [optimizer.state[parameter][name] for parameter in parameters.values() for name in ("exp_avg", "exp_avg_sq")]
    assert len(moments) == 2 * len(parameters)
    assert {moment.dtype for moment in moments} == {fp32}


@pytest.mark.parametrize(("recipe", "of_gradients"), [("rowwise", torch.float8_e4m3fn), ("tensorwise", torch.float8_e5m2)])
def test_formats_of_the_recipes(recipe: str, of_gradients: torch.dtype) -> None:
    """The document has e4m3 everywhere and says that its range is the better one; it is not."""
    assert (torch.finfo(torch.float8_e4m3fn).max, torch.finfo(torch.float8_e5m2).max) == (448, 57_344)
    assert (torch.finfo(torch.float8_e4m3fn).eps, torch.finfo(torch.float8_e5m2).eps) == (1 / 8, 1 / 4)
    product = float8.float8_product(recipe, emulate=False)
    x, weight = (torch.empty(n, 32, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (64, 16))
    with Operators() as run:
        product(x, weight).sum().backward()
    forward, *backward = [given[:2] for given, _ in run.calls["_scaled_mm"]]
    assert forward == [torch.float8_e4m3fn] * 2
    assert len(backward) == 2
    assert all(of_gradients in given and torch.float8_e4m3fn in given for given in backward)


# ---------------------------------------------------------------- runs
def run(folder: Path, *overrides: str) -> list[float]:
    """Losses of all steps so far."""
    data = ("--dataset=python_stdlib", f"--run.dir={folder}", "--run.name=run", '--logger=["jsonl"]', "--checkpoint.asynchronous=false")
    with Trainer(yxanul("yxanul_270m", *shaped(**NARROW), *SMALL, *data, *overrides)) as trainer:
        trainer.train()
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_a_run_goes_on_without_fp8_and_with_it_again(tmp_path: Path) -> None:
    """With nothing but the document's switch between the starts."""
    constant = ("--scheduler=constant", "--optimizer.0.lr=3e-3")
    for steps, switch in ((3, ()), (6, (BF16,)), (9, ())):
        mixed = run(tmp_path / "mixed", *constant, f"--train.steps={steps}", *switch)
    straight = run(tmp_path / "straight", *constant, "--train.steps=9")
    plain = run(tmp_path / "plain", *constant, "--train.steps=9", BF16)
    assert len(mixed) == 9
    assert mixed[:3] == straight[:3] != plain[:3]
    assert mixed[3:] != straight[3:]
    assert all(math.isclose(a, b, rel_tol=0.03) for a, b in zip(mixed, plain, strict=True))
    states = [checkpoint.load(tmp_path / name / "run" / "checkpoints" / "step-00000009").state for name in ("mixed", "plain")]
    assert states[0]["model"].keys() == states[1]["model"].keys()
    assert {tensor.dtype for state in states for tensor in state["model"].values()} == {torch.float32}
    for state in states:
        moments = [value for one in state["optimizers"][0]["params"].values() for name, value in one.items() if name.startswith("exp_avg")]
        assert moments
        assert {moment.dtype for moment in moments} == {torch.float32}


# ---------------------------------------------------------------- machines
MACHINES = [
    ("rtx_4090", "RTX 4090", 1),
    ("rtx_5090", "RTX 5090", 1),
    ("a100_40gb", "A100 40GB", 1),
    ("a100_80gb", "A100 80GB", 1),
    ("h100", "H100", 1),
    ("h100_x8", "H100", 8),
]
CAPABILITY = {"RTX 4090": (8, 9), "RTX 5090": (12, 0), "A100 40GB": (8, 0), "A100 80GB": (8, 0), "H100": (9, 0)}


def whole_bytes(config: RunConfig, n_devices: int) -> int:
    model = planned_model(config)
    layout = Layout(config, model, World(size=n_devices, local_size=n_devices))
    rows = config.train.rows(config.train.seq_len)
    assert rows is not None
    held = layout.memory().device
    primed = sum(held[name] for name in ("weights", "moments")) if config.train.priming_steps else 0
    return sum(held.values()) + primed + pass_bytes(config, model, rows, config.train.seq_len)


@pytest.mark.parametrize(("name", "device", "n_devices"), MACHINES)
def test_each_machine_has_room(name: str, device: str, n_devices: int) -> None:
    config, memory = yxanul(name, BF16), memory_of(device)
    assert memory is not None
    assert (config.parallel.strategy == "none") is (n_devices == 1)
    assert not list(curriculum_problems(config))
    assert all(leg.rows % n_devices == 0 for leg in legs_of(config))
    assert whole_bytes(config, n_devices) <= SHARE * memory


@pytest.mark.slow
@pytest.mark.parametrize(("name", "device", "n_devices"), MACHINES)
def test_each_machine_has_room_in_fp8_and_for_the_other_model(name: str, device: str, n_devices: int) -> None:
    """Casts to FP8 come and go while activations are held, but logits and their gradient are larger."""
    config, memory = yxanul(name), memory_of(device)
    assert memory is not None
    assert whole_bytes(config, n_devices) == whole_bytes(yxanul(name, BF16), n_devices)
    rows = f"--train.micro_batch_tokens={config.train.micro_batch_tokens}"
    assert whole_bytes(yxanul("yxanul_197m", rows, f"--parallel.strategy={config.parallel.strategy}"), n_devices) <= SHARE * memory


def test_without_chunks_the_logits_alone_would_not_fit() -> None:
    """The document's batch of 8,192 rows of 8 tokens makes 26.2 GB of logits in bf16, on a card of 24 GB."""
    assert pytest.approx(26.2e9, rel=1e-3) == 8192 * 8 * VOCAB * 2
    memory = memory_of("RTX 4090")
    assert memory is not None
    rows = ("--train.seq_len=8", "--train.global_batch=8192", "--train.micro_batch_tokens=65536", "--curriculum=[]")
    assert whole_bytes(yxanul("rtx_4090", *SHALLOW, BF16, *rows, "--loss.chunk_tokens=0"), 1) > memory
    assert whole_bytes(yxanul("rtx_4090", *SHALLOW, BF16, *rows), 1) < memory


@pytest.mark.parametrize(("name", "device", "_n"), MACHINES)
def test_each_machine_can_compute_what_its_config_says(name: str, device: str, _n: int) -> None:
    for quantizer in yxanul(name).quantizer:
        assert quantizer.config.select == "all"
        assert CAPABILITY[device] >= float8.CAPABILITY[quantizer.config.recipe]
        model = planned_model(yxanul(name))
        assert len(multipliers(model, quantizer_claims(yxanul(name), model).claimed[0])) == 7 * 28
    assert bool(yxanul(name).quantizer) is (CAPABILITY[device] >= (8, 9))


def test_the_plan_says_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recipe", "plan", "yxanul", "--scale", "a100-40gb", "--device-name", "A100 40GB"]
    assert cli.main(words) == 0
    assert "of what A100 40GB has: fits in the 90% that can be planned with\n" in capsys.readouterr().out
    assert cli.main([*words, "--train.micro_batch_tokens=65536", "--curriculum=[]"]) == 0
    assert "does not fit in the 90% that can be planned with; lower train.micro_batch_tokens or" in capsys.readouterr().out


# ---------------------------------------------------------------- on a GPU
@pytest.mark.gpu
def test_on_a_gpu_the_seven_projections_are_multiplied_in_fp8() -> None:
    """Two layers of the real widths and the real vocabulary: the operators that run, and a loss as in bf16."""
    losses = []
    for quantizer in ([], [BF16]):
        config = yxanul("yxanul_270m", *SHALLOW, *quantizer, "--model.attention_backend=varlen")
        model = planned_model(config).to_empty(device="cuda")
        initialise(model, 0)
        module = TrainModule(model, config.loss.build())
        set_precision(module, "bf16")
        use_kernels(module, "plain")  # which would join three projections into one product
        begin_quantizers(config, model, 1024, device=torch.device("cuda"), compiled=False, tuned=None)  # type: ignore[arg-type]
        batch = made_up(2, 512, VOCAB, 1, document_mask=True).to(torch.device("cuda"))
        # No mask of rows × rows: documents are blocks for FlexAttention, lengths for the others.
        assert not isinstance(attention_mask(batch, "auto", None, 64, torch.bfloat16), Tensor)
        with Operators() as seen:
            loss = module(batch)[0].loss
            loss.backward()
        products = [given[:2] for given, _ in seen.calls["_scaled_mm"]]
        assert products == ([] if quantizer else [[torch.float8_e4m3fn] * 2] * (3 * 7 * 2))
        losses.append(loss.item() / batch.labels.numel())
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.15)
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


# ---------------------------------------------------------------- the configs beside
def test_configs_beside_load() -> None:
    ultra, fineweb, smoke, text = (yxanul(name) for name in ("yxanul_270m_ultra", "yxanul_270m_fineweb", "smoke", "smoke_text"))
    assert sum(leg.tokens for leg in legs_of(ultra)) == 30_015_488_000
    assert legs_of(ultra)[0].rows * legs_of(ultra)[0].seq_len == 8192 * 8
    assert read_again(ultra)
    assert [quantizer.name for quantizer in smoke.quantizer] == ["float8", "int8"]
    for config in (ultra, fineweb, smoke, text):
        assert [entry.name for entry in config.counted] == ["english", "math", "code"]
        assert config.checkpoint.best == "validation/summary/bits_per_byte"
        assert not list(curriculum_problems(config))
        planned_model(config)  # of as many parameters as it says


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_recipe_at_scale_smoke(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As shipped: tokenizer, shards, a curriculum of four stages in FP8, three domains, the best step of all three, an artifact under its limit."""
    out = tmp_path / "yxanul"
    assert cli.main(["recipe", "run", str(CONFIGS.parents[1] / "recipes" / "yxanul"), "--scale", "smoke", "--output", str(out)]) == 0
    said = capfd.readouterr()
    rows = list(map(json.loads, (out / "train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()))
    for domain in ("english", "math", "code", "summary"):
        losses = [row[f"validation/{domain}/loss"] for row in rows if f"validation/{domain}/loss" in row]
        assert len(losses) == 4
        assert losses[-1] < losses[0] < math.log(4096)
        assert re.search(rf"^  {domain}: loss", said.out, re.MULTILINE)
    assert [seq_len for seq_len in (64, 128, 256) if f"seq_len {seq_len}, " in (out / "train" / "log.txt").read_text(encoding="utf-8")] == [64, 128, 256]
    limit = yxanul("smoke").export.max_bytes
    assert limit is not None
    assert (out / "yxanul.titanlm").stat().st_size <= limit
