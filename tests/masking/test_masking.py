"""Masking: budgets are met, nothing is both input and target, sequences can be put together again."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import PARITY, mask_keys
from hypothesis import given, settings
from hypothesis import strategies as st

from m4.data.dataset import Dataset
from m4.data.stream import ApplyMasking
from m4.interchange import fourm
from m4.masking import dirichlet as masking_module
from m4.masking.base import ExampleMasking
from m4.masking.dirichlet import DirichletMasking, Masking, Strategy
from m4.masking.draws import Draws
from m4.masking.spans import Spans, mask_spans
from m4.tokens.batch import MaskedBatch, Targets, Tokens
from m4.tokens.modality import Features, Grid, Modalities, Sequence


def mask_one(masking, example, modalities, seed=0):
    """MaskedBatch of one example, without the batch axis."""
    batch = masking([example], modalities, mask_keys(1, seed))
    inputs, targets = (type(part)(*(column[0] for column in part)) for part in (batch.inputs, batch.targets))
    return type(batch)(inputs, targets, {name: x[0] for name, x in batch.features.items()})


def tokens_of(part, i):
    keep = part.valid & (part.modality == i)
    return {name: getattr(part, name)[keep] for name in part._fields}


@pytest.mark.parametrize("seed", range(40))
def test_inputs_and_targets_are_disjoint_and_true(seed, modalities, masking, make_example):
    """A grid position is never both; every id is the example's; feature rows are the example's."""
    example = make_example(seed)
    batch = mask_one(masking, example, modalities, seed)
    for i, m in enumerate(modalities):
        inputs, targets = tokens_of(batch.inputs, i), tokens_of(batch.targets, i)
        if isinstance(m, Grid):
            assert not set(inputs["position"]) & set(targets["position"])
            for part in (inputs, targets):
                assert len(set(part["position"])) == len(part["position"])
                np.testing.assert_array_equal(part["ids"], example[m.name][part["position"]])
            assert (targets["previous"] == -1).all()
        if isinstance(m, Features):
            found = batch.features[m.name][inputs["ids"]]
            assert found.dtype == np.uint8
            np.testing.assert_array_equal(found, example[m.name][inputs["position"]])


@pytest.mark.parametrize("seed", range(20))
def test_every_slot_is_used(seed, modalities, masking, make_example):
    """Grids leave no slot empty while tokens are left; a sequence may, as its masked spans shrink to sentinels."""
    example = make_example(seed)
    batch = mask_one(masking, example, modalities, seed)
    assert masking.num_inputs - len(example["caption"]) < batch.inputs.valid.sum() <= masking.num_inputs
    grids = {k: v for k, v in example.items() if k != "caption"}
    batch = mask_one(masking, grids, modalities, seed)
    assert batch.inputs.valid.all()
    left = 24 - np.isin(batch.inputs.modality, (1, 2)).sum()
    assert batch.targets.valid.sum() == min(left, masking.num_targets)


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.data())
def test_spans_put_together_give_the_sequence(mask, data):
    """Replacing each sentinel of the input by the target's span after it gives back every token."""
    ids = np.array(data.draw(st.lists(st.integers(50, 99), min_size=len(mask), max_size=len(mask))))
    inputs, targets = mask_spans(ids, np.array(mask), 5)
    spans, key = {}, None
    for t in targets:
        if t < 50:
            key = t
            spans[key] = []
        else:
            spans[key].append(t)
    assert not spans[targets[-1]] and targets[0] == 5
    rebuilt = [t for i in inputs for t in (spans[i] if i < 50 else [i])]
    np.testing.assert_array_equal(rebuilt, ids)


def test_spans_by_hand():
    inputs, targets = mask_spans(np.array([10, 11, 12, 13, 14]), np.array([False, True, True, False, True]), 5)
    assert inputs.tolist() == [10, 5, 13, 6]
    assert targets.tolist() == [5, 11, 12, 6, 14, 7]


CAPTION = Sequence(
    name="caption", signal="caption", vocab_size=99, max_length=30, first_sentinel=5, num_sentinels=12, end_id=3
)


