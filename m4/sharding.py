"""Meshes, and where arrays live. The model knows nothing of this.

Axes: data (copies of the model, the batch cut), fsdp (parameters cut, the batch cut too), tensor (reserved for cutting
within a layer). The same code runs on one CPU and on many hosts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

BATCH = PartitionSpec(("data", "fsdp"))
MIN_SIZE_TO_CUT = 2**16  # smaller arrays are not worth a collective


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; data = -1 takes all that the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def make(self) -> jax.sharding.Mesh:
        num = jax.device_count()
        rest = self.fsdp * self.tensor
        data = num // rest if self.data == -1 else self.data
        if data < 1 or data * rest != num:
            raise ValueError(
                f"mesh data={self.data}, fsdp={self.fsdp}, tensor={self.tensor} does not use {num} devices"
            )
        return jax.make_mesh(
            (data, self.fsdp, self.tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
        )


def parameter_spec(shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> PartitionSpec:
    """The largest axis that fsdp divides is cut; small arrays are copied."""
    fsdp = mesh.shape["fsdp"]
    if fsdp > 1 and np.prod(shape) >= MIN_SIZE_TO_CUT:
        for axis in sorted(range(len(shape)), key=lambda a: -shape[a]):
            if shape[axis] % fsdp == 0:
                return PartitionSpec(*(["fsdp" if a == axis else None for a in range(len(shape))]))
    return PartitionSpec()


def shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """A NamedSharding for every array of parameters or optimizer state."""
    return jax.tree.map(lambda x: NamedSharding(mesh, parameter_spec(x.shape, mesh)), tree)


def shard_batch(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """This process's rows -> the global batch, cut over data and fsdp."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH), x), batch)


def check_batch_size(batch_size: int, mesh: jax.sharding.Mesh) -> None:
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise ValueError(f"batch_size={batch_size} must be a multiple of data x fsdp = {ways}")


def constrain_activations(mesh: jax.sharding.Mesh):
    """What the model applies between blocks: without it fsdp gathers activations (3 to 15 times the memory)."""
    return lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, BATCH))
