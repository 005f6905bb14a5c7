"""4M-7 XL: as 4m7_b.py with 24 + 24 blocks of width 2048, 2.8 billion parameters, a fifth of the learning rate.

    python train.py configs/4m7_xl.py

Hardware: 256 TPU v5e or 128 v5p chips, or 128 GPUs of 80 GB; see
`python -m m4 plan configs/4m7_xl.py --topology v5e:16x16`.
Expected cost, planned and not measured: 238,419 steps, 4.3e21 model FLOPs:
510 chip-days of TPU v5e at 50% MFU, or 113 H100-days at 45%.
"""

import dataclasses

from m4.config import Config, load_config
from m4.distributed.mesh import MeshConfig
from m4.interchange import fourm

base: Config = load_config("configs/4m7_b.py")
config = dataclasses.replace(
    base,
    name="4m7_xl",
    model=fourm.released("xlarge", dtype="bfloat16", remat="blocks"),
    optimizer=dataclasses.replace(base.optimizer, learning_rate=2e-5 * base.batch_size / 256, clip_norm=3.0),
    mesh=MeshConfig(fsdp=64),
    micro_batches=1,
)
