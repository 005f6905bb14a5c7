"""4M-21 B: twenty-one modalities, three data sets, from the weights of 4M-7 (Bachmann et al. 2024, section 3).

    python train.py configs/4m21_b.py --init-from runs/4m7_b

Data: token shards of CC12M (all modalities), COYO-700M (those of 4M-7) and C4 (text). Hardware: 32 TPU v5e chips or 16
GPUs of 80 GB; see `python -m m4 plan configs/4m21_b.py --topology v5e:8x8`.
Expected cost, planned and not measured: 238,419 steps, 3.4e20 model FLOPs:
40 chip-days of TPU v5e at 50% MFU, or 9 H100-days at 45%.
"""

import dataclasses

from m4.config import Config, load_config
from m4.data.dataset import Dataset
from m4.interchange import fourm
from m4.masking.dirichlet import DirichletMasking, Masking, Strategy
from m4_tokenizers.modalities.image import PixelPatchesRecipe
from m4_tokenizers.modalities.stored import IdsRecipe

base: Config = load_config("configs/4m7_b.py")
batch_size, num_inputs, num_targets = 4096, 256, 256


def mixture(names: tuple[str, ...], captions: tuple[str, ...]) -> tuple[Strategy, ...]:
    """Everything to everything, from few modalities at a time to all; pixels to everything; captions to everything."""
    predicted = [n for n in names if n not in ("rgb@224", "t5_caption")]
    keep = {"color_palette": "binary"} if "color_palette" in names else {}
    return (
        *(Strategy(inputs=dict.fromkeys(names, a), targets=dict.fromkeys(predicted, a), keep=keep) for a in ALPHAS),
        Strategy(inputs={"rgb@224": 1000.0}, targets=dict.fromkeys(predicted, 0.5), keep=keep),
        *(
            Strategy(
                weight=1 / len(captions),
                inputs={caption: 5.0, **{n: 0.05 for n in names if n not in CAPTIONS}},
                targets={n: 0.5 for n in predicted if n != caption},
                keep={**keep, caption: "all"},
            )
            for caption in captions
        ),
    )


ALPHAS = (0.01, 0.1, 1.0, 10.0)
CAPTIONS = ("caption", "t5_caption")
words = (Strategy(inputs={"caption": 1.0}, targets={"caption": 1.0}),)
config = dataclasses.replace(
    base,
    name="4m21_b",
    datasets=(
        Dataset(
            tokens="data/tokens/cc12m_21",
            weight=0.6,
            masking=DirichletMasking(strategies=mixture(fourm.MOD21, CAPTIONS)),
        ),
        Dataset(
            tokens="data/tokens/coyo",
            weight=0.2,
            masking=DirichletMasking(strategies=mixture(fourm.MOD7, ("caption",))),
        ),
        Dataset(
            tokens="data/tokens/c4",
            weight=0.2,
            masking=DirichletMasking(strategies=(Strategy(inputs={"caption": 1.0}, targets={"caption": 1.0}),)),
        ),
    ),
    tokenizers=tuple(
        PixelPatchesRecipe(name=name, image_size=224, patch_size=16, mean=fourm.IMAGENET_MEAN, std=fourm.IMAGENET_STD)
        if name == "rgb@224"
        else IdsRecipe(modality=fourm.modality(name))
        for name in fourm.MOD21
    ),
    masking=Masking(num_inputs=num_inputs, num_targets=num_targets, strategies=mixture(fourm.MOD21, CAPTIONS)),
    model=fourm.released("base", dtype="bfloat16", share_modality_embeddings=False),
    optimizer=dataclasses.replace(base.optimizer, learning_rate=1e-4 * batch_size / 256),
    batch_size=batch_size,
)
