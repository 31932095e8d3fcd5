"""The only place where text of a data set becomes part of a message to a model."""
