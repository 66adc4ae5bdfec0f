"""The examples run as they are described, on one process and on several ranks, and learn something."""

from __future__ import annotations

import gzip
import os
import re
import runpy
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
# No proxy listens here, so a download fails at once, with and without a network.
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")


def python(example, *args, timeout=60, env=None):
    return subprocess.run(
        [sys.executable, EXAMPLES / example, *args], capture_output=True, text=True, timeout=timeout,
        env=os.environ | (env or {}), check=False,
    )  # fmt: skip


def accuracy(text):
    return float(re.search(r"test accuracy (\S+)%", text)[1])


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_digits_in_one_process(tmp_path):
    done = python("digits.py", "--epochs", "6")
    assert done.returncode == 0, done.stderr
    assert accuracy(done.stdout) >= 93
    assert done.stdout.count(" it/s") == 7
    assert (tmp_path / "data" / "digits.npz").exists()


def test_digits_on_two_ranks(tmp_path, gang):
    zero, one = gang.ok(2, EXAMPLES / "digits.py", "--epochs", "10", "--batch-size", "32")
    assert accuracy(zero.stdout) >= 97
    assert one.stdout == ""
    # Every event file has the number of the process that wrote it in its name: there was one writer.
    events = list((tmp_path / "lightning_logs" / "version_0").glob("events.out.tfevents.*"))
    assert len({name.name.split(".")[-2] for name in events}) == 1
    assert [p.name for p in (tmp_path / "lightning_logs").iterdir()] == ["version_0"]


def test_plain_ddp_on_two_ranks_and_again_after_an_interruption(tmp_path, gang):
    first = gang.ok(2, EXAMPLES / "plain_ddp.py", "--epochs", "2", "--checkpoint", "run/state.pt")
    assert "epoch 2/2" in first[0].stdout
    again = python("plain_ddp.py", "--epochs", "12", "--checkpoint", "run/state.pt")
    assert "going on after epoch 2" in again.stdout
    assert "epoch 2/" not in again.stdout
    assert accuracy(again.stdout) >= 93
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["state.pt"]


def test_several_machines_may_prepare_the_data_in_a_folder_that_they_share(tmp_path, monkeypatch):
    example = runpy.run_path(str(EXAMPLES / "gpt.py"))
    both, save = Barrier(2, timeout=60), np.save

    def save_at_once(*args):
        both.wait()
        save(*args)
        both.wait()

    monkeypatch.setattr(np, "save", save_at_once)
    with ThreadPoolExecutor(2) as machines:
        made = [machines.submit(example["Library"](tmp_path, 64, 8, 0).prepare_data) for _ in range(2)]
        for each in made:
            each.result()
    assert [path.name for path in tmp_path.iterdir()] == ["stdlib.npy"]


def write_idx(path, array):
    """MNIST's own format: a magic number with type and number of dimensions, the shape, the bytes."""
    header = struct.pack(f">I{array.ndim}I", 0x0800 | array.ndim, *array.shape)
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header + array.tobytes())


def write_mnist(folder):
    """scikit-learn's digits, enlarged to 28 x 28, as MNIST's four files."""
    # Read without importing scikit-learn, which leaves environment variables behind.
    data = Path(find_spec("sklearn").origin).parent / "datasets" / "data" / "digits.csv.gz"
    table = np.loadtxt(data, delimiter=",")
    images, labels = table[:, :-1], table[:, -1]
    images = np.kron(images.reshape(-1, 8, 8) * 15.9, np.ones((1, 3, 3))).astype(np.uint8)
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    labels = labels.astype(np.uint8)
    folder.mkdir()
    for part, rows in (("train", slice(0, 1500)), ("t10k", slice(1500, None))):
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images[rows])
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels[rows])


def test_mnist_from_a_folder(tmp_path):
    write_mnist(tmp_path / "mine")
    done = python("mnist.py", "--data", "mine", "--epochs", "2", "--workers", "0", env=NO_NETWORK)
    assert done.returncode == 0, done.stderr
    assert accuracy(done.stdout) >= 80


def test_mnist_says_what_to_do_without_a_network():
    done = python("mnist.py", env=NO_NETWORK)
    assert done.returncode == 1
    assert "train-images-idx3-ubyte" in done.stderr
    assert "--data FOLDER" in done.stderr
    assert "Traceback" not in done.stderr
