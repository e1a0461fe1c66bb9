"""The second stage of SuperBPE: merges learnt on a text that is tokens already, with a say in which are allowed.

The trainer of the `tokenizers` library cannot go on from a vocabulary, and
knows no limit on words. It could be made to, with a character of the private
use planes for each token of the first stage, which ends at 131,068 tokens; but
a limit laid over its merges afterwards is not the limit learnt with, since
every merge decides what can be merged next. So the merges are found here, in
the same order as the library's where everything is allowed: the most frequent
pair, of equals the one with the smallest ids.

The text is one array of ids. A pair's places are kept as an array, of which
those that later merges have used are told by looking, so counts that are too
high are mended when they come to be the highest. Memory is some 40 bytes a token of
the text; time goes with the merges made, a few hundred microseconds each, and
with the text once.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

import numpy as np

BREAK = -1
"""Stands in a text where no merge may cross."""
_ID_BITS = 32
_MASK = (1 << 2 * _ID_BITS) - 1


class PairMerger:
    """Merges the most frequent pairs of ``text``, ids with BREAK at both ends and wherever else; ``tokens`` are the bytes of the ids and grow."""

    def __init__(self, text: np.ndarray, tokens: list[bytes], min_frequency: int = 2) -> None:
        whole = np.int32 if len(text) < 1 << 31 else np.int64
        self.tokens = tokens
        self._ids = {token: i for i, token in enumerate(tokens)}
        self._least = min_frequency
        self._text = text.astype(np.int32)
        """The token that begins at each place, BREAK where one goes on."""
        self._next = np.arange(1, len(text) + 1, dtype=whole)
        self._previous = np.arange(-1, len(text) - 1, dtype=whole)
        self._later: dict[int, np.ndarray] = {}
        """Places of pairs that have a learnt token, or whose places were looked through."""
        places = np.flatnonzero((text[:-1] >= 0) & (text[1:] >= 0)).astype(whole)
        self._pairs, self._starts, self._places = _grouped(_pair(self._text[places], self._text[places + 1]), places)
        counts = np.diff(self._starts)
        often = counts >= min_frequency
        self._queue = [_entry(count, pair) for count, pair in zip(counts[often].tolist(), self._pairs[often].tolist())]
        heapq.heapify(self._queue)

    def learn(self, vocab_size: int, allowed: Callable[[bytes], bool]) -> Iterator[tuple[int, int]]:
        """Merges, as ids, until there are ``vocab_size`` tokens or no pair is frequent enough."""
        while len(self.tokens) < vocab_size and self._queue:
            entry = heapq.heappop(self._queue)
            count, pair = -(entry >> 2 * _ID_BITS), entry & _MASK
            left, right = pair >> _ID_BITS, pair & (1 << _ID_BITS) - 1
            token = self.tokens[left] + self.tokens[right]
            if not allowed(token):
                continue
            places = self._places_of(pair, left, right)
            if len(places) < count:
                self._put(pair, places)
                continue
            self._later.pop(pair, None)
            self._merge(places, left == right, token)
            yield left, right

    def _places_of(self, pair: int, left: int, right: int) -> np.ndarray:
        """Where the pair stands now, ascending."""
        places = self._later.get(pair)
        if places is None:
            at = int(np.searchsorted(self._pairs, pair))
            found = at < len(self._pairs) and self._pairs[at] == pair
            places = self._places[self._starts[at] : self._starts[at + 1]] if found else self._places[:0]
        return places[(self._text[places] == left) & (self._text[self._next[places]] == right)]

    def _put(self, pair: int, places: np.ndarray) -> None:
        self._later.pop(pair, None)
        if len(places) >= self._least:
            self._later[pair] = places
            heapq.heappush(self._queue, _entry(len(places), pair))

    def _merge(self, places: np.ndarray, twins: bool, token: bytes) -> None:
        ends = self._next[places]
        if twins:  # of x x x the first two
            index = np.arange(len(places))
            starts = np.maximum.accumulate(np.where(np.append(False, ends[:-1] == places[1:]), 0, index))
            places, ends = (each[(index - starts) % 2 == 0] for each in (places, ends))
        known = token in self._ids
        new = self._ids.setdefault(token, len(self.tokens))
        if not known:
            self.tokens.append(token)
        after = self._next[ends]
        self._text[places], self._text[ends] = new, BREAK
        self._next[places], self._previous[after] = after, places
        if known:  # made in another way before, so it also stands elsewhere
            places = np.flatnonzero(self._text == new).astype(places.dtype)
        before, after = self._previous[places], self._next[places]
        # A pair of two new ones is that of the first with what follows it, not also that of the second with what precedes it.
        before = before[np.append(True, before[1:] != places[:-1])]
        before = before[self._text[before] >= 0]
        followed = places[self._text[after] >= 0]
        pairs = np.concatenate([_pair(self._text[before], new), _pair(new, self._text[self._next[followed]])])
        found, starts, where = _grouped(pairs, np.concatenate([before, followed]))
        for pair, start, end in zip(found.tolist(), starts[:-1].tolist(), starts[1:].tolist()):
            if end - start >= self._least:
                self._put(pair, where[start:end])  # most pairs stand once, and cost no more than this look


def _pair(left: np.ndarray | int, right: np.ndarray | int) -> np.ndarray:
    return (np.asarray(left, dtype=np.int64) << _ID_BITS) | np.asarray(right, dtype=np.int64)


def _entry(count: int, pair: int) -> int:
    """The smallest is that of the highest count and then of the smallest ids."""
    return (-count << 2 * _ID_BITS) + pair


def _grouped(pairs: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs that there are, ascending (G,), where each begins (G + 1,) in the last, the places by pair, ascending in each."""
    order = np.argsort(pairs, kind="stable")
    pairs = pairs[order]
    starts = np.flatnonzero(np.append(True, pairs[1:] != pairs[:-1])) if len(pairs) else np.zeros(0, dtype=np.int64)
    return pairs[starts], np.append(starts, len(pairs)), places[order]
