"""Plain PyTorch, without `trainer`: what a script needs to run on many ranks and to be killed at any time.

    launch --procs 4 --max-restarts 3 examples/plain_ddp.py
    torchrun --nproc-per-node 4 examples/plain_ddp.py
    python examples/plain_ddp.py

The launcher sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; everything else is torch.distributed. The
script writes a checkpoint after every epoch and begins by looking for one, so a restart costs at most one epoch.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def read_digits() -> tuple[TensorDataset, TensorDataset]:
    """Training and test images, the same on every rank."""
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(images / 16).float(), torch.from_numpy(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1500], order[1500:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def save(path: Path, state: dict) -> None:
    """Write the checkpoint beside the old one, then put it in its place in one move: a kill leaves one or the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    with open(unfinished, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset, rank: int, world_size: int, device: torch.device) -> float:
    """The share of right answers; every rank looks at its part, and the counts are added up."""
    images, labels = (tensor[rank::world_size].to(device) for tensor in data.tensors)
    counts = torch.tensor([(model(images).argmax(1) == labels).sum(), len(labels)], dtype=torch.float64, device=device)
    if world_size > 1:
        dist.all_reduce(counts)
    return (counts[0] / counts[1]).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32, help="per rank")
    # The launcher's run folder is the same for every attempt of a run.
    folder = Path(os.environ.get("LAUNCH_RUN_DIR", "plain_ddp_run"))
    parser.add_argument("--checkpoint", type=Path, default=folder / "plain_ddp.pt")
    args = parser.parse_args()

    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    torch.manual_seed(0)
    train, test = read_digits()
    sampler = DistributedSampler(train, world_size, rank, seed=0)
    loader = DataLoader(train, args.batch_size, sampler=sampler)
    model: nn.Module = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    first_epoch = 0
    if args.checkpoint.exists():
        state = torch.load(args.checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_epoch = state["epochs_done"]
        if rank == 0:
            print(f"going on after epoch {first_epoch}", flush=True)

    replica = DistributedDataParallel(model) if world_size > 1 else model
    for epoch in range(first_epoch, args.epochs):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(replica(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
        if rank == 0:
            print(f"epoch {epoch + 1}/{args.epochs}  loss {loss.item():.4f}", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epochs_done": epoch + 1}
            save(args.checkpoint, state)

    result = accuracy(model, test, rank, world_size, device)
    if rank == 0:
        print(f"test accuracy {result:.2%}", flush=True)
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
