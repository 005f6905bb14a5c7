"""Words that are heard, with pictures that show what they say: a modality of sound for a model that never heard any.

    python train.py configs/quickstart.py
    apt-get install tuxpaint-stamps-default && pip install -e ".[audio]"
    python train.py configs/spoken.py

Both ways, picture <-> spoken words in six languages, while the scenes of before are rehearsed. On 2 CPU cores: about 20
minutes. Pairs of the training split find each other (mean rank 0.25, chance 0.5), those of unseen things hardly (0.42;
see docs/results.md); of old tasks caption -> picture loses 0.001, the others nothing.
"""

import dataclasses

from m4.config import load_config
from m4.data.dataset import Dataset
from m4.evaluation.conditional_generation import ConditionalGeneration
from m4.evaluation.retrieval import Retrieval
from m4.masking.dirichlet import DirichletMasking, Strategy
from m4.objectives.contrastive import Contrast
from m4.objectives.masked_modeling import MaskedModeling
from m4.training.optimizer import OptimizerConfig
from m4_tokenizers.modalities.stored import tokenizers_of

quickstart = load_config("configs/quickstart.py")
spoken = load_config("configs/tokenizers/spoken.py")
there = Strategy(inputs={"rgb_pixels": 1.0}, targets={"audio_tokens": 1.0}, keep="all")
finish = Strategy(
    inputs={"rgb_pixels": 1000.0, "audio_tokens": 1.0}, targets={"audio_tokens": 1.0}, input_share=(0.5, 1.0)
)
back = Strategy(inputs={"audio_tokens": 1.0}, targets={"rgb_tokens": 1.0}, keep="all")
# What the contrast compares: all of a picture beside all of a recording.
both = Strategy(inputs={"rgb_pixels": 1.0, "audio_tokens": 1.0}, targets={"rgb_tokens": 1.0}, keep="all", weight=5.0)
num_inputs = 128
as_before = quickstart.masking.num_inputs / num_inputs  # rehearsed tasks read no more than they did
rehearsed = tuple(
    dataclasses.replace(s, input_share=tuple(as_before * x for x in s.input_share))
    for s in quickstart.masking.strategies
)

config = dataclasses.replace(
    quickstart,
    name="spoken",
    init_from="runs/quickstart",
    tokenizers=(*tokenizers_of("runs/quickstart"), *spoken.tokenizers),
    datasets=(
        Dataset(
            source=spoken.source,
            masking=DirichletMasking(strategies=(there, finish, back, both)),
            name="spoken",
            weight=2.0,
        ),
        dataclasses.replace(quickstart.datasets[0], name="rehearsal", masking=DirichletMasking(strategies=rehearsed)),
    ),
    masking=dataclasses.replace(quickstart.masking, num_inputs=num_inputs),
    objectives=(MaskedModeling(), Contrast(a=("rgb_pixels",), b=("audio_tokens",))),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20),
    num_steps=1000,
    evaluators=(
        ConditionalGeneration(
            tasks=tuple(dataclasses.replace(d, dataset="rehearsal") for d in quickstart.evaluators[0].tasks)
        ),
        Retrieval(a=("rgb",), b=("audio",), num_samples=77),  # each unseen stamp once
    ),
)
