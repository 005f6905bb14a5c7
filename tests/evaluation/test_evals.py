"""Measures on cases whose scores are known by hand."""

import numpy as np
import pytest

from m4.evaluation.measures.attributes import CaptionAttributes, ForegroundOverlap
from m4.evaluation.measures.boxes import BoxAccuracy, mean_average_precision
from m4.evaluation.measures.depth import DepthAccuracy

ONE = {"bbox": np.array([[0.1, 0.1, 0.5, 0.5]], np.float32), "label": ["cube"]}
OTHER = {"bbox": np.array([[0.2, 0.6, 0.6, 0.9]], np.float32), "label": ["sphere"]}


def test_average_precision_of_perfect_wrong_and_half():
    truth = [ONE, OTHER]
    assert mean_average_precision(truth, truth) == pytest.approx(1.0)
    assert mean_average_precision([OTHER, ONE], truth) == 0.0
    assert mean_average_precision([ONE, ONE], truth) == pytest.approx(0.5)  # the sphere is missed
    empty = {"bbox": np.zeros((0, 4), np.float32), "label": []}
    assert mean_average_precision([empty, empty], truth) == 0.0
    swapped = {"bbox": ONE["bbox"], "label": ["sphere"]}
    assert mean_average_precision([swapped, empty], truth) == 0.0  # the class counts


def test_average_precision_reads_scores():
    """A false alarm that the model is less sure of costs nothing; a surer one does."""
    both = {"bbox": np.concatenate([ONE["bbox"], OTHER["bbox"]]), "label": ["cube", "cube"]}
    sure, unsure = ({**both, "score": np.array(s)} for s in ([0.9, 0.1], [0.1, 0.9]))
    assert mean_average_precision([sure], [ONE]) == pytest.approx(1.0)
    assert mean_average_precision([unsure], [ONE]) == pytest.approx(0.5)


def test_constant_boxes_beat_nothing_and_lose_to_truth():
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 0.5, (60, 2))
    examples = [{"boxes": {"bbox": np.array([[y, x, y + 0.4, x + 0.4]]), "label": ["cube"]}} for y, x in corner]
    score = BoxAccuracy().baseline(examples[:30], examples[30:])["value"]
    assert 0 < score < 0.9


def test_depth_counts_object_pixels_only():
    depth = np.array([[2.0, 2.0, 4.0, 0.0]], np.float32)
    example = {"depth": depth, "instance": np.array([[1, 1, 0, 1]])}
    score = DepthAccuracy().score([np.array([[2.4, 2.6, 99.0, 5.0]])], [example])
    assert score["value"] == 0.5 and score["abs_rel"] == pytest.approx((0.2 + 0.3) / 2)
    unknown = DepthAccuracy().score([np.zeros((1, 4))], [example])
    assert unknown["value"] == 0.0
    assert DepthAccuracy().baseline([example], [example])["value"] == 1.0


def test_caption_score():
    truth = [{"caption": "a small red cube and a large blue sphere"}]
    score = CaptionAttributes().score(["a small red cube and a small blue sphere"], truth)
    assert score["value"] == pytest.approx(0.75) and score["exact"] == 0.0
    assert CaptionAttributes().score([truth[0]["caption"]], truth) == {"value": 1.0, "exact": 1.0}


def test_foreground_overlap_of_the_true_picture_is_nearly_one():
    from m4.data.sources.rendering import scene

    examples = [scene("simple", 5, "test", i) for i in range(8)]
    measure = ForegroundOverlap()
    assert measure.score([e["rgb"] for e in examples], examples)["value"] > 0.95
    assert measure.baseline(examples, examples)["value"] < 0.6
