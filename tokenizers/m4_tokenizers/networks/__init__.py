"""Encoders and decoders of tokenizers."""
