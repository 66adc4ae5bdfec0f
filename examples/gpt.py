"""A decoder-only transformer, trained from scratch on text that every machine has: Python's own standard library.

    launch --procs 2 examples/gpt.py                                   # two CPU ranks, a minute
    launch --gpus 8 examples/gpt.py --size 350M --strategy fsdp --precision bf16-mixed --context 1024 --compile
    launch --nodes 4 --gpus 8 examples/gpt.py --size 1B --strategy hsdp --precision bf16-mixed --recompute
    python examples/gpt.py --size 1M --steps 100

Tokens are bytes. The validation loss is to be compared with the entropy of single bytes, which is printed at the end
beside a sample of what the model writes. Tokens per second, and the MFU where the device's peak is known, are in the
progress bar, in the log, and told at the end. Stop or kill it at any time: `launch resume NAME` goes on at the same
byte.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import trainer as T
from trainer.callbacks import LearningRateMonitor, ModelCheckpoint, ThroughputMonitor
from trainer.recompute import recompute


@dataclass(frozen=True)
class Size:
    """The shape of a model."""

    layers: int
    heads: int
    width: int


# The parameters that these come to are about what their names say.
SIZES = {
    "1M": Size(5, 4, 128), "10M": Size(6, 6, 384), "50M": Size(12, 9, 576), "125M": Size(13, 14, 896),
    "350M": Size(24, 17, 1088), "1B": Size(23, 15, 1920),
}  # fmt: skip
VOCABULARY = 256


class Bytes(Dataset):
    """Consecutive pieces of a text: `context` bytes, and the same shifted by one."""

    def __init__(self, text: np.ndarray, context: int) -> None:
        self.text, self.context = text, context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.context
        piece = torch.from_numpy(self.text[start : start + self.context + 1].astype(np.int64))
        return piece[:-1], piece[1:]


class Library(T.DataModule):
    """The standard library's source as one array of bytes; every twentieth stretch of it is kept for validation."""

    def __init__(self, folder: Path, context: int, batch_size: int, workers: int) -> None:
        super().__init__()
        self.file = folder / "stdlib.npy"
        self.context, self.batch_size, self.workers = context, batch_size, workers

    def prepare_data(self) -> None:
        """Runs in one process per machine while the others wait."""
        if self.file.exists():
            return
        root = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(f for f in root.rglob("*.py") if not {"site-packages", "dist-packages"} & {*f.parts})
        text = b"\n".join(f.read_bytes() for f in files)
        # Pieces of 64 KiB in an order that is always the same, so that both parts hold something of every module.
        pieces = [text[i : i + 2**16] for i in range(0, len(text) - 2**16, 2**16)]
        order = np.random.default_rng(0).permutation(len(pieces))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not there at all, even if this process is killed; several machines may share the folder.
        with tempfile.TemporaryDirectory(dir=self.file.parent) as own:
            unfinished = Path(own) / self.file.name
            np.save(unfinished, np.frombuffer(b"".join(pieces[i] for i in order), np.uint8))
            unfinished.rename(self.file)

    def setup(self, stage: str) -> None:
        """Runs on every rank: the file is mapped, not read."""
        text = np.load(self.file, mmap_mode="r")
        held_out = len(text) // 20
        self.train, self.val = Bytes(text[held_out:], self.context), Bytes(text[:held_out], self.context)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True, num_workers=self.workers,
                          pin_memory=torch.cuda.is_available())  # fmt: skip

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size, num_workers=self.workers)

    def unigram_entropy(self) -> float:
        """Loss in nats of a model that knows how frequent each byte is, and nothing else."""
        counts = np.bincount(self.val.text, minlength=VOCABULARY)
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())


