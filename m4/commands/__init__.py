"""The verbs of `python -m m4`: one file each, found here by name."""
