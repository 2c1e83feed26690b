"""What the documentation says that the sources know better: pages of passes, of the API, messages, the picture of floors.

``mkdocs build`` runs these through `hooks`. Nothing here imports graphopt (or torch): sources are read, not run.
"""
