"""A hook for mkdocs: links that leave docs/ point to the repository, or become plain text if its
address isn't known. On a Git host's own pages such links work unchanged."""

from __future__ import annotations

import posixpath
import re
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|mailto:|#)([^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """The page's text with its outside links rewritten."""
    folder = posixpath.dirname(posixpath.join("docs", page.file.src_uri))

    def rewrite(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.startswith("docs/"):
            return match.group(0)
        address = config.get("repo_url")
        return f"[{text}]({address.rstrip('/')}/blob/main/{path})" if address else text

    return LINK.sub(rewrite, markdown)
