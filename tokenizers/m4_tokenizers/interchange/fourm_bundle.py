"""SOURCE ... --out FOLDER: a released 4M model and its tokenizers as one folder.

A SOURCE is a safetensors file of 4M (the model or a tokenizer), a folder of such files, the text
tokenizer's JSON, or the id of a repository of the Hugging Face hub, such as EPFL-VILAB/4M-21_B.
Ids are looked up in the hub's cache on this disk, then on the hub.
A modality without a tokenizer stays one of ids. Other commands take FOLDER as RUN.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from m4.checkpoints.model_file import read_description
from m4.checkpoints.runs import tokenizer_file
from m4.command_line import parser_of
from m4.config import Config
from m4.errors import closest
from m4.files import remove_leftovers, replacing_together, shown, write_digests, write_json
from m4.interchange.fourm_convert import convert as convert_model
from m4.masking.dirichlet import Masking, Strategy
from m4.registry import to_json
from m4.tensor_file import DTYPES, OTHERS, PICKLES, TensorFile, literal_like
from m4.tokens.modality import Features, Grid, Modalities, Modality
from m4.tokens.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from m4_tokenizers.interchange import fourm_tokenizers
from m4_tokenizers.interchange.architectures import parse_config, read_presets
from m4_tokenizers.interchange.fourm_pixels import ReleasedPixelsRecipe
from m4_tokenizers.interchange.fourm_sequences import ReleasedInstancesRecipe, ReleasedPeopleRecipe
from m4_tokenizers.modalities.boxes import BoxRecipe
from m4_tokenizers.modalities.metadata import MetadataRecipe
from m4_tokenizers.modalities.palette import PaletteRecipe
from m4_tokenizers.modalities.stored import IdsRecipe
from m4_tokenizers.modalities.text import WordPieceRecipe

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
SUPER_RESOLUTION = "super_resolution"  # folder of the second model
NO_PRESETS: Mapping[str, Any] = {}


def files_of(source: str) -> list[Path]:
    """The files of a source: a local path, a repository in the hub's cache, or one of the hub. ValueError if it is none
    of them, or a pickle."""
    path = Path(source)
    if path.suffix in PICKLES:
        raise ValueError(
            f"{shown(path)} is a pickle: loading it would run whatever code it holds. Way out, where you trust it: "
            "`torch.load(path, weights_only=True)`, then `safetensors.torch.save_file(tensors, out, metadata={key: "
            "str(value) for key, value in config.items()})`"
        )
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted([*path.rglob("*.safetensors"), *path.glob("*.json")])
        if not found:
            raise ValueError(f"{shown(path)} has no .safetensors file")
        return [file for file in found if file.name != "config.json"]
    if source.count("/") != 1:
        near = [str(p) for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise ValueError(f"no file, folder or hub id {source!r}; {closest(source, near)}")
    return [_in_cache(source) or _from_hub(source)]


def _in_cache(source: str) -> Path | None:
    """The newest weights of a repository in the hub's cache on this disk."""
    home = os.environ.get("HF_HOME", Path.home() / ".cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE", Path(home) / "hub"))
    found = (cache / f"models--{source.replace('/', '--')}" / "snapshots").glob(f"*/{WEIGHTS}")
    return max(found, key=lambda file: file.stat().st_mtime, default=None)


def _from_hub(source: str) -> Path:
    from huggingface_hub import hf_hub_download  # comes with tokenizers; seconds to import, used here alone

    try:
        return Path(hf_hub_download(source, WEIGHTS))
    except Exception as error:  # of any kind: no network, no such repository, an interrupted download
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{source} cannot be downloaded from the hub: {reason}") from error


@dataclasses.dataclass
class Sources:
    """What the given files are: a model, perhaps one of super-resolution, tokenizers, and the text tokenizer's JSON."""

    model: Path
    super_resolution: Path | None
    tokenizers: list[Path]
    text: Path | None

    @classmethod
    def read(cls, names: Seq[str]) -> Sources:
        """ValueError unless there is exactly one model, and at most one of super-resolution and one text JSON."""
        models, large, tokenizers, texts = [], [], [], []
        for file in [file for name in names for file in files_of(name)]:
            if file.suffix == ".json":
                texts.append(file)
                continue
            metadata = TensorFile.read(file, dtypes={**DTYPES, **OTHERS}).metadata
            if "domains_in" in metadata:
                targets = literal_like(metadata["domains_out"], [], f"{shown(file)}: domains_out")
                (large if targets and all(name.endswith("@448") for name in targets) else models).append(file)
            elif "enc_type" in metadata:
                tokenizers.append(file)
            else:
                has = ", ".join(metadata) or "nothing"
                raise ValueError(f"{shown(file)} is neither a model nor a tokenizer of 4M: its metadata has {has}")
        kinds = ("model", models, 1), ("super-resolution model", large, 0), ("text tokenizer (.json)", texts, 0)
        for kind, files, least in kinds:
            if not least <= len(files) <= 1:
                given = ", ".join(map(shown, files)) or "(none)"
                raise ValueError(f"a bundle has one {kind}; {len(files)} were given: {given}")
        return cls(models[0], large[0] if large else None, tokenizers, texts[0] if texts else None)


