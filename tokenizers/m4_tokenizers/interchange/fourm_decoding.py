"""What 4M's demo shows of generated tokens: texts, boxes, values, people, instances and pictures, quirks included.

    ids of a sequence --shown_ids--> ids --decode_verbatim--> "v1=12 v0=16 [EOS]" --metadata--> {"saturation": 81.6}
    ids of a grid --decode_raw--> what the tokenizer returns --depth_picture, ...--> picture

The tokenizers of m4_tokenizers.modalities decode the same ids without ml-4m's quirks; these functions are for
comparisons with it. What ml-4m fails on raises the same class of error here.

B batch, H rows and W columns of pixels, C channels, K classes, h rows and w columns of tokens, n instances; the tokens
of a text are what spaces separate, and v0=7 is one with the number 7
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from m4.errors import need
from m4.interchange.fourm import IMAGENET_MEAN, IMAGENET_STD
from m4_tokenizers.modalities.metadata import FIELDS, Bins, Field, Whole
from m4_tokenizers.modalities.text import EOS, WordPieceRecipe
from m4_tokenizers.networks.diffusion import DiffusionDecoder
from m4_tokenizers.networks.patches import cubic_weights
from m4_tokenizers.vq import VQTokenizer

IMAGE_SIZE = 224  # rows and columns of the pictures of people and instances, pixels
SWATCH = 25  # columns of a colour of a palette, pixels
FIRST_SENTINEL, END_OF_SENTINELS = EOS + 1, WordPieceRecipe.layout.first_coordinate
PERSON_TOKENS = 39  # "human" and a box, then "pose", "global", "camera" and "shape" in any order
NUM_POSE_CODES = 8
MASK_GRID, MASK_SIZE = 4, 64  # rows and columns of a mask in tokens and in pixels
CODES_PER_AXIS = 512  # of a mask or a pose; code c is v0=c, or v1=c-512
MIN_RANGE = 0.9  # of the probabilities of a mask that is drawn
SAME_DICE, SAME_IOU = 0.8, 0.9  # above which two instances are one

DetectedBox = tuple[float, float, float, float, str]


class MergedSequence(NamedTuple):
    """A sequence as ml-4m stores it after generation: int32 ids, and masks that are True where there is no token."""

    tensor: Int[np.ndarray, " n"]
    input_mask: Bool[np.ndarray, " n"]
    target_mask: Bool[np.ndarray, " n"]


def merge_spans(inputs: Int[np.ndarray, " n"], outputs: Int[np.ndarray, " m"]) -> Int[np.ndarray, " k"]:
    """The input ids, each sentinel replaced by the ids that follow it in the outputs, up to the next sentinel.

        inputs  a  [S_1] c [S_2]        outputs  [S_1] b [S_7] x [S_1] d        merged  a b d c

    Spans of one sentinel are joined. A sentinel that the outputs lack vanishes, and so do outputs before the first
    sentinel or behind one that the inputs lack.
    """
    spans: dict[int, list[int]] = {}
    current: list[int] = []
    for i in outputs.tolist():
        if FIRST_SENTINEL <= i < END_OF_SENTINELS:
            current = spans.setdefault(i, [])
        else:
            current.append(i)
    merged = []
    for i in inputs.tolist():
        merged.extend(spans.get(i, []) if FIRST_SENTINEL <= i < END_OF_SENTINELS else [i])
    return np.array(merged, np.int32)


def merge_generated(inputs: Int[np.ndarray, " n"], generated: Int[np.ndarray, " m"]) -> MergedSequence:
    """The sequence after autoregressive generation, from its inputs ([S_1] alone where nothing was given) and the ids
    of the loop, start sentinel included. Both masks are all False, as in ml-4m, though it is no target any more."""
    tensor = merge_spans(inputs, generated)
    return MergedSequence(tensor, np.zeros(len(tensor), bool), np.zeros(len(tensor), bool))


def shown_ids(sequence: MergedSequence) -> Int[np.ndarray, " k"]:
    """The ids that the demo shows: those of the input, with those of the target in place of its sentinels."""
    tensor, input_mask, target_mask = sequence
    return merge_spans(tensor[~input_mask], tensor[~target_mask])


def without_end(text: str) -> str:
    """A text as the demo shows it. [EOS] is removed only where a space precedes it, and [PAD] never."""
    return text.replace(" [EOS]", "")


def _tokens(text: str) -> list[str]:
    """The tokens of a text that are neither [EOS] nor [PAD]."""
    return [token for token in text.split(" ") if token not in ("", "[EOS]", "[PAD]")]


def _number(token: str) -> int:
    """The number of a token v0=7, whatever its axis. ValueError for a word."""
    if not token[3:].isdecimal():
        raise ValueError(f"{token!r} is no coordinate such as v0=7")
    return int(token[3:])


def detected_boxes(text: str) -> list[DetectedBox]:
    """The boxes (left, top, right, bottom, name) that the demo plots from "v0=3 v1=231 v2=38 v3=372 hair drier ...",
    as shares of the image's width and height, in [0, 1].

    A box without a name is left out; words and [PAD] behind a name belong to it. IndexError for a coordinate before
    the first v0, or a word before the first four coordinates of a box: the demo then plots none of them.
    """
    boxes: list[tuple[list[float], list[str]]] = []
    # A removed [PAD] leaves its space behind a name, as in ml-4m.
    shown = text.replace("[EOS]", "").replace("[PAD]", "").lstrip(" ")
    for token in shown.split(" ") if shown else ():
        if token.startswith("v0="):
            boxes.append(([], []))
        if not boxes:
            raise IndexError(f"{token!r} precedes the first v0 of {text[:60]!r}")
        corners, words = boxes[-1]
        if token[:3] in ("v0=", "v1=", "v2=", "v3="):
            corners.append(_number(token) / (WordPieceRecipe.layout.num_bins - 1))
        elif len(corners) < 4:
            raise IndexError(f"{token!r} follows {len(corners)} coordinates of a box, which has four")
        else:
            words.append(token)
    return [(c[0], c[1], c[2], c[3], " ".join(words)) for c, words in boxes if words and len(c) == 4]


def _metadata_value(field: Field, index: int) -> int | float:
    """4M's value of a bin: its lower edge by ml-4m's arithmetic, or the index itself. The index may exceed the bins."""
    if isinstance(field, Whole):
        return index * field.step
    if isinstance(field, Bins):
        return index / field.num_bins * (field.high - field.low) + field.low
    return index


def metadata(text: str) -> dict[str, int | float]:
    """Values by the name of their field, in the order of 4M's fields, from "v1=<field> v0=<bin> ...".

    A field with no value or several is left out, and of a repeated one the last counts; the axis of the value is not
    checked. KeyError for an unknown field or two tokens before the first field, IndexError for a word as a value.
    """
    pieces: list[list[str]] = [[]]
    for token in _tokens(text):
        if token.startswith("v1="):
            pieces.append([])
        pieces[-1].append(token)
    fields, values = {f"v1={i}": field for i, field in enumerate(FIELDS)}, {}
    for field, value in (piece for piece in pieces if len(piece) == 2):
        if field not in fields:
            raise KeyError(field)
        if "=" not in value:
            raise IndexError(f"the value of {field} is {value!r}, which is no coordinate such as v0=7")
        values[field] = _metadata_value(fields[field], _number(value))
    return {field.name: values[key] for key, field in fields.items() if key in values}


def palette_picture(text: str) -> Float[np.ndarray, "H W 3"]:
    """The colours of "v1=<count> v0=<red> v0=<green> ..." side by side, each 25 columns wide, in [0, 1].

    The first token, the count, is ignored, and all axes count. The side is 25 n // 3 for n numbers; columns without a
    colour are black. ValueError for a word, OverflowError for a number above 255.
    """
    numbers = [_number(token) for token in _tokens(text)[1:]]
    if numbers and max(numbers) > 255:
        raise OverflowError(f"a colour has the value {max(numbers)}; allowed: 0 to 255")
    side = SWATCH * len(numbers) // 3
    picture = np.zeros((side, side, 3), np.uint8)
    for i in range(len(numbers) // 3):
        picture[:, SWATCH * i : SWATCH * (i + 1)] = numbers[3 * i : 3 * i + 3]
    return picture / 255


class Person(NamedTuple):
    """The arguments with which ml-4m would call SMPL, the camera, and the box in pixels of a 224 x 224 image."""

    global_orient: Float32[np.ndarray, "1 1 3 3"]  # rotation of the body, in [-1, 1]
    betas: Float32[np.ndarray, "1 10"]  # shape of the body, in [-3, 3]
    body_pose: Float32[np.ndarray, "1 23 3 3"]  # of the joints, as the tokenizer returns them: no exact rotations
    pred_cam: Float32[np.ndarray, "1 3"]  # camera, in [-1, 19]
    bbox_xyxy: Float32[np.ndarray, " 4"]  # left, top, right, bottom
    box_center: Float32[np.ndarray, "1 2"]  # column and row
    box_size: Float32[np.ndarray, ""]  # the longer side


def person_tokens(text: str) -> list[list[str]]:
    """The tokens of each person: every 39 in turn, wherever the word "human" is; an incomplete rest is left out."""
    tokens, size = _tokens(text), PERSON_TOKENS
    return [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)]


def _group(tokens: list[str], word: str, name: str, count: int) -> list[str]:
    """The `count` tokens behind a word. KeyError with ml-4m's name where the word is missing."""
    if word not in tokens:
        raise KeyError(name)
    start = tokens.index(word) + 1
    return tokens[start : start + count]


