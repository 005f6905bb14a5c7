"""Mean average precision of labelled boxes at an overlap of 0.5, by pycocotools."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

Boxes = dict[
    str, Any
]  # {"bbox": float32 [n 4] as (ymin, xmin, ymax, xmax) in [0, 1], "label": n str, "score": n float}


def mean_average_precision(predictions: Sequence[Boxes], truths: Sequence[Boxes], *, iou: float = 0.5) -> float:
    """Class-aware mAP over the labels that the truths hold; predictions without "score" have equal scores."""
    labels = sorted({label for t in truths for label in t["label"]})
    category = {label: i + 1 for i, label in enumerate(labels)}
    rows = lambda boxes, i: [  # noqa: E731
        {
            "image_id": i,
            "category_id": category[label],
            "bbox": [1000 * x for x in (x0, y0, x1 - x0, y1 - y0)],
            "area": float(1e6 * (x1 - x0) * (y1 - y0)),
            "iscrowd": 0,
            "score": float(score),
        }
        for (y0, x0, y1, x1), label, score in zip(
            np.asarray(boxes["bbox"], float).tolist(),
            boxes["label"],
            boxes["score"] if "score" in boxes else np.ones(len(boxes["label"])),
            strict=True,
        )
        if label in category
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth, predicted = COCO(), [row for i, p in enumerate(predictions) for row in rows(p, i)]
        annotations = [row for i, t in enumerate(truths) for row in rows(t, i)]
        truth.dataset = {
            "images": [{"id": i} for i in range(len(truths))],
            "annotations": [{"id": k + 1, **row} for k, row in enumerate(annotations)],
            "categories": [{"id": i, "name": label} for label, i in category.items()],
        }
        truth.createIndex()
        if not predicted:
            return 0.0
        evaluation = COCOeval(truth, truth.loadRes(predicted), "bbox")
        evaluation.params.iouThrs = np.array([iou])
        areas: list[list[int] | list[float]] = [[0, 1e10]]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = areas, ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    accumulated: Any = evaluation.eval  # a dict, which its stubs do not say
    precision = accumulated["precision"][0, :, :, 0, -1]  # [recall, class]
    return float(precision[:, (precision > -1).all(0)].mean())


@dataclasses.dataclass(frozen=True)
class BoxAccuracy:
    """`value` is class-aware mAP@0.5."""

    metric = "class-aware mAP@0.5"

    def score(self, predictions: Sequence[Any], examples: Sequence[dict[str, Any]]) -> dict[str, float]:
        return {"value": mean_average_precision(predictions, [e["boxes"] for e in examples])}

    def baseline(self, train: Sequence[dict[str, Any]], examples: Sequence[dict[str, Any]]) -> dict[str, float]:
        """The best constant prediction: k cluster centres of each label's training boxes, for the k that scores best in
        training.
        """
        constants = [_constant_boxes(train, k) for k in (1, 2, 4, 8, 16, 32)]
        scores = [self.score([c] * len(train), train)["value"] for c in constants]
        return self.score([constants[int(np.argmax(scores))]] * len(examples), examples)


def _constant_boxes(train: Sequence[dict[str, Any]], k: int) -> Boxes:
    """k-means centres of the boxes of each label, the share of boxes near a centre as its score."""
    boxes = np.concatenate([e["boxes"]["bbox"] for e in train])
    labels = np.array([label for e in train for label in e["boxes"]["label"]])
    out: Boxes = {"bbox": [], "label": [], "score": []}
    for label in sorted(set(labels)):
        points = boxes[labels == label]
        centres = points[np.linspace(0, len(points) - 1, min(k, len(points))).astype(int)]
        for _ in range(20):
            nearest = np.linalg.norm(points[:, None] - centres[None], axis=-1).argmin(1)
            centres = np.stack(
                [points[nearest == i].mean(0) if (nearest == i).any() else c for i, c in enumerate(centres)]
            )
        out["bbox"].extend(centres)
        out["label"].extend([label] * len(centres))
        out["score"].extend((nearest == i).mean() for i in range(len(centres)))
    return out
