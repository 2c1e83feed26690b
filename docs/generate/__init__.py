"""What the documentation says that the sources know better: pages of passes and of the API, messages, a picture.

``mkdocs build`` runs these through `hooks`. Nothing here imports graphopt (or torch): sources are read, not run.
"""
