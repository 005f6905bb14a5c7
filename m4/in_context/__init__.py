"""Few-shot tasks by examples in the context."""
