"""A step's input, from plan to device: row slots and block tables as diffs, one pinned upload a step, none where nothing changed."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import torch

from appliance.engine.scheduler import StepPlan
from appliance.engine.sequence import Sequence
from appliance.kernels import ops as k

_RING = 4  # host buffers in flight: one being filled, up to two steps launched, one spare
_STAGED_BLOCKS = 240  # new blocks of a step that its graph itself writes into the tables: more than a chunk of 2,048 tokens and 100 decodes take


def row_params(sequence: Sequence) -> list[int]:
    """The NUM_PARAMS int32 words of a sequence's device row. LAST_ID and NUM_TOKENS are set by its final chunk."""
    sampling = sequence.sampling
    seed = sampling.seed & 0xFFFF_FFFF_FFFF_FFFF
    words = [0] * k.NUM_PARAMS
    words[k.OUTPUT_INDEX] = sequence.num_outputs
    words[k.SEED_LOW] = _signed(seed & 0xFFFF_FFFF)
    words[k.SEED_HIGH] = _signed(seed >> 32)
    words[k.TOP_K] = sampling.top_k
    for column, value in (
        (k.TEMPERATURE, sampling.temperature),
        (k.TOP_P, sampling.top_p),
        (k.MIN_P, sampling.min_p),
        (k.REPETITION_PENALTY, sampling.repetition_penalty),
        (k.PRESENCE_PENALTY, sampling.presence_penalty),
        (k.FREQUENCY_PENALTY, sampling.frequency_penalty),
    ):
        words[column] = struct.unpack("<i", struct.pack("<f", value))[0]
    return words


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


@dataclass(frozen=True, slots=True)
class Bucket:
    """The shape a step runs in. An eager step's bucket is its own shape; a graph's is rounded up."""

    num_decodes: int
    num_chunks: int
    num_chunk_tokens: int

    @property
    def num_entries(self) -> int:
        return self.num_decodes + self.num_chunks

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + self.num_chunk_tokens


