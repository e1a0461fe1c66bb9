"""The one file: what is reached, that shortening changes nothing, that the importer serves its own table and nothing else."""

import ast
import bz2
import inspect
import json
import re
import subprocess
import sys
import textwrap
import tokenize
from pathlib import Path

import pytest
import tomli_w

from titanlm.config import dump, load, loads
from titanlm.errors import TitanError
from titanlm.loggers.golf import RULE, Golf, GolfConfig
from titanlm.registry import KINDS, known, registrations
from titanlm.submission import reached as module
from titanlm.submission.build import _submitted
from titanlm.submission.bundle import ENTRY, Importer, _lean, _literal, _packed, bundle
from titanlm.submission.challenge_log import read_log
from titanlm.submission.joined import joined
from titanlm.submission.reached import LEFT_OUT, UNSAID, WHERE_USED

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(ROOT.glob("train_configs/**/*.toml"))
MAX_COMPRESSED_BYTES = 91_500
"""Of train_gpt.py; 0.6 % of what a submission may have."""


@pytest.fixture(scope="module")
def pr369():
    return {form: bundle(golf("pr369"), form) for form in ("readable", "compressed")}


def golf(name, *overrides):
    return _submitted(load(ROOT / f"train_configs/golf/{name}.toml", overrides))


# ---------------------------------------------------------------- of a real config
def test_modules_are_those_of_the_run(pr369):
    modules = {name.removeprefix("titanlm.") for name in pr369["compressed"].modules}
    assert pr369["readable"].modules == pr369["compressed"].modules
    components = {
        name for name in modules if re.match(r"(averagers|datasets|loggers|losses|models|optimizers|packers|quantizers|schedulers|tokenizers)\.", name)
    }
    assert components == {
        "averagers.ema", "averagers.swapping", "datasets.documents", "datasets.files", "datasets.mixture",
        "datasets.python_stdlib",  # a stand-in
        "datasets.shard_file",
        "datasets.shard_sequence", "datasets.token_shards", "datasets.token_spans", "loggers.golf", "loggers.group", "loggers.jsonl", "loggers.text",
        "losses.chunked", "losses.cross_entropy", "models.golf", "models.layers", "models.layers.attention", "models.layers.bigram_hash",
        "models.layers.cache", "models.layers.compiled", "models.layers.embedding", "models.layers.feed_forward", "models.layers.head",
        "models.layers.init", "models.layers.language_model", "models.layers.linear", "models.layers.norm", "models.layers.product", "models.layers.rope",
        "models.layers.rounding", "models.layers.smear_gate", "models.layers.softcap", "models.layers.unet_skips", "optimizers.adamw",
        "optimizers.compiled", "optimizers.moments",
        "optimizers.muon", "optimizers.newton_schulz",
        "optimizers.split_weights",  # a stand-in
        "packers.boundaries", "packers.none", "packers.rows", "packers.sliding", "quantizers.gptq",
            "quantizers.int5",
        "quantizers.int6", "quantizers.int8", "quantizers.rowwise", "schedulers.ramp", "schedulers.warmdown", "schedulers.warmup",
        "tokenizers.byte_counts", "tokenizers.files", "tokenizers.fingerprint", "tokenizers.model_proto", "tokenizers.sentencepiece", "tokenizers.text",
    }  # fmt: skip
    stand_ins = {name.removeprefix("titanlm.") for name in LEFT_OUT} & modules
    assert stand_ins == {"checkpoint_copy", "data_state", "distributed.fsdp2", "generate", "initial_load"}
    rest = {name for name in modules - components - stand_ins if "." not in name}
    assert rest == {
        "attention_choice", "averagers", "batch", "best", "calibration",
            "check", "checkpoint", "clipping", "config", "config_sources", "constraints", "course", "curricula", "data", "datasets", "device",
        "distributed", "environment", "errors", "evaluate", "export", "exported", "exporters", "failures",
            "fitters", "guard", "interrupts", "interval", "kernels", "loggers", "losses",
        "metrics", "micro_batch", "models", "optimizers", "packers", "patterns", "precision", "profiling", "progress", "quantizers", "randomness", "registry",
        "resume",
        "run_choices", "run_start", "runs", "saver", "schedulers", "spikes",
        "state_bytes", "state_tree", "stream", "submission", "targets", "tensor_file", "titanlm", "tokenizers",
        "train", "train_module", "tuned", "weights", "workers",
    }  # fmt: skip


@pytest.mark.slow
def test_sizes(pr369):
    for made in (pr369["compressed"], bundle(golf("pr369_logged"))):
        assert made.n_bytes == len(made.content) <= MAX_COMPRESSED_BYTES


def test_the_probe_of_rows_is_in_it_where_it_is_asked_for(pr369):
    made = bundle(golf("pr369", "--train.micro_batch_tokens=auto"), "readable")
    assert b"SHARE = 0.9" in made.content
    assert b"SHARE = 0.9" not in pr369["readable"].content
    assert {name.removeprefix("titanlm.") for name in set(made.modules) - set(pr369["readable"].modules)} == {
        "distributed.code_gather", "pass_memory", "recipe_plan",  # the first two stand-ins
    }  # fmt: skip


