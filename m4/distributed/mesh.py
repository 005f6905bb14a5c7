"""Meshes, and how arrays are sharded over them: the batch and the parameters by a short list of rules.

Axes, from the slowest network to the fastest:

    data     copies of the parameters, the batch sharded: only gradients cross it. Slices and nodes come first.
    fsdp     the batch and the parameters sharded: each device gathers a layer before it computes it
    tensor   the columns of a layer's first product and the rows of its second sharded, the batch not

    parameter                                    its axes are sharded over
    tables of tokens [V D]                       None, (fsdp, tensor)
    kernels of query, key_value and up [D F]     fsdp, tensor
    kernels of out and down [F D]                tensor, fsdp
    all others                                   fsdp, on the largest axis that it divides; small ones are whole

The same code runs on one CPU and on many hosts. Enter the mesh (`jax.set_mesh`) where the step is called or compiled.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from m4.distributed.constraints import BATCH

AXES = ("data", "fsdp", "tensor")
MIN_SIZE_TO_SHARD = 2**14  # smaller arrays are not worth a collective

RULES = (
    (r"(token|decoder|output)_embedding$", (None, ("fsdp", "tensor"))),
    (r"(query|key_value|up)\.kernel$", ("fsdp", "tensor")),
    (r"(out|down)\.kernel$", ("tensor", "fsdp")),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh; their product is the number of all devices."""

    data: int = -1
    """Copies of the parameters, each with its part of the batch; -1 takes all devices that the others leave."""
    fsdp: int = 1
    """Devices over which both batch and parameters are sharded."""
    tensor: int = 1
    """Devices over which each layer's matrices are sharded, and the batch is not."""

    def shape(self, num_devices: int) -> tuple[int, int, int]:
        rest = self.fsdp * self.tensor
        data = num_devices // max(rest, 1) if self.data == -1 else self.data
        if min(data, self.fsdp, self.tensor) < 1 or data * rest != num_devices:
            raise ValueError(
                f"mesh data={self.data}, fsdp={self.fsdp}, tensor={self.tensor} does not use {num_devices} devices; "
                f"their product must be {num_devices} (data=-1: what the others leave)"
            )
        return data, self.fsdp, self.tensor

    def make(self, devices: Any = None) -> jax.sharding.Mesh:
        """The mesh over all devices of the job, or these. Slices (or nodes) are the outermost part of the data axis."""
        devices = jax.devices() if devices is None else list(devices)
        shape = self.shape(len(devices))
        groups = {getattr(d, "slice_index", 0) or 0 for d in devices}
        if shape[0] % len(groups):
            raise ValueError(f"data={shape[0]} must be a multiple of the number of slices, {len(groups)}")
        if len(groups) > 1:
            within = (shape[0] // len(groups), *shape[1:])
            array = mesh_utils.create_hybrid_device_mesh(
                within, (len(groups), 1, 1), devices, allow_split_physical_axes=True
            )
        else:
            array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(array, AXES, axis_types=(AxisType.Auto,) * 3)


def parameter_spec(path: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> P:
    """The sharding of one parameter by the rules above; an axis that its part of the mesh does not divide is whole."""
    if math.prod(shape) < MIN_SIZE_TO_SHARD:
        return P()
    for pattern, axes in RULES:
        if re.search(pattern, path):  # stacked blocks have the block as a first axis
            axes = (None,) * (len(shape) - len(axes)) + axes
            return P(*(_if_divisible(a, n, mesh) for a, n in zip(axes, shape, strict=True)))
    for axis in sorted(range(len(shape)), key=lambda a: -shape[a]):
        if shape[axis] % mesh.shape["fsdp"] == 0:
            return P(*("fsdp" if a == axis else None for a in range(len(shape))))
    return P()


def _if_divisible(axes: Any, size: int, mesh: jax.sharding.Mesh) -> Any:
    if axes is None or size % math.prod(mesh.shape[a] for a in (axes if isinstance(axes, tuple) else (axes,))):
        return None
    return axes


def shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """A NamedSharding for every array of parameters, or of an optimizer's state, whose arrays have the same paths."""

    def sharding(path, x):
        keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in path]
        return NamedSharding(mesh, parameter_spec(".".join(keys).removesuffix(".value"), x.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def shard_batch(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """This process's rows -> the global batch, sharded over data and fsdp."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(NamedSharding(mesh, P(BATCH)), x), batch)


def check_sizes(
    batch_size: int,
    num_targets: int,
    micro_batches: int,
    width: int,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
) -> None:
    """ValueError if the mesh does not divide what it shards."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * micro_batches
    if batch_size % ways:
        raise ValueError(f"batch_size={batch_size} must be a multiple of data x fsdp x micro_batches = {ways}")
    if num_targets % mesh.shape["tensor"]:
        raise ValueError(f"num_targets={num_targets} must be a multiple of tensor={mesh.shape['tensor']}")
    columns = mesh.shape["fsdp"] * mesh.shape["tensor"]
    if width % columns:
        raise ValueError(f"width={width} must be a multiple of fsdp x tensor = {columns}")


def bytes_by_device(tree: Any) -> dict[Any, int]:
    """Bytes of the arrays that each local device holds."""
    held = collections.Counter()
    for x in jax.tree.leaves(tree):
        for shard in x.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return held


def part_of_batch(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """(index, count): the part of each batch that this process feeds. Processes whose devices hold the same examples
    (a layer sharded over hosts) feed the same part."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows_of: dict[int, list[int]] = {}
    for row, devices in enumerate(mesh.devices.reshape(ways, -1)):
        for process in sorted({d.process_index for d in devices}):
            rows_of.setdefault(process, []).append(row)
    parts = sorted({tuple(rows) for rows in rows_of.values()})
    if [row for part in parts for row in part] != list(range(ways)) or len({len(part) for part in parts}) > 1:
        raise ValueError(
            f"mesh {dict(mesh.shape)} gives processes unequal parts of the batch: {parts}; choose other axes"
        )
    return parts.index(tuple(rows_of[jax.process_index()])), len(parts)
