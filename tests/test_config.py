"""The config layer on fake components: no torch, no built-in component."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import tomli

from titanlm import registry
from titanlm.config import DEFAULTS, MAX_PROBLEMS, RunConfig, diff, dump, flatten, load, loads
from titanlm.config_sources import MAX_FILE_BYTES, MAX_KEY_PARTS, parse
from titanlm.constraints import Decay, PositiveFloat, PositiveInt
from titanlm.errors import ConfigError, TitanError
from titanlm.registry import Component, Slot, register

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(
    path
    for path in [*ROOT.glob("train_configs/**/*.toml"), *ROOT.glob("recipes/**/*.toml")]
    if not (path.parent / "pyproject.toml").exists()  # a package of its own: tested where it is installed
    and {"model", "extends", "optimizer"} & tomli.loads(path.read_text()).keys()  # a config, not a recipe
)


@dataclass(frozen=True)
class PlainConfig:
    size: int = 1


@dataclass(frozen=True)
class RopeConfig:
    theta: float = 1e4


@dataclass(frozen=True)
class ToyConfig:
    n_layers: PositiveInt = 2
    attention: Literal["full", "local"] = "full"
    tie: bool = True
    label: str = ""
    width: int | None = None
    scales: dict[str, float] = field(default_factory=dict)
    rope: RopeConfig = field(default_factory=RopeConfig)
    inner: Annotated[Component, Slot("packer")] = field(default_factory=lambda: Component.named("packer", "toy_packer"))
    filters: tuple[Annotated[Component, Slot("filter")], ...] = ()

    def __post_init__(self) -> None:
        problems = []
        if self.n_layers == 13:
            problems.append("n_layers: 13 is refused")
        if self.label == "bad":
            problems.append("label: 'bad' is refused")
        if self.n_layers == 99 and self.tie:
            problems.append("tie and n_layers = 99 exclude each other")
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(frozen=True)
class OtherConfig:
    depth: int = 1


@dataclass(frozen=True)
class StepperConfig:
    lr: PositiveFloat
    params: tuple[str, ...] = ("*",)
    betas: tuple[Decay, Decay] = (0.9, 0.95)


@dataclass(frozen=True)
class ToyLossConfig:
    chunk_tokens: int = 1


def toy(config: ToyConfig, *, vocab_size: int) -> None: ...
def other(config: OtherConfig) -> None: ...
def stepper(config: StepperConfig, *, named_params: Any) -> None: ...
def toy_loss(config: ToyLossConfig) -> None: ...
def toy_tokenizer(config: PlainConfig) -> None: ...
def toy_dataset(config: PlainConfig, *, split: str) -> None: ...
def toy_packer(config: PlainConfig) -> None: ...
def toy_filter(config: PlainConfig) -> None: ...
def toy_scheduler(config: PlainConfig) -> None: ...
def toy_exporter(config: PlainConfig) -> None: ...
def toy_logger(config: PlainConfig) -> None: ...


HEAD = """\
tokenizer = "toy_tokenizer"
dataset = "toy_dataset"
packer = "toy_packer"
scheduler = "toy_scheduler"
loss = "toy_loss"
logger = "toy_logger"
export.exporter = "toy_exporter"
"""
GOOD = HEAD + 'model = "toy"\noptimizer = {name = "stepper", lr = 1}\n'
AFTER_HEAD = HEAD.count("\n") + 1


@pytest.fixture(autouse=True)
def components() -> Iterator[None]:
    before = set(registry._entries)
    for kind in ("tokenizer", "dataset", "packer", "filter", "scheduler", "exporter", "logger", "loss"):
        register(kind, f"toy_{kind}")(globals()[f"toy_{kind}"])
    register("model", "toy")(toy)
    register("model", "other")(other)
    register("optimizer", "stepper")(stepper)
    yield
    for key in set(registry._entries) - before:
        if not registry._entries[key].factory.__module__.startswith("titanlm."):
            del registry._entries[key]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write files into the working directory; the first is the config."""
    monkeypatch.chdir(tmp_path)

    def write_files(text: str = GOOD, **others: str) -> Path:
        for name, content in {"run": text, **others}.items():
            Path(f"{name}.toml").write_text(content)
        return Path("run.toml")

    return write_files


