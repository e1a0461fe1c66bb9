"""The linear warm-up all schedulers share."""

from __future__ import annotations


def warmup(step: int, warmup_steps: int) -> float:
    """(step + 1) / warmup_steps up to 1; the first step already has a learning rate above 0."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def require_fit(total_steps: int, **parts: int) -> None:
    """Raise ValueError naming the settings whose steps together exceed the run's."""
    if sum(parts.values()) > total_steps:
        names = " + ".join(f"{name} {steps}" for name, steps in parts.items())
        raise ValueError(f"{next(iter(parts))}: {names} exceed train.steps = {total_steps}")
