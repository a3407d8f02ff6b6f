"""The launch scripts for an installed wheel: `python -m llava.scripts DIR` writes `DIR/scripts` and `DIR/run`.

In a clone they are the top-level folders `scripts/` and `run/`; building a wheel copies them next to this file
(`setup.py`). `files.py` says which files these are, `__main__.py` is the program.
"""
