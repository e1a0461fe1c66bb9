"""Once every kind of step and validation has been seen, nothing is compiled any more: a recompilation stops a device for a minute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from titanlm.config import load
from titanlm.train import Trainer

pytestmark = pytest.mark.slow

BUSY = [
    '--optimizer=[{name="muon",params=["@matrix"],ns_dtype="fp32",momentum_schedule={name="ramp",start_factor=0.5,steps=50},'
    'weight_decay=0.1,weight_decay_schedule={name="ramp",start_factor=0.1,steps=50}},'
    '{name="adamw",weight_decay_schedule={name="ramp",start_factor=0.1,steps=50}}]',
    '--quantizer=[{name="int6",qat=true,params=["@matrix"]}]',
    *("--qat.start_fraction=0.5", "--train.steps=12", "--train.validate_every=2", "--train.log_every=3", "--checkpoint.every=5", "--train.deterministic=false"),
    *("--validation.0.seq_len=32", "--validation.0.micro_batch=3", "--train.compile_cache=off", "--scheduler=cosine"),
]


@pytest.fixture
def graphs() -> Callable[[], int]:
    """How many graphs have been compiled since the test began."""
    torch.compiler.reset()
    counters.clear()
    return lambda: int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("mode", ["block", "model"])
def test_nothing_is_compiled_after_the_first_steps_of_a_phase(tiny: Path, graphs: Callable[[], int], mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning rates, momentum, weight decay and the average's decay change every step, rounding sets in once, validation comes in between."""
    after: dict[int, int] = {}
    between = Trainer._between_steps

    def counted(trainer: Trainer, step: int) -> None:
        between(trainer, step)
        after[step] = graphs()

    monkeypatch.setattr(Trainer, "_between_steps", counted)
    with Trainer(load(tiny, [*BUSY, f"--train.compile={mode}"])) as trainer:
        assert trainer.choices.compiled == mode
        trainer.train()
    assert after[1] > 0
    # Step 2 is the first to be validated. Rounding begins with step 7, and so with the validation before it.
    assert {after[step] for step in range(2, 6)} == {after[2]}, after
    assert after[7] > after[5]
    assert {after[step] for step in range(7, 13)} == {after[7]}, after
    assert graphs() == after[12]
