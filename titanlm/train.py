"""The trainer: build, loop, one step.

``Trainer.__init__`` is a checklist in the order in which things depend on one
another. ``train`` is the loop with everything that happens between steps.
``train_step`` is the step itself, the same for every feature: what differs is
in the components.

Launch: ``titanlm train FILE`` or ``torchrun -m titanlm.train FILE``.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from titanlm import checkpoint, randomness
from titanlm.best import Best
from titanlm.check import Report, build_model, check, optimizer_claims, roles_of
from titanlm.config import RunConfig, dump
from titanlm.data import DataEnded, Loader, StepData
from titanlm.data_state import start_state
from titanlm.distributed import activation_checkpointing
from titanlm.distributed.compile import compile_module
from titanlm.distributed.world import World
from titanlm.environment import requirements
from titanlm.errors import CheckpointError, ConfigError, DataError, TitanError
from titanlm.evaluate import ValidationSet, pad_id, score
from titanlm.guard import FiniteGuard
from titanlm.interrupts import Interrupted, Interrupts
from titanlm.loggers.group import LoggerGroup
from titanlm.metrics import StepMeter, bits_per_byte, peak_flops
from titanlm.patterns import NamedParam
from titanlm.precision import set_precision
from titanlm.profiling import ProfileWindow
from titanlm.progress import Phase, Phases, Progress
from titanlm.resume import Earlier, find_earlier
from titanlm.runs import RunFolder, write_atomic
from titanlm.stream import streams_of
from titanlm.tokenizers.fingerprint import difference
from titanlm.train_module import TrainModule
from titanlm.weights import initialise, load_weights, unique_names

CPU_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory")
"""What torch says where no CUDA allocator is asked."""


def choose_device(name: str) -> torch.device:
    """Raises TitanError when CUDA is asked for and absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise TitanError("no CUDA device is available here; use 'cpu' or 'auto' (`titanlm env` says what there is)")
    return torch.device(name)


