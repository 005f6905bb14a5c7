"""Tokenizers of every image-like signal of the scenes, 8 x 8 tokens at 64 x 64.

    python -m m4_tokenizers train configs/tokenizers/scenes.py [--signal depth]

Hardware: 2 CPU cores. Time and results: the table of tokenizers/README.md (cards scenes_*).
"""

from m4.data.sources.scenes import Scenes
from m4_tokenizers.modalities.depth import DepthRecipe
from m4_tokenizers.modalities.edges import EdgesRecipe
from m4_tokenizers.modalities.image import ImageRecipe
from m4_tokenizers.modalities.instances import MaskRecipe
from m4_tokenizers.modalities.normals import NormalsRecipe
from m4_tokenizers.modalities.semseg import SemanticRecipe
from m4_tokenizers.quantizers.vector import LearnedVectorQuantizer
from m4_tokenizers.train import TokenizerConfig

codes = LearnedVectorQuantizer(num_codes=1024)

config = TokenizerConfig(
    source=Scenes(variant="full", num_train=20_000, num_validation=1000),
    tokenizers=(
        ImageRecipe(quantizer=codes, num_steps=1500),
        DepthRecipe(quantizer=LearnedVectorQuantizer(num_codes=4096), num_steps=2200, num_examples=12_000),
        NormalsRecipe(quantizer=codes, num_steps=1200),
        SemanticRecipe(quantizer=codes, num_steps=1200),
        EdgesRecipe(quantizer=codes, num_steps=1200),
        MaskRecipe(num_steps=800),
    ),
)