def problems_of(path: Path | str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert str(caught.value).count("\n") == len(caught.value.problems)
    return caught.value.problems


# ---------------------------------------------------------------- decoding
def test_a_config_is_typed_and_frozen(write: Any) -> None:
    config = load(write())
    assert config.model == Component("model", "toy", ToyConfig())
    assert config.optimizer == (Component("optimizer", "stepper", StepperConfig(lr=1.0)),)
    assert type(config.optimizer[0].config.lr) is float  # the one conversion
    assert config.run.name == "run"
    with pytest.raises(AttributeError):
        config.train.steps = 3  # type: ignore[misc]
    assert replace(config, train=replace(config.train, steps=3)).train.steps == 3


def test_every_mistake_is_reported_at_once_with_its_line(write: Any) -> None:
    path = write(
        HEAD
        + 'trian = 1\noptimizer = "stepper"\n[model]\nname = "toy"\natention = "full"\nn_layers = 12.5\n'
        + 'attention = "locl"\ntie = 1\nlabel = 3\n[train]\nsteps = "12"\nmicro_batch = true\nclip = nan\nlog_every = 0\nseq_len = 1.0\n'
    )
    line = AFTER_HEAD
    expected = {
        f"run.toml:{line}: trian: unknown key; did you mean 'train'?",
        f"run.toml:{line + 1}: optimizer.0.lr: missing; it has no default",
        f"run.toml:{line + 4}: model.atention: unknown key of model 'toy'; did you mean 'attention'?",
        f"run.toml:{line + 5}: model.n_layers: expected an integer, got float 12.5",
        f"run.toml:{line + 6}: model.attention: expected 'full' or 'local', got str 'locl'; did you mean 'local'?",
        f"run.toml:{line + 7}: model.tie: expected true or false, got int 1",
        f"run.toml:{line + 8}: model.label: expected a string, got int 3",
        f"run.toml:{line + 10}: train.steps: expected an integer, got str '12'",
        f"run.toml:{line + 11}: train.micro_batch: expected an integer, got bool True",
        f"run.toml:{line + 12}: train.clip: expected a finite number, got float nan",
        f"run.toml:{line + 13}: train.log_every: expected a number greater than 0, got int 0",
        f"run.toml:{line + 14}: train.seq_len: expected an integer, got float 1.0",
    }
    assert {problem.partition(" (keys")[0] for problem in problems_of(path)} == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('model = "tooy"', "model.name: no model named 'tooy'; did you mean 'toy'? (known: "),
        ("model = 3", "model: expected the name of a model or a table, got int 3"),
        ("model = []", "model: expected the name of a model or a table, got list []"),
        ("model = {n_layers = 3}", "model: which model? give it a `name` (known: "),
        ("model = {name = 3}", "model: which model? give it a `name` (known: "),
        ('model = {name = "toy", inner = "toy_paker"}', "model.inner.name: no packer named 'toy_paker'; did you mean 'toy_packer'?"),
        ('model = {name = "toy", inner = {name = "toy_packer", siz = 1}}', "model.inner.siz: unknown key of packer 'toy_packer'; did you"),
        ('model = {name = "toy", filters = ["toy_filter", {name = "toy_filter", sze = 1}]}', "model.filters.1.sze: unknown key of filter "),
        ('model = {name = "toy", rope = {thta = 1}}', "model.rope.thta: unknown key; did you mean 'theta'?"),
        ('model = {name = "toy", rope = {theta = "1"}}', "model.rope.theta: expected a number, got str '1'"),
        ('model = {name = "toy", scales = {a = "x"}}', "model.scales.a: expected a number, got str 'x'"),
        ('model = {name = "toy", n_layers = 13}', "model.n_layers: 13 is refused"),
        ('model = {name = "toy", n_layers = 99}', "model: tie and n_layers = 99 exclude each other"),
        ('model = {name = "toy", n_layers = -1}', "model.n_layers: expected a number greater than 0, got int -1"),
        ('model = {name = "toy", width = 1979-05-27}', "model.width: a date has no place in a config"),
        ('model = {name = "toy", width = 9223372036854775808}', "model.width: an integer of a config has at most 64 bits"),
    ],
)
def test_slots(write: Any, text: str, problem: str) -> None:
    (found,) = problems_of(write(HEAD + text + '\noptimizer = {name = "stepper", lr = 1}\n'))
    assert found.startswith(f"run.toml:{AFTER_HEAD}: {problem}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[train]\nclip = inf", "train.clip: expected a finite number, got float inf"),
        ("[train]\nclip = -1", "train.clip: expected a number greater than or equal to 0, got int -1"),
        ("[train]\nsteps = 0", "train.steps: expected a number greater than 0, got int 0"),
        ("[train]\nsteps = 12:30:00", "train.steps: a time has no place in a config"),
        ("[train]\nsteps = [1]", "train.steps: expected an integer, got list [1]"),
        ("[train]\nsteps = {a = 1}", "train.steps: expected an integer, got dict {'a': 1}"),
        ('[train]\nprecision = ""', "train.precision: expected 'fp32' or 'bf16', got str ''"),
        ("train = 3", "train: expected a table, got int 3"),
        ("[[train]]\nsteps = 3", "train: expected a table, got list "),
        ('imports = "my_pkg"', "imports: expected a list, got str 'my_pkg'"),
        ("[checkpoint]\nevry = 3", "checkpoint.evry: unknown key; did you mean 'every'?"),
        ('optimizer = {name = "stepper", lr = 1, betas = [0.9]}', "optimizer.0.betas: too short: item 1 is missing"),
        ('optimizer = {name = "stepper", lr = 1, betas = [0.9, 0.9, 0.9]}', "optimizer.0.betas: expected 2 items, got 3"),
        ('optimizer = {name = "stepper", lr = 1, betas = [0.9, 1]}', "optimizer.0.betas.1: expected a number less than 1, got int 1"),
        ('optimizer = {name = "stepper", lr = 1, params = "*"}', "optimizer.0.params: expected a list, got str '*'"),
    ],
)
def test_sections_and_lists(write: Any, text: str, problem: str) -> None:
    rest = 'model = "toy"\n' + ("" if text.startswith("optimizer") else 'optimizer = {name = "stepper", lr = 1}\n')
    (found,) = problems_of(write(HEAD + rest + text + "\n"))
    assert problem in found
    assert found.startswith("run.toml:")


