"""Converts tokenizers that others released to m4 and back."""
