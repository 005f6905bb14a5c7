"""The training loop of learned tokenizers, which resumes after it was killed.

    examples -> batch of a step -> encoder, quantizer, decoder -> losses -> Adam; moving averages of codebooks

The batch of a step depends on (seed, step) alone. With a folder: FOLDER/checkpoints, FOLDER/metrics.jsonl and
TensorBoard events with reconstructions.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array
from PIL import Image
from tqdm import tqdm

from m4.checkpoints.numbered import Checkpoints
from m4.command_line import finishing
from m4.distributed.constraints import BATCH
from m4.distributed.mesh import MeshConfig
from m4.files import naming, write_atomically
from m4.tokens.tokenizer import Examples, Tokenizer, load_tokenizer
from m4.training.metrics import EventFile
from m4.training.trainer import random_key
from m4_tokenizers.networks.autoencoder import VQ, check_finite
from m4_tokenizers.quantizers.codebooks import use_of_counts

logger = logging.getLogger(__name__)

MAX_BYTES = 3 * 2**30  # of arrays that stay in memory; larger sets are read step by step
START_EXAMPLES = 2400  # to which principal components and k-means are fitted
NUM_SHOWN = 6  # examples in TensorBoard
TILE = 128  # pixels


@runtime_checkable
class Trainable(Protocol):
    """The fields of a recipe that training reads; vq.VQRecipe documents them."""

    signal: str
    name: str
    image_size: int
    sizes: tuple[int, ...]
    quantizer: Any
    losses: tuple[Any, ...]
    adversarial: Any
    num_steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    start_from: str
    log_every: int
    save_every: int
    tokenizer_class: ClassVar[type]

    @property
    def num_channels(self) -> int: ...

    def signal_of(self, example: Mapping[str, Any]) -> Any | None: ...

    def to_arrays(self, signals: Seq[Any]) -> np.ndarray: ...

    def loss_weights(self, x: Array) -> Array: ...


class TrainingArrays:
    """The arrays of chosen examples, checked: ValueError names the index and file of one that cannot be trained on."""

    def __init__(self, recipe: Trainable, source: Examples, chosen: np.ndarray):
        self.recipe, self.source, self.chosen = recipe, source, chosen
        if not len(chosen):
            raise ValueError(f"tokenizer {recipe.name} has no examples to learn from: the source has {len(source)}")
        one = self.read(chosen[:1])
        self.cached = self.read(chosen) if one.nbytes * len(chosen) <= MAX_BYTES else None

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def arrays(self) -> np.ndarray:
        """All arrays, or the first thousand where all do not fit into memory."""
        return self.read(self.chosen[:1000]) if self.cached is None else self.cached

    def read(self, indices: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(indices), 64):
            examples = [self.source[int(i)] for i in indices[start : start + 64]]
            try:
                parts.append(self._arrays(examples))
            except ValueError:
                for i, example in zip(indices[start:], examples, strict=False):
                    try:
                        self._arrays([example])
                    except ValueError as error:
                        file = f" ({example['file']})" if "file" in example else ""
                        raise ValueError(f"example {int(i)}{file} of signal {self.recipe.signal}: {error}") from error
                raise
        return np.concatenate(parts)

    def _arrays(self, examples: Examples) -> np.ndarray:
        arrays = self.recipe.to_arrays([self.recipe.signal_of(example) for example in examples])
        check_finite(arrays)
        return arrays

    def batch(self, step: int, *, seed: int) -> np.ndarray:
        picks = np.random.default_rng([seed, step]).integers(0, len(self), self.recipe.batch_size)
        return self.read(self.chosen[picks]) if self.cached is None else self.cached[picks]


def optimizer_of(recipe: Trainable) -> optax.GradientTransformation:
    warmup = min(recipe.warmup_steps, recipe.num_steps // 4)
    schedule = optax.warmup_cosine_decay_schedule(0.0, recipe.learning_rate, warmup, max(recipe.num_steps, 1))
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=recipe.weight_decay, mask=is_matrix)
    )


def is_matrix(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def resize(x: Array, size: int) -> Array:
    """Images at another size (antialiased), class maps by their nearest pixel."""
    if x.shape[1] == size:
        return x
    method = "linear" if jnp.issubdtype(x.dtype, jnp.floating) else "nearest"
    return jax.image.resize(x, (x.shape[0], size, size, *x.shape[3:]), method)


def make_step(recipe: Trainable, graph: Any, discriminator_graph: Any):
    optimizer = optimizer_of(recipe)
    critic_optimizer = recipe.adversarial and optax.adam(recipe.adversarial.learning_rate, b1=0.5)

    # Order of a step: gradients of all losses, Adam, then the quantizer's moving averages (from the latents that the
    # gradients saw), then the discriminator, on the same reconstructions.
    @functools.partial(jax.jit, donate_argnums=(0,), static_argnames=("size",))
    def step(state, batch, index, key, networks, *, size: int):
        learned, others, moments, critic = (state[k] for k in ("learned", "others", "moments", "critic"))
        x = resize(batch, size)
        draw_codes, draw_noise, draw_dead = jax.random.split(jax.random.fold_in(key, index), 3)

        def loss_fn(learned):
            model = nnx.merge(graph, learned, others)
            latents = model.latent(x)
            quantized = model.quantizer(latents, draw_codes)
            codes, commitment = quantized.codes, quantized.loss
            if recipe.start_from:
                codes, commitment = jax.lax.stop_gradient(codes), 0.0
            prediction, target = model.decoder.compare(codes, x, draw_noise)
            weights = recipe.loss_weights(x)
            terms, total = {}, commitment
            for loss, network in zip(recipe.losses, networks, strict=True):
                terms[type(loss).__name__] = loss(prediction, target, weights, network)
                total = total + loss.weight * terms[type(loss).__name__]
            if critic:
                discriminator = nnx.merge(discriminator_graph, jax.lax.stop_gradient(critic["learned"]))
                terms["adversarial"] = -jnp.mean(discriminator(prediction))
                has_begun = index >= recipe.adversarial.first_step
                total = total + jnp.where(has_begun, recipe.adversarial.weight, 0.0) * terms["adversarial"]
            return total, (terms, latents, quantized.ids, prediction)

        (total, (terms, latents, ids, decoded)), grads = jax.value_and_grad(loss_fn, has_aux=True)(learned)
        updates, moments = optimizer.update(grads, moments, learned)
        learned = optax.apply_updates(learned, updates)
        if not recipe.start_from:
            model = nnx.merge(graph, learned, others)
            model.quantizer.update(latents, ids, draw_dead)
            others = nnx.split(model, functools.partial(is_learned, recipe), ...)[2]
        if critic:
            critic_loss = lambda p: nnx.merge(discriminator_graph, p).loss(x, jax.lax.stop_gradient(decoded))  # noqa: E731
            terms["discriminator"], critic_grads = jax.value_and_grad(critic_loss)(critic["learned"])
            updates, critic_moments = critic_optimizer.update(critic_grads, critic["moments"], critic["learned"])
            critic = {"learned": optax.apply_updates(critic["learned"], updates), "moments": critic_moments}
        counts = jnp.zeros(recipe.quantizer.num_codes, jnp.int32).at[ids.reshape(-1)].add(1)
        state = {"learned": learned, "others": others, "moments": moments, "critic": critic}
        return state, {"loss": total, **terms}, counts

    return step, optimizer, critic_optimizer


def is_learned(recipe: Trainable, path: tuple, leaf: Any) -> bool:
    """Parameters that the optimizer moves: all, or the decoder's alone where the rest is from a file."""
    return isinstance(leaf, nnx.Param) and (not recipe.start_from or path[0] == "decoder")


