"""Sampling in plain torch: the definition that every other implementation is tested against.

For each row, with l the row's logits in float32:

1. Penalties (where on). Seen ids are those of the prompt and of the outputs. A seen id's logit becomes l / r where l > 0, else l * r, with r the
   repetition penalty (arXiv 1909.05858); then frequency_penalty * (times it was output) and presence_penalty * (was it output at all) are subtracted.
2. Logit bias is added. Log-probabilities and ranks are those of this l.
3. Temperature 0: the id of the largest l, the lowest such id on a tie. Nothing of what follows applies.
4. s = l / temperature. Ids are ordered by falling s, equal ones by rising id. Each filter keeps a prefix of that order, and never less than one id:
   top-k the first k; top-p the shortest prefix that holds a mass >= p of what top-k left; min-p the ids with exp(s - max s) >= min_p.
5. The id with the largest s + noise among those kept, the lowest such id on a tie (the Gumbel-max trick: a draw from softmax(s) over the kept
   ids). The noise is `philox.gumbel_noise` at the id itself, so a row's draw depends on its logits, parameters, seed and output index alone.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from appliance.kernels import ops as k
from appliance.kernels.philox import gumbel_noise

_NUM_CANDIDATES: Final = 1024  # filters seldom keep more; sorting a whole row of 49,152 costs several times as much as selecting 1,024


def sample(logits: Tensor, batch: k.SamplingBatch) -> k.Sampled:
    """Draw one id for each row of `logits` [B, vocab] (float32, bf16 or fp16; not changed) as the module says.

    Reads the device once (which rows are random, and whether the filters' candidates sufficed), so it is no part of a CUDA graph.
    """
    rows = batch.rows.long()
    params = batch.state.params.index_select(0, rows)
    logits = adjusted_logits(logits, batch, params)
    token_ids = logits.argmax(dim=1)
    if not batch.all_greedy:
        temperature = params.view(torch.float32)[:, k.TEMPERATURE]
        random_rows = (temperature > 0).nonzero().squeeze(1)
        if random_rows.numel():
            scaled = logits.index_select(0, random_rows) / temperature[random_rows].unsqueeze(1)
            token_ids[random_rows] = _draw(scaled, params.index_select(0, random_rows), batch)
    if batch.num_logprobs is None:
        return k.Sampled(token_ids.to(torch.int32))
    return _with_logprobs(logits, token_ids, batch.num_logprobs)


def adjusted_logits(logits: Tensor, batch: k.SamplingBatch, params: Tensor) -> Tensor:
    """Logits in float32 after penalties and bias (steps 1 and 2); a new tensor where anything changes. `params` are the batch's rows' own."""
    logits = logits.to(torch.float32)
    if batch.use_penalties:
        if batch.state.prompt_mask is None or batch.state.output_counts is None:
            raise ValueError("use_penalties needs state.prompt_mask and state.output_counts")
        rows, floats = batch.rows.long(), params.view(torch.float32)
        counts = batch.state.output_counts.index_select(0, rows)
        seen = batch.state.prompt_mask.index_select(0, rows) | (counts > 0)
        repetition = floats[:, k.REPETITION_PENALTY].unsqueeze(1)
        logits = torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
        logits = logits - floats[:, k.FREQUENCY_PENALTY].unsqueeze(1) * counts
        logits = logits - floats[:, k.PRESENCE_PENALTY].unsqueeze(1) * (counts > 0)
    if batch.bias_entries is not None and batch.bias_ids is not None and batch.bias_values is not None:
        logits = logits.index_put((batch.bias_entries, batch.bias_ids), batch.bias_values, accumulate=True)
    return logits


def _with_logprobs(logits: Tensor, token_ids: Tensor, num_logprobs: int) -> k.Sampled:
    logprobs = torch.log_softmax(logits, dim=1)
    chosen = token_ids.unsqueeze(1)
    ranks = 1 + (logits > logits.gather(1, chosen)).sum(dim=1)
    top_ids = _largest(logits, min(num_logprobs, logits.shape[1]))
    return k.Sampled(
        token_ids=token_ids.to(torch.int32),
        logprobs=logprobs.gather(1, chosen).squeeze(1),
        ranks=ranks.to(torch.int32),
        top_ids=top_ids.to(torch.int32),
        top_logprobs=logprobs.gather(1, top_ids),
    )


def _draw(scaled: Tensor, params: Tensor, batch: k.SamplingBatch) -> Tensor:
    """Steps 4 and 5 for rows whose temperature is above 0: ids [S] int64."""
    if not (batch.use_top_k or batch.use_top_p or batch.use_min_p):
        ids = torch.arange(scaled.shape[1], device=scaled.device)
        return (scaled + _noise(ids, params)).argmax(dim=1)
    token_ids, complete = _draw_filtered(scaled, params, batch, min(_NUM_CANDIDATES, scaled.shape[1]))
    rest = (~complete).nonzero().squeeze(1)
    if rest.numel():
        token_ids[rest] = _draw_filtered(scaled[rest], params[rest], batch, scaled.shape[1])[0]
    return token_ids


def _draw_filtered(scaled: Tensor, params: Tensor, batch: k.SamplingBatch, num_candidates: int) -> tuple[Tensor, Tensor]:
    """Ids drawn among each row's `num_candidates` first in order, and whether these hold all that the filters keep."""
    vocab = scaled.shape[1]
    floats = params.view(torch.float32)
    ids = _largest(scaled, num_candidates)
    values = scaled.gather(1, ids)
    order = torch.arange(num_candidates, device=scaled.device)
    weights = (values - values[:, :1]).exp()
    keep = torch.ones_like(ids, dtype=torch.bool)
    limit = params[:, k.TOP_K].long().unsqueeze(1) if batch.use_top_k else torch.zeros_like(ids[:, :1])
    limit = torch.where(limit > 0, limit, vocab)
    keep &= order < limit
    if batch.use_top_p:
        top_p = floats[:, k.TOP_P].double().unsqueeze(1)
        cut_weights = weights.double() * keep
        whole = (scaled - values[:, :1]).exp().sum(dim=1, keepdim=True, dtype=torch.float64)
        total = torch.where(limit < vocab, cut_weights.sum(dim=1, keepdim=True), whole)
        before = cut_weights.cumsum(dim=1) - cut_weights
        keep &= (before < top_p * total) | (top_p >= 1)
    if batch.use_min_p:
        keep &= weights >= floats[:, k.MIN_P].unsqueeze(1)
    keep[:, 0] = True
    complete = (limit.squeeze(1) <= num_candidates) | ((limit.squeeze(1) >= vocab) & ~keep[:, -1])
    scores = (values + _noise(ids, params)).masked_fill(~keep, -torch.inf)
    best = scores == scores.amax(dim=1, keepdim=True)
    return ids.masked_fill(~best, vocab).amin(dim=1), complete


def _noise(ids: Tensor, params: Tensor) -> Tensor:
    """[S, n] float32 noise of ids [n] or [S, n]."""
    column = params.unsqueeze(2)
    return gumbel_noise(ids, column[:, k.OUTPUT_INDEX], column[:, k.SEED_LOW], column[:, k.SEED_HIGH])


def _largest(values: Tensor, count: int) -> Tensor:
    """Ids [B, count] of the largest float32 values of each row, falling; equal ones by rising id (torch.topk leaves ties open)."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0 in bits too
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)  # monotonic in the float
    vocab = values.shape[1]
    keys = (ordered << 32) | torch.arange(vocab - 1, -1, -1, device=values.device)
    keys = keys.sort(dim=1, descending=True).values if count == vocab else keys.topk(count, dim=1, sorted=True).values
    return (vocab - 1) - (keys & 0xFFFFFFFF)
