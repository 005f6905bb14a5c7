"""A tokenizer for each kind of signal."""
