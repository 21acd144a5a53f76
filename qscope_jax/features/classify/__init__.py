"""Rules over features that tell classes of texts apart, beside baselines."""
