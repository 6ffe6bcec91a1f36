"""The mini world: synthetic images and questions on which the whole method trains and is evaluated in CPU minutes."""
