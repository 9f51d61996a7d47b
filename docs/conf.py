"""How Sphinx builds the API reference from the docstrings: see index.rst for the command."""

import softmax_jax

project = "softmax_jax"
copyright = "the softmax_jax authors"
version = release = softmax_jax.__version__

extensions = [
  "sphinx.ext.autodoc",
  "sphinx.ext.autosummary",
  "sphinx.ext.mathjax",
  "sphinx.ext.napoleon",
]
html_theme = "alabaster"
html_theme_options = {
  "description": "Softmax and its losses for JAX, gradients by hand",
  "page_width": "1250px",  # lines of code of 100 characters
  "body_max_width": "none",
  "sidebar_width": "300px",
}
html_show_sourcelink = False

# In the docstrings `name` is a link where this reference has the name, and plain code elsewhere.
default_role = "autolink"
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!softmax_jax).*")]  # names of other libraries
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the text says shapes and dtypes, which types of arrays do not
autodoc_inherit_docstrings = False
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_attr_annotations = False  # it would name a private module of jaxlib
