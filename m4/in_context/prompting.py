"""Queries after labelled examples: answered freely, or by a choice among candidates.

    from m4.in_context import answer, score

    shots = [Shot(inputs={"rgb": image}, outputs={"caption": name}) for image, name in ((cup, "dax"), (bowl, "wug"))]
    answer(sampler, Shot(inputs={"rgb": other}), "caption", shots=shots)["caption"]
    score(sampler, [Shot(inputs={"rgb": other})], "caption", [["dax", "wug"]], shots=shots)

B queries, C candidates of each, n tokens of a candidate, N context slots
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from m4.in_context.shots import encode
from m4.inference.prompts import BadSamples, Context, check_plan, make_prompt, reason
from m4.inference.results import Results
from m4.inference.sampler import Sampler
from m4.inference.scheme import Stage
from m4.masking.episodes import Shot, inputs_of, pack_shots, question_answer_text
from m4.tokens.batch import Targets
from m4.tokens.modality import Modality, Sequence
from m4.tokens.packing import ANSWER, Record

BUDGET = 2048  # input tokens of a prompt


class ShotsDropped(UserWarning):
    """Some examples means no place in a prompt."""


def candidate_targets(candidates: Seq[Seq[np.ndarray]], m: Modality, index: int) -> Targets:
    """Ids of B queries' candidates as targets of a decoder, [B C n]."""
    shape = len(candidates), max(map(len, candidates)), max(len(ids) for row in candidates for ids in row)
    ids, valid = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for b, row in enumerate(candidates):
        for c, candidate in enumerate(row):
            ids[b, c, : len(candidate)], valid[b, c, : len(candidate)] = candidate, True
    previous = np.full(shape, -1, np.int32)
    if isinstance(m, Sequence):
        previous[..., 0], previous[..., 1:] = m.first_sentinel, ids[..., :-1]
    position, query = np.broadcast_to(np.arange(shape[2], dtype=np.int32), shape), np.zeros(shape, np.int32)
    return Targets(ids, previous, np.full(shape, index, np.int32), position, query, query, valid)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _score(graph, params, name, inputs, features, targets: Targets) -> Float[Array, "B C"]:
    """Mean log-probabilities of candidates [B C n] after prompts [B N]."""
    model = nnx.merge(graph, params)
    model.unstack()
    context = model.encode(inputs, features)
    hidden = jax.vmap(lambda t: model.decode(t, context), in_axes=1, out_axes=1)(targets)
    log_probability = jax.nn.log_softmax(model.logits(hidden, name))
    chosen = jnp.take_along_axis(log_probability, targets.ids[..., None], axis=-1)[..., 0]
    return (chosen * targets.valid).sum(-1) / jnp.maximum(targets.valid.sum(-1), 1)


def answer(
    sampler: Sampler,
    queries: Shot | Seq[Shot],
    target: str | Stage,
    *,
    shots: Seq[Shot] | Seq[Seq[Shot]] = (),
    num_tokens: int = 0,
    budget: int = BUDGET,
    seed: int = 0,
    indices: Seq[int] | None = None,
    progress: Callable[[range], Any] = lambda batches: batches,
) -> Results:
    """What labelled examples let the model say of queries (their outputs are not read), without a gradient step.

    `shots`: for all queries, or one list for each. `num_tokens`: of each image of the shots, coarse to fine
    (0: all). Shots that do not fit into `budget` input tokens beside the query are dropped whole, the oldest first,
    with a warning. A target that the query has as an input is a question, to be continued by its answer. The other
    arguments are those of `Sampler`.
    """
    (stage,) = sampler.plan([target])
    single = isinstance(queries, Shot)
    queries = [queries] if single else queries
    m, inputs = sampler.modalities.as_target(stage.target), inputs_of(queries)
    check_plan([stage], [n for n in inputs if sampler.modalities.as_input(n).name != m.name], sampler.modalities)
    numbers = sampler.check([stage], len(queries), seed, indices)
    prompts = build_prompts(sampler, queries, stage.target, shots, num_tokens, budget)
    inputs = sampler.read_all(inputs)
    out = Results(sampler, [stage.target], inputs, single)
    for first in progress(range(0, len(prompts), sampler.batch_size)):
        part = slice(first, first + sampler.batch_size)
        records, partial, contexts = zip(*prompts[part], strict=True)
        made = sampler.generate(records, [stage], seed, numbers[part], partial={m.name: partial}, contexts=contexts)
        out.add(without_questions(made, stage.target, m))
    if single:
        (out[stage.target],) = out[stage.target]
    return out


def without_questions(made: Results, target: str, m: Modality) -> Results:
    """Of texts that go on from a question, the answer alone."""
    if not isinstance(m, Sequence) or not m.num_declarations:
        return made
    for row, ids in enumerate(made.tokens[m.name]):
        (begins,) = np.nonzero(ids == m.first_declaration + ANSWER)
        if len(begins):
            made.tokens[m.name][row] = ids[begins[0] + 1 :]
            made.history[m.name][row] = made.history[m.name][row][begins[0] + 1 :]
            (made[target][row],) = made.sampler.tokenizers[m.name].decode([made.tokens[m.name][row]])
    return made