def _scaled(tokens: list[str], low: float, high: float, shape: tuple[int, ...]) -> np.ndarray:
    """Bins as float32 values in [low, high]. ValueError for words, or too few tokens for the shape."""
    shares = np.array([_number(token) for token in tokens]) / (WordPieceRecipe.layout.num_bins - 1)
    return (shares * (high - low) + low).astype(np.float32).reshape(shape)


def person(tokens: list[str], poses: VQTokenizer) -> Person:
    """The person of 39 tokens "human v0 v1 v2 v3 pose ... global ... camera ... shape ...", groups in any order.

    `poses`: 4M's tokenizer of human poses. KeyError for a missing group, ValueError for a word among its numbers.
    """
    box = _scaled(tokens[1:5], 0, IMAGE_SIZE, (4,))
    camera = _scaled(_group(tokens, "camera", "pred_cam", 3), -1, 19, (1, 3))
    orientation = _scaled(_group(tokens, "global", "global_orient", 9), -1, 1, (1, 1, 3, 3))
    betas = _scaled(_group(tokens, "shape", "betas", 10), -3, 3, (1, 10))
    group = _group(tokens, "pose", "body_pose", NUM_POSE_CODES)
    codes = [_number(token) + CODES_PER_AXIS * token.startswith("v1=") for token in group]
    raw = decode_raw(poses, np.array(codes, np.int32).reshape(1, 1, 1, NUM_POSE_CODES))
    center, size = (box[:2] + box[2:]) / 2, np.max(box[2:] - box[:2])
    return Person(orientation, betas, raw.reshape(1, -1, 3, 3), camera, box, center[None], np.asarray(size))


