"""Hooks for mkdocs. Links that leave docs/ point to the repository, or become plain text if its
address isn't known. On a Git host's own pages such links work unchanged. A flag in a line of text
is never broken after its dashes."""

from __future__ import annotations

import posixpath
import re
from typing import Any

CODE = re.compile(r"<pre\b.*?</pre>|<code>.*?</code>", re.DOTALL)
FLAG = re.compile(r"(?<![\w-])--\w+")
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


def on_page_content(html: str, **_: Any) -> str:
    """The page's HTML with each flag in inline code in one piece."""

    def join(match: re.Match[str]) -> str:
        code = match.group(0)
        flag = r'<span class="flag">\g<0></span>'
        return code if code.startswith("<pre") else FLAG.sub(flag, code)

    return CODE.sub(join, html)
