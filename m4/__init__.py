"""m4: any-to-any multimodal models on one vocabulary of addressed tokens, in JAX."""
