"""LLaVA-1.5 for today's torch and transformers, with seams for extensions.

Public names, module paths, command lines and file formats are those of upstream LLaVA; the code is our own.
`docs/architecture.md` is the map of the package.
"""

from llava.runtime.foreign_lines import drop_foreign_lines

__version__ = "0.1.0"

drop_foreign_lines()
