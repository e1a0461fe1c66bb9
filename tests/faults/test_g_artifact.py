"""The artifact: its limit to the byte, damage and forgery, and another process that reads it (G)."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from titanlm.config import load
from titanlm.errors import ArtifactError
from titanlm.evaluate import evaluate_target
from titanlm.export import export_run
from titanlm.exporters.artifact import read_artifact
from titanlm.exporters.encoding import ExportRequest
from titanlm.exporters.header import MAGIC, PREFIX, VERSION
from titanlm.registry import Component
from titanlm.train import Trainer

ROOT = Path(__file__).parents[2]
PROVED = {
    "G1 every byte counts": "tests/exporters/test_artifact.py::test_the_limit_is_exact",
    "G1 an export": "tests/test_export.py::test_the_limit_is_met_to_the_byte",
    "G2": "tests/exporters/test_artifact.py::test_the_limit_is_exact",
    "G3 a failing disk": "tests/exporters/test_artifact.py::test_a_write_that_fails_leaves_the_old_artifact",
    "G3 Ctrl-C": "tests/exporters/test_artifact.py::test_a_write_that_is_interrupted_leaves_the_old_artifact",
    "G4 flips": "tests/exporters/test_artifact_hostile.py::test_200_bit_flips_are_200_errors",
    "G4 cut off": "tests/exporters/test_artifact_hostile.py::test_truncation_at_every_byte",
    "G4 trailing bytes": "tests/exporters/test_artifact_hostile.py::test_trailing_bytes",
    "G4 trailing bytes in the payload": "tests/exporters/test_artifact_hostile.py::test_trailing_bytes_inside_the_payload",
    "G5": "tests/exporters/test_artifact_hostile.py::test_bombs_are_refused_in_bounded_memory",
    "G5 windows": "tests/exporters/test_artifact_hostile.py::test_windows_of_gigabytes_are_refused",
    "G6": "tests/exporters/test_artifact_hostile.py::test_forged_headers",
    "G6 a million parts": "tests/exporters/test_artifact_hostile.py::test_a_million_rows_are_refused_soon",
    "G6 scales that are not finite": "tests/exporters/test_artifact_hostile.py::test_forged_values",
    "G8": "tests/exporters/test_artifact.py::test_same_bytes_in_another_process",
    "G8 twice": "tests/test_export.py::test_the_same_bytes_twice",
    "G9 embedded": "tests/test_export.py::test_an_embedded_tokenizer_travels",
    "G9 beside": "tests/exporters/test_artifact.py::test_the_tokenizer_beside_is_verified",
}
"""Cases of the fault matrix that other files prove."""


def write(path: Path, fill: float = 1.0, **settings: Any) -> Any:
    request = ExportRequest(path, "x = 1\n", settings.pop("max_bytes", None), "embed", {"tok": b"abc"}, "fp", **settings)
    return Component.named("exporter", "artifact", codec="zlib").build().write({"w": torch.full((40, 40), fill)}, request)


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_g1_sixteen_million_bytes_of_code_and_model(tmp_path: Path, over: int) -> None:
    n_bytes = write(tmp_path / "measured").n_bytes
    path = tmp_path / "new" / "artifact"
    limit = {"max_bytes": 16_000_000, "code_bytes": 16_000_000 + over - n_bytes}
    if over <= 0:
        assert write(path, **limit).n_bytes == 16_000_000 + over
        return
    with pytest.raises(ArtifactError, match=r"takes 16,000,001 bytes, 1 over export.max_bytes = 16,000,000; nothing was written") as error:
        write(path, **limit)
    assert f"code {limit['code_bytes']:,}" in str(error.value)
    assert "  w" in str(error.value)
    assert not path.parent.exists()


def in_a_child(work: Any) -> int:
    """Exit status of a forked process, negative for the signal that killed it."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_g3_killed_at_any_moment_there_is_the_old_artifact_or_the_new(tmp_path: Path) -> None:
    """``kill -9`` at the n-th event of the export that Python audits or that flushes to disk, for every n until one gets through."""
    path, kept = tmp_path / "artifact", tmp_path / "kept"
    write(path)
    old = path.read_bytes()
    write(kept, fill=2.0)
    new = kept.read_bytes()
    kept.unlink()

    def killed_at(n: int) -> None:
        count = 0

        def tick(*_: object) -> None:
            nonlocal count
            count += 1
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)

        fsync = os.fsync
        os.fsync = lambda fd: (tick(), fsync(fd))[1]
        sys.addaudithook(lambda event, arguments: tick() if event in ("open", "os.rename", "os.remove", "os.mkdir") else None)
        write(path, fill=2.0)

    outcomes = []
    for n in range(1, 100):
        status = in_a_child(lambda n=n: killed_at(n))
        assert path.read_bytes() in (old, new)
        read_artifact(path)
        outcomes.append(path.read_bytes() == new)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        path.write_bytes(old)
    assert outcomes[0] is False
    assert outcomes[-1] is True
    assert len(outcomes) > 4


