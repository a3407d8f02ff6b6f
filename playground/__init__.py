"""The embedded default: pictures, questions, a tokenizer and a small LLaVA, all made on the spot from one seed.

Nothing here is downloaded. `python -m playground.generate` builds it, `python -m playground.demo` fine-tunes it.
The package only calls `llava` and its extensions; it holds none of their logic.
"""

import os

# Two threads on a machine that does other work as well: by default they wait for each other in busy loops, which made
# a step 15 to 30 times slower. Read once, when torch is loaded; a value that is set already is kept.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
