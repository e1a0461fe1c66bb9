"""Recipes: what is read, what is planned, and what runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from titanlm import cli, config, recipe_run
from titanlm.distributed.world import World
from titanlm.errors import ConfigError, TitanError
from titanlm.recipe import found, listing, load, open_recipe
from titanlm.recipe_plan import HOST_DEVICES, Layout, _rows, _Training, peak_of, plan, planned_model
from titanlm.runs import Lock
from titanlm.supervisor import run_child

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(ROOT.glob("recipes/*/recipe.toml"))

TWO = """
description = "words"
scales = ["small", "large"]

[[stage]]
name = "data"
scales = ["small"]
run = ["tokenizer", "train", "--type", "spm", "--vocab-size", "300", "--output", "{out}/spm.model"]
output = "{out}/spm.model"

[[stage]]
name = "data"
scales = ["large"]
run = ["data", "download", "golf", "--output", "shared"]
output = "shared"

[[stage]]
name = "train"
config = "configs/run.toml"
run = ["train", "{config}", "--run.dir={out}"]
overrides = ["--train.seed=7"]
output = "{out}/run"
[stage.large]
overrides = ["--tokenizer={name = 'sentencepiece', path = '{data.output}/spm.model'}", "--train.steps=9"]

[[stage]]
name = "eval"
run = ["eval", "{train.output}"]
"""
MODEL = 'model = {name = "decoder", n_layers = 1, d_model = 16, n_heads = 2}\noptimizer = "adamw"\n'


EACH = """
scales = ["small", "large"]

[[stage]]
name = "train"
config = "configs/run.toml"
each = [7, 8]
run = ["train", "{config}", "--run.dir={out}", "--run.name=seed-{each}"]
overrides = ["--train.seed={each}"]
output = "{out}/seed-{each}"
[stage.large]
each = [1337, "42", 2024]

[[stage]]
name = "submission"
run = ["submission", "build", "{train.output}", "--output", "{out}/made", "--name", "n", "--author", "a", "--github-id", "g"]

[[stage]]
name = "eval"
scales = ["small"]
run = ["eval", "{train-8.output}"]
"""


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of two scales in recipes/two of the working directory."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "recipes" / "two" / "recipe.toml"
    (file.parent / "configs").mkdir(parents=True)
    (file.parent / "configs" / "run.toml").write_text(MODEL, encoding="utf-8")
    file.write_text(TWO, encoding="utf-8")
    return file


# ---------------------------------------------------------------- reading
def test_stages_of_each_scale(two: Path) -> None:
    recipe = open_recipe("two")
    assert (recipe.name, recipe.description, recipe.scales) == ("two", "words", ("small", "large"))
    small, large = recipe.at(), recipe.at("large", Path("else where"), ["--train.steps=3"])
    assert [stage.name for stage in small.stages] == [stage.name for stage in large.stages] == ["data", "train", "eval"]
    assert small.stages[0].words[-1] == small.stages[0].output == "runs/two-small/spm.model"
    assert small.stages[1].words == ("train", "recipes/two/configs/run.toml", "--run.dir=runs/two-small", "--train.seed=7")
    assert large.stages[1].overrides == (
        "--run.dir=else where",
        "--train.seed=7",
        "--tokenizer={name = 'sentencepiece', path = 'shared/spm.model'}",
        "--train.steps=9",
        "--train.steps=3",  # of the command line, for train stages alone
    )
    assert large.configs()["train"].train.steps == 3
    assert large.configs()["train"].tokenizer.config.path == "shared/spm.model"
    assert (large.stages[2].command, large.stages[2].config) == ("titanlm eval 'else where/run'", None)


def test_a_recipe_is_found_by_name_file_and_folder(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found()["two"] == Path("recipes/two/recipe.toml")
    assert open_recipe("recipes/two").path == open_recipe("recipes/two/recipe.toml").path == Path("recipes/two/recipe.toml")
    for file in SHIPPED:  # of the checkout, wherever one is
        assert found()[file.parent.name].resolve() == file
    with pytest.raises(TitanError, match=r"no recipe 'tow'; did you mean 'two'\? \(recipes: .*two\b.*; or name a recipe.toml or its folder\)"):
        open_recipe("tow")
    monkeypatch.chdir(two.parent)
    assert open_recipe("recipe.toml").name == "two"
    (stage,) = [stage for stage in open_recipe("recipe.toml").at().stages if stage.config]
    assert stage.config == Path("configs/run.toml")


def test_listing(two: Path) -> None:
    (two.parent.parent / "broken").mkdir()
    (two.parent.parent / "broken" / "recipe.toml").write_text("scale = 3", encoding="utf-8")
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in listing().splitlines()}
    assert rows["two"] == "small, large words"
    assert rows["broken"] == "cannot be used, 3 mistakes; titanlm recipe plan broken names them"


MISTAKES = """
scales = ["small", "large"]
descripton = "x"

[[stage]]
name = "Data"
run = ["data", "prepar", "--output", "{out}"]
outptu = "x"

[[stage]]
name = "train"
scales = ["smal"]
run = ["train", "x.toml"]

[[stage]]
name = "train"
config = "configs/rum.toml"
run = ["train", "{config}", "{eval.output}", 3]
output = "x"
[stage.larg]
overrides = []

