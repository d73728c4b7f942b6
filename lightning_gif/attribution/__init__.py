"""From a query to a score for every training example, and what a user sees of it."""
