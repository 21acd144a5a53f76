"""Programs that carry checkpoints between ecosystems."""
