"""One self-contained HTML page: metrics with their recipes, tables, images and the commands that made them."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from unified.files import write_text

MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".svg": "image/svg+xml"}


def write_report(
    out: Path,
    title: str,
    metrics: Sequence[tuple[str, float | str, str]] = (),
    tables: Mapping[str, Sequence[Mapping[str, object]]] | None = None,
    images: Sequence[tuple[Image.Image | Path, str]] = (),
    commands: Sequence[str] = (),
    notes: Sequence[str] = (),
    opening: Sequence[tuple[Image.Image | Path, str]] = (),
) -> Path:
    """Write an HTML page that needs no other file.

    Args:
        out: the file to write; its folder is made.
        title: headline.
        metrics: ``(label, value, recipe)`` of measured numbers; the recipe says in one line how it was measured: the
            network, the number of images, the reference set.
        tables: further tables by their titles, as lists of rows with equal keys.
        images: ``(image, caption)``, in memory or as PNG, JPEG or SVG files; embedded as base64.
        commands: shell commands that made the results, in order.
        notes: paragraphs below the headline, such as the licence of the images.
        opening: as ``images``, those that stand in front of everything but the notes.

    Returns:
        ``out``.

    Raises:
        ValueError: if ``out`` is not named ``.html``, the rows of a table differ in their keys, or an image file is
            missing or of another kind.
    """
    from jinja2 import Environment, StrictUndefined

    out = Path(out)
    if out.suffix != ".html":
        raise ValueError(f"out: {str(out)!r} is not named .html.")
    shown_tables = []
    for name, rows in (tables or {}).items():
        header = list(rows[0]) if rows else []
        for number, row in enumerate(rows):
            if list(row) != header:
                raise ValueError(f"tables: row {number} of {name!r} has the keys {list(row)}, the first has {header}.")
        cells = [[(format_value(value), not isinstance(value, str)) for value in row.values()] for row in rows]
        heads = [(field, bool(cells) and cells[0][column][1]) for column, field in enumerate(header)]
        shown_tables.append((name, heads, cells))
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE
    )
    text = page.render(
        title=title,
        notes=notes,
        metrics=[(label, format_value(value), recipe) for label, value, recipe in metrics],
        tables=shown_tables,
        images=[(_data_uri(image), caption) for image, caption in images],
        opening=[(_data_uri(image), caption) for image, caption in opening],
        commands=commands,
    )
    return write_text(out, text)


def format_value(value: object) -> str:
    """Print a number: whole ones with thousands marks, others with two or three decimals where that fits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or 0.001 <= abs(value) < 10:
        return f"{value:.3f}"
    return f"{value:,.2f}" if 10 <= abs(value) < 1e6 else f"{value:.3g}"


def _data_uri(image: Image.Image | Path) -> str:
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        kind, data = "image/png", buffer.getvalue()
    else:
        path = Path(image)
        if path.suffix.lower() not in MEDIA_TYPES or not path.is_file():
            raise ValueError(f"images: {str(path)!r} is missing or not one of {sorted(MEDIA_TYPES)}.")
        kind, data = MEDIA_TYPES[path.suffix.lower()], path.read_bytes()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { --ink: #1d2430; --faint: #5b6675; --line: #d9dee5; --soft: #f5f7f9; --accent: #0b6e6e; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: clamp(1.6rem, 4vw, 2.2rem); line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
p { max-width: 48rem; margin: 0 0 .75rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .95rem; }
th, td { text-align: left; vertical-align: top; padding: .5rem .9rem .5rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.value { font-weight: 650; color: var(--accent); }
td.recipe { color: var(--faint); font-size: .87rem; }
figure { margin: 0 0 2rem; }
figure img { display: block; max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 6px; }
figcaption { color: var(--faint); font-size: .9rem; margin-top: .5rem; max-width: 48rem; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 6px; padding: .9rem 1rem;
  overflow-x: auto; font: .85rem/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (max-width: 40rem) {
  .metrics th:last-child { display: none; }
  .metrics td.recipe { display: block; padding-top: 0; }
  .metrics tr { display: grid; grid-template-columns: 1fr auto; border-bottom: 1px solid var(--line); }
  .metrics td, .metrics th { border: 0; }
  .metrics td.recipe { grid-column: 1 / -1; }
}
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
{% for note in notes %}
<p>{{ note }}</p>
{% endfor %}
{% for source, caption in opening %}
<figure><img src="{{ source }}" alt="{{ caption }}"><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
{% if metrics %}
<h2>Metrics</h2>
<div class="scroll"><table class="metrics">
<thead><tr><th>metric</th><th class="number">value</th><th>recipe</th></tr></thead>
<tbody>
{% for label, value, recipe in metrics %}
<tr><td>{{ label }}</td><td class="number value">{{ value }}</td>\
<td class="recipe">{{ recipe }}</td></tr>
{% endfor %}
</tbody>
</table></div>
{% endif %}
{% if images %}
<h2>Images</h2>
{% for source, caption in images %}
<figure><img src="{{ source }}" alt="{{ caption }}"><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
{% endif %}
{% for name, header, rows in tables %}
<h2>{{ name }}</h2>
<div class="scroll"><table>
<thead><tr>{% for cell, number in header %}<th{% if number %} class="number"{% endif %}>{{ cell }}</th>\
{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for cell, number in row %}<td{% if number %} class="number"{% endif %}>{{ cell }}</td>\
{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endfor %}
{% if commands %}
<h2>Commands</h2>
<pre>{% for command in commands %}{{ command }}
{% endfor %}</pre>
{% endif %}
</main>
</body>
</html>
"""
