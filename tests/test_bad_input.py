"""Every mistake a user can make ends in one list of errors that name key and remedy, before a device or the disk is touched."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from titanlm import evaluate
from titanlm.cli import main
from titanlm.distributed.world import World
from titanlm.tokenizers.training import train_sentencepiece

ROOT = Path(__file__).parent.parent
Refuse = Callable[..., str]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` takes a GPU where there is one; what must not touch one is a message."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def refuse(tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Runs a command that must end in status 2 and a message, which is returned; nothing may be written or computed before."""
    monkeypatch.chdir(tiny.parent)

    def run(*words: str | Path, status: int = 2) -> str:
        before = sorted(tiny.parent.rglob("*"))
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("a CUDA device was initialised"))
            found = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert found == status, out + err
        assert "Traceback" not in out + err
        assert sorted(tiny.parent.rglob("*")) == before, "something was written"
        return err if status == 2 else out

    return run


def problems(message: str) -> list[str]:
    """The list below the head line, which counts them."""
    head, *lines = message.splitlines()
    assert head.endswith(f": {len(lines)} error{'s' if len(lines) != 1 else ''}"), message
    return [line.removeprefix("  ") for line in lines]


# ---------------------------------------------------------------- what the config says
LOADING = {
    "unknown key": ("--model.n_layer=3", "model.n_layer: unknown key of model 'decoder'; did you mean 'n_layers'? (keys: "),
    "unknown section": ("--trian.steps=3", "trian: unknown key; did you mean 'train'? (keys: "),
    "word for a number": ("--model.n_layers=twelve", "model.n_layers: expected an integer, got str 'twelve'"),
    "fraction for an integer": ("--model.n_layers=12.5", "model.n_layers: expected an integer, got float 12.5"),
    "quoted number": ('--train.steps="12"', "train.steps: expected an integer, got str '12'"),
    "truth for a number": ("--train.steps=true", "train.steps: expected an integer, got bool True"),
    "infinite": ("--train.clip=inf", "train.clip: expected a finite number, got float inf"),
    "out of range": ("--train.micro_batch=0", "train.micro_batch: expected a number greater than 0, got int 0"),
    "streams": ("--data.n_streams=0", "data.n_streams: expected a number greater than 0, got int 0"),
    "choice": ("--train.precision=fp16", "train.precision: expected 'fp32' or 'bf16', got str 'fp16'"),
    "unknown component": ("--optimizer=adam", "optimizer.0.name: no optimizer named 'adam'; did you mean 'adamw'? (known: "),
    "unknown model": ("--model=GTP", "model.name: no model named 'GTP' (known: "),
    "missing setting": ("--tokenizer=sentencepiece", "tokenizer.path: missing; it has no default"),
    "codec level": ("--export.exporter.level=99", "level = 99 does not exist for codec 'zstd' (1 to 22)"),
    "codec": ("--export.exporter.codec=rar", "export.exporter.codec: expected 'zstd', 'lzma', 'zlib', 'brotli', 'none' or 'auto', got str 'rar'"),
}


@pytest.mark.parametrize("mistake", LOADING)
def test_mistakes_found_while_loading(mistake: str, refuse: Refuse, tiny: Path) -> None:
    override, expected = LOADING[mistake]
    for command in (["train", tiny, override], ["train", tiny, override, "--dry-run"]):
        (problem,) = problems(refuse(*command))
        assert problem.startswith(override.partition("=")[0])  # where it was written
        assert expected in problem
    assert problems(refuse("config", "check", tiny, override, status=1)) == [problem]


