"""Experiments, a folder each: a question, the command that answers it, and what came out."""
