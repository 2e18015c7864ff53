"""Who is admitted next: priority first, then the key that was served least, then age."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from appliance.engine.sequence import Sequence


class WaitingQueue:
    """Sequences without blocks. Preempted ones come back before all others of their priority.

    Fairness across keys is start-time fair queueing on tokens: each key carries the tokens served to it, a key that returns from idleness starts
    at the level of the least-served waiting one, so that it can neither hoard credit nor be starved.
    """

    def __init__(self) -> None:
        self._returned: list[Sequence] = []  # preempted, oldest arrival first
        self._by_key: dict[tuple[int, str], deque[Sequence]] = {}
        self._served: dict[str, float] = {}
        self._count = 0
        self._tokens: dict[int, int] = {}  # sequence id -> tokens to prefill
        self.num_tokens = 0  # to prefill, over all that wait; a prefix that the cache still holds included

    def __len__(self) -> int:
        return self._count + len(self._returned)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._returned
        for queue in self._by_key.values():
            yield from queue

    def push(self, sequence: Sequence) -> None:
        """Queue a new sequence behind its key's others of the same priority."""
        slot = (sequence.priority, sequence.key_id)
        if slot not in self._by_key:
            self._by_key[slot] = deque()
            waiting = {key for _, key in self._by_key if key != sequence.key_id}
            floor = min((self._served.get(key, 0.0) for key in waiting), default=0.0)
            self._served[sequence.key_id] = max(self._served.get(sequence.key_id, 0.0), floor)
        self._by_key[slot].append(sequence)
        self._count += 1
        self._count_tokens(sequence)

    def push_back(self, sequence: Sequence) -> None:
        """Take back a preempted sequence, ahead of the queue."""
        self._returned.append(sequence)
        self._returned.sort(key=lambda item: item.arrival)
        self._count_tokens(sequence)

    def charge(self, key_id: str, num_tokens: int) -> None:
        """Count tokens computed for a key."""
        self._served[key_id] = self._served.get(key_id, 0.0) + num_tokens

    def peek(self) -> Sequence | None:
        """The next to be admitted; None where nothing waits."""
        slot = self._best_slot()
        best = self._by_key[slot][0] if slot is not None else None
        if self._returned and (best is None or self._returned[0].priority <= best.priority):
            return self._returned[0]
        return best

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence, wherever it stands. Raises ValueError if it is not here."""
        if sequence in self._returned:
            self._returned.remove(sequence)
            self.num_tokens -= self._tokens.pop(sequence.id)
            return
        slot = (sequence.priority, sequence.key_id)
        queue = self._by_key.get(slot)
        if queue is None:
            raise ValueError(f"sequence {sequence.id} is not waiting")
        if queue[0] is sequence:
            queue.popleft()
        else:
            queue.remove(sequence)
        self._count -= 1
        self.num_tokens -= self._tokens.pop(sequence.id)
        if not queue:
            del self._by_key[slot]
            if not self._by_key:
                self._served.clear()

    def oldest_queued_at(self) -> float | None:
        """CLOCK_MONOTONIC at which the longest-waiting one was first queued; None where nothing waits."""
        heads = [sequence.queued_at for sequence in self._returned]
        heads.extend(queue[0].queued_at for queue in self._by_key.values())
        return min(heads, default=None)

    def _count_tokens(self, sequence: Sequence) -> None:
        self._tokens[sequence.id] = len(sequence.token_ids)
        self.num_tokens += len(sequence.token_ids)

    def _best_slot(self) -> tuple[int, str] | None:
        if not self._by_key:
            return None
        return min(self._by_key, key=lambda slot: (slot[0], self._served.get(slot[1], 0.0), self._by_key[slot][0].arrival))
