"""Ranks compare what must differ between them and what must not, by torch's own collectives."""

import json
import os
import random
import sys

import numpy
import torch
import torch.distributed as dist

import launcher

dist.init_process_group("gloo")
mine = {
    "random": random.random(), "numpy": numpy.random.random(), "torch": torch.rand(1).item(),
    "seed": torch.initial_seed(), "threads": torch.get_num_threads(), "hash": hash("a"), "launcher": launcher.WHOSE,
    "omp": os.environ.get("OMP_NUM_THREADS"), "warn": sys.warnoptions, "cuda": torch.cuda.is_initialized(),
    "stdin": sys.stdin.read(), "elastic": dist.is_torchelastic_launched(), "visible": torch.cuda.device_count(),
}  # fmt: skip
everyone = [None] * dist.get_world_size()
dist.all_gather_object(everyone, mine)
if dist.get_rank() == 0:
    print(json.dumps(everyone))
dist.destroy_process_group()
