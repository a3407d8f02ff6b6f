"""Scores that no upstream program has under its own name, and the files that benchmark servers want."""
