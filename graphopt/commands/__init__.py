"""What the command ``graphopt`` does, one command a file; `graphopt.cli` puts them together."""