def test_a_slot_that_has_a_default_may_leave_out_its_name(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEFAULTS, "packer", "toy_packer")
    path = write(GOOD.replace('packer = "toy_packer"\n', ""))
    assert load(path).packer == Component.named("packer", "toy_packer")
    assert load(path, ["--packer.size=3"]).packer == Component.named("packer", "toy_packer", size=3)
    assert load(write(GOOD.replace('packer = "toy_packer"', "packer = {size = 4}"))).packer.config.size == 4


def test_required_slots(write: Any) -> None:
    assert problems_of(write(HEAD)) == ["model: missing; it has no default", "optimizer: missing; it has no default"]


def test_a_date_hides_no_other_mistake(write: Any) -> None:
    problems = problems_of(write(GOOD + "[train]\nsteps = 1979-05-27\nclip = -1\n"))
    assert [problem.split(": ")[1] for problem in problems] == ["train.steps", "train.clip"]


def test_list_shorthands(write: Any) -> None:
    item = Component("optimizer", "stepper", StepperConfig(lr=1.0))
    for text in ('optimizer = {name = "stepper", lr = 1}', '[optimizer]\nname = "stepper"\nlr = 1', '[[optimizer]]\nname = "stepper"\nlr = 1'):
        assert load(write(HEAD + 'model = "toy"\n' + text)).optimizer == (item,)
    text = 'logger = ["toy_logger", {name = "toy_logger", size = 2}]\n'
    assert [logger.config.size for logger in load(write(GOOD.replace('logger = "toy_logger"\n', text))).logger] == [1, 2]
    assert load(write(GOOD + "validation = []\n")).validation == ()


