"""``train.micro_batch_tokens = "auto"``: how many rows fit a forward and backward pass, found by trying.

Larger micro-batches keep a GPU busier and accumulate less often, up to the
memory there is, and how much a row takes can hardly be computed: it depends on
what the compiler fuses, on recomputation, on the chunks of the loss. So rows of
made-up tokens go through the real module, compiled as the run will be, forward
and backward, twice for each number of rows tried: once to compile and to have
gradients lie there, as they do from the second micro-batch of a step on, and
once measured. A straight line through the last two measurements says how many
rows might fit, those are tried next, and so on until no larger number that
divides a rank's rows evenly is thought to fit (:func:`largest`). What is
chosen has been run, not only predicted.

Measured: on CUDA the allocator's peak above what the run already holds (weights,
average). A CPU has no such allocator: there the bytes of the tensors that
autograd keeps for the backward pass are counted, and the gradients, but neither
what operators use while they work nor what chunked losses keep, so it is a lower
bound. Added to either: the optimizers' moments, which do not exist yet, found by
a step on the meta device, and with `train.priming_steps` the copy of the state
that priming makes. A step of the optimizers needs room for a while too, when the
activations are gone; that it needs less than those is assumed.

Nothing of it remains. Gradients are dropped, buffers and random number
generators put back, no row of the data is read, and what was compiled is
forgotten, since the compiler makes code for varying shapes once it has seen two.
So a run is bit for bit that in which the number was given by hand, with several
ranks too (tested with two).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from titanlm import randomness
from titanlm.batch import Batch, document_bound
from titanlm.config import RunConfig
from titanlm.distributed.strategy import Strategy, shards_of
from titanlm.distributed.world import Peers, World
from titanlm.errors import TitanError
from titanlm.failures import is_out_of_memory
from titanlm.metrics import GIB
from titanlm.progress import Phase, Phases, Shape, enter, largest_divisor
from titanlm.recipe_plan import SHARDED, Layout
from titanlm.state_tree import is_distributed
from titanlm.tuned import Tuned

SHARE = 0.9
"""Of the free memory that may be planned with. The rest is for what the allocator loses between its blocks (`reserved_gib` beside `memory_gib` in
a run's metrics), for the workspaces of cuBLAS and NCCL, which are not its own, and for rows of another length in validation."""


@dataclass
class Probe:
    """One rank's part of the trials; every rank makes the same ones at the same time."""

    config: RunConfig
    model: nn.Module
    forward: Callable[[Batch], Any]
    """The module as the training step calls it."""
    strategy: Strategy
    device: torch.device
    peers: Peers
    vocab_size: int
    n_sources: int
    to_come_bytes: int
    """What the run will hold on the device beside activations and gradients, and does not hold yet."""
    compiled: bool

    @property
    def _sharded(self) -> bool:
        return self.config.parallel.strategy in SHARDED

    def rows(self, tuned: Tuned, phases: Phases) -> dict[Shape, int]:
        """Rows a forward pass for every shape of the phases, as they were chosen, or by trials now.

        What fits depends on the length of rows, not on how many a step has, so of
        each length the shape with most of them is tried.
        """
        last = {phase.shape: phase for _, phase in phases.stages}
        most = {shape.seq_len: phase for shape, phase in sorted(last.items())}
        legal = {seq_len: sorted({n for shape in last if shape.seq_len == seq_len for n in divisors(shape.rows)}) for seq_len in most}
        fitting = {seq_len: self._chosen(tuned, phase, legal[seq_len]) for seq_len, phase in most.items()}
        return {shape: largest_divisor(shape.rows, fitting[shape.seq_len]) for shape in last}

    def _chosen(self, tuned: Tuned, phase: Phase, legal: Sequence[int]) -> int:
        """Out of ``legal`` numbers; ``phase`` is the last of its shape: switches such as rounded weights come on while a run goes on, and cost memory."""
        shape, conditions = phase.shape, self._conditions()
        key = f"micro-batch of rows of {shape.seq_len}"
        stored = tuned.get(key)
        if _fits(stored, legal, conditions):
            return int(stored["rows"])
        if stored is not None:
            tuned.tell(f"{key}: chosen anew, because {_why(stored, shape, conditions)}")
        with self._untraced():
            enter(phase, self.model)
            found = self._found(shape, legal, tuned.tell)
        value: dict[str, Any] = tuned.keep(key, {**found, "for": conditions})
        return int(value["rows"])

    def _conditions(self) -> dict[str, Any]:
        """What the memory of a row hangs on and may change at a resume."""
        train, parallel = self.config.train, self.config.parallel
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        shards = {"fsdp2": self.peers.size, "hsdp": shards_of(parallel, self.peers.world)}.get(parallel.strategy, 1)
        return {
            "device": device,
            "shards": shards,
            "compile": train.compile,
            "activation_checkpointing": train.activation_checkpointing,
            "chunk_tokens": getattr(self.config.loss.config, "chunk_tokens", 0),
            "parallel": [parallel.strategy, parallel.reshard_after_forward, parallel.gather_dtype, parallel.prefetch_blocks, parallel.cpu_offload],
            "to_come_bytes": self.to_come_bytes,
        }

    def _found(self, shape: Shape, legal: Sequence[int], tell: Callable[[str], object]) -> dict[str, Any]:
        def trial(rows: int) -> int | None:
            tell(f"trying micro-batches of {rows} row{'s' * (rows > 1)} of {shape.seq_len}{', compiled first, which may take a minute' * self.compiled}")
            return self._trial(rows, shape.seq_len)

        # Of the rank that has least: all take the same number of rows.
        free = -self.peers.max(-free_bytes(self.device) // (self.peers.world.local_size if self.device.type == "cpu" else 1))
        budget = int(SHARE * free) - self.to_come_bytes
        rows, needs = largest(legal, trial, budget)
        if rows is None:
            tried, need = min(needs.items())
            needed = "out of memory" if need is None else f"{(need + self.to_come_bytes) / GIB:.2f} GiB"
            raise TitanError(
                f'train.micro_batch_tokens: "auto" finds room for not one row of {shape.seq_len}: {free / GIB:.2f} GiB are free, {tried} row took {needed}; '
                "use train.activation_checkpointing, a smaller loss.chunk_tokens, or give train.micro_batch = 1 to try all the same"
            )
        known = sorted((tried, need) for tried, need in needs.items() if need is not None)
        (fewest, least), (most, highest) = known[0], known[-1]
        slope = (highest - least) / (most - fewest) if most > fewest else highest
        need = needs[rows]
        assert need is not None
        return {
            "rows": rows,
            "bytes_per_token": round(slope / shape.seq_len),
            "needed_bytes": need + self.to_come_bytes,
            "free_bytes": free,
        }

    # ------------------------------------------------------------ one trial
    def _trial(self, rows: int, seq_len: int) -> int | None:
        """Bytes of a forward and backward pass over so many rows, gradients included; None when a rank has not got them."""
        batch = made_up(rows, seq_len, self.vocab_size, self.n_sources, document_mask=self.config.data.document_mask)
        held = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        need = 0
        try:
            for last in (False, True):
                # Parts of gradients lie whole on every rank until they are added up; else nothing is, so that no rank waits for one without memory.
                self.strategy.synchronise(last and self._sharded)
                measured = self._measured(batch, held)
                if self.peers.max(measured is None):
                    return None
                assert measured is not None
                need = measured
        finally:
            for parameter in self.model.parameters():
                parameter.grad = None
        return self.peers.max(need)

    def _measured(self, batch: Batch, held: int) -> int | None:
        try:
            if self.device.type != "cuda":
                with saved_bytes(self.model) as count:
                    self._pass(batch)
                return count() + sum(_local_bytes(p.grad) for p in self.model.parameters() if p.grad is not None)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._pass(batch)
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - held
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if self._sharded:  # parts are gathered, and other ranks may wait in the middle of the pass
                why = f"out of memory with {len(batch.tokens)} rows under {self.config.parallel.strategy!r}, from where a run cannot go on"
                raise TitanError(f"train.micro_batch_tokens: {why}; give a number, or train.micro_batch") from error
        gc.collect()  # out of the handler, whose traceback holds the tensors of the pass
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _pass(self, batch: Batch) -> None:
        sums, aux = self.forward(batch.to(self.device))
        ((sums.loss + sum(aux.values())) / batch.labels.numel()).backward()

    @contextmanager
    def _untraced(self) -> Iterator[None]:
        """Everything is as it was afterwards, the memory too."""
        rng, buffers = randomness.capture(), {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        try:
            yield
        finally:
            randomness.restore(rng)
            with torch.no_grad():
                for name, buffer in self.model.named_buffers():
                    if name in buffers and buffer.shape == buffers[name].shape:
                        buffer.copy_(buffers[name])
            if self.compiled:
                torch.compiler.reset()
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(self.device)


def _fits(stored: Any, legal: Sequence[int], conditions: dict[str, Any]) -> bool:
    rows = stored.get("rows") if isinstance(stored, dict) else None
    return rows in legal and stored.get("for") == conditions


def _why(stored: Any, shape: Shape, conditions: dict[str, Any]) -> str:
    before = stored.get("for") if isinstance(stored, dict) else None
    if not isinstance(before, dict):
        return "what is stored is no such choice"
    changed = [f"{name} was {before.get(name)!r}" for name, value in conditions.items() if before.get(name) != value]
    return ", ".join(changed) or f"{stored.get('rows')!r} rows do not divide the {shape.rows} of a rank"


def to_come(config: RunConfig, model: Any, world: World) -> int:
    """Bytes that this run will hold on a device for moments, and while priming, out of the model on the meta device.

    Not for use while ranks are connected, as ``optimizer_bytes`` is not.
    """
    kept = Layout(config, model, world).memory().device
    moments = kept.get("moments", 0)  # none where they are offloaded
    return moments + (sum(kept.get(name, 0) for name in ("weights", "average")) + moments) * bool(config.train.priming_steps)


def moments_held(optimizers: Sequence[torch.optim.Optimizer], device: torch.device) -> int:
    """Bytes of state that optimizers have made already, which the device no longer has free; on a CPU none, where zeros take no memory until they change."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()] if device.type == "cuda" else []
    return sum(_local_bytes(value) for state in states for value in state.values() if isinstance(value, Tensor) and value.device.type == "cuda")


# ---------------------------------------------------------------- the search
def divisors(n: int) -> list[int]:
    """Ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def largest(legal: Sequence[int], trial: Callable[[int], int | None], budget: int) -> tuple[int | None, Mapping[int, int | None]]:
    """The largest of the ascending ``legal`` numbers of rows whose trial stays within ``budget`` bytes, and the bytes of all that were tried.

    ``trial`` gives bytes, or None where there was no memory for it. Only
    numbers that the line through the last two trials that fitted has within
    the budget are tried, after the two smallest: each costs a compilation. So
    where memory bends down just below the budget, as when chunks of the loss
    have filled up, the answer may be too few; it is never too many. None when
    not even the smallest fits.
    """
    needs: dict[int, int | None] = {}
    fitting: list[int] = []
    beyond = legal[-1] + 1
    while candidates := [rows for rows in legal if rows < beyond and (not fitting or rows > fitting[-1])]:
        rows = candidates[0]
        if len(fitting) > 1:
            (x, y), (a, b) = ((rows, needs[rows] or 0) for rows in fitting[-2:])
            slope = max(0.0, (b - y) / (a - x))
            within = [rows for rows in candidates if b + slope * (rows - a) <= budget]
            if not within:
                break
            rows = within[-1]
        need = needs[rows] = trial(rows)
        if need is None or need > budget:
            beyond = rows
        else:
            fitting.append(rows)
    return (fitting[-1] if fitting else None), needs


# ---------------------------------------------------------------- what is measured
def made_up(rows: int, seq_len: int, vocab_size: int, n_sources: int, *, document_mask: bool) -> Batch:
    """Rows of two documents each, on the CPU, every position trained; from a generator of its own."""
    tokens = torch.randint(vocab_size, (rows, seq_len + 1), generator=torch.Generator().manual_seed(0))
    second = torch.arange(seq_len) >= seq_len // 2
    positions = torch.arange(seq_len, dtype=torch.int32) - second * (seq_len // 2)
    ids = 2 * torch.arange(rows)[:, None] + second
    return Batch(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        positions=positions.to(torch.int32).expand(rows, -1).contiguous(),
        document_ids=ids,
        target_bytes=torch.ones(rows, seq_len, dtype=torch.int32),
        document_mask=document_mask,
        n_sources=n_sources,
        max_documents=document_bound(ids.numpy()) if document_mask else None,
    )


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Inside, counts the memory of tensors that autograd keeps for backward passes, each once and without the model's own."""
    own = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _address(tensor) not in own:
            sizes[_address(tensor)] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # an output that its own node kept would hold itself

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(sizes.values())


def _address(tensor: Any) -> int:
    return int((tensor.to_local() if is_distributed(tensor) else tensor).untyped_storage().data_ptr())


def _local_bytes(tensor: Any) -> int:
    return int((tensor.to_local() if is_distributed(tensor) else tensor).nbytes)


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take: of a CUDA device, its own allocator's unused blocks included; of the host within its control group."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [_meminfo()]
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        cached = next(int(line.split()[1]) for line in (group / "memory.stat").read_text(encoding="ascii").splitlines() if line.startswith("inactive_file "))
        found.append(max(0, limit - used + cached))
    except (OSError, StopIteration, ValueError):  # "max": no limit
        pass
    return min(found)


def _meminfo() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    except (OSError, StopIteration, ValueError):
        import os

        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # no Linux: half of what is built in