CHECKED = {
    "micro-batch": (["--train.micro_batch=3"], ["train.micro_batch: 3 rows do not divide train.global_batch = 8"]),
    "heads": (["--model.n_heads=5", "--model.n_kv_heads=1"], ["model.n_heads: 5 heads do not divide d_model = 32; change either or set head_dim"]),
    "odd rotary": (["--model.head_dim=7"], ["model.head_dim: must be even for rotary positions, is 7"]),
    "kv heads": (["--model.n_kv_heads=3"], ["model.n_kv_heads: 3 does not divide n_heads = 4"]),
    "vocabulary": (["--model.vocab_size=200"], ["model.vocab_size: 200 is smaller than the tokenizer's 257; leave it unset to take that"]),
    "too long": (["--train.seq_len=5000"], ["model.max_positions: 4096, but sequences of 5000 tokens are asked for; raise it or shorten them"]),
    "declared size": (["--model.expect_params=26_000"], ["model.expect_params: 26,000, but the settings make 26,848 parameters (+3.3%)"]),
    "schedule": (["--scheduler.warmup_steps=21"], ["scheduler.warmup_steps: warmup_steps 21 exceed train.steps = 20"]),
    "two-part schedule": (
        ['--scheduler={name="wsd",warmup_steps=8,decay_steps=13}'],
        ["scheduler.warmup_steps: warmup_steps 8 + decay_steps 13 exceed train.steps = 20"],
    ),
    "pattern": (
        ['--optimizer.0.params=["blocks.*.atention.*", "*"]'],
        ["optimizer.0.params: pattern 'blocks.*.atention.*' matches no parameter"],
    ),
    "role": (['--optimizer.0.params=["@matrx", "*"]'], ["optimizer.0.params: no role '@matrx'; did you mean 'matrix'? (roles: @embedding, "]),
    "idle optimizer": (
        ['--optimizer=["adamw", "adamw"]'],
        ["optimizer.1.params: every parameter matched by ['*'] is claimed by an entry before it, or there is none"],
    ),
    "unclaimed": (
        ['--optimizer.0.params=["blocks.*", "norm.*"]'],
        ['optimizer: no entry claims embedding.weight; add an entry with params = ["*"] at the end'],
    ),
    "quantizer's pattern": (['--quantizer=[{name="int8",params=["head.*"]}]'], ["quantizer.0.params: pattern 'head.*' matches no parameter"]),
    "equal names": (
        ['--validation=[{name="a"},{name="b"},{name="a"}]'],
        ["validation: two sets are named 'a'; give each a `name` of its own"],
    ),
    "no such data": (['--dataset.paths=["nope*.txt"]'], ["dataset.paths: 'nope*.txt' is no file, no directory with files and no glob that matches any"]),
    "no such validation data": (
        ['--validation.0.dataset={name="text",paths=["nope.txt"]}'],
        ["validation.0.dataset.paths: 'nope.txt' is no file, no directory"],
    ),
    "folder without files": (['--dataset.paths=["empty"]'], ["dataset.paths: 'empty' is no file, no directory with files"]),
    "empty files": (
        ['--dataset.paths=["empty.txt"]', "--dataset.validation_fraction=0", '--dataset.validation_paths=["corpus.txt"]'],
        ["dataset: dataset 'text': dataset.paths has no rows for 'train' in 1 files: every file is empty"],
    ),
    "blank text": (
        ['--dataset.paths=["blank.txt"]', "--dataset.validation_fraction=0", '--dataset.validation_paths=["corpus.txt"]', "--dataset.unit=line"],
        ["dataset: dataset 'text': all 3 rows that stream 0 of 8 reads are empty"],
    ),
    "blank validation text": (
        ["--dataset.validation_fraction=0", '--dataset.validation_paths=["blank.txt"]'],
        ["dataset: no text: every row is empty, unreadable or refused by dataset.filter"],
    ),
    "endless validation": (
        ['--validation=[{name="a"},{name="b",split="train"}]'],
        ["validation.1.max_tokens: the split 'train' never ends; say how many tokens of it to score"],
    ),
    "no validation data": (["--dataset.validation_fraction=0"], ["dataset: dataset 'text': there is no validation data; set dataset.validation_paths"]),
    "nothing but validation": (["--dataset.validation_fraction=1"], ["dataset: dataset 'text': dataset.paths has no rows for 'train'"]),
    "not UTF-8": (['--dataset.paths=["latin.txt"]', "--dataset.validation_fraction=0.5"], ["latin.txt: byte 2 is not UTF-8"]),
    "no model file": (
        ['--tokenizer={name="sentencepiece",path="nope.model"}'],
        ["nope.model (No such file or directory); make one with `titanlm tokenizer train --type spm`, or correct the path"],
    ),
    "damaged model file": (
        ['--tokenizer={name="sentencepiece",path="corpus.txt"}'],
        ["tokenizer.path: corpus.txt is no SentencePiece model or a damaged one; train one with `titanlm tokenizer train --type spm`"],
    ),
    "empty model file": (['--tokenizer={name="sentencepiece",path="empty.txt"}'], ["tokenizer.path: empty.txt is no SentencePiece model"]),
    "sample prompt": (
        ["--train.sample_every=5", f"--train.sample_prompt={'a' * 100}", "--model.max_positions=64"],
        ["train.sample_prompt: the prompt is 101 tokens long and model.max_positions is 64; shorten the prompt"],
    ),
}


