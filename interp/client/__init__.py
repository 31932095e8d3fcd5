"""The only place that calls a language model."""
