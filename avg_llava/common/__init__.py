"""Foundations that know nothing of models: files, hashes, settings, worker processes, the machine."""
