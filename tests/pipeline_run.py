"""4M's demo from end to end with m4, on a case of fixtures: python tests/pipeline_run.py CASE_DIR --out FILE.npz

A case is laid out as those of shared/parity/pipeline (see the README there): case.json, inputs.npz, roar_order.npz, the
input image if there is one, and models/NAME/state_dict.json beside the case. What comes out has the names and the
layout of its tokens.npz (MOD.tensor, MOD.drawn, MOD.ar_pred_ids) and outputs.npz; neither is read.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), *(str(ROOT / folder) for folder in ("tokenizers", "tests", "tests/parity"))]

import make_checkpoint  # noqa: E402
import parity_run  # noqa: E402

from m4.inference.autoregressive import Autoregressive  # noqa: E402
from m4.inference.guidance import Guidance  # noqa: E402
from m4.inference.parallel import MaskGIT  # noqa: E402
from m4.inference.prompts import make_prompt  # noqa: E402
from m4.inference.sampler import run_stage  # noqa: E402
from m4.inference.scheme import Replay  # noqa: E402
from m4.interchange import fourm_plans  # noqa: E402
from m4.interchange.fourm import IMAGENET_MEAN, IMAGENET_STD  # noqa: E402
from m4.tokens.modality import Features, Sequence  # noqa: E402
from m4_tokenizers.interchange import fourm_decoding as demo  # noqa: E402
from m4_tokenizers.modalities.text import WordPieceRecipe  # noqa: E402

EDGES = {"tok_canny_edge": "tok_edge", "tok_sam_edge": "tok_edge"}  # of one tokenizer


def pixels_of(file: Path, side: int) -> np.ndarray:
    """The image as 4M's demo reads it: RGB, its centre square, bicubic; uint8 [side side 3]."""
    image = Image.open(file).convert("RGB")
    size = min(image.size)
    left, top = (round((x - size) / 2) for x in image.size)  # Python's round, half to even
    return np.asarray(image.crop((left, top, left + size, top + size)).resize((side, side)))


def converted_tokenizer(file: Path):
    spec = json.loads(file.read_text())
    presets = spec["presets"] if "presets" in spec else {}
    return parity_run.converted_tokenizer(file.parent, {"presets": presets})