def people(text: str, poses: VQTokenizer) -> list[Person]:
    """All people that can be read from a text; others are left out."""
    found = []
    for tokens in person_tokens(text):
        with contextlib.suppress(KeyError, ValueError):
            found.append(person(tokens, poses))
    return found


def people_picture(text: str, image: Float32[np.ndarray, "H W 3"] | None) -> Float[np.ndarray, "H W C"]:
    """What the demo shows of people without SMPL: the image at half its brightness, or ones of four channels.

    `image`: in [0, 1] (see denormalized). Ones are shown without an image, or if the shown text is "none".
    """
    if image is None or without_end(text) == "none":
        return np.ones((IMAGE_SIZE, IMAGE_SIZE, 4))
    return np.float32(0.5) * image


def instance_tokens(text: str) -> tuple[Int[np.ndarray, "n 4"], Int[np.ndarray, "n h w"]]:
    """The instances of "point v0 v1 none point v0 v1 polygon v0 v1 v2 v3 <16 codes> ...", from large to small boxes:
    (left, top, right, bottom) of each box in pixels, and the codes of its mask.

    A polygon counts if it has exactly 20 coordinates, of whatever axis, and its box is not empty. Code c is v0=c, or
    c - 512 on any other axis.
    """
    found = []
    for part in " ".join(_tokens(text)).split("point"):
        for piece in part.split("polygon")[1:]:
            tokens = piece.split()
            if len(tokens) != 4 + MASK_GRID**2 or any(token[2:3] != "=" for token in tokens):
                continue
            numbers = [_number(token) for token in tokens]
            codes = [n + CODES_PER_AXIS * (token[:3] != "v0=") for n, token in zip(numbers, tokens, strict=True)]
            if numbers[0] < numbers[2] and numbers[1] < numbers[3]:
                found.append((numbers[:4], codes[4:]))
    found.sort(key=lambda item: -(item[0][2] - item[0][0]) * (item[0][3] - item[0][1]))
    boxes, codes = (np.array([item[k] for item in found], np.int32) for k in (0, 1))
    return boxes.reshape(-1, 4), codes.reshape(-1, MASK_GRID, MASK_GRID)


