"""Masking: budgets are met, nothing is both input and target, sequences can be put together again."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m4.masking import Masking, Strategy, mask_spans
from m4.modality import Features, Grid, Sequence


def tokens_of(part, i):
    keep = part.valid & (part.modality == i)
    return {name: getattr(part, name)[keep] for name in part._fields}


@pytest.mark.parametrize("seed", range(40))
def test_inputs_and_targets_are_disjoint_and_true(seed, modalities, masking, make_example):
    """A grid position is never both; every id is the example's; feature rows are the example's, normalised."""
    example = make_example(seed)
    batch = masking(example, modalities, np.random.default_rng(seed))
    for i, m in enumerate(modalities):
        inputs, targets = tokens_of(batch.inputs, i), tokens_of(batch.targets, i)
        if isinstance(m, Grid):
            assert not set(inputs["position"]) & set(targets["position"])
            for part in (inputs, targets):
                assert len(set(part["position"])) == len(part["position"])
                np.testing.assert_array_equal(part["ids"], example[m.name][part["position"]])
            assert (targets["previous"] == -1).all()
        if isinstance(m, Features):
            expected = (example[m.name].astype(np.float32) / 255 - 0.5) / 0.25
            found = batch.features[m.name][inputs["ids"]]
            np.testing.assert_allclose(found, expected[inputs["position"]], atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_every_slot_is_used(seed, modalities, masking, make_example):
    """Grids leave no slot empty while tokens are left; a sequence may, as its masked spans shrink to sentinels."""
    example = make_example(seed)
    batch = masking(example, modalities, np.random.default_rng(seed))
    assert masking.num_inputs - len(example["caption"]) < batch.inputs.valid.sum() <= masking.num_inputs
    grids = {k: v for k, v in example.items() if k != "caption"}
    batch = masking(grids, modalities, np.random.default_rng(seed))
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


@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 20))
@settings(deadline=None)
def test_sequence_targets_are_teacher_forced_and_within_budget(seed, num_inputs, num_targets):
    """previous[i + 1] == ids[i], positions count up, nothing exceeds the slots, whatever the budgets."""
    caption = Sequence(
        name="caption", signal="caption", vocab_size=99, max_length=30, first_sentinel=5, num_sentinels=12, end_id=3
    )
    from m4.modality import Modalities

    rng = np.random.default_rng(seed)
    example = {"caption": np.append(rng.integers(20, 99, rng.integers(1, 29)), 3)}
    strategy = Strategy(inputs={"caption": 1.0}, targets={"caption": 1.0})
    masking = Masking(num_inputs=num_inputs, num_targets=num_targets, strategies=(strategy,))
    batch = masking(example, Modalities([caption]), rng)
    targets = tokens_of(batch.targets, 0)
    np.testing.assert_array_equal(targets["previous"][1:], targets["ids"][:-1])
    np.testing.assert_array_equal(targets["position"], np.arange(len(targets["ids"])))
    if len(targets["ids"]):
        assert 5 <= targets["previous"][0] < 17  # a span opens with its sentinel


def test_pure_function_of_its_generator(modalities, masking, make_example):
    a, b, c = (masking(make_example(0), modalities, np.random.default_rng(s)) for s in (1, 1, 2))
    for x, y in zip(a.inputs + a.targets, b.inputs + b.targets, strict=True):
        np.testing.assert_array_equal(x, y)
    assert any((x != y).any() for x, y in zip(a.inputs + a.targets, c.inputs + c.targets, strict=True))


def test_budgets_follow_the_dirichlet(modalities, make_example):
    """Equal concentrations share slots equally on average; a large one takes all that it can hold."""
    names = ("rgb_tokens", "depth_tokens")
    strategy = Strategy(inputs={n: 0.5 for n in names}, targets={"caption": 1.0})
    masking = Masking(num_inputs=8, num_targets=4, strategies=(strategy,))
    draws = [masking(make_example(i), modalities, np.random.default_rng(i)) for i in range(2000)]
    counts = np.array([np.bincount(d.inputs.modality[d.inputs.valid], minlength=4) for d in draws])
    # Dirichlet(.5, .5): mean 4 of 8, variance of the share 1/8.
    assert abs(counts[:, 1].mean() - 4) < 4 * 8 * (1 / 8 / 2000) ** 0.5
    skewed = dataclasses.replace(strategy, inputs={"rgb_pixels": 1000.0, "depth_tokens": 0.01})
    batch = dataclasses.replace(masking, num_inputs=14, strategies=(skewed,))(
        make_example(0), modalities, np.random.default_rng(0)
    )
    assert np.bincount(batch.inputs.modality[batch.inputs.valid], minlength=4).tolist() == [12, 0, 2, 0]


def test_missing_modality_gets_no_budget(modalities, masking, make_example):
    example = {k: v for k, v in make_example(3).items() if k not in ("rgb_tokens", "caption")}
    batch = masking(example, modalities, np.random.default_rng(0))
    present = set(batch.inputs.modality[batch.inputs.valid]) | set(batch.targets.modality[batch.targets.valid])
    assert present <= {modalities.index("rgb_pixels"), modalities.index("depth_tokens")}


def test_errors_name_the_closest_match(modalities):
    def check(**fields):
        Masking(num_inputs=4, num_targets=4, strategies=(Strategy(**fields),)).check(modalities)

    with pytest.raises(ValueError, match="Did you mean 'depth_tokens'"):
        check(inputs={"depth_token": 1.0}, targets={"caption": 1.0})
    with pytest.raises(ValueError, match="rgb_pixels"):
        check(inputs={"caption": 1.0}, targets={"rgb_pixels": 1.0})
    with pytest.raises(ValueError, match="must be positive"):
        check(inputs={"caption": 0.0}, targets={"caption": 1.0})
