"""Settings of Sphinx for the API reference, which `make docs` writes to out/api."""

from importlib import metadata

project = "mnp_fast"
release = metadata.version("mnp_fast")
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "alabaster"
html_show_copyright = False
default_role = "py:obj"
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
