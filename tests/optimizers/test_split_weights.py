"""Weights in two halves: to the bit the fp32 ones, in the optimizer, in a run and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from titanlm import checkpoint
from titanlm.check import check
from titanlm.config import load
from titanlm.errors import CheckpointError
from titanlm.export import export_run
from titanlm.exporters.artifact import read_artifact
from titanlm.exporters.encoding import decode_tensors
from titanlm.models.layers import embedding, head, linear, rounding
from titanlm.models.layers.embedding import Embedding
from titanlm.models.layers.head import Head
from titanlm.optimizers.split_weights import halves, joined
from titanlm.patterns import NamedParam
from titanlm.registry import Component
from titanlm.state_bytes import state_bytes
from titanlm.train import Trainer

RUN = ("--train.precision=bf16", "--model.d_model=64", "--validation=[]", "--train.steps=6")


def optimizer_of(weight_dtype: str, rest: str = "") -> str:
    return f'--optimizer=[{{name="muon", ns_dtype="fp32", weight_decay=0.1, weight_dtype="{weight_dtype}"{rest}}}, {{name="adamw"}}]'


def test_halves_are_the_nearest_bf16_and_all_that_is_left() -> None:
    """Every exponent and sign, four million drawn numbers."""
    bits = torch.randint(-(2**31), 2**31, (4_000_000,), generator=torch.Generator().manual_seed(0)).int()
    x = bits.view(torch.float32)
    high, low = halves(x)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(joined(high, low).view(torch.int32), bits)
    untied = x.isfinite() & (bits & 0xFFFF != 0x8000)  # torch rounds those that are not to even
    assert torch.equal(high[untied], x[untied].bfloat16())
    ties = x.isfinite() & ~untied
    assert ties.any()
    assert (high[ties].double() - x[ties].double()).abs().equal((x[ties].bfloat16().double() - x[ties].double()).abs())


def built(weight_dtype: str, **settings: Any) -> tuple[list[Any], Any]:
    generator = torch.Generator().manual_seed(0)
    named = [NamedParam(f"w{i}", torch.nn.Parameter(torch.randn(shape, generator=generator)), "matrix") for i, shape in enumerate([(6, 6), (4, 6), (4, 6)])]
    return [p.parameter for p in named], Component.named("optimizer", "muon", weight_dtype=weight_dtype, weight_decay=0.1, **settings).build(named_params=named)


def whole(parameter: Any, optimizer: Any) -> Tensor:
    low = optimizer.state[parameter].get("low_bits")
    return parameter.detach() if low is None else joined(parameter.detach(), low)


@pytest.mark.parametrize("compile_kernels", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("momentum_dtype", ["fp32", "bf16"])
def test_a_step_moves_the_fp32_weight(compile_kernels: bool, momentum_dtype: str) -> None:
    """Equal to the weights of an optimizer that keeps them whole, to the bit, in steps that are taken and in one that is not."""
    (ours, split), (plain, entire) = (built(dtype, momentum_dtype=momentum_dtype, ns_dtype="fp32") for dtype in ("bf16", "fp32"))
    generator = torch.Generator().manual_seed(1)
    for optimizer in (split, entire):
        optimizer.compile_kernels = compile_kernels
    for step in range(4):
        for a, b in zip(ours, plain, strict=True):
            b.grad = torch.randn(b.shape, generator=generator)
            if step == 2:
                b.grad[0, 0] = torch.nan
            a.grad = b.grad.clone()
            assert a.dtype == torch.bfloat16
        for optimizer, parameters in ((split, ours), (entire, plain)):
            optimizer.found_inf = torch.tensor(float(step == 2))
            optimizer.step()
            assert all(parameter.isfinite().all() for parameter in parameters)
        for a, b in zip(ours, plain, strict=True):
            assert torch.equal(whole(a, split), b.detach())
            assert torch.equal(a.detach(), halves(b.detach())[0])


def trained(tiny: Path, name: str, *overrides: str, stop: int = 6) -> dict[str, Tensor]:
    """The weights that the optimizers move, by name."""
    with Trainer(load(tiny, [*RUN, f"--run.name={name}", *overrides])) as trainer:
        while trainer.progress.step < stop:
            trainer.train_step()
        trainer.save(wait=True)
        return {name: whole(parameter, trainer.optimizers[0]).clone() for parameter, name in trainer.names.items()}


@pytest.mark.parametrize("overrides", [["--train.micro_batch=4"], ["--train.micro_batch=8"], ["--model.embedding_rank=16", "--loss.chunk_tokens=64"]])
def test_a_run_is_that_of_whole_weights_to_the_bit(tiny: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole ones being rounded for products as ``halves`` rounds, which differs from torch where two numbers are as near. Passes add up in fp32 either way."""

    def as_halved(module: nn.Module, name: str) -> Tensor:
        weight: Tensor = getattr(module, name)
        fixed = weight.detach()
        left = fixed.dtype == torch.bfloat16 or (isinstance(module, Embedding | Head) and name == "weight")  # rounded already, or not muon's
        return weight if left else weight + (halves(fixed)[0].float() - fixed)

    split = trained(tiny, "split", optimizer_of("bf16"), *overrides)
    with monkeypatch.context() as patched:
        for user in (linear, embedding, head, rounding):
            patched.setattr(user, "in_use", as_halved)
        entire = trained(tiny, "entire", optimizer_of("fp32"), *overrides)
    assert [name for name in entire if not torch.equal(entire[name], split[name])] == []


