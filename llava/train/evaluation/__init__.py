"""Evaluation in the middle of a training run: losses on other rows, answers to questions, and their scores."""
