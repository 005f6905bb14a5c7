"""Tokenizers of real photographs: 8 x 8 tokens of random crops at 64 x 64.

    pip install -e ".[photos]" && python -m m4_tokenizers train configs/tokenizers/photos.py

Hardware: 2 CPU cores. Time and results: the table of tokenizers/README.md (cards photos_*).
"""

from m4.data.sources.photos import Photos
from m4_tokenizers.modalities.edges import EdgesRecipe
from m4_tokenizers.modalities.image import ImageRecipe
from m4_tokenizers.quantizers.vector import LearnedVectorQuantizer
from m4_tokenizers.train import TokenizerConfig

codes = LearnedVectorQuantizer(num_codes=1024)

config = TokenizerConfig(
    source=Photos(num_train=20_000, num_validation=1024),
    tokenizers=(
        ImageRecipe(quantizer=codes, num_steps=1500),
        EdgesRecipe(quantizer=codes, num_steps=1000),
    ),
)
