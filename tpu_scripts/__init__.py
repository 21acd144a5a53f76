"""Programs that plan and run work on TPU pods."""