def test_a_resumed_run_goes_on_to_the_bit(tiny: Path) -> None:
    straight = trained(tiny, "straight", optimizer_of("bf16"))
    trained(tiny, "stopped", optimizer_of("bf16"), stop=3)
    resumed = trained(tiny, "stopped", optimizer_of("bf16"))
    assert [name for name in straight if not torch.equal(straight[name], resumed[name])] == []
    saved = checkpoint.load(tiny.parent / "runs" / "stopped" / "checkpoints" / "step-00000006").state
    dtypes = {saved["model"][name].dtype for name in saved["model"]}
    assert dtypes == {torch.float32, torch.bfloat16}


TO_WHOLE = (optimizer_of("fp32"), '--checkpoint.allow_changes=["optimizer"]')


@pytest.mark.parametrize("priming_steps", [0, 1])
def test_a_run_may_go_on_with_whole_weights_and_loses_no_bit(tiny: Path, priming_steps: int) -> None:
    """Primed or not, and back to where it began when the loss has jumped."""
    split = trained(tiny, "moved", optimizer_of("bf16"), stop=3)
    with Trainer(load(tiny, [*RUN, "--run.name=moved", f"--train.priming_steps={priming_steps}", *TO_WHOLE])) as trainer:
        trainer._prime()
        for _ in range(2):
            moved = {name: parameter.detach() for parameter, name in trainer.names.items()}
            assert {weight.dtype for weight in moved.values()} == {torch.float32}
            assert [name for name in moved if not torch.equal(moved[name], split[name])] == []
            assert not any("low_bits" in state for state in trainer.optimizers[0].state.values())
            trainer.train_step()
            trainer._roll_back(3)


def test_a_run_of_whole_weights_does_not_go_on_in_halves(tiny: Path) -> None:
    """Nor one that has made no step yet, and so no state."""
    for stop, kept in ((0, "nothing"), (1, "momentum_buffer float32")):
        trained(tiny, f"moved-{stop}", optimizer_of("fp32"), stop=stop)
        with pytest.raises(CheckpointError, match=rf"saved as {kept}, and this optimizer keeps momentum_buffer float32, low_bits int16; .*weight_dtype"):
            Trainer(load(tiny, [*RUN, f"--run.name=moved-{stop}", optimizer_of("bf16"), '--checkpoint.allow_changes=["optimizer"]']))


