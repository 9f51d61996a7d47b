"""How Sphinx builds the site: `sphinx-build -n -W --keep-going docs build/site`.

The notebooks are copied from their own folder, with the outputs that are stored in them. MathJax is
part of the site, so that it needs no network, neither while it is built nor while it is read.
"""

import re
import shutil
from pathlib import Path

from docutils import nodes

import softmax_jax

project = "softmax_jax"
copyright = "the softmax_jax authors"
version = release = softmax_jax.__version__

extensions = [
  "myst_nb",
  "sphinx.ext.autodoc",
  "sphinx.ext.autosummary",
  "sphinx.ext.mathjax",
  "sphinx.ext.napoleon",
  "sphinx.ext.viewcode",
  "sphinx-mathjax-offline",
  "sphinx_copybutton",
]
exclude_patterns = ["_templates"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = "softmax_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_show_sourcelink = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
copybutton_exclude = ".linenos, .gp, .go"  # prompts and outputs

# In the docstrings `name` is a link where this reference or another below has the name, and plain
# code elsewhere.
default_role = "autolink"
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!softmax_jax).*")]  # names of other libraries
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the text says shapes and dtypes, which types of arrays do not
autodoc_inherit_docstrings = False
autosummary_generate = True
autosummary_imported_members = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = False  # it would name a private module of jaxlib

# Where other libraries document the names that the docstrings use. An inventory of theirs would be
# fetched while the site is built.
JAX, OPTAX = "https://docs.jax.dev/en/latest/", "https://optax.readthedocs.io/en/latest/"
OTHERS = {
  r"jax\.(nn|export)": JAX + "{}.html",
  r"jax\.(custom_vjp|jit|shard_map|nn\.\w+)": JAX + "_autosummary/{0}.html#{0}",
  r"jax\.sharding\.\w+": JAX + "jax.sharding.html#{}",
  r"optax\.losses": OPTAX + "api/losses.html",
  r"optax\.losses\.\w+": OPTAX + "api/losses.html#{}",
}


def link_to_others(app, env, node, content):
  """The link to a name of another library, or None."""
  name = node["reftarget"]
  for pattern, page in OTHERS.items():
    if re.fullmatch(pattern, name):
      return nodes.reference("", "", content, refuri=page.format(name), internal=False)
  return None


def copy_notebooks(app):
  """Puts the notebooks where Sphinx looks for pages."""
  folder = Path(app.srcdir) / "notebooks"
  folder.mkdir(exist_ok=True)
  for path in Path(app.srcdir).parent.glob("notebooks/*.ipynb"):
    copy = folder / path.name
    if not copy.exists() or copy.read_bytes() != path.read_bytes():  # a new copy is built anew
      shutil.copy(path, copy)


def setup(app):
  """Called by Sphinx."""
  app.connect("builder-inited", copy_notebooks, priority=0)
  app.connect("missing-reference", link_to_others)
