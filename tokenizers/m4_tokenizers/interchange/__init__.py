"""Released tokenizers of others, to and from m4's."""
