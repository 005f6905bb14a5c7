"""A modality that pretraining never saw, from 500 samples: what a thermal camera sees of the quickstart's scenes.

    python train.py configs/quickstart.py
    python train.py configs/thermal.py

On 2 CPU cores: 5 to 13 minutes beside other work. Normalised, means of 3 seeds: picture -> thermal 0.548, thermal ->
picture 0.339 (from random parameters -0.169 and 0.060); of old tasks picture -> depth lost 0.004, the others nothing
(python benchmarks/new_modality.py).
"""

import dataclasses

from m4.config import load_config
from m4.data.dataset import Dataset
from m4.data.sources.thermal import ThermalScenes
from m4.evaluation.conditional_generation import ConditionalGeneration, ConditionalTask
from m4.evaluation.measures.attributes import ForegroundOverlap
from m4.evaluation.measures.maps import MapAccuracy
from m4.inference.parallel import MaskGIT
from m4.masking.dirichlet import DirichletMasking, Strategy
from m4.training.optimizer import OptimizerConfig
from m4_tokenizers.modalities.maps import MapRecipe
from m4_tokenizers.modalities.stored import tokenizers_of
from m4_tokenizers.networks.patch_mixing import PatchEncoder

quickstart = load_config("configs/quickstart.py")
thermal = MapRecipe(
    signal="thermal", name="thermal_tokens", lowest=0, highest=80, units="degrees Celsius",
    encoder=PatchEncoder(num_blocks=0), num_steps=300,
)  # fmt: skip
there = Strategy(inputs={"rgb_pixels": 1.0}, targets={"thermal_tokens": 1.0}, keep="all")
back = Strategy(inputs={"thermal_tokens": 1.0}, targets={"rgb_tokens": 1.0}, keep="all")
finish = Strategy(inputs={"thermal_tokens": 1000.0, "rgb_tokens": 1.0}, targets={"rgb_tokens": 1.0})

config = dataclasses.replace(
    quickstart,
    name="thermal",
    init_from="runs/quickstart",
    tokenizers=(*tokenizers_of("runs/quickstart"), thermal),
    datasets=(
        Dataset(
            source=ThermalScenes(seed=1, num_train=500),
            masking=DirichletMasking(strategies=(there, back, finish)),
            name="thermal",
        ),
        dataclasses.replace(quickstart.datasets[0], name="rehearsal", weight=2.0),
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20),
    num_steps=300,
    evaluators=(
        ConditionalGeneration(
            tasks=(
                ConditionalTask(
                    name="rgb_to_thermal",
                    inputs=("rgb",),
                    target="thermal",
                    scheme=MaskGIT(steps=1, temperature=0),
                    metric=MapAccuracy(signal="thermal", tolerance=2.0),
                ),
                ConditionalTask(
                    name="thermal_to_rgb",
                    inputs=("thermal",),
                    target="rgb",
                    scheme=MaskGIT(steps=6, temperature=0.5),
                    metric=ForegroundOverlap(),
                ),
                *quickstart.evaluators[0].tasks,
            )
        ),
    ),
)
