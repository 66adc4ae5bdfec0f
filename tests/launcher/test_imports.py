"""Who may import whom, read from the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("launcher", "trainer")

# DESIGN.md: what stands further left knows nothing of what stands further right.
ORDER = {
    "errors": 0, "hardware": 0, "processes": 0, "progress": 0, "stacks": 0, "native": 1, "hangs": 1, "pace": 1,
    "vitals": 1, "nvml": 0, "clocks": 0, "notices": 1,
    "spec": 1, "topology": 2, "channel": 2, "logs": 2,
    "worker": 2, "runs": 2, "failure": 2, "faults": 2, "config": 2, "index": 3, "gang": 3, "zygote": 3, "snapshot": 3,
    "history": 3, "samples": 3, "starting": 3, "scheduling": 3, "fleet": 3, "watching": 3, "arrival": 3,
    "addresses": 3, "pulse": 3, "crew": 4, "fence": 3, "record": 4, "telling": 4, "node": 4,
    "agent": 4, "elastic": 4,
    "waking": 0, "observer": 4, "reception": 4, "supervisor": 4,
    "scrub": 0, "surroundings": 3, "report": 8,
    "arrays": 5, "sweep": 5, "backends": 5, "options": 6, "hosts": 6, "where": 7, "request": 7, "standing": 7,
    "commands": 8, "doctor": 5, "launching": 9, "cli": 9, "call": 0, "jobs": 9, "calling": 10,
    "__init__": 11,
}  # fmt: skip


def _modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _imports(path: Path, *, top_only: bool) -> set[str]:
    """Full names of the modules that a file imports; `top_only`: when it is imported, not inside functions."""
    tree = ast.parse(path.read_text())
    found = set()
    later = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
        elif top_only and (isinstance(node, later) or _for_types(node)):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


@pytest.mark.parametrize(("package", "other"), [PACKAGES, PACKAGES[::-1]])
def test_the_packages_do_not_know_each_other(package: str, other: str) -> None:
    for path in _modules(package):
        guilty = {name for name in _imports(path, top_only=False) if name.split(".")[0] == other}
        assert not guilty, f"{path.relative_to(ROOT)} imports {guilty}"


def test_only_elastic_imports_torch() -> None:
    """The supervisor and the command line must start at once; torch is the agent's and the ranks'."""
    for path in _modules("launcher"):
        heavy = {n for n in _imports(path, top_only=True) if n.split(".")[0] in ("torch", "numpy", "rich")}
        assert not heavy or path.name == "elastic.py", f"{path.name} imports {heavy}"


def test_the_direction_of_imports() -> None:
    for path in _modules("launcher"):
        me = path.relative_to(ROOT / "launcher").parts[0].removesuffix(".py")
        assert me in ORDER, f"launcher/{me}: say in ORDER, and in DESIGN.md, where it stands"
        for name in _imports(path, top_only=True):
            parts = name.split(".")
            if parts[0] == "launcher" and len(parts) > 1 and parts[1] in ORDER and parts[1] != me:
                assert ORDER[parts[1]] <= ORDER[me], f"{path.relative_to(ROOT)} imports {name}"


def test_importing_launcher_does_nothing() -> None:
    """No torch, no thread, no handler, no variable."""
    code = (
        "import os, signal, sys, threading\n"
        "before = dict(os.environ), [signal.getsignal(s) for s in (2, 15)]\n"
        "import launcher, launcher.supervisor, launcher.agent, launcher.backends.local, launcher.cli\n"
        "assert (dict(os.environ), [signal.getsignal(s) for s in (2, 15)]) == before\n"
        "assert threading.active_count() == 1\n"
        "assert not {'torch', 'numpy', 'trainer'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
