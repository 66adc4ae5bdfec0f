"""The examples run as they are described, on one process and on several ranks, and learn something."""

from __future__ import annotations

import gzip
import os
import pickle
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
KILLED = Path(__file__).parents[1] / "programs" / "example_killed.py"
LAUNCH = str(Path(sys.executable).parent / "launch")
# No proxy listens here, so a download fails at once, with and without a network.
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")


def python(example, *args, timeout=60, env=None):
    return subprocess.run(
        [sys.executable, EXAMPLES / example, *args], capture_output=True, text=True, timeout=timeout,
        env=os.environ | (env or {}), check=False,
    )  # fmt: skip


def launch(*arguments, code=0):
    done = subprocess.run(
        [LAUNCH, *map(str, arguments)], capture_output=True, text=True, timeout=220, env=os.environ, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def killed_and_resumed(example, place, *arguments):
    """The example's output on two ranks, of which one was killed after the batch at `place` (epoch:batch)."""
    done = launch("--procs", 2, "--max-restarts", 1, "--run", "r", KILLED, example, place, *arguments)
    assert re.search("rank 1 was killed by SIGKILL.*; restarting", done.stderr)
    assert done.stderr.count("fit goes on from") == 1
    return done


def accuracy(text):
    return float(re.search(r"accuracy (\S+)%", text)[1])


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


def write_cifar(folder):
    """Files like CIFAR-10's: images of noise, whose brightness in each colour tells the class."""
    draw = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        labels = draw.permutation(np.arange(50) % 10)
        colours = np.stack([labels % 2 * 160, labels // 2 % 3 * 80, labels // 6 * 160], 1)[:, :, None]
        data = (draw.uniform(0, 90, (50, 3, 1024)) + colours).astype(np.uint8).reshape(50, -1)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": labels.tolist()}))


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_cifar_like_on_two_ranks_is_killed_and_learns(tmp_path):
    write_cifar(tmp_path / "mine" / "cifar-10-batches-py")
    done = killed_and_resumed("cifar_like.py", "1:3", "--data", "mine", "--batch-size", 16, "--epochs", 3)
    assert accuracy(done.stdout) >= 40
    assert len([*tmp_path.glob("runs/r/**/epoch=*-val_acc=*.ckpt")]) == 1


@pytest.mark.slow
def test_cifar_like_makes_its_own_images_and_names_missing_ones(tmp_path, monkeypatch, capsys):
    for name, value in (("KMP_DUPLICATE_LIB_OK", "True"), ("KMP_INIT_AT_FORK", "FALSE")):
        monkeypatch.setenv(name, value)  # scikit-learn sets them when it is imported
    example = runpy.run_path(str(EXAMPLES / "cifar_like.py"))
    data = example["ImageData"](None, tmp_path, batch_size=8, workers=0)
    data.prepare_data()
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 32, 32)
    assert labels.shape == (8,)
    assert (len(data.train), len(data.val), len(data.test)) == (1348, 149, 300)
    monkeypatch.setattr(sys, "argv", ["cifar_like.py", "--data", "none"])
    with pytest.raises(SystemExit, match="2"):
        example["main"]()
    assert "there is no data_batch_1, data_batch_2" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_gan_on_two_ranks_is_killed_and_learns_and_logs_pictures(tmp_path):
    done = killed_and_resumed("gan.py", "1:5", "--epochs", 6)
    trained, untrained = map(float, re.search(r"digits (\S+); .* generator (\S+)", done.stdout).groups())
    assert trained < untrained - 1
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (log,) = tmp_path.glob("runs/r/**/version_0")
    events = EventAccumulator(str(log), size_guidance={"images": 0}).Reload()
    assert len({image.step for image in events.Images("painted")}) == 6


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_finetune_on_two_ranks_is_killed_after_the_backbone_was_let_go(tmp_path):
    done = killed_and_resumed("finetune.py", "4:5", "--unfreeze-at", 3, "--epochs", 6)
    assert "21 of 23 tensors come from data/pretrained.pt" in done.stdout
    assert done.stderr.count("Epoch 3: learning rate") == 1
    assert done.stderr.count("Epoch 5: learning rate") == 1
    assert accuracy(done.stdout) >= 85


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_sweep_with_a_killed_element_tells_the_best(monkeypatch):
    example = runpy.run_path(str(EXAMPLES / "sweep.py"))
    table, grid = example["table"], Path("runs/grid")
    launch("--backend", "local", "--procs", 2, "--run", "grid", "--sweep", "lr=1,0.01", KILLED,
           "sweep.py", "1:3", "--epochs", 2, code=137)  # fmt: skip
    assert table(grid) == "None of the 2 elements of runs/grid has ended yet."
    assert launch("retry", "grid", "--failed").stderr.count("fit goes on from") == 2
    lines = table(grid).splitlines()
    assert lines[0].split()[:2] == ["run", "lr"]
    assert [line.split()[:2] for line in lines[1:3]] == [["1", "0.01"], ["0", "1"]]
    assert lines[3].startswith("best: run 1, ")
    assert Path(lines[3].split(", ")[1]).exists()
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--table", "runs"])
    with pytest.raises(SystemExit, match=r"no array\.json"):
        example["main"]()
