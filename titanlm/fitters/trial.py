"""One trial of a fitter: measured, and told on stderr, since each takes as long as an export.

The line begins as those of the Parameter Golf record (pull request 369) do:
``prune_trial:0.12 artifact:15892189 VALID``, or ``OVER``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from titanlm.exporters.encoding import Candidate


def measured(candidate: Candidate, size_bytes: Callable[[Candidate], int], max_bytes: int, *, label: str, trial: int, at_most: int) -> int:
    """The candidate's size in bytes; ``label`` names what is tried, and ``trial`` of ``at_most`` says how far the fit is."""
    start = time.perf_counter()
    n_bytes = size_bytes(candidate)
    spare = max_bytes - n_bytes
    verdict, rest = ("VALID", f"{spare:,} bytes left") if spare >= 0 else ("OVER", f"{-spare:,} bytes over")
    place = f"trial {trial} of at most {at_most}, {time.perf_counter() - start:.1f} s"
    print(f"{label} artifact:{n_bytes} {verdict} ({rest}; {place})", file=sys.stderr, flush=True)
    return n_bytes
