"""Hostile files, secrets, the network and the terminal (H)."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import pickle
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from titanlm import checkpoint
from titanlm.cli import main
from titanlm.datasets.shard_file import ShardWriter, dtype_for, open_shard, read_manifest
from titanlm.errors import DataError, TitanError
from titanlm.exporters.artifact import read_artifact
from titanlm.registry import Component
from titanlm.tokenizers.training import train_sentencepiece

ROOT = Path(__file__).parents[2]
PROVED = {
    "H1 checkpoint": "tests/test_checkpoint.py::test_pickle_is_never_read",
    "H1 artifact": "tests/exporters/test_artifact_hostile.py::test_nothing_is_unpickled_or_imported_by_name",
    "H3 names in an artifact": "tests/exporters/test_artifact.py::test_tokenizer_file_names_stay_in_their_folder",
    "H3 pipes and devices as data": "tests/datasets/test_files.py::test_h3_pipes_and_devices_are_not_opened",
    "H3 pipe as an artifact": "tests/exporters/test_artifact_hostile.py::test_what_is_no_file",
    "H4": "tests/datasets/test_files.py::test_h4_protocols_that_are_not_read",
    "H5 wandb": "tests/loggers/test_wandb.py::test_nothing_secret_is_stored_or_sent",
    "H5 errors of libraries": "tests/datasets/test_files.py::test_h5_no_secret_in_errors_or_fingerprints",
    "H5 environment": "tests/test_environment.py::test_report_holds_nothing_private",
    "H7 a check": "tests/test_check.py::test_h7_a_check_looks_at_no_url_and_a_run_does",
    "H7 tokenizer": "tests/tokenizers/test_huggingface.py::test_nothing_reaches_for_a_network",
    "H8 terminal": "tests/loggers/test_console.py::test_control_characters_never_reach_the_terminal",
    "H8 file names": "tests/datasets/test_files.py::test_h8_control_characters_in_names_are_escaped",
    "H8 fingerprints": "tests/tokenizers/test_fingerprint.py::test_difference_obeys_no_terminal_sequences",
    "H9": "tests/tokenizers/test_huggingface.py::test_what_the_file_says_beyond_cutting_text_is_ignored",
}
"""Cases of the fault matrix that other files prove."""

WATCHED = """
import os, sys
seen = []
def hook(event, arguments):
    if event in ("pickle.find_class", "os.system", "socket.connect", "socket.getaddrinfo", "socket.bind"):
        seen.append((event, *map(str, arguments[-1:])))
    elif event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if not path.startswith((os.environ["ALLOWED"] + os.sep, "/dev/", "/proc/")):
            seen.append((event, path))
sys.addaudithook(hook)
"""
"""Begins a child whose forbidden acts are counted in ``seen``: unpickling, shells, sockets, writing outside of $ALLOWED."""


def watched(code: str, folder: Path, *words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "ALLOWED": str(folder.resolve()), **environment}
    variables["TMPDIR"] = variables["ALLOWED"]
    command = [sys.executable, "-c", WATCHED + code, *map(str, words)]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=200, check=False)


LIFE = """
from titanlm.cli import main
config, run, artifact = sys.argv[1], "runs/tiny", "runs/tiny/artifact.titanlm"
imported_before = set(sys.modules)
for words in (
    ["train", config, "--train.steps=4", "--checkpoint.every=2"],
    ["train", config, "--train.steps=6", "--checkpoint.every=2"],
    ["eval", run], ["export", run], ["eval", artifact], ["generate", artifact, "--max-tokens=3", "--prompt=a"],
    ["data", "state", run], ["data", "prepare", "--input", "corpus.txt", "--tokenizer", "spm.model", "--output", "shards", "--workers=0"],
    ["data", "inspect", "shards", "--tokenizer", "spm.model"], ["tokenizer", "compare", "spm.model", "own.toml", "byte", "--input", "corpus.txt"],
):
    if main(words) not in (0, None):
        sys.exit(f"{words} failed")