@st.composite
def captions(draw):
    """A modality with or without chunks, and ids of it; chunks begin at ids 20 to 29."""
    modality = dataclasses.replace(CAPTION, chunk_ids=draw(st.sampled_from([(0, 0), (20, 30)])))
    return modality, np.append(draw(st.lists(st.integers(20, 98), min_size=1, max_size=28)), 3)


@given(captions(), st.integers(1, 40), st.integers(1, 40), st.sampled_from(["random", "all", "binary"]), st.integers(0))
@settings(deadline=None)
def test_sequences_are_teacher_forced_reconstructible_and_within_budget(caption, num_inputs, num_targets, keep, seed):
    """previous[i + 1] == ids[i]; positions count up; sentinels of the input filled with spans of the target give the
    sequence back (where the target was not cut); chunks are whole."""
    modality, ids = caption
    strategy = Strategy(inputs={"caption": 1.0}, targets={"caption": 1.0}, keep=keep)
    masking = Masking(num_inputs=num_inputs, num_targets=num_targets, strategies=(strategy,))
    batch = mask_one(masking, {"caption": ids}, Modalities([modality]), seed % 2**63)
    inputs, targets = tokens_of(batch.inputs, 0), tokens_of(batch.targets, 0)
    np.testing.assert_array_equal(targets["previous"][1:], targets["ids"][:-1])
    for part in (inputs, targets):
        np.testing.assert_array_equal(part["position"], np.arange(len(part["ids"])))
    is_sentinel = lambda t: 5 <= t < 17  # noqa: E731
    spans, key = {}, None
    for t in (*targets["previous"][:1], *targets["ids"]):
        if is_sentinel(t):
            key, spans[t] = t, []
        else:
            spans[key].append(t)
    if len(targets["ids"]):
        assert is_sentinel(targets["previous"][0])
    if len(targets["ids"]) < num_targets and set(spans) >= {t for t in inputs["ids"] if is_sentinel(t)}:
        rebuilt = [t for i in inputs["ids"] for t in (spans[i] if is_sentinel(i) else [i])]
        np.testing.assert_array_equal(rebuilt, ids)
    if modality.chunk_ids != (0, 0):
        opens = [i == 0 or 20 <= t < 30 or t == 3 for i, t in enumerate(ids)]
        chunk_of = dict(zip(range(len(ids)), np.cumsum(opens), strict=True))
        kept = [t for t in inputs["ids"] if not is_sentinel(t)]
        # A kept run is a run of whole chunks of the sequence: its length is that of some set of chunks.
        sizes = np.bincount(list(chunk_of.values()))
        reachable = {0}
        for size in sizes:
            reachable |= {r + size for r in reachable}
        assert len(kept) in reachable


def test_slots_that_a_cut_sequence_leaves_go_to_grids():
    """Wherever its cut begins, all slots are used; its end is a target as often as a middle."""
    grid = Grid(name="depth_tokens", signal="depth", vocab_size=7, shape=(3, 4))
    strategy = Strategy(inputs={"caption": 1.0}, targets={"caption": 3.0, "depth_tokens": 1.0})
    masking = Masking(num_inputs=12, num_targets=6, strategies=(strategy,))
    num_cut, ends = 0, 0
    for seed in range(300):
        ids = np.append(np.arange(30, 32 + seed % 9), 3)
        example = {"caption": ids, "depth_tokens": np.zeros(12, np.uint8)}
        batch = mask_one(masking, example, Modalities([CAPTION, grid]), seed)
        assert batch.targets.valid.all()
        inputs, targets = tokens_of(batch.inputs, 0)["ids"], tokens_of(batch.targets, 0)["ids"]
        hidden = np.setdiff1d(ids, inputs)
        is_cut = 0 < np.isin(targets, ids).sum() < len(hidden)
        num_cut += is_cut and 3 in hidden
        ends += is_cut and 3 in targets
    assert num_cut > 50 and ends > num_cut / 5


