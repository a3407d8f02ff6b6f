"""Training-free reduction of image tokens: rules under one seam, with one budget.

`rule.py` is the seam, `plan.py` reads a plan from text, `extension.py` carries it out; each rule has a file.
"""

from dynamic.rules.attach import Handle, attach, reduced

__all__ = ["Handle", "attach", "reduced"]
