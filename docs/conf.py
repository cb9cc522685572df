"""Sphinx: the guides of this folder, and the reference out of docstrings. Build: python -m sphinx -W docs site."""

import importlib.metadata

project = "metalr"
version = release = importlib.metadata.version("metalr")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"metalr {release}"
default_role = "code"
exclude_patterns = ["site"]
suppress_warnings = ["myst.xref_missing", "myst.header"]  # links to files of the repository that are no pages
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_use_ivar = True
napoleon_numpy_docstring = False
myst_heading_anchors = 3
