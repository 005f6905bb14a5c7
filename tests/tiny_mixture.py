"""configs/mixture.py in seconds, for tests. python train.py tests/tiny_mixture.py --datasets.2.source.files FILE"""

import dataclasses

from m4.checkpoints.numbered import CheckpointConfig
from m4.config import Config, load_config

tiny: Config = load_config("tests/tiny_config.py")
mixture: Config = load_config("configs/mixture.py")
scenes, stamps, texts = mixture.datasets
small = dataclasses.replace(stamps.source, num_train=120, num_validation=8, num_test=8)

config = dataclasses.replace(
    tiny,
    name="tiny_mixture",
    datasets=(
        dataclasses.replace(scenes, source=tiny.datasets[0].source),
        dataclasses.replace(stamps, source=small),
        texts,
    ),
    tokenizers=(*tiny.tokenizers[:3], *mixture.tokenizers[3:]),
    masking=mixture.masking,
    evaluators=(),
    num_steps=12,
    checkpoints=CheckpointConfig(save_every=6),
)
