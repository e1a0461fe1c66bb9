"""train_gpt.py at work: environment variables, losses, artifact and scores, in an interpreter where titanlm is blocked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from titanlm.config import _adapter, dump, load
from titanlm.datasets.prepare import prepare, request_of
from titanlm.errors import TitanError
from titanlm.registry import PYDANTIC_CONFIG
from titanlm.submission import isolated
from titanlm.submission.bundle import bundle
from titanlm.submission.entry import adapted, export, main, with_max_tokens
from titanlm.tokenizers.training import train_sentencepiece
from titanlm.train import Trainer

STEPS = 20
LOGGERS = '--logger=["golf", "jsonl"]'


@pytest.fixture(autouse=True)
def descriptions(monkeypatch):
    """``main`` does without what settings mean, for the whole process."""
    monkeypatch.setitem(PYDANTIC_CONFIG, "use_attribute_docstrings", True)
    yield
    _adapter.cache_clear()


@pytest.fixture
def shards(tmp_path: Path, corpus: Path) -> Path:
    """A folder with data/x_{train,val}_*.bin and spm.model, as of the challenge."""
    train_sentencepiece([corpus.read_text(encoding="utf-8")], tmp_path / "spm.model", 320)
    (tmp_path / "prepare.toml").write_text(
        f'model = "decoder"\noptimizer = "adamw"\ntokenizer = {{ name = "sentencepiece", path = "{tmp_path}/spm.model", add_eos = false }}\n'
        f'dataset = {{ name = "text", paths = ["{corpus}"], unit = "paragraph", validation_fraction = 0.2 }}\n'
    )
    for split in ("train", "validation"):
        prepare(request_of(tmp_path / "data", config=tmp_path / "prepare.toml", split=split, prefix="x", workers=0))
    return tmp_path


@pytest.fixture
def golf(shards: Path, tiny: Path) -> Path:
    """The shape of a golf config: spans of shards, two scorings, a quantizer, a limit. Its paths lead nowhere."""
    path = shards / "golf.toml"
    path.write_text(
        """
extends = "tiny.toml"
packer = "none"
tokenizer = { name = "sentencepiece", path = "nowhere/spm.model", add_eos = false }
dataset = { name = "token_spans", span_tokens = 96, paths = ["nowhere/x_train_*.bin"], validation_paths = ["nowhere/x_val_*.bin"] }
quantizer = "int6"
[data]
n_streams = 8
document_mask = false
[export]
max_bytes = 750_000
[[validation]]
name = "plain"
packer = { name = "sliding", drop_tail = true }
[[validation]]
name = "sliding"
packer = { name = "sliding", stride = 16, drop_tail = true }
max_tokens = 1000
every = 0
"""
    )
    return path


def started(script: Path, *words: str, cwd: Path, launcher: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess:
    """The script where no installed titanlm is found; with a launcher, where one may be."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SEED", "DATA_PATH"))}
    command = [*launcher, str(script)] if launcher else ["-I", isolated.__file__, str(script)]
    return subprocess.run([sys.executable, *command, *words], capture_output=True, text=True, cwd=cwd, env=variables | environment, timeout=200)