# ---------------------------------------------------------------- lines
def test_lines_of_every_way_to_write_a_key() -> None:
    text = '''\
# a = 1
a = """
b = 1 \\""" [x] {
""" # c = 1
d = [ # [e]
  1, "]", [2],
  { f = 1, "g.h" = { i = \'\'\'
j = 1\'\'\'}, k = 2 }, { f = 3 }]
l . m = 1
"n".'o'."p\\u0071" = "#"
[q]
r = \'\'\'\'quoted\'\'\'\'
s = """"quoted\\\\"""""
[q.t]
u = {}
[[v]]
w = 1
[[v]]
[[v.x]]
y = 1
[[v.x]]
y = 2
[v.x.z]
aa = 1
[[v]]
ab = 1979-05-27T07:32:00Z
'''
    origins: dict[Any, str] = {}
    parse(text.replace("\n", "\r\n"), "f", origins)
    assert {path: int(place[2:]) for path, place in origins.items()} == {
        ("a",): 2,
        ("d",): 5,
        ("d", 2 + 1, "f"): 7,
        ("d", 3, "g.h"): 7,
        ("d", 3, "g.h", "i"): 7,
        ("d", 3, "k"): 8,
        ("d", 4, "f"): 8,
        ("l", "m"): 9,
        ("n", "o", "pq"): 10,
        ("q",): 11,
        ("q", "r"): 12,
        ("q", "s"): 13,
        ("q", "t"): 14,
        ("q", "t", "u"): 15,
        ("v", 0): 16,
        ("v", 0, "w"): 17,
        ("v", 1): 18,
        ("v", 1, "x", 0): 19,
        ("v", 1, "x", 0, "y"): 20,
        ("v", 1, "x", 1): 21,
        ("v", 1, "x", 1, "y"): 22,
        ("v", 1, "x", 1, "z"): 23,
        ("v", 1, "x", 1, "z", "aa"): 24,
        ("v", 2): 25,
        ("v", 2, "ab"): 26,
    }


def test_lines_agree_with_the_parser_on_random_texts() -> None:
    """Every recorded path exists in the parsed tables, and its line holds the last part of the key."""
    source = random.Random(0)

    def value(depth: int) -> str:
        kinds = ["3", "'[x]'", '"a = {\\""', '"""\n[z]\ny = 1\n"""', "'''\n]'''", "true", "[]", "{}"]
        if depth:
            kinds += [f"[\n {value(depth - 1)}, # }}\n {value(depth - 1)} ]", f"{{ k0 = {value(depth - 1)}, k1 = {value(depth - 1)} }}"] * 3
        return source.choice(kinds)

    for _ in range(60):
        lines = [f"top{index} = {value(3)}" for index in range(3)]
        for index in range(4):
            lines += [source.choice([f"[t{index}]", f"[[a]]\n[a.b{index}]", "[[a]]"]), f"k{index} = {value(3)}  # comment"]
        text = "\n".join(lines)
        origins: dict[Any, str] = {}
        parse(text, "f", origins)
        for path, place in origins.items():
            here: Any = tomli.loads(text)
            for part in path:
                here = here[part]
            name = next(part for part in reversed(path) if isinstance(part, str))
            assert name in text.splitlines()[int(place[2:]) - 1]


def test_an_error_names_the_nearest_line_and_the_right_file(write: Any) -> None:
    base = HEAD + '[model]\nname = "toy"\nn_layers = 4\n[[optimizer]]\nname = "stepper"\nlr = 1\n[[optimizer]]\nname = "stepper"\nlr = 2\n'
    path = write('extends = "base.toml"\n[model]\ntie = 3\n[[optimizer]]\nname = "stepper"\n', base=base)
    assert problems_of(path) == [
        "run.toml:3: model.tie: expected true or false, got int 3",
        "run.toml:4: optimizer.0.lr: missing; it has no default",  # not base.toml, whose list is gone
    ]
    write(path.read_text(), base=base.replace("n_layers = 4", "n_layers = 0"))
    assert problems_of(path)[0] == f"base.toml:{AFTER_HEAD + 2}: model.n_layers: expected a number greater than 0, got int 0"


