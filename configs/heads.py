"""A classification head and a dense head on a pretrained model: what a cut-out is, and which pixels are of it.

    python train.py configs/quickstart.py
    apt-get install tuxpaint-stamps-default
    python train.py configs/heads.py

Heads are modalities: one token for the class of a sample, a grid of tokens for the classes of its pixels. Test stamps
are of no training. On 2 CPU cores: 12 minutes with preparation, beside other work. Results: category (of 16) 0.344
right (most frequent 0.230), classes of object pixels 0.141 (best constant map 0.017, bound 0.722); old tasks lose
nothing.
"""

import dataclasses

from m4.config import load_config
from m4.data.dataset import Dataset
from m4.data.sources.stamps import CATEGORIES, Stamps
from m4.evaluation.conditional_generation import ConditionalGeneration, ConditionalTask
from m4.evaluation.measures.classes import ClassAccuracy, ClassMapAccuracy
from m4.inference.parallel import MaskGIT
from m4.masking.dirichlet import DirichletMasking, Strategy
from m4.training.optimizer import OptimizerConfig
from m4_tokenizers.modalities.classes import ClassRecipe
from m4_tokenizers.modalities.semseg import SemanticRecipe
from m4_tokenizers.modalities.stored import tokenizers_of
from m4_tokenizers.networks.patch_mixing import PatchEncoder

quickstart = load_config("configs/quickstart.py")
classes = ("nothing", *CATEGORIES)
category = ClassRecipe(signal="category", classes=CATEGORIES)
semseg = SemanticRecipe(
    num_classes=len(classes), class_names=classes, encoder=PatchEncoder(num_blocks=0), num_steps=300
)
heads = Strategy(inputs={"rgb_pixels": 1.0}, targets={"category": 1.0, "semseg_tokens": 1.0}, keep="all")
best = MaskGIT(steps=1, temperature=0)

config = dataclasses.replace(
    quickstart,
    name="heads",
    init_from="runs/quickstart",
    tokenizers=(*tokenizers_of("runs/quickstart"), category, semseg),
    datasets=(
        Dataset(
            source=Stamps(max_objects=1, num_train=6000),
            signals=("rgb", "category", "semseg"),
            masking=DirichletMasking(strategies=(heads,)),
            name="stamps",
        ),
        dataclasses.replace(quickstart.datasets[0], name="rehearsal"),
    ),
    masking=dataclasses.replace(quickstart.masking, num_targets=65),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20),
    num_steps=300,
    evaluators=(
        ConditionalGeneration(
            tasks=(
                ConditionalTask(
                    name="rgb_to_category",
                    inputs=("rgb",),
                    target="category",
                    scheme=best,
                    metric=ClassAccuracy(),
                    dataset="stamps",
                ),
                ConditionalTask(
                    name="rgb_to_semseg",
                    inputs=("rgb",),
                    target="semseg",
                    scheme=best,
                    metric=ClassMapAccuracy(),
                    dataset="stamps",
                ),
                *(dataclasses.replace(d, dataset="rehearsal") for d in quickstart.evaluators[0].tasks),
            )
        ),
    ),
)
