"""The demo: a small shipped model of Python source text, compressed to 2 bits in minutes."""