class Rotary(nn.Module):
    """Turns queries and keys by an angle that grows with their position (RoPE, arXiv:2104.09864)."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.width, self.context = width, context
        self.register_buffer("turn", torch.empty(context, width // 2, 2), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Made anew where a model was made without memory."""
        device = self.turn.device
        frequency = 10_000.0 ** (-torch.arange(0, self.width, 2, device=device) / self.width)
        angle = torch.outer(torch.arange(self.context, device=device), frequency)
        self.turn.copy_(torch.stack([angle.cos(), angle.sin()], -1))

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, heads, length, width of a head)."""
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = self.turn[: x.shape[-2]].unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).type_as(x)


class Block(nn.Module):
    """Attention, then a gated feed-forward layer, each added to what came in."""

    def __init__(self, size: Size, context: int) -> None:
        super().__init__()
        width = size.width
        hidden = math.ceil(8 * width / 3 / 64) * 64  # whole tiles of a GPU's matrix units
        self.heads = size.heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.down = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)
        self.rotary = Rotary(width // size.heads, context)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(self.rotary(q), self.rotary(k), v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(-2))
        gate, value = self.gate(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)


class GPT(T.Module):
    """The transformer, and how it is trained."""

    def __init__(
        self, size: str, context: int, batch_size: int, lr: float, warmup: int, recompute_blocks: bool = False
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.shape = SIZES[size]
        self.embedding: nn.Embedding | None = None

    def configure_model(self) -> None:
        """Without memory at first: FSDP gives each rank its shards only, so that the whole need not fit anywhere."""
        if self.embedding is not None:
            return
        with torch.device("meta"):
            self.embedding = nn.Embedding(VOCABULARY, self.shape.width)
            self.blocks = nn.ModuleList(Block(self.shape, self.hparams.context) for _ in range(self.shape.layers))
            self.norm = nn.RMSNorm(self.shape.width)
            self.head = nn.Linear(self.shape.width, VOCABULARY, bias=False)
        if self.hparams.recompute_blocks:
            recompute(self, Block)

    def _init_weights(self, layer: nn.Module) -> None:
        # What is added to the sum that runs through all blocks begins small.
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            nn.init.normal_(layer.weight, std=0.5 / math.sqrt(self.shape.width * 2 * self.shape.layers))

    def tokens_in_batch(self, batch: tuple[Tensor, Tensor]) -> int:
        """Speed is told in tokens per second."""
        return batch[0].numel()

    @property
    def flops_per_batch(self) -> float:
        """For the MFU. Per token 6 per weight, and attention's products (arXiv:2204.02311, appendix B)."""
        weights = sum(p.numel() for p in self.blocks.parameters()) + self.head.weight.numel()
        per_token = 6 * weights + 12 * self.shape.layers * self.shape.width * self.hparams.context
        return per_token * self.hparams.context * self.hparams.batch_size

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, targets = batch
        return F.cross_entropy(self(tokens).flatten(0, 1).float(), targets.flatten())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def configure_optimizers(self) -> dict:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams.lr, betas=(0.9, 0.95))
        steps, warmup = self.trainer.estimated_stepping_batches, self.hparams.warmup

        def share(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def write(self, begin: str, count: int, temperature: float = 0.7) -> str:
        """Go on with a text, byte by byte. All ranks call it: where weights are sharded they gather them together."""
        draw = torch.Generator(self.device).manual_seed(0)
        tokens = torch.tensor([list(begin.encode())], device=self.device)
        for _ in range(count):
            logits = self(tokens[:, -self.hparams.context :])[0, -1].float()
            likely = torch.softmax(logits / temperature, -1)
            tokens = torch.cat([tokens, torch.multinomial(likely, 1, generator=draw)[None]], 1)
        return bytes(tokens[0].tolist()).decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1M")
    parser.add_argument("--context", type=int, default=128, help="bytes that the model looks back")
    parser.add_argument("--batch-size", type=int, default=16, help="per process")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=0, help="processes that load data, per rank")
    parser.add_argument("--strategy", default="auto", help="ddp, fsdp, hsdp or auto")
    parser.add_argument("--precision", default="32-true", help="32-true, bf16-mixed, bf16-true, ...")
    parser.add_argument("--compile", action="store_true", help="torch.compile the step, or with FSDP each block")
    parser.add_argument("--recompute", action="store_true", help="trade time for memory: run blocks again in backward")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder for the prepared text")
    args = parser.parse_args()

    T.seed_everything(args.seed, verbose=False)
    trainer = T.Trainer(
        max_steps=args.steps,
        accumulate_grad_batches=args.accumulate,
        gradient_clip_val=1.0,
        strategy=args.strategy,
        precision=args.precision,
        compile=args.compile,
        val_check_interval=max(1, args.steps // 3) * args.accumulate,
        check_val_every_n_epoch=None,
        limit_val_batches=20,
        log_every_n_steps=10,
        save_every="auto",  # beside the best ones: as often as saves are cheap
        callbacks=[
            ModelCheckpoint(monitor="val_loss", filename="{step}-{val_loss:.3f}"),
            LearningRateMonitor(),
            ThroughputMonitor(),  # tokens/s, MFU, data wait and communication in the log
        ],
    )
    data = Library(args.data, args.context, args.batch_size, args.workers)
    warmup = max(1, min(100, args.steps // 10))
    model = GPT(args.size, args.context, args.batch_size, args.lr, warmup, args.recompute)
    trainer.fit(model, datamodule=data)

    loss = float(trainer.callback_metrics["val_loss"])
    text = model.write("def ", 200)
    if trainer.is_global_zero:
        print(text)
        print(f"validation loss {loss:.3f} nats per byte; entropy of single bytes {data.unigram_entropy():.3f}")


if __name__ == "__main__":
    main()
