"""Who computes what: the only place that talks to torch.distributed."""
