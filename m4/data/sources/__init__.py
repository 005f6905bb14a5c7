"""Aligned raw data: each file is a source of raw examples, read by index."""
