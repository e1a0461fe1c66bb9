"""How many UTF-8 bytes each token of a row stands for, by table.

Parameter Golf's rule for models that may put a space before a text themselves:
the bytes of y after x are those of its piece without the leading space, and one
for that space unless x is a boundary (a special or unknown id, or nothing).

Millions of tokens a second go through here, so an id's three facts lie in one
number, bytes · 4 + space · 2 + boundary, and are fetched at once.
"""

from __future__ import annotations

import numpy as np


class ByteCounts:
    """``n_bytes`` (V,) with the leading space, ``space`` (V,) where there is one that may be free, ``boundary`` (V,)."""

    def __init__(self, n_bytes: np.ndarray, space: np.ndarray, boundary: np.ndarray) -> None:
        facts = n_bytes.astype(np.int32) * 4 + space * 2 + boundary
        # One entry more than there are ids, so that "no previous id", -1, finds a boundary at the end.
        self._facts = np.append(facts, 1).astype(np.int32)
        self._free_spaces = bool(space.any())

    def of(self, ids: np.ndarray, prev_ids: np.ndarray) -> np.ndarray:
        """(n,) int32 for ``ids`` that each follow one of ``prev_ids``, -1 for none."""
        own = self._facts.take(ids)
        counted = own >> 2
        if self._free_spaces:
            own >>= 1
            own &= self._facts.take(prev_ids)
            own &= 1
            counted -= own
        return counted
