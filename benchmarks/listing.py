"""Time from a parquet dataset of very many files to its first document.

    python benchmarks/listing.py
    python benchmarks/listing.py --files 2000 --streams 8

Small files are made in a temporary folder, all of them in one directory, of
sixteen sizes. Timed are building the dataset for all streams, as a
run does, with names and sizes just written and so in memory, and then the first
document of one stream.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from titanlm.registry import Component


def make(folder: Path, n_files: int) -> None:
    """Files of one row each."""
    import pyarrow
    from pyarrow import parquet

    contents = []
    for length in range(1, 17):
        parquet.write_table(pyarrow.table({"text": ["x" * length]}), folder / "one.parquet")
        contents.append((folder / "one.parquet").read_bytes())
    os.unlink(folder / "one.parquet")
    for number in range(n_files):
        (folder / f"part-{number:06}.parquet").write_bytes(contents[number % len(contents)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=387_270)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--dir", type=Path, help="where to make the temporary folder")
    options = parser.parse_args()

    tokenizer = Component.named("tokenizer", "byte").build()
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        make(Path(folder), options.files)
        dataset = Component.named("dataset", "parquet", paths=(folder,))
        runtime = {"tokenizer": tokenizer, "split": "train", "n_streams": options.streams, "seed": 0}
        started = time.perf_counter()
        streams = [dataset.build(stream=stream, **runtime) for stream in range(options.streams)]
        built_s = time.perf_counter() - started
        next(streams[0])
        first_s = time.perf_counter() - started - built_s
        print(f"{options.files:,} files, {options.streams} streams: built in {built_s:.2f} s, first document {first_s:.2f} s later")


if __name__ == "__main__":
    main()