def losses(run: Path) -> list[str]:
    """As they are written: as many digits as tell a float from all others."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [repr(record["loss"]) for record in records if "loss" in record]


def trained(config) -> Path:
    with Trainer(config) as trainer:
        trainer.train()
        return trainer.folder.path


# ---------------------------------------------------------------- config
def test_environment_becomes_config(golf):
    text = dump(load(golf))
    same = adapted(text, {})
    assert (same.run.name, same.run.dir, same.train.seed) == ("seed42", "runs", 42)
    config = adapted(text, {"SEED": "7", "DATA_PATH": "/d", "TOKENIZER_PATH": '/t "quoted"/m', "MAX_WALLCLOCK_SECONDS": "600"})
    assert (config.run.name, config.train.seed, config.train.max_wallclock_s) == ("seed7", 7, 600.0)
    assert config.dataset.config.paths == ("/d/x_train_*.bin",)
    assert config.dataset.config.validation_paths == ("/d/x_val_*.bin",)
    assert config.tokenizer.config.path == '/t "quoted"/m'
    assert adapted(text, {"MAX_WALLCLOCK_SECONDS": "0"}).train.max_wallclock_s is None
    assert {entry.max_tokens for entry in with_max_tokens(config, 300).validation} == {300}


def test_data_path_reaches_validation_sets_with_data_of_their_own(golf):
    own = '--validation.0.dataset={name = "token_shards", validation_paths = ["a/b/y_val_*.bin"]}'
    config = adapted(dump(load(golf, [own])), {"DATA_PATH": "/d"})
    assert config.validation[0].dataset.config.validation_paths == ("/d/y_val_*.bin",)


def test_several_processes_replicate(golf, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert adapted(dump(load(golf)), {}).parallel.strategy == "replicate"


@pytest.mark.parametrize(("name", "value"), [("SEED", "x"), ("SEED", "-1"), ("MAX_WALLCLOCK_SECONDS", "nan"), ("MAX_WALLCLOCK_SECONDS", "ten")])
def test_values_that_are_no_numbers(golf, name, value):
    with pytest.raises(TitanError, match=f"{name} is '{value}'"):
        adapted(dump(load(golf)), {name: value})


def test_words_that_mean_nothing(golf, capsys, monkeypatch):
    """Said soon: the file, which is long, is not parsed for every class of settings."""
    _adapter.cache_clear()
    monkeypatch.setattr("inspect.findsource", None)
    assert main(["--evaluate", "x"], dump(load(golf)), "train_gpt.py") == 2
    assert "--eval ARTIFACT [--max-tokens N]" in capsys.readouterr().err


# ---------------------------------------------------------------- the file
@pytest.mark.slow
@pytest.mark.parametrize("form", ["compressed", "readable"])
def test_losses_are_bitwise_titanlms_and_the_artifact_scores_as_logged(golf, shards, form, monkeypatch):
    place = {"DATA_PATH": str(shards / "data"), "TOKENIZER_PATH": str(shards / "spm.model")}
    config = load(golf, [LOGGERS])
    monkeypatch.chdir(shards)
    straight = trained(adapted(dump(config), place | {"SEED": "7"}))

    home = shards / "home"
    home.mkdir()
    script = home / "train_gpt.py"
    made = bundle(config, form)
    script.write_bytes(made.content)
    # The auditing of `isolated` refuses training shards, so training runs with the file's own importer as the only guard.
    done = started(script, cwd=home, launcher=("-I",), SEED="7", **place)
    assert done.returncode == 0, done.stderr
    run = home / "runs" / "seed7"
    assert len(losses(run)) == STEPS
    assert losses(run) == losses(straight)

    log = (run / "train_seed7.log").read_text(encoding="utf-8")
    assert log.startswith(made.content.decode("latin-1" if form == "compressed" else "utf-8"))
    artifact = run / "export" / "model.titanlm"
    assert f"Total submission size artifact+zstd: {artifact.stat().st_size + made.n_bytes} bytes" in log
    assert artifact.stat().st_size + made.n_bytes <= config.export.max_bytes

    # Alone, with validation data only, as verify starts it.
    for shard in (shards / "data").glob("*_train_*"):
        shard.unlink()
    (home / "model.titanlm").write_bytes(artifact.read_bytes())
    done = started(script, "--eval", "model.titanlm", cwd=home, **place)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    sets = json.loads(line)["validation"]
    assert sets.keys() == {"plain", "sliding"}
    exact = f"final_int8_zlib_roundtrip_exact val_loss:{sets['sliding']['loss']:.8f} val_bpb:{sets['sliding']['bits_per_byte']:.8f}\n"
    assert log.endswith(exact)
    part = json.loads(started(script, "--eval", "model.titanlm", "--max-tokens", "300", cwd=home, **place).stdout)["validation"]
    assert all(0 < one["tokens"] <= 300 for one in part.values())


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_export_and_score(golf, shards):
    script = shards / "train_gpt.py"
    script.write_bytes(bundle(load(golf, [LOGGERS])).content)
    place = {"DATA_PATH": str(shards / "data"), "TOKENIZER_PATH": str(shards / "spm.model")}
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    both = started(script, cwd=shards, launcher=torchrun, SEED="1", **place)
    assert both.returncode == 0, both.stderr
    alone = started(script, cwd=shards, launcher=("-I",), SEED="2", **place)
    assert alone.returncode == 0, alone.stderr
    one = shards / "runs" / "seed1"
    assert len(losses(one)) == STEPS
    # Scored by two ranks and by one: the same file, the same score but for the order of a sum.
    artifact = str(one / "export" / "model.titanlm")
    shared = started(script, "--eval", artifact, cwd=shards, launcher=torchrun, **place)
    single = started(script, "--eval", artifact, cwd=shards, **place)
    values = [json.loads(done.stdout)["validation"]["sliding"] for done in (shared, single)]
    assert values[0]["loss"] == pytest.approx(values[1]["loss"], rel=1e-9)
    assert values[0]["tokens"] == values[1]["tokens"]
    assert f"val_bpb:{values[0]['bits_per_byte']:.8f}" in (one / "train_seed1.log").read_text()


def test_code_that_leaves_no_room_is_said(golf, shards):
    config = load(golf, [f"--tokenizer.path={shards / 'spm.model'}", "--export.max_bytes=50000"])
    with pytest.raises(TitanError, match=r"export\.max_bytes: the code alone has 60,000 bytes of 50,000"):
        export(shards, shards / "a.titanlm", config, 60_000)