class DeviceBatch:
    """Persistent device buffers of the step loop. Row slot `num_rows - 1` is the dummy that padding names.

    One int32 upload a step: [rows | samples | chunk_starts | chunk_lens | chunk_ids], skipped where it equals the one before.
    """

    def __init__(self, *, max_num_seqs: int, max_num_chunks: int, max_num_tokens: int, max_blocks: int, device: torch.device) -> None:
        self.device = device
        self.max_entries = max_num_seqs + max_num_chunks
        self.max_num_chunks = max_num_chunks
        self.dummy_row = max_num_seqs
        self.state = k.RowState(
            params=torch.zeros(max_num_seqs + 1, k.NUM_PARAMS, dtype=torch.int32, device=device),
            block_tables=torch.zeros(max_num_seqs + 1, max_blocks, dtype=torch.int32, device=device),
        )
        self._staged = (max_num_chunks, max_num_chunks * k.NUM_PARAMS, 3 * _STAGED_BLOCKS)
        self._no_updates = np.zeros(sum(self._staged), dtype=np.int32)
        self._no_updates[:max_num_chunks] = self.dummy_row
        self._no_updates[sum(self._staged[:2]) :: 3] = self.dummy_row
        self.turn = torch.zeros(1, dtype=torch.int32, device=device)  # steps that the device has done, modulo 2^32
        self.host_turn = 0  # the same as far as launched
        self.updates_ring = _pinned(_RING * sum(self._staged), device).view(_RING, -1)
        self.updates_ring.copy_(torch.from_numpy(self._no_updates))
        self._slot_holds = [False] * _RING
        self.ids_ring = _pinned(_RING * self.max_entries, device).view(_RING, -1)
        self._header = 2 * self.max_entries + 2 * max_num_chunks
        size = self._header + max_num_tokens
        self._device_step = torch.zeros(size, dtype=torch.int32, device=device)
        self._host_step = [_pinned(size, device) for _ in range(_RING)]
        self._turn = 0
        self._uploaded: tuple[Bucket, tuple[int, ...]] | None = None
        entries, tokens = self.max_entries, max_num_tokens
        self._batch_buffers = {
            "input_ids": torch.zeros(tokens, dtype=torch.int32, device=device),
            "positions": torch.zeros(tokens, dtype=torch.int32, device=device),
            "slot_mapping": torch.full((tokens,), -1, dtype=torch.int64, device=device),
            "query_start": torch.zeros(entries + 1, dtype=torch.int32, device=device),
            "context_lens": torch.zeros(entries, dtype=torch.int32, device=device),
            "logit_index": torch.zeros(entries, dtype=torch.int64, device=device),
        }
        self.max_context_len = 0  # bound for grids; set by the runner

    def step_input(self, bucket: Bucket) -> k.StepInput:
        """Views of the uploaded step in the shape of `bucket`; the same addresses for the same bucket."""
        entries, chunks = self.max_entries, self.max_num_chunks
        whole = self._device_step
        chunk_base = 2 * entries
        return k.StepInput(
            rows=whole[: bucket.num_entries],
            samples=whole[entries : entries + bucket.num_entries],
            chunk_starts=whole[chunk_base : chunk_base + bucket.num_chunks],
            chunk_lens=whole[chunk_base + chunks : chunk_base + chunks + bucket.num_chunks],
            chunk_ids=whole[self._header : self._header + bucket.num_chunk_tokens],
            num_decodes=bucket.num_decodes,
        )

    def attention_batch(self, bucket: Bucket, max_query_len: int, max_context_len: int) -> k.AttentionBatch:
        """Views of the buffers that `prepare_inputs` fills, in the shape of `bucket`."""
        entries, tokens, buffers = bucket.num_entries, bucket.num_tokens, self._batch_buffers
        return k.AttentionBatch(
            input_ids=buffers["input_ids"][:tokens],
            positions=buffers["positions"][:tokens],
            slot_mapping=buffers["slot_mapping"][:tokens],
            query_start=buffers["query_start"][: entries + 1],
            context_lens=buffers["context_lens"][:entries],
            logit_index=buffers["logit_index"][:entries],
            rows=self._device_step[:entries],
            block_tables=self.state.block_tables,
            num_decodes=bucket.num_decodes,
            max_query_len=max_query_len,
            max_context_len=max_context_len,
        )

    @property
    def num_staged(self) -> tuple[int, int]:
        """Rows and blocks that a slot of `updates_ring` has room for."""
        return self._staged[0], _STAGED_BLOCKS

    def take_turn(self) -> torch.Tensor:
        """Count a step that was launched; the pinned ids `[max_entries]` that it will leave, valid until `_RING` further steps."""
        slot = self.host_turn % _RING
        self.host_turn += 1
        return self.ids_ring[slot]

    def stage_updates(self, plan: StepPlan) -> bool:
        """Write the plan's new rows and blocks into the slot of the next step. False where there are too many: then nothing is staged."""
        rows, blocks = plan.new_rows, plan.new_blocks
        fits = len(rows) <= self._staged[0] and len(blocks) <= _STAGED_BLOCKS
        slot = self.host_turn % _RING
        staged = fits and bool(rows or blocks)
        if staged or self._slot_holds[slot]:  # what it held four steps ago must not be applied again
            view = self.updates_ring[slot].numpy()
            view[:] = self._no_updates
            if staged:
                self._write_updates(view, self._staged, rows, blocks)
            self._slot_holds[slot] = staged
        return fits

    @staticmethod
    def _write_updates(view: np.ndarray, split: tuple[int, int, int], rows: list[Sequence], blocks: list[tuple[int, int, int]]) -> None:
        for index, sequence in enumerate(rows):
            start = split[0] + index * k.NUM_PARAMS
            view[index] = sequence.row
            view[start : start + k.NUM_PARAMS] = row_params(sequence)
        if blocks:
            start = split[0] + split[1]
            view[start : start + 3 * len(blocks)] = np.asarray(blocks, dtype=np.int32).reshape(-1)

    def upload_updates(self, plan: StepPlan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """The plan's new rows and blocks on the device, as `apply_updates` takes them; None where there are none."""
        rows, blocks = plan.new_rows, plan.new_blocks
        if not rows and not blocks:
            return None
        split = len(rows), len(rows) * k.NUM_PARAMS, 3 * len(blocks)
        host = _pinned(sum(split), self.device)
        self._write_updates(host.numpy(), split, rows, blocks)
        device = host.to(self.device, non_blocking=True)
        row_ids, params, triples = device.split(split)
        return row_ids, params.view(-1, k.NUM_PARAMS), triples.view(-1, 3)

    def upload_step(self, plan: StepPlan, bucket: Bucket) -> None:
        """Write the plan into the device's step buffer, padded to `bucket`."""
        rows = [sequence.row for sequence in plan.decodes]
        signature = (bucket, tuple(rows)) if not plan.chunks else None
        if signature is not None and signature == self._uploaded:
            return
        self._uploaded = signature  # type: ignore[assignment]  # rows of running sequences are never None
        host = self._host_step[self._turn]
        self._turn = (self._turn + 1) % _RING
        view = host.numpy()
        entries, chunks = self.max_entries, self.max_num_chunks
        num = len(rows)
        view[: bucket.num_entries] = self.dummy_row
        view[:num] = rows
        view[entries : entries + bucket.num_entries] = 0
        view[entries : entries + num] = 1
        starts, lens, cursor = 2 * entries, 2 * entries + chunks, self._header
        view[lens : lens + bucket.num_chunks] = 0
        view[starts : starts + bucket.num_chunks] = 0
        for index, chunk in enumerate(plan.chunks):
            entry = bucket.num_decodes + index
            view[entry] = chunk.sequence.row
            view[entries + entry] = chunk.final
            view[starts + index] = chunk.start
            view[lens + index] = chunk.length
            view[cursor : cursor + chunk.length] = np.frombuffer(chunk.sequence.token_ids, dtype=np.int32)[chunk.start : chunk.start + chunk.length]
            cursor += chunk.length
        self._device_step[:cursor].copy_(host[:cursor], non_blocking=True)


def _pinned(size: int, device: torch.device) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int32, pin_memory=device.type == "cuda")
