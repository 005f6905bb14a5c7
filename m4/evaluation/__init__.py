"""Evaluations of trained models: one file per family, each with its baseline and its upper bound."""
