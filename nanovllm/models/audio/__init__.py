"""Audio encoders ("towers"): mel features to embeddings of a text model."""
