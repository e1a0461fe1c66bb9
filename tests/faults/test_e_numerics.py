"""E: loss and gradients that are not finite, losses that jump, memory that runs out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from titanlm import checkpoint
from titanlm.config import load
from titanlm.errors import NonFiniteError, TitanError
from titanlm.train import Trainer
from titanlm.train_module import TrainModule

PROVED = {
    "E1": [
        "tests/test_train.py::test_non_finite_loss_stops_before_the_update",
        "tests/test_guard.py::test_e1_a_skipped_step_changes_no_bit_and_training_goes_on",
    ],
    "E3": ["tests/test_spikes.py::test_e3_three_in_a_row"],
    "E4": ["tests/faults/test_a_atomicity.py::test_e4_weights_that_are_not_finite_are_not_saved"],
    "E6": ["tests/test_train.py::test_validation_prefetch_and_sampling_do_not_touch_training"],
}
"""Cases that are proved elsewhere, or there too."""

POISON = """
from titanlm.train import Trainer
from titanlm.train_module import TrainModule
forward, train_step, now = TrainModule.forward, Trainer.train_step, [0]
def counted(self):
    now[0] = self.progress.step + 1
    train_step(self)
def poisoned(self, batch):
    import torch
    sums, aux = forward(self, batch)
    bad = torch.is_grad_enabled() and now[0] in STEPS and rank == RANK
    return (sums._replace(loss=sums.loss * float("nan")) if bad else sums), aux
Trainer.train_step, TrainModule.forward = counted, poisoned
"""


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def factors(monkeypatch: pytest.MonkeyPatch, by_step: dict[int, float], seen: list[int] | None = None) -> None:
    """Multiply the loss of these steps, the first time each is done."""
    forward, train_step = TrainModule.forward, Trainer.train_step
    state = {"step": 0}

    def counted(trainer: Trainer) -> None:
        state["step"] = trainer.progress.step + 1
        train_step(trainer)
        by_step.pop(state["step"], None)

    def changed(self: Any, batch: Any) -> Any:
        sums, aux = forward(self, batch)
        return (sums._replace(loss=sums.loss * by_step.get(state["step"], 1.0)) if torch.is_grad_enabled() else sums), aux

    monkeypatch.setattr(Trainer, "train_step", counted)
    monkeypatch.setattr(TrainModule, "forward", changed)


def run(config: Path, *overrides: str) -> Trainer:
    with Trainer(load(config, overrides)) as trainer:
        trainer.train()
    return trainer


@pytest.mark.parametrize("averaged", [True, False], ids=["with an averager", "device alone"])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")], ids=str)
def test_e1_a_bad_step_is_skipped_whole_and_its_documents_are_written_down(tiny: Path, monkeypatch: pytest.MonkeyPatch, averaged: bool, factor: float) -> None:
    overrides = ["--run.name=x", "--train.steps=6", "--train.on_nonfinite=skip", "--train.log_every=6", "--scheduler=constant", "--checkpoint.every=1"]
    if not averaged:
        text = tiny.read_text()
        tiny.write_text(text.replace('[averager]\nname = "ema"\ndecay = 0.9\n', ""))
    factors(monkeypatch, {3: factor})
    run(tiny, *overrides)
    folder = tiny.parent / "runs" / "x"
    before, after = (checkpoint.load(folder / "checkpoints" / f"step-{step:08d}").state for step in (2, 3))
    for part in ("model", "averagers", "optimizers"):
        flat = [torch.utils._pytree.tree_leaves(state[part]) for state in (before, after)]
        changed = [i for i, (a, b) in enumerate(zip(*flat, strict=True)) if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)]
        assert changed == [], part
    (entry,) = map(json.loads, (folder / "skipped_steps.jsonl").open())
    assert entry["step"] == 3
    assert entry["documents"]
    (row,) = [row for row in rows(folder) if "loss" in row]
    assert row["skipped_steps"] == 1
    assert 3 < row["loss"] < 6, "the mean of five steps"


def test_e1_too_many_bad_steps_in_a_row_end_the_run(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factors(monkeypatch, dict.fromkeys(range(3, 20), float("nan")))
    with pytest.raises(NonFiniteError, match=r"steps 3 to 6: .*in 4 steps in a row, and 3 may be skipped"):
        run(tiny, "--run.name=x", "--train.on_nonfinite=skip", "--train.max_skipped=3")


@pytest.mark.parametrize(("policy", "status"), [pytest.param("stop", 2, marks=pytest.mark.slow), ("skip", 0)])
def test_e2_a_bad_loss_on_one_rank_is_every_ranks(tiny: Path, zygote: Any, policy: str, status: int) -> None:
    before = POISON.replace("STEPS", "(3,)").replace("RANK", "1")
    arguments = ["--parallel.strategy=fsdp2", f"--train.on_nonfinite={policy}", "--train.steps=5", "--scheduler=constant", "--checkpoint.every=1"]
    launched = zygote.train(tiny, *arguments, ranks=2, before=before).expect(status)
    folder = tiny.parent / "runs" / "tiny"
    if policy == "stop":
        assert all("step 3: loss or gradient is not finite" in launched.output(rank) for rank in (0, 1))
        assert [step for step, _ in checkpoint.steps(folder / "checkpoints")][-1] == 2
    else:
        (entry,) = map(json.loads, (folder / "skipped_steps.jsonl").open())
        assert entry["step"] == 3
        assert [step for step, _ in checkpoint.steps(folder / "checkpoints")][-1] == 5


SPIKE = ["--spike.sigmas=6", "--spike.window=6", "--spike.patience=2", "--train.steps=16", "--scheduler=constant", "--optimizer.0.lr=1e-4"]
SPIKE += ["--checkpoint.every=5", "--validation=[]"]


def test_e3_a_jump_winds_back_and_passes_over_its_data(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    factors(monkeypatch, {12: 50.0, 13: 50.0})
    trainer = run(tiny, "--run.name=x", *SPIKE)
    assert "the loss jumped after step 11: wound back from step 13 to 10, rollback 1 of 3" in capsys.readouterr().out
    assert trainer.rollbacks == 1
    folder = tiny.parent / "runs" / "x"
    assert [row["step"] for row in rows(folder) if "loss" in row] == list(range(1, 17)), "every step once"
    saved = checkpoint.load(folder / "checkpoints" / "step-00000016")
    assert saved.state["rollbacks"] == 1
    assert saved.ranks[0]["data"]["row"] == 8 * (16 + 3), "the rows of three steps were passed over"


def test_e3_a_kill_right_after_the_rollback_does_not_bring_the_jump_back(tiny: Path, zygote: Any) -> None:
    before = """
