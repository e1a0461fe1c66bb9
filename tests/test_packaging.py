"""A wheel built from the project, installed where there is no source tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a commit of everything would hold; the build leaves its litter there."""
    try:
        listed = subprocess.run(["git", "ls-files", "-zco", "--exclude-standard"], cwd=REPO, capture_output=True, check=True, timeout=60).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: what belongs to the project is not known")
    copy = tmp_path_factory.mktemp("packaging") / "project"
    for name in filter(None, os.fsdecode(listed).split("\0")):
        if (REPO / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPO / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(sources: Path) -> Path:
    out = sources.parent / "wheels"
    build = [*PIP, "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(sources)]
    subprocess.run(build, check=True, timeout=300)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    target = wheel.parents[1] / "site"
    subprocess.run([*PIP, "install", "--quiet", "--no-index", "--no-deps", "--target", str(target), str(wheel)], check=True, timeout=300)
    return target


def run(site: Path, cwd: Path, *command: str) -> str:
    # -P is for scripts too: neither the working directory nor a script's own is searched, so only the wheel can be found.
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_holds_the_package_and_nothing_else(sources: Path, wheel: Path) -> None:
    package = {path.relative_to(sources).as_posix() for path in (sources / "titanlm").rglob("*") if path.suffix == ".py" or path.name == "py.typed"}
    assert "titanlm/py.typed" in package
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    assert {name for name in names if not re.match(r"titanlm-[^/]+\.dist-info/", name)} == package
    info = {name.split(".dist-info/")[1] for name in names - package}
    assert {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"} <= info


def test_every_folder_of_components_is_a_package(sources: Path) -> None:
    """A folder without ``__init__.py`` works in a source tree and is missing from a wheel."""
    folders = {path.parent for path in (sources / "titanlm").rglob("*.py")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]


def test_metadata(wheel: Path) -> None:
    (metadata,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA")]
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    version = re.search(r'__version__ = "([^"]+)"', (REPO / "titanlm" / "__init__.py").read_text())
    assert version is not None
    assert f"\nVersion: {version[1]}\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    assert "\nRequires-Python: >=3.11\n" in text


def test_installed_wheel_trains(site: Path, tmp_path: Path) -> None:
    place = run(site, tmp_path, sys.executable, "-c", "import titanlm; print(titanlm.__file__)")
    assert Path(place.strip()).is_relative_to(site)
    (tmp_path / "tiny.toml").write_text(
        'dataset = { name = "python_stdlib", max_files = 60, max_bytes_per_file = 2000, validation_fraction = 0.2 }\n'
        'model = { name = "decoder", n_layers = 1, d_model = 16, n_heads = 2 }\n'
        'optimizer = [{ name = "adamw", lr = 1e-3 }]\n'
        'averager = "ema"\n'
        'quantizer = "int6"\n'
        "data = { n_streams = 2 }\n"
        'train = { steps = 3, seq_len = 32, global_batch = 4, micro_batch = 2, log_every = 1, device = "cpu" }\n'
        "validation = [{ max_tokens = 500 }]\n"
        "export = { at_end = true, max_bytes = 50_000 }\n"
    )
    printed = run(site, tmp_path, sys.executable, "-m", "titanlm", "train", "tiny.toml")
    assert "after round trip" in printed
    folder = tmp_path / "runs" / "tiny"
    assert (folder / "checkpoints" / "step-00000003" / "MANIFEST.json").is_file()
    assert (folder / "artifact.titanlm").stat().st_size <= 50_000
    assert len((folder / "metrics.jsonl").read_text().splitlines()) >= 3


def test_console_script(site: Path, tmp_path: Path) -> None:
    script = str(site / "bin" / "titanlm")
    assert run(site, tmp_path, script, "--help").startswith("usage: titanlm")
    listing = run(site, tmp_path, script, "list", "model")
    assert re.search(r"^  decoder ", listing, re.MULTILINE)
