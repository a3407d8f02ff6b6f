"""Looking at data and adapters: clusters of instructions, and how the A and B of several adapters differ.

`features.py` and `clusters.py` serve `python -m hydralora.components`; `adapters.py`, `similarity.py` and `figures.py`
serve `python -m hydralora.analysis`.
"""
