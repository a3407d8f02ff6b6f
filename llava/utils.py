"""Helpers of programs under upstream's name (upstream `llava/utils.py`); they are in `llava.runtime`."""

from llava.runtime.files import read_json
from llava.runtime.program import errors_only, package_versions, run_program

__all__ = ["errors_only", "package_versions", "read_json", "run_program"]
