"""What a sparse coder is, and the map it computes."""
