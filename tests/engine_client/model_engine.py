"""An engine in this process: the fake's behaviour without I/O, under a test's control. It is also the `Link` that a SequenceTable writes to."""

from __future__ import annotations

from fake_engine import Row, expected_tokens, token_at

from appliance.engine.replay import SequenceTable
from appliance.engine.wire import Abort, Events, Finish, Ready, Rejected, SequenceEvent, StepOutput, Submit, TokenLogprobs, pack_ids, unpack_ids
from appliance.events import StepStats

STATS = StepStats(**{**dict.fromkeys(StepStats.__struct_fields__, 0), "chunks": (), "block_ends": None, "graph_hit": False})  # type: ignore[arg-type]


def ready(max_num_seqs: int = 4, context_length: int = 4096) -> Ready:
    """Facts of a model engine."""
    counts = dict.fromkeys(
        ("vocab_size", "max_num_batched_tokens", "block_size", "num_blocks", "num_parameters", "weight_bytes", "kv_bytes_per_token"), 1
    )
    texts = dict.fromkeys(("device", "dtype", "quantization"), "x")
    return Ready(**counts, **texts, max_num_seqs=max_num_seqs, context_length=context_length, load_seconds=0.0, reasons=())  # type: ignore[arg-type]


class ModelEngine:
    """One life of an engine. `step` makes one token per running sequence; `alone_log` keeps who was submitted to run alone."""

    def __init__(
        self, table: SequenceTable, *, max_num_seqs: int = 4, max_waiting: int = 8, announce: bool = True, context_length: int = 4096
    ) -> None:
        self.table = table
        self.writable = True
        self.facts = ready(max_num_seqs, context_length)
        self.max_waiting = max_waiting
        self.announce = announce
        self.waiting: list[Row] = []
        self.running: list[Row] = []
        self.finished: list[tuple[int, str, str]] = []
        self.rejected: list[Rejected] = []
        self.alone_log: list[int] = []
        self.submits: list[Submit] = []

    def send(self, message: Submit | Abort | Finish) -> None:
        """Take one frame from the table."""
        if isinstance(message, Submit):
            self._submit(message)
            return
        for rows in (self.waiting, self.running):
            for row in [row for row in rows if row.submit.sequence_id == message.sequence_id]:
                rows.remove(row)
                self.finished.append((message.sequence_id, "abort" if isinstance(message, Abort) else "finish", ""))

    def _submit(self, message: Submit) -> None:
        prompt_ids, outputs = unpack_ids(message.prompt_ids), unpack_ids(message.output_ids)
        assert outputs == expected_tokens(prompt_ids, message.sampling.seed, len(outputs)), "resumed with tokens it never sampled"
        assert len(outputs) < message.sampling.max_tokens, "resumed past its end"
        assert all(row.submit.sequence_id != message.sequence_id for row in self.waiting + self.running), "submitted twice"
        if message.alone:
            assert not self.waiting, "alone, but others are with it"
            assert not self.running, "alone, but others are with it"
            self.alone_log.append(prompt_ids[0])
        else:
            assert not any(row.submit.alone for row in self.waiting + self.running), "sent beside one that must be alone"
        self.submits.append(message)
        if len(self.waiting) >= self.max_waiting:
            self.rejected.append(Rejected(message.sequence_id, "queue_full", "full"))
        else:
            self.waiting.append(Row(message, prompt_ids, len(outputs)))

    def reject(self, now: float) -> None:
        """Deliver the rejections so far."""
        rejected, self.rejected = self.rejected, []
        for message in rejected:
            self.table.on_rejected(message, now)

    def schedule(self) -> list[SequenceEvent]:
        """Admit from the queue. Announces it, if this engine does."""
        events = []
        while self.waiting and len(self.running) < self.facts.max_num_seqs:
            row = self.waiting.pop(0)
            self.running.append(row)
            events.append(SequenceEvent(row.submit.sequence_id, "scheduled", 0.0, 3))
        if self.announce:
            self.table.on_events(Events(tuple(events)).events, ahead=True)
            return []
        return events

    def step(self, now: float, *, lose_output: bool = False) -> list[tuple[float, int]]:
        """Schedule, sample, deliver. With `lose_output` the engine is about to die with what it has sampled."""
        events = self.schedule()
        if lose_output:
            return []
        ids, tokens, logprobs = [], [], {}
        finished, self.finished = self.finished, []
        for row in list(self.running):
            sampling = row.submit.sampling
            token = token_at(row.prompt_ids, sampling.seed, row.num_outputs)
            ids.append(row.submit.sequence_id)
            tokens.append(token)
            row.num_outputs += 1
            if sampling.num_logprobs is not None:
                logprobs[row.submit.sequence_id] = TokenLogprobs(-float(row.num_outputs), 1, (token,), (-1.0,))
            if row.num_outputs >= sampling.max_tokens or len(row.prompt_ids) + row.num_outputs >= self.facts.context_length:
                self.running.remove(row)
                finished.append((row.submit.sequence_id, "length", ""))
        output = StepOutput(
            stats=STATS,
            sequence_ids=pack_ids(ids),
            token_ids=pack_ids(tokens),
            finished=tuple(finished),
            events=tuple(events),
            logprobs=logprobs or None,
        )
        gaps = self.table.on_step(output, now)
        self.reject(now)
        return gaps
