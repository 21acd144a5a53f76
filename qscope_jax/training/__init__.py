"""Everything with a gradient, the one loop that runs it, and the one checkpoint that resumes it."""
