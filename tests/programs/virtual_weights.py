"""Train for some steps on virtual ranks, from and to a state on disk; print what the weights hash to.

argv: folder, name of the state to begin from ("-": a new one), steps to make, name to save under, loader workers.
"""

import hashlib
import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from trainer.distributed import connect
from trainer.virtual import VirtualFeed, VirtualRanks

SIZE, BATCH, VIRTUAL = 107, 3, 5  # 15 per step: the last step of an epoch has 2 samples for 5 virtual ranks


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 33), nn.BatchNorm1d(33), nn.ReLU(), nn.Dropout(0.3), nn.Linear(33, 17), nn.Linear(17, 1)
        )
        self.seldom = nn.Parameter(torch.ones(1))
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("mask", torch.full((2,), float("-inf")))

    def forward(self, x):
        found = self.layers(x) if len(x) > 1 else self.layers[4:](torch.relu(self.layers[0](x)))
        # A parameter that only some shares use.
        return found * self.seldom if x[0, 0] > 0.5 else found


class Samples(Dataset):
    def __len__(self):
        return SIZE

    def __getitem__(self, i):
        x = torch.randn(6, generator=torch.Generator().manual_seed(i))
        # Augmentation, by all three generators.
        return (x + 0.1 * torch.randn(6) + 0.1 * random.random() + 0.1 * np.random.rand()).float()


def main():
    folder, begin, count, end = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    step = epoch = position = 0
    if begin != "-":
        saved = torch.load(folder / begin, weights_only=True)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        step, epoch, position = saved["place"]
    with connect(accelerator="cpu") as world:
        virtual = VirtualRanks(net, world, VIRTUAL, seed=4)
        workers = int(sys.argv[5]) if len(sys.argv) > 5 else 0
        loader = DataLoader(Samples(), BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
        feed = VirtualFeed(loader, world, VIRTUAL, seed=4)
        last = step + count
        while step < last:
            for batches in feed.batches(epoch, position):
                virtual.begin(feed.total)
                for (rank, share), x in zip(feed.shares, batches, strict=True):
                    virtual.enter(step, rank)
                    loss = (net(x) - x.sum(1, keepdim=True)).pow(2).mean()
                    (loss * (share.seen / share.total)).backward()
                    virtual.add(rank, share)
                virtual.finish()
                assert net.unused.grad is None
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                step, position = step + 1, feed.position
                if step == last:
                    break
            if position == SIZE:
                epoch, position = epoch + 1, 0
        feed.close()
        digest = hashlib.sha256()
        for tensor in net.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        if world.rank == 0:
            torch.save(
                {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "place": (step, epoch, position)},
                folder / end,
            )
        print(digest.hexdigest(), flush=True)


main()
