"""Starts training processes in tenths of a second: they are forked from a process that has imported torch and done nothing else.

Importing torch takes seconds, and a process that has run a backward pass cannot
be forked, so a test cannot fork itself. ``Zygote`` starts this file as a server
and asks it for groups of ranks, connected as torchrun would connect them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


# ---------------------------------------------------------------- the asking side
class Zygote:
    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        self._server = subprocess.Popen(
            [sys.executable, "-u", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )

    def train(self, config: Path, *overrides: str, ranks: int = 1, before: str = "", env: dict[str, str] | None = None) -> Launched:
        """``titanlm train CONFIG OVERRIDES`` on so many ranks; ``before`` is Python run first in each (``rank`` is its number)."""
        arguments = ["train", str(config), *overrides]
        return self.run(f"{before}\nfrom titanlm.cli import main\nraise SystemExit(main({arguments!r}))", ranks=ranks, env=env)

    def run(self, code: str, *, ranks: int = 1, env: dict[str, str] | None = None) -> Launched:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pids, log = self._ask({"code": code, "ranks": ranks, "port": port, "env": env or {}})
        return Launched(self, pids, Path(log))

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        self._server.kill()
        self._server.wait()


@dataclass
class Launched:
    zygote: Zygote
    pids: list[int]
    log: Path

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[rank], number)

    def wait(self, timeout_s: float = 120.0) -> list[int]:
        """Exit statuses by rank, −N for a process ended by signal N; those still running at the end are killed and given as None."""
        statuses: list[int] = self.zygote._ask({"wait": self.pids, "timeout_s": timeout_s})
        return statuses

    def output(self, rank: int = 0) -> str:
        """What a rank has printed."""
        return Path(f"{self.log}-{rank}").read_text(encoding="utf-8", errors="replace")

    def expect(self, *statuses: int | None, timeout_s: float = 120.0) -> Launched:
        """Wait, and fail with what was printed when the statuses are others (one stands for all)."""
        found = self.wait(timeout_s)
        wanted = list(statuses) * len(self.pids) if len(statuses) == 1 else list(statuses)
        assert found == wanted, f"statuses {found}\n" + "\n".join(f"--- rank {rank}\n{self.output(rank)[-4000:]}" for rank in range(len(self.pids)))
        return self


# ---------------------------------------------------------------- the server
def serve() -> None:
    import tempfile

    import torch.distributed.fsdp
    import torch.nn.parallel  # noqa: F401

    import titanlm.cli
    import titanlm.datasets.text
    import titanlm.datasets.token_shards
    import titanlm.models.decoder
    import titanlm.optimizers.adamw
    import titanlm.train  # noqa: F401

    logs = Path(tempfile.mkdtemp(prefix="zygote-"))
    n_groups = 0
    ended: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "code" in request:
            n_groups += 1
            log = logs / str(n_groups)
            answer: Any = [[_fork(request, rank, log) for rank in range(request["ranks"])], str(log)]
        else:
            answer = _wait(request["wait"], request["timeout_s"], ended)
        print(json.dumps(answer), flush=True)


def _fork(request: dict[str, Any], rank: int, log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.setsid()
        for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY)):
            os.dup2(os.open(os.devnull, flags), descriptor)
        os.dup2(os.open(f"{log}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 1)
        os.dup2(1, 2)
        if request["ranks"] > 1:
            n = str(request["ranks"])
            os.environ.update(RANK=str(rank), WORLD_SIZE=n, LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=n)
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(request["port"]))
        os.environ.update(request["env"])
        exec(compile(request["code"], "<zygote>", "exec"), {"__name__": "__main__", "rank": rank})
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _wait(pids: list[int], timeout_s: float, ended: dict[int, int]) -> list[int | None]:
    deadline = time.monotonic() + timeout_s
    while (missing := [pid for pid in pids if pid not in ended]) and time.monotonic() < deadline:
        for pid in missing:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                ended[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for pid in missing:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [ended.get(pid) for pid in pids]


if __name__ == "__main__":
    serve()
