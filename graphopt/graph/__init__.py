"""The graph of a training step: capture, operator rules, axes, sizes, drafts, lowering to a callable, files."""
