"""Search among latents: by words, and by the meaning of their labels."""
