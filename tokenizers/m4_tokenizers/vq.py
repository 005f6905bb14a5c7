"""Grids of tokens for images with any channels: a small autoencoder that starts as the k-means tokenizer.

    patches --linear map + residual--> latent --nearest code--> ids --code--> linear map + residual --> patches

The linear maps are the patches' principal components, the codes k-means in that space, and both residuals start at
zero: step 0 is the k-means tokenizer, and training teaches the residuals what neighbouring patches say.

Axes: N images, B batch, H rows and W columns of pixels, C channels; h rows and w columns of patches, P numbers of a
patch (channels fastest); D latent dimensions, F features inside a residual, s and t
places of a grid in raster order.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence as Seq
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from m4.modality import Grid
from m4_tokenizers.quantizers import VectorQuantizer, fit_codebook

BATCH = 64  # the one shape in which images are encoded and decoded, so that nothing is compiled twice
NUM_MOVES = 9  # of a grid by at most one patch: a block's groups of features


def to_patches(pixels: np.ndarray, patch_size: int) -> np.ndarray:
    return einops.rearrange(pixels, "n (h p) (w q) c -> n h w (p q c)", p=patch_size, q=patch_size)


def to_pixels(patches: np.ndarray, patch_size: int) -> np.ndarray:
    return einops.rearrange(patches, "n h w (p q c) -> n (h p) (w q) c", p=patch_size, q=patch_size)


def normalize(x: Float[Array, "... F"]) -> Float[Array, "... F"]:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def shifts(shape: tuple[int, int]) -> Float[np.ndarray, "S s t"]:
    """The nine moves of a grid by at most one patch, as matrices over its raster; the border repeats."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    offsets = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    sources = [np.clip(y + dy, 0, shape[0] - 1) * shape[1] + np.clip(x + dx, 0, shape[1] - 1) for dy, dx in offsets]
    return np.stack([np.eye(y.size, dtype=np.float32)[:, source.ravel()] for source in sources])


class Block(nnx.Module):
    """Each ninth of the features looks at one neighbour, then an MLP, added to the input.

    The looking is a learned [grid, grid] matrix that starts as a shift: a depthwise convolution is as good a step,
    but takes more than twice as long on CPU.
    """

    def __init__(self, width: int, shape: tuple[int, int], *, rngs: nnx.Rngs):
        self.look = nnx.Param(jnp.asarray(shifts(shape)))
        self.widen = nnx.Linear(width, 2 * width, rngs=rngs)
        self.narrow = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "B s F"]) -> Float[Array, "B s F"]:
        groups = einops.rearrange(normalize(x), "b s (g f) -> b s g f", g=NUM_MOVES)
        mixed = einops.rearrange(jnp.einsum("bsgf,gst->btgf", groups, self.look[...]), "b t g f -> b t (g f)")
        return x + self.narrow(jax.nn.gelu(self.widen(mixed)))


