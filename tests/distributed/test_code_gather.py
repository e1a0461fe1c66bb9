"""Weights that travel as the codes of FP8: what is sent, and that nobody can tell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from titanlm.check import check
from titanlm.config import load
from titanlm.distributed.code_gather import CodeGather, _require_these
from titanlm.models.layers.attention import Attention
from titanlm.models.layers.product import codes_of, compute_with, multipliers
from titanlm.quantizers.float8 import decode, encode, float8_product
from titanlm.registry import Component

IN_FP8 = '--quantizer=[{name="float8",select="all",params=%s}]'
MOST = IN_FP8 % '["*gate_proj*","*up_proj*","*down_proj*","*o_proj*","*q_proj*"]'  # and neither keys nor values, so queries are multiplied by alone
BF16 = "--train.precision=bf16"


def test_codes_are_those_the_product_makes_and_come_back_as_the_same() -> None:
    from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
    from torchao.float8.float8_training_tensor import LinearMMConfig

    def codes(weight: torch.Tensor) -> torch.Tensor:
        bits: torch.Tensor = hp_tensor_to_float8_dynamic(weight, torch.float8_e4m3fn, LinearMMConfig())._data
        return bits.view(torch.uint8)

    generator = torch.Generator().manual_seed(0)
    for spread in (0.0, 1e-30, 1e-4, 0.02, 1.0, 1e4, 1e30):
        for heavy in (1, 7):
            weight = (spread * torch.randn(256, 48, generator=generator) ** heavy).bfloat16()
            largest = weight.abs().max().float()
            parts = [encode(part.flatten(), largest) for part in weight.chunk(4)]
            assert torch.equal(torch.cat(parts).view(256, 48), codes(weight))
            back = torch.empty_like(weight)
            for part, into in zip(parts, back.chunk(4), strict=True):
                decode(part.view(into.shape), largest, into)
            assert torch.equal(codes(back), codes(weight))
            assert spread == 0.0 or not torch.equal(back, weight)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers(run: Path) -> list[Any]:
    """Losses, norms of gradients and validation scores."""
    kept = [{name: value for name, value in row.items() if name in ("step", "loss", "grad_norm") or name.startswith("validation/")} for row in rows(run)]
    assert any("grad_norm" in row for row in kept)
    return kept


GOLF = """--model={name="golf",n_layers=3,d_model=32,n_heads=4,n_kv_heads=2,d_ff=64,exclusive_last=1,q_gain=1.5,smear_gate="masked"}"""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, []),
        (2, [GOLF]),
        pytest.param(4, ["--parallel.strategy=hsdp", "--parallel.shards=2", "--parallel.prefetch_blocks=1"], marks=pytest.mark.slow),
        pytest.param(
            2, ["--train.activation_checkpointing=full", "--parallel.cpu_offload=true", "--parallel.reshard_after_forward=false"], marks=pytest.mark.slow
        ),
        pytest.param(3, ["--train.global_batch=6", "--data.n_streams=6"], marks=pytest.mark.slow),
        pytest.param(2, ["--train.compile=block", "--train.steps=3", "--validation=[]"], marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
    ids=["fsdp2", "golf", "hsdp", "offload", "padded", "compiled"],
)
def test_numbers_are_those_of_gathering_in_bf16_to_the_bit(tiny: Path, zygote: Any, ranks: int, settings: list[str]) -> None:
    common = ["--train.micro_batch=1", "--train.steps=6", "--scheduler=constant", "--parallel.strategy=fsdp2", BF16, MOST, *settings]
    if GOLF in settings:
        common[common.index(MOST)] = IN_FP8 % '["@matrix"]'
    for how in ("compute", "float8"):
        zygote.train(tiny, f"--run.name={how}", f"--parallel.gather_dtype={how}", *common, ranks=ranks).expect(0)
    compute, coded = (tiny.parent / "runs" / name for name in ("compute", "float8"))
    assert numbers(coded) == numbers(compute)
    assert "of the numbers of blocks travel as one byte" in (coded / "log.txt").read_text()


ON_ONE_GPU = """
import sys
import torch
import torch.distributed as dist
from titanlm import cli, train

train.choose_device = lambda name, local_rank: torch.device("cuda", 0)
connect = dist.init_process_group
dist.init_process_group = lambda backend, **named: connect("cpu:gloo,cuda:gloo", **named | {"device_id": None})
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""
"""NCCL takes a GPU for each rank; gloo does not ask, and sends through the host."""


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("settings", [[], [GOLF], ["--train.compile=block"]], ids=["fsdp2", "golf", "compiled"])
def test_numbers_are_those_of_gathering_in_bf16_on_gpus_too(tiny: Path, settings: list[str]) -> None:
    program = tiny.parent / "on_one_gpu.py"
    program.write_text(ON_ONE_GPU)
    started = [program] if torch.cuda.device_count() < 2 else ["-m", "titanlm.train"]
    common = ["--train.micro_batch=1", "--train.steps=6", "--scheduler=constant", "--parallel.strategy=fsdp2", BF16, *settings]
    common += [IN_FP8 % '["@matrix"]' if GOLF in settings else MOST, "--train.device=cuda"]
    for how in ("compute", "float8"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *started, tiny]
        subprocess.run([*command, f"--run.name={how}", f"--parallel.gather_dtype={how}", *common], check=True, timeout=300)
    compute, coded = (tiny.parent / "runs" / name for name in ("compute", "float8"))
    assert numbers(coded) == numbers(compute)
    assert "of the numbers of blocks travel as one byte" in (coded / "log.txt").read_text()
    assert "emulated" not in (coded / "log.txt").read_text()


