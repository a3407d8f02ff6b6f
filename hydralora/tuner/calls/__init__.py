"""What a call of a model says about its tokens: its prompt, its padding, its packed texts, its rows.

`inputs.py` reads the arguments of a forward pass, `generation.py` those of `generate`, `packing.py` where texts begin,
`notes.py` makes the note that the layers read. `rows.py` hands adapters to rows, `checkpoints.py` notes to what is
recomputed.
"""