def test_compressed_file_is_source_in_latin_1(pr369, tmp_path):
    script = tmp_path / "train_gpt.py"
    script.write_bytes(pr369["compressed"].content)
    with tokenize.open(script) as file:
        assert file.read().encode("latin-1") == pr369["compressed"].content
    assert b"\0" not in pr369["compressed"].content  # 3.12 and later refuse it
    unpacked = unpack(pr369["compressed"].content)
    for told in ("class Trainer", "class TitanError", "the environment variable"):
        assert told in unpacked
    assert "import titanlm" not in unpacked
    assert "from titanlm" not in unpacked


def test_a_log_with_it_is_utf_8_and_read_as_any(pr369, tmp_path):
    script = tmp_path / "train_gpt.py"
    script.write_bytes(pr369["compressed"].content)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(tomli_w.dumps({"train": {"seed": 3, "steps": 9, "global_batch": 2, "seq_len": 8, "priming_steps": 0}, "validation": []}))
    (run / "environment.json").write_text(json.dumps({"python": "3.11.7", "torch": "2.13.0", "cuda": "", "cpus": 2, "gpus": []}))
    for start, steps in ((0, [1, 2, 3]), (2, [3])):  # the second resumes, and cuts off what is later than step 2
        logger = Golf(GolfConfig(source=str(script)), run_dir=run)
        logger.start(start)
        for step in steps:
            logger.log(step, {"loss": 2.0, "elapsed_s": step})
        logger.close()
    log = run / "train_seed3.log"
    source, rule, rest = log.read_text(encoding="utf-8").partition(f"\n{RULE}\n")
    assert rule
    assert source.encode("latin-1") == pr369["compressed"].content
    assert "resumed at step 2" in rest
    assert rest.count("step:3/9") == 1
    with open(log, "rb") as file:
        read = read_log(file)
    assert (read.seed, read.steps, read.train_time_ms) == (3, 3, 3000)


def packed_in(script: bytes) -> bytes:
    """What the string literal of the script holds."""
    (packed,) = [node.value.value for node in ast.walk(ast.parse(script)) if isinstance(node, ast.Attribute) and node.attr == "encode"]
    return packed.encode("latin-1")


def unpack(script: bytes) -> str:
    return bz2.decompress(packed_in(script))[::-1].decode()


@pytest.mark.parametrize("packed", [bytes(range(256)), b"\0007\0x\0", b"'''", b"\\'", b"a''''", b"\r\n\r", b"\\\0\\0", b"''\\"])
def test_any_bytes_can_be_packed(packed, monkeypatch):
    monkeypatch.setattr(bz2, "compress", lambda content: packed)
    assert packed_in(b"# coding: latin-1\n" + _packed("")) == packed


@pytest.mark.parametrize("path", sorted(ROOT.glob("train_configs/**/*.toml")), ids=lambda path: path.stem)
def test_embedded_config_is_the_config(path):
    config = load(path)
    assert loads(tomli_w.dumps(_lean(config))) == config
    assert len(tomli_w.dumps(_lean(config))) < 0.8 * len(dump(config))


@pytest.mark.slow
def test_same_text_every_time(pr369):
    assert bundle(golf("pr369")).content == pr369["compressed"].content


