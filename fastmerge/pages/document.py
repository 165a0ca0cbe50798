"""A page as one HTML file: headings, text, tables, code and figures."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmerge.errors import OutputError, printable

if TYPE_CHECKING:
    import os

    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --paper: #fff; --shade: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --paper: #0d1117; --shade: #151b23; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
       max-width: 60rem; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p { margin: .5rem 0; } .soft, figcaption { color: var(--soft); font-size: .9rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
.wide { overflow-x: auto; } th, td { padding: .3rem .75rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { color: var(--soft); font-weight: 600; }
pre { background: var(--shade); border: 1px solid var(--line); border-radius: 6px; padding: .75rem 1rem;
      overflow-x: auto; font: .85rem/1.45 ui-monospace, monospace; }
figure { margin: 1rem 0; } img { width: 100%; height: auto; background: #fff; border-radius: 6px; }
"""


class Document:
    """A page under construction; every text in it is escaped.

    Args:
        title: of the page.
        subtitle: a line below it.

    Attributes:
        figures: by name, in their order.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.figures: dict[str, Figure] = {}
        self._title = title
        self._parts = [f"<h1>{_text(title)}</h1>"]
        if subtitle:
            self._parts.append(f'<p class="soft">{_text(subtitle)}</p>')

    def heading(self, text: str) -> None:
        """Begins a section."""
        self._parts.append(f"<h2>{_text(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{_text(text)}</p>")

    def code(self, text: str) -> None:
        """Lines as they are."""
        self._parts.append(f"<pre>{html.escape(printable(text, lines=True))}</pre>")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; the first column names its rows."""
        top = "".join(f"<th>{_text(cell)}</th>" for cell in head)
        body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        self._parts.append(f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>')

    def figure(self, name: str, figure: Figure, caption: str) -> None:
        """A figure with a line below it, which also is what is read in its place.

        Args:
            name: of its file, without the suffix.
            figure: drawn already.
            caption: what it shows.
        """
        from fastmerge.pages.figures import svg

        self.figures[name] = figure
        data = base64.b64encode(svg(figure)).decode()
        image = f'<img id="{_text(name)}" alt="{_text(caption)}" src="data:image/svg+xml;base64,{data}">'
        self._parts.append(f"<figure>{image}<figcaption>{_text(caption)}</figcaption></figure>")

    def html(self) -> str:
        """The whole file."""
        body = "\n".join(self._parts)
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            # Nothing is loaded, whatever the texts say; and no icon is asked for.
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            "style-src 'unsafe-inline'\">\n"
            f'<link rel="icon" href="data:,">\n<title>{_text(self._title)}</title>\n'
            f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
        )

    def write(self, out: str | os.PathLike[str], images: str | os.PathLike[str] | None = None) -> None:
        """Writes the file, and each figure as PNG into a directory where one is given.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            Path(out).write_text(self.html(), encoding="utf-8")
            if images is not None:
                Path(images).mkdir(parents=True, exist_ok=True)
                for name, figure in self.figures.items():
                    figure.savefig(Path(images) / f"{name}.png", dpi=150, metadata={"Software": None})
        except OSError as error:
            raise OutputError(f"{error.filename or out}: {error.strerror}") from None


def number(value: Any) -> str:
    """A figure as tables show it: four digits, or what it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def listed(values: Mapping[str, Any]) -> str:
    """``name 0.5, other 1``."""
    return ", ".join(f"{name} {number(value)}" for name, value in values.items())


def _text(value: Any) -> str:
    return html.escape(printable(number(value)))
