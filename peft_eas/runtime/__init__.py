"""What merged models need at run time: flat files that import torch, transformers and one another, and travel with each
checkpoint."""