[[stage]]
name = "eval"
scales = ["small"]
run = ["eval", "{trian.output}{eval.output}{config}", "--devise", "cpu"]
output = "{outt}/x"
[stage.large]
config = "configs/run.toml"

[[stage]]
name = "again"
run = ["recipe", "run", "two"]

[[stage]]
name = "after"
config = "configs/run.toml"
run = ["eval", "{eval.output}{again.output}"]
"""


def test_all_mistakes_at_once(two: Path) -> None:
    two.write_text(MISTAKES, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(two.relative_to(Path.cwd()))
    said = {problem.partition("recipe.toml:")[2] for problem in caught.value.problems}
    assert len(said) == len(caught.value.problems)
    expected = [
        "3: descripton: unknown key; did you mean 'description'? (keys: description, scales, stage)",
        "6: stage.0.name: 'Data': a stage has a name of small letters, digits and -",
        "7: stage.0.run: titanlm data prepar: no verb 'prepar'; did you mean 'prepare'?",
        "8: stage.0.outptu: unknown key; did you mean 'output'?",
        "12: stage.1.scales: no scale 'smal'; did you mean 'small'? (scales: small, large)",
        "17: stage.2.config: recipes/two/configs/rum.toml: no such file, relative to the recipe's folder; did you mean 'run.toml'?",
        "18: stage.2.run: {eval.output}: stage 'eval' comes later",
        "18: stage.2.run: {eval.output}: stage 'eval' is not at scale 'large'",
        "18: stage.2.run.3: expected a string, got 3",
        "20: stage.2.larg: unknown key; did you mean 'large'?",
        "26: stage.3.run: {trian.output}: stands for nothing; did you mean 'train.output'?",
        "26: stage.3.run: {eval.output}: a stage cannot name its own output",
        "26: stage.3.run: {config}: the stage has no config at scale 'small'",
        "26: stage.3.run: titanlm eval: no option '--devise'; did you mean '--device'?",
        "27: stage.3.output: {outt}: stands for nothing; did you mean 'out'?",
        "28: stage.3.large: the stage is not at scale 'large'; its scales are small",
        "33: stage.4.run: a recipe runs no recipes; give their stages",
        "37: stage.5.config: `run` does not name it; write {config} where the file goes",
        "38: stage.5.run: {again.output}: stage 'again' says no output",
    ]
    missing = [text for text in expected if not any(problem.startswith(text) for problem in said)]
    assert not missing, said


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", 'scales: missing; name at least one, such as scales = ["smoke", "full"], the default first'),
        ("", "stage: missing; a recipe has at least one [[stage]]"),
        ('scales = "small"', "scales: expected a list of strings, got 'small'"),
        ('scales = ["S 1"]', "scales: 'S 1': a scale is called by small letters, digits and -"),
        ('scales = ["run"]\nstage = [{name = "a", run = ["list"]}]', "scales: 'run' is a key of stages; call the scale something else"),
        ('scales = ["a", "b"]\nstage = [{name = "a", scales = ["a"], run = ["list"]}]', "scales: no stage is at scale 'b'"),
        ('scales = ["a"]\nstage = [3]', "stage.0: expected a table, got 3"),
        ('scales = ["a"]\nstage = [{run = ["list"]}]', "stage.0.name: missing; a stage has a name"),
        ('scales = ["a"]\nstage = [{name = "a"}]', "stage.0.run: missing; the words after `titanlm`"),
        ('scales = ["a"]\nstage = [{name = "a", run = ["train", "--help"]}]', "stage.0.run: titanlm train: asks for help, and does nothing"),
        ('scales = ["a"]\nstage = [{name = "a", run = ["list"]}, {name = "a", run = ["list"]}]', "stage.1.name: two stages are called 'a' at one scale"),
    ],
)
def test_a_mistake(two: Path, text: str, problem: str) -> None:
    two.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(two)
    assert any(problem in each for each in caught.value.problems), caught.value.problems


def test_what_is_asked_of_a_recipe_may_be_wrong(two: Path) -> None:
    recipe = open_recipe("two")
    with pytest.raises(TitanError, match=r"--scale smal: recipes/two/recipe.toml has no such scale; did you mean 'small'\? \(scales: small, large\)"):
        recipe.at("smal")
    with pytest.raises(TitanError, match="would not survive in an override"):
        recipe.at(out=Path("it's"))
    (two.parent / "none.toml").write_text('scales = ["a"]\nstage = [{name = "a", run = ["list"]}]', encoding="utf-8")
    with pytest.raises(TitanError, match=r"--train.steps=3: overrides change train stages, and recipes/two/none.toml has none at scale a"):
        open_recipe("recipes/two/none.toml").at(overrides=["--train.steps=3"])
    (two.parent / "configs" / "run.toml").write_text(f"{MODEL}[train]\nstepps = 3\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        recipe.at(overrides=["--train.sed=1"]).configs()
    assert [problem.partition("stage 'train': ")[2].partition(";")[0] for problem in caught.value.problems] == [
        "recipes/two/configs/run.toml:4: train.stepps: unknown key",
        "--train.sed: train.sed: unknown key",
    ]


# ---------------------------------------------------------------- each
def test_a_stage_for_each_value(two: Path) -> None:
    two.write_text(EACH, encoding="utf-8")
    recipe = open_recipe("two")
    small, large = recipe.at(out=Path("out")), recipe.at("large", Path("out"), ["--train.steps=3"])
    assert [(stage.name, stage.of) for stage in small.stages] == [("train-7", "train"), ("train-8", "train"), ("submission", "submission"), ("eval", "eval")]
    assert small.stages[1].words == ("train", "recipes/two/configs/run.toml", "--run.dir=out", "--run.name=seed-8", "--train.seed=8")
    assert small.stages[1].output == "out/seed-8"
    assert small.stages[2].words[:5] == ("submission", "build", "out/seed-7", "out/seed-8", "--output")
    assert small.stages[3].words == ("eval", "out/seed-8")
    assert [stage.name for stage in large.stages] == ["train-1337", "train-42", "train-2024", "submission"]
    assert large.stages[3].words[2:5] == ("out/seed-1337", "out/seed-42", "out/seed-2024")
    assert {name: (each.train.seed, each.train.steps) for name, each in large.configs().items()} == {
        "train-1337": (1337, 3), "train-42": (42, 3), "train-2024": (2024, 3),
    }  # fmt: skip


def test_one_value_is_one_path(two: Path) -> None:
    """So it may stand inside a word, and the stage is called by its value all the same."""
    two.write_text(EACH.replace("[7, 8]", "[8]").replace("{train-8.output}", "{train.output}/checkpoints"), encoding="utf-8")
    stages = open_recipe("two").at(out=Path("out")).stages
    assert [stage.command for stage in stages[::2]] == [
        "titanlm train recipes/two/configs/run.toml --run.dir=out --run.name=seed-8 --train.seed=8",
        "titanlm eval out/seed-8/checkpoints",
    ]


EACH_MISTAKES = """
scales = ["small", "large"]

