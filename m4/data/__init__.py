"""From raw examples to a resumable stream of batches."""
