"""The network, in the paper's order: image model D, class maps M, language model L, the blend of their gradients."""
