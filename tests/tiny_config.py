"""A run of seconds with every part of the quickstart, for tests. python train.py tests/tiny_config.py"""

import dataclasses

from m4.checkpoints.numbered import CheckpointConfig
from m4.config import Config, load_config
from m4.data.dataset import Dataset
from m4.data.sources.scenes import Scenes
from m4.model.config import ModelConfig
from m4.training.metrics import MetricsConfig
from m4_tokenizers.modalities.boxes import BoxRecipe
from m4_tokenizers.modalities.depth import DepthRecipe
from m4_tokenizers.modalities.image import ImageRecipe, PixelPatchesRecipe
from m4_tokenizers.modalities.text import TextRecipe
from m4_tokenizers.networks.patch_mixing import PatchDecoder, PatchEncoder
from m4_tokenizers.quantizers.vector import LearnedVectorQuantizer

quickstart: Config = load_config("configs/quickstart.py")
small = {
    "encoder": PatchEncoder(width=18, num_blocks=0),
    "quantizer": LearnedVectorQuantizer(num_codes=32),
    "decoder": PatchDecoder(width=18, num_blocks=1),
    "num_steps": 3,
}

config = dataclasses.replace(
    quickstart,
    name="tiny",
    datasets=(Dataset(source=Scenes(num_train=200, num_validation=16, num_test=24, num_heldout=8)),),
    tokenizers=(PixelPatchesRecipe(), ImageRecipe(**small), DepthRecipe(**small), TextRecipe(), BoxRecipe()),
    model=ModelConfig(width=32, num_heads=2, encoder_depth=1, decoder_depth=1, hidden=32),
    batch_size=16,
    num_steps=100,
    checkpoints=CheckpointConfig(save_every=4),
    metrics=MetricsConfig(log_every=1),
    evaluators=(dataclasses.replace(quickstart.evaluators[0], splits=("test", "heldout"), num_samples=12),),
)
