"""An encoder to be used as such: pictures and what is said of them have embeddings that find each other.

    apt-get install tuxpaint-stamps-default
    python train.py configs/embeddings.py
    python -m m4 evaluate runs/embeddings --suite probes

On 2 CPU cores: 22 minutes with preparation. Neighbours and linear probes of its pooled embeddings tell shape, colour
and size of unseen kinds of objects, and the category of cut-outs of unseen things (0.449, 0.467; pixels 0.376, 0.306),
better than those of pixels and of an untrained encoder (docs/results.md).
"""

from m4.config import Config
from m4.data.dataset import Dataset
from m4.data.sources.scenes import Scenes
from m4.data.sources.stamps import Stamps
from m4.evaluation.retrieval import Retrieval
from m4.masking.dirichlet import DirichletMasking, Masking, Strategy
from m4.model.config import ModelConfig
from m4.objectives.contrastive import Contrast
from m4.objectives.masked_modeling import MaskedModeling
from m4.training.optimizer import OptimizerConfig
from m4_tokenizers.modalities.boxes import BoxRecipe
from m4_tokenizers.modalities.depth import DepthRecipe
from m4_tokenizers.modalities.image import PixelPatchesRecipe
from m4_tokenizers.modalities.text import TextRecipe
from m4_tokenizers.networks.patch_mixing import PatchEncoder

# The contrast compares all of a picture with all of its caption, each by itself.
scene = Strategy(
    inputs={"rgb_pixels": 1.0, "caption": 1.0}, targets={"depth_tokens": 0.5, "boxes": 1.0}, keep="all", weight=3.0
)
look = Strategy(inputs={"rgb_pixels": 1.0}, targets={"depth_tokens": 0.5, "caption": 1.0, "boxes": 1.0})
cutout = Strategy(inputs={"rgb_pixels": 1.0, "caption": 1.0}, targets={"depth_tokens": 1.0}, keep="all")
cutouts = Stamps(max_objects=1, num_train=12_000)

config = Config(
    name="embeddings",
    datasets=(
        Dataset(
            source=Scenes(variant="simple", num_train=20_000),
            masking=DirichletMasking(strategies=(scene, look)),
            name="scenes",
            weight=0.42,
        ),
        # Without boxes, whose labels are the categories that the probes ask for.
        Dataset(
            source=cutouts,
            signals=("rgb", "depth", "caption"),
            masking=DirichletMasking(strategies=(cutout,)),
            name="stamps",
            weight=0.58,
        ),
    ),
    tokenizers=(
        PixelPatchesRecipe(),
        DepthRecipe(encoder=PatchEncoder(num_blocks=0), num_steps=300),
        TextRecipe(vocab_size=2048, max_length=32, cut_long=True),
        BoxRecipe(),
    ),
    masking=Masking(num_inputs=96, num_targets=48, strategies=(look,)),
    model=ModelConfig(
        width=192,
        num_heads=3,
        hidden=512,
        encoder_depth=3,
        decoder_depth=3,
        mimetic_init=True,
        embedding_scale=14.0,
        unroll=3,
        position_base=30.0,
    ),
    objectives=(MaskedModeling(), Contrast(a=("rgb_pixels",), b=("caption",))),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100),
    batch_size=64,
    num_steps=1500,
    evaluators=(Retrieval(a=("rgb",), b=("caption",), source=cutouts),),
)
