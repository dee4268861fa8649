"""Action-conditioned visual world models on the Conditional Diffusion Transformer (CDiT)."""