class Residual(nnx.Module):
    """What a linear map of single patches leaves out, zero at first."""

    def __init__(
        self, *, num_in: int, num_out: int, width: int, num_blocks: int, shape: tuple[int, int], rngs: nnx.Rngs
    ):
        self.read = nnx.Linear(num_in, width, rngs=rngs)
        self.position = nnx.Param(jnp.zeros((shape[0] * shape[1], width)))
        self.blocks = nnx.List([Block(width, shape, rngs=rngs) for _ in range(num_blocks)])
        self.write = nnx.Linear(width, num_out, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w I"]) -> Float[Array, "B h w O"]:
        h, w = x.shape[1:3]
        y = self.read(einops.rearrange(x, "b h w i -> b (h w) i")) + self.position[...][None]
        for block in self.blocks:
            y = block(y)
        return einops.rearrange(self.write(normalize(y)), "b (h w) o -> b h w o", h=h, w=w)


class Autoencoder(nnx.Module):
    def __init__(self, recipe: "GridRecipe", *, rngs: nnx.Rngs):
        size, latent = recipe.patch_size**2 * recipe.num_channels, recipe.latent_size
        residual = functools.partial(Residual, width=recipe.width, shape=recipe.shape, rngs=rngs)
        self.mean = nnx.Param(jnp.zeros(size))
        self.project = nnx.Param(jnp.zeros((size, latent)))
        self.unproject = nnx.Param(jnp.zeros((latent, size)))
        self.quantizer = VectorQuantizer(jnp.zeros((recipe.num_codes, latent)))
        self.before = residual(num_in=size, num_out=latent, num_blocks=recipe.num_encoder_blocks)
        self.after = residual(num_in=latent, num_out=size, num_blocks=recipe.num_decoder_blocks)

    def start_from(self, patches: Float[np.ndarray, "N P"], *, seed: int) -> None:
        """Principal components and k-means: what the residuals then improve."""
        mean = patches.mean(axis=0)
        covariance = np.einsum("np,nq->pq", patches - mean, patches - mean, optimize=True) / len(patches)
        _, vectors = np.linalg.eigh(covariance.astype(np.float64))
        basis = vectors[:, ::-1][:, : self.project.shape[1]].astype(np.float32)
        latent = (patches - mean) @ basis
        scale = np.sqrt(np.mean(latent * latent))  # residuals expect numbers of order one
        codes = fit_codebook(latent / scale, num_codes=self.quantizer.codes.shape[0], seed=seed)
        self.mean[...], self.project[...], self.unproject[...] = mean, basis / scale, basis.T * scale
        self.quantizer.codes[...] = jnp.asarray(codes)

    def latent(self, patches: Float[Array, "B h w P"]) -> Float[Array, "B h w D"]:
        centred = patches - self.mean[...][None, None, None]
        return jnp.einsum("bhwp,pd->bhwd", centred, self.project[...]) + self.before(patches)

    def encode(self, patches: Float[Array, "B h w P"]) -> Int[Array, "B h w"]:
        return self.quantizer.nearest(self.latent(patches))

    def reconstruct(self, codes: Float[Array, "B h w D"]) -> Float[Array, "B h w P"]:
        linear = jnp.einsum("bhwd,dp->bhwp", codes, self.unproject[...]) + self.mean[...][None, None, None]
        return linear + self.after(codes)

    def decode(self, ids: Int[Array, "B h w"]) -> Float[Array, "B h w P"]:
        return self.reconstruct(self.quantizer.look_up(ids))


@functools.partial(jax.jit, static_argnames=("graph", "method"))
def _apply(graph, state, batch, *, method: str):
    return getattr(nnx.merge(graph, state), method)(batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridRecipe:
    """What all grids of patch tokens share; image.py and depth.py say what a pixel is."""

    signal: str
    name: str
    image_size: int = 64
    patch_size: int = 8
    num_codes: int = 1024
    latent_size: int = 32
    width: int = 144
    num_encoder_blocks: int = 2
    num_decoder_blocks: int = 4
    num_steps: int = 1200
    batch_size: int = 16
    learning_rate: float = 2e-3
    commitment: float = 0.02
    num_examples: int = 6000
    num_held_out: int = 512

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size} does not divide image_size={self.image_size}")
        if self.width % NUM_MOVES:
            raise ValueError(f"width={self.width} is not a multiple of {NUM_MOVES}")

    @property
    def shape(self) -> tuple[int, int]:
        return (self.image_size // self.patch_size,) * 2

    @property
    def modality(self) -> Grid:
        return Grid(name=self.name, signal=self.signal, vocab_size=self.num_codes, shape=self.shape)

    @property
    def num_channels(self) -> int:
        raise NotImplementedError

    def to_pixels(self, signals: Seq[Any]) -> Float[np.ndarray, "N H W C"]:
        """Signals, checked, as numbers of about [-1, 1]."""
        raise NotImplementedError

    def to_signals(self, pixels: Float[np.ndarray, "N H W C"]) -> list[Any]:
        raise NotImplementedError

    def loss_weights(self, pixels: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """How much each number of the image counts."""
        return jnp.ones_like(pixels)

    def train(self, patches: Float[np.ndarray, "N h w P"], *, seed: int) -> Autoencoder:
        """The autoencoder fitted to patches: k-means, then gradient steps."""
        rng = np.random.default_rng(seed)
        model = Autoencoder(self, rngs=nnx.Rngs(seed))
        flat = patches.reshape(-1, patches.shape[-1])
        model.start_from(flat[rng.permutation(len(flat))[:150_000]], seed=seed)
        graph, state = nnx.split(model)
        warmup = min(50, self.num_steps // 4)
        schedule = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, max(self.num_steps, 1))
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

        def loss_fn(state, batch):
            model = nnx.merge(graph, state)
            codes, commitment = model.quantizer(model.latent(batch))
            pairs = [
                einops.rearrange(x, "b h w (s c) -> b h w s c", c=self.num_channels)
                for x in (batch, model.reconstruct(codes))
            ]
            error = jnp.mean(self.loss_weights(pairs[0]) * (pairs[0] - pairs[1]) ** 2)
            return error + self.commitment * commitment, error

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(state, moments, batch):
            (_, error), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state, batch)
            updates, moments = optimizer.update(gradients, moments, state)
            return optax.apply_updates(state, updates), moments, error

        moments = optimizer.init(state)
        progress = tqdm(range(self.num_steps), desc=self.name, unit="step", mininterval=1.0)
        for i in progress:
            state, moments, error = step(state, moments, patches[rng.integers(0, len(patches), self.batch_size)])
            if i % 50 == 0:
                progress.set_postfix(loss=f"{float(error):.5f}")
        return nnx.merge(graph, state)

    def fit_grid(self, source: Seq[dict[str, Any]], *, seed: int):
        """(autoencoder, held-out examples for the card, mean of the others as pixels, what the card says so far)."""
        start = time.perf_counter()
        order = np.random.default_rng(seed).permutation(len(source))
        num_held_out = min(self.num_held_out, len(source) // 5)
        held_out = [source[int(i)] for i in np.sort(order[:num_held_out])]
        chosen = np.sort(order[num_held_out:][: self.num_examples])
        pixels = self.to_pixels([source[int(i)][self.signal] for i in chosen])
        model = self.train(to_patches(pixels, self.patch_size), seed=seed)
        card = {
            "signal": self.signal,
            "tokens_per_sample": self.modality.max_tokens,
            "vocab_size": self.num_codes,
            "num_examples": len(chosen),
            "num_held_out": num_held_out,
            "fit_seed": seed,
            "fit_seconds": round(time.perf_counter() - start, 1),
        }
        return model, held_out, pixels.mean(axis=0), card


class GridTokenizer:
    """Encodes and decodes in batches of one shape; subclasses add files, pictures and the class of their recipe."""

    recipe_class: type[GridRecipe]

    def __init__(self, *, recipe: GridRecipe, model: Autoencoder, card: dict[str, Any]):
        self.recipe, self.card, self.modality = recipe, card, recipe.modality
        self._graph, self._state = nnx.split(model)

    def _run(self, method: str, inputs: np.ndarray) -> np.ndarray:
        padding = np.zeros((BATCH - len(inputs), *inputs.shape[1:]), inputs.dtype)
        outputs = _apply(self._graph, self._state, np.concatenate([inputs, padding]), method=method)
        return np.asarray(outputs)[: len(inputs)]

    def encode(self, signals: Seq[Any]) -> list[np.ndarray]:
        ids = []
        for start in range(0, len(signals), BATCH):
            pixels = self.recipe.to_pixels(signals[start : start + BATCH])
            ids.extend(self._run("encode", to_patches(pixels, self.recipe.patch_size)))
        return [row.reshape(-1) for row in ids]

    def decode(self, ids: Seq[np.ndarray]) -> list[Any]:
        signals = []
        for start in range(0, len(ids), BATCH):
            part = np.stack([np.asarray(row, np.int32) for row in ids[start : start + BATCH]])
            if part.shape[1] != self.modality.max_tokens or part.min() < 0 or part.max() >= self.modality.vocab_size:
                raise ValueError(
                    f"{self.modality.name} decodes {self.modality.max_tokens} ids in [0, {self.modality.vocab_size}), "
                    f"but got {part.shape[1]} in [{part.min()}, {part.max()}]"
                )
            patches = self._run("decode", part.reshape(-1, *self.modality.shape))
            signals.extend(self.recipe.to_signals(to_pixels(patches, self.recipe.patch_size)))
        return signals

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        arrays = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(self._state)}
        return dataclasses.asdict(self.recipe), arrays

    @classmethod
    def from_state(cls, config: dict[str, Any], arrays: dict[str, np.ndarray], card: dict[str, Any]):
        recipe = cls.recipe_class(**config)
        graph, state = nnx.split(nnx.eval_shape(lambda: Autoencoder(recipe, rngs=nnx.Rngs(0))))
        loaded = [
            (path, leaf.replace(jnp.asarray(arrays[".".join(map(str, path))])))
            for path, leaf in nnx.to_flat_state(state)
        ]
        return cls(recipe=recipe, model=nnx.merge(graph, nnx.from_flat_state(loaded)), card=card)
