"""What mkdocs is told of this repository: pages that lie elsewhere, links that leave `docs/`, and the HTTP interface.

README.md is the first page, `loadtests/README.md` another; any other file of the repository that a page links to is
copied beside them. `openapi.md` is made from the application's own document. mkdocs calls the functions below by name.
"""

from __future__ import annotations

import asyncio
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from service.app import create_app
from service.handlers.docs_page import docs_page
from service.pool import PoolFile
from service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = {"index.md": "README.md", "loadtests/README.md": "loadtests/README.md"}
"""Pages of the site that are not in docs/: where they stand, and the file that they are."""

BADGE = re.compile(r"\[?!\[[^\]]*\]\(https://img\.shields\.io/[^)]*\)(?:\]\([^)]*\))?")
"""Pictures of another server, which the site does without."""

LINK = re.compile(r"(!?\[[^\]]*\]\()((?!https?:|mailto:|#)[^)\s#]+)((?:#[^)\s]*)?\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill in the lists of pages that grow by themselves."""
    docs = Path(config.docs_dir)
    lists = {folder.upper(): sorted(f"{folder}/{path.name}" for path in (docs / folder).glob("*.md"))
             for folder in ("runbooks", "decisions")}  # fmt: skip
    config.nav = _filled(config.nav, lists)
    return config


async def _interface() -> dict[str, Any]:
    """Return the OpenAPI document as a gateway answers it; nothing is connected to."""
    model = {"name": "rm", "urls": ["http://127.0.0.1:9"], "rendering": "template"}
    settings = Settings(store_url="redis://127.0.0.1:9/0")
    app = create_app(settings, PoolFile.model_validate({"models": [model]}))
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    request = {"type": "http", "method": "GET", "path": "/openapi.json", "root_path": "", "query_string": b""}
    await app({**request, "headers": [], "app": None}, receive, send)
    document: dict[str, Any] = json.loads(b"".join(message.get("body", b"") for message in sent))
    return document


def _filled(nav: Any, lists: dict[str, list[str]]) -> Any:
    if isinstance(nav, dict):
        return {name: _filled(inside, lists) for name, inside in nav.items()}
    if isinstance(nav, list):
        named = nav[0] if nav and isinstance(nav[0], str) else ""
        return lists.get(named) or [_filled(one, lists) for one in nav]
    return nav


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies elsewhere."""
    for place, name in ELSEWHERE.items():
        files.append(File.generated(config, place, content=(ROOT / name).read_text("utf-8")))
    document = asyncio.run(_interface())
    files.append(File.generated(config, "openapi.json", content=json.dumps(document, indent=1)))
    files.append(File.generated(config, "openapi.md", content=_framed(docs_page(document))))
    linked = {
        target
        for file in files.documentation_pages()
        for target in _targets(file)
        if (ROOT / target).is_file() and target not in ELSEWHERE.values() and not target.startswith("docs/")
    }
    for target in sorted(linked):
        files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Turn links to files of the repository into links to where they stand in the site."""
    home = _home(page.file)

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(home, match[2]))
        if not (ROOT / target).exists():
            # mkdocs says what is wrong with it.
            return match[0]
        if (ROOT / target).is_dir():
            return match[1].removesuffix("](").removeprefix("[")
        placed = _place(target)
        return match[1] + posixpath.relpath(placed, posixpath.dirname(page.file.src_uri) or ".") + match[3]

    return LINK.sub(moved, BADGE.sub("", markdown))


def _home(file: File) -> str:
    """Return the folder of a page's source in the repository."""
    return posixpath.dirname(ELSEWHERE.get(file.src_uri, "docs/" + file.src_uri))


def _place(target: str) -> str:
    """Return where a file of the repository stands in the site."""
    elsewhere = {name: place for place, name in ELSEWHERE.items()}
    return elsewhere.get(target, target.removeprefix("docs/"))


def _targets(file: File) -> list[str]:
    home = _home(file)
    return [posixpath.normpath(posixpath.join(home, match[2])) for match in LINK.finditer(file.content_string)]


def _framed(page: str) -> str:
    """Return the body of the page that a gateway shows at `/docs`, as a page of the site."""
    _, _, body = page.partition("</h1>")
    body = body.removesuffix("</html>")
    return f"# HTTP interface\n\nEvery gateway shows this at `/docs`.\n\n<div>{body}</div>\n"
