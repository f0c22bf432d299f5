"""ReVision on Ray: close the modality gap, train multimodal LLMs from unpaired text (arXiv 2602.07026)."""

__version__ = "0.1.0"
