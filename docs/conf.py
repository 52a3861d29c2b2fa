"""Sphinx configuration for `make docs`. The code in the lesson's pages runs in every build."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import omninorm

# Run cells without the user's IPython settings, and without IPython's own log output.
_profile = Path(__file__).parent / "_build" / "ipython" / "profile_default"
_profile.mkdir(parents=True, exist_ok=True)
(_profile / "ipython_kernel_config.py").write_text("get_config().Application.log_level = 40\n", encoding="utf-8")
os.environ["OMNINORM_BUILDS_DOCS"] = "1"  # compare the lesson's numbers with the recorded ones
os.environ["IPYTHONDIR"] = str(_profile.parent)
logging.getLogger("traitlets").setLevel(logging.WARNING)

project = "omninorm"
author = "The omninorm authors"
version = release = omninorm.__version__
copyright = author  # no year, so that builds are reproducible

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]

# Pages are Markdown, and headings have anchors as on GitHub.
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

# A failing cell fails the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 300
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Class attributes", "params_style"), ("Shape", "params_style"), ("Source", "params_style")]

html_theme = "furo"
html_title = f"omninorm {version}"
html_static_path = ["_static"]
html_css_files = ["omninorm.css"]
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
