"""What the site needs beyond MkDocs: links to files of the repository, pictures and text from beside docs/, MathML."""

import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)")
INCLUDE = re.compile(r"<!-- include (\S+) -->")
FETCHED = re.compile(r'<(?:script|img|iframe)[^>]* src="?https?:[^ >]*|<link[^>]* rel="?stylesheet[^>]*https?:[^ >]*')
FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Take in the pictures beside docs/ that pages show."""
    for page in DOCS.rglob("*.md"):
        for target, _ in LINK.findall(_with_includes(page.read_text(), page.parent)):
            path = (page.parent / target).resolve()
            if path.suffix == ".png" and DOCS not in path.parents:
                name = _name_in_site(path)
                if files.get_file_from_path(name) is None:
                    files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Put in what is included, and point to the repository where a file is no part of the site."""
    folder = Path(page.file.abs_src_path).parent
    return LINK.sub(
        lambda found: f"]({_address(found[1], folder, config.repo_url)}{found[2] or ''})",
        _with_includes(markdown, folder),
    )


def on_page_content(html: str, **_: Any) -> str:
    """Make MathML of formulas: every browser shows it, and no script is fetched."""
    return FORMULA.sub(lambda found: _mathml(unescape(found[2]), "block" if found[1] == "div" else "inline"), html)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse what a browser would fetch from elsewhere while it shows the page."""
    if found := FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri} must show without a network, got {found[0]}")
    return output


def _with_includes(markdown: str, folder: Path) -> str:
    """The text with files put in, without their titles, and with links as seen from the page."""

    def text(found: re.Match[str]) -> str:
        path = (folder / found[1]).resolve()
        _, _, body = path.read_text().partition("\n")
        return LINK.sub(lambda link: f"]({_seen_from(folder, path.parent / link[1])}{link[2] or ''})", body.strip())

    return INCLUDE.sub(text, markdown)


def _seen_from(folder: Path, path: Path) -> str:
    path = path.resolve()
    if DOCS in path.parents:
        return path.relative_to(folder).as_posix()
    return "../" * len(folder.relative_to(REPOSITORY).parts) + path.relative_to(REPOSITORY).as_posix()


def _address(target: str, folder: Path, repository: str) -> str:
    path = (folder / target).resolve()
    if DOCS in path.parents:
        return target
    if not path.exists():
        raise PluginError(f"a page in {folder} links to {target}, which is not there")
    if path.suffix == ".png":
        return "../" * len(folder.relative_to(DOCS).parts) + _name_in_site(path)
    return f"{repository}/{'tree' if path.is_dir() else 'blob'}/main/{path.relative_to(REPOSITORY).as_posix()}"


def _name_in_site(path: Path) -> str:
    return f"pictures/{path.name}"


def _mathml(formula: str, display: str) -> str:
    return str(convert(formula.strip()[2:-2].strip(), display=display))  # between \( and \), or \[ and \]
