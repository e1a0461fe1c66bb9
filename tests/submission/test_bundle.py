"""The one file: what is reached, that shortening changes nothing, that the importer serves its own table and nothing else."""

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from titanlm.config import load
from titanlm.errors import TitanError
from titanlm.submission import reached as module
from titanlm.submission.bundle import Importer, _literal, bundle
from titanlm.submission.reached import LEFT_OUT
from titanlm.submission.shorter import shortened

ROOT = Path(__file__).parents[2]
GOLF = ['--logger=["golf", "jsonl"]']
MAX_COMPRESSED_BYTES = 118_000
"""Of pr369's train_gpt.py; 0.7 % of what a submission may have."""


@pytest.fixture(scope="module")
def pr369():
    config = load(ROOT / "train_configs/golf/pr369.toml", GOLF)
    return {form: bundle(config, form) for form in ("readable", "compressed")}


# ---------------------------------------------------------------- of a real config
def test_modules_are_those_of_the_run(pr369):
    modules = {name.removeprefix("titanlm.") for name in pr369["compressed"].modules}
    assert pr369["readable"].modules == pr369["compressed"].modules
    components = {
        name for name in modules if re.match(r"(averagers|datasets|loggers|losses|models|optimizers|packers|quantizers|schedulers|tokenizers)\.", name)
    }
    assert components == {
        "averagers.ema", "averagers.swapping", "datasets.documents", "datasets.files", "datasets.mixture", "datasets.shard_file",
        "datasets.shard_sequence", "datasets.token_shards", "datasets.token_spans", "loggers.golf", "loggers.group", "loggers.jsonl", "loggers.text",
        "losses.chunked", "losses.cross_entropy", "models.golf", "models.layers", "models.layers.attention", "models.layers.bigram_hash",
        "models.layers.cache", "models.layers.compiled", "models.layers.embedding", "models.layers.feed_forward", "models.layers.head",
        "models.layers.init", "models.layers.language_model", "models.layers.linear", "models.layers.norm", "models.layers.rope",
        "models.layers.rounding", "models.layers.smear_gate", "models.layers.softcap", "models.layers.unet_skips", "optimizers.adamw",
        "optimizers.muon", "optimizers.newton_schulz", "packers.boundaries", "packers.none", "packers.rows", "packers.sliding", "quantizers.gptq",
            "quantizers.int5",
        "quantizers.int6", "quantizers.int8", "quantizers.rowwise", "schedulers.ramp", "schedulers.warmdown", "schedulers.warmup",
        "tokenizers.byte_counts", "tokenizers.files", "tokenizers.fingerprint", "tokenizers.model_proto", "tokenizers.sentencepiece", "tokenizers.text",
    }  # fmt: skip
    stand_ins = {name.removeprefix("titanlm.") for name in LEFT_OUT} & modules
    assert stand_ins == {"checkpoint_copy", "data_state", "distributed.fsdp2", "generate", "initial_load"}
    rest = {name for name in modules - components - stand_ins if "." not in name}
    assert rest == {
        "averagers", "batch", "best", "calibration",
            "check", "checkpoint", "clipping", "config", "config_sources", "constraints", "course", "data", "datasets", "device",
        "distributed", "environment", "errors", "evaluate", "export", "exported", "exporters", "failures",
            "fitters", "guard", "interrupts", "interval", "loggers", "losses",
        "metrics", "models", "optimizers", "packers", "patterns", "precision", "profiling", "progress", "quantizers", "randomness", "registry", "resume",
        "run_start", "runs", "saver", "schedulers", "spikes", "state_tree", "stream", "submission", "targets", "tensor_file", "titanlm", "tokenizers",
        "train", "train_module", "weights", "workers",
    }  # fmt: skip


def test_sizes(pr369):
    assert pr369["compressed"].n_bytes <= MAX_COMPRESSED_BYTES
    assert pr369["compressed"].text.isascii()


def test_same_text_every_time(pr369):
    assert bundle(load(ROOT / "train_configs/golf/pr369.toml", GOLF)).text == pr369["compressed"].text


