"""The GPU's memory as the driver counts it, without a CUDA context, which would take half a gigabyte of what is asked for. Torch-free."""

from __future__ import annotations

import os
from typing import Any

from appliance.engine.memory_plan import DeviceMemory


def gpu_memory() -> DeviceMemory | None:
    """Of the GPU that the engine would take: the first that CUDA_VISIBLE_DEVICES leaves. None where there is none, or the driver does not say."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handle = _handle(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
        if handle is None:
            return None
        info = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
        return DeviceMemory(str(pynvml.nvmlDeviceGetName(handle)), True, int(info.total - info.reserved), int(info.free))
    except (pynvml.NVMLError, ValueError):
        return None
    finally:
        pynvml.nvmlShutdown()


def _handle(nvml: Any, visible: str | None) -> Any:
    """Of the first visible device; None where there is none. Raises ValueError for a MIG instance, whose memory is not its card's."""
    if visible is None:
        return nvml.nvmlDeviceGetHandleByIndex(0)
    first = visible.split(",")[0].strip()
    if first in ("", "-1"):
        return None
    if first.startswith("GPU-"):
        return nvml.nvmlDeviceGetHandleByUUID(first)
    if first.startswith("MIG"):
        raise ValueError(first)
    return nvml.nvmlDeviceGetHandleByIndex(int(first))
