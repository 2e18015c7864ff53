"""Hand-over through pinned memory: every slot in turn, on both ways."""

from __future__ import annotations

import pytest
import torch

from appliance.kernels import ops as k
from appliance.kernels.host_ring import give_ids, take_updates
from appliance.kernels.reference import ReferenceOps

RING, NUM_ROWS, NUM_BLOCKS, SEQUENCES, TABLE = 4, 3, 40, 6, 9


@pytest.mark.parametrize("num_entries", [1, 5, 1500])
def test_every_turn_takes_its_slot_and_gives_into_the_same(num_entries: int, device: torch.device) -> None:
    """Ten steps over four slots: updates and ids equal the twins', which leave the other slots as they were."""
    generator = torch.Generator().manual_seed(num_entries)
    shape = (SEQUENCES + 1, k.NUM_PARAMS), (SEQUENCES + 1, TABLE)
    states = [
        k.RowState(torch.zeros(shape[0], dtype=torch.int32, device=device), torch.zeros(shape[1], dtype=torch.int32, device=device)) for _ in "ab"
    ]
    pinned, twin = device.type == "cuda", ReferenceOps()
    size = NUM_ROWS * (1 + k.NUM_PARAMS) + 3 * NUM_BLOCKS
    updates = torch.zeros(RING, size, dtype=torch.int32, pin_memory=pinned)
    ids = torch.full((RING, 2000), -1, dtype=torch.int32, pin_memory=pinned)
    twin_ids = ids.clone()
    turn, twin_turn = (torch.zeros(1, dtype=torch.int32, device=device) for _ in "ab")
    for step in range(10):
        rows = torch.randperm(SEQUENCES, generator=generator)[:NUM_ROWS].int()
        params = torch.randint(0, 99, (NUM_ROWS, k.NUM_PARAMS), generator=generator, dtype=torch.int32)
        places = torch.randperm(SEQUENCES * TABLE, generator=generator)[:NUM_BLOCKS].int()
        triples = torch.stack([places // TABLE, places % TABLE, torch.randint(0, 99, (NUM_BLOCKS,), generator=generator, dtype=torch.int32)], dim=1)
        updates[step % RING] = torch.cat([rows, params.flatten(), triples.flatten()])
        take_updates(states[0], updates, turn, NUM_ROWS, NUM_BLOCKS)
        twin.take_updates(states[1], updates, twin_turn, NUM_ROWS, NUM_BLOCKS)
        assert torch.equal(states[0].params, states[1].params)
        assert torch.equal(states[0].block_tables, states[1].block_tables)
        sampled = torch.randint(0, 1 << 30, (num_entries,), generator=generator, dtype=torch.int32)
        give_ids(sampled.to(device), ids, turn)
        twin.give_ids(sampled.to(device), twin_ids, twin_turn)
        if pinned:
            torch.cuda.synchronize()
        assert torch.equal(ids, twin_ids)
        assert torch.equal(ids[step % RING, :num_entries], sampled)
        assert int(turn) == int(twin_turn) == step + 1
