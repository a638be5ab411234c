"""mkdocs hook: pages of the site that are not in ``docs/``, and links between the two.

README.md is the first page. Files that pages link to keep their places in the repository, so that
the same links work there and on the site; source code is shown as a page of its own. What the site
does not have, such as tests, is named there without a link.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "src/mtpbatch/models/README.md",
]
SOURCES = ["src/mtpbatch/models/LICENSE"]
FOLDERS = ["examples"]
LINK = re.compile(r"\[([^\[\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def _shown() -> dict[str, str]:
    """The site's path of each file from outside ``docs/``."""
    inside = [
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".md", ".py", ".yaml")
    ]
    return {
        name: name if name.endswith(".md") else f"{name}.md"
        for name in [*DOCUMENTS, *SOURCES, *inside]
    } | {"README.md": "index.md"}


SHOWN = _shown()
ORIGINS = {uri: name for name, uri in SHOWN.items()}


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    for name, uri in SHOWN.items():
        path = ROOT / name
        content = path.read_text(encoding="utf-8")
        if path.suffix != ".md":
            content = f"# {path.name}\n\n```{path.suffix[1:]}\n{content}\n```\n"
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    here = page.file.src_uri
    origin = ORIGINS.get(here, f"docs/{here}")

    def on_the_site(match: re.Match[str]) -> str:
        words, target, anchor = match.groups(default="")
        name = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        if (ROOT / name / "README.md").exists():
            name = f"{name}/README.md"
        if not (ROOT / name).exists():
            return match[0]  # mkdocs complains of it
        if name not in SHOWN and not name.startswith("docs/"):
            return words
        uri = SHOWN.get(name, name.removeprefix("docs/"))
        return f"[{words}]({posixpath.relpath(uri, posixpath.dirname(here) or '.')}{anchor})"

    if here == "errors.md":  # docstrings link to these
        markdown = re.sub(r"(?m)^## (\w+)$", r"## \1 { #mtpbatch.\1 }", markdown)
    return LINK.sub(on_the_site, markdown)
