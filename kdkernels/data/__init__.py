"""Text to batches: documents by domain, packed blocks, a held-out split, an order that resumes from one integer."""

from kdkernels.data.corpus import BlockOrder, Corpus, batch_of, counted, load_corpus
from kdkernels.data.documents import find_domains, read_documents
from kdkernels.data.packing import Blocks, pack, split, tokenise

__all__ = [
    "BlockOrder",
    "Blocks",
    "Corpus",
    "batch_of",
    "counted",
    "find_domains",
    "load_corpus",
    "pack",
    "read_documents",
    "split",
    "tokenise",
]
