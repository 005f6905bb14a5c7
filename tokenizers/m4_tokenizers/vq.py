"""Learned tokenizers: a signal as an array -> encoder -> quantizer -> ids, and ids -> codes -> decoder -> signal.

    signals --to_arrays--> [N H W C] --encoder--> latents --quantizer--> ids
    signals <--to_signals-- [N H W C] <--decoder-- codes <--look_up----- ids

`VQRecipe` says which parts a tokenizer has and how it is trained; a modality is a subclass with its own
`to_arrays`, `to_signals` and `measure` (modalities/: image.py, depth.py, ...). Encoders and decoders are in networks/,
quantizers in quantizers/, the training loop in training.py.

N signals, B batch, H rows, W columns, C channels, h rows and w columns of tokens, D values of a latent
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from m4.registry import from_json, to_json
from m4.tokens.modality import Grid
from m4.tokens.tokenizer import Examples
from m4_tokenizers import training
from m4_tokenizers.losses import SquaredError
from m4_tokenizers.modalities.reading import Reader
from m4_tokenizers.networks.autoencoder import VQ, check_finite
from m4_tokenizers.networks.diffusion import DiffusionDecoder
from m4_tokenizers.networks.patch_mixing import PatchDecoder, PatchEncoder
from m4_tokenizers.quantizers.codebooks import code_use
from m4_tokenizers.quantizers.vector import LearnedVectorQuantizer


@functools.partial(jax.jit, static_argnames=("graph", "method"))
def _apply(graph, state, batch, *, method: str):
    return getattr(nnx.merge(graph, state), method)(batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQRecipe:
    """Parts, training and measurement of a learned tokenizer."""

    signal: str
    """Signal that is read."""
    name: str
    """Name of the modality."""
    image_size: int = 64
    """Rows and columns of the signal as an array, pixels."""
    encoder: Any = PatchEncoder()
    """Signal -> latents (m4_tokenizers.networks, or a user's own)."""
    quantizer: Any = LearnedVectorQuantizer()
    """Latents -> token ids (m4_tokenizers.quantizers)."""
    decoder: Any = PatchDecoder()
    """Codes -> signal (m4_tokenizers.networks)."""
    losses: tuple[Any, ...] = (SquaredError(),)
    """Losses of the reconstruction (m4_tokenizers.losses); the weighted sum is minimised."""
    adversarial: Any = None
    """A discriminator beside the losses (m4_tokenizers.losses.Adversarial); None leaves it out."""
    num_steps: int = 1200
    """Training steps."""
    batch_size: int = 16
    """Signals per step."""
    learning_rate: float = 2e-3
    """Peak learning rate of Adam."""
    warmup_steps: int = 50
    """Steps in which the learning rate rises from 0 to its peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay; 0 is none."""
    sizes: tuple[int, ...] = ()
    """Image sizes, one of which is drawn in each step (multi-resolution training); () is image_size alone."""
    start_from: str = ""
    """Tokenizer file whose encoder and quantizer are taken and kept unchanged, so that only the decoder learns; ""
    learns all."""
    num_examples: int = 6000
    """Examples that are trained on, at most."""
    num_held_out: int = 512
    """Examples that are held out and measured, for the tokenizer's card; at most a fifth."""
    log_every: int = 50
    """Steps between lines of metrics."""
    save_every: int = 500
    """Steps between checkpoints."""

    kind = ""  # of signals (m4.data.sources.files.KINDS); without one, the tokenizer has its own `read`
    num_classes = 0
    embedding_size = 0
    tokenizer_class: ClassVar[Any]  # a subclass of VQTokenizer

    if TYPE_CHECKING:  # a property or constant of each subclass

        @property
        def values(self) -> str:
            """A description of the signals' values, for the card."""
            ...

    def __post_init__(self):
        for size in (self.image_size, *self.sizes):
            if size % self.encoder.patch_size:
                raise ValueError(f"patch_size={self.encoder.patch_size} does not divide image_size={size}")
        if self.adversarial and isinstance(self.decoder, DiffusionDecoder):
            raise ValueError(
                "a diffusion decoder is trained on noise, not on pictures that a discriminator could judge"
            )

    @property
    def grid(self) -> tuple[int, int]:
        return (self.image_size // self.encoder.patch_size,) * 2

    @property
    def modality(self) -> Grid:
        shape = self.grid if self.grid != (1, 1) or self.quantizer.num_codebooks == 1 else ()
        shape += (self.quantizer.num_codebooks,) if self.quantizer.num_codebooks > 1 else ()
        return Grid(name=self.name, signal=self.signal, vocab_size=self.quantizer.num_codes, shape=shape)

    @property
    def num_channels(self) -> int:
        raise NotImplementedError

    def signal_of(self, example: Mapping[str, Any]) -> Any | None:
        """The signal of a raw example, or None; a subclass may compute it from other signals."""
        return example[self.signal] if self.signal in example else None

    def to_arrays(self, signals: Seq[Any]) -> np.ndarray:
        """Signals, checked -> float32 [N H W C] of about [-1, 1], or int32 [N H W] class indices."""
        raise NotImplementedError

    def check(self, signal: Any) -> None:
        """ValueError for a signal that cannot be learned from, as `encode` refuses it."""
        check_finite(self.to_arrays([signal]))

    def to_signals(self, arrays: Float[np.ndarray, "N H W C"]) -> list[Any]:
        raise NotImplementedError

    def loss_weights(self, x: Array) -> Array:
        """The weight of each value of the array in the losses."""
        return jnp.ones_like(x, jnp.float32)

    def mean_signal(self, arrays: np.ndarray) -> Any:
        """The trivial reconstruction that a card compares with: the same for every example."""
        return self.to_signals(arrays.mean(axis=0, keepdims=True))[0]

    def measure(self, given: Seq[Any], decoded: Seq[Any], examples: Seq[dict[str, Any]]) -> dict[str, float]:
        """How good reconstructions are, by the field's measures."""
        raise NotImplementedError

    def fit(self, source: Examples, *, seed: int, folder: Path | None = None) -> "VQTokenizer":
        """Trains on raw examples. With a folder: checkpoints, from which a killed run resumes, and TensorBoard."""
        start = time.perf_counter()
        order = np.random.default_rng(seed).permutation(len(source))
        num_held_out = min(self.num_held_out, len(source) // 5)
        chosen = np.sort(order[num_held_out:][: self.num_examples])
        recipe: Any = self  # Trainable, except that its fields are frozen
        examples = training.TrainingArrays(recipe, source, chosen)
        model = training.train(recipe, examples, seed=seed, folder=folder)
        tokenizer = self.tokenizer_class(recipe=self, model=model, card={})
        mean = self.mean_signal(examples.arrays[:4096])
        held_out = order[:num_held_out] if num_held_out else chosen  # with fewer than five examples all are trained on
        tokenizer.card = {
            **tokenizer.evaluate([source[int(i)] for i in np.sort(held_out)], mean=mean),
            "num_held_out": num_held_out,
            "num_examples": len(chosen),
            "fit_seed": seed,
            "fit_seconds": round(time.perf_counter() - start, 1),
        }
        return tokenizer


class VQTokenizer(Reader):
    """Encodes and decodes in batches of one shape; subclasses add files and pictures.

    `kept`: entries of a file that the recipe's parts do not use (a converted file's 4M header and spare tensors).
    """

    component: ClassVar[str]

    def __init__(self, *, recipe: VQRecipe, model: VQ, card: dict[str, Any], kept: dict[str, Any] | None = None):
        self.recipe: Any = recipe  # a subclass of VQRecipe, with further fields
        self.card, self.modality, self.kept = card, recipe.modality, kept or {}
        self._graph, self._state = nnx.split(model)
        # One shape in which batches are run, so that nothing is compiled twice.
        self.batch_size = int(np.clip(2**19 // recipe.image_size**2, 1, 64))

    @property
    def model(self) -> VQ:
        return nnx.merge(self._graph, self._state)

    def _run(self, method: str, inputs: np.ndarray) -> np.ndarray:
        padding = np.zeros((self.batch_size - len(inputs), *inputs.shape[1:]), inputs.dtype)
        outputs = _apply(self._graph, self._state, np.concatenate([inputs, padding]), method=method)
        return np.asarray(outputs)[: len(inputs)]

    def encode(self, signals: Seq[Any]) -> list[np.ndarray]:
        ids = []
        for start in range(0, len(signals), self.batch_size):
            arrays = self.recipe.to_arrays(signals[start : start + self.batch_size])
            check_finite(arrays)
            ids.extend(self._run("encode", arrays))
        return [row.reshape(-1) for row in ids]

    def decode(self, ids: Seq[np.ndarray]) -> list[Any]:
        signals = []
        for start in range(0, len(ids), self.batch_size):
            part = np.stack([np.asarray(row, np.int32) for row in ids[start : start + self.batch_size]])
            if part.shape[1] != self.modality.max_tokens or part.min() < 0 or part.max() >= self.modality.vocab_size:
                raise ValueError(
                    f"{self.modality.name} decodes {self.modality.max_tokens} ids in [0, {self.modality.vocab_size}), "
                    f"but got {part.shape[1]} in [{part.min()}, {part.max()}]"
                )
            num_codebooks = self.recipe.quantizer.num_codebooks
            shape = (*self.recipe.grid, *((num_codebooks,) if num_codebooks > 1 else ()))
            signals.extend(self.recipe.to_signals(self._run("decode", part.reshape(-1, *shape))))
        return signals

    def average(self, signals: Seq[Any]) -> Any:
        """The mean of several signals, as arrays of the networks; for classes, the most frequent."""
        arrays = np.concatenate([self.recipe.to_arrays([signal]) for signal in signals])
        if np.issubdtype(arrays.dtype, np.integer):
            return self.recipe.mean_signal(arrays)
        return self.recipe.to_signals(arrays.mean(0, keepdims=True))[0]

    def evaluate(self, examples: Examples, *, mean: Any) -> dict[str, Any]:
        """The card: sizes of tokens, and how well they reconstruct these examples, compared with `mean` (a signal)."""
        given = [self.recipe.signal_of(example) for example in examples]
        self.decode(self.encode(given[:1]))  # compiles
        start = time.perf_counter()
        ids = self.encode(given)
        middle = time.perf_counter()
        decoded = self.decode(ids)
        seconds = middle - start, time.perf_counter() - middle
        quality = self.recipe.measure(given, decoded, examples)
        trivial = self.recipe.measure(given, [mean] * len(given), examples)
        arrays = self.recipe.to_arrays(given[:1024])
        return {
            "component": self.component,
            "signal": self.modality.signal,
            "values": self.recipe.values,
            "array_mean": round(float(arrays.mean()), 4),
            "array_std": round(float(arrays.std()), 4),
            "tokens_per_sample": self.modality.max_tokens,
            "vocab_size": self.modality.vocab_size,
            "num_parameters": sum(x.size for x in jax.tree.leaves(nnx.state(self.model, nnx.Param))),
            "num_held_out": len(examples),
            **{k: round(v, 4) for k, v in quality.items()},
            **{f"{k}_of_mean": round(v, 4) for k, v in trivial.items()},
            **code_use(np.stack(ids), self.modality.vocab_size),
            "encoded_per_second": round(len(given) / seconds[0], 1),
            "decoded_per_second": round(len(given) / seconds[1], 1),
        }

    def signal_of(self, example: Mapping[str, Any]) -> Any | None:
        return self.recipe.signal_of(example)

    @property
    def kind(self) -> str:
        return self.recipe.kind

    def check(self, signal: Any) -> None:
        """ValueError for a signal that cannot be encoded."""
        self.recipe.check(signal)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        flat = nnx.to_flat_state(self._state)
        arrays = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in flat}
        spare = {k: v for k, v in self.kept.items() if isinstance(v, np.ndarray)}
        config = {"recipe": to_json(self.recipe), "kept": {k: v for k, v in self.kept.items() if k not in spare}}
        return config, {**arrays, **spare}

    @classmethod
    def from_state(cls, config: dict[str, Any], arrays: dict[str, np.ndarray], card: dict[str, Any]) -> "VQTokenizer":
        recipe = from_json(config["recipe"])
        graph, state = nnx.split(nnx.eval_shape(lambda: VQ(recipe, rngs=nnx.Rngs(0))))
        expected = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
        wrong = [k for k, leaf in expected.items() if k not in arrays or arrays[k].shape != leaf.shape]
        if wrong:
            shapes = {k: list(arrays[k].shape) if k in arrays else "missing" for k in wrong[:5]}
            raise ValueError(f"the arrays do not fit the recipe's {json.dumps(config['recipe'])[:200]}...: {shapes}")
        broken = [k for k in expected if not np.isfinite(arrays[k]).all()]
        if broken:
            raise ValueError(f"the tokenizer's arrays {', '.join(broken[:5])} have values that are not finite")
        loaded = [
            (path, leaf.replace(jnp.asarray(arrays[".".join(map(str, path))])))
            for path, leaf in nnx.to_flat_state(state)
        ]
        kept = {**config["kept"], **{k: v for k, v in arrays.items() if k not in expected}}
        return cls(recipe=recipe, model=nnx.merge(graph, nnx.from_flat_state(loaded)), card=card, kept=kept)
