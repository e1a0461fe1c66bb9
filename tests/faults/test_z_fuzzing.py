"""A few hundred inputs for each reader of foreign files (Z1 to Z5); ``fuzz.py`` beside this file goes on for as long as one likes."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

from titanlm import checkpoint

ROOT = Path(__file__).parents[2]
PROVED = {
    "Z1 each field once": "tests/test_config.py::test_every_setting_refuses_values_of_other_types",
    "Z2 damaged text": "tests/test_config.py::test_random_damage_is_a_config_error_or_a_config",
    "Z3 2,500 forged artifacts": "tests/exporters/test_artifact_hostile.py::test_fuzz_only_artifact_errors_escape",
}
"""Cases of the fault matrix that other files prove."""

_spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).with_name("fuzz.py"))
assert _spec is not None
assert _spec.loader is not None
fuzz = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fuzz)


CASES = {"z1 config": 80, "z2 toml": 200, "z3 artifact": 300, "z4 shard": 300, "z5 checkpoint": 250}
"""How many inputs each gets."""


@pytest.mark.parametrize("case", CASES)
def test_z1_to_z5_readers_read_or_raise_what_they_declare(case: str) -> None:
    fuzz.fuzz(case.split()[1], CASES[case], derandomize=True)


def test_z5_a_manifest_of_millions_of_ranks_is_refused_at_once(tmp_path: Path) -> None:
    """Found by fuzzing: the names of all parts were made before the first missing one was looked for."""
    folder = tmp_path / "step-00000003"
    folder.mkdir()
    for name, content in fuzz.saved().items():
        (folder / name).write_bytes(content)
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    (folder / "MANIFEST.json").write_text(json.dumps({**manifest, "world_size": 2**62}))
    with fuzz.bounded(tmp_path):
        assert checkpoint.verify(folder) is not None


def test_the_oracle_sees_what_it_forbids(tmp_path: Path) -> None:
    """A fuzzer that could not fail would prove nothing."""
    import os
    import pickle

    for act in (lambda: os.system("true"), lambda: pickle.loads(pickle.dumps(Path("x"))), lambda: open(tmp_path.parent / "elsewhere", "w").close()):
        with pytest.raises(AssertionError), fuzz.bounded(tmp_path):
            act()
    with fuzz.bounded(tmp_path):
        (tmp_path / "here").write_text("")


def test_the_tests_that_prove_cases_elsewhere_exist() -> None:
    """Tables ``PROVED`` of the files beside this one name tests by path and name."""
    n_seen = 0
    for file in Path(__file__).parent.glob("test_*.py"):
        for statement in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "PROVED":
                table = ast.literal_eval(statement.value)
                for case, place in ((case, place) for case, places in table.items() for place in ([places] if isinstance(places, str) else places)):
                    path, _, name = place.partition("::")
                    text = (ROOT / path).read_text(encoding="utf-8")
                    assert re.search(rf"^def {re.escape(name)}\(", text, re.MULTILINE), f"{file.name}: {case}: {place} is no test"
                    n_seen += 1
    assert n_seen > 30