# ---------------------------------------------------------------- extends
def test_extends_merges_equal_components_and_replaces_others(write: Any) -> None:
    base = GOOD.replace('model = "toy"', 'model = {name = "toy", n_layers = 4, inner = {name = "toy_packer", size = 5}}') + (
        '[run]\nname = "base"\ndir = "elsewhere"\n[train]\nsteps = 7\nseq_len = 8\n'
    )
    child = 'extends = "base.toml"\n'

    same = load(write(child + "[model]\ntie = false\n[train]\nsteps = 9\n[run]\nname = 'child'\n", base=base))
    assert (same.model.config.n_layers, same.model.config.tie, same.model.config.inner.config.size) == (4, False, 5)
    assert (same.train.steps, same.train.seq_len) == (9, 8)
    assert (same.run.name, same.run.dir) == ("child", "elsewhere")  # a run's name is no component's

    named = load(write(child + '[model]\nname = "toy"\n[model.inner]\nsize = 6\n', base=base))
    assert (named.model.config.n_layers, named.model.config.inner.config.size) == (4, 6)
    assert load(write(child + '[model]\nname = "other"\n', base=base)).model.config == OtherConfig()
    assert load(write(child + 'model = "toy"\n', base=base)).model.config == ToyConfig()  # the short form is all defaults
    assert load(write(child + "[model]\nn_layers = 3\n", base=GOOD)).model.config == ToyConfig(n_layers=3)  # over the short form

    lists = load(write(child + '[[optimizer]]\nname = "stepper"\nlr = 5\n', base=base))
    assert [optimizer.config.lr for optimizer in lists.optimizer] == [5.0]


def test_extends_is_relative_to_the_file_and_chains(write: Any, tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "leaf.toml").write_text('extends = "../mid.toml"\n[train]\nsteps = 3\n')
    (tmp_path / "deep" / "mid.toml").write_text('extends = "../run.toml"\n[train]\nseq_len = 4\n')
    write(GOOD)
    config = load("deep/er/leaf.toml")
    assert (config.train.steps, config.train.seq_len, config.run.name) == (3, 4, "leaf")


def test_extends_refuses_cycles_and_what_is_no_file(write: Any, tmp_path: Path) -> None:
    (problem,) = problems_of(write('extends = "a.toml"', a='extends = "b.toml"', b='extends = "./run.toml"'))
    assert "a file extends itself: run.toml → a.toml → b.toml → run.toml" in problem
    (problem,) = problems_of(write('extends = "run.toml"'))
    assert "extends itself" in problem
    assert problems_of(write('\nextends = ["a.toml"]')) == ["run.toml:2: extends: expected the name of one file, got ['a.toml']"]
    assert problems_of(write('extends = "bse.toml"', base="")) == ["bse.toml: no such file; did you mean 'base.toml'?"]
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    (problem,) = problems_of("loop.toml")
    assert "loop.toml" in problem


