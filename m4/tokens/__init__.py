"""Inputs of the model: modalities, tokenizers, and batches of addressed tokens."""
