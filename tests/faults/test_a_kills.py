"""Cases A through the whole trainer: kills at random moments, going back, two trainers in one folder, the end of the data, going on after the end."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from titanlm import checkpoint
from titanlm.cli import main

PROVED = {
    "A16 the lock alone": "tests/test_runs.py::test_lock_of_a_killed_process_is_reclaimed",
    "A17 every reason of an unwritable place": "tests/test_runs.py::test_unwritable_place_is_a_clear_error",
}
"""Cases of the fault matrix that other files prove."""

_spec = importlib.util.spec_from_file_location("kill_trials", Path(__file__).with_name("kill_trials.py"))
assert _spec is not None
assert _spec.loader is not None
sys.modules["kill_trials"] = kill_trials = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kill_trials)

STAND_STILL = """
import time
from titanlm.data import Loader
next_step, calls = Loader.next, []
def standing(self, phase):
    calls.append(None)
    if len(calls) == STEP:
        time.sleep(1000)
    return next_step(self, phase)
Loader.next = standing
"""
"""Run before a trainer, which then never comes to this step of its start."""


def steps(root: Path) -> list[int]:
    return [step for step, _ in checkpoint.steps(root)]


# ---------------------------------------------------------------- A1
@pytest.mark.slow
def test_a1_killed_at_random_moments_and_started_again(tmp_path: Path, zygote: Any) -> None:
    """Losses, scores and the whole state at the end are those of a run that was left alone; no more is lost than the steps since the last save."""
    training = kill_trials.Training(zygote, tmp_path, random.Random(3))
    trials = [training.trial(f"trial-{number}", kills=kills) for number, kills in enumerate((1, 2, 2))]
    assert [trial for trial in trials if not trial.good] == []


def test_a1_killed_between_a_save_and_the_scoring_of_its_step(tiny: Path, zygote: Any) -> None:
    overrides = ["--train.steps=3", "--scheduler=constant", "--train.validate_every=2", "--checkpoint.every=2", "--checkpoint.asynchronous=false"]
    dying = "import os, signal\nfrom titanlm import train\ntrain.score = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
    zygote.train(tiny, *overrides, before=dying).expect(-9)
    zygote.train(tiny, *overrides).expect(0)
    assert kill_trials.scores(tiny.parent / "runs" / "tiny").keys() == {2, 3}


# ---------------------------------------------------------------- A13
def test_a13_after_going_back_new_checkpoints_are_the_newest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "checkpoints"
    for step in (50, 900, 1000):
        checkpoint.save(root, step, {"at": step}, {}, "")
    assert main(["checkpoint", "rewind", str(tmp_path), "--step", "50"]) == 0
    assert "goes on from step 50" in capsys.readouterr().out
    checkpoint.save(root, 60, {"at": 60}, {}, "")
    checkpoint.rotate(root, 1, 60)
    assert checkpoint.latest(root) == root / "step-00000060"
    assert [path.name for path in sorted(root.iterdir())] == ["after-step-00000050-1", "step-00000060"]
    assert [checkpoint.load(path).state["at"] for path in sorted((root / "after-step-00000050-1").iterdir())] == [900, 1000]


@pytest.mark.slow
def test_a13_a_run_goes_on_from_where_it_was_taken_back_to(tiny: Path, zygote: Any) -> None:
    """Killed again after its first save: that one is taken up, and the end is that of a run that went straight on."""
    run, common = tiny.parent / "runs" / "back", ["--run.name=back", "--checkpoint.every=4"]
    zygote.train(tiny, "--run.name=straight").expect(0)
    zygote.train(tiny, *common).expect(0)
    assert main(["checkpoint", "rewind", str(run), "--step", "4"]) == 0
    launched = zygote.train(tiny, *common, "--checkpoint.keep_last=1", before=STAND_STILL.replace("STEP", "6"))
    kill_trials.wait_until(lambda: steps(run / "checkpoints") == [8])
    launched.kill(0)
    launched.expect(-9)
    assert f"resumed from {run}/checkpoints/step-00000008" in zygote.train(tiny, *common).expect(0).output()
    straight = tiny.parent / "runs" / "straight"
    assert kill_trials.losses(run) == kill_trials.losses(straight)
    assert kill_trials.state_differences(run, straight, 20) == []


def test_a13_after_going_back_the_last_step_is_scored_again(tiny: Path, zygote: Any) -> None:
    run, overrides = tiny.parent / "runs" / "tiny", ["--train.steps=2", "--scheduler=constant", "--checkpoint.every=1"]
    zygote.train(tiny, *overrides).expect(0)
    scores = kill_trials.scores(run)
    assert main(["checkpoint", "rewind", str(run), "--step", "1"]) == 0
    zygote.train(tiny, *overrides).expect(0)
    assert kill_trials.scores(run) == scores


# ---------------------------------------------------------------- A16
def test_a16_the_second_trainer_of_a_folder_is_refused_until_the_first_is_gone(tiny: Path, zygote: Any) -> None:
    run = tiny.parent / "runs" / "tiny"
    first = zygote.train(tiny, before=STAND_STILL.replace("STEP", "3"))
    kill_trials.wait_until(lambda: kill_trials.last_step(run) == 2)
    second = zygote.train(tiny, "--train.steps=21").expect(2)
    assert f"{run}: process {first.pids[0]} is training in it" in second.output()
    assert "Traceback" not in second.output()
    assert "steps = 20" in (run / "config.toml").read_text()
    first.kill(0)
    first.expect(-9)
    zygote.train(tiny).expect(0)
    assert steps(run / "checkpoints") == [7, 14, 20]


# ---------------------------------------------------------------- A17
@pytest.mark.parametrize("blocked", ["runs", "runs/tiny", "runs/tiny/checkpoints"])
def test_a17_a_file_in_place_of_a_folder(tiny: Path, capsys: pytest.CaptureFixture[str], blocked: str) -> None:
    path = tiny.parent / blocked
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    before = sorted(tiny.parent.rglob("*"))
    assert main(["train", str(tiny)]) == 2
    message = capsys.readouterr().err
    assert f"{path} is in the way" in message
    assert "run.dir or run.name" in message
    assert path.read_text() == "mine"
    assert sorted(tiny.parent.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a17_a_folder_that_may_not_be_written(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tiny.parent / "runs"
    runs.mkdir(mode=0o555)
    assert main(["train", str(tiny)]) == 2
    assert f"{runs / 'tiny'}: not writable" in capsys.readouterr().err
    assert list(runs.iterdir()) == []


# ---------------------------------------------------------------- A19
def test_a19_data_that_end_between_two_saves_are_followed_by_one(tiny: Path, zygote: Any) -> None:
    text, run = tiny.parent / "short.txt", tiny.parent / "runs" / "tiny"
    text.write_text("\n\n".join(f"{number} " + "word " * 100 for number in range(30)))
    overrides = [f'--dataset.paths=["{text}"]', "--data.epochs=1", "--train.steps=1000", "--checkpoint.every=1000"]
    launched = zygote.train(tiny, *overrides).expect(0)
    last = kill_trials.last_step(run)
    assert 5 < last < 1000
    assert f"training ends at step {last} of 1000" in launched.output()
    assert steps(run / "checkpoints") == [last]
    saved = checkpoint.load(run / "checkpoints" / checkpoint.folder_name(last))
    assert {"model", "optimizers", "averagers"} <= saved.state.keys()
    assert saved.ranks[0].keys() == {"data", "rng"}
    # Started again, there is still nothing to read, and the same is there as before.
    rows = kill_trials.metrics(run)
    zygote.train(tiny, *overrides).expect(0)
    assert kill_trials.metrics(run) == rows
    assert steps(run / "checkpoints") == [last]


# ---------------------------------------------------------------- A20
@pytest.mark.slow
def test_a20_a_finished_run_with_more_steps_goes_on_as_if_it_had_had_them_all_along(tiny: Path, zygote: Any) -> None:
    """Under a schedule that does not look at the end."""
    runs = tiny.parent / "runs"
    zygote.train(tiny, "--run.name=straight", "--scheduler=constant").expect(0)
    for n_steps in (10, 15, 20):
        zygote.train(tiny, "--run.name=extended", "--scheduler=constant", f"--train.steps={n_steps}").expect(0)
    assert kill_trials.losses(runs / "extended") == kill_trials.losses(runs / "straight")
    assert kill_trials.state_differences(runs / "extended", runs / "straight", 20) == []
