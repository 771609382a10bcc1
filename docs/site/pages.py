"""mkdocs hook: the pages of the site that are not in docs/ as they are, and links that lead out of docs/."""

from __future__ import annotations

import ast
import base64
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
REPOSITORY = "https://github.com/ldm-vae/ldm-vae"

# files of the repository that are pages of another name in the site
RENAMED = {
    "README.md": "index.md",
    "docs/README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "docs/tutorial.ipynb": "tutorial.md",
}
ORIGIN = {page: file for file, page in RENAMED.items()}

# what docs/extending.md builds on, beside `ldm_vae.__all__`
EXTENSION = {
    "Sources": ["data.source.Record", "data.source.Source", "data.source.SourceConfig"],
    "Losses": ["losses.TermConfig", "losses.Schedule"],
    "Perturbations": ["perturbations.PerturbationConfig"],
    "Discriminators and other parts of a config": ["core.config.Part"],
    "Metrics": ["metrics.metric.Metric", "metrics.metric.ImageMetric"],
}


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages. docs/README.md would be the home page, which the repository's README is."""
    if readme := files.get_file_from_path("README.md"):
        files.remove(readme)
    for file, page in RENAMED.items():
        text = (ROOT / file).read_text(encoding="utf-8")
        if file.endswith(".ipynb"):
            text, pictures = notebook(json.loads(text), page.removesuffix(".md"))
            for name, content in pictures.items():
                files.append(File.generated(config, name, content=content))
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "reference.md", content=reference()))
    files.append(File.generated(config, "site.css", content=(Path(__file__).parent / "site.css").read_text()))
    return files


def reference() -> str:
    """The page of the public names: mkdocstrings fills it in from the sources, which are parsed and not imported."""
    (homes,) = (
        ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "ldm_vae" / "__init__.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES"
    )
    lines = ["# Reference", "", "## `ldm_vae`", "", "[The interface on one page](api.md) has an example of each.", ""]
    lines += [f"::: ldm_vae.{home}.{name}\n" for name, home in sorted(homes.items())]
    lines += ["## For modules of your own", "", "[Extending](extending.md) shows each in use.", ""]
    for title, names in EXTENSION.items():
        lines += [f"### {title}", "", *(f"::: ldm_vae.{name}\n    options: {{heading_level: 4}}\n" for name in names)]
    return "\n".join(lines)


def notebook(content: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in content["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if kind := next((kind for kind in ("image/png", "image/webp") if kind in data), None):
                file = f"images/{name}_{len(pictures)}.{kind.removeprefix('image/')}"
                pictures[file] = base64.b64decode(data[kind])
                parts.append(f"![{output['metadata'].get('alt', 'output of the cell')}]({file})")
            else:
                text = "".join(output.get("text") or data["text/plain"])
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures


LINK = re.compile(r"(\]\()(?!https?:|#)([^)\s#]+)(#[^)\s]*)?(\))")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as the site has them: to its pages by their names here, to other files of the repository there."""
    if page.file.src_uri == "reference.md":
        return markdown
    origin = ORIGIN.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    here = posixpath.dirname(origin)

    def place(match: re.Match[str]) -> str:
        before, target, anchor, after = match.groups()
        path = posixpath.normpath(posixpath.join(here, target))
        if not (ROOT / path).exists():  # a picture of the notebook
            return match[0]
        if path in RENAMED:
            path = RENAMED[path]
        elif path.startswith("docs/"):
            path = path.removeprefix("docs/")
        else:
            kind = "tree" if (ROOT / path).is_dir() else "blob"
            path = f"{REPOSITORY}/{kind}/main/{path}"
        return f"{before}{path}{anchor or ''}{after}"

    return "".join(
        part if index % 2 else LINK.sub(place, part)
        for index, part in enumerate(re.split(r"(^```.*?^```$|`[^`\n]+`)", markdown, flags=re.DOTALL | re.MULTILINE))
    )
