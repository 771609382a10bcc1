"""`eval.speed`: what things cost beside what they compete with; one file a table."""
