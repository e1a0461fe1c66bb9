"""Programs of a submission, run with bounds: time, output, environment."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from titanlm.errors import TitanError

_MAX_OUTPUT_BYTES = 1 << 20
_KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class Ended:
    status: int
    output: bytes
    errors: bytes

    @property
    def last_words(self) -> str:
        lines = self.errors.decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:300] if lines else "without a word"


def environment(scratch: Path) -> dict[str, str]:
    """No keys, tokens or settings of the user's, and a home that goes away."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return kept | {"HOME": str(scratch), "TMPDIR": str(scratch)}


def run(command: Sequence[str], folder: Path, variables: Mapping[str, str], timeout_s: float) -> Ended:
    """Run to the end, or until it takes too long or prints too much (TitanError); whatever it started ends with it."""
    process = subprocess.Popen(
        command, cwd=folder, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    deadline = time.monotonic() + timeout_s
    printed = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    try:
        with process.stdout, process.stderr, selectors.DefaultSelector() as selector:
            for descriptor in printed:
                selector.register(descriptor, selectors.EVENT_READ)
            while selector.get_map():
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise TitanError(f"took longer than {timeout_s:g} s and was stopped")
                for key, _ in ready:
                    piece = os.read(key.fd, 1 << 16)
                    printed[key.fd] += piece
                    if not piece:
                        selector.unregister(key.fd)
                if sum(map(len, printed.values())) > _MAX_OUTPUT_BYTES:
                    raise TitanError(f"printed more than {_MAX_OUTPUT_BYTES:,} bytes and was stopped")
            output, errors = map(bytes, printed.values())
        try:
            return Ended(process.wait(max(0.0, deadline - time.monotonic())), output, errors)
        except subprocess.TimeoutExpired as error:
            raise TitanError(f"took longer than {timeout_s:g} s and was stopped") from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
