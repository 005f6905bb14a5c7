"""`python -m m4 demo`: a local page that generates any signals from any others. Needs the extra `demo` (Gradio)."""

from __future__ import annotations

import dataclasses
import logging
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, cast

import gradio as gr
import numpy as np
from PIL import Image
from starlette.middleware import Middleware

from m4.data.samples import fit_mask, kind_of
from m4.data.sources.pictures import to_rgb
from m4.demo.server import Guard, Hosts, Room, bounded, check_hosts, keep_temporary_files_in, refuse_large_pictures
from m4.inference.guidance import Guidance
from m4.inference.prompts import MASK
from m4.inference.results import Results
from m4.inference.sampler import Sampler, default_scheme
from m4.inference.scheme import Stage
from m4.tokens.modality import Grid, Sequence
from m4.tokens.spans import trim
from m4.tokens.tokenizer import WritesOut

logger = logging.getLogger(__name__)

UNKNOWN = 128  # grey of tokens that are not generated yet
PICTURE = 256  # pixels on the page
MAX_WAITING = 32  # clicks that wait for their turn


def build(sampler: Sampler, title: str, *, finished: Callable[[], Any] = lambda: None) -> gr.Blocks:
    """The page: an input for each signal on the left, the outputs on the right; `finished` is called after each run."""
    modalities = sampler.modalities
    inputs = [s for s in modalities.signals if any(m.is_input and m.signal == s for m in modalities)]
    targets = [s for s in modalities.signals if any(m.is_target and m.signal == s for m in modalities)]
    with gr.Blocks(title=f"m4: {title}", analytics_enabled=False) as page:
        gr.Markdown(
            f"## m4: {title}\nGive any of these, tick what to generate. Paint on a picture what is to be redone."
        )
        with gr.Row():
            with gr.Column(scale=2):
                given = {name: _input(sampler, name) for name in inputs}
            with gr.Column(scale=1):
                wanted = gr.CheckboxGroup(targets, label="generate", elem_id="targets")
                seed = gr.Number(0, label="seed", precision=0, elem_id="seed")
                steps = gr.Slider(1, 32, 8, step=1, label="steps (grids)", elem_id="steps")
                temperature = gr.Slider(0, 2, 0.7, step=0.05, label="temperature", elem_id="temperature")
                guidance = gr.Slider(1, 8, 1, step=0.5, label="guidance (1: none)", elem_id="guidance")
                button = gr.Button("Generate", variant="primary", elem_id="generate")
                status = gr.Textbox(label="status", interactive=False, elem_id="status")
            with gr.Column(scale=3):
                out = {n: gr.Image(label=n, visible=False, height=PICTURE, elem_id=f"out-{n}") for n in targets}
                text = gr.Textbox(label="in words", interactive=False, lines=3, elem_id="words")
                again = gr.Button("Edit the generated picture", visible=False, elem_id="edit")

        editable = next((n for n in inputs if n in out and isinstance(given[n], gr.ImageEditor)), "")

        def run(*values):
            signals = dict(zip(inputs, values, strict=False))
            try:
                yield from _generate(sampler, signals, *values[len(inputs) :], out, text, status, again, editable)
            finally:
                finished()

        button.click(
            run, [*given.values(), wanted, seed, steps, temperature, guidance], [*out.values(), text, status, again]
        )
        if editable:
            again.click(lambda picture: picture, out[editable], given[editable])
    return page


def _input(sampler: Sampler, name: str) -> Any:
    tokenizer = sampler.input_tokenizer(name)
    if isinstance(tokenizer.modality, Sequence):
        return gr.Textbox(label=name, elem_id=f"in-{name}", info=f"{MASK} stands for words to generate")
    if kind_of(tokenizer) == "image":
        editor = gr.ImageEditor(
            label=name, type="numpy", sources=["upload", "clipboard"], height=2 * PICTURE, elem_id=f"in-{name}",
            brush=gr.Brush(colors=["#ff00ff"], color_mode="fixed"), layers=False, transforms=(),
        )  # fmt: skip
        return bounded(editor)
    return gr.File(label=f"{name} (a file)", elem_id=f"in-{name}", height=80)


def _generate(
    sampler, values, wanted, seed, steps, temperature, guidance, out, text, status, again, editable
) -> Iterator[dict[Any, Any]]:
    """Updates of the page, one for each step."""
    seed = int(seed or 0)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            inputs, fixed = _read(sampler, values, wanted, Path(scratch))
        stages = [_stage(sampler, name, int(steps), temperature, guidance) for name in wanted]
        if not inputs:
            raise ValueError("give at least one input")
        if not stages:
            raise ValueError("tick at least one output")
    except ValueError as error:
        raise gr.Error(str(error)) from error
    events: queue.Queue = queue.Queue()

    def work():
        try:
            events.put(sampler(inputs, stages, keep=fixed, seed=seed, on_step=lambda *event: events.put(event)))
        except Exception as error:
            events.put(error)

    threading.Thread(target=work, daemon=True).start()
    yield {picture: gr.update(visible=name in wanted, value=None) for name, picture in out.items()} | {
        status: "compiling, at the first time", text: "", again: gr.update(visible=False)
    }  # fmt: skip
    while True:
        event = events.get()
        if isinstance(event, ValueError):
            raise gr.Error(str(event))
        if isinstance(event, Exception):
            raise event
        if isinstance(event, Results):
            texts = [event[n] if isinstance(event[n], str) else f"{n}: {_short(event[n])}" for n in event
                     if isinstance(sampler.modalities.as_target(n), Sequence)]  # fmt: skip
            yield {out[n]: _large(event.draw(n)) for n in event} | {
                text: "\n".join(texts), status: f"done, seed {seed}", again: gr.update(visible=editable in event)
            }  # fmt: skip
            return
        target, ids, known = event
        picture = _partial(sampler, target, ids[0], known[0])
        yield {out[target]: _large(picture), status: f"{target}: {int(known[0].sum())} tokens"}


