"""One sequence as the engine holds it: its tokens, its blocks and how far it has come."""

from __future__ import annotations

import hashlib
from array import array

from appliance.engine.wire import Sampling, Submit


class Sequence:
    """Mutable; owned by the scheduler.

    Tokens and their ownership (len(token_ids) = 9, one sampled token on its way from the device):

        token_ids    p p p p p | o o o o        ids known to the host: prompt, then outputs
        num_computed ^^^^^^^^^^^^^^^^^ 9        positions whose KV is written by steps launched so far
        num_pending                      ? 1    sampled by launched steps, id not yet read
    """

    __slots__ = (
        "alone",
        "arrival",
        "blocks",
        "cache_salt",
        "deadline_at",
        "finish_at",
        "hashes",
        "id",
        "in_step",
        "is_prefilling",
        "key_id",
        "num_cached",
        "num_computed",
        "num_pending",
        "num_preemptions",
        "num_prompt",
        "num_registered",
        "priority",
        "queued_at",
        "row",
        "sampling",
        "token_ids",
        "was_scheduled",
    )

    def __init__(self, submit: Submit, arrival: int) -> None:
        self.id = submit.sequence_id
        self.sampling: Sampling = submit.sampling
        self.token_ids = array("i")
        self.token_ids.frombytes(submit.prompt_ids)
        self.num_prompt = len(self.token_ids)
        self.token_ids.frombytes(submit.output_ids)
        self.deadline_at = submit.deadline_at
        self.queued_at = submit.queued_at
        self.priority = submit.priority
        self.key_id = submit.key_id
        self.cache_salt = submit.cache_salt
        self.alone = submit.alone
        self.arrival = arrival  # order of arrival: ties in the queue, and who is newest
        self.row: int | None = None  # row slot on the device while running
        self.blocks: list[int] = []
        self.hashes: list[bytes] = []  # of its full blocks, chained
        self.num_registered = 0  # blocks that were offered to the prefix cache
        self.num_computed = 0
        self.num_pending = 0
        self.num_cached = 0  # prompt tokens found in the prefix cache at the newest admission
        self.num_preemptions = 0
        self.is_prefilling = False
        self.in_step = False
        self.was_scheduled = False
        self.finish_at: int | None = None  # the server found a stop string after so many outputs

    @property
    def num_outputs(self) -> int:
        """Outputs whose ids the host knows."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_tokens(self) -> int:
        """Tokens that exist, those still on the device included."""
        return len(self.token_ids) + self.num_pending

    def is_last_sample_launched(self, context_length: int) -> bool:
        """True once the step that samples its last possible token is launched: it needs no further one."""
        return self.num_outputs + self.num_pending >= self.sampling.max_tokens or self.num_tokens >= context_length

    def extend_hashes(self, block_size: int, limit: int) -> None:
        """Hash its full blocks of known ids up to token `limit`. SHA-256 of the parent's hash and the ids; the salt goes into the first."""
        end = min(limit, len(self.token_ids)) // block_size
        while len(self.hashes) < end:
            index = len(self.hashes)
            parent = self.hashes[-1] if index else b"appliance-kv-1\0" + self.cache_salt.encode("utf-8", "surrogatepass")
            ids = self.token_ids[index * block_size : (index + 1) * block_size]
            self.hashes.append(hashlib.sha256(parent + ids.tobytes()).digest())
