"""What a latent does, in bounded memory."""
