"""Saves beside the training: what went wrong is told to all at a step, and only what is durable is ever named."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from tests.conftest import PROGRAMS, REPO, poll_until
from trainer import Trainer, saves
from trainer.callbacks import Callback, ModelCheckpoint
from trainer.callbacks.periodic import PeriodicCheckpoint, best_interval, parse_save_every
from trainer.checkpoint.background import Background
from trainer.checkpoint.folder import Folder
from trainer.errors import CheckpointWriteError, ConfigError


class Waits(Callback):
    """Before each batch waits until the writer is idle, so that what follows follows at that step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        background = trainer.saves._background
        if background is not None and background._newest is not None:
            poll_until(lambda: background._newest.writer.stage(1, 1), what="the writer")
            background._newest.writer._thread.join()


def failing(monkeypatch, code: int, *numbers: int) -> None:
    """Make the writes of these numbers fail; every save of a file is one."""
    original, count = Folder.write_blocks, 0

    def write_blocks(self, name, blocks):
        nonlocal count
        count += 1
        if count in numbers:
            raise OSError(code, os.strerror(code))
        return original(self, name, blocks)

    monkeypatch.setattr(Folder, "write_blocks", write_blocks)


def test_an_error_of_the_writer_is_raised_at_the_next_step(boring, data, quiet, tmp_path, monkeypatch):
    failing(monkeypatch, errno.EIO, 2)
    callback = ModelCheckpoint(tmp_path / "c", "{step}", every_n_train_steps=3)
    trainer = quiet(max_steps=30, enable_checkpointing=True, callbacks=[callback, Waits()])
    with pytest.raises(CheckpointWriteError, match=r"step=6.ckpt was not written: OSError: .*Input/output"):
        trainer.fit(boring(), data(200))
    assert trainer.global_step in (6, 7)  # the writer may be faster than the end of the batch
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step=3.ckpt"]
    # What failed is not what the callback goes by.
    assert callback.best_model_path == str(tmp_path / "c" / "step=3.ckpt")


