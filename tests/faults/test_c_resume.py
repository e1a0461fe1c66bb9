"""C: exact resume, at every step, on other numbers of ranks, and only with all of the state."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from titanlm import checkpoint
from titanlm.config import load
from titanlm.errors import CheckpointError
from titanlm.resume import OWN_STATE, STATE
from titanlm.train import Trainer

PROVED = {
    "C1": ["tests/test_train.py::test_killed_after_seven_steps_and_resumed_is_bitwise_equal"],
    "C3": [
        "tests/test_train.py::test_interrupted_in_the_middle_of_accumulation",
        "tests/test_data.py::test_c5_world_size_2_1_2_with_workers_loses_and_repeats_nothing",
    ],
    "C4": ["tests/test_data.py::test_c4_rows_do_not_depend_on_workers_and_resume_with_any_number"],
    "C6": ["tests/distributed/test_parallel.py::test_c6_numbers_of_ranks_that_do_not_fit_are_refused_with_those_that_do"],
    "C11": ["tests/test_initial_load.py::test_a_tied_source_gives_an_untied_head_its_embedding"],
    "C14": ["tests/test_train.py::test_changed_settings_on_resume"],
    "C15": ["tests/tokenizers/test_fingerprint.py::test_difference_in_words"],
    "C16": ["tests/test_train.py::test_changed_data_on_resume"],
}
"""Cases that are proved elsewhere, or there too."""

RANDOM = """
import torch
from titanlm.train_module import TrainModule
forward = TrainModule.forward
def noisy(self, batch):
    sums, aux = forward(self, batch)
    return sums._replace(loss=sums.loss * (1 + 0.01 * torch.rand(()))) if torch.is_grad_enabled() else sums, aux
TrainModule.forward = noisy
"""
"""Draws from torch's generator in every forward pass, as dropout would."""


def run(config: Path, *overrides: str) -> Trainer:
    with Trainer(load(config, overrides)) as trainer:
        trainer.train()
    return trainer


