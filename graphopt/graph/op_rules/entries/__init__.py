"""The entries of the table of operator rules, a file a subject: a line for each operator, or for a few of one rule."""
