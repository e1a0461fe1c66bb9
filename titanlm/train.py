"""The trainer: build, loop, one step.

``Trainer.__init__`` is a checklist in the order in which things depend on one
another. ``train`` is the loop with everything that happens between steps.
``train_step`` is the step itself, the same for every feature and every number
of ranks: what differs is in the components and in the strategy.

Every rank runs the same code. Where ranks could come to different conclusions
(a signal, a bad row, the end of the data) they agree first (``Peers``).

Launch: ``titanlm train FILE`` or ``torchrun --nproc-per-node=N -m titanlm.train FILE``.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from titanlm import checkpoint, randomness
from titanlm.best import Best
from titanlm.check import Report, build_model, check, optimizer_claims, roles_of
from titanlm.checkpoint import Saved
from titanlm.checkpoint_copy import RemoteCopies
from titanlm.clipping import clip_gradients
from titanlm.config import RunConfig, dump
from titanlm.course import flops_left, horizon_of, limit_settings, phases_of, schedules_of
from titanlm.data import DataEnded, Loader, StepData, merge_states
from titanlm.data_state import start_state
from titanlm.device import choose_device
from titanlm.distributed import activation_checkpointing
from titanlm.distributed.process_group import connected
from titanlm.distributed.strategy import build_strategy
from titanlm.distributed.watchdog import Watchdog
from titanlm.distributed.world import Peers, World
from titanlm.errors import CheckpointError, ConfigError, DataError, PeerError, TitanError
from titanlm.evaluate import Scores, ValidationSet, pad_id, score, summary
from titanlm.failures import is_lost_connection, is_out_of_memory, out_of_memory
from titanlm.guard import FiniteGuard
from titanlm.interrupts import Interrupted, Interrupts
from titanlm.interval import Interval
from titanlm.kernels.fused import use_kernels
from titanlm.loggers.group import LoggerGroup
from titanlm.loggers.text import printable
from titanlm.metrics import StepMeter, bits_per_byte, peak_flops
from titanlm.patterns import NamedParam
from titanlm.precision import DTYPES, set_precision
from titanlm.profiling import ProfileWindow
from titanlm.progress import Phase, Phases, Progress, enter
from titanlm.resume import WEIGHTS, find_earlier
from titanlm.run_choices import RunChoices, bytes_to_come
from titanlm.run_start import load_initial, open_folder, preflight, prepare_checkpoints, require_same_data, room_for_checkpoints, wind_back
from titanlm.runs import write_atomic
from titanlm.saver import Saver
from titanlm.spikes import SpikeDetector
from titanlm.state_tree import copied
from titanlm.stream import streams_of
from titanlm.train_module import TrainModule
from titanlm.weights import initialise, load_weights, unique_names

ECHO_S = 3.0
"""A launcher hands on the signal that a terminal gave to every process already; so soon a second one is that."""
SAVE_BOUND_S = 20.0
"""How long a trainer that ends waits for a save under way; launchers kill 30 s after SIGTERM."""
SETTLED_STEPS = 20
"""After so many, or after the first validation if that is sooner, all that a run compiles at its start is compiled."""
SKIPPED = "skipped_steps.jsonl"
"""Steps that were passed over because they were not finite, and their documents."""
SCORED = "scored.json"
"""Step → the validation sets that were scored at it."""


class Trainer:
    """One rank of a run. Use as a context manager, so that locks, files and connections are released."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        train, parallel = config.train, config.parallel

        # 1. Everything that can be wrong is found before a device is touched or a file written.
        report = preflight(config)
        self.world = World.from_environment()
        to_come_bytes = bytes_to_come(config, report.model, self.world)

        # 2. Device and seeds. Determinism first: cuBLAS reads its setting at the first CUDA call.
        randomness.set_deterministic(train.deterministic)
        if train.threads:
            torch.set_num_threads(train.threads)
        self.device = choose_device(train.device, self.world.local_rank)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        randomness.seed_everything(train.seed, self.world.rank)

        with ExitStack() as opened:
            # 3. The other ranks.
            store = None
            if parallel.strategy != "none":
                times = {"timeout_s": parallel.timeout_s, "init_timeout_s": parallel.init_timeout_s}
                store = opened.enter_context(connected(self.world, self.device, **times))
            self.peers = Peers(self.world)

            # 4. The run folder, locked: two trainers in one would overwrite each other's checkpoints.
            self.folder = open_folder(config, self.peers)
            opened.callback(self.folder.close)
            self.checkpoints = self.folder.checkpoints

            # 5. What an earlier start of this run left; a config that may not go on from it is not recorded.
            self.copies = RemoteCopies(config.checkpoint.copy_to) if config.checkpoint.copy_to and self.world.rank == 0 else None
            self.peers.first(lambda: prepare_checkpoints(self.checkpoints, self.copies))
            earlier = find_earlier(config, self.checkpoints, self.peers)
            self.n_parameters = sum(parameter.numel() for parameter in report.model.parameters())
            self.peers.first(lambda: self.folder.record(dump(config), world_size=self.world.size, n_parameters=self.n_parameters))

            self.loggers = self._new_loggers()
            opened.callback(lambda: self.loggers.close())
            self.watchdog = Watchdog(
                timeout_s=parallel.timeout_s,
                first_timeout_s=parallel.init_timeout_s,
                rank=self.world.rank,
                size=self.world.size,
                store=store,
                folder=self.folder.path,
            )
            self._build(report, earlier, opened, to_come_bytes)
            self._opened = opened.pop_all()

    def _new_loggers(self) -> LoggerGroup:
        return LoggerGroup([logger.build(run_dir=self.folder.path) for logger in self.config.logger] if self.world.rank == 0 else [])

    def _build(self, report: Report, earlier: Saved | None, opened: ExitStack, to_come_bytes: int | None) -> None:
        config, train, parallel = self.config, self.config.train, self.config.parallel

        # 6. Tokenizer, then data: streams know its ids, and the model its vocabulary.
        self.tokenizer = report.tokenizer
        self.horizon = horizon_of(config)
        self.phases = phases_of(config, self.world, self.horizon)
        self.phase: Phase | None = None  # none entered yet
        data = config.data
        streams = streams_of(config, self.tokenizer, seq_len=self.phases.max_seq_len)
        self.fingerprints = {"tokenizer": self.tokenizer.fingerprint, "dataset": streams[0].fingerprint}
        start = start_state(config, streams, self.fingerprints) if data.start and earlier is None else None
        self.loader = Loader(
            streams,
            world_size=self.world.size,
            rank=self.world.rank,
            document_mask=data.document_mask,
            boundary_label=data.boundary_label,
            pad_id=pad_id(self.tokenizer),
            prefetch=data.prefetch,
            workers=data.workers,
            pin=self.device.type == "cuda",
        )
        opened.callback(self.loader.close)

        # What is slow from here on is told as it begins. Loggers start last: a start that is refused leaves what they have written as it was.
        if earlier is not None:
            require_same_data(self.fingerprints, earlier.state["fingerprints"], earlier.folder)
        shared = f" on {self.world.size} ranks ({parallel.strategy})" if parallel.strategy != "none" else ""
        documents = ", ".join(report.data) or "not counted"
        self.loggers.message(f"{self.n_parameters:,} parameters, {train.precision} on {self.device}{shared}; documents: {documents}")

        # 7. Model on the meta device, changed by adapter and quantizers; nothing is allocated yet.
        model = build_model(config, self.tokenizer)
        self.model: Any = model
        self.module = TrainModule(model, config.loss.build()).train()
        set_precision(self.module, train.precision)
        use_kernels(self.module, train.kernels)
        self.choices = RunChoices(config, self.folder.path, self.device, self.peers, self.loggers.message)
        self.choices.settle_attention(model, self.phases)

        # 8. Recomputation, then sharding, both around a block's forward pass: what is recomputed is what was gathered.
        activation_checkpointing.apply(model.blocks, train.activation_checkpointing)
        self.strategy = build_strategy(parallel, self.world, self.device, DTYPES[train.precision])
        self.strategy.shard(self.module)

        # 9. Memory and initial weights, drawn whole by seed and name, then sliced: the same on every device and at every world size.
        model.to_empty(device=self.strategy.parameter_device(self.device))
        initialise(model, train.seed)
        fresh = earlier is None and config.checkpoint.initial_load is not None
        for note in load_initial(config, model, self.tokenizer, self.peers) if fresh else ():
            self.loggers.message(note)

        # 10. Compiled in place: state keeps its names. Each phase's shapes compile once, when they first come.
        self.choices.compile(self.module)
        for note in self.strategy.notes():
            self.loggers.message(note)
        self.forward = self.strategy.wrap(self.module)

        # 11. Optimizers over the materialised parameters; each knows the peaks of what is scheduled.
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        parameters, roles = dict(model.named_parameters()), roles_of(model)
        self.optimizers = [
            entry.build(named_params=[NamedParam(name, parameters[name], roles[name]) for name in names])
            for entry, names in zip(config.optimizer, optimizer_claims(config, model).claimed, strict=True)
        ]
        self.choices.compile_optimizers(self.optimizers)
        run = {"total_steps": train.steps, "horizon": self.horizon}
        self.schedulers = [{name: one.build(**run) for name, one in schedules_of(config, entry).items()} for entry in config.optimizer]
        for optimizer, schedulers in zip(self.optimizers, self.schedulers, strict=True):
            for group in optimizer.param_groups:
                if missing := schedulers.keys() - group.keys():
                    raise TitanError(f"{type(optimizer).__name__} keeps no {min(missing)!r} in its groups, which {min(missing)}_schedule could change")
                group |= {f"peak_{name}": float(group[name]) for name in schedulers}
        stored = model.state_dict()
        self.own_buffers = {name: buffer for name, buffer in model.named_buffers() if name in stored}
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.averagers = [config.averager.build(model=model, horizon=self.horizon)] if config.averager is not None else []
        self.hooks = [module.on_step_end for module in model.modules() if hasattr(module, "on_step_end")]

        if to_come_bytes is not None:
            probed: dict[str, Any] = {"model": model, "forward": self.forward, "strategy": self.strategy, "optimizers": self.optimizers}
            rows = {"vocab_size": self.tokenizer.vocab_size, "n_sources": self.loader.n_sources}
            self.phases, config = self.choices.size_micro_batches(self.phases, to_come_bytes, **probed, **rows)

        # 12. What watches, saves and reports.
        self.guard = FiniteGuard(
            self.optimizers,
            self.device,
            remember=train.log_every + 1,
            on_nonfinite=train.on_nonfinite,
            needs_host=bool(self.averagers or self.hooks),
            max_in_a_row=train.max_skipped,
        )
        self.spikes = SpikeDetector(config.spike.sigmas, config.spike.window, config.spike.patience)
        self.rollbacks = 0
        peak = peak_flops(self.device)
        self.meter = StepMeter(model.flops_per_token(self.phases.max_seq_len), peak and peak * self.world.size, self.device)
        self.validation = [ValidationSet.build(entry, config, self.tokenizer) for entry in config.validation]
        # As rank 0 reads them: a file system may show the others an older file, and all must come to the same decisions.
        scored = [replace(entry, every=None, micro_batch=None) for entry in config.validation]  # what has no part in a score
        of = hashlib.sha256(repr(scored).encode()).hexdigest()
        best = self.peers.first(lambda: Best.read(self.folder.path, config.checkpoint.best, of))
        self.scored, value, step = self.peers.gather(best and [read_scored(self.folder.path / SCORED), best.value, best.step])[0]
        self.best = Best(self.folder.path, config.checkpoint.best, value, step, of)
        self.saver = Saver(self.checkpoints, peers=self.peers.apart())
        opened.callback(self._close_saver)
        self.profile = ProfileWindow(config.profile, self.folder.path)
        opened.callback(lambda: self._profiled(self.profile.close()))
        self.interrupts = Interrupts(echo_s=ECHO_S if self.world.size > 1 else 0.0)

        # 13. Last, the earlier start's state, or the weights of another run: they replace the initial ones of all the above.
        self.progress = Progress()
        self.saved_step = -1
        self.source_tokens = np.zeros(self.loader.n_sources, dtype=np.int64)
        self.unreadable = 0
        self.interval = Interval(self.loader.n_sources, self.device)
        if earlier is not None:
            for note in [f"resumed from {earlier.folder} (step {earlier.step}, {earlier.state['progress']['tokens']:,} tokens)", *self._take_up(earlier)]:
                self.loggers.message(note)
            self.loader.restore(merge_states([own["data"] for own in earlier.ranks]))
        elif start is not None:
            self.loader.restore(start)
        self._complete()
        self._forget_later()
        self.started_at = self.progress.step
        self.peers.first(lambda: self.loggers.start(self.progress.step))
        for note in room_for_checkpoints(config.checkpoint.keep_last, report.checkpoint_bytes, self.checkpoints):
            self.loggers.message(note)

    # ------------------------------------------------------------ the step
    def train_step(self) -> None:
        """One optimizer step. Raises Interrupted between micro-batches; ``_abandon`` then undoes what was begun."""
        phase = self._enter()
        data = self.peers.agree(lambda: self.loader.next(phase)).over(self.peers)
        totals = torch.zeros(1 + self.loader.n_sources, device=self.device)  # the loss, and the nll of each source
        for index, batch in enumerate(data.micro_batches, start=1):
            self.watchdog.beat(f"step {self.progress.step + 1}, micro-batch {index}")
            self.interrupts.check(self.peers)
            self.strategy.synchronise(index == phase.accumulation)
            sums, aux = self.forward(batch.to(self.device))
            objective = (sums.loss + sum(aux.values())) / max(1, data.n_valid)
            objective.backward()
            totals[0] += objective.detach()
            totals[1:] += sums.nll
        loss, nll = self.peers.add_(totals).split([1, self.loader.n_sources])
        grad_norm = clip_gradients(self.trained, phase.clip)
        updates = self.guard.observe(self.progress.step, data.document_ids, loss[0], grad_norm)
        if updates:
            self._set_schedules(phase)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            for hook in self.hooks:
                hook()
        else:
            self._abandon()
        self._advance(data, loss[0], nll, grad_norm)
        for averager in self.averagers if updates else ():
            averager.update(self.progress)
        self._complete()

    def _enter(self) -> Phase:
        """The phase of the next step, its switches set. A change is told: what the clock decides could be known in no other way."""
        phase = self.phases.at(self.progress)
        if phase != self.phase:
            enter(phase, self.model)
            self.watchdog.starting()  # it may have to be compiled
            self.meter.flops_per_token = self.model.flops_per_token(phase.seq_len)
            if self.phase is not None:
                self.loggers.message(f"from step {self.progress.step + 1} on: {phase.changes(self.phase)}")
            self.phase = phase
        return phase

    def _complete(self) -> None:
        """Note what a step under way may change before it is done: generators, and buffers that forward passes count in."""
        self.rng = randomness.capture()
        self.buffers = {name: self.own_buffers[name].clone() for name in self.own_buffers}

    def _abandon(self) -> None:
        """Back to the end of the last completed step."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for name, buffer in self.own_buffers.items():
            buffer.copy_(self.buffers[name])

    def _set_schedules(self, phase: Phase) -> None:
        """Learning rates, and whatever else of an optimizer follows a schedule, for the step under way."""
        for optimizer, schedulers in zip(self.optimizers, self.schedulers, strict=True):
            factors = {name: scheduler.factor(self.progress) for name, scheduler in schedulers.items()}
            factors["lr"] *= phase.lr_factor(self.progress)
            for group in optimizer.param_groups:
                for name, factor in factors.items():
                    value = group[f"peak_{name}"] * factor
                    if isinstance(group[name], Tensor):
                        group[name].fill_(value)
                    else:
                        group[name] = value

    def _advance(self, data: StepData, loss: Tensor, nll: Tensor, grad_norm: Tensor) -> None:
        """The step is done: move the clock and the data's cursor together."""
        self.loader.commit()
        self.meter.step(data.n_tokens, self.loader.take_stall_s())
        self.progress = Progress(self.progress.step + 1, self.progress.tokens + data.n_tokens, self._elapsed_s())
        self.interval.add(data, loss, nll, self.guard)
        self.source_tokens += data.source_tokens
        self.grad_norm = grad_norm

    def _elapsed_s(self) -> float:
        """Seconds of training; with a limit on them the slowest clock counts for every rank, since schedules and the end hang on it."""
        if self.horizon.max_wallclock_s is None:
            return self.meter.elapsed_s
        return self.peers.max(round(self.meter.elapsed_s * 1e6)) / 1e6

    @property
    def finished(self) -> bool:
        return self.horizon.fraction(self.progress) >= 1.0

    # ------------------------------------------------------------ the loop
    def train(self) -> Path | None:
        """Train to ``train.steps`` or ``train.max_wallclock_s``; returns the last checkpoint, or None when the run was already finished.

        On SIGINT, SIGTERM or SIGUSR1, at whichever rank, the step under way is
        abandoned, the last completed one is saved and Interrupted is raised.
        """
        collecting = gc.isenabled()
        self.watchdog.start()
        try:
            # What a signal asks for is done inside, so that its echo does not end it.
            with self.interrupts:
                try:
                    return self._train()
                except (Interrupted, DataError, PeerError) as error:
                    self._abandon()
                    why = error if isinstance(error, Interrupted) else "stopped"
                    try:
                        self.save(wait=True)
                        self.loggers.message(f"{why}: saved step {self.progress.step}; start again to go on from there")
                    except CheckpointError as failure:  # must not hide what ended the run
                        self.loggers.message(f"WARNING: {failure}; {why}: the run goes on from its last checkpoint when started again")
                    raise error
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise TitanError(out_of_memory(self.config, error)) from error
            if self.world.size > 1 and is_lost_connection(error):
                raise TitanError(f"{self.watchdog.culprits()}; the run goes on from its last checkpoint when started again ({error})") from error
            raise
        finally:
            self.watchdog.stop()
            if collecting:
                gc.enable()

    def _train(self) -> Path | None:
        train = self.config.train
        if self.finished:
            where = f"{self.folder.path}: already at step {self.progress.step} of {train.steps}"
            remedy = "raise train.steps to go on"
            if self.progress.step < train.steps:
                remedy = f"the {self.horizon.max_wallclock_s:g} s of {limit_settings(self.config)} are used up; raise it to go on"
            self.loggers.message(f"{where}; {remedy}")
            self.validate_once(self.validation)
            return None
        self.validate_once(self._due(self.progress.step))
        if train.gc_every:
            gc.disable()  # a collection in the middle of a step stalls the device
        self._prime()
        self.meter.start()
        while not self.finished:
            self.profile.before_step(self.progress.step + 1)
            try:
                self.train_step()
            except DataEnded as end:
                self._wind_up(str(end))
                break
            self._between_steps(self.progress.step)
        self.validate_once(self.validation)
        self._keep_compiled()
        return self.checkpoints / f"step-{self.progress.step:08d}"

    def _prime(self) -> None:
        """Run every phase still to come for a few steps, so that it is compiled before the clock starts, and put everything back."""
        if not self.config.train.priming_steps:
            return
        started, phases, saved_step = time.perf_counter(), self.phases, self.saved_step
        state, own = copied(self._whole_state()), copied(self._whole_own_state())
        kept = Saved(self.checkpoints, self.progress.step, state, [own] * self.world.size, "")
        try:
            for number, phase in enumerate(to_come := phases.after(self.progress), 1):
                self.phases, self.phase = Phases([(0, phase)]), None
                if len(to_come) > 1:
                    self.loggers.message(f"priming phase {number} of {len(to_come)}: {phase.micro_batch} rows of {phase.seq_len}")
                for _ in range(self.config.train.priming_steps):
                    self.progress = Progress(**state["progress"])  # schedules know nothing behind the end of a run
                    try:
                        self.train_step()
                    except DataEnded:  # so little data compiles all the same
                        self.loader.restore(own["data"])
        finally:
            self.phases = phases
            self._abandon()
            self.guard.restore(state["guard"])
            self._take_up(kept)
            self.loader.restore(own["data"])
            self.saved_step = saved_step
            self._complete()
            self.meter.forget()
        self.loggers.message(f"primed in {time.perf_counter() - started:.1f} s; everything is as it was at step {kept.step} again")

    def _keep_compiled(self) -> None:
        """Write what was compiled, the first time that there is something new."""
        with self.meter.pause():  # of every rank: the slowest clock counts
            if told := self.choices.keep_compiled():
                self.loggers.message(told)

    def _between_steps(self, step: int) -> None:
        """What is due after this many steps."""
        train, every, last = self.config.train, self.config.checkpoint.every, self.finished
        self.watchdog.started()  # whatever had to be compiled is
        self._profiled(self.profile.after_step(step))
        self._or_warn(self.saver.poll)
        if (step % train.log_every == 0 or last) and self.log():
            return  # wound back: this is another step now
        # Saved before it is validated: a failing validation must not cost the training before it.
        if last:
            if step < train.steps:
                limit = f"{self.horizon.max_wallclock_s:g} s of training are over ({limit_settings(self.config)})"
                self.loggers.message(f"{limit}: it ends at step {step} of {train.steps}")
            self.save(wait=True)
        elif every and step % every == 0:
            self._or_warn(self.save)
        due = [] if last else self._due(step)
        self.validate_once(due)
        if due or step == self.started_at + SETTLED_STEPS:
            self._keep_compiled()
        if train.sample_every and step % train.sample_every == 0:
            self.sample()
        if train.gc_every and step % train.gc_every == 0:
            self._check_finite()  # waits for the device, whose work belongs to the time before the pause
            with self.meter.pause():
                gc.collect()

    def _wind_up(self, why: str) -> None:
        """End at the present step, which no config could know to be the last."""
        self._abandon()
        if self.interval.steps and self.progress.step > self.started_at:
            self.log()
        self.loggers.message(f"{why}: training ends at step {self.progress.step} of {self.config.train.steps}")
        self.save(wait=True)

    def _due(self, step: int) -> list[ValidationSet]:
        return [entry for entry in self.validation if entry.every and step and step % entry.every == 0]

    def validate_once(self, sets: list[ValidationSet]) -> None:
        """Score those of the sets that have not been scored at this step: a run killed in a validation makes up for it when it is started again."""
        step, done = self.progress.step, self.scored.get(str(self.progress.step), [])
        counted = {entry.name for entry in self.config.counted}
        again = counted if counted.difference(done) and counted.issubset(entry.name for entry in sets) else ()  # their summary is of one scoring
        missing = [entry for entry in sets if entry.name not in done or entry.name in again]
        if missing:
            self.validate(missing)
            self.scored[str(step)] = list(dict.fromkeys([*done, *(entry.name for entry in missing)]))
            self.peers.first(lambda: write_atomic(self.folder.path / SCORED, json.dumps(self.scored)))

    def _profiled(self, trace: Path | None) -> None:
        if trace is not None:
            self.loggers.message(f"profile written to {trace}; open it in a trace viewer such as Perfetto")

    def log(self) -> bool:
        """Metrics since the last log step. The only place that waits for the device in an ordinary step.

        True when the loss had jumped and the run was wound back.
        """
        self._check_finite()
        nlls, n_bytes, loss = self.interval.nll.tolist(), self.interval.n_bytes, self.interval.mean_loss()
        metrics = {"loss": loss, "grad_norm": float(self.grad_norm)}
        if n_bytes:
            metrics["bits_per_byte"] = bits_per_byte(sum(nlls), n_bytes)
        for index, source in enumerate(self.config.data.source):
            if n_tokens := int(self.interval.source_tokens[index]):
                metrics[f"source/{source.label}/loss"] = nlls[index] / n_tokens
            metrics[f"source/{source.label}/tokens"] = float(self.source_tokens[index])
        for index, (entry, optimizer) in enumerate(zip(self.config.optimizer, self.optimizers, strict=True)):
            rates = dict.fromkeys(float(group["lr"]) for group in optimizer.param_groups)
            for position, lr in enumerate(rates):
                label = entry.name if len(self.optimizers) == 1 else f"{index}.{entry.name}"
                metrics[f"lr/{label}" if position == 0 else f"lr/{label}.{position}"] = lr
                metrics.setdefault("lr", lr)
        metrics |= {"tokens": float(self.progress.tokens), "total_steps": float(self.config.train.steps)}
        metrics |= self.meter.report(flops_left(self.config, self.model.flops_per_token, self.progress.step))
        if self.horizon.max_wallclock_s is not None and "eta_s" in metrics:
            metrics["eta_s"] = max(0.0, min(metrics["eta_s"], self.horizon.max_wallclock_s - self.progress.elapsed_s))
        counted = ("documents", "passed_over", "unreadable")
        counts = self.loader.counts()
        totals = dict(zip(counted, self.peers.sum([counts[name] for name in counted]), strict=True))
        metrics |= {f"data/{name}": float(total) for name, total in totals.items()}
        if self.config.train.on_nonfinite == "skip":
            metrics["skipped_steps"] = float(self.guard.n_skipped)
        self.loggers.log(self.progress.step, metrics)
        self.interval.reset()
        if totals["unreadable"] > self.unreadable:
            self.unreadable = totals["unreadable"]
            where = f"`titanlm data state {self.folder.path}` names the first of them after the next checkpoint"
            self.loggers.message(f"WARNING: {self.unreadable:,} rows of the data could not be read and were passed over so far; {where}")
        assert self.phase is not None
        began = self.spikes.observe(self.progress.step, loss, repr(replace(self.phase, micro_batch=self.phase.rows_per_rank, accumulation=1)))
        if began is not None:
            self._roll_back(began)
        return began is not None

    def _check_finite(self) -> None:
        """Stop at a step that was not finite, or write down which were passed over since the last look."""
        for step, documents in self.guard.check():
            everywhere = sorted({document for own in self.peers.gather(documents) for document in own})
            self.loggers.message(f"WARNING: step {step + 1} was passed over: its loss or gradient is not finite; its documents are in {SKIPPED}")
            self.peers.first(partial(append_line, self.folder.path / SKIPPED, {"step": step + 1, "documents": everywhere}))

    def validate(self, sets: list[ValidationSet]) -> dict[str, float]:
        """Score sets with the raw weights and, where there is an averager, the averaged ones."""
        self._check_finite()
        metrics: dict[str, float] = {}
        self._enter()  # weights are rounded here where the next step rounds them, whether the run was resumed or not
        with self.meter.pause():
            for entry in sets:
                try:
                    scores = self._score(entry)
                    metrics |= scores.metrics(f"validation/{entry.name}")
                    for averager in self.averagers:
                        with averager.swap():
                            metrics |= self._score(entry).metrics(f"validation/{entry.name}", "averaged_")
                except RuntimeError as error:
                    # Sharded ranks stand at different gathers then; nothing but a new start puts them in step again.
                    if not is_out_of_memory(error) or self.world.size > 1:
                        raise
                    self.loggers.message(f"WARNING: validation set {entry.name!r} was left out: out of memory; lower its micro_batch ({entry.micro_batch})")
                    continue
                if scores.difference:
                    self.loggers.message(f"{entry.name}: {scores.difference}")
        metrics |= summary(self.config.counted, metrics)
        if metrics:
            self.loggers.log(self.progress.step, metrics)
        if self.best.beaten_by(metrics) and self._or_warn(partial(self.save, wait=True)):
            self.best = self.best.now(metrics, self.progress.step)
            self.peers.first(self.best.write)
            self.loggers.message(f"best {self.best.metric} so far, {self.best.value:.4f}: step {self.progress.step} is kept")
        return metrics

    def _score(self, entry: ValidationSet) -> Scores:
        try:
            return score(self.module, entry, self.device, self._poll(f"validation {entry.name!r}"), self.peers)
        finally:
            self.strategy.settle()  # after a failure too: what is still gathered would hide that the weights have changed

    def _poll(self, doing: str) -> Callable[[], None]:
        """To be called often by whatever takes long between steps."""

        def poll() -> None:
            self.watchdog.beat(f"step {self.progress.step}, {doing}")
            self.interrupts.check(self.peers)

        return poll

    def sample(self) -> None:
        """Print what the model makes of the sample prompt now. Every rank takes part and makes the same."""
        from titanlm.generate import continue_text

        self._check_finite()
        self._enter()
        prompt, pieces, poll = self.config.train.sample_prompt, [], self._poll("sample")
        with self.meter.pause(), self.strategy.gathered():
            for piece in continue_text(self.model, self.tokenizer, prompt, max_tokens=128, temperature=0.8, seed=self.config.train.seed):
                poll()
                pieces.append(piece)
        self.loggers.message(f"sample at step {self.progress.step}: {prompt}{''.join(pieces)}")

    # ------------------------------------------------------------ state
    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on as if it had not stopped, the same on every rank but for the shards of tensors."""
        whole = self._whole_state()
        return {name: whole[name] for name in WEIGHTS} if self.config.checkpoint.save_only_model else whole

    def _whole_state(self) -> dict[str, Any]:
        stored = self.model.state_dict()
        return {
            "progress": {"step": self.progress.step, "tokens": self.progress.tokens, "elapsed_s": self.progress.elapsed_s},
            "fingerprints": self.fingerprints,
            "model": {name: stored[name] for name in unique_names(self.model)},
            "averagers": [averager.state_dict() for averager in self.averagers],
            "optimizers": [checkpoint.optimizer_state(optimizer, self.names) for optimizer in self.optimizers],
            "interval": self.interval.state(),
            "source_tokens": self.source_tokens.tolist(),
            "guard": self.guard.state(),
            "spikes": self.spikes.state(),
            "rollbacks": self.rollbacks,
        }

    def own_state(self) -> dict[str, Any]:
        """What differs from rank to rank."""
        return {} if self.config.checkpoint.save_only_model else self._whole_own_state()

    def _whole_own_state(self) -> dict[str, Any]:
        return {"data": self.loader.state(), "rng": self.rng}

    def save(self, *, wait: bool = False) -> None:
        """Write a checkpoint of the last completed step, unless there is one, in the background unless told to wait.

        Raises CheckpointError when it is waited for and fails.
        """
        with self.meter.pause():
            # Ranks hear at different steps that an earlier save has failed. From here on all know, and so all save now or none.
            self._or_warn(self._await_saver)
            if self.saved_step != self.progress.step:
                self._check_finite()
                self.saver.save(self.progress.step, self.state(), self.own_state(), dump(self.config), after=partial(self._published, self.best.step))
                self.saved_step = self.progress.step
            if wait or not self.config.checkpoint.asynchronous:
                self._await_saver()

    def _close_saver(self) -> None:
        """What ends the run has been said, or is about to be, and must not be hidden by this."""
        try:
            self.saver.close(SAVE_BOUND_S)
        except CheckpointError as error:
            self.loggers.message(f"WARNING: {error}")

    def _await_saver(self) -> None:
        """Until nothing is being written any more, however long it takes: a slow disk is not a hanging rank."""
        try:
            while self.saver.busy:
                self.watchdog.beat(f"step {self.progress.step}, saving")
                time.sleep(0.005)
            self.saver.poll()
        except CheckpointError:
            self.saved_step = -1
            raise

    def _published(self, best: int | None, folder: Path) -> None:
        """In the saver's thread, once a checkpoint is whole."""
        if self.world.rank == 0:
            settings = self.config.checkpoint
            kept: dict[str, Any] = {"keep_last": settings.keep_last, "best": best, "keep_every": settings.keep_every}
            checkpoint.rotate(self.checkpoints, newest=int(folder.name.removeprefix("step-")), **kept)
            if self.copies is not None:
                try:
                    self.copies.upload(folder, **kept)
                except CheckpointError as error:  # the checkpoint itself is sound, and the next copy may work
                    print(printable(f"WARNING: {error}"), file=sys.stderr)

    def _or_warn(self, action: Callable[[], None]) -> bool:
        """Whether it worked. A full disk in the middle of a run is no reason to end it; the next save may work."""
        try:
            action()
        except CheckpointError as error:
            self.saved_step = -1
            self.loggers.message(f"WARNING: {error}; training goes on without it")
            return False
        return True

    def _take_up(self, saved: Saved) -> list[str]:
        """All of a checkpoint's state but the data's; what the user should know of it."""
        state = checkpoint.fit({name: saved.state[name] for name in ("model", "averagers")}, self.state())
        load_weights(self.model, state["model"], str(saved.folder))
        for averager, average in zip(self.averagers, state["averagers"], strict=True):
            averager.load_state_dict(average)
        for optimizer, moments in zip(self.optimizers, saved.state["optimizers"], strict=True):
            checkpoint.restore_optimizer(optimizer, self.names, moments)
        self.progress = Progress(**saved.state["progress"])
        self.meter.elapsed_s = self.progress.elapsed_s
        rest = checkpoint.fit({name: saved.state[name] for name in ("interval", "guard", "spikes")}, {})
        self.interval.restore(rest["interval"])
        self.guard.restore(rest["guard"])
        self.spikes.restore(rest["spikes"])
        self.source_tokens = np.array(saved.state["source_tokens"])
        self.rollbacks, self.phase = saved.state["rollbacks"], None
        self.saved_step = self.progress.step
        if len(saved.ranks) == self.world.size:
            randomness.restore(saved.ranks[self.world.rank]["rng"])
            return []
        randomness.seed_everything(self.config.train.seed + self.progress.step, self.world.rank)
        return [f"it was saved by {len(saved.ranks)} ranks and is shared out over {self.world.size}: dropout and the like draw anew, all else goes on"]

    def _forget_later(self) -> None:
        """What is known of steps after this one belongs to a run that went on from here once, and was wound back or lost its last checkpoint."""
        scored = {step: names for step, names in self.scored.items() if int(step) <= self.progress.step}
        if scored != self.scored:
            self.scored = scored
            self.peers.first(lambda: write_atomic(self.folder.path / SCORED, json.dumps(scored)))
        if self.best.step is not None and self.best.step > self.progress.step:
            self.peers.first(self.best.forget)
            self.best = Best(self.best.folder, self.best.metric, of=self.best.of)

    def _roll_back(self, began: int) -> None:
        """Back to the newest checkpoint up to step ``began``; the data goes on from here, so what made the loss jump is passed over.

        Raises TitanError when there is none, or when it has happened as often as it may.
        """
        here, limit = self.progress.step, self.config.spike.max_rollbacks
        self._or_warn(self._await_saver)
        folder = checkpoint.latest(self.checkpoints, self.peers, at_most=began)
        if folder is None or self.rollbacks >= limit:
            why = f"no checkpoint of step {began} or before" if folder is None else f"{limit} rollbacks have not helped (spike.max_rollbacks)"
            raise TitanError(f"step {here}: the loss has jumped since step {began}, and {why}; lower the learning rate, raise warm-up or look at the data")
        count, elapsed_s = self.rollbacks + 1, self.progress.elapsed_s
        self._take_up(checkpoint.opened(folder, self.peers))
        self.rollbacks = count
        self.progress = replace(self.progress, elapsed_s=elapsed_s)  # time that was lost is gone
        self.meter.elapsed_s = elapsed_s
        self.peers.first(lambda: wind_back(self.checkpoints, self.progress.step, self.copies))
        self._complete()
        self._forget_later()
        self.loggers.close()
        self.loggers = self._new_loggers()
        self.peers.first(lambda: self.loggers.start(self.progress.step))
        self.loggers.message(f"WARNING: the loss jumped after step {began}: wound back from step {here} to {self.progress.step}, rollback {count} of {limit}")
        self.saved_step = -1  # saved again, with the data's new place: a kill now must not bring the spike back
        self.save(wait=True)

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Raises TitanError when the file cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise TitanError(f"{path}: cannot be written: {error.strerror}") from error


def read_scored(path: Path) -> dict[str, list[str]]:
    """Nothing when the file is not there or says nothing: sets are then scored again."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {str(int(step)): list(map(str, names)) for step, names in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def train(config: RunConfig) -> int:
    """Train a config and, with ``export.at_end``, export it; returns the exit status."""
    try:
        path = _train(config)
    except Interrupted as interrupted:
        return interrupted.status
    if config.export.at_end and World.from_environment().rank == 0:
        from titanlm.export import export_run
        from titanlm.exported import describe

        print(describe(export_run(path, device=config.train.device)))
    return 0


def _train(config: RunConfig) -> Path:
    """The run folder. On its own, so that the trainer's memory is free before an export needs it."""
    with Trainer(config) as trainer:
        trainer.train()
        return trainer.folder.path


def dry_run(config: RunConfig) -> str:
    """Check a config and say what it would take, on the meta device only."""
    report = check(config)
    if report.problems:
        raise ConfigError(report.problems, config.run.name or "config")
    return printable("\n".join([*(f"WARNING: {warning}" for warning in report.warnings), report.summary]))


if __name__ == "__main__":
    from titanlm.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
