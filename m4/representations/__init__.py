"""Embeddings of a trained encoder."""
