"""Non-finite steps: what the device flag keeps out, and what the error says."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from titanlm.errors import NonFiniteError
from titanlm.guard import FiniteGuard
from titanlm.optimizers.adamw import AdamWConfig, adamw
from titanlm.patterns import NamedParam

CPU = torch.device("cpu")
FINE = torch.tensor(1.0)


def parameters(n: int = 2) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(3, generator=generator)) for _ in range(n)]


def fused(members: Sequence[nn.Parameter]) -> torch.optim.AdamW:
    return adamw(AdamWConfig(lr=0.1), named_params=[NamedParam(str(index), parameter, "matrix") for index, parameter in enumerate(members)])


def set_gradients(members: Sequence[nn.Parameter], value: float = 1.0) -> None:
    for parameter in members:
        parameter.grad = torch.full_like(parameter, value)


def everything(members: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Weights, moments and step counts, copied."""
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    return [tensor.detach().clone() for tensor in (*members, *state)]


def test_a_bad_step_and_those_after_it_change_nothing() -> None:
    members = parameters()
    optimizer = fused(members)
    guard = FiniteGuard([optimizer], CPU, remember=5)
    assert not guard.flagless
    set_gradients(members)
    guard.observe(0, (1, 2), FINE, FINE)
    optimizer.step()
    guard.check()
    before = everything(members, optimizer)
    for step, loss, value in ((1, FINE * torch.nan, torch.nan), (2, FINE, 1.0)):  # the next step's numbers are fine again
        set_gradients(members, value)
        guard.observe(step, (3, 4 + step), loss, FINE * value)  # does not raise: nothing waits for the device
        optimizer.step()
        after = everything(members, optimizer)
        assert len(after) == len(before) == 2 + 3 * 2
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    with pytest.raises(NonFiniteError, match=r"step 2: loss or gradient is not finite; .*Documents of the step: 3, 5\. Lower the learning rate"):
        guard.check()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_every_number_that_is_not_finite(value: float, where: str) -> None:
    guard = FiniteGuard([fused(parameters())], CPU, remember=2)
    bad = torch.tensor(value)
    guard.observe(7, (9,), bad if where == "loss" else FINE, bad if where == "gradient" else FINE)
    with pytest.raises(NonFiniteError, match="step 8: "):
        guard.check()


def test_the_first_bad_step_is_reported() -> None:
    guard = FiniteGuard([fused(parameters())], CPU, remember=10)
    for step in range(10):
        guard.observe(step, (100 + step,), torch.tensor(torch.nan) if step in (4, 6, 9) else FINE, FINE)
    for _ in range(2):  # as often as it is asked
        with pytest.raises(NonFiniteError, match=r"step 5: .*Documents of the step: 104\."):
            guard.check()


def test_it_remembers_as_many_steps_as_go_unchecked() -> None:
    guard = FiniteGuard([fused(parameters())], CPU, remember=3)
    for step in range(3):
        guard.observe(step, (step,), FINE, FINE)
    guard.check()
    for step in range(3, 6):
        guard.observe(step, (step,), FINE * torch.nan if step == 3 else FINE, FINE)
    assert len(guard.history) == 3
    with pytest.raises(NonFiniteError, match=r"step 4: .*Documents of the step: 3\."):
        guard.check()


def test_many_documents_are_cut_short() -> None:
    guard = FiniteGuard([fused(parameters())], CPU, remember=1)
    guard.observe(0, tuple(range(50)), FINE * torch.nan, FINE)
    with pytest.raises(NonFiniteError, match=r"Documents of the step: 0, 1, .*, 18, 19…\. "):
        guard.check()


def test_an_optimizer_without_the_flag_is_stopped_before_its_update() -> None:
    members = parameters(3)
    optimizers = [fused(members[:1]), torch.optim.SGD(members[1:], lr=0.1)]
    guard = FiniteGuard(optimizers, CPU, remember=5)
    assert guard.flagless
    guard.observe(0, (1,), FINE, FINE)
    with pytest.raises(NonFiniteError, match="step 2: "):
        guard.observe(1, (2,), FINE, FINE * torch.inf)
    # The flag is up for the other one all the same.
    set_gradients(members)
    before = members[0].detach().clone()
    optimizers[0].step()
    assert torch.equal(members[0], before)


def test_unfused_adamw_has_no_flag() -> None:
    assert FiniteGuard([torch.optim.AdamW(parameters(), lr=0.1, fused=False)], CPU, remember=1).flagless
    assert not FiniteGuard([torch.optim.AdamW(parameters(), lr=0.1, fused=True)], CPU, remember=1).flagless


def test_finite_steps_are_ordinary_steps() -> None:
    guarded, plain = parameters(), parameters()
    optimizer, reference = fused(guarded), fused(plain)
    guard = FiniteGuard([optimizer], CPU, remember=5)
    for step in range(20):
        for members in (guarded, plain):
            set_gradients(members, 0.1 * (step - 7))
        guard.observe(step, (), FINE, FINE)
        optimizer.step()
        reference.step()
    guard.check()
    assert all(torch.equal(a, b) for a, b in zip(guarded, plain, strict=True))
