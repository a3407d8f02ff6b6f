"""Puts the extensions onto an untouched checkout of upstream's LLaVA, checked and reversibly.

    python -m moe_patch apply LLAVA_DIR

`extensions.py` lists what belongs to an extension: files and edits. `syntax.py` finds the places of the edits,
`edits.py` makes them, `sources.py` prepares the files, `checkout.py` reads and writes the user's folder, `commit.py`
reads what git has of it, `plan.py` says what would change, `operations.py` changes it, `manifest.py` remembers it and
`recovery.py` does without that memory. `payload/` contains the code that runs in the checkout. All but the payload
needs Python 3.10 and its standard library alone.
"""
