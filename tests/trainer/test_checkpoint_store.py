"""One process's store: round trips, saves in the background, names, retention, what is left behind."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import warnings
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from trainer.checkpoint import Retention, Store, load_checkpoint, load_file, save_file, snapshot
from trainer.checkpoint import folder as folder_module
from trainer.checkpoint.catalog import is_unfinished, open_checkpoint
from trainer.checkpoint.contents import verify
from trainer.checkpoint.manifest import new_attempt
from trainer.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointWriteError,
    ConfigError,
)


def state(seed: int = 0, rows: int = 700) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weights": OrderedDict(
            large=torch.randn(rows, 900, generator=generator),
            transposed=torch.randn(5, 6, generator=generator).t(),
            half=torch.randn(3, 4, generator=generator).bfloat16(),
            scalar=torch.tensor(3 + seed),
            empty=torch.empty(0, 3),
            complex=torch.randn(3, dtype=torch.complex64, generator=generator),
            flags=torch.tensor([True, False]),
        ),
        "optimizer": {0: {"step": torch.tensor(1.0)}, 1: (1, 2, {3, 4}, frozenset({5}))},
        "plain": [None, True, 1.1, -0.0, float("nan"), float("-inf"), 2**70, 3 + 4j, b"abc", "x\ud800é", 1e-320],
        "numpy": {"array": np.arange(5, dtype=np.uint32), "scalar": np.float64(1 / 3), "b": np.bool_(True)},
        "others": [Counter({3: 1}), torch.float16, torch.Size([1, 2]), torch.device("cpu")],
        "$odd": {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}},
        "seed": seed,
    }


def large(seed: int) -> dict:
    """One that a process writes: smaller ones are written by a thread."""
    return {"w": torch.full((1 << 20,), float(seed)), "seed": seed}


def same(a: object, b: object, path: str = "") -> None:
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype, path
        assert (a == b).all(), path
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{path}.{i}")
    else:
        assert repr(a) == repr(b), path


@pytest.fixture
def url(request, tmp_path):
    return str(tmp_path / "store")


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_state_comes_back_as_it_was(kind, wait, tmp_path):
    url = str(tmp_path / "s") if kind == "file" else f"memory://{tmp_path}"
    own = {"python": random.getstate(), "torch": torch.get_rng_state(), "numpy": np.random.get_state()}
    with Store(url) as store:
        assert store.newest() is None
        assert store.load_newest() is None
        saved = store.save(state(), step=7, rank_state=own, extra={"loss": 0.5}, wait=wait)
        store.wait()
        manifest = store.newest()
        assert (manifest.step, manifest.world_size, manifest.extra) == (7, 1, {"loss": 0.5})
        loaded = store.load(manifest)
        same(state(), loaded.state)
        same(own, loaded.rank_state)
        assert verify(open_checkpoint(saved.path)) == []
        assert load_checkpoint(saved.path)["seed"] == 0
        store.remove(saved.name)
        assert store.newest() is None


def test_a_state_may_change_as_soon_as_a_background_save_returns(url):
    with Store(url) as store:
        live = {"w": torch.zeros(1 << 20), "n": [0]}
        for step in range(1, 4):
            live["w"].fill_(step)
            live["n"][0] = step
            saved = store.save(live, step=step, wait=False)
            live["w"].fill_(-1)
            live["n"][0] = -1
            assert saved.seconds is None
        store.wait()
        for manifest in store.list():
            loaded = store.load(manifest).state
            assert loaded["n"] == [manifest.step]
            assert torch.equal(loaded["w"], torch.full((1 << 20,), float(manifest.step)))
        helpers = [c for c in psutil.Process().children() if "trainer.checkpoint.helper" in " ".join(c.cmdline())]
        assert len(helpers) == 1
        # It takes 0.1 s to start and 30 MB because it does not import torch, not even to read its job.
        assert "libtorch" not in Path(f"/proc/{helpers[0].pid}/maps").read_text()
    assert not helpers[0].is_running()


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [1, {"b": object()}]}, "a.1.b a builtins.object"),
        ({"f": print}, "f a builtins.builtin_function"),
        ({"s": torch.eye(2).to_sparse()}, "s is a torch.sparse_coo tensor"),
        ({"m": torch.empty(2, device="meta")}, "m is a meta tensor"),
        ({"n": np.array(["x"])}, "n a numpy.ndarray"),
        ({"e": signal.SIGTERM}, "e a signal.Signals"),
    ],
)
def test_what_cannot_be_read_without_running_code_is_refused_with_its_path(value, where, url, tmp_path):
    with pytest.raises(CheckpointError, match=where):
        Store(url).save(value, step=1)
    with pytest.raises(CheckpointError, match=where):
        save_file(value, tmp_path / "x.ckpt")
    assert not Path(url).exists()


def test_a_name_saved_again_replaces_the_older_one_when_it_is_durable(url):
    store = Store(url)
    store.save(state(1), step=1, name="last")
    first = open_checkpoint(f"{url}/last").folder.path
    store.save(state(2), step=2, name="last")
    assert store.load("last").state["seed"] == 2
    assert store.load(f"{url}/last").state["seed"] == 2
    assert not Path(first).exists()
    assert [m.name for m in store.list()] == ["last"]
    for name in ("", "a/b", ".."):
        with pytest.raises(CheckpointError, match="one part of a path"):
            store.save({}, step=1, name=name)


def test_a_missing_checkpoint_is_named(url, tmp_path):
    with pytest.raises(CheckpointNotFoundError, match=r"no whole checkpoint at .*nowhere"):
        Store(url).load(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointNotFoundError, match="no file"):
        load_file(tmp_path / "nowhere.ckpt")
    with pytest.raises(CheckpointError, match="memory:// lives in one process"):
        Store("memory://x", type("Two", (), {"rank": 0, "size": 2})())


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (Retention(last=2), [5, 6]),
        (Retention(last=1, best=2, monitor="loss"), [1, 4, 6]),
        (Retention(last=1, best=1, monitor="loss", mode="max"), [3, 6]),
        (Retention(last=1, every_n_steps=3), [3, 6]),
        (Retention(last=1, names="x*"), [1, 2, 3, 4, 5, 6]),
    ],
)
def test_retention_keeps_what_it_was_asked_to(policy, kept, tmp_path):
    losses = [0.1, 0.9, 3.0, 0.2, 0.8, float("nan")]
    store = Store(str(tmp_path), retention=policy)
    for step, loss in enumerate(losses, 1):
        store.save({}, step=step, extra={"loss": loss})
    with pytest.raises(CheckpointError, match=r"extra=.*which is JSON"):
        store.save({}, step=9, extra={"loss": torch.zeros(1)})
    assert [m.step for m in reversed(store.list())] == kept


def test_retention_by_time_keeps_the_first_of_each_stretch():
    from trainer.checkpoint import Manifest

    times = [0, 60, 3600, 3660, 7300, 7400]
    made = [Manifest(str(i), f"{i:020x}", i, 1, (), created) for i, created in enumerate(times)]
    assert [m.step for m in Retention(last=1, every_hours=1.0).removable(made)] == [3, 1]


@pytest.mark.parametrize("bad", [{"last": 0}, {"best": 1}, {"mode": "up"}, {"every_hours": 0}])
def test_a_retention_that_makes_no_sense_is_refused(bad):
    with pytest.raises(ConfigError):
        Retention(**bad)


def test_retention_removes_nothing_if_what_would_stay_is_not_complete(url):
    store = Store(url)
    store.save(state(1), step=1)
    store.save(state(2), step=2)
    folder = open_checkpoint(f"{url}/step-{2:012d}").folder.path
    os.truncate(f"{folder}/rank-00000.safetensors", 100)
    from trainer.checkpoint.folder import Folder
    from trainer.checkpoint.retention import remove_unwanted

    assert remove_unwanted(Folder.at(url), Retention(last=1)) == []
    assert store.load(f"step-{1:012d}").state["seed"] == 1


@pytest.mark.parametrize("form", ["store", "file"])
def test_what_is_not_read_back_as_it_was_written_replaces_nothing(form, tmp_path, monkeypatch):
    def content(step: int) -> dict:
        return {"w": torch.full((1 << 18,), float(step))}  # small, so that this process writes it

    def save(step: int) -> None:
        if form == "store":
            Store(tmp_path, retention=Retention(last=1)).save(content(step), step=step)
        else:
            save_file(content(step), tmp_path / "one.ckpt")

    def changed(descriptor, block):
        os.write(descriptor, bytes(block[:-1]) + bytes([block[-1] ^ 1]))

    save(1)
    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "_write_all", changed)
        with pytest.raises(CheckpointWriteError, match=r"not what is read back: .* the checksum of bytes 0 to"):
            save(2)
    same(Store(tmp_path).load_newest().state if form == "store" else load_file(tmp_path / "one.ckpt"), content(1))
    save(3)
    assert len([path for path in tmp_path.iterdir() if not path.name.startswith(".")]) == 1


def test_attempts_that_died_are_collected_after_the_next_save(url):
    store = Store(url)
    store.save(state(1), step=1)
    folder = open_checkpoint(url).folder
    dead = folder.parent.parent / "step-9" / "00000000000000abcdef"
    dead.make()
    dead.write_whole("rank-00000.jsonl", b"{}")
    assert [m.step for m in store.list()] == [1]
    assert is_unfinished(dead.parent)
    assert not is_unfinished(folder.parent)
    assert not is_unfinished(dead)
    store.save(state(2), step=2)
    in_flight = dead.parent / new_attempt()  # of another store of this process, for all one can know
    in_flight.make()
    Store(url).save(state(3), step=3)
    assert not Path(dead.path).exists()
    assert Path(in_flight.path).exists()
    assert [m.step for m in store.list()] == [3, 2, 1]


def test_a_rank_without_memory_for_the_copy_writes_at_once_and_says_so(url, monkeypatch):
    monkeypatch.setattr(snapshot, "available_memory", lambda: 1000.0)
    with Store(url) as store:
        with pytest.warns(UserWarning, match="no memory for a copy"):
            store.save(state(3), step=3, wait=False)
        store.wait()
        same(state(3), store.load(store.newest()).state)


def test_a_full_disk_is_a_warning_and_loses_nothing(url, monkeypatch):
    from trainer.checkpoint.folder import Folder

    def full(self, name, blocks):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Store(url) as store:
        store.save(state(1), step=1)
        with monkeypatch.context() as patched:
            patched.setattr(Folder, "write_blocks", full)
            with pytest.raises(CheckpointWriteError, match="No space left") as caught:
                store.save(state(2), step=2)
            assert caught.value.disk_full
        same(state(1), store.load_newest().state)
        store.save(state(3), step=3)
        same(state(3), store.load_newest().state)


def test_closing_tells_of_the_save_that_nobody_awaited_and_of_no_other(url, monkeypatch):
    from trainer.checkpoint.folder import Folder

    def broken(self, name, blocks):
        raise OSError(errno.EIO, "Input/output error")

    store, second = Store(url), Store(url)
    with monkeypatch.context() as patched:
        patched.setattr(Folder, "write_blocks", broken)
        store.save(state(1), step=1, wait=False)  # small: by a thread
        with pytest.raises(CheckpointWriteError, match=r"step-000000000001 was not written: .* Input/output error"):
            store.wait()
        second.save(state(2), step=2, wait=False)
        with pytest.warns(UserWarning, match=r"step-000000000002 was not committed: .* Input/output error"):
            second.close()
    store.save(large(3), step=3, wait=False)  # by a process
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.close()
    same(large(3), store.load_newest().state)


def test_the_death_of_the_writer_is_an_error_at_the_next_step_and_not_the_end(url):
    with Store(url) as store:
        store.save(large(1), step=1, wait=False)
        store.wait()
        helper = psutil.Process().children()[0]
        helper.suspend()
        store.save(large(2), step=2, wait=False)
        assert store.poll() is None
        helper.kill()
        with pytest.raises(CheckpointWriteError, match="ended in the middle of its work, with signal SIGKILL"):
            poll_until_told(store)
        with pytest.raises(CheckpointWriteError):
            store.save(large(3), step=3, wait=False)
        assert store.newest().step == 1
        store.save(large(4), step=4, wait=False)
        store.wait()
        same(large(4), store.load_newest().state)


def poll_until_told(store):
    while store.poll() is None:
        pass


_DIES = """
import os, signal, sys, torch
from trainer.checkpoint import Store
store = Store(sys.argv[1])
store.save({"w": torch.zeros(1 << 22)}, step=1, wait=False)
pid = os.fork()  # as a DataLoader's worker: it holds the other end of the writer's connection
if pid == 0:
    signal.pause()
