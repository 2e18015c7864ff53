"""The C++ library's structures and functions as ctypes sees them; the layouts are those of linear.h, attention.h, elementwise.h and stack.cpp."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from typing import Final

import torch
from torch import Tensor

DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1}  # DType of simd.h


class Tile(Structure):
    """linear.h: Tile."""

    _fields_ = (("data", c_void_p), ("format", c_int32), ("first_row", c_int32), ("num_rows", c_int32), ("unused", c_int32))


class LinearShape(Structure):
    """linear.h: Linear."""

    _fields_ = (
        ("tiles", POINTER(Tile)),
        ("bias", c_void_p),
        ("num_tiles", c_int32),
        ("in_features", c_int32),
        ("out_features", c_int32),
        ("unused", c_int32),
    )


class AttentionShape(Structure):
    """attention.h: AttentionShape."""

    _fields_ = (
        ("query_start", c_void_p),
        ("context_lens", c_void_p),
        ("rows", c_void_p),
        ("block_tables", c_void_p),
        ("max_blocks", c_int64),
        ("num_entries", c_int32),
        ("num_tokens", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("block_size", c_int32),
        ("sliding_window", c_int32),
        ("cache_dtype", c_int32),
        ("scale", c_float),
        ("unused", c_int32),
    )


class RopeShape(Structure):
    """elementwise.h: RopeShape."""

    _fields_ = (
        ("cos_sin", c_void_p),
        ("positions", c_void_p),
        ("slot_mapping", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("num_tokens", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("width", c_int32),
        ("block_size", c_int32),
        ("cache_dtype", c_int32),
        ("eps", c_float),
    )


class LayerShape(Structure):
    """stack.cpp: Layer."""

    _fields_ = (
        ("qkv", c_void_p),
        ("output", c_void_p),
        ("gate_up", c_void_p),
        ("down", c_void_p),
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("sliding_window", c_int32),
        ("unused", c_int32),
    )


class DrawShape(Structure):
    """sampling.cpp: DrawShape."""

    _fields_ = (
        ("rows", c_void_p),
        ("params", c_void_p),
        ("vocab", c_int64),
        ("num_rows", c_int32),
        ("num_params", c_int32),
        ("seed_low", c_int32),
        ("seed_high", c_int32),
        ("output_index", c_int32),
        ("temperature", c_int32),
    )


class RowsShape(Structure):
    """steps.cpp: Rows."""

    _fields_ = (
        ("params", c_void_p),
        ("block_tables", c_void_p),
        ("max_blocks", c_int64),
        ("num_params", c_int32),
        ("last_id", c_int32),
        ("num_tokens", c_int32),
        ("output_index", c_int32),
    )


class StepShape(Structure):
    """steps.cpp: Step."""

    _fields_ = (
        ("rows", c_void_p),
        ("samples", c_void_p),
        ("chunk_starts", c_void_p),
        ("chunk_lens", c_void_p),
        ("chunk_ids", c_void_p),
        ("num_entries", c_int32),
        ("num_decodes", c_int32),
        ("num_tokens", c_int32),
        ("block_size", c_int32),
    )


class BatchShape(Structure):
    """steps.cpp: Batch."""

    _fields_ = (
        ("input_ids", c_void_p),
        ("positions", c_void_p),
        ("slot_mapping", c_void_p),
        ("query_start", c_void_p),
        ("context_lens", c_void_p),
        ("rows", c_void_p),
        ("logit_index", c_void_p),
    )


_SIGNATURES: Final[dict[str, tuple[type | None, tuple[type, ...]]]] = {
    "cpu_packed_bytes": (c_int64, (c_int32, c_int64, c_int64)),
    "cpu_packed_format": (c_int32, (c_int32,)),
    "cpu_pack": (None, (c_int32, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int32)),
    "cpu_linear": (None, (c_void_p, c_void_p, c_void_p, c_int32, c_int32, c_int32)),
    "cpu_rms_norm": (None, (c_void_p, c_void_p, c_void_p, c_int32, c_int32, c_float, c_int32, c_int32)),
    "cpu_add_rms_norm": (None, (c_void_p, c_void_p, c_void_p, c_void_p, c_int32, c_int32, c_float, c_int32, c_int32)),
    "cpu_silu_mul": (None, (c_void_p, c_void_p, c_int32, c_int32, c_int32, c_int32)),
    "cpu_rope_store_kv": (None, (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int32, c_int32)),
    "cpu_attention": (None, (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int32, c_int32)),
    "cpu_stack": (None, (c_void_p, c_int32, c_void_p, c_void_p, c_void_p, c_int32, c_int32)),
    "cpu_draw": (None, (c_void_p, c_void_p, c_void_p, c_int32, c_int32)),
    "cpu_philox": (None, (c_void_p, c_int32, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32, c_void_p)),
    "cpu_prepare_inputs": (None, (c_void_p, c_void_p, c_void_p)),
    "cpu_apply_updates": (None, (c_void_p, c_void_p, c_void_p, c_int32, c_void_p, c_int32)),
    "cpu_commit_sampled": (None, (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64)),
}


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """`library` with the types of its functions set."""
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's data lies; None for None."""
    return None if tensor is None else tensor.data_ptr()