def signals_of(file: Path) -> list[str]:
    """The signals that a tokenizer is of: 4M has one for both kinds of edges."""
    config = parse_config(TensorFile.read(file))
    text = f"{file.parent.name}/{file.stem}".lower()
    if "edge" in text and "canny" not in text and "sam" not in text:
        return ["edges", "sam_edges"]
    return [fourm_tokenizers.guess_signal(config, file)]


def grid_tokenizers(
    files: Seq[Path], modalities: Modalities, scratch: Path, presets: Mapping[str, Any] = NO_PRESETS
) -> Iterator[tuple[Modality, Tokenizer]]:
    """Each grid's tokenizer, at the grid's size. ValueError for two of one modality, and for one that does not fit."""
    known: dict[str, Path] = {}
    for file in files:
        for signal in signals_of(file):
            for m in [m for m in modalities if isinstance(m, Grid) and m.signal.partition("@")[0] == signal]:
                if m.name in known:
                    raise ValueError(f"two tokenizers of {m.name} were given: {shown(known[m.name])}, {shown(file)}")
                known[m.name] = file
                yield m, _converted(file, signal, m, scratch / f"{m.name}.safetensors", presets)


def _converted(file: Path, signal: str, m: Grid, out: Path, presets: Mapping[str, Any]) -> Tokenizer:
    size = parse_config(TensorFile.read(file))["patch_size"] * m.shape[0] if len(m.shape) == 2 else 0
    fourm_tokenizers.convert(file, out, signal=signal, image_size=size, presets=presets)
    tokenizer: Any = load_tokenizer(out)
    own = tokenizer.modality
    if (own.vocab_size, own.max_tokens) != (m.vocab_size, m.max_tokens):
        raise ValueError(
            f"{shown(file)} is no tokenizer of {m.name}: it has {own.max_tokens} tokens of {own.vocab_size} ids, the "
            f"model {m.max_tokens} of {m.vocab_size}"
        )
    recipe = dataclasses.replace(tokenizer.recipe, name=m.name, signal=m.signal)
    return type(tokenizer)(recipe=recipe, model=tokenizer.model, card=tokenizer.card, kept=tokenizer.kept)


def sequence_parts(
    files: Seq[Path], modalities: Modalities, scratch: Path, presets: Mapping[str, Any]
) -> dict[str, Path]:
    """Converted tokenizers of poses and masks, of which texts of the model hold the codes, by signal."""
    wanted = {
        signal for signal, name in (("pose", "human_poses"), ("mask", "sam_instance")) if name in modalities.names
    }
    parts = {}
    for file in files:
        for signal in {*signals_of(file)} & wanted:
            parts[signal] = scratch / f"{signal}.safetensors"
            fourm_tokenizers.convert(file, parts[signal], signal=signal, presets=presets)
    return parts


def untrained(modalities: Modalities, text: Path | None, parts: Mapping[str, Path]) -> dict[str, Any]:
    """Recipes of pixels, and of 4M's sequences with the ids of the text tokenizer's file."""
    recipes: list[Any] = [
        ReleasedPixelsRecipe(name=m.name, signal=m.signal, image_size=16 * m.shape[0])
        for m in modalities
        if isinstance(m, Features) and m.name.startswith("rgb@")
    ]
    if text is not None:
        path = str(text)
        recipes += [WordPieceRecipe(path=path), BoxRecipe(name="det", wordpiece=path, max_objects=51)]
        recipes += [MetadataRecipe(wordpiece=path, max_length=40), PaletteRecipe(wordpiece=path)]
        released = {"pose": ReleasedPeopleRecipe, "mask": ReleasedInstancesRecipe}
        recipes += [released[signal](path=path, parts=str(file)) for signal, file in parts.items()]
    return {r.name: r for r in recipes if r.name in modalities.names and _same(r.modality, modalities.named(r.name))}


