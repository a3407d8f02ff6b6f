"""Soft accuracy of VQA benchmarks (original `llava/dynamic_eval/m4c_evaluator.py`)."""

from llava.eval.m4c_evaluator import (
    EvalAIAnswerProcessor,
    STVQAAccuracyEvaluator,
    STVQAANLSEvaluator,
    TextCapsBleu4Evaluator,
    TextVQAAccuracyEvaluator,
)

__all__ = [
    "EvalAIAnswerProcessor",
    "STVQAANLSEvaluator",
    "STVQAAccuracyEvaluator",
    "TextCapsBleu4Evaluator",
    "TextVQAAccuracyEvaluator",
]
