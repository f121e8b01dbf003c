"""The report's blocks as Markdown and as one HTML page that asks nobody. All text is escaped here."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from metrics import table


@dataclass(frozen=True)
class Block:
    """kind: heading, text, list, table or figure. body: what that kind holds."""

    kind: str
    body: Any


# ---- Markdown


def markdown(blocks: Sequence[Block]) -> str:
    first, parts = True, []
    for block in blocks:
        if block.kind == "heading":
            parts.append(f"{'#' if first else '##'} {safe(block.body)}")
            first = False
        elif block.kind == "list":
            parts.append("\n".join(f"- {safe(item)}" for item in block.body))
        elif block.kind == "table":
            columns, rows = block.body
            sides = [(safe(name), "left" if i == 0 else "right") for i, name in enumerate(columns)]
            parts.append(table(sides, [[safe(cell) for cell in row] for row in rows]))
        elif block.kind == "figure":
            parts.append(f"(figure in report.html: {safe(block.body[1])})")
        else:
            parts.append(safe(block.body))
    return "\n\n".join(parts) + "\n"


def safe(text: object) -> str:
    """Markdown shows HTML, links and pictures: a model's name must be none, and must not end a table's cell."""
    escaped = html.escape(str(text), quote=False).replace("|", r"\|").replace("](", r"]\(").replace("][", r"]\[")
    return "".join(c if c.isprintable() else " " for c in escaped)


# ---- HTML

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1d2126; --faint: #6a717b; --line: #d9dde3; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --text: #e6e8eb; --faint: #9aa1ab; --line: #333940; } }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; margin: 0.75rem 0;  /* a shadow at the edge behind which there is more */
  background: linear-gradient(to right, var(--page) 30%, transparent),
  linear-gradient(to left, var(--page) 30%, transparent) 100% 0,
  linear-gradient(to right, var(--line), transparent), linear-gradient(to left, var(--line), transparent) 100% 0;
  background-repeat: no-repeat; background-size: 3rem 100%, 3rem 100%, 0.9rem 100%, 0.9rem 100%;
  background-attachment: local, local, scroll, scroll; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; min-width: 7.5rem; padding-left: 0; } th { font-weight: 600; }
figure { margin: 0.75rem 0; } .drawings { display: flex; flex-wrap: wrap; gap: 0.5rem; overflow-x: auto; }
figure svg { flex: 1 1 18rem; min-width: 0; max-width: 36rem; height: auto; display: block; }
figure svg.broad { flex-basis: 100%; min-width: 40rem; max-width: none; }  /* two panels: pushed by a finger */
figcaption { color: var(--faint); font-size: 0.85rem; } ul { padding-left: 1.25rem; }
@media (max-width: 40rem) { table { font-size: 0.75rem; } th, td { padding: 0.25rem 0.35rem; } }
@page { margin: 15mm; }
@media print { :root { --page: #ffffff; --text: #000000; --faint: #444444; --line: #bbbbbb; }
  body { max-width: none; padding: 0; font-size: 11px; } table, figcaption { font-size: 10px; }
  figure, tr { break-inside: avoid; } h2 { break-after: avoid; }
  .wide { overflow: visible; background: none; } figure svg.broad { min-width: 0; } }
"""


def page(blocks: Sequence[Block]) -> str:
    title = html.escape(blocks[0].body)
    parts, first = [], True
    for block in blocks:
        parts.append(f"<h1>{html.escape(block.body)}</h1>" if first and block.kind == "heading" else element(block))
        first = first and block.kind != "heading"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def element(block: Block) -> str:
    if block.kind == "heading":
        return f"<h2>{html.escape(block.body)}</h2>"
    if block.kind == "list":
        return "<ul>" + "".join(f"<li>{html.escape(str(item))}</li>" for item in block.body) + "</ul>"
    if block.kind == "table":
        columns, rows = block.body
        head = "".join(f"<th>{html.escape(str(name))}</th>" for name in columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
        return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    if block.kind == "figure":
        drawing, caption = block.body  # the drawing is made here, and its labels are escaped by who draws it
        return f'<figure><div class="drawings">{drawing}</div><figcaption>{html.escape(caption)}</figcaption></figure>'
    return f"<p>{html.escape(block.body)}</p>"
