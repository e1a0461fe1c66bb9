"""What a start settles of how its run computes: attention kernels, compile mode, rows of a forward pass; and what was compiled before.

Each choice is made as soon as what it hangs on is there, and before what hangs
on it: attention before the model has memory, compiling and the products of
quantizers once it has, and rows last, by passes through what is going to
train. What was measured is kept with the run (``titanlm.tuned``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from titanlm.attention_choice import settle_attention
from titanlm.batch import Batch
from titanlm.check import quantizer_claims
from titanlm.config import RunConfig
from titanlm.course import longest_row
from titanlm.distributed.compile import compile_kernels, compile_module
from titanlm.distributed.strategy import Strategy
from titanlm.distributed.world import Peers, World
from titanlm.losses.chunked import chunk_size
from titanlm.models.layers.product import share_computed_with
from titanlm.progress import Phases
from titanlm.train_module import TrainModule
from titanlm.tuned import Tuned


def bytes_to_come(config: RunConfig, model: Any, world: World) -> int | None:
    """What a probe of rows must leave free, out of the model on the meta device; None where nothing is probed.

    Before ranks are connected: an optimizer may exchange something in the step by which this is found.
    """
    if config.train.micro_batch_tokens != "auto":
        return None
    from titanlm.micro_batch import to_come

    return to_come(config, model, world)


def begin_quantizers(config: RunConfig, model: Any, n_tokens: int, *, device: torch.device, compiled: bool, tuned: Tuned) -> list[str]:
    """Let quantizers do what hangs on the device, on a model of which nothing was traced yet; what they have to say.

    ``n_tokens`` are those of a forward pass. On the meta device nothing is computed and all is as it would be on a GPU.
    """
    facts = {"n_tokens": n_tokens, "n_head_tokens": chunk_size(n_tokens, config.loss.config.chunk_tokens)}
    notes: list[str] = []
    for entry, names in zip(config.quantizer, quantizer_claims(config, model).claimed, strict=True):
        begin = getattr(entry.build(), "begin", None)
        notes += [] if begin is None else begin(model, names, device=device, compiled=compiled, tuned=tuned, **facts)
        if getattr(entry.build(), "of_products", False):
            seq_len = longest_row(config)
            share = share_computed_with(model, names, seq_len, getattr(entry.config, "n_products", 3))
            notes.append(f"{entry.name}: {share} in rows of {seq_len:,}")
    return notes


class RunChoices:
    """Of one rank; the methods are called in the order in which they stand here, by every rank. ``tell`` gets what the user should know, as it happens."""

    def __init__(self, config: RunConfig, folder: Path, device: torch.device, peers: Peers, tell: Callable[[str], object]) -> None:
        """Loads what was compiled before, so nothing may be compiled yet.

        Raises TitanError when the run folder's choices cannot be read, or there is no cache where one is named.
        """
        self.config, self.device, self.peers, self.tell = config, device, peers, tell
        self.compiled: Literal["none", "block", "model"] = "none"
        self.compile_cache = None
        train = config.train
        cached = train.compile_cache != "off" and train.compile != "none"
        other = Path(train.compile_cache).expanduser()
        self.tuned = Tuned(folder, peers, tell, other if cached and train.compile_cache != "run" and other.is_dir() else None)
        if cached:
            from titanlm.distributed.compile_cache import CompileCache

            self.compile_cache = peers.agree(lambda: CompileCache(folder, device, train.compile_cache))
            if loaded := self.compile_cache.load():
                tell(loaded)

    def settle_attention(self, model: Any, phases: Phases) -> None:
        """By the shape of the run's largest forward pass. Raises TitanError when the backend that is named cannot serve here."""
        rows, seq_len = phases.largest_pass(self.config.train.micro_batch_tokens != "auto")
        self._n_tokens = rows * seq_len
        self._tell_all(settle_attention(self.config, model, self.device, rows, seq_len, self.tuned))

    def compile(self, module: TrainModule) -> None:
        """In place, and quantizers do what hangs on the device; nothing is traced yet."""
        model: Any = module.model
        mode = self.config.train.compile
        self.compiled = compile_module(module, mode)
        compiled = self.compiled != "none"
        self._tell_all(begin_quantizers(self.config, model, self._n_tokens, device=self.device, compiled=compiled, tuned=self.tuned))
        if mode == "auto":
            self.tell(f"train.compile: {self.compiled!r} for a model of {len(model.blocks)} blocks")

    def compile_optimizers(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        compile_kernels(optimizers, self.compiled)

    def size_micro_batches(
        self,
        phases: Phases,
        to_come_bytes: int,
        *,
        model: nn.Module,
        forward: Callable[[Batch], Any],
        strategy: Strategy,
        optimizers: Sequence[torch.optim.Optimizer],
        vocab_size: int,
        n_sources: int,
    ) -> tuple[Phases, RunConfig]:
        """The phases cut into micro-batches of the rows that fit, and the config that says so by a number."""
        from titanlm.micro_batch import Probe, moments_held

        probe = Probe(
            config=self.config,
            model=model,
            forward=forward,
            strategy=strategy,
            device=self.device,
            peers=self.peers,
            vocab_size=vocab_size,
            n_sources=n_sources,
            to_come_bytes=to_come_bytes - moments_held(optimizers, self.device),
            compiled=self.compiled != "none",
        )
        phases = phases.cut(probe.rows(self.tuned, phases))
        longest = phases.longest  # by whose rows validation goes
        self.tell(f"micro-batches of {longest.micro_batch} rows of {longest.seq_len}, {longest.accumulation} a step on each rank")
        return phases, replace(self.config, train=replace(self.config.train, micro_batch_tokens=longest.micro_batch * longest.seq_len))

    def keep_compiled(self) -> str | None:
        """Write what was compiled, the first time that there is something new; what to tell of it."""
        return None if self.compile_cache is None else self.peers.first(self.compile_cache.write)

    def _tell_all(self, notes: Sequence[str]) -> None:
        for note in notes:
            self.tell(note)
