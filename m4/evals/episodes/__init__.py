"""Few-shot tasks: one file for each family. Each draws episodes of m4.shots, endlessly many and by number."""
