"""A run of sae-explain: prepared, asked, journaled, told."""
