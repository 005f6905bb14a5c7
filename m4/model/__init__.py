"""The encoder-decoder and its layers."""
