"""The data that the articles' code reads: MNIST's own files, made from scikit-learn's digits."""

from __future__ import annotations

import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest


def write_idx(path, array):
    """MNIST's file format: a magic number with type and number of dimensions, the shape, the bytes."""
    path.write_bytes(struct.pack(f">I{array.ndim}I", 0x0800 | array.ndim, *array.shape) + array.tobytes())


@pytest.fixture(scope="session")
def mnist_files(tmp_path_factory):
    """A folder that torchvision takes for MNIST: 60000 and 10000 images of 28 x 28, as the articles' splits need."""
    # Read without importing scikit-learn, which leaves environment variables behind.
    table = np.loadtxt(Path(find_spec("sklearn").origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    images, labels = table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.uint8)
    images = np.pad(np.kron(images * 15.9, np.ones((1, 3, 3))), ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    raw = tmp_path_factory.mktemp("mnist") / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 60000), ("t10k", 10000)):
        chosen = np.arange(count) % len(labels)
        write_idx(raw / f"{part}-images-idx3-ubyte", images[chosen])
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels[chosen])
    return raw.parent


@pytest.fixture
def article_folder(tmp_path, monkeypatch, mnist_files):
    """An empty working folder (and home) in which MNIST is where each article looks for it."""
    for folder in (tmp_path, tmp_path / "datasets", tmp_path / "data"):
        folder.mkdir(exist_ok=True)
        (folder / "MNIST").symlink_to(mnist_files)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path