def test_g3_a_full_disk_leaves_the_old_artifact(tmp_path: Path) -> None:
    """A real limit on the size of files, in a child."""
    path = tmp_path / "artifact"
    write(path)
    old = path.read_bytes()

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with pytest.raises(ArtifactError, match="File too large; what was there before is unchanged"):
            write(path, fill=2.0)

    assert in_a_child(full) == 0
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("declared", [1, 2**20, 2**62])
def test_g5_a_zstd_frame_that_lies_about_its_content_is_refused_at_once(tmp_path: Path, declared: int) -> None:
    zstandard = pytest.importorskip("zstandard")
    write(tmp_path / "artifact")
    data = (tmp_path / "artifact").read_bytes()
    end = PREFIX.size + PREFIX.unpack(data[: PREFIX.size])[2]
    header = json.loads(zlib.decompress(data[PREFIX.size : end]))
    # One block of 128 KiB of zeros in a single segment whose size is given in eight bytes.
    payload = zstandard.FRAME_HEADER + bytes([0xE0]) + declared.to_bytes(8, "little") + ((1 << 17) << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\0"
    header |= {"codec": "zstd", "payload_bytes": len(payload), "payload_sha256": hashlib.sha256(payload).hexdigest()}
    text = zlib.compress(json.dumps(header).encode())
    (tmp_path / "artifact").write_bytes(PREFIX.pack(MAGIC, VERSION, len(text), hashlib.sha256(text).digest()) + text + payload)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ArtifactError):
        read_artifact(tmp_path / "artifact")
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10


def test_g7_g8_a_fresh_process_elsewhere_scores_and_exports_the_same(tiny: Path) -> None:
    """bits per byte to the last digit, without the run folder; and the export of another process, with another hash seed and locale, is the same bytes."""
    with Trainer(load(tiny, ["--train.steps=4", "--scheduler.warmup_steps=1"])) as trainer:
        trainer.train()
    run = tiny.parent / "runs" / "tiny"
    export_run(run, device="cpu")
    artifact, again = tiny.parent / "moved.titanlm", tiny.parent / "again.titanlm"
    here = json.loads(evaluate_target(run / "artifact.titanlm", device="cpu", as_json=True))
    code = (
        "import sys; from titanlm.cli import main\n"
        "refuse = lambda event, _: sys.exit(event) if event == 'socket.connect' else None\nsys.addaudithook(refuse)\n"
        "assert main(['export', sys.argv[1], '--device=cpu', f'--output={sys.argv[2]}']) == 0\n"
        "import os, shutil; os.replace(f'{sys.argv[1]}/artifact.titanlm', sys.argv[3]); shutil.rmtree(sys.argv[1])\n"
        "print('SCORES'); sys.exit(main(['eval', sys.argv[3], '--json', '--device=cpu']))\n"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed, "TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(run), str(again), str(artifact)]
    done = subprocess.run(command, cwd=ROOT.anchor, env=variables, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout.partition("SCORES\n")[2])
    assert without_place(there) == without_place(here)
    assert again.read_bytes() == artifact.read_bytes()


def without_place(scores: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in scores.items() if key not in ("source", "target")}
