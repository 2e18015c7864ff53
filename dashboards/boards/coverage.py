"""Which families no panel shows, each with its reason. A test holds that every other one is charted."""

from __future__ import annotations

NOT_CHARTED = {
    "appliance_engine_info": "facts of the engine, no course; `appliance_build_info` counts the instances",
    "appliance_kv_info": "facts of the KV pool, no course; `appliance_kv_blocks` shows its size",
    "appliance_gpu_info": "names and UUIDs of the GPUs, no course",
}
