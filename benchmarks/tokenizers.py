"""Speed of tokenizers: python benchmarks/tokenizers.py --setting vit_b_encode

    vit_b_encode   images/s of ViT-B/16 at 224 with a codebook of 16,384 (the released 4M tokenizers), random weights
    vit_b_decode   the same sizes, tokens to images by a plain decoder
    ddim_decode    images/s of the small diffusion decoder of configs/tokenizers/diffusion.py, at its number of steps
    train_small    training steps/s of the tokenizer of rgb in configs/tokenizers/scenes.py

Prints one JSON line: medians over repetitions, after one that is not measured. Reading images is not measured.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tokenizers"))

import jax
import jax.numpy as jnp
import measure
import numpy as np
from flax import nnx

from m4.config import load_config
from m4_tokenizers import training
from m4_tokenizers.modalities.image import ImageRecipe
from m4_tokenizers.networks.autoencoder import VQ
from m4_tokenizers.networks.vit import ViTDecoder, ViTEncoder
from m4_tokenizers.quantizers.vector import VectorQuantizer


def vit_b() -> ImageRecipe:
    sizes = {"patch_size": 16, "width": 768, "depth": 12, "num_heads": 12}
    quantizer = VectorQuantizer(num_codes=16_384, latent_size=32)
    return ImageRecipe(image_size=224, encoder=ViTEncoder(**sizes), quantizer=quantizer, decoder=ViTDecoder(**sizes))


def method(recipe: ImageRecipe, name: str, batch_size: int) -> tuple[Callable, int, str]:
    """(a call that takes no argument, the images it works on, the unit)."""
    model = VQ(recipe, rngs=nnx.Rngs(0))
    if name == "encode":
        model.decoder = None  # takes no part, and no memory
    graph, state = nnx.split(model)
    rng, size = np.random.default_rng(0), recipe.image_size
    x = rng.uniform(-1, 1, (batch_size, size, size, 3)).astype(np.float32)
    if name == "decode":
        x = rng.integers(0, recipe.quantizer.num_codes, (batch_size, *recipe.grid)).astype(np.int32)
    run = jax.jit(lambda state, x: getattr(nnx.merge(graph, state), name)(x))
    x = jnp.asarray(x)
    return lambda: run(state, x).block_until_ready(), batch_size, "images_per_s"


def train_small() -> tuple[Callable, int, str]:
    recipe = load_config("configs/tokenizers/scenes.py").tokenizers[0]
    model = VQ(recipe, rngs=nnx.Rngs(0))
    graph, learned, others = nnx.split(model, lambda path, x: training.is_learned(recipe, path, x), ...)
    step, optimizer, _ = training.make_step(recipe, graph, None)
    state = {"learned": learned, "others": others, "moments": optimizer.init(learned), "critic": {}}
    size = recipe.image_size
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (recipe.batch_size, size, size, 3)).astype(np.float32))
    networks = tuple(loss.network() for loss in recipe.losses)

    def run():
        nonlocal state
        state, scalars, _ = step(state, x, 0, jax.random.key(0), networks, size=size)
        scalars["loss"].block_until_ready()

    return run, 1, "steps_per_s"


SETTINGS = {
    "vit_b_encode": lambda: method(vit_b(), "encode", 8),
    "vit_b_decode": lambda: method(vit_b(), "decode", 8),
    "ddim_decode": lambda: method(load_config("configs/tokenizers/diffusion.py").tokenizers[0], "decode", 16),
    "train_small": train_small,
}


def main() -> None:
    measure.keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", choices=SETTINGS, default="vit_b_encode")
    parser.add_argument("--num-repetitions", type=int, default=7)
    args = parser.parse_args()
    run, count, unit = SETTINGS[args.setting]()
    start = time.perf_counter()
    run()
    compile_s = time.perf_counter() - start
    seconds = []
    for _ in range(args.num_repetitions):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    step_s = float(np.median(seconds))
    line = {
        "setting": args.setting,
        unit: round(count / step_s, 3),
        "step_s": round(step_s, 4),
        "step_s_range": [round(min(seconds), 4), round(max(seconds), 4)],
        "compile_s": round(compile_s - step_s, 2),
        **measure.machine(),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