@given(st.integers(0, 2**32), st.data())
@settings(deadline=None, max_examples=60)
def test_any_mixture_keeps_its_budgets(modalities, make_example, seed, data):
    """Whatever strategies and modalities: budgets hold, inputs and targets of grids are disjoint, what an example has
    not is never picked, and "filled" leaves a slot empty only when nothing that the strategy allows is left."""
    names = data.draw(st.lists(st.sampled_from(modalities.names), min_size=1, unique=True))
    alphas = st.floats(0.005, 1000)
    readable, predictable = names, [n for n in names if n != "rgb_pixels"] or ["caption"]
    strategies = tuple(
        Strategy(
            inputs={n: data.draw(alphas) for n in readable},
            targets={n: data.draw(alphas) for n in predictable},
            keep=data.draw(st.sampled_from(["random", "all", "binary"])),
            input_share=tuple(sorted([data.draw(st.floats(0, 1)), 1.0])),
        )
        for _ in range(data.draw(st.integers(1, 3)))
    )
    slots = st.integers(1, 40)
    masking = Masking(num_inputs=data.draw(slots), num_targets=data.draw(slots), strategies=strategies)
    masking.check(modalities)
    has = set(data.draw(st.lists(st.sampled_from(modalities.names), unique=True))) | {predictable[0], readable[0]}
    example = {k: v for k, v in make_example(seed % 1000).items() if k in has}
    batch = mask_one(masking, example, modalities, seed)
    counts = []
    for part, allowed in ((batch.inputs, readable), (batch.targets, predictable)):
        used = np.bincount(part.modality[part.valid], minlength=4)
        counts.append(used)
        assert {modalities.names[j] for j in np.flatnonzero(used)} <= has & set(allowed)
    for j, m in enumerate(modalities):
        inputs, targets = tokens_of(batch.inputs, j), tokens_of(batch.targets, j)
        if isinstance(m, Grid):
            assert not set(inputs["position"]) & set(targets["position"])
    empty = masking.num_targets - counts[1].sum()
    for j, m in enumerate(modalities):
        if empty and isinstance(m, Grid) and m.name in predictable and m.name in example:
            assert counts[0][j] + counts[1][j] == m.max_tokens


def test_a_mask_depends_on_its_own_key_alone(modalities, masking, make_example):
    """The same in any batch, at any place in it; another key or seed gives another."""
    examples, keys = [make_example(i) for i in range(9)], mask_keys(9, seed=4)
    together = masking(examples, modalities, keys)
    backwards = masking(examples[::-1], modalities, keys[::-1])
    for i in range(9):
        alone = masking(examples[i : i + 1], modalities, keys[i : i + 1])
        for x, y, z in zip(
            (*together.inputs, *together.targets, *together.features.values()),
            (*alone.inputs, *alone.targets, *alone.features.values()),
            (*backwards.inputs, *backwards.targets, *backwards.features.values()),
            strict=True,
        ):
            np.testing.assert_array_equal(x[i], y[0])
            np.testing.assert_array_equal(x[i], z[8 - i])
    same = masking([examples[0]] * 2, modalities, np.array([[4, 0], [4, 1]], np.uint64))
    assert any((x[0] != x[1]).any() for x in same.inputs + same.targets)


@pytest.mark.parametrize("side", [9, 40])  # more than 1024 positions are shuffled by longer random numbers
def test_a_mask_does_not_depend_on_the_sizes_of_others_in_its_batch(side):
    """Grids of different sizes, missing from some examples: each is masked as if it were alone."""
    shapes = {"small": (2, 2), "middle": (5, 3), "large": (side, side)}
    modalities = Modalities([Grid(name=n, signal=n, vocab_size=9, shape=s) for n, s in shapes.items()])
    every = {name: 1.0 for name in shapes}
    masking = Masking(num_inputs=12, num_targets=12, strategies=(Strategy(inputs=every, targets=every),))
    rng = np.random.default_rng(0)
    has = [("small", "middle"), ("large",), ("small", "middle", "large"), ("middle",), ("small", "large")]
    examples = [{n: rng.integers(0, 9, np.prod(shapes[n])).astype(np.uint8) for n in names} for names in has]
    keys = mask_keys(len(examples))
    together = masking(examples, modalities, keys)
    for i in range(len(examples)):
        alone = masking(examples[i : i + 1], modalities, keys[i : i + 1])
        for x, y in zip((*together.inputs, *together.targets), (*alone.inputs, *alone.targets), strict=True):
            np.testing.assert_array_equal(x[i], y[0])


