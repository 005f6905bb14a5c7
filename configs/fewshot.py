"""In-context tuning: from the quickstart, a model that learns tasks from labelled examples in its prompt.

python train.py configs/quickstart.py
python train.py configs/fewshot.py
python -m m4 evaluate runs/fewshot --suite fewshot
"""

import dataclasses

from m4.config import load_config
from m4.data import Dataset
from m4.evals.episodes.counting import Counting
from m4.evals.episodes.fast_binding import FastBinding
from m4.evals.episodes.operators import OperatorInduction
from m4.evals.episodes.renamed import Renamed
from m4.evals.episodes.source import EpisodeSource
from m4.evals.fewshot import FewShot
from m4.optim import OptimizerConfig
from m4.shots import ShotMasking
from m4_tokenizers.stored import TokenizerFile
from m4_tokenizers.text import TextRecipe

quickstart = load_config("configs/quickstart.py")
pretrained = "runs/quickstart"

# Answers are spelled in bytes, in a modality of their own: names that nobody has used before, and numbers.
text = TextRecipe(name="text", signal="text", max_length=12, num_sentinels=3, num_bins=0, vocab_size=4 + 3 + 32 + 256)


def tasks(max_shots):
    found = (
        FastBinding(ways=1, max_shots=max_shots),  # copying, where there is nothing to choose
        FastBinding(max_shots=max_shots),
        FastBinding(ways=5, max_shots=max_shots),
        OperatorInduction(form="text", max_shots=max_shots),
        OperatorInduction(max_shots=max_shots),
        Counting(max_shots=max_shots),
    )
    return tuple(Renamed(task=t, old="caption", new="text") for t in found)


def episodes(task, weight):
    inputs = ("rgb",) if task.images else ("text",)
    num_tokens = 16 if task.name.startswith("fast_binding") else 64
    return Dataset(
        source=EpisodeSource(task=task, num_train=4000, num_test=64),
        shots=ShotMasking(num_examples=5, inputs=inputs, outputs=("text",), labelled=(2, 4), num_tokens=(num_tokens,)),
        weight=weight,
        name=task.name,
    )


config = dataclasses.replace(
    quickstart,
    name="fewshot",
    init_from=pretrained,
    datasets=tuple(
        episodes(t, weight) for t, weight in zip(tasks(4), (0.1, 0.2, 0, 0.15, 0.35, 0.2), strict=True) if weight
    ),
    tokenizers=(
        *(
            TokenizerFile(path=f"{pretrained}/tokenizers/{name}.safetensors")
            for name in ("rgb_pixels", "rgb", "depth", "caption", "boxes")
        ),
        text,
    ),
    masking=dataclasses.replace(quickstart.masking, num_inputs=352, num_targets=18),
    model=dataclasses.replace(quickstart.model, separate_depth=2, match_size=32),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50),
    loss="token",
    batch_size=32,
    num_steps=600,
    evaluations=(),
    fewshot=FewShot(tasks=tasks(8)[1:]),
)
