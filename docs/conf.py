"""Sphinx configuration: the site of README, docs, experiments and docstrings (`make docs`)."""

import os
import re
import shutil
from pathlib import Path
from pkgutil import resolve_name

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import jaxvae
from jaxvae.cli.commands import _COMMANDS
from jaxvae.cli.parser import make_parser

project = "jaxvae"
author = "the authors of jaxvae"
copyright = author
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]

# The source is the whole repository, so that relative links between files work on the site too.
root_doc = "README"
include_patterns = [
    "README.md",
    "README.ko.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/*.md",
    "docs/*.ipynb",
    "docs/api/*.md",
    "experiments/*/README.md",
    "experiments/speed/results/*.md",
]
exclude_patterns = [".*", "build", "runs"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks contain their outputs
highlight_language = "none"  # the default: commands and equations

default_role = "code"
napoleon_use_ivar = True  # autodoc also documents what "Attributes" lists
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True

smartquotes_action = "D"  # dashes, but not quotes
html_theme = "furo"
html_title = "jaxvae"
html_static_path = ["_static"]
html_css_files = ["dark.css"]
html_math_renderer = "mathml"

CONTENTS = """
```{toctree}
:hidden:
:caption: Start

docs/install
docs/tutorial
README.ko
docs/tutorial.ko
```
```{toctree}
:hidden:
:caption: Guides

docs/howto
docs/choosing
docs/models
docs/use
docs/tables
docs/counts
docs/outliers
docs/gallery
docs/monitoring
docs/export
docs/sharing
docs/compression
docs/scale
docs/speed
docs/reliability
docs/faq
```
```{toctree}
:hidden:
:caption: Reference

docs/api
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
    """Add contents to README, help to commands, titles to results; remove links to folders."""
    if "/results/" in name:
        source[0] = f"# Speed: {Path(name).name.replace('_', ' ')}\n\n{source[0]}"
    source[0] = re.sub(r"\[([^]]*)\]\(results\)", r"\1", source[0])
    if name == root_doc:
        source[0] += CONTENTS
    if name == "docs/api/commands":
        os.environ["COLUMNS"] = "90"  # the width of the help
        (commands,) = make_parser(_COMMANDS)._subparsers._group_actions
        for command, parser in commands.choices.items():
            source[0] += f"\n## jaxvae {command}\n\n```\n{parser.format_help()}```\n"


def as_restructured_text(app, what, name, obj, options, lines):
    """Convert plain-text docstrings: blocks indented by four are equations; escape * and |."""
    text = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
        if paragraph.startswith("    "):
            text += ["::", "", *paragraph.splitlines(), ""]
            continue
        parts = re.split("(`[^`]*`)", paragraph)  # code is at the odd indices
        parts[::2] = [re.sub(r"([*|\\]|_(?!\w))", r"\\\1", part) for part in parts[::2]]
        plain = "".join(parts).splitlines()
        if plain and all(re.match(r"[a-z]\w*(, [a-z]\w*)*: |  ", line) for line in plain):
            # "name: description", with continuation lines indented by two: a definition list.
            for line in plain:
                term, _, says = line.partition(": ") if line[0] != " " else ("", "", line.strip())
                text += [f"``{term}``", f"    {says}"] if term else [f"    {says}"]
        else:
            text += plain
        text.append("")
    lines[:] = text


def short(types):
    """Shorten the types of arrays: `Array`, and `ArrayLike` for the union that it stands for."""
    types = re.sub(r"(jax\.)?jaxlib\._jax\.Array", "Array", types)
    numbers = r"(?: \| (?:~?numpy\.number|float))*"
    union = rf"(\w+)\[Array, (.*?)\] \| ~?(?:jaxtyping\.)?\1\[ndarray, \2\]{numbers}"
    return re.sub(union, r"\1[ArrayLike, \2]", types)


def shorten_signature(app, what, name, obj, options, signature, returns):
    """Shorten the types of arrays in a signature."""
    return signature and short(signature), returns and short(returns)


def escape_shapes(app, what, name, obj, options, lines):
    """Shorten the types of attributes, and escape the asterisk of shapes like "*batch latent"."""
    lines[:] = [short(x).replace("*", r"\*") if x.startswith(":vartype") else x for x in lines]


def skip_repeated(app, what, name, obj, skip, options):
    """Describe public names once, as `jaxvae.NAME`, and fields of a NamedTuple in its docstring."""
    public = name in jaxvae.__all__ and getattr(jaxvae, name) is obj
    return skip or public or type(obj).__name__ == "_tuplegetter"


def write_math(self, node):
    """Write math as MathML, which browsers render natively: the site needs no network."""
    kind = "block" if node.tagname == "math_block" else "inline"
    math = tex2mathml(node.astext(), as_block=kind == "block")
    # "log p" with TeX's thin space.
    self.body.append(math.replace("<mo>&ApplyFunction;</mo>", '<mspace width="0.17em"/>'))
    raise nodes.SkipNode


def link_sources_back(app, pagename, templatename, context, doctree):
    """Link source code to the names it is documented by; viewcode takes one prefix for a module."""
    if pagename.startswith("_modules/jaxvae/"):
        module = pagename.removeprefix("_modules/").replace("/", ".")
        prefixes = (module, module.rpartition(".")[0], "jaxvae")
        documented = app.env.get_domain("py").objects

        def target(link):
            names = [f"{prefix}.{link[2]}" for prefix in reversed(prefixes)]
            here = resolve_name(names[-1])
            return link[1] + next(n for n in names if n in documented and resolve_name(n) == here)

        there = rf"(\.html#)(?:{'|'.join(map(re.escape, prefixes))})\.([\w.]+)"
        context["body"] = re.sub(there, target, context["body"])


def copy_start_page(app, exception):
    """Copy README.html to index.html."""
    if exception is None and app.builder.name == "html":
        shutil.copy(Path(app.outdir) / "README.html", Path(app.outdir) / "index.html")


def setup(app):
    app.connect("source-read", adapt)
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)
    app.connect("autodoc-process-docstring", escape_shapes, priority=600)  # after napoleon
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-skip-member", skip_repeated)
    app.connect("build-finished", copy_start_page)
    app.connect("html-page-context", link_sources_back)
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    return {"parallel_read_safe": True}