def start(recipe: Trainable, examples: TrainingArrays, *, seed: int) -> VQ:
    """The model before its first step."""
    model = VQ(recipe, rngs=nnx.Rngs(random_key(seed)))
    if recipe.start_from:
        given: Any = load_tokenizer(Path(recipe.start_from))
        for part in ("encoder", "quantizer"):
            if getattr(given.recipe, part) != getattr(recipe, part):
                raise ValueError(
                    f"{recipe.start_from} has another {part}: {getattr(given.recipe, part)} instead of "
                    f"{getattr(recipe, part)}"
                )
            setattr(model, part, getattr(given.model, part))
        model.class_embedding = given.model.class_embedding
    else:
        rng = np.random.default_rng(seed)
        picks = np.sort(rng.permutation(len(examples))[:START_EXAMPLES])
        model.start_from(examples.arrays[picks[picks < len(examples.arrays)]], seed=seed)
    return model


def train(recipe: Trainable, examples: TrainingArrays, *, seed: int, folder: Path | None = None) -> VQ:
    """The trained model. With a folder: saved every recipe.save_every steps, and resumed from there."""
    mesh = MeshConfig().make()
    if recipe.batch_size % mesh.size:
        raise ValueError(f"batch_size={recipe.batch_size} must be a multiple of the {mesh.size} devices")
    model = start(recipe, examples, seed=seed)
    graph, learned, others = nnx.split(model, functools.partial(is_learned, recipe), ...)
    critic_graph, critic = None, {}
    if recipe.adversarial:
        discriminator = recipe.adversarial.make(num_channels=recipe.num_channels, rngs=nnx.Rngs(random_key(seed + 1)))
        critic_graph, critic = nnx.split(discriminator)
    step_fn, optimizer, critic_optimizer = make_step(recipe, graph, critic_graph)
    if critic:
        critic = {"learned": critic, "moments": critic_optimizer.init(critic)}
    state = {"learned": learned, "others": others, "moments": optimizer.init(learned), "critic": critic}
    state = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))

    saved = Checkpoints(folder / "checkpoints") if folder else None
    first = saved.latest if saved else 0
    if saved and first:
        state = saved.restore({"state": state})[0]["state"]
        logger.info(f"{recipe.name}: resumed from step {first}")
    log = Log(folder, first) if folder else None
    shown = [examples.source[int(i)] for i in examples.chosen[:NUM_SHOWN]]

    key, sizes = random_key(seed), recipe.sizes or (recipe.image_size,)
    networks = tuple(loss.network() for loss in recipe.losses)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(BATCH))
    counts = jnp.zeros(recipe.quantizer.num_codes, jnp.int32)
    closers = (saved.close, log.close) if saved and log else ()
    with (
        finishing(*closers, kept=lambda: _kept(recipe, saved)),
        ThreadPoolExecutor(1) as reader,
        tqdm(total=recipe.num_steps, initial=first, desc=recipe.name, unit="step", mininterval=1.0) as progress,
    ):
        ahead = reader.submit(examples.batch, first, seed=seed)
        for i in range(first, recipe.num_steps):
            batch = ahead.result()
            ahead = reader.submit(examples.batch, i + 1, seed=seed)
            size = sizes[np.random.default_rng([seed, i, 1]).integers(len(sizes))]
            state, scalars, used = step_fn(state, jax.device_put(batch, sharding), i, key, networks, size=int(size))
            counts = counts + used
            progress.update()
            if (i + 1) % recipe.log_every == 0 or i + 1 == recipe.num_steps:
                scalars = {**{k: float(v) for k, v in scalars.items()}, **use_of_counts(np.asarray(counts))}
                check_loss(recipe, scalars, i + 1)
                progress.set_postfix(loss=f"{scalars['loss']:.4f}", codes=f"{scalars['codes_used']:.0%}")
                counts = jnp.zeros_like(counts)
                if log:
                    log.write(i + 1, scalars)
            if saved and log and ((i + 1) % recipe.save_every == 0 or i + 1 == recipe.num_steps):
                check_loss(recipe, scalars, i + 1)  # a state that is not finite is not saved
                saved.save(i + 1, {"state": state}, {}, {})
                model = nnx.merge(graph, state["learned"], state["others"])
                log.picture(i + 1, sheet([recipe.tokenizer_class(recipe=recipe, model=model, card={})], shown))
        ahead.cancel()
    return nnx.merge(graph, state["learned"], state["others"])


