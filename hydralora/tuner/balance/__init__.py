"""Losses on the routing, which act on the routers whatever trains the model.

`losses.py` holds their forms, `pooled.py` the original's over all layers, `terms.py` what a configuration asks for,
`auxiliary.py` how their gradient is attached, by `eager.py` or `compiled.py`, `trainer.py` what trainers say about an
update.
"""
