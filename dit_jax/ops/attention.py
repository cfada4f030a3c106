"""One `attend` with a body for each platform: Pallas splash (TPU), cuDNN or XLA (GPU), blocked XLA (CPU).

Shapes: B batch, N queries, M keys, H heads, K head width. On a mesh the body runs in a `shard_map`: batch over `data`
(and `fsdp`), heads over `tensor` where they divide, queries over the token axes; keys and values are gathered along the
tokens first, which is exact for any set of queries.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from dit_jax.ops import mesh as meshes
from dit_jax.ops.linear import products_in

TPU_BLOCK = 1024  # most queries, and most keys, of a step of the kernel
TPU_LANES = 128
ATTENDED = "attended"  # its results, where a gradient chooses what to keep (`models.remat`)
CPU_SCORES = 1 << 17  # scores a CPU block holds at once: 512 KiB in fp32, about one L2 cache


def attend(
    q_BNHK: jax.Array,
    k_BMHK: jax.Array,
    v_BMHK: jax.Array,
    valid_BM: jax.Array | None = None,
    scale: float | None = None,
):
    """softmax(q·kᵀ·scale)·v over the keys where `valid` holds (all, if None); scale defaults to K^-1/2. Returns [B, N,
    H, K]."""
    scale = q_BNHK.shape[-1] ** -0.5 if scale is None else scale
    body = functools.partial(_BODIES[meshes.platform()], scale=scale)
    mesh = meshes.current_mesh()
    if mesh is None:
        found = body(q_BNHK, k_BMHK, v_BMHK, valid_BM)
    else:
        found = _on_mesh(mesh, body, q_BNHK, k_BMHK, v_BMHK, valid_BM)
    return checkpoint_name(found, ATTENDED)


def _on_mesh(mesh, body, q, k, v, valid):
    batch, tokens = meshes.activation_axes(mesh, q.shape[0])
    shards = meshes.axis_size(mesh, tokens)
    heads = "tensor" if "tensor" in mesh.axis_names and q.shape[2] % mesh.shape["tensor"] == 0 else None
    queries = (tokens or None) if q.shape[1] % shards == 0 else None
    row = PartitionSpec(batch or None, None, heads)
    spec_q = PartitionSpec(batch or None, queries, heads)
    operands: list[jax.Array] = [q, k, v] if valid is None else [q, k, v, valid]
    specs = (spec_q, row, row, PartitionSpec(batch or None))[: len(operands)]
    return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=spec_q, check_vma=False)(*operands)


def _cpu(q_BNHK, k_BMHK, v_BMHK, valid_BM=None, *, scale):
    """Loops over groups of heads and blocks of queries that fit a cache, and divides by the sum of weights after the
    second product."""
    batch, queries, heads, width = q_BNHK.shape
    keys = k_BMHK.shape[1]
    block = _query_block(queries, keys)
    blocks = -(-queries // block)
    group = _head_group(batch * heads, block * keys) if blocks == 1 else 1
    q = jnp.pad(q_BNHK, ((0, 0), (0, blocks * block - queries), (0, 0), (0, 0)))
    q = q.reshape(batch, blocks, block, heads, width).transpose(0, 3, 1, 2, 4)
    q = q.reshape(-1, group, blocks, block, width).swapaxes(1, 2)
    k, v = (x.transpose(0, 2, 1, 3).reshape(-1, group, keys, width) for x in (k_BMHK, v_BMHK))
    bias = None
    if valid_BM is not None:
        bias = jnp.repeat(jnp.where(valid_BM, 0.0, -jnp.inf), heads, axis=0).reshape(-1, group, 1, keys)

    @jax.checkpoint
    def one_block(q, k, v, bias):
        scores = jnp.einsum("gnk,gmk->gnm", q, k, preferred_element_type=jnp.float32) * scale
        scores = scores if bias is None else scores + bias
        weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        mixed = jnp.einsum("gnm,gmk->gnk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (mixed / jnp.sum(weights, axis=-1, keepdims=True)).astype(v.dtype)

    def one_group(operands):
        q, k, v, bias = operands
        if blocks == 1:
            return one_block(q[0], k, v, bias)[None]
        return jax.lax.map(lambda rows: one_block(rows, k, v, bias), q)

    out = jax.lax.map(one_group, (q, k, v, bias)).swapaxes(1, 2)
    return out.reshape(batch, heads, blocks * block, width).transpose(0, 2, 1, 3)[:, :queries]


def _query_block(queries: int, keys: int) -> int:
    """Queries a block: scores near a cache's size, 128 rows at least, blocks of nearly equal length."""
    rows = max(128, CPU_SCORES // keys)
    blocks = -(-queries // rows)
    return -(-queries // blocks)


def _head_group(heads: int, scores: int) -> int:
    """Heads that one turn of the loop takes when all queries fit one block: as many as divide evenly and stay near a
    cache's size."""
    return max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or n * scores <= 2 * CPU_SCORES))


def _gpu(q, k, v, valid_BM=None, *, scale):
    # cuDNN takes half precision, heads of a multiple of 8, and a mask only at full length.
    every_pair = (q.shape[0], 1, q.shape[1], k.shape[1])
    mask = None if valid_BM is None else jnp.broadcast_to(valid_BM[:, None, None, :], every_pair)
    fused = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0
    with products_in(q.dtype):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn" if fused else "xla")


def _tpu(q_BNHK, k_BMHK, v_BMHK, valid_BM=None, *, scale, interpret=False):
    """Splash attention; lengths are padded to whole blocks, padding is masked by segment ids. `interpret` runs it
    anywhere."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (_, queries, heads, width), keys = q_BNHK.shape, k_BMHK.shape[1]
    block_q, block_k = tpu_block(queries), tpu_block(keys)
    pad_q, pad_k = _round_up(queries, block_q), _round_up(keys, block_k)
    if valid_BM is None and pad_k != keys:
        valid_BM = jnp.ones((q_BNHK.shape[0], keys), bool)

    def blocked(x, length):
        return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, -width % TPU_LANES))).transpose(0, 2, 1, 3)

    kernel = splash.make_splash_mha(
        mask=masks.MultiHeadMask([masks.FullMask((pad_q, pad_k))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block_q, block_kv=block_k, block_kv_compute=block_k,
            block_q_dkv=block_q, block_kv_dkv=block_k, block_kv_dkv_compute=block_k,
            block_q_dq=block_q, block_kv_dq=block_k,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENDED,
        interpret=interpret,
    )  # fmt: skip
    scaled = (q_BNHK.astype(jnp.float32) * scale).astype(q_BNHK.dtype)  # a scale rounded to bf16 would tilt every score
    q, k, v = blocked(scaled, pad_q), blocked(k_BMHK, pad_k), blocked(v_BMHK, pad_k)
    segments = None
    if valid_BM is not None:
        padding = jnp.pad(~valid_BM, ((0, 0), (0, pad_k - keys)), constant_values=True).astype(jnp.int32)
        segments = splash.SegmentIds(q=jnp.zeros((q_BNHK.shape[0], pad_q), jnp.int32), kv=padding)
    out = jax.vmap(lambda q, k, v, segments: kernel(q, k, v, segment_ids=segments))(q, k, v, segments)
    return out.transpose(0, 2, 1, 3)[:, :queries, :, :width].astype(v_BMHK.dtype)


def tpu_block(length: int) -> int:
    """Queries or keys of a step of the TPU's kernel: large, as a step's fixed cost is that of many products, but such
    that little is padded. In whole lanes."""
    if length <= TPU_BLOCK:
        return _round_up(length, TPU_LANES)
    return min(range(TPU_BLOCK, TPU_BLOCK // 2, -TPU_LANES), key=lambda block: _round_up(length, block))


def _round_up(length: int, multiple: int) -> int:
    return math.ceil(length / multiple) * multiple


_BODIES = {"cpu": _cpu, "gpu": _gpu, "tpu": _tpu}
