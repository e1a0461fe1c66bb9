"""Runs with compact state: resumed to the bit, and compiled once whatever the schedules do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from titanlm import checkpoint
from titanlm.config import load
from titanlm.errors import CheckpointError
from titanlm.train import Trainer

FALLING = '{name="linear", min_factor=0.5}'
SETTINGS = (
    f'--optimizer=[{{name="muon", ns_dtype="fp32", momentum_dtype="bf16", weight_decay=0.1, weight_decay_schedule={FALLING}, '
    f'momentum_schedule={{name="ramp", start_factor=0.9, steps=15}}}}, {{name="adamw", lr=1e-2, moments="int8", weight_decay_schedule={FALLING}}}]',
    "--model.d_model=64",
    "--validation=[]",
)


def trained(tiny: Path, name: str, *overrides: str) -> dict[str, Any]:
    with Trainer(load(tiny, [*SETTINGS, f"--run.name={name}", *overrides])) as trainer:
        trainer.train()
    return checkpoint.load(tiny.parent / "runs" / name / "checkpoints" / f"step-{trainer.progress.step:08d}").state


def tensors(tree: Any, path: str = "") -> dict[str, torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {name: tensor for key, value in items for name, tensor in tensors(value, f"{path}/{key}").items()}


def stopped(tiny: Path, after: int, *overrides: str) -> None:
    with Trainer(load(tiny, [*SETTINGS, "--run.name=stopped", *overrides])) as trainer:
        for _ in range(after):
            trainer.train_step()
        trainer.save(wait=True)


def assert_equal(a: Any, b: Any) -> None:
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name].contiguous().view(-1).view(torch.uint8), b[name].contiguous().view(-1).view(torch.uint8))] == []


@pytest.mark.parametrize("mode", ["none", "block"])
def test_optimizers_compile_where_the_run_does(tiny: Path, mode: str) -> None:
    with Trainer(load(tiny, [*SETTINGS, f"--train.compile={mode}"])) as trainer:
        assert [optimizer.compile_kernels for optimizer in trainer.optimizers] == [trainer.choices.compiled != "none"] * 2


def test_a_resumed_run_equals_one_that_was_not_stopped_to_the_bit(tiny: Path) -> None:
    straight = trained(tiny, "straight", "--train.steps=12")
    stopped(tiny, 5, "--train.steps=12")
    assert_equal(trained(tiny, "stopped", "--train.steps=12"), straight)
    kinds = {tensor.dtype for tensor in tensors(straight["optimizers"]).values()}
    assert kinds == {torch.float32, torch.bfloat16, torch.uint8}


@pytest.mark.slow
def test_a_compiled_run_compiles_once_and_resumes_to_the_bit(tiny: Path) -> None:
    compiled = ["--train.compile=block", "--train.steps=8"]
    eager = tensors(trained(tiny, "eager", "--train.steps=8"))
    torch._dynamo.reset()
    counters.clear()
    with Trainer(load(tiny, [*SETTINGS, "--run.name=counted", *compiled])) as trainer:
        assert all(optimizer.compile_kernels for optimizer in trainer.optimizers)
        graphs = []
        for _ in range(8):
            trainer.train_step()
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[-1] > 0
    straight = trained(tiny, "straight", *compiled)
    for name, value in tensors(straight["model"]).items():
        assert (value - eager[f"/model{name}"]).norm() < 0.02 * value.norm(), name
    stopped(tiny, 4, *compiled)
    assert_equal(trained(tiny, "stopped", *compiled), straight)


@pytest.mark.parametrize(("before", "after"), [("int8", "fp32"), ("fp32", "int8"), ("bf16", "fp32"), ("int8", "fp8")])
def test_moments_of_another_form_are_refused_by_name(tiny: Path, before: str, after: str) -> None:
    form = '--optimizer=[{{name="adamw", moments="{}"}}]'
    overrides = ("--model.d_model=64", "--validation=[]", "--run.name=other")
    with Trainer(load(tiny, [*overrides, form.format(before)])) as trainer:
        trainer.train_step()
        trainer.save(wait=True)
    with pytest.raises(CheckpointError, match=r"optimizer state of \S+ was saved as exp_avg.* and this optimizer keeps exp_avg.*initial_load"):
        Trainer(load(tiny, [*overrides, form.format(after), '--checkpoint.allow_changes=["optimizer"]']))


@pytest.mark.parametrize("mode", ["none", pytest.param("block", marks=pytest.mark.slow)])
def test_momentum_of_another_dtype_goes_on_in_the_one_asked_for(tiny: Path, mode: str) -> None:
    overrides = ("--model.d_model=64", "--validation=[]", "--run.name=moved", f"--train.compile={mode}")
    form = '--optimizer=[{{name="muon", ns_dtype="fp32", momentum_dtype="{}"}}, {{name="adamw"}}]'
    with Trainer(load(tiny, [*overrides, form.format("bf16")])) as trainer:
        trainer.train_step()
        trainer.save(wait=True)
    with Trainer(load(tiny, [*overrides, form.format("fp32"), '--checkpoint.allow_changes=["optimizer"]'])) as trainer:
        buffer = next(state["momentum_buffer"] for state in trainer.optimizers[0].state.values())
        before = buffer.clone()
        trainer.train_step()
        buffer = next(state["momentum_buffer"] for state in trainer.optimizers[0].state.values())
        assert buffer.dtype == torch.float32
        assert not torch.equal(buffer, before.float())
