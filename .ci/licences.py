"""The licences of what is installed with muster: every package that it needs, directly or not.

`python .ci/licences.py` tells of what a plain install brings, `python .ci/licences.py all` of all extras too.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement


def needed(extras: bool) -> list[Distribution]:
    """The packages behind muster, by name."""
    root = distribution("muster")
    given = tuple(root.metadata.get_all("Provides-Extra") or ()) if extras else ()
    todo, seen, found = [(root, given)], set(), {}
    while todo:
        package, wanted = todo.pop()
        for text in package.requires or ():
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in (*wanted, "")):
                continue
            key = (re.sub(r"[-_.]+", "-", requirement.name).lower(), tuple(sorted(requirement.extras)))
            if key in seen:
                continue
            seen.add(key)
            try:
                other = root if key[0] == "muster" else distribution(key[0])
            except PackageNotFoundError:
                continue  # not on this platform, or an extra that is not installed
            found[key[0]] = other
            todo.append((other, key[1]))
    return [found[name] for name in sorted(found) if name != "muster"]


def licence(package: Distribution) -> str:
    """What the package says of itself, in the newest of the three ways that there are."""
    about = package.metadata
    classes = [c.rsplit(" :: ", 1)[-1] for c in about.get_all("Classifier") or () if c.startswith("License ::")]
    short = (about.get("License") or "").strip().splitlines()[:1]
    return about.get("License-Expression") or ", ".join(classes) or (short[0][:60] if short else "not stated")


if __name__ == "__main__":
    packages = needed("all" in sys.argv[1:])
    for one in packages:
        sys.stdout.write(f"{one.metadata['Name']:32} {one.version:20} {licence(one)}\n")
    sys.stdout.write(f"{len(packages)} packages\n")
