"""Ways to use a trained model: files of questions, the terminal, a server, a web page."""
