"""Which experts act for a token, and how much: by the router, by a task, or as a call asks.

`acting.py` is what the layer calls; `rule.py` chooses among the router's probabilities, `tasks.py` holds the weights
of tasks, `given.py` what a call asks for and `calls.py` how it asks; `from_loras.py` makes experts of LoRA adapters,
`ablation.py` compares experts by the loss with each of them.
"""
