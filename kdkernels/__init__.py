"""kdkernels: fused kernels for language-model distillation."""