def instance_logits(codes: Int[np.ndarray, "n h w"], masks: VQTokenizer) -> Float32[np.ndarray, "n H W"]:
    """Logits of 64 x 64 pixels of instances' masks, by 4M's tokenizer of masks."""
    return decode_raw(masks, codes)[..., 0] if len(codes) else np.zeros((0, MASK_SIZE, MASK_SIZE), np.float32)


def _same_instance(mask: np.ndarray, box: np.ndarray, other_mask: np.ndarray, other_box: np.ndarray) -> bool:
    """Whether two masks of probabilities have dice above 0.8, and their boxes intersection over union above 0.9."""
    dice = 2 * (mask * other_mask).sum() / (mask.sum() + other_mask.sum())
    sides = np.minimum(box[2:], other_box[2:]) - np.maximum(box[:2], other_box[:2])
    overlap = np.prod(np.maximum(sides, 0))
    total = np.prod(box[2:] - box[:2]) + np.prod(other_box[2:] - other_box[:2]) - overlap
    return bool(dice > SAME_DICE and overlap / total > SAME_IOU)


def instance_masks(
    boxes: Int[np.ndarray, "n 4"], logits: Float32[np.ndarray, "n 64 64"]
) -> tuple[Int[np.ndarray, "m 4"], Bool[np.ndarray, "m 224 224"]]:
    """Boxes and masks of different instances, as pixels of the picture.

    Masks whose probabilities span less than 0.9 are dropped, and duplicates are averaged with their boxes. A mask is
    resized to its whole box (bicubic, as torch does it), then cropped to the picture.
    """
    masks = (1 / (1 + np.exp(-logits))).astype(np.float32)
    groups: list[list[int]] = []
    for i in range(len(masks)):
        if np.ptp(masks[i]) < MIN_RANGE:
            continue
        same = [g for g in groups if _same_instance(masks[g[0]], boxes[g[0]], masks[i], boxes[i])]
        if same:
            same[0].append(i)
        else:
            groups.append([i])
    found, places = np.zeros((len(groups), IMAGE_SIZE, IMAGE_SIZE), bool), np.zeros((len(groups), 4), int)
    for k, group in enumerate(groups):
        left, top, right, bottom = places[k] = boxes[group].mean(axis=0).astype(int)
        rows, columns = (cubic_weights(MASK_SIZE, side) for side in (bottom - top, right - left))
        view = found[k, top:bottom, left:right]
        view[:] = (rows @ masks[group].mean(axis=0) @ columns.T)[: view.shape[0], : view.shape[1]] > 0.5
    return places, found


def instance_picture(
    boxes: Int[np.ndarray, "n 4"], logits: Float32[np.ndarray, "n 64 64"]
) -> UInt8[np.ndarray, "224 224 3"]:
    """Masks in the colours of their rank by area, small ones over large ones, on black."""
    picture, (_, masks) = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8), instance_masks(boxes, logits)
    for mask, colour in zip(masks, np.random.default_rng(0).integers(0, 255, (len(masks), 3)), strict=True):
        picture[mask] = colour
    return picture


@functools.partial(jax.jit, static_argnames=("graph", "num_steps"))
def _decode(graph: Any, state: Any, ids: Any, noise: Any, *, num_steps: int) -> Array:
    model = nnx.merge(graph, state)
    codes = model.quantizer.look_up(ids)
    if noise is None:
        return model.decoder(codes)
    timesteps = model.decoder.config.schedule.timesteps(num_steps, "trailing")
    return model.decoder.denoise(codes, noise, timesteps, num_steps)


