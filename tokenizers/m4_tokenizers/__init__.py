"""Tokenizers: how signals become the tokens of m4 and back; see ../README.md."""
