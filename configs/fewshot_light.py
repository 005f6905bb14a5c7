"""In-context examples read by a light module beside the quickstart, which stays as it is (M2IXT, Chen et al. 2023).

    python train.py configs/quickstart.py
    python train.py configs/fewshot_light.py
    python -m m4 evaluate runs/fewshot_light --suite fewshot

Trained with at most 3 examples in a prompt. On 2 CPU cores: 4 minutes with preparation, its evaluation 3. Held-out
kinds under new names, 2 of them, 4 examples: 0.867 right where chance is 0.5, and 0.880 with 8.
"""

import dataclasses

from m4.config import load_config
from m4.data.dataset import Dataset
from m4.evaluation.few_shot import FewShot
from m4.in_context.example_encoder import ExampleEncoder
from m4.in_context.independent_items import IndependentItems
from m4.in_context.similarity_prior import SimilarityPrior
from m4.in_context.tasks.fast_binding import FastBinding
from m4.in_context.tasks.source import EpisodeSource
from m4.masking.episodes import EpisodeMasking
from m4.objectives.masked_modeling import MaskedModeling

fewshot = load_config("configs/fewshot.py")
in_text = load_config("configs/fewshot.py", "in_text")
extensions = (IndependentItems(num_blocks=2), ExampleEncoder(depth=1), SimilarityPrior(size=32))
masking = EpisodeMasking(num_examples=4, outputs=("text",), labelled=(1, 3), num_tokens=(16,), ask_all=True)


def episodes(task):
    source = EpisodeSource(task=in_text(task), num_train=8000, num_test=64)
    return Dataset(source=source, masking=masking, name=task.name)


config = dataclasses.replace(
    fewshot,
    name="fewshot_light",
    datasets=(episodes(FastBinding(ways=1, max_shots=3)), episodes(FastBinding(max_shots=3))),
    masking=dataclasses.replace(fewshot.masking, num_inputs=140),
    model=dataclasses.replace(fewshot.model, extensions=extensions),
    objectives=(MaskedModeling(weighting="token"),),
    optimizer=dataclasses.replace(fewshot.optimizer, train=("shot_encoder*", "matching*"), learning_rate=3e-3),
    num_steps=300,
    evaluators=(FewShot(tasks=(in_text(FastBinding()),), num_tokens=16),),
)