def decode_raw(
    tokenizer: VQTokenizer,
    ids: Int[np.ndarray, "B h w *codebooks"],
    *,
    noise: Float32[np.ndarray, "B H W C"] | None = None,
    num_steps: int = 50,
) -> Float32[np.ndarray, "B H W C"]:
    """What a tokenizer returns for a grid of ids of any size, before colours and clipping.

    A diffusion decoder (rgb, depth, normal, edges) needs the `noise` from which it takes `num_steps` DDIM steps,
    "trailing" ones. ValueError if it is missing, or given to another decoder.
    """
    if isinstance(tokenizer.recipe.decoder, DiffusionDecoder) != (noise is not None):
        raise ValueError(f"{tokenizer.modality.name}: a diffusion decoder needs noise, and others take none")
    graph, state = nnx.split(tokenizer.model)
    return np.asarray(_decode(graph, state, ids, noise, num_steps=num_steps))


def _colormap(name: str) -> Callable[[np.ndarray], np.ndarray]:
    need("matplotlib", "plots", f"the {name} colours of 4M's demo")
    import matplotlib  # seconds to import, used here alone

    return matplotlib.colormaps[name]


def _min_max(x: np.ndarray) -> np.ndarray:
    """Values scaled to [0, 1]; zeros where all are the same."""
    return (x - x.min()) / (np.ptp(x) or 1)


def feature_picture(raw: Float32[np.ndarray, "h w C"]) -> Float32[np.ndarray, "h w 3"]:
    """The first three principal components of CLIP, DINOv2 or ImageBind features, in [0, 1] by their common range.

    By an exact singular value decomposition; the largest loading of each component is positive.
    """
    flat = raw.reshape(-1, raw.shape[-1]).astype(np.float64)
    flat -= flat.mean(axis=0)
    loadings = np.linalg.svd(flat, full_matrices=False)[2][:3]
    signs = np.sign(loadings[np.arange(3), np.abs(loadings).argmax(axis=1)])
    picture = _min_max(flat @ (loadings * signs[:, None]).T)
    return picture.reshape(*raw.shape[:2], 3).astype(np.float32)


def depth_picture(raw: Float32[np.ndarray, "H W 1"]) -> Float[np.ndarray, "H W 3"]:
    """Depth in turbo's colours, from the smallest value of the image to the largest."""
    return _colormap("turbo")(_min_max(raw[..., 0]))[..., :3]


def class_picture(raw: Float32[np.ndarray, "H W K"]) -> Float[np.ndarray, "H W 3"]:
    """The class of the highest score in viridis' colours, entry k of 256 for class k: the demo without detectron2."""
    return _colormap("viridis")(raw.argmax(axis=-1))[..., :3]


def rgb_picture(raw: Float32[np.ndarray, "H W 3"]) -> Float32[np.ndarray, "H W 3"]:
    """Images and normals from [-1, 1] to [0, 1], clipped."""
    return (raw * np.float32(0.5) + np.float32(0.5)).clip(0, 1)


def edge_picture(raw: Float32[np.ndarray, "H W 1"]) -> Float32[np.ndarray, "H W"]:
    """Edges from [-1, 1] to [0, 1], clipped."""
    return ((raw[..., 0] + 1) / 2).clip(0, 1)


def denormalized(pixels: Float32[np.ndarray, "H W 3"]) -> Float32[np.ndarray, "H W 3"]:
    """The model's input image rgb@224, standardised by ImageNet's mean and deviation, in [0, 1] but not clipped."""
    return pixels * np.array(IMAGENET_STD, np.float32) + np.array(IMAGENET_MEAN, np.float32)


# Pictures of raw outputs, by the name of the modality without its resolution.
PICTURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "tok_rgb": rgb_picture, "tok_normal": rgb_picture, "tok_depth": depth_picture, "tok_semseg": class_picture,
    "tok_canny_edge": edge_picture, "tok_sam_edge": edge_picture, "tok_clip": feature_picture,
    "tok_dinov2": feature_picture, "tok_imagebind": feature_picture,
}  # fmt: skip