def _read(sampler: Sampler, values: dict[str, Any], wanted: list[str], scratch: Path) -> tuple[dict, dict]:
    """Signals by name, and for images that are painted on the mask of the pixels that stay."""
    inputs, fixed = {}, {}
    for name, value in values.items():
        m, tokenizer = sampler.modalities.as_input(name), sampler.input_tokenizer(name)
        if isinstance(value, dict):  # from the image editor
            if value["background"] is None:
                continue
            picture, painted = _picture(value)
            if name in wanted:
                if not painted.any():
                    raise ValueError(f"{name} is given and asked for: paint on it what is to be redone, or untick it")
                fixed[name] = fit_mask(~painted, tokenizer)
            inputs[name] = scratch / f"{len(inputs)}.png"
            Image.fromarray(picture).save(inputs[name])
            continue
        if value is None or value == "":
            continue
        if not isinstance(m, Sequence):
            inputs[name] = Path(value)
            continue
        if not _is_text(sampler, m) and value.lstrip()[:1] not in ("[", "{", "#"):
            raise ValueError(f"{name} must be written out, as JSON; got {value[:60]!r}")
        if name in wanted and MASK not in value:
            raise ValueError(f"{name} is given and asked for: write {MASK} where it is to be generated, or untick it")
        inputs[name] = cast(WritesOut, tokenizer).from_text(value) if kind_of(tokenizer) else value
    return sampler.read_sample(inputs, words_name_files=False), fixed


def _is_text(sampler: Sampler, m: Sequence) -> bool:
    """Whether a sequence is plain text: the value of any other could name a file of this machine."""
    return isinstance(sampler.tokenizers[m.name].decode([np.array([m.end_id])])[0], str)


def _picture(value: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [H W 3], on white where it is transparent, and bool [H W], True where it was painted on."""
    background = np.asarray(value["background"])
    painted = [np.asarray(layer)[..., 3] > 0 for layer in value["layers"] if np.asarray(layer).shape[-1] == 4]
    return to_rgb(Image.fromarray(background)), np.any([np.zeros(background.shape[:2], bool), *painted], axis=0)


def _stage(sampler: Sampler, name: str, steps: int, temperature: float, guidance: float) -> Stage:
    m = sampler.modalities.as_target(name)
    scheme = default_scheme(m)
    if isinstance(m, Grid):
        scheme = dataclasses.replace(scheme, steps=steps, temperature=temperature)
    return Stage(target=name, scheme=scheme, guidance=Guidance(scale=guidance) if guidance != 1 else None)


def _partial(sampler: Sampler, target: str, ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The target so far, grey where it is not known yet."""
    m, tokenizer = sampler.modalities.as_target(target), sampler.tokenizer(target)
    if isinstance(m, Sequence):
        return tokenizer.draw(tokenizer.decode([trim(ids[known], m)])[0], image=None)
    picture = np.array(tokenizer.draw(tokenizer.decode([np.where(known, ids, 0)])[0], image=None))
    if len(m.shape) == 2 and not any(a % b for a, b in zip(picture.shape, m.shape, strict=False)):
        blocks = [a // b for a, b in zip(picture.shape, m.shape, strict=False)]
        picture[~np.kron(known.reshape(m.shape), np.ones(blocks, bool)).astype(bool)] = UNKNOWN
    return picture


def _large(picture: np.ndarray) -> np.ndarray:
    """Small pictures enlarged by a whole factor, so that their pixels are visible."""
    factor = max(PICTURE // max(picture.shape[:2]), 1)
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def _short(signal: Any) -> str:
    if isinstance(signal, dict) and "label" in signal:
        return ", ".join(signal["label"]) or "none"
    return str(signal)[:200]


def launch(
    sampler: Sampler, title: str, *, host: str, port: int, max_mb: int, max_storage_mb: int = 512,
    allowed_hosts: Seq[str] = (),
) -> None:  # fmt: skip
    """Serves until interrupted. No file outside the page's own uploads can be read, and none larger than `max_mb`.

    Uploads and results take `max_storage_mb` at most: the oldest are deleted. `allowed_hosts`: names of this machine,
    beside localhost and `host`, under which browsers may use the page.
    """
    if max_mb < 1 or max_storage_mb < max_mb:
        raise ValueError(f"an upload of {max_mb} MiB and storage of {max_storage_mb} MiB: at least 1, and storage more")
    hosts = Hosts(listens=host, allowed=check_hosts(allowed_hosts))
    with tempfile.TemporaryDirectory() as folder:  # uploads and results, deleted with the server
        keep_temporary_files_in(Path(folder))
        refuse_large_pictures()
        room = Room(Path(folder), max_storage_mb * 2**20)
        page = build(sampler, title, finished=room.tidy)
        page.queue(default_concurrency_limit=1, max_size=MAX_WAITING)
        page.launch(
            server_name=host, server_port=port or None, max_file_size=f"{max_mb}mb", allowed_paths=[],
            footer_links=[], show_error=True, quiet=True, prevent_thread_lock=True, ssr_mode=False, share=False,
            app_kwargs={"middleware": [Middleware(Guard, hosts=hosts, room=room)]},
        )  # fmt: skip
        logger.info(f"http://{host}:{page.server_port}")
        page.block_thread()