[[stage]]
name = "train"
config = "configs/run.toml"
each = [7, 8]
run = ["train", "{config}", "--run.name={each}", "--run.dir={train-7.output}", "--train.seed={eval-1.output}"]
output = "{out}/run"

[[stage]]
name = "eval"
scales = ["small"]
each = [1]
run = ["eval", "{out}", "--validation.0.name={train.output}"]
output = "{train.output}"

[[stage]]
name = "eval"
scales = ["large"]
each = []
run = ["eval", "{train-9.output}", "--weights", "{each}"]

[[stage]]
name = "train-8"
run = ["list", "{each}"]

[[stage]]
name = "last"
each = 3
scales = ["small"]
run = ["list"]
[stage.small]
each = [true, 1.5, "a b", 3, "3", -3, ""]
"""


def test_all_mistakes_of_each_at_once(two: Path) -> None:
    two.write_text(EACH_MISTAKES, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(two.relative_to(Path.cwd()))
    said = [problem.partition("recipe.toml:")[2] for problem in caught.value.problems]
    assert len(said) == len(set(said))
    expected = [
        "8: stage.0.run: {train-7.output}: a stage cannot name its own output",
        "8: stage.0.run: {eval-1.output}: stage 'eval-1' comes later",
        "8: stage.0.run: {eval-1.output}: stage 'eval-1' is not at scale 'large'",
        "9: stage.0.output: has no {each}, so all stages would write to one place",
        "14: stage.1.each: `run` does not name it, so all stages would do the same; write {each} where they differ",
        "15: stage.1.run: {train.output}: 2 paths, which cannot stand inside '--validation.0.name={train.output}'; "
        "make it a word by itself, or name one, such as {train-7.output}",
        "16: stage.1.output: {train.output} is 2 paths; an output is one",
        "21: stage.2.each: has no value; name at least one, such as each = [1337, 42], or leave it out",
        "22: stage.2.run: {train-9.output}: stands for nothing; did you mean 'train-8.output'?",
        "22: stage.2.run: {each}: the stage has no each at scale 'large'",
        "25: stage.3.name: two stages are called 'train-8' at one scale; give each a name of its own",
        "26: stage.3.run: {each}: the stage has no each at scale 'small'",
        '34: stage.4.small.each.0: expected a whole number or a string, got True; write "True"',
        '34: stage.4.small.each.1: expected a whole number or a string, got 1.5; write "1.5"',
        "34: stage.4.small.each.2: 'a b': it is part of the stage's name",
        "34: stage.4.small.each.4: '3' is in it twice",
        "34: stage.4.small.each.5: -3: it is part of the stage's name",
        "34: stage.4.small.each.6: '': it is part of the stage's name",
        "30: stage.4.each: expected a list of whole numbers and strings, got 3",
    ]
    missing = [text for text in expected if not any(problem.startswith(text) for problem in said)]
    assert not missing, said


def test_what_stages_differ_in_is_not_overridden(two: Path) -> None:
    two.write_text(EACH, encoding="utf-8")
    recipe = open_recipe("two")
    with pytest.raises(TitanError, match=r"--train.seed=3: would make the stages of 'train' equal, which differ in it; change `each` in recipes/two/r"):
        recipe.at(overrides=["--train.steps=3", "--train.seed=3"])
    with pytest.raises(ConfigError) as caught:
        recipe.at(overrides=["--train.stepps=3"]).configs()
    assert len(caught.value.problems) == 1  # once, not a seed
    assert caught.value.problems[0].startswith("stage 'train': --train.stepps: train.stepps: unknown key")


# ---------------------------------------------------------------- plans
@pytest.mark.parametrize("file", [pytest.param(file, marks=[pytest.mark.slow] * (file.parent.name == "yxanul"), id=file.parent.name) for file in SHIPPED])
def test_every_shipped_recipe_plans(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where there is neither data nor a network nor a tokenizer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("connects"))
    recipe = load(file)
    assert recipe.description
    for scale in recipe.scales:
        text = plan(recipe.at(scale), device_name="H200")
        assert "unknown" not in text
        assert "\n   hours " in text
        assert not list(tmp_path.iterdir())


def test_golf_at_full_scale_has_the_records_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recipe", "plan", "golf", "--scale", "full", "--devices", "8", "--device-name", "H200", "--parallel.strategy=replicate"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "parameters       27,092,057\n" in out
    assert "524,288 a step" in out


def test_a_plan_of_a_config(two: Path) -> None:
    """By hand: embedding 257·16, a block of 4·16² + 3·16·d_ff and two norms, the last norm; d_ff is the decoder's choice."""
    (two.parent / "configs" / "run.toml").write_text(MODEL.replace("n_heads = 2", "n_heads = 2, d_ff = 24, vocab_size = 257"), encoding="utf-8")
    text = plan(open_recipe("two").at("small", overrides=["--train.steps=10", "--train.max_wallclock_s=36"]), device_name="NVIDIA H100 80GB HBM3")
    parameters = 257 * 16 + 4 * 16 * 16 + 3 * 16 * 24 + 2 * 16 + 16
    # A token: six FLOPs a number of a matrix, the head's included, and attention over half a row on average, as the model says.
    flops = planned_model(config.load(two.parent / "configs" / "run.toml")).flops_per_token(1024)
    hours = [flops * 327_680 / (share * 989e12) / 3600 for share in (0.2, 0.35, 0.5)]
    assert f"parameters       {parameters:,}\n" in text
    assert "tokens           32,768 a step, 327,680 in 10 steps\n" in text
    assert f"FLOPs            {flops:,.0f} a token, {flops * 327_680:.3g} in all" in text
    assert f"hours            {hours[0]:,.2f} at 20%, {hours[1]:,.2f} at 35%, {hours[2]:,.2f} at 50% MFU, computed, on 1 × NVIDIA H100" in text
    assert "max_wallclock_s ends it after 0.01 hours; all steps within them take 0% MFU" in text
    assert text.startswith("recipes/two/recipe.toml: scale small, 3 stages in runs/two-small\n")
    assert "1. data\n   titanlm tokenizer train --type spm" in text


