"""A generative adversarial network by manual optimization: two networks, two optimizers, and pictures in the log.

    launch --procs 2 examples/gan.py                         # two CPU ranks, 15 seconds
    launch --gpus 4 examples/gan.py --epochs 200 --batch-size 256
    tensorboard --logdir runs                                # Images: what the generator paints after each epoch

The images are the 1797 scans of handwritten digits that come with scikit-learn. How far the generator's pixels are from
theirs is logged as `distance`: the Frechet distance between the two as normal distributions (0: no difference). That is
the "FID" of image generation, without a network in between.

What it shows: `automatic_optimization = False`, `self.optimizers()`, a backward of each optimizer with the other's
weights held (`toggled_optimizer`), and learning-rate schedulers stepped by hand, on any number of ranks. Stop or kill
it at any time: `launch resume NAME` goes on with the next batch.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.utils import make_grid

import trainer as T
from trainer.callbacks import ModelCheckpoint


class GAN(T.Module):
    """Paints digits of 8 x 8 pixels, and tells them from real ones."""

    def __init__(self, real: Tensor, noise: int = 32, width: int = 32, lr: float = 4e-3) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.save_hyperparameters(ignore="real")
        self.generator = nn.Sequential(
            nn.Linear(noise, 2 * width * 4), nn.Unflatten(1, (2 * width, 2, 2)), nn.GroupNorm(8, 2 * width), nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1), nn.GroupNorm(8, width), nn.ReLU(),
            nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1), nn.Sigmoid(),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Dropout(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Dropout(0.2),
            nn.Flatten(), nn.Linear(2 * width * 4, 1),
        )  # fmt: skip
        # The same noise every time, so that one sees how the same pictures change. No buffers: DDP would share them
        # after every step.
        self.fixed, self.real = torch.randn(512, noise, generator=torch.Generator().manual_seed(0)), real

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        (real,) = batch
        paint, judge = self.optimizers()
        noise = torch.randn(len(real), self.hparams.noise, device=self.device)

        with self.toggled_optimizer(judge):  # only the discriminator's weights require gradients in here
            with torch.no_grad():
                painted = self(noise)
            # Labels of 0.9: a discriminator that is quite sure teaches nothing.
            loss = says(self.discriminator(real), 0.9) + says(self.discriminator(painted), 0.0)
            judge.zero_grad()
            self.manual_backward(loss)
            judge.step()
        with self.toggled_optimizer(paint):
            deceit = says(self.discriminator(self(noise)), 1.0)
            paint.zero_grad()
            self.manual_backward(deceit)
            paint.step()
        self.log_dict({"discriminator_loss": loss, "generator_loss": deceit}, prog_bar=True)

    def on_train_epoch_end(self) -> None:
        for schedule in self.lr_schedulers():
            schedule.step()
        with torch.no_grad():
            painted = self(self.fixed.to(self.device))
        # The same on every rank, as weights and noise are; so it needs no reduction.
        self.log("distance", frechet(painted, self.real.to(self.device)), prog_bar=True, sync_dist=False)
        # Ranks that do not log get an experiment that takes every call and does nothing.
        if self.logger is not None:
            grid = make_grid(F.interpolate(painted[:64], scale_factor=4.0), nrow=8)
            self.logger.experiment.add_image("painted", grid, self.current_epoch)

    def configure_optimizers(self) -> tuple[list, list]:
        optimizers = [
            torch.optim.Adam(part.parameters(), lr=self.hparams.lr, betas=(0.5, 0.99))
            for part in (self.generator, self.discriminator)
        ]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98) for optimizer in optimizers]


def says(logits: Tensor, truth: float) -> Tensor:
    """How wrong the discriminator is if images are real with this probability."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, truth))


def frechet(one: Tensor, other: Tensor) -> Tensor:
    """The Frechet distance of two sets of images (n x 1 x 8 x 8), both taken as normal distributions of pixels."""
    one, other = one.flatten(1).double(), other.flatten(1).double()
    (mean1, cov1), (mean2, cov2) = (one.mean(0), one.T.cov()), (other.mean(0), other.T.cov())
    # The trace of a matrix's root is the sum of the roots of its eigenvalues; rounding may put one below zero.
    common = torch.linalg.eigvals(cov1 @ cov2).real.clamp(min=0).sqrt().sum()
    return (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=16, help="per process")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    from sklearn.datasets import load_digits

    real = torch.from_numpy(load_digits().images / 16).float().unsqueeze(1)
    T.seed_everything(args.seed, verbose=False)
    trainer = T.Trainer(
        max_epochs=args.epochs,
        log_every_n_steps=10,
        callbacks=[ModelCheckpoint(filename="{epoch}-{distance:.2f}", monitor="distance", every_n_epochs=1)],
    )
    model = GAN(real, lr=args.lr)
    untrained = float(frechet(model(model.fixed).detach(), real))
    trainer.fit(model, DataLoader(TensorDataset(real), args.batch_size, shuffle=True, drop_last=True))
    if trainer.is_global_zero:
        trained = float(trainer.callback_metrics["distance"])
        print(f"distance from real digits {trained:.2f}; of an untrained generator {untrained:.2f}", flush=True)


if __name__ == "__main__":
    main()
