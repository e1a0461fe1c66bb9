from __future__ import annotations

import pytest

from titanlm.progress import Horizon, Phase, Phases, Progress, Start, largest_divisor

SHORT, LONG, ROUNDED = (Phase(seq_len, 2, 1) for seq_len in (64, 128, 256))


def test_the_share_of_a_run_is_that_of_the_nearer_end() -> None:
    steps, seconds = Horizon(200), Horizon(200, max_wallclock_s=60.0)
    assert [steps.fraction(Progress(step, elapsed_s=1e9)) for step in (0, 50, 200, 300)] == [0.0, 0.25, 1.0, 1.0]
    assert seconds.fraction(Progress(50, elapsed_s=6.0)) == 0.25
    assert seconds.fraction(Progress(50, elapsed_s=45.0)) == 0.75
    assert seconds.fraction(Progress(50, elapsed_s=61.0)) == 1.0


def test_phases_by_steps() -> None:
    phases = Phases([(0, SHORT), (3, LONG), (5, ROUNDED)])
    assert [phases.at(Progress(step)) for step in range(7)] == [SHORT] * 3 + [LONG] * 2 + [ROUNDED] * 2
    assert phases.max_seq_len == 256
    assert Phases([(0, SHORT)]).at(Progress(10**9)) is SHORT


def test_phases_by_share_follow_steps_and_seconds() -> None:
    phases = Phases([(0, SHORT), (0.5, LONG), (0.75, ROUNDED)], Horizon(10))
    assert [phases.at(Progress(step)) for step in (0, 4, 5, 7, 8, 10)] == [SHORT, SHORT, LONG, LONG, ROUNDED, ROUNDED]
    timed = Phases([(0, SHORT), (0.5, LONG)], Horizon(10, max_wallclock_s=100.0))
    assert timed.at(Progress(2, elapsed_s=49.0)) is SHORT
    assert timed.at(Progress(2, elapsed_s=50.0)) is LONG  # slow steps: the clock comes first
    assert timed.at(Progress(5, elapsed_s=1.0)) is LONG


def test_steps_and_shares_in_one_run() -> None:
    """The last in the list that has been reached holds, even if one before it has not."""
    phases = Phases([(0.0, SHORT), (4, LONG), (0.3, ROUNDED)], Horizon(20))
    assert [phases.at(Progress(step)) for step in (3, 4, 5, 6)] == [SHORT, LONG, LONG, ROUNDED]
    early = Phases([(0, SHORT), (4, LONG), (0.1, ROUNDED)], Horizon(20))
    assert [early.at(Progress(step)) for step in (1, 2, 4)] == [SHORT, ROUNDED, ROUNDED]


def test_what_is_still_to_come_counts_equal_phases_once() -> None:
    phases = Phases([(0, SHORT), (2, LONG), (0.5, SHORT), (0.75, ROUNDED)], Horizon(10))
    assert phases.after(Progress(0)) == (SHORT, LONG, ROUNDED)
    assert phases.after(Progress(2)) == (LONG, SHORT, ROUNDED)
    assert phases.after(Progress(6)) == (SHORT, ROUNDED)
    assert phases.after(Progress(10)) == (ROUNDED,)


@pytest.mark.parametrize("starts", [(), (1,), (0, 0), (0, 5, 5), (0, 5, 3), (0, 0.5, 0.4), (0, 1.0), (0, 0.0), (0, -0.5), (0.5,)])
def test_starts_in_another_order_are_refused(starts: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"must increase strictly from 0"):
        Phases([(start, SHORT) for start in starts], Horizon(10))


def test_shares_need_a_horizon() -> None:
    with pytest.raises(ValueError, match="give its horizon"):
        Phases([(0, SHORT), (0.5, LONG)])


def test_a_start_may_be_a_step_and_a_share() -> None:
    """Both have to be reached; the share sets in within the second stage, so what it would make of the first never comes."""
    late = [Phase(phase.seq_len, 2, 1, switches=(("late", True),)) for phase in (SHORT, LONG)]
    stages = [(0, SHORT), (4, LONG), (0.6, late[0]), (Start(4, 0.6), late[1])]
    by_steps, timed = Phases(stages, Horizon(10)), Phases(stages, Horizon(10, max_wallclock_s=100.0))
    assert [by_steps.at(Progress(step)) for step in (3, 4, 5, 6, 9)] == [SHORT, LONG, LONG, late[1], late[1]]
    assert timed.at(Progress(3, elapsed_s=60.0)) is late[0]
    assert by_steps.after(Progress()) == (SHORT, LONG, late[1])
    assert timed.after(Progress()) == (SHORT, LONG, late[0], late[1])
    assert timed.after(Progress(3, elapsed_s=60.0)) == (late[0], late[1])
    assert timed.after(Progress(4, elapsed_s=1.0)) == (LONG, late[1])
    with pytest.raises(ValueError, match=r"must increase strictly from 0"):
        Phases([*stages, (4, SHORT)], Horizon(10))


def test_learning_rates_rise_again_and_are_never_0() -> None:
    phase = Phase(8, 1, 1, lr_multiplier=3.0, rewarmup_steps=4, start_step=10)
    assert [phase.lr_factor(Progress(step)) for step in (0, 10, 11, 13, 14, 99)] == [0.75, 0.75, 1.5, 3.0, 3.0, 3.0]
    assert SHORT.lr_factor(Progress(5)) == 1.0
    assert phase.changes(SHORT) == "seq_len 8, micro_batch 1, lr_multiplier 3.0, rewarmup_steps 4"


def test_the_largest_pass_is_that_with_most_positions_then_of_the_longest_rows() -> None:
    phases = Phases([(0, Phase(8, 64, 1)), (1, Phase(64, 8, 4)), (2, Phase(128, 2, 1))])
    assert phases.largest_pass(True) == (8, 64)
    assert phases.longest.seq_len == 128


def test_largest_divisor_against_trying_all() -> None:
    for n in range(60):
        for most in range(70):
            assert largest_divisor(n, most) == max((d for d in range(1, min(n, most) + 1) if n % d == 0), default=1)
