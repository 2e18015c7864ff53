"""One sequence as the engine holds it: its tokens, its blocks and how far it has come."""

from __future__ import annotations

import hashlib
from array import array

from appliance.engine.wire import Sampling, Submit

NOT_GREEDY, TOP_K, TOP_P, MIN_P, PENALTIES, LOGPROBS, BIAS = (1 << bit for bit in range(7))


def sampling_flags(sampling: Sampling) -> int:
    """What a sequence asks of the sampler beyond the highest logit, as bits: a step's needs are the OR of its sequences'."""
    asked = (
        (sampling.temperature != 0.0, NOT_GREEDY),
        (sampling.top_k > 0, TOP_K),
        (sampling.top_p < 1.0, TOP_P),
        (sampling.min_p > 0.0, MIN_P),
        (sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0, PENALTIES),
        (sampling.num_logprobs is not None, LOGPROBS),
        (bool(sampling.logit_bias) or sampling.min_tokens > 0, BIAS),
    )
    return sum(flag for wanted, flag in asked if wanted)


class Sequence:
    """Mutable; owned by the scheduler.

    Tokens and their ownership (len(token_ids) = 9, one sampled token on its way from the device):

        token_ids    p p p p p | o o o o        ids known to the host: prompt, then outputs
        num_computed ^^^^^^^^^^^^^^^^^ 9        positions whose KV is written by steps launched so far
        num_tokens   ^^^^^^^^^^^^^^^^^ ? 10     tokens that exist, those sampled by launched steps included
    """

    __slots__ = (
        "alone",
        "arrival",
        "blocks",
        "cache_salt",
        "check_at",
        "deadline_at",
        "ended",
        "finish_at",
        "hashes",
        "id",
        "in_step",
        "is_prefilling",
        "key_id",
        "max_tokens",
        "num_cached",
        "num_computed",
        "num_preemptions",
        "num_prompt",
        "num_registered",
        "num_tokens",
        "priority",
        "queued_at",
        "row",
        "runs_until",
        "sampling",
        "sampling_flags",
        "token_ids",
        "was_scheduled",
    )

    def __init__(self, submit: Submit, arrival: int, context_length: int) -> None:
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
        self.num_tokens = len(self.token_ids)
        self.max_tokens = min(self.num_prompt + self.sampling.max_tokens, context_length)  # it ends when num_tokens reaches this
        self.sampling_flags = sampling_flags(self.sampling)
        self.num_cached = 0  # prompt tokens found in the prefix cache at the newest admission
        self.num_preemptions = 0
        self.is_prefilling = False
        self.in_step = False
        self.was_scheduled = False
        self.ended = False
        self.runs_until = 0  # up to so many tokens it decodes without another block, and without an end
        self.check_at = 0  # at so many known tokens there is more to do than to append one
        self.finish_at: int | None = None  # the server found a stop string after so many outputs

    @property
    def num_outputs(self) -> int:
        """Outputs whose ids the host knows."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens that launched steps sample and whose ids are not read yet."""
        return self.num_tokens - len(self.token_ids)

    def extend_hashes(self, block_size: int, limit: int) -> None:
        """Hash its full blocks of known ids up to token `limit`. SHA-256 of the parent's hash and the ids; the salt goes into the first."""
        end = min(limit, len(self.token_ids)) // block_size
        while len(self.hashes) < end:
            index = len(self.hashes)
            parent = self.hashes[-1] if index else b"appliance-kv-1\0" + self.cache_salt.encode("utf-8", "surrogatepass")
            ids = self.token_ids[index * block_size : (index + 1) * block_size]
            self.hashes.append(hashlib.sha256(parent + ids.tobytes()).digest())
