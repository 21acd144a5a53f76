"""DAPO (arXiv 2503.14476): group-relative policy gradients from sampled answers and their rewards, some of the answers steered on purpose."""
