"""Few-shot tasks: one file for each family. Each creates endlessly many episodes, by index."""
