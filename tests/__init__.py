"""A package, so that no `tests` of others that is installed stands in its way in processes that tests start."""
