"""Who failed first on machines whose clocks differ, and what their ranks do meanwhile, over a real ssh."""

from __future__ import annotations

import json

import pytest
from job import LAUNCH

pytestmark = [pytest.mark.lab, pytest.mark.ssh, pytest.mark.timeout(180)]

# Rank 0 fails a moment after rank 1; by the bare numbers of their clocks it is the other way round.
BOTH_FAIL = """
import os, time
from pathlib import Path
print("up", flush=True)
mine, theirs = ("second", "first") if os.environ["RANK"] == "0" else ("first", "go")
while not Path(theirs).exists():
    time.sleep(0.01)
Path(mine).touch()
if mine == "second":
    time.sleep(0.2)
raise ValueError(mine)
"""


def test_a_run_is_watched_and_its_first_failure_named_although_clocks_differ(launched, machines, tmp_path):
    (tmp_path / "fail.py").write_text(BOTH_FAIL)
    one = launched("--hosts", "ada,cyd", "--preload", "json", "fail.py")
    one.ups(2)
    top = machines.popen(LAUNCH, "top", "job", "--json", cwd=tmp_path,
                         environment={"XDG_STATE_HOME": str(tmp_path / "state")}, stdout=-1, text=True)  # fmt: skip
    told = json.loads(top.communicate(timeout=60)[0])
    assert (told["ranks"], told["hosts"], told["silent_nodes"]) == (2, ["ada", "cyd"], [])
    assert sorted((row["rank"], row["host"], row["line"]) for row in told["rows"]) == [
        (0, "ada", "up"),
        (1, "cyd", "up"),
    ]
    (tmp_path / "go").touch()
    code, _, err = one.end()
    assert code == 1, err
    assert "rank 1 of 2 on cyd" in err, err
    assert "class of fault: user code (rank 1 said: ValueError: first)" in err
