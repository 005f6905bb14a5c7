"""What the model reads: modalities, tokenizers, and batches of addressed tokens."""