# ---------------------------------------------------------------- overrides
def test_overrides(write: Any) -> None:
    path = write(GOOD + "[run]\nname = 'r'\n")

    def model(*overrides: str) -> ToyConfig:
        return load(path, overrides).model.config

    assert model("--model.n_layers=3").n_layers == 3
    assert model("--model.n_layers=3", "--model.n_layers=4").n_layers == 4
    assert model("--model.label=two words # and this").label == "two words # and this"
    assert model('--model.label="3"').label == "3"
    assert model("--model.label=").label == ""
    assert model("--model.label=a\nb = 3").label == "a\nb = 3"
    assert model("--model.scales.a=1", "--model.scales.b=2.5").scales == {"a": 1.0, "b": 2.5}
    assert model("--model.inner.name=toy_packer", "--model.inner.size=7").inner.config.size == 7
    assert model("--model.n_layers=5", "--model=toy").n_layers == 2  # replaces the slot
    assert load(path, ["--model=other"]).model.config == OtherConfig()
    assert load(path, ["--model.name=other"]).model.config == OtherConfig()
    assert load(path, ["--optimizer.0.lr=3e-4"]).optimizer[0].config.lr == 3e-4
    assert load(path, ["--validation=[]"]).validation == ()
    assert load(path, ["--validation.0.max_tokens=9"]).validation[0].max_tokens == 9  # the file has no such list
    assert load(path, ["--quantizer=[]"]).quantizer == ()
    assert load(path, ["--logger=toy_logger"]).logger == (Component.named("logger", "toy_logger"),)
    assert load(path, ['--optimizer=[{name="stepper",lr=1},{name="stepper",lr=2}]']).optimizer[1].config.lr == 2
    assert load(path, ["--train.steps=3"]).train.steps == 3


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("--model.n_lyers=3", "--model.n_lyers: model.n_lyers: unknown key of model 'toy'; did you mean 'n_layers'?"),
        ("--trian.steps=3", "--trian.steps: trian: unknown key; did you mean 'train'?"),
        ("--train.steps=ten", "--train.steps: train.steps: expected an integer, got str 'ten'"),
        ('--train.steps="3"', "--train.steps: train.steps: expected an integer, got str '3'"),
        ("--train.steps.x=3", "--train.steps.x: train.steps: expected an integer, got dict {'x': 3}"),
        ("--model.inner.size=3", "--model.inner.size: model.inner: which packer? give it a `name` (known: "),
        ("--data.n_streams.x.y=3", "--data.n_streams.x.y=3: 'n_streams' holds a value, not a table"),
        ("--run.name.x=3", ": run.name: expected a string, got dict {'name': 'r', 'x': 3}"),
        ("--optimizer.lr=3", "--optimizer.lr=3: this is a list of 1: write its number before 'lr', counted from 0"),
        ("--optimizer.1.lr=3", "--optimizer.1.lr=3: no item 1: the list has 1"),
        ("--optimizer=steper", "--optimizer: optimizer.0.name: no optimizer named 'steper'; did you mean 'stepper'?"),
        ("--extends=base.toml", "--extends=base.toml: only a file extends another"),
        ("--train.steps", "--train.steps: an override is written --section.key=value"),
        ("train.steps=3", "train.steps=3: an override is written --section.key=value"),
        ("--train..steps=3", "--train..steps=3: an override is written --section.key=value"),
        ("--train.steps=99999999999999999999", "--train.steps: train.steps: an integer of a config has at most 64 bits"),
        ("--model.label=\udc80", "--model.label: model.label: not valid Unicode: str '\\udc80'"),
        ("--model.tie=[" + "[" * 100_000, "--model.tie: model.tie: expected true or false, got str '[["),
        ("--model.tie=" + "[" * 300 + "]" * 300, "config: nested too deeply"),
        (f"--{'a.' * 20_000}a=1", f": a key of more than {MAX_KEY_PARTS} parts"),
        (f"--model.scales={{{'a.' * 20_000}a=1}}", f": a key of more than {MAX_KEY_PARTS} parts"),
    ],
)
def test_bad_overrides(write: Any, override: str, problem: str) -> None:
    (found,) = problems_of(write(GOOD + "[run]\nname = 'r'\n[data]\nn_streams = 3\n"), override)
    assert problem in found
    assert len(found) < 1000


def test_bad_overrides_are_collected_too(write: Any) -> None:
    assert len(problems_of(write(), "--optimizer.lr=3", "--x", "--optimizer.4.lr=1")) == 3


