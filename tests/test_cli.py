"""The command line and the static listing behind ``list`` and ``describe``."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli

from titanlm import cli, config, registry
from titanlm.describe import describe, listing
from titanlm.errors import ConfigError, TitanError
from titanlm.registry import KINDS, known

ROOT = Path(__file__).parent.parent
BUILT_IN = [(kind, name) for kind in KINDS for name, origin in known(kind).items() if origin.source == "built-in"]


def run(*words: str, code: str | None = None, **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code] if code is not None else [sys.executable, "-m", "titanlm"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run([*command, *words], capture_output=True, text=True, env=environment, timeout=120, check=False, **settings)


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Stand-ins for the modules that verbs call, and a working directory."""
    monkeypatch.chdir(tmp_path)
    calls: list[tuple[Any, ...]] = []

    def stand_in(module: str, **functions: Any) -> None:
        monkeypatch.setitem(sys.modules, f"titanlm.{module}", SimpleNamespace(**functions))

    monkeypatch.setattr(config, "load", lambda file, overrides=(): calls.append((str(file), list(overrides))) or f"config of {file}")
    return SimpleNamespace(calls=calls, stand_in=stand_in)


def refuse(*_: Any, **__: Any) -> Any:
    raise ConfigError(["train.steps: no", "model: no"], "run.toml")


# ---------------------------------------------------------------- weight
@pytest.mark.parametrize(
    "words",
    [["--help"], ["train", "--help"], ["list"], ["describe", *BUILT_IN[0]], ["list", "optimizer"], ["recipe", "list"], ["recipe", "run", "--help"]],
    ids=" ".join,
)
def test_light_verbs_import_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from titanlm.cli import main; status = main(sys.argv[1:])\n"
        "heavy = {'torch', 'pydantic', 'numpy', 'sentencepiece', 'wandb'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = run(*words, code=code)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


