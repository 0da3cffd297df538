"""CUDA kernels, compiled when first used, each beside its plain-jnp twin; README.md has their rules."""
