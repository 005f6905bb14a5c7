"""Conditional generation: any modalities in, any others out."""
