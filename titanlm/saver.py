"""Saving while training goes on: the state is copied at once, and written by a thread.

Training waits only for the copy, into host memory that is kept from save to
save: getting that memory from the system costs several times what filling it
does. One save is under way at a time, so the copy needs no second memory. The
thread talks to the other ranks over a connection of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titanlm import checkpoint
from titanlm.distributed.world import Peers
from titanlm.errors import CheckpointError
from titanlm.state_tree import Part, split

_ALIGNMENT = 64


class Saver:
    """Writes checkpoints into a folder, one at a time. ``peers`` must be a connection that only this uses."""

    def __init__(self, root: Path, *, peers: Peers = checkpoint.ALONE, finite: Sequence[str] = ("model",)) -> None:
        self.root, self.peers, self.finite = root, peers, finite
        self._memory: HostMemory | None = None
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self._target = root

    def save(
        self, step: int, state: dict[str, Any], own: dict[str, Any], config_toml: str, *, after: Callable[[Path], None] | None = None, wait: bool = False
    ) -> None:
        """Begin to save a state as it is now; numpy arrays in it must not be changed any more. Collective.

        ``after`` is called with the folder once it is published, in the thread,
        on every rank. Waits for the save before; if that failed and nobody has
        heard of it, this one is begun all the same, and then its CheckpointError raised.
        """
        if self._thread is not None:
            self._thread.join()
        earlier, self._failure = self._failure, None
        self._target = self.root / checkpoint.folder_name(step)
        try:
            part = self._copy(split(state, own, self.peers.rank))
        except Exception as error:  # said in the thread, where the other ranks hear of it
            staged: Part | Exception = error
        else:
            staged = part
        self._thread = threading.Thread(target=self._write, args=(step, staged, config_toml, after), name="checkpoint", daemon=True)
        self._thread.start()
        if wait:
            self.wait()
        if earlier is not None:
            raise earlier

    @property
    def busy(self) -> bool:
        """Whether a save is being written."""
        return self._thread is not None and self._thread.is_alive()

    def poll(self) -> None:
        """Raise the CheckpointError of a save that has failed since, once."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until nothing is under way. Raises CheckpointError when the save failed or takes longer."""
        if self._thread is None:
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise CheckpointError(f"{self._target}: after {timeout_s:g} s still being written, and not published; earlier checkpoints are untouched")
        self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self, timeout_s: float | None = None) -> None:
        """Wait as ``wait`` does, and give the memory back."""
        self.wait(timeout_s)
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _copy(self, part: Part) -> Part:
        """The same part with its tensors in host memory."""
        tensors = {path: tensor for path, tensor in part.tensors.items() if isinstance(tensor, Tensor)}
        n_bytes = sum(tensor.nbytes + _ALIGNMENT for tensor in tensors.values())
        on_device = any(tensor.is_cuda for tensor in tensors.values())
        if self._memory is None or len(self._memory.bytes) < n_bytes:
            if self._memory is not None:
                self._memory.close()
            self._memory = HostMemory(n_bytes, pinned=on_device)
        begin = 0
        for path, tensor in tensors.items():
            end = begin + tensor.nbytes
            part.tensors[path] = self._memory.bytes[begin:end].view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)
            begin = end + -end % _ALIGNMENT
        if on_device:
            torch.cuda.current_stream().synchronize()
        return part

    def _write(self, step: int, staged: Part | Exception, config_toml: str, after: Callable[[Path], None] | None) -> None:
        def part() -> Part:
            if isinstance(staged, Exception):
                raise staged
            return staged

        try:
            folder = checkpoint.publish(self.root, step, part, config_toml, peers=self.peers, finite=self.finite)
            if after is not None:
                try:
                    checkpoint.together(self.peers, lambda: after(folder))
                except CheckpointError as error:
                    raise CheckpointError(f"{folder}: is saved, but what was to follow failed: {error}") from error
        except CheckpointError as error:
            self._failure = error
        except BaseException as error:
            self._failure = CheckpointError(f"{self._target}: cannot be saved: {error!r}")
            self._failure.__cause__ = error


class HostMemory:
    """Bytes that a save is copied into, pinned where a GPU copies into them.

    Registered with CUDA rather than taken from torch's pinned allocator, which rounds up to a power of two.
    """

    def __init__(self, n_bytes: int, pinned: bool) -> None:
        self.bytes = torch.empty(n_bytes, dtype=torch.uint8)
        self._pinned = pinned
        if pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), n_bytes, 0))

    def close(self) -> None:
        if self._pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr()))
        self.bytes = torch.empty(0, dtype=torch.uint8)