def test_saves_that_come_faster_than_they_are_written_wait_and_say_so_once(boring, data, quiet, tmp_path, monkeypatch):
    original, waiting = Folder.write_blocks, threading.Event()

    def write_blocks(self, name, blocks):
        assert waiting.wait(20)
        return original(self, name, blocks)

    def waits(self):
        waiting.set()
        return wait(self)

    wait = Background.wait
    monkeypatch.setattr(Folder, "write_blocks", write_blocks)
    monkeypatch.setattr(Background, "wait", waits)
    monkeypatch.setattr(saves, "_LONG_WAIT_S", 0.0)
    callback = ModelCheckpoint(tmp_path / "c", "{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.warns(UserWarning, match="waited .* s for the one before it") as caught:
        quiet(max_steps=4, enable_checkpointing=True, callbacks=[callback]).fit(boring(), data(200))
    assert len([w for w in caught if "for the one before it" in str(w.message)]) == 1
    assert len(list((tmp_path / "c").iterdir())) == 4
    waiting.set()  # from now on the store is fast enough; a warning would be an error
    quiet(max_steps=4, enable_checkpointing=True, callbacks=[callback, Waits()]).fit(boring(), data(200))


def test_a_full_disk_is_a_warning_and_the_best_ones_stay(boring, data, quiet, tmp_path, monkeypatch):
    failing(monkeypatch, errno.ENOSPC, 3, 4)
    callback = ModelCheckpoint(
        tmp_path / "c", "{step}", every_n_train_steps=2, monitor="loss", mode="max", save_top_k=2, save_last=True
    )
    seen = []

    class Looks(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step % 2 == 0:
                return  # what came of the save that has just been made is learnt after this batch
            named = {*callback.best_k_models, callback.best_model_path, callback.last_model_path} - {""}
            seen.append({Path(p).name for p in named if not Path(p).exists()})

    class Rising(boring):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", float(self.trainer.global_step))
            return loss

    trainer = quiet(max_steps=10, enable_checkpointing=True, callbacks=[callback, Waits(), Looks()])
    with pytest.warns(UserWarning, match=r"The store is full, and training goes on.*No space left") as caught:
        trainer.fit(Rising(), data(200))
    assert len([w for w in caught if "store is full" in str(w.message)]) == 2
    assert trainer.global_step == 10
    # Steps 6 and 8 were lost; nothing was removed for them.
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["last.ckpt", "step=10.ckpt", "step=4.ckpt"]
    assert {Path(p).name for p in callback.best_k_models} == {"step=10.ckpt", "step=4.ckpt"}
    assert (tmp_path / "c" / "last.ckpt").read_bytes() == (tmp_path / "c" / "step=10.ckpt").read_bytes()
    # One batch after each save the callback named nothing that was not there.
    assert seen == [set()] * 5


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk needs root")
def test_a_disk_that_is_really_full(gang, tmp_path):
    (tmp_path / "disk").mkdir()
    said = gang.ok(1, "full_disk.py", str(tmp_path / "disk"))[0].stdout.splitlines()[-1]
    # The first few fit; what came later was lost with a warning each, until there was room for the last.
    assert re.fullmatch(r"WARNED (1[0-9]) \[2, 3(, 4)?, 21\]", said), said


def test_a_checkpoint_is_listed_when_it_is_durable_and_not_before(boring, data, quiet, tmp_path, monkeypatch):
    monkeypatch.setenv("LAUNCH_RUN_DIR", str(tmp_path))
    failing(monkeypatch, errno.ENOSPC, 3)  # the file of step 2 is the first, the list the second
    callback = ModelCheckpoint(tmp_path / "c", "{step}", every_n_train_steps=2, save_top_k=-1)
    with pytest.warns(UserWarning, match="store is full"):
        quiet(max_steps=7, enable_checkpointing=True, callbacks=[callback]).fit(boring(), data(200))
    listed = [Path(e["path"]).name for e in json.loads((tmp_path / "checkpoints" / "saved.json").read_text())]
    assert listed == ["step=2.ckpt", "step=6.ckpt", "resume-step=7-epoch.ckpt", "resume-step=7-finished.ckpt"]


def test_ranks_go_on_together_and_raise_together(gang, tmp_path):
    results = gang.ok(2, "saves_on_ranks.py", str(tmp_path))
    said = {line for r in results for line in r.stdout.splitlines()}
    assert f"ENDED 30 {tmp_path / 'full' / 'step=30.ckpt'}" in said
    assert len([line for line in said if line.startswith("RAISED")]) == 1
    assert len(said) == 2
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["last.ckpt", "step=30.ckpt"]
    # What failed left nothing behind, and what it was to replace is still there.
    assert sorted(p.name for p in (tmp_path / "error").iterdir()) == ["last.ckpt", "step=2.ckpt"]


_SLOW = """
import runpy, signal, sys, threading
signal.alarm(50)  # a deadline for whoever waits for us
from trainer.checkpoint.background import Background
from trainer.checkpoint.folder import Folder
from trainer.saves import Saves
original = Folder.write_blocks
def write_blocks(self, name, blocks):
    if sys.argv[2] in name:  # half of it, and then no more
        def half():
            block = next(iter(blocks))
            yield block[: len(block) // 2]
            print("HALF", flush=True)
            threading.Event().wait()
        return original(self, name, half())
    return original(self, name, blocks)
def at_stop(self):
    print("STOPPING", flush=True)
    return to_stop(self)
Folder.write_blocks = write_blocks
to_stop, Saves.at_stop = Saves.at_stop, at_stop
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.slow
def test_no_torn_checkpoint_is_resumed_when_the_grace_is_shorter_than_a_save(gang, tmp_path):
    """The stop signal comes while a save is under way, and the kill before either is durable."""
    program = str(PROGRAMS / "trainer_resume.py")

    def environment(name: str, attempt: int) -> dict[str, str]:
        (tmp_path / name).mkdir(exist_ok=True)
        hurt = json.dumps([["SIGTERM", 0, "train", 13]])
        return {"LAUNCH_RUN_DIR": str(tmp_path / name), "LAUNCH_ATTEMPT": str(attempt),
                "HURT": hurt if name == "hurt" else "[]"}  # fmt: skip

    whole = gang.ok(1, program, env=environment("whole", 0))[0].stdout
    command = [sys.executable, "-c", _SLOW, program, "step=6.ckpt"]
    variables = os.environ | environment("hurt", 0) | {"PYTHONPATH": str(REPO)}
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as process:
        assert {process.stdout.readline() for _ in range(2)} == {"HALF\n", "STOPPING\n"}
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    torn = list((tmp_path / "hurt").rglob(".*.part"))
    assert len(torn) == 1
    assert gang.ok(1, program, env=environment("hurt", 1))[0].stdout == whole
    assert not torn[0].exists()
    torch.load(next((tmp_path / "hurt").rglob("resume-*finished.ckpt")), weights_only=True)


@pytest.mark.parametrize("bad", [0, -3, True, "often", "10 parsecs", "0min", 2.5])
def test_a_wrong_save_every_is_refused(bad):
    with pytest.raises(ConfigError, match=r"save_every=.*'10min'"):
        Trainer(accelerator="cpu", save_every=bad)


def test_save_every_without_checkpoints_is_refused():
    with pytest.raises(ConfigError, match="contradict"):
        Trainer(accelerator="cpu", save_every=5, enable_checkpointing=False)


@pytest.mark.parametrize(("given", "parsed"), [(7, 7), ("30s", 30.0), ("10min", 600.0), ("1.5 h", 5400.0),
                                               (timedelta(minutes=2), 120.0), ("auto", "auto")])  # fmt: skip
def test_forms_of_save_every(given, parsed):
    assert parse_save_every(given) == parsed


def test_the_best_interval_is_where_training_loses_least():
    """Against the loss itself: stalls per interval, and half an interval per failure."""
    for stall, between in ((0.1, 3600.0), (5.0, 86400.0), (0.02, 1e6)):
        chosen = best_interval(stall, 0.1, between)

        def loss(interval, stall=stall, between=between):
            return stall / interval + (interval + stall) / 2 / between

        assert loss(chosen) < 1.02 * min(loss(chosen * f) for f in (0.25, 0.5, 0.7, 1.4, 2, 4))
    assert best_interval(0.1, 900.0, 3600.0) > 900  # no save waits for that before it
    assert best_interval(100.0, 1.0, 10.0) == 10  # a machine that fails all the time


def test_save_every_steps_beside_a_model_checkpoint(boring, data, quiet, tmp_path, monkeypatch):
    monkeypatch.setenv("LAUNCH_RUN_DIR", str(tmp_path))
    callback = ModelCheckpoint(tmp_path / "c", "{step}", every_n_train_steps=6, save_top_k=-1)
    trainer = quiet(max_epochs=1, enable_checkpointing=True, callbacks=[callback], save_every=4,
                    accumulate_grad_batches=2)  # fmt: skip
    trainer.fit(boring(), data(136))
    listed = [Path(e["path"]).name for e in json.loads((tmp_path / "checkpoints" / "saved.json").read_text())]
    # 34 batches, 17 steps. Own ones (steps 4, 8, 16 and the ends of the epoch and the run) make room for newer ones.
    assert listed == ["step=6.ckpt", "step=12.ckpt", "resume-step=17-epoch.ckpt", "resume-step=17-finished.ckpt"]
    assert {p.name for p in (tmp_path / "checkpoints").glob("*.ckpt")} == set(listed[2:])


def test_auto_chooses_from_what_it_measured_and_says_so(boring, data, quiet, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LAUNCH_RUN_DIR", str(tmp_path))
    monkeypatch.setenv("LAUNCH_ATTEMPT", "3")
    trainer = quiet(max_steps=8, enable_checkpointing=True, save_every="auto", callbacks=[
        ModelCheckpoint(tmp_path / "c", "{step}", every_n_train_steps=2), Waits()])  # fmt: skip
    trainer.fit(boring(), data(200))
    said = [line for line in capsys.readouterr().err.splitlines() if "save_every='auto'" in line][-1]
    assert "3 failures so far" in said
    periodic = next(c for c in trainer.callbacks if isinstance(c, PeriodicCheckpoint))
    assert f"every {periodic._interval.seconds:.0f} s" in said
    state = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["callbacks"]
    assert state["PeriodicCheckpoint"]["stops"] == 0
