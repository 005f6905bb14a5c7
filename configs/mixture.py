"""A weighted mixture: rendered scenes, photographs and drawings cut out and composed, and text alone.

    python train.py configs/mixture.py

Needs the corpus of cut-outs (apt-get install tuxpaint-stamps-default, or --datasets.1.source.path) and any text at
data/texts.txt, one document a line (or --datasets.2.source.files). What it reads: python -m m4 data configs/mixture.py
"""

import dataclasses

from m4.config import Config, load_config
from m4.data.dataset import Dataset
from m4.data.sources.scenes import Scenes
from m4.data.sources.stamps import Stamps
from m4.data.sources.texts import Texts
from m4.masking.dirichlet import DirichletMasking, Masking, Strategy
from m4_tokenizers.modalities.boxes import BoxRecipe
from m4_tokenizers.modalities.depth import DepthRecipe
from m4_tokenizers.modalities.image import ImageRecipe, PixelPatchesRecipe
from m4_tokenizers.modalities.text import TextRecipe
from m4_tokenizers.networks.patch_mixing import PatchEncoder
from m4_tokenizers.quantizers.vector import LearnedVectorQuantizer

quickstart: Config = load_config("configs/quickstart.py")
targets = {"rgb_tokens": 0.5, "depth_tokens": 0.5, "caption": 0.5, "boxes": 0.5}
anything = (
    Strategy(inputs={"rgb_pixels": 1000.0}, targets=targets),
    Strategy(inputs={"rgb_pixels": 0.5, **targets}, targets=targets),
)
words = (Strategy(inputs={"caption": 1.0}, targets={"caption": 1.0}),)

config = dataclasses.replace(
    quickstart,
    name="mixture",
    datasets=(
        Dataset(source=Scenes(variant="simple", num_train=20_000), weight=0.5),
        Dataset(source=Stamps(num_train=20_000), weight=0.4),
        Dataset(source=Texts(files=("data/texts.txt",)), weight=0.1, masking=DirichletMasking(strategies=words)),
    ),
    tokenizers=(
        PixelPatchesRecipe(),
        ImageRecipe(encoder=PatchEncoder(num_blocks=0), quantizer=LearnedVectorQuantizer(num_codes=512), num_steps=500),
        DepthRecipe(encoder=PatchEncoder(num_blocks=0), num_steps=300),
        TextRecipe(vocab_size=4096, max_length=64, cut_long=True),
        BoxRecipe(max_objects=5),
    ),
    masking=Masking(num_inputs=72, num_targets=48, strategies=anything),
)