class Demo:
    """One run of one model: the state of all modalities, and the recorded draws, call by call."""

    def __init__(self, folder: Path):
        self.folder, self.case = folder, json.loads((folder / "case.json").read_text())
        plan = self.case["plan"]
        names = [plan["fm"], plan["fm_sr"]]
        self.model = parity_run.converted_model(folder.parent / "models" / names[self.case["stage"]])
        self.modalities, self.split = self.model.modalities, nnx.split(self.model)
        self.out, self.call = {}, 0
        arrays = np.load(folder / "inputs.npz")
        self.arrays = {key.removeprefix("in."): arrays[key] for key in arrays.files}
        self.models, self.pixels = folder.parent / "models", None
        wordpiece = folder.parent.parent / "text" / "text_tokenizer_4m_wordpiece_30k.json"
        self.text = WordPieceRecipe(path=str(wordpiece)).fit([], seed=0)
        self.record: dict[str, np.ndarray] = {}
        for name in dict.fromkeys(key.rsplit(".", 1)[0] for key in self.arrays):
            m, visible = self.modalities.named(name), ~self.arrays[f"{name}.input_mask"][0]
            if isinstance(m, Features):
                self.pixels = pixels_of(folder / plan["conditions"][name], 16 * m.shape[0])
                self.record[name] = rearrange(self.pixels, "(h p) (w q) c -> (h w) (p q c)", h=m.shape[0], w=m.shape[1])
                continue
            ids = self.arrays[f"{name}.tensor"][0]
            for field in ("tensor", "input_mask", "target_mask"):
                self.out[f"{name}.{field}"] = self.arrays[f"{name}.{field}"]
            if visible.any():
                # A sequence that is still to be generated shows its first sentinel from the start.
                self.record[name] = ids[visible]

    def noise(self) -> np.ndarray:
        """Gumbel noise of the next call, by row."""
        attempt, shape = self.case["attempts"][self.call], self.case["multinomial_shapes"][self.call]
        name = f"gumbel:{self.folder_name}:{self.call}:{attempt}"
        self.call += 1
        return make_checkpoint.gumbel(self.case["plan"]["noise_seed"], name, shape).astype(np.float32)

    @property
    def folder_name(self) -> str:
        return self.case["plan"]["stages"][self.case["stage"]]["case"]

    def run(self) -> dict[str, np.ndarray]:
        for target, entries in itertools.groupby(self.case["schedule"], key=lambda entry: entry["target_domain"]):
            self.generate(target, list(entries))
        for name in self.record:
            self.show(name)
        return self.out

    def generate(self, name: str, entries: list[dict]) -> None:
        m, first, plan = self.modalities.named(name), entries[0], self.case["plan"]
        guidance = None
        if first["cfg_scale"] != 1:
            guidance = Guidance(
                scale=first["cfg_scale"], drop=tuple(first["cfg_cond_domains"]), dropped_sequences="masked"
            )
        sampling = {"top_p": plan["top_p"] or 1.0, "top_k": plan["top_k"]}
        if isinstance(m, Sequence):
            self.sequence(m, first, sampling, guidance)
        elif first["scheme"] == "roar":
            self.roar(m, entries, sampling, guidance)
        else:
            self.maskgit(m, entries, sampling, guidance)

    def stage(self, scheme, m, guidance, replay, partial=None):
        others = {name: ids for name, ids in self.record.items() if name != m.name}
        prompt = make_prompt([others], [partial], m, self.modalities, guidance)
        out = run_stage(*self.split, scheme, m, prompt, np.zeros((1, 1), int), guidance, replay)
        return [np.asarray(x)[0] for x in out]

    def sequence(self, m, entry: dict, sampling: dict, guidance) -> None:
        length = self.arrays[f"{m.name}.tensor"].shape[1] - 2
        start, noise = self.call, np.zeros((length + 1, 1, m.vocab_size), np.float32)
        for step, shape in enumerate(self.case["multinomial_shapes"][start : start + length + 1]):
            if [*shape] == [1, m.vocab_size]:  # else the sequence has ended before
                noise[step] = self.noise()
        scheme = Autoregressive(
            temperature=entry["temperature"], **sampling, max_length=length, constrained=False, ends_at_sentinel=True
        )
        ids, *_ = self.stage(scheme, m, guidance, Replay(noise=jnp.asarray(noise)), np.array([-1]))
        (closing,) = np.nonzero(ids == m.first_sentinel + 1)
        ids = ids[: closing[0] + 1] if len(closing) else ids
        self.call = start + len(ids)
        self.out[f"{m.name}.drawn"] = ids
        self.out[f"{m.name}.ar_pred_ids"] = np.append(m.first_sentinel, ids)[None]
        merged = demo.merge_generated(np.array([m.first_sentinel]), np.append(m.first_sentinel, ids))
        for field, value in merged._asdict().items():
            self.out[f"{m.name}.{field}"] = value[None]
        self.record[m.name] = merged.tensor

    def roar(self, m, entries: list[dict], sampling: dict, guidance) -> None:
        """All steps at once, in the recorded order of positions."""
        order = np.concatenate(np.load(self.folder / "roar_order.npz")[m.name].astype(int))
        order = order[order >= 0]
        (stage,) = [
            s for s in (*fourm_plans.FROM_RGB, *fourm_plans.TO_RGB) if s.target == m.name and self.is_of(s, entries)
        ]
        noise, first = np.zeros((len(entries), 1, m.max_tokens, m.vocab_size), np.float32), 0
        for step, entry in enumerate(entries):
            noise[step, 0, order[first : first + entry["num_tokens"]]] = self.noise()
            first += entry["num_tokens"]
        replay = Replay(order=jnp.asarray(order[None].astype(np.int32)), noise=jnp.asarray(noise))
        scheme = dataclasses.replace(stage.scheme, **sampling)
        ids, *_ = self.stage(scheme, m, guidance, replay)
        self.out[f"{m.name}.drawn"] = ids[order]
        self.known(m, ids)

    def is_of(self, stage, entries: list[dict]) -> bool:
        """Whether a stage of the plans has the steps and temperatures of a recorded one."""
        scheme, m = stage.scheme, self.modalities.named(stage.target)
        counts = scheme.counts(m.max_tokens)
        if counts.tolist() != [entry["num_tokens"] for entry in entries]:
            return False
        expected = [entry["temperature"] for entry in entries]
        return np.allclose(scheme._schedule(m.max_tokens)[:, 1], expected, rtol=1e-6)

    def maskgit(self, m, entries: list[dict], sampling: dict, guidance) -> None:
        """Step by step, each from what is known by then: all draws are wanted, also those that are not kept."""
        known, steps, drawn = np.full(m.max_tokens, -1), np.full(m.max_tokens, -1), []
        for step, entry in enumerate(entries):
            (at,) = np.nonzero(known < 0)
            noise = np.zeros((1, 1, m.max_tokens, m.vocab_size), np.float32)
            noise[0, 0, at] = self.noise()
            scheme = MaskGIT(steps=1, temperature=entry["temperature"], **sampling)
            given = known if step else None
            ids, log_probability, _ = self.stage(scheme, m, guidance, Replay(noise=jnp.asarray(noise)), given)
            drawn.append(ids[at])
            kept = at[np.argsort(-log_probability[at], kind="stable")[: entry["num_tokens"]]]  # the most confident
            known[kept], steps[kept] = ids[kept], step
        self.out[f"{m.name}.drawn"] = np.concatenate(drawn)
        self.out[f"{m.name}.step_of_position"] = steps.astype(np.int16)
        self.known(m, known)

    def known(self, m, ids: np.ndarray) -> None:
        self.out[f"{m.name}.tensor"] = ids[None].astype(np.int32)
        self.out[f"{m.name}.input_mask"] = np.zeros((1, len(ids)), bool)
        self.out[f"{m.name}.target_mask"] = np.ones((1, len(ids)), bool)
        self.record[m.name] = ids

    # What is shown

    def show(self, name: str) -> None:
        if isinstance(self.modalities.named(name), Sequence):
            self.show_text(name)
        elif name.startswith("tok_"):
            self.show_grid(name)
        else:
            self.picture(name, self.image())

    def image(self) -> np.ndarray:
        mean, deviation = (np.array(x, np.float32) for x in (IMAGENET_MEAN, IMAGENET_STD))
        return demo.denormalized((self.pixels.astype(np.float32) / 255 - mean) / deviation)

    def picture(self, name: str, picture: np.ndarray) -> None:
        self.out[name] = picture
        if picture.dtype != np.uint8:
            self.out[f"{name}.u8"] = np.round(255 * picture.clip(0, 1)).astype(np.uint8)
            self.out[f"{name}.crop"] = picture[96:128, 96:128].astype(np.float32)

    def show_text(self, name: str) -> None:
        masks = [self.out[f"{name}.{mask}"][0] for mask in ("input_mask", "target_mask")]
        shown = demo.shown_ids(demo.MergedSequence(self.out[f"{name}.tensor"][0], *masks))
        text = self.text.decode_verbatim(shown)
        self.out[f"{name}.text"] = np.array(demo.without_end(text))
        if name == "color_palette":
            self.picture(name, demo.palette_picture(text))
        elif name == "human_poses":
            self.picture(name, demo.people_picture(text, self.image() if self.pixels is not None else None))
        elif name == "sam_instance":
            boxes, codes = demo.instance_tokens(text)
            self.picture(name, demo.instance_picture(boxes, demo.instance_logits(codes, self.tokenizer(name))))

    def tokenizer(self, kind: str):
        return converted_tokenizer(self.models / EDGES.get(kind, kind) / "state_dict.json")

    def show_grid(self, name: str) -> None:
        kind, stage = name.split("@")[0], self.case["plan"]["stages"][self.case["stage"]]
        key, noise = f"randn:{self.folder_name}:{name}", None
        if key in self.case["randn"]:
            drawn = make_checkpoint.noise(self.case["plan"]["noise_seed"], key, self.case["randn"][key])
            noise = np.moveaxis(drawn.astype(np.float32), 1, -1)
        ids = self.record[name].reshape(1, *self.modalities.named(name).shape)
        raw = demo.decode_raw(self.tokenizer(kind), ids, noise=noise, num_steps=stage["decoding_steps"])[0]
        first = np.moveaxis(raw, -1, 0)[None]
        if demo.PICTURES[kind] is demo.feature_picture:
            self.out[f"raw.{name}.channels"] = first[:, :: max(first.shape[1] // 16, 1)][:, :16]
            self.out[f"{name}.exact_pca"] = demo.feature_picture(raw)
        elif kind == "tok_semseg":
            self.out[f"raw.{name}.argmax"] = first.argmax(1).astype(np.uint8)
            self.out[f"raw.{name}.crop"] = first[:, :, 100:112, 100:112]
        else:
            self.out[f"raw.{name}.crop"] = first[:, :, 96:128, 96:128]
            self.out[f"raw.{name}.every8"] = first[:, :, ::8, ::8]
        self.picture(name, demo.PICTURES[kind](raw))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    np.savez(args.out, **Demo(args.case).run())
    print(f"{args.out}: the arrays of {args.case}")
