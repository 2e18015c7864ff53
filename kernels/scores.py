"""What the sampling kernels share: a row's parameters, the noise, an order of floats in integers, how a row is split over programs."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from appliance.kernels import ops, philox
from appliance.kernels.launch import cdiv, next_power_of_2, num_multiprocessors

OUTPUT_INDEX = tl.constexpr(ops.OUTPUT_INDEX)
SEED_LOW = tl.constexpr(ops.SEED_LOW)
SEED_HIGH = tl.constexpr(ops.SEED_HIGH)
TEMPERATURE = tl.constexpr(ops.TEMPERATURE)
TOP_K = tl.constexpr(ops.TOP_K)
TOP_P = tl.constexpr(ops.TOP_P)
MIN_P = tl.constexpr(ops.MIN_P)
REPETITION_PENALTY = tl.constexpr(ops.REPETITION_PENALTY)
PRESENCE_PENALTY = tl.constexpr(ops.PRESENCE_PENALTY)
FREQUENCY_PENALTY = tl.constexpr(ops.FREQUENCY_PENALTY)
NUM_PARAMS = tl.constexpr(ops.NUM_PARAMS)
LOG2_E = tl.constexpr(1.4426950408889634)
NOISE_LANES = tl.constexpr(philox.NOISE_LANES)
_HAS_FAST_LOG = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def float_column(row_params, row, column: tl.constexpr):
    """One float parameter of a row (its bits lie in an int32 column)."""
    return tl.load(row_params + row * NUM_PARAMS + column).to(tl.float32, bitcast=True)


@triton.jit
def gumbel(ids, output_index, seed_low, seed_high):
    """Twin of philox.gumbel_noise at any ids. Where they are consecutive, `philox_words` of their counters costs a quarter."""
    counters = ids // (4 * NOISE_LANES) * NOISE_LANES + ids % NOISE_LANES
    w0, w1, w2, w3 = philox_words(counters, output_index, seed_low, seed_high)
    which = ids // NOISE_LANES % 4
    return gumbel_of(tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3)))


@triton.jit
def philox_words(counters, output_index, seed_low, seed_high):
    """The four words of Philox4x32-10 at (counters, output_index, 0, 0): twin of philox.philox4x32."""
    c0 = counters.to(tl.uint32)
    c1 = tl.zeros_like(c0) + output_index.to(tl.uint32, bitcast=True)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    k0 = seed_low.to(tl.uint32, bitcast=True)
    k1 = seed_high.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def gumbel_of(word):
    """-log(-log u), u = (word + 0.5) / 2^32, in float32 to a few units in the last place.

    Near u = 1, where float32 has no room, -log u comes from the complement v = 1 - u: -log(1 - v) = 2 artanh(v / (2 - v)), by its series.
    """
    upper = word >= 0x80000000
    folded = tl.where(upper, word ^ 0xFFFFFFFF, word)  # the word, or the complement's: below 2^31
    v = (folded.to(tl.int32).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    s = v / (2.0 - v)
    t = s * s
    series = 1.0 + t * (0.33333334 + t * (0.2 + t * (0.14285715 + t * (0.11111111 + t * (0.09090909 + t * (0.07692308 + t * 0.06666667))))))
    negative_log = tl.where(upper, 2.0 * s * series, -_log(v))
    return -_log(negative_log)


@triton.jit
def _log(x):
    """The chip's own logarithm where there is one: 2^-22 at most from log2 x, a tenth of the instructions of the exact function."""
    if _HAS_FAST_LOG:
        return libdevice.fast_logf(x)
    return tl.log(x)


@triton.jit
def ordered(x):
    """int32 that orders as the float32 x does; -0.0 and 0.0 are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def num_parts(num_rows: int, vocab: int, block: int, device: torch.device) -> int:
    """Programs that share a row of `vocab` scores in tiles of `block`: a power of two, about eight programs a multiprocessor in all."""
    most = next_power_of_2(cdiv(vocab, block))
    parts = 1
    while parts < most and num_rows * parts < 8 * num_multiprocessors(device):
        parts *= 2
    return parts
