"""4M-7 L: as 4m7_b.py with 24 + 24 blocks of width 1024.

    python train.py configs/4m7_l.py

Hardware: 64 TPU v5e chips or 32 GPUs of 80 GB; see `python -m m4 plan configs/4m7_l.py --topology v5e:8x8`.
Expected cost, planned and not measured: 238,419 steps, 1.1e21 model FLOPs:
130 chip-days of TPU v5e at 50% MFU, or 29 H100-days at 45%.
"""

import dataclasses

from m4.config import Config, load_config
from m4.distributed.mesh import MeshConfig
from m4.interchange import fourm

base: Config = load_config("configs/4m7_b.py")
config = dataclasses.replace(
    base,
    name="4m7_l",
    model=fourm.released("large", dtype="bfloat16"),
    mesh=MeshConfig(fsdp=16),
    micro_batches=1,
)