if seen:
    sys.exit(f"{seen}")
"""


def test_h1_h7_a_life_of_a_run_unpickles_nothing_and_opens_no_socket(tiny: Path) -> None:
    """Train, resume, score, export, score and sample the artifact, prepare and read shards, three kinds of tokenizer; no file outside either."""
    train_sentencepiece([(tiny.parent / "corpus.txt").read_text()], tiny.parent / "spm.model", 400, "bpe")
    (tiny.parent / "own.tiktoken").write_bytes(b"".join(base64.b64encode(bytes([value])) + b" %d\n" % value for value in range(256)))
    tokenizer = '[tokenizer]\nname = "tiktoken"\npath = "own.tiktoken"\npattern = "gpt2"\n'
    (tiny.parent / "own.toml").write_text(tiny.read_text().replace('tokenizer = "byte"\n', tokenizer))
    done = watched(LIFE, tiny.parent, tiny)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture(scope="module")
def payloads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of pickles, by the way they were written; loading one makes ``mark``."""
    mark = tmp_path_factory.mktemp("mark") / "made"
    array, zipped = io.BytesIO(), io.BytesIO()
    np.save(array, np.array([Payload(mark)], dtype=object))
    torch.save({"x": Payload(mark)}, zipped)
    made = {"pickle": pickle.dumps(Payload(mark)), "text pickle": pickle.dumps(Payload(mark), 0), "npy": array.getvalue(), "pt": zipped.getvalue()}
    pickle.loads(made["pickle"])
    assert mark.exists()  # the payloads work
    mark.unlink()
    return {**made, "mark": str(mark).encode()}


def test_h1_h2_pickles_in_place_of_every_file_are_refused(tiny: Path, payloads: dict[str, bytes]) -> None:
    """Also with manifests that were made to match; nothing falls back to another reader."""
    mark = Path(payloads.pop("mark").decode())
    folder = checkpoint_of(tiny.parent / "runs" / "x")
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    for content in payloads.values():
        for name in ("MANIFEST.json", *(name for name in manifest["files"] if not name.endswith(".toml"))):
            before = (folder / name).read_bytes(), (folder / "MANIFEST.json").read_bytes()
            (folder / name).write_bytes(content)
            if name != "MANIFEST.json":
                entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                (folder / "MANIFEST.json").write_text(json.dumps({**manifest, "files": {**manifest["files"], name: entry}}))
            with pytest.raises(TitanError):
                everything(checkpoint.load(folder))
            (folder / name).write_bytes(before[0])
            (folder / "MANIFEST.json").write_bytes(before[1])
        file = tiny.parent / "payload"
        file.write_bytes(content)
        for read in (
            read_artifact,
            open_shard,
            lambda path: read_manifest(path.parent),
            *(lambda path, name=name: Component.named("tokenizer", name, path=str(path)).build() for name in ("sentencepiece", "huggingface")),
            lambda path: Component.named("tokenizer", "tiktoken", path=str(path), pattern="gpt2").build(),
        ):
            (tiny.parent / "shards.json").write_bytes(content)
            with pytest.raises(TitanError):
                read(file)
        (tiny.parent / "state.json").write_bytes(content)
        assert main(["data", "state", "--import", str(tiny.parent / "state.json"), "--output", str(tiny.parent / "out.json"), "--trust", "shards"]) == 2
        assert main(["eval", str(file)]) == 2
        assert main(["train", str(file)]) == 2
    everything(checkpoint.load(folder))
    assert not mark.exists()


def checkpoint_of(root: Path) -> Path:
    """A small valid checkpoint."""
    state = {"model": {"w": torch.ones(3)}, "progress": {"step": 3}}
    return checkpoint.save(root, 3, state, {"rng": torch.zeros(2, dtype=torch.uint8)}, "x = 1\n")


