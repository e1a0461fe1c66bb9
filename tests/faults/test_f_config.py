"""Wrong, hostile and extreme configs (F)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from titanlm import registry
from titanlm.cli import main
from titanlm.config import dump, load, loads
from titanlm.errors import ConfigError
from titanlm.registry import register

ROOT = Path(__file__).parents[2]
PROVED = {
    "F1 names": "tests/test_config.py::test_every_mistake_is_reported_at_once_with_its_line",
    "F1 slots": "tests/test_config.py::test_slots",
    "F1 a key twice": "tests/test_config.py::test_hostile_files_are_one_config_error",
    "F1 on the command line": "tests/test_bad_input.py::test_mistakes_found_while_loading",
    "F2": "tests/test_config.py::test_every_setting_refuses_values_of_other_types",
    "F2 dates": "tests/test_config.py::test_a_date_hides_no_other_mistake",
    "F3 nan, infinite, negative, zero": "tests/test_config.py::test_sections_and_lists",
    "F3 beyond 64 bits": "tests/test_config.py::test_bad_overrides",
    "F3 run names": "tests/test_bad_input.py::test_wrong_run_names",
    "F4": "tests/test_bad_input.py::test_mistakes_found_by_the_check",
    "F5 each is one error": "tests/test_config.py::test_hostile_files_are_one_config_error",
    "F5 byte order mark, CRLF": "tests/test_config.py::test_bom_and_crlf",
    "F6 what is no module": "tests/test_config.py::test_what_cannot_be_imported",
    "F6 stored configs": "tests/test_config.py::test_a_stored_config_imports_and_extends_nothing",
    "F6 stored configs of runs and artifacts": "tests/test_targets.py::test_a_stored_config_imports_nothing",
    "F7 clash": "tests/test_registry.py::test_a_taken_name_names_both_places",
    "F7 unknown name": "tests/test_registry.py::test_an_unknown_name_answers_with_the_right_ones",
    "F8": "tests/test_config.py::test_round_trip",
    "F8 shipped configs": "tests/test_config.py::test_round_trip_of_shipped_configs",
    "F9": "tests/test_config.py::test_bad_overrides",
    "F10 loops": "tests/test_config.py::test_extends_refuses_cycles_and_what_is_no_file",
}
"""Cases of the fault matrix that other files prove."""


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a command that must end in status 2, or 1 for a check, without a traceback."""
    status = main(words)
    out, err = capsys.readouterr()
    assert status == (1 if words[:2] == ["config", "check"] else 2), out + err
    assert "Traceback" not in out + err
    return out + err


