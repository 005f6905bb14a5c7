"""4M-7 B: seven modalities, 12 + 12 blocks of width 768, as the original trained it (Mizrahi et al. 2023, appendix).

    python train.py configs/4m7_b.py --datasets.0.tokens data/tokens/cc12m      on every host: scripts/launch_tpu.sh

Data: token shards of CC12M with the modalities below, by `python -m m4 pretokenize`.
Hardware: 64 TPU v5e chips or 16 GPUs of 80 GB; see `python -m m4 plan configs/4m7_b.py --topology v5e:8x8`.
Expected cost, planned and not measured: 238,419 steps, 3.3e20 model FLOPs:
38 chip-days of TPU v5e at 50% MFU, or 8 H100-days at 45%.
"""

from m4.checkpoints.numbered import CheckpointConfig
from m4.config import Config
from m4.data.dataset import Dataset
from m4.interchange import fourm
from m4.masking.dirichlet import Masking, Strategy
from m4.training.metrics import MetricsConfig
from m4.training.optimizer import OptimizerConfig
from m4_tokenizers.modalities.image import PixelPatchesRecipe
from m4_tokenizers.modalities.stored import IdsRecipe

NUM_TOKENS = 500e9
batch_size, num_inputs, num_targets = 8192, 128, 128
tokens_per_step = batch_size * (num_inputs + num_targets)

targets = {name: 0.5 for name in fourm.MOD7 if name != "rgb@224"}
config = Config(
    name="4m7_b",
    datasets=(Dataset(tokens="data/tokens/cc12m"),),
    tokenizers=tuple(
        PixelPatchesRecipe(name=name, image_size=224, patch_size=16, mean=fourm.IMAGENET_MEAN, std=fourm.IMAGENET_STD)
        if name == "rgb@224"
        else IdsRecipe(modality=fourm.modality(name))
        for name in fourm.MOD7
    ),
    masking=Masking(
        num_inputs=num_inputs,
        num_targets=num_targets,
        strategies=(
            Strategy(inputs={"rgb@224": 1000.0}, targets=targets),
            Strategy(inputs={"rgb@224": 0.5, **targets}, targets=targets),
        ),
    ),
    model=fourm.released("base", dtype="bfloat16"),
    optimizer=OptimizerConfig(
        learning_rate=1e-4 * batch_size / 256, warmup_steps=round(10e9 / tokens_per_step), clip_norm=1e4
    ),
    batch_size=batch_size,
    num_workers=8,
    num_steps=round(NUM_TOKENS / tokens_per_step),
    checkpoints=CheckpointConfig(save_every=1000, keep_every=20_000),
    metrics=MetricsConfig(log_every=50),
)