def test_a_plan_counts_the_stages_of_each(two: Path) -> None:
    two.write_text(EACH, encoding="utf-8")
    (two.parent / "configs" / "run.toml").write_text(MODEL.replace("n_heads = 2", "n_heads = 2, vocab_size = 257"), encoding="utf-8")
    recipe, overrides = open_recipe("two"), ["--train.steps=10", "--train.max_wallclock_s=36"]
    text = plan(recipe.at("large", overrides=overrides), device_name="H100")
    flops = planned_model(config.load(two.parent / "configs" / "run.toml")).flops_per_token(1024) * 327_680
    assert text.startswith("recipes/two/recipe.toml: scale large, 4 stages in runs/two-large\n")
    assert text.count("\n   takes            what train-1337 does\n") == 2
    tokens, total, hours, limit = text.partition("\n\ntrain-1337, train-42, train-2024 together\n")[2].splitlines()
    assert tokens.split() == ["tokens", "983,040"]
    assert total.split() == ["FLOPs", f"{3 * flops:.3g}"]
    assert hours.split()[1] == f"{3 * flops / (0.2 * 989e12) / 3600:,.2f}"
    assert limit.strip() == "train.max_wallclock_s ends them after 0.03 hours"
    # What is not equal is computed by itself: another length for each.
    two.write_text(EACH.replace("--train.seed={each}", "--train.steps={each}"), encoding="utf-8")
    text = plan(open_recipe("two").at("small"))
    assert "in 7 steps\n" in text
    assert "in 8 steps\n" in text
    assert f"\n   tokens           {15 * 32_768:,}\n" in text


