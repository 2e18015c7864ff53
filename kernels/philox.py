"""Philox4x32-10, a counter-based random generator: the noise at one place depends on key and counter alone.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); test vectors from its library, Random123.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
WEYL: Final = (0x9E3779B9, 0xBB67AE85)  # what the key grows by, each round
NOISE_LANES: Final = 256  # ids of a run whose noise comes from one word of consecutive counters; four runs share their counters
_LOW: Final = 0xFFFFFFFF


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], num_rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 random bits for each counter. All tensors int64 holding 0 <= word < 2^32; they broadcast against each other.

    A product of two words may pass 2^63; int64 multiplication wraps, which keeps the low 64 bits right, and the masks take the sign off.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for round_index in range(num_rounds):
        if round_index:
            k0 = (k0 + WEYL[0]) & _LOW
            k1 = (k1 + WEYL[1]) & _LOW
        product0 = c0 * MULTIPLIERS[0]
        product1 = c2 * MULTIPLIERS[1]
        high0 = (product0 >> 32) & _LOW
        high1 = (product1 >> 32) & _LOW
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _LOW, high0 ^ c3 ^ k1, product0 & _LOW
    return c0, c1, c2, c3


def gumbel_noise(ids: Tensor, output_index: Tensor, seed_low: Tensor, seed_high: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, of vocabulary ids at one output index under a 64-bit seed. Integer tensors that broadcast; negative ones
    stand for their 32 bits.

    u = (noise_words + 0.5) / 2^32; noise = -log(-log u), computed in float64 (in float32 u would round to 1 for the largest words, and the noise to
    infinity) and rounded once.
    """
    uniform = noise_words(ids, output_index, seed_low, seed_high).to(torch.float64).add_(0.5).mul_(2.0**-32)
    return uniform.log_().neg_().log_().neg_().to(torch.float32)


def noise_words(ids: Tensor, output_index: Tensor, seed_low: Tensor, seed_high: Tensor) -> Tensor:
    """The 32 random bits, int64, behind the noise of ids: all four words of a Philox call serve, since a call costs more than what is done with them.

    With L = NOISE_LANES, id v takes word (v // L) % 4 of Philox(counter = (v // 4L * L + v % L, output index, 0, 0), key = (seed low, seed high)):
    consecutive lanes take consecutive counters and read consecutive ids.
    """
    zero = torch.zeros((), dtype=torch.int64, device=ids.device)
    v = _word(ids)
    counter = v // (4 * NOISE_LANES) * NOISE_LANES + v % NOISE_LANES
    words = philox4x32((counter, _word(output_index), zero, zero), (_word(seed_low), _word(seed_high)))
    which = v // NOISE_LANES % 4
    return torch.where(which < 2, torch.where(which == 0, words[0], words[1]), torch.where(which == 2, words[2], words[3]))


def _word(x: Tensor) -> Tensor:
    return x.to(torch.int64) & _LOW
