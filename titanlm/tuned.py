"""What a run found out about its machine when it first started, so that later starts do not decide otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from titanlm.distributed.world import Peers
from titanlm.runs import write_atomic

FILE = "tuned.json"


class Tuned:
    """Decisions by key, in ``tuned.json`` of the run folder; every rank asks for the same ones in the same order."""

    def __init__(self, folder: Path, peers: Peers) -> None:
        self.path, self.peers = folder / FILE, peers

    def choice(self, key: str, decide: Callable[[], Any]) -> Any:
        """The stored decision, or what ``decide`` gives on rank 0, JSON, which is then stored; the same on every rank."""
        return self.peers.gather(self.peers.first(lambda: self._stored(key, decide)))[0]

    def _stored(self, key: str, decide: Callable[[], Any]) -> Any:
        known = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        if key not in known:
            known[key] = decide()
            write_atomic(self.path, json.dumps(known, indent=2))
        return known[key]
