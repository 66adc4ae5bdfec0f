"""Packages that were written for Lightning, their imports rewritten to ours: real training. argv: which one.

Prints what came out as JSON.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

import trainer as T

QUIET = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_checkpointing": False,
    "enable_model_summary": False,
}  # fmt: skip


def lightly() -> dict:
    """A linear classifier and a nearest-neighbour one on features, and the callback that keeps their metrics."""
    from lightly.utils.benchmarking import KNNClassifier, LinearClassifier, MetricCallback

    images = torch.randn(256, 3, 8, 8)
    labels = (images[:, 0].mean((1, 2)) > 0).long()
    loader = DataLoader(TensorDataset(images, labels, torch.arange(256)), batch_size=32)
    features, kept = torch.nn.Flatten(), MetricCallback()
    model = LinearClassifier(features, batch_size_per_device=32, lr=0.5, feature_dim=192, num_classes=2, topk=(1,))
    T.Trainer(max_epochs=6, callbacks=[kept], **QUIET).fit(model, loader, loader)
    neighbours = KNNClassifier(
        features, num_classes=2, knn_k=5, knn_t=0.1, train_dataloader_idx=0, val_dataloader_idx=1, topk=(1,)
    )
    trainer = T.Trainer(**QUIET)
    trainer.validate(neighbours, [loader, loader], verbose=False)
    return {
        "curve": kept.val_metrics["val_top1"],
        "neighbours": {k: v.item() for k, v in trainer.callback_metrics.items()},
    }


def forecasting() -> dict:
    """A Temporal Fusion Transformer: schedulers by monitor, early stopping, clipping, a finder, predictions."""
    import pandas as pd
    from pytorch_forecasting import QuantileLoss, TemporalFusionTransformer, TimeSeriesDataSet
    from pytorch_forecasting.data import GroupNormalizer

    time = np.arange(60)
    waves = [
        pd.DataFrame({"time": time, "value": (np.sin(time / 4 + g) + 2).astype("float32"), "group": str(g)})
        for g in range(4)
    ]
    frame = pd.concat(waves, ignore_index=True)
    train = TimeSeriesDataSet(
        frame[frame.time < 50], time_idx="time", target="value", group_ids=["group"], max_encoder_length=16,
        max_prediction_length=4, time_varying_unknown_reals=["value"],
        target_normalizer=GroupNormalizer(groups=["group"]),
    )  # fmt: skip
    loaders = [
        train.to_dataloader(train=True, batch_size=32, num_workers=0),
        TimeSeriesDataSet.from_dataset(train, frame, min_prediction_idx=50).to_dataloader(
            train=False, batch_size=32, num_workers=0
        ),
    ]
    model = TemporalFusionTransformer.from_dataset(
        train, learning_rate=0.03, hidden_size=8, attention_head_size=1, hidden_continuous_size=4, loss=QuantileLoss(),
        log_interval=-1, reduce_on_plateau_patience=2,
    )  # fmt: skip
    trainer = T.Trainer(
        max_epochs=4, gradient_clip_val=0.1, callbacks=[T.callbacks.EarlyStopping("val_loss", patience=3)], **QUIET
    )
    before = trainer.validate(model, loaders[1], verbose=False)[0]["val_loss"]
    trainer.fit(model, *loaders)
    found = model.predict(loaders[1], mode="raw", return_index=True, trainer_kwargs=QUIET)
    return {
        "before": before, "after": trainer.callback_metrics["val_loss"].item(),
        "predicted": [len(found.index), len(found.output.prediction)],
    }  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    result = {"lightly": lightly, "pytorch_forecasting": forecasting}[sys.argv[1]]()
    result["lightning"] = sorted(m for m in sys.modules if m.partition(".")[0] in ("lightning", "pytorch_lightning"))
    print("RESULT " + json.dumps(result))


main()
