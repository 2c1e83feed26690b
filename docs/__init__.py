"""The pages of the documentation; `docs.generate` holds what is made from the sources."""
