"""Links of every page lead somewhere, also those to a heading."""

from __future__ import annotations

import pytest

from tests.docs.pages import REPO, anchors, links, pages

# Pages of the site that are made when it is built, and what each is made of.
MADE = {
    "docs/reference/command-line.md": "launcher/options.py",
    "docs/explanation/house.md": "DESIGN.md",
    "docs/explanation/security.md": "SECURITY.md",
    "docs/about/changelog.md": "CHANGELOG.md",
    "docs/about/contributing.md": "CONTRIBUTING.md",
    "docs/about/benchmarks.md": "benchmarks/README.md",
}


@pytest.mark.parametrize("page", pages())
def test_links(page: str) -> None:
    wrong = []
    for link in links(page):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (REPO / page).parent / path if path else REPO / page
        target = target.resolve()
        name = str(target.relative_to(REPO))
        target = REPO / MADE.get(name, name)
        if not target.exists() or (anchor and anchor not in anchors(str(target.relative_to(REPO)))):
            wrong.append(link)
    assert wrong == []


def test_pages_that_are_made_are_those_of_the_site() -> None:
    text = (REPO / "docs/site/pages.py").read_text()
    for page, source in MADE.items():
        assert f'"{page.removeprefix("docs/")}"' in text
        assert (REPO / source).exists()
        assert not (REPO / page).exists()
