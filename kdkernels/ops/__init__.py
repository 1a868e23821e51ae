"""The public operators ``torch.ops.kdkernels.*``: schema, fake, autograd and backend table, one file per operator."""

from kdkernels.ops import dense, linear, sparse

__all__ = ["dense", "linear", "sparse"]
