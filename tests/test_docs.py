"""Every link between files of the repository leads somewhere."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FILES = subprocess.run(["git", "ls-files", "*.md"], cwd=REPOSITORY, check=True, capture_output=True, text=True)
PAGES = [REPOSITORY / name for name in FILES.stdout.split()]


def anchors(page: Path) -> set[str]:
    """What headings are called in links, as GitHub makes it."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_modules_and_functions_that_pages_name_exist() -> None:
    """`nldist.a.b.c` in a page is a module or something in one."""
    import importlib

    for page in PAGES:
        for name in re.findall(r"`(nldist(?:\.\w+)+)`", page.read_text()):
            parts = name.split(".")
            for end in range(len(parts), 0, -1):
                try:
                    found = importlib.import_module(".".join(parts[:end]))
                    break
                except ModuleNotFoundError:
                    continue
            for part in parts[end:]:
                assert hasattr(found, part), f"{page.name}: {name}"
                found = getattr(found, part)