def test_something_is_left_to_predict():
    """A short example whose every token would go in keeps an eighth of its grids out."""
    grid = Grid(name="x", signal="x", vocab_size=9, shape=(8, 8))
    other = dataclasses.replace(grid, name="y")
    strategy = Strategy(inputs={"x": 1.0, "y": 1.0}, targets={"x": 1.0, "y": 1.0})
    masking = Masking(num_inputs=64, num_targets=64, strategies=(strategy,))
    ids = np.zeros(64, np.uint8)
    batch = masking([{"x": ids}, {"x": ids, "y": ids}] * 8, Modalities([grid, other]), mask_keys(16))
    assert batch.inputs.valid.sum(1).tolist() == [56, 64] * 8 and batch.targets.valid.sum(1).tolist() == [8, 64] * 8


def test_budgets_follow_the_dirichlet(modalities, make_example):
    """Equal concentrations share slots equally on average; a large one takes all that it can hold."""
    names = ("rgb_tokens", "depth_tokens")
    strategy = Strategy(inputs={n: 0.5 for n in names}, targets={"caption": 1.0})
    masking = Masking(num_inputs=8, num_targets=4, strategies=(strategy,))
    inputs = masking([make_example(i) for i in range(2000)], modalities, mask_keys(2000)).inputs
    counts = ((inputs.modality == 1) & inputs.valid).sum(1)
    # Dirichlet(.5, .5): mean 4 of 8, variance of the share 1/8.
    assert abs(counts.mean() - 4) < 4 * 8 * (1 / 8 / 2000) ** 0.5
    skewed = dataclasses.replace(strategy, inputs={"rgb_pixels": 1000.0, "depth_tokens": 0.01})
    batch = mask_one(dataclasses.replace(masking, num_inputs=14, strategies=(skewed,)), make_example(0), modalities)
    assert np.bincount(batch.inputs.modality[batch.inputs.valid], minlength=4).tolist() == [12, 0, 2, 0]


def test_what_cannot_be_used_goes_to_the_others(modalities, make_example):
    """Slots beyond a full modality are handed on in proportion to the shares of the others, to within one each."""
    strategy = Strategy(inputs={"rgb_pixels": 1e6, "rgb_tokens": 2e3, "depth_tokens": 1e3}, targets={"caption": 1.0})
    masking = Masking(num_inputs=21, num_targets=4, strategies=(strategy,))
    inputs = masking([make_example(i) for i in range(500)], modalities, mask_keys(500)).inputs
    assert inputs.valid.all()
    counts = np.stack([(inputs.modality == j).sum(1) for j in range(3)])
    assert (counts[0] == 12).all()
    np.testing.assert_allclose(counts[1:].mean(1), [6, 3], atol=0.1)


def test_missing_modality_gets_no_budget(modalities, masking, make_example):
    example = {k: v for k, v in make_example(3).items() if k not in ("rgb_tokens", "caption")}
    batch = mask_one(masking, example, modalities)
    present = set(batch.inputs.modality[batch.inputs.valid]) | set(batch.targets.modality[batch.targets.valid])
    assert present <= {modalities.index("rgb_pixels"), modalities.index("depth_tokens")}


def test_a_strategy_that_an_example_cannot_serve_is_not_drawn(modalities, make_example):
    """Text alone never draws picture -> depth; with no other strategy that is an error which names what it has."""
    from_picture = Strategy(inputs={"rgb_pixels": 1.0}, targets={"depth_tokens": 1.0, "caption": 1.0}, weight=100.0)
    of_text = Strategy(inputs={"caption": 1.0}, targets={"caption": 1.0})
    words = [{"caption": make_example(i)["caption"]} for i in range(50)]
    masking = Masking(num_inputs=8, num_targets=8, strategies=(from_picture, of_text))
    inputs = masking(words, modalities, mask_keys(50)).inputs
    assert (inputs.modality[inputs.valid] == 3).all() and inputs.valid.any(1).all()
    with pytest.raises(ValueError, match=r"no masking strategy fits an example that has only \['caption'\]"):
        dataclasses.replace(masking, strategies=(from_picture,))(words, modalities, mask_keys(50))


