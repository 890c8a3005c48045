"""Runnable examples: the demo tasks, their tokenizer and the training script."""