def test_what_is_not_known_is_said(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tokenizer is an output that is not there yet."""
    text = plan(open_recipe("two").at("large"))
    assert "parameters       unknown: model.vocab_size is unset, and the tokenizer cannot say it yet: tokenizer.path: cannot read " in text
    assert "tokens           32,768 a step, 294,912 in 9 steps" in text
    assert cli.main(["recipe", "plan", "two", "--device-name", "H210"]) == 2
    assert "--device-name 'H210': its peak is not known; did you mean" in capsys.readouterr().err
    assert peak_of("NVIDIA H200") == 989e12


def test_mistakes_of_a_plan_name_the_stage(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipe", "plan", "two", "--devices", "3", "--parallel.strategy=replicate"]) == 2
    assert (
        "stage 'train': parallel: 32 rows in micro-batches of 8, and 64 streams of data, cannot be shared out evenly among 3 ranks" in capsys.readouterr().err
    )
    assert cli.main(["recipe", "plan", "two", "--model.n_heads=3"]) == 2
    assert "two/recipe.toml: 1 error\n  stage 'train': " in capsys.readouterr().err
    assert cli.main(["recipe", "plan", "two", '--optimizer=[{name = "adamw", params = ["@norm"]}]']) == 2
    assert "stage 'train': optimizer: none claims embedding." in capsys.readouterr().err


def layout(file: Path, *overrides: str, size: int = 1, local: int = HOST_DEVICES) -> Layout:
    settings = config.load(file, overrides)
    return Layout(settings, planned_model(settings), World(size=size, local_size=min(size, local)))


def test_memory_is_what_one_process_holds(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from titanlm.train import Trainer

    muon = [
        '--optimizer=[{name = "muon"}, {name = "adamw"}]',
        "--train.steps=1",
        "--scheduler=constant",
        "--validation=[]",
        "--logger=[]",
        "--checkpoint.asynchronous=false",
    ]
    seen: dict[str, int] = {}
    step = torch.optim.Optimizer.zero_grad

    def look(optimizer: Any, set_to_none: bool = True) -> None:
        seen["gradients"] = seen.get("gradients", 0) + sum(p.grad.nbytes for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
        step(optimizer, set_to_none)

    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", look)
    with Trainer(config.load(tiny, muon)) as trainer:
        seen.clear()
        trainer.train()
        seen["weights"] = sum(parameter.nbytes for parameter in trainer.model.parameters())
        states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
        seen["moments"] = sum(value.nbytes for state in states for name, value in state.items() if name != "step")
        seen["average"] = sum(value.nbytes for value in trainer.averagers[0].average.values())
    assert layout(tiny, *muon).memory().device == seen
    assert layout(tiny, *muon).memory().host == {}


MEASURE = """
import json, torch, torch.distributed as dist
from titanlm.train import Trainer
sent = dict(gathers=0, scatters=0, reduces=0)

def counted(name, real, bytes_of):
    def call(*args, **kwargs):
        if counting:
            sent[name] += bytes_of(*args, **kwargs)
        return real(*args, **kwargs)
    return call

counting = False
def scattered(output, input, **_): return input.nbytes - output.nbytes
def gathered(output, input, *_, **__): return output.nbytes - input.nbytes
def reduced(tensor, *_, async_op=False, **__): return tensor.nbytes if async_op else 0  # those of DDP; 2 (n - 1) / n of a tensor, n = 2
for called, name, bytes_of in (("all_gather", "gathers", gathered), ("reduce_scatter", "scatters", scattered)):
    called += "_single" if hasattr(dist, "all_gather_single") else {"gathers": "_into_tensor", "scatters": "_tensor"}[name]  # before torch 2.13
    setattr(dist, called, counted(name, getattr(dist, called), bytes_of))
dist.all_reduce = counted("reduces", dist.all_reduce, reduced)
step = Trainer.train_step

def train_step(self):
    global counting
    counting = True
    step(self)
    counting = False
    local = lambda tensor: tensor.to_local() if hasattr(tensor, "to_local") else tensor
    states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
    held = dict(
        weights=sum(local(parameter).nbytes for parameter in self.model.parameters()),
        moments=sum(local(value).nbytes for state in states for name, value in state.items() if name != "step"),
        average=sum(local(value).nbytes for value in self.averagers[0].average.values()),
    )
    open("FOLDER/" + str(rank) + ".json", "w").write(json.dumps([sent, held]))

Trainer.train_step = train_step
"""


@pytest.mark.distributed
@pytest.mark.parametrize(
    "settings",
    [
        ["--parallel.strategy=replicate"],
        ["--parallel.strategy=fsdp2"],
        ["--parallel.strategy=fsdp2", "--parallel.reshard_after_forward=false", "--train.micro_batch=2", "--train.precision=bf16"],
        ["--parallel.strategy=fsdp2", "--parallel.gather_dtype=compute", "--train.precision=bf16", "--train.micro_batch=1"],
        ["--parallel.strategy=fsdp2", "--parallel.gather_dtype=float8", "--train.precision=bf16", '--quantizer=[{name="float8",select="all"}]'],
    ],
    ids=["replicate", "fsdp2", "fsdp2 kept", "fsdp2 compute", "fsdp2 float8"],
)
def test_memory_and_traffic_are_what_ranks_have(tiny: Path, tmp_path: Path, zygote: Any, settings: list[str]) -> None:
    """Counted where torch hands the bytes to the process group, in every rank of a real step."""
    common = [*settings, "--train.steps=1", "--scheduler=constant", "--validation=[]", "--train.deterministic=false"]
    zygote.train(tiny, *common, ranks=2, before=MEASURE.replace("FOLDER", str(tmp_path))).expect(0)
    sent, held = json.loads((tmp_path / "0.json").read_text(encoding="utf-8"))
    planned = layout(tiny, *common, size=2)
    traffic, memory = planned.traffic(), planned.memory().device
    assert {name: memory[name] for name in held} == held
    # The padding of small parameters aside, which units of FSDP2 add to their buffers.
    assert vars(traffic) == pytest.approx(sent, rel=0.01)


def test_hsdp_and_offload_by_hand(tiny: Path) -> None:
    """Against sums over shapes: 4 devices in groups of 2, blocks gathered twice in each of 2 micro-batches."""
    hsdp = ["--parallel.strategy=hsdp", "--parallel.shards=2", "--train.micro_batch=1"]
    planned = layout(tiny, *hsdp, size=4)
    model = planned.model
    total = sum(parameter.numel() for parameter in model.parameters())
    blocks = sum(parameter.numel() for parameter in model.blocks.parameters())
    half = sum(-(-parameter.shape[0] // 2) * (parameter.numel() // parameter.shape[0]) for parameter in model.parameters())
    traffic = planned.traffic()
    assert traffic.gathers == pytest.approx(2 * (2 * 4 * blocks + 4 * (total - blocks)) / 2, rel=0.01)
    assert (traffic.scatters, traffic.reduces) == (4 * half, 4 * half)
    assert planned.memory().device["gradients"] == 4 * total  # added up whole until the last micro-batch
    offloaded = layout(tiny, *hsdp, "--train.micro_batch=2", "--parallel.cpu_offload=true", size=4).memory()
    assert offloaded.host == {"weights": 4 * half, "moments": 8 * half, "average": 4 * half, "gradients": 4 * half}
    assert offloaded.device == {"gathered": 4 * total}  # of two blocks, all


def test_rows_that_a_probe_has_yet_to_find_are_not_guessed(tiny: Path) -> None:
    """Memory counts as with several micro-batches, traffic as with one, and both say so."""
    common = ["--parallel.strategy=fsdp2"]
    unknown, one, two = (layout(tiny, *common, f"--train.{rows}", size=2) for rows in ("micro_batch_tokens=auto", "micro_batch=4", "micro_batch=2"))
    assert (unknown.accumulation, one.accumulation, two.accumulation) == (None, 1, 2)
    assert unknown.memory() == two.memory() != one.memory()
    assert unknown.traffic() == one.traffic() != two.traffic()
    said = dict(_rows(_Training(config.load(tiny, [*common, "--train.micro_batch_tokens=auto"])), World(size=2, local_size=2), None, None))
    assert said["micro-batches"].endswith('(train.micro_batch_tokens = "auto"): not known here')
    assert said["communication"].startswith("at least ")


# ---------------------------------------------------------------- runs
class Child:
    """Stands in for the stages' processes: notes their commands, by verb and run, makes their outputs, and ends as it is told."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.ends: dict[str, tuple[int, int]] = {}

    def __call__(self, command: list[str], received: list[int], instead: dict[int, int]) -> tuple[int, int]:
        verb = command[command.index("titanlm") + 1]
        run = next((word.partition("=")[2] for word in command if word.startswith("--run.name=")), "")
        self.ran.append(f"{verb} {run}".strip())
        status, interrupted = self.ends.pop(self.ran[-1], (0, 0))
        if not status and verb == "tokenizer":
            Path("out/spm.model").touch()
        if not status and verb == "train":
            Path("out", run or "run").mkdir(exist_ok=True)
        return status, interrupted


@pytest.fixture
def child(two: Path, monkeypatch: pytest.MonkeyPatch) -> Child:
    child = Child()
    monkeypatch.setattr(recipe_run, "run_child", child)
    return child


def again(child: Child, *words: str) -> list[str]:
    """The verbs that a run of the recipe starts."""
    child.ran.clear()
    assert cli.main(["recipe", "run", "two", "--output", "out", *words]) == 0
    return list(child.ran)


def test_only_what_is_not_finished_runs(child: Child, two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert again(child) == ["tokenizer", "train", "eval"]
    assert capsys.readouterr().out.startswith("[1/3] data: titanlm tokenizer train --type spm --vocab-size 300 --output out/spm.model\n[1/3] data: done in 0.")
    assert again(child) == []
    assert again(child, "--from", "train") == ["train", "eval"]
    assert again(child, "--train.steps=5") == ["train", "eval"]  # another command
    capsys.readouterr()
    assert cli.main(["recipe", "run", "two", "--output", "out", "--dry-run"]) == 0
    said = capsys.readouterr().out.splitlines()[::2]
    assert said == ["data: finished", "train: runs, its command changed", "eval: runs, train runs before it"]
    assert again(child) == ["train", "eval"]
    file = two.parent / "configs" / "run.toml"
    file.write_text(f"{MODEL}# a comment changes nothing\n", encoding="utf-8")
    assert again(child) == []
    file.write_text(f"{MODEL}[train]\nsteps = 4\n", encoding="utf-8")
    assert again(child) == ["train", "eval"]
    Path("out/spm.model").unlink()
    assert again(child) == ["tokenizer", "train", "eval"]
    stages = json.loads(Path("out/recipe.json").read_text(encoding="utf-8"))["stages"]
    assert list(stages) == ["data", "train", "eval"]
    assert stages["eval"]["command"] == ["eval", "out/run"]
    assert (stages["data"]["config"], len(stages["train"]["config"])) == ("", 64)


@pytest.mark.parametrize(("status", "interrupted"), [(1, 0), (2, 0), (130, 2), (143, 15)])
def test_a_stage_that_does_not_end_well_ends_the_run(child: Child, status: int, interrupted: int, capsys: pytest.CaptureFixture[str]) -> None:
    again(child)
    child.ends["train"] = (status, interrupted)
    assert cli.main(["recipe", "run", "two", "--output", "out", "--from", "train"]) == status
    assert list(json.loads(Path("out/recipe.json").read_text(encoding="utf-8"))["stages"]) == ["data"]
    said = capsys.readouterr().out
    assert f"[2/3] train: {'interrupted' if interrupted else f'failed with status {status}'} after" in said
    assert ("out/run is of an earlier run; move it away to begin it anew" in said) is not bool(interrupted)
    assert ("the same command goes on here" in said) is bool(interrupted)
    assert again(child) == ["train", "eval"]


def test_each_stage_is_passed_over_by_itself(child: Child, two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two.write_text(EACH, encoding="utf-8")
    child.ends["train seed-8"] = (130, signal.SIGINT)
    assert cli.main(["recipe", "run", "two", "--output", "out"]) == 130
    assert child.ran == ["train seed-7", "train seed-8"]
    assert again(child) == ["train seed-8", "submission", "eval"]
    assert again(child) == []
    Path("out/seed-7").rmdir()  # of the first: the second does not follow from it
    assert again(child, "--dry-run") == []
    said = capsys.readouterr().out.splitlines()[-8::2]
    assert said == ["train-7: runs, out/seed-7 is gone", "train-8: finished", "submission: runs, train-7 runs before it", "eval: runs, train-7 runs before it"]
    child.ends["train seed-7"] = (1, 0)
    assert cli.main(["recipe", "run", "two", "--output", "out"]) == 1
    assert list(json.loads(Path("out/recipe.json").read_text(encoding="utf-8"))["stages"]) == ["train-8"]
    assert again(child) == ["train seed-7", "submission", "eval"]
    assert again(child, "--from", "train-8") == ["train seed-8", "submission", "eval"]
    assert again(child, "--from", "train") == ["train seed-7", "train seed-8", "submission", "eval"]
    two.write_text(EACH.replace("[7, 8]", "[9, 7, 8]"), encoding="utf-8")
    assert again(child) == ["train seed-9", "submission", "eval"]
    capsys.readouterr()
    assert cli.main(["recipe", "run", "two", "--output", "out", "--from", "train-5"]) == 2
    assert "(stages: train, train-9, train-7, train-8, submission, eval)" in capsys.readouterr().err


def test_a_signal_that_a_stage_did_not_heed_ends_the_run_after_it(child: Child) -> None:
    child.ends["tokenizer"] = (0, signal.SIGTERM)
    assert cli.main(["recipe", "run", "two", "--output", "out"]) == 143
    assert again(child) == ["train", "eval"]


def test_processes_that_cannot_share_the_work_are_refused_before_anything_runs(child: Child, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipe", "run", "two", "--output", "out", "--nproc", "3"]) == 2
    assert "parallel.strategy: 'none' trains with one process and there are 3" in capsys.readouterr().err
    assert child.ran == []


@pytest.mark.parametrize("word", ["--run.name=y", "--run.dir=elsewhere"])
def test_stages_write_where_the_recipe_says(child: Child, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipe", "run", "two", "--output", "out", word]) == 2
    assert "--output DIR moves all of them" in capsys.readouterr().err


def test_a_signal_that_torchrun_does_not_hand_on_is_another_for_it() -> None:
    """A child that ends with the number of the signal it got."""
    script = "import signal, sys, time\nfor n in (10, 15): signal.signal(n, lambda number, frame: sys.exit(number))\nprint(1, flush=True)\ntime.sleep(60)"
    for instead, status in (({}, signal.SIGUSR1), ({signal.SIGUSR1: signal.SIGTERM}, signal.SIGTERM)):
        received: list[int] = []
        threading.Timer(1.0, received.append, [signal.SIGUSR1]).start()
        assert run_child([sys.executable, "-c", script], received, instead) == (status, signal.SIGUSR1)


def test_an_output_that_a_stage_does_not_make(child: Child, two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two.write_text(TWO.replace('output = "{out}/run"', 'output = "{out}/rum"'), encoding="utf-8")
    assert cli.main(["recipe", "run", "two", "--output", "out"]) == 2
    assert "stage 'train' ended well, but its output out/rum is not there" in capsys.readouterr().err
    assert list(json.loads(Path("out/recipe.json").read_text(encoding="utf-8"))["stages"]) == ["data"]


def test_what_is_wrong_is_said_before_anything_runs(child: Child, two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, text in (
        (["--from", "trian"], "--from trian: no such stage at scale small; did you mean 'train'? (stages: data, train, eval)"),
        (["--train.stepps=3"], "stage 'train': --train.stepps: train.stepps: unknown key"),
        (["--scale", "huge"], "--scale huge: recipes/two/recipe.toml has no such scale"),
    ):
        assert cli.main(["recipe", "run", "two", "--output", "out", *words]) == 2
        assert text in capsys.readouterr().err
    assert child.ran == []
    assert not Path("out").exists()


def test_a_folder_belongs_to_one_run_of_one_scale(child: Child, capsys: pytest.CaptureFixture[str]) -> None:
    again(child)
    lock = Lock(Path("out/.recipe.lock"))
    assert cli.main(["recipe", "run", "two", "--output", "out"]) == 2
    assert "wait for it or choose another --output" in capsys.readouterr().err
    lock.release()
    assert cli.main(["recipe", "run", "two", "--output", "out", "--scale", "large"]) == 2
    assert "out: holds recipe two at scale small; choose another --output" in capsys.readouterr().err
    Path("out/recipe.json").write_text("{", encoding="utf-8")
    assert cli.main(["recipe", "run", "two", "--output", "out"]) == 2
    assert "out/recipe.json: cannot be read" in capsys.readouterr().err
    assert child.ran == ["tokenizer", "train", "eval"]


REAL = """
description = "tokenizer, shards, training, score"
scales = ["small"]
[[stage]]
name = "tokenizer"
run = ["tokenizer", "train", "--type", "spm", "--vocab-size", "330", "--input", "corpus.txt", "--output", "{out}/spm.model", "--force"]
output = "{out}/spm.model"
[[stage]]
name = "data"
run = ["data", "prepare", "--input", "corpus.txt", "--tokenizer", "{tokenizer.output}", "--output", "{out}/shards", "--workers", "0"]
output = "{out}/shards"
[[stage]]
name = "train"
config = "tiny.toml"
run = ["train", "{config}", "--run.dir={out}", "--run.name=run"]
overrides = ["--tokenizer={name = 'sentencepiece', path = '{tokenizer.output}'}", "--dataset={name = 'token_shards', paths = ['{data.output}']}"]
output = "{out}/run"
[[stage]]
name = "eval"
run = ["eval", "{train.output}", "--json"]
"""


@pytest.mark.slow
def test_a_recipe_is_interrupted_and_goes_on(tiny: Path, tmp_path: Path) -> None:
    """For real: every stage a process, the signal that Ctrl-C sends, and the same losses as a run that was left alone."""
    (tmp_path / "recipe.toml").write_text(REAL, encoding="utf-8")
    split = ["--validation.0.split=train", "--train.steps=60", "--checkpoint.every=20"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def command(*words: str) -> list[str]:
        return [sys.executable, "-m", "titanlm", "recipe", "run", "recipe.toml", *split, *words]

    def losses(out: str) -> list[float]:
        rows = [json.loads(line) for line in (tmp_path / out / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        return [row["loss"] for row in rows if "loss" in row]

    first = subprocess.Popen(command("--output", "out"), cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "out" / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text(encoding="utf-8").count("\n") > 5):
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 130
    assert "[3/4] train: interrupted after" in said
    assert list(json.loads((tmp_path / "out" / "recipe.json").read_text(encoding="utf-8"))["stages"]) == ["tokenizer", "data"]
    assert 5 < len(losses("out")) < 60

    done = subprocess.run(command("--output", "out"), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "[1/4] tokenizer: finished before\n[2/4] data: finished before\n[3/4] train: titanlm train tiny.toml" in done.stdout
    straight = subprocess.run(command("--output", "straight"), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert straight.returncode == 0, straight.stderr
    assert losses("out") == losses("straight")
    scores = [json.loads(line)["validation"] for text in (done.stdout, straight.stdout) for line in text.splitlines() if line.startswith('{"target"')]
    assert scores[0] == scores[1]


@pytest.mark.slow
@pytest.mark.distributed
def test_train_stages_run_on_several_processes(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        'scales = ["small"]\n[[stage]]\nname = "train"\nconfig = "tiny.toml"\nrun = ["train", "{config}", "--run.dir={out}"]\noutput = "{out}/tiny"\n',
        encoding="utf-8",
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["recipe", "run", "recipe.toml", "--output", "out", "--nproc", "2", "--parallel.strategy=replicate", "--train.steps=3"]
    done = subprocess.run([sys.executable, "-m", "titanlm", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out" / "tiny" / "checkpoints" / "step-00000003").iterdir()} >= {"own-00000.safetensors", "own-00001.safetensors"}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_golf_recipe_ends_in_a_submission_that_verifies_at_scale_smoke(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As shipped: tokenizer, shards, two seeds, a folder under its limit that is scored again by its own script."""
    out = tmp_path / "golf"
    command = ["recipe", "run", str(ROOT / "recipes" / "golf"), "--scale", "smoke", "--output", str(out)]
    assert cli.main(command) == 0
    said = capfd.readouterr().out
    assert " 0 failed" in said
    assert "re-score: without titanlm, network and training data" in said
    folder = out / "submission"
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "loss.png", "model.titanlm", "requirements.txt", "submission.json", "train_gpt.py", "train_seed1337.log", "train_seed42.log",
    }  # fmt: skip
    limit = config.load(ROOT / "train_configs" / "golf" / "smoke.toml").export.max_bytes
    assert limit is not None
    assert (folder / "train_gpt.py").stat().st_size + (folder / "model.titanlm").stat().st_size <= limit
    document = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
    assert document["seeds"] == [1337, 42]
    assert document["val_bpb"] < 2.6
    assert document["val_bpb_std"] > 0
    for seed in (1337, 42):  # what each run logged itself
        assert f"seed:{seed}" in (out / f"train-{seed}" / f"train_seed{seed}.log").read_text(encoding="utf-8").splitlines()
        assert "made of metrics.jsonl" not in (folder / f"train_seed{seed}.log").read_text(encoding="utf-8")
    assert cli.main(command) == 0
    assert capfd.readouterr().out.count("finished before") == 8
