"""The matrix of subsets and the probes of missing signals, on embeddings whose contents are known; on a real run."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from m4.evaluation import modality_subsets as subsets
from m4.evaluation.base import Evaluator, evaluate, evaluator_classes
from m4.evaluation.modality_subsets import Subsets


@pytest.fixture(scope="module")
def parts():
    """Embeddings in which "a" knows the class, "b" whether it is odd, and a pair is the mean of both."""
    rng = np.random.default_rng(0)

    def part(count):
        labels = rng.integers(0, 4, count)
        a = np.concatenate([np.eye(4)[labels] * 4, np.zeros((count, 2))], axis=1)
        b = np.concatenate([np.zeros((count, 4)), np.eye(2)[labels % 2] * 4], axis=1)
        noisy = {("a",): a, ("b",): b, ("a", "b"): (a + b) / 2}
        return {k: x + rng.normal(size=x.shape) * 0.1 for k, x in noisy.items()}, labels

    return part(600), part(400)


def test_subsets_of():
    assert subsets.subsets_of(["a", "b"]) == [("a",), ("b",), ("a", "b")]
    assert len(subsets.subsets_of(list("abcde"))) == 31


def test_matrix(parts):
    (train, labels), (test, truth) = parts
    found = subsets.matrix(train, labels, test, truth, np.random.default_rng(0))
    assert list(found) == ["a", "b", "a + b", "drawn"] and list(found["a"]) == ["a", "b", "a + b"]
    assert found["a"]["a"] > 0.98 and found["a + b"]["a + b"] > 0.98
    assert 0.4 < found["b"]["b"] < 0.6  # of two classes it cannot tell which
    assert found["a"]["b"] < 0.5 and found["drawn"]["a"] > 0.95


def test_missing_by_label_flips(parts):
    (train, labels), (test, truth) = parts
    found = subsets.missingness(train, labels, test, truth, np.random.default_rng(0))
    assert list(found) == ["a", "presence of a", "b", "presence of b"]
    # Whether the signal is there says which half of the classes: 0.9 of it, and 0.1 when that is flipped.
    for name in "ab":
        row = found[f"presence of {name}"]
        assert row["by label"] == pytest.approx(0.45, abs=0.08) and row["flipped"] == pytest.approx(0.05, abs=0.05)
    assert found["a"]["by label"] > found["a"]["flipped"]
    assert found["b"]["random"] > 0.9  # "a" is always there


def test_presence_has_the_shares_that_it_says():
    labels, rng = np.arange(4).repeat(5000), np.random.default_rng(0)
    shares = {how: subsets.present(labels, how, 4, rng).reshape(4, -1).mean(1) for how in ("random", "by label")}
    shares["flipped"] = subsets.present(labels, "flipped", 4, rng).reshape(4, -1).mean(1)
    np.testing.assert_allclose(shares["random"], 0.5, atol=0.03)
    np.testing.assert_allclose(shares["by label"], [0.1, 0.1, 0.9, 0.9], atol=0.03)
    np.testing.assert_allclose(shares["flipped"], [0.9, 0.9, 0.1, 0.1], atol=0.03)


def test_of_a_run(whole_run, tmp_path):
    results = evaluate(whole_run, Subsets(num_train=64, num_test=16), tmp_path)
    assert len(results["matrix"]) == 16 and set(results["missingness"]) >= {"rgb", "presence of rgb"}
    assert json.loads((tmp_path / "subsets.json").read_text()) == results
    assert (tmp_path / "subsets.png").stat().st_size > 1000 and "| drawn |" in (tmp_path / "subsets.md").read_text()
    with pytest.raises(ValueError, match="unknown label 'shapes'"):
        evaluate(whole_run, Subsets(label="shapes"), tmp_path)


def test_a_users_own_evaluator(whole_run, tmp_path):
    """It is found in the run's config by its name; without one, the name is refused with those that there are."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Count(Evaluator):
        name = "count"

        def run(self, trained, report, seed):
            results = {"parameters": sum(x.size for x in jax.tree.leaves(nnx.state(trained.model, nnx.Param)))}
            report.write(results, f"{results['parameters']:,}", {"_one": np.zeros((2, 2, 3), np.uint8)})
            return results

    results = evaluate(whole_run, Count(), tmp_path)
    assert json.loads((tmp_path / "count.json").read_text()) == results and results["parameters"] > 1000
    assert (tmp_path / "count_one.png").exists() and (tmp_path / "count.md").read_text() == f"{results['parameters']:,}"
    twice = evaluate(whole_run, (Count(), Count()), tmp_path)
    assert twice == {"count": results, "count_2": results} and (tmp_path / "count_2.json").exists()
    with pytest.raises(ValueError, match="no evaluation 'fewshots'.*Did you mean 'fewshot'"):
        evaluate(whole_run, "fewshots", tmp_path)
    assert {"directions", "fewshot", "probes", "retrieval", "subsets"} <= {*evaluator_classes()}
