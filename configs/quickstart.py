"""Any-to-any on rendered scenes, from nothing to scores and pictures.

    python train.py configs/quickstart.py

Hardware: 2 CPU cores. Time: 12 minutes (3 of them preparation, 1 evaluation). Result, normalised on 512 test scenes:
picture -> depth 0.76, caption 0.69, boxes 0.58; depth -> picture 0.29; caption -> picture 0.47, of which most is
painting many colours whatever the caption (see "shuffled" in docs/results.md).
"""

from m4.config import Config
from m4.data.dataset import Dataset
from m4.data.sources.scenes import Scenes
from m4.evaluation.conditional_generation import ConditionalGeneration, ConditionalTask
from m4.evaluation.measures.attributes import CaptionAttributes, ForegroundOverlap, ObjectColours
from m4.evaluation.measures.boxes import BoxAccuracy
from m4.evaluation.measures.depth import DepthAccuracy
from m4.inference.autoregressive import Autoregressive
from m4.inference.parallel import MaskGIT
from m4.masking.dirichlet import Masking, Strategy
from m4.model.config import ModelConfig
from m4.training.optimizer import OptimizerConfig
from m4_tokenizers.modalities.boxes import BoxRecipe
from m4_tokenizers.modalities.depth import DepthRecipe
from m4_tokenizers.modalities.image import ImageRecipe, PixelPatchesRecipe
from m4_tokenizers.modalities.text import TextRecipe
from m4_tokenizers.networks.patch_mixing import PatchEncoder
from m4_tokenizers.quantizers.vector import LearnedVectorQuantizer

strategies = (
    # Look at a picture, say all there is to say.
    Strategy(weight=0.5, inputs={"rgb_pixels": 1.0}, targets={"depth_tokens": 0.5, "caption": 1.0, "boxes": 1.0}),
    # Draw a caption; finish a drawing of a caption; paint a depth map.
    Strategy(weight=0.2, inputs={"caption": 1.0}, targets={"rgb_tokens": 1.0}, keep="all"),
    Strategy(
        weight=0.2,
        inputs={"caption": 1000.0, "rgb_tokens": 1.0},
        targets={"rgb_tokens": 1.0},
        keep="all",
        input_share=(0.2, 0.8),
    ),
    Strategy(weight=0.1, inputs={"depth_tokens": 1000.0, "rgb_tokens": 1.0}, targets={"rgb_tokens": 1.0}),
)

config = Config(
    name="quickstart",
    datasets=(Dataset(source=Scenes(variant="simple", num_train=20_000)),),
    tokenizers=(
        PixelPatchesRecipe(),
        ImageRecipe(encoder=PatchEncoder(num_blocks=0), quantizer=LearnedVectorQuantizer(num_codes=512), num_steps=500),
        DepthRecipe(encoder=PatchEncoder(num_blocks=0), num_steps=300),
        TextRecipe(),
        BoxRecipe(),
    ),
    masking=Masking(num_inputs=72, num_targets=48, strategies=strategies),
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
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100),
    batch_size=64,
    num_steps=680,
    evaluators=(
        ConditionalGeneration(
            tasks=(
                ConditionalTask(
                    name="rgb_to_depth",
                    inputs=("rgb",),
                    target="depth",
                    scheme=MaskGIT(steps=1, temperature=0),
                    metric=DepthAccuracy(),
                ),
                ConditionalTask(
                    name="rgb_to_caption",
                    inputs=("rgb",),
                    target="caption",
                    scheme=Autoregressive(),
                    metric=CaptionAttributes(),
                ),
                ConditionalTask(
                    name="rgb_to_boxes", inputs=("rgb",), target="boxes", scheme=Autoregressive(), metric=BoxAccuracy()
                ),
                ConditionalTask(
                    name="caption_to_rgb",
                    inputs=("caption",),
                    target="rgb",
                    scheme=MaskGIT(steps=8, temperature=1.0, choice_temperature=1000.0),
                    metric=ObjectColours(),
                ),
                ConditionalTask(
                    name="depth_to_rgb",
                    inputs=("depth",),
                    target="rgb",
                    scheme=MaskGIT(steps=6, temperature=0.5),
                    metric=ForegroundOverlap(),
                ),
            )
        ),
    ),
)
