"""Which requests are sent, with what in them, and when. All of it follows from the seed."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence

from appliance.bench.records import Job, RequestPlan

# Words that are one token each, with a space before them, in the usual English vocabularies: n of them make a prompt of about n tokens.
_WORDS = (
    "the of and to in is that for it as with was on are by this be at from or an have not they which one you were all their we can there been has"
    + " when who will more no if out so up said what its about than into them could time some these two may then other new only see over such way"
    + " even most after also made before must through years where much your well down should because each just those people how too good state"
    + " make world still own long work life between both under last never while home might right day another same water house place found school"
).split(" ")


class Lengths:
    """Token counts drawn uniformly from [low, high]."""

    def __init__(self, low: int, high: int) -> None:
        if not 1 <= low <= high:
            raise ValueError(f"lengths need 1 <= low <= high, not {low} and {high}")
        self.low, self.high = low, high

    @classmethod
    def parse(cls, text: str, range_ratio: float = 0.0) -> Lengths:
        """`128` (with a ratio r: 128 (1 - r) to 128 (1 + r), as vLLM's client draws them) or `100:1024`."""
        low, colon, high = text.partition(":")
        if colon:
            return cls(int(low), int(high))
        return cls(max(1, math.floor(int(text) * (1 - range_ratio))), math.ceil(int(text) * (1 + range_ratio)))

    def draw(self, rng: random.Random) -> int:
        """One length."""
        return rng.randint(self.low, self.high)


def plan_requests(
    num_requests: int, inputs: Lengths, outputs: Lengths, seed: int, request_rate: float | None = None, first_index: int = 0
) -> list[RequestPlan]:
    """`num_requests` plans. With a rate they arrive as a Poisson process, the first at once; else each is sent when a slot is free.

    Prompts follow from seed and index: levels of one run start at different ones, so that none finds another's prompts in a prefix cache.
    """
    rng = random.Random(f"lengths-{seed}")
    arrivals = random.Random(f"arrivals-{seed}")
    offset = 0.0
    plans = []
    for index in range(first_index, first_index + num_requests):
        plans.append(RequestPlan(index, inputs.draw(rng), outputs.draw(rng), None if request_rate is None else offset))
        if request_rate is not None:
            offset += arrivals.expovariate(request_rate)
    return plans


def share_out(plans: Sequence[RequestPlan], num_processes: int) -> list[list[RequestPlan]]:
    """The plans of each process, dealt in turn."""
    return [list(plans[i::num_processes]) for i in range(num_processes)]


def shared_body(model: str, chat: bool, temperature: float, ignore_eos: bool, extra: dict[str, object]) -> bytes:
    """The JSON that all requests have in common, open at its end: `request_body` adds the rest."""
    body: dict[str, object] = {"model": model, "temperature": temperature, "stream": True, "stream_options": {"include_usage": True}}
    if ignore_eos:
        body["ignore_eos"] = True
    return json.dumps(body | extra).encode()[:-1]


def request_body(job: Job, plan: RequestPlan) -> bytes:
    """The whole JSON body of one request. The first `prefix_tokens` of the prompt are the same in every request of the seed."""
    own = random.Random(f"prompt-{job.seed}-{plan.index}")
    common = random.Random(f"prefix-{job.seed}")
    num_common = min(job.prefix_tokens, plan.num_input_tokens)
    counts = ((common, num_common), (own, plan.num_input_tokens - num_common))
    if job.text_prompts:
        prompt = json.dumps(" ".join(rng.choice(_WORDS) for rng, count in counts for _ in range(count)))
    else:
        span = job.max_token_id - job.min_token_id + 1
        prompt = json.dumps([job.min_token_id + int(rng.random() * span) for rng, count in counts for _ in range(count)])
    field = f'"messages": [{{"role": "user", "content": {prompt}}}]' if job.chat else f'"prompt": {prompt}'
    return job.body + f', {field}, "max_tokens": {plan.num_output_tokens}}}'.encode()
