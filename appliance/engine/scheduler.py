"""What runs in the next step: one token budget, decodes first, then prefill chunks, mixed in one batch; preemption by recompute, newest first."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

from appliance.engine.block_pool import BlockPool
from appliance.engine.sequence import Sequence
from appliance.engine.waiting import WaitingQueue
from appliance.engine.wire import SequenceEvent


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Sizes fixed at start."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_chunks: int  # prefill entries of one step
    block_size: int
    context_length: int
    max_waiting: int
    prefix_caching: bool
    chunk_token_sizes: tuple[int, ...] = ()  # sizes in which graphs replay chunks, ascending: a step's prompt tokens are cut to one of them


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + length) of a sequence; `final` when they complete it, so that its next token is sampled."""

    sequence: Sequence
    start: int
    length: int
    final: bool


@dataclass(slots=True)
class StepPlan:
    """One step. Decode entry i computes position num_tokens - 1 of decodes[i]."""

    decodes: list[Sequence] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    new_rows: list[Sequence] = field(default_factory=list)  # their device row must be filled before the step
    new_blocks: list[tuple[int, int, int]] = field(default_factory=list)  # (row, index in its block table, block)
    events: list[SequenceEvent] = field(default_factory=list)
    num_preemptions: int = 0
    num_context_tokens: int = 0  # positions that the decodes attend to, over all of them

    @property
    def num_prefill_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


