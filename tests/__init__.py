"""The tests of graphopt."""
