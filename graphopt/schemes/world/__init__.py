"""One step on all ranks of `torch.distributed`: `ranks.World` and the schemes that run in it."""
