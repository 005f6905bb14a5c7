"""Small changes of a trained model, as files and as sums."""
