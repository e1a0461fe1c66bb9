"""Runs a script as on a machine that has no titanlm and no network: ``python -I isolated.py SCRIPT ARGUMENT…``.

Stands alone, so that starting it imports nothing of titanlm. The finders of
modules that are there when it starts no longer find titanlm; one that the
script adds, for what it carries with it, does. Python's audit events refuse
names and addresses beyond this machine, and .bin files of training shards.

That finds a script which needs what it must not have. It is no prison for one
that means harm: programs that it starts and C code are not seen.
"""

from __future__ import annotations

import ipaddress
import os
import runpy
import sys
from typing import Any

BLOCKED = "titanlm"
_TO_ADDRESS = frozenset({"socket.connect", "socket.sendto", "socket.sendmsg"})
_TO_NAME = frozenset({"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"})


class Without:
    """A finder that does not find titanlm, and is itself in all else."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.partition(".")[0] == BLOCKED else self.finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def refuse(event: str, args: tuple[Any, ...]) -> None:
    """The audit hook; raises PermissionError."""
    if event in _TO_ADDRESS and isinstance(args[1], tuple) and not is_here(args[1][0]):
        raise PermissionError(f"no network here: {event} to {args[1][0]!r} is refused")
    if event in _TO_NAME and not is_here(args[0]):
        raise PermissionError(f"no network here: {event} of {args[0]!r} is refused")
    if event == "open" and isinstance(args[0], str | bytes) and is_training_shard(os.fsdecode(args[0])):
        raise PermissionError(f"no training data here: {os.fsdecode(args[0])!r} is refused")


def is_here(host: Any) -> bool:
    """Whether a host is this machine; None is what a server listens on."""
    name = host.decode("ascii", "replace") if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def is_training_shard(path: str) -> bool:
    return path.endswith(".bin") and "_train_" in os.path.basename(path)


def main(argv: list[str]) -> None:
    script = argv[0]
    sys.argv = argv
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))  # as for any script; -I leaves it out
    sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
    sys.addaudithook(refuse)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
