"""Measurements that anyone can run again; results are committed with the command that made them.

Those that train in this process import the checkout as `personalize`, whatever its folder's name.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Checkout:
    """Find `personalize` at the root of the checkout."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "personalize":
            return None
        return importlib.util.spec_from_file_location(
            name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )


if importlib.util.find_spec("personalize") is None:
    sys.meta_path.append(Checkout)  # type: ignore[arg-type]