@pytest.mark.parametrize("mistake", CHECKED)
def test_mistakes_found_by_the_check(mistake: str, refuse: Refuse, tiny: Path) -> None:
    overrides, expected = CHECKED[mistake]
    (tiny.parent / "empty").mkdir()
    (tiny.parent / "empty.txt").touch()
    (tiny.parent / "blank.txt").write_text(" \n\t\n \n")
    (tiny.parent / "latin.txt").write_bytes("ab\xe9\n\nab\xe9d\n\n\xe9".encode("latin-1"))
    found = problems(refuse("train", tiny, *overrides))
    assert len(found) >= len(expected)
    for each in expected:
        assert any(each in problem for problem in found), found
    assert problems(refuse("config", "check", tiny, *overrides, status=1)) == found


def test_all_mistakes_are_listed_at_once(refuse: Refuse, tiny: Path) -> None:
    loading = ["--model.n_layer=3", "--train.steps=12.5", "--optimizer=adam", "--scheduler.shape=x", "--data.n_streams=-1", "--nope.x=1"]
    assert len(problems(refuse("train", tiny, *loading))) == len(loading)
    checked = [
        *("--train.micro_batch=3", "--train.seq_len=5000", "--model.n_kv_heads=3", "--model.vocab_size=9"),
        *("--scheduler.warmup_steps=30", "--validation=[{},{}]", '--validation.0.dataset={name="text",paths=["x"]}'),
    ]
    assert [problem.partition(": ")[0] for problem in problems(refuse("train", tiny, *checked))] == [
        *("train.micro_batch", "validation.0.dataset.paths", "model.n_kv_heads", "model.vocab_size", "model.max_positions"),
        *("scheduler.warmup_steps", "validation"),
    ]


