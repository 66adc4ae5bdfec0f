"""An example, run as it is but for one more callback in each Trainer that it makes."""

from __future__ import annotations

import runpy
from pathlib import Path

import trainer as T


def run(example: str, callback: T.Callback) -> None:
    made = T.Trainer.__init__

    def with_callback(self: T.Trainer, *args: object, **kwargs: object) -> None:
        made(self, *args, **(kwargs | {"callbacks": [*kwargs.get("callbacks", []), callback]}))

    T.Trainer.__init__ = with_callback
    runpy.run_path(str(Path(__file__).parent.parent.parent / "examples" / example), run_name="__main__")
