"""Fits the tokenizers of a config and shows how well they reconstruct: files, cards and a sheet of pictures."""

import json
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from m4.components import closest, save_tokenizer
from m4.modality import Features, Tokenizer

TILE = 192  # pixels


def train(config: Any, *, signals: Seq[str], out: Path) -> None:
    """Writes OUT/<modality>.safetensors and .png for the config's tokenizers (of these signals, if any are named)."""
    allowed = [recipe.modality.signal for recipe in config.tokenizers]
    for signal in signals:
        if signal not in allowed:
            raise ValueError(f"the config has no tokenizer of signal {signal!r}; {closest(signal, allowed)}")
    config.source.prepare(config.data_dir)
    examples = config.source.split("train", config.data_dir)
    held_out = config.source.split("validation", config.data_dir)
    shown = [held_out[i] for i in range(min(8, len(held_out)))]
    for recipe in config.tokenizers:
        if signals and recipe.modality.signal not in signals:
            continue
        tokenizer = recipe.fit(examples, seed=config.seed)
        name = recipe.modality.name
        save_tokenizer(tokenizer, out / f"{name}.safetensors")
        if not isinstance(recipe.modality, Features):
            Image.fromarray(sheet(tokenizer, shown)).save(out / f"{name}.png")
        print(name, json.dumps(tokenizer.card), flush=True)


def sheet(tokenizer: Tokenizer, examples: Seq[dict[str, Any]]) -> np.ndarray:
    """Two rows of tiles: the signals of the examples, and below each what its tokens decode to."""
    given = [example[tokenizer.modality.signal] for example in examples]
    backgrounds = [example["rgb"] for example in examples] if "rgb" in examples[0] else [None] * len(examples)
    rows = []
    for signals in (given, tokenizer.decode(tokenizer.encode(given))):
        pairs = zip(signals, backgrounds, strict=True)
        drawn = [tokenizer.draw(signal, image=image) for signal, image in pairs]
        tiles = [np.asarray(Image.fromarray(tile).resize((TILE, TILE), Image.Resampling.NEAREST)) for tile in drawn]
        rows.append(np.concatenate(tiles, axis=1))
    return np.concatenate(rows)
