"""Processes: topology, groups, the ZeRO engine. The only home of torch.distributed in training."""
