"""Opening runs, checkpoints and artifacts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from titanlm import checkpoint
from titanlm.check import build_model
from titanlm.config import load, loads
from titanlm.errors import CheckpointError, ConfigError, TitanError
from titanlm.export import export_run
from titanlm.targets import find_checkpoint, import_outside, open_target, require_tokenizer
from titanlm.train import Trainer
from titanlm.weights import load_weights, unique_names


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a GPU, ``auto`` would take it, and sums would differ in the last digits."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def run(tiny: Path) -> Path:
    """A run with checkpoints of steps 2 and 4, and an artifact."""
    with Trainer(load(tiny, ["--train.steps=4", "--checkpoint.every=2", "--validation.0.max_tokens=100"])) as trainer:
        trainer.train()
    export_run(trainer.folder.path)
    return trainer.folder.path


def flip(folder: Path) -> None:
    file = folder / "model-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


# ---------------------------------------------------------------- which checkpoint
def test_which_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = run / "checkpoints"
    assert find_checkpoint(run) == root / "step-00000004"
    assert find_checkpoint(run, 2) == root / "step-00000002"
    assert find_checkpoint(root / "step-00000002") == root / "step-00000002"
    for path, step, text in (
        (run, 3, r"no checkpoint of step 3 \(there: 2, 4\)"),
        (run, -1, r"no checkpoint of step -1 \(there: 2, 4\)"),
        (root, None, "not a run folder"),
        (root / "step-00000009", None, "not a run folder"),
        (root / "step-00000002", 4, "this is one checkpoint already; leave out --step"),
    ):
        with pytest.raises(CheckpointError, match=text):
            find_checkpoint(path, step)
    flip(root / "step-00000004")
    capsys.readouterr()
    assert find_checkpoint(run) == root / "step-00000002"
    assert "step-00000004: model-00000.safetensors (part of rank 0) is damaged" in capsys.readouterr().err
    assert find_checkpoint(run, 4) == root / "step-00000004"  # named by the user: opening it will say what is wrong
    flip(root / "step-00000002")
    with pytest.raises(CheckpointError, match="no valid checkpoint in it yet"):
        find_checkpoint(run)


def test_damage_is_named_when_a_target_is_opened(run: Path) -> None:
    flip(run / "checkpoints" / "step-00000002")
    with pytest.raises(CheckpointError, match=r"step-00000002: model-00000\.safetensors \(part of rank 0\) is damaged"):
        open_target(run / "checkpoints" / "step-00000002")
    assert open_target(run).source.endswith("step-00000004")


# ---------------------------------------------------------------- what is opened
def test_the_three_kinds(run: Path) -> None:
    state = checkpoint.load(run / "checkpoints" / "step-00000004").state
    raw, averaged, artifact = open_target(run, averaged=False), open_target(run), open_target(run / "artifact.titanlm")
    assert [target.weights for target in (raw, averaged, artifact)] == ["raw", "averaged", "artifact"]
    assert [target.device for target in (raw, averaged, artifact)] == [torch.device("cpu")] * 3
    for target, weights in ((raw, state["model"]), (averaged, state["averagers"][0]["average"])):
        for name, parameter in target.module.model.named_parameters():
            assert torch.equal(parameter, weights[name]), name
    for name, parameter in artifact.module.model.named_parameters():
        assert torch.equal(parameter, state["averagers"][0]["average"][name].half().float()), name
        assert parameter.dtype == torch.float32
    for target in (raw, averaged, artifact):
        assert not any(module.training for module in target.module.modules())
        assert target.config.run.name == "tiny"
        assert target.tokenizer.vocab_size == 257
        assert target.module.model.head.weight is target.module.model.embedding.weight  # still tied
    for choice in (True, False):
        with pytest.raises(TitanError, match="an artifact holds one set of weights"):
            open_target(run / "artifact.titanlm", averaged=choice)
    with pytest.raises(TitanError, match="no such run folder"):
        open_target(run / "nothing")


def test_opening_changes_nothing(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*"))}
    state = torch.get_rng_state()
    open_target(run)
    open_target(run / "artifact.titanlm")
    assert {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*"))} == before
    assert torch.equal(torch.get_rng_state(), state)


def test_precision_is_the_stored_or_the_overridden(run: Path) -> None:
    assert open_target(run).module.compute_dtype == torch.float32
    assert open_target(run, overrides=["--train.precision=bf16"]).module.compute_dtype == torch.bfloat16


# ---------------------------------------------------------------- stored configs
def test_overrides_of_a_loads(run: Path) -> None:
    text = (run / "config.toml").read_text()
    config = loads(text, "x", ["--validation.0.max_tokens=7", "--optimizer.0.lr=0.5", "--averager.decay=0.5"])
    assert (config.validation[0].max_tokens, config.optimizer[0].config.lr) == (7, 0.5)
    assert loads(text, "x") == load(run / "config.toml")
    with pytest.raises(ConfigError, match="train.stps: unknown key"):
        loads(text, "x", ["--train.stps=1"])
    with pytest.raises(ConfigError, match="only a file extends another"):
        loads(text, "x", ["--extends=y.toml"])


def test_a_stored_config_imports_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only --import does; the stored list is a record."""
    (tmp_path / "outside_trap.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = (run / "config.toml").read_text()
    assert loads(text, "x", ['--imports=["outside_trap"]']).imports == ("outside_trap",)
    assert loads(text.replace("imports = []", 'imports = ["outside_trap"]'), "x").imports == ("outside_trap",)
    with pytest.raises(SystemExit, match="imported"):
        import_outside(["outside_trap"])


def test_imports_named_by_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    (tmp_path / "outside_here.py").write_text("seen = True\n")
    import_outside(["outside_here"])  # from the working directory, as `python -m` would
    assert sys.modules.pop("outside_here").seen
    with pytest.raises(ConfigError) as caught:
        import_outside(["outside_one", "outside_two.b", ".x", ""])
    assert len(caught.value.problems) == 4
    assert "no module named 'outside_one'; install its package or run where it can be imported" in caught.value.problems[0]
    (tmp_path / "outside_broken.py").write_text("import outside_missing_dependency\n")
    with pytest.raises(ModuleNotFoundError, match="outside_missing_dependency"):  # its author's to mend
        import_outside(["outside_broken"])


# ---------------------------------------------------------------- tokenizers and weights
def test_another_tokenizer(tiny: Path) -> None:
    tokenizer = load(tiny).tokenizer.build()
    require_tokenizer(tokenizer, tokenizer.fingerprint, "x")
    with pytest.raises(TitanError, match="x: made with another tokenizer than the one found now"):
        require_tokenizer(tokenizer, "another", "x")


def test_weights_that_do_not_fit_are_all_named(tiny: Path) -> None:
    config = load(tiny)
    model: Any = build_model(config, config.tokenizer.build())
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights(0)
    names = unique_names(model)
    assert "head.weight" not in names  # tied: stored once
    weights = {name: model.state_dict()[name].clone() + 1 for name in names}
    wrong = {name: tensor for name, tensor in weights.items() if name != "norm.weight"} | {"extra": torch.zeros(2)}
    wrong["embedding.weight"] = wrong["embedding.weight"][1:]
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, wrong, "here")
    assert str(caught.value).splitlines() == [
        "here: the weights do not fit the model:",
        "  embedding.weight: shape [256, 32], the model has [257, 32]",
        "  extra: not part of the model",
        "  norm.weight: missing",
    ]
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    load_weights(model, weights, "here")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())


def test_a_mistyped_run_is_answered_with_the_nearest(run: Path) -> None:
    with pytest.raises(TitanError, match=rf"no such run folder.*did you mean '{run.name}'"):
        open_target(run.with_name(run.name[:-1]))
