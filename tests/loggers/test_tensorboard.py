"""TensorBoard events, read back with TensorBoard's own reader."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from titanlm.errors import TitanError
from titanlm.loggers.tensorboard import Tensorboard, TensorboardConfig


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_resume_shows_no_step_twice(tmp_path: Path) -> None:
    first = Tensorboard(TensorboardConfig(), run_dir=tmp_path)
    first.message("before the start")
    first.start(0)
    for step in (10, 20, 30):
        first.log(step, {"loss": 1 / step, "validation/a/loss": float(step)})
    assert scalars(tmp_path)["loss"] == [(step, float(np.float32(1 / step))) for step in (10, 20, 30)]  # on disk before close
    second = Tensorboard(TensorboardConfig(), run_dir=tmp_path)  # the first was killed; the checkpoint was of step 20
    second.start(20)
    for step in (30, 40):
        second.log(step, {"loss": -float(step)})
    second.close()
    found = scalars(tmp_path)
    assert found["loss"] == [(10, float(np.float32(0.1))), (20, float(np.float32(0.05))), (30, -30.0), (40, -40.0)]
    assert found["validation/a/loss"] == [(10, 10.0), (20, 20.0)]
    first.close()


def test_new_run_in_an_old_folder_begins_anew(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        made = Tensorboard(TensorboardConfig(), run_dir=tmp_path)
        made.start(0)
        made.log(1, {"loss": loss})
        made.close()
    assert scalars(tmp_path) == {"loss": [(1, 2.0)]}


def test_missing_package_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    blocked: Any = None
    monkeypatch.setitem(sys.modules, "tensorboard", blocked)
    with pytest.raises(TitanError, match="pip install tensorboard"):
        Tensorboard(TensorboardConfig(), run_dir=tmp_path)


def test_file_in_the_way_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(TitanError, match="tensorboard: cannot be written"):
        Tensorboard(TensorboardConfig(), run_dir=tmp_path).start(0)