print(pid, store.background._process._process.pid, flush=True)
if sys.argv[2] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
os.kill(pid, signal.SIGKILL)
os.waitpid(pid, 0)
"""


@pytest.mark.parametrize("way", ["kill", "leave"])
def test_the_writer_ends_with_its_process_even_if_forked_children_live(way, url):
    command = [sys.executable, "-c", _DIES, url, way]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        worker, helper = map(int, process.stdout.readline().split())
        code = process.wait(60)
        if way == "kill":
            psutil.wait_procs([psutil.Process(helper)] if psutil.pid_exists(helper) else [], timeout=10)
            os.kill(worker, signal.SIGKILL)
    if way == "leave":
        assert code == 0
        assert Store(url).load_newest().state["w"].shape == (1 << 22,)  # awaited at exit
    assert not psutil.pid_exists(helper)


def test_a_single_file_opens_with_plain_torch(tmp_path):
    path = tmp_path / "new" / "x.ckpt"
    content = {"state_dict": {"w": torch.ones(3)}, "epoch": 1, "hyper_parameters": {"lr": 0.1}}
    save_file(content, path)
    save_file(content | {"epoch": 2}, path)
    same(content | {"epoch": 2}, torch.load(path, weights_only=True))
    same(content | {"epoch": 2}, load_file(path))
    assert [p.name for p in path.parent.iterdir()] == ["x.ckpt"]
    os.truncate(path, 500)
    with pytest.raises(CheckpointDamagedError, match="not a whole torch file"):
        load_file(path)
    torch.save({"state_dict": {}, "when": random.Random()}, path)
    with pytest.raises(CheckpointError, match="weights_only=False"):
        load_file(path)
    assert set(load_file(path, weights_only=False)) == {"state_dict", "when"}


def test_objects_and_exchanges_per_save_do_not_grow_with_the_number_of_tensors(tmp_path):
    class Counting:
        rank, size = 0, 1

        def __init__(self):
            self.calls = 0

        def gather(self, obj):
            self.calls += 1
            return [obj]

        def broadcast(self, obj, src=0):
            self.calls += 1
            return obj

    counts = set()
    for number in (1, 10, 2000):
        world = Counting()
        saved = Store(str(tmp_path / str(number)), world).save({str(i): torch.zeros(2) for i in range(number)}, step=1)
        files = list(Path(open_checkpoint(saved.path).folder.path).iterdir())
        counts.add((world.calls, len(files)))
    assert counts == {(3, 3)}
