"""Answering with a trained model, and reporting what was measured."""
