"""Where arrays inside a compiled program live on the mesh."""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

BATCH = ("data", "fsdp")  # axes of a mesh over which examples are cut; "tensor" cuts within a layer


def shard_constraint(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """x with its leading axes cut over these axes of the mesh that is set (`jax.set_mesh`); x as it is without one.

    `P.UNCONSTRAINED` leaves an axis to the compiler.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*axes))


def lookup(table: Float[Array, "V D"], index: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Rows of a table whose columns are cut over fsdp and tensor: each device reads its columns for its neighbours too,
    and numbers of activations are exchanged, never the table."""
    rows = shard_constraint(table, None, ("fsdp", "tensor"))[shard_constraint(index, "data")]
    return shard_constraint(shard_constraint(rows, "data", None, ("fsdp", "tensor")), BATCH)
