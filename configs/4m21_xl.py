"""4M-21 XL: as 4m21_b.py with 24 + 24 blocks of width 2048, a fifth of the learning rate.

    python train.py configs/4m21_xl.py

Hardware: 256 TPU v5e or 128 v5p chips, or 128 GPUs of 80 GB; see
`python -m m4 plan configs/4m21_xl.py --topology v5e:16x16`.
Expected cost, planned and not measured: 238,419 steps, 4.4e21 model FLOPs:
517 chip-days of TPU v5e at 50% MFU, or 114 H100-days at 45%.
"""

import dataclasses

from m4.config import Config, load_config
from m4.distributed.mesh import MeshConfig
from m4.interchange import fourm

base: Config = load_config("configs/4m21_b.py")
config = dataclasses.replace(
    base,
    name="4m21_xl",
    model=fourm.released("xlarge", dtype="bfloat16", remat="blocks", share_modality_embeddings=False),
    optimizer=dataclasses.replace(base.optimizer, learning_rate=2e-5 * base.batch_size / 256, clip_norm=3.0),
    mesh=MeshConfig(fsdp=64),
    micro_batches=1,
)
