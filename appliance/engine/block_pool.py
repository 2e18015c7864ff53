"""Fixed blocks of KV cache: who owns which, and which still hold a prefix that somebody may ask for again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Blocks 0 to num_blocks - 1. A block is referenced (by one or more sequences), or free; a free block with a hash stays findable until reused.

    Empty blocks are taken before cached ones and last-freed first, which keeps the touched part of the pool small; cached ones go least
    recently freed first. All methods are O(blocks named). Not thread-safe: the step loop owns it.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, not {num_blocks}")
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

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
            self._references[block] = 1
            blocks.append(block)
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
                else:
                    self._cached[block] = None

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