@pytest.mark.distributed
def test_a_byte_a_number_is_sent_of_what_is_multiplied_by_in_fp8(tiny: Path, zygote: Any) -> None:
    code = f"""
from titanlm.config import load
from titanlm.distributed import code_gather
from titanlm.train import Trainer
sent, gather = [], code_gather._gather
def counted(output, input, group):
    sent.append(input.nbytes)
    return gather(output, input, group)
code_gather._gather = counted
settings = ["--run.name=counted", "--parallel.strategy=fsdp2", "--parallel.gather_dtype=float8", "--train.micro_batch=1", {BF16!r}, {MOST!r}]
with Trainer(load({str(tiny)!r}, settings)) as trainer:
    block = trainer.model.blocks[0]
    trainer.train_step()
    coded = sum(p.numel() for name, p in block.named_parameters() if "_proj" in name and "k_proj" not in name and "v_proj" not in name)
    total = sum(p.numel() for p in block.parameters())
print(set(sent) == {{(2 * total - coded) // 2}}, len(sent), 1.0 * coded / total)
"""
    same, n, share = zygote.run(code, ranks=2).expect(0).output(0).splitlines()[-1].split()
    assert same == "True"
    assert int(n) >= 2 * 2  # two blocks, forward and backward
    assert float(share) > 0.8


def coded(unit: torch.nn.Module, pattern: str) -> set[str]:
    """Names of the parameters that travel as codes when those of the pattern's are multiplied by in FP8."""
    product = float8_product("tensorwise", emulate=True)
    for each in multipliers(unit, [name for name, _ in unit.named_parameters() if pattern in name]):
        compute_with(each, product)
    return {span.name for span in CodeGather(unit).spans(1) if span.codes}


@pytest.mark.parametrize(
    ("model", "travel"),
    [
        ("decoder", {"feed_forward.gate_proj.weight", "feed_forward.up_proj.weight", "feed_forward.down_proj.weight", "attention.o_proj.weight"}),
        ("golf", {"feed_forward.up_proj.weight"}),
    ],
)
def test_what_is_made_into_another_matrix_first_travels_as_it_is(model: str, travel: set[str]) -> None:
    built = Component.named("model", model, n_layers=1, d_model=64, n_heads=4, n_kv_heads=2).build(vocab_size=61, max_seq_len=64)
    assert coded(built.blocks[0], "_proj") == travel


def test_a_class_that_is_derived_remakes_what_its_base_does() -> None:
    class Derived(Attention):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().forward(*args, **kwargs)

    made = Derived(64, 4, 2, 16, qk_norm="none", norm_eps=1e-6, backend="sdpa")
    assert coded(made, "_proj") == {"o_proj.weight"}


def test_what_is_sent_is_looked_at_the_first_time() -> None:
    unit = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    spans = list(CodeGather(unit).spans(1))
    sent = torch.cat([parameter.detach().flatten() for parameter in unit.parameters()]).bfloat16()
    _require_these(spans, sent)
    for other in (sent.roll(16), sent[:16], sent.float()):
        with pytest.raises(RuntimeError, match=r"parallel.gather_dtype: this torch gathers"):
            _require_these(spans, other)


def test_rows_scales_have_no_codes() -> None:
    layer = torch.nn.Module()
    assert codes_of(layer, "weight") is None
    assert not hasattr(float8_product("rowwise", emulate=True), "codes")
    assert hasattr(float8_product("tensorwise", emulate=True), "codes")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ([BF16], "sends what quantizer 'float8' with recipe 'tensorwise' multiplies by, and there is none"),
        ([BF16, '--quantizer=[{name="float8",recipe="rowwise",select="all"}]'], "sends what quantizer 'float8' with recipe 'tensorwise' multiplies by"),
        ([BF16, MOST], None),
        ([BF16, "--parallel.strategy=replicate"], None),
    ],
)
def test_it_is_refused_where_there_are_no_codes_to_send(tiny: Path, settings: list[str], problem: str | None) -> None:
    found = [each for each in check(load(tiny, ["--parallel.strategy=fsdp2", "--parallel.gather_dtype=float8", *settings])).problems if "gather_dtype" in each]
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]