def losses(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Paths at which two states differ in a bit; the wall clock does not count."""
    if isinstance(a, dict) and isinstance(b, dict):
        pairs = [(f"{path}/{key}", a.get(key), b.get(key)) for key in {**a, **b} if key != "elapsed_s"]
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = [(f"{path}/{index}", x, y) for index, (x, y) in enumerate(zip(a, b, strict=True))]
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    elif isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return [] if a.dtype == b.dtype and np.array_equal(a, b) else [path]
    else:
        return [] if type(a) is type(b) and a == b else [path]
    return [found for pair in pairs for found in differences(pair[1], pair[2], pair[0])]


def final(run_dir: Path, step: int) -> dict[str, Any]:
    saved = checkpoint.load(run_dir / "checkpoints" / f"step-{step:08d}")
    return {**saved.state, "ranks": saved.ranks}


SHORT = ["--train.steps=4", "--checkpoint.every=1", "--checkpoint.keep_last=20", "--scheduler=constant", "--validation=[]"]


def test_c1_c2_stopped_at_every_step_and_resumed_one_step_at_a_time(tiny: Path, zygote: Any) -> None:
    """Three resumes in a row, one after each step, with random numbers in every forward pass: bitwise the straight run, average and all."""
    zygote.train(tiny, "--run.name=straight", *SHORT, before=RANDOM).expect(0)
    for steps in range(1, 5):
        zygote.train(tiny, "--run.name=often", *SHORT, f"--train.steps={steps}", before=RANDOM).expect(0)
    straight, often = tiny.parent / "runs" / "straight", tiny.parent / "runs" / "often"
    assert differences(final(straight, 4), final(often, 4)) == []
    assert losses(straight) == losses(often)


DROPPED = {
    "progress": lambda saved, new: saved.state.update(progress={**saved.state["progress"], "step": 0}),
    "model": lambda saved, new: saved.state.update(model=new.state["model"]),
    "averagers": lambda saved, new: saved.state.update(averagers=new.state["averagers"]),
    "averagers' counter": lambda saved, new: saved.state["averagers"][0].update(updates=0),
    "optimizers": lambda saved, new: saved.state.update(optimizers=[{"params": {}, "groups": each["groups"]} for each in saved.state["optimizers"]]),
    "interval": lambda saved, new: saved.state.update(interval=new.state["interval"]),
    "source_tokens": lambda saved, new: saved.state.update(source_tokens=new.state["source_tokens"]),
    "guard": lambda saved, new: saved.state.update(guard=new.state["guard"]),
    "spikes": lambda saved, new: saved.state.update(spikes=new.state["spikes"]),
    "data": lambda saved, new: saved.ranks[0].update(data=new.ranks[0]["data"]),
    "rng": lambda saved, new: saved.ranks[0].update(rng=new.ranks[0]["rng"]),
}


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random numbers in every forward pass, and a third step that is not finite."""
    from titanlm.train_module import TrainModule

    forward = TrainModule.forward
    calls: list[None] = []

    def changed(self: Any, batch: Any) -> Any:
        sums, aux = forward(self, batch)
        if torch.is_grad_enabled():
            calls.append(None)
            factor = 1 + 0.01 * torch.rand(())
            sums = sums._replace(loss=sums.loss * (float("nan") if changed.step == 3 else factor))  # type: ignore[attr-defined]
        return sums, aux

    monkeypatch.setattr(TrainModule, "forward", changed)
    train_step = Trainer.train_step

    def counted(trainer: Trainer) -> None:
        changed.step = trainer.progress.step + 1  # type: ignore[attr-defined]
        train_step(trainer)

    monkeypatch.setattr(Trainer, "train_step", counted)


FULL = [
    "--train.steps=8",
    "--checkpoint.every=4",
    "--train.log_every=3",
    "--scheduler.name=cosine",
    "--train.on_nonfinite=skip",
    "--spike.sigmas=6",
    "--validation=[]",
]


def test_c8_each_part_of_the_state_matters(tiny: Path, noisy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resuming with a part as in a new run gives another run; with all of it, the same. In one run: average, random numbers, a skipped step, open sums."""
    run(tiny, "--run.name=whole", *FULL)
    with Trainer(load(tiny, ["--run.name=new", *FULL])) as new:
        new.save(wait=True)
    runs = tiny.parent / "runs"
    begun = checkpoint.load(runs / "new" / "checkpoints" / "step-00000000")
    opened = checkpoint.opened
    found = {}
    for what in ("nothing", *DROPPED):
        folder = runs / what.replace(" ", "-").replace("'", "")
        (folder / "checkpoints").mkdir(parents=True)
        (runs / "whole" / "checkpoints" / "step-00000004").rename(folder / "checkpoints" / "step-00000004")

        def without(path: Path, peers: Any, what: str = what) -> Any:
            saved = opened(path, peers)
            if what in DROPPED:
                DROPPED[what](saved, begun)
            return saved

        monkeypatch.setattr(checkpoint, "opened", without)
        run(tiny, f"--run.name={folder.name}", *FULL)
        found[what] = differences(final(runs / "whole", 8), final(folder, 8))
        (folder / "checkpoints" / "step-00000004").rename(runs / "whole" / "checkpoints" / "step-00000004")
    assert found.pop("nothing") == []
    assert [what for what, differing in found.items() if not differing] == []


@pytest.mark.parametrize("missing", [*STATE, *OWN_STATE])
def test_c8_a_checkpoint_without_a_part_is_refused_by_name(tiny: Path, finished: Path, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = checkpoint.opened

    def without(path: Path, peers: Any) -> Any:
        saved = opened(path, peers)
        (saved.state if missing in STATE else saved.ranks[0]).pop(missing)
        return saved

    monkeypatch.setattr(checkpoint, "opened", without)
    expected = "holds weights alone" if missing == "optimizers" else rf"lacks the (own )?state of .*{missing}"
    with pytest.raises(CheckpointError, match=expected):
        Trainer(load(tiny, ["--run.name=finished", "--train.steps=3", "--scheduler=constant"]))


@pytest.fixture
def finished(tiny: Path) -> Path:
    run(tiny, "--run.name=finished", "--train.steps=2", "--scheduler=constant", "--validation=[]")
    return tiny.parent / "runs" / "finished"


@pytest.mark.slow
def test_c5_one_run_over_changing_numbers_of_ranks_and_strategies(tiny: Path, zygote: Any) -> None:
    """2 → 1 → 4 → 2 ranks: the same rows, and losses within 1e-6 a step of one process; V = 257 divides by none of them (C12)."""
    common = ["--train.micro_batch=1", "--scheduler=constant", "--validation=[]", "--checkpoint.every=0"]
    zygote.train(tiny, "--run.name=alone", "--train.steps=12", *common).expect(0)
    for steps, ranks, strategy in ((3, 2, "fsdp2"), (6, 1, "none"), (9, 4, "fsdp2"), (12, 2, "replicate")):
        launched = zygote.train(tiny, "--run.name=moved", f"--train.steps={steps}", f"--parallel.strategy={strategy}", *common, ranks=ranks).expect(0)
    assert "saved by 4 ranks and is shared out over 2" in launched.output(0)
    alone, moved = tiny.parent / "runs" / "alone", tiny.parent / "runs" / "moved"
    assert all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(losses(alone), losses(moved), strict=True))
    one, two = checkpoint.load(alone / "checkpoints" / "step-00000012"), checkpoint.load(moved / "checkpoints" / "step-00000012")
    from titanlm.data import merge_states

    assert differences(*(merge_states([own["data"] for own in saved.ranks]) for saved in (one, two))) == []


@pytest.mark.slow
def test_c2_two_ranks_resumed_three_times_are_bitwise_the_straight_two(tiny: Path, zygote: Any) -> None:
    arguments = ["--parallel.strategy=fsdp2", *SHORT]
    zygote.train(tiny, "--run.name=straight", *arguments, ranks=2, before=RANDOM).expect(0)
    for steps in (1, 2, 3, 4):
        zygote.train(tiny, "--run.name=often", *arguments, f"--train.steps={steps}", ranks=2, before=RANDOM).expect(0)
    runs = tiny.parent / "runs"
    assert differences(final(runs / "straight", 4), final(runs / "often", 4)) == []


def test_c9_recomputation_and_micro_batches_may_change_and_names_keep(tiny: Path) -> None:
    run(tiny, "--run.name=x", "--train.steps=2", "--scheduler=constant", "--train.activation_checkpointing=full")
    trainer = run(tiny, "--run.name=x", "--train.steps=4", "--scheduler=constant", "--train.micro_batch=8")
    assert not [name for name in trainer.state()["model"] if "orig_mod" in name or "module." in name]
    assert len(losses(tiny.parent / "runs" / "x")) == 4


def test_c13_optimizers_that_share_parameters_otherwise_are_refused(tiny: Path) -> None:
    run(tiny, "--run.name=x", "--train.steps=2", "--scheduler=constant")
    with pytest.raises(CheckpointError, match=r"(?s)optimizer\.0\.params.*optimizer\.1"):
        run(tiny, "--run.name=x", '--optimizer=[{name="adamw",params=["@norm"]},{name="adamw"}]', "--scheduler=constant")


def test_c14_a_change_that_is_asked_for_is_allowed(tiny: Path) -> None:
    run(tiny, "--run.name=x", "--train.steps=2", "--scheduler=constant")
    run(tiny, "--run.name=x", "--train.steps=3", "--scheduler=constant", "--optimizer.0.lr=0.005", '--checkpoint.allow_changes=["optimizer.0.lr"]')
    rows = [json.loads(line) for line in (tiny.parent / "runs" / "x" / "metrics.jsonl").open()]
    assert [row["lr"] for row in rows if "lr" in row] == [0.01, 0.01, 0.005]


def test_c17_a_checkpoint_before_the_first_step_resumes(tiny: Path) -> None:
    """No optimizer has state yet."""
    with Trainer(load(tiny, ["--run.name=x"])) as trainer:
        trainer.save(wait=True)
    run(tiny, "--run.name=x", "--train.steps=4", "--scheduler.name=cosine", '--checkpoint.allow_changes=["scheduler"]')
    run(tiny, "--run.name=y", "--train.steps=4", "--scheduler.name=cosine")
    assert losses(tiny.parent / "runs" / "x") == losses(tiny.parent / "runs" / "y")


def test_c18_another_seed_is_refused(tiny: Path) -> None:
    run(tiny, "--run.name=x", "--train.steps=2", "--scheduler=constant")
    for change in ("--train.seed=7", "--train.deterministic=false"):
        with pytest.raises(CheckpointError, match=change[2:].partition("=")[0]):
            run(tiny, "--run.name=x", change, "--scheduler=constant")


def test_c19_the_best_outlives_rotation_and_resume(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import titanlm.train
    from titanlm.evaluate import Scores

    values = iter([3.0, 2.0, 5.0, 6.0, 7.0, 8.0])
    settings = ["--checkpoint.every=1", "--checkpoint.keep_last=1", "--train.validate_every=1", "--averager.name=ema", "--scheduler=constant"]
    settings += ["--checkpoint.best=validation/validation/loss"]

    def scored(module: Any, entry: Any, *rest: Any) -> Scores:
        loss = scored.last if scored.averaged else next(values)  # type: ignore[attr-defined]
        scored.last, scored.averaged = loss, not scored.averaged  # type: ignore[attr-defined]
        return Scores(loss, 10, 10, 10 * loss)

    scored.averaged, scored.last = False, 0.0  # type: ignore[attr-defined]
    monkeypatch.setattr(titanlm.train, "score", scored)
    run(tiny, "--run.name=x", "--train.steps=3", *settings)
    run(tiny, "--run.name=x", "--train.steps=5", *settings)
    folder = tiny.parent / "runs" / "x"
    assert json.loads((folder / "best.json").read_text())["step"] == 2
    assert [step for step, _ in checkpoint.steps(folder / "checkpoints")] == [2, 5]


@pytest.mark.parametrize(
    ("metric", "weights", "best"),
    [("english/loss", (1, 1, 1), 1), ("math/perplexity", (1, 1, 1), 3), ("summary/loss", (1, 1, 1), 2), ("summary/averaged_loss", (8, 1, 1), 4)],
)
def test_c19_the_best_by_any_set_and_by_their_summary(tiny: Path, monkeypatch: pytest.MonkeyPatch, metric: str, weights: tuple[int, ...], best: int) -> None:
    """Weighted means by step: 6.7, 2.7, 3.8, 3.1, 9 for equal weights, and 3.4, 3.2, 3.0, 2.5, 9 with English eightfold."""
    import titanlm.train
    from titanlm.checkpoint_commands import listing
    from titanlm.evaluate import Scores

    losses = {"english": [2.0, 3.3, 3.0, 2.2, 9.0], "math": [9.0, 2.2, 1.5, 3.5, 9.0], "code": [9.0, 2.5, 7.0, 3.7, 9.0]}
    calls = dict.fromkeys(losses, 0)

    def scored(module: Any, entry: Any, *rest: Any) -> Scores:
        calls[entry.name] += 1
        loss = losses[entry.name][(calls[entry.name] - 1) // 2]  # raw and averaged
        return Scores(loss, 10, 10, 10 * loss)

    monkeypatch.setattr(titanlm.train, "score", scored)
    sets = ",".join(f"{{name='{name}',max_tokens=48,weight={weight}}}" for name, weight in zip(losses, weights, strict=True))
    settings = ["--checkpoint.every=1", "--checkpoint.keep_last=1", "--train.validate_every=1", "--scheduler=constant", f"--validation=[{sets}]"]
    for steps in (3, 5):
        run(tiny, f"--train.steps={steps}", f"--checkpoint.best=validation/{metric}", *settings)
    folder = tiny.parent / "runs" / "tiny"
    assert json.loads((folder / "best.json").read_text())["step"] == best
    rows = [line.split() for line in listing(str(folder)).splitlines()[1:]]
    assert [(int(row[0]), row[-1]) for row in rows] == [(best, "best"), (5, "newest")]


def test_weights_alone_are_not_resumed_but_taken_up(tiny: Path) -> None:
    run(tiny, "--run.name=small", "--train.steps=2", "--scheduler=constant", "--checkpoint.save_only_model=true")
    folder = tiny.parent / "runs" / "small" / "checkpoints" / "step-00000002"
    assert {file.name for file in folder.glob("*.safetensors")} == {"model-00000.safetensors", "averagers-00000.safetensors"}
    with pytest.raises(CheckpointError, match=r"holds weights alone .*--checkpoint\.initial_load\.path="):
        run(tiny, "--run.name=small", "--train.steps=3", "--scheduler=constant")
    with Trainer(load(tiny, ["--run.name=next", f"--checkpoint.initial_load={{path='{folder}',weights='raw'}}"])) as trainer:
        saved = checkpoint.load(folder).state["model"]
        assert all(torch.equal(parameter, saved[name]) for name, parameter in trainer.model.named_parameters())
        assert all(torch.equal(average, saved[name]) for name, average in trainer.averagers[0].average.items())
        assert trainer.progress.step == 0
