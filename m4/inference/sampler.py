"""A trained model ready to use: raw signals in, raw signals out.

    from m4 import Sampler

    sampler = Sampler.load("runs/quickstart")
    results = sampler({"rgb": "photo.png"}, ["depth", "caption"])
    print(results["caption"])
    results.draw("depth")          # uint8 picture
    results.write("out")           # files

B rows, n tokens of the target, Q queries, G gallery, D width
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, Literal, cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from m4.checkpoints.runs import load_run
from m4.data.samples import read_sample, read_samples
from m4.distributed.mesh import MeshConfig
from m4.errors import check_seed, closest
from m4.inference.autoregressive import Autoregressive
from m4.inference.guidance import Guidance
from m4.inference.parallel import ROAR, MaskGIT
from m4.inference.prompts import MASK, BadSamples, Context, check_plan, encode_each, make_prompt, reason, token_mask
from m4.inference.results import Results
from m4.inference.scheme import GeneratedTokens, Prompt, Replay, Scheme, Stage
from m4.model.encoder_decoder import Model
from m4.tokens.modality import Features, Modality, Sequence
from m4.tokens.spans import fill_spans, show_spans, trim
from m4.tokens.tokenizer import CanAverage, Tokenizer


def keep_compiled() -> None:
    """Keeps compiled programs on disk for other processes (in JAX_COMPILATION_CACHE_DIR, else ~/.cache/m4)."""
    if not jax.config.jax_compilation_cache_dir:  # ty: ignore[missing-attribute]  made at import
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "m4"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def default_scheme(
    modality: Modality, grid_scheme: Literal["maskgit", "roar"] = "maskgit"
) -> Autoregressive | MaskGIT | ROAR:
    grids: dict[str, MaskGIT | ROAR] = {
        "maskgit": MaskGIT(temperature=0.7, top_p=0.9),
        "roar": ROAR(steps=16, temperature=0.7, top_p=0.9),
    }
    return Autoregressive() if isinstance(modality, Sequence) else grids[grid_scheme]


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4, 5, 6))
def _run(graph, params, scheme, modality, guidance, static, on_step, prompt, arrays, replay) -> GeneratedTokens:
    model = nnx.merge(graph, params)
    model.unstack()
    return scheme.generate(model, modality, prompt, guidance, static, arrays, replay, on_step)


def run_stage(
    graph: Any, params: Any, scheme: Scheme, modality: Modality, prompt: Prompt, seeds: Int[np.ndarray, "B k"],
    guidance: Guidance | None = None, replay: Replay | None = None, on_step: Callable | None = None,
) -> GeneratedTokens:  # fmt: skip
    """One stage on the device. `graph` and `params` are `nnx.split(model)`; on_step(ids, known) is called after every
    step."""
    static, arrays = scheme.prepare(modality, prompt, seeds)
    return _run(graph, params, scheme, modality, guidance, static, on_step, prompt, arrays, replay or Replay())


_callbacks: list[Callable] = []  # those of the running stage: an argument of _run would compile it for each callback
_callbacks_lock = threading.Lock()


def _report_step(ids: Int[Array, "B n"], known: Bool[Array, "B n"]) -> None:
    for callback in _callbacks:
        callback(ids, known)


@dataclasses.dataclass
class Sampler:
    """A trained model and its tokenizers. With several devices the rows of a batch are sharded over them."""

    model: Model
    tokenizers: dict[str, Tokenizer]
    batch_size: int = 64
    devices: Seq[Any] | None = None  # default: all of this process

    def __post_init__(self):
        if jax.config.jax_enable_x64:  # ty: ignore[missing-attribute]  made at import
            raise ValueError("generation is written for 32-bit numbers; leave JAX_ENABLE_X64 unset")
        self.num_rows = 0  # rows of the last batch that was compiled
        self.modalities = self.model.modalities
        devices = list(self.devices or jax.local_devices())
        self.mesh = MeshConfig().make(devices) if len(devices) > 1 else None
        self.graph, params = nnx.split(self.model)
        self.params = params if self.mesh is None else jax.device_put(params, NamedSharding(self.mesh, P()))

    @classmethod
    def load(cls, path: str | Path, *, batch_size: int = 64) -> Sampler:
        """The model of a run's folder, or one that comes with m4, by its name."""
        run = load_run(Path(path))
        return cls(run.model, run.tokenizers, batch_size)

    def tokenizer(self, target: str) -> Tokenizer:
        return self.tokenizers[self.modalities.as_target(target).name]

    def input_tokenizer(self, name: str) -> Tokenizer:
        """An input's tokenizer, by signal or modality, perhaps with a tag ("caption#not")."""
        return self.tokenizers[self.modalities.as_input(name.partition("#")[0]).name]

    def plan(self, targets: Seq[str | Stage]) -> list[Stage]:
        """Names become stages with the default scheme of their kind."""
        named = lambda t: Stage(target=t, scheme=default_scheme(self.modalities.as_target(t)))  # noqa: E731
        return [t if isinstance(t, Stage) else named(t) for t in targets]

    def __call__(
        self,
        inputs: Mapping[str, Any],
        targets: Seq[str | Stage],
        *,
        keep: Mapping[str, Any] | None = None,
        seed: int = 0,
        indices: Seq[int] | None = None,
        progress: Callable[[range], Any] = lambda batches: batches,
        on_step: Callable[[str, np.ndarray, np.ndarray], None] | None = None,
    ) -> Results:
        """Raw signals in (a list by name, all of one length; or single ones), raw signals out.

        A signal is what its tokenizer takes, or a file (None: this sample lacks it); for texts and labels only a
        pathlib.Path is a file. Names are of signals or modalities; "caption#not" is another caption, for guidance.
        Stages run in the given order, and each sees what those before generated. One `seed` gives the same results,
        whatever the batches and devices.

        `keep`: the fixed part of an input that is also a target: a mask (bool [H W] of pixels or tokens, True = fixed),
        or the share of its tokens that is fixed, at random (variations). Of a text all but [MASK] is fixed.
        `indices`: each sample's index in random streams (default: 0, 1, ...). `progress` may wrap the batches (tqdm);
        on_step(target, ids [B n], known [B n]) is called after every step.
        """
        keep = dict(keep or {})
        texts = {n: v if isinstance(v, list) else [v] for n, v in inputs.items()}
        masked = {n for n, v in texts.items() if any(isinstance(t, str) and MASK in t for t in v)}
        for name in keep:
            if name not in inputs:
                raise ValueError(f"keep names {name!r}, which is not given; {closest(name, list(inputs))}")
        stages = self.plan(targets)
        check_plan(stages, list(inputs), self.modalities, [*keep, *masked])
        single = not any(isinstance(v, list) for v in inputs.values())
        lengths = {name: len(v) for name, v in texts.items()}
        if len(set(lengths.values())) > 1 or 0 in lengths.values():
            raise ValueError(f"inputs must be non-empty lists of one length; got {lengths}")
        count = max(lengths.values(), default=1)
        sample_indices = self.check(stages, count, seed, indices)
        read = self.read_all(texts)
        fixed = {**dict.fromkeys(masked), **keep}
        masks = {name: self._masks(name, value, count) for name, value in fixed.items()}
        partial = self._partial(read, masks, seed, sample_indices)
        records = self.encode({n: v for n, v in read.items() if n not in masks}, count)
        out = Results(self, [s.target for s in stages], read, single)
        for first in progress(range(0, count, self.batch_size)):
            part = slice(first, first + self.batch_size)
            known = {name: values[part] for name, values in partial.items()}
            batch = records[part], stages, seed, sample_indices[part]
            out.add(self.generate(*batch, partial=known, on_step=on_step))
        for name in out if single else ():
            out[name] = out[name][0]
        return out

    def check(self, stages: Seq[Stage], count: int, seed: int, indices: Seq[int] | None) -> Int[np.ndarray, " B"]:
        """The samples' indices. ValueError for what `check_plan` cannot check."""
        for stage in stages:
            if stage.ensemble > 1 and not hasattr(tokenizer := self.tokenizer(stage.target), "average"):
                raise ValueError(f"ensemble={stage.ensemble}: {type(tokenizer).__name__} cannot average {stage.target}")
        check_seed(seed)
        sample_indices = np.arange(count) if indices is None else np.asarray(indices)
        if len(sample_indices) != count:
            raise ValueError(f"{len(sample_indices)} indices were given for {count} samples")
        return sample_indices

    def read(self, name: str, signal: Any) -> Any:
        """A signal from its file; anything else unchanged."""
        return self.read_all({name: [signal]})[name][0]

    def read_sample(self, values: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        """One sample's signals by name; for `options` see `m4.data.samples.read_sample`."""
        return read_sample(values, {name: self.input_tokenizer(name) for name in values}, **options)

    def read_all(self, inputs: Mapping[str, Seq[Any]]) -> dict[str, list[Any]]:
        """Lists of one length, each sample with one geometry; a str never names a text file."""
        return read_samples(inputs, {name: self.input_tokenizer(name) for name in inputs})

    def encode(self, inputs: Mapping[str, Seq[Any]], count: int = 0) -> list[dict[str, np.ndarray]]:
        """Raw signals -> stored arrays by modality, one dict a sample, without those that are None.

        `BadSamples` names the samples that cannot be encoded.
        """
        records: list[dict[str, np.ndarray]] = [{} for _ in range(count or max(map(len, inputs.values()), default=0))]
        errors = {}
        for name, signals in inputs.items():
            base, hash_, tag = name.partition("#")
            m = self.modalities.as_input(base)
            if tag and isinstance(m, Features):
                raise ValueError(
                    f"{name!r}: of {m.name} there can be only one; allowed: tokens, such as those of texts"
                )
            present = [i for i, s in enumerate(signals) if s is not None]
            encoded, bad = encode_each(self.tokenizers[m.name], [signals[i] for i in present])
            errors.update({present[k]: (name, message) for k, message in bad.items()})
            for i, ids in zip(present, encoded, strict=not bad):
                records[i][m.name + hash_ + tag] = ids
        if errors:
            raise BadSamples(errors, len(records))
        return records

    def _masks(self, name: str, value: Any, count: int) -> list[Any]:
        """One mask (or share) for each sample."""
        if isinstance(value, list):
            if len(value) != count:
                raise ValueError(f"keep of {name!r} has {len(value)} masks for {count} samples")
            return value
        return [value] * count

    def _partial(self, read, masks, seed: int, sample_indices: Seq[int] | np.ndarray) -> dict[str, list[np.ndarray]]:
        """Ids of partly given signals by modality, -1 where they are to be generated."""
        partial, errors = {}, {}
        for name, masks_of_samples in masks.items():
            m = self.modalities.as_target(name)
            partial[m.name] = [None] * len(masks_of_samples)
            for i, (signal, mask) in enumerate(zip(read[name], masks_of_samples, strict=True)):
                if signal is None:
                    continue
                try:
                    is_text = isinstance(m, Sequence)
                    ids = self._partial_text(m, signal) if is_text else self.tokenizers[m.name].encode([signal])[0]
                except Exception as error:
                    errors[i] = name, reason(error)
                    continue
                if not isinstance(m, Sequence):
                    fixed = token_mask(mask, m, np.random.default_rng([seed, sample_indices[i]]))
                    ids = np.where(fixed, ids, -1)
                partial[m.name][i] = ids
        if errors:
            raise BadSamples(errors, len(sample_indices))
        return partial

    def _partial_text(self, m: Sequence, text: str) -> np.ndarray:
        """Ids with -1 for each [MASK]; the end is open only after a [MASK]."""
        if MASK not in text:
            raise ValueError(f"{m.name} {text!r} is given in part, but has no {MASK}")
        pieces = text.split(MASK)
        encoded = self.tokenizers[m.name].encode(pieces)
        ids = [np.append(e[:-1], -1) for e in encoded[:-1]]
        return np.concatenate([*ids, encoded[-1] if pieces[-1] else encoded[-1][:-1]]).astype(np.int32)

    def generate(
        self,
        records: Seq[dict[str, np.ndarray]],
        stages: Seq[Stage],
        seed: int,
        indices: Seq[int] | np.ndarray,
        *,
        partial: Mapping[str, Seq[np.ndarray | None]] | None = None,
        contexts: Seq[Context] | None = None,
        on_step: Callable[[str, np.ndarray, np.ndarray], None] | None = None,
    ) -> Results:
        """One batch of encoded conditions through all stages; `indices`: the samples' indices in random streams.

        `partial`: ids of partly given signals by modality, -1 where they are to be generated. `contexts`: what is read
        beside each sample, such as in-context examples.
        """
        out, partial, indices = Results(self, [s.target for s in stages], {}, False), partial or {}, np.asarray(indices)
        records, generated_names = [dict(r) for r in records], []
        for name, known in partial.items():  # earlier stages see the given part of a later target
            m = self.modalities.named(name)
            for record, part in zip(records, known, strict=True):
                if part is not None:
                    record[name] = show_spans(part, m)[0] if isinstance(m, Sequence) else part
        for s, stage in enumerate(stages):
            m = self.modalities.as_target(stage.target)
            tokenizer = self.tokenizers[m.name]
            grammar = getattr(tokenizer, "grammar", None)
            known = partial[m.name] if m.name in partial else [None] * len(records)
            # Its own given tokens are no input of a stage: `make_prompt` adds them as the target's.
            others = [{name: ids for name, ids in record.items() if name != m.name} for record in records]
            samples = []
            for member in range(stage.ensemble):
                prompt = make_prompt(
                    others, known, m, self.modalities, stage.guidance, generated_names, grammar, contexts
                )
                generated = self._on_device(stage, m, prompt, [seed, s, member], indices, on_step)
                samples.append(self._finish(m, generated, known))
            ids, log_probability, history = samples[0]
            if stage.ensemble > 1:
                decoded = [tokenizer.decode(ids) for ids, _, _ in samples]
                signals = [cast(CanAverage, tokenizer).average(list(group)) for group in zip(*decoded, strict=True)]
                ids = tokenizer.encode(signals)
                for i, part in enumerate(known):  # fixed tokens stay, whatever the average
                    if part is not None:
                        ids[i] = np.where(part >= 0, part, ids[i])
                        (signals[i],) = tokenizer.decode([ids[i]])
            else:
                signals = self._decode(tokenizer, ids, log_probability)
            for record, row in zip(records, ids, strict=True):
                record[m.name] = row
            generated_names.append(m.name)
            out[stage.target].extend(signals)
            out.tokens.setdefault(m.name, []).extend(ids)
            out.history.setdefault(m.name, []).extend(history)
        return out

    def _on_device(self, stage, m, prompt: Prompt, seeds: list[int], indices, on_step) -> GeneratedTokens:
        """One compilation serves every batch: a short one is padded with its last row. `seeds`: seed, stage, member.

        With `on_step` one device computes, so that its calls come in order.
        """
        num = full = len(indices)
        mesh = None if on_step is not None else self.mesh
        if num < self.num_rows <= 4 * num:
            full = self.num_rows
        if mesh is not None:
            full = math.ceil(full / mesh.size) * mesh.size
        self.num_rows = full
        rows, grammar = np.minimum(np.arange(full), num - 1), prompt.grammar
        prompt = jax.tree.map(lambda x: np.asarray(x)[rows], prompt._replace(grammar=None))
        seed, *rest = seeds
        static, arrays = stage.scheme.prepare(
            m, prompt._replace(grammar=grammar), np.array([[seed, i, *rest] for i in indices[rows]])
        )
        report = None if on_step is None else _report_step
        params = self.params
        if self.mesh is not None and mesh is None:
            params = jax.device_put(params, self.mesh.devices.flat[0])
        run = functools.partial(_run, self.graph, params, stage.scheme, m, stage.guidance, static, report)
        if mesh is not None:
            prompt = jax.device_put(prompt, NamedSharding(mesh, P("data")))
        prompt = prompt._replace(grammar=grammar)
        if on_step is None:
            with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
                out = jax.device_get(run(prompt, arrays, Replay()))
        else:
            with _callbacks_lock:
                _callbacks[:] = [functools.partial(on_step, stage.target)]
                try:
                    out = jax.device_get(run(prompt, arrays, Replay()))
                    jax.effects_barrier()
                finally:
                    _callbacks.clear()
        if np.isnan(out.log_probability[:num]).any():
            raise ValueError(f"{stage.target}: the model's predictions are not finite; are its weights damaged?")
        return GeneratedTokens(*(x[:num] for x in out))

    def _finish(self, m: Modality, generated: GeneratedTokens, known: Seq[np.ndarray | None]):
        """Ids as tokenizers take them, their log-probabilities, and the step in which each was decoded.

        A generated sequence holds its spans one after another; each fills its gap in the given part.
        """
        if not isinstance(m, Sequence):
            return list(generated.ids), generated.log_probability, list(generated.step)
        ids = []
        for row, part in zip(generated.ids, known, strict=True):
            if part is None:
                ids.append(trim(row, m, generated.ids.shape[1] - 1))
            else:
                given, num_spans, _ = show_spans(part, m)
                (stop,) = np.nonzero((row == m.end_id) | (row == m.first_sentinel + num_spans))
                row = row[: stop[0] + (row[stop[0]] == m.end_id)] if len(stop) else row
                filled = fill_spans(given, row, m)
                ids.append(filled if filled[-1:] == m.end_id else np.append(filled, m.end_id))
        return ids, generated.log_probability, [np.arange(len(i)) for i in ids]

    def _decode(self, tokenizer: Tokenizer, ids: list[np.ndarray], log_probability: Float[np.ndarray, "B n"]) -> list:
        decode = getattr(tokenizer, "decode_with_scores", None)
        if decode is not None and all(len(i) <= log_probability.shape[1] for i in ids):
            return [decode(i, lp[: len(i)]) for i, lp in zip(ids, log_probability, strict=True)]
        return tokenizer.decode(ids)
