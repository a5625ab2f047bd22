"""What the site has beside docs/: the pages and files of the project that pages link to, as `../README.md`.

On a code host these links work by themselves; in the site such files lie in project/. A hook of mkdocs.yml.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# the target of a link to a file, without its anchor
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)[^)#\s]+")


def on_files(files: Any, config: Any) -> Any:
    """Add what pages link to outside of docs/, and what is linked to from there."""
    waiting = [file for file in files if file.src_uri.endswith(".md")]
    for page in waiting:
        for link in _LINK.findall(page.content_string):
            path = _path(page.src_uri, link)
            if files.get_file_from_path(_uri(path)) is None and (ROOT / path).is_file():
                added = File.generated(config, _uri(path), content=(ROOT / path).read_text(encoding="utf-8"))
                files.append(added)
                waiting += [added] * path.endswith(".md")
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page whose links lead to where files lie in the site."""
    here = page.file.src_uri
    return _LINK.sub(
        lambda link: posixpath.relpath(_uri(_path(here, link[0])), posixpath.dirname(here) or "."), markdown
    )


def _path(page: str, link: str) -> str:
    """Return a link's target, from the project's root. page: in the site."""
    home = page.removeprefix("project/") if page.startswith("project/") else f"docs/{page}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(home), link))


def _uri(path: str) -> str:
    return path.removeprefix("docs/") if path.startswith("docs/") else f"project/{path}"
