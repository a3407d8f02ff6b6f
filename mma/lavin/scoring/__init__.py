"""Scores as the original computes them: ScienceQA by subject, context and grade; MME by subset."""
