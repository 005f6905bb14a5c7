"""The run that version 0.1 saved into tests/data/runs_0.1; its tokenizers are those of that folder.

python train.py tests/data/run_0_1.py --num-steps 4
"""

from m4.checkpoints.numbered import CheckpointConfig
from m4.config import Config
from m4.data.dataset import Dataset
from m4.data.sources.scenes import Scenes
from m4.masking.dirichlet import Masking, Strategy
from m4.model.config import ModelConfig
from m4.training.metrics import MetricsConfig
from m4.training.optimizer import OptimizerConfig
from m4_tokenizers.modalities.stored import TokenizerFile

FOLDER = "tests/data/runs_0.1/run"
anything = Strategy(
    inputs={"rgb_pixels": 1.0, "depth_tokens": 1.0, "caption": 1.0},
    targets={"rgb_tokens": 1.0, "depth_tokens": 1.0, "caption": 1.0},
)
config = Config(
    name="run_0_1",
    datasets=(Dataset(source=Scenes(num_train=64, num_validation=4, num_test=4, num_heldout=4)),),
    tokenizers=tuple(
        TokenizerFile(path=f"{FOLDER}/tokenizers/{name}.safetensors")
        for name in ("rgb_pixels", "rgb", "depth", "caption")
    ),
    masking=Masking(num_inputs=72, num_targets=48, strategies=(anything,)),
    model=ModelConfig(width=4, num_heads=2, encoder_depth=1, decoder_depth=1, hidden=8),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
    batch_size=8,
    num_steps=4,
    checkpoints=CheckpointConfig(save_every=2),
    metrics=MetricsConfig(log_every=1),
)
