"""Aligned raw data: each file is a source of raw examples, built once by tfds and read by index."""
