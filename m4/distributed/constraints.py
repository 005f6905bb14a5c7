"""How arrays inside a compiled program are sharded over the mesh."""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

BATCH = ("data", "fsdp")  # axes of a mesh over which examples are sharded; "tensor" shards within a layer


def shard_constraint(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """x with its leading axes sharded over these axes of the mesh that is set (`jax.set_mesh`); unchanged without one.

    `P.UNCONSTRAINED` leaves an axis to the compiler.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*axes))


def lookup(table: Float[Array, "V D"], index: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Rows of a table whose columns are sharded over fsdp and tensor: each device reads its columns for its neighbours
    too, and activations are exchanged, never the table."""
    rows = shard_constraint(table, None, ("fsdp", "tensor"))[shard_constraint(index, "data")]
    return shard_constraint(shard_constraint(rows, "data", None, ("fsdp", "tensor")), BATCH)
