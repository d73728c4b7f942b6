"""Files: written atomically, verified by digests, and read without executing code in them."""
