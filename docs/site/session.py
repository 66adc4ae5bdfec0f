"""Records the terminal session of the README as a picture: `python docs/site/session.py docs/session.svg`.

The commands are typed into a real terminal (tmux) in a folder of their own, and what stands there at the end is drawn.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[2]
COLUMNS, LINES = 112, 60
# What is typed, what must stand on the screen then, and what is pressed after it.
STEPS = (
    ("launch --procs 2 --run night digits.py --epochs 9", r"epoch [345]/9", "C-c"),
    ("", r"go on with: launch resume night\n\$", ""),
    ("launch resume night", r"run night finished\n\$", ""),
    ("launch show night", r"1 +finished.*\n\$", ""),
)


def main(target: Path) -> None:
    """Type, wait, draw."""
    with tempfile.TemporaryDirectory() as here:
        page = (ROOT / "docs" / "tutorials" / "digits.md").read_text()
        script = re.search(r'```python title="digits.py"\n(.*?)```', page, re.DOTALL)
        assert script is not None
        (Path(here) / "digits.py").write_text(script[1])
        shell = (
            f"env -i PS1='$ ' TERM=xterm-256color HOME={here} OMP_NUM_THREADS=1 PYTHONPATH={ROOT} "
            f"PATH={Path(sys.executable).parent}:/usr/bin:/bin bash --norc --noprofile"
        )
        name = f"session-{time.time_ns()}"
        tmux("new-session", "-d", "-s", name, "-x", str(COLUMNS), "-y", str(LINES), "-c", here, shell)
        try:
            for line, wanted, key in STEPS:
                if line:
                    tmux("send-keys", "-t", name, "-l", line)
                    tmux("send-keys", "-t", name, "Enter")
                deadline = time.monotonic() + 120
                while not re.search(wanted, screen(name)):
                    if time.monotonic() > deadline:
                        sys.exit(f"{wanted!r} did not appear:\n{screen(name)}")
                    time.sleep(0.05)
                if key:
                    tmux("send-keys", "-t", name, key)
            time.sleep(0.5)
            text = screen(name, "-e").rstrip().removesuffix("$").rstrip().replace(here, "~")
        finally:
            tmux("kill-session", "-t", name)
    console = Console(record=True, width=COLUMNS, file=open("/dev/null", "w"))  # noqa: SIM115 # as long as we are
    console.print(Text.from_ansi(text))
    # Without the web fonts that rich's own template asks the network for.
    template = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    template = template.replace("font-family: Fira Code, monospace", "font-family: monospace")
    target.write_text(console.export_svg(title="launch", code_format=template) + "\n")


def screen(name: str, *flags: str) -> str:
    """What stands on the terminal."""
    return tmux("capture-pane", "-p", *flags, "-t", name)


def tmux(*words: str) -> str:
    """A server of our own, so that nobody's settings hold."""
    return subprocess.run(["tmux", "-L", "muster-docs", "-f", "/dev/null", *words], check=True, capture_output=True,
                          text=True).stdout  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
