"""Who computes what, and how several processes agree: the only place that talks to torch.distributed."""
