"""From a config to trained coders: the top of `sae`."""