def everything(loaded: Any) -> None:
    """Touch every tensor, should they be read lazily."""
    repr(loaded)


UNSAFE = re.compile(
    r"""
      ^\s*(?:import|from)\ (?:pickle|dill|joblib|shelve|marshal)\b | \btorch\.load\( | \byaml\.load\( | (?<![\w.])(?:eval|exec)\(
    | weights_only=False | allow_pickle=True | os\.system\( | shell=True
    """,
    re.MULTILINE | re.VERBOSE,
)


def test_h1_h2_no_source_file_reaches_for_what_runs_code() -> None:
    """The registry evaluates annotations of modules that were imported, and a submission's script runs the modules that are in itself; no file's text is."""
    found = {str(path.relative_to(ROOT)): match[0] for path in (ROOT / "titanlm").rglob("*.py") if (match := UNSAFE.search(path.read_text(encoding="utf-8")))}
    assert found == {"titanlm/registry.py": "eval(", "titanlm/submission/bundle.py": "exec("}


@pytest.mark.parametrize("kind", ["absolute", "parent", "link", "pipe"])
def test_h3_what_a_checkpoint_names_stays_in_its_folder(tmp_path: Path, kind: str) -> None:
    folder = checkpoint_of(tmp_path)
    secret = tmp_path / "secret.safetensors"
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    (name,) = (name for name in manifest["files"] if name.startswith("model"))
    secret.write_bytes((folder / name).read_bytes())
    if kind in ("absolute", "parent"):
        other = str(secret) if kind == "absolute" else "../secret.safetensors"
        manifest["files"][other] = manifest["files"].pop(name)
        (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    (folder / name).unlink()
    if kind == "link":
        (folder / name).symlink_to(secret)
    if kind == "pipe":
        os.mkfifo(folder / name)
    assert checkpoint.verify(folder) is not None
    with pytest.raises(TitanError):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", ["MANIFEST.json", "config.toml"])
@pytest.mark.timeout(30)
def test_h3_a_pipe_in_place_of_a_file_makes_nobody_wait(tmp_path: Path, name: str) -> None:
    folder = checkpoint_of(tmp_path)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert checkpoint.verify(folder) is not None
    shards = tmp_path / "shards"
    shards.mkdir()
    os.mkfifo(shards / "shards.json")
    with pytest.raises(DataError, match=r"shards\.json"):
        read_manifest(shards)
    os.mkfifo(shards / "a.bin")
    with pytest.raises(DataError, match=r"a\.bin"):
        open_shard(shards / "a.bin")


CANARY = "canary-7f3a9c55"
SECRETS = {"WANDB_API_KEY": f"wandb-{CANARY}", "HF_TOKEN": f"hf-{CANARY}", "AWS_SECRET_ACCESS_KEY": f"aws-{CANARY}"}


def test_h5_secrets_of_the_environment_are_written_nowhere(tiny: Path) -> None:
    """Of the environment, and of a URL that is refused; in no file of the run, no output and no traceback."""
    code = """
from titanlm.cli import main
config, address = sys.argv[1:]
assert main(["train", config, "--train.steps=3", "--export.at_end=true", "--logger=[\\"console\\",\\"jsonl\\",\\"tensorboard\\"]"]) == 0
for refused in (f'--dataset.paths=["{address}"]', f'--validation=[{{file="{address}"}}]', f'--dataset.validation_paths=["{address}"]'):
    assert main(["train", config, refused, "--run.name=refused"]) == 2
    main(["config", "check", config, refused])  # looks at no URL, and may find nothing wrong
print(main(["env"]))
raise RuntimeError("a traceback")
"""
    address = f"https://me:{CANARY}@example.org/a.jsonl"
    done = watched(code, tiny.parent, tiny, address, **SECRETS)
    assert "RuntimeError: a traceback" in done.stderr, done.stderr
    assert CANARY not in done.stdout + done.stderr
    files = [path for path in tiny.parent.rglob("*") if path.is_file()]
    assert {"config.toml", "environment.json", "log.txt", "metrics.jsonl", "artifact.titanlm", "MANIFEST.json"} <= {path.name for path in files}
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


def test_h6_modes_follow_the_umask_and_temporary_files_lie_beside(tmp_path: Path) -> None:
    for umask, folder_mode, file_mode in ((0o022, 0o755, 0o644), (0o077, 0o700, 0o600)):
        before = os.umask(umask)
        try:
            folder = checkpoint_of(tmp_path / f"{umask:o}")
            with ShardWriter(tmp_path / f"{umask:o}.bin", dtype_for(9)) as writer:
                writer.write(np.arange(3))
                writer.close()
        finally:
            os.umask(before)
        assert stat.S_IMODE(folder.stat().st_mode) == folder_mode
        for file in [*folder.iterdir(), tmp_path / f"{umask:o}.bin"]:
            assert stat.S_IMODE(file.stat().st_mode) == file_mode, file


ESCAPE = "\x1b]0;owned\x07\x1b[31m"


def test_h8_escapes_in_a_config_are_not_obeyed(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tiny.read_text()
    (tiny.parent / "evil.toml").write_text(text + '"\\u001b[31mkey" = 1\n')
    settings = ("run.name", "run.dir", "checkpoint.best", "tokenizer", "train.precision", "model.name", "data.start", "scheduler.shape")
    for words in (
        *(["train", str(tiny), f'--{key}="\\u001b]0;owned\\u0007\\u0000"'] for key in settings),
        *(["config", "check", str(tiny), f'--{key}="\\u001b]0;owned\\u0007\\u0000"'] for key in settings),
        ["config", "check", str(tiny.parent / "evil.toml")],
        ["config", "diff", str(tiny), str(tiny), "--validation.0.name=\x1b[31m"],
        ["train", str(tiny), f'--dataset.paths=["{ESCAPE}"]'],
        ["train", f"{ESCAPE}.toml"],
        ["train", str(tiny), f"--{ESCAPE}=1"],
        ["eval", f"{ESCAPE}"],
        [f"{ESCAPE}"],
        ["data", "inspect", f"{ESCAPE}.txt"],
        ["config", "show", str(tiny), '--run.name="\\u001b[31m"'],
    ):
        main(words)
        out, err = capsys.readouterr()
        assert not set(out + err) & {"\x1b", "\x07", "\0"}, (words, out, err)


def test_h8_escapes_in_documents_are_not_obeyed(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{ESCAPE.replace('/', '')}.txt"
    (tiny.parent / name).write_text(f"{ESCAPE} a document\n\n" * 20 + "".join(f"{ESCAPE}{number}\n\n" for number in range(90)))
    overrides = [f"--dataset.paths={json.dumps([str(tiny.parent / name)])}", "--train.steps=3", "--train.sample_every=1", f"--train.sample_prompt={ESCAPE}"]
    assert main(["train", str(tiny), "--run.name=ansi", *overrides]) == 0
    assert main(["data", "inspect", str(tiny.parent / name)]) == 0
    log = (tiny.parent / "runs" / "ansi" / "log.txt").read_text(encoding="utf-8")
    out, err = capsys.readouterr()
    assert "\\x1b]0;owned" in log
    assert not set(out + err + log) & {"\x1b", "\x07"}


def test_h8_a_sample_is_escaped_on_a_terminal_and_whole_in_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from titanlm import generate

    monkeypatch.setattr(generate, "generate_text", lambda *_, **__: iter([ESCAPE, "end"]))
    assert main(["generate", "x"]) == 0
    assert capsys.readouterr().out == f"{ESCAPE}end\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["generate", "x"]) == 0
    assert capsys.readouterr().out == "\\x1b]0;owned\\x07\\x1b[31mend\n"
