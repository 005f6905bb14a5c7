"""A tokenizer of spoken words: 8 x 8 tokens of two seconds.

    apt-get install tuxpaint-stamps-default && pip install -e ".[audio]"
    python -m m4_tokenizers train configs/tokenizers/spoken.py

Hardware: 2 CPU cores. Time and results: the table of tokenizers/README.md (card spoken_audio).
"""

from m4.data.sources.spoken import Spoken
from m4_tokenizers.modalities.audio import AudioRecipe
from m4_tokenizers.train import TokenizerConfig

config = TokenizerConfig(source=Spoken(), tokenizers=(AudioRecipe(),))
