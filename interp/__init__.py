"""Labels for the latents of a sparse coder: evidence, explanation, score."""
