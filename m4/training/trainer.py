"""The training step, and the state that it carries: one function of (state, batch, step number), compiled once.

    batch --normalised--> micro-batches --loss, gradients--> summed --clip, AdamW--> parameters, average of them

The sum over micro-batches is that of the whole batch, since every target's weight comes from counts of the whole. A
step whose loss or gradients are not finite changes nothing but the counters.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from m4.distributed.constraints import BATCH, shard_constraint
from m4.distributed.mesh import shardings
from m4.model.encoder_decoder import Model
from m4.tokens.batch import MaskedBatch, normalized, token_counts
from m4.training.optimizer import where_trained


class TrainState(NamedTuple):
    """What a step changes. `average`: of the parameters (None without one); the numbers of steps that were skipped."""

    params: Any
    optimizer: Any
    average: Any
    num_skipped: jax.Array  # in the whole run
    num_skipped_in_a_row: jax.Array

    def parts(self) -> dict[str, Any]:
        """What a checkpoint keeps, by name."""
        parts = {"params": self.params, "optimizer": self.optimizer}
        if self.average is not None:
            parts["average"] = self.average
        counters = {name: getattr(self, name) for name in ("num_skipped", "num_skipped_in_a_row")}
        return {**parts, "counters": counters}

    @classmethod
    def of(cls, parts: Mapping[str, Any]) -> TrainState:
        own = {name: part for name, part in parts.items() if name != "counters"}
        fields: dict[str, Any] = {"average": None, **own, **parts["counters"]}
        return cls(**fields)


def random_key(seed: int) -> jax.Array:
    """Another key for each seed from 0 to 2**64 - 1, where `jax.random.key` takes the last 32 bits of it alone."""
    high, low = divmod(seed, 2**32)
    key = jax.random.key(low)
    return jax.random.fold_in(key, np.uint32(high)) if high else key


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The step of a config on a mesh. `c` is an m4.config.Config."""

    c: Any
    mesh: jax.sharding.Mesh

    @functools.cached_property
    def _split(self):
        return nnx.eval_shape(lambda: nnx.split(self._model(), nnx.Param))

    @functools.cached_property
    def model(self) -> Model:
        """Without its numbers."""
        return nnx.merge(*self._split)

    @property
    def num_parameters(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.abstract_state.params))

    @property
    def num_trained(self) -> int:
        """ValueError for patterns that fit no parameter, or leave none to train."""
        sizes = jax.tree.map(lambda x, t: round(x.size * np.mean(t)), self._split[1], self._is_trained)
        if not (count := sum(jax.tree.leaves(sizes))):
            c = self.c.optimizer
            raise ValueError(
                f"train={c.train} and freeze={c.freeze} leave no parameter to train; default: train=('*',)"
            )
        return count

    @functools.cached_property
    def _is_trained(self) -> Any:
        """By parameter; see m4.training.optimizer."""
        model, names = self.model, self.c.modalities.names
        rows = {
            table: {m: range(of[i], of[i + 1]) for i, m in enumerate(names) if of[i] < of[i + 1]}
            for table, of in model.table_rows.items()
        }
        return self.c.optimizer.is_trained(self._split[1], rows)

    def trained(self, state: TrainState) -> Model:
        """The model to use: its parameters, or their average."""
        return nnx.merge(self._split[0], state.params if state.average is None else state.average)

    def with_params(self, state: TrainState, params: Any) -> TrainState:
        """A run's start from other parameters."""
        average = state.average and jax.tree.map(jnp.copy, params)
        return state._replace(params=params, average=average)

    def load(self) -> Any:
        """What the config's objectives read besides the batch, on the host. ValueError for what does not fit."""
        return tuple(objective.load(self.c, self.model, self.mesh) for objective in self.c.objectives)

    def abstract(self, loaded: Any) -> Any:
        """Shapes, dtypes and places of what was loaded."""
        places = shardings(loaded, self.mesh)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), loaded, places)

    def place(self, loaded: Any) -> Any:
        """What was loaded, where the rules of meshes put it."""
        put = lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: np.asarray(x)[index])  # noqa: E731
        return jax.tree.map(put, loaded, shardings(loaded, self.mesh))

    def _model(self) -> Model:
        return Model(self.c.model, self.c.modalities, rngs=nnx.Rngs(random_key(self.c.seed)))

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return self.c.optimizer.make(self.c.num_steps, self._is_trained)

    def _make(self) -> TrainState:
        params = nnx.split(self._model(), nnx.Param)[1]
        zero = jnp.zeros((), jnp.int32)
        average = jax.tree.map(jnp.copy, params) if self.c.average_decay else None
        return TrainState(params, self.optimizer.init(params), average, zero, zero)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and places."""
        shapes = jax.eval_shape(self._make)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings(shapes, self.mesh)
        )

    @functools.cached_property
    def _options(self) -> dict[str, Any]:
        """Of XLA. By default it orders a CPU's program for concurrency, at 1.3 times the memory.

        A version without the choice keeps its default.
        """
        options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
        if self.mesh.devices.flat[0].platform != "cpu":
            return {}
        try:
            jax.jit(lambda: 0, compiler_options=options).lower().compile()
        except jax.errors.JaxRuntimeError:
            return {}
        return options

    def init(self) -> TrainState:
        """Made where it lives: no device ever holds the whole."""
        places = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        return jax.jit(self._make, out_shardings=places, compiler_options=self._options)()

    @functools.cached_property
    def step(self):
        """(state, batch, number, loaded) -> (state, scalars); the old state's memory is used again.

        loaded: what the objectives read besides, as `place` gives it, which stays unchanged; None for nothing.
        """
        places = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        whole = NamedSharding(self.mesh, P())
        return jax.jit(self._step, donate_argnums=0, out_shardings=(places, whole), compiler_options=self._options)

    def _step(
        self, state: TrainState, batch: MaskedBatch, number: jax.Array, loaded: Any = None
    ) -> tuple[TrainState, dict[str, Any]]:
        c = self.c
        key = jax.random.fold_in(random_key(c.seed), number)
        counts = token_counts(batch.targets, len(c.modalities))
        loaded = (None,) * len(c.objectives) if loaded is None else loaded
        (loss, detail), grads = self._gradients(self._loss(batch, key, loaded), state.params, batch)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        new = self._updated(state, grads, finite, number)
        scalars = {
            "loss": loss,
            "grad_norm": norm,
            "param_norm": optax.tree.norm(new.params),
            "learning_rate": c.optimizer.schedule(c.num_steps)(number - 1),
            "skipped_steps": new.num_skipped,
            "skipped_in_a_row": new.num_skipped_in_a_row,
            "slots/inputs": batch.inputs.valid.mean(),
            "slots/targets": batch.targets.valid.mean(),
            **detail,
            **{f"targets/{m.name}": counts[i] for i, m in enumerate(c.modalities) if m.is_target},
        }
        return new, scalars

    def _loss(self, batch: MaskedBatch, key: jax.Array, loaded: Any) -> Callable:
        """The loss of a part of the batch, by its parameters, the part and the part's index, and scalars. Parts add up
        to the batch: what objectives divide by is counted over the whole batch."""
        c, graph, is_trained = self.c, self._split[0], self._is_trained
        totals = [objective.totals(batch, self.model) for objective in c.objectives]

        def loss_fn(params, part, index):
            params = jax.tree.map(lambda p, t: jax.lax.stop_gradient(p) if t is False else p, params, is_trained)
            part = normalized(part, c.modalities)
            outputs = nnx.merge(graph, params).outputs(part, jax.random.fold_in(key, index))
            losses, scalars = [], {}
            for objective, total, own in zip(c.objectives, totals, loaded, strict=True):
                loss, more = objective(outputs, part, total, own)
                losses.append(loss)
                scalars |= more
            return sum(losses[1:], losses[0]), scalars

        return loss_fn

    def _gradients(self, loss_fn: Callable, params: Any, batch: MaskedBatch) -> tuple[tuple[jax.Array, Any], Any]:
        """((loss, its summands), gradients), in micro-batches one after the other."""
        value_and_grad, k = jax.value_and_grad(loss_fn, has_aux=True), self.c.micro_batches
        if k == 1:
            return value_and_grad(params, batch, 0)
        # Row r goes to part r mod k, so that each device keeps its own rows.
        parts = jax.tree.map(
            lambda x: shard_constraint(x.reshape(-1, k, *x.shape[1:]).swapaxes(0, 1), None, BATCH), batch
        )

        def add(total, part_and_index):
            out = value_and_grad(params, *part_and_index)
            return jax.tree.map(jnp.add, total, out), None

        shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[0], parts), 0)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add, zeros, (parts, jnp.arange(k)))[0]

    def _updated(self, state: TrainState, grads: Any, finite: jax.Array, number: jax.Array) -> TrainState:
        """The state behind a step; the same but for its counters where a gradient or the loss is not finite."""
        c, is_trained = self.c, self._is_trained
        # Where moments and parameters keep their places in memory: a choice between old and new ones would copy them.
        grads = jax.tree.map(
            lambda g, t: jnp.where(finite, where_trained(t, g, jnp.zeros_like(g)), 0), grads, is_trained
        )
        make = functools.partial(c.optimizer.make, c.num_steps, is_trained)
        updates, optimizer = make(skip_update=~finite).update(grads, state.optimizer, state.params)
        optimizer = jax.tree.map(lambda x, old: x if x.ndim else jnp.where(finite, x, old), optimizer, state.optimizer)
        params = jax.tree.map(
            lambda p, u, t: where_trained(t, p + jnp.where(finite, u, 0), p), state.params, updates, is_trained
        )
        average = state.average
        if average is not None:
            # Short at first, so that the random start is soon forgotten.
            decay = jnp.where(finite, jnp.minimum(c.average_decay, (1 + number) / (10 + number)), 1.0)
            average = jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)
        skipped = 1 - finite.astype(jnp.int32)
        return TrainState(
            params, optimizer, average, state.num_skipped + skipped, (state.num_skipped_in_a_row + 1) * skipped
        )
