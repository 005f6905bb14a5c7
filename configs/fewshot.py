"""In-context tuning: from the quickstart, a model that learns tasks from labelled examples in its prompt.

    python train.py configs/quickstart.py
    python train.py configs/fewshot.py
    python -m m4 evaluate runs/fewshot --suite fewshot

On 2 CPU cores, beside two other runs: 24 minutes with preparation, its evaluation 15. With 4 examples, held-out kinds
under new names, 2 of them: 0.943 right where chance is 0.5; counting by an attribute that is never said: 0.447, 0.282
without examples and 0.314 with shuffled labels (all figures: docs/results.md).
"""

import dataclasses

from m4.config import load_config
from m4.data.dataset import Dataset
from m4.evaluation.few_shot import FewShot
from m4.in_context.independent_items import IndependentItems
from m4.in_context.similarity_prior import SimilarityPrior
from m4.in_context.tasks.counting import Counting
from m4.in_context.tasks.fast_binding import FastBinding
from m4.in_context.tasks.operators import OperatorInduction
from m4.in_context.tasks.renamed_signal import Renamed
from m4.in_context.tasks.source import EpisodeSource
from m4.masking.dirichlet import DirichletMasking, Strategy
from m4.masking.episodes import EpisodeMasking
from m4.objectives.masked_modeling import MaskedModeling
from m4.objectives.word_prediction import WordPrediction
from m4.training.optimizer import OptimizerConfig
from m4_tokenizers.modalities.stored import tokenizers_of
from m4_tokenizers.modalities.text import TextRecipe

quickstart = load_config("configs/quickstart.py")
pretrained = "runs/quickstart"

# Answers are spelled in bytes, in a modality of their own: names that nobody has used before, and numbers.
text = TextRecipe(name="text", signal="text", max_length=12, num_sentinels=3, num_bins=0, vocab_size=4 + 3 + 32 + 256)
# Of captions it learns by which words examples may be alike (m4/in_context/similarity_prior.py).
captions = Strategy(inputs={"rgb_pixels": 1.0}, targets={"caption": 1.0}, keep="all")
# Each example is read by itself at first; then those like the query are compared with it.
extensions = (IndependentItems(num_blocks=2), SimilarityPrior(size=32, words="caption"))


def in_text(task):
    return Renamed(task=task, old="caption", new="text")


def episodes(task, weight):
    masking = EpisodeMasking(
        num_examples=5,
        inputs=("rgb",) if task.images else ("text",),
        outputs=("text",),
        labelled=(2, 4),
        num_tokens=(16, 64) if task.name.startswith("fast_binding") else (64,),
        ask_all=task.name != "counting",  # whose examples are balanced over few labels (EpisodeMasking)
    )
    source = EpisodeSource(task=in_text(task), num_train=8000, num_test=64)
    return Dataset(source=source, masking=masking, weight=weight, name=task.name)


config = dataclasses.replace(
    quickstart,
    name="fewshot",
    init_from=pretrained,
    datasets=(
        dataclasses.replace(
            quickstart.datasets[0], name="captions", masking=DirichletMasking(strategies=(captions,)), weight=0.2
        ),
        episodes(FastBinding(ways=1, max_shots=4), 0.1),  # copying, where there is nothing to choose
        episodes(FastBinding(max_shots=4), 0.2),
        episodes(OperatorInduction(form="text", max_shots=4), 0.1),
        episodes(OperatorInduction(max_shots=4), 0.05),
        episodes(Counting(max_shots=4), 0.35),
    ),
    tokenizers=(*tokenizers_of(pretrained), text),
    masking=dataclasses.replace(quickstart.masking, num_inputs=352, num_targets=18),
    model=dataclasses.replace(quickstart.model, extensions=extensions),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50),
    objectives=(MaskedModeling(weighting="token"), WordPrediction(text="caption")),
    batch_size=32,
    num_steps=800,
    evaluators=(
        FewShot(
            tasks=tuple(
                in_text(t)
                for t in (
                    FastBinding(),
                    FastBinding(ways=5),
                    OperatorInduction(),
                    OperatorInduction(form="text"),
                    Counting(),
                )
            ),
            num_tokens=(16, 16, 64, 16, 64),
            token_counts=(1, 4, 16),
        ),
    ),
)
