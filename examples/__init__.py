"""Runnable examples: the demonstration tasks, their tokenizer and the training script."""
