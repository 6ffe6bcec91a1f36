"""Answering questions: requests, budgets, batched and routed generation, conversations, files of questions."""
