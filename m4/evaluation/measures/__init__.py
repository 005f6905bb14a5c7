"""How predictions are compared with the truth."""
