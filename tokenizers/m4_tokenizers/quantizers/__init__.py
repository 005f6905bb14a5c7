"""Latent vectors -> token ids -> codes."""
