"""Non-finite steps: what the device flag or the host keeps out, what is skipped, and what the error says."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

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
    assert not guard.host_decides
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
    with pytest.raises(NonFiniteError, match=r"step 4: .*Documents of the step: 3\."):
        guard.observe(6, (6,), FINE, FINE)  # more than it can remember: it looks by itself


def test_many_documents_are_cut_short() -> None:
    guard = FiniteGuard([fused(parameters())], CPU, remember=1)
    guard.observe(0, tuple(range(50)), FINE * torch.nan, FINE)
    with pytest.raises(NonFiniteError, match=r"Documents of the step: 0, 1, .*, 18, 19…\. "):
        guard.check()


def test_an_optimizer_without_the_flag_is_stopped_before_its_update() -> None:
    members = parameters(3)
    optimizers = [fused(members[:1]), torch.optim.SGD(members[1:], lr=0.1)]
    guard = FiniteGuard(optimizers, CPU, remember=5)
    assert guard.host_decides
    guard.observe(0, (1,), FINE, FINE)
    with pytest.raises(NonFiniteError, match="step 2: "):
        guard.observe(1, (2,), FINE, FINE * torch.inf)
    # The flag is up for the other one all the same.
    set_gradients(members)
    before = members[0].detach().clone()
    optimizers[0].step()
    assert torch.equal(members[0], before)


def test_unfused_adamw_has_no_flag() -> None:
    assert FiniteGuard([torch.optim.AdamW(parameters(), lr=0.1, fused=False)], CPU, remember=1).host_decides
    assert not FiniteGuard([torch.optim.AdamW(parameters(), lr=0.1, fused=True)], CPU, remember=1).host_decides


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


# ------------------------------------------------------------ skip
BAD: dict[str, tuple[float, float]] = {
    "nan loss": (torch.nan, 1.0),
    "nan gradient": (1.0, torch.nan),
    "inf loss": (torch.inf, 1.0),
    "inf gradient": (1.0, -torch.inf),
    "both": (torch.nan, torch.nan),
    "1e30 whose norm overflows": (1e30, 1e30),
}
"""Loss, and one element of the gradient."""
MAKERS: dict[str, Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]] = {
    "fused adamw": fused,
    "fused adam with amsgrad": lambda members: torch.optim.Adam(members, lr=0.1, fused=True, amsgrad=True),
    "fused sgd": lambda members: torch.optim.SGD(members, lr=0.1, momentum=0.9, fused=True),
    "adamw": lambda members: torch.optim.AdamW(members, lr=0.1, fused=False),
    "sgd": lambda members: torch.optim.SGD(members, lr=0.1, momentum=0.9),
}


class Run:
    """Steps as the trainer takes them: observe, then optimizers unless the host knows better."""

    def __init__(self, maker: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer], **options: object) -> None:
        self.members = parameters()
        self.optimizer = maker(self.members)
        self.guard = FiniteGuard([self.optimizer], CPU, remember=50, on_nonfinite="skip", **options)  # type: ignore[arg-type]
        self.loss_sum, self.moved = torch.zeros(()), 0

    def step(self, number: int, loss: float = 1.0, element: float | None = None) -> bool:
        set_gradients(self.members, 0.1 * (number % 7 - 3))
        if element is not None:
            self.members[0].grad[1] = element  # type: ignore[index]
        norm = torch.nn.utils.get_total_norm([member.grad for member in self.members if member.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(self.members, 1.0, norm)
        good = self.guard.observe(number, (number, 1000 + number), torch.tensor(loss), norm)
        if good:
            self.optimizer.step()
            self.moved += 1
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_sum += self.guard.clean(torch.tensor(loss))
        return good

    def everything(self) -> list[Tensor]:
        return everything(self.members, self.optimizer)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("bad", BAD)
def test_e1_a_skipped_step_changes_no_bit_and_training_goes_on(bad: str, maker: str) -> None:
    """Weights, moments and step counts are those of a run that never saw the bad steps."""
    run, straight = Run(MAKERS[maker], max_in_a_row=2), Run(MAKERS[maker])
    for number in range(10):
        if number in (3, 4, 7):
            before = run.everything()
            run.step(number, *BAD[bad])
            assert all(torch.equal(a, b) for a, b in zip(before, run.everything(), strict=True))
        else:
            run.step(number)
            straight.step(number)
    assert len(run.everything()) > 2
    assert all(torch.equal(a, b) for a, b in zip(run.everything(), straight.everything(), strict=True))
    assert run.guard.check() == [(number, (number, 1000 + number)) for number in (3, 4, 7)]
    assert run.guard.check() == []
    assert run.guard.n_skipped == 3
    assert run.loss_sum == 7


@pytest.mark.parametrize("maker", MAKERS)
def test_e1_a_bad_first_step(maker: str) -> None:
    run, straight = Run(MAKERS[maker], max_in_a_row=1), Run(MAKERS[maker])
    run.step(0, torch.nan, torch.nan)
    assert all(torch.equal(a, b) for a, b in zip(run.members, straight.members, strict=True))
    for number in range(1, 5):
        run.step(number)
        straight.step(number)
    assert all(torch.equal(a, b) for a, b in zip(run.everything(), straight.everything(), strict=True))


def test_e1_who_decides() -> None:
    """The device alone where every optimizer has the flag and nothing else moves; then the host never waits."""
    device, host, flagless = Run(fused, max_in_a_row=5), Run(fused, needs_host=True, max_in_a_row=5), Run(MAKERS["sgd"], max_in_a_row=5)
    for number in range(4):
        loss = torch.nan if number == 2 else 1.0
        assert device.step(number, loss)
        assert host.step(number, loss) is flagless.step(number, loss) is (number != 2)
    assert device.guard.n_skipped == 0  # the host has not looked
    assert [len(run.guard.check()) for run in (device, host, flagless)] == [1, 1, 1]
    assert [run.guard.n_skipped for run in (device, host, flagless)] == [1, 1, 1]
    assert not FiniteGuard([fused(parameters())], CPU, remember=1, needs_host=True).host_decides  # stop needs it for nothing


@pytest.mark.parametrize("maker", ["fused adamw", "adamw"])
def test_e1_too_many_in_a_row_stop_the_run_and_are_named(maker: str) -> None:
    run = Run(MAKERS[maker], max_in_a_row=2)
    for number in range(3):
        run.step(number)
    for number in (3, 4):
        run.step(number, torch.nan)
    assert [step for step, _ in run.guard.check()] == [3, 4]

    def goes_on() -> None:
        run.step(5, torch.nan)
        run.step(6)  # fine again, but where only the device decides the host looks later
        run.guard.check()

    named = r"\n  step 4: documents 3, 1003\n  step 5: .*\n  step 6: documents 5, 1005$"
    with pytest.raises(NonFiniteError, match=rf"(?s)^steps 4 to 6: .* in 3 steps in a row, and 2 may be skipped.*{named}"):
        goes_on()
    with pytest.raises(NonFiniteError, match="steps 4 to 6"):
        run.guard.state()  # nothing of it is saved


def test_e1_good_steps_end_the_row() -> None:
    run = Run(fused, max_in_a_row=1)
    for number in range(20):
        run.step(number, torch.nan if number % 2 else 1.0)
    assert len(run.guard.check()) == run.guard.n_skipped == 10


@pytest.mark.parametrize("cut", [2, 3, 4, 5, 8])
def test_e1_a_resumed_guard_counts_on(cut: int) -> None:
    """In a row and in all, whether the cut is before, in or after a row of bad steps."""
    bad = {2, 3, 6, 7, 8}

    def observe(guard: FiniteGuard, steps: range) -> str:
        try:
            for step in steps:
                guard.observe(step, (step,), FINE * torch.nan if step in bad else FINE, FINE)
            guard.check()
        except NonFiniteError as error:
            return str(error)
        return ""

    straight, stopped, resumed = (FiniteGuard([fused(parameters())], CPU, 20, "skip", max_in_a_row=2) for _ in range(3))
    expected = observe(straight, range(10))
    assert observe(stopped, range(cut)) == ""
    resumed.observe(99, (), FINE * torch.nan, FINE)  # what it saw before is forgotten
    resumed.restore(json.loads(json.dumps(stopped.state())))
    assert resumed.bad == 0
    assert observe(resumed, range(cut, 10)) == expected != ""
    assert stopped.n_skipped <= resumed.n_skipped == straight.n_skipped == 4


def test_e1_after_a_rollback_the_failure_is_forgotten() -> None:
    run = Run(fused, max_in_a_row=0)
    run.step(0)
    state = run.guard.state()
    run.step(1, torch.nan)
    with pytest.raises(NonFiniteError):
        run.guard.check()
    run.guard.restore(state)
    run.step(2)
    assert run.guard.check() == []


@pytest.mark.parametrize("values", [torch.tensor(torch.nan), torch.tensor([1.0, torch.inf, torch.nan]), torch.tensor([1, 2])])
def test_clean_leaves_no_trace_of_a_bad_step(values: Tensor) -> None:
    guard = FiniteGuard([], CPU, 5, "skip", max_in_a_row=5)
    guard.observe(0, (), FINE, FINE)
    assert torch.equal(guard.clean(values).nan_to_num(7), values.nan_to_num(7))
    guard.observe(1, (), FINE, FINE * torch.nan)
    assert torch.equal(guard.clean(values), torch.zeros_like(values))
    assert guard.bad == 1
