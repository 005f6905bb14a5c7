"""Attention by a library's kernel, equal to `m4.model.attention.attend` on XLA within rounding.

    TPU         splash attention (Pallas): nothing of size T x S leaves the kernel
    NVIDIA GPU  flash attention of cuDNN, in bfloat16: the rule becomes one bias [B 1 T S] for all heads and blocks
    others      XLA

The kernel is chosen while a program is traced, by the mesh that is set (`jax.set_mesh`, also of devices that are not
there), else by JAX's default devices. `jax.lax.platform_dependent` would choose later, but what the backward pass of
every branch needs would be kept, and JAX asks for cuDNN while it traces.

B batch, T query tokens, S key tokens, N heads, H head width
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

if TYPE_CHECKING:
    from m4.model.visibility import Visible


LANES = 128  # of a TPU's vector registers: splash attention takes multiples of them


def kernel_for(q: Float[Array, "B T N H"]) -> Callable | None:
    """(q, k, v, visible) -> [B T N H] on the devices that the program is for; None: XLA, also for few queries."""
    mesh = jax.sharding.get_abstract_mesh()
    device = jax.devices()[0] if mesh.empty else mesh.abstract_device
    if device.platform == "tpu" and q.shape[1] >= LANES:
        # Run again in the backward pass: its results, which TPUs pad, would take a tenth more memory if they were kept.
        return jax.checkpoint(splash)
    fits = q.dtype == jnp.bfloat16 and q.shape[1] > 1 and q.shape[3] <= 128 and q.shape[3] % 8 == 0
    return cudnn if device.device_kind.startswith("NVIDIA") and fits else None


def on_mesh(kernel: Callable, batch: tuple[str, ...], heads: str) -> Callable:
    """The kernel on each device's examples and heads, which compilers cannot cut; what does not divide stays whole."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel

    def run(q, k, v, visible):
        rows = batch if len(q) % math.prod(mesh.shape[axis] for axis in batch) == 0 else None
        x = P(rows, None, heads if q.shape[2] % mesh.shape[heads] == 0 else None)
        rule = jax.tree.map(lambda a: P(rows if len(a) > 1 else None), visible)
        # Kernels do not say over which axes their results differ.
        return jax.shard_map(kernel, in_specs=(x, x, x, rule), out_specs=x, check_vma=False)(q, k, v, visible)

    return run


def splash(q: Array, k: Array, v: Array, visible: Visible, interpret: bool = False) -> Float[Array, "B T N H"]:
    """A query sees the keys of its own segment up to a last slot, which is the rule if ranks do not fall: `Visible`.

    Where it sees none, the kernel gives a mean of all values.
    """
    # Takes 0.2 s.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    (batch, length, _, width), num_keys = q.shape, k.shape[1]
    slots = jnp.arange(num_keys)[None, None]
    last = jnp.broadcast_to(jnp.where(visible.mask(), slots, -1).max(-1), (batch, length))
    query_segment = jnp.broadcast_to(visible.query_segment, (batch, length))
    key_segment = jnp.broadcast_to(visible.key_segment, (batch, num_keys))
    q = (q.astype(jnp.float32) * width**-0.5).astype(q.dtype)

    def of_example(q, k, v, last, query_segment, key_segment):
        block_q, block_kv = (max(b for b in (128, 256, 384, 512) if n % b == 0) for n in (q.shape[1], k.shape[1]))
        minor = library.QKVLayout.SEQ_MINOR  # heads are narrower than vector registers: else memory is padded
        blocks = library.BlockSizes(
            block_q=block_q, block_kv=block_kv, block_q_dkv=block_q, block_kv_dkv=block_kv,
            use_fused_bwd_kernel=True, q_layout=minor, k_layout=minor, v_layout=minor,
        )  # fmt: skip
        rule = MaskInfo(None, None, None, None, q_sequence=last)
        kernel = library.SplashAttentionKernel(
            rule, None, rule, block_sizes=blocks, is_mqa=False, save_residuals=False,
            mask_value=library.DEFAULT_MASK_VALUE, attn_logits_soft_cap=None, residual_checkpoint_name=None,
            mask_function=_up_to, interpret=interpret,
        )  # fmt: skip
        return kernel(q, k, v, library.SegmentIds(query_segment, key_segment))

    heads = [rearrange(_pad(x, LANES), "b t n h -> b n t h") for x in (q, k, v)]
    rule = (_pad(last, LANES, -1), _pad(query_segment, LANES), _pad(key_segment, LANES, -1))
    out = rearrange(jax.vmap(of_example)(*heads, *rule), "b n t h -> b t n h")[:, :length]
    return jnp.where((last >= 0)[..., None, None], out, 0)


def _up_to(last, slot):
    return last >= slot


def cudnn(q: Array, k: Array, v: Array, visible: Visible) -> Float[Array, "B T N H"]:
    """With a mask, not with lengths: valid keys need not come first (parallel decoding of a grid)."""
    length, num_keys = q.shape[1], k.shape[1]
    mask = jnp.broadcast_to(visible.mask(), (len(q), length, num_keys))
    even = jnp.pad(mask, ((0, 0), (0, length % 2), (0, num_keys % 2)))  # for the backward pass
    out = jax.nn.dot_product_attention(*(_pad(x, 2) for x in (q, k, v)), mask=even[:, None], implementation="cudnn")
    return jnp.where(mask.any(-1)[..., None, None], out[:, :length], 0)


def _pad(x: Array, multiple: int, value: int = 0) -> Array:
    """The second axis made a multiple."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2), constant_values=value)
