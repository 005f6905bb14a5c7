"""Four quantizers at equal bits (10 a token) in the same networks, on the same scenes and steps.

    python -m m4_tokenizers train configs/tokenizers/quantizers.py

Hardware: 2 CPU cores, about 2 minutes each. Results: the table of tokenizers/README.md (cards quantizers_*).
"""

import dataclasses

from m4.data.sources.scenes import Scenes
from m4_tokenizers.modalities.image import ImageRecipe
from m4_tokenizers.quantizers.scalar import FiniteScalarQuantizer, LookupFreeQuantizer
from m4_tokenizers.quantizers.vector import LearnedVectorQuantizer, VectorQuantizer
from m4_tokenizers.train import TokenizerConfig

base = ImageRecipe(num_steps=1500)
variants = {
    "rgb_ema": VectorQuantizer(num_codes=1024, cosine=False, commitment=0.25),
    "rgb_learned": LearnedVectorQuantizer(num_codes=1024),
    "rgb_fsq": FiniteScalarQuantizer(levels=(4, 4, 4, 4, 4)),
    "rgb_lookup_free": LookupFreeQuantizer(num_bits=10),
}

config = TokenizerConfig(
    source=Scenes(variant="full", num_train=20_000, num_validation=1000),
    tokenizers=tuple(dataclasses.replace(base, name=name, quantizer=q) for name, q in variants.items()),
)