def test_each_data_set_has_its_own_mixture(modalities, make_example):
    mixtures = [(Strategy(inputs={"rgb_pixels": 1.0}, targets={n: 1.0}),) for n in ("caption", "depth_tokens")]
    masking = Masking(num_inputs=4, num_targets=4, strategies=mixtures[0])
    which = np.arange(40) % 2
    examples = [make_example(i) for i in range(40)]
    targets = masking(examples, modalities, mask_keys(40), [mixtures[k] for k in which]).targets
    for k, name in ((0, "caption"), (1, "depth_tokens")):
        assert (targets.modality[which == k][targets.valid[which == k]] == modalities.index(name)).all()


def test_keep_may_differ_among_sequences(make_example):
    """One sequence all or nothing, the other always whole."""
    title = dataclasses.replace(CAPTION, name="title", signal="title")
    strategy = Strategy(
        inputs={"caption": 1.0, "title": 1.0}, targets={"caption": 1.0}, keep={"caption": "binary", "title": "all"}
    )
    masking = Masking(num_inputs=60, num_targets=4, strategies=(strategy,))
    example = {name: np.append(np.arange(20, 40), 3) for name in ("caption", "title")}
    inputs = masking([example] * 200, Modalities([CAPTION, title]), mask_keys(200)).inputs
    caption, title = (((inputs.modality == j) & inputs.valid).sum(1) for j in (0, 1))
    whole = caption >= 21
    assert set(caption) <= {1, 21} and 60 < whole.sum() < 140
    assert (title[caption > 0] == 21).all()


def test_arrays_that_do_not_fit_their_modality_are_named(modalities, masking, make_example):
    for name, wrong, message in (
        ("rgb_tokens", np.zeros(11, int), "11 tokens of rgb_tokens, which holds 12"),
        ("caption", np.full(11, 20), "11 tokens of caption, which holds 10"),
        ("rgb_pixels", np.zeros((13, 6), np.uint8), "13 tokens of rgb_pixels, which holds 12"),
    ):
        with pytest.raises(ValueError, match=message):
            mask_one(masking, {**make_example(0), name: wrong}, modalities)


def test_errors_name_the_closest_match(modalities):
    def check(**fields):
        Masking(num_inputs=4, num_targets=4, strategies=(Strategy(**fields),)).check(modalities)

    with pytest.raises(ValueError, match="Did you mean 'depth_tokens'"):
        check(inputs={"depth_token": 1.0}, targets={"caption": 1.0})
    with pytest.raises(ValueError, match="rgb_pixels"):
        check(inputs={"caption": 1.0}, targets={"rgb_pixels": 1.0})
    with pytest.raises(ValueError, match="must be positive"):
        check(inputs={"caption": 0.0}, targets={"caption": 1.0})
    with pytest.raises(ValueError, match="Did you mean 'random'"):  # of a config.json: checked types would say it first
        strategy = Strategy(inputs={"caption": 1.0}, targets={"caption": 1.0})
        object.__setattr__(strategy, "keep", "randon")
        masking_module.check_strategies((strategy,), modalities)
    with pytest.raises(ValueError, match="Did you mean 'caption'"):
        check(inputs={"caption": 1.0}, targets={"caption": 1.0}, keep={"captoin": "all"})


# The original's masks: exact where its random draws are given, equal in distribution elsewhere.

LIMIT = 4.5  # standard errors; of the 1,200 comparisons below, 0.01 would pass it by chance if all were normal


def fixture(name):
    path = PARITY / "masking_stats" / name
    if not path.exists():
        pytest.skip(f"no fixture {name}: set M4_PARITY to the folder of parity fixtures")
    return json.loads(path.read_text())


def agrees(found, reference):
    """Mean and share of zeros of int [n] lie within sampling error of the original's, whose own error is known."""
    error = np.sqrt(found.var() / len(found) + reference["sem"] ** 2)
    assert abs(found.mean() - reference["mean"]) <= LIMIT * error + 1e-9, (found.mean(), reference)
    zeros, count = (found == 0).mean(), reference["n"]
    pooled = (zeros * len(found) + reference["frac_zero"] * count) / (len(found) + count)
    error = np.sqrt(pooled * (1 - pooled) * (1 / len(found) + 1 / count))
    assert abs(zeros - reference["frac_zero"]) <= LIMIT * error + 1e-9, (zeros, reference)


