"""What goes in and what must come out: random subsets (4M) and few-shot episodes."""
