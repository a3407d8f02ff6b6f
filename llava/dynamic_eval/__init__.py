"""Evaluation of sparse models under the module names of Dynamic-LLaVA.

A sparse checkpoint is loaded like any other, so each program is that of `llava.eval` under another name.
"""