def test_spans_and_chunks_equal_the_originals():
    vectors = fixture("vectors.json")
    for kind in ("simple", "chunk"):
        for v in vectors[kind]:
            masked = ~(np.array(v["draws"]) <= v["keep_prob"])
            ids = v["sequence"] if kind == "simple" else np.concatenate(v["chunks"])
            masked = masked if kind == "simple" else np.repeat(masked, [len(c) for c in v["chunks"]])
            inputs, targets = mask_spans(np.asarray(ids), masked, 5)
            assert (inputs.tolist(), targets.tolist()) == (v["input"], v["target"])


def original_strategies(content):
    """The mixture of a fixture; a concentration of 0 is one that is not named."""
    inputs, targets = content["input_alphas"], content["target_alphas"]
    return tuple(
        Strategy(
            inputs={m: a[k] for m, a in inputs.items() if a[k] > 0},
            targets={m: a[k] for m, a in targets.items() if a[k] > 0},
        )
        for k in range(len(next(iter(inputs.values()))))
    )


@pytest.mark.parametrize("name", ["mix_mod7_all2all_rgb2all_a0.5", "mix_mod21_all2allmix_rgb2all_capT5bias"])
def test_budgets_are_distributed_as_the_originals(name):
    content = fixture(f"budgets_{name}.json")
    names, most = content["modality_order"], np.array([content["max_tokens"][n] for n in content["modality_order"]])
    is_sequence = np.array([isinstance(fourm.modality(n), Sequence) for n in names])
    count = 4000
    for k, strategy in enumerate(original_strategies(content)):
        draws = Draws(mask_keys(count, seed=k))
        inputs, targets = (
            masking_module._split(
                np.tile([alphas[n] if n in alphas else 0.0 for n in names], (count, 1)),
                np.full(count, total),
                draws,
                part,
            )[0]
            for part, alphas, total in (
                (0, strategy.inputs, content["num_input_tokens"]),
                (1, strategy.targets, content["num_target_tokens"]),
            )
        )
        inputs = np.minimum(inputs, most)
        targets = np.minimum(targets, np.where(is_sequence, most, most - inputs))
        for j, n in enumerate(names):
            agrees(inputs[:, j], content["components"][str(k)]["input"][n])
            agrees(targets[:, j], content["components"][str(k)]["target"][n])


def test_whole_samples_are_distributed_as_the_originals():
    """Visible tokens and sentinels of each modality of 4M-7, 8,000 masks against its 20,000."""
    content, budgets = fixture("full_samples_mod7.json"), fixture("budgets_mix_mod7_all2all_rgb2all_a0.5.json")
    modalities = [fourm.modality(n) for n in budgets["modality_order"]]
    modalities = Modalities([dataclasses.replace(m, size=1) if isinstance(m, Features) else m for m in modalities])
    rng, example, count = np.random.default_rng(0), {}, 8000
    for m in modalities:
        if isinstance(m, Sequence):
            length = content["sequence_lengths_with_eos"][m.name]
            example[m.name] = np.append(rng.integers(300, 30_000, length - 1), m.end_id)
        else:
            example[m.name] = np.zeros((196, 1) if isinstance(m, Features) else 196, np.uint8)
    masking = Masking(strategies=original_strategies(budgets), budgets="drawn")
    parts = [masking([example] * 500, modalities, mask_keys(count)[i : i + 500]) for i in range(0, count, 500)]
    inputs, targets = (
        Kind(*(np.concatenate([getattr(p, which)[c] for p in parts]) for c in range(len(Kind._fields))))
        for which, Kind in (("inputs", type(parts[0].inputs)), ("targets", type(parts[0].targets)))
    )
    for j, m in enumerate(modalities):
        reference = content["modalities"][m.name]
        here, there = inputs.valid & (inputs.modality == j), targets.valid & (targets.modality == j)
        agrees(here.sum(1), reference["input_valid"])
        if isinstance(m, Sequence):
            agrees((here & (inputs.ids >= 5) & (inputs.ids < 204)).sum(1), reference["sentinels_in_input"])
        else:
            agrees(there.sum(1), reference["target_valid"])