def score(
    sampler: Sampler,
    queries: Seq[Shot],
    target: str,
    candidates: Seq[Seq[Any]],
    *,
    shots: Seq[Shot] | Seq[Seq[Shot]] = (),
    num_tokens: int = 0,
    budget: int = BUDGET,
    calibrate: bool = False,
    progress: Callable[[range], Any] = lambda batches: batches,
) -> Float[np.ndarray, "B C"]:
    """Mean log-probability (nats a token) of each query's candidate answers; of fewer candidates than others, -inf.

    Every prompt is encoded once, whatever the number of its candidates. `calibrate`: less that of the same
    candidates after the same shots and a query without content, its question empty (contextual calibration, Zhao et al.
    2021).
    The other arguments are those of `answer`.
    """
    m = sampler.modalities.as_target(target)
    if len(candidates) != len(queries):
        raise ValueError(f"{len(candidates)} lists of candidates were given for {len(queries)} queries")
    for row in candidates:
        if isinstance(row, str) or not len(row):
            raise ValueError(f"candidates must be lists of at least one answer, one list for each query; got {row!r}")
    scores = np.full((len(queries), max(map(len, candidates), default=0)), -np.inf, np.float32)
    prompts = build_prompts(sampler, queries, target, shots, num_tokens, budget)
    for first in progress(range(0, len(queries), sampler.batch_size)):
        rows = range(first, min(first + sampler.batch_size, len(queries)))
        records, partial, contexts = zip(*prompts[rows.start : rows.stop], strict=True)
        prompt = make_prompt(records, partial, m, sampler.modalities, contexts=contexts)
        encoded = [sampler.tokenizers[m.name].encode(list(candidates[i])) for i in rows]
        targets = candidate_targets(encoded, m, sampler.modalities.index(m.name))
        # A short batch is filled up with its last row, for the sizes of those before to serve it.
        fill = np.minimum(np.arange(sampler.batch_size if first else len(rows)), len(rows) - 1)
        inputs, features, targets = jax.tree.map(lambda x, fill=fill: x[fill], (*prompt.rows(), targets))
        means = np.asarray(_score(sampler.graph, sampler.params, m.name, inputs, features, targets))
        if np.isnan(means[: len(rows)]).any():
            raise ValueError(f"{target}: the model's predictions are not finite; its weights are damaged")
        for row, i in enumerate(rows):
            scores[i, : len(candidates[i])] = means[row, : len(candidates[i])]
    if calibrate:
        is_question = lambda name: sampler.modalities.as_input(name).name == m.name  # noqa: E731
        empty = [Shot(inputs={n: "" for n in q.inputs if is_question(n)}) for q in queries]
        options: dict[str, Any] = {"shots": shots, "num_tokens": num_tokens, "budget": budget, "progress": progress}
        scores -= np.where(np.isfinite(scores), score(sampler, empty, target, candidates, **options), 0)
    return scores


def build_prompts(
    sampler: Sampler, queries: Seq[Shot], target: str, shots, num_tokens: int, budget: int
) -> list[tuple[Record, np.ndarray | None, Context]]:
    """Of each query its record, what is given of the target, and its context."""
    m, prompts, errors, num_dropped = sampler.modalities.as_target(target), [], {}, 0
    if num_tokens < 0:
        raise ValueError(f"num_tokens={num_tokens} must be at least 0 (all)")
    own = bool(shots) and not isinstance(shots[0], Shot)
    if own and len(shots) != len(queries):
        raise ValueError(f"{len(shots)} lists of shots were given for {len(queries)} queries")
    encoded = _encode_shots(sampler, [shot for row in shots for shot in row] if own else shots)
    for i, query in enumerate(queries):
        try:
            record, others, partial = _encode_query(sampler, query, m)
        except Exception as error:
            errors[i] = ", ".join(query.inputs), reason(error)
            continue
        examples = [encoded[id(shot)] for shot in (shots[i] if own else shots)]
        shown = [ids for r in (record, *others) for ids in r.values()] + ([] if partial is None else [partial])
        room = budget - sum(map(len, shown))
        packed, dropped = pack_shots(
            examples, sampler.modalities, budget=room, num_tokens=num_tokens, first_item=1 + len(others)
        )
        num_dropped = max(num_dropped, dropped)
        prompts.append((record, partial, Context(tuple(others), packed)))
    if errors:
        raise BadSamples(errors, len(queries))
    if num_dropped:
        warnings.warn(
            f"up to {num_dropped} of the oldest shots were dropped: they exceed the budget of {budget} input "
            "tokens; num_tokens gives each image fewer",
            ShotsDropped,
            stacklevel=3,
        )
    return prompts


def _encode_shots(sampler: Sampler, shots: Seq[Shot]) -> dict[int, list[Record]]:
    """Records by the id of each shot; ValueError says which cannot be encoded."""
    encoded = {}
    for number, shot in enumerate(shots, 1):
        if id(shot) not in encoded:
            try:
                encoded[id(shot)] = encode(shot, sampler.tokenizers, sampler.modalities)
            except Exception as error:
                raise ValueError(f"shot {number} cannot be read: {reason(error)}") from error
    return encoded


def _encode_query(sampler: Sampler, query: Shot, m: Modality) -> tuple[Record, list[Record], np.ndarray | None]:
    """A query's record, those of its further images, and what is given of the target: a question and -1."""
    record, *others = encode(Shot(inputs=query.inputs), sampler.tokenizers, sampler.modalities)
    partial = np.array([-1]) if isinstance(m, Sequence) else None
    for name in [n for n in query.inputs if sampler.modalities.as_input(n).name == m.name]:
        (ids,) = sampler.tokenizers[m.name].encode([question_answer_text(query.inputs[name], None, name)])
        assert isinstance(m, Sequence), "other targets are no inputs, too"
        if ids[-1] != m.end_id:
            raise ValueError(f"the question {query.inputs[name]!r} is longer than {m.name}, which has {m.max_length}")
        partial = np.append(ids[:-1], -1)
        record = {n: x for n, x in record.items() if n != m.name}
    return record, others, partial