import os, signal
from titanlm.train import Trainer
from titanlm.train_module import TrainModule
forward, train_step, roll_back, now = TrainModule.forward, Trainer.train_step, Trainer._roll_back, [0, 0]
def counted(self):
    now[:] = [self.progress.step + 1, self.loader.state()["row"] // 8]
    train_step(self)
def jumping(self, batch):
    import torch
    sums, aux = forward(self, batch)
    return (sums._replace(loss=sums.loss * 50) if torch.is_grad_enabled() and now[1] in (11, 12) else sums), aux
def dying(self, began):
    roll_back(self, began)
    os.kill(os.getpid(), signal.SIGKILL)
Trainer.train_step, TrainModule.forward, Trainer._roll_back = counted, jumping, dying
"""
    zygote.train(tiny, *SPIKE, before=before).expect(-9)
    launched = zygote.train(tiny, *SPIKE, before=before).expect(0)
    assert "(step 10," in launched.output()
    assert checkpoint.load(tiny.parent / "runs" / "tiny" / "checkpoints" / "step-00000016").state["rollbacks"] == 1


def test_e3_rollbacks_that_do_not_help_end_the_run(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_step = Trainer.train_step
    factors(monkeypatch, {})

    def jumping(trainer: Trainer) -> None:
        train_step(trainer)
        if trainer.progress.step >= 12:
            trainer.interval.loss += 500

    monkeypatch.setattr(Trainer, "train_step", jumping)
    with pytest.raises(TitanError, match=r"2 rollbacks have not helped \(spike.max_rollbacks\)"):
        run(tiny, "--run.name=x", "--spike.max_rollbacks=2", *SPIKE)


def test_e3_a_jump_before_the_first_checkpoint_says_so(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factors(monkeypatch, {5: 50.0, 6: 50.0})
    with pytest.raises(TitanError, match="no checkpoint of step 4 or before"):
        run(tiny, "--run.name=x", *SPIKE, "--checkpoint.every=0")


def test_e5_out_of_memory_in_a_validation_does_not_end_training(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    forward = TrainModule.forward

    def full(self: Any, batch: Any) -> Any:
        if not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return forward(self, batch)

    monkeypatch.setattr(TrainModule, "forward", full)
    run(tiny, "--run.name=x", "--train.steps=4", "--train.validate_every=2", "--scheduler=constant")
    assert capsys.readouterr().out.count("validation set 'validation' was left out: out of memory; lower its micro_batch (4)") == 2
    assert [step for step, _ in checkpoint.steps(tiny.parent / "runs" / "x" / "checkpoints")] == [4]


def test_e5_out_of_memory_in_a_step_keeps_the_checkpoints(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_step = Trainer.train_step

    def full(trainer: Trainer) -> None:
        if trainer.progress.step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        train_step(trainer)

    monkeypatch.setattr(Trainer, "train_step", full)
    with pytest.raises(TitanError, match="out of memory"):
        run(tiny, "--run.name=x", "--checkpoint.every=2")
    assert checkpoint.latest(tiny.parent / "runs" / "x" / "checkpoints").name == "step-00000002"