def _kept(recipe: Trainable, saved: Checkpoints | None) -> str:
    return f"tokenizer {recipe.name} is not finished" + (f"; {saved.kept()}" if saved else "")


def check_loss(recipe: Trainable, scalars: Mapping[str, Any], step: int) -> None:
    if not np.isfinite(loss := float(scalars["loss"])):
        raise ValueError(f"{recipe.name}: the loss is {loss} at step {step}")


class Log:
    """metrics.jsonl and TensorBoard events; lines after the step that a killed run resumes from are dropped."""

    def __init__(self, folder: Path, first: int):
        self.path = folder / "metrics.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= first]
        write_atomically(self.path, "".join(f"{line}\n" for line in kept).encode())
        self.events = EventFile(folder / "tensorboard", first)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        with naming(self.path), self.path.open("a") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")
        self.events.scalars(step, scalars)

    def picture(self, step: int, picture: np.ndarray) -> None:
        self.events.picture(step, "reconstructions", picture)

    def close(self) -> None:
        self.events.close()


def sheet(tokenizers: Seq[Tokenizer], examples: Examples) -> np.ndarray:
    """Rows of tiles: the signals of the examples, and below them the reconstructions of each tokenizer."""
    given = [tokenizers[0].signal_of(example) for example in examples]
    backgrounds = [example["rgb"] for example in examples] if "rgb" in examples[0] else [None] * len(examples)
    rows = []
    for signals in (given, *(tokenizer.decode(tokenizer.encode(given)) for tokenizer in tokenizers)):
        pairs = zip(signals, backgrounds, strict=True)
        drawn = [tokenizers[0].draw(signal, image=image) for signal, image in pairs]
        tiles = [np.asarray(Image.fromarray(tile).resize((TILE, TILE), Image.Resampling.NEAREST)) for tile in drawn]
        rows.append(np.concatenate(tiles, axis=1))
    return np.concatenate(rows)
