"""A diffusion decoder on the frozen encoder of configs/tokenizers/scenes.py, which is trained first.

    python -m m4_tokenizers train configs/tokenizers/scenes.py --signal rgb
    python -m m4_tokenizers train configs/tokenizers/diffusion.py

Hardware: 2 CPU cores. Time and results: the table of tokenizers/README.md (card diffusion_rgb), the plain decoder's in
the row scenes_rgb.
"""

import dataclasses

from m4.config import load_config
from m4_tokenizers.losses import AbsoluteError
from m4_tokenizers.networks.diffusion import DiffusionDecoder, Schedule
from m4_tokenizers.networks.unet import UNet
from m4_tokenizers.train import TokenizerConfig

scenes: TokenizerConfig = load_config("configs/tokenizers/scenes.py")

config = dataclasses.replace(
    scenes,
    tokenizers=(
        dataclasses.replace(
            scenes.tokenizers[0],
            name="rgb_diffusion",
            decoder=DiffusionDecoder(
                network=UNet(width=64, multipliers=(1, 2), num_blocks=1, attention_levels=(1,)),
                # As the released 4M tokenizers: the clean picture is predicted. With v-prediction so small a network
                # leaves noise in the picture (see tokenizers/README.md).
                schedule=Schedule(kind="shifted_cosine:0.5", prediction="sample"),
                num_decode_steps=10,
            ),
            start_from="runs/tokenizers/rgb_tokens.safetensors",
            losses=(AbsoluteError(),),
            num_steps=4200,
            batch_size=8,
            learning_rate=1e-3,
            num_examples=20_000,
            num_held_out=256,
        ),
    ),
)