def test_readable_code_stands_verbatim_and_what_nobody_calls_is_left_out(pr369):
    text = pr369["readable"].text
    train = (ROOT / "titanlm/train.py").read_text()
    trainer = train[train.index("class Trainer:") : train.index("def append_line")].rstrip()
    assert trainer in text
    for gone in ("def dry_run(", "def evaluate_target(", "class Console", "class Parquet", "class Mixin", "wandb.init", "def format_report("):
        assert gone not in text


def test_packages_are_what_is_imported(pr369):
    packages = set(pr369["compressed"].packages) - set(sys.stdlib_module_names)
    assert {"torch", "numpy", "pydantic", "safetensors", "sentencepiece", "tomli"} <= packages
    assert packages.isdisjoint({"wandb", "tensorboard", "tqdm", "pyarrow", "tiktoken", "titanlm"})


def test_outside_components_and_settings_of_left_out_modules_are_refused(tiny, tmp_path, monkeypatch):
    with pytest.raises(TitanError, match=r"checkpoint\.copy_to = 's3://b/r': titanlm\.checkpoint_copy is left out"):
        bundle(load(tiny, ["--checkpoint.copy_to=s3://b/r"]))
    (tmp_path / "outside_loss.py").write_text(
        "from dataclasses import dataclass\nfrom titanlm.registry import register\n"
        "@dataclass(frozen=True)\nclass C:\n    chunk_tokens: int = 0\n@register('loss', 'outside')\ndef outside(config: C): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(TitanError, match="loss 'outside' is none of titanlm's own"):
        bundle(load(tiny, ['--imports=["outside_loss"]', "--loss=outside"]))


# ---------------------------------------------------------------- what is reached, of a package made here
@pytest.fixture
def package(tmp_path, monkeypatch):
    def write(**files: str) -> Path:
        root = tmp_path / "titanlm"
        for name, text in {"__init__": "", **files}.items():
            path = root.joinpath(*name.split("__")).with_suffix(".py") if name != "__init__" else root / "__init__.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(textwrap.dedent(text))
        monkeypatch.setattr(module, "_ROOT", root)
        return root

    return write


def reached(module_name: str, name: str, *, minified: bool = False) -> dict[str, str]:
    found = module.Reached()
    found.need(module_name, name)
    return {name.removeprefix("titanlm."): text.strip() for name, text in found.sources(minified=minified).items() if name != "titanlm"}


def test_names_are_followed_through_every_kind_of_import(package):
    package(
        a="""
        from typing import TYPE_CHECKING
        import titanlm
        from titanlm import b
        from titanlm.c import used as alias, unused
        if TYPE_CHECKING:
            from titanlm.types import T
        def main(x: T):
            from titanlm.d import inner
            return b.here(alias) + inner()
        def other():
            from titanlm.e import never
        """,
        b="def here(f): return f()\ndef away(): return 1\n",
        c="LIMIT = 3\n'''Of what.'''\nOTHER = 4\ndef used(): return LIMIT\ndef unused(): return OTHER\n",
        d="def inner(): return 2\n",
        e="def never(): ...\n",
        types="class T: ...\n",
    )
    sources = reached("titanlm.a", "main", minified=True)
    assert sources.keys() == {"a", "b", "c", "d"}
    assert "unused" not in sources["a"]
    assert "TYPE_CHECKING" not in sources["a"]
    assert sources["b"] == "def here(f):\n return f()"
    assert sources["c"] == "LIMIT = 3\ndef used():\n return LIMIT"


def test_what_belongs_to_a_name_comes_with_it_and_what_runs_for_its_effect_stays(package):
    package(
        a="""
        import atexit
        from dataclasses import dataclass
        import operator_library
        @dataclass
        class Settings:
            x: Kind = 1
        Settings.checked = True
        class Kind: ...
        @operator_library.op
        def operator(x: int) -> int: return x
        @operator.fake
        def _(x): return x
        operator.backward(print)
        class Lonely: ...
        Lonely.checked = True
        atexit.register(print)
        def main(): return Settings, operator
        """
    )
    text = reached("titanlm.a", "main")["a"]
    for kept in ("class Settings", "Settings.checked", "class Kind", "def operator(x: int)", "def _(x)", "operator.backward(print)", "atexit.register"):
        assert kept in text
    assert "Lonely" not in text


def test_modules_as_values_are_refused(package):
    package(a="from titanlm import b\ndef main(): return vars(b)\n", b="def f(): ...\n")
    with pytest.raises(TitanError, match="b of line 2: a module as a value"):
        reached("titanlm.a", "main")


def test_left_out_modules_are_stood_in_for(package, monkeypatch):
    package(a="from titanlm.big import Thing\ndef main(x: 'Thing'): return Thing()\n", big="class Thing: ...\n")
    monkeypatch.setattr(module, "LEFT_OUT", {"titanlm.big": ("some.setting", (0,))})
    source = reached("titanlm.a", "main")["big"]
    names: dict = {}
    exec(source, names)
    assert isinstance(names["Thing"], type)
    with pytest.raises(ImportError, match=r"titanlm\.big\.Thing is left out: some\.setting was 0"):
        names["Thing"](1, key=2)


# ---------------------------------------------------------------- shorter
TANGLED = '''
import math
LIMIT = 3
def work(items, *, scale: float = 2.0, **options):
    """Says what it does."""
    global LAST
    total: float = 0.0
    empty: int
    try:
        raise ValueError("x")
    except ValueError as total_error:
        reason = str(total_error)
    squares = [item * item for item in items if (half := item / 2) >= 0]
    def inner(step=1):
        nonlocal total
        total += step * scale
        shadow = sum(squares)
        return (lambda value, other=shadow: value + other)(total)
    match options:
        case {"mode": mode, **others}:
            pass
        case _:
            mode, others = None, {}
    first, *remaining = squares
    with open(__file__) as handle:
        length = len(handle.name) > 0
    LAST = inner()
    for number, letter in enumerate("ab"):
        total += number
    text = f"""
    {total:>{LIMIT}} {first=}
        {letter!r}"""
    return total, LAST, half, reason, mode, others, remaining, length, text, math.pi, inner(step=5), {key: number for key in "xy"}
'''


def test_shortening_changes_no_result(tmp_path):
    short = "\n".join(shortened(statement, {"LIMIT", "work", "math"}) for statement in ast.parse(TANGLED).body)
    assert "Says what" not in short
    assert "float" not in short
    assert "squares" not in short  # it had a longer name
    results = []
    for text in (TANGLED, short):
        names = {"__file__": __file__}
        exec(text, names)
        results.append(names["work"]([1, 2, 3], mode="m", extra=1))
    assert results[0] == results[1]


def test_literals_hold_any_text():
    for text in ("plain\n", "a ''' b", "ends in \\", "ends in '", "'''", "\\'''\\", 'and """ too', "\\n stays"):
        assert ast.literal_eval(_literal(text)) == text


# ---------------------------------------------------------------- the importer
def test_importer_serves_its_table_and_no_installed_titanlm(tmp_path):
    script = tmp_path / "one.py"
    script.write_text(
        "from __future__ import annotations\nimport importlib.abc, importlib.util, linecache, sys, inspect, traceback, types\n\n"
        + inspect.getsource(Importer)
        + textwrap.dedent(
            """
            sources = {"titanlm": "", "titanlm.sub": "", "titanlm.sub.leaf": "def f():\\n    raise KeyError('here')\\n"}
            sys.meta_path.insert(0, Importer(sources, __file__))
            from titanlm.sub import leaf
            assert inspect.getsource(leaf.f).startswith("def f"), leaf
            linecache.checkcache()
            try:
                leaf.f()
            except KeyError:
                assert "raise KeyError('here')" in traceback.format_exc()
            for name in ("titanlm.train", "titanlm.sub.other"):
                try:
                    __import__(name)
                except ModuleNotFoundError as error:
                    assert error.name == name and "no part of" in str(error)
                else:
                    raise SystemExit(f"{name} was found")
            import json, xml.dom  # others are
            print("fine")
            """
        )
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    assert done.stdout == "fine\n", done.stderr
