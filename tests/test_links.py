"""Links between the documents lead somewhere, those of the guide too."""

import re

import pytest

from embervlm.config import REPOSITORY

GUIDE = REPOSITORY.parent / "shared" / "spec" / "stage4_guide.md"
PAGES = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md"), *(REPOSITORY / "deployment").glob("*.md")]
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")


def links(text):
    """Relative ones, with the part of the page that they name."""
    return [(path, anchor) for path, anchor in LINK.findall(text) if "://" not in path]


def anchors(text):
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    return {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_leads_somewhere(page):
    for path, anchor in links(page.read_text(encoding="utf-8")):
        target = page.parent / path
        assert target.exists(), f"{page.name}: {path}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page.name}: {path}{anchor}"


@pytest.mark.skipif(not GUIDE.exists(), reason="the guide does not lie beside this checkout")
def test_the_guides_links_lead_somewhere_from_docs():
    found = [path for path, _ in links(GUIDE.read_text(encoding="utf-8")) if path.startswith("../")]
    assert len(found) == 4
    assert not [path for path in found if not (REPOSITORY / "docs" / path).exists()]