def test_readable_code_stands_verbatim_and_what_nobody_calls_is_left_out(pr369):
    text = pr369["readable"].content.decode()
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


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in CONFIGS if not re.match("[ah]100|rtx", path.stem)], ids=lambda path: path.stem)
def test_files_of_all_configs_start(path, tmp_path):
    """As far as a word that means nothing: everything is imported, and the config is read. Yxanul's machines change numbers alone."""
    (tmp_path / "train_gpt.py").write_bytes(bundle(_submitted(load(path))).content)
    done = subprocess.run([sys.executable, "-I", "train_gpt.py", "nonsense"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("arguments: 'nonsense' means nothing here")


@pytest.mark.slow
def test_every_component_can_be_in_one_file():
    """Nothing in titanlm is of the kind that cannot be followed; one file of all, without what no config leaves out."""
    found = module.Reached({})
    found.need(*ENTRY)
    for kind, table in KINDS.items():
        for name in known(kind):
            place = f"titanlm.{table.folder}.{name}"
            if module.is_module(place):
                found.need(place, next(registrations(module.path_of(place), kind, name)).name)
    text, _ = joined(found.sources(), [ENTRY[0]], ENTRY)
    compile(text, "all", "exec")


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


def reached(module_name: str, name: str, **left_out: str) -> dict[str, str]:
    found = module.Reached({f"titanlm.{what.replace('__', '.')}": why for what, why in left_out.items()})
    found.need(module_name, name)
    return {name.removeprefix("titanlm."): text.strip() for name, text in found.sources().items() if name != "titanlm"}


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
    sources = reached("titanlm.a", "main")
    assert sources.keys() == {"a", "b", "c", "d"}
    assert "unused" not in sources["a"]
    assert "TYPE_CHECKING" not in sources["a"]
    assert sources["b"] == "def here(f): return f()"
    assert sources["c"].split() == ["LIMIT", "=", "3", "'''Of", "what.'''", "def", "used():", "return", "LIMIT"]


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


def test_what_changes_or_registers_elsewhere_stays(package):
    package(
        a="""
        import atexit
        import os
        import torch
        from titanlm.b import Thing
        from functools import cache
        os.environ["SET_HERE"] = "1"
        torch.backends.flag = True
        Thing.patched = True
        @atexit.register
        def said(): ...
        @torch.library.register_fake("a::b")
        def fake(x): return x
        @cache
        def unused(): ...
        def main(): return 1
        """,
        b="class Thing: ...\n",
    )
    sources = reached("titanlm.a", "main")
    for kept in ("SET_HERE", "backends.flag", "Thing.patched", "def said", "def fake", "import os", "import atexit"):
        assert kept in sources["a"]
    assert "unused" not in sources["a"]
    assert sources["b"] == "class Thing: ..."


def test_modules_imported_by_another_name_in_functions_and_quoted_names_are_followed(package):
    package(
        a="""
        from dataclasses import dataclass
        from titanlm.c import Kind
        @dataclass
        class Settings:
            kind: "Kind | None" = None
        def main():
            import titanlm.b as other
            return other.here(), Settings()
        """,
        b="def here(): return 1\n",
        c="class Kind: ...\n",
    )
    sources = reached("titanlm.a", "main")
    assert sources["b"] == "def here(): return 1"
    assert sources["c"] == "class Kind: ..."


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("from .b import f\ndef main(): return f()\n", r"from \.b import f: name the module in full"),
        ("from titanlm.b import *\ndef main(): return f()\n", r"import \*: name"),
        ("import titanlm.b\ndef main(): return titanlm.b.f()\n", "titanlm of line 2: a module as a value"),
    ],
)
def test_imports_that_are_not_followed_are_refused(package, source, message):
    package(a=source, b="def f(): ...\n")
    with pytest.raises(TitanError, match=message):
        reached("titanlm.a", "main")


def test_factories_that_inherit_their_settings_are_refused(monkeypatch):
    monkeypatch.setattr("titanlm.submission.bundle.registrations", lambda *_: iter(ast.parse("class Mine(Base): ...").body))
    with pytest.raises(TitanError, match=r"Mine: needs an __init__ of its own"):
        bundle(load(ROOT / "train_configs/debug.toml"))


def test_what_is_left_out_is_stood_in_for(package):
    package(
        a="from titanlm.big import Thing\nfrom titanlm.b import part\ndef main(x: 'Thing'): return Thing(), part()\n",
        b="import json\ndef part(): return piece()\ndef piece(): return json.loads('1')\n",
        big="class Thing: ...\n",
    )
    sources = reached("titanlm.a", "main", big="some.setting was 0", b__piece="nobody asked")
    assert "json" not in sources["b"]
    for text, name, why in ((sources["big"], "Thing", r"titanlm\.big\.Thing is left out: some\.setting was 0"), (sources["b"], "piece", "nobody asked")):
        names: dict = {}
        exec(text, names)
        assert isinstance(names[name], type)
        with pytest.raises(ImportError, match=why):
            names[name](1, key=2)


@pytest.mark.slow
def test_what_only_some_configs_use_is_left_out_of_others(pr369):
    config = golf("pr369", "--quantizer.1.rounding=gptq", '--dataset.paths=["s3://b/x_train_*.bin"]')
    told, without = bundle(config).content, pr369["compressed"].content
    for word in ("import fsspec", "cholesky"):
        assert word in unpack(told)
        assert word not in unpack(without)


@pytest.mark.slow
def test_attention_kernels_are_those_that_are_named(pr369):
    """And nothing is measured: "auto" is what it is without a measurement."""
    told = {name: unpack(bundle(golf("pr369", f"--model.attention_backend={name}")).content) for name in ("flash3", "flash4", "varlen")}
    told["auto"] = unpack(pr369["compressed"].content)
    kernels = {"flash3": "flash_attn_3.fwd", "flash4": "_flash_attn_fwd", "varlen": "_flash_attention_forward"}
    for name, text in told.items():
        assert {other for other, word in kernels.items() if word in text} == {name} & kernels.keys()
        assert ("runs on CUDA alone" in text) == (name != "auto")
        assert "median" not in text
        assert "_scaled_dot_product_cudnn_attention_backward" in text
        assert "_flash_attn_bwd" in text


def test_names_of_what_is_left_out_are_still_those_of_something():
    for what in (*LEFT_OUT, *WHERE_USED, *UNSAID):
        place, _, name = what.rpartition(".")
        assert module.is_module(what) or re.search(rf"^((def|class) {name}\b|{name} = )", module.path_of(place).read_text(encoding="utf-8"), re.MULTILINE), what


# ---------------------------------------------------------------- as text
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
