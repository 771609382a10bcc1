"""`eval.modes`: what models learned of a distribution that is known; one file a table."""