# ---------------------------------------------------------------- parsing
def leaves(parser: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not parser.verbs:
        yield words, parser
    for name, verb in parser.verbs.items():
        yield from leaves(verb, (*words, name))


def test_every_verb_shows_an_example_that_parses(capsys: pytest.CaptureFixture[str]) -> None:
    seen = set()
    for words, parser in leaves(cli._build_parser()):
        assert cli.main([*words, "--help"]) == 0
        example = capsys.readouterr().out.partition("example:\n  titanlm ")[2].partition("\n")[0].partition(" >")[0]
        assert example.startswith(" ".join(words))
        args = cli._parse(shlex.split(example))
        assert args.run is parser.get_default("run")
        seen.add(words[0])
    assert seen >= {"train", "eval", "export", "generate", "list", "describe", "config", "tokenizer", "recipe", "env"}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["trian"], "no verb 'trian'; did you mean 'train'? (verbs: train, eval, export, "),
        (["config", "chek"], "no verb 'chek'; did you mean 'check'? (verbs: check, show, diff, schema)"),
        (["frobnicate"], "no verb 'frobnicate' (verbs: "),
        ([], "the following arguments are required: VERB"),
        (["train"], "the following arguments are required: FILE"),
        (["train", "a.toml", "--dryrun"], "no option '--dryrun'; did you mean '--dry-run'?"),
        (["train", "a.toml", "--train.steps", "3"], "no option '--train.steps'; an override is written --section.key=value, in one word"),
        (["train", "a.toml", "b.toml"], "unexpected argument 'b.toml'"),
        (["list", "--model.n_layers=3"], "no option '--model.n_layers=3'"),
        (["eval", "x", "--device=tpu"], "argument --device: invalid choice: 'tpu'"),
        (["eval", "x", "--raw", "--averaged"], "not allowed with argument"),
        (["tokenizer", "train", "--type", "spm"], "the following arguments are required: --vocab-size, --output"),
    ],
)
def test_wrong_words(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert text in capsys.readouterr().err


def test_overrides_are_told_from_options() -> None:
    args = cli._parse(["train", "--run.name=two words", "--optimizer=adamw", "a.toml", "--dry-run", "--model.x=a\nb"])
    assert (args.file, args.dry_run, args.overrides) == (Path("a.toml"), True, ["--run.name=two words", "--optimizer=adamw", "--model.x=a\nb"])
    args = cli._parse(["eval", "runs/a", "--device=cpu", "--import=a.b", "--import", "c", "--validation.0.max_tokens=3", "--raw"])
    assert (args.device, args.imports, args.averaged, args.overrides) == ("cpu", ["a.b", "c"], False, ["--validation.0.max_tokens=3"])
    args = cli._parse(["tokenizer", "train", "--type=spm", "--vocab-size=300", "--output=x", "--config=a.toml", "--dataset.name=text"])
    assert (args.config, args.overrides) == (Path("a.toml"), ["--dataset.name=text"])
    args = cli._parse(["config", "check", "a.toml", "--train.steps=3", "b.toml"])
    assert (args.files, args.overrides) == ([Path("a.toml"), Path("b.toml")], ["--train.steps=3"])


# ---------------------------------------------------------------- endings
def test_a_users_mistake_is_printed_in_one_piece(modules: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(config, "load", refuse)
    assert cli.main(["train", "run.toml"]) == 2
    assert capsys.readouterr() == ("", "run.toml: 2 errors\n  train.steps: no\n  model: no\n")


def test_a_mistake_leaves_no_traceback_in_a_real_process(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('model = "decodr"\noptimizer = "adamw"\n[train]\nsteps = "3"\n')
    done = run("config", "show", "run.toml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("run.toml: 2 errors\n  run.toml:1: model.name: no model named 'decodr'; did you mean 'decoder'?")
    assert "Traceback" not in done.stderr


def test_interrupts_and_bugs(modules: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: Any) -> int:
        raise KeyboardInterrupt

    modules.stand_in("train", train=interrupt, dry_run=lambda _: 1 / 0)
    assert cli.main(["train", "run.toml"]) == 130
    assert capsys.readouterr().err == ""
    with pytest.raises(ZeroDivisionError):  # ours to mend, so it keeps its traceback
        cli.main(["train", "run.toml", "--dry-run"])


def test_a_closed_pipe_is_quiet() -> None:
    code = "import os, sys; from titanlm.cli import main; r, w = os.pipe(); os.close(r); os.dup2(w, 1); sys.exit(main(['list']))"
    done = run(code=code)
    assert (done.returncode, done.stderr) == (141, "")


# ---------------------------------------------------------------- verbs
def test_train(modules: Any, capsys: pytest.CaptureFixture[str]) -> None:
    modules.stand_in("train", train=lambda config: 7, dry_run=lambda config: f"dry {config}")
    assert cli.main(["train", "a.toml", "--train.steps=3"]) == 7
    assert cli.main(["train", "a.toml", "--dry-run"]) == 0
    assert modules.calls == [("a.toml", ["--train.steps=3"]), ("a.toml", [])]
    assert capsys.readouterr().out == "dry config of a.toml\n"


def test_eval_export_and_generate_hand_over_their_options(modules: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from titanlm import evaluate, export, generate  # the real signatures, so that neither side drifts

    seen = {}

    def recorder(name: str, real: Any, result: Any) -> Any:
        def record(*positional: Any, **named: Any) -> Any:
            seen[name] = inspect.signature(real).bind(*positional, **named).arguments
            return result

        return record

    pairs = [("evaluate", evaluate.evaluate_target), ("export", export.export_run), ("generate", generate.generate_text)]
    for (name, real), result in zip(pairs, ["scores", "written", iter(["a", "bc"])], strict=True):
        modules.stand_in(name, **{real.__name__: recorder(name, real, result)})
    modules.stand_in("exported", describe=str, as_json=str)
    assert cli.main(["eval", "runs/a", "--averaged", "--json", "--import", "m", "--train.seq_len=3"]) == 0
    assert cli.main(["export", "runs/a", "--step=5", "--output=x.titanlm", "--device", "cpu", "--export.max_bytes=9"]) == 0
    assert cli.main(["generate", "runs/a", "--prompt", "p: ", "--top-k=4", "--seed=1"]) == 0
    assert capsys.readouterr().out == "scores\nwritten\np: abc\n"
    assert seen["evaluate"]["overrides"] == ["--train.seq_len=3"]
    assert (seen["evaluate"]["averaged"], seen["evaluate"]["as_json"], seen["evaluate"]["imports"]) == (True, True, ["m"])
    assert (seen["export"]["step"], seen["export"]["output"], seen["export"]["device"]) == (5, Path("x.titanlm"), "cpu")
    assert (seen["generate"]["prompt"], seen["generate"]["top_k"], seen["generate"]["top_p"], seen["generate"]["max_tokens"]) == ("p: ", 4, None, 200)


def test_config_check_reports_every_file(modules: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    reports = {
        "good.toml": SimpleNamespace(problems=[], warnings=["lr is low"], summary="parameters 3\nmemory 4"),
        "bad.toml": SimpleNamespace(problems=["model.n_heads: does not divide"], warnings=[], summary=""),
    }
    monkeypatch.setattr(config, "load", lambda file, overrides: refuse() if file.name == "worse.toml" else file.name)
    modules.stand_in("check", check=lambda config: reports[config])
    assert cli.main(["config", "check", "good.toml"]) == 0
    assert capsys.readouterr().out == "good.toml: ok\n  parameters 3\n  memory 4\n  warning: lr is low\n"
    assert cli.main(["config", "check", "worse.toml", "bad.toml", "good.toml"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("run.toml: 2 errors\n  train.steps: no\n  model: no\nbad.toml: 1 error\n  model.n_heads: does not divide\ngood.toml: ok\n")


SMALL = 'model = {name = "decoder", n_layers = 1, d_model = 16, n_heads = 2}\noptimizer = "adamw"\n'


def test_config_show_and_diff_on_real_components(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text(SMALL)
    assert cli.main(["config", "show", "a.toml", "--train.steps=5"]) == 0
    shown = capsys.readouterr().out
    assert config.loads(shown) == config.load("a.toml", ["--train.steps=5"])
    Path("b.toml").write_text(shown)
    assert cli.main(["config", "diff", "a.toml", "b.toml"]) == 1
    assert capsys.readouterr().out == "train.steps: 1000 → 5\n"
    assert cli.main(["config", "diff", "a.toml", "a.toml"]) == 0
    assert capsys.readouterr().out == ""


def test_env_fails_when_something_is_missing(modules: Any, capsys: pytest.CaptureFixture[str]) -> None:
    missing: list[str] = []
    modules.stand_in("environment", report=dict, format_report=lambda report: f"report {report}", requirements=lambda config: missing)
    assert cli.main(["env"]) == 0
    assert cli.main(["env", "a.toml"]) == 0
    missing.append("wandb: not installed")
    assert cli.main(["env", "a.toml"]) == 1
    assert capsys.readouterr().out.endswith("a.toml: wandb: not installed\n")


def test_tokenizer_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("".join(f"the quick brown fox number {i} jumps over {i * 7} lazy dogs\n" for i in range(300)))
    command = ["tokenizer", "train", "--type", "spm", "--vocab-size", "320", "--output", "spm.model"]
    assert cli.main([*command, "--input", "text.txt"]) == 0
    assert capsys.readouterr().out.startswith("spm.model: 320 pieces from 1 texts, ")
    first = Path("spm.model").read_bytes()

    assert cli.main([*command, "--input", "text.txt"]) == 2
    assert capsys.readouterr().err == "spm.model: exists; --force overwrites it\n"
    assert cli.main([*command, "--dataset.name=text"]) == 2  # nothing to override
    assert cli.main([*command, "--force", "--dataset.name=text"]) == 2
    assert "overrides change the config of --config FILE" in capsys.readouterr().err
    assert cli.main([*command, "--force", "--input", "nowhere.txt"]) == 2
    assert "nowhere.txt" in capsys.readouterr().err
    assert Path("spm.model").read_bytes() == first

    # The config may already name the tokenizer that is yet to be made.
    slots = 'tokenizer = {name = "sentencepiece", path = "spm2.model"}\ndataset = {name = "text", paths = ["other.txt"]}\n'
    Path("run.toml").write_text(SMALL + slots)
    command[-1] = "spm2.model"
    assert cli.main([*command, "--config", "run.toml", '--dataset.paths=["text.txt"]']) == 0
    assert Path("spm2.model").read_bytes() == first


# ---------------------------------------------------------------- list and describe
def test_list_names_every_component_with_a_line() -> None:
    text = listing()
    for kind, name in BUILT_IN:
        (line,) = [line for line in listing(kind).splitlines() if line.split()[:1] == [name]]
        assert len(line.split()) > 2, f"{kind} {name} has no docstring"
        assert line in text
    assert listing("adapter").startswith("adapter: ")
    with pytest.raises(TitanError, match="no kind 'optimizers'; did you mean 'optimizer'"):
        listing("optimizers")


def pasted(text: str) -> dict[str, Any]:
    """The TOML part of a description."""
    return tomli.loads(text[text.index("\n[") + 1 :])


@pytest.mark.parametrize(("kind", "name"), BUILT_IN)
def test_the_settings_of_every_built_in_component_can_be_pasted(kind: str, name: str) -> None:
    text = describe(kind, name)
    tables = pasted(text)
    assert f"{KINDS[kind].folder}/{name}.py:" in text
    around = {"exporter": "export", "filter": "dataset"}
    slot = tables[around[kind]][kind] if kind in around else tables[kind]
    slot = slot[0] if isinstance(slot, list) else slot
    assert slot["name"] == name
    # What was read from the source is what Python has: all settings are there, with the defaults they have.
    settings = registry.lookup(kind, name).settings
    for field in dataclasses.fields(settings):
        if dataclasses.is_dataclass(field.default_factory):  # a table of its own, its settings one by one
            assert all(f"{field.name}.{inner.name} = " in text for inner in dataclasses.fields(field.default_factory))
            continue
        assert f"\n{field.name} = " in text or f"\n# {field.name} = <" in text
        if field.default is dataclasses.MISSING:
            continue
        assert slot.get(field.name) == config.to_tables(field.default)


OUTSIDE = '''\
"""Lion, from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from titanlm.constraints import PositiveFloat
from titanlm.registry import Component, Slot, register

SIZE = 1 << 4
Mode = Literal["a", "b\\""]


@dataclass(frozen=True)
class Common:
    lr: PositiveFloat = 1e-4
    """Peak,
    of the schedule."""
    size: int = SIZE * 2


@dataclass(frozen=True)
class LionConfig(Common):
    needed: tuple[str, ...] = field(kw_only=True)
    params: tuple[str, ...] = ("*",)
    mode: Mode = "b\\""
    kinds: ClassVar[int] = 3
    size: int = -1
    maybe: int | None = None
    scales: dict[str, float] = field(default_factory=dict)
    packer: Annotated[Component, Slot("packer")] = field(default_factory=lambda: Component.named("packer", "concat", size=2))
    odd: float = float("0.5")


@register("optimizer", "lion")
def lion(config: LionConfig, *, named_params):
    """Sign-momentum (Chen et al., 2023).

    More.
    """
'''


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "outside_cli_lion.py").write_text(OUTSIDE)
    yield "outside_cli_lion"
    sys.modules.pop("outside_cli_lion", None)
    registry._entries.pop(("optimizer", "lion"), None)


def test_an_outside_component_is_listed_and_described(outside: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["describe", "optimizer", "lion"]) == 2
    assert "no optimizer named 'lion'" in capsys.readouterr().err
    assert cli.main(["list", "optimizer", "--import", outside]) == 0
    assert "Sign-momentum (Chen et al., 2023). [" in capsys.readouterr().out
    assert cli.main(["describe", "optimizer", "lion", "--import", outside]) == 0
    text = capsys.readouterr().out
    assert text.startswith("optimizer lion\n")
    assert f"{outside}.py:" in text
    assert "Lion, from elsewhere.\n\nSign-momentum (Chen et al., 2023).\n\nMore.\n\n[[optimizer]]\n" in text
    assert "lr = 0.0001  # number > 0: Peak, of the schedule.\n" in text
    assert "# needed = <[string, ...], required>\n" in text
    assert "# maybe = <integer, optional>\n" in text
    assert "# odd = <number, optional>\n" in text
    assert 'mode = "b\\""  # "a" | "b\\""\n' in text
    assert pasted(text) == {
        "optimizer": [{"name": "lion", "lr": 1e-4, "params": ["*"], "mode": 'b"', "size": -1, "scales": {}, "packer": {"name": "concat", "size": 2}}]
    }
    assert cli.main(["list", "--import", "outside_nowhere"]) == 2
    assert "no module named 'outside_nowhere'" in capsys.readouterr().err


def test_entry_points_are_listed_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    info = tmp_path / "outside_points-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-points\nVersion: 1\n")
    taken = next(name for kind, name in BUILT_IN if kind == "optimizer")
    (info / "entry_points.txt").write_text(f"[titanlm.optimizer]\nlion_ep = outside_nowhere.lion\n{taken} = outside_nowhere.thief\n")
    lines = [" ".join(line.split()) for line in listing("optimizer").splitlines()]
    assert "lion_ep entry point outside_nowhere.lion (outside-points)" in lines
    assert any(line.startswith(f"{taken} entry point outside_nowhere.thief (outside-points), not used: the name is taken by ") for line in lines)


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "titanlm config"
