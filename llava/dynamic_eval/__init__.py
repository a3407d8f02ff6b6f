"""The evaluation programs of Dynamic-LLaVA under their original names; all work is done in `llava.eval`."""
