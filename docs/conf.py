"""The site. Build it from the repository's root: ``sphinx-build -W --keep-going -c docs . outputs/site``.

The source folder is the root, so that a link between two Markdown files works on the site as it does in the repository.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]  # the package of this checkout, and the extensions

from lightning_gif import __version__  # noqa: E402

project = "lightning-gif"
version = release = __version__

extensions = [
    "gallery",
    "mathml",
    "offline",
    "public_names",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]

root_doc = "docs/index"
include_patterns = ["docs/**", "benchmarks/README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
exclude_patterns = [".venv", "outputs", "**/__pycache__", "docs/_*"]
smartquotes = False  # messages and code are shown with the quotes that they have
nitpicky = True  # a reference to nothing is a warning
nitpick_ignore = [  # names in annotations that the package imports for type checkers only
    *(("py:class", name) for name in ("Axes", "DataLoader", "Figure", "Tensor", "Trainer", "nn.Module")),
    ("py:attr", "trials"),  # set in __init__
    *(("py:class", name) for name in ("Grouping", "Overrides", "Retrain", "TargetsChoice")),
]
nitpick_ignore_regex = [("py:class", r".*\[.*")]  # parts of nested annotations

myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3
myst_dmath_double_inline = True
html_math_renderer = "mathml"

nb_execution_mode = "auto"  # notebooks are stored without outputs, so they run in each build
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

autodoc_typehints = "signature"
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"  # system fonts, and no script or style from elsewhere
html_title = f"lightning-gif {release}"
html_extra_path = ["_root"]  # the start of the site
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False