HUGE = 2**63 - 1
EXTREME = [
    *(f"--{key}={HUGE}" for key in ("train.seq_len", "train.micro_batch", "train.global_batch", "train.threads")),
    *(f"--{key}={HUGE}" for key in ("data.n_streams", "data.workers", "data.prefetch", "validation.0.seq_len", "validation.0.micro_batch")),
    *(f"--model.{key}={HUGE}" for key in ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_positions", "vocab_size", "embedding_rank")),
    f"--scheduler.warmup_steps={HUGE}",
    "--optimizer.0.lr=1e400",
    '--optimizer.0.params=[""]',
    "--averager.decay=1",
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("override", EXTREME)
def test_f3_sizes_that_no_machine_has_are_refused_before_they_are_tried(override: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["config", "check", str(tiny), override], capsys)
    assert override[2:].partition("=")[0] in message


ZERO_BYTES = [
    r'--dataset.paths=["a\u0000b"]',
    r'--validation=[{file="a\u0000b.txt"}]',
    r'--tokenizer={name="sentencepiece",path="a\u0000b"}',
    r'--run.dir="a\u0000b"',
    r'--run.name="a\u0000b"',
    r'--data.start="a\u0000b"',
]


@pytest.mark.parametrize("override", ZERO_BYTES)
def test_f3_paths_with_a_zero_byte_are_refused(override: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["train", str(tiny), override], capsys)


@pytest.mark.parametrize("override", ['--tokenizer={name="sentencepiece",path=""}', '--run.name=""', '--dataset.paths=["."]', "--dataset.paths=[]"])
def test_f3_empty_and_unfit_paths_are_refused(override: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    refused(["config", "check", str(tiny), override], capsys)


HOSTILE = r"""
import resource, sys, time
from pathlib import Path
from titanlm.config import load
from titanlm.errors import ConfigError
folder = Path(sys.argv[1])
deep = {
    "dots": b"a." * 20_000 + b"a = 1",
    "spaced dots": b"a . " * 20_000 + b"a = 1",
    "header": b"[" + b"a." * 20_000 + b"a]",
    "quoted": b"a = {" + b"'a'." * 20_000 + b"a = 1}",
    "brackets": b"a = " + b"[" * 100_000,
    "headers": b"[" * 100_000,
    "tables": b"a = " + b"{a=" * 100_000,
    "digits": b"a = " + b"9" * 5_000,
    "many": b"".join(b"[a.b%d]\nc = 1\n" % i for i in range(40_000)),
    "arrays": b"[[a]]\n" * 140_000,
    "quotes": b"a = " + b'"' * 900_000,
    "backslashes": b'a = "' + b"\\" * 900_000,
    "comments": b"# x\n" * 250_000,
    "large": b"a = 1 #" + b" " * 10_000_000,
    "half": b'a = "\\ud800"',
    "utf16": "a = 1".encode("utf-16"),
}
(folder / "warm.toml").write_bytes(b"x = 1")
try:
    load(folder / "warm.toml")
except ConfigError:
    pass
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, content in deep.items():
    file = folder / "hostile.toml"
    file.write_bytes(content)
    start = time.process_time()
    try:
        load(file)
        sys.exit(f"{name} was loaded")
    except ConfigError as error:
        if len(str(error)) > 100_000:
            sys.exit(f"{name}: a message of {len(str(error))}")
    seconds, kibibytes = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{name}: {seconds:.2f} s, {kibibytes >> 10} MiB")
    if seconds > 2 or kibibytes > 200 << 10:
        sys.exit(f"{name}: {seconds:.1f} s, {kibibytes} KiB")
"""


def test_f5_hostile_files_take_bounded_time_and_memory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_f6_a_file_named_by_the_user_imports_and_what_it_extends_too(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever names a file trusts it and its parents; the same text from a checkpoint imports nothing."""
    monkeypatch.chdir(tiny.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tiny.parent / "f6_outside.py").write_text("import pathlib; pathlib.Path('imported').touch()")
    tiny.write_text('imports = ["f6_outside"]\n' + tiny.read_text())
    loads(tiny.read_text())
    assert not Path("imported").exists()
    Path("child.toml").write_text('extends = "tiny.toml"\n')
    load("child.toml")
    assert Path("imported").exists()
    sys.modules.pop("f6_outside")


@dataclass(frozen=True)
class FailingConfig:
    how: str = "value"


def failing(config: FailingConfig, *, total_steps: int) -> None:
    """Raises."""
    raise ValueError("how: 'value' is refused") if config.how == "value" else ZeroDivisionError(config.how)


def test_f7_a_factory_that_refuses_is_a_problem_and_one_that_breaks_a_bug(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    register("scheduler", "f7_failing")(failing)
    try:
        assert "scheduler.how: 'value' is refused" in refused(["config", "check", str(tiny), "--scheduler=f7_failing"], capsys)
        with pytest.raises(ZeroDivisionError):  # its author needs the traceback
            main(["config", "check", str(tiny), '--scheduler={name="f7_failing",how="bug"}'])
    finally:
        del registry._entries["scheduler", "f7_failing"]


def test_f8_the_config_of_a_checkpoint_is_the_resolved_one(tiny: Path) -> None:
    config = load(tiny, ["--train.steps=7", '--run.name="x"'])
    text = dump(config)
    assert loads(text) == config
    assert dump(loads(text)) == text
    assert "steps = 7" in text


def test_f9_overrides_reach_items_of_lists_and_nested_tables(tiny: Path) -> None:
    config = load(tiny, ["--optimizer.0.lr=0.5", "--validation.0.max_tokens=7", "--dataset.filter=[]", '--packer={name="best_fit"}'])
    assert (config.optimizer[0].config.lr, config.validation[0].max_tokens, config.packer.name) == (0.5, 7, "best_fit")
    for wrong in ("--optimizer.1.lr=1", "--optimizer.lr=1", "--optimizer.x.lr=1", "--train.steps.x=1", "--traim.x=1", "--model.n_layer=1"):
        with pytest.raises(ConfigError):
            load(tiny, [wrong])


def test_f10_extends_reads_configs_and_shows_nothing_of_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may extend one outside of its folder; one that is no config is refused without a word of it."""
    (tmp_path / "inner").mkdir()
    secret = tmp_path / "passwd"
    secret.write_text("root:x:0:0:canary:/root:/bin/bash\n")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    file = tmp_path / "inner" / "run.toml"
    for parent in ("../passwd", str(secret), "/dev/zero", "../pipe", "../loop", "..", "a\0b", "~/x", ""):
        file.write_text(f"extends = {json.dumps(parent)}\n")
        with pytest.raises(ConfigError) as error:
            load(file)
        assert "canary" not in str(error.value)
