"""One table of transformers' `TrainingArguments`: which options are supported, which have no effect, which are refused.

`optimization.py`, `machine.py` and `results.py` have its rows, `table.py` merges them, `check.py` applies it to a run
before anything is loaded, `listing.py` and `document.py` show it. Every training program has a table made of this one;
`lengths.py`, `noise.py` and `smoothing.py` are what supports options that transformers does not support for a LLaVA.
"""