def import_bundle(names: Seq[str], out: Path, presets: Mapping[str, Any] = NO_PRESETS) -> str:
    """Writes the bundle; returns a summary that lists the modalities without a tokenizer. A bundle in the folder is
    replaced as a whole. ValueError for sources that are no bundle, before anything is written."""
    sources = Sources.read(names)
    with tempfile.TemporaryDirectory() as scratch:
        # Everything is read and converted before the folder is touched.
        models = [Part.read(sources.model, sources, Path(scratch) / "base", presets)]
        if sources.super_resolution is not None:
            models.append(Part.read(sources.super_resolution, sources, Path(scratch) / "large", presets))
            _check_chain(models[0].modalities, models[1].modalities)
        remove_leftovers(out)
        with replacing_together(out) as folder:
            for part, name in zip(models, ("", SUPER_RESOLUTION), strict=False):
                part.write(folder / name, out.name)
    lines = []
    for part, name in zip(models, ("", f"/{SUPER_RESOLUTION}"), strict=False):
        num, missing = len(part.modalities), part.missing
        lines.append(f"{shown(out)}{name}: {num} modalities, {num - len(missing)} with a tokenizer")
        lines += [f"  {m} has no tokenizer: it is read and generated as ids" for m in missing]
    return "\n".join(lines)


@dataclasses.dataclass
class Part:
    """One model of a bundle, converted, with the tokenizers of its modalities."""

    weights: Path
    modalities: Modalities
    tokenizers: dict[str, Any]
    missing: list[str]

    @classmethod
    def read(cls, model: Path, sources: Sources, scratch: Path, presets: Mapping[str, Any]) -> Part:
        scratch.mkdir()
        weights = scratch / WEIGHTS
        convert_model(model, weights)
        _, modalities = read_description(TensorFile.read(weights))
        grids = grid_tokenizers(sources.tokenizers, modalities, scratch, presets)
        tokenizers: dict[str, Any] = {m.name: tokenizer for m, tokenizer in grids}
        parts = sequence_parts(sources.tokenizers, modalities, scratch, presets) if sources.text else {}
        recipes = untrained(modalities, sources.text, parts)
        tokenizers |= {name: recipe.fit([], seed=0) for name, recipe in recipes.items()}
        missing = [m for m in modalities if m.name not in tokenizers]
        tokenizers |= {m.name: IdsRecipe(modality=m).fit([], seed=0) for m in missing}
        return cls(weights, modalities, tokenizers, [m.name for m in missing])

    def write(self, folder: Path, name: str) -> None:
        folder.mkdir(exist_ok=True)
        shutil.copyfile(self.weights, folder / WEIGHTS)
        for m in self.modalities:
            save_tokenizer(self.tokenizers[m.name], tokenizer_file(folder, m))
        write_json(folder / "config.json", to_json(_config(name, self.modalities, self.tokenizers)))
        if folder.name == SUPER_RESOLUTION:
            write_digests(folder, [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()])


def _check_chain(base: Modalities, large: Modalities) -> None:
    """ValueError unless the second model reads something that the first one generates."""
    known = {m.name for m in base if m.is_target}
    reads = [m.name for m in large if m.is_input and m.name.startswith("tok_") and m.name.endswith("@224")]
    if not known & {*reads}:
        raise ValueError(
            f"the super-resolution model reads {', '.join(reads)}, none of which the first model generates: "
            f"{', '.join(sorted(known))}"
        )


def _same(a: Modality, b: Modality) -> bool:
    """Whether two modalities have one name, kind and vocabulary."""
    identity = lambda m: (type(m), m.name, m.signal, m.vocab_size, m.max_tokens)  # noqa: E731
    return identity(a) == identity(b)


def _config(name: str, modalities: Modalities, tokenizers: dict[str, Any]) -> Config:
    """The config of a bundle: its tokenizers, and a masking of everything from everything for further training."""
    inputs = {m.name: 1.0 for m in modalities if m.is_input}
    targets = {m.name: 1.0 for m in modalities if m.is_target}
    recipe = lambda t, m: getattr(t, "recipe", None) or IdsRecipe(modality=m)  # noqa: E731
    return Config(
        name=name,
        masking=Masking(num_inputs=256, num_targets=256, strategies=(Strategy(inputs=inputs, targets=targets),)),
        datasets=(),
        tokenizers=tuple(recipe(tokenizers[m.name], m) for m in modalities),
    )


def main(argv: list[str]) -> None:
    parser = parser_of("import", __doc__)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="files, folders, or ids of the Hugging Face hub")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the bundle, e.g. models/4m21_b")
    parser.add_argument("--presets", metavar="FILE", default="", help="JSON of architectures that configs name")
    args = parser.parse_args(argv)

    presets = read_presets(Path(args.presets)) if args.presets else {}
    logger.info(import_bundle(args.sources, Path(args.out), presets))
