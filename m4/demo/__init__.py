"""A local page that generates any modality from any others."""
