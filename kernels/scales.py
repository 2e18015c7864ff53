"""What the attention kernels share to read an fp8 cache's scales (kv_cache.py says how they lie)."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803 - constants of a kernel are upper case

import triton
import triton.language as tl


@triton.jit
def power_of_two(scale_bytes):
    """2^b of an fp8 cache's scale bytes, loaded as the e4m3 that they are not."""
    return ((scale_bytes.to(tl.uint8, bitcast=True).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_scales(key_scales, value_scales, table, keys, end, stride_block, BLOCK_SIZE: tl.constexpr):
    """Scale bytes of `keys` before `end`, 0 for others. The compiler pipelines no loads of bytes: loops take those of the next tile ahead."""
    inside = keys < end
    at = tl.load(table + keys // BLOCK_SIZE, mask=inside, other=0).to(tl.int64) * stride_block + keys % BLOCK_SIZE
    return tl.load(key_scales + at, mask=inside, other=0.0), tl.load(value_scales + at, mask=inside, other=0.0)
