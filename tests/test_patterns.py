from __future__ import annotations

from titanlm.patterns import claim

ROLES = {"embedding.weight": "embedding", "blocks.0.q.weight": "matrix", "blocks.0.norm.weight": "norm", "blocks.1.q.weight": "matrix"}


def test_first_match_wins_and_everything_is_claimed_once() -> None:
    claims = claim(ROLES, [["blocks.0.*"], ["@matrix"], ["*"]])
    assert claims.claimed == [["blocks.0.q.weight", "blocks.0.norm.weight"], ["blocks.1.q.weight"], ["embedding.weight"]]
    assert claims.unclaimed == []
    assert claims.problems == []


def test_pattern_without_match_is_named_with_the_nearest_parameter() -> None:
    claims = claim(ROLES, [["blocks.0.q.weigth"], ["*"]])
    assert claims.problems == ["0.params: pattern 'blocks.0.q.weigth' matches no parameter; did you mean 'blocks.0.q.weight'?"]


def test_entry_shadowed_by_an_earlier_one() -> None:
    claims = claim(ROLES, [["*"], ["@matrix"]])
    assert len(claims.problems) == 1
    assert claims.problems[0].startswith("1.params: every parameter matched by ['@matrix'] is claimed")


def test_absent_role_is_fine_beside_another_but_an_unknown_one_is_not() -> None:
    assert claim(ROLES, [["@matrix", "@head"], ["*"]]).problems == []
    assert "did you mean 'matrix'" in claim(ROLES, [["@matrx"], ["*"]]).problems[0]


def test_unclaimed_parameters_are_listed() -> None:
    assert claim(ROLES, [["@matrix"]]).unclaimed == ["embedding.weight", "blocks.0.norm.weight"]


def test_entries_of_other_groups_take_nothing_away() -> None:
    claims = claim(ROLES, [["@matrix"], ["blocks.*"], ["@matrix", "@embedding"], ["@matrix"]], [False, False, True, True])
    assert claims.claimed[0] == claims.claimed[2][1:] == [name for name, role in ROLES.items() if role == "matrix"]
    assert claims.claimed[1] == ["blocks.0.norm.weight"]
    assert claims.unclaimed == []
    assert [problem.partition(":")[0] for problem in claims.problems] == ["3.params"]
