"""Lossless compression of images by a trained model."""

from jaxvae.compression.codec import compress, decompress, header_of
from jaxvae.compression.container import Header, is_compressed

__all__ = ["Header", "compress", "decompress", "header_of", "is_compressed"]
