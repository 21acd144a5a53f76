"""Whatever continues prompts behind one signature: the local model, or an endpoint."""