# ---------------------------------------------------------------- files
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a = " + b"a." * 20_000 + b"a", "run.toml:1: a key of more than 32 parts"),
        (b"\n\n[" + b"a." * 20_000 + b"a]", "run.toml:3: a key of more than 32 parts"),
        (b"a = {" + b"'a' . " * 20_000 + b"a = 1}", "run.toml:1: a key of more than 32 parts"),
        (b"[" * 100_000, "run.toml:1: not valid TOML"),
        (b"a = " + b"[" * 100_000, "run.toml: "),
        (b"a = " + b"{a = " * 100_000, "run.toml: "),
        (b"a = " + b"1" * 5000, "run.toml: an integer has too many digits"),
        (GOOD.encode() + b"a = " + b"1" * 4000, "a: an integer of a config has at most 64 bits"),
        (b"#" * (MAX_FILE_BYTES + 1), f"run.toml: {MAX_FILE_BYTES + 1} bytes; a config holds at most {MAX_FILE_BYTES}"),
        (b"a" * MAX_FILE_BYTES, "run.toml:1: not valid TOML"),
        ("a = 1".encode("utf-16"), "run.toml: not UTF-8 at byte 0"),
        (b"a = '\xff'", "run.toml: not UTF-8 at byte 5"),
        (b"a = '\xed\xa0\x80'", "run.toml: not UTF-8 at byte 5"),
        (b"a = '\x00'", "run.toml:1: not valid TOML"),
        (b"a = 1\nb = \n", "run.toml:2: not valid TOML"),
        (b"[a]\nb = 1\nb = 2\n", "run.toml:3: not valid TOML"),
        (b"[a]\n[b]\n[a]\n", "run.toml:3: not valid TOML"),
    ],
)
def test_hostile_files_are_one_config_error(write: Any, content: bytes, problem: str) -> None:
    path = write()
    path.write_bytes(content)
    assert any(problem in found for found in problems_of(path))


def test_a_flood_of_mistakes_is_cut_short(write: Any) -> None:
    for flood in ("".join(f"k{i} = 1\n" for i in range(2000)), "[[validation]]\nx = 1\n" * 2000):
        assert len(problems_of(write(GOOD + flood))) == MAX_PROBLEMS + 1
    problems = problems_of(write(GOOD.replace("logger =", "# ") + '[[logger]]\nname = "toy_loger"\n' * 2000))
    assert len(problems) == MAX_PROBLEMS + 1
    assert problems[0].endswith("logger: 2000 items; at most 100")


def test_bom_and_crlf(write: Any) -> None:
    path = write()
    path.write_bytes(b"\xef\xbb\xbf" + (GOOD + "[train]\nsteps = 'x'\n").replace("\n", "\r\n").encode())
    assert problems_of(path) == [f"run.toml:{AFTER_HEAD + 3}: train.steps: expected an integer, got str 'x'"]


def test_wrong_paths(write: Any, tmp_path: Path) -> None:
    write()
    assert problems_of("rum.toml") == ["rum.toml: no such file; did you mean 'run.toml'?"]
    assert problems_of(tmp_path) == [f"{tmp_path}: is a directory"]
    assert problems_of("nowhere/run.toml") == ["nowhere/run.toml: no such file"]
    assert "cannot be read" in problems_of("a\0b.toml")[0]
    assert "cannot be read" in problems_of("a" * 5000)[0]


def test_random_damage_is_a_config_error_or_a_config(write: Any) -> None:
    """Mutations of a good file never escape as another exception."""
    source = random.Random(1)
    text = GOOD + '[train]\nsteps = 3\nclip = 1.5\n[[validation]]\nname = "a"\n[validation.dataset]\nname = "toy_dataset"\n[run]\nname = "x"\n'
    pieces = ["[", "]", "{", "}", '"', "'", "=", ".", ",", "\n", "#", "\\", "0", "-1", "nan", "true", "1979-05-27", '"""', "é", "\t", "[[", "toy"]
    for _ in range(200):
        damaged = text
        for _ in range(source.randint(1, 3)):
            at = source.randrange(len(damaged))
            damaged = damaged[:at] + source.choice(pieces) + damaged[at + source.randint(0, 4) :]
        try:
            load(write(damaged))
        except ConfigError:
            continue


def test_every_setting_refuses_values_of_other_types(write: Any) -> None:
    """Each plain field of each section, mutated once: refused under its own path, or the value is of its type."""
    config = load(write(GOOD.replace('"toy"', '{name = "toy", inner = "toy_packer"}')))
    wrong = {
        int: ['"1000"', "true", "1.0", "1979-05-27", "[1]"],
        float: ['"1"', "true", "nan", "inf"],
        bool: ["1", '"true"'],
        str: ["3", "true", "[]"],
    }
    n_tried = 0
    for path, value in flatten(config).items():
        for text in wrong.get(type(value), []):
            problems = problems_of(Path("run.toml"), f"--{path}={text}")
            slot = path.removesuffix(".name")  # a slot whose name is no name is refused as a whole
            assert any(f": {slot}" in problem for problem in problems), (path, text, problems)
            n_tried += 1
    assert n_tried > 100