@pytest.mark.parametrize("keep", ["random", "all", "binary"])
@pytest.mark.parametrize("length", [12, 40])
def test_sequences_are_distributed_as_the_originals(length, keep):
    """Visible tokens, sentinels and the first sentinel of the target, at several budgets."""
    rows = [r for r in fixture("span_masking.json")["sequence_mask"] if (r["L"], r["keep_scheme"]) == (length, keep)]
    assert len(rows) == 4
    for r in rows:
        check_sequence(r)


def check_sequence(r):
    modality = dataclasses.replace(CAPTION, max_length=300, num_sentinels=199, vocab_size=999, end_id=998)
    count, ids = 4000, np.append(np.arange(300, 300 + r["L"] - 1), 998)
    is_sentinel = lambda x: (x >= 5) & (x < 204)  # noqa: E731
    keys, keep = mask_keys(count), masking_module.Keep.__args__.index(r["keep_scheme"])
    one = np.ones((count, 1), int)
    uniform = np.random.default_rng(0).random((count, 2))
    spans = Spans.of(
        [{"caption": ids}] * count, Modalities([modality]), one * r["L"], one * r["input_budget"], one * keep, uniform,
        Draws(keys),
    )  # fmt: skip
    example, found, _, _ = spans.inputs(one * r["input_budget"])
    agrees(np.bincount(example, minlength=count), r["input_valid"])
    agrees(np.bincount(example[is_sentinel(found)], minlength=count), r["sentinels_in_input"])
    example, found, previous, _, position = spans.targets(one * (r["target_budget"] - 1), uniform[:, 1:])
    # The original counts the opening sentinel, which is only read here.
    agrees(np.bincount(example, minlength=count) + 1, r["target_valid"])
    agrees(np.bincount(example[is_sentinel(found)], minlength=count) + 1, r["sentinels_in_target"])
    first = np.ones(count, int)
    first[example[position == 0]] = previous[position == 0] - 4
    agrees(first, r["first_target_sentinel_number"])


def test_a_masking_of_a_users_own_is_mixed_with_others(modalities, make_example):
    """Each row is that of its data set's masking alone, whatever stands beside it."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class FirstTokens(ExampleMasking):
        count: int

        def __call__(self, examples, modalities, keys, num_inputs, num_targets):
            index, size = modalities.index("depth_tokens"), (len(examples), self.count)
            ids = np.stack([e["depth_tokens"][: self.count] for e in examples]).astype(np.int32)
            place = np.broadcast_to(np.arange(self.count, dtype=np.int32), size)
            query = np.zeros(size, np.int32)
            rest = np.full(size, index, np.int32), place, query, query, np.ones(size, bool)
            wide = [
                np.pad(x, ((0, 0), (0, num_targets - self.count))) for x in (ids, np.full(size, -1, np.int32), *rest)
            ]
            empty = np.zeros((len(examples), num_inputs), np.int32)
            return MaskedBatch(Tokens(*[empty] * 5, empty > 0), Targets(*wide), {})

    targets = {m.name: 1.0 for m in modalities if not isinstance(m, Features)}
    strategy = Strategy(inputs={"rgb_tokens": 1.0}, targets=targets)
    own = DirichletMasking(strategies=(Strategy(inputs={"caption": 1.0}, targets={"depth_tokens": 1.0}),))
    datasets = (
        Dataset(tokens="a"), Dataset(tokens="b", masking=own), Dataset(tokens="c", masking=FirstTokens(count=3)),
        Dataset(tokens="d", masking=FirstTokens(count=5)),
    )  # fmt: skip
    mask = ApplyMasking(Masking(num_inputs=12, num_targets=12, strategies=(strategy,)), datasets, modalities, seed=3)
    batch = [(i, (i % 4, make_example(i))) for i in range(12)]
    whole = mask(batch)
    assert whole.targets.valid[2].sum() == 3 and whole.targets.valid[3].sum() == 5
    for i, item in enumerate(batch):
        alone = mask([item])
        for kind in ("inputs", "targets"):
            for a, b in zip(getattr(alone, kind), getattr(whole, kind), strict=True):
                np.testing.assert_array_equal(a[0], b[i])
