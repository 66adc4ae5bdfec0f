"""Meet the other ranks once and say who is here."""

import os

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
one = torch.ones(1)
dist.all_reduce(one)
print(f"rank {dist.get_rank()} of {int(one)} in attempt {os.environ.get('LAUNCH_ATTEMPT')}")
dist.destroy_process_group()