# ---------------------------------------------------------------- imports
@pytest.fixture
def module_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("outside_"):
            del sys.modules[name]


LION = """
from dataclasses import dataclass
from titanlm.registry import register

@dataclass(frozen=True)
class LionConfig:
    lr: float = 1e-4
    params: tuple[str, ...] = ("*",)

@register("optimizer", "lion")
def lion(config: LionConfig, *, named_params):
    "Sign-momentum."
"""


def test_imports_register_components(write: Any, module_dir: Path) -> None:
    (module_dir / "outside_lion.py").write_text(LION)
    config = load(write('imports = ["outside_lion"]\n' + GOOD), ["--optimizer=lion"])
    assert config.optimizer[0].config.lr == 1e-4
    assert config.imports == ("outside_lion",)


def test_what_cannot_be_imported(write: Any, module_dir: Path) -> None:
    bad = 'imports = [\n  "nope_a.b",\n  "/tmp/x.py", "..evil", 3, "", "outside_bad"]\n'
    (module_dir / "outside_bad.py").write_text(LION.replace("named_params", "named_parms"))
    problems = problems_of(write(bad + GOOD))
    assert len(problems) == 6
    assert problems[0].startswith("run.toml:1: imports.0: no module named 'nope_a'; install its package")
    assert "imports.1: expected a dotted module name such as 'my_pkg.lion', got '/tmp/x.py'" in problems[1]
    assert "asks for 'named_parms'" in problems[5]
    assert "outside_bad.py:10" in problems[5]


def test_an_error_inside_an_imported_module_is_its_authors(write: Any, module_dir: Path) -> None:
    (module_dir / "outside_broken.py").write_text("import outside_missing_dependency\n")
    (module_dir / "outside_crash.py").write_text("1 / 0\n")
    with pytest.raises(ModuleNotFoundError, match="outside_missing_dependency"):
        load(write('imports = ["outside_broken"]\n' + GOOD))
    with pytest.raises(ZeroDivisionError):
        load(write('imports = ["outside_crash"]\n' + GOOD))


def test_a_stored_config_imports_and_extends_nothing(write: Any, module_dir: Path) -> None:
    (module_dir / "outside_trap.py").write_text("raise SystemExit('imported')\n")
    stored = 'imports = ["outside_trap"]\n' + GOOD
    assert loads(stored).imports == ("outside_trap",)
    assert "outside_trap" not in sys.modules
    with pytest.raises(ConfigError, match="--import outside_trap"):
        loads(stored.replace('"stepper"', '"lion"'))
    with pytest.raises(ConfigError, match="extends: not allowed in a stored config"):
        loads('extends = "run.toml"\n' + GOOD)


# ---------------------------------------------------------------- out again
def test_round_trip(write: Any) -> None:
    path = write(GOOD + '[run]\nname = "ä \\\\ \\" \\u0000 \\U0001F600\\n"\n')
    config = load(path, ['--model.scales={a=1e22, "b c"=0.1}', '--model.filters=["toy_filter"]', "--model.width=3", "--profile={start=1}"])
    text = dump(config)
    assert loads(text) == config
    assert dump(loads(text)) == text
    assert isinstance(config, RunConfig)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_round_trip_of_shipped_configs(path: Path) -> None:
    config = load(path)
    assert loads(dump(config)) == config


def test_diff(write: Any) -> None:
    a = load(write(), ["--model.scales={a=1}"])
    b = load(write(), ["--optimizer.0.lr=2", "--model.width=3", "--model.scales={a=2}"])
    assert diff(a, b) == [("model.scales.a", 1.0, 2.0), ("optimizer.0.lr", 1.0, 2.0), ("model.width", None, 3)]
    assert diff(a, a) == []


def test_config_errors_are_titan_errors() -> None:
    assert issubclass(ConfigError, TitanError)
