"""Interfaces to a trained model: HTTP server, web page and terminal chat."""