class Trainer:
    """One run on this process. Use as a context manager, so that locks and files are released."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        train = config.train

        # 1. Everything that can be wrong is found before a device is touched or a file written.
        report = preflight(config)
        self.world = World.from_environment()

        # 2. Device and seeds. Determinism first: cuBLAS reads its setting at the first CUDA call.
        randomness.set_deterministic(train.deterministic)
        if train.threads:
            torch.set_num_threads(train.threads)
        self.device = choose_device(train.device)
        randomness.seed_everything(train.seed, self.world.rank)

        # 3. The run folder, locked: two trainers in one would overwrite each other's checkpoints.
        self.folder = RunFolder.open(Path(config.run.dir), config.run.name)
        self.checkpoints = self.folder.checkpoints
        self.loggers = LoggerGroup([])
        try:
            # 4. What an earlier start of this run left; a config that may not go on from it is not recorded.
            earlier = find_earlier(config, self.checkpoints)
            self.folder.record(dump(config))
            self._build(report, earlier)
        except BaseException:
            self.loggers.close()
            self.folder.close()
            raise

    def _build(self, report: Report, earlier: Earlier | None) -> None:
        config, train = self.config, self.config.train
        checkpoint.sweep(self.checkpoints)
        self.loggers = LoggerGroup([logger.build(run_dir=self.folder.path) for logger in config.logger])

        # 5. Tokenizer, then data: streams know its ids, and the model its vocabulary.
        self.tokenizer = report.tokenizer
        self.phases = Phases([(0, first_phase(config, self.world))])
        data = config.data
        streams = streams_of(config, self.tokenizer, seq_len=self.phases.max_seq_len)
        self.fingerprints = {"tokenizer": self.tokenizer.fingerprint, "dataset": streams[0].fingerprint}
        self.start = start_state(config, streams, self.fingerprints) if data.start and earlier is None else None
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

        # 6. Model on the meta device, changed by adapter and quantizers; nothing is allocated yet.
        model = build_model(config, self.tokenizer)

        # 7. Recomputation is set up before the model is compiled, so that the compiler plans it.
        activation_checkpointing.apply(model.blocks, train.activation_checkpointing)

        # 8. Memory and initial weights, drawn by seed and name and so the same on every device and world size.
        model.to_empty(device=self.device)
        initialise(model, train.seed)
        self.module = TrainModule(model, config.loss.build()).train()
        self.model: Any = model
        set_precision(self.module, train.precision)

        # 9. Compiled in place: state keeps its names. Each phase's shapes compile once.
        self.compiled = compile_module(self.module, train.compile)

        # 10. Optimizers over the materialised parameters; each knows its peak learning rate.
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        parameters, roles = dict(model.named_parameters()), roles_of(model)
        self.optimizers = [
            entry.build(named_params=[NamedParam(name, parameters[name], roles[name]) for name in names])
            for entry, names in zip(config.optimizer, optimizer_claims(config, model).claimed, strict=True)
        ]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["peak_lr"] = float(group["lr"])
        stored = self.model.state_dict()
        self.own_buffers = {name: buffer for name, buffer in model.named_buffers() if name in stored}
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.scheduler = config.scheduler.build(total_steps=train.steps)
        self.averagers = [config.averager.build(model=model)] if config.averager is not None else []
        self.hooks = [module.on_step_end for module in model.modules() if hasattr(module, "on_step_end")]

        # 11. What watches and reports.
        self.guard = FiniteGuard(self.optimizers, self.device, remember=train.log_every + 1)
        self.meter = StepMeter(self.model.flops_per_token(self.phases.max_seq_len), peak_flops(self.device), self.device)
        self.validation = [ValidationSet.build(entry, config, self.tokenizer) for entry in config.validation]
        self.best = Best.read(self.folder.path, config.checkpoint.best)
        self.profile = ProfileWindow(config.profile, self.folder.path)
        self.interrupts = Interrupts()

        # 12. Last, the earlier start's state: it replaces the initial one of all the above.
        self.progress = Progress()
        self.saved_step = -1
        self.source_tokens = np.zeros(self.loader.n_sources, dtype=np.int64)
        self.unreadable = 0
        self._reset_interval()
        if earlier is not None:
            self._resume(*earlier)
        elif self.start is not None:
            self.loader.restore(self.start)
        self._complete()
        self.started_at = self.progress.step
        self.loggers.start(self.progress.step)
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.loggers.message(f"{n_parameters:,} parameters, {train.precision} on {self.device}; documents: {', '.join(report.data) or 'not counted'}")
        if earlier is not None:
            self.loggers.message(f"resumed from {earlier[0]} (step {self.progress.step}, {self.progress.tokens:,} tokens)")

    # ------------------------------------------------------------ the step
    def train_step(self) -> None:
        """One optimizer step. Raises Interrupted between micro-batches; ``_abandon`` then undoes what was begun."""
        phase = self._enter(self.phases.at(self.progress))
        data = self.loader.next(phase)
        loss, nll = torch.zeros((), device=self.device), torch.zeros(self.loader.n_sources, device=self.device)
        for batch in data.micro_batches:
            self.interrupts.check()
            sums, aux = self.module(batch.to(self.device))
            objective = (sums.loss + sum(aux.values())) / max(1, data.n_valid)
            objective.backward()
            loss += objective.detach()
            nll += sums.nll
        grad_norm = clip_gradients(self.trained, phase.clip)
        self.guard.observe(self.progress.step, data.document_ids, loss, grad_norm)
        self._set_learning_rates(phase)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for hook in self.hooks:
            hook()
        self._advance(data, loss, nll, grad_norm)
        for averager in self.averagers:
            averager.update(self.progress)
        self._complete()

    def _enter(self, phase: Phase) -> Phase:
        """Set the structural switches of a phase on the modules that have them."""
        for name, on in phase.switches:
            for module in self.model.modules():
                if getattr(module, name, on) is not on:
                    setattr(module, name, on)
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

    def _set_learning_rates(self, phase: Phase) -> None:
        factor = self.scheduler.factor(self.progress) * phase.lr_multiplier
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                lr = group["peak_lr"] * factor
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr

    def _advance(self, data: StepData, loss: Tensor, nll: Tensor, grad_norm: Tensor) -> None:
        """The step is done: move the clock and the data's cursor together."""
        self.loader.commit()
        n_tokens = data.n_tokens * self.world.size  # every rank has as many rows
        self.meter.step(n_tokens, self.loader.take_stall_s())
        self.progress = Progress(self.progress.step + 1, self.progress.tokens + n_tokens, self.meter.elapsed_s)
        self.interval_loss += loss
        self.interval_nll += nll
        self.interval_steps += 1
        self.interval_bytes += data.n_bytes
        self.interval_source_tokens += data.source_tokens
        self.source_tokens += data.source_tokens
        self.grad_norm = grad_norm

    # ------------------------------------------------------------ the loop
    def train(self) -> Path | None:
        """Train to ``train.steps``; returns the last checkpoint, or None when the run was already finished.

        On SIGINT or SIGTERM the step under way is abandoned, the last completed
        one is saved and Interrupted is raised.
        """
        train = self.config.train
        finished = self.progress.step >= train.steps
        collecting = gc.isenabled()
        try:
            with self.interrupts:
                if finished:
                    where = f"{self.folder.path}: already at step {self.progress.step} of {train.steps}"
                    self.loggers.message(f"{where}; raise train.steps to go on")
                    self._finish()
                    return None
                if train.gc_every:
                    gc.disable()  # a collection in the middle of a step stalls the device
                self.meter.start()
                while self.progress.step < train.steps:
                    self.profile.before_step(self.progress.step + 1)
                    try:
                        self.train_step()
                    except DataEnded as end:
                        self._wind_up(str(end))
                        break
                    self._between_steps(self.progress.step)
                self._finish()
        except (Interrupted, DataError) as error:
            self._abandon()
            self.save()
            self.loggers.message(f"{error if isinstance(error, Interrupted) else 'stopped'}: saved step {self.progress.step}; start again to go on from there")
            raise
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in CPU_OUT_OF_MEMORY):
                raise TitanError(out_of_memory(self.config, error)) from error
            raise
        finally:
            if collecting:
                gc.enable()
        return self.checkpoints / f"step-{self.progress.step:08d}"

    def _between_steps(self, step: int) -> None:
        """What is due after this many steps."""
        train, every, last = self.config.train, self.config.checkpoint.every, step == self.config.train.steps
        self._profiled(self.profile.after_step(step))
        if step % train.log_every == 0 or last:
            self.log()
        # Saved before it is validated: a failing validation must not cost the training before it.
        if last:
            self.save()
        elif every and step % every == 0:
            self._save_or_warn()
        due = [entry for entry in self.validation if entry.every and step % entry.every == 0]
        if due and not last:
            self.validate(due)
        if train.sample_every and step % train.sample_every == 0:
            self.sample()
        if train.gc_every and step % train.gc_every == 0:
            self.guard.check()  # waits for the device, whose work belongs to the time before the pause
            with self.meter.pause():
                gc.collect()

    def _wind_up(self, why: str) -> None:
        """End at the present step, which no config could know to be the last."""
        self._abandon()
        if self.interval_steps and self.progress.step > self.started_at:
            self.log()
        self.loggers.message(f"{why}: training ends at step {self.progress.step} of {self.config.train.steps}")
        self.save()

    def _save_or_warn(self) -> bool:
        """Whether there is a checkpoint now. A full disk in the middle of a run is no reason to end it; the next save may work."""
        try:
            self.save()
        except CheckpointError as error:
            self.loggers.message(f"WARNING: {error}; training goes on without it")
            return False
        return True

    def _finish(self) -> None:
        """The last validation, once: a run killed in it makes up for it when it is started again."""
        done = self.folder.path / "finished.json"
        mark = json.dumps({"step": self.progress.step})
        if not (done.exists() and done.read_text(encoding="utf-8") == mark):
            self.validate(self.validation)
            write_atomic(done, mark)

    def _profiled(self, trace: Path | None) -> None:
        if trace is not None:
            self.loggers.message(f"profile written to {trace}; open it in a trace viewer such as Perfetto")

    def log(self) -> None:
        """Metrics since the last log step. The only place that waits for the device in an ordinary step."""
        self.guard.check()
        nlls, n_bytes = self.interval_nll.tolist(), self.interval_bytes
        metrics = {"loss": float(self.interval_loss) / self.interval_steps, "grad_norm": float(self.grad_norm)}
        if n_bytes:
            metrics["bits_per_byte"] = bits_per_byte(sum(nlls), n_bytes)
        for index, source in enumerate(self.config.data.source):
            if n_tokens := int(self.interval_source_tokens[index]):
                metrics[f"source/{source.label}/loss"] = nlls[index] / n_tokens
            metrics[f"source/{source.label}/tokens"] = float(self.source_tokens[index])
        for index, (entry, optimizer) in enumerate(zip(self.config.optimizer, self.optimizers, strict=True)):
            rates = dict.fromkeys(float(group["lr"]) for group in optimizer.param_groups)
            for position, lr in enumerate(rates):
                label = entry.name if len(self.optimizers) == 1 else f"{index}.{entry.name}"
                metrics[f"lr/{label}" if position == 0 else f"lr/{label}.{position}"] = lr
                metrics.setdefault("lr", lr)
        metrics |= {"tokens": float(self.progress.tokens), "total_steps": float(self.config.train.steps)}
        metrics |= self.meter.report(remaining_steps=self.config.train.steps - self.progress.step)
        counts = self.loader.counts()
        metrics |= {f"data/{name}": float(counts[name]) for name in ("documents", "passed_over", "unreadable")}
        self.loggers.log(self.progress.step, metrics)
        self._reset_interval()
        if (unreadable := counts["unreadable"]) > self.unreadable:
            self.unreadable = unreadable
            where = f"`titanlm data state {self.folder.path}` names the first of them after the next checkpoint"
            self.loggers.message(f"WARNING: {unreadable:,} rows of the data could not be read and were passed over so far; {where}")

    def _reset_interval(self) -> None:
        self.interval_loss = torch.zeros((), device=self.device)
        self.interval_nll = torch.zeros(self.loader.n_sources, device=self.device)
        self.interval_steps = self.interval_bytes = 0
        self.interval_source_tokens = np.zeros(self.loader.n_sources, dtype=np.int64)

    def validate(self, sets: list[ValidationSet]) -> dict[str, float]:
        """Score sets with the raw weights and, where there is an averager, the averaged ones."""
        self.guard.check()
        metrics: dict[str, float] = {}
        differences = []
        with self.meter.pause():
            for entry in sets:
                scores = score(self.module, entry, self.device, self.interrupts.check)
                metrics |= scores.metrics(f"validation/{entry.name}")
                differences += [f"{entry.name}: {scores.difference}"] if scores.difference else []
                for averager in self.averagers:
                    with averager.swap():
                        metrics |= score(self.module, entry, self.device, self.interrupts.check).metrics(f"validation/{entry.name}", "averaged_")
        if metrics:
            self.loggers.log(self.progress.step, metrics)
        for line in differences:
            self.loggers.message(line)
        if self.best.beaten_by(metrics) and self._save_or_warn():
            self.best = self.best.now(metrics, self.progress.step)
            self.loggers.message(f"best {self.best.metric} so far, {self.best.value:.4f}: step {self.progress.step} is kept")
        return metrics

    def sample(self) -> None:
        """Print what the model makes of the sample prompt now."""
        from titanlm.generate import continue_text

        self.guard.check()
        prompt, pieces = self.config.train.sample_prompt, []
        with self.meter.pause():
            for piece in continue_text(self.model, self.tokenizer, prompt, max_tokens=128, temperature=0.8, seed=self.config.train.seed):
                self.interrupts.check()
                pieces.append(piece)
        self.loggers.message(f"sample at step {self.progress.step}: {prompt}{''.join(pieces)}")

    # ------------------------------------------------------------ state
    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on as if it had not stopped."""
        stored = self.model.state_dict()
        return {
            "progress": {"step": self.progress.step, "tokens": self.progress.tokens, "elapsed_s": self.progress.elapsed_s},
            "model": {name: stored[name] for name in unique_names(self.model)},
            "optimizers": [checkpoint.optimizer_state(optimizer, self.names) for optimizer in self.optimizers],
            "averagers": [averager.state_dict() for averager in self.averagers],
            "data": self.loader.state(),
            "rng": [self.rng],
            "interval": {
                "loss": self.interval_loss, "nll": self.interval_nll,
                "steps": self.interval_steps, "bytes": self.interval_bytes, "source_tokens": self.interval_source_tokens.tolist(),
            },
            "source_tokens": self.source_tokens.tolist(),
            "fingerprints": self.fingerprints,
        }  # fmt: skip

    def save(self) -> None:
        """Write a checkpoint of the last completed step, unless it is there already."""
        if self.saved_step == self.progress.step:
            return
        self.guard.check()
        with self.meter.pause():
            checkpoint.save(self.checkpoints, self.progress.step, self.state(), dump(self.config))
            checkpoint.rotate(self.checkpoints, self.config.checkpoint.keep_last, self.progress.step, self.best.step)
        self.saved_step = self.progress.step

    def _resume(self, folder: Path, state: dict[str, Any]) -> None:
        """Take up a checkpoint of this run."""
        require_same_data(self.fingerprints, state["fingerprints"], folder)
        load_weights(self.model, state["model"], str(folder))
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            checkpoint.restore_optimizer(optimizer, self.names, saved)
        for averager, saved in zip(self.averagers, state["averagers"], strict=True):
            averager.load_state_dict(saved)
        self.loader.restore(state["data"])
        self.progress = Progress(**state["progress"])
        self.meter.elapsed_s = self.progress.elapsed_s
        interval = state["interval"]
        self.interval_loss, self.interval_nll = interval["loss"].to(self.device), interval["nll"].to(self.device)
        self.interval_steps, self.interval_bytes = interval["steps"], interval["bytes"]
        self.interval_source_tokens, self.source_tokens = np.array(interval["source_tokens"]), np.array(state["source_tokens"])
        randomness.restore(state["rng"][self.world.rank])
        self.saved_step = self.progress.step

    def close(self) -> None:
        self._profiled(self.profile.close())
        self.loader.close()
        self.loggers.close()
        self.folder.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def require_same_data(now: dict[str, str], saved: dict[str, str], folder: Path) -> None:
    """Raise CheckpointError with the difference when a resumed run would read other data, or the same as other tokens."""
    changed = [what for what, value in now.items() if saved.get(what) != value]
    if changed:
        details = difference(saved["tokenizer"], now["tokenizer"]) if "tokenizer" in changed else []
        lines = "".join(f"\n  {line}" for line in details)
        raise CheckpointError(f"{folder}: the {' and the '.join(changed)} changed since it was saved; a resumed run would read other data{lines}")


def preflight(config: RunConfig) -> Report:
    """Check a config; print warnings, raise ConfigError with every problem."""
    report = check(config, network=True)
    problems = report.problems + requirements(config)
    if problems:
        raise ConfigError(problems, config.run.name or "config")
    for warning in report.warnings:
        print(f"WARNING: {warning}", file=sys.stderr)
    return report


def first_phase(config: RunConfig, world: World) -> Phase:
    train = config.train
    rows = train.micro_batch * world.size
    if train.global_batch % rows:
        problem = f"{train.global_batch} rows cannot be made of micro-batches of {train.micro_batch} on {world.size} ranks"
        raise ConfigError([f"train.global_batch: {problem}"])
    return Phase(train.seq_len, train.micro_batch, train.global_batch // rows, clip=train.clip or None)


def clip_gradients(parameters: list[Any], largest: float | None) -> Tensor:
    """The gradients' norm before clipping, 0-d on the device; nothing waits for it."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if largest is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm


def out_of_memory(config: RunConfig, error: BaseException) -> str:
    """What to change, from the cheapest remedy on."""
    train = config.train
    return (
        f"out of memory: {str(error).splitlines()[0]}\n"
        f"  train.micro_batch = {train.micro_batch}: halve it; train.global_batch stays and accumulation doubles\n"
        f"  train.activation_checkpointing = {train.activation_checkpointing!r}: 'selective' or 'full' recompute instead of keeping\n"
        f"  loss.chunk_tokens = {config.loss.config.chunk_tokens}: fewer positions of logits at once (0 keeps all of them)"
    )


def train(config: RunConfig) -> int:
    """Train a config and, with ``export.at_end``, export it; returns the exit status."""
    try:
        path = _train(config)
    except Interrupted:
        return 130
    if config.export.at_end:
        from titanlm.export import export_run

        print(export_run(path, device=config.train.device))
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
    return "\n".join([*(f"WARNING: {warning}" for warning in report.warnings), report.summary])


if __name__ == "__main__":
    from titanlm.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