def test_momentum_may_go_on_in_another_dtype(tiny: Path) -> None:
    before = trained(tiny, "moved", optimizer_of("bf16"), stop=2)
    with Trainer(load(tiny, [*RUN, "--run.name=moved", optimizer_of("bf16", ', momentum_dtype="bf16"'), *TO_WHOLE[1:]])) as trainer:
        muon = trainer.optimizers[0]
        assert {state["momentum_buffer"].dtype for state in muon.state.values()} == {torch.bfloat16}
        assert all(torch.equal(whole(parameter, muon), before[trainer.names[parameter]]) for parameter in muon.state)
        trainer.train_step()


@pytest.mark.parametrize("strategy", ["replicate", "fsdp2"])
def test_several_processes_are_refused_before_a_device_is_touched(tiny: Path, strategy: str) -> None:
    problems = check(load(tiny, [*RUN, optimizer_of("bf16"), f"--parallel.strategy={strategy}"])).problems
    told = f"blocks.0.attention.q_proj.weight would be bf16, and strategy {strategy!r} would sum its gradients in that"
    assert problems == [f'optimizer.0.weight_dtype: {told}; keep "fp32" with several processes']


def test_products_in_fp32_are_refused(tiny: Path) -> None:
    problems = check(load(tiny, [optimizer_of("bf16")])).problems
    told = "blocks.0.attention.q_proj.weight would be bf16, and products in fp32 would miss the rest of it"
    assert problems == [f'optimizer.0.weight_dtype: {told}; set train.precision = "bf16", or keep "fp32"']


def test_bytes_of_both_halves(tiny: Path) -> None:
    """Two and two a weight, four a gradient and four of momentum, as in a run."""
    config = load(tiny, [*RUN, optimizer_of("bf16")])
    report = check(config)
    with Trainer(config) as trainer:
        trainer.train_step()
        weights = sum(parameter.nbytes for parameter in trainer.trained)
        kept = sum(value.nbytes for optimizer in trainer.optimizers for state in optimizer.state.values() for value in state.values() if value.ndim)
        numbers = sum(parameter.numel() for parameter in trainer.trained)
        matrices = sum(parameter.numel() for parameter in trainer.optimizers[0].state)
    assert weights == 4 * numbers - 2 * matrices
    parts = state_bytes(config, report.model)
    assert parts["weights"] == weights
    assert kept <= parts["moments"] <= kept + 4 * len(report.model.state_dict())  # steps of AdamW
    assert f"memory           {(sum(parts.values()) + 4 * numbers) / 2**30:.3f} GiB for weights, gradients, moments and average" in report.summary


def test_what_is_rounded_in_training_stays_whole(tiny: Path) -> None:
    """Where a model scales a matrix before it multiplies, the bf16 half is not what an artifact holds."""
    rounding = '--quantizer=[{name="int6", params=["@matrix"], qat=true}]'
    told = "blocks.0.attention.q_proj.weight would be bf16, and a quantizer with qat = true rounds whole weights in training"
    assert check(load(tiny, [*RUN, optimizer_of("bf16"), rounding])).problems == [f'optimizer.0.weight_dtype: {told}; leave one of them out, or keep "fp32"']


def test_an_artifact_holds_the_bf16_half(tiny: Path) -> None:
    tiny.write_text(tiny.read_text().replace('[averager]\nname = "ema"\ndecay = 0.9\n', ""))
    with Trainer(load(tiny, [*RUN, "--run.name=exported", "--export.dtype=float32", optimizer_of("bf16")])) as trainer:
        trainer.train()
        used = {name: parameter.detach().float() for parameter, name in trainer.names.items()}
    artifact = tiny.parent / "exported.titanlm"
    export_run(tiny.parent / "runs" / "exported", output=artifact, scored=False)
    weights = decode_tensors(read_artifact(artifact).tensors)
    assert [name for name in used if not torch.equal(weights[name].float(), used[name])] == []
