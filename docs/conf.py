"""How Sphinx makes the site of README, docs, experiments and docstrings: make docs."""

import re
import shutil
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import jaxvae

project = "jaxvae"
author = "the authors of jaxvae"
copyright = author
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]

# The whole repository is the source, so that links lead from one file to another as they do there.
root_doc = "README"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/*.md",
    "docs/*.ipynb",
    "experiments/*/README.md",
    "experiments/speed/results/*.md",
]
exclude_patterns = [".*", "build", "runs"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks hold their outputs
highlight_language = "none"  # where none is named: commands and equations

default_role = "code"
napoleon_use_ivar = True  # what "Attributes" lists, autodoc documents too
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True

smartquotes_action = "D"  # dashes, but not quotes
html_theme = "furo"
html_title = "jaxvae"
html_math_renderer = "mathml"

CONTENTS = """
```{toctree}
:hidden:
:caption: Tutorial

docs/tutorial
docs/tutorial.ko
```
```{toctree}
:hidden:
:caption: Guides

docs/models
docs/gallery
docs/monitoring
docs/export
docs/scale
docs/speed
docs/reliability
```
```{toctree}
:hidden:
:caption: Reference

docs/api
docs/modules
CONTRIBUTING
CHANGELOG
```
```{toctree}
:hidden:
:caption: Experiments
:glob:

experiments/*/README
experiments/speed/results/*
```
"""


def adapt(app, name, source):
    """README is the start page and leads to all others; tables have a title; folders are none."""
    if "/results/" in name:
        source[0] = f"# Speed: {Path(name).name.replace('_', ' ')}\n\n{source[0]}"
    source[0] = re.sub(r"\[([^]]*)\]\(results\)", r"\1", source[0])
    if name == root_doc:
        source[0] += CONTENTS


def as_restructured_text(app, what, name, obj, options, lines):
    """Docstrings are plain text: blocks indented by four are equations; *, | mean themselves."""
    if lines and lines[0].startswith("Alias for field number"):  # says Python, of a NamedTuple
        lines.clear()
    text = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
        if paragraph.startswith("    "):
            text += ["::", "", *paragraph.splitlines(), ""]
            continue
        parts = re.split("(`[^`]*`)", paragraph)  # code at the odd places
        parts[::2] = [re.sub(r"([*|\\]|_(?!\w))", r"\\\1", part) for part in parts[::2]]
        plain = "".join(parts).splitlines()
        if plain and all(re.match(r"[a-z]\w*(, [a-z]\w*)*: |  ", line) for line in plain):
            # "name: what it is", each with what follows it indented by two: a list of definitions.
            for line in plain:
                term, _, says = line.partition(": ") if line[0] != " " else ("", "", line.strip())
                text += [f"``{term}``", f"    {says}"] if term else [f"    {says}"]
        else:
            text += plain
        text.append("")
    lines[:] = text


def leave_to_the_first_page(app, what, name, obj, skip, options):
    """What is a public name is described once, where those are."""
    public = name in jaxvae.__all__ and getattr(jaxvae, name) is obj
    return skip or (public and app.env.docname == "docs/modules")


def write_math(self, node):
    """As MathML, which browsers show by themselves: the site needs no network."""
    kind = "block" if node.tagname == "math_block" else "inline"
    math = tex2mathml(node.astext(), as_block=kind == "block")
    # "log p", with the space of TeX.
    self.body.append(math.replace("<mo>&ApplyFunction;</mo>", '<mspace width="0.17em"/>'))
    raise nodes.SkipNode


def lead_back(app, pagename, templatename, context, doctree):
    """From a module's source to its names; viewcode takes all for public if one is."""
    if pagename.startswith("_modules/jaxvae/"):
        module = pagename.removeprefix("_modules/").replace("/", ".")
        there = rf"(/modules\.html#)(?:{re.escape(module)}|jaxvae)\."
        context["body"] = re.sub(there, rf"\1{module}.", context["body"])


def copy_start_page(app, exception):
    if exception is None and app.builder.name == "html":
        shutil.copy(Path(app.outdir) / "README.html", Path(app.outdir) / "index.html")


def setup(app):
    app.connect("source-read", adapt)
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)
    app.connect("autodoc-skip-member", leave_to_the_first_page)
    app.connect("build-finished", copy_start_page)
    app.connect("html-page-context", lead_back)
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    return {"parallel_read_safe": True}
