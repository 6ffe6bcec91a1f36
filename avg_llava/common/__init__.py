"""Foundations: atomic files and hashes, JSON lines, worker processes, machine facts, settings, terminal tables."""
