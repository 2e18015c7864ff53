"""Drives a decoder alone: hands out blocks in scattered order, builds each step's batch and reads its logits. No scheduler, no engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from appliance.kernels import ops as k
from appliance.model.decoder import Decoder


@dataclass
class Context:
    """One sequence: its row slot and its ids, of which the first `num_stored` are in the cache."""

    row: int
    ids: list[int]
    num_stored: int = 0
    num_blocks: int = 0
    top_two_gaps: list[float] = field(default_factory=list)


class PagedLoop:
    """One decoder with its caches and row state. A step is `step(decodes, chunks)`; greedy loops are `greedy` and `greedy_batch`."""

    def __init__(
        self, decoder: Decoder, ops: k.Ops, *, block_size: int = 8, num_blocks: int = 256, num_rows: int = 32, device: str = "cpu", seed: int = 0
    ) -> None:
        self.decoder, self.ops, self.block_size, self.device = decoder, ops, block_size, torch.device(device)
        shape = decoder.kv_shape(num_blocks, block_size)
        # Not zeros: a kernel that reads a slot it should not gets a NaN.
        self.kv_caches = [
            tuple(torch.full(shape, torch.nan, dtype=decoder.dtype, device=self.device) for _ in range(2)) for _ in range(decoder.config.num_layers)
        ]
        self.state = k.RowState(
            params=torch.zeros(num_rows + 1, k.NUM_PARAMS, dtype=torch.int32, device=self.device),
            block_tables=torch.zeros(num_rows + 1, num_blocks, dtype=torch.int32, device=self.device),
        )
        self._free_blocks = list(range(num_blocks))
        random.Random(seed).shuffle(self._free_blocks)
        self._next_row = 0
        self.dummy_row = num_rows

    def add(self, ids: Sequence[int], **params: int) -> Context:
        """A new sequence of `ids`; params are columns of its row by name, e.g. SEED_LOW=3."""
        context = Context(self._next_row, list(ids))
        self._next_row += 1
        row = torch.zeros(1, k.NUM_PARAMS, dtype=torch.int32)
        for name, value in params.items():
            row[0, getattr(k, name)] = value
        self._update(torch.tensor([context.row], dtype=torch.int32), row, [])
        return context

    def step(self, decodes: Sequence[Context], chunks: Sequence[tuple[Context, int]] = (), *, pad: int = 0) -> Tensor:
        """Run one step: a token of each of `decodes`, so many of each of `chunks`, and `pad` padding entries of each kind. Greedy.

        Ids drawn by decodes and by final chunks are appended to their contexts. Returns the logits of the real entries, decodes first.
        """
        entries = [*decodes, *(context for context, _ in chunks)]
        lengths = [*(1 for _ in decodes), *(length for _, length in chunks)]
        for context, length in zip(entries, lengths, strict=True):
            self._reserve(context, context.num_stored + length)
        step, batch = self._batch(decodes, chunks, pad)
        self.ops.prepare_inputs(self.state, step, batch, self.block_size)
        logits = self.decoder.logits(self.decoder.forward(batch, self.kv_caches))
        sampling = k.SamplingBatch(rows=batch.rows, state=self.state, all_greedy=True)
        drawn = self.ops.sample(logits, sampling).token_ids
        self.ops.commit_sampled(self.state, step, batch, drawn)
        real = [*range(len(decodes)), *range(len(decodes) + pad, len(decodes) + pad + len(chunks))]
        for index, context, length in zip(real, entries, lengths, strict=True):
            context.num_stored += length
            if step.samples[index]:
                context.ids.append(int(drawn[index]))
                top = logits[index].float().topk(2).values
                context.top_two_gaps.append(float(top[0] - top[1]))
        return logits[real]

    def greedy(self, prompt: Sequence[int], num_tokens: int, *, chunk: int | None = None) -> Context:
        """One sequence alone, its prompt in chunks of at most `chunk` tokens."""
        context = self.add(prompt)
        while context.num_stored < len(prompt):
            self.step([], [(context, min(chunk or len(prompt), len(prompt) - context.num_stored))])
        for _ in range(num_tokens - 1):
            self.step([context])
        return context

    def greedy_batch(self, prompts: Sequence[Sequence[int]], num_tokens: int, *, chunk: int = 7, pad: int = 1) -> list[Context]:
        """All together, as an engine would: decodes of those that have begun, one chunk each of two that have not, and padding."""
        contexts = [self.add(prompt) for prompt in prompts]
        while unfinished := [c for c, prompt in zip(contexts, prompts, strict=True) if len(c.ids) < len(prompt) + num_tokens]:
            decodes = [c for c in unfinished if c.num_stored == len(c.ids) - 1 and c.top_two_gaps]
            waiting = [c for c in unfinished if not c.top_two_gaps][:2]
            self.step(decodes, [(c, min(chunk, len(c.ids) - c.num_stored)) for c in waiting], pad=pad)
        return contexts

    def _reserve(self, context: Context, num_tokens: int) -> None:
        triples = []
        while context.num_blocks * self.block_size < num_tokens:
            triples.append((context.row, context.num_blocks, self._free_blocks.pop()))
            context.num_blocks += 1
        self._update(torch.zeros(0, dtype=torch.int32), torch.zeros(0, k.NUM_PARAMS, dtype=torch.int32), triples)

    def _update(self, rows: Tensor, params: Tensor, triples: list[tuple[int, int, int]]) -> None:
        blocks = torch.tensor(triples, dtype=torch.int32).reshape(-1, 3)
        self.ops.apply_updates(self.state, rows.to(self.device), params.to(self.device), blocks.to(self.device))

    def _batch(self, decodes: Sequence[Context], chunks: Sequence[tuple[Context, int]], pad: int) -> tuple[k.StepInput, k.AttentionBatch]:
        def ints(values: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        num_decodes, padding = len(decodes) + pad, [self.dummy_row] * pad
        final = [context.num_stored + length == len(context.ids) for context, length in chunks]
        ids = [token for context, length in chunks for token in context.ids[context.num_stored : context.num_stored + length]]
        step = k.StepInput(
            rows=ints([c.row for c in decodes] + padding + [c.row for c, _ in chunks] + padding),
            samples=ints([1] * len(decodes) + [0] * pad + final + [0] * pad),
            chunk_starts=ints([c.num_stored for c, _ in chunks] + [0] * pad),
            chunk_lens=ints([length for _, length in chunks] + [0] * pad),
            chunk_ids=ints(ids + [0] * pad),
            num_decodes=num_decodes,
        )
        num_entries, num_tokens = len(step.rows), num_decodes + len(step.chunk_ids)
        batch = k.AttentionBatch(
            input_ids=ints([0] * num_tokens),
            positions=ints([0] * num_tokens),
            slot_mapping=ints([0] * num_tokens, torch.int64),
            query_start=ints([0] * (num_entries + 1)),
            context_lens=ints([0] * num_entries),
            rows=step.rows,
            block_tables=self.state.block_tables,
            logit_index=ints([0] * num_entries, torch.int64),
            num_decodes=num_decodes,
            max_query_len=max([length for _, length in chunks], default=1),
            max_context_len=max([c.num_stored + 1 for c in decodes] + [c.num_stored + length for c, length in chunks], default=1),
        )
        return step, batch
