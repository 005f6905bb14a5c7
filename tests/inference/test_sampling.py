"""Generation: the original's tokens, caches that change nothing, rows independent of their batch, what is kept."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import parity_run
import pytest
from conftest import ROOT
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from m4.inference.autoregressive import Autoregressive
from m4.inference.guidance import Guidance
from m4.inference.parallel import ROAR, MaskGIT, token_schedule
from m4.inference.parallel import temperature_schedule as temperatures
from m4.inference.prompts import check_plan, in_buckets, make_prompt
from m4.inference.sampler import Sampler, _run, run_stage
from m4.inference.scheme import Replay, Stage
from m4.inference.token_sampling import TokenSampling, _inverse_distribution
from m4.model.encoder_decoder import Model
from m4.representations.nearest import retrieve
from m4.tokens.batch import Targets
from m4.tokens.grammar import Grammar
from m4.tokens.modality import Sequence
from m4.tokens.packing import pack
from m4.tokens.spans import fill_spans, show_spans, trim
from m4_tokenizers.modalities.boxes import BoxRecipe
from m4_tokenizers.modalities.metadata import MetadataRecipe
from m4_tokenizers.modalities.palette import PaletteRecipe
from m4_tokenizers.modalities.stored import Ids

PARITY = Path(os.environ.get("M4_PARITY", ROOT.parent / "shared" / "parity"))
FAST = ("ar_caption_sampled",)  # one case of each kind of scheme takes half a minute to compile: the others are slow
CASES = sorted(p.name for p in (ROOT / "tests/parity/generation").iterdir() if p.is_dir())


@pytest.fixture(scope="module")
def model(small_model, modalities):
    model = Model(small_model, modalities, rngs=nnx.Rngs(3))
    # Larger tables: else all tokens are about equally likely, and rounding decides.
    model.token_embedding[...] = 20 * model.token_embedding[...]
    return model


@pytest.fixture(scope="module")
def sampler(model, modalities):
    return Sampler(model, {m.name: Ids(modality=m, card={}) for m in modalities}, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def records(make_example):
    """Prompts of different modalities and lengths."""
    subsets = [("rgb_pixels",), ("caption",), ("rgb_pixels", "caption"), ("rgb_tokens",), ("rgb_tokens", "rgb_pixels")]
    return [{n: make_example(i)[n] for n in subsets[i % len(subsets)]} for i in range(10)]


# ---- The original ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_tokens_equal_the_original(name):
    folder = ROOT / "tests/parity/generation" / name
    ours, theirs = parity_run.run(folder), np.load(folder / "outputs.npz")
    assert set(theirs.files) <= set(ours)
    for key in theirs.files:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


def test_schedules_equal_the_original():
    expected = json.loads((ROOT / "tests/parity/generation/schedules.json").read_text())
    for kind in ("cosine", "linear"):
        for steps, total, counts in expected[f"{kind}_schedule"]:
            np.testing.assert_array_equal(token_schedule(kind, steps, total), counts)
    for first, counts, values in expected["linear_temp"]:
        np.testing.assert_allclose(temperatures("linear", counts, first, 0.0, 0.5), values, rtol=1e-12)
    for first, last, power, counts, values in expected["onex_temp"]:
        np.testing.assert_allclose(temperatures("power", counts, first, last, power), values, rtol=1e-12)


@given(st.sampled_from(["maskgit", "cosine", "linear"]), st.integers(1, 200), st.integers(1, 800))
def test_every_schedule_decodes_every_token_once(kind, steps, total):
    counts = token_schedule(kind, min(steps, total), total)
    assert counts.sum() == total and counts.min() >= 0 and len(counts) == min(steps, total)


# ---- Drawing --------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([{"top_k": 3}, {"top_k": 0.2}, {"top_p": 0.6}, {"min_p": 0.3}]))
def test_filters_equal_their_definition(seed, fields):
    logits = np.random.default_rng(seed).normal(0, 2, 40).astype(np.float32)
    kept = np.isfinite(np.asarray(TokenSampling(**fields).filtered(jnp.asarray(logits)[None])[0]))
    p = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum()
    order = np.argsort(-p)
    if "top_k" in fields:
        k = fields["top_k"] if fields["top_k"] >= 1 else int(fields["top_k"] * 40)
        expected = np.isin(np.arange(40), order[:k])
    elif "top_p" in fields:
        expected = np.isin(np.arange(40), order[np.cumsum(p[order]) - p[order] <= fields["top_p"]])
    else:
        expected = p >= fields["min_p"] * p.max()
    np.testing.assert_array_equal(kept, expected)


@pytest.mark.parametrize("size", [5, 128, 300])
def test_draws_follow_the_distribution(size):
    """Frequencies of 200,000 draws within 5 standard errors; what is filtered out never comes."""
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 1.5, size), jnp.float32)
    sampling, count = TokenSampling(temperature=0.7, top_p=0.95), 200_000
    u = jax.random.uniform(jax.random.key(0), (count,))
    ids, log_probability = jax.jit(lambda u: sampling.draw(jnp.broadcast_to(logits, (count, size)), 0.7, u))(u)
    p = np.asarray(jax.nn.softmax(sampling.filtered(logits[None])[0] / 0.7), float)
    frequency = np.bincount(np.asarray(ids), minlength=size) / count
    assert (np.abs(frequency - p) <= 5 * np.sqrt(p * (1 - p) / count) + 1e-9).all()
    np.testing.assert_allclose(np.exp(log_probability), p[np.asarray(ids)], rtol=1e-3)


# ---- Caches, batches, devices ---------------------------------------------------------------------------------------


def uncached(model, records, modality, noise, modalities):
    """Decoding that runs the whole prefix for each token: the most likely, or the likeliest with Gumbel noise."""
    inputs, features = jax.tree.map(jnp.asarray, in_buckets([pack([r], [0], modalities) for r in records], modalities))
    length = len(noise)
    index = jnp.full((len(records), length), modalities.index(modality.name))
    position = jnp.broadcast_to(jnp.arange(length), index.shape)

    @jax.jit
    def step(previous, t):
        targets = Targets(previous, previous, index, position, 0 * index, 0 * index, index >= 0)
        hidden = model.decode(targets, model.encode(inputs, features))
        return (model.logits(hidden, modality.name)[:, t] + noise[t]).argmax(-1)

    previous, out = np.full((len(records), length), modality.first_sentinel), []
    for t in range(length):
        out.append(np.asarray(step(jnp.asarray(previous), t)))
        if t + 1 < length:
            previous[:, t + 1] = out[-1]
    return np.stack(out, axis=1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_decoding_equals_uncached_on_100_prompts(model, modalities, make_example, temperature):
    names = [("rgb_pixels",), ("rgb_tokens",), ("rgb_tokens", "depth_tokens"), ("depth_tokens", "rgb_pixels")]
    records = [{n: make_example(i)[n] for n in names[i % 4]} for i in range(100)]
    m = modalities.named("caption")
    noise = jax.random.gumbel(jax.random.key(0), (m.max_length + 1, 100, m.vocab_size)) * temperature
    prompt, scheme = make_prompt(records, [None] * 100, m, modalities), Autoregressive(temperature=temperature)
    out = run_stage(*nnx.split(model), scheme, m, prompt, np.arange(100)[:, None], replay=Replay(noise=noise))
    rows = [trim(row, m) for row in np.asarray(out.ids)]
    assert temperature == 0 or len({len(i) for i in rows}) > 5  # rows end at different steps
    for row, raw in zip(rows, uncached(model, records, m, noise, modalities), strict=True):
        np.testing.assert_array_equal(row, trim(raw, m))


SCHEMES = [
    ("depth_tokens", MaskGIT(steps=4, choice_temperature=2.0)),
    ("depth_tokens", ROAR(steps=5, top_k=3, temperature_schedule="linear")),
    ("caption", Autoregressive(temperature=1.0, top_p=0.9)),
]


@pytest.mark.parametrize("target,scheme", SCHEMES)
def test_a_batch_equals_its_rows_alone(sampler, records, target, scheme):
    """With guidance too; another seed gives others."""
    stages = [Stage(target=target, scheme=scheme, guidance=Guidance(scale=2.0))]
    together = sampler.generate(records, stages, 7, range(10))[target]
    for i in (0, 3, 7):
        sampler.num_rows = 0
        np.testing.assert_array_equal(sampler.generate(records[i : i + 1], stages, 7, [i])[target][0], together[i])
    other = sampler.generate(records, stages, 8, range(10))[target]
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(together, other, strict=True))


@pytest.mark.parametrize("target,scheme", SCHEMES)
def test_two_devices_equal_one(sampler, records, target, scheme):
    two = Sampler(sampler.model, sampler.tokenizers, devices=jax.devices()[:2])
    stages = [Stage(target=target, scheme=scheme), Stage(target="rgb_tokens", scheme=ROAR(steps=2))][:1]
    for a, b in zip(*(s.generate(records[:5], stages, 1, range(5))[target] for s in (sampler, two)), strict=True):
        np.testing.assert_array_equal(a, b)


# ---- Guidance -------------------------------------------------------------------------------------------------------


def first_logits(model, modalities, record, target="depth_tokens"):
    """Of all positions of an empty grid."""
    inputs, features = jax.tree.map(jnp.asarray, in_buckets([pack([record], [0], modalities)], modalities))
    num = modalities.named(target).max_tokens
    position = jnp.arange(num)[None]
    index = jnp.full((1, num), modalities.index(target))
    targets = Targets(0 * index, 0 * index - 1, index, position, 0 * index, 0 * index, index >= 0)
    return model.logits(model.decode(targets, model.encode(inputs, features)), target)


@pytest.mark.parametrize(
    "guidance,combine",
    [
        (Guidance(scale=3.0), lambda f: f() + 3 * (f("caption", "rgb_tokens") - f())),
        (Guidance(scale=3.0, drop=("caption",)), lambda f: -2 * f("rgb_tokens") + 3 * f("caption", "rgb_tokens")),
        (
            Guidance(scale=(("caption", 2.0), ("rgb_tokens", -1.0))),
            lambda f: f() + 2 * (f("caption") - f()) - (f("rgb_tokens") - f()),
        ),
        (
            Guidance(scale=(("caption", 2.0), ("caption#not", -0.5))),
            lambda f: f("rgb_tokens") * -0.5 + 2 * f("caption", "rgb_tokens") - 0.5 * f("not", "rgb_tokens"),
        ),
    ],
)
def test_guidance_is_the_weighted_sum_of_its_passes(model, modalities, make_example, guidance, combine):
    example, other = make_example(0), make_example(1)
    record = {"caption": example["caption"], "rgb_tokens": example["rgb_tokens"]}
    if "not" in str(guidance):
        record["caption#not"] = other["caption"]

    def logits(*names):
        given = {n: record[n] for n in names if n != "not"} | ({"caption": other["caption"]} if "not" in names else {})
        return first_logits(model, modalities, given)

    m = modalities.named("depth_tokens")
    prompt = make_prompt([record], [None], m, modalities, guidance)
    graph, params = nnx.split(model)
    scheme = ROAR(steps=1, temperature=0)
    ids, log_probability, _ = run_stage(graph, params, scheme, m, prompt, np.array([[0]]), guidance)
    expected = jax.nn.log_softmax(combine(logits))[0]
    np.testing.assert_array_equal(ids[0], expected.argmax(-1))
    np.testing.assert_allclose(log_probability[0], expected.max(-1), atol=1e-4)


def test_scales_rise_along_the_steps():
    for schedule in ("linear", "cosine"):
        weights = np.asarray(Guidance(scale=5.0, schedule=schedule).weights(jnp.linspace(0, 1, 5)))
        np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
        np.testing.assert_allclose(weights[[0, -1], 1], [1, 5], atol=1e-6)
        assert (np.diff(weights[:, 1]) > 0).all()


def test_growing_guidance_also_drops_what_was_generated(sampler, records):
    """With all inputs dropped alone, the generated depth still conditions the pass without; growing drops it too."""
    stages = lambda grow: [  # noqa: E731
        Stage(target="depth_tokens", scheme=MaskGIT(steps=2)),
        Stage(target="caption", scheme=Autoregressive(), guidance=Guidance(scale=4.0, grow=grow)),
    ]
    a, b = (sampler.generate(records[2:3] * 8, stages(g), 0, range(8))["caption"] for g in (False, True))
    assert any(len(x) != len(y) or (x != y).any() for x, y in zip(a, b, strict=True))


# ---- Partial inputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [MaskGIT(steps=3), ROAR(steps=4)])
def test_editing_keeps_what_it_was_told_to(sampler, make_example, scheme):
    """Bit for bit; the rest is generated; rows with different masks do not disturb each other."""
    ids = [make_example(i)["depth_tokens"].astype(np.int32) for i in range(5)]
    rng = np.random.default_rng(0)
    masks = [rng.random((3, 4)) < share for share in (0.0, 0.2, 0.5, 0.9, 1.0)]
    captions = [make_example(i)["caption"] for i in range(5)]
    stages = [Stage(target="depth_tokens", scheme=scheme)]
    edit = lambda rows: sampler(  # noqa: E731
        {"depth_tokens": [ids[i] for i in rows], "caption": [captions[i] for i in rows]}, stages,
        keep={"depth_tokens": [masks[i] for i in rows]}, indices=rows,
    )  # fmt: skip
    out = edit(range(5))
    for i in range(5):
        new, kept = out["depth_tokens"][i], masks[i].ravel()
        np.testing.assert_array_equal(new[kept], ids[i][kept])
        np.testing.assert_array_equal(out.history["depth_tokens"][i] < 0, kept)
        np.testing.assert_array_equal(edit([i])["depth_tokens"][0], new)
    assert (out["depth_tokens"][0] != ids[0]).any()
    fine = sampler({"depth_tokens": [ids[1]]}, stages, keep={"depth_tokens": np.repeat(masks[1], 4, axis=1)})
    np.testing.assert_array_equal(fine["depth_tokens"][0][masks[1].ravel()], ids[1][masks[1].ravel()])


def test_what_is_kept_is_context_of_earlier_stages_and_survives_an_average(model, modalities, make_example):
    class Averaging(Ids):
        def average(self, signals):
            return np.zeros_like(signals[0])

    sampler = Sampler(model, {m.name: Averaging(modality=m, card={}) for m in modalities}, devices=jax.devices()[:1])
    ids, keep = [make_example(i)["depth_tokens"].astype(np.int32) for i in range(16)], {"depth_tokens": 0.5}
    chain = [
        Stage(target="rgb_tokens", scheme=MaskGIT(steps=1)),
        Stage(target="depth_tokens", scheme=MaskGIT(steps=2), ensemble=2),
    ]
    out = sampler({"depth_tokens": ids}, chain, keep=keep, indices=[0] * 16)  # equal but for what they are given
    assert len({tuple(i) for i in out["rgb_tokens"]}) > 1
    for new, old, when in zip(out["depth_tokens"], ids, out.history["depth_tokens"], strict=True):
        np.testing.assert_array_equal(new, np.where(when < 0, old, 0))
    with pytest.raises(ValueError, match="is no target"):
        sampler({"depth_tokens": ids}, ["caption"], keep=keep)
    plain = Sampler(model, {m.name: Ids(modality=m, card={}) for m in modalities}, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="cannot average"):
        plain({"depth_tokens": ids}, [dataclasses.replace(chain[0], ensemble=2)])


def test_variations_keep_a_share(sampler, make_example):
    ids = make_example(0)["depth_tokens"].astype(np.int32)
    out = sampler(
        {"depth_tokens": [ids] * 6}, [Stage(target="depth_tokens", scheme=ROAR())], keep={"depth_tokens": 0.5}
    )
    assert [(h < 0).sum() for h in out.history["depth_tokens"]] == [6] * 6
    assert len({tuple(i) for i in out["depth_tokens"]}) > 3
    with pytest.raises(ValueError, match="share within"):
        sampler({"depth_tokens": ids}, ["depth_tokens"], keep={"depth_tokens": 1.5})


@given(st.lists(st.booleans(), min_size=1, max_size=9))
def test_spans_are_shown_and_filled_again(masked):
    m = Sequence(name="s", signal="s", vocab_size=99, max_length=10, first_sentinel=5, num_sentinels=8, end_id=3)
    masked = np.append(masked, False)
    ids = np.append(np.arange(20, 20 + len(masked) - 1), 3)
    if not masked.any():
        return
    shown, count, open_end = show_spans(np.where(masked, -1, ids), m)
    assert not open_end and count == (np.diff(np.append(False, masked).astype(int)) == 1).sum()
    # One sentinel between spans, as the decoder writes them.
    spans = [ids[s] for s in np.ma.clump_unmasked(np.ma.array(ids, mask=~masked))]
    joined = np.concatenate([np.append(s, 6 + k) for k, s in enumerate(spans)])[:-1]
    np.testing.assert_array_equal(fill_spans(shown, joined, m), ids)


def test_infilling_keeps_the_rest_of_a_sequence(sampler, modalities):
    m = modalities.named("caption")
    part = np.array([20, -1, 21, -1, 3], np.int32)
    sampler_ids = []
    for seed in range(20):
        prompt = make_prompt([{}], [part], m, modalities)
        seeds = np.array([[seed]])
        out = jax.device_get(
            run_stage(sampler.graph, sampler.params, Autoregressive(temperature=2.0), m, prompt, seeds)
        )
        ((ids,), _, _) = sampler._finish(m, out, [part])
        assert ids[0] == 20 and ids[-1] == 3 and 21 in ids[1:-1]
        assert not ((ids >= 5) & (ids < 13)).any()
        sampler_ids.append(tuple(ids))
    assert len({*sampler_ids}) > 5


# ---- Grammars -------------------------------------------------------------------------------------------------------


def grammatical(recipe, source):
    tokenizer = recipe.fit(source, seed=0)
    return tokenizer, tokenizer.grammar


LABELS = [{"boxes": {"bbox": np.array([[0.1, 0.1, 0.5, 0.5]], np.float32), "label": [n]}} for n in ("cube", "cone")]


@pytest.mark.parametrize(
    "recipe,source",
    [
        (BoxRecipe(), LABELS),
        (PaletteRecipe(), [{"palette": np.zeros((3, 3), np.uint8)}]),
        (MetadataRecipe(), [{"metadata": {}}]),
    ],
)
@pytest.mark.parametrize("count", [500, pytest.param(3400, marks=pytest.mark.slow)])
def test_constrained_outputs_parse(recipe, source, count, small_model, modalities):
    """Of an untrained model at a high temperature: whatever it writes is read back, and written again the same."""
    from m4.tokens.modality import Modalities

    tokenizer, grammar = grammatical(recipe, source)
    m = tokenizer.modality
    together = Modalities([modalities.named("depth_tokens"), m])
    graph, params = nnx.split(Model(small_model, together, rngs=nnx.Rngs(0)))
    scheme = Autoregressive(temperature=5.0)
    plain = Sampler(nnx.merge(graph, params), {m.name: tokenizer}, devices=jax.devices()[:1])
    prompt = make_prompt([{"depth_tokens": np.zeros(12, int)}] * count, [None] * count, m, together, grammar=grammar)
    generated = jax.device_get(run_stage(graph, params, scheme, m, prompt, np.arange(count)[:, None]))
    ids, _, _ = plain._finish(m, generated, [None] * count)
    raw = np.asarray(generated.ids)
    assert len({tuple(i) for i in ids}) > 0.9 * count
    for row, whole in zip(ids, raw, strict=True):
        assert len(row) <= m.max_length and (row == whole[: len(row)]).all()  # it ended by itself
        state = 0
        for token in row:
            state = grammar.next_state[state, grammar.token_class[token]]
            assert state >= 0
        assert state == len(grammar.next_state) - 1
    signals = tokenizer.decode(ids)
    if isinstance(recipe, BoxRecipe):
        assert [5 * len(s["label"]) + 1 for s in signals] == [len(i) for i in ids]
        assert {label for s in signals for label in s["label"]} <= {"cube", "cone"}
    elif isinstance(recipe, PaletteRecipe):
        assert [3 * len(s) + 2 for s in signals] == [len(i) for i in ids]
    else:
        assert all(len(s) == len({*i[:-1:2].tolist()}) for s, i in zip(signals, ids, strict=True))


def test_a_grammar_without_an_end_is_refused():
    with pytest.raises(ValueError, match="never ends"):
        Grammar.make(np.arange(3), [{0: 1}, {1: 0}], end_id=2)


# ---- Bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage,message",
    [
        (Stage(target="rgb_pixels", scheme=ROAR()), "input only"),
        (Stage(target="depth", scheme=Autoregressive()), "which MaskGIT and ROAR do"),
        (Stage(target="caption", scheme=ROAR()), "which Autoregressive does"),
        (Stage(target="depth", scheme=MaskGIT(steps=0)), "steps=.* must be at least 1"),
        (Stage(target="depth", scheme=MaskGIT(top_p=0.0)), r"top_p=.* within \(0, 1\]"),
        (Stage(target="depth", scheme=MaskGIT(top_p=1.1)), r"top_p=.* within \(0, 1\]"),
        (Stage(target="depth", scheme=ROAR(temperature=-1)), "at least 0"),
        (Stage(target="caption", scheme=Autoregressive(max_length=99)), "within 0 and 10"),
        (Stage(target="depth", scheme=ROAR(), guidance=Guidance(drop=("captoin",))), "Did you mean 'caption'"),
        (Stage(target="depth", scheme=ROAR(), guidance=Guidance(scale=(("boxes", 1.0),))), "names 'boxes'"),
        (Stage(target="depth", scheme=ROAR(), ensemble=0), "at least 1"),
        (Stage(target="depth", scheme=ROAR(temperature=float("nan"))), "at least 0"),
        (Stage(target="depth", scheme=ROAR(schedule="cosin")), "Did you mean 'cosine'"),
        (Stage(target="depth", scheme=ROAR(steps=2.5)), "steps=.* must be at least 1"),
        (Stage(target="rgb", scheme=ROAR()), "already given"),
    ],
)
def test_a_bad_plan_is_refused(modalities, stage, message):
    with pytest.raises(ValueError, match=message):
        check_plan([stage], ["rgb", "caption"] if stage.target != "caption" else ["rgb"], modalities)


def test_bad_inputs_are_named(sampler, make_example):
    ids = make_example(0)["depth_tokens"]
    with pytest.raises(ValueError, match="one length"):
        sampler({"caption": [np.array([3])] * 2, "depth_tokens": [ids]}, ["rgb"])
    with pytest.raises(ValueError, match="keep names 'rgb'"):
        sampler({"depth_tokens": ids}, ["rgb"], keep={"rgb": 0.5})
    with pytest.raises(ValueError, match=r"a multiple of \[3, 4\]"):
        sampler({"depth_tokens": ids}, ["depth_tokens"], keep={"depth_tokens": np.ones((5, 5), bool)})
    with pytest.raises(ValueError, match="there can be only one"):
        sampler({"rgb#2": np.zeros((12, 6), np.uint8)}, ["depth"])


def test_lengths_are_bounded(sampler, records):
    for length in (1, 4):
        stage = Stage(target="caption", scheme=Autoregressive(max_length=length, temperature=3.0))
        assert all(
            len(i) <= length and i[-1] == 3 for i in sampler.generate(records[3:5], [stage], 0, [0, 1])["caption"]
        )


def test_a_token_that_is_filtered_out_never_comes():
    """Where a random number falls on the border of a block of probabilities."""
    p = jnp.zeros((1, 256)).at[0, jnp.asarray([3, 5, 200])].set(jnp.asarray([0.1, 0.2, 0.7]))
    border = np.float32(0.1) + np.float32(0.2)
    for u in (0.0, np.nextafter(border, np.float32(0)), border, np.nextafter(border, np.float32(1)), 1 - 2**-24):
        assert int(_inverse_distribution(p, jnp.asarray([u], jnp.float32))[0]) in (3, 5, 200)


def test_retrieval_by_cosine():
    rng = np.random.default_rng(0)
    gallery = rng.normal(size=(50, 8))
    best, similarity = retrieve(3 * gallery[[4, 9]] + 0.01 * rng.normal(size=(2, 8)), gallery, k=3)
    assert best[:, 0].tolist() == [4, 9] and (similarity[:, 0] > 0.99).all()
    assert (np.diff(similarity, axis=1) <= 0).all()


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_callback_is_called_after_every_step(sampler, make_example, num_devices):
    heard, sampler = [], Sampler(sampler.model, sampler.tokenizers, devices=jax.devices()[:num_devices])
    sampler(
        {"caption": make_example(0)["caption"]}, [Stage(target="depth_tokens", scheme=MaskGIT(steps=4))],
        on_step=lambda target, ids, known: heard.append((target, int(known.sum()))),
    )  # fmt: skip
    assert [t for t, _ in heard] == ["depth_tokens"] * 4
    assert heard[-1][1] == 12 and [n for _, n in heard] == sorted(n for _, n in heard)


def test_schemes_are_data(modalities):
    """Adding a scheme edits nothing: any frozen dataclass with the protocol's methods runs."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class RightToLeft(ROAR):
        def generate(self, model, modality, prompt, guidance, static, arrays, replay, on_step):
            order = jnp.broadcast_to(jnp.arange(modality.max_tokens)[::-1], prompt.given.shape)
            return super().generate(
                model, modality, prompt, guidance, static, arrays, replay._replace(order=order), on_step
            )

    model = Model(dataclasses.replace(small(), width=16), modalities, rngs=nnx.Rngs(0))
    prompt = make_prompt([{"caption": np.array([3])}], [None], m := modalities.named("depth_tokens"), modalities)
    out = run_stage(*nnx.split(model), RightToLeft(steps=12), m, prompt, np.array([[0]]))
    np.testing.assert_array_equal(out.step[0], np.arange(12)[::-1])


def small():
    from m4.model.config import ModelConfig

    return ModelConfig(width=16, num_heads=2, encoder_depth=1, decoder_depth=1, hidden=24)


@pytest.mark.parametrize("target,scheme", [SCHEMES[0], SCHEMES[2]])
def test_a_stage_is_one_program_without_calls_to_the_host(model, modalities, target, scheme):
    m = modalities.named(target)
    prompt = make_prompt([{"rgb_tokens": np.zeros(12, int)}], [None], m, modalities)
    static, arrays = scheme.prepare(m, prompt, np.zeros((1, 1), int))
    graph, params = nnx.split(model)
    for on_step, expected in ((None, False), (print, True)):
        program = _run.lower(graph, params, scheme, m, None, static, on_step, prompt, arrays, Replay())
        assert ("callback" in program.as_text()) == expected
