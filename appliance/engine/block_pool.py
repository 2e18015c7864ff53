"""Fixed blocks of KV cache: who owns which, and which still hold a prefix that somebody may ask for again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from appliance.events import BlockEnds

_BITS = 64  # more than any time in milliseconds or number of reuses has


class BlockPool:
    """Blocks 0 to num_blocks - 1. A block is referenced (by one or more sequences), or free; a free block with a hash stays findable until reused.

    Empty blocks are taken before cached ones and last-freed first, which keeps the touched part of the pool small; cached ones go least
    recently freed first. All methods are O(blocks named). Not thread-safe: the step loop owns it, and sets `now` before it takes or frees blocks.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, not {num_blocks}")
        self.num_blocks = num_blocks
        self.now = 0  # CLOCK_MONOTONIC in whole milliseconds; for the lifetimes alone
        self.num_allocated = self.num_reused = self.num_evicted = 0  # blocks, ever
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._allocated_at = [0] * num_blocks
        self._freed_at = [0] * num_blocks  # of those in _cached
        self._num_reuses = [0] * num_blocks  # of the content it holds
        self._ends = _Ends()

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could hand out, cached ones included."""
        return len(self._empty) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks referenced by at least one sequence."""
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        """Free blocks that are still findable by their hash."""
        return len(self._cached)

    @property
    def num_findable(self) -> int:
        """Blocks with a hash, in use or free."""
        return len(self._block_of)

    def take_ends(self) -> BlockEnds | None:
        """The lives that ended since the last call; None where none did."""
        if self._ends.is_empty:
            return None
        ends, self._ends = self._ends, _Ends()
        return ends.report()

    def lookup(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks that hold the longest known prefix of `hashes`. Changes nothing; `share` them before anything else is allocated."""
        blocks: list[int] = []
        for key in hashes:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_among(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` nobody references: sharing them takes so many from `num_free`."""
        return sum(1 for block in blocks if self._references[block] == 0)

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to each of `blocks`, found by `lookup`."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1
            self._num_reuses[block] += 1
            self.num_reused += 1

    def allocate(self, count: int) -> list[int]:
        """`count` blocks of unknown content, referenced once. Raises MemoryError (and changes nothing) where so many are not free."""
        if count > self.num_free:
            raise MemoryError(f"{count} blocks asked for, {self.num_free} of {self.num_blocks} free")
        blocks: list[int] = []
        for _ in range(count):
            if self._empty:
                block = self._empty.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                key = self._hash_of[block]
                assert key is not None
                del self._block_of[key]
                self._hash_of[block] = None
                self.num_evicted += 1
                self._ends.add_idle(self.now - self._freed_at[block])
                self._ends.add(self.now - self._allocated_at[block], self._num_reuses[block])
            self._references[block] = 1
            self._allocated_at[block] = self.now
            self._num_reuses[block] = 0
            blocks.append(block)
        self.num_allocated += count
        return blocks

    def register(self, block: int, key: bytes) -> None:
        """Make a full, referenced block findable under `key`. The first block registered under a key keeps it."""
        assert self._references[block] > 0, "only a referenced block has known content"
        if self._hash_of[block] is None and key not in self._block_of:
            self._hash_of[block] = key
            self._block_of[key] = block

    def free(self, blocks: Sequence[int]) -> None:
        """Drop one reference from each of `blocks`, given in the order of the sequence: its tail becomes reusable before its head."""
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} freed twice"
            if self._references[block] == 0:
                if self._hash_of[block] is None:
                    self._empty.append(block)
                    self._ends.add(self.now - self._allocated_at[block], self._num_reuses[block])
                else:
                    self._cached[block] = None
                    self._freed_at[block] = self.now

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block is in exactly one place and every hash leads back to its block. O(num_blocks)."""
        empty = set(self._empty)
        assert len(empty) == len(self._empty), "a block is twice in the empty list"
        for block in range(self.num_blocks):
            places = (block in empty) + (block in self._cached) + (self._references[block] > 0)
            assert places == 1, f"block {block} is in {places} places"
            assert self._references[block] >= 0
            key = self._hash_of[block]
            assert key is None or self._block_of[key] == block
            assert block not in empty or key is None
            assert block not in self._cached or key is not None
        assert len(self._block_of) == sum(key is not None for key in self._hash_of)


class _Ends:
    """Lives of blocks that ended, counted by the bit length of milliseconds and of reuses: cheaper than any search in edges."""

    __slots__ = ("idle_milliseconds", "idles", "is_empty", "lifetime_milliseconds", "lifetimes", "num_reuses", "reuses")

    def __init__(self) -> None:
        self.is_empty = True
        self.lifetimes, self.idles, self.reuses = [0] * _BITS, [0] * _BITS, [0] * _BITS
        self.lifetime_milliseconds = self.idle_milliseconds = self.num_reuses = 0

    def add(self, lifetime_milliseconds: int, num_reuses: int) -> None:
        self.is_empty = False
        self.lifetimes[lifetime_milliseconds.bit_length()] += 1
        self.lifetime_milliseconds += lifetime_milliseconds
        self.reuses[num_reuses.bit_length()] += 1
        self.num_reuses += num_reuses

    def add_idle(self, milliseconds: int) -> None:
        self.idles[milliseconds.bit_length()] += 1
        self.idle_milliseconds += milliseconds

    def report(self) -> BlockEnds:
        return BlockEnds(
            lifetimes=_pairs(self.lifetimes),
            lifetime_seconds=self.lifetime_milliseconds / 1000,
            idles=_pairs(self.idles),
            idle_seconds=self.idle_milliseconds / 1000,
            reuses=_pairs(self.reuses),
            num_reuses=self.num_reuses,
        )


def _pairs(counts: list[int]) -> tuple[tuple[int, int], ...]:
    return tuple((bits, count) for bits, count in enumerate(counts) if count)