def test_sizes_within_two_percent_of_the_declared_are_accepted(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for declared, status in ((26_350, 0), (27_350, 0), (26_300, 1), (27_400, 1)):  # 26,848 in truth
        assert main(["config", "check", str(tiny), f"--model.expect_params={declared}"]) == status
    assert capsys.readouterr().out.count("expect_params") == 2


# ---------------------------------------------------------------- files
def test_wrong_files(refuse: Refuse, tiny: Path) -> None:
    (problem,) = problems(refuse("train", "tinny.toml"))
    assert problem == "tinny.toml: no such file; did you mean 'tiny.toml'?"
    (problem,) = problems(refuse("train", tiny.parent))
    assert "is a directory" in problem
    (tiny.parent / "a.toml").write_text('extends = "b.toml"')
    (tiny.parent / "b.toml").write_text('extends = "a.toml"')
    (problem,) = problems(refuse("train", "a.toml"))
    assert problem.endswith("extends: a file extends itself: a.toml → b.toml → a.toml")
    (tiny.parent / "c.toml").write_text("[train]\nsteps = \n")
    (problem,) = problems(refuse("train", "c.toml"))
    assert problem.startswith("c.toml:2: not valid TOML: ")
    (tiny.parent / "d.toml").write_bytes(b"\xff\xfe\x00")
    (problem,) = problems(refuse("train", "d.toml"))
    assert problem == "d.toml: not UTF-8 at byte 0"
    (tiny.parent / "e.toml").write_text(tiny.read_text() + '[export]\ndtype = "int4"\n')
    (problem,) = problems(refuse("train", "e.toml"))
    line = len(tiny.read_text().splitlines()) + 2
    assert problem.startswith(f"e.toml:{line}: export.dtype: expected 'float32', 'bfloat16' or 'float16', got str 'int4'")


def test_wrong_run_names(refuse: Refuse, tiny: Path) -> None:
    for name in ("../x", "a/b", ".hidden", "-x", ""):
        overrides = [f"--run.name={name}"]
        message = refuse("train", tiny, *overrides)
        assert "run.name: " in message
        assert "--run.name=NAME" in message


def test_config_check_goes_on_to_the_next_file(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tiny.with_name("bad.toml")
    bad.write_text(tiny.read_text().replace("n_kv_heads = 2", "n_kv_heads = 3"))
    assert main(["config", "check", str(bad), "nope.toml", str(tiny)]) == 1
    out = capsys.readouterr().out
    assert "model.n_kv_heads: 3 does not divide" in out
    assert "nope.toml: no such file" in out
    assert f"{tiny}: ok" in out


# ---------------------------------------------------------------- what the machine lacks
def test_missing_packages(refuse: Refuse, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("wandb", "tensorboard", "zstandard"):
        monkeypatch.setitem(sys.modules, package, None)
    assert problems(refuse("train", tiny, '--logger=["console", "wandb", "tensorboard"]', "--export.at_end=true", "--train.micro_batch=3")) == [
        "train.micro_batch: 3 rows do not divide train.global_batch = 8",
        "logger.1: 'wandb' needs a package that is not installed; run: pip install wandb",
        "logger.2: 'tensorboard' needs a package that is not installed; run: pip install tensorboard",
        "export.exporter.codec: 'zstd' needs a package that is not installed; run: pip install zstandard, or use 'lzma'",
    ]


def test_missing_devices(refuse: Refuse, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = problems(refuse("train", tiny, "--train.device=cuda"))
    assert problem.startswith("train.device: 'cuda' is not available here, ")
    assert problem.endswith("; use 'cpu' or 'auto'")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    (problem,) = problems(refuse("train", tiny, "--train.device=auto", "--train.precision=bf16"))
    assert problem == "train.precision: Old GPU has no bf16; use 'fp32'"


def test_processes(refuse: Refuse, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    (problem,) = problems(refuse("train", tiny))
    assert problem.startswith("parallel.strategy: 'none' trains with one process and there are 2; use 'replicate'")
    monkeypatch.setattr(World, "from_environment", lambda: World(0, 3))
    (problem,) = problems(refuse("train", tiny, "--parallel.strategy=fsdp2"))
    assert problem.endswith("8 streams of data, cannot be shared out evenly among 3 ranks; 1, 2 ranks can")
    monkeypatch.undo()
    monkeypatch.setenv("RANK", "5")
    (problem,) = problems(refuse("train", tiny))
    assert problem.startswith("parallel: the environment contradicts itself: RANK=5 WORLD_SIZE=1")
    monkeypatch.setenv("RANK", "one")
    (problem,) = problems(refuse("train", tiny))
    assert problem.startswith("parallel: the environment variable RANK is 'one', which is no whole number")


# ---------------------------------------------------------------- runs, checkpoints, artifacts
@pytest.fixture
def trained(tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder with checkpoints of steps 2 and 4, and an artifact."""
    monkeypatch.chdir(tiny.parent)
    assert main(["train", str(tiny), "--train.steps=4", "--checkpoint.every=2", "--export.at_end=true"]) == 0
    capsys.readouterr()
    return tiny.parent / "runs" / "tiny"


def test_targets_that_are_none(refuse: Refuse, trained: Path) -> None:
    assert "nope: no such run folder, checkpoint folder or artifact file" in refuse("eval", "nope")
    assert "no such run folder" in refuse("generate", "nope")
    for folder in ("runs", "runs/tiny/checkpoints"):
        assert "not a run folder (no checkpoints in it), a checkpoint folder or an artifact file" in refuse("eval", folder)
    assert "not a titanlm artifact" in refuse("eval", "tiny.toml")
    assert "no checkpoint of step 3 (there: 2, 4)" in refuse("export", trained, "--step=3")
    assert "leave out --step" in refuse("export", trained / "checkpoints" / "step-00000004", "--step=2")
    assert "no checkpoints in it" in refuse("export", trained / "artifact.titanlm")
    assert "leave out --averaged and --raw" in refuse("eval", trained / "artifact.titanlm", "--raw")
    (trained / "checkpoints" / "step-4").mkdir()
    assert "not a checkpoint folder (step-00000123)" in refuse("eval", trained / "checkpoints" / "step-4")


def test_overrides_of_a_stored_config(refuse: Refuse, trained: Path) -> None:
    assert "model.max_positions: 4096, but sequences of 5000 tokens are asked for" in refuse("eval", trained, "--train.seq_len=5000")
    assert "model.n_heads: 3 heads do not divide d_model = 32" in refuse("export", trained, "--model.n_heads=3")
    assert "blocks.1.attention.k_norm.weight: not part of the model" in refuse("eval", trained, "--model.n_layers=1")
    assert "embedding.weight: shape [257, 32], the model has [300, 32]" in refuse("eval", trained, "--model.vocab_size=300")
    assert "model.n_layer: unknown key of model 'decoder'; did you mean 'n_layers'?" in refuse("eval", trained, "--model.n_layer=1")
    assert "train.steps: expected an integer, got str 'x'" in refuse("eval", trained / "artifact.titanlm", "--train.steps=x")
    assert "dataset.paths: 'nope.txt' is no file" in refuse("eval", trained, '--dataset.paths=["nope.txt"]')
    assert "quantizer.0.params: pattern 'head.*' matches no parameter" in refuse("export", trained, '--quantizer=[{name="int8",params=["head.*"]}]')


def test_an_artifact_over_the_limit(refuse: Refuse, trained: Path) -> None:
    artifact = (trained / "artifact.titanlm").read_bytes()
    message = refuse("export", trained, "--export.max_bytes=20_000")
    n_bytes = len(artifact)  # the limit is written into it, in six characters before compression
    assert " over export.max_bytes = 20,000; nothing was written\n" in message
    assert int(message.split("takes ")[1].split(" ")[0].replace(",", "")) == pytest.approx(n_bytes, abs=64)
    assert "use fewer bits ([[quantizer]])" in message
    assert message.splitlines()[3].split() == ["16,448", "embedding.weight"]  # the largest tensor first: 257 · 32 · 2 bytes
    assert (trained / "artifact.titanlm").read_bytes() == artifact


def test_a_limit_exceeded_at_the_end_of_training_keeps_the_run(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tiny), "--train.steps=3", "--scheduler=constant", "--export.at_end=true", "--export.max_bytes=1000"]) == 2
    assert "over export.max_bytes = 1,000; nothing was written" in capsys.readouterr().err
    run = tiny.parent / "runs" / "tiny"
    assert not (run / "artifact.titanlm").exists()
    assert main(["export", str(run), "--export.max_bytes=100_000"]) == 0


def test_damaged_artifacts(refuse: Refuse, trained: Path) -> None:
    content = (trained / "artifact.titanlm").read_bytes()
    for length in (0, 10, 47, 1000, len(content) - 1):
        (trained / "cut").write_bytes(content[:length])
        for verb in ("eval", "generate"):
            assert "cut: " in refuse(verb, trained / "cut")
    flipped = bytearray(content)
    flipped[-100] ^= 1
    (trained / "flipped").write_bytes(flipped)
    assert "the payload does not match its checksum, so the file is damaged; copy or export it again" in refuse("eval", trained / "flipped")


def test_a_run_with_damaged_checkpoints_only(refuse: Refuse, tiny: Path, trained: Path) -> None:
    for folder in (trained / "checkpoints").iterdir():
        file = folder / "model-00000.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    for verb in ("eval", "export", "generate"):
        message = refuse(verb, trained)
        assert len(re.findall(r"model-00000\.safetensors \(part of rank 0\) is damaged: .*; passed over", message)) == 2
        assert message.endswith(f"{trained}: no valid checkpoint in it yet\n")
    message = refuse("train", tiny, "--train.steps=4", "--checkpoint.every=2")  # it does not start over what was trained before
    assert message.count("model-00000.safetensors (part of rank 0) is damaged") == 2
    assert message.endswith("no checkpoint in it is sound; move the run folder away or choose another run.name to start anew\n")
    assert "step-00000002: model-00000.safetensors (part of rank 0) is damaged" in refuse("eval", trained / "checkpoints" / "step-00000002")
    assert "step-00000002: model-00000.safetensors (part of rank 0) is damaged" in refuse("export", trained, "--step=2")


def test_settings_that_may_not_change_on_resume(refuse: Refuse, tiny: Path, trained: Path) -> None:
    message = refuse("train", tiny, "--train.steps=6", "--checkpoint.every=2", "--train.clip=0.5", "--model.n_layers=3")
    assert "train.clip: 1.0 → 0.5" in message
    assert "model.n_layers: 2 → 3" in message
    assert "go back to them, choose another run.name, or name them in checkpoint.allow_changes" in message
    message = refuse("train", tiny, "--checkpoint.resume=never")
    assert "holds checkpoints and checkpoint.resume is 'never'; choose another run.name" in message


def test_another_tokenizer_than_in_training(tiny: Path, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Retrained in place: the config is the same, the ids are not."""
    monkeypatch.chdir(tiny.parent)
    train_sentencepiece([corpus.read_text()], Path("spm.model"), 320)
    train = ["train", str(tiny), '--tokenizer={name="sentencepiece",path="spm.model"}', "--scheduler=constant"]
    assert main([*train, "--train.steps=2"]) == 0
    assert main(["export", "runs/tiny"]) == 0
    kept = Path("spm.model").read_bytes()
    train_sentencepiece([corpus.read_text()[::-1]], Path("spm.model"), 320)
    capsys.readouterr()
    for command in (["eval", "runs/tiny"], ["export", "runs/tiny"], ["generate", "runs/tiny"], ["eval", "runs/tiny/checkpoints/step-00000002"]):
        assert main(command) == 2
        assert "made with another tokenizer than the one found now (fingerprints differ)" in capsys.readouterr().err
    assert main([*train, "--train.steps=3"]) == 2
    assert "the tokenizer and the dataset changed" in (err := capsys.readouterr().err) or "the tokenizer changed" in err
    assert main(["eval", "runs/tiny/artifact.titanlm"]) == 0  # which carries its own
    Path("spm.model").unlink()
    assert main(["eval", "runs/tiny"]) == 2
    assert "spm.model (No such file or directory)" in capsys.readouterr().err
    Path("spm.model").write_bytes(kept)
    assert main([*train, "--train.steps=3"]) == 0


def test_modules_that_cannot_be_imported(refuse: Refuse, tiny: Path, trained: Path) -> None:
    assert "imports.0: no module named 'outside_nope'; install its package" in refuse("train", tiny, '--imports=["outside_nope"]')
    for verb in ("eval", "export", "generate"):
        assert "no module named 'outside_nope'; install its package" in refuse(verb, trained, "--import", "outside_nope")
        for name in (".relative", "", "a/b.py"):
            assert "expected a dotted module name such as 'my_pkg.lion'" in refuse(verb, trained, f"--import={name}")


def test_sampling_options(refuse: Refuse, trained: Path) -> None:
    for option in ("--temperature=-1", "--temperature=nan", "--temperature=inf", "--top-k=0", "--top-p=0", "--top-p=1.5", "--max-tokens=0", "--seed=-1"):
        assert option.partition("=")[0] in refuse("generate", trained, option)


# ---------------------------------------------------------------- a real process
@pytest.mark.slow
def test_in_a_process_of_its_own(tiny: Path) -> None:
    """Through the interpreter's own door: status, one piece on stderr, nothing on stdout; and no CUDA context for config mistakes."""
    code = (
        "import sys, torch; from titanlm.cli import main; status = main(sys.argv[1:])\n"
        "print('cuda initialised' if torch.cuda.is_initialized() else '', end=''); sys.exit(status)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    words = ["train", str(tiny), "--train.device=auto", "--model.n_kv_heads=3", "--train.micro_batch=3"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment, cwd=tiny.parent, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(problems(done.stderr)) == 2
    assert not (tiny.parent / "runs").exists()
    done = subprocess.run([sys.executable, "-m", "titanlm", "eval", "nope"], capture_output=True, text=True, env=environment, cwd=tiny.parent, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "nope: no such run folder, checkpoint folder or artifact file\n"


def test_a_diverged_model_is_valid_json(trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not finite is null, since JSON has no nan."""
    monkeypatch.setattr(evaluate, "score", lambda *_: evaluate.Scores(loss=math.nan, n_tokens=1, n_bytes=1, nll=math.nan))
    assert main(["eval", str(trained), "--json"]) == 0
    values = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))["validation"]["validation"]
    assert values["loss"] is None
    assert values["perplexity"] is None
