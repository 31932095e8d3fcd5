"""Which latents fire in a text, and what each does to the next token."""