class Scheduler:
    """Owns every sequence from submission to its end, the block pool and the row slots. Used by the step loop alone.

    Invariants: a running sequence has a row; its blocks cover the tokens whose KV was launched; `_promised` blocks are what running prefills will
    still take, so that no admission can starve them.
    """

    def __init__(self, limits: SchedulerLimits, pool: BlockPool) -> None:
        self.limits = limits
        self.pool = pool
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # in order of admission: the last is the newest
        self._prefilling: list[Sequence] = []  # of the running ones, in the same order
        self._decoding: list[Sequence] = []  # the others, longest first: attention ends evenly where the long ones start first
        self._num_by_key: dict[str, int] = {}  # running sequences
        self._num_computed = self._num_held = 0  # over the running ones: tokens, and references to blocks
        self.chunk_budget = limits.max_num_batched_tokens  # prefill tokens of a step that also decodes; set by the chunk policy
        self._rows = list(range(limits.max_num_seqs - 1, -1, -1))
        self._num_arrivals = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0

    def next_arrival(self) -> int:
        """A number that grows with every call: the order of arrival."""
        self._num_arrivals += 1
        return self._num_arrivals

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; the caller has checked that it fits and that the queue has room."""
        self.waiting.push(sequence)

    def schedule(self, now: float) -> StepPlan | None:
        """The next step, or None where nothing can run. Blocks and rows are taken; `num_computed` and `num_pending` count the step as launched."""
        plan = StepPlan()
        self._schedule_decodes(plan, now)
        budget = self.limits.max_num_batched_tokens - len(plan.decodes)
        if plan.decodes:
            budget = min(budget, self.chunk_budget)
        if self.limits.chunk_token_sizes:
            budget = _round_down(self.limits.chunk_token_sizes, budget)
        budget = self._schedule_running_chunks(plan, budget, now)
        if plan.num_preemptions == 0:
            self._admit(plan, budget, now)
        if not plan.decodes and not plan.chunks:
            return plan if plan.events else None
        self._mark_launched(plan, now)
        return plan

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it stands: its blocks and row are free for the next step."""
        if sequence.row is None:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self._release(sequence)

    def register_blocks(self, sequence: Sequence) -> None:
        """Offer its newly full blocks to the prefix cache: those whose ids are known and whose KV is launched."""
        if not self.limits.prefix_caching:
            return
        size = self.limits.block_size
        known = min(sequence.num_computed, len(sequence.token_ids))
        if known // size <= sequence.num_registered:
            return
        sequence.extend_hashes(size, known)
        for index in range(sequence.num_registered, known // size):
            self.pool.register(sequence.blocks[index], sequence.hashes[index])
        sequence.num_registered = known // size

    def count_tokens(self) -> tuple[int, int]:
        """Tokens whose KV lies in referenced blocks, a shared block counted once; and tokens still to be prefilled, waiting ones included."""
        backlog = self.waiting.num_tokens + sum(len(sequence.token_ids) - sequence.num_computed for sequence in self._prefilling)
        return self._num_computed - (self._num_held - self.pool.num_used) * self.limits.block_size, backlog

    def _schedule_decodes(self, plan: StepPlan, now: float) -> None:
        size = self.limits.block_size
        ending = False
        for sequence in [sequence for sequence in self._decoding if sequence.num_tokens > sequence.runs_until]:
            if sequence.num_tokens >= sequence.max_tokens:
                ending = True  # its last token is on its way
                continue
            if sequence.num_tokens > len(sequence.blocks) * size:
                while self.pool.num_free < 1 and sequence.row is not None:
                    self._preempt_newest(plan, now)
                if sequence.row is None:
                    continue
                self._grow(sequence, 1, plan)
            sequence.runs_until = min(len(sequence.blocks) * size, sequence.max_tokens - 1)
        plan.decodes = [sequence for sequence in self._decoding if sequence.num_tokens < sequence.max_tokens] if ending else self._decoding[:]
        if plan.num_preemptions:
            plan.new_blocks = [update for update in plan.new_blocks if self._is_current(update)]

    def _is_current(self, update: tuple[int, int, int]) -> bool:
        row, index, block = update
        return any(s.row == row and index < len(s.blocks) and s.blocks[index] == block for s in self.running)

    def _schedule_running_chunks(self, plan: StepPlan, budget: int, now: float) -> int:
        for sequence in self._prefilling:
            budget -= self._add_chunk(sequence, plan, budget)
        return budget

    def _admit(self, plan: StepPlan, budget: int, now: float) -> None:
        while budget > 0 and self._rows and len(plan.chunks) < self.limits.max_num_chunks:
            sequence = self.waiting.peek()
            if sequence is None or sequence.num_pending:  # a preempted one whose last sample is still on its way
                return
            if self.running and (sequence.alone or self.running[0].alone):
                return
            hits = self._lookup_prefix(sequence)
            needed = self._num_blocks(len(sequence.token_ids)) - len(hits)
            promised = sum(self._num_blocks(s.num_tokens) - len(s.blocks) for s in self._prefilling)
            headroom = len(self.running)  # each running sequence may soon need a block: admitting into the last ones only buys preemptions
            if needed + promised + min(headroom, self.pool.num_blocks // 16) > self.pool.num_free - self.pool.num_free_among(hits) and self.running:
                return
            if needed > self.pool.num_free - self.pool.num_free_among(hits):
                return
            self.waiting.remove(sequence)
            self._start(sequence, hits, plan, now)
            budget -= self._add_chunk(sequence, plan, budget)

    def _lookup_prefix(self, sequence: Sequence) -> list[int]:
        if not self.limits.prefix_caching:
            return []
        # At least the last token is computed: its hidden state gives the next one.
        sequence.extend_hashes(self.limits.block_size, len(sequence.token_ids) - 1)
        usable = (len(sequence.token_ids) - 1) // self.limits.block_size
        return self.pool.lookup(sequence.hashes[:usable])

    def _start(self, sequence: Sequence, hits: list[int], plan: StepPlan, now: float) -> None:
        self.pool.share(hits)
        sequence.row = self._rows.pop()
        sequence.blocks = list(hits)
        sequence.num_registered = len(hits)
        sequence.num_computed = len(hits) * self.limits.block_size
        sequence.num_cached = min(sequence.num_computed, sequence.num_prompt)
        sequence.is_prefilling = True
        sequence.in_step = True
        sequence.check_at = sequence.runs_until = 0
        self.running.append(sequence)
        self._prefilling.append(sequence)
        self._num_by_key[sequence.key_id] = self._num_by_key.get(sequence.key_id, 0) + 1
        self._num_computed += sequence.num_computed
        self._num_held += len(hits)
        plan.new_rows.append(sequence)
        plan.new_blocks.extend((sequence.row, index, block) for index, block in enumerate(hits))
        if self.limits.prefix_caching:
            self.prefix_query_tokens += len(sequence.token_ids)
            self.prefix_hit_tokens += sequence.num_computed
        kind = "resumed" if sequence.was_scheduled else "scheduled"
        sequence.was_scheduled = True
        plan.events.append(SequenceEvent(sequence.id, kind, now, sequence.num_cached))

    def _add_chunk(self, sequence: Sequence, plan: StepPlan, budget: int) -> int:
        """Give a prefilling sequence its share of the budget; returns the tokens taken."""
        remaining = len(sequence.token_ids) - sequence.num_computed
        # Decodes may have taken blocks promised to it; they give them back at their end at the latest, so it takes what is there and waits.
        room = (len(sequence.blocks) + self.pool.num_free) * self.limits.block_size - sequence.num_computed
        length = min(remaining, budget, room)
        if length <= 0 or len(plan.chunks) >= self.limits.max_num_chunks:
            return 0
        self._grow(sequence, self._num_blocks(sequence.num_computed + length) - len(sequence.blocks), plan)
        plan.chunks.append(Chunk(sequence, sequence.num_computed, length, length == remaining))
        self.waiting.charge(sequence.key_id, length)
        return length

    def _grow(self, sequence: Sequence, count: int, plan: StepPlan) -> None:
        if count <= 0:
            return
        assert sequence.row is not None
        start = len(sequence.blocks)
        sequence.blocks.extend(self.pool.allocate(count))
        self._num_held += count
        plan.new_blocks.extend((sequence.row, index, sequence.blocks[index]) for index in range(start, start + count))

    def _preempt_newest(self, plan: StepPlan, now: float) -> None:
        victim = self.running.pop()
        self._release(victim)
        victim.num_preemptions += 1
        victim.num_computed = 0
        victim.num_registered = 0
        victim.is_prefilling = False
        victim.in_step = False
        self.waiting.push_back(victim)
        plan.num_preemptions += 1
        plan.events.append(SequenceEvent(victim.id, "preempted", now, victim.num_preemptions))

    def _release(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        self.register_blocks(sequence)
        self.pool.free(sequence.blocks)
        (self._prefilling if sequence.is_prefilling else self._decoding).remove(sequence)
        self._num_computed -= sequence.num_computed
        self._num_held -= len(sequence.blocks)
        self._num_by_key[sequence.key_id] -= 1
        if not self._num_by_key[sequence.key_id]:
            del self._num_by_key[sequence.key_id]
        self._rows.append(sequence.row)
        sequence.blocks = []
        sequence.row = None

    def _mark_launched(self, plan: StepPlan, now: float) -> None:
        self._count_decodes(plan)
        in_chunks = set()
        for chunk in plan.chunks:
            sequence = chunk.sequence
            in_chunks.add(sequence.id)
            sequence.num_computed = chunk.start + chunk.length
            self._num_computed += chunk.length
            if chunk.final:
                sequence.is_prefilling = False
                sequence.num_tokens += 1
                self._prefilling.remove(sequence)
                bisect.insort(self._decoding, sequence, key=_shortness)
            if not sequence.in_step:
                sequence.in_step = True
                plan.events.append(SequenceEvent(sequence.id, "prefill", now))
        for sequence in self._prefilling:
            if sequence.in_step and sequence.id not in in_chunks:
                sequence.in_step = False
                plan.events.append(SequenceEvent(sequence.id, "prefill_wait", now))

    def _count_decodes(self, plan: StepPlan) -> None:
        num_context = 0
        for sequence in plan.decodes:
            num_tokens = sequence.num_tokens
            num_context += num_tokens
            sequence.num_computed = num_tokens
            sequence.num_tokens = num_tokens + 1
        plan.num_context_tokens = num_context
        self._num_computed += len(plan.decodes)
        if len(self._num_by_key) > 1:
            for sequence in plan.decodes:
                self.waiting.charge(sequence.key_id, 1)
        elif plan.decodes:
            self.waiting.charge(plan.decodes[0].key_id, len(plan.decodes))

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.block_size)


def _shortness(sequence: Sequence) -> int:
    return -sequence.num_tokens


def _round_down(sizes: tuple[int, ...], value: int) -> int:
    """The largest of `sizes` that is at most `value`; `value` itself where all are larger."""
    index = bisect.bisect_right(sizes, value)
    return sizes[index - 1] if index else value
